"""Stores of prepared records: what comes back, in which order, after kills, with broken files and on other machines."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from jaxmed.data import store as module
from jaxmed.data.inputs import PreparedField, check_scans, input_source
from jaxmed.data.intensity import Intensity
from jaxmed.data.loader import LoaderConfig, make_loader
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.records import SubsetSource
from jaxmed.data.scans import find_records
from jaxmed.data.store import RECORDS, StoredSource, StoreSettings, find_store, open_store, pack_store, stored_scans
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.scans import ScanFiles
from jaxmed.io.tables import read_table, write_table
from jaxmed.volume import Volume

pytestmark = pytest.mark.core

PREPROCESS = Preprocess((6, 5, 4), axes="xyz", intensity=Intensity("window", window=(0.0, 1000.0)))
SETTINGS = StoreSettings(PREPROCESS, dtype="float32")
COUNT = 11


def write_scans(folder):
    generator = np.random.default_rng(0)
    rows = []
    for number in range(COUNT):
        array = generator.integers(0, 1000, (6, 5, 4)).astype(np.int16)
        nifti.write(folder / f"s{number}.nii.gz", Volume.make(array, np.diag([1.0, 2.0, 3.0, 1.0])))
        rows.append({"path": f"s{number}.nii.gz", "subject": f"p{number // 2}", "label": str(number % 2)})
    write_table(folder / "scans.csv", tuple(rows[0]), rows)
    return folder / "scans.csv"


@pytest.fixture
def manifest(tmp_path):
    return write_scans(tmp_path / "scans")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Four records of 480 bytes in a file, so that eleven make three."""
    monkeypatch.setattr(StoreSettings, "record_bytes", property(lambda settings: 250_000))


def pack(manifest, folder, settings=SETTINGS):
    return pack_store(folder, find_records(manifest, None)[0], settings, shard_mb=1)


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in sorted((folder / "shards").iterdir())}


@pytest.mark.parametrize(("dtype", "compression"), [("float32", "none"), ("float32", "zstd"), ("float16", "none")])
def test_a_store_gives_back_what_the_files_hold(manifest, tmp_path, dtype, compression):
    settings = dataclasses.replace(SETTINGS, dtype=dtype, compression=compression)
    stored, failed = pack(manifest, tmp_path / "store", settings)
    assert failed == [] and len(stored) == COUNT and [shard.take for shard in stored.shards] == [4, 4, 3]
    for number, record in enumerate(find_records(manifest, None)[0]):
        image = stored[number]["image"]
        assert image.shape == (6, 5, 4, 1) and image.dtype == dtype
        np.testing.assert_allclose(image, PREPROCESS(record.path), rtol=0, atol=2**-12 if dtype == "float16" else 0)
        assert stored.name(number) == str(record.path)
    table = read_table(tmp_path / "store" / RECORDS)
    assert table.columns == ("path", "subject", "label", "store") and table.column("subject")[5] == "p2"
    assert repr(open_store(tmp_path / "store")) == repr(stored)
    assert open_store(tmp_path / "store").settings == settings


def stream(source, count, *, start=0, processes=1, batch=4):
    config = LoaderConfig(batch_size=batch, seed=5, num_threads=2)
    found = []
    for process in range(processes):
        batches = make_loader(source, PreparedField(PREPROCESS), config, process, processes)(start)
        found.append(list(itertools.islice(batches, count)))
        batches.close()
    return [
        {name: np.concatenate([share[step][name] for share in found]) for name in ("record", "image")}
        for step in range(count)
    ]


def test_the_order_is_shuffled_over_all_files_and_goes_on_within_an_epoch_on_other_numbers_of_processes(
    manifest, tmp_path
):
    stored, _ = pack(manifest, tmp_path / "store")
    whole = stream(stored, 6)
    first = np.concatenate([step["record"] for step in whole])[:COUNT]
    assert sorted(first) == list(range(COUNT))
    # A shuffle within files would keep every four of an epoch in one of them.
    assert len(set(first[:4] // 4)) > 1
    for start, processes in ((2, 2), (4, 4), (3, 1)):  # the epoch ends in the third batch
        again = stream(open_store(tmp_path / "store"), 2, start=start, processes=processes)
        for ours, theirs in zip(again, whole[start:], strict=False):
            np.testing.assert_array_equal(ours["record"], theirs["record"])
            np.testing.assert_array_equal(ours["image"], theirs["image"])
    files = input_source([record.scan for record in find_records(manifest, None)[0]], PREPROCESS)
    for ours, theirs in zip(stream(files, 2), whole, strict=False):
        np.testing.assert_array_equal(ours["image"], theirs["image"])


def test_a_broken_file_fails_alone_and_is_packed_once_it_is_mended(manifest, tmp_path):
    place, folder = manifest.parent / "s5.nii.gz", tmp_path / "store"
    whole = place.read_bytes()
    place.write_bytes(whole[:60])
    stored, failed = pack(manifest, folder)
    assert len(stored) == COUNT - 1 and [one["path"] for one in failed] == [str(place)]
    assert failed[0]["id"] == "s5" and "s5.nii.gz: expected" in failed[0]["reason"]
    assert str(place) not in stored.paths
    np.testing.assert_array_equal(stored[5]["image"], PREPROCESS(manifest.parent / "s6.nii.gz"))
    place.write_bytes(whole)
    before = times(folder)
    stored, failed = pack(manifest, folder)
    assert failed == [] and len(stored) == COUNT
    after = times(folder)
    assert {name for name in after if after[name] != before[name]} == {"00001.array_record", "00001.json"}


def test_packing_goes_on_where_it_was_stopped(manifest, tmp_path, monkeypatch):
    folder, write, calls = tmp_path / "store", module._write_shard, []

    def stop(folder, number, *rest):
        if number == 2:
            raise KeyboardInterrupt
        calls.append(number)
        return write(folder, number, *rest)

    monkeypatch.setattr(module, "_write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(manifest, folder)
    with pytest.raises(InputError, match="one that was not finished; run jaxmed data pack again"):
        open_store(folder)
    before = times(folder)
    monkeypatch.setattr(module, "_write_shard", write)
    (folder / "shards" / ".0123456789ab-00002.array_record").write_bytes(b"half")
    stored, _ = pack(manifest, folder)
    assert len(stored) == COUNT and calls == [0, 1]
    assert {name: time for name, time in times(folder).items() if name in before} == before
    assert not list(folder.rglob(".*"))


def test_changed_files_and_fewer_rows_are_packed_anew_and_nothing_else(manifest, tmp_path):
    folder = tmp_path / "store"
    pack(manifest, folder)
    before = times(folder)
    pack(manifest, folder)
    assert times(folder) == before
    nifti.write(manifest.parent / "s9.nii.gz", Volume.make(np.arange(120, dtype=np.int16).reshape(6, 5, 4), np.eye(4)))
    stored, _ = pack(manifest, folder)
    assert stored[9]["image"].max() == np.float32(0.119)
    after = times(folder)
    assert {name for name in after if after[name] != before[name]} == {"00002.array_record", "00002.json"}
    rows = read_table(manifest).rows[:4]
    write_table(manifest, tuple(rows[0]), rows)
    assert len(pack(manifest, folder)[0]) == 4 and len(times(folder)) == 2


def test_other_settings_are_refused_by_packing_and_by_reading(manifest, tmp_path):
    folder = tmp_path / "store"
    stored, _ = pack(manifest, folder)
    scans = [record.scan for record in find_records(manifest, None)[0]]
    stored.require(scans, PREPROCESS)
    other = dataclasses.replace(PREPROCESS, size=(8, 8, 8))
    with pytest.raises(InputError, match=r"store: expected a new folder, or a store of size \(8, 8, 8\), found one of"):
        pack(manifest, folder, dataclasses.replace(SETTINGS, preprocess=other))
    with pytest.raises(InputError, match="a store of dtype float16, found one of dtype float32"):
        pack(manifest, folder, dataclasses.replace(SETTINGS, dtype="float16"))
    with pytest.raises(InputError, match=r"expected records of size \(8, 8, 8\), found a store of size \(6, 5, 4\)"):
        stored.require(scans, other)
    window = dataclasses.replace(PREPROCESS, intensity=Intensity("window", window=(0.0, 900.0)))
    with pytest.raises(InputError, match=r"records of window \(0.0, 900.0\), found a store of window \(0.0, 1000.0\)"):
        stored.require(scans, window)
    with pytest.raises(InputError, match=r"records of fill 0.0, found a store of fill None"):
        stored.require([scans[0]._replace(fill=0.0)], PREPROCESS)
    with pytest.raises(InputError, match=r"a record of .*other.nii.gz, found none; see outputs/failed.csv"):
        stored.require([ScanFiles(manifest.parent / "other.nii.gz")], PREPROCESS)


def test_inputs_come_from_the_store_where_it_has_them_and_from_files_elsewhere(manifest, tmp_path):
    stored, _ = pack(manifest, tmp_path / "store")
    scans = [record.scan for record in find_records(manifest, None)[0]][::-2]
    source = input_source(scans, PREPROCESS, store=stored)
    assert isinstance(source, SubsetSource) and source.source is stored
    assert [source.name(row) for row in range(len(source))] == [str(scan.path) for scan in scans]
    other = dataclasses.replace(PREPROCESS, size=(6, 5, 5))
    assert not isinstance(input_source(scans, other, store=stored), SubsetSource)
    for path in manifest.parent.glob("*.nii.gz"):
        path.unlink()
    assert check_scans(scans, PREPROCESS, 4, 1, stored) == []
    np.testing.assert_array_equal(source[0]["image"], stored[COUNT - 1]["image"])


def test_a_manifest_may_name_its_store_which_may_have_moved(manifest, tmp_path):
    folder = tmp_path / "store"
    pack(manifest, folder)
    moved = folder.rename(tmp_path / "elsewhere")
    for store, given in ((moved, None), (None, moved / RECORDS), (None, moved)):
        stored, table = find_store(store, given)
        assert isinstance(stored, StoredSource) and table == moved / RECORDS
        stored.require(stored_scans(read_table(table)), PREPROCESS)
    assert find_store(None, manifest) == (None, manifest)
    assert find_store(moved, manifest)[1] == manifest
    rows = [{**row, "store": str(moved)} for row in read_table(manifest).rows[:3]]
    own = tmp_path / "scans" / "own.csv"
    write_table(own, tuple(rows[0]), rows)
    stored, table = find_store(None, own)
    assert stored is not None and table == own
    assert stored.rows(stored_scans(read_table(own)), PREPROCESS).tolist() == [0, 1, 2]
    rows[1]["store"] = "other"
    write_table(own, tuple(rows[0]), rows)
    with pytest.raises(InputError, match="one store in every row of the column 'store', found 2"):
        find_store(None, own)


def test_damage_is_told(manifest, tmp_path):
    folder = tmp_path / "store"
    pack(manifest, folder, dataclasses.replace(SETTINGS, compression="zstd"))
    place = folder / "shards" / "00001.array_record"
    whole = bytearray(place.read_bytes())
    # Blocks begin at every 64 KiB with a hash of their header; the records lie in the first ones.
    whole[70] ^= 4
    place.write_bytes(whole)
    stored = open_store(folder)
    assert stored[0]["image"].shape == (6, 5, 4, 1)
    with pytest.raises(InputError, match="store: expected record . as it was packed"):
        for number in range(4, 8):
            stored[number]
    place.write_bytes(whole[:1000])
    with pytest.raises(InputError, match="00001.array_record: expected a shard of .* bytes, found 1,000 bytes"):
        open_store(folder)
    place.unlink()
    with pytest.raises(InputError, match="00001.array_record: expected a shard of .* bytes, found no file"):
        open_store(folder)
    with pytest.raises(InputError, match="nowhere: expected a store, found none; make one with jaxmed data pack"):
        open_store(tmp_path / "nowhere")


def test_nothing_but_broken_files_and_slices_are_refused(manifest, tmp_path):
    for path in manifest.parent.glob("*.nii.gz"):
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"expected records that can be read, found .*s0.nii.gz.* \(and 10 more\)"):
        pack(manifest, tmp_path / "store")
    # The place is free for other settings then, which may be what these files need.
    assert not list((tmp_path / "store").iterdir())
    write_scans(manifest.parent)
    slices = StoreSettings(dataclasses.replace(PREPROCESS, size=(6, 5)))
    with pytest.raises(InputError, match=r"expected one image of \(6, 5, 1\), found shape \(4, 6, 5, 1\)"):
        pack(manifest, tmp_path / "slices", slices)


def test_a_table_that_was_cut_is_no_longer_that_of_its_store(manifest, tmp_path):
    folder = tmp_path / "store"
    pack(manifest, folder)
    rows = read_table(folder / RECORDS).rows[:5]
    write_table(folder / RECORDS, tuple(rows[0]), rows)
    with pytest.raises(InputError, match="expected 11 records, as the shards have, found 5"):
        open_store(folder)
    index = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**index, "version": 9}))
    with pytest.raises(InputError, match="a store of version 1, found 9"):
        open_store(folder)
