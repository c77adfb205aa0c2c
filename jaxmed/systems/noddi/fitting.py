"""Fit NODDI, or another model of one fibre, to diffusion signals: tensor, grid, then Levenberg-Marquardt.

Sources: the three steps follow cuDIMOT (Hernandez-Fernandez et al., NeuroImage 2019): a tensor for the direction, a
grid, then Levenberg-Marquardt, here for many voxels at once and on the exact Rician likelihood (`likelihood.py`).

Deviation: parameters keep their own scale and are held at their bounds, where cuDIMOT and the older toolboxes put
them through a sigmoid: the signal is nearly linear in them, so fewer steps are needed, and a value on a bound says so.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxmed.physics.microstructure import MicrostructureModel
from jaxmed.physics.noddi import Tissue
from jaxmed.solvers.least_squares import lm_init, lm_run
from jaxmed.systems.noddi import chunks
from jaxmed.systems.noddi.chunks import Climb, Programs, Voxels
from jaxmed.systems.noddi.derivatives import Forward, model_forward, noddi_forward
from jaxmed.systems.noddi.likelihood import describe_optimum, make_surface
from jaxmed.systems.noddi.options import SIGMA_FLOOR, FitConfig, Noise
from jaxmed.systems.noddi.protocol import Protocol, prepare
from jaxmed.systems.noddi.start import fit_tensor, search_grid, search_model

STEPS = 7
"""Iterations between looks at who is done, the first of which evaluates the start: half of all voxels need no more."""

FLAGS = {
    "not_converged": 1,
    "at_bound": 2,
    "ndi_undefined": 4,
    "odi_undefined": 8,
    "direction_undefined": 16,
    "no_unweighted_signal": 32,
    "not_finite": 64,
}
"""Bits of the flags map."""
FLAG_DEFINITIONS = {
    "not_converged": "the tolerance was not met within the iterations",
    "at_bound": "a parameter lies on a bound of its range",
    "ndi_undefined": "free water fraction above 0.9, or a standard error of ndi as wide as not knowing it",
    "odi_undefined": "a standard error of odi as wide as not knowing it, or ndi below two of its own",
    "direction_undefined": "a cone of uncertainty wider than 45 degrees, or ndi below two of its standard errors",
    "no_unweighted_signal": "mean unweighted signal not above 0; not fitted",
    "not_finite": "NaN or Inf in the input; not fitted",
}
UNKNOWN = 12**-0.5
"""Standard deviation of a uniform draw, as a share of its range: an error that says nothing."""
WET = 0.9
"""Free water fraction above which there is too little tissue to describe."""
WIDEST_CONE = 45.0
DETECTED = 2.0
"""Standard errors that ndi must exceed, or there may be no neurites to have a direction: noise alone makes some."""


class Estimates(NamedTuple):
    """What a fit of any model returns for each voxel; zero where a voxel was not fitted.

    Attributes:
        values: Parameters, in the model's order.
        errors: Their standard errors (Laplace), at most the width of their range.
        direction: Fibre direction in the frame of the gradient table, unit length, sign arbitrary.
        direction_error: Root mean square angle of its cone of uncertainty, in degrees.
        s0: Unweighted signal, in the unit of the input: the mean, or fitted.
        residual: Root mean squared residual over the fitted rows divided by s0 (NRMSE).
        mean_diffusivity: Of the diffusion tensor, in um^2/ms.
        fractional_anisotropy: Of the diffusion tensor.
        iterations: Levenberg-Marquardt iterations of the climb that won.
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
    """NODDI of each voxel by name; see `Estimates`.

    Attributes:
        ndi: Neurite density index, the intra-cellular share of tissue water; meaningless where fwf is near 1.
        odi: Orientation dispersion index.
        fwf: Free water fraction.
        direction: Mean fibre direction in the frame of the gradient table, unit length, sign arbitrary.
        ndi_error: Standard error of ndi.
        odi_error: Standard error of odi.
        fwf_error: Standard error of fwf.
        direction_error: Root mean square angle of the direction's cone of uncertainty, in degrees.
        dot: Fraction of water that does not move; None unless it was fitted.
        dot_error: Its standard error.
        s0: Unweighted signal, in the unit of the input.
        residual: Root mean squared residual divided by s0 (NRMSE).
        mean_diffusivity: Of the diffusion tensor, in um^2/ms.
        fractional_anisotropy: Of the diffusion tensor.
        iterations: Levenberg-Marquardt iterations.
        flags: Sum of `FLAGS`.
        converged: Whether a tolerance was met.
        fitted: Whether there was something to fit.
    """

    ndi: Float[np.ndarray, "*voxel"]
    odi: Float[np.ndarray, "*voxel"]
    fwf: Float[np.ndarray, "*voxel"]
    direction: Float[np.ndarray, "*voxel 3"]
    ndi_error: Float[np.ndarray, "*voxel"]
    odi_error: Float[np.ndarray, "*voxel"]
    fwf_error: Float[np.ndarray, "*voxel"]
    direction_error: Float[np.ndarray, "*voxel"]
    dot: Float[np.ndarray, "*voxel"] | None
    dot_error: Float[np.ndarray, "*voxel"] | None
    s0: Float[np.ndarray, "*voxel"]
    residual: Float[np.ndarray, "*voxel"]
    mean_diffusivity: Float[np.ndarray, "*voxel"]
    fractional_anisotropy: Float[np.ndarray, "*voxel"]
    iterations: Int[np.ndarray, "*voxel"]
    flags: UInt8[np.ndarray, "*voxel"]
    converged: Bool[np.ndarray, "*voxel"]
    fitted: Bool[np.ndarray, "*voxel"]


def fit(
    # Lengths are checked by name below: a table of another scan is a user's mistake, not a programmer's.
    signals: Float[np.ndarray | Array, "*voxel image"],
    bvals: Float[np.ndarray, " bval"],
    bvecs: Float[np.ndarray, "bvec 3"],
    mask: Bool[np.ndarray, "*voxel"] | None = None,
    *,
    sigma: float | Float[np.ndarray, "*voxel"] | None = None,
    gradient_map: Float[np.ndarray, "*voxel 3 3"] | None = None,
    config: FitConfig = FitConfig(),
) -> Maps:
    """Estimate NODDI parameters of every voxel.

    Args:
        signals: Magnitudes, not normalised: each voxel is divided by its mean over the b = 0 rows.
        bvals: b-values in s/mm^2, at least one at or below `config.b0_threshold`.
        bvecs: Unit directions; ignored at b = 0.
        mask: Voxels to fit; None fits all.
        sigma: Noise of each channel, in the unit of `signals`: maximises the Rician likelihood. None minimises squares,
            which biases maps where the signal meets the noise floor.
        gradient_map: What the gradients are multiplied by in each voxel, where they vary over space: the identity
            plus the gradient nonlinearity. Its change of length changes b.
        config: Model constants and tolerances.

    Returns:
        Maps in the shape of the voxels.

    Raises:
        ValueError: Shapes disagree, no row is unweighted, no voxel is inside the mask, or the model is not NODDI.

    Source: Zhang et al., NeuroImage 2012 (model); Hernandez-Fernandez et al., NeuroImage 2019 (cuDIMOT's steps).
    """
    if config.model != "noddi":
        raise ValueError(f"config.model: expected noddi, found {config.model}; call `estimate`")
    return name_maps(estimate(signals, bvals, bvecs, mask, sigma=sigma, gradient_map=gradient_map, config=config))


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
    return Maps(**shared, **named, converged=converged)


def estimate(
    signals: Float[np.ndarray | Array, "*voxel image"],
    bvals: Float[np.ndarray, " bval"],
    bvecs: Float[np.ndarray, "bvec 3"],
    mask: Bool[np.ndarray, "*voxel"] | None = None,
    *,
    sigma: float | Float[np.ndarray, "*voxel"] | None = None,
    gradient_map: Float[np.ndarray, "*voxel 3 3"] | None = None,
    config: FitConfig = FitConfig(),
    finished: Estimates | None = None,
    on_block: Callable[[int, int, Estimates], None] | None = None,
) -> Estimates:
    """Fit the model that `config` names; see `fit`.

    Args:
        signals: Magnitudes.
        bvals: b-values in s/mm^2.
        bvecs: Unit directions.
        mask: Voxels to fit.
        sigma: Noise of each channel.
        gradient_map: Of each voxel; NODDI only.
        config: Model and tolerances.
        finished: Estimates of an interrupted call on the same input, one row per voxel inside the mask, in order: the
            first ones, which are not fitted again.
        on_block: Called with (voxels done, voxels in all, rows so far) after each block of chunks.
    """
    shape, num_rows = signals.shape[:-1], signals.shape[-1]
    if len(bvals) != num_rows or bvecs.shape != (num_rows, 3):
        raise ValueError(
            f"bvals and bvecs: expected {num_rows} rows, one per image, found {len(bvals)} and {bvecs.shape}"
        )
    if not np.any(bvals <= config.b0_threshold):
        raise ValueError(f"bvals: expected a row at b <= {config.b0_threshold:g} s/mm^2, found none")
    if gradient_map is not None and config.model != "noddi":
        raise ValueError("gradient_map: expected the model noddi, found " + config.model)
    inside = np.ones(shape, bool) if mask is None else np.asarray(mask, bool)
    if not inside.any():
        raise ValueError("mask: expected at least one voxel inside, found none")
    voxels = Voxels(
        np.asarray(signals, np.float32)[inside],
        np.broadcast_to(np.asarray(0.0 if sigma is None else sigma, np.float32), shape)[inside],
        None if gradient_map is None else np.asarray(gradient_map, np.float32)[inside],
    )
    programs = make_programs(bvals, bvecs, "gaussian" if sigma is None else "rician", config, gradient_map is not None)
    count = len(voxels.signals)
    # A power of two for few voxels: programs are compiled for few sizes.
    size = min(config.chunk_size or default_chunk_size(), max(128, 2 ** (count - 1).bit_length()))
    done = 0 if finished is None else len(finished.fitted)
    parts = [] if finished is None else [finished]
    for rows in chunks.run_blocks(programs, voxels, size, config.max_iterations, config.damping, done):
        parts = [jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts, rows)]
        done += len(rows[0])
        if on_block is not None:
            on_block(done, count, parts[0])
    return Estimates(*(_scatter(np.asarray(row), inside) for row in parts[0]))


def default_chunk_size() -> int:
    """Return the voxels of a chunk that suit the device."""
    return 2048 if jax.default_backend() == "cpu" else 65536


def _scatter(row: np.ndarray, inside: np.ndarray) -> np.ndarray:
    full = np.zeros((*inside.shape, *row.shape[1:]), row.dtype)
    full[inside] = row
    return full


def make_programs(bvals: np.ndarray, bvecs: np.ndarray, noise: Noise, config: FitConfig, varies: bool) -> Programs:
    """Bind the compiled steps to one protocol; two protocols of the same shells share their compilation."""
    protocol = prepare(bvals, bvecs, config, varies=varies)
    # What only the host reads, and what the tables hold already, must not make another program.
    tissue = config.tissue if varies else Tissue()
    config = dataclasses.replace(
        config, chunk_size=None, max_iterations=1, b0_threshold=50.0, order=None, tissue=tissue
    )
    return Programs(
        begin=functools.partial(_begin, protocol, noise, config),
        advance=functools.partial(_advance, protocol, noise, config),
        finish=functools.partial(_finish, protocol, noise, config),
    )


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
    s0 = protocol.is_b0 @ jnp.where(finite, magnitudes, 0.0)
    fitted = s0 > 0
    safe_s0 = jnp.where(fitted, s0, 1.0)
    everything = jnp.where(fitted, magnitudes / safe_s0, 1.0)
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
def _begin(protocol: Protocol, noise: Noise, config: FitConfig, voxels: Voxels) -> Climb:
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
def _advance(protocol: Protocol, noise: Noise, config: FitConfig, voxels: Voxels, climb: Climb) -> Climb:
    surface = _open(protocol, noise, config, voxels)[-1]
    return climb._replace(state=lm_run(surface, climb.state, config.cost_tolerance, STEPS))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _finish(protocol: Protocol, noise: Noise, config: FitConfig, voxels: Voxels, climb: Climb) -> Estimates:
    model, forward, data, _ = _open(protocol, noise, config, voxels)
    point, number = climb.state.point, len(model.parameters)
    known = data.precision if noise == "rician" else None
    optimum = describe_optimum(forward, noise, data.rows, known, point)
    rows: dict[str, Any] = dict(
        values=point.values[:number],
        errors=optimum.errors[:number],
        direction=point.direction,
        direction_error=optimum.direction_error,
        s0=data.s0 * (point.values[-1] if config.s0 == "free" else 1.0),
        residual=optimum.residual / (point.values[-1] if config.s0 == "free" else 1.0),
        mean_diffusivity=climb.tensor[0],
        fractional_anisotropy=climb.tensor[1],
        iterations=climb.state.iterations.astype(jnp.int32),
        flags=_flags(model, climb.state.done, optimum, point.values),
        fitted=data.fitted,
    )
    for name, row in rows.items():
        rows[name] = jnp.where(data.fitted, row, jnp.zeros_like(row))
    refused = jnp.where(data.finite, FLAGS["no_unweighted_signal"], FLAGS["not_finite"])
    rows["flags"] = jnp.where(data.fitted, rows["flags"], refused).astype(jnp.uint8)
    return Estimates(**rows)


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
    return bits.astype(jnp.uint8)
