"""Diffusion series: grouping, order, and directions from the patient's frame to FSL's."""

from pathlib import Path

import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io.dicom_diffusion import read_diffusion
from jaxmed.io.gradients import to_world

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, generate_uid  # noqa: E402

ROW = np.array([0.8, 0.6, 0.0])
COLUMN = np.array([-0.48, 0.64, 0.6])
NORMAL = np.cross(ROW, COLUMN)
ORIGIN = np.array([-10.0, 20.0, 30.0])
SERIES = generate_uid()
BVALS = np.array([0.0, 700.0, 0.0, 2000.0])
PATIENT = np.array([[0, 0, 0], [1.0, 0, 0], [0, 0, 0], [0.0, 0.6, 0.8]])  # LPS+
SLICES = 3


def stored():
    """Return image, slice, row, column with a value for every voxel."""
    return np.random.default_rng(0).integers(0, 3000, (len(BVALS), SLICES, 4, 6)).astype(np.uint16)


def new_file(pixels: np.ndarray) -> Dataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.Modality = SERIES, "MR"
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.PixelData = pixels.tobytes()
    return data


def place(data: Dataset, slice_number: int) -> None:
    data.ImagePositionPatient = [float(f"{value:.6f}") for value in ORIGIN + slice_number * 2.5 * NORMAL]


def geometry(data: Dataset) -> None:
    data.PixelSpacing, data.SliceThickness = [0.7, 0.5], 2.5


def write_classic(folder: Path) -> list[Path]:
    """Write one file per slice, names shuffled; both unweighted images carry the same tags."""
    paths, pixels = [], stored()
    for number in range(len(BVALS)):
        for z in range(SLICES):
            data = new_file(pixels[number, z])
            place(data, z)
            geometry(data)
            data.ImageOrientationPatient = [*ROW.tolist(), *COLUMN.tolist()]
            data.InstanceNumber = number * SLICES + z + 1
            data.DiffusionBValue = BVALS[number]
            if BVALS[number]:
                data.DiffusionGradientOrientation = PATIENT[number].tolist()
            path = folder / f"{(data.InstanceNumber * 5) % 13:02d}.dcm"
            data.save_as(path, enforce_file_format=True)
            paths.append(path)
    return paths


def write_enhanced(folder: Path) -> list[Path]:
    """Write one file of all frames."""
    pixels = stored()
    data = new_file(pixels.reshape(-1, 4, 6))
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    data.NumberOfFrames = len(BVALS) * SLICES
    shared, turn, measures = Dataset(), Dataset(), Dataset()
    turn.ImageOrientationPatient = [*ROW.tolist(), *COLUMN.tolist()]
    geometry(measures)
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([turn]), Sequence([measures])
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for number in range(len(BVALS)):
        for z in range(SLICES):
            frame, position, diffusion = Dataset(), Dataset(), Dataset()
            place(position, z)
            diffusion.DiffusionBValue = BVALS[number]
            if BVALS[number]:
                direction = Dataset()
                direction.DiffusionGradientOrientation = PATIENT[number].tolist()
                diffusion.DiffusionGradientDirectionSequence = Sequence([direction])
            frame.PlanePositionSequence, frame.MRDiffusionSequence = Sequence([position]), Sequence([diffusion])
            frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    path = folder / "enhanced.dcm"
    data.save_as(path, enforce_file_format=True)
    return [path]


def change(path: Path, **fields) -> None:
    data = pydicom.dcmread(path)
    for name, value in fields.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    data.save_as(path)


@pytest.mark.parametrize("write", [write_classic, write_enhanced])
def test_a_series_becomes_a_scan_with_its_table(write, tmp_path):
    write(tmp_path)
    volume, table = read_diffusion(tmp_path)
    np.testing.assert_array_equal(volume.array, stored().transpose(3, 2, 1, 0))
    np.testing.assert_array_equal(table.bvals, BVALS)
    lps = np.stack([ROW * 0.5, COLUMN * 0.7, NORMAL * 2.5], 1)
    np.testing.assert_allclose(volume.affine[:3, :3], np.diag([-1, -1, 1]) @ lps, atol=1e-6)
    # The way back: FSL's frame to RAS+, which is the patient's LPS+ with two signs.
    np.testing.assert_allclose(to_world(table.bvecs, volume.affine), PATIENT * [-1, -1, 1], atol=1e-5)


def test_a_direction_along_the_rows_is_the_first_axis_in_fsl_terms(tmp_path):
    paths = write_classic(tmp_path)
    for path in paths[SLICES : 2 * SLICES]:
        change(path, DiffusionGradientOrientation=ROW.tolist())
    volume, table = read_diffusion(tmp_path)
    # Rows run along the array's first axis; FSL reverses it where the determinant is positive.
    sign = -1.0 if np.linalg.det(volume.affine[:3, :3]) > 0 else 1.0
    np.testing.assert_allclose(table.bvecs[1], [sign, 0, 0], atol=1e-5)


MISTAKES = {
    "no b-value": (lambda paths: change(paths[4], DiffusionBValue=None), "(0018,9087)"),
    "no direction": (lambda paths: change(paths[4], DiffusionGradientOrientation=None), "(0018,9089)"),
    "long direction": (lambda paths: change(paths[4], DiffusionGradientOrientation=[2.0, 0, 0]), "unit length"),
    "missing slice": (lambda paths: paths[4].unlink(), "expected"),
    "missing repeat": (lambda paths: paths[7].unlink(), "as many frames"),
    "mosaic": (lambda paths: change(paths[0], ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), "a mosaic"),
    "nothing weighted": (lambda paths: [change(path, DiffusionBValue=0.0) for path in paths], "above 50"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_wrong_is_named(mistake, tmp_path):
    break_it, expected = MISTAKES[mistake]
    break_it(write_classic(tmp_path))
    with pytest.raises(InputError, match="expected") as error:
        read_diffusion(tmp_path)
    assert expected in str(error.value)
