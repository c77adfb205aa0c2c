"""Maps as DICOM: pydicom reads back values, units and places, for sources of every kind."""

import numpy as np
import pytest

from jaxmed.arrays.grid import reorient
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.dicom import read_series, read_stack
from jaxmed.io.maps import Quantity
from jaxmed.io.parametric_map import (
    MR_IMAGE,
    new_stack,
    on_stack,
    write_mr_images,
    write_parametric_map,
)
from jaxmed.volume import Volume

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")

QUANTITY = Quantity("NDI", "neurite density index")
SHAPE = (5, 4, 3)


def oblique(mirrored: bool) -> np.ndarray:
    """Axes of a tilted scan of 2 x 2.5 x 3 mm, RAS+."""
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    turn *= np.sign(np.linalg.det(turn)) * (-1 if mirrored else 1)
    affine = np.eye(4)
    affine[:3, :3] = turn * [2.0, 2.5, 3.0]
    affine[:3, 3] = [-20.0, 33.0, 7.0]
    return affine


@pytest.fixture(params=[False, True], ids=["right-handed", "left-handed"])
def scan(request, tmp_path):
    """A map in NIfTI's order, and the folder of a DICOM series with the same voxels."""
    affine = oblique(request.param)
    values = np.random.default_rng(0).uniform(0, 1, SHAPE).astype(np.float32)
    source = Volume.make(np.rint(values * 900), affine)
    write_mr_images(
        tmp_path / "source", source, new_stack(SHAPE, affine, "test"), Quantity("b0", "b0"), stored_per_unit=1
    )
    return Volume.make(values, affine), tmp_path / "source"


def world_values(volume: Volume) -> dict[tuple[float, ...], float]:
    """Each voxel's value by its place in the world, to 0.01 mm."""
    index = np.stack(np.meshgrid(*map(np.arange, volume.array.shape), indexing="ij"), -1).reshape(-1, 3)
    places = index @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    rounded = np.round(places, 2) + 0.0
    return dict(zip(map(tuple, rounded.tolist()), volume.array.reshape(-1).tolist(), strict=True))


def test_a_phantom_series_has_the_voxels_it_was_made_of(scan):
    volume, folder = scan
    found, wanted = world_values(read_series(folder)), world_values(volume)
    assert found.keys() == wanted.keys()
    for place, value in wanted.items():
        assert found[place] == pytest.approx(np.rint(np.float32(value) * 900), abs=0.51)


def test_parametric_maps_keep_values_units_and_places(scan, tmp_path):
    volume, folder = scan
    write_parametric_map(tmp_path / "ndi.dcm", volume, read_stack(folder), QUANTITY)
    assert world_values(read_series(tmp_path / "ndi.dcm")) == world_values(volume)
    data = pydicom.dcmread(tmp_path / "ndi.dcm")
    assert data.SOPClassUID == pydicom.uid.ParametricMapStorage and list(data.ImageType[:2]) == ["DERIVED", "PRIMARY"]
    assert data.FloatPixelData and "PixelData" not in data
    mapping = data.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    unit = mapping.MeasurementUnitsCodeSequence[0]
    assert (unit.CodeValue, unit.CodingSchemeDesignator, unit.CodeMeaning) == ("1", "UCUM", "no units")
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1, 0)


def test_mr_images_keep_values_to_a_thousandth_and_places(scan, tmp_path):
    volume, folder = scan
    paths = write_mr_images(tmp_path / "maps", volume, read_stack(folder), QUANTITY)
    assert len(paths) == SHAPE[2]
    found, wanted = world_values(read_series(tmp_path / "maps")), world_values(volume)
    assert found.keys() == wanted.keys()
    assert max(abs(found[place] - value) for place, value in wanted.items()) < 0.000501
    data = pydicom.dcmread(paths[0])
    assert data.SOPClassUID == MR_IMAGE and list(data.ImageType[:2]) == ["DERIVED", "PRIMARY"]
    assert data.RescaleSlope == 0.001 and data.pixel_array.dtype == np.uint16
    assert data.RealWorldValueMappingSequence[0].MeasurementUnitsCodeSequence[0].CodeValue == "1"


def test_derived_series_belong_to_the_study_of_their_source(scan, tmp_path):
    volume, folder = scan
    stack = read_stack(folder)
    write_parametric_map(tmp_path / "ndi.dcm", volume, stack, QUANTITY)
    images = write_mr_images(tmp_path / "maps", volume, stack, QUANTITY)
    source = stack.headers[0]
    derived = [pydicom.dcmread(path) for path in (tmp_path / "ndi.dcm", *images)]
    for data in derived:
        for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
            assert data[name].value == source[name].value, name
        assert data.SeriesInstanceUID != source.SeriesInstanceUID
    assert len({data.SeriesInstanceUID for data in derived}) == 2
    assert len({data.SOPInstanceUID for data in derived}) == len(derived)


def test_any_order_of_axes_fits_the_series(scan, tmp_path):
    """Converters flip and permute axes; the voxels stay where they are."""
    volume, folder = scan
    stack = read_stack(folder)
    wanted = on_stack(volume, stack)
    for codes in ("RAS", "LPI", "SRA", "PIR"):
        np.testing.assert_array_equal(on_stack(reorient(volume, codes), stack), wanted)


def test_a_converted_scan_fits_its_series_after_rounding_to_single_precision(scan, tmp_path):
    volume, folder = scan
    nifti.write(tmp_path / "map.nii.gz", volume)
    write_parametric_map(tmp_path / "ndi.dcm", nifti.read(tmp_path / "map.nii.gz"), read_stack(folder), QUANTITY)
    assert world_values(read_series(tmp_path / "ndi.dcm")) == world_values(volume)


def test_many_images_in_one_place_are_one_stack(scan, tmp_path):
    volume, folder = scan
    for number, path in enumerate(sorted(folder.iterdir())):
        data = pydicom.dcmread(path)
        data.SOPInstanceUID, data.InstanceNumber = pydicom.uid.generate_uid(), 100 + number
        data.save_as(folder / f"again_{path.name}")
    stack = read_stack(folder)
    assert len(stack.headers) == SHAPE[2]
    write_parametric_map(tmp_path / "ndi.dcm", volume, stack, QUANTITY)
    assert world_values(read_series(tmp_path / "ndi.dcm")) == world_values(volume)


def test_a_multiframe_source_serves_too(scan, tmp_path):
    volume, folder = scan
    write_parametric_map(tmp_path / "first.dcm", volume, read_stack(folder), QUANTITY)
    stack = read_stack(tmp_path / "first.dcm")
    assert len(stack.headers) == SHAPE[2] and len({id(header) for header in stack.headers}) == 1
    images = write_mr_images(tmp_path / "maps", volume, stack, QUANTITY)
    assert pydicom.dcmread(images[0]).StudyInstanceUID == stack.headers[0].StudyInstanceUID
    assert world_values(read_series(tmp_path / "maps")).keys() == world_values(volume).keys()


def test_maps_on_other_voxels_are_refused(scan, tmp_path):
    volume, folder = scan
    stack = read_stack(folder)
    moved = volume.affine.copy()
    moved[:3, 3] += 1.0
    with pytest.raises(InputError, match="expected the voxels of the scan, found a grid displaced by"):
        on_stack(Volume.make(volume.array, moved), stack)
    with pytest.raises(InputError, match="expected the voxels of the scan"):
        on_stack(Volume.make(volume.array[:-1], volume.affine), stack)
    coarse = volume.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    with pytest.raises(InputError, match="expected the voxels of the scan"):
        on_stack(Volume.make(volume.array, coarse), stack)


def test_values_that_an_mr_image_cannot_hold_are_refused(scan, tmp_path):
    volume, folder = scan
    with pytest.raises(InputError, match=r"expected values from 0 to 65.535 for an MR image, found"):
        write_mr_images(tmp_path / "maps", Volume.make(volume.array - 1, volume.affine), read_stack(folder), QUANTITY)
    assert not (tmp_path / "maps").exists()


def test_a_source_without_a_study_is_refused(scan, tmp_path):
    volume, folder = scan
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        del data.StudyInstanceUID
        data.save_as(path)
    stack = read_stack(folder)
    with pytest.raises(InputError, match="one that does not serve"):
        write_mr_images(tmp_path / "maps", volume, stack, QUANTITY)
    with pytest.raises(InputError, match="one that does not serve"):
        write_parametric_map(tmp_path / "ndi.dcm", volume, stack, QUANTITY)
