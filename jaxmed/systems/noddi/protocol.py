"""How voxels are fitted, and a gradient table prepared for it: all but the data, in float64.

The series of the stick signal in Legendre polynomials of the cosine c is a polynomial in u = 2 c^2 - 1 of half the
degree. Rows of one b-value share its coefficients, which are a small matrix times the Watson moments of a voxel; what
is left for each row is Horner's rule. u runs over [-1, 1], where a polynomial in powers keeps its digits in float32.

Angles between gradients and fibres depend on the voxel, coefficients do not: rows with a b-value of their own, and all
rows of a scan whose gradients vary over space, carry their own coefficients.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.config import Count, NonNegative, Positive, Size, checked
from jaxmed.physics import noddi
from jaxmed.physics.acquisition import (
    find_shells,
    group_rows,
    smooth_basis,
    tensor_design,
    tensor_rows,
)
from jaxmed.physics.microstructure import MicrostructureModel, ball_and_stick_model, noddi_model

MAX_GROUPS = 4
"""Most b-values with a group of their own: the program grows with every group."""
NUM_NODES = 32
"""Nodes of the quadrature for Watson moments: exact to 6e-10 up to kappa = 64, the largest that odi >= 0.01 allows."""

GRID_KAPPA = (0.25, 1.0, 2.0, 3.5, 6.0, 10.0, 18.0, 36.0)
GRID_NDI = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)
GRID_DEGREE = 6
"""Degree of the polynomials in u of the grid search: signals to 2e-3 at b = 3000, below the noise of any scan."""


@dataclasses.dataclass(frozen=True)
@checked
class FitConfig:
    """How voxels are fitted.

    Attributes:
        model: NODDI, or one stick in a ball.
        tissue: Diffusivities that NODDI fixes.
        order: Highest Legendre order of NODDI's series, even; None takes 16, or 24 where b exceeds 5000 s/mm^2.
        extra_cellular: NODDI's space outside neurites: "averaged_tensor" as in the original toolbox and AMICO, or
            "convolved" as in dmipy.
        dot: Add water that does not move to NODDI, for fixed tissue.
        s0: "mean" divides by the mean unweighted signal; "free" fits it, which counts unweighted images as data.
        b0_threshold: b-values up to this, in s/mm^2, count as unweighted. Take 100 for HCP 7T (b = 55 to 65).
        max_iterations: Most Levenberg-Marquardt iterations of one ascent.
        damping: First damping, relative to the diagonal of the normal matrix.
        cost_tolerance: A voxel is done when the next step promises to lower its cost by less than this fraction:
            1e-6 of a likelihood over a hundred images moves a parameter by a hundredth of its standard error.
        restart_margin: Ascend from the grid's second valley too where its squares exceed those of the first by less
            than this fraction, and keep the better end; 0 never does.
        chunk_size: Voxels that one compiled call takes. 2048 keeps the work of a chunk in a CPU's cache; take 65536 on
            an accelerator. None chooses by the device.
    """

    model: Literal["noddi", "ball-and-stick"] = "noddi"
    tissue: noddi.Tissue = dataclasses.field(default_factory=noddi.Tissue)
    order: int | None = None
    extra_cellular: noddi.ExtraCellular = "averaged_tensor"
    dot: bool = False
    s0: Literal["mean", "free"] = "mean"
    b0_threshold: NonNegative = 50.0
    max_iterations: Size = 60
    damping: Positive = 1e-2
    cost_tolerance: Positive = 1e-6
    restart_margin: NonNegative = 0.1
    chunk_size: Count | None = None

    def __post_init__(self) -> None:
        if self.order is not None and (self.order < 4 or self.order % 2 or self.order > 32):
            raise ValueError(f"order: expected an even number from 4 to 32, found {self.order}")
        if self.model != "noddi" and (self.dot or self.extra_cellular != "averaged_tensor"):
            raise ValueError(f"model: expected noddi with dot or extra_cellular, found {self.model}")

    def build_model(self) -> MicrostructureModel:
        """Return the forward model; its order is that of the tables, not of this record."""
        if self.model == "ball-and-stick":
            return ball_and_stick_model()
        return noddi_model(self.tissue, self.order or 16, self.extra_cellular, self.dot)


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
    rows = [np.flatnonzero(~is_b0)] if varies else group_rows(bvals, config.b0_threshold, MAX_GROUPS)
    x, weights = noddi.unit_quadrature(NUM_NODES)
    polynomials = noddi.legendre(x, order).T
    powers = noddi.legendre_to_powers(order) * (2 * np.arange(0, order + 1, 2) + 1)
    design = tensor_design(bvals, bvecs)
    in_order = np.concatenate(rows)
    smooth = smooth_basis(bvals[in_order], bvecs[in_order])
    return Protocol(
        bvals=_single(bvals),
        bvecs=_single(bvecs),
        is_b0=_single(is_b0 / is_b0.sum()),
        order=jnp.asarray(in_order, jnp.int32),
        groups=tuple(_make_group(bvals[part], bvecs[part], order, powers, config.tissue) for part in rows),
        unweighted=jnp.asarray(np.concatenate([weak, np.flatnonzero(is_b0 & (bvals == 0))]), jnp.int32),
        weak=_make_group(bvals[weak], bvecs[weak], order, powers, config.tissue) if len(weak) else None,
        smooth=None if smooth is None else _single(smooth),
        grid=_make_grid(bvals[in_order], order, config.tissue),
        tensor_rows=_single(tensor_rows(bvals, design, config.b0_threshold)),
        tensor_design=_single(design),
        nodes=_single(np.stack([weights, x**2])),
        polynomials=_single(np.concatenate([polynomials, polynomials * x**2])),
        powers=_single(powers),
    )


def _single(table: np.ndarray) -> Array:
    return jnp.asarray(table, jnp.float32)


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
    series = noddi.project_chebyshev(u, signals, GRID_DEGREE)
    return Grid(
        shells=_single(members),
        tissue=_single(series),
        squared=_single(noddi.project_chebyshev(u, signals**2, 2 * GRID_DEGREE)),
        times_free=_single(series * free[:, None]),
        free=_single(free),
    )
