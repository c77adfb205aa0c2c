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

    def entry(more=None, **fields):
        header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields}
        header = [header] if more == [] else header | (more or {})
        text = b"{" * (more == []) + json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + b"\0" * 8

    path.write_bytes(entry())
    np.testing.assert_array_equal(safetensors.read(path)["x"], [0, 0])
    other = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for content, words in [
        (good[:-1], "truncated"),
        (good + b"1", "damaged"),
        (good[:20], "truncated"),
        (good[:5], "other content"),
        (b"PK\x03\x04" * 10, "a zip archive"),
        (b"\xff" * 8 + b"{", "damaged"),
        ((9).to_bytes(8, "little") + b"{" + b"x" * 20, "header"),
        (entry(dtype="X9"), "X9"),
        (entry(dtype="F4", shape=[16]), "'x' of a type among"),
        (entry(shape=[3]), "damaged"),
        (entry(shape=[-2]), "damaged"),
        (entry(shape=[2**40, 2**40]), "overflow"),
        (entry(shape=[2**64]), "damaged"),
        (entry(shape=[1] * 70 + [2]), "'x' of at most 64 axes, found 71"),
        (entry(shape=[2.5]), "damaged"),
        (entry(shape={"a": 1}), "damaged"),
        (entry(data_offsets=[8, 0]), "damaged"),
        (entry(data_offsets=[0, 10**12]), "truncated"),
        (entry(data_offsets=[0, float("inf")]), "damaged"),
        (entry(data_offsets=[float("nan"), 8]), "damaged"),
        (entry(shape=[1], data_offsets=[4, 8]), "damaged"),  # a hole before it
        (entry(shape=[1], data_offsets=[0, 4]), "damaged"),  # and behind it
        (entry(more={"y": other}), "invalid offset"),  # in the place of another
        (entry(more={"y": {**other, "data_offsets": [8, 12]}}), "damaged"),
        (entry(more={"__metadata__": {"a": 1}}), "damaged"),
        (entry(more={"__metadata__": []}), "damaged"),
        (entry(more=[]), "damaged"),
        (b"", "empty"),
    ]:
        path.write_bytes(content)
        for call in (safetensors.read, safetensors.read_metadata)[: 1 if "'x'" in words else 2]:
            with pytest.raises(InputError, match=words) as caught:
                call(path)
            assert str(caught.value).startswith(f"{path}: expected ") and "\n" not in str(caught.value)


def test_a_deep_or_endless_header_is_told(tmp_path):
    path = tmp_path / "a.safetensors"
    for text in (b'{"a":' + b"[" * 200_000, b'{"a":' + b"9" * 200_000 + b"}", b'{"a":1e999}', b'{"\xff":1}'):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(InputError, match="damaged"):
            safetensors.read(path)


def test_tensors_are_views_of_the_file_and_cost_no_memory(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    safetensors.write(path, tensors)
    for array in safetensors.read(path).values():
        assert array.size == 0 or (not array.flags.owndata and not array.flags.writeable)
    content = path.read_bytes()
    safetensors.write(path, tensors)
    assert path.read_bytes() == content


def test_types_that_the_format_lacks_are_refused(tmp_path):
    for array in (np.ones(2, np.complex128), np.array(["a"]), np.array([{}], object)):
        with pytest.raises(InputError, match="tensor 'x'"):
            safetensors.write(tmp_path / "a.safetensors", {"x": array})
    with pytest.raises(InputError, match="suffix"):
        safetensors.write(tmp_path / "a.bin", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("start", [b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x1f\x8b", b"PK", b"\0\x02"])
def test_a_length_that_looks_like_another_formats_mark_is_a_length(start, tmp_path):
    # The first bytes are the header's length: two of them can be those of a pickle or of a gzip file.
    length = int.from_bytes(start, "little")
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(length)
    values = np.array([1.5, -2.0], "<f4")
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header + values.tobytes())
    assert (tmp_path / "a.safetensors").read_bytes()[: len(start)] == start
    np.testing.assert_array_equal(safetensors.read(tmp_path / "a.safetensors")["x"], values)
