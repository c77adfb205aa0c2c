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
