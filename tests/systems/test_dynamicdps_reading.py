"""Scans to images in [0, 2] and back: nothing is lost, nothing is turned."""

import dataclasses

import numpy as np
import pytest
from scan_files import make_slices, save_slices

from jaxmed.arrays.foreground import find_foreground
from jaxmed.arrays.grid import reorient
from jaxmed.data.brain_labels import read_labels, simplify_labels
from jaxmed.data.images import PREPROCESS
from jaxmed.data.preprocess import load, load_head
from jaxmed.data.scans import ANY_KIND, find_scans
from jaxmed.data.windows import cut_about, paste
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.images import write_png
from jaxmed.volume import Volume

pytestmark = pytest.mark.core


def sized(size, percentile=99.5, reference=1.6, high=0.0, **changes):
    told = dataclasses.replace(PREPROCESS.intensity, percentiles=(0.0, percentile), reference=reference, high=high)
    return dataclasses.replace(PREPROCESS, size=size, intensity=told, **changes)


def head(shape=(12, 15, 9), centre=(0.5, 0.6, 0.5)):
    """A bright ball of 400 with a spot of 700 in a background of 0."""
    places = np.meshgrid(*[np.arange(n) / n - c for n, c in zip(shape, centre, strict=True)], indexing="ij")
    array = np.where(np.sqrt(sum(place**2 for place in places)) < 0.3, 400.0, 0.0)
    array[tuple(int(n * c) for n, c in zip(shape, centre, strict=True))] = 700
    return array.astype(np.float32)


def write(path, array, codes="LPS", spacing=2.0):
    """Store a volume along other axes than RAS."""
    volume = reorient(Volume.make(array, np.diag([spacing, spacing, spacing, 1.0])), codes)
    nifti.write(path, volume)
    return path


@pytest.mark.parametrize("frame", [sized((8, 16)), sized((16, 6), axis="sagittal"), sized((8, 8, 16))])
def test_images_go_back_to_where_they_were_cut(frame, tmp_path):
    array, frame = head(), dataclasses.replace(frame, intensity=sized((8, 8), 100.0).intensity)
    scan = load(write(tmp_path / "a.nii.gz", array, "SAL"), frame)
    images, windows = cut_about(scan.volume.array, frame.slice_axis, frame.size, find_foreground(scan.volume.array))
    assert images.shape == ({"axial": 9, "sagittal": 12}[frame.axis] if frame.is_sliced else 1, *frame.size)
    back = paste(images, windows, np.zeros_like(scan.volume.array), frame.slice_axis)
    stored = scan.restore_stored(paste(images, windows, scan.volume.array, frame.slice_axis))
    np.testing.assert_allclose(stored.array, nifti.read(tmp_path / "a.nii.gz").array, rtol=1e-5)
    np.testing.assert_array_equal(stored.affine, nifti.read(tmp_path / "a.nii.gz").affine)
    changed = paste(images + 1, windows, scan.volume.array, frame.slice_axis)
    is_inside = changed != scan.volume.array
    np.testing.assert_array_equal(back[is_inside], scan.volume.array[is_inside])
    assert is_inside.sum() == np.prod([min(a, b) for a, b in zip(frame.size, lengths(frame), strict=True)]) * len(
        images
    )


def lengths(frame):
    shape = (12, 15, 9)
    return [n for axis, n in enumerate(shape) if not frame.is_sliced or axis != {"axial": 2, "sagittal": 0}[frame.axis]]


def test_the_percentile_of_the_head_becomes_the_reference_and_the_unit_does_not_count(tmp_path):
    frame = sized((8, 8), percentile=50.0, reference=1.25)
    one = load(write(tmp_path / "a.nii", head()), frame)
    ten = load(write(tmp_path / "b.nii", 10 * head()), frame)
    assert one.volume.array.max() == 2.0 and np.unique(one.volume.array).tolist() == [0.0, 1.25, 2.0]
    np.testing.assert_allclose(ten.volume.array, one.volume.array, rtol=1e-6)
    assert one.high == pytest.approx(640) and ten.high == pytest.approx(6400)
    fixed = load(tmp_path / "a.nii", sized((8, 8), high=4096.0))
    assert fixed.volume.array.max() == pytest.approx(700 / 2048) and fixed.high == 4096


def test_images_stand_about_the_head_and_not_about_the_field_of_view():
    array = np.zeros((20, 12, 4), np.float32)
    array[12:18, 2:6] = 1
    images, windows = cut_about(array, 2, (8, 6), array > 0)
    assert windows[0].starts == (11, 1) and images[:, 1:7, 1:5].min() == 1 and images.sum() == array.sum()
    # Towards the edge the window stops rather than show nothing.
    array[:] = 0
    array[18:, :3] = 1
    assert cut_about(array, 2, (8, 6), array > 0)[1][0].starts == (12, 0)


def test_a_new_voxel_size_is_taken_within_slices_and_undone(tmp_path):
    frame = sized((8, 8), spacing=(4.0,))
    smooth = np.hypot(*np.meshgrid(np.linspace(-1, 1, 24), np.linspace(-1, 1, 20), indexing="ij"))
    array = np.repeat((np.cos(smooth) * 100)[:, :, None], 5, axis=2).astype(np.float32)
    scan = load(write(tmp_path / "a.nii", array, "RAS"), frame)
    assert scan.volume.array.shape == (12, 10, 5) and scan.volume.spacing == (4.0, 4.0, 2.0)
    back = scan.restore_stored(scan.volume.array)
    assert back.array.shape == (24, 20, 5)
    np.testing.assert_allclose(back.array[4:-4, 4:-4], array[4:-4, 4:-4], rtol=0.02)
    whole = load(tmp_path / "a.nii", sized((8, 8, 8), spacing=(4.0,)))
    assert whole.volume.array.shape == (12, 10, 2)


def test_a_picture_is_a_plane_and_becomes_the_same_picture(tmp_path):
    picture = np.zeros((6, 10), np.float32)
    picture[1, 7], picture[2:5, 2:6] = 1.0, 0.4
    write_png(tmp_path / "a.png", picture)
    scan = load(tmp_path / "a.png", sized((16, 8)))
    # x runs along the columns and y from the last row up: the picture as it is seen.
    assert scan.kind == "picture" and scan.volume.array.shape == (10, 6, 1) and scan.volume.array[7, 4, 0] == 2.0
    np.testing.assert_allclose(
        scan.as_stored(scan.restore_stored(scan.volume.array)), np.minimum(picture, scan.high), atol=0.01
    )


def test_both_sides_of_a_label_map_become_one(tmp_path):
    labels = np.zeros((6, 4, 4), np.int16)
    labels[:2], labels[2:4], labels[4] = 2, 41, 502
    nifti.write(tmp_path / "a.nii.gz", Volume.make(labels, np.eye(4)))
    found = read_labels(tmp_path / "a.nii.gz", sized((4, 4)))
    np.testing.assert_array_equal(found.array[:, 0, 0], [2, 2, 2, 2, 0, 0])
    np.testing.assert_array_equal(simplify_labels(labels[:, 0, 0]), [2, 2, 2, 2, 0, 0])
    assert set(np.unique(read_labels(tmp_path / "a.nii.gz", sized((4, 4), spacing=(2.0,))).array)) <= {0, 2}


def test_fluid_far_from_the_brain_is_none(tmp_path):
    labels = np.zeros((24, 4, 4), np.int16)
    labels[:4], labels[4:] = 3, 24
    nifti.write(tmp_path / "a.nii.gz", Volume.make(labels, np.eye(4)))
    found = read_labels(tmp_path / "a.nii.gz", sized((4, 4))).array
    np.testing.assert_array_equal(found[:, 0, 0], [3] * 4 + [24] * 5 + [0] * 15)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 4, 4)), "an image with contrast, found a constant volume, all zero"),
        (np.full((4, 4, 4), np.nan), "finite voxels"),
        (-head(), "a scan with positive intensities"),
    ],
)
def test_scans_without_an_image_are_refused(array, words, tmp_path):
    nifti.write(tmp_path / "a.nii", Volume.make(array.astype(np.float32), np.eye(4)), allow_nonfinite=True)
    with pytest.raises(InputError, match=words):
        load(tmp_path / "a.nii", sized((4, 4)))


def test_colour_series_and_empty_folders_are_refused(tmp_path):
    colour = np.random.default_rng(0).random((4, 4, 3)).astype(np.float32)
    write_png(tmp_path / "a.png", colour)
    with pytest.raises(InputError, match=r"a grey picture, found shape \(4, 4, 3\)"):
        load(tmp_path / "a.png", sized((4, 4)))
    write_png(tmp_path / "b.png", np.repeat(colour[..., :1], 3, axis=2))
    assert load(tmp_path / "b.png", sized((4, 4))).volume.array.shape == (4, 4, 1)
    nifti.write(tmp_path / "c.nii", Volume.make(np.ones((2, 2, 2, 3), np.float32), np.eye(4)))
    with pytest.raises(InputError, match="3D data, found 4D"):
        load(tmp_path / "c.nii", sized((4, 4)))
    (tmp_path / "empty").mkdir()
    for place in ("empty", "nowhere"):
        with pytest.raises(InputError, match=place):
            find_scans(tmp_path / place, ANY_KIND)
    assert [path.name for path in find_scans(tmp_path, ANY_KIND).paths] == ["a.png", "b.png", "c.nii"]


@pytest.mark.parametrize(
    "settings", [{"size": (4,)}, {"spacing": (-1.0,)}, {"percentile": 0.0}, {"reference": 2.5}, {"high": -1.0}]
)
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        sized(**{"size": (4, 4)} | settings)


@pytest.mark.parametrize("kind", ["symmetric", "scored", "shifted", "hounsfield"])
@pytest.mark.parametrize("suffix", [".nii", ".npy"])
def test_scans_below_zero_become_the_same_image_and_return(tmp_path, kind, suffix):
    array, frame = head((24, 30, 18)), sized((8, 16), percentile=90.0)
    array += np.float32(30) * np.random.default_rng(0).random(array.shape).astype(np.float32)
    if suffix == ".npy":
        array = array[:, :, 9:10]
    scaled = {
        "symmetric": array / array.max() * 2 - 1,
        "scored": (array - array.mean()) / array.std(),
        "shifted": array - 200,
        "hounsfield": array * 3 - 1024,
    }[kind]
    paths = []
    for name, values in (("a", array), ("b", scaled)):
        paths.append(tmp_path / f"{name}{suffix}")
        if suffix == ".npy":
            np.save(paths[-1], values[:, ::-1, 0].T)
        else:
            write(paths[-1], values)
    plain, scan = (load(path, frame) for path in paths)
    # The background is noise about 15, and becomes 0.
    assert np.median(scan.volume.array[0]) == pytest.approx(0, abs=0.06)
    assert np.abs(scan.volume.array - plain.volume.array).max() < 0.12
    assert scan.low < 0 < plain.high and plain.low == 0
    stored = reorient(scan.restore_stored(scan.volume.array)).array
    kept = (scan.volume.array > 0) & (scan.volume.array < 2)
    np.testing.assert_allclose(stored[kept], scaled[kept], rtol=1e-4, atol=1e-4 * np.ptp(scaled))
    # A distance of nothing is nothing.
    assert not scan.restore_stored(np.zeros_like(stored), is_difference=True).array.any()


def test_noise_about_zero_stays_and_scores_within_a_mask_are_refused(tmp_path):
    generator = np.random.default_rng(0)
    array = head((24, 30, 18))
    noisy = load(write(tmp_path / "a.nii", array + generator.normal(0, 30, array.shape)), sized((8, 8)))
    assert noisy.low == 0
    inside = array > 0
    scored = np.where(inside, generator.normal(0, 1, array.shape), 0)
    with pytest.raises(InputError, match=r"b.nii: expected a scan whose background is its lowest .*; give it unscaled"):
        load(write(tmp_path / "b.nii", scored), sized((8, 8)))
    with pytest.raises(InputError, match="whose background is its lowest"):
        load(write(tmp_path / "c.nii", array * 3 - 1024), sized((8, 8), high=4096.0))


@pytest.mark.parametrize("inside", [1, 255, 0.5, 200])
@pytest.mark.parametrize("outside", [0, 100])
def test_masks_of_a_scan_are_read_by_their_values_and_on_its_grid(tmp_path, inside, outside):
    array = head()
    scan = load(write(tmp_path / "a.nii", array), sized((8, 8)))
    mask = np.where(array > 0, max(inside, outside), min(inside, outside)).astype(np.float32)
    np.testing.assert_array_equal(load_head(write(tmp_path / "m.nii", mask), scan, sized((8, 8))), array > 0)
    labels = (array > 0) * np.float32(3) + (array > 500)
    np.testing.assert_array_equal(load_head(write(tmp_path / "l.nii", labels), scan, sized((8, 8))), array > 0)
    with pytest.raises(InputError, match="the shape of|the grid of"):
        load_head(write(tmp_path / "o.nii", mask, spacing=3.0), scan, sized((8, 8)))
    write_png(tmp_path / "m.png", (array[..., 4] > 0).astype(np.uint8))
    with pytest.raises(InputError, match="give NIfTI"):
        load_head(tmp_path / "m.png", scan, sized((8, 8)))
    write_png(tmp_path / "p.png", array[..., 4] / 700)
    picture = load(tmp_path / "p.png", sized((8, 8)))
    np.testing.assert_array_equal(load_head(tmp_path / "m.png", picture, sized((8, 8))), picture.volume.array > 0)


def test_fill_values_are_replaced_on_request(tmp_path):
    array, frame = head(), sized((8, 8))
    plain = load(write(tmp_path / "a.nii", array), frame)
    array[array == 0] = np.finfo(np.float32).min
    path = write(tmp_path / "b.nii", array)
    with pytest.raises(InputError, match="b.nii: expected intensities of at most .*; replace them with --fill VALUE"):
        load(path, frame)
    np.testing.assert_array_equal(load(path, frame, fill=0.0).volume.array, plain.volume.array)


def test_a_dicom_series_is_read_as_its_nifti_is(tmp_path):
    affine = np.array([[-1.0, 0, 0, 9], [0, -1.0, 0, 8], [0, 0, 2.0, -4], [0, 0, 0, 1.0]])
    volume = Volume.make(head(), affine)
    nifti.write(tmp_path / "a.nii", volume)
    save_slices(make_slices(volume, Modality="MR"), tmp_path / "s")
    (found,) = find_scans(tmp_path / "s", ANY_KIND).scans
    frame = sized((8, 8))
    one, other = load(tmp_path / "a.nii", frame), load(found, frame)
    np.testing.assert_array_equal(one.volume.array, other.volume.array)
    np.testing.assert_allclose(one.grid.affine, other.grid.affine, atol=1e-6)


def test_one_plane_is_for_slices_alone(tmp_path):
    plane = head()[:, :, 4:5]
    nifti.write(tmp_path / "a.nii", Volume.make(plane, np.eye(4)))
    assert load(tmp_path / "a.nii", sized((8, 8))).volume.array.shape == plane.shape
    with pytest.raises(InputError, match="several slices, found one plane"):
        load(tmp_path / "a.nii", sized((8, 8, 8)))
