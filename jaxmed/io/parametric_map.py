"""Write maps as DICOM beside the series that they come from.

Two forms: Parametric Map Storage, which keeps floating-point values and names their unit, and one MR Image Storage file
per slice, which every viewer shows (16 bit, value = stored / 1000). Both take patient, study, frame of reference and
geometry from the source, get a series of their own, and call themselves derived.

Source: DICOM PS3.3, A.75 (Parametric Map IOD), A.4 (MR Image IOD), C.7.6.16.2.11 (real world value mapping).
"""

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Float64, Shaped

from jaxmed.errors import InputError
from jaxmed.files import atomic_path
from jaxmed.io.dicom import Stack, read_stack
from jaxmed.io.dicom_files import require_pydicom
from jaxmed.io.maps import Quantity
from jaxmed.versions import package_version
from jaxmed.volume import Volume, check_affine

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

DicomForm = Literal["parametric-map", "mr-image", "both"]
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
STORED_PER_UNIT = 1000
"""An MR image stores this many counts for a value of 1."""
GRID_TOLERANCE = 0.05
"""As a share of the smallest voxel edge: writers round positions and directions to a few digits."""
# What a derived series shares with its source: the patient, the study, the frame of reference, the equipment.
COPIED = (
    "SpecificCharacterSet", "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientWeight",
    "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber",
    "ReferringPhysicianName", "FrameOfReferenceUID", "PositionReferenceIndicator", "PatientPosition",
    "InstitutionName", "Manufacturer", "ManufacturerModelName", "DeviceSerialNumber", "MagneticFieldStrength",
    "ScanningSequence", "SequenceVariant", "ScanOptions", "MRAcquisitionType", "EchoTime", "RepetitionTime",
    "EchoTrainLength", "BodyPartExamined",
)  # fmt: skip


def write_dicom_map(folder: Path, volume: Volume, stack: Stack, quantity: Quantity, form: DicomForm) -> list[Path]:
    """Write one map beside its source: NAME.dcm, and NAME/0001.dcm, ... for every viewer; return the files."""
    place, paths = folder / quantity.name, []
    if form in ("parametric-map", "both"):
        paths.append(place.with_name(f"{quantity.name}.dcm"))
        write_parametric_map(paths[0], volume, stack, quantity)
    return paths + (write_mr_images(place, volume, stack, quantity) if form in ("mr-image", "both") else [])


def write_parametric_map(path: str | Path, volume: Volume, stack: Stack, quantity: Quantity) -> None:
    """Write one map as a Parametric Map of floating-point values.

    Args:
        path: A .dcm file.
        volume: The map, 3D, on the voxels of the source in any order of its axes.
        stack: The source, from `jaxmed.io.dicom.read_stack`.
        quantity: What the map holds.

    Raises:
        InputError: A package is missing, the map is on other voxels, or the source's header lacks what every DICOM
            image has.
    """
    require_pydicom("highdicom")
    import highdicom as hd
    from pydicom.sr.coding import Code
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    frames = on_stack(volume, stack).astype(np.float32)
    low, high = quantity.bounds
    unit = Code(quantity.unit, "UCUM", "no units" if quantity.unit == "1" else quantity.unit)
    # No measurement can be said to be impossible: the mapping holds for every finite float.
    limits = (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))
    mapping = hd.pm.RealWorldValueMapping(
        quantity.label[:16], quantity.definition[:64], unit, value_range=limits, slope=1.0, intercept=0.0
    )
    spacing = stack.spacing
    try:
        data = hd.pm.ParametricMap(
            _distinct(stack.headers),
            frames,
            series_instance_uid=generate_uid(),
            series_number=_series_number(stack),
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="jaxmed",
            manufacturer_model_name="jaxmed",
            software_versions=package_version("jaxmed") or "unknown",
            device_serial_number="0",
            contains_recognizable_visual_features=False,
            real_world_value_mappings=[mapping],
            voi_lut_transformations=[hd.VOILUTTransformation((low + high) / 2, high - low)],
            transfer_syntax_uid=ExplicitVRLittleEndian,
            content_description=quantity.definition[:64],
            content_label=quantity.label.upper()[:16],
            pixel_measures=hd.PixelMeasuresSequence(spacing[:2], spacing[2], spacing[2]),
            plane_orientation=hd.PlaneOrientationSequence("PATIENT", stack.orientation),
            plane_positions=[hd.PlanePositionSequence("PATIENT", position) for position in stack.positions.tolist()],
        )
    except (AttributeError, ValueError, TypeError) as error:
        raise _unfit(stack, error) from error
    data.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "QUANTITY"]
    data.SeriesDescription = quantity.label[:64]
    _save(data, Path(path))


def write_mr_images(
    folder: str | Path, volume: Volume, stack: Stack, quantity: Quantity, *, stored_per_unit: float = STORED_PER_UNIT
) -> list[Path]:
    """Write one map as a series of MR images, one file per slice.

    Values are rounded to 1 / `stored_per_unit` and must lie between 0 and 65535 / `stored_per_unit`.

    Returns:
        The files, in the order of the slices.

    Raises:
        InputError: See `write_parametric_map`; or a value cannot be stored.
    """
    require_pydicom()
    from pydicom.uid import generate_uid

    frames = on_stack(volume, stack)
    stored = np.rint(np.asarray(frames, np.float64) * stored_per_unit)
    if not np.isfinite(stored).all() or stored.min() < 0 or stored.max() > 65535:
        expected = f"values from 0 to {65535 / stored_per_unit:g} for an MR image"
        raise InputError(quantity.label, expected, f"{frames.min():g} to {frames.max():g}", "write a parametric map")
    series, paths = generate_uid(), []
    for number, image in enumerate(stored.astype("<u2")):
        data = _mr_image(stack, number, image, quantity, stored_per_unit)
        data.SeriesInstanceUID = series
        paths.append(Path(folder) / f"{number + 1:04d}.dcm")
        _save(data, paths[-1])
    return paths


def read_source(folder: Path, volume: Volume, series: str | None) -> Stack:
    """Read the DICOM series that a map is to be filed beside, and check that it has the map's voxels.

    Raises:
        InputError: It is no regular series, or another one.
    """
    stack = read_stack(folder, series=series)
    on_stack(volume, stack)
    return stack


def on_stack(volume: Volume, stack: Stack) -> Shaped[np.ndarray, "slice row column"]:
    """Reorder a volume's axes to the slices, rows and columns of a series, without interpolation.

    Raises:
        InputError: The two do not share their voxels.
    """
    if volume.array.ndim != 3:
        raise InputError("map", "a 3D volume", f"shape {volume.array.shape}")
    advice = "give the DICOM series that the NIfTI scan was converted from"
    relation = np.linalg.inv(stack.affine) @ volume.affine
    turn = np.rint(relation[:3, :3])
    is_permutation = np.array_equal(np.abs(turn) @ np.abs(turn).T, np.eye(3))
    source_axis = np.abs(turn).argmax(axis=1)
    wanted = (stack.shape[0], stack.shape[1], len(stack.positions))
    shape = tuple(volume.array.shape[axis] for axis in source_axis)
    if not is_permutation or shape != wanted:
        found = f"{volume.array.shape} voxels of {tuple(round(edge, 3) for edge in volume.spacing)} mm"
        raise InputError(stack.path, "the voxels of the scan", f"{wanted} on another grid than {found}", advice)
    array = volume.array.transpose(source_axis)
    signs = turn[np.arange(3), source_axis]
    start = np.where(signs < 0, np.array(wanted) - 1, 0)
    exact = np.eye(4)
    exact[:3, :3], exact[:3, 3] = turn, start
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    corners[:, :3] *= np.array(volume.array.shape) - 1
    error = np.abs((relation - exact) @ corners.T).max()
    if error > GRID_TOLERANCE:
        raise InputError(stack.path, "the voxels of the scan", f"a grid displaced by {error:.2g} voxels", advice)
    array = array[tuple(slice(None, None, -1) if sign < 0 else slice(None) for sign in signs)]
    return np.ascontiguousarray(array.transpose(2, 1, 0))


def new_stack(shape: tuple[int, int, int], affine: Float[np.ndarray, "4 4"], description: str) -> Stack:
    """Make the headers of a series that has no source: for phantoms.

    The columns and rows of its images run along the first two axes of the affine.
    """
    require_pydicom()
    from pydicom.dataset import Dataset
    from pydicom.uid import generate_uid

    check_affine(affine, "affine")
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / spacing
    normal = np.cross(axes[:, 0], axes[:, 1])
    heights = range(shape[2]) if normal @ axes[:, 2] > 0 else range(shape[2] - 1, -1, -1)
    positions = np.array([lps[:3, 3] + height * lps[:3, 2] for height in heights])
    stacked = np.eye(4)
    stacked[:3, :3] = np.stack([lps[:3, 0], lps[:3, 1], normal * spacing[2]], axis=1)
    stacked[:3, 3] = positions[0]
    header = Dataset()
    for name in ("StudyInstanceUID", "FrameOfReferenceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(header, name, generate_uid())
    now = datetime.datetime.now()
    header.SOPClassUID, header.Modality = MR_IMAGE, "MR"
    header.PatientName, header.PatientID = "Phantom^jaxmed", "PHANTOM"
    header.PatientBirthDate = header.PatientSex = header.AccessionNumber = header.ReferringPhysicianName = ""
    header.StudyID, header.SeriesNumber, header.StudyDescription = "1", 1, description[:64]
    header.StudyDate, header.StudyTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    header.Rows, header.Columns = shape[1], shape[0]
    return Stack(
        Path("phantom"),
        (header,) * shape[2],
        (shape[0], shape[1]),
        np.diag([-1.0, -1.0, 1.0, 1.0]) @ stacked,
        (float(spacing[1]), float(spacing[0]), float(spacing[2])),
        (*axes[:, 0].tolist(), *axes[:, 1].tolist()),
        positions,
    )


def _mr_image(stack: Stack, number: int, image: np.ndarray, quantity: Quantity, per_unit: float) -> "Dataset":
    from pydicom.dataset import Dataset
    from pydicom.uid import generate_uid

    source, data = stack.headers[number], Dataset()
    for name in COPIED:
        if name in source:
            data[name] = source[name]
    if "StudyInstanceUID" not in data or "FrameOfReferenceUID" not in data:
        raise _unfit(stack, "no StudyInstanceUID or FrameOfReferenceUID")
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = MR_IMAGE, generate_uid(), "MR"
    data.ImageType = ["DERIVED", "PRIMARY", "OTHER"]
    data.SeriesNumber, data.InstanceNumber = _series_number(stack), number + 1
    data.SeriesDescription, data.DerivationDescription = quantity.label[:64], quantity.definition[:1024]
    # Type 2: present, empty where the source does not say.
    for name in ("ScanningSequence", "SequenceVariant", "ScanOptions", "MRAcquisitionType", "EchoTime"):
        if name not in data:
            setattr(data, name, None)
    data.ImagePositionPatient = [_decimal(value) for value in stack.positions[number]]
    data.ImageOrientationPatient = [_decimal(value) for value in stack.orientation]
    data.PixelSpacing = [_decimal(value) for value in stack.spacing[:2]]
    data.SliceThickness = data.SpacingBetweenSlices = _decimal(stack.spacing[2])
    data.SliceLocation = _decimal(float(stack.positions[number] @ _normal(stack)))
    data.Rows, data.Columns = image.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 0
    data.RescaleSlope, data.RescaleIntercept, data.RescaleType = _decimal(1 / per_unit), 0, "US"
    low, high = quantity.bounds
    data.WindowCenter, data.WindowWidth = _decimal((low + high) / 2), _decimal(high - low)
    data.RealWorldValueMappingSequence = [_real_world(quantity, per_unit)]
    data.PixelData = image.tobytes()
    return data


def _real_world(quantity: Quantity, per_unit: float) -> "Dataset":
    from pydicom.dataset import Dataset

    unit, mapping = Dataset(), Dataset()
    unit.CodeValue, unit.CodingSchemeDesignator = quantity.unit, "UCUM"
    unit.CodeMeaning = "no units" if quantity.unit == "1" else quantity.unit
    mapping.MeasurementUnitsCodeSequence = [unit]
    mapping.LUTLabel, mapping.LUTExplanation = quantity.label[:16], quantity.definition[:64]
    mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = 1 / per_unit, 0.0
    # The pixels are unsigned: their value representation decides that of the limits.
    mapping.add_new("RealWorldValueFirstValueMapped", "US", 0)
    mapping.add_new("RealWorldValueLastValueMapped", "US", 65535)
    return mapping


def _decimal(value: float) -> str:
    """Return a decimal string of at most 16 characters, DICOM's DS."""
    for digits in range(15, 0, -1):
        text = f"{value:.{digits}g}"
        if len(text) <= 16:
            return text
    raise ValueError(f"expected a number of at most 16 characters, got {value}")


def _normal(stack: Stack) -> Float64[np.ndarray, "3"]:
    along_row, along_column = np.reshape(stack.orientation, (2, 3))
    return np.cross(along_row, along_column)


def _distinct(headers: tuple["Dataset", ...]) -> list["Dataset"]:
    """Return each header once: a multi-frame file stands for all of its slices."""
    return list({id(header): header for header in headers}.values())


def _series_number(stack: Stack) -> int:
    number = stack.headers[0].get("SeriesNumber")
    return int(number or 0) * 100 + 1


def _unfit(stack: Stack, error: object) -> InputError:
    advice = "maps cannot be filed beside a series without patient, study and frame of reference"
    return InputError(stack.path, "a DICOM series to derive maps from", f"one that does not serve ({error})", advice)


def _save(data: Any, path: Path) -> None:
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    if not hasattr(data, "file_meta"):
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    with atomic_path(path) as temporary:
        data.save_as(temporary, enforce_file_format=True)
