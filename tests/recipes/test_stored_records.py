"""Stages on a store: the same records as of files, which may be gone, and what is refused."""

import dataclasses

import numpy as np
import pytest

from jaxmed.data.cohort import read_labelled_sets
from jaxmed.data.inputs import check_scans
from jaxmed.data.intensity import Intensity
from jaxmed.data.labels import LabelConfig
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.records import SubsetSource
from jaxmed.data.scans import find_records
from jaxmed.data.store import StoreSettings, pack_store
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.tables import write_table
from jaxmed.recipes.adapt_stage import LabelledConfig, LabelledData, Start, labelled_sources, read_sets
from jaxmed.recipes.pretrain_stage import UnlabelledData, find_unlabelled
from jaxmed.recipes.training import TrainConfig
from jaxmed.volume import Volume

pytestmark = pytest.mark.core

PREPROCESS = Preprocess((4, 4, 4), axes="xyz", intensity=Intensity("window", window=(0.0, 100.0)))
FIRST = Start(*[None] * 8)._replace(preprocess=PREPROCESS)


@pytest.fixture
def manifest(tmp_path):
    rows = []
    for number in range(16):
        array = np.random.default_rng(number).integers(0, 100, (4, 4, 4)).astype(np.int16)
        nifti.write(tmp_path / "scans" / f"{number}.nii.gz", Volume.make(array, np.eye(4)))
        split = ("train", "train", "validation", "test")[number % 4]
        rows.append({"path": f"{number}.nii.gz", "subject": f"s{number}", "split": split, "label": number // 4 % 2})
    write_table(tmp_path / "scans" / "scans.csv", tuple(rows[0]), rows)
    return tmp_path / "scans" / "scans.csv"


@pytest.fixture
def store(manifest, tmp_path):
    pack_store(tmp_path / "store", find_records(manifest, None)[0], StoreSettings(PREPROCESS, dtype="float32"))
    return tmp_path / "store"


def remove_scans(manifest):
    for path in manifest.parent.glob("*.nii.gz"):
        path.unlink()


def test_unlabelled_records_are_those_of_the_manifest(manifest, store):
    given = find_unlabelled(UnlabelledData(manifest), None, PREPROCESS, TrainConfig())
    remove_scans(manifest)
    found = find_unlabelled(UnlabelledData(store=store), None, PREPROCESS, TrainConfig())
    assert [scan.path for scan in found.scans] == [scan.path for scan in given.scans]
    assert found.counts == given.counts == {"train": 8, "validation": 4} and found.store is not None
    assert (
        find_unlabelled(UnlabelledData(manifest, store=store), None, PREPROCESS, TrainConfig()).counts == found.counts
    )
    other = dataclasses.replace(PREPROCESS, size=(8, 8, 8))
    with pytest.raises(InputError, match=r"store: expected records of size \(8, 8, 8\), found a store of size"):
        find_unlabelled(UnlabelledData(store=store), None, other, TrainConfig())
    with pytest.raises(InputError, match="expected records of fill -1000.0, found a store of fill None"):
        find_unlabelled(UnlabelledData(store=store), None, PREPROCESS, TrainConfig(), fill=-1000.0)
    with pytest.raises(InputError, match="data.manifest, input: expected one of them, found both"):
        find_unlabelled(UnlabelledData(store=store), manifest.parent, PREPROCESS, TrainConfig())


def test_labelled_records_are_those_of_the_manifest(manifest, store):
    plain = read_labelled_sets(manifest, (), LabelConfig(), (0.7, 0.15, 0.15), 0)
    expected = labelled_sources(plain.cohort, FIRST, False, "full", None)[0]
    images = [np.asarray(expected[row]["image"]) for row in range(len(expected))]
    remove_scans(manifest)
    sets = read_sets(LabelledConfig(LabelledData(store=store)))
    assert sets.store is not None and sets.cohort.paths == plain.cohort.paths
    np.testing.assert_array_equal(sets.cohort.targets, plain.cohort.targets)
    assert check_scans(sets.cohort.scans, PREPROCESS, 16, 1, sets.store) == []
    training, source = labelled_sources(sets.cohort, FIRST, False, "full", None, sets.store)
    assert training is source and isinstance(source.images, SubsetSource)
    for row, image in enumerate(images):
        np.testing.assert_array_equal(source[row]["image"], image)
    test = sets.cohort.take(sets.cohort.rows("test"))
    picked = labelled_sources(test, FIRST, False, "full", None, sets.store)[1]
    np.testing.assert_array_equal(picked[0]["image"], images[3])


def test_the_store_has_to_hold_what_training_reads(manifest, store):
    sets = read_sets(LabelledConfig(LabelledData(manifest, store=store)))
    larger = FIRST._replace(training=dataclasses.replace(PREPROCESS, size=(6, 6, 6)))
    # Without an augmentation training takes the encoder's own input.
    labelled_sources(sets.cohort, larger, False, "full", None, sets.store)
    with pytest.raises(InputError, match=r"expected records of size \(6, 6, 6\)"):
        labelled_sources(sets.cohort, larger, True, "full", None, sets.store)
    # Where the store holds what training takes, the encoder's input comes from the files.
    swapped = larger._replace(preprocess=larger.training, training=PREPROCESS)
    training, source = labelled_sources(sets.cohort, swapped, True, "full", None, sets.store)
    assert training[0]["image"].shape == (4, 4, 4, 1) and source[0]["image"].shape == (6, 6, 6, 1)


def test_a_store_takes_the_place_of_synthetic_data(store):
    assert not LabelledConfig(LabelledData(store=store, synthetic=8)).is_synthetic
    assert UnlabelledData(store=store).is_given and not UnlabelledData(synthetic=3).is_given
