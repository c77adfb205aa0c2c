from functools import partial

import numpy as np
import pytest

from jaxmed.data.records import (
    ArraySource,
    FileSource,
    SubsetSource,
    epoch_order,
    record_at,
    record_seed,
)
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.tables import read_table, resolve_paths, write_table
from jaxmed.volume import Volume

pytestmark = pytest.mark.core


def test_an_epoch_is_a_permutation_of_its_own():
    first, second = epoch_order(4, 0, 50), epoch_order(4, 1, 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.tolist() != second.tolist()
    assert first.tolist() != epoch_order(5, 0, 50).tolist()
    assert epoch_order(4, 7, 50, False).tolist() == list(range(50))


def test_the_order_stays_the_same_between_releases():
    assert epoch_order(0, 0, 8).tolist() == [4, 1, 3, 6, 0, 5, 2, 7]
    assert record_seed(0, 0, 0).integers(1000, size=3).tolist() == [957, 311, 562]


def test_positions_run_through_epochs():
    places = [record_at(1, position, 7) for position in range(21)]
    assert [place.record for place in places[7:14]] == epoch_order(1, 1, 7).tolist()
    assert (places[9].epoch, places[9].index) == (1, 2)
    short = [record_at(1, position, 7, epoch_length=6) for position in range(12)]
    assert [place.record for place in short[6:]] == epoch_order(1, 1, 7).tolist()[:6]


def test_seeds_of_records_differ_by_record_epoch_and_seed():
    draws = {record_seed(*place).random() for place in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))}
    assert len(draws) == 4
    assert record_seed(3, 2, 1).random() == record_seed(3, 2, 1).random()


def test_a_manifest_becomes_records(tmp_path):
    for number in range(3):
        nifti.write(tmp_path / f"{number}.nii.gz", Volume.make(np.full((2, 3, 4), number, np.int16), np.eye(4)))
    rows = [{"path": f"{n}.nii.gz", "mask": f"{n}.nii.gz", "age": 60 + n} for n in range(3)]
    write_table(tmp_path / "m.csv", ("path", "mask", "age"), rows)
    table = read_table(tmp_path / "m.csv")
    files = {"image": tuple(resolve_paths(table, "path")), "label": tuple(resolve_paths(table, "mask"))}
    source = FileSource(
        files, {"age": np.array(table.floats("age"), np.float32)}, {"label": partial(nifti.read, dtype=np.int32)}
    )
    record = source[2]
    assert (len(source), record["age"], source.name(2)) == (3, 62, str(tmp_path / "2.nii.gz"))
    assert record["image"].array.dtype == np.float32 and record["label"].array.dtype == np.int32
    assert record["image"].array.max() == 2
    part = SubsetSource(source, np.array([2, 0]))
    assert part[0]["age"] == 62 and part.name(1) == source.name(0)
    with pytest.raises(InputError, match="records from 0 to 2"):
        SubsetSource(source, np.array([3]))


def test_reprs_tell_equal_data_and_no_addresses(tmp_path):
    paths = (tmp_path / "a.nii", tmp_path / "b.nii")

    def make(age):
        return FileSource({"image": paths}, {"age": np.array([age, 2.0])})

    assert repr(make(1.0)) == repr(make(1.0)) != repr(make(3.0))
    array = ArraySource({"image": np.zeros((2, 4, 4), np.float32)})
    assert repr(array) == "ArraySource(array: image float32[2, 4, 4])"
    assert "0x" not in repr(SubsetSource(array, np.array([1])))


def test_columns_of_other_lengths_are_refused(tmp_path):
    with pytest.raises(InputError, match="as many records"):
        ArraySource({"a": np.zeros(2), "b": np.zeros(3)})
    with pytest.raises(InputError, match="at least one record"):
        FileSource({})
