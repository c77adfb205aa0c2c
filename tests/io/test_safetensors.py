"""Safetensors: the same bytes as the reference package, and damaged files."""

import json

import ml_dtypes
import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io import safetensors

pytestmark = pytest.mark.core


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "a.half": rng.normal(size=5).astype(np.float16),
        "brain": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "count": np.array(7, np.int64),
        "mask": np.array([True, False, True]),
        "none": np.zeros((0, 3), np.float32),
        "flipped": rng.normal(size=(4, 3))[::-1].T,
    }


def test_written_tensors_return_exactly(tmp_path, tensors):
    safetensors.write(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    again = safetensors.read(tmp_path / "a.safetensors")
    assert set(again) == set(tensors)
    for name, array in tensors.items():
        assert again[name].dtype == array.dtype and again[name].shape == array.shape
        np.testing.assert_array_equal(again[name], array)
    assert safetensors.read_metadata(tmp_path / "a.safetensors") == {"format": "pt"}


def test_reference_package_reads_and_writes_the_same(tmp_path, tensors):
    reference = pytest.importorskip("safetensors.numpy")
    plain = {name: np.ascontiguousarray(tensors[name]) for name in ("b.weight", "a.half", "count")}
    plain["count"] = plain["count"].reshape(())
    safetensors.write(tmp_path / "a.safetensors", plain)
    reference.save_file(plain, tmp_path / "b.safetensors")
    for read in (reference.load_file, safetensors.read):
        for name in ("a", "b"):
            for key, array in read(tmp_path / f"{name}.safetensors").items():
                np.testing.assert_array_equal(array, plain[key])


def test_big_endian_arrays_are_written_as_little_endian(tmp_path):
    safetensors.write(tmp_path / "a.safetensors", {"x": np.arange(3, dtype=">i4")})
    np.testing.assert_array_equal(safetensors.read(tmp_path / "a.safetensors")["x"], [0, 1, 2])


def test_wrong_files_are_told(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    safetensors.write(path, tensors)
    good = path.read_bytes()

    def entry(**fields):
        header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields}
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + b"\0" * 8

    path.write_bytes(entry())
    np.testing.assert_array_equal(safetensors.read(path)["x"], [0, 0])
    for content, words in [
        (good[:-1], "truncated"),
        (good[:20], "truncated"),
        (good[:5], "other content"),
        (b"PK\x03\x04" * 10, "other content"),
        ((9).to_bytes(8, "little") + b"{" + b"x" * 20, "header"),
        (entry(dtype="X9"), "'x'"),
        (entry(shape=[3]), "shape .3,. for 'x'"),
        (entry(shape=[-2]), "'x'"),
        (entry(data_offsets=[8, 0]), "'x'"),
        (entry(data_offsets=[0, 10**12]), "truncated"),
        (b"", "empty"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=words):
            safetensors.read(path)


def test_types_that_the_format_lacks_are_refused(tmp_path):
    for array in (np.ones(2, np.complex128), np.array(["a"]), np.array([{}], object)):
        with pytest.raises(InputError, match="tensor 'x'"):
            safetensors.write(tmp_path / "a.safetensors", {"x": array})
    with pytest.raises(InputError, match="suffix"):
        safetensors.write(tmp_path / "a.bin", {})
    assert not list(tmp_path.iterdir())
