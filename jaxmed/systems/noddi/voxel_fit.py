"""The fit of a batch of voxels, as functions that jax transforms: tensor, grid, Levenberg-Marquardt, flags.

`fitting.py` is the driver that takes a scan through them chunk by chunk.

The initial guess takes its direction from a diffusion tensor and its parameters from a grid. NODDI's grid is a handful
of matrix products: at a known direction every candidate is a short Chebyshev series in u = 2 c^2 - 1, so its squared
distance to the data needs only sums of the data times the polynomials over each shell, and sums of the polynomials: no
candidate is evaluated in any row.

Sources: the three steps follow cuDIMOT (Hernandez-Fernandez et al., NeuroImage 2019): a tensor for the direction, a
grid, then Levenberg-Marquardt, here for many voxels at once and on the exact Rician likelihood (`likelihood.py`).

Deviation: parameters keep their own scale and are held at their bounds, where cuDIMOT and the older toolboxes put
them through a sigmoid: the signal is nearly linear in them, so fewer steps are needed, and a value on a bound says so.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxmed.data.diffusion import Voxels
from jaxmed.objectives.gradient_signals import Forward, Noise, Point, describe_optimum, make_surface
from jaxmed.physics.microstructure import MicrostructureModel, turn
from jaxmed.physics.noddi import WET, kappa_to_odi
from jaxmed.physics.rician import SIGMA_FLOOR
from jaxmed.solvers.ascents import Ascent
from jaxmed.solvers.diffusion_tensor import fit_tensor
from jaxmed.solvers.least_squares import lm_init, lm_run, solve_positive
from jaxmed.systems.noddi.likelihood import model_forward, noddi_forward
from jaxmed.systems.noddi.protocol import GRID_DEGREE, GRID_KAPPA, GRID_NDI, FitConfig, Protocol

FLAGS = {
    "not_converged": 1,
    "at_bound": 2,
    "ndi_undefined": 4,
    "odi_undefined": 8,
    "direction_undefined": 16,
    "no_signal": 32,
    "not_finite": 64,
    "misfit": 128,
}
"""Bits of the flags map."""
FLAG_DEFINITIONS = {
    "not_converged": "the tolerance was not met within the iterations",
    "at_bound": "a parameter lies on a bound of its range",
    "ndi_undefined": "free water fraction above 0.9, or a standard error of ndi as wide as not knowing it",
    "odi_undefined": "a standard error of odi as wide as not knowing it, or ndi below two of its own",
    "direction_undefined": "a cone of uncertainty wider than 45 degrees, or ndi below two of its standard errors",
    "no_signal": "mean unweighted signal not above 0, or another more than ten times as large; not fitted",
    "not_finite": "NaN or Inf in the input; not fitted",
    "misfit": "a residual above three times the noise: the model does not make this signal",
}
MARGIN = 0.02
"""Starts keep this distance from a bound, as a share of the range: at it, some derivatives vanish."""
DOT_START = 0.05
STEPS = 7
"""Iterations between looks at who is done, the first of which evaluates the start: half of all voxels need no more."""
MAX_RELATIVE = 10.0
"""Largest signal relative to the unweighted one: beyond, a voxel holds no diffusion signal, and squares overflow."""
MISFIT = 3.0
"""Root mean squared residual over the noise above which a model does not make the signal."""
UNKNOWN = 12**-0.5
"""Standard deviation of a uniform draw, as a share of its range: an error that says nothing."""
WIDEST_CONE = 45.0
DETECTED = 2.0
"""Standard errors that ndi must exceed, or there may be no neurites to have a direction: noise alone makes some."""


class Estimates(NamedTuple):
    """What a fit of any model returns for each voxel, on the host; zero where a voxel was not fitted.

    Attributes:
        values: Parameters, in the model's order.
        errors: Their standard errors (Laplace), at most the width of their range.
        direction: Fibre direction in the frame of the gradient table, unit length, sign arbitrary.
        direction_error: Root mean square angle of its cone of uncertainty, in degrees.
        s0: Unweighted signal, in the unit of the input: the mean, or fitted.
        residual: Root mean squared residual over the fitted rows divided by s0 (NRMSE).
        mean_diffusivity: Mean diffusivity of the tensor that starts the fit, in um^2/ms.
        fractional_anisotropy: Anisotropy of that tensor.
        iterations: Levenberg-Marquardt iterations of the ascent that won.
        flags: Sum of `FLAGS`.
        fitted: False outside the mask, where the unweighted signal is not positive, and where the input is not finite.
    """

    values: Float[np.ndarray, "*voxel parameter"]
    errors: Float[np.ndarray, "*voxel parameter"]
    direction: Float[np.ndarray, "*voxel 3"]
    direction_error: Float[np.ndarray, "*voxel"]
    s0: Float[np.ndarray, "*voxel"]
    residual: Float[np.ndarray, "*voxel"]
    mean_diffusivity: Float[np.ndarray, "*voxel"]
    fractional_anisotropy: Float[np.ndarray, "*voxel"]
    iterations: Int[np.ndarray, "*voxel"]
    flags: UInt8[np.ndarray, "*voxel"]
    fitted: Bool[np.ndarray, "*voxel"]


class Maps(NamedTuple):
    """NODDI of each voxel by name; what is not described here is as in `Estimates`.

    Attributes:
        ndi: Neurite density index, the intra-cellular share of tissue water; meaningless where fwf is near 1.
        odi: Orientation dispersion index.
        fwf: Free water fraction.
        ndi_error: Standard error of ndi, as those of odi, fwf and dot.
        dot: Fraction of water that does not move; None unless it was fitted.
        converged: Whether a tolerance was met.
        notes: What was repaired in the gradient table, one sentence each.
    """

    ndi: Float[np.ndarray | Array, "*voxel"]
    odi: Float[np.ndarray | Array, "*voxel"]
    fwf: Float[np.ndarray | Array, "*voxel"]
    direction: Float[np.ndarray | Array, "*voxel 3"]
    ndi_error: Float[np.ndarray | Array, "*voxel"]
    odi_error: Float[np.ndarray | Array, "*voxel"]
    fwf_error: Float[np.ndarray | Array, "*voxel"]
    direction_error: Float[np.ndarray | Array, "*voxel"]
    dot: Float[np.ndarray | Array, "*voxel"] | None
    dot_error: Float[np.ndarray | Array, "*voxel"] | None
    s0: Float[np.ndarray | Array, "*voxel"]
    residual: Float[np.ndarray | Array, "*voxel"]
    mean_diffusivity: Float[np.ndarray | Array, "*voxel"]
    fractional_anisotropy: Float[np.ndarray | Array, "*voxel"]
    iterations: Int[np.ndarray | Array, "*voxel"]
    flags: UInt8[np.ndarray | Array, "*voxel"]
    converged: Bool[np.ndarray | Array, "*voxel"]
    fitted: Bool[np.ndarray | Array, "*voxel"]
    notes: tuple[str, ...]


def fit_voxels(
    protocol: Protocol,
    signals: Float[Array | np.ndarray, "*voxel image"],
    sigma: Float[Array | np.ndarray, "*#voxel"] | float | None = None,
    gradient_map: Float[Array | np.ndarray, "*voxel 3 3"] | None = None,
    *,
    config: FitConfig = FitConfig(),
) -> Maps:
    """Estimate NODDI parameters of a few voxels: what `fit` does, as a function that jit, vmap and grad go through.

    Nothing is checked: `protocol` comes from `prepare`, whose table has passed `check_gradients`. All voxels ascend
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
    state = jax.lax.stop_gradient(_ascend_twice(protocol, noise, config, jax.lax.stop_gradient(voxels)))
    point = _differentiable(protocol, noise, config, voxels, state)
    rows = finish(protocol, noise, config, voxels, state._replace(state=state.state._replace(point=point)))
    return name_maps(jax.tree.map(lambda row: jnp.moveaxis(row, -1, 0).reshape(*shape, *row.shape[:-1]), rows))


def _ascend_twice(protocol: Protocol, noise: Noise, config: FitConfig, voxels: Voxels) -> Ascent:
    """Ascend from the best cell of the grid and from its other valley at once, and keep the better end."""
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


def _differentiable(protocol: Protocol, noise: Noise, config: FitConfig, voxels: Voxels, ascent: Ascent) -> Point:
    """Return the maximum with the derivatives of its equation, gradient = 0, by the data."""
    surface = _open(protocol, noise, config, voxels)[-1]
    point = ascent.state.point
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
    return Point(point.values + step[:-2], turn(point.direction, step[-2:]))


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
def begin(protocol: Protocol, noise: Noise, config: FitConfig, voxels: Voxels) -> Ascent:
    """Return ascents at their start, and the second start of each where it is worth one."""
    model, _, data, surface = _open(protocol, noise, config, voxels)
    tensor = fit_tensor(protocol.tensor_design, protocol.tensor_rows, data.everything)
    weighted = data.everything[protocol.order]
    if config.model == "noddi":
        starts = search_grid(protocol, config, weighted, tensor.direction)
    else:
        starts = search_model(protocol, model, config, weighted, tensor.direction)
    state = lm_init(surface, starts.best, config.damping)
    state = state._replace(done=~data.fitted)
    margin = config.restart_margin * starts.squares
    summary = jnp.stack([tensor.mean_diffusivity, tensor.fractional_anisotropy])
    return Ascent(state, starts.other, data.fitted & (starts.gap < margin), summary)


@functools.partial(jax.jit, static_argnums=(1, 2))
def advance(protocol: Protocol, noise: Noise, config: FitConfig, voxels: Voxels, ascent: Ascent) -> Ascent:
    """Take up to `STEPS` steps in every ascent that is not done."""
    surface = _open(protocol, noise, config, voxels)[-1]
    return ascent._replace(state=lm_run(surface, ascent.state, config.cost_tolerance, STEPS))


@functools.partial(jax.jit, static_argnums=(1, 2))
def finish(protocol: Protocol, noise: Noise, config: FitConfig, voxels: Voxels, ascent: Ascent) -> Estimates:
    """Return what is said of each voxel, voxel last."""
    model, forward, data, _ = _open(protocol, noise, config, voxels)
    point, number = ascent.state.point, len(model.parameters)
    known = data.precision if noise == "rician" else None
    optimum = describe_optimum(forward, noise, data.rows, known, point)
    # S0 over the mean of what counts as unweighted, which has fallen a little where its b-values are not 0.
    s0 = point.values[-1] if config.s0 == "free" else 1 / forward.unweighted(point)
    settled = ascent.state.done & jnp.isfinite(ascent.state.at.cost)
    flags = _flags(model, settled, optimum, point.values)
    flags += jnp.where(_misfits(protocol, data, known, optimum.residual, len(forward.names) + 2), FLAGS["misfit"], 0)
    rows: dict[str, Any] = dict(
        values=point.values[:number],
        errors=optimum.errors[:number],
        direction=point.direction,
        direction_error=optimum.direction_error,
        s0=data.s0 * s0,
        residual=optimum.residual / s0,
        mean_diffusivity=ascent.start[0],
        fractional_anisotropy=ascent.start[1],
        iterations=ascent.state.iterations.astype(jnp.int32),
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


def name_maps(rows: Estimates) -> Maps:
    """Give NODDI's estimates their names."""
    count = rows.values.shape[-1]
    shared: dict[str, Any] = {name: getattr(rows, name) for name in Maps._fields if name in Estimates._fields}
    named: dict[str, Any] = {
        name + suffix: part[..., index] if index < count else None
        for part, suffix in ((rows.values, ""), (rows.errors, "_error"))
        for index, name in enumerate(("ndi", "odi", "fwf", "dot"))
    }
    converged = rows.fitted & (rows.flags & FLAGS["not_converged"] == 0)
    return Maps(**shared, **named, converged=converged, notes=())


class InitialGuess(NamedTuple):
    """The best point of a grid, and the best of its other valleys.

    Attributes:
        best: Where the first ascent starts.
        other: The lowest cell that is lower than its neighbours and is not the best one.
        squares: Squared distance to the data at `best`.
        gap: By how much it is larger at `other`; infinite where there is no other valley.
    """

    best: Point
    other: Point
    squares: Float[Array, " voxel"]
    gap: Float[Array, " voxel"]


def search_grid(
    protocol: Protocol,
    config: FitConfig,
    measured: Float[Array, "row voxel"],
    direction: Float[Array, "3 voxel"],
) -> InitialGuess:
    """Search a grid of (odi, ndi) at a known direction, with fwf solved exactly at each point.

    The signal is linear in fwf, so its best value is a projection clipped to [0, 1].

    Args:
        protocol: Its `grid`.
        config: Which NODDI the point is for; the grid itself knows neither dot nor s0.
        measured: Weighted rows in the protocol's order, relative to S0.
        direction: Fibre direction.
    """
    bvecs = jnp.concatenate([group.bvecs for group in protocol.groups])
    cosine = sum(bvecs[:, axis : axis + 1] * direction[axis] for axis in range(3))
    cost, fwf = _grid_costs(protocol, measured, 2 * cosine**2 - 1)
    best = jnp.argmin(cost.reshape(-1, cost.shape[-1]), axis=0)
    valleys = jnp.where(_is_valley(cost), cost, jnp.inf).reshape(-1, cost.shape[-1])
    valleys = jnp.where(jnp.arange(len(valleys))[:, None] == best, jnp.inf, valleys)
    other = jnp.argmin(valleys, axis=0)
    flat_cost, flat_fwf = (part.reshape(-1, cost.shape[-1]) for part in (cost, fwf))

    def point(cell):
        ndi = jnp.asarray(GRID_NDI)[cell % len(GRID_NDI)]
        odi = kappa_to_odi(jnp.asarray(GRID_KAPPA)[cell // len(GRID_NDI)])
        chosen = jnp.take_along_axis(flat_fwf, cell[None], axis=0)[0]
        values = [ndi, odi, jnp.clip(chosen, MARGIN, 1 - MARGIN)]
        values += [jnp.full_like(ndi, DOT_START)] if config.dot else []
        values += [jnp.ones_like(ndi)] if config.s0 == "free" else []
        return Point(jnp.stack(values), direction)

    squares = jnp.min(flat_cost, axis=0)
    return InitialGuess(point(best), point(other), squares, jnp.min(valleys, axis=0) - squares)


def _grid_costs(protocol, measured, u):
    """Return the squared distance and fwf of every candidate, kappa x ndi x voxel."""
    grid = protocol.grid
    plain, with_data = [], []
    previous, current = jnp.ones_like(u), u
    for degree in range(2 * GRID_DEGREE + 1):
        plain.append(grid.shells @ previous)
        if degree <= GRID_DEGREE:
            with_data.append(grid.shells @ (measured * previous))
        previous, current = current, 2 * u * current - previous
    sums, moments = jnp.stack(plain, axis=1), jnp.stack(with_data, axis=1)  # shell x degree x voxel
    low = sums[:, : GRID_DEGREE + 1]
    mm = jnp.sum(measured**2, axis=0)
    mf = grid.free @ moments[:, 0]
    ff = grid.free**2 @ sums[:, 0]
    mt, tf, tt = (
        jnp.einsum("csd,sdv->cv", table, part)
        for table, part in ((grid.tissue, moments), (grid.times_free, low), (grid.squared, sums))
    )
    # Away from the data (m - t) and towards free water (f - t).
    aa, at, towards = mm - 2 * mt + tt, mf - mt - tf + tt, ff - 2 * tf + tt
    fwf = jnp.clip(at / jnp.maximum(towards, 1e-6), 0.0, 1.0)
    cost = aa - 2 * fwf * at + fwf**2 * towards
    shape = (len(GRID_KAPPA), len(GRID_NDI), -1)
    return cost.reshape(shape), fwf.reshape(shape)


def _is_valley(cost):
    """Return where a cell is not above any of its four neighbours."""
    found = jnp.ones(cost.shape, bool)
    for axis in range(2):
        for shift in (1, -1):
            edge = jnp.full_like(jax.lax.slice_in_dim(cost, 0, 1, axis=axis), jnp.inf)
            first, last = (edge, jax.lax.slice_in_dim(cost, 0, cost.shape[axis] - 1, axis=axis))
            if shift < 0:
                first, last = jax.lax.slice_in_dim(cost, 1, cost.shape[axis], axis=axis), edge
            found &= cost <= jnp.concatenate([first, last], axis=axis)
    return found


def search_model(
    protocol: Protocol,
    model: MicrostructureModel,
    config: FitConfig,
    measured: Float[Array, "row voxel"],
    direction: Float[Array, "3 voxel"],
) -> InitialGuess:
    """Try every combination of a model's starting values at a known direction."""
    bvals, bvecs = protocol.bvals[protocol.order], protocol.bvecs[protocol.order]
    candidates = jnp.array(list(itertools.product(*(parameter.starts for parameter in model.parameters))))
    count = measured.shape[1]

    def attempt(best, values):
        predicted = model.signal(jnp.broadcast_to(values, (count, len(values))), direction.T, bvals, bvecs).T
        cost = jnp.sum((predicted - measured) ** 2, axis=0)
        better = cost < best[0]
        return (jnp.where(better, cost, best[0]), jnp.where(better, values[:, None], best[1])), None

    start = (jnp.full(count, jnp.inf), jnp.zeros((candidates.shape[1], count)))
    (squares, values), _ = jax.lax.scan(attempt, start, candidates)
    if config.s0 == "free":
        values = jnp.concatenate([values, jnp.ones((1, count))])
    point = Point(values, direction)
    return InitialGuess(point, point, squares, jnp.full(count, jnp.inf))
