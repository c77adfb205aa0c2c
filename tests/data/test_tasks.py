"""Cases from files: each slice with its mask and its subject, nothing turned, nothing lost, every mistake named."""

import dataclasses
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scan_files import make_slices, save_slices

from jaxmed.arrays.grid import reorient
from jaxmed.data.cuts import cut_scan, cut_truth, write_result
from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.tasks import TaskData, read_cases, read_manifest
from jaxmed.data.windows import middle_of, place
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.images import read_image, write_png
from jaxmed.io.tables import write_table
from jaxmed.recipes.few_shot_stage import write_synthetic
from jaxmed.volume import Volume

pytestmark = pytest.mark.core
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_selfplay.py"
COLUMNS = ("path", "mask", "task", "subject", "split")
SMALL = Preprocess((8, 8))
SHAPE = (14, 12, 6)


def texture(shape=SHAPE, seed=0):
    """Values in [0, 1], every voxel its own."""
    return np.random.default_rng(seed).uniform(0, 1, shape).astype(np.float32)


def box_mask(shape=SHAPE, corner=(6, 2, 1), size=(4, 4, 3)):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = True
    return mask


def write_volume(path, array, codes="LPS", spacing=(1.0, 1.0, 3.0)):
    """Store a volume along other axes than RAS."""
    kept = array.astype(np.uint8) if array.dtype == bool else array
    nifti.write(path, reorient(Volume.make(kept, np.diag([*spacing, 1.0])), codes))
    return path.name


def save(path, array):
    np.save(path, array)
    return path.name


def manifest(folder, *rows, columns=COLUMNS):
    write_table(folder / "cases.csv", columns, [dict(zip(columns, row, strict=True)) for row in rows])
    return TaskData(folder / "cases.csv", min_voxels=4)


@pytest.fixture
def volume(tmp_path):
    """A manifest of one volume, its voxels and its mask in RAS+ order."""
    array, mask = texture(), box_mask()
    row = (write_volume(tmp_path / "a.nii.gz", array), write_volume(tmp_path / "m.nii.gz", mask))
    return manifest(tmp_path, (*row, "liver", "anna", "train")), array, mask


@pytest.fixture
def stack(tmp_path):
    """A manifest of three pictures in a file, rows from the top."""
    pictures, masks = texture((3, 8, 8)), np.zeros((3, 8, 8), np.uint8)
    masks[:, 1:4, 2:7] = 1
    row = save(tmp_path / "a.npy", pictures), save(tmp_path / "m.npy", masks)
    return manifest(tmp_path, (*row, "nine", "writer_{item}", "support")), pictures, masks


def test_slices_with_enough_of_the_mask_become_cases_about_its_middle(volume):
    config, array, mask = volume
    cases, failures = read_cases(config, SMALL, "train")
    assert failures == () and cases.task_names == ("liver",) and cases.tasks.tolist() == [0, 0, 0]
    assert cases.subjects == ("anna",) * 3 and cases.names == tuple(f"a.nii.gz slice {z}" for z in (1, 2, 3))
    # The mask covers x from 6 to 9 and y from 2 to 5: its middle, 8 and 4, is to be voxel 4 of the image.
    np.testing.assert_array_equal(cases.images, np.moveaxis(array[4:12, 0:8, 1:4], 2, 0))
    np.testing.assert_array_equal(cases.masks, np.moveaxis(mask[4:12, 0:8, 1:4], 2, 0))


@pytest.mark.parametrize(("axis", "number"), [("sagittal", 0), ("coronal", 1)])
def test_slices_are_cut_across_any_axis(axis, number, volume):
    config, array, mask = volume
    cases, _ = read_cases(config, Preprocess((6, 6), axis=axis), "train")
    found = np.flatnonzero(mask.any(tuple(other for other in range(3) if other != number)))
    assert len(cases.images) == len(found)
    assert cases.masks.sum() == mask.sum()
    np.testing.assert_allclose(np.sort(cases.images[cases.masks]), np.sort(array[mask]))


def test_a_volume_is_one_patch_in_3d(volume):
    config, array, mask = volume
    cases, _ = read_cases(config, Preprocess((8, 6, 10)), "train")
    # 6 slices in a patch of 10: two empty ones on either side.
    np.testing.assert_array_equal(cases.images[0, :, :, 2:8], array[4:12, 1:7])
    assert cases.images.shape == (1, 8, 6, 10) and not cases.images[0, :, :, [0, 1, 8, 9]].any()
    np.testing.assert_array_equal(cases.masks[0, :, :, 2:8], mask[4:12, 1:7])


def test_a_stack_of_volumes_has_one_patch_per_item(tmp_path):
    array, masks = texture((2, 8, 9, 10)), np.stack([box_mask((8, 9, 10)), np.zeros((8, 9, 10), bool)])
    row = save(tmp_path / "a.npy", array), save(tmp_path / "m.npy", masks)
    cases, failures = read_cases(manifest(tmp_path, (*row, "t", "s{item}", "train")), Preprocess((8, 8, 8)), "train")
    # The mask's middle is (8, 4, 3): the window of 8 begins at 0, 0 and 0, but for what would lie outside.
    assert failures == () and cases.names == ("a.npy item 0",) and cases.subjects == ("s0000",)
    np.testing.assert_array_equal(cases.images[0], array[0, :8, :8, :8])
    # Pictures one after the other are no volume.
    save(tmp_path / "flat.npy", array[0])
    with pytest.raises(InputError, match="an array of item, x, y, z, .* found 3D"):
        cut_scan(tmp_path / "flat.npy", Preprocess((8, 8, 8)))
    with pytest.raises(InputError, match="one volume, found a stack of 2"):
        cut_scan(tmp_path / "a.npy", Preprocess((8, 8, 8)))


def test_a_mask_may_be_smeared_by_jpeg(tmp_path):
    mask = np.pad(box_mask((30, 30), (7, 7), (13, 13)), 1)
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "m.jpg", quality=60)
    write_png(tmp_path / "a.png", texture((32, 32)))
    assert len(np.unique(read_image(tmp_path / "m.jpg"))) > 2
    cases, _ = read_cases(manifest(tmp_path, ("a.png", "m.jpg", "t", "s", "train")), Preprocess((32, 32)), "train")
    np.testing.assert_array_equal(cases.masks[0], mask[::-1].T)


def test_a_voxel_size_is_taken_within_the_slices(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 1, 24)[:, None, None], (24, 24, 4)).astype(np.float32)
    mask = box_mask(ramp.shape, (4, 8, 1), (12, 8, 2))
    row = write_volume(tmp_path / "a.nii", ramp), write_volume(tmp_path / "m.nii", mask)
    config = manifest(tmp_path, (*row, "t", "s", "train"))
    cases, _ = read_cases(config, Preprocess((12, 12), spacing=(2.0,)), "train")
    assert cases.images.shape == (2, 12, 12)
    np.testing.assert_array_equal(cases.masks[0], box_mask((12, 12), (2, 4), (6, 4)))
    # Voxels of 2 mm: the mean of two neighbours, but for the edges.
    np.testing.assert_allclose(cases.images[0, 2:-2, 6], ramp[:, 0, 0].reshape(12, 2).mean(1)[2:-2], atol=1e-3)


def test_items_of_a_stack_are_subjects_and_stand_upright(stack):
    config, pictures, masks = stack
    cases, _ = read_cases(config, SMALL, "support")
    assert cases.subjects == ("writer_0000", "writer_0001", "writer_0002")
    assert cases.names == ("a.npy item 0", "a.npy item 1", "a.npy item 2")
    # x along the columns, y from the last row up.
    np.testing.assert_array_equal(cases.images, pictures[:, ::-1].transpose(0, 2, 1))
    np.testing.assert_array_equal(cases.masks, masks[:, ::-1].transpose(0, 2, 1) > 0)


def test_pictures_of_8_bits_are_divided_by_255(tmp_path):
    picture, mask = (texture((8, 9)) * 255).astype(np.uint8), box_mask((8, 9), (1, 2), (4, 4)).astype(np.uint8) * 255
    write_png(tmp_path / "a.png", picture)
    write_png(tmp_path / "m.png", mask)
    cases, _ = read_cases(manifest(tmp_path, ("a.png", "m.png", "t", "s", "test")), Preprocess((9, 8)), "test")
    np.testing.assert_allclose(cases.images[0], picture[::-1].T / np.float32(255))
    np.testing.assert_array_equal(cases.masks[0], mask[::-1].T > 0)
    assert cases.names == ("a.png",)


def test_intensities_become_0_to_1_as_the_frame_or_the_row_says(tmp_path):
    hu = np.round(texture() * 1500 - 1000)
    row = write_volume(tmp_path / "a.nii.gz", hu), write_volume(tmp_path / "m.nii.gz", box_mask())
    rows = (*row, "a", "s", "train", "ct"), (*row, "b", "s", "train", "percentile")
    cases, _ = read_cases(manifest(tmp_path, *rows, columns=(*COLUMNS, "intensity")), SMALL, "train")
    part = np.moveaxis(hu[4:12, 0:8, 1:4], 2, 0)
    assert cases.task_names == ("a", "b") and cases.tasks.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(cases.images[:3], np.clip((part + 175) / 425, 0, 1), atol=1e-6)
    low, high = np.percentile(hu, (1, 99))
    np.testing.assert_allclose(cases.images[3:], np.clip((part - low) / (high - low), 0, 1), atol=1e-5)


def test_a_value_chooses_one_label_of_a_map(tmp_path):
    labels = box_mask().astype(np.uint8) * 2 + box_mask(corner=(0, 8, 1)).astype(np.uint8) * 5
    row = write_volume(tmp_path / "a.nii.gz", texture()), write_volume(tmp_path / "m.nii.gz", labels)
    columns = (*COLUMNS, "value")
    rows = [(*row, f"t{value}", "s", "train", value) for value in ("5", "3", "")]
    cases, failures = read_cases(manifest(tmp_path, *rows, columns=columns), SMALL, "train")
    assert cases.task_names == ("t5", "t") and np.bincount(cases.tasks).tolist() == [3, 3]
    assert cases.masks[0].sum() == 16 and not cases.masks[0, :, 4:].all()
    assert len(failures) == 1 and "expected the label 3, found the labels 0, 2, 5" in failures[0]["reason"]


def test_cases_of_a_task_are_thinned_evenly(stack):
    config, pictures, _ = stack
    cases, _ = read_cases(dataclasses.replace(config, max_items=2), SMALL, "support")
    assert cases.names == ("a.npy item 0", "a.npy item 2")
    assert cases.select([1]).subjects == ("writer_0002",)
    np.testing.assert_array_equal(cases.select([1]).images[0], pictures[2, ::-1].T)


def test_shifts_move_the_mask_off_the_middle_and_repeat(tmp_path):
    mask = box_mask((40, 40, 30), (18, 18, 0), (4, 4, 30))
    row = write_volume(tmp_path / "a.nii.gz", texture((40, 40, 30))), write_volume(tmp_path / "m.nii.gz", mask)
    config = dataclasses.replace(manifest(tmp_path, (*row, "t", "s", "train")), shift=3)
    frame = Preprocess((16, 16))
    cases, _ = read_cases(config, frame, "train", seed=1)
    again, _ = read_cases(config, frame, "train", seed=1)
    other, _ = read_cases(config, frame, "train", seed=2)
    np.testing.assert_array_equal(cases.images, again.images)
    assert (cases.images != other.images).any() and cases.masks.sum() == mask.sum()
    offsets = np.array([middle_of(one) for one in cases.masks]) - 8
    assert np.abs(offsets).max() == 3 and len(np.unique(offsets, axis=0)) > 10


def test_subjects_are_split_where_the_manifest_does_not(tmp_path):
    rows = [(f"{n}.png", f"{n}.png", "t", f"s{n // 2}") for n in range(20)]
    config = dataclasses.replace(manifest(tmp_path, *rows, columns=COLUMNS[:4]), fractions=(0.6, 0.2, 0.2))
    homes = {}
    for record in read_manifest(config, seed=0):
        homes.setdefault(record.subject, set()).add(record.split)
    assert all(len(splits) == 1 for splits in homes.values())
    assert sorted(next(iter(splits)) for splits in homes.values()) == ["test"] * 2 + ["train"] * 6 + ["validation"] * 2


def test_windows_stay_inside_and_short_axes_are_centred():
    assert place((20, 9), (8, 8), (2, 8)) == (0, 1)
    assert place((20, 4), (8, 8), (10, 0)) == (6, -2)
    assert place((20, 4), (8, 8)) == (6, -2)
    assert middle_of(box_mask((20,), (6,), (4,))) == (8,)


@pytest.mark.parametrize("codes", ["LPS", "SAL"])
@pytest.mark.parametrize(
    ("frame", "tiles"),
    [(SMALL, False), (SMALL, True), (Preprocess((16, 8), axis="coronal"), True), (Preprocess((8, 8, 8)), True)],
)
def test_what_is_found_in_a_volume_goes_back_to_its_voxels(codes, frame, tiles, tmp_path):
    mask = box_mask(corner=(4, 4, 1), size=(6, 4, 3))
    write_volume(tmp_path / "a.nii.gz", texture(), codes)
    write_volume(tmp_path / "m.nii.gz", mask, codes)
    scan = cut_scan(tmp_path / "a.nii.gz", frame, tiles=tiles)
    stored, truth = nifti.read(tmp_path / "a.nii.gz"), nifti.read(tmp_path / "m.nii.gz")
    back = scan.restore(scan.images)
    np.testing.assert_array_equal(back.affine, stored.affine)
    seen = scan.restore(np.ones_like(scan.images))
    np.testing.assert_allclose(back.array, np.where(seen.array > 0, stored.array, 0), atol=1e-6)
    assert (seen.array == 1).all() == tiles and len(scan.names) == len(scan.images)
    found = scan.restore(cut_truth(tmp_path / "m.nii.gz", scan, frame))
    assert found.array.dtype == np.uint8
    np.testing.assert_array_equal(found.array, np.where(seen.array > 0, truth.array, 0))


def test_a_box_says_where_to_look(volume, tmp_path):
    _, array, mask = volume
    scan = cut_scan(tmp_path / "a.nii.gz", SMALL, tmp_path / "m.nii.gz")
    assert [window.item for window in scan.windows] == [1, 2, 3] and scan.names[0] == "a.nii.gz slice 1"
    np.testing.assert_array_equal(scan.images, np.moveaxis(array[4:12, 0:8, 1:4], 2, 0))
    # In the same place as the cases that were trained on.
    np.testing.assert_array_equal(
        cut_truth(tmp_path / "m.nii.gz", scan, SMALL), np.moveaxis(mask[4:12, 0:8, 1:4], 2, 0)
    )
    write_volume(tmp_path / "none.nii.gz", np.zeros(SHAPE, bool))
    with pytest.raises(InputError, match="expected a box with voxels inside"):
        cut_scan(tmp_path / "a.nii.gz", SMALL, tmp_path / "none.nii.gz")


def test_a_coarser_image_goes_back_to_the_voxels_of_the_file(tmp_path):
    mask = box_mask((24, 24, 3), (4, 8, 0), (12, 8, 3))
    write_volume(tmp_path / "a.nii.gz", texture((24, 24, 3)))
    write_volume(tmp_path / "m.nii.gz", mask)
    frame = Preprocess((12, 12), spacing=(2.0,))
    scan = cut_scan(tmp_path / "a.nii.gz", frame)
    found = scan.restore(cut_truth(tmp_path / "m.nii.gz", scan, frame))
    np.testing.assert_array_equal(found.array, nifti.read(tmp_path / "m.nii.gz").array)
    assert found.grid.shape == (24, 24, 3)


def test_results_are_files_of_the_kind_of_the_input(stack, tmp_path):
    _, pictures, masks = stack
    out = tmp_path / "out"
    scan = cut_scan(tmp_path / "a.npy", SMALL)
    np.testing.assert_allclose(np.load(write_result(out, "a", scan, scan.images)), pictures, atol=1e-6)
    truth = cut_truth(tmp_path / "m.npy", scan, SMALL)
    np.testing.assert_array_equal(np.load(write_result(out, "m", scan, truth)), masks)

    picture = (texture((20, 11)) * 255).astype(np.uint8)
    write_png(tmp_path / "a.png", picture)
    scan = cut_scan(tmp_path / "a.png", SMALL, tiles=True)
    np.testing.assert_allclose(read_image(write_result(out, "a", scan, scan.images)) * 255, picture, atol=1e-4)
    assert set(np.unique(read_image(write_result(out, "b", scan, scan.images > 2)))) == {0}
    assert set(np.unique(read_image(write_result(out, "c", scan, scan.images >= 0)))) == {1}

    cube = texture((1, 8, 9, 10))
    save(tmp_path / "c.npy", cube)
    scan = cut_scan(tmp_path / "c.npy", Preprocess((8, 8, 8)), tiles=True)
    np.testing.assert_allclose(np.load(write_result(out, "c", scan, scan.images)), cube, atol=1e-6)

    write_volume(tmp_path / "v.nii.gz", texture(), "PSR")
    scan = cut_scan(tmp_path / "v.nii.gz", SMALL, tiles=True)
    written, stored = nifti.read(write_result(out, "v", scan, scan.images)), nifti.read(tmp_path / "v.nii.gz")
    np.testing.assert_allclose(written.array, stored.array, atol=1e-6)
    np.testing.assert_array_equal(written.affine, stored.affine)


def test_a_broken_file_does_not_stop_the_others(tmp_path):
    good = write_volume(tmp_path / "a.nii.gz", texture()), write_volume(tmp_path / "m.nii.gz", box_mask())
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "a.nii.gz").read_bytes()[:200])
    array = texture()
    array[2, 3, 4] = np.nan
    nifti.write(tmp_path / "nan.nii.gz", Volume.make(array, np.eye(4)), allow_nonfinite=True)
    empty, other = np.zeros(SHAPE, bool), box_mask((14, 12, 5))
    wrong = {
        "cut.nii.gz": (good[1], "NIfTI"),
        "nan.nii.gz": (good[1], "NaN"),
        "gone.nii.gz": (good[1], "no such file"),
        write_volume(tmp_path / "flat.nii.gz", np.full(SHAPE, 0.5, np.float32)): (good[1], "constant"),
        write_volume(tmp_path / "hu.nii.gz", texture() * 900 - 500): (good[1], r"values in \[0, 1\]"),
        write_volume(tmp_path / "b.nii.gz", texture()): (write_volume(tmp_path / "e.nii.gz", empty), "voxels inside"),
        write_volume(tmp_path / "c.nii.gz", texture()): (write_volume(tmp_path / "o.nii.gz", other), "the shape of"),
        write_volume(tmp_path / "d.nii.gz", texture()): ("absent.nii.gz", "no such file"),
        save(tmp_path / "four.npy", texture((2, 8, 8, 8))): (good[1], "4D"),
        save(tmp_path / "tiny.npy", texture((2, 1, 8))): (good[1], "2 x 2 voxels or more"),
    }
    rows = [(*good, "t", "good", "train"), *((path, mask, "t", path, "train") for path, (mask, _) in wrong.items())]
    cases, failures = read_cases(manifest(tmp_path, *rows), SMALL, "train")
    assert set(cases.subjects) == {"good"} and [failure["id"] for failure in failures] == list(wrong)
    for failure, (_, reason) in zip(failures, wrong.values(), strict=True):
        assert len(failure["reason"].splitlines()) == 1
        with pytest.raises(ValueError, match=reason):
            raise ValueError(failure["reason"])


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], COLUMNS, "at least one record"),
        ([("a", "m", "t", "s")], ("path", "msak", "task", "subject"), "a column 'mask'"),
        ([("a", "m", "t", "s", "train")], (*COLUMNS[:4], "spilt"), "a column 'split' or none, found 'spilt'"),
        ([("a", "", "t", "s", "train")], COLUMNS, "a value under 'mask', found an empty cell"),
        ([("a", "m", "t", "s", "tain")], COLUMNS, "one of train, validation, support, test under 'split'"),
        ([("a", "m", "t", "s", "train"), ("b", "m", "t", "s", "test")], COLUMNS, "every subject in one split"),
        ([("a", "m", "t", "s", "test")], COLUMNS, "rows with split 'train', found only test"),
        ([("a", "m", "t", "s", "train", "hu")], (*COLUMNS, "intensity"), "one of unit, ct, percentile"),
        ([("a", "m", "t", "s", "train", "liver")], (*COLUMNS, "value"), "the number of a label"),
        ([("a.nii", "m.nii", "t", "s", "train")], COLUMNS, "a NIfTI file, found no such file"),
        ([("a.nii", "m", "t", "r", "train"), ("b.nii", "m", "t", "s", "train")], COLUMNS, "all broken: .*a.nii"),
    ],
)
def test_a_wrong_manifest_is_told_in_one_line(rows, columns, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        read_cases(manifest(tmp_path, *rows, columns=columns), SMALL, "train")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("array", "frame", "message"),
    [
        (texture((8, 8, 3)), Preprocess((8, 8), intensity=Intensity("window")), "a CT scan in HU, found values in"),
        (
            texture((8, 8, 3)) * 50 - 900,
            Preprocess((8, 8), intensity=Intensity("window")),
            "inside the window of -175 to 250 HU",
        ),
        (
            box_mask((8, 8, 8), (1, 1, 1), (1, 1, 2)),
            Preprocess((8, 8), intensity=Intensity("percentile")),
            "a spread between",
        ),
        (texture((8, 8, 3)) + 1, Preprocess((8, 8)), "set --preprocess.intensity.kind window or percentile"),
        (texture((8, 8, 3)), Preprocess((64, 8)), "use a smaller --preprocess.size"),
    ],
)
def test_images_of_another_range_or_size_are_refused(array, frame, message, tmp_path):
    write_volume(tmp_path / "a.nii.gz", array.astype(np.float32))
    with pytest.raises(InputError, match=message):
        cut_scan(tmp_path / "a.nii.gz", frame)


def test_pictures_of_colour_and_images_as_masks_are_refused(tmp_path):
    write_png(tmp_path / "c.png", (texture((8, 8, 3)) * 255).astype(np.uint8))
    with pytest.raises(InputError, match="a grey picture"):
        cut_scan(tmp_path / "c.png", SMALL)
    write_png(tmp_path / "g.png", texture((8, 8)))
    scan = cut_scan(tmp_path / "g.png", SMALL)
    with pytest.raises(InputError, match="a mask of two values, such as 0 and 1, found the values"):
        cut_truth(tmp_path / "g.png", scan, SMALL)
    with pytest.raises(InputError, match="NIfTI, or an array of item, x, y, z, for images of"):
        cut_scan(tmp_path / "g.png", Preprocess((8, 8, 8)))
    write_volume(tmp_path / "a.nii.gz", texture())
    with pytest.raises(
        InputError, match=r"a mask of two values, such as 0 and 1, found the values .* in all\); cut probabilities"
    ):
        cut_truth(tmp_path / "a.nii.gz", cut_scan(tmp_path / "a.nii.gz", SMALL), SMALL)
    write_volume(tmp_path / "m.nii.gz", box_mask())
    with pytest.raises(InputError, match="1 of kind picture"):
        cut_truth(tmp_path / "m.nii.gz", scan, SMALL)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Preprocess, "size", (8,)), (Preprocess, "spacing", (0.0,)), (Intensity, "window", (1.0, 1.0)),
        (Intensity, "percentiles", (1.0, 101.0)), (TaskData, "fractions", (0.5, 0.2, 0.2)),
        (TaskData, "min_voxels", 0), (TaskData, "shift", -1),
    ],
)  # fmt: skip
def test_impossible_settings_are_named(kind, field, value):
    with pytest.raises(ValueError, match=field):
        kind(**{field: value})


def test_synthetic_puzzles_take_the_road_of_files(tmp_path):
    config = write_synthetic(TaskData(synthetic=4), Preprocess((16, 16)), 0, tmp_path)
    train, failures = read_cases(config, Preprocess((16, 16)), "train")
    assert failures == () and train.images.shape == (20, 16, 16) and np.bincount(train.tasks).tolist() == [4] * 5
    support, test = (read_cases(config, Preprocess((16, 16)), split)[0] for split in ("support", "test"))
    assert support.task_names == test.task_names == ("blob", "star")
    assert not set(support.subjects) & set(test.subjects)


def test_real_lesions_are_cut_about_their_masks(shared_data, tmp_path):
    rows = []
    for name in ("STS_008", "STS_025"):
        image, mask = (shared_data / "sts_mr_pet_ct" / name / f"mr_t1_{what}.nii.gz" for what in ("image", "mask"))
        rows.append((image, mask, "lesion", name, "test"))
    frame = Preprocess((64, 64), spacing=(1.5,), intensity=Intensity("percentile"))
    cases, failures = read_cases(manifest(tmp_path, *rows), frame, "test")
    assert failures == () and set(cases.subjects) == {"STS_008", "STS_025"}
    assert cases.images.min() == 0 and cases.images.max() == 1
    for name in ("STS_008", "STS_025"):
        stored = nifti.read(shared_data / "sts_mr_pet_ct" / name / "mr_t1_mask.nii.gz")
        ours = cases.masks[[subject == name for subject in cases.subjects]].sum() * 1.5**2 * stored.spacing[2]
        assert ours == pytest.approx(stored.array.sum() * np.prod(stored.spacing), rel=0.03)  # mm^3


def test_a_real_tumour_goes_back_to_its_scan(shared_data):
    folder = shared_data / "tumour_mri"
    image, label = folder / "brain1_image.nii.gz", folder / "brain1_label.nii.gz"
    frame = Preprocess((64, 64), intensity=Intensity("percentile"))
    scan = cut_scan(image, frame, label)
    found = scan.restore(cut_truth(label, scan, frame))
    stored = nifti.read(label)
    np.testing.assert_array_equal(found.array, stored.array)
    np.testing.assert_array_equal(found.affine, stored.affine)


def prepare(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare_selfplay.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_digits_become_tasks_with_the_noise_of_the_reference(shared_data, tmp_path, monkeypatch):
    archive = shared_data / "mnist_digits" / "mnist_t10k_first6600.npz"
    prepare(monkeypatch, "digits", archive, tmp_path, "--train", 20, "--validation", 8, "--support", 16, "--test", 12)
    config, frame = TaskData(tmp_path / "manifest.csv"), Preprocess((32, 32))
    found = {split: read_cases(config, frame, split)[0] for split in ("train", "validation", "support", "test")}
    assert found["train"].task_names == tuple(f"digit{n}" for n in range(5))
    assert found["validation"].task_names == ("digit5",)
    novel = tuple(f"digit{n}" for n in range(6, 10))
    assert found["support"].task_names == found["test"].task_names == novel
    assert [len(cases.images) for cases in found.values()] == [100, 8, 64, 48]
    everything = [mask.tobytes() for cases in found.values() for mask in cases.masks]
    assert len(set(everything)) == len(everything)  # no picture stands twice
    images = np.concatenate([cases.images for cases in found.values()])
    masks = np.concatenate([cases.masks for cases in found.values()])
    # The padded border holds noise alone: half of N(0, 0.4^2) becomes 0, the mean of the rest is 0.4 sqrt(2/pi).
    border = images[:, :2]
    assert (border == 0).mean() == pytest.approx(0.5, abs=0.01)
    assert border[border > 0].mean() == pytest.approx(0.4 * np.sqrt(2 / np.pi), rel=0.02)
    assert not masks[:, :2].any() and images[masks].mean() > 0.7


def test_organs_and_lesions_become_manifests_without_shared_subjects(shared_data, tmp_path, monkeypatch):
    folders = {"sarcoma": "sts_mr_pet_ct", "tumour": "tumour_mri", "cardiac": "cardiac_mr_sunnybrook"}
    folders["chest"] = "chest_ct_heart"
    given = [part for name, folder in folders.items() for part in (f"--{name}", shared_data / folder)]
    prepare(monkeypatch, "lesions", tmp_path, *given)
    records = read_manifest(TaskData(tmp_path / "manifest.csv"), 0)
    tasks = {
        split: {r.task for r in records if r.split == split} for split in ("train", "validation", "support", "test")
    }
    organs = {"left ventricle", "heart", "pulmonary artery"}
    assert tasks == {"train": organs, "validation": {"left ventricle"}, "support": {"lesion"}, "test": {"lesion"}}
    assert len({r.subject for r in records if r.task == "left ventricle"}) == 30
    tested = [
        r.subject
        for path in sorted(tmp_path.glob("leave_out_*.csv"))
        for r in read_manifest(TaskData(path), 0) if r.split == "test"
    ]  # fmt: skip
    assert len(tested) == len(set(tested)) == 7 and {r.subject for r in records if r.task == "lesion"} == set(tested)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
@pytest.mark.parametrize("bits", [10, 12])
def test_pictures_that_use_a_few_of_their_bits_are_told_and_scaled_on_request(tmp_path, suffix, bits):
    pixels = (texture((16, 16)) * (2**bits - 1)).astype(np.uint16)
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path)
    with pytest.raises(InputError, match="values that reach across .*; set --preprocess.intensity.kind percentile"):
        cut_scan(path, SMALL)
    found = cut_scan(path, dataclasses.replace(SMALL, intensity=Intensity("percentile"))).images
    assert found.min() == 0 and found.max() == 1
    Image.fromarray(np.uint16(pixels * 2 ** (16 - bits))).save(tmp_path / "whole.png")
    assert cut_scan(tmp_path / "whole.png", SMALL).images.max() > 0.9


@pytest.mark.parametrize("values", [(100, 200), (0, 1), (0, 255)])
def test_the_larger_of_two_greys_is_inside(tmp_path, values):
    mask = box_mask()[..., 1]
    write_png(tmp_path / "a.png", texture(mask.shape))
    Image.fromarray(np.where(mask, values[1], values[0]).astype(np.uint8)).save(tmp_path / "m.png")
    coloured = Image.fromarray(mask.astype(np.uint8))
    coloured.putpalette([10, 20, 30, 200, 0, 0])
    coloured.save(tmp_path / "p.png")
    scan = cut_scan(tmp_path / "a.png", SMALL)
    for name in ("m.png", "p.png"):
        truth = cut_truth(tmp_path / name, scan, SMALL)
        assert truth.sum() == mask.sum()


def test_fill_values_are_replaced_on_request(tmp_path):
    array = texture()
    array[0] = -1e30
    row = write_volume(tmp_path / "a.nii.gz", array), write_volume(tmp_path / "m.nii.gz", box_mask())
    config = manifest(tmp_path, (*row, "t", "s", "train"))
    with pytest.raises(InputError, match="a.nii.gz: expected intensities of at most .*--fill VALUE"):
        read_cases(config, SMALL, "train")
    cases, failures = read_cases(config, SMALL, "train", fill=0.5)
    assert failures == () and cases.images.min() >= 0


def test_a_dicom_series_is_read_as_its_nifti_is_and_masks_lie_on_its_grid(tmp_path):
    affine = np.array([[-1.0, 0, 0, 9], [0, -1.0, 0, 8], [0, 0, 3.0, -4], [0, 0, 0, 1.0]])
    volume = Volume.make(np.round(texture() * 1000).astype(np.float32), affine)
    nifti.write(tmp_path / "a.nii.gz", volume)
    save_slices(make_slices(volume), tmp_path / "s")
    frame = Preprocess((8, 8), intensity=Intensity("percentile"))
    one, other = cut_scan(tmp_path / "a.nii.gz", frame), cut_scan(tmp_path / "s", frame)
    np.testing.assert_array_equal(one.images, other.images)
    path = write_result(tmp_path / "out", "mask", other, one.images > 0.5)
    np.testing.assert_allclose(nifti.read(path).affine, affine, atol=1e-6)
    with pytest.raises(InputError, match="several slices, found one plane"):
        nifti.write(tmp_path / "plane.nii", Volume.make(volume.array[..., :1], affine))
        cut_scan(tmp_path / "plane.nii", Preprocess((8, 8, 8)))
