"""NumPy files: what was saved comes back, from many threads at once."""

import gc
import io
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxmed import files
from jaxmed.errors import InputError
from jaxmed.io.numpy_files import array_names, map_array, read_array, read_member, restore_npz, write_npz

pytestmark = pytest.mark.core
ARRAYS = {
    "plain": np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float16),
    "column_major": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "big_endian": np.arange(6, dtype=">i4").reshape(2, 3),
    "number": np.float64(2.5),
    "empty": np.zeros((0, 3), np.float32),
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_what_was_saved_comes_back(name, tmp_path):
    np.save(tmp_path / "a.npy", ARRAYS[name])
    np.savez_compressed(tmp_path / "a.npz", **ARRAYS)
    assert array_names(tmp_path / "a.npz") == list(ARRAYS)
    for found in (read_array(tmp_path / "a.npy"), read_member(tmp_path / "a.npz", name)):
        np.testing.assert_array_equal(found, ARRAYS[name])
        assert found.dtype == np.asarray(ARRAYS[name]).dtype and found.shape == np.shape(ARRAYS[name])


def test_a_mapped_array_is_read_only(tmp_path):
    np.save(tmp_path / "a.npy", ARRAYS["plain"])
    mapped = map_array(tmp_path / "a.npy")
    np.testing.assert_array_equal(mapped, ARRAYS["plain"])
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1


def test_damaged_files_are_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}, None]), allow_pickle=True)
    np.savez(tmp_path / "a.npz", a=ARRAYS["plain"])
    (tmp_path / "text.npy").write_bytes(b"hello world" * 9)
    np.save(tmp_path / "cut.npy", ARRAYS["plain"])
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-1])
    for name, message in (("objects", "objects"), ("text", "magic"), ("cut", "119 bytes of 120")):
        with pytest.raises(ValueError, match=message):
            read_array(tmp_path / f"{name}.npy")
    with pytest.raises(KeyError):
        read_member(tmp_path / "a.npz", "b")
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(zipfile.BadZipFile):
        array_names(tmp_path / "a.npz")


def test_threads_do_not_disturb_each_other(tmp_path):
    """With np.load alone, this ends in a SystemError of Python's parser in most runs (up to Python 3.12)."""
    np.save(tmp_path / "a.npy", ARRAYS["plain"])
    np.savez(tmp_path / "a.npz", a=ARRAYS["plain"])

    def yield_to_others(phase, info):
        time.sleep(0)

    def read(number):
        array = map_array(tmp_path / "a.npy") if number % 2 else read_member(tmp_path / "a.npz", "a")
        return np.array_equal(array, ARRAYS["plain"])

    threshold = gc.get_threshold()
    gc.callbacks.append(yield_to_others)
    gc.set_threshold(50)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(2000)))
    finally:
        gc.callbacks.remove(yield_to_others)
        gc.set_threshold(*threshold)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_equal_arrays_make_equal_bytes_whatever_the_time(tmp_path, monkeypatch, is_compressed):
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "words": np.array(["x", "yz"]), "none": np.zeros((0, 2), np.int16)}
    write_npz(tmp_path / "one.npz", arrays, is_compressed=is_compressed)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    write_npz(tmp_path / "two.npz", arrays, is_compressed=is_compressed)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz", allow_pickle=False) as found:
        assert found.files == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
    with pytest.raises(ValueError, match="allow_pickle"):
        write_npz(tmp_path / "one.npz", {"a": np.array([object()])})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "two.npz"]


@pytest.mark.parametrize("place", [10, 200, 700, -40])
def test_what_a_run_continues_from_is_whole_or_not_there(tmp_path, place):
    path = tmp_path / "part.npz"
    assert restore_npz(path) is None
    write_npz(path, ARRAYS)
    found = restore_npz(path)
    assert found is not None and set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    again = restore_npz(path)
    assert again is None or all(np.array_equal(again[name], array) for name, array in ARRAYS.items())
    path.write_bytes(content[: len(content) // 2])
    assert restore_npz(path) is None


def header(shape):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"shape": shape, "fortran_order": False, "descr": "<f4"})
    return buffer.getvalue() + bytes(100)


@pytest.mark.parametrize("shape", [(10**6, 10**6), (2**62, 8), (-5, 3), (26,)])
def test_claims_of_a_header_are_held_against_the_size_of_the_file(shape, tmp_path):
    (tmp_path / "a.npy").write_bytes(header(shape))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", header(shape))
    for read in (lambda: read_array(tmp_path / "a.npy"), lambda: read_member(tmp_path / "a.npz", "a")):
        with pytest.raises(ValueError, match="228 bytes where shape|100 bytes of 104"):
            read()


def test_archives_that_grow_beyond_all_measure_are_told(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(10**6, np.uint8))
    assert read_member(tmp_path / "a.npz", "a").shape == (10**6,)
    monkeypatch.setattr(files, "FREELY_UNPACKED", 500_000)
    with pytest.raises(InputError, match=r"a\.npz, array 'a': expected at most 488.3 KiB, or 40 .*, found 976.7 KiB"):
        read_member(tmp_path / "a.npz", "a")
