"""DICOM series as volumes: classic (one slice per file) and enhanced multi-frame.

The array axes are column, row, slice as stored (for an axial scan: towards the patient's left,
back and head). The affine turns DICOM's LPS+ patient coordinates into RAS+, in mm, by negating the
first two world axes. Values are rescaled (HU for CT) frame by frame, or go through the modality's table;
padding values stay as stored.

Positions are text of a few decimals: slices every 1.25 mm that are written as 1.2, 2.5, 3.8 are no gaps, and their
distance is that of a line through all of them. A slice that is there twice counts once.

Source: DICOM PS3.3, C.7.6.2.1.1 (image plane), C.11.1 (modality transformation), C.7.6.16 (frames).
"""

import decimal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Shaped

from jaxmed.errors import InputError
from jaxmed.io.dicom_files import (
    Image,
    choose_series,
    collect_warnings,
    count_frames,
    find_images,
    list_files,
    read_numbers,
    require_pydicom,
    text_of,
    warning_notes,
)
from jaxmed.io.dicom_pixels import decode
from jaxmed.volume import Grid, Volume, require_intensities

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

ORIENTATION_TOLERANCE = 1e-4  # of direction cosines; writers round them to 6 digits
SPACING_TOLERANCE = 0.02  # of the slice distance
ROUNDING_TOLERANCE = 0.1  # besides, where positions have few decimals; without one slice some are off by 0.2 and more
SHEAR_TOLERANCE = 1e-3  # as io/nifti.py: gantry tilt of 0.06 degrees
CONVERT = "convert the series with dcm2niix, and give its NIfTI file"
APART = (
    "EchoTime", "EffectiveEchoTime", "EchoNumbers", "InversionTime", "TemporalPositionIdentifier",
    "TemporalPositionIndex", "DiffusionBValue", "TriggerTime", "ImageType", "FrameType", "ConvolutionKernel",
    "AcquisitionNumber", "AcquisitionTime",
)  # fmt: skip
"""What may tell images at one place apart."""


class Frame(NamedTuple):
    """One slice: where it is, and how its numbers are to be read."""

    path: Path
    number: int
    shape: tuple[int, int]  # rows, columns
    position: tuple[float, ...]  # of the first pixel's centre, LPS+, mm
    orientation: tuple[float, ...]
    spacing: tuple[float, float]  # between rows, between columns, mm
    slope: float
    intercept: float
    groups: tuple["Dataset", ...]  # where its attributes stand, the header last


class Read(NamedTuple):
    """A series as a volume.

    Attributes:
        volume: Columns, rows and slices.
        notes: What was passed over, and what is unexpected.
    """

    volume: Volume
    notes: tuple[str, ...]


def read_series(path: str | Path, *, series: str | None = None, allow_shear: bool = False) -> Volume:
    """Read one series of slices, sorted along their normal.

    Args:
        path: A folder (searched with its subfolders; files that are not DICOM images are passed
            over), a DICOMDIR, or a single file.
        series: SeriesInstanceUID or SeriesDescription to read; needed when the folder holds several.
        allow_shear: Whether slices may be displaced sideways (gantry tilt).

    Raises:
        InputError: When there is no such series, or it is not one regular stack of slices: several
            series, mixed sizes or orientations, missing slices, different ones at one place, damaged or
            compressed data that cannot be decoded.
    """
    return read_with_notes(path, series=series, allow_shear=allow_shear).volume


def read_with_notes(
    path: str | Path,
    *,
    series: str | None = None,
    allow_shear: bool = False,
    files: Sequence[Path] = (),
    fill: float | None = None,
) -> Read:
    """Do what `read_series` does, and tell what is unexpected.

    Args:
        path: As there.
        series: As there.
        allow_shear: As there.
        files: What to look at instead of everything under the path.
        fill: Intensity of voxels that have none; None refuses them.

    Raises:
        InputError: As there.
    """
    path, warned = Path(path), []
    frames, notes = open_frames(path, series, files, warned)
    frames, copies = drop_copies(path, frames, warned)
    order, affine, further = arrange(path, frames, allow_shear)
    images = fill_images([frames[index] for index in order], warned)
    array = require_intensities(images.reshape(images.shape[:3]), path, fill=fill)
    return Read(Volume.make(array, affine), (*notes, *copies, *further, *warning_notes(warned)))


def read_grid(path: str | Path, *, series: str | None = None, files: Sequence[Path] = ()) -> Grid:
    """Return where the voxels of a series stand, from its headers.

    Args:
        path: A folder or a single file; see `read_series`.
        series: As there.
        files: What to look at instead of everything under the path.

    Raises:
        InputError: See `read_series`.
    """
    path, warned = Path(path), []
    frames, _ = drop_copies(path, open_frames(path, series, files, warned)[0], warned)
    _, affine, _ = arrange(path, frames, False)
    rows, columns = frames[0].shape
    return Grid((columns, rows, len(frames)), affine)


class Stack(NamedTuple):
    """Where the slices of a series are, and the headers that say so: what a derived series copies.

    Attributes:
        path: Where it was read.
        headers: One per slice, ascending along the normal; a multi-frame file stands for each of its slices.
        shape: Columns and rows.
        affine: Column, row, slice to RAS+, in mm.
        spacing: Between rows, between columns, between slices, in mm.
        orientation: Direction cosines of a row and of a column, LPS+.
        positions: Centres of each slice's first pixel, LPS+, in mm.
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
        series: As there.

    Raises:
        InputError: See `read_series`.
    """
    path = Path(path)
    frames = [group[0] for group in group_places(open_frames(path, series, (), [])[0])]
    order, affine, _ = arrange(path, frames, allow_shear=False)
    first = frames[order[0]]
    return Stack(
        path,
        tuple(frames[index].groups[-1] for index in order),
        (first.shape[1], first.shape[0]),
        affine,
        (*first.spacing, float(np.linalg.norm(affine[:3, 2]))),
        first.orientation,
        np.array([frames[index].position for index in order]),
    )


def open_series(
    path: Path, series: str | None, files: Sequence[Path], warned: list[str]
) -> tuple[list[Image], list[str]]:
    """Read the headers of one series; return its images, and notes on what was passed over.

    Args:
        path: Where to look.
        series: Which series, where there are several.
        files: What to look at instead of everything under the path.
        warned: Gets pydicom's warnings.

    Raises:
        InputError: There is no image, no such series, or a file that should be a slice is damaged.
    """
    require_pydicom()
    with collect_warnings(warned):
        images = find_images(files or list_files(path))
        if not images:
            advice = "name the folder that holds the .dcm files"
            raise InputError(path, "a DICOM image series", "no DICOM image", advice)
        return choose_series(path, images, series)


def open_frames(
    path: Path, series: str | None, files: Sequence[Path], warned: list[str]
) -> tuple[list[Frame], list[str]]:
    """Return every frame of one series, and notes; arguments and errors as of `open_series`."""
    images, notes = open_series(path, series, files, warned)
    with collect_warnings(warned):
        return [frame for image in images for frame in read_frames(image)], notes


def fill_images(
    frames: Sequence[Frame], warned: list[str], count: int = 1
) -> Float32[np.ndarray, "column row slice image"]:
    """Read the pixels of frames that are sorted by image, then by slice; each file is decoded once.

    Args:
        frames: As many of each image.
        warned: Gets pydicom's warnings.
        count: Images.
    """
    (rows, columns), depth = frames[0].shape, len(frames) // count
    array = np.empty((columns, rows, depth, count), np.float32)
    places: dict[Path, list[int]] = {}
    for place, frame in enumerate(frames):
        places.setdefault(frame.path, []).append(place)
    for file, members in places.items():
        stored = decode(file, warned)
        for place in members:
            frame = frames[place]
            array[:, :, place % depth, place // depth] = rescale(stored[frame.number], frame).T
    return array


def read_frames(image: Image) -> list[Frame]:
    """Gather each frame's attributes, which enhanced files keep in functional groups.

    Raises:
        InputError: One is missing, or is no such number.
    """
    file, header = image
    if "MOSAIC" in text_of(header, "ImageType").upper().split("\\"):
        raise InputError(file, "one slice per image", "a mosaic", CONVERT)
    if text_of(header, "SamplesPerPixel") not in ("", "1"):
        raise InputError(file, "one value per pixel", "a colour image", "convert it to grayscale")
    shape = [_required(file, header, name, 1)[0] for name in ("Rows", "Columns")]
    if min(shape) < 1 or shape != [int(length) for length in shape]:
        raise InputError(file, "rows and columns", f"{shape[0]:g} and {shape[1]:g}", "export it again")
    shared = [*header.get("SharedFunctionalGroupsSequence", [])]
    per_frame = [*header.get("PerFrameFunctionalGroupsSequence", [])]
    count = count_frames(file, header)
    if count > 1 and len(per_frame) != count:
        found = f"{len(per_frame)} of them for {count} frames"
        raise InputError(file, "a functional group per frame", found)
    has_table = bool(header.get("ModalityLUTSequence"))
    frames = []
    for index in range(count):
        groups = (*per_frame[index : index + 1], *shared, header)
        pixel = group_of(groups, "PixelMeasuresSequence")
        values = group_of(groups, "PixelValueTransformationSequence")
        rows, columns = _required(file, pixel, "PixelSpacing", 2)
        if min(rows, columns) <= 0:
            raise InputError(file, "a PixelSpacing above 0 mm", f"{rows:g} and {columns:g}", "export it again")
        slope = read_numbers(file, values, "RescaleSlope", 1)
        intercept = read_numbers(file, values, "RescaleIntercept", 1)
        if slope == (0.0,):
            raise InputError(file, "a RescaleSlope other than 0", "0", "export it again")
        frames.append(
            Frame(
                file,
                index,
                (int(shape[0]), int(shape[1])),
                _required(file, group_of(groups, "PlanePositionSequence"), "ImagePositionPatient", 3),
                _required(file, group_of(groups, "PlaneOrientationSequence"), "ImageOrientationPatient", 6),
                (rows, columns),
                1.0 if slope is None or has_table else slope[0],
                0.0 if intercept is None or has_table else intercept[0],
                groups,
            )
        )
    return frames


def group_of(groups: Sequence["Dataset"], name: str) -> "Dataset":
    """Return the functional group of that name of a frame, or its header."""
    for group in groups[:-1]:
        items = group.get(name)
        if items:
            return items[0]
    return groups[-1]


def _required(file: Path, source: "Dataset", name: str, count: int) -> tuple[float, ...]:
    values = read_numbers(file, source, name, count)
    if values is None:
        advice = "only cross-sectional images have a place in space" if count > 1 else "copy it again"
        expected = f"{count} numbers in {name}" if count > 1 else f"a number in {name}"
        raise InputError(file, expected, "none", advice)
    return values


def group_places(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Return the frames at each place, in the order in which places are first met."""
    found: dict[tuple[float, ...], list[Frame]] = {}
    for frame in frames:
        place = tuple(round(value, 3) + 0.0 for value in (*frame.position, *frame.orientation))
        found.setdefault(place, []).append(frame)
    return list(found.values())


def drop_copies(path: Path, frames: list[Frame], warned: list[str]) -> tuple[list[Frame], list[str]]:
    """Keep one of frames that stand at one place and show the same; return the frames, and a note.

    Raises:
        InputError: Frames at one place show different things.
    """
    places = group_places(frames)
    if len(places) == len(frames):
        return frames, []
    for group in places:
        images = [rescale(decode(frame.path, warned)[frame.number], frame) for frame in group]
        if any(not np.array_equal(images[0], image) for image in images[1:]):
            raise _mixed(path, places)
    count = len(frames) - len(places)
    note = f"{count} slice{'s are' if count > 1 else ' is'} there twice, alike in place and pixels: taken once"
    return [group[0] for group in places], [note]


def _mixed(path: Path, places: list[list[Frame]]) -> InputError:
    """Return the error that says by what the images at one place differ."""
    most = max(len(group) for group in places)
    found = f"{most} different ones at {'each' if all(len(g) == most for g in places) else 'some'}"
    for name in APART:
        told = [[_told(frame, name) for frame in group] for group in places]
        if all(len(set(words)) == len(words) for words in told) and all(all(words) for words in told):
            values = sorted({word for words in told for word in words})
            if len(values) <= 2 * most:
                found += f", which differ in {name} ({', '.join(values[:6])})"
                break
    advice = "separate time points, echoes or b-values into folders of their own"
    return InputError(path, "one slice per position", found, advice)


def _told(frame: Frame, name: str) -> str:
    for group in frame.groups:
        inner = [group, *(item for sequence in _SEQUENCES for item in (group.get(sequence) or [])[:1])]
        for place in inner:
            if text := text_of(place, name):
                return text
    return ""


_SEQUENCES = ("MREchoSequence", "FrameContentSequence", "MRImageFrameTypeSequence", "MRDiffusionSequence")


def arrange(path: Path, frames: list[Frame], allow_shear: bool) -> tuple[list[int], np.ndarray, list[str]]:
    """Order frames, no two at one place, along their normal; find the affine, column row slice to RAS+, and notes.

    Raises:
        InputError: They are no regular stack.
    """
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
    order = np.argsort(positions @ normal, kind="stable")
    affine, notes = np.eye(4), []
    affine[:3, 0] = along_row * first.spacing[1]
    affine[:3, 1] = along_column * first.spacing[0]
    if len(frames) == 1:
        affine[:3, 2], affine[:3, 3] = normal * _thickness(first), positions[0]
    else:
        affine[:3, 2], affine[:3, 3], notes = _fit_line(path, positions[order], normal, allow_shear)
    return order.tolist(), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, notes


def _thickness(frame: Frame) -> float:
    pixel = group_of(frame.groups, "PixelMeasuresSequence")
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        with collect_warnings([]):
            found = read_numbers(frame.path, pixel, name, 1)
        if found is not None and found[0] > 0:
            return found[0]
    raise InputError(frame.path, "the thickness of a single slice", "no SliceThickness")


def _fit_line(
    path: Path, positions: Float64[np.ndarray, "slice 3"], normal: Float64[np.ndarray, "3"], allow_shear: bool
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return step and start of the line through all positions, which are in order, and notes."""
    count = len(positions)
    step, start = np.polyfit(np.arange(count), positions, 1)
    gaps = np.diff(positions @ normal)
    typical = float(np.median(gaps))
    off = np.linalg.norm(positions - (start + np.arange(count)[:, None] * step), axis=1)
    is_even = np.abs(gaps - typical).max() <= SPACING_TOLERANCE * typical
    is_even &= off.max() <= SPACING_TOLERANCE * typical
    allowed = SPACING_TOLERANCE * typical + np.minimum(_rounding(positions), ROUNDING_TOLERANCE * typical)
    if typical <= 0 or (not is_even and (off > allowed).any()):
        worst = int(np.abs(gaps - typical).argmax())
        found = f"{gaps[worst]:.4g} mm after slice {worst + 1} of {count}"
        if np.abs(gaps - typical).max() <= SPACING_TOLERANCE * typical:
            found = f"slice {int(off.argmax()) + 1} of {count} {off.max():.3g} mm beside its place"
        advice = "copy the missing slices, or resample the series"
        raise InputError(path, f"slices every {typical:.4g} mm", found, advice)
    # Sideways displacement per slice, as the cosine that io/nifti.py bounds too.
    sideways = np.linalg.norm(step - (step @ normal) * normal) / np.linalg.norm(step)
    if sideways > SHEAR_TOLERANCE and not allow_shear:
        found = f"a tilt of {np.degrees(np.arcsin(sideways)):.2g} degrees"
        advice = "correct the gantry tilt first"
        raise InputError(path, "slices stacked along their normal", found, advice)
    distance = float(np.linalg.norm(step))
    rounded = f"slice positions are rounded: the distance of {distance:.4g} mm is that of a line through all {count}"
    return step, start, [] if is_even else [rounded]


def _rounding(positions: Float64[np.ndarray, "slice 3"]) -> Float64[np.ndarray, " slice"]:
    """Return by how much each position may be off because its numbers have few decimals, in mm."""
    total = np.zeros(len(positions))
    for column in positions.T:
        if np.ptp(column) == 0:
            continue
        numbers = [decimal.Decimal(repr(float(value))).normalize() for value in column]
        decimals = max(max(0, -int(number.as_tuple().exponent)) for number in numbers)
        digits = max(len(number.as_tuple().digits) for number in numbers)
        # Writers keep so many decimals, or so many digits in all.
        kept = [min(decimals, digits - max(0, number.adjusted() + 1)) for number in numbers]
        total += 0.5 * 10.0 ** -np.array(kept, float)
    return total


def rescale(stored: Shaped[np.ndarray, "row column"], frame: Frame) -> Float64[np.ndarray, "row column"]:
    """Return the values of a frame; in double precision, so that a large intercept rounds once."""
    return stored.astype(np.float64) * frame.slope + frame.intercept
