"""DICOM series as volumes: classic (one slice per file) and enhanced multi-frame.

The array axes are column, row, slice as stored (for an axial scan: towards the patient's left,
back and head). The affine turns DICOM's LPS+ patient coordinates into RAS+, in mm, by negating the
first two world axes. Values are rescaled (HU for CT) frame by frame; padding values stay as stored.

Source: DICOM PS3.3, C.7.6.2.1.1 (image plane), C.11.1 (modality transformation), C.7.6.16 (frames).
"""

import importlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

from jaxmed.errors import InputError
from jaxmed.volume import Volume

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# What pydicom raises on damaged or undecodable data: it has no error of its own.
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    RuntimeError,
    struct.error,
)
ORIENTATION_TOLERANCE = 1e-4  # of direction cosines; writers round them to 6 digits
SPACING_TOLERANCE = 0.02  # of the slice distance
SHEAR_TOLERANCE = 1e-3  # as io/nifti.py: gantry tilt of 0.06 degrees


class _Frame(NamedTuple):
    """One slice: where it is, and how its numbers are to be read."""

    path: Path
    number: int
    shape: tuple[int, int]  # rows, columns
    position: tuple[float, ...]  # of the first pixel's centre, LPS+, mm
    orientation: tuple[float, ...]
    spacing: tuple[float, float]  # between rows, between columns, mm
    thickness: float | None
    slope: float
    intercept: float


def read_series(path: str | Path, *, series: str | None = None, allow_shear: bool = False) -> Volume:
    """Read one series of slices, sorted along their normal.

    Args:
        path: A folder (searched with its subfolders; files that are not DICOM images are passed
            over) or a single file.
        series: SeriesInstanceUID to read; needed when the folder holds several.
        allow_shear: Whether slices may be displaced sideways (gantry tilt).

    Raises:
        InputError: When there is no such series, or it is not one regular stack of slices: several
            series, mixed sizes or orientations, missing or double slices, damaged or
            compressed data that cannot be decoded.
    """
    path = Path(path)
    require_pydicom()
    headers = _headers(path)
    if not headers:
        advice = "name the folder that holds the .dcm files"
        raise InputError(path, "a DICOM image series", "no DICOM image", advice)
    members = _choose(path, headers, series)
    frames = [frame for file, header in members for frame in _frames(file, header)]
    order, affine = _arrange(path, frames, allow_shear)
    array = _pixels(members, frames, order)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise InputError(path, "finite voxels", f"{bad} NaN or Inf voxels of {array.size}")
    return Volume.make(array, affine)


class Stack(NamedTuple):
    """Where the slices of a series are, and the headers that say so: what a derived series copies.

    Attributes:
        path: Where it was read.
        headers: One per slice, ascending along the normal; a multi-frame file stands for each of its slices.
        shape: Columns and rows.
        affine: Column, row, slice to RAS+, in mm.
        spacing: Between rows, between columns, between slices, in mm.
        orientation: Direction cosines of a row and of a column, LPS+.
        positions: Of each slice's first pixel, LPS+, in mm.
    """

    path: Path
    headers: tuple["Dataset", ...]
    shape: tuple[int, int]
    affine: Float64[np.ndarray, "4 4"]
    spacing: tuple[float, float, float]
    orientation: tuple[float, ...]
    positions: Float64[np.ndarray, "slice 3"]


def read_stack(path: str | Path, *, series: str | None = None) -> Stack:
    """Read the geometry and headers of a series, one per place: diffusion series have many images in each.

    Args:
        path: A folder or a single file; see `read_series`.
        series: SeriesInstanceUID to read; needed when the folder holds several.

    Raises:
        InputError: See `read_series`.
    """
    path = Path(path)
    require_pydicom()
    headers = _headers(path)
    if not headers:
        raise InputError(path, "a DICOM image series", "no DICOM image", "name the folder that holds the .dcm files")
    frames, owners, seen = [], [], set()
    for file, header in _choose(path, headers, series):
        for frame in _frames(file, header):
            place = tuple(round(value, 3) for value in frame.position)
            if place not in seen:
                seen.add(place)
                frames.append(frame)
                owners.append(header)
    order, affine = _arrange(path, frames, allow_shear=False)
    first = frames[order[0]]
    return Stack(
        path,
        tuple(owners[index] for index in order),
        (first.shape[1], first.shape[0]),
        affine,
        (*first.spacing, float(np.linalg.norm(affine[:3, 2]))),
        first.orientation,
        np.array([frames[index].position for index in order]),
    )


def list_series(path: str | Path) -> dict[str, str]:
    """Return the SeriesInstanceUIDs under a folder, each with its description and file count."""
    require_pydicom()
    found: dict[str, list[str]] = {}
    for _, header in _headers(Path(path)):
        text = str(header.get("SeriesDescription", "")) or "no description"
        found.setdefault(_uid(header), []).append(text)
    return {uid: f"{texts[0]}, {len(texts)} files" for uid, texts in found.items()}


def require_pydicom(package: str = "pydicom") -> None:
    """Check that a package of the extra `dicom` is installed.

    Raises:
        InputError: It is not.
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        advice = "pip install 'jaxmed[dicom]'"
        raise InputError("DICOM", f"the package {package}", "none installed", advice) from error


def _headers(path: Path) -> list[tuple[Path, "Dataset"]]:
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    if not path.exists():
        raise InputError(path, "a DICOM folder or file", "no such path", "check the path")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    headers = []
    for file in files:
        try:
            header = dcmread(file, stop_before_pixels=True)
        except InvalidDicomError:
            continue
        except READ_ERRORS as error:
            raise InputError(file, "a whole DICOM file", f"a damaged one ({error})") from error
        if "Rows" in header:
            headers.append((file, header))
        elif not _is_other_object(header):
            # pydicom reads as far as a cut file goes; passing over it could drop the last slice.
            raise InputError(file, "a whole DICOM image", "no Rows in its header", "copy it again")
    return headers


def _is_other_object(header: "Dataset") -> bool:
    """Whether it is a report, a presentation state, a DICOMDIR: a known class, but no image."""
    meta = getattr(header, "file_meta", {})
    kind = header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID")
    return kind is not None and kind.name != str(kind) and "Image Storage" not in kind.name


def _uid(header: "Dataset") -> str:
    return str(header.get("SeriesInstanceUID", "(no SeriesInstanceUID)"))


def _choose(path: Path, headers: list[tuple[Path, "Dataset"]], series: str | None) -> list[tuple[Path, "Dataset"]]:
    found = sorted({_uid(header) for _, header in headers})
    if series is None and len(found) > 1:
        listed = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        advice = "name one of them as series"
        raise InputError(path, "one series", f"{len(found)}: {listed}", advice)
    if series is not None and series not in found:
        raise InputError(path, f"the series {series}", f"{', '.join(found[:5])}")
    chosen = series or found[0]
    return [(file, header) for file, header in headers if _uid(header) == chosen]


def _frames(file: Path, header: "Dataset") -> list[_Frame]:
    """Gather each frame's attributes, which enhanced files keep in functional groups."""
    if int(header.get("SamplesPerPixel", 1)) != 1:
        raise InputError(file, "one value per pixel", "a colour image", "convert it to grayscale")
    shared = [*header.get("SharedFunctionalGroupsSequence", [])]
    per_frame = [*header.get("PerFrameFunctionalGroupsSequence", [])]
    count = int(header.get("NumberOfFrames", 1) or 1)
    if count > 1 and len(per_frame) != count:
        found = f"{len(per_frame)} of them for {count} frames"
        raise InputError(file, "a functional group per frame", found)
    frames = []
    for index in range(count):
        places = [*per_frame[index : index + 1], *shared]
        plane = _group(places, "PlanePositionSequence", header)
        turn = _group(places, "PlaneOrientationSequence", header)
        pixel = _group(places, "PixelMeasuresSequence", header)
        values = _group(places, "PixelValueTransformationSequence", header)
        thickness = pixel.get("SpacingBetweenSlices") or pixel.get("SliceThickness")
        rows, columns = _numbers(file, pixel, "PixelSpacing", 2)
        frames.append(
            _Frame(
                file,
                index,
                (int(header.Rows), int(header.Columns)),
                _numbers(file, plane, "ImagePositionPatient", 3),
                _numbers(file, turn, "ImageOrientationPatient", 6),
                (rows, columns),
                float(thickness) if thickness else None,
                float(values.get("RescaleSlope", 1)),
                float(values.get("RescaleIntercept", 0)),
            )
        )
    return frames


def _group(places: Sequence["Dataset"], name: str, header: "Dataset") -> "Dataset":
    for place in places:
        items = place.get(name)
        if items:
            return items[0]
    return header


def _numbers(file: Path, source: "Dataset", name: str, count: int) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in source[name].value)
    except (KeyError, TypeError, ValueError):
        values = ()
    if len(values) != count or not np.isfinite(values).all():
        advice = "only cross-sectional images have a place in space"
        found = f"{values}" if values else "none"
        raise InputError(file, f"{count} numbers in {name}", found, advice)
    return values


def _arrange(path: Path, frames: list[_Frame], allow_shear: bool) -> tuple[list[int], np.ndarray]:
    """Order the frames along their normal and find the affine, column row slice to RAS+."""
    first = frames[0]
    for frame in frames:
        if frame.shape != first.shape:
            raise InputError(frame.path, f"{first.shape} pixels as in {first.path.name}", frame.shape)
        turn = np.abs(np.subtract(frame.orientation, first.orientation)).max()
        if turn > ORIENTATION_TOLERANCE:
            found = f"{frame.orientation}"
            advice = "split localisers and views into series of their own"
            expected = f"the orientation of {first.path.name}, {first.orientation}"
            raise InputError(frame.path, expected, found, advice)
        if not np.allclose(frame.spacing, first.spacing, rtol=1e-3):
            expected = f"the PixelSpacing of {first.path.name}, {first.spacing} mm"
            raise InputError(frame.path, expected, f"{frame.spacing} mm")
    along_row, along_column = np.reshape(first.orientation, (2, 3))
    lengths = np.linalg.norm([along_row, along_column], axis=1)
    if np.abs(lengths - 1).max() > 1e-3 or abs(along_row @ along_column) > SHEAR_TOLERANCE:
        expected = "orthogonal unit vectors in ImageOrientationPatient"
        raise InputError(first.path, expected, f"{first.orientation}")
    normal = np.cross(along_row, along_column)
    positions = np.array([frame.position for frame in frames])
    heights = positions @ normal
    order = np.argsort(heights, kind="stable")
    step = _slice_step(path, frames, positions[order], heights[order], normal, allow_shear)
    affine = np.eye(4)
    affine[:3, 0] = along_row * first.spacing[1]
    affine[:3, 1] = along_column * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[order[0]]
    return order.tolist(), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _slice_step(
    path: Path,
    frames: list[_Frame],
    positions: np.ndarray,
    heights: np.ndarray,
    normal: np.ndarray,
    allow_shear: bool,
) -> np.ndarray:
    if len(frames) == 1:
        if not frames[0].thickness:
            raise InputError(path, "the thickness of a single slice", "no SliceThickness")
        return normal * frames[0].thickness
    gaps = np.diff(heights)
    typical = float(np.median(gaps))
    if gaps.min() < 1e-3:
        found = f"{int((gaps < 1e-3).sum())} slices at the place of another"
        advice = "separate time points, echoes or b-values first"
        raise InputError(path, "one slice per position", found, advice)
    if np.abs(gaps - typical).max() > SPACING_TOLERANCE * typical:
        worst = int(np.abs(gaps - typical).argmax())
        found = f"{gaps[worst]:.4g} mm after slice {worst + 1} of {len(frames)}"
        advice = "copy the missing slices, or resample the series"
        raise InputError(path, f"slices every {typical:.4g} mm", found, advice)
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    # Sideways displacement per slice, as the cosine that io/nifti.py bounds too.
    sideways = np.linalg.norm(step - (step @ normal) * normal) / np.linalg.norm(step)
    if sideways > SHEAR_TOLERANCE and not allow_shear:
        found = f"a tilt of {np.degrees(np.arcsin(sideways)):.2g} degrees"
        advice = "correct the gantry tilt first"
        raise InputError(path, "slices stacked along their normal", found, advice)
    return step


def _pixels(
    members: list[tuple[Path, "Dataset"]], frames: list[_Frame], order: list[int]
) -> Float32[np.ndarray, "x y z"]:
    rows, columns = frames[0].shape
    array = np.empty((columns, rows, len(frames)), np.float32)
    place = {(frames[item].path, frames[item].number): z for z, item in enumerate(order)}
    scaling = {(frame.path, frame.number): (frame.slope, frame.intercept) for frame in frames}
    for file, _ in members:
        stored = _decode(file)
        stored = stored[None] if stored.ndim == 2 else stored
        for index in range(len(stored)):
            slope, intercept = scaling[file, index]
            # In double precision, so that a large intercept rounds once.
            array[..., place[file, index]] = stored[index].T * slope + intercept
    return array


def _decode(file: Path) -> np.ndarray:
    from pydicom import dcmread

    try:
        data = dcmread(file)
        if "PixelData" not in data and "FloatPixelData" not in data:
            if "DoubleFloatPixelData" not in data:
                raise EOFError("it has no pixel data")
        _require_decoder(file, data)
        pixels = data.pixel_array
        expected = (int(data.get("NumberOfFrames", 1) or 1), int(data.Rows), int(data.Columns))
        if pixels.size != np.prod(expected):
            raise ValueError(f"{pixels.shape} pixels for {expected}")
    except InputError:
        raise
    except READ_ERRORS as error:
        found = f"a damaged one ({error})"
        raise InputError(file, "a whole DICOM file", found, "copy it again") from error
    return pixels.reshape(expected)


def _require_decoder(file: Path, data: "Dataset") -> None:
    from pydicom.pixels.decoders.base import get_decoder

    syntax = data.file_meta.TransferSyntaxUID
    if not syntax.is_compressed:
        return
    advice = "decompress the series first, for example with gdcmconv --raw or dcmdjpeg"
    try:
        is_available = get_decoder(syntax).is_available
    except NotImplementedError:
        is_available = False
    if not is_available:
        raise InputError(file, "pixels that can be decoded here", f"{syntax.name}", advice)
