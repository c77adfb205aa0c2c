"""Measures of segmentations and of images, in 2D and 3D; NumPy and SciPy on the host.

Conventions for masks without voxels, used throughout: two empty masks agree (Dice, Jaccard and the F1 of regions 1,
distances 0 mm, volume error 0); when only one is empty, Dice and Jaccard are 0, distances are the diagonal of the image
in mm (no distance in it is larger, so that a missed structure counts against a method and means stay finite), and the
volume error relative to an empty truth is None.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, cast

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float64, Integer, Real

from jaxmed.errors import InputError

SSIM_SIGMA = 1.5
SSIM_RADIUS = 5
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


class SurfaceDistances(NamedTuple):
    """Distances between two surfaces, in mm.

    Attributes:
        average: Average symmetric surface distance: the mean over the voxels of both surfaces.
        hausdorff: Largest distance.
        hausdorff_95: Larger of the 95th percentiles of the two directions.
    """

    average: float
    hausdorff: float
    hausdorff_95: float


class VolumeError(NamedTuple):
    """Estimated minus true volume.

    Attributes:
        absolute: In mm^3 (mm^2 for a 2D mask).
        relative: Fraction of the true volume; None when only the truth is empty.
    """

    absolute: float
    relative: float | None


class RegionMatch(NamedTuple):
    """Connected regions, such as lesions, of two masks.

    Attributes:
        found: True regions that the estimate touches.
        missed: True regions that it does not.
        false: Estimated regions that touch no true one.
    """

    found: int
    missed: int
    false: int

    @property
    def f1(self) -> float:
        """Twice the found regions over all that are true or wrongly estimated, found ones twice; 1 without any."""
        total = 2 * self.found + self.missed + self.false
        return 2 * self.found / total if total else 1.0


def dice(truth: Bool[np.ndarray, "*space"], estimate: Bool[np.ndarray, "*space"]) -> float:
    """Return twice the shared voxels over all voxels of both masks."""
    _check_shapes(truth, estimate)
    total = int(truth.sum()) + int(estimate.sum())
    return 2 * int((truth & estimate).sum()) / total if total else 1.0


def jaccard(truth: Bool[np.ndarray, "*space"], estimate: Bool[np.ndarray, "*space"]) -> float:
    """Return the shared voxels over those of either mask."""
    _check_shapes(truth, estimate)
    union = int((truth | estimate).sum())
    return int((truth & estimate).sum()) / union if union else 1.0


def volume_error(
    truth: Bool[np.ndarray, "*space"], estimate: Bool[np.ndarray, "*space"], spacing: tuple[float, ...]
) -> VolumeError:
    """Return the error of a volume; positive where the estimate is larger.

    Args:
        truth: Mask.
        estimate: Mask.
        spacing: Voxel size per axis, in mm.
    """
    _check_shapes(truth, estimate)
    _check_spacing(spacing, truth.ndim)
    ours, theirs = int(estimate.sum()), int(truth.sum())
    relative = (ours - theirs) / theirs if theirs else (None if ours else 0.0)
    return VolumeError((ours - theirs) * math.prod(spacing), relative)


def match_regions(truth: Bool[np.ndarray, "*space"], estimate: Bool[np.ndarray, "*space"]) -> RegionMatch:
    """Count the regions of a mask that another one finds, misses and makes up; voxels are joined by their corners too.

    A region is found by a single shared voxel: how well it is covered is what Dice measures.

    Source: Commowick et al., Scientific Reports 8:13650, 2018 (F1 over lesions, without its shares of overlap).
    """
    _check_shapes(truth, estimate)
    corners = np.ones((3,) * truth.ndim, bool)

    def count(mask: np.ndarray, other: np.ndarray) -> tuple[int, int]:
        regions, total = cast(tuple[np.ndarray, int], scipy.ndimage.label(mask, corners))
        return total, len(np.unique(regions[mask & other]))

    (total, found), (estimated, right) = count(truth, estimate), count(estimate, truth)
    return RegionMatch(found, total - found, estimated - right)


def surface_distances(
    truth: Bool[np.ndarray, "*space"], estimate: Bool[np.ndarray, "*space"], spacing: tuple[float, ...]
) -> SurfaceDistances:
    """Measure how far the surfaces of two masks lie apart.

    A surface is the voxels of a mask of which a face neighbour is outside it or outside the image. From the centre of
    each to the centre of the nearest of the other surface gives two directed sets of distances. The average is their
    joint mean; the Hausdorff distance their maximum; its 95 % form the larger of their two 95th percentiles
    (interpolated linearly).

    Args:
        truth: Mask.
        estimate: Mask.
        spacing: Voxel size per axis, in mm; may differ between axes.

    Source: Maier-Hein et al., Metrics Reloaded, arXiv:2206.01653, appendix (ASSD, HD, HD95).
    """
    _check_shapes(truth, estimate)
    _check_spacing(spacing, truth.ndim)
    is_empty = not truth.any(), not estimate.any()
    if all(is_empty):
        return SurfaceDistances(0.0, 0.0, 0.0)
    if any(is_empty):
        diagonal = math.dist([0.0] * truth.ndim, [n * s for n, s in zip(truth.shape, spacing, strict=True)])
        return SurfaceDistances(diagonal, diagonal, diagonal)
    # Distances between voxels of the two masks do not need the space around them.
    box = scipy.ndimage.find_objects((truth | estimate).astype(np.uint8))[0]
    surfaces = [_surface(mask[box]) for mask in (truth, estimate)]
    fields = [scipy.ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces]
    directed = np.asarray(fields[1])[surfaces[0]], np.asarray(fields[0])[surfaces[1]]
    return SurfaceDistances(
        average=float(np.concatenate(directed).mean()),
        hausdorff=float(max(distances.max() for distances in directed)),
        hausdorff_95=float(max(np.percentile(distances, 95) for distances in directed)),
    )


def score_mask(
    truth: Bool[np.ndarray, "*space"], estimate: Bool[np.ndarray, "*space"], spacing: tuple[float, ...]
) -> dict[str, float | None]:
    """Compare two masks in every measure of this file.

    Args:
        truth: Mask.
        estimate: Mask.
        spacing: Voxel size per axis, in mm.

    Returns:
        dice, jaccard, average_surface_distance_mm, hausdorff_mm, hausdorff_95_mm, region_f1, volume_error_mm3 and
        volume_error_relative (None where the truth is empty and the estimate is not).
    """
    distances, volume = surface_distances(truth, estimate, spacing), volume_error(truth, estimate, spacing)
    return {
        "dice": dice(truth, estimate),
        "jaccard": jaccard(truth, estimate),
        "average_surface_distance_mm": distances.average,
        "hausdorff_mm": distances.hausdorff,
        "hausdorff_95_mm": distances.hausdorff_95,
        "region_f1": match_regions(truth, estimate).f1,
        "volume_error_mm3": volume.absolute,
        "volume_error_relative": volume.relative,
    }


def score_labels(
    truth: Integer[np.ndarray, "*space"],
    estimate: Integer[np.ndarray, "*space"],
    spacing: tuple[float, ...],
    labels: Mapping[str, int],
) -> dict[str, dict[str, float | None]]:
    """Compare two label maps, structure by structure, as `score_mask` does.

    Args:
        truth: Label of each voxel.
        estimate: Label of each voxel.
        spacing: Voxel size per axis, in mm.
        labels: Value by name of the structures to compare.
    """
    _check_shapes(truth, estimate)
    return {name: score_mask(truth == value, estimate == value, spacing) for name, value in labels.items()}


def mae(
    truth: Real[np.ndarray, "*space"],
    estimate: Real[np.ndarray, "*space"],
    mask: Bool[np.ndarray, "*space"] | None = None,
) -> float:
    """Return the mean absolute error, in the unit of the images.

    Args:
        truth: Image.
        estimate: Image.
        mask: Voxels that count; None for all.

    Raises:
        InputError: The shapes differ, the mask is empty, or a voxel that counts is not finite.
    """
    return float(np.abs(np.subtract(*_values(truth, estimate, mask))).mean())


def psnr(
    truth: Real[np.ndarray, "*space"],
    estimate: Real[np.ndarray, "*space"],
    data_range: float,
    mask: Bool[np.ndarray, "*space"] | None = None,
) -> float:
    """Return the peak signal-to-noise ratio in dB; infinite for equal images.

    Args:
        truth: Image.
        estimate: Image.
        data_range: Distance between the lowest and the highest intensity that there can be.
        mask: Voxels that count; None for all.

    Raises:
        InputError: As for `mae`, or the range is not positive.
    """
    _check_range(data_range)
    true, found = _values(truth, estimate, mask)
    squared = float(((found - true) ** 2).mean())
    return 10 * math.log10(data_range**2 / squared) if squared else math.inf


def ssim(
    truth: Real[np.ndarray, "*space"],
    estimate: Real[np.ndarray, "*space"],
    data_range: float,
    mask: Bool[np.ndarray, "*space"] | None = None,
) -> float:
    """Return the mean structural similarity of two images, in 2D or 3D.

    The window is a Gaussian of standard deviation 1.5 voxels, cut to 11 voxels a side, with K1 = 0.01, K2 = 0.03 and
    moments divided by the window's weight. Only voxels whose window lies inside the image count, as in the paper;
    scikit-image gives the same with `gaussian_weights=True, use_sample_covariance=False`.

    Args:
        truth: Image.
        estimate: Image.
        data_range: Distance between the lowest and the highest intensity that there can be.
        mask: Centres of the windows that count; None for all.

    Raises:
        InputError: The shapes differ, an axis has fewer than 11 voxels, a voxel is not finite, the range is not
            positive, or no window counts.

    Source: Wang et al., IEEE Transactions on Image Processing 13 (2004), 600, equation 13 and section III C.
    """
    _check_range(data_range)
    size = 2 * SSIM_RADIUS + 1
    if truth.ndim not in (2, 3) or min(truth.shape) < size:
        raise InputError("images for SSIM", f"2 or 3 axes of {size} voxels or more", f"shape {truth.shape}")
    _values(truth, estimate, None)
    if mask is not None:
        _check_shapes(truth, mask)
    luminance, contrast = _similarity(truth.astype(np.float64), estimate.astype(np.float64), data_range)
    counts = luminance * contrast if mask is None else (luminance * contrast)[mask[_inner(mask.ndim)]]
    if not counts.size:
        raise InputError("mask for SSIM", f"a voxel {SSIM_RADIUS} or more from the image's edge", "none")
    return float(counts.mean())


def ms_ssim(truth: Real[np.ndarray, "*space"], estimate: Real[np.ndarray, "*space"], data_range: float) -> float:
    """Return the multi-scale structural similarity of two images, in 2D or 3D.

    The window is that of `ssim`; between scales every 2 x 2 (x 2) voxels are averaged. Images too small for five scales
    have as many as fit, and their weights are divided by their sum.

    Args:
        truth: Image.
        estimate: Image.
        data_range: Distance between the lowest and the highest intensity that there can be.

    Raises:
        InputError: As for `ssim`.

    Source: Wang, Simoncelli and Bovik, Asilomar Conference on Signals, Systems and Computers 2003, equation 7. Contrast
        terms below 0, which have no root, count as 0.
    """
    ssim(truth, estimate, data_range)  # checks both
    size = 2 * SSIM_RADIUS + 1
    scales = sum(min(truth.shape) // 2**scale >= size for scale in range(len(SCALE_WEIGHTS)))
    weights = np.array(SCALE_WEIGHTS[:scales]) / sum(SCALE_WEIGHTS[:scales])
    x, y, result = truth.astype(np.float64), estimate.astype(np.float64), 1.0
    for scale, weight in enumerate(weights):
        luminance, contrast = _similarity(x, y, data_range)
        term = contrast if scale + 1 < scales else luminance * contrast
        result *= max(float(term.mean()), 0.0) ** weight
        x, y = _halve(x), _halve(y)
    return result


def field_error(
    truth: Real[np.ndarray, "*space"],
    estimate: Real[np.ndarray, "*space"],
    mask: Bool[np.ndarray, "*space"] | None = None,
) -> float:
    """Return the relative L2 error of a gain, such as a bias field, whose scale is free: |w b - b*| / |b*|.

    Args:
        truth: b*.
        estimate: b; w is the factor that makes the error least.
        mask: Voxels that count; None for all.

    Raises:
        InputError: As for `mae`, or the truth is 0 everywhere.
    """
    true, found = _values(truth, estimate, mask)
    length = float(np.linalg.norm(true))
    if not length:
        raise InputError("true field", "values other than 0", "0 everywhere")
    factor = float(found @ true) / max(float(found @ found), np.finfo(np.float64).tiny)
    return float(np.linalg.norm(factor * found - true)) / length


def _similarity(
    x: Float64[np.ndarray, "*space"], y: Float64[np.ndarray, "*space"], data_range: float
) -> tuple[Float64[np.ndarray, "*inner"], Float64[np.ndarray, "*inner"]]:
    """Return the terms of luminance and of contrast and structure, where the window lies inside the image."""
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast = (2 * covariance + c2) / (variance_x + variance_y + c2)
    inside = _inner(x.ndim)
    return luminance[inside], contrast[inside]


def _inner(ndim: int) -> tuple[slice, ...]:
    return (slice(SSIM_RADIUS, -SSIM_RADIUS),) * ndim


def _halve(image: Float64[np.ndarray, "*space"]) -> Float64[np.ndarray, "*half"]:
    """Return means of 2 x 2 (x 2) voxels; a last odd plane is left out."""
    for axis, length in enumerate(image.shape):
        even = np.take(image, range(0, length // 2 * 2, 2), axis)
        image = (even + np.take(image, range(1, length // 2 * 2, 2), axis)) / 2
    return image


def _blur(image: Float64[np.ndarray, "*space"]) -> Float64[np.ndarray, "*space"]:
    return scipy.ndimage.gaussian_filter(image, SSIM_SIGMA, radius=SSIM_RADIUS)


def _surface(mask: Bool[np.ndarray, "*space"]) -> Bool[np.ndarray, "*space"]:
    return mask & np.logical_not(scipy.ndimage.binary_erosion(mask))


def _values(
    truth: np.ndarray, estimate: np.ndarray, mask: np.ndarray | None
) -> tuple[Float64[np.ndarray, " voxel"], Float64[np.ndarray, " voxel"]]:
    _check_shapes(truth, estimate)
    if mask is not None:
        _check_shapes(truth, mask)
    found = []
    for name, image in (("true image", truth), ("estimated image", estimate)):
        values = (image if mask is None else image[mask]).astype(np.float64).ravel()
        if not values.size:
            raise InputError("mask" if mask is not None else name, "at least one voxel", "none")
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            raise InputError(name, "finite intensities", f"{bad} voxels that are not", "mask them, or repair the image")
        found.append(values)
    return found[0], found[1]


def _check_shapes(truth: np.ndarray, estimate: np.ndarray) -> None:
    if truth.shape != estimate.shape:
        raise InputError(
            "two images to compare", f"one shape {truth.shape}", estimate.shape, "resample one to the other"
        )


def _check_spacing(spacing: tuple[float, ...], num_axes: int) -> None:
    if len(spacing) != num_axes or not all(math.isfinite(size) and size > 0 for size in spacing):
        raise InputError("spacing", f"{num_axes} positive voxel sizes in mm", spacing)


def _check_range(data_range: float) -> None:
    if not (math.isfinite(data_range) and data_range > 0):
        raise InputError("data_range", "a positive number", data_range, "give the span of the intensities")
