"""A gradient table prepared for fitting: everything that does not depend on the data, integrated in float64.

The series of the stick signal in Legendre polynomials of the cosine c is a polynomial in u = 2 c^2 - 1 of half the
degree. Rows of one b-value share its coefficients, which are a small matrix times the Watson moments of a voxel; what
is left for each row is Horner's rule. u runs over [-1, 1], where a polynomial in powers keeps its digits in float32.

Angles between gradients and fibres depend on the voxel, coefficients do not: rows with a b-value of their own, and all
rows of a scan whose gradients vary over space, carry their own coefficients.
"""

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.physics import noddi
from jaxmed.physics.acquisition import find_shells
from jaxmed.systems.noddi.options import FitConfig

TENSOR_MAX_BVAL = 1200.0
"""Largest b-value, in s/mm^2, at which a single tensor still describes tissue."""
MAX_GROUPS = 4
"""Most b-values with a group of their own: the program grows with every group."""
NUM_NODES = 32
"""Of the quadrature for Watson moments: exact to 6e-10 up to kappa = 64, the largest that odi >= 0.01 allows."""

GRID_KAPPA = (0.25, 1.0, 2.0, 3.5, 6.0, 10.0, 18.0, 36.0)
GRID_NDI = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)
GRID_DEGREE = 6
"""Of the polynomials in u that the grid search uses: signals to 2e-3 at b = 3000, below the noise of any scan."""


class Group(NamedTuple):
    """Rows whose signals share coefficients, or rows with their own.

    Attributes:
        bvecs: Unit directions.
        attenuation: b times the parallel diffusivity; one number, or one per row.
        free: Attenuation of free water, likewise.
        series: From Watson moments to coefficients of the stick signal in powers of u, likewise.
    """

    bvecs: Float[Array, "row 3"]
    attenuation: Float[Array, " share"]
    free: Float[Array, " share"]
    series: Float[Array, "power degree share"]


class Grid(NamedTuple):
    """Candidates (kappa slow, ndi fast) as Chebyshev series in u, for every shell.

    Attributes:
        shells: 1 where a row (in the groups' order) belongs to a shell.
        tissue: Coefficients of the tissue signal.
        squared: Coefficients of its square.
        times_free: Coefficients of its product with free water.
        free: Signal of free water.
    """

    shells: Float[Array, "shell row"]
    tissue: Float[Array, "candidate shell degree"]
    squared: Float[Array, "candidate shell degree2"]
    times_free: Float[Array, "candidate shell degree"]
    free: Float[Array, " shell"]


class Protocol(NamedTuple):
    """A gradient table prepared for fitting; two tables of the same shells share one compiled program.

    Attributes:
        bvals: In s/mm^2, of every row.
        bvecs: Unit directions; zero where there is none.
        is_b0: 1 over their number for rows that count as unweighted, else 0.
        order: Weighted rows, group by group.
        groups: Those rows.
        unweighted: The others, those whose b-value is not zero first.
        weak: Those of them, with the attenuation and the direction that they have; None where there is none.
        smooth: Orthonormal columns over the weighted rows that any smooth signal lies in: what they leave is noise.
            None where there are too few rows.
        grid: Starting candidates.
        tensor_rows: 1 for rows that the tensor fit uses, else 0.
        tensor_design: Row of the log-linear tensor model: -b g_i g_j, and 1.
        nodes: Quadrature weights and squared nodes of the Watson moments.
        polynomials: Even Legendre polynomials at those nodes, then the same times x^2.
        powers: From Legendre polynomials of c, times 2 l + 1, to powers of u.
    """

    bvals: Float[Array, " measurement"]
    bvecs: Float[Array, "measurement 3"]
    is_b0: Float[Array, " measurement"]
    order: Int[Array, " weighted"]
    groups: tuple[Group, ...]
    unweighted: Int[Array, " unweighted"]
    weak: Group | None
    smooth: Float[Array, "weighted column"] | None
    grid: Grid
    tensor_rows: Float[Array, " measurement"]
    tensor_design: Float[Array, "measurement 7"]
    nodes: Float[Array, "2 node"]
    polynomials: Float[Array, "degree2 node"]
    powers: Float[Array, "power degree"]


def prepare(
    bvals: Float[np.ndarray, " measurement"],
    bvecs: Float[np.ndarray, "measurement 3"],
    config: FitConfig,
    *,
    varies: bool = False,
) -> Protocol:
    """Integrate everything that depends on the gradient table alone.

    Args:
        bvals: b-values in s/mm^2.
        bvecs: Unit directions; of an unweighted row zero where it is not known.
        config: Which model, and which rows are unweighted.
        varies: Whether gradients vary over space, so that no two rows share a b-value.
    """
    order = config.order or noddi.order_for(bvals)
    is_b0 = bvals <= config.b0_threshold
    bvecs = np.where(bvals[:, None] > 0, bvecs, 0.0)
    weak = np.flatnonzero(is_b0 & (bvals > 0))
    rows = _group_rows(bvals, config.b0_threshold, varies)
    x, weights = noddi.unit_quadrature(NUM_NODES)
    polynomials = noddi.legendre(x, order).T
    powers = legendre_to_powers(order) * (2 * np.arange(0, order + 1, 2) + 1)
    gi, gj = np.array([0, 1, 2, 0, 0, 1]), np.array([0, 1, 2, 1, 2, 2])
    products = np.where(np.any(bvecs, axis=1)[:, None], bvecs[:, gi] * bvecs[:, gj], (gi == gj) / 3)
    pairs = products * np.where(gi == gj, 1.0, 2.0)
    design = np.concatenate([-1e-3 * bvals[:, None] * pairs, np.ones((len(bvals), 1))], axis=1)
    in_order = np.concatenate(rows)
    return Protocol(
        bvals=_single(bvals),
        bvecs=_single(bvecs),
        is_b0=_single(is_b0 / is_b0.sum()),
        order=jnp.asarray(in_order, jnp.int32),
        groups=tuple(_make_group(bvals[part], bvecs[part], order, powers, config.tissue) for part in rows),
        unweighted=jnp.asarray(np.concatenate([weak, np.flatnonzero(is_b0 & (bvals == 0))]), jnp.int32),
        weak=_make_group(bvals[weak], bvecs[weak], order, powers, config.tissue) if len(weak) else None,
        smooth=_make_smooth(bvals[in_order], bvecs[in_order]),
        grid=_make_grid(bvals[in_order], order, config.tissue),
        tensor_rows=_single(tensor_rows(bvals, design, config.b0_threshold)),
        tensor_design=_single(design),
        nodes=_single(np.stack([weights, x**2])),
        polynomials=_single(np.concatenate([polynomials, polynomials * x**2])),
        powers=_single(powers),
    )


def _single(table: np.ndarray) -> Array:
    return jnp.asarray(table, jnp.float32)


def _group_rows(bvals: np.ndarray, b0_threshold: float, varies: bool) -> list[np.ndarray]:
    """Give the commonest b-values a group each, and the rest one together."""
    weighted = np.flatnonzero(bvals > b0_threshold)
    if varies:
        return [weighted]
    values, counts = np.unique(bvals[weighted], return_counts=True)
    if len(values) > MAX_GROUPS:
        common = values[np.argsort(-counts, kind="stable")[: MAX_GROUPS - 1]]
        values = values[np.isin(values, common) & (counts >= 6)]
    groups = [np.flatnonzero(bvals == value) for value in values]
    rest = weighted[~np.isin(bvals[weighted], values)]
    return groups + ([rest] if len(rest) else [])


def _make_group(bvals, bvecs, order, powers, tissue) -> Group:
    share = bvals[:1] if np.all(bvals == bvals[0]) and len(bvals) > 1 else bvals
    attenuation = share * (1e-3 * tissue.parallel_diffusivity)
    radial = noddi.stick_moments(attenuation, order)
    return Group(
        bvecs=_single(bvecs),
        attenuation=_single(attenuation),
        free=_single(np.exp(-share * (1e-3 * tissue.free_diffusivity))),
        series=_single(powers[:, :, None] * radial.T),
    )


def _make_smooth(bvals: np.ndarray, bvecs: np.ndarray) -> Array | None:
    """Return an orthonormal basis of signals that vary smoothly with b and direction.

    Columns: 1, b^3, the products of two components of the direction times b, and those of four times b^2 (of two where
    rows are few).
    """
    b = (bvals / bvals.max())[:, None]
    two, four = (
        np.stack(
            [np.prod(bvecs[:, list(axes)], axis=1) for axes in itertools.combinations_with_replacement(range(3), n)]
        )
        for n in (2, 4)
    )
    for highest in (four, two):
        columns = np.concatenate([np.ones_like(b), b**3, b * two.T, b**2 * highest.T], axis=1)
        left, values, _ = np.linalg.svd(columns, full_matrices=False)
        basis = left[:, values > 1e-6 * values[0]]
        if 2 * basis.shape[1] <= len(bvals):
            return _single(basis)
    return None


def legendre_to_powers(order: int) -> Float[np.ndarray, "power degree"]:
    """Return the coefficients of P_0(c), P_2(c), ... in powers of u = 2 c^2 - 1, one column each."""
    count = order // 2 + 1
    u = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    chebyshev = np.polynomial.chebyshev
    series = np.linalg.solve(chebyshev.chebvander(u, count - 1), noddi.legendre(np.sqrt((u + 1) / 2), order))
    columns = [chebyshev.cheb2poly(column) for column in series.T]
    return np.stack([np.pad(column, (0, count - len(column))) for column in columns], axis=1)


def _make_grid(bvals: np.ndarray, order: int, tissue: noddi.Tissue) -> Grid:
    shells = find_shells(bvals, b0_threshold=-1.0)
    members = np.zeros((len(shells), len(bvals)))
    for index, shell in enumerate(shells):
        members[index, list(shell.rows)] = 1
    shell_bvals = np.array([shell.bval for shell in shells])
    attenuation = shell_bvals * (1e-3 * tissue.parallel_diffusivity)
    u = np.cos(np.pi * (np.arange(4 * GRID_DEGREE) + 0.5) / (4 * GRID_DEGREE))
    angular = noddi.legendre(np.sqrt((u + 1) / 2), order)
    kappa, ndi = (
        part.reshape(-1, 1, 1) for part in np.meshgrid(np.array(GRID_KAPPA), np.array(GRID_NDI), indexing="ij")
    )
    x, weights = noddi.unit_quadrature(64)
    density = weights * np.exp(kappa[:, 0] * (x**2 - 1))
    moments = density @ noddi.legendre(x, order) / density.sum(axis=1, keepdims=True)
    degrees = 2 * np.arange(0, order + 1, 2) + 1
    intra = np.einsum("cl,sl,ul->csu", moments, degrees * noddi.stick_moments(attenuation, order), angular)
    kept = 1 - moments[:, None, 1:2] * angular[:, 1]
    extra = np.exp(-attenuation[:, None] * (1 - (2 / 3) * ndi * kept))
    signals = ndi * intra + (1 - ndi) * extra
    free = np.exp(-shell_bvals * (1e-3 * tissue.free_diffusivity))
    series = _chebyshev(u, signals, GRID_DEGREE)
    return Grid(
        shells=_single(members),
        tissue=_single(series),
        squared=_single(_chebyshev(u, signals**2, 2 * GRID_DEGREE)),
        times_free=_single(series * free[:, None]),
        free=_single(free),
    )


def _chebyshev(u: np.ndarray, values: np.ndarray, degree: int) -> np.ndarray:
    """Project values at Chebyshev nodes u (the last axis) on Chebyshev polynomials."""
    basis = np.polynomial.chebyshev.chebvander(u, degree)
    scale = np.where(np.arange(degree + 1) == 0, 1.0, 2.0) / len(u)
    return values @ basis * scale


def tensor_rows(bvals: np.ndarray, design: np.ndarray, b0_threshold: float) -> np.ndarray:
    """Choose rows for the tensor: low b where they determine it, shell by shell more where they do not."""
    limits = [TENSOR_MAX_BVAL] + [max(bvals[list(shell.rows)]) for shell in find_shells(bvals, b0_threshold)]
    for limit in sorted(limit for limit in limits if limit >= TENSOR_MAX_BVAL):
        rows = bvals <= limit
        if rows.sum() >= 7 and np.linalg.matrix_rank(design[rows], tol=1e-3) == 7:
            return rows.astype(float)
    return np.ones(len(bvals))
