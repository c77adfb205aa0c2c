"""Scans as the images of a network in [0, 2], and images back on the grid and the scale of the scan.

A scan is turned to RAS+, resampled where a voxel size is asked for, and scaled: its background is 0, and a percentile
of the intensities inside the head becomes a fixed value, so that scans of any unit look alike, those in [-1, 1] or with
a mean of 0 too. What was done is kept beside the image, and `restore_scan` undoes it.

Source: DynamicDPS, arXiv:2503.01075, official code, for the range [0, 2]; it divides by 4096, which only suits data in
that unit (`high` does the same).
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Shaped
from scipy import ndimage

from jaxmed.arrays.foreground import find_foreground
from jaxmed.arrays.grid import reorient, resample, resample_to, restore
from jaxmed.config import NonNegative, Size, checked
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.images import drop_colour, read_image
from jaxmed.io.masks import read_mask
from jaxmed.io.scans import Kind, ScanFiles, kind_of, read_volume
from jaxmed.volume import Grid, Volume, require_same_grid

KINDS: tuple[Kind, ...] = ("nifti", "dicom", "picture", "array")
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
TOP = 2.0
FLUID, FLUID_DISTANCE = 24, 5.0  # mm
# Rows of a picture run down and its columns to the right: x and y of a volume of one plane, seen as it is shown.
# A background this far below 0 is one of its own, and more than such a share of voxels so far below it is no noise;
# distances as shares of the range from the background to the 99.5th percentile.
LEAST_SHIFT, LARGEST_DEPTH, LARGEST_SHARE = 0.02, 0.3, 0.01
PICTURE_AFFINE = np.diag([1.0, -1.0, 1.0, 1.0])


@dataclasses.dataclass(frozen=True)
@checked
class FrameConfig:
    """How scans become images; travels with the weights.

    Attributes:
        size: Voxels of an image along each axis: two numbers for slices, three for volumes or patches of them.
        axis: The slices of 2D networks: axial is across z (foot to head), coronal across y, sagittal across x.
        spacing: Voxel size in mm; of slices within their plane, their distance stays. 0 keeps the scan's.
        percentile: Of the intensities inside the head, in percent.
        reference: What that percentile becomes, in (0, 2].
        high: Stored intensity that becomes 2, for data of one known unit; 0 goes by the percentile.
    """

    size: tuple[Size, ...] = (256, 256)
    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    spacing: NonNegative = 0.0
    percentile: float = 99.5
    reference: float = 1.6
    high: float = 0.0

    def __post_init__(self) -> None:
        if len(self.size) not in (2, 3) or min(self.size) < 1:
            raise ValueError(f"size: expected two or three positive numbers, found {self.size}")
        if min(self.spacing, self.high) < 0:
            raise ValueError(f"spacing, high: expected 0 or more, found {self.spacing, self.high}")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile: expected a percentage above 0, found {self.percentile:g}")
        if not 0 < self.reference <= TOP:
            raise ValueError(f"reference: expected a number above 0 and up to 2, found {self.reference:g}")

    @property
    def is_sliced(self) -> bool:
        """Whether images are slices."""
        return len(self.size) == 2


class Scan(NamedTuple):
    """A scan, ready for a network, and what was done to it.

    Attributes:
        volume: Intensities in [0, 2], RAS+, at the frame's voxel size.
        grid: Of the file.
        high: Stored intensity that became 2; what was above is clipped.
        low: Stored intensity that became 0, that of the background; what was below is clipped.
        is_picture: Whether the file is a 2D image without a place in the world.
        path: The file.
        notes: What is unexpected about it.
    """

    volume: Volume
    grid: Grid
    high: float
    low: float
    is_picture: bool
    path: Path
    notes: tuple[str, ...] = ()


class Placement(NamedTuple):
    """Where the images of a volume were cut from it.

    Attributes:
        shape: Of the volume, RAS+.
        axis: Across the slices; None where the image is the volume.
        starts: Voxel of the volume at the image's first, along each axis of the image; negative where it was extended.
    """

    shape: tuple[int, int, int]
    axis: int | None
    starts: tuple[int, ...]


def read_scan(scan: ScanFiles | Path, frame: FrameConfig, fill: float | None = None) -> Scan:
    """Read a NIfTI volume or a DICOM series, or a grey 2D picture as a volume of one plane, 1 mm.

    Args:
        scan: The file, or a folder of DICOM slices.
        frame: Voxel size and scale.
        fill: Intensity of voxels that have none; None refuses them.

    Raises:
        InputError: For whatever is wrong with the file: see `io.nifti.read`; or it is constant, or of colour.
    """
    scan = scan if isinstance(scan, ScanFiles) else ScanFiles(scan)
    scan = scan._replace(fill=scan.fill if fill is None else fill)
    path, is_picture = scan.path, kind_of(scan.path) in ("picture", "array")
    stored, notes = (_read_picture(path, scan.fill), ()) if is_picture else _read_volume(scan, frame)
    volume = _resampled(reorient(stored), frame, order=1)
    low = _find_low(path, volume.array, frame)
    above = volume.array - np.float32(low)
    high = frame.high or low + _find_high(path, above, frame)
    scaled = np.clip(above * np.float32(TOP / (high - low)), 0.0, TOP).astype(np.float32)
    return Scan(Volume.make(scaled, volume.affine), stored.grid, high, low, is_picture, path, notes)


def read_inside(path: Path, scan: Scan) -> Bool[np.ndarray, "x y z"]:
    """Read the mask of a scan, or a label map of its brain, onto the grid of `scan.volume`.

    Raises:
        InputError: For whatever is wrong with the file, its grid is another, or nothing is inside.
    """
    inside, grid = read_mask(path, allow_labels=True)
    if grid is None and (not scan.is_picture or inside.ndim != 2):
        raise InputError(path, f"a mask of {scan.path}", f"a picture or array of shape {inside.shape}", "give NIfTI")
    if grid is None:
        inside, affine = np.ascontiguousarray(inside.T[:, :, None]), PICTURE_AFFINE
    else:
        affine = grid.affine
    mask = Volume.make(inside.astype(np.float32), affine)
    require_same_grid(mask, scan.grid, str(path), str(scan.path))
    moved = resample_to(reorient(mask), scan.volume.grid, order=1).array > 0.5
    if not moved.any():
        raise InputError(path, "a mask with voxels", "none", "check the mask")
    return moved


def read_labels(path: Path, frame: FrameConfig) -> Volume:
    """Read a label map in FreeSurfer's numbering as one brain: RAS+, at the frame's voxel size, int32.

    Both sides have one label (`simplify_labels`), and fluid ends 5 mm outside of the brain: in some maps the label 24
    fills spaces down to the neck.

    Raises:
        InputError: It is no volume of whole numbers, or holds one label only.
    """
    volume = nifti.read(path, dimensions=(3,), dtype=np.int32, allow_constant=False)
    volume = _resampled(reorient(volume), frame, order=0)
    labels = simplify_labels(volume.array)
    brain = (labels > 0) & (labels != FLUID)
    distance = np.asarray(ndimage.distance_transform_edt(~brain, volume.spacing)) if brain.any() else np.inf
    return Volume.make(np.where(distance <= FLUID_DISTANCE, labels, 0).astype(np.int32), volume.affine)


def restore_scan(array: Shaped[np.ndarray, "x y z"], scan: Scan, *, is_difference: bool = False) -> Volume:
    """Bring a result on the grid of `scan.volume` back onto the grid, and the intensities, of the file.

    Args:
        array: Intensities in [0, 2].
        scan: Where they belong.
        is_difference: Whether they are distances between intensities, whose 0 stays 0.
    """
    stored = np.asarray(array, np.float32) * np.float32((scan.high - scan.low) / TOP)
    restored = restore(Volume.make(stored, scan.volume.affine), scan.grid)
    if is_difference or not scan.low:
        return restored
    return Volume.make(restored.array + np.float32(scan.low), restored.affine)


def to_picture(volume: Volume) -> Float32[np.ndarray, "row column"]:
    """Return the rows and columns of a picture that `read_scan` read as a volume of one plane."""
    return np.asarray(volume.array[:, :, 0].T, np.float32)


def cut_images(
    array: Shaped[np.ndarray, "x y z"], frame: FrameConfig, foreground: Bool[np.ndarray, "x y z"] | None = None
) -> tuple[Shaped[np.ndarray, "image ..."], Placement]:
    """Cut the slices of a volume, or the volume itself, about the middle of the head; edges are extended by 0.

    Args:
        array: RAS+.
        frame: Size and axis.
        foreground: The head; all of it by default.

    Returns:
        Every slice along the axis in order (one image for a volume), and where they stood.
    """
    axis = AXES[frame.axis] if frame.is_sliced else None
    kept = [index for index in range(3) if index != axis]
    starts = []
    for index, size in zip(kept, frame.size, strict=True):
        length = array.shape[index]
        first, last = 0, length - 1
        if foreground is not None and foreground.any():
            present = np.flatnonzero(foreground.any(axis=tuple(other for other in range(3) if other != index)))
            first, last = int(present[0]), int(present[-1])
        start = (first + last + 1) // 2 - size // 2
        # A field of view that is large enough is never extended on one side while it is cut on the other.
        starts.append(int(np.clip(start, min(0, length - size), max(0, length - size))))
    x, y, z = array.shape
    placement = Placement((x, y, z), axis, tuple(starts))
    moved = array[None] if axis is None else np.moveaxis(array, axis, 0)
    images = np.zeros((moved.shape[0], *frame.size), array.dtype)
    inside, source = _windows(placement, frame.size)
    images[(slice(None), *inside)] = moved[(slice(None), *source)]
    return images, placement


def paste_images(
    images: Shaped[np.ndarray, "image ..."], placement: Placement, background: Shaped[np.ndarray, "x y z"]
) -> Shaped[np.ndarray, "x y z"]:
    """Put images back where `cut_images` took them from.

    Args:
        images: All slices in order, or the one volume.
        placement: Where they stood.
        background: The volume that shows where no image lies.
    """
    result = np.array(background, images.dtype)
    moved = result[None] if placement.axis is None else np.moveaxis(result, placement.axis, 0)
    inside, source = _windows(placement, images.shape[1:])
    moved[(slice(None), *source)] = images[(slice(None), *inside)]
    return result


def head_of(array: Float32[np.ndarray, "x y z"]) -> Bool[np.ndarray, "x y z"]:
    """Return the largest bright region of a scan: the head, or the brain where the skull is stripped."""
    return find_foreground(array)


def simplify_labels(labels: Shaped[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
    """Give both sides of the brain one label, and the rest of the head 0.

    Args:
        labels: In FreeSurfer's numbering; 256 and more are no brain.

    Source: FreeSurfer's colour table, for the pairs.
    """
    table = np.arange(256, dtype=np.int32)
    for right, left in PAIRS.items():
        table[right] = left
    is_brain = (labels >= 0) & (labels < 256)
    return np.where(is_brain, table[np.where(is_brain, labels, 0)], 0).astype(np.int32)


PAIRS = {
    41: 2, 42: 3, 43: 4, 44: 5, 46: 7, 47: 8, 49: 10, 50: 11, 51: 12, 52: 13, 53: 17, 54: 18, 57: 25, 58: 26, 60: 28,
    62: 30, 63: 31, 137: 136, 164: 163,
}  # fmt: skip


def _read_volume(scan: ScanFiles, frame: FrameConfig) -> tuple[Volume, tuple[str, ...]]:
    volume, _, notes = read_volume(scan, allow_plane=frame.is_sliced)
    return volume, notes


def _read_picture(path: Path, fill: float | None) -> Volume:
    image = drop_colour(read_image(path, allow_constant=False, fill=fill))
    if image.ndim != 2:
        raise InputError(path, "a grey 2D image", f"shape {image.shape}", "convert it, or give one slice")
    return Volume.make(np.ascontiguousarray(image.T[:, :, None]), PICTURE_AFFINE)


def _resampled(volume: Volume, frame: FrameConfig, order: int) -> Volume:
    if not frame.spacing:
        return volume
    axis = AXES[frame.axis] if frame.is_sliced else None
    x, y, z = (own if index == axis else frame.spacing for index, own in enumerate(volume.spacing))
    return resample(volume, (x, y, z), order=order, antialias=order > 0)


def _find_low(path: Path, array: Shaped[np.ndarray, "x y z"], frame: FrameConfig) -> float:
    """Return the intensity of the background, by the faces of the volume: 0, or a lower one in scaled scans."""
    sides = [np.take(array, (0, -1), axis) for axis in range(3) if array.shape[axis] > 1]
    background = float(np.median(np.concatenate([side.reshape(-1) for side in sides])))
    top = float(np.percentile(array, 99.5))
    span = max(top - background, 0.0)
    low = background if background < -LEAST_SHIFT * span and not frame.high else 0.0
    deep = float(np.mean(array < low - LARGEST_DEPTH * max(top - low, 0.0)))
    if top > low and deep > LARGEST_SHARE:
        expected = "a scan whose background is its lowest intensity"
        found = f"{deep:.0%} of it below a background of {low:g}, down to {array.min():g}"
        raise InputError(path, expected, found, "give it unscaled: not divided by its deviation within a mask")
    return low


def _find_high(path: Path, array: Shaped[np.ndarray, "x y z"], frame: FrameConfig) -> float:
    inside = array[find_foreground(array)]
    value = float(np.percentile(inside, frame.percentile)) if inside.size else 0.0
    if not value > 0:
        raise InputError(path, "a scan with positive intensities", f"values up to {array.max():g}", "check the file")
    return value * TOP / frame.reference


def _windows(placement: Placement, size: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the part of an image that lies inside the volume, and the part of the volume that it shows."""
    lengths = [length for index, length in enumerate(placement.shape) if index != placement.axis]
    inside: list[Any] = []
    source: list[Any] = []
    for start, count, length in zip(placement.starts, size, lengths, strict=True):
        low, high = max(start, 0), min(start + count, length)
        source.append(slice(low, high))
        inside.append(slice(low - start, high - start))
    return tuple(inside), tuple(source)
