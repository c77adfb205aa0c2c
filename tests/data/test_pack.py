import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image

from jaxmed.data.pack import PackConfig, open_pack, pack, stale_files
from jaxmed.data.records import FileSource
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.volume import Volume

pytestmark = pytest.mark.core

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


@dataclasses.dataclass(frozen=True)
class Halve:
    def __call__(self, fields):
        volume = fields["image"]
        return {"image": Volume.make(volume.array / 2, volume.affine)}


@pytest.fixture
def source(tmp_path):
    paths = tuple(tmp_path / f"{number}.nii.gz" for number in range(4))
    for number, path in enumerate(paths):
        array = np.arange(24, dtype=np.int16).reshape(2, 3, 4) * 10 + number
        nifti.write(path, Volume.make(array, AFFINE))
    return FileSource({"image": paths}, {"age": np.array([60.0, np.nan, 62.0, 63.0], np.float32)})


def test_a_pack_gives_back_what_was_read(source, tmp_path):
    packed = pack(source, tmp_path / "pack", config=PackConfig(dtype="int16"))
    assert len(packed) == 4
    for index in range(4):
        ours, theirs = packed[index], source[index]
        assert isinstance(ours["image"].array.base, np.memmap) or isinstance(ours["image"].array, np.memmap)
        assert ours["image"].array.dtype == np.int16
        np.testing.assert_array_equal(ours["image"].array, theirs["image"].array)
        np.testing.assert_array_equal(ours["image"].affine, AFFINE)
        np.testing.assert_equal(ours["age"], theirs["age"])
    assert packed.name(3).endswith("0000003.image.npy")
    assert repr(packed) == repr(open_pack(tmp_path / "pack"))


def test_images_are_packed_without_a_place(tmp_path):
    pixels = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    np.save(tmp_path / "a.npy", pixels)
    packed = pack(FileSource({"image": (tmp_path / "a.npy",)}), tmp_path / "pack")
    np.testing.assert_array_equal(packed[0]["image"], pixels)


def test_transforms_are_done_once_and_told(source, tmp_path):
    packed = pack(source, tmp_path / "pack", Halve())
    np.testing.assert_array_equal(packed[1]["image"].array, source[1]["image"].array / 2)
    assert packed.settings == ("Halve()", "float32")
    with pytest.raises(ValueError, match="equal in every run"):
        pack(source, tmp_path / "pack", lambda fields: fields)


def test_changed_sources_are_found_and_packed_again(source, tmp_path):
    folder = tmp_path / "pack"
    pack(source, folder)
    path = source.files["image"][2]
    os.utime(path, ns=(1, 1))
    assert stale_files(folder) == []  # another time, the same contents
    nifti.write(path, Volume.make(np.full((2, 3, 4), 7, np.int16), AFFINE))
    assert stale_files(folder) == [str(path)]
    with pytest.raises(InputError, match="1 changed"):
        open_pack(folder)
    others = [folder / "0000" / f"000000{index}.image.npy" for index in (0, 1, 3)]
    before = [other.stat().st_mtime_ns for other in others]
    assert pack(source, folder)[2]["image"].array.max() == 7
    assert [other.stat().st_mtime_ns for other in others] == before
    for gone in source.files["image"]:
        gone.unlink()
    assert len(open_pack(folder)) == 4


def test_a_broken_record_is_named_and_the_rest_is_kept(source, tmp_path):
    folder = tmp_path / "pack"
    path = source.files["image"][3]
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    with pytest.raises(InputError, match="3.nii.gz"):
        pack(source, folder, config=PackConfig(threads=1))
    index = json.loads((folder / "pack.json").read_text())
    assert not index["complete"] and index["records"][0] is not None
    with pytest.raises(InputError, match="a finished pack"):
        open_pack(folder)
    path.write_bytes(whole)
    assert len(pack(source, folder)) == 4


def test_values_that_do_not_fit_the_type_are_refused(source, tmp_path):
    with pytest.raises(InputError, match="whole numbers that fit uint8"):
        pack(source, tmp_path / "pack", Halve(), PackConfig(dtype="uint8"))


def test_a_damaged_packed_file_is_named(source, tmp_path):
    packed = pack(source, tmp_path / "pack")
    place = tmp_path / "pack" / "0000" / "0000001.image.npy"
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(InputError, match="0000001.image.npy.*run the packing again"):
        packed[1]
    place.unlink()
    with pytest.raises(InputError, match="no such file"):
        packed[1]


@pytest.mark.parametrize("bit", [3, 8 * 90 + 5, -1])
def test_a_flipped_bit_is_found_before_a_run(source, tmp_path, bit):
    whole = pack(source, tmp_path / "pack")
    place = tmp_path / "pack" / "0000" / "0000002.image.npy"
    content = place.read_bytes()
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    place.write_bytes(changed)
    with pytest.raises(InputError, match=r"as they were packed, found 1 damaged: 0000/0000002.image.npy; run the pack"):
        open_pack(tmp_path / "pack")
    kept = (tmp_path / "pack" / "0000" / "0000001.image.npy").stat().st_mtime_ns
    with pytest.warns(UserWarning, match=r"0000002.image.npy: its bits are not those that were written"):
        again = pack(source, tmp_path / "pack")
    assert place.read_bytes() == content and repr(again) == repr(whole) == repr(open_pack(tmp_path / "pack"))
    assert (tmp_path / "pack" / "0000" / "0000001.image.npy").stat().st_mtime_ns == kept


def test_old_leftovers_of_a_shared_pack_are_swept(source, tmp_path):
    pack(source, tmp_path / "pack")
    old, young = (tmp_path / "pack" / "0000" / f".0123456789a{n}-0000001.image.npy" for n in "ab")
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (0, 0))
    pack(source, tmp_path / "pack")
    assert young.exists() and not old.exists()


def test_pictures_pack_as_uint8_only_when_whole(tmp_path):
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(tmp_path / "a.png")
    source = FileSource({"image": (tmp_path / "a.png",)})
    with pytest.raises(InputError, match="a.png"):
        pack(source, tmp_path / "pack", config=PackConfig(dtype="uint8"))
    assert pack(source, tmp_path / "pack", config=PackConfig(dtype="float16"))[0]["image"].dtype == np.float16
