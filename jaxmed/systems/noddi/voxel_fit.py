"""The fit of a batch of voxels, as functions that jax transforms: tensor, grid, Levenberg-Marquardt, flags.

`fitting.py` is the driver that takes a scan through them chunk by chunk.

Sources: the three steps follow cuDIMOT (Hernandez-Fernandez et al., NeuroImage 2019): a tensor for the direction, a
grid, then Levenberg-Marquardt, here for many voxels at once and on the exact Rician likelihood (`likelihood.py`).

Deviation: parameters keep their own scale and are held at their bounds, where cuDIMOT and the older toolboxes put
them through a sigmoid: the signal is nearly linear in them, so fewer steps are needed, and a value on a bound says so.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmed.physics.microstructure import MicrostructureModel
from jaxmed.solvers.least_squares import lm_init, lm_run, solve_positive
from jaxmed.systems.noddi.chunks import Climb, Voxels
from jaxmed.systems.noddi.derivatives import Forward, Point, model_forward, noddi_forward, tangent_frame
from jaxmed.systems.noddi.estimates import FLAGS, Estimates, Maps, name_maps
from jaxmed.systems.noddi.likelihood import describe_optimum, make_surface
from jaxmed.systems.noddi.options import SIGMA_FLOOR, FitConfig, Noise
from jaxmed.systems.noddi.protocol import Protocol
from jaxmed.systems.noddi.start import fit_tensor, search_grid, search_model

STEPS = 7
"""Iterations between looks at who is done, the first of which evaluates the start: half of all voxels need no more."""
MAX_RELATIVE = 10.0
"""Largest signal relative to the unweighted one: beyond, a voxel holds no diffusion signal, and squares overflow."""
MISFIT = 3.0
"""Root mean squared residual over the noise above which a model does not make the signal."""
UNKNOWN = 12**-0.5
"""Standard deviation of a uniform draw, as a share of its range: an error that says nothing."""
WET = 0.9
"""Free water fraction above which there is too little tissue to describe."""
WIDEST_CONE = 45.0
DETECTED = 2.0
"""Standard errors that ndi must exceed, or there may be no neurites to have a direction: noise alone makes some."""


def fit_voxels(
    protocol: Protocol,
    signals: Float[Array | np.ndarray, "*voxel image"],
    sigma: Float[Array | np.ndarray, "*#voxel"] | float | None = None,
    gradient_map: Float[Array | np.ndarray, "*voxel 3 3"] | None = None,
    *,
    config: FitConfig = FitConfig(),
) -> Maps:
    """Estimate NODDI parameters of a few voxels: what `fit` does, as a function that jit, vmap and grad go through.

    Nothing is checked: `protocol` comes from `prepare`, whose table has passed `check_gradients`. All voxels climb
    until the last is done, so give thousands at most. Derivatives are those of the maximum itself (by the implicit
    function theorem, with the exact second derivatives of the likelihood), not of the steps that led there; a parameter
    on a bound stays there.

    Args:
        protocol: Tables of the gradient table; made outside of jit, with `varies=True` for a gradient map.
        signals: Magnitudes.
        sigma: Noise of each channel; None minimises squares.
        gradient_map: See `fit`.
        config: Model constants and tolerances; static.
    """
    shape = signals.shape[:-1]
    noise: Noise = "gaussian" if sigma is None else "rician"
    level = jnp.broadcast_to(jnp.asarray(0.0 if sigma is None else sigma, jnp.float32), shape).reshape(-1)
    voxels = Voxels(
        jnp.asarray(signals, jnp.float32).reshape(-1, signals.shape[-1]),
        level,
        None if gradient_map is None else jnp.asarray(gradient_map, jnp.float32).reshape(-1, 3, 3),
    )
    state = jax.lax.stop_gradient(_climb_twice(protocol, noise, config, jax.lax.stop_gradient(voxels)))
    point = _differentiable(protocol, noise, config, voxels, state)
    rows = finish(protocol, noise, config, voxels, state._replace(state=state.state._replace(point=point)))
    return name_maps(jax.tree.map(lambda row: jnp.moveaxis(row, -1, 0).reshape(*shape, *row.shape[:-1]), rows))


def _climb_twice(protocol: Protocol, noise: Noise, config: FitConfig, voxels: Voxels) -> Climb:
    """Climb from the best cell of the grid and from its other valley at once, and keep the better end."""
    first = begin(protocol, noise, config, voxels)
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), voxels)
    surface = _open(protocol, noise, config, twice)[-1]
    starts = jax.tree.map(lambda one, other: jnp.concatenate([one, other], axis=-1), first.state.point, first.other)
    state = lm_init(surface, starts, config.damping)
    state = state._replace(done=jnp.concatenate([first.state.done, ~first.tries_other]))
    ends = lm_run(surface, state, config.cost_tolerance, config.max_iterations)
    one, other = (jax.tree.map(lambda leaf, half=half: jnp.split(leaf, 2, axis=-1)[half], ends) for half in (0, 1))
    wins = first.tries_other & (other.at.cost < one.at.cost)
    return first._replace(state=jax.tree.map(lambda mine, theirs: jnp.where(wins, theirs, mine), one, other))


def _differentiable(protocol: Protocol, noise: Noise, config: FitConfig, voxels: Voxels, climb: Climb) -> Point:
    """Return the maximum with the derivatives of its equation, gradient = 0, by the data."""
    surface = _open(protocol, noise, config, voxels)[-1]
    point = climb.state.point
    zero = jnp.zeros((len(point.values) + 2, point.values.shape[1]))

    def slope(update):
        there, _ = fixed.move(point, update)
        return fixed.evaluate(there).gradient

    fixed = _open(protocol, noise, config, jax.lax.stop_gradient(voxels))[-1]
    columns = [jax.jvp(slope, (zero,), (zero.at[index].set(1.0),))[1] for index in range(len(zero))]
    held = fixed.blocked(point, slope(zero))
    free = ~held
    curvature = jnp.where(free[:, None] & free[None], jnp.stack(columns, axis=1), 0.0)
    curvature = curvature + jnp.eye(len(zero))[:, :, None] * held
    step = -solve_positive(jax.lax.stop_gradient(curvature), jnp.where(free, surface.evaluate(point).gradient, 0.0))
    step = jnp.where(jnp.isfinite(step), step, 0.0)
    step = step - jax.lax.stop_gradient(step)  # the value stays, its derivative is kept
    first, second = tangent_frame(point.direction)
    turned = point.direction + step[-2] * first + step[-1] * second
    return Point(point.values + step[:-2], turned / jnp.sqrt(jnp.sum(turned**2, axis=0)))


class _Data(NamedTuple):
    """A chunk relative to S0, measurement x voxel."""

    everything: Array
    rows: Array
    s0: Array
    precision: Array
    finite: Array
    fitted: Array


def _normalise(protocol: Protocol, noise: Noise, forward: Forward, voxels: Voxels) -> _Data:
    magnitudes = voxels.signals.T
    finite = jnp.all(jnp.isfinite(magnitudes), axis=0)
    magnitudes = jnp.where(finite, magnitudes, 0.0)
    s0 = protocol.is_b0 @ magnitudes
    safe_s0 = jnp.where(s0 > 0, s0, 1.0)
    relative = magnitudes / safe_s0
    fitted = (s0 > 0) & (jnp.max(jnp.abs(relative), axis=0) <= MAX_RELATIVE)
    everything = jnp.where(fitted, relative, 1.0)
    sigma = jnp.maximum(voxels.sigma / safe_s0, SIGMA_FLOOR)
    precision = 1 / sigma**2 if noise == "rician" else jnp.ones_like(s0)
    return _Data(everything, everything[forward.rows], s0, precision, finite, fitted)


def _open(protocol, noise, config, voxels):
    """Return the forward model, the data and the surface of a chunk."""
    model = config.build_model()
    if config.model == "noddi":
        gradient_map = None if voxels.gradient_map is None else jnp.moveaxis(voxels.gradient_map, 0, -1)
        forward = noddi_forward(protocol, model, config, gradient_map)
    else:
        forward = model_forward(protocol, model, config)
    data = _normalise(protocol, noise, forward, voxels)
    return model, forward, data, make_surface(forward, noise, data.rows, data.precision)


# Jitted here, so that repeated calls of `fit` compile once.
@functools.partial(jax.jit, static_argnums=(1, 2))
def begin(protocol: Protocol, noise: Noise, config: FitConfig, voxels: Voxels) -> Climb:
    """Return climbs at their start, and the second start of each where it is worth one."""
    model, _, data, surface = _open(protocol, noise, config, voxels)
    tensor = fit_tensor(protocol, data.everything)
    weighted = data.everything[protocol.order]
    if config.model == "noddi":
        starts = search_grid(protocol, config, weighted, tensor.direction)
    else:
        starts = search_model(protocol, model, config, weighted, tensor.direction)
    state = lm_init(surface, starts.best, config.damping)
    state = state._replace(done=~data.fitted)
    margin = config.restart_margin * starts.squares
    summary = jnp.stack([tensor.mean_diffusivity, tensor.fractional_anisotropy])
    return Climb(state, starts.other, data.fitted & (starts.gap < margin), summary)


@functools.partial(jax.jit, static_argnums=(1, 2))
def advance(protocol: Protocol, noise: Noise, config: FitConfig, voxels: Voxels, climb: Climb) -> Climb:
    """Take up to `STEPS` steps in every climb that is not done."""
    surface = _open(protocol, noise, config, voxels)[-1]
    return climb._replace(state=lm_run(surface, climb.state, config.cost_tolerance, STEPS))


@functools.partial(jax.jit, static_argnums=(1, 2))
def finish(protocol: Protocol, noise: Noise, config: FitConfig, voxels: Voxels, climb: Climb) -> Estimates:
    """Return what is said of each voxel, voxel last."""
    model, forward, data, _ = _open(protocol, noise, config, voxels)
    point, number = climb.state.point, len(model.parameters)
    known = data.precision if noise == "rician" else None
    optimum = describe_optimum(forward, noise, data.rows, known, point)
    # S0 over the mean of what counts as unweighted, which has fallen a little where its b-values are not 0.
    s0 = point.values[-1] if config.s0 == "free" else 1 / forward.unweighted(point)
    settled = climb.state.done & jnp.isfinite(climb.state.at.cost)
    flags = _flags(model, settled, optimum, point.values)
    flags += jnp.where(_misfits(protocol, data, known, optimum.residual, len(forward.names) + 2), FLAGS["misfit"], 0)
    rows: dict[str, Any] = dict(
        values=point.values[:number],
        errors=optimum.errors[:number],
        direction=point.direction,
        direction_error=optimum.direction_error,
        s0=data.s0 * s0,
        residual=optimum.residual / s0,
        mean_diffusivity=climb.tensor[0],
        fractional_anisotropy=climb.tensor[1],
        iterations=climb.state.iterations.astype(jnp.int32),
        flags=flags,
        fitted=data.fitted,
    )
    for name, row in rows.items():
        rows[name] = jnp.where(data.fitted, row, jnp.zeros_like(row))
    refused = jnp.where(data.finite, FLAGS["no_signal"], FLAGS["not_finite"])
    rows["flags"] = jnp.where(data.fitted, rows["flags"], refused).astype(jnp.uint8)
    return Estimates(**rows)


def _misfits(protocol: Protocol, data: _Data, precision: Array | None, residual: Array, unknowns: int) -> Array:
    """Return where a residual is far above the noise: the noise that is known, or what no smooth signal explains."""
    if precision is None:
        if protocol.smooth is None:
            return jnp.zeros_like(data.fitted)
        measured = data.everything[protocol.order]
        rest = measured - protocol.smooth @ (protocol.smooth.T @ measured)
        variance = jnp.sum(rest**2, axis=0) / (rest.shape[0] - protocol.smooth.shape[1])
        precision = 1 / jnp.maximum(variance, SIGMA_FLOOR**2)
    count = data.rows.shape[0]
    return residual**2 * precision * (count / max(count - unknowns, 1)) > MISFIT**2


def _flags(model: MicrostructureModel, done, optimum, values):
    bits = jnp.where(done, 0, FLAGS["not_converged"])
    bits += jnp.where(optimum.at_bound > 0, FLAGS["at_bound"], 0)
    no_direction = optimum.direction_error > WIDEST_CONE
    if "odi" in model.names:
        value, error = (dict(zip(model.names, part, strict=False)) for part in (values, optimum.errors))
        bare = value["ndi"] < DETECTED * error["ndi"]
        no_direction |= bare
        bits += jnp.where((error["ndi"] > UNKNOWN) | (value["fwf"] > WET), FLAGS["ndi_undefined"], 0)
        bits += jnp.where((error["odi"] > UNKNOWN) | bare, FLAGS["odi_undefined"], 0)
    bits += jnp.where(no_direction, FLAGS["direction_undefined"], 0)
    return bits
