"""Measures of masks and images against analytic shapes, brute force and scikit-image's values."""

import itertools
import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from jaxmed.errors import InputError
from jaxmed.metrics import imaging as im

pytestmark = pytest.mark.core


def box(shape, *slices):
    mask = np.zeros(shape, bool)
    mask[slices] = True
    return mask


def ball(shape, spacing, center, radius):
    """Voxels whose centre is within `radius` mm of `center` (mm)."""
    grid = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij")
    return sum((axis - c) ** 2 for axis, c in zip(grid, center, strict=True)) <= radius**2


def brute_surface(mask, spacing):
    """Positions in mm of the voxels with a face neighbour outside."""
    padded = np.pad(mask, 1)
    found = []
    for index in np.argwhere(padded):
        steps = np.concatenate([np.eye(mask.ndim, dtype=int), -np.eye(mask.ndim, dtype=int)])
        if not all(padded[tuple(index + step)] for step in steps):
            found.append(index * spacing)
    return np.array(found)


def images(*shape):
    """As in make_ssim_values.py, which made the stored values with scikit-image."""
    axes = np.meshgrid(*(np.linspace(0, 1, size) for size in shape), indexing="ij")
    truth = 0.5 + 0.4 * np.prod([np.sin(7 * axis + index) for index, axis in enumerate(axes)], axis=0)
    return truth, np.clip(0.95 * truth + 0.08 + 0.05 * np.sin(40 * sum(axes)), 0, 1)


def test_overlaps_of_shifted_boxes_equal_hand_values():
    truth, estimate = box((8, 8), slice(0, 4), slice(0, 4)), box((8, 8), slice(2, 6), slice(0, 4))
    assert im.dice(truth, estimate) == pytest.approx(0.5)
    assert im.jaccard(truth, estimate) == pytest.approx(1 / 3)
    assert im.dice(truth, truth) == im.jaccard(truth, truth) == 1.0


def test_shifted_planes_are_as_far_apart_as_their_shift():
    truth, estimate = box((20, 9, 7), slice(3, 4)), box((20, 9, 7), slice(8, 9))
    assert im.surface_distances(truth, estimate, (0.8, 1.0, 2.5)) == pytest.approx((4.0, 4.0, 4.0))
    turned = im.surface_distances(truth.transpose(1, 0, 2), estimate.transpose(1, 0, 2), (1.0, 0.8, 2.5))
    assert turned == pytest.approx((4.0, 4.0, 4.0))


def test_shifted_cubes_have_the_shift_as_hausdorff_distance():
    truth = box((30, 30, 30), slice(5, 15), slice(5, 15), slice(5, 15))
    estimate = box((30, 30, 30), slice(5, 15), slice(5, 15), slice(8, 18))
    found = im.surface_distances(truth, estimate, (1.0, 1.0, 2.0))
    assert found.hausdorff == pytest.approx(6.0)
    assert 0 < found.average < found.hausdorff_95 <= found.hausdorff
    error = im.volume_error(truth, estimate[:, :, ::-1], (1.0, 1.0, 2.0))
    assert error == (0.0, 0.0)


def test_concentric_balls_differ_by_their_radii():
    spacing = (0.5, 0.5, 1.0)
    center = (15.0, 15.0, 15.0)
    small, large = (ball((61, 61, 31), spacing, center, radius) for radius in (6.0, 10.0))
    found = im.surface_distances(small, large, spacing)
    # Surfaces are voxel centres: each is off by up to a voxel.
    assert found.average == pytest.approx(4.0, abs=0.5)
    assert found.hausdorff == pytest.approx(4.0, abs=1.2)
    volume = im.volume_error(small, large, spacing)
    assert volume.absolute == pytest.approx(4 / 3 * math.pi * (1000 - 216), rel=0.02)
    assert volume.relative == pytest.approx(1000 / 216 - 1, rel=0.03)


@pytest.mark.parametrize("spacing", [(1.0, 2.0), (0.7, 1.0, 3.0)])
def test_surface_distances_equal_brute_force(spacing):
    rng = np.random.default_rng(0)
    truth, estimate = rng.random((2, *(9, 8, 7)[: len(spacing)])) < 0.6
    surfaces = [brute_surface(mask, np.array(spacing)) for mask in (truth, estimate)]
    table = cdist(*surfaces)
    there, back = table.min(axis=1), table.min(axis=0)
    found = im.surface_distances(truth, estimate, spacing)
    assert found.average == pytest.approx(np.concatenate([there, back]).mean())
    assert found.hausdorff == pytest.approx(max(there.max(), back.max()))
    assert found.hausdorff_95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert im.surface_distances(estimate, truth, spacing) == pytest.approx(found)


def test_regions_are_found_missed_and_made_up():
    truth, estimate = np.zeros((2, 12, 12), bool)
    truth[1:3, 1:3] = truth[1:4, 8:10] = truth[9, 9] = True
    truth[3, 3] = True  # joined to the first by a corner
    estimate[3, 3] = True  # finds it there
    estimate[2:6, 9] = True  # finds the second
    estimate[6:8, 1:3] = estimate[10, 0] = True  # two that are nothing
    match = im.match_regions(truth, estimate)
    assert match == (2, 1, 2) and match.f1 == pytest.approx(4 / 7)
    # One estimate over two true regions finds both, and is not false.
    assert im.match_regions(truth, np.ones_like(truth)) == (3, 0, 0)
    empty = np.zeros_like(truth)
    assert im.match_regions(empty, empty).f1 == 1 and im.match_regions(empty, truth).f1 == 0
    assert im.match_regions(truth, empty) == (0, 3, 0) and im.match_regions(truth, empty).f1 == 0
    assert im.match_regions(truth[None], estimate[None]) == match


def test_empty_masks_have_decided_values():
    empty, full = np.zeros((3, 4), bool), box((3, 4), slice(0, 1), slice(0, 2))
    spacing = (2.0, 2.0)
    assert im.dice(empty, empty) == im.jaccard(empty, empty) == 1.0
    assert im.surface_distances(empty, empty, spacing) == (0.0, 0.0, 0.0)
    assert im.volume_error(empty, empty, spacing) == (0.0, 0.0)
    for pair in ((empty, full), (full, empty)):
        assert im.dice(*pair) == im.jaccard(*pair) == 0.0
        assert im.surface_distances(*pair, spacing) == (10.0, 10.0, 10.0)
    assert im.volume_error(empty, full, spacing) == (8.0, None)
    assert im.volume_error(full, empty, spacing) == (-8.0, -1.0)


def test_label_maps_are_scored_structure_by_structure():
    truth = np.zeros((12, 12, 12), int)
    truth[:4], truth[8:] = 1, 2
    estimate = np.roll(truth, 1, axis=1)
    estimate[8:] = 0
    found = im.score_labels(truth, estimate, (1.0, 1.0, 1.0), {"left": 1, "right": 2, "none": 3})
    assert found["left"]["dice"] == 1.0 and found["left"]["hausdorff_mm"] == 0.0
    assert found["right"]["dice"] == 0.0
    assert found["right"]["hausdorff_95_mm"] == pytest.approx(12 * math.sqrt(3))
    assert found["right"]["volume_error_mm3"] == -4 * 144
    assert found["none"]["dice"] == 1.0 and found["none"]["volume_error_relative"] == 0.0
    assert [found[name]["region_f1"] for name in found] == [1.0, 0.0, 1.0]
    assert im.score_mask(truth == 2, estimate == 2, (1.0, 1.0, 1.0)) == found["right"]


@pytest.mark.parametrize(
    ("shape", "ssim", "psnr"),
    [((40, 33), 0.8922612147588572, 23.590428316147765), ((16, 20, 14), 0.9433925657648803, 23.63529248461034)],
    ids=["2D", "3D"],
)
def test_ssim_and_psnr_equal_scikit_image(shape, ssim, psnr):
    truth, estimate = images(*shape)
    assert im.ssim(truth, estimate, 1.0) == pytest.approx(ssim, abs=1e-10)
    assert im.psnr(truth, estimate, 1.0) == pytest.approx(psnr, abs=1e-10)
    assert im.ssim(100 * truth, 100 * estimate, 100.0) == pytest.approx(ssim, abs=1e-10)


def test_ssim_equals_wangs_formula_window_by_window():
    truth, estimate = images(14, 13)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    values = np.zeros((14, 13))
    for i, j in itertools.product(range(5, 9), range(5, 8)):
        x, y = (image[i - 5 : i + 6, j - 5 : j + 6] for image in (truth, estimate))
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy, c = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2, (window * x * y).sum() - mx * my
        values[i, j] = (2 * mx * my + 1e-4) * (2 * c + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert im.ssim(truth, estimate, 1.0) == pytest.approx(values[5:9, 5:8].mean())
    mask = box((14, 13), slice(0, 7), slice(6, 13))
    assert im.ssim(truth, estimate, 1.0, mask) == pytest.approx(values[5:7, 6:8].mean())
    assert im.ssim(truth, truth, 1.0) == pytest.approx(1.0)


def test_errors_of_intensity_equal_hand_values():
    truth, estimate = np.array([[0, 4], [2, 2]]), np.array([[1, 4], [2, 4]])
    assert im.mae(truth, estimate) == pytest.approx(0.75)
    assert im.mae(truth, estimate, truth == 2) == pytest.approx(1.0)
    assert im.psnr(truth, estimate, 4.0) == pytest.approx(10 * math.log10(16 / 1.25))
    assert im.psnr(truth, truth, 4.0) == math.inf


def test_unsigned_intensities_do_not_wrap_around():
    truth, estimate = np.array([[0, 5]], np.uint8), np.array([[3, 4]], np.uint8)
    assert im.mae(truth, estimate) == pytest.approx(2.0)


def test_unusable_images_are_refused():
    truth = np.ones((12, 12))
    with pytest.raises(InputError, match="mask: expected at least one voxel"):
        im.mae(truth, truth, np.zeros((12, 12), bool))
    with pytest.raises(InputError, match="estimated image: expected finite intensities, found 1 voxels"):
        im.psnr(truth, np.where(np.eye(12) * np.arange(12) == 3, np.nan, truth), 1.0)
    with pytest.raises(InputError, match="11 voxels or more"):
        im.ssim(truth[:10], truth[:10], 1.0)
    with pytest.raises(InputError, match="5 or more from the image's edge"):
        im.ssim(truth, truth, 1.0, box((12, 12), slice(0, 2)))
    with pytest.raises(InputError, match="data_range"):
        im.psnr(truth, truth, 0.0)
    with pytest.raises(InputError, match="2 positive voxel sizes"):
        im.surface_distances(truth > 0, truth > 0, (1.0, 1.0, 1.0))


def windowed(x, y, data_range):
    """Return the terms of luminance, and of contrast and structure, by an explicit window."""
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.multiply.outer(taps, taps) / taps.sum() ** 2
    views = [np.lib.stride_tricks.sliding_window_view(image, window.shape) for image in (x, y)]
    means = [(view * window).sum((2, 3)) for view in views]
    centred = [view - mean[..., None, None] for view, mean in zip(views, means, strict=True)]
    xx, yy, xy = ((centred[a] * centred[b] * window).sum((2, 3)) for a, b in ((0, 0), (1, 1), (0, 1)))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * means[0] * means[1] + c1) / (means[0] ** 2 + means[1] ** 2 + c1)
    return luminance, (2 * xy + c2) / (xx + yy + c2)


def test_similarity_of_scales_is_the_product_of_the_formula():
    rng = np.random.default_rng(3)
    truth = rng.random((23, 26))
    estimate = truth + 0.2 * rng.random(truth.shape)
    fine = windowed(truth, estimate, 1.0)[1].mean()
    half = [image[:22, :26].reshape(11, 2, 13, 2).mean((1, 3)) for image in (truth, estimate)]
    luminance, contrast = windowed(*half, 1.0)
    weights = np.array([0.0448, 0.2856]) / (0.0448 + 0.2856)
    expected = fine ** weights[0] * (luminance * contrast).mean() ** weights[1]
    assert im.ms_ssim(truth, estimate, 1.0) == pytest.approx(expected)
    assert im.ms_ssim(truth, truth, 1.0) == pytest.approx(1.0)
    small = truth[:15, :14], estimate[:15, :14]  # of one scale
    assert im.ms_ssim(*small, 1.0) == pytest.approx(im.ssim(*small, 1.0))


def test_a_field_is_compared_up_to_its_scale():
    rng = np.random.default_rng(4)
    truth = np.exp(rng.normal(size=(4, 5)))
    assert im.field_error(truth, 7 * truth) == pytest.approx(0, abs=1e-12)
    estimate = np.exp(rng.normal(size=(4, 5)))
    factors = np.linspace(0, 3, 3001)
    least = min(np.linalg.norm(f * estimate - truth) for f in factors) / np.linalg.norm(truth)
    assert im.field_error(truth, estimate) == pytest.approx(least, abs=1e-5)
    with pytest.raises(InputError, match="true field: expected values other than 0"):
        im.field_error(0 * truth, estimate)
