"""Scans as DICOM, broken scans, and what a stage left or said."""

import csv
import gzip

import numpy as np
import pytest

from jaxmed.io import nifti
from jaxmed.volume import Volume


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def only_line(capsys):
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


def make_slices(volume, **fields):
    """Return the data sets of an axial scan as a classic CT series; fields overwrite attributes, None deletes them."""
    pydicom = pytest.importorskip("pydicom")
    uid, study = pydicom.uid.generate_uid(), pydicom.uid.generate_uid()
    slices = []
    for index in range(volume.array.shape[2]):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
        data.SeriesInstanceUID, data.StudyInstanceUID, data.Modality = uid, study, "CT"
        data.InstanceNumber = index + 1
        data.Columns, data.Rows = volume.array.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        data.PixelSpacing, data.SliceThickness = [volume.spacing[1], volume.spacing[0]], volume.spacing[2]
        x, y, z = volume.affine[:3, 3] + index * volume.affine[:3, 2]
        data.ImagePositionPatient, data.ImageOrientationPatient = [-x, -y, z], [1, 0, 0, 0, 1, 0]
        data.PixelData = np.ascontiguousarray(volume.array[:, :, index].T).astype("<i2").tobytes()
        change(data, **fields)
        slices.append(data)
    return slices


def change(data, **fields):
    """Overwrite attributes of a data set; None deletes them."""
    for name, value in fields.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)


def save_slices(slices, folder, name="{:03d}.dcm"):
    """Write data sets under numbered names; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name.format(index) for index in range(len(slices))]
    for data, path in zip(slices, paths, strict=True):
        data.save_as(path, enforce_file_format=True)
    return paths


def strip_preamble(path, implicit=True):
    """Rewrite a DICOM file as the bare data set, without preamble and meta information."""
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.dcmread(path)
    bare = pydicom.Dataset()
    bare.update(data)
    pydicom.dcmwrite(path, bare, implicit_vr=implicit, little_endian=True)


def write_object(path, sop_class):
    """Write a DICOM object that holds no image: an index, a report, something private."""
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = sop_class
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data.SeriesInstanceUID = pydicom.uid.generate_uid()
    data.save_as(path, enforce_file_format=True)


def write_dicom(folder, volume):
    """Write an axial scan as a classic CT series."""
    return save_slices(make_slices(volume), folder)


def raw_affine(path, row, column, value):
    """Change one number of the sform in the file itself: our writer refuses what this makes."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    place = 280 + 16 * row + 4 * column
    data[place : place + 4] = np.float32(value).tobytes()
    path.write_bytes(gzip.compress(bytes(data)))


def rewrite(path, change):
    volume = nifti.read(path)
    nifti.write(path, Volume.make(change(volume.array.copy()), volume.affine), allow_nonfinite=True)


def poke(value):
    def change(array):
        array[1, 1, 1] = value
        return array

    return change


# Of a single file; among others the same files are listed in failed.csv.
MISTAKES = {
    "missing": (lambda p: p.unlink(), "scan_0.nii.gz: expected"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:300]), "scan_0.nii.gz: expected"),
    "no image": (lambda p: p.write_bytes(b"hello world" * 99), "scan_0.nii.gz: expected a NIfTI file"),
    "empty": (lambda p: p.write_bytes(b""), "an empty file"),
    "four dimensions": (lambda p: rewrite(p, lambda a: np.stack([a, a], -1)), "expected 3D data, found 4D"),
    "not a number": (lambda p: rewrite(p, poke(np.nan)), "1 NaN or Inf"),
    "infinite": (lambda p: rewrite(p, poke(np.inf)), "1 NaN or Inf"),
    "all zero": (lambda p: rewrite(p, np.zeros_like), "a constant volume, all zero"),
    "constant": (lambda p: rewrite(p, np.ones_like), "a constant volume"),
    "singular affine": (lambda p: raw_affine(p, 0, 0, 0.0), "a singular one"),
    "sheared affine": (lambda p: raw_affine(p, 0, 1, 0.8), "a sheared one"),
}
