"""Fit NODDI to diffusion signals: tensor, grid, then Levenberg-Marquardt, for many voxels at once.

Sources: the model is `jaxmed.physics.noddi`; the three steps follow cuDIMOT (tensor for the direction, a grid, then
Levenberg-Marquardt); the Rician likelihood is maximised by least squares on pseudo-data (expectation-maximisation over
the unknown phase): m I1(z) / I0(z) with z = m s / sigma^2 takes the place of the magnitude m.

Inside a chunk arrays are measurement x voxel: neighbouring voxels share vector instructions and nothing is
transposed between steps.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import i0e, i1e
from jaxtyping import Array, Bool, Float, Int

from jaxmed.physics import noddi
from jaxmed.physics.acquisition import find_shells
from jaxmed.solvers.least_squares import solve_positive, weighted_linear

Noise = Literal["gaussian", "rician"]

GRID_KAPPA = (0.25, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 16.0, 32.0)
GRID_NDI = tuple(step / 10 for step in range(11))
TENSOR_MAX_BVAL = 1200.0
"""Largest b-value, in s/mm^2, at which a single tensor still describes tissue."""
SIGMA_FLOOR = 1e-3
"""Smallest noise level relative to S0: the Rician likelihood has no maximum without noise."""


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How voxels are fitted.

    Attributes:
        tissue: Fixed diffusivities.
        order: Highest Legendre order of the model, even; None takes 16, or 24 where b exceeds 5000 s/mm^2.
        b0_threshold: b-values up to this, in s/mm^2, count as unweighted. Take 100 for HCP 7T (b = 55 to 65).
        max_iterations: Most Levenberg-Marquardt iterations.
        damping: First damping, relative to the diagonal of the normal matrix; times or over 10 as steps fail or hold.
        cost_tolerance: A voxel is done when the next step promises to lower its cost by less than this fraction.
        gradient_tolerance: Or when the cosine between its residuals and every column of the Jacobian is below this.
        chunk_size: Voxels that one compiled call takes. 2048 keeps the work of a chunk in a CPU's cache; take 65536 on
            an accelerator. None chooses by the device.
    """

    tissue: noddi.Tissue = dataclasses.field(default_factory=noddi.Tissue)
    order: int | None = None
    b0_threshold: float = 50.0
    max_iterations: int = 30
    damping: float = 1e-2
    cost_tolerance: float = 1e-8
    gradient_tolerance: float = 1e-6
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.order is not None and (self.order < 4 or self.order % 2 or self.order > 32):
            raise ValueError(f"order: expected an even number from 4 to 32, found {self.order}")
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations: expected 1 or more, found {self.max_iterations}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size: expected 1 or more, found {self.chunk_size}")


class Maps(NamedTuple):
    """What a fit returns for each voxel; zero where a voxel was not fitted.

    Attributes:
        ndi: Neurite density index, the intra-cellular share of tissue water; meaningless where fwf is near 1.
        odi: Orientation dispersion index.
        fwf: Free water fraction.
        direction: Mean fibre direction in the frame of the gradient table, unit length, sign arbitrary.
        s0: Mean unweighted signal, in the unit of the input.
        residual: Root mean squared residual over all rows divided by s0 (NRMSE).
        mean_diffusivity: Of the diffusion tensor, in um^2/ms.
        fractional_anisotropy: Of the diffusion tensor.
        iterations: Levenberg-Marquardt iterations used.
        converged: Whether a tolerance was met within them.
        fitted: False outside the mask and where the unweighted signal is not positive.
    """

    ndi: Float[Array | np.ndarray, "*voxel"]
    odi: Float[Array | np.ndarray, "*voxel"]
    fwf: Float[Array | np.ndarray, "*voxel"]
    direction: Float[Array | np.ndarray, "*voxel 3"]
    s0: Float[Array | np.ndarray, "*voxel"]
    residual: Float[Array | np.ndarray, "*voxel"]
    mean_diffusivity: Float[Array | np.ndarray, "*voxel"]
    fractional_anisotropy: Float[Array | np.ndarray, "*voxel"]
    iterations: Int[Array | np.ndarray, "*voxel"]
    converged: Bool[Array | np.ndarray, "*voxel"]
    fitted: Bool[Array | np.ndarray, "*voxel"]


class Protocol(NamedTuple):
    """A gradient table prepared for fitting; every table below was integrated in float64.

    Attributes:
        bvecs: Unit directions, zero at b = 0.
        attenuation: b times the parallel diffusivity.
        free: Attenuation of free water.
        radial: (2 l + 1) h_l of every row.
        is_b0: 1 for rows that count as unweighted, else 0.
        tensor_rows: 1 for rows that the tensor fit uses, else 0.
        tensor_design: Row of the log-linear tensor model: -b g_i g_j, and 1.
        nodes: Quadrature weights and squared nodes of the Watson moments.
        polynomials: Even Legendre polynomials at those nodes, times 1 and times x^2.
    """

    bvecs: Float[Array, "measurement 3"]
    attenuation: Float[Array, " measurement"]
    free: Float[Array, " measurement"]
    radial: Float[Array, "measurement degree"]
    is_b0: Float[Array, " measurement"]
    tensor_rows: Float[Array, " measurement"]
    tensor_design: Float[Array, "measurement 7"]
    nodes: Float[Array, "2 node"]
    polynomials: Float[Array, "2 degree node"]


def fit(
    # Lengths are checked by name below: a table of another scan is a user's mistake, not a programmer's.
    signals: Float[np.ndarray | Array, "*voxel image"],
    bvals: Float[np.ndarray, " bval"],
    bvecs: Float[np.ndarray, "bvec 3"],
    mask: Bool[np.ndarray, "*voxel"] | None = None,
    *,
    sigma: float | None = None,
    config: FitConfig = FitConfig(),
    finished: Maps | None = None,
    on_chunk: Callable[[int, int, Maps], None] | None = None,
) -> Maps:
    """Estimate NODDI parameters of every voxel.

    Args:
        signals: Magnitudes, not normalised: each voxel is divided by its mean over the b = 0 rows.
        bvals: b-values in s/mm^2, at least one at or below `config.b0_threshold`.
        bvecs: Unit directions; ignored at b = 0.
        mask: Voxels to fit; None fits all.
        sigma: Noise of each channel, in the unit of `signals`: maximises the Rician likelihood. None minimises squares,
            which biases maps where the signal meets the noise floor.
        config: Model constants and tolerances.
        finished: Maps of an interrupted call on the same input, one row per voxel inside the mask, in order: the first
            ones, which are not fitted again.
        on_chunk: Called with (voxels done, voxels in all, rows so far) after each chunk.

    Returns:
        Maps in the shape of the voxels.

    Raises:
        ValueError: Shapes disagree, no row is unweighted, or no voxel is inside the mask.

    Source: Zhang et al., NeuroImage 2012 (model); Hernandez-Fernandez et al., NeuroImage 2019 (cuDIMOT's steps).
    """
    shape, num_rows = signals.shape[:-1], signals.shape[-1]
    if len(bvals) != num_rows or bvecs.shape != (num_rows, 3):
        raise ValueError(
            f"bvals and bvecs: expected {num_rows} rows, one per image, found {len(bvals)} and {bvecs.shape}"
        )
    if not np.any(bvals <= config.b0_threshold):
        raise ValueError(f"bvals: expected a row at b <= {config.b0_threshold:g} s/mm^2, found none")
    flat = np.asarray(signals, np.float32).reshape(-1, num_rows)
    inside = np.ones(len(flat), bool) if mask is None else np.asarray(mask, bool).reshape(-1)
    voxels = flat[inside]
    if not len(voxels):
        raise ValueError("mask: expected at least one voxel inside, found none")
    fit_chunk = make_fit(bvals, bvecs, "gaussian" if sigma is None else "rician", config)
    rows = _run_chunks(fit_chunk, voxels, sigma or 0.0, _chunk_size(config), finished, on_chunk)
    return Maps(*(_scatter(np.asarray(row), inside).reshape(*shape, *row.shape[1:]) for row in rows))


def _chunk_size(config: FitConfig) -> int:
    return config.chunk_size or (2048 if jax.default_backend() == "cpu" else 65536)


def _run_chunks(fit_chunk, voxels, sigma, size, finished, on_chunk) -> Maps:
    # Padding every chunk to one size keeps one compiled program, whatever the number of voxels.
    size = min(size, max(128, len(voxels)))
    parts = [] if finished is None else [finished]
    start = 0 if finished is None else len(finished.ndi)
    while start < len(voxels):
        stop = min(start + size, len(voxels))
        block = np.zeros((voxels.shape[1], size), np.float32)
        block[:, : stop - start] = voxels[start:stop].T
        part = jax.device_get(fit_chunk(block, np.float32(sigma)))
        parts.append(Maps(*(np.moveaxis(np.asarray(row), -1, 0)[: stop - start] for row in part)))
        start = stop
        if on_chunk is not None:
            parts = [_concatenate(parts)]
            on_chunk(stop, len(voxels), parts[0])
    return _concatenate(parts)


def _concatenate(parts: list[Maps]) -> Maps:
    return Maps(*(np.concatenate(rows) for rows in zip(*parts, strict=True)))


def _scatter(row: np.ndarray, inside: np.ndarray) -> np.ndarray:
    full = np.zeros((len(inside), *row.shape[1:]), row.dtype)
    full[inside] = row
    return full


def make_fit(
    bvals: Float[np.ndarray, " measurement"],
    bvecs: Float[np.ndarray, "measurement 3"],
    noise: Noise,
    config: FitConfig = FitConfig(),
) -> Callable[[Float[Array, "measurement voxel"], Float[Array, ""]], Maps]:
    """Prepare the fit of one protocol.

    Returns:
        A jitted function of magnitudes (measurement x voxel) and sigma, to maps with the voxels last. Two protocols
        with the same number of rows share one compiled program.
    """
    return functools.partial(_fit_chunk, prepare(bvals, bvecs, config), noise, config)


def prepare(bvals: np.ndarray, bvecs: np.ndarray, config: FitConfig) -> Protocol:
    """Integrate everything that depends on the gradient table alone."""
    order = config.order or noddi.order_for(bvals)
    is_b0 = bvals <= config.b0_threshold
    attenuation = bvals * (1e-3 * config.tissue.parallel_diffusivity)
    degrees = 2 * np.arange(0, order + 1, 2) + 1
    x, weights = noddi.unit_quadrature(64)
    polynomials = noddi.legendre(x, order).T
    gi, gj = np.array([0, 1, 2, 0, 0, 1]), np.array([0, 1, 2, 1, 2, 2])
    pairs = bvecs[:, gi] * bvecs[:, gj] * np.where(gi == gj, 1.0, 2.0)
    design = np.concatenate([-1e-3 * bvals[:, None] * pairs, np.ones((len(bvals), 1))], axis=1)
    tables = dict(
        bvecs=np.where(is_b0[:, None], 0.0, bvecs),
        attenuation=attenuation,
        free=np.exp(-bvals * (1e-3 * config.tissue.free_diffusivity)),
        radial=degrees * noddi.stick_moments(attenuation, order),
        is_b0=is_b0 / is_b0.sum(),
        tensor_rows=tensor_rows(bvals, design, config.b0_threshold),
        tensor_design=design,
        nodes=np.stack([weights, x**2]),
        polynomials=np.stack([polynomials, polynomials * x**2]),
    )
    return Protocol(**{name: jnp.asarray(table, jnp.float32) for name, table in tables.items()})


def tensor_rows(bvals: np.ndarray, design: np.ndarray, b0_threshold: float) -> np.ndarray:
    """Choose rows for the tensor: low b where they determine it, shell by shell more where they do not."""
    limits = [TENSOR_MAX_BVAL] + [max(bvals[list(shell.rows)]) for shell in find_shells(bvals, b0_threshold)]
    for limit in sorted(limit for limit in limits if limit >= TENSOR_MAX_BVAL):
        rows = bvals <= limit
        if rows.sum() >= 7 and np.linalg.matrix_rank(design[rows], tol=1e-3) == 7:
            return rows.astype(float)
    return np.ones(len(bvals))


class _Point(NamedTuple):
    """Parameters of a chunk: logits of ndi, fwf and (odi - 0.01) / 0.98, and the direction."""

    logits: Float[Array, "3 voxel"]
    direction: Float[Array, "3 voxel"]


class _State(NamedTuple):
    """Levenberg-Marquardt state; normal and gradient belong to the accepted point."""

    point: _Point
    cost: Float[Array, " voxel"]
    normal: Float[Array, "5 5 voxel"]
    gradient: Float[Array, "5 voxel"]
    damping: Float[Array, " voxel"]
    iterations: Float[Array, " voxel"]
    done: Bool[Array, " voxel"]
    iteration: Array


@functools.partial(jax.jit, static_argnums=(1, 2))  # jitted here so that repeated calls of `fit` compile once
def _fit_chunk(protocol: Protocol, noise: Noise, config: FitConfig, magnitudes, sigma) -> Maps:
    s0 = protocol.is_b0 @ magnitudes
    fitted = s0 > 0
    safe_s0 = jnp.where(fitted, s0, 1.0)
    measured = jnp.where(fitted, magnitudes / safe_s0, 1.0)
    relative_sigma = jnp.maximum(sigma / safe_s0, SIGMA_FLOOR)
    tensor = fit_tensor(protocol, measured)
    point = search_grid(protocol, measured, tensor.direction)
    state = _levenberg_marquardt(protocol, noise, config, measured, relative_sigma, point)
    ndi, fwf, odi = _fractions(state.point.logits)
    predicted = _predict(protocol, state.point)[0]
    residual = jnp.sqrt(jnp.mean((measured - predicted) ** 2, axis=0))
    rows = Maps(
        ndi=ndi,
        odi=odi,
        fwf=fwf,
        direction=state.point.direction,
        s0=s0,
        residual=residual,
        mean_diffusivity=tensor.mean_diffusivity,
        fractional_anisotropy=tensor.fractional_anisotropy,
        iterations=state.iterations.astype(jnp.int32),
        converged=state.done,
        fitted=fitted,
    )
    return Maps(*(jnp.where(fitted, row, jnp.zeros_like(row)) for row in rows))


class Tensor(NamedTuple):
    """Summary of a diffusion tensor: principal direction, mean diffusivity in um^2/ms, fractional anisotropy."""

    direction: Float[Array, "3 voxel"]
    mean_diffusivity: Float[Array, " voxel"]
    fractional_anisotropy: Float[Array, " voxel"]


def fit_tensor(protocol: Protocol, measured: Float[Array, "measurement voxel"]) -> Tensor:
    """Fit a diffusion tensor by log-linear least squares, weighted by the squared predicted signal.

    Source: Basser et al., J. Magn. Reson. B 1994; Veraart et al., NeuroImage 2013 (the two passes).
    """
    log_signal = jnp.log(jnp.maximum(measured, 1e-3))
    rows = protocol.tensor_rows[:, None]
    weights = rows * jnp.maximum(measured, 1e-3) ** 2
    for _ in range(2):
        beta = weighted_linear(protocol.tensor_design, log_signal, weights, ridge=1e-6)
        weights = rows * jnp.exp(2 * jnp.clip(protocol.tensor_design @ beta, -7.0, 1.0))
    xx, yy, zz, xy, xz, yz = beta[:6]
    matrix = jnp.stack([jnp.stack([xx, xy, xz]), jnp.stack([xy, yy, yz]), jnp.stack([xz, yz, zz])])
    # A voxel of noise can give a tensor that is not finite; eigh must not see it.
    matrix = jnp.where(jnp.all(jnp.isfinite(matrix), axis=(0, 1)), matrix, jnp.eye(3)[:, :, None])
    values, vectors = jnp.linalg.eigh(jnp.moveaxis(matrix, -1, 0))
    values = jnp.maximum(values, 0.0)
    mean = values.mean(axis=-1)
    spread = jnp.sum((values - mean[:, None]) ** 2, axis=-1)
    anisotropy = jnp.sqrt(1.5 * spread / jnp.maximum(jnp.sum(values**2, axis=-1), 1e-12))
    return Tensor(vectors[:, :, -1].T, mean, anisotropy)


def search_grid(
    protocol: Protocol,
    measured: Float[Array, "measurement voxel"],
    direction: Float[Array, "3 voxel"],
) -> _Point:
    """Find the best (odi, ndi) of a grid at a known direction, with fwf solved exactly at each point.

    The signal is linear in fwf, so its best value is a projection clipped to [0, 1]. Extra-cellular signals of
    neighbouring ndi differ by one constant factor: one exponential per odi makes all eleven.
    """
    order = 2 * (protocol.radial.shape[1] - 1)
    angular = _legendre_rows(protocol.bvecs @ direction, order)
    free = protocol.free[:, None]
    attenuation = protocol.attenuation[:, None]
    moments = jnp.asarray(noddi.watson_moments(jnp.asarray(GRID_KAPPA), order))

    def try_kappa(best, moment):
        intra = jnp.einsum("ml,lmv->mv", protocol.radial * moment, angular)
        factor = jnp.exp(attenuation * (2 / 3 / 10) * (1 - moment[1] * angular[1]))
        extra = jnp.broadcast_to(jnp.exp(-attenuation), factor.shape)
        for ndi in GRID_NDI:
            tissue = ndi * intra + (1 - ndi) * extra
            away, towards = measured - tissue, free - tissue
            aa, at, tt = (jnp.sum(p, axis=0) for p in (away * away, away * towards, towards * towards))
            fwf = jnp.clip(at / jnp.maximum(tt, 1e-12), 0.0, 1.0)
            cost = aa - 2 * fwf * at + fwf**2 * tt
            candidate = (cost, jnp.full_like(cost, ndi), fwf, jnp.broadcast_to(moment[1], cost.shape))
            best = jax.tree.map(lambda new, old, won=cost < best[0]: jnp.where(won, new, old), candidate, best)
            extra = extra * factor
        return best, None

    nothing = jnp.zeros(measured.shape[1])
    start = (jnp.full_like(nothing, jnp.inf), nothing, nothing, nothing)
    (_, ndi, fwf, second), _ = jax.lax.scan(try_kappa, start, moments)
    kappa = jnp.asarray(GRID_KAPPA)[jnp.argmin(jnp.abs(second[:, None] - moments[:, 1]), axis=1)]
    odi = noddi.kappa_to_odi(kappa)
    # Away from the bounds, where logits are infinite and their gradients vanish.
    fractions = jnp.clip(jnp.stack([ndi, fwf, (odi - 0.01) / 0.98]), 0.03, 0.97)
    return _Point(jnp.log(fractions / (1 - fractions)), direction)


def _legendre_rows(cosine, order):
    """Return the even Legendre polynomials along a new first axis."""
    return jnp.moveaxis(jnp.asarray(noddi.legendre(cosine, order)), -1, 0)


def _fractions(logits):
    ndi, fwf, odi = jax.nn.sigmoid(logits)
    return ndi, fwf, 0.01 + 0.98 * odi


def _levenberg_marquardt(protocol, noise, config, measured, sigma, point) -> _State:
    evaluate = functools.partial(_evaluate, protocol, noise, measured, sigma)
    cost, normal, gradient = evaluate(point)
    zeros = jnp.zeros_like(cost)
    state = _State(point, cost, normal, gradient, zeros + config.damping, zeros, zeros > 0, jnp.int32(0))

    def unfinished(state):
        return (state.iteration < config.max_iterations) & ~jnp.all(state.done)

    def step(state):
        diagonal = jnp.einsum("iiv->iv", state.normal)
        # The floor keeps the system solvable where a parameter has no effect (direction at odi = 1, odi at ndi = 0).
        extra = state.damping * diagonal + 1e-7 * jnp.max(diagonal, axis=0) + 1e-12
        damped = state.normal + jnp.eye(5)[:, :, None] * extra
        update = jnp.clip(solve_positive(damped, -state.gradient), -3.0, 3.0)
        candidate = _move(state.point, update)
        cost, normal, gradient = evaluate(candidate)
        better = cost < state.cost  # False for NaN
        # The decrease that the quadratic model promises: unlike a difference of two costs it keeps its digits in
        # float32, where a cost near its minimum is noise below 1e-7.
        promised = 0.5 * jnp.sum(update * (extra * update - state.gradient), axis=0)
        small = promised <= config.cost_tolerance * jnp.abs(state.cost)
        slopes = jnp.abs(state.gradient) / jnp.sqrt(2 * jnp.abs(state.cost) * diagonal + 1e-30)
        flat = jnp.max(slopes, axis=0) <= config.gradient_tolerance
        stuck = ~better & (state.damping >= 1e6)
        accept = better & ~state.done

        def choose(new, old):
            return jnp.where(accept, new, old)

        damping = jnp.clip(jnp.where(better, state.damping / 10, state.damping * 10), 1e-8, 1e7)
        return _State(
            point=jax.tree.map(choose, candidate, state.point),
            cost=choose(cost, state.cost),
            normal=choose(normal, state.normal),
            gradient=choose(gradient, state.gradient),
            damping=jnp.where(state.done, state.damping, damping),
            iterations=state.iterations + ~state.done,
            done=state.done | small | flat | stuck,
            iteration=state.iteration + 1,
        )

    return jax.lax.while_loop(unfinished, step, state)


def _move(point: _Point, update: Float[Array, "5 voxel"]) -> _Point:
    first, second = _tangents(point.direction)
    moved = point.direction + update[3] * first + update[4] * second
    return _Point(
        jnp.clip(point.logits + update[:3], -12.0, 12.0),
        moved / jnp.sqrt(jnp.sum(moved**2, axis=0)),
    )


def _tangents(direction: Float[Array, "3 voxel"]):
    """Return two unit vectors that complete each direction to a frame, without a branch.

    Source: Duff et al., J. Comput. Graph. Tech. 2017.
    """
    x, y, z = direction
    sign = jnp.where(z >= 0, 1.0, -1.0)
    a = -1 / (sign + z)
    b = x * y * a
    return jnp.stack([1 + sign * x * x * a, sign * b, -sign * x]), jnp.stack([b, sign + y * y * a, -y])


def _evaluate(protocol, noise, measured, sigma, point):
    """Return cost, normal matrix and gradient of every voxel at a point."""
    predicted, columns = _predict(protocol, point)
    if noise == "gaussian":
        weight, target = 1.0, measured
        cost = 0.5 * jnp.sum((predicted - measured) ** 2, axis=0)
    else:
        weight = 1 / sigma**2
        z = measured * predicted * weight
        scaled = i0e(z)
        target = measured * i1e(z) / scaled
        # Of the log density only what depends on the prediction.
        cost = jnp.sum(0.5 * weight * (predicted - measured) ** 2 - jnp.log(scaled), axis=0)
    residual = predicted - target
    gradient = jnp.stack([jnp.sum(column * residual, axis=0) for column in columns]) * weight
    lower = {(i, j): jnp.sum(columns[i] * columns[j], axis=0) * weight for i in range(5) for j in range(i + 1)}
    normal = jnp.stack([jnp.stack([lower[max(i, j), min(i, j)] for j in range(5)]) for i in range(5)])
    return cost, normal, gradient


def _predict(protocol: Protocol, point: _Point):
    """Return the signal and its derivatives by the three logits and the two tangents.

    Written out by hand: forward-mode differentiation evaluates the recursion once per parameter.
    """
    ndi, fwf, odi = _fractions(point.logits)
    moments, by_odi = _moments(protocol, odi)
    order = 2 * (protocol.radial.shape[1] - 1)
    cosine = protocol.bvecs @ point.direction
    intra, intra_by_odi, intra_by_cosine, second = _intra(protocol, cosine, moments, by_odi, order)
    attenuation = protocol.attenuation[:, None]
    kept = 1 - moments[1] * second
    extra = jnp.exp(-attenuation * (1 - (2 / 3) * ndi * kept))
    free = protocol.free[:, None]
    tissue = ndi * intra + (1 - ndi) * extra
    predicted = (1 - fwf) * tissue + fwf * free
    slope = (2 / 3) * attenuation * extra * (1 - ndi)
    by_ndi = (1 - fwf) * (intra - extra + slope * kept)
    by_odi_total = (1 - fwf) * (ndi * intra_by_odi - slope * ndi * by_odi[1] * second)
    by_cosine = (1 - fwf) * ndi * (intra_by_cosine - slope * moments[1] * 3 * cosine)
    first_tangent, second_tangent = _tangents(point.direction)
    columns = (
        by_ndi * (ndi * (1 - ndi)),
        (free - tissue) * (fwf * (1 - fwf)),
        by_odi_total * ((odi - 0.01) * (0.99 - odi) / 0.98),
        by_cosine * (protocol.bvecs @ first_tangent),
        by_cosine * (protocol.bvecs @ second_tangent),
    )
    return predicted, columns


def _moments(protocol: Protocol, odi):
    """Return the Watson moments and their derivatives by odi, degree x voxel."""
    kappa = noddi.odi_to_kappa(odi)
    weights, squares = protocol.nodes[:, :, None]
    density = weights * jnp.exp(kappa * (squares - 1))
    total = jnp.sum(density, axis=0)
    plain, squared = (polynomial @ density / total for polynomial in protocol.polynomials)
    by_kappa = squared - plain * squared[0]
    return plain, by_kappa * (-(jnp.pi / 2) * (1 + kappa**2))


def _intra(protocol, cosine, moments, by_odi, order):
    """Return the stick signal, its derivatives by odi and by cosine, and P_2, by one recursion."""
    radial = protocol.radial
    previous, current = jnp.ones_like(cosine), cosine
    slope_previous, slope_current = jnp.zeros_like(cosine), jnp.ones_like(cosine)
    value = radial[:, :1] * jnp.ones_like(cosine)
    value_by_odi, value_by_cosine, second = 0.0, 0.0, current
    for degree in range(1, order):
        following = ((2 * degree + 1) * cosine * current - degree * previous) / (degree + 1)
        slope_following = slope_previous + (2 * degree + 1) * current
        previous, current = current, following
        slope_previous, slope_current = slope_current, slope_following
        if degree % 2:
            index = (degree + 1) // 2
            column = radial[:, index : index + 1]
            value = value + column * moments[index] * current
            value_by_odi = value_by_odi + column * by_odi[index] * current
            value_by_cosine = value_by_cosine + column * moments[index] * slope_current
            second = current if degree == 1 else second
    return value, value_by_odi, value_by_cosine, second
