"""Label maps: onto a network's grid and back, and what is refused of a table of them."""

import numpy as np
import pytest

from jaxmed.data.label_maps import (
    MaskData,
    PreparedPair,
    labels_from_input,
    labels_to_input,
    list_masked,
    masked_source,
)
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.scans import ScanFiles
from jaxmed.io.tables import write_table
from jaxmed.volume import Volume

pytestmark = pytest.mark.core
LABELS = (0, 2, 5)
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
PREPROCESS = Preprocess((8, 12, 12), axes="zyx", spacing=(2.0, 1.0, 1.0))


def blocks(shape=(12, 12, 8)):
    """Two boxes that touch."""
    array = np.zeros(shape, np.int16)
    array[2:6, 3:8, 1:5], array[6:10, 2:9, 2:7] = 2, 5
    return array


def test_label_maps_go_to_the_input_and_back():
    mask = Volume.make(blocks().astype(np.int32), AFFINE)
    places = labels_to_input(mask, LABELS, PREPROCESS)
    np.testing.assert_array_equal(np.array(LABELS)[places], mask.array.transpose(2, 1, 0))
    shares = (places[..., None] == np.arange(3)).astype(np.float32)
    back = labels_from_input(shares, LABELS, PREPROCESS, mask.grid)
    np.testing.assert_array_equal(back.array, mask.array)
    np.testing.assert_array_equal(back.affine, AFFINE)
    assert not labels_to_input(Volume.make(0 * mask.array, AFFINE), LABELS, PREPROCESS).any()


def test_what_lies_beyond_the_scan_or_the_input_is_background():
    mask = Volume.make(np.full((12, 12, 8), 5, np.int32), AFFINE)
    wide = Preprocess((12, 16, 12), axes="zyx", spacing=(2.0, 1.0, 1.0))
    places = labels_to_input(mask, LABELS, wide)
    assert (places[2:10, 2:14] == 2).all() and places.sum() == 2 * mask.array.size
    narrow = Preprocess((8, 6, 6), axes="zyx", spacing=(2.0, 1.0, 1.0))
    shares = np.zeros((*narrow.size, 3), np.float32)
    shares[..., 1] = 1
    found = labels_from_input(shares, LABELS, narrow, mask.grid).array
    assert (found[3:9, 3:9] == 2).all() and found.sum() == 2 * 6 * 6 * 8


def test_no_gap_opens_between_labels_that_touch_where_voxels_change():
    mask = Volume.make(blocks().astype(np.int32), AFFINE)
    fine = Preprocess((16, 18, 18), axes="zyx", spacing=(1.0, 2 / 3, 2 / 3))
    places = labels_to_input(mask, LABELS, fine)
    inside = places[4:8, 6:10]  # slices and rows that both boxes fill
    columns = np.flatnonzero((inside > 0).all((0, 1)))
    assert len(columns) == columns[-1] - columns[0] + 1 and {1, 2} <= set(inside[..., columns].ravel().tolist())


@pytest.fixture
def cases(tmp_path):
    """Four scans with label maps; a function writes their table, with changes to some cells."""
    rng = np.random.default_rng(0)
    for number in range(4):
        scan = rng.uniform(0, 1, (12, 12, 8)).astype(np.float32)
        nifti.write(tmp_path / f"scan{number}.nii.gz", Volume.make(scan, AFFINE))
        nifti.write(tmp_path / f"mask{number}.nii.gz", Volume.make(blocks(), AFFINE))

    def table(changes=(), **columns):
        splits = ("train", "train", "validation", "test")
        rows = [
            {"path": f"scan{n}.nii.gz", "mask": f"mask{n}.nii.gz", "subject": f"s{n}", "split": split}
            for n, split in enumerate(splits)
        ]
        for number, field, value in changes:
            rows[number][field] = value
        write_table(tmp_path / "cases.csv", tuple(rows[0]), rows)
        return MaskData(tmp_path / "cases.csv", **columns)

    return table


def write_mask(folder, name, array, affine=AFFINE):
    nifti.write(folder / name, Volume.make(array, affine))
    return name


def test_a_table_is_read_with_the_labels_of_its_training_cases(cases, tmp_path):
    listed = list_masked(cases(), 0, PREPROCESS)
    assert listed.labels == LABELS and listed.subjects == ("s0", "s1", "s2", "s3") and not listed.notes
    assert [listed.rows(split) for split in ("train", "validation", "test")] == [[0, 1], [2], [3]]
    # A case without a label is told, and is no mistake.
    write_mask(tmp_path, "empty.nii.gz", 0 * blocks())
    listed = list_masked(cases([(2, "mask", "empty.nii.gz")]), 0, PREPROCESS)
    assert listed.labels == LABELS and "1 of 3 label maps to learn from hold no label" in listed.notes[0]
    assert list_masked(cases(labels=(5, 2, 7)), 0, PREPROCESS).labels == (0, 2, 5, 7)


def test_a_broken_case_of_the_split_test_stops_nothing(cases, tmp_path):
    (tmp_path / "scan3.nii.gz").write_bytes(b"not a scan")
    write_mask(tmp_path, "seven.nii.gz", np.full_like(blocks(), 7))
    listed = list_masked(cases([(3, "mask", "seven.nii.gz")]), 0, PREPROCESS)
    assert listed.labels == LABELS and len(listed.scans) == 4
    learnt = listed.learnt()
    assert learnt.subjects == ("s0", "s1", "s2") and learnt.rows("test") == [] and len(learnt.masks) == 3
    assert learnt.labels == LABELS and learnt.scans == listed.scans[:3]


def test_records_hold_image_and_label_from_files_and_from_a_cache(cases, tmp_path):
    listed, field = list_masked(cases(), 0, PREPROCESS), PreparedPair(PREPROCESS, LABELS)
    for source in (masked_source(listed, field), masked_source(listed, field, tmp_path / "cache")):
        record = field(source[1])
        assert record["image"].shape == (8, 12, 12, 1) and record["label"].dtype == np.int32
        np.testing.assert_allclose(record["image"], PREPROCESS(ScanFiles(listed.scans[1].path)), atol=1e-3)
        np.testing.assert_array_equal(np.array(LABELS)[record["label"]], blocks().transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("name", "array", "affine", "message"),
    [
        ("half", blocks() / np.float32(2), AFFINE, "half.nii.gz: expected whole numbers"),
        ("below", -blocks(), AFFINE, "below.nii.gz: expected labels from 0 to 32767, found values from -5 to 0"),
        ("cut", blocks()[:10], AFFINE, "cut.nii.gz: expected the shape of"),
        ("moved", blocks(), np.diag([1.0, 1.0, 2.5, 1.0]), "moved.nii.gz: expected the grid of"),
        ("twelve", np.where(blocks() == 5, 12, blocks()).astype(np.int16), AFFINE,
         "twelve.nii.gz: expected the labels 0, 2, 5, found the value 12"),
    ],
)  # fmt: skip
def test_a_map_that_is_none_is_refused(cases, tmp_path, name, array, affine, message):
    write_mask(tmp_path, f"{name}.nii.gz", array, affine)
    with pytest.raises(InputError) as error:
        list_masked(cases([(2, "mask", f"{name}.nii.gz")]), 0, PREPROCESS)
    assert message in str(error.value)


EMPTY = [(number, "mask", "empty.nii.gz") for number in range(4)]


@pytest.mark.parametrize(
    ("changes", "columns", "message"),
    [
        (EMPTY, {}, "expected label maps with a label in the split train"),
        ([(2, "split", "test")], {}, "expected records with split 'validation'"),
        ([(1, "mask", "")], {}, "expected a value under 'mask', found an empty cell"),
        ([(1, "mask", "nothing.nii.gz")], {}, "expected existing files under 'mask', found 1 of 4 missing"),
        ([(1, "subject", "s2")], {}, "expected every subject in one split"),
        ([], {"mask": "masc"}, "did you mean 'mask'?"),
        ([], {"labels": (2,)}, "expected the labels 0, 2, found the value 5"),
    ],
    ids=["empty", "validation", "cell", "file", "subject", "column", "labels"],
)
def test_a_table_from_which_nothing_can_be_learnt_is_refused(cases, tmp_path, changes, columns, message):
    write_mask(tmp_path, "empty.nii.gz", 0 * blocks())
    with pytest.raises(InputError) as error:
        list_masked(cases(changes, **columns), 0, PREPROCESS)
    assert message in str(error.value)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="data.manifest: expected a table of scans with label maps"):
        list_masked(MaskData(), 0, PREPROCESS)
    with pytest.raises(ValueError, match="fractions: expected three shares that sum to 1"):
        MaskData(fractions=(0.5, 0.1, 0.1))
    with pytest.raises(ValueError, match="labels: expected up to 63 values, each once"):
        MaskData(labels=(1, 1))
