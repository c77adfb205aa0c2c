"""DICOM as archives and scanners leave it: files without a preamble, odd numbers, copies, and what lies beside."""

import re
import shutil
import warnings

import numpy as np
import pytest
from scan_files import make_slices, save_slices, strip_preamble, write_object

from jaxmed.errors import InputError
from jaxmed.io.dicom import read_series, read_with_notes
from jaxmed.volume import Volume

pydicom = pytest.importorskip("pydicom")

AFFINE = np.array([[-0.7, 0, 0, 9], [0, -0.8, 0, 8], [0, 0, 2.5, -4], [0, 0, 0, 1.0]])


def scan(seed=0, count=5):
    """Make a small scan with a value for every voxel."""
    return Volume.make(np.random.default_rng(seed).integers(-1000, 3000, (6, 4, count)).astype(np.float32), AFFINE)


def check(path, **options):
    """Check that a folder holds the scan, voxel by voxel; return the notes."""
    volume, notes = read_with_notes(path, **options)
    np.testing.assert_array_equal(volume.array, scan().array)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    return notes


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("which", [slice(2, None), slice(None)])
@pytest.mark.parametrize("name", ["{:03d}.dcm", "{:03d}.IMA", "IM{:04d}", "1.2.840.{}"])
def test_slices_without_a_preamble_are_read(which, implicit, name, tmp_path):
    for path in save_slices(make_slices(scan()), tmp_path, name)[which]:
        strip_preamble(path, implicit)
    assert check(tmp_path) == ()


@pytest.mark.parametrize("content", [b"", b"x" * 500, bytes(500), b"version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("name", ["{:03d}.dcm", "IM{:04d}"])
def test_a_file_that_should_be_a_slice_is_named(content, name, tmp_path):
    paths = save_slices(make_slices(scan()), tmp_path, name)
    paths[-1].write_bytes(content)
    with pytest.raises(InputError, match="a DICOM file, as those beside it") as caught:
        read_series(tmp_path)
    assert paths[-1].name in str(caught.value)


def test_what_is_no_slice_is_passed_over(tmp_path):
    save_slices(make_slices(scan()), tmp_path, "IM{:04d}")
    for name in ("README", "IM0001.json", "IM0002.jpg", "._IM0003", ".DS_Store", "DICOMDIR"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7 something")
    (tmp_path / ".hidden").mkdir()
    save_slices(make_slices(scan(1)), tmp_path / ".hidden")
    write_object(tmp_path / "csa", "1.3.12.2.1107.5.9.1")  # Siemens' private objects have a class that nobody knows
    write_object(tmp_path / "report", "1.2.840.10008.5.1.4.1.1.88.11")
    assert check(tmp_path) == ()


# Numbers in headers ---------------------------------------------------------------------------------------------------

NEEDED = {"PixelSpacing": 2, "ImagePositionPatient": 3, "ImageOrientationPatient": 6}
OPTIONAL = ("RescaleSlope", "RescaleIntercept", "NumberOfFrames", "InstanceNumber", "SliceThickness")


def write_raw(path, name, text):
    """Write a text into a number's element as a careless writer does, unchecked."""
    data = pydicom.dcmread(path)
    tag = pydicom.datadict.tag_for_keyword(name)
    vr = "IS" if name in ("NumberOfFrames", "InstanceNumber") else "DS"
    value = text.encode() + b" " * (len(text) % 2)
    raw = pydicom.dataelem.RawDataElement(pydicom.tag.Tag(tag), vr, len(value), value, 0, False, True)
    data[tag] = raw
    data.save_as(path)


@pytest.mark.parametrize("name", [*NEEDED, *OPTIONAL])
def test_an_empty_number_is_absent(name, tmp_path):
    for path in save_slices(make_slices(scan()), tmp_path):
        write_raw(path, name, "")
    if name in OPTIONAL:
        check(tmp_path)
        return
    with pytest.raises(InputError, match=f"000.dcm: expected {NEEDED[name]} numbers in {name}, found none"):
        read_series(tmp_path)


@pytest.mark.parametrize("kind", ["comma", "text", "doubled", "nan", "inf"])
@pytest.mark.parametrize("name", [*NEEDED, "RescaleSlope", "RescaleIntercept", "NumberOfFrames"])
def test_what_is_no_number_is_named(name, kind, tmp_path):
    paths = save_slices(make_slices(scan()), tmp_path)
    count = NEEDED.get(name, 1)
    bad = {"comma": "0,7", "text": "a few", "doubled": "1\\1", "nan": "nan", "inf": "inf"}[kind]
    write_raw(paths[3], name, "\\".join([bad] + ["1"] * (count - 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=f"003.dcm: expected .*{name}, found '") as caught:
            read_series(tmp_path)
    assert ("with a point" in str(caught.value)) == (kind == "comma")


@pytest.mark.parametrize("kind", ["0,7", "thick", "1\\2", "nan"])
def test_a_number_that_is_not_needed_does_no_harm(kind, tmp_path):
    for path in save_slices(make_slices(scan()), tmp_path):
        write_raw(path, "SliceThickness", kind)
        write_raw(path, "InstanceNumber", kind)
    check(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"PixelSpacing": [0, 0]}, "a PixelSpacing above 0 mm, found 0 and 0"),
        ({"PixelSpacing": [-0.8, 0.7]}, "a PixelSpacing above 0 mm, found -0.8 and 0.7"),
        ({"RescaleSlope": 0}, "a RescaleSlope other than 0"),
        ({"Rows": 0}, "rows and columns, found 0 and 6"),
        ({"NumberOfFrames": 0}, "a whole number of frames"),
        ({"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, "orthogonal unit vectors"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, "one slice per image, found a mosaic"),
    ],
)
def test_numbers_that_cannot_be_are_told_with_the_file(fields, words, tmp_path):
    save_slices(make_slices(scan(), **fields), tmp_path)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        read_series(tmp_path)
    assert "000.dcm" in str(caught.value)


# Pixels ---------------------------------------------------------------------------------------------------------------


def test_the_modality_table_is_applied(tmp_path):
    slices = make_slices(Volume.make(np.abs(scan().array), AFFINE), PixelRepresentation=0)
    table = (np.arange(4096) // 2 + 7).astype("<u2")
    for bits, data in zip((16, 12, 16, 12, 16), slices, strict=True):
        item = pydicom.Dataset()
        item.add_new(0x00283002, "US", [4096, 0, bits])
        item.add_new(0x00283006, "OW", table.tobytes())
        data.ModalityLUTSequence = pydicom.Sequence([item])
        data.RescaleIntercept = -1024  # the table goes first
    save_slices(slices, tmp_path)
    np.testing.assert_array_equal(read_series(tmp_path).array, table[np.abs(scan().array).astype(int)])


@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("high", [11, 13, 15])
def test_the_bits_below_the_high_bit_count(high, signed, tmp_path):
    values = np.clip(scan().array, -1000, 2000).astype(np.int64) if signed else np.abs(scan().array).astype(np.int64)
    shift = high - 11
    noise = np.random.default_rng(1).integers(0, 2**16, values.shape)
    kept = ((values & 0xFFF) << shift) | (noise & ~(0xFFF << shift))  # overlays and the like in the other bits
    slices = make_slices(scan(), BitsStored=12, HighBit=high, PixelRepresentation=signed)
    for index, data in enumerate(slices):
        data.PixelData = (kept[:, :, index].T & 0xFFFF).astype("<u2").tobytes()
    save_slices(slices, tmp_path)
    np.testing.assert_array_equal(read_series(tmp_path).array, values)


def test_a_high_bit_beyond_the_word_is_refused(tmp_path):
    save_slices(make_slices(scan(), BitsStored=12, HighBit=7), tmp_path)
    with pytest.raises(InputError, match="a HighBit from 11 to 15 for 12 bits of 16, found 7"):
        read_series(tmp_path)


# Places ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "decimals"), [(1.25, 1), (1 / 3, 2), (0.625, 1), (2.5, 1), (0.9375, 2), (2.0, 0), (5 / 3, 1), (1.25, 2)]
)
@pytest.mark.parametrize("start", [-4.0, -1203.7])
def test_rounded_positions_are_no_gaps(step, decimals, start, tmp_path):
    slices = make_slices(scan(count=14))
    for index, data in enumerate(slices):
        data.ImagePositionPatient = ["-9.0", "-8.0", f"{start + index * step:.{decimals}f}"]
    save_slices(slices, tmp_path)
    assert read_series(tmp_path).spacing[2] == pytest.approx(step, abs=2 * 0.5 * 10.0**-decimals / 13)


@pytest.mark.parametrize("missing", [1, 5, 7, 12])
@pytest.mark.parametrize(("step", "decimals"), [(1.25, 1), (1 / 3, 2), (0.625, 1), (2.0, 0), (2.5, 3)])
def test_a_missing_slice_among_rounded_ones_is_a_gap(step, decimals, missing, tmp_path):
    slices = make_slices(scan(count=14))
    for index, data in enumerate(slices):
        data.ImagePositionPatient = ["-9.0", "-8.0", f"{index * step:.{decimals}f}"]
    del slices[missing]
    save_slices(slices, tmp_path)
    with pytest.raises(InputError, match="copy the missing slices"):
        read_series(tmp_path)


def test_a_slice_beside_its_place_is_told(tmp_path):
    slices = make_slices(scan())
    slices[2].ImagePositionPatient = [-7.5, -8.0, 1.0]
    save_slices(slices, tmp_path)
    with pytest.raises(InputError, match=r"slice 3 of 5 1.2 mm beside its place"):
        read_series(tmp_path)


@pytest.mark.parametrize("new_uid", [False, True])
def test_a_slice_that_is_there_twice_counts_once(new_uid, tmp_path):
    paths = save_slices(make_slices(scan()), tmp_path)
    copy = shutil.copy(paths[3], tmp_path / "003.dcm (1)")
    if new_uid:
        data = pydicom.dcmread(copy)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
        data.save_as(copy)
    (note,) = check(tmp_path)
    assert note.startswith("1 slice is there twice")


def test_a_series_copied_into_another_folder_counts_once(tmp_path):
    save_slices(make_slices(scan()), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (note,) = check(tmp_path)
    assert note.startswith("5 slices are there twice")


def test_slices_of_one_identifier_are_not_one_slice(tmp_path):
    save_slices(make_slices(scan(), SOPInstanceUID="1.2.3"), tmp_path)
    assert check(tmp_path) == ()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("EchoTime", ("2.46", "4.92")), ("TemporalPositionIdentifier", ("1", "2")), ("AcquisitionNumber", ("1", "2")),
        ("ImageType", (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"])),
    ],
)  # fmt: skip
def test_different_images_at_one_place_are_told_apart(name, values, tmp_path):
    for number, value in enumerate(values):
        slices = make_slices(scan(number), SeriesInstanceUID="1.2.3", **{name: value})
        save_slices(slices, tmp_path, f"{number}_{{:03d}}.dcm")
    with pytest.raises(InputError, match=f"found 2 different ones at each, which differ in {name}"):
        read_series(tmp_path)


# Series ---------------------------------------------------------------------------------------------------------------


def test_several_series_are_listed_with_descriptions_and_slices(tmp_path):
    for number, words in enumerate(("Lung 1.25", "Soft 2.5")):
        slices = make_slices(scan(number, 5 - number), SeriesDescription=words, SeriesInstanceUID=f"1.2.{number}")
        save_slices(slices, tmp_path, f"{number}_{{}}")
    with pytest.raises(InputError, match="one series, found 2") as caught:
        read_series(tmp_path)
    assert "1.2.0 (Lung 1.25, CT, 5 slices), 1.2.1 (Soft 2.5, CT, 4 slices); name one of them with --series" in str(
        caught.value
    )
    for series in ("1.2.0", "Lung 1.25", "LUNG 1.25"):
        check(tmp_path, series=series)


OTHERS = {
    "a localiser": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
    "a screenshot": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "ImagePositionPatient": None},
    "a segmentation": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"},
    "dose": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.2"},
}


@pytest.mark.parametrize("is_own_series", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_what_cannot_be_a_scan_is_passed_over_with_a_note(other, is_own_series, tmp_path):
    slices = make_slices(scan())
    save_slices(slices, tmp_path)
    fields = dict(OTHERS[other]) | ({} if is_own_series else {"SeriesInstanceUID": slices[0].SeriesInstanceUID})
    save_slices(make_slices(scan(1, 2), **fields), tmp_path, "B{}.dcm")
    (note,) = check(tmp_path)
    assert "passed over" in note


def test_a_single_slice_beside_a_series_is_passed_over(tmp_path):
    save_slices(make_slices(scan()), tmp_path)
    save_slices(make_slices(scan(1, 1)), tmp_path, "B{}.dcm")
    (note,) = check(tmp_path)
    assert "1 slice) cannot be a scan" in note


def test_a_dicomdir_leads_to_the_files_beside_it(tmp_path):
    save_slices(make_slices(scan()), tmp_path / "PT0" / "SE0", "IM{}")
    write_object(tmp_path / "DICOMDIR", "1.2.840.10008.1.3.10")
    assert check(tmp_path) == check(tmp_path / "DICOMDIR") == ()


def test_many_warnings_are_one_note(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_slices(make_slices(scan(), SpecificCharacterSet="ISO 2022 IR 999"), tmp_path)
    capsys.readouterr()
    (note,) = check(tmp_path)
    assert note.startswith("pydicom warned ") and "ISO 2022 IR 999" in note
    assert capsys.readouterr().err == ""
