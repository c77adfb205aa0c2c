"""Where a fit starts: the direction from a diffusion tensor, the parameters from a grid.

NODDI's grid is a handful of matrix products. At a known direction every candidate is a short Chebyshev series in
u = 2 c^2 - 1, so its squared distance to the data needs only sums of the data times the polynomials over each shell,
and sums of the polynomials: no candidate is evaluated in any row.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.physics.microstructure import MicrostructureModel
from jaxmed.physics.noddi import kappa_to_odi
from jaxmed.solvers.least_squares import weighted_linear
from jaxmed.solvers.symmetric import eigh_3x3
from jaxmed.systems.noddi.derivatives import Point
from jaxmed.systems.noddi.options import FitConfig
from jaxmed.systems.noddi.protocol import GRID_DEGREE, GRID_KAPPA, GRID_NDI, Protocol

MARGIN = 0.02
"""Starts keep this distance from a bound, as a share of the range: at it, some derivatives vanish."""
DOT_START = 0.05


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
    # A voxel of noise can give a tensor that is not finite; the rotations must not see it.
    matrix = jnp.where(jnp.all(jnp.isfinite(matrix), axis=(0, 1)), matrix, jnp.eye(3)[:, :, None])
    values, vectors = eigh_3x3(matrix)
    values = jnp.maximum(values, 0.0)
    mean = values.mean(axis=0)
    spread = jnp.sum((values - mean) ** 2, axis=0)
    anisotropy = jnp.sqrt(1.5 * spread / jnp.maximum(jnp.sum(values**2, axis=0), 1e-12))
    return Tensor(vectors[:, 2], mean, anisotropy)


class Starts(NamedTuple):
    """The best point of a grid, and the best of its other valleys.

    Attributes:
        best: Where the first climb starts.
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
) -> Starts:
    """Search a grid of (odi, ndi) at a known direction, with fwf solved exactly at each point.

    The signal is linear in fwf, so its best value is a projection clipped to [0, 1].

    Args:
        protocol: Its `grid`.
        config: Which NODDI the point is for; the grid itself knows neither dot nor s0.
        measured: Weighted rows in the protocol's order, relative to S0.
        direction: Of the fibre.
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
    return Starts(point(best), point(other), squares, jnp.min(valleys, axis=0) - squares)


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
) -> Starts:
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
    return Starts(point, point, squares, jnp.full(count, jnp.inf))
