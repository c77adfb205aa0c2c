"""NIfTI: values, places, and everything that can be wrong with a file."""

import errno
import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.volume import Volume

pytestmark = pytest.mark.core

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.1, 0.3) @ np.diag([-1.5, 2.0, 3.0]), [10.0, -20.0, 30.5]
)


def save(path, array, affine=OBLIQUE, *, kind=nib.Nifti1Image, **fields):
    image = kind(array, affine, dtype=array.dtype)
    for name, value in fields.items():
        image.header[name] = value
    image.to_filename(path)
    return path


@pytest.fixture
def array():
    return np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("code", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_reads_what_nibabel_reads(tmp_path, suffix, kind, code):
    array = np.random.default_rng(0).integers(0, 100, (3, 4, 5)).astype(code)
    path = save(tmp_path / f"a{suffix}", array, kind=kind)
    volume = nifti.read(path)
    np.testing.assert_array_equal(volume.array, nib.load(path).get_fdata())
    np.testing.assert_array_equal(volume.affine, nib.load(path).affine)
    assert volume.array.dtype == np.float32
    assert volume.array.flags.c_contiguous and volume.array.flags.writeable
    assert nifti.describe(path)["dtype"] == np.dtype(code).name


def test_reads_big_endian_and_intensity_scaling(tmp_path):
    array = np.arange(24, dtype=">i2").reshape(2, 3, 4)
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    image = nib.Nifti1Image(array, OBLIQUE, header)
    image.header.set_slope_inter(0.5, -1024)
    image.to_filename(tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    assert content[:2] == b"\0\0"
    content[352:] = array.tobytes(order="F")
    content[112:120] = np.array([0.5, -1024], ">f4").tobytes()
    (tmp_path / "b.nii").write_bytes(content)
    np.testing.assert_array_equal(nifti.read(tmp_path / "b.nii").array, array * 0.5 - 1024)


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ((4, 5), (4, 5, 1)),
        ((4, 5, 1), (4, 5, 1)),
        ((4, 5, 6, 1), (4, 5, 6)),
        ((4, 5, 6, 3), (4, 5, 6, 3)),
        ((4, 5, 6, 1, 3), (4, 5, 6, 3)),
    ],
)
def test_axes_of_length_one_are_dropped_after_the_third(tmp_path, stored, read):
    array = np.arange(np.prod(stored), dtype=np.float32).reshape(stored)
    volume = nifti.read(save(tmp_path / "a.nii", array))
    assert volume.array.shape == read
    np.testing.assert_array_equal(volume.array, array.reshape(read))


def test_which_form_counts(tmp_path, array):
    image = nib.Nifti1Image(array, None)
    image.header.set_zooms((2, 3, 4))
    image.header["xyzt_units"] = 2
    shifted = OBLIQUE + np.eye(4, k=3)
    cases = {}
    for name, sform, qform in [("both", 2, 1), ("sform", 1, 0), ("qform", 0, 3), ("none", 0, 0)]:
        image.header.set_sform(shifted, code=sform)
        image.header.set_qform(OBLIQUE, code=qform)
        image.header["sform_code"], image.header["qform_code"] = sform, qform
        path = tmp_path / f"{name}.nii"
        content = image.header.binaryblock + b"\0" * 4 + array.tobytes(order="F")
        path.write_bytes(content.replace(b"ni1", b"n+1"))
        header = bytearray(path.read_bytes())
        header[108:112] = np.float32(352).tobytes()
        path.write_bytes(header)
        cases[name] = nifti.read(path).affine, nifti.describe(path)
    np.testing.assert_allclose(cases["both"][0], shifted, rtol=1e-6)
    np.testing.assert_allclose(cases["sform"][0], shifted, rtol=1e-6)
    np.testing.assert_allclose(cases["qform"][0], OBLIQUE, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cases["none"][0], np.diag([1.5, 2, 3, 1]), rtol=1e-6)
    assert [cases[name][1]["form"] for name in cases] == ["sform", "sform", "qform", "pixdim"]
    assert cases["both"][1]["forms_agree"] is False
    assert cases["sform"][1]["forms_agree"] is None
    assert cases["none"][1]["orientation"] is None
    assert cases["qform"][1]["orientation"] == "".join(nib.aff2axcodes(OBLIQUE))


def test_voxels_can_be_written_to(tmp_path):
    # A single row is dense in both orders, where a view of the file would do.
    volume = nifti.read(save(tmp_path / "a.nii.gz", np.ones((7, 1, 1), np.float32)))
    volume.array[0] = 2
    assert volume.array.sum() == 8


@pytest.mark.parametrize(("code", "scale"), [(0, 1), (1, 1000), (2, 1), (3, 0.001)])
def test_units_become_millimetres(tmp_path, array, code, scale):
    path = save(tmp_path / "a.nii", array, np.diag([1.0, 2, 4, 1]), xyzt_units=code)
    assert nifti.read(path).spacing == pytest.approx((scale, 2 * scale, 4 * scale))


def test_labels_are_read_as_integers_and_only_whole_ones(tmp_path, array):
    labels = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    volume = nifti.read(save(tmp_path / "a.nii", labels), dtype=np.int32)
    assert volume.array.dtype == np.int32
    np.testing.assert_array_equal(volume.array, labels)
    with pytest.raises(InputError, match="whole numbers"):
        nifti.read(save(tmp_path / "b.nii", array), dtype=np.int32)
    with pytest.raises(InputError, match="from 0 to 255"):
        nifti.read(save(tmp_path / "c.nii", labels - 1), dtype=np.uint8)


def wrong_files(folder: Path, array: np.ndarray) -> dict[str, Path]:
    """Make one file for each thing that can be wrong with it."""
    good = save(folder / "good.nii", array).read_bytes()
    packed = gzip.compress(good)
    contents = {
        "empty.nii": b"",
        "no_image.nii": b"patient,label\n" * 100,
        "short.nii": good[:100],
        "header_cut.nii": good[:346],
        "truncated.nii": good[:-1],
        "truncated.nii.gz": packed[: len(packed) // 2],
        "cut_header.nii.gz": packed[:12],
        "flipped.nii.gz": packed[:-200] + bytes([packed[-200] ^ 255]) + packed[-199:],
        "checksum.nii.gz": packed[:-8] + b"\0" * 8,
        "plain.nii.gz": good,
        "packed.nii": packed,
        "bomb.nii.gz": gzip.compress(good[:42] + np.array([9999] * 3, "i2").tobytes() + good[48:]),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    rgb = np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    bad, shear = array.copy(), OBLIQUE.copy()
    bad[0, 0, 0], bad[1, 1, 1] = np.nan, np.inf
    shear[:3, 0] += 0.01 * shear[:3, 1]
    patches = {
        "zero_size.nii": (42, np.array([0], "i2")),
        "unit.nii": (123, np.array([7], "u1")),
        "intercept.nii": (112, np.array([1, np.inf], "f4")),
        "nan_affine.nii": (280, np.full(4, np.nan, "f4")),
        "singular.nii": (312, np.array([0, 0, 0, 1], "f4")),
        "vox_offset.nii": (108, np.array([4e9], "f4")),
        "datatype.nii": (70, np.array([3], "i2")),
    }
    for name, (start, value) in patches.items():
        end = start + value.nbytes
        (folder / name).write_bytes(good[:start] + value.tobytes() + good[end:])
    (folder / "folder.nii").mkdir()
    return {
        **{name: folder / name for name in (*contents, *patches, "folder.nii")},
        "missing.nii": folder / "missing.nii",
        "wrong_suffix": save(folder / "a.hdr", array, kind=nib.Nifti1Pair),
        "rgb.nii": save(folder / "rgb.nii", rgb),
        "complex.nii": save(folder / "complex.nii", array.astype(np.complex64)),
        "nonfinite.nii": save(folder / "nonfinite.nii", bad),
        "overflow.nii": save(folder / "overflow.nii", np.full((2, 2, 2), 1e200)),
        "five.nii": save(folder / "five.nii", np.zeros((2, 2, 2, 2, 2), np.float32)),
        "shear.nii": save(folder / "shear.nii", array, shear),
    }


def test_every_wrong_file_is_told_in_one_line_that_names_it(tmp_path, array):
    for name, path in wrong_files(tmp_path, array).items():
        with pytest.raises(InputError) as caught:
            nifti.read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: expected "), (name, message)
        assert "\n" not in message


def test_wrong_files_are_told_what_is_wrong(tmp_path, array):
    files = wrong_files(tmp_path, array)
    for name, words in {
        "missing.nii": "no such file",
        "folder.nii": "a folder",
        "empty.nii": "an empty file",
        "no_image.nii": "not an image",
        "truncated.nii": "truncated",
        "truncated.nii.gz": "damaged",
        "flipped.nii.gz": "damaged",
        "checksum.nii.gz": "damaged",
        "bomb.nii.gz": "truncated",
        "rgb.nii": "RGB",
        "complex.nii": "complex",
        "nonfinite.nii": "2 NaN or Inf voxels of 210",
        "five.nii": "5D of shape",
        "shear.nii": "sheared",
        "singular.nii": "singular",
    }.items():
        with pytest.raises(InputError, match=words):
            nifti.read(files[name])
    assert nifti.read(files["shear.nii"], allow_shear=True).array.shape == (5, 6, 7)
    assert np.isnan(nifti.read(files["nonfinite.nii"], allow_nonfinite=True).array).sum() == 1


def test_dimensions_are_checked_before_voxels_are_read(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.zeros((4, 4, 4, 3), np.float32))
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\0\0\0\0")  # reading the voxels would fail
    with pytest.raises(InputError, match="3D data, found 4D of shape"):
        nifti.read(path, dimensions=(3,))


@pytest.mark.parametrize(("value", "words"), [(0, "all zero"), (7, "7 everywhere")])
def test_constant_volumes_are_refused_on_request(tmp_path, value, words):
    path = save(tmp_path / "a.nii", np.full((3, 3, 3), value, np.float32))
    assert nifti.read(path).array.max() == value
    with pytest.raises(InputError, match=words):
        nifti.read(path, allow_constant=False)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int16, np.int64, bool, np.float64])
def test_written_volume_returns_exactly(tmp_path, array, suffix, dtype):
    affine = OBLIQUE.astype(np.float32).astype(np.float64)
    volume = Volume.make((array > 0).astype(dtype), affine)
    nifti.write(tmp_path / f"a{suffix}", volume)
    again = nifti.read(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(again.array, volume.array)
    np.testing.assert_array_equal(again.affine, affine)
    note = nifti.describe(tmp_path / f"a{suffix}")
    assert note["forms_agree"] is True
    expected = {"bool": "uint8", "float64": "float32"}.get(np.dtype(dtype).name)
    assert note["dtype"] == (expected or np.dtype(dtype).name)


def test_sheared_affine_is_written_without_a_qform(tmp_path, array):
    affine = np.eye(4)
    affine[0, 1] = 0.25
    nifti.write(tmp_path / "a.nii", Volume.make(array, affine))
    note = nifti.describe(tmp_path / "a.nii")
    assert (note["qform_code"], note["sform_code"]) == (0, 1)
    np.testing.assert_array_equal(nifti.read(tmp_path / "a.nii", allow_shear=True).affine, affine)


@pytest.mark.parametrize("sform", [0, 2])
@pytest.mark.parametrize("qform", [0, 1])
@pytest.mark.parametrize("unit", [1, 2, 3])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_map_of_an_input_returns_on_exactly_its_grid(tmp_path, array, sform, qform, unit, kind):
    source = save(tmp_path / "in.nii", array, kind=kind, xyzt_units=unit, sform_code=sform, qform_code=qform)
    # nibabel settles forms from its affine when saving, so codes are set in the bytes.
    content = bytearray(source.read_bytes())
    places = ("i2", 252) if kind is nib.Nifti1Image else ("i4", 344)
    codes = np.array([qform, sform], places[0]).tobytes()
    content[places[1] : places[1] + len(codes)] = codes
    source.write_bytes(content)
    volume = nifti.read(source)
    nifti.write(tmp_path / "out.nii.gz", volume, reference=source)
    again = nifti.read(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(again.affine, volume.affine)
    np.testing.assert_array_equal(again.array, volume.array)
    note = nifti.describe(tmp_path / "out.nii.gz")
    assert note == nifti.describe(source)
    assert (note["sform_code"], note["qform_code"]) == (sform, qform)


def test_reference_of_another_grid_is_refused(tmp_path, array):
    source = save(tmp_path / "in.nii", array)
    with pytest.raises(InputError, match=r"out.nii: expected the shape of .*in.nii"):
        nifti.write(tmp_path / "out.nii", Volume.make(array[1:], OBLIQUE), reference=source)
    with pytest.raises(InputError, match=r"out.nii: expected the grid of .*in.nii"):
        nifti.write(tmp_path / "out.nii", Volume.make(array, np.eye(4)), reference=source)


def test_channels_are_written_over_a_3d_reference(tmp_path, array):
    source = save(tmp_path / "in.nii", array)
    volume = nifti.read(source)
    maps = Volume.make(np.stack([volume.array, -volume.array], -1), volume.affine)
    nifti.write(tmp_path / "out.nii.gz", maps, reference=source)
    again = nifti.read(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(again.array, maps.array)
    np.testing.assert_array_equal(again.affine, volume.affine)


def test_writing_is_deterministic_and_leaves_nothing_behind(tmp_path, array, monkeypatch):
    volume = Volume.make(array, np.eye(4))
    nifti.write(tmp_path / "a.nii.gz", volume)
    nifti.write(tmp_path / "b.nii.gz", volume)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()

    def full(path, content):
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="c.nii.gz: expected enough space"):
        nifti.write(tmp_path / "c.nii.gz", volume)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_unwritable_volumes_are_refused(tmp_path, array):
    bad = array.copy()
    bad[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="1 NaN or Inf"):
        nifti.write(tmp_path / "a.nii", Volume.make(bad, np.eye(4)))
    nifti.write(tmp_path / "a.nii", Volume.make(bad, np.eye(4)), allow_nonfinite=True)
    with pytest.raises(InputError, match="real numbers"):
        nifti.write(tmp_path / "a.nii", Volume.make(array * 1j, np.eye(4)))
    with pytest.raises(InputError, match="NIfTI file name"):
        nifti.write(tmp_path / "a.img", Volume.make(array, np.eye(4)))
