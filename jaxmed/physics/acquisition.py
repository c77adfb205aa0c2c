"""Diffusion acquisitions: shells, gradient directions, and magnitude noise.

b-values are in s/mm^2 and directions are unit vectors. Tables are NumPy arrays on the host; noise is drawn on the
device from a key.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Key


@dataclasses.dataclass(frozen=True)
class Shell:
    """Rows of a gradient table whose b-values lie together.

    Attributes:
        bval: Their mean b-value in s/mm^2.
        rows: Their row numbers.
    """

    bval: float
    rows: tuple[int, ...]


def find_shells(
    bvals: Float[np.ndarray, " measurement"], b0_threshold: float = 50.0, tolerance: float = 50.0
) -> list[Shell]:
    """Group b-values into shells, for reports and checks; a fit keeps every row's own b-value.

    Args:
        bvals: b-values in s/mm^2.
        b0_threshold: Rows at or below it are the b = 0 shell.
        tolerance: Neighbouring b-values closer than this share a shell.

    Returns:
        Shells in ascending order; the b = 0 shell first, where there is one.
    """
    rows = np.argsort(bvals, kind="stable")
    groups: list[list[int]] = [[int(row) for row in rows if bvals[row] <= b0_threshold]]
    for row in rows[len(groups[0]) :]:
        start_of_shells = len(groups) == 1
        if start_of_shells or bvals[row] - bvals[groups[-1][-1]] > tolerance:
            groups.append([])
        groups[-1].append(int(row))
    return [Shell(float(np.mean(bvals[group])), tuple(group)) for group in groups if group]


MIN_AXES = 6
"""Different axes that determine a diffusion tensor, and that a shell of its own has."""
SAME_AXIS = 5.0
"""Axes nearer than this, in degrees, count as one: a head that moves turns a repeated direction by a degree or two."""
MIN_BVAL_RATIO = 1.25
"""Between the mean b-values of a lower and a higher shell; shells nearer than this say the same thing twice."""


def count_axes(bvecs: Float[np.ndarray, "row 3"]) -> int:
    """Count the different axes among unit directions: repetitions and antipodes are one, zeros none."""
    rest = bvecs[np.any(bvecs, axis=1)]
    count, least = 0, np.cos(np.radians(SAME_AXIS))
    while len(rest):
        count += 1
        rest = rest[np.abs(rest @ rest[0]) < least]
    return count


def spans_tensors(bvecs: Float[np.ndarray, "row 3"]) -> bool:
    """Return whether unit directions determine a diffusion tensor: six different axes, not on a plane or a cone."""
    x, y, z = bvecs.T
    design = np.stack([x * x, y * y, z * z, x * y, x * z, y * z], axis=1)
    return count_axes(bvecs) >= MIN_AXES and int(np.linalg.matrix_rank(design, tol=0.005 * len(bvecs) ** 0.5)) == 6


def has_two_shells(bvals: Float[np.ndarray, " row"], bvecs: Float[np.ndarray, "row 3"]) -> bool:
    """Return whether weighted rows fall into a lower and a higher part that say different things.

    Both need directions of their own and their mean b-values a real ratio: one stray image is no shell, nor are ten
    whose b-value a scanner has rounded.
    """
    for cut in np.unique(bvals)[1:]:
        lower, upper = bvals < cut, bvals >= cut
        if bvals[upper].mean() < MIN_BVAL_RATIO * bvals[lower].mean():
            continue
        if count_axes(bvecs[lower]) >= MIN_AXES and count_axes(bvecs[upper]) >= MIN_AXES:
            return True
    return False


def spread_directions(count: int) -> Float[np.ndarray, "count 3"]:
    """Spread directions evenly over a half sphere by the golden-angle spiral."""
    height = (np.arange(count) + 0.5) / count
    angle = np.pi * (1 + 5**0.5) * np.arange(count)
    radius = np.sqrt(1 - height**2)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=-1)


def two_shell_protocol(
    num_b0: int = 9, shells: tuple[tuple[int, float], ...] = ((30, 711.0), (60, 2855.0))
) -> tuple[Float[np.ndarray, " measurement"], Float[np.ndarray, "measurement 3"]]:
    """Make the gradient table of a typical NODDI scan.

    Args:
        num_b0: Images without diffusion weighting.
        shells: Number of directions and b-value of each shell.

    Returns:
        b-values in s/mm^2, and unit directions (zero at b = 0).

    Source: the widely used 9 + 30 + 60 protocol after Zhang et al., NeuroImage 2012, section 2.4.
    """
    bvals = [np.zeros(num_b0)] + [np.full(count, bval) for count, bval in shells]
    bvecs = [np.zeros((num_b0, 3))] + [spread_directions(count) for count, _ in shells]
    return np.concatenate(bvals), np.concatenate(bvecs)


def add_rician_noise(
    key: Key[Array, ""], signal: Float[Array | np.ndarray, "*batch"], sigma: Float[Array, "*#batch"] | float
) -> Float[Array, "*batch"]:
    """Return the magnitude of a signal with complex Gaussian noise.

    Args:
        key: Consumed.
        signal: Noise-free magnitude.
        sigma: Standard deviation of each of the two channels, in the unit of the signal.
    """
    real, imaginary = sigma * jax.random.normal(key, (2, *signal.shape))
    return jnp.hypot(signal + real, imaginary)


def estimate_sigma(repeats: Float[np.ndarray, "voxel repeat"]) -> float:
    """Estimate the channel noise of magnitude images from repeated acquisitions.

    The spread over repeats is corrected for the narrowing of the Rician distribution at low signal, per voxel;
    the median over voxels is robust to motion and flow.

    Args:
        repeats: Repeated magnitudes, for example the b = 0 images; at least two per voxel.

    Returns:
        Sigma, in the unit of the magnitudes.

    Source: Koay and Basser, J. Magn. Reson. 2006, equations 12 to 18 (the fixed point), on the pooled variance.
    """
    repeats = np.asarray(repeats, np.float64)  # squares of large intensities leave float32
    mean = repeats.mean(axis=1)
    variance = repeats.var(axis=1, ddof=1)
    inside = (mean > 0) & (variance > 0)
    if not inside.any():
        return 0.0
    # The median of a variance with few degrees of freedom sits below its mean by a known factor (chi-square).
    freedom = repeats.shape[1] - 1
    pooled = np.median(variance[inside]) * freedom / scipy.special.chdtri(freedom, 0.5)
    ratio = np.median(mean[inside]) / np.sqrt(pooled)
    snr = max(ratio, 1.0)
    for _ in range(50):
        snr = np.sqrt(max(_koay_correction(snr) * (1 + ratio**2) - 2, 0.0))
    return float(np.sqrt(pooled / _koay_correction(snr)))


def _koay_correction(snr: float) -> float:
    """Return the variance of a Rician magnitude relative to the channel variance."""
    quarter = snr**2 / 4
    bracket = (2 + snr**2) * scipy.special.i0e(quarter) + snr**2 * scipy.special.i1e(quarter)
    return 2 + snr**2 - np.pi / 8 * bracket**2
