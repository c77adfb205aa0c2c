"""WhiteStripe: intensities of a T1-weighted brain in units of its normal-appearing white matter; on the host.

Source: Shinohara et al. 2014, "Statistical normalization techniques for magnetic resonance imaging"; its steps and
constants as in the official code of CoCoLIT, arXiv:2508.01292: a Gaussian kernel density of what is below the 96th
percentile, at 80 places.
Deviation: the density is summed over a fine histogram, which differs from the sum over voxels by less than 1e-4 of its
largest value and takes milliseconds.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Shaped

from jaxmed.errors import InputError

TAIL = 96.0
"""Percentile above which values do not count for the density: vessels, and what is left of skull and fat."""
PLACES = 80
BINS = 8192
WIDTH = 0.05
"""Share of the brain's voxels on either side of the mode that makes the stripe."""


class WhiteStripe(NamedTuple):
    """Intensities in which the white matter has mean 0 and deviation 1.

    Attributes:
        array: All voxels; what was 0 outside of the brain is far below 0.
        mode: Of the white matter, in the unit of the scan.
        mean: Of the stripe, likewise.
        std: Of the stripe, likewise.
    """

    array: Float32[np.ndarray, "x y z"]
    mode: float
    mean: float
    std: float


def white_stripe(
    array: Shaped[np.ndarray, "x y z"], mask: Bool[np.ndarray, "x y z"], where: object = "image"
) -> WhiteStripe:
    """Scale a T1-weighted image by its white matter.

    Args:
        array: Intensities in any unit; fluid is darkest and white matter brightest.
        mask: The brain.
        where: The file, for messages.

    Raises:
        InputError: The mask is empty, or the intensities within have no spread about the white matter.
    """
    inside = array[mask].astype(np.float64)
    if inside.size < 2 or inside.min() == inside.max():
        found = "an empty mask" if not inside.size else f"{inside.size} of one intensity, {inside[0]:g}"
        raise InputError(where, "brain voxels with contrast", found, "check the mask")
    mode = white_matter_mode(inside)
    middle = float(np.mean(inside <= mode))
    low, high = np.quantile(inside, (max(middle - WIDTH, 0.0), min(middle + WIDTH, 1.0)))
    stripe = inside[(inside > low) & (inside < high)]
    if not stripe.size or stripe.min() == stripe.max():
        expected = f"a spread of intensities about the white matter, {mode:g}"
        raise InputError(where, expected, f"{stripe.size} voxels of one intensity", "give a scan, not a label map")
    mean, std = float(stripe.mean()), float(stripe.std())
    return WhiteStripe(((array - mean) / std).astype(np.float32), mode, mean, std)


def white_matter_mode(values: Float64[np.ndarray, " voxel"]) -> float:
    """Return the brightest mode of the density of a T1-weighted brain, or its largest value where it has none."""
    places, density = kernel_density(values[values <= np.percentile(values, TAIL)])
    is_mode = (density[1:-1] > density[:-2]) & (density[1:-1] > density[2:])
    found = np.flatnonzero(is_mode)
    return float(places[found[-1] + 1] if found.size else places[density.argmax()])


def kernel_density(
    values: Float64[np.ndarray, " voxel"],
) -> tuple[Float64[np.ndarray, " place"], Float64[np.ndarray, " place"]]:
    """Return evenly spaced places over the range of some values, and their Gaussian kernel density there.

    The bandwidth is Scott's: the deviation of n values over n^(1/5).
    """
    places = np.linspace(values.min(), values.max(), PLACES)
    width = float(values.std(ddof=1)) * values.size**-0.2
    counts, edges = np.histogram(values, BINS)
    middles = (edges[1:] + edges[:-1]) / 2
    kernel = np.exp(-0.5 * ((places[:, None] - middles) / width) ** 2)
    return places, kernel @ counts / (values.size * width * np.sqrt(2 * np.pi))
