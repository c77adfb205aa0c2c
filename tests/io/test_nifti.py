"""NIfTI: values, places, and everything that can be wrong with a file."""

import errno
import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.volume import Grid, Volume, require_same_grid

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
    assert np.isnan(nifti.read(files["nonfinite.nii"], allow_nonfinite=True).array).sum() == 2


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


# Every number of a header, by where it stands in NIfTI-1 and NIfTI-2.
PLACES = {
    "dim0": (40, "i2", 16, "i8"), "dim1": (42, "i2", 24, "i8"), "dim4": (48, "i2", 48, "i8"),
    "datatype": (70, "i2", 12, "i2"), "bitpix": (72, "i2", 14, "i2"), "qfac": (76, "f4", 104, "f8"),
    "pixdim1": (80, "f4", 112, "f8"), "pixdim4": (92, "f4", 136, "f8"), "vox_offset": (108, "f4", 168, "i8"),
    "scl_slope": (112, "f4", 176, "f8"), "scl_inter": (116, "f4", 184, "f8"), "cal_max": (124, "f4", 192, "f8"),
    "toffset": (136, "f4", 216, "f8"), "qform_code": (252, "i2", 344, "i4"), "sform_code": (254, "i2", 348, "i4"),
    "quatern_b": (256, "f4", 352, "f8"), "qoffset_x": (268, "f4", 376, "f8"), "srow_x0": (280, "f4", 400, "f8"),
    "srow_z3": (324, "f4", 520, "f8"), "xyzt_units": (123, "u1", 500, "i4"), "intent_code": (68, "i2", 504, "i4"),
}  # fmt: skip
VALUES = (0, -1, 8, 0.5, 1e30, np.nan, np.inf, -np.inf)


def patched(array, kind, code, order, name, value, affine=OBLIQUE):
    image = kind(array, affine, kind.header_class(endianness=order))
    image.header["qform_code"], image.header["sform_code"] = {"q": (1, 0), "s": (0, 1), "p": (0, 0)}[code]
    content = bytearray(image.header.binaryblock + b"\0" * 4 + array.astype(order + "f4").tobytes(order="F"))
    magic, offset = ((344, b"n+1\0"), 352) if kind is nib.Nifti1Image else ((4, b"n+2\0"), 544)
    content[magic[0] : magic[0] + 4] = magic[1]
    places = {key: place[:2] if kind is nib.Nifti1Image else place[2:] for key, place in PLACES.items()}
    for key, number in (("vox_offset", offset), (name, value)):
        place, dtype = places[key]
        with np.errstate(all="ignore"):
            number = (
                np.clip(np.nan_to_num(number, posinf=1e9), -128, 127) if dtype[0] in "iu" and key == name else number
            )
            data = np.array(number, order + dtype).tobytes()
        content[place : place + len(data)] = data
    return bytes(content)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("code", "sqp")
def test_whatever_a_number_of_the_header_is_the_voxels_are_right_or_it_is_told(tmp_path, array, kind, order, code):
    path, again, read = tmp_path / "a.nii", tmp_path / "b.nii.gz", 0
    for name in PLACES:
        for value in VALUES:
            path.write_bytes(patched(array, kind, code, order, name, value))
            try:
                volume = nifti.read(path)
            except InputError as error:
                assert str(error).startswith(f"{path}: expected ") and "\n" not in str(error)
                continue
            read += 1
            if name not in ("scl_slope", "scl_inter", "dim1"):
                np.testing.assert_array_equal(volume.array, array, err_msg=f"{name} {value}")
            assert np.isfinite(volume.array).all() and np.isfinite(volume.spacing).all()
            nifti.write(again, volume, reference=path)
            np.testing.assert_array_equal(nifti.read(again).affine, volume.affine)
    assert read > len(PLACES) * len(VALUES) / 3


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("vox_offset", np.nan, "voxels from byte 352 on"), ("vox_offset", np.inf, "voxels from byte 352 on"),
        ("vox_offset", 0, "voxels from byte"), ("vox_offset", -16, "voxels from byte|valid NIfTI header"),
        ("dim0", 0, "1 to 7 axes"), ("dim0", 8, "1 to 7 axes"), ("dim0", -3, "1 to 7 axes"),
        ("dim1", -5, "at least one voxel"), ("pixdim1", np.nan, r"voxel sizes above 0 \(pixdim\)"),
        ("pixdim1", np.inf, r"voxel sizes above 0 \(pixdim\)"), ("pixdim1", 0, r"voxel sizes above 0 \(pixdim\)"),
    ],
)  # fmt: skip
def test_impossible_numbers_of_the_header_are_named(tmp_path, array, kind, name, value, words):
    if kind is nib.Nifti2Image and name == "vox_offset" and not np.isfinite(value):
        pytest.skip("NIfTI-2 has a whole number there")
    (tmp_path / "a.nii").write_bytes(patched(array, kind, "p", "<", name, value))
    with pytest.raises(InputError, match=words):
        nifti.read(tmp_path / "a.nii")


@pytest.mark.parametrize("excess", [0, 1e-7, 5e-7, 1e-5, 5e-4])
def test_quaternions_longer_than_one_by_rounding_are_read(tmp_path, array, excess):
    turn = np.array([0.6, 0.64, 0.48])  # of length 1 without a fourth part: half a turn
    content = bytearray(patched(array, nib.Nifti1Image, "q", "<", "qfac", 1))
    content[80:92] = np.array([0.7, 0.8, 2.5], "<f4").tobytes()
    content[256:268] = (turn * np.sqrt(1 + excess)).astype("<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    expected = (2 * np.outer(turn, turn) - np.eye(3)) @ np.diag([0.7, 0.8, 2.5])
    np.testing.assert_allclose(nifti.read(tmp_path / "a.nii").affine[:3, :3], expected, atol=2e-3)
    content[256:268] = (turn * 1.1).astype("<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(InputError, match="expected a valid qform, found .* which is at most 1; repair the header"):
        nifti.read(tmp_path / "a.nii")


def test_a_mask_with_the_qform_alone_lies_on_the_grid_of_its_scan(tmp_path):
    generator = np.random.default_rng(0)
    scan, mask = nib.Nifti1Image(np.zeros((200, 220, 180), np.uint8), None), nib.Nifti1Header()
    for _ in range(100):
        turn = nib.eulerangles.euler2mat(*generator.uniform(-np.pi, np.pi, 3)) @ np.diag([1, -1, 1.2])
        affine = nib.affines.from_matvec(turn, generator.uniform(-100, 100, 3)).astype(np.float32).astype(float)
        mask.set_data_shape(scan.shape)
        mask.set_qform(affine, 1)
        require_same_grid(Grid(scan.shape, mask.get_qform()), Grid(scan.shape, affine), "mask", "scan")


def test_gzip_of_many_members_is_read_as_it_streams(tmp_path, array):
    content = save(tmp_path / "a.nii", np.tile(array, (8, 8, 8))).read_bytes()
    cut = [content[start : start + 100] for start in range(0, len(content), 100)]
    (tmp_path / "a.nii.gz").write_bytes(b"".join(gzip.compress(part, 1) for part in cut) + bytes(512))
    np.testing.assert_array_equal(nifti.read(tmp_path / "a.nii.gz").array, nifti.read(tmp_path / "a.nii").array)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content) + b"garbage")
    with pytest.raises(InputError, match="a damaged one"):
        nifti.read(tmp_path / "b.nii.gz")


def test_what_a_file_claims_is_bounded_before_it_is_unpacked(tmp_path, array, monkeypatch):
    content = save(tmp_path / "a.nii", array).read_bytes()
    monkeypatch.setattr(nifti, "SPARE_BYTES", 1000)
    (tmp_path / "tail.nii.gz").write_bytes(gzip.compress(content + bytes(100)))
    np.testing.assert_array_equal(nifti.read(tmp_path / "tail.nii.gz").array, array)
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(content + bytes(10**7)))
    with pytest.raises(InputError, match="bomb.nii.gz: expected about 1192 bytes, as the header says, found more than"):
        nifti.read(tmp_path / "bomb.nii.gz")
    for name, size, edge in (("claim.nii.gz", 2**25, 1500), ("sparse.nii", 2**43, 10_000)):
        claim = content[:42] + np.array([edge] * 3, "i2").tobytes() + content[48:]
        with (tmp_path / name).open("wb") as file:  # what follows takes no room on the disk
            file.write(gzip.compress(claim) if name.endswith(".gz") else claim)
            file.truncate(size)
    with pytest.raises(InputError, match="expected at most 2 GiB, or 40 times .*, found 12.57 GiB packed into 32 MiB"):
        nifti.read(tmp_path / "claim.nii.gz")
    with pytest.raises(InputError, match="fit into this machine's memory"):
        nifti.read(tmp_path / "sparse.nii")


@pytest.mark.parametrize("fill", [np.finfo(np.float32).min, -1e30, 1e20, 9.97e36, -(2.0**31), np.nan, np.inf])
def test_fill_values_are_refused_or_replaced(tmp_path, array, fill):
    bad = array.copy()
    bad[:, :2, :2] = fill
    path = save(tmp_path / "a.nii", bad)
    with pytest.raises(InputError, match=r"a\.nii: expected .*20 .*of 210.*; .*--fill VALUE"):
        nifti.read(path)
    expected = array.copy()
    expected[:, :2, :2] = -1000
    np.testing.assert_array_equal(nifti.read(path, fill=-1000).array, expected)
    assert np.isnan(nifti.read(path, allow_nonfinite=True).array).sum() == 20


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.float64])
def test_ends_of_integers_are_fill_values_too(tmp_path, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    array[0, 0, 0] = np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else 1e200
    with pytest.raises(InputError, match="--fill VALUE"):
        nifti.read(save(tmp_path / "a.nii", array))
    array[0, 0, 0] = 99
    np.testing.assert_array_equal(nifti.read(save(tmp_path / "b.nii", array)).array, array)


@pytest.mark.parametrize("scale", [1e30, 1e12, 1e9, 1e-20, 1e-42])
def test_intensities_out_of_all_proportion_are_told(tmp_path, array, scale):
    path = save(tmp_path / "a.nii", np.abs(array) * np.float32(scale))
    for options in ({}, {"allow_nonfinite": True}):
        with pytest.raises(InputError, match=r"a\.nii: expected .*power of ten"):
            nifti.read(path, **options)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8])
@pytest.mark.parametrize("largest", [40, 530, 2035])
def test_labels_stored_with_a_slope_are_read(tmp_path, dtype, largest):
    labels = np.random.default_rng(0).integers(0, largest + 1, (6, 7, 8))
    labels[0, 0, :2] = 0, largest
    if np.iinfo(dtype).max < largest:
        return
    image = nib.Nifti1Image(labels.astype(np.float64), OBLIQUE)
    image.header.set_data_dtype(dtype)
    image.to_filename(tmp_path / "a.nii")
    assert nib.load(tmp_path / "a.nii").dataobj.slope != 1
    np.testing.assert_array_equal(nifti.read(tmp_path / "a.nii", dtype=np.int32).array, labels)


def test_fractions_are_no_labels_and_the_message_says_so(tmp_path, array):
    for name, wrong in (("image", array * 500), ("probability", np.abs(array) % 1), ("half", np.round(array) + 0.5)):
        image = nib.Nifti1Image(wrong.astype(np.float64), OBLIQUE)
        image.header.set_data_dtype(np.int16)
        image.to_filename(tmp_path / f"{name}.nii")
        with pytest.raises(InputError, match=r"\(labels\), found fractions, .* away from whole numbers"):
            nifti.read(tmp_path / f"{name}.nii", dtype=np.int32)
    array[0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"\(labels\), found 1 NaN or Inf voxels of 210"):
        nifti.read(save(tmp_path / "nan.nii", array), dtype=np.int32)


def test_nibabels_own_words_reach_no_root_handler(tmp_path, caplog):
    raw = bytearray(nib.Nifti1Image(np.ones((3, 3, 3), np.float32), np.eye(4)).to_bytes())
    raw[108:112] = np.float32(np.inf).tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    with pytest.raises(InputError, match="vox_offset"):
        nifti.read(tmp_path / "a.nii")
    assert caplog.records == []
