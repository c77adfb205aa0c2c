"""DICOM series: place, order, rescaling, and series that are no regular stack."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io.dicom import read_series

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, JPEGLosslessSV1, generate_uid  # noqa: E402

ROW = np.array([0.8, 0.6, 0.0])
COLUMN = np.array([-0.48, 0.64, 0.6])
NORMAL = np.cross(ROW, COLUMN)
ORIGIN = np.array([-10.0, 20.0, 30.0])
SERIES = generate_uid()


def stored(count=5):
    """Make slices of row, column with a value for every voxel."""
    return np.random.default_rng(0).integers(-1000, 3000, (count, 4, 6)).astype(np.int16)


def header(pixels: np.ndarray, series=SERIES) -> Dataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, generate_uid()
    data.SeriesInstanceUID, data.SeriesDescription, data.Modality = series, "chest", "CT"
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.PixelData = pixels.astype("<i2").tobytes()
    return data


def one_slice(pixels: np.ndarray, position: np.ndarray, series=SERIES) -> Dataset:
    data = header(pixels, series)
    data.ImagePositionPatient = [float(f"{value:.6f}") for value in position]
    data.ImageOrientationPatient = [*ROW.tolist(), *COLUMN.tolist()]
    data.PixelSpacing, data.SliceThickness = [0.7, 0.5], 2.5
    data.RescaleSlope, data.RescaleIntercept = 2, -1024
    return data


def series(folder: Path, pixels: np.ndarray | None = None, uid=SERIES, step=2.5) -> list[Path]:
    """Write a classic series whose file names are in another order than its slices."""
    folder.mkdir(exist_ok=True)
    pixels = stored() if pixels is None else pixels
    paths = []
    for index, image in enumerate(pixels):
        path = folder / f"{uid[-4:]}_{(index * 2) % len(pixels)}.dcm"
        one_slice(image, ORIGIN + index * step * NORMAL, uid).save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def expected_affine(step=2.5):
    affine = np.eye(4)
    affine[:3, :3] = np.stack([ROW * 0.5, COLUMN * 0.7, NORMAL * step], 1)
    affine[:3, 3] = ORIGIN
    return np.diag([-1, -1, 1, 1]) @ affine


def change(path: Path, **fields) -> None:
    data = pydicom.dcmread(path)
    for name, value in fields.items():
        setattr(data, name, value)
    data.save_as(path)


def test_slices_are_sorted_placed_and_rescaled(tmp_path):
    series(tmp_path)
    (tmp_path / "notes.txt").write_text("not DICOM")
    volume = read_series(tmp_path)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, stored().transpose(2, 1, 0) * 2.0 - 1024)
    np.testing.assert_allclose(volume.affine, expected_affine(), atol=1e-5)
    assert volume.spacing == pytest.approx((0.5, 0.7, 2.5), rel=1e-5)


def test_every_slice_has_its_own_rescaling(tmp_path):
    change(series(tmp_path)[2], RescaleSlope=5, RescaleIntercept=7)
    np.testing.assert_array_equal(read_series(tmp_path).array[..., 2], stored()[2].T * 5.0 + 7)


def test_single_file_is_one_slice_thick(tmp_path):
    paths = series(tmp_path)
    volume = read_series(paths[0])
    assert volume.array.shape == (6, 4, 1)
    np.testing.assert_allclose(volume.affine, expected_affine(), atol=1e-5)
    change(paths[0], SliceThickness=None)
    with pytest.raises(InputError, match="thickness"):
        read_series(paths[0])


@pytest.mark.parametrize("is_shared", [True, False])
def test_enhanced_multi_frame_file_is_read(tmp_path, is_shared):
    pixels = stored()
    data = header(pixels)
    data.NumberOfFrames = len(pixels)
    order = [3, 0, 4, 1, 2]
    data.PixelData = pixels[order].astype("<i2").tobytes()

    def group(**fields):
        item = Dataset()
        for name, value in fields.items():
            setattr(item, name, value)
        return Sequence([item])

    common = Dataset()
    common.PlaneOrientationSequence = group(ImageOrientationPatient=[*ROW, *COLUMN])
    common.PixelMeasuresSequence = group(PixelSpacing=[0.7, 0.5], SliceThickness=2.5)
    common.PixelValueTransformationSequence = group(RescaleSlope=2, RescaleIntercept=-1024)
    frames = []
    for index in order:
        frame = Dataset() if is_shared else copy.deepcopy(common)
        place = [float(f"{value:.6f}") for value in ORIGIN + index * 2.5 * NORMAL]
        frame.PlanePositionSequence = group(ImagePositionPatient=place)
        frames.append(frame)
    data.SharedFunctionalGroupsSequence = Sequence([common if is_shared else Dataset()])
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    data.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    volume = read_series(tmp_path / "a.dcm")
    np.testing.assert_array_equal(volume.array, pixels.transpose(2, 1, 0) * 2.0 - 1024)
    np.testing.assert_allclose(volume.affine, expected_affine(), atol=1e-5)
    data.PerFrameFunctionalGroupsSequence = Sequence(frames[:2])
    data.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(InputError, match="group per frame, found 2"):
        read_series(tmp_path)


def test_several_series_are_listed_and_one_can_be_named(tmp_path):
    other = generate_uid()
    series(tmp_path / "a")
    series(tmp_path / "b", stored(3), other)
    with pytest.raises(InputError, match="one series, found 2: ") as caught:
        read_series(tmp_path)
    assert SERIES in str(caught.value) and other in str(caught.value)
    assert read_series(tmp_path, series=other).array.shape == (6, 4, 3)
    with pytest.raises(InputError, match="expected the series 1.2.3"):
        read_series(tmp_path, series="1.2.3")


def remove(paths):
    paths[2].unlink()


def double(paths):
    change(paths[2], ImagePositionPatient=pydicom.dcmread(paths[1]).ImagePositionPatient)


def tilt(paths):
    for index, path in enumerate(paths):
        place = ORIGIN + index * (2.5 * NORMAL + 0.1 * ROW)
        change(path, ImagePositionPatient=place.round(6).tolist())


def resize(paths):
    small = stored()[0][:, :5]
    change(paths[2], Columns=5, PixelData=small.astype("<i2").tobytes())


def colour(paths):
    change(paths[2], SamplesPerPixel=3)


def cut(paths):
    paths[2].write_bytes(paths[2].read_bytes()[:-5])


def cut_header(paths):
    paths[2].write_bytes(paths[2].read_bytes()[:300])


def no_pixels(paths):
    data = pydicom.dcmread(paths[2])
    del data.PixelData
    data.save_as(paths[2])


def compress(paths):
    data = pydicom.dcmread(paths[2])
    data.PixelData = pydicom.encaps.encapsulate([b"\0" * 48])
    data["PixelData"].VR = "OB"
    data.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    data.save_as(paths[2])


def unknown_syntax(paths):
    compress(paths)
    data = pydicom.dcmread(paths[2])
    data.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    data.save_as(paths[2])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove, "slices every 2.5 mm, found 5 mm after slice 2 of 4"),
        (double, "one slice per position"),
        (tilt, "tilt of 2.3 degrees"),
        (resize, r"pixels as in .*found \(4, 5\)"),
        (lambda p: change(p[2], ImageOrientationPatient=[1, 0, 0, 0, 1, 0]), "the orientation of"),
        (lambda p: change(p[2], PixelSpacing=[0.8, 0.5]), "the PixelSpacing of"),
        (lambda p: change(p[2], PixelSpacing=None), "2 numbers in PixelSpacing, found none"),
        (lambda p: change(p[2], ImagePositionPatient=None), "3 numbers in ImagePositionPatient"),
        (colour, "colour"),
        (cut, "damaged"),
        (cut_header, "no Rows"),
        (no_pixels, "damaged"),
        (compress, "dcm: expected"),
        (unknown_syntax, "pixels that can be decoded here, found MPEG2"),
    ],
)
def test_series_that_are_no_regular_stack_are_told(tmp_path, spoil, words):
    paths = series(tmp_path)
    spoil(paths)
    with pytest.raises(InputError, match=words) as caught:
        read_series(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_tilted_series_can_be_asked_for(tmp_path):
    tilt(series(tmp_path))
    volume = read_series(tmp_path, allow_shear=True)
    step = np.diag([-1, -1, 1]) @ (2.5 * NORMAL + 0.1 * ROW)
    np.testing.assert_allclose(volume.affine[:3, 2], step, atol=1e-5)


def test_objects_without_pixels_are_passed_over(tmp_path):
    report = one_slice(stored()[0], ORIGIN)
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    for name in ("Rows", "Columns", "PixelData"):
        delattr(report, name)
    series(tmp_path)
    report.save_as(tmp_path / "report.dcm", enforce_file_format=True)
    assert read_series(tmp_path).array.shape == (6, 4, 5)


def test_missing_package_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(InputError, match=r"pip install 'jaxmed\[dicom\]'"):
        read_series(tmp_path)


def test_folders_without_images_are_told(tmp_path):
    (tmp_path / "notes.txt").write_text("not DICOM")
    with pytest.raises(InputError, match="no DICOM image"):
        read_series(tmp_path)
    with pytest.raises(InputError, match="no DICOM image"):
        read_series(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="no such path"):
        read_series(tmp_path / "missing")
