"""How good a scan or picture is, told from itself: noise, detail, ghosts, motion, distortion, and one score.

Everything is measured in the planes of a scan, the two axes of finest spacing; of several planes power is averaged
first. All functions are traceable, on the device, for images in two or three dimensions. Intensities are in any unit:
each is told relative to the signal, the 98th percentile. A ghost is looked for at fractions of the array's extent,
where it lies in an image that was not cropped.

The score rests on what a reader can tell apart: bits of detail above noise and a floor (Shannon's capacity of every
frequency), less what noise, ghosts and misalignment take. Blur, noise and a weak field all cost detail. Where the noise
is about a tenth of the signal or more, as in maps of diffusion coefficients, a slight blur can raise the score: it then
takes more noise than detail.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxmed.arrays.filters import finite_difference
from jaxmed.arrays.grid import thick_axis
from jaxmed.arrays.histogram import mutual_information

SIGNAL = 98.0
"""Percentile of an image that counts as its signal."""
FLOOR = 0.1
"""Contrast, as a share of the signal, below which detail counts little: noise that a reader does not mind."""
HALVING = 0.08
"""Noise, as a share of the signal, that halves the score; with FLOOR chosen on the files of the tests."""
RINGS = 16
NOISE_RADIUS = 0.8
"""Of the highest frequency along an axis, beyond which a spectrum is taken to be noise."""
FOLDS = (2, 3, 4)
"""Ghosts are looked for at these fractions of the field of view."""
LEVELS = 64


class Quality(NamedTuple):
    """Measures of one image.

    Attributes:
        noise: Standard deviation of the noise, as a share of the signal.
        snr: Mean of the object over that of the noise.
        cnr: Distance between the object's dark and bright part over the noise.
        resolution: Distance in mm (pixels of a picture) that the image resolves above its noise.
        detail: Bits per voxel above noise and floor.
        ghosting: Ghost over signal, 0 for none.
        motion: Imbalance of fine detail between the two axes of a plane, 0 for none.
        alignment: What another image of the same place tells of this one, from 0 to 1; NaN without one.
        score: From 0 to 100.
    """

    noise: Float[Array, ""]
    snr: Float[Array, ""]
    cnr: Float[Array, ""]
    resolution: Float[Array, ""]
    detail: Float[Array, ""]
    ghosting: Float[Array, ""]
    motion: Float[Array, ""]
    alignment: Float[Array, ""]
    score: Float[Array, ""]


def measure_quality(
    image: Float[Array, "*space"],
    spacing: Sequence[float] = (),
    reference: Float[Array, "*space"] | None = None,
) -> Quality:
    """Measure an image.

    Args:
        image: Two or three axes.
        spacing: Voxel size along each axis in mm; ones by default. Static: the thickest axis runs from plane to plane.
        reference: Another sequence on the same grid, such as the T2-weighted one of a diffusion scan, by which the
            image's distortion is told.
    """
    planes, size = in_planes(image, spacing)
    signal = jnp.maximum(jnp.percentile(planes, SIGNAL), 1e-12)
    planes = planes / signal
    power, count, beyond = ring_power(planes)
    noise = jnp.sqrt(beyond)
    # A ring's mean over n frequencies varies by 1 / sqrt(n) of itself; the window makes about one in four count.
    error = 2 * beyond * jax.lax.rsqrt(jnp.maximum(count * len(planes) / 4, 1.0))
    ratio = jnp.maximum(power - beyond - error, 0.0) / (beyond + FLOOR**2)
    detail = (0.5 * jnp.log2(1 + ratio) * count).sum() / count.sum()
    passed = ((ratio / (1 + ratio)) * count).sum() / count.sum()
    inside, bright, contrast = _regions(planes)
    least = jnp.maximum(noise, 1e-6)
    ghosting = ghost_level(planes)
    aligned = jnp.ones(()) if reference is None else shared_information(image, reference)
    score = 100 * jnp.tanh(detail) / (1 + beyond / HALVING**2) * (1 - ghosting) ** 2 * aligned
    return Quality(
        noise, inside / least, contrast / least, size * jax.lax.rsqrt(jnp.maximum(passed, 1e-6)), detail, ghosting,
        imbalance(planes, beyond), jnp.full((), jnp.nan) if reference is None else aligned, score,
    )  # fmt: skip


def in_planes(
    image: Float[Array, "*space"], spacing: Sequence[float]
) -> tuple[Float[Array, "plane row column"], float]:
    """Return an image as planes of its two finest axes, and the edge of a square as large as one of their voxels."""
    spacing = tuple(spacing) or (1.0,) * image.ndim
    if image.ndim == 2:
        return image[None], float(np.sqrt(spacing[0] * spacing[1]))
    thick = thick_axis(spacing)
    fine = [edge for axis, edge in enumerate(spacing) if axis != thick]
    return jnp.moveaxis(image, thick, 0), float(np.sqrt(fine[0] * fine[1]))


def ring_power(
    planes: Float[Array, "plane row column"],
) -> tuple[Float[Array, " ring"], Float[Array, " ring"], Float[Array, ""]]:
    """Return mean power and number of frequencies of each ring, and the power beyond all that images hold.

    Planes are tapered by Hann's window; white noise of variance v has the power v in every ring.
    """
    rows, columns = planes.shape[1:]
    window = jnp.asarray(_hann(rows)[:, None] * _hann(columns), jnp.float32)
    mean = (planes * window).sum((1, 2), keepdims=True) / window.sum()
    spectrum = jnp.abs(jnp.fft.fft2((planes - mean) * window)) ** 2 / (window**2).sum()
    power = spectrum.mean(0)
    radius = 2 * np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.fftfreq(columns))
    rings = max(min(RINGS, min(rows, columns) // 4), 1)
    place = np.minimum((radius * rings).astype(int), rings - 1)
    count = np.bincount(place.ravel(), minlength=rings).astype(np.float32)
    total = jnp.zeros(rings).at[place.ravel()].add(power.ravel())
    return total / count, jnp.asarray(count), power[radius > NOISE_RADIUS].mean()


def ghost_level(planes: Float[Array, "plane row column"]) -> Float[Array, ""]:
    """Return the largest ghost over the signal, at halves, thirds and quarters of the field along either axis.

    A ghost shows in two ways. Where object and ghost overlap, every n-th line of k-space is weaker or stronger than its
    neighbours. Where the ghost lies in air, edges stand there again: the share of an edge's strength that comes again,
    block by block, beyond that of places nearby.
    """
    found = [jnp.zeros(())]
    for axis in (1, 2):
        length = planes.shape[axis]
        found += [_line_modulation(planes, axis, fold) for fold in FOLDS]
        found += [_repeated_edges(planes, axis, round(length / fold)) for fold in FOLDS]
    return jnp.stack(found).max()


def imbalance(planes: Float[Array, "plane row column"], noise_power: Float[Array, ""]) -> Float[Array, ""]:
    """Return by how many octaves the energy of edges differs between the two axes, that of the noise taken off."""
    energies = []
    for axis in (1, 2):
        steps = jnp.diff(planes, axis=axis)
        energies.append(jnp.maximum((steps**2).mean() - 2 * noise_power, 1e-8))
    return jnp.abs(jnp.log2(energies[0] / energies[1]))


def shared_information(one: Float[Array, "*space"], two: Float[Array, "*space"]) -> Float[Array, ""]:
    """Return the square of Linfoot's coefficient of two images, 1 - exp(-2 mutual information): 0 independent, 1 equal.

    Of Gaussian intensities it is the share of the variance of one that the other explains. What is brighter than the
    signal counts as the signal.

    Source: Linfoot, Information and Control 1 (1957), 85.
    """
    flat = (jnp.minimum(image, jnp.percentile(image, SIGNAL)).reshape(-1) for image in (one, two))
    return jnp.maximum(1 - jnp.exp(-2 * mutual_information(*flat)), 0.0)


def _regions(planes: Float[Array, "plane row column"]) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Return the object's mean, that of its bright part, and the distance to that of its dark part.

    Air is parted from the object, and dark from bright, by Otsu's threshold.
    """
    level = jnp.clip(planes.reshape(-1), 0.0, 1.5)
    air = 0.5 * otsu(level, jnp.ones_like(level, bool))
    inside = level > air
    middle = otsu(level, inside)
    bright, dark = inside & (level > middle), inside & (level <= middle)
    means = [(jnp.where(mask, level, 0).sum() / jnp.maximum(mask.sum(), 1)) for mask in (inside, bright, dark)]
    return means[0], means[1], means[1] - means[2]


def otsu(values: Float[Array, " voxel"], mask: Bool[Array, " voxel"]) -> Float[Array, ""]:
    """Return the threshold that parts masked values into two groups of largest distance; of 64 levels.

    Source: Otsu, IEEE Transactions on Systems, Man and Cybernetics 9 (1979), 62.
    """
    low, high = values.min(), values.max()
    width = jnp.maximum(high - low, 1e-12) / LEVELS
    place = jnp.clip(((values - low) / width).astype(jnp.int32), 0, LEVELS - 1)
    count = jnp.zeros(LEVELS).at[place].add(mask.astype(jnp.float32))
    centre = low + (jnp.arange(LEVELS) + 0.5) * width
    below, first = jnp.cumsum(count), jnp.cumsum(count * centre)
    above, second = below[-1] - below, first[-1] - first
    gap = first / jnp.maximum(below, 1) - second / jnp.maximum(above, 1)
    between = jnp.where((below > 0) & (above > 0), below * above * gap**2, -1.0)
    best = between >= between.max() * (1 - 1e-6)  # all levels between groups that lie apart are as good
    return low + ((best * jnp.arange(LEVELS)).sum() / best.sum() + 1) * width


def _line_modulation(planes: Float[Array, "plane row column"], axis: int, fold: int) -> Float[Array, ""]:
    lines = jnp.abs(jnp.fft.rfft(planes - planes.mean((1, 2), keepdims=True), axis=axis)) ** 2
    level = jnp.log(lines.sum((0, 3 - axis)) + 1e-12)
    step = level[1:-1] - 0.5 * (level[:-2] + level[2:])
    number = np.arange(1, len(level) - 1)
    chosen = (number % fold == 0) & (number > 2)
    if chosen.sum() < 3:
        return jnp.zeros(())
    # What the mean of so many lines comes to by chance, twice its standard error, does not count.
    chance = 2 * step[chosen].std() / np.sqrt(chosen.sum())
    ratio = jnp.exp(-0.5 * jnp.maximum(jnp.abs(step[chosen].mean()) - chance, 0.0))
    return (1 - ratio) / (1 + ratio)


def _repeated_edges(planes: Float[Array, "plane row column"], axis: int, shift: int) -> Float[Array, ""]:
    edges = finite_difference(planes, 3 - axis)
    block = max(4, planes.shape[axis] // 12)
    near = max(2, planes.shape[axis] // 24)
    energy = _block_sums(edges**2, block)

    def share(move: int) -> Array:
        moved = jnp.roll(edges, move, axis)
        largest = jnp.maximum(energy, _block_sums(moved**2, block)).sum()
        return jnp.abs(_block_sums(edges * moved, block)).sum() / jnp.maximum(largest, 1e-12)

    around = jnp.stack([share(shift + off) for off in (-2 * near, -near, near, 2 * near)])
    chance = around.mean() + 2 * around.std()
    return jnp.maximum(share(shift) - chance, 0.0) / jnp.maximum(1 - chance, 1e-6)


def _block_sums(planes: Float[Array, "plane row column"], block: int) -> Float[Array, "plane down across"]:
    count, rows, columns = planes.shape
    down, across = max(rows // block, 1), max(columns // block, 1)
    kept = planes[:, : down * block, : across * block]
    return kept.reshape(count, down, -1, across, kept.shape[2] // across).sum((2, 4))


def _hann(length: int) -> Float[np.ndarray, " sample"]:
    return np.hanning(length + 2)[1:-1]
