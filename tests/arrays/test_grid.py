"""Grids: every orientation there and back, parity with nibabel and scipy, fields of view."""

import itertools

import nibabel as nib
import nibabel.processing
import numpy as np
import pytest
import scipy.ndimage

from jaxmed.arrays.grid import (
    crop_or_pad,
    orientation,
    reorient,
    resample,
    resample_to,
    resize,
    restore,
)
from jaxmed.errors import InputError
from jaxmed.volume import Grid, Volume

pytestmark = pytest.mark.core

ROTATION = nib.eulerangles.euler2mat(0.15, -0.1, 0.2)
ORIENTATIONS = [
    (permutation, signs)
    for permutation in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def oblique(permutation=(0, 1, 2), signs=(1, 1, 1), spacing=(1.0, 1.25, 2.5)):
    turn = np.eye(3)[:, list(permutation)] * signs
    matrix = ROTATION @ turn @ np.diag(spacing)
    return nib.affines.from_matvec(matrix, [-31.7, 12.1, 77.3])


def smooth(shape, affine):
    """Sample a smooth function of the world position, with a wavelength of 60 mm and more."""
    points = nib.affines.apply_affine(affine, np.stack(np.indices(shape), -1))
    waves = points @ (2 * np.pi / np.array([[60, 90, 80], [100, -75, 60], [-70, 80, 120.0]])).T
    return np.sin(waves).sum(-1).astype(np.float32)


@pytest.mark.parametrize(("permutation", "signs"), ORIENTATIONS)
def test_every_orientation_returns_to_its_grid(permutation, signs):
    affine = oblique(permutation, signs)
    array = smooth((24, 21, 16), affine)
    volume = Volume.make(array, affine)
    codes = "".join(nib.aff2axcodes(affine))
    assert orientation(affine) == codes

    turned = reorient(volume, "RAS")
    assert orientation(turned.affine) == "RAS"
    np.testing.assert_allclose(turned.array, smooth(turned.array.shape, turned.affine), atol=1e-5)
    back = reorient(turned, codes)
    np.testing.assert_array_equal(back.array, array)
    np.testing.assert_allclose(back.affine, affine, rtol=0, atol=1e-12)

    exact = restore(turned, volume.grid)
    np.testing.assert_array_equal(exact.array, array)
    np.testing.assert_array_equal(exact.affine, affine)

    fine = resample(turned, (0.9, 1.0, 1.1), antialias=False)
    result = restore(fine, volume.grid, order=3)
    np.testing.assert_array_equal(result.affine, affine)
    assert result.array.shape == array.shape
    # Cubic interpolation of a smooth image; half a voxel at the rim is extrapolated.
    inside = (slice(2, -2),) * 3
    assert np.abs(result.array - array)[inside].max() < 0.02
    assert np.abs(result.array - array).max() < 0.3


@pytest.mark.parametrize("shape", [(12, 13, 14), (6, 5, 4), (30, 31, 32), (6, 31, 14)])
def test_cropped_and_padded_volumes_return_bit_by_bit(shape):
    affine = oblique((2, 0, 1), (1, -1, -1))
    volume = Volume.make(np.random.default_rng(0).normal(size=(12, 13, 14)), affine)
    moved = crop_or_pad(reorient(volume), shape, fill=-9.0)
    assert moved.array.shape == shape
    result = restore(moved, volume.grid, fill=np.nan)
    np.testing.assert_array_equal(result.affine, affine)
    kept = ~np.isnan(result.array)
    turned = np.array([min(a, b) for a, b in zip(shape, reorient(volume).array.shape, strict=True)])
    assert kept.sum() == turned.prod()
    np.testing.assert_array_equal(result.array[kept], volume.array[kept])


def test_cropping_keeps_world_positions_and_centre():
    volume = Volume.make(np.arange(4 * 5 * 6.0).reshape(4, 5, 6), oblique())
    moved = crop_or_pad(volume, (3, 3, 3), center=(2, 0, 5), fill=-1.0)
    assert moved.array[1, 1, 1] == volume.array[2, 0, 5]
    np.testing.assert_allclose(moved.affine @ [1, 1, 1, 1], volume.affine @ [2, 0, 5, 1])
    assert (moved.array[:, 0] == -1).all() and (moved.array[..., 2] == -1).all()
    far = crop_or_pad(volume, (3, 3, 3), center=(50, 0, 0), fill=-1.0)
    assert (far.array == -1).all()


def test_channels_stay_last():
    array = np.random.default_rng(0).normal(size=(6, 7, 8, 2)).astype(np.float32)
    volume = Volume.make(array, oblique((1, 2, 0), (-1, 1, 1)))
    target = Grid((5, 6, 7), oblique(spacing=(1.5, 1.0, 2.0)))
    for move in (
        lambda v: reorient(v, "LPI"),
        lambda v: resample(v, 1.0),
        lambda v: resample_to(v, target, order=3),
        lambda v: crop_or_pad(v, (4, 9, 3)),
        lambda v: resize(v, (3, 4, 5), order=1),
    ):
        both = move(volume)
        for channel in range(2):
            alone = move(Volume.make(np.ascontiguousarray(array[..., channel]), volume.affine))
            np.testing.assert_allclose(both.array[..., channel], alone.array, atol=1e-6)
            np.testing.assert_array_equal(both.affine, alone.affine)


@pytest.mark.parametrize("codes", ["LPS", "SRA", "PIR", "RAS"])
def test_reorientation_agrees_with_nibabel(codes):
    affine = oblique((1, 2, 0), (-1, 1, 1))
    array = np.random.default_rng(0).normal(size=(6, 7, 8))
    image = nib.Nifti1Image(array, affine)
    start = nib.orientations.io_orientation(affine)
    turn = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(tuple(codes)))
    expected = image.as_reoriented(turn)
    result = reorient(Volume.make(array, affine), codes)
    np.testing.assert_array_equal(result.array, np.asarray(expected.dataobj))
    np.testing.assert_allclose(result.affine, expected.affine, atol=1e-12)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("is_oblique", [True, False])
def test_interpolation_agrees_with_nibabel(order, is_oblique):
    source = oblique()
    target = oblique((2, 0, 1), (1, 1, -1), (1.7, 1.1, 1.3)) if is_oblique else source.copy()
    if not is_oblique:
        target[:3, :3] *= [0.7, 1.3, 0.9]
        target[:3, 3] += [1.0, 2.0, 3.0]
    array = np.random.default_rng(0).normal(size=(42, 40, 38))
    shape = (41, 43, 39)
    if is_oblique:  # the middles of both fields of view coincide
        middles = [
            nib.affines.apply_affine(affine, (np.array(size) - 1) / 2)
            for affine, size in ((source, array.shape), (target, shape))
        ]
        target[:3, 3] += middles[0] - middles[1] + 0.1  # off the ties of order 0
    expected = nib.processing.resample_from_to(
        nib.Nifti1Image(array, source), (shape, target), order=order, mode="constant", cval=0.0
    ).get_fdata()
    result = resample_to(Volume.make(array, source), Grid(shape, target), order=order, antialias=False)
    places = nib.affines.apply_affine(np.linalg.solve(source, target), np.stack(np.indices(shape), -1))
    # nibabel ends at the outer voxel centres, we half a voxel later; for the spline, the two
    # prefilter past the edge in different ways, whose effect decays by 0.27 a voxel.
    rim = 1e-3 if order < 3 else 11
    inside = ((places > rim) & (places < np.array(array.shape) - 1 - rim)).all(-1)
    outside = ((places < -0.501) | (places > np.array(array.shape) - 0.499)).any(-1)
    assert inside.sum() > 100 and outside.any()
    assert np.abs(result.array - expected)[inside].max() < 1e-5
    assert (result.array[outside] == 0).all()


@pytest.mark.parametrize("order", [0, 1, 3])
def test_interpolation_along_axes_agrees_with_scipy(order):
    volume = Volume.make(np.random.default_rng(0).normal(size=(9, 10, 11)), oblique())
    result = resample(volume, (0.7, 1.9, 2.0), order=order, antialias=False)
    step = np.diag(np.linalg.solve(volume.affine, result.affine))[:3]
    offset = np.linalg.solve(volume.affine, result.affine)[:3, 3]
    expected = scipy.ndimage.affine_transform(
        volume.array, np.diag(step), offset, result.array.shape, order=order, mode="nearest"
    )
    np.testing.assert_allclose(result.array, expected, atol=1e-9)


def test_resampling_keeps_the_field_of_view():
    volume = Volume.make(np.zeros((20, 18, 16), np.float32), oblique(spacing=(1.0, 1.5, 3.0)))

    def edges(v):
        corners = np.array([[-0.5, -0.5, -0.5, 1], [*(np.array(v.array.shape) - 0.5), 1]])
        return (v.affine @ corners.T)[:3].T

    half = resample(volume, (2.0, 3.0, 1.0))
    assert half.array.shape == (10, 9, 48)
    np.testing.assert_allclose(edges(half), edges(volume), atol=1e-9)
    odd = resample(volume, 1.7)
    assert odd.spacing == pytest.approx((1.7, 1.7, 1.7), rel=1e-12)
    np.testing.assert_allclose(edges(odd).mean(0), edges(volume).mean(0), atol=1e-9)
    whole = resize(volume, (7, 40, 16))
    assert whole.array.shape == (7, 40, 16)
    np.testing.assert_allclose(edges(whole), edges(volume), atol=1e-9)


def test_downsampling_blurs_by_the_stated_width():
    # Voxels of 1 mm to 4 mm: a point spreads into a Gaussian of variance (16 - 1) / (8 ln 2) mm^2.
    point = np.zeros((81, 1, 1))
    point[40] = 1
    volume = Volume.make(point, np.eye(4))
    shifts = np.arange(-2.0, 2.0, 0.25)
    response = []
    for shift in shifts:
        affine = np.diag([4.0, 1.0, 1.0, 1.0])
        affine[0, 3] = shift
        response.append(resample_to(volume, Grid((20, 1, 1), affine), order=1).array[:, 0, 0])
    places = shifts[:, None] + 4 * np.arange(20)
    weights = np.array(response)
    mean = (weights * places).sum() / weights.sum()
    variance = (weights * (places - mean) ** 2).sum() / weights.sum()
    # The linear kernel adds the variance of a triangle of half width 1 mm, 1/6.
    assert mean == pytest.approx(40, abs=1e-6)
    assert variance == pytest.approx(15 / (8 * np.log(2)) + 1 / 6, rel=0.01)


def test_antialiasing_removes_what_the_new_grid_cannot_show():
    stripes = np.tile((np.arange(39) % 2).astype(np.float32)[:, None, None], (1, 5, 6))
    volume = Volume.make(stripes, np.eye(4))
    # Blurred by sigma 1.2 voxels, the amplitude of the finest stripes falls to exp(-pi^2 s^2 / 2).
    inner = (slice(3, -3),) * 3
    assert np.abs(resample(volume, (3.0, 1.0, 1.0)).array[3:-3] - 0.5).max() < 1e-2
    assert np.abs(resample(volume, 3.0, antialias=False).array - 0.5).max() > 0.4
    np.testing.assert_array_equal(resample(volume, 1.0).array[inner], stripes[inner])


def test_labels_stay_labels():
    labels = np.random.default_rng(0).choice([0, 3, 1024, 30001], (9, 9, 9)).astype(np.int32)
    volume = Volume.make(labels, oblique())
    for moved in (
        resample(volume, (0.8, 2.0, 1.1), order=0),
        resample_to(volume, Grid((8, 8, 8), oblique((1, 0, 2))), order=0),
    ):
        assert moved.array.dtype == np.int32
        assert set(np.unique(moved.array)) <= {0, 3, 1024, 30001}


def test_constant_stays_constant_up_to_the_edge_of_the_field_of_view():
    volume = Volume.make(np.full((8, 9, 10), 7, np.int16), oblique())
    for order in (0, 1, 3):
        moved = resample(volume, (0.5, 0.6, 4.0), order=order)
        np.testing.assert_allclose(moved.array, 7, rtol=1e-6)
        np.testing.assert_allclose(restore(moved, volume.grid).array, 7, rtol=1e-6)


def test_single_slice_can_be_resampled():
    volume = Volume.make(np.random.default_rng(0).normal(size=(8, 9, 1)), np.diag([1.0, 1, 5, 1]))
    for order in (0, 1, 3):
        moved = resample(volume, (1.0, 1.0, 1.0), order=order)
        np.testing.assert_allclose(moved.array, np.repeat(volume.array, 5, 2), atol=1e-9)


def test_wrong_arguments_are_told():
    volume = Volume.make(np.zeros((4, 4, 4), np.float32), np.eye(4))
    for call in (
        lambda: reorient(volume, "RAX"),
        lambda: reorient(volume, "RLA"),
        lambda: resample(volume, -1.0),
        lambda: resample(volume, np.nan),
        lambda: resample(volume, 1.0, order=2),
        lambda: crop_or_pad(volume, (0, 4, 4)),
        lambda: resize(volume, (0, 4, 4)),
    ):
        with pytest.raises(InputError):
            call()
