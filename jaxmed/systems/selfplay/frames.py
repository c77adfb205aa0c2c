"""Files and their masks as volumes that images are cut from: in [0, 1], RAS+, at one voxel size.

Pictures become volumes too, one plane thick or, as a stack, with the items along z. So every image has the axes x (to
the right) and y (up), or x, y and z: a slice of a volume as well as a picture, whose rows run down.
"""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Shaped

from jaxmed.arrays.grid import reorient, resample
from jaxmed.config import Positive, Size, checked
from jaxmed.data.transforms import percentile_range, window
from jaxmed.errors import InputError
from jaxmed.io import scans
from jaxmed.io.images import PICTURE_SUFFIXES, drop_colour, read_image
from jaxmed.io.masks import read_mask
from jaxmed.io.scans import ScanFiles
from jaxmed.volume import Grid, Volume, require_same_grid

Intensity = Literal["unit", "ct", "percentile"]
INTENSITIES = ("unit", "ct", "percentile")
Kind = Literal["volume", "picture", "stack", "array"]
KINDS: tuple[scans.Kind, ...] = ("nifti", "dicom", "picture", "array")
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
# Rows of a picture run down: against y.
PICTURE_AFFINE = np.diag([1.0, -1.0, 1.0, 1.0])
LEAST_SHARE = 4
"""An image has to fill this part (one in so many voxels) of a window along each axis."""
LEAST_UNIT = 4095 / 65535
"""A range that ends below this is no image in [0, 1]: data of 12 bits in 16, or labels."""
LEAST_HU = 2.0
"""A range of values below this is no CT scan in HU."""


@dataclasses.dataclass(frozen=True)
@checked
class FrameConfig:
    """How files become images; travels with the weights.

    Attributes:
        size: Voxels of an image along each axis: two numbers for slices and pictures, three for patches.
        axis: The slices of volumes: axial is across z (foot to head), coronal across y, sagittal across x.
        spacing: Voxel size in mm; of slices within their plane, their distance stays. None keeps that of the file;
            pictures and .npy files have none and stay as they are.
        intensity: "unit" takes values as they are, which have to lie in [0, 1] (pictures of 8 bits are divided by 255,
            of 16 by 65535) and to reach beyond a sixteenth of it, which data of 12 bits stored in 16 do not; "ct" maps
            a window in HU to [0, 1]; "percentile" maps the range between two percentiles of the volume, or of the
            picture, to [0, 1]. The last two clip.
        hu_window: Of "ct", in HU.
        percentiles: Of "percentile".
    """

    size: tuple[Size, ...] = (128, 128)
    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    spacing: Positive | None = None
    intensity: Intensity = "unit"
    hu_window: tuple[float, float] = (-175.0, 250.0)
    percentiles: tuple[float, float] = (1.0, 99.0)

    def __post_init__(self) -> None:
        if len(self.size) not in (2, 3) or min(self.size) < 1:
            raise ValueError(f"size: expected two or three positive numbers, found {self.size}")
        if self.spacing is not None and not self.spacing > 0:
            raise ValueError(f"spacing: expected mm above 0, or None, found {self.spacing:g}")
        if not self.hu_window[0] < self.hu_window[1]:
            raise ValueError(f"hu_window: expected two numbers in order, found {self.hu_window}")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles: expected two percentages in order, found {self.percentiles}")

    @property
    def is_sliced(self) -> bool:
        """Whether images are slices or pictures."""
        return len(self.size) == 2


class Loaded(NamedTuple):
    """What a file holds, scaled and turned.

    Attributes:
        volumes: In [0, 1], RAS+, at the frame's voxel size; more than one for a stack of volumes.
        axis: Across the slices; None where each volume is one image.
        grid: Of the file.
        kind: A volume with its place in the world, a picture, a stack of pictures, or volumes without a place.
        path: The file.
    """

    volumes: tuple[Volume, ...]
    axis: int | None
    grid: Grid
    kind: Kind
    path: Path


def load(scan: ScanFiles | Path, frame: FrameConfig, fill: float | None = None) -> Loaded:
    """Read a NIfTI volume or a DICOM series, a grey picture, or a .npy file, whose first axis in a stack is the item.

    Args:
        scan: The file, or a folder of DICOM slices.
        frame: Size, axis, voxel size and scale.
        fill: Value of voxels that have none; None refuses them.

    Raises:
        InputError: For whatever is wrong with the file: damaged, not finite, constant, of colour, of another number of
            axes, of another range, or too small for the frame.
    """
    scan = scan if isinstance(scan, ScanFiles) else ScanFiles(scan)
    scan = scan._replace(fill=scan.fill if fill is None else fill)
    path = scan.path
    stored, kind = _read(scan, frame)
    axis = None
    if frame.is_sliced:
        axis = AXES[frame.axis] if kind == "volume" else 2
    moved = []
    for number, volume in enumerate(stored):
        where = f"{path} item {number}" if len(stored) > 1 else str(path)
        turned = _resampled(reorient(volume), frame, kind, axis)
        scaled = _scaled(turned.array, frame, where, kind)
        moved.append(Volume.make(scaled, turned.affine))
    loaded = Loaded(tuple(moved), axis, stored[0].grid, kind, path)
    _check_size(loaded, frame)
    return loaded


def load_mask(path: Path, loaded: Loaded, frame: FrameConfig, value: int | None = None) -> tuple[Volume, ...]:
    """Read the mask of a file, on the grid of `loaded.volumes`.

    Args:
        path: Of the mask: on the grid of the image, or a picture or .npy file of its shape.
        loaded: The image.
        frame: As it was loaded.
        value: Which label counts; None takes the larger of two values (`io.masks`), or all labels of a NIfTI map.

    Raises:
        InputError: For whatever is wrong with the file, or its grid is another.
    """
    found, grid = read_mask(path, value=value, allow_labels=True)
    if grid is None:
        stored, kind = _as_volumes(found.astype(np.float32), path, frame)
    else:
        stored, kind = [Volume.make(found.astype(np.float32), grid.affine)], "volume"
    if kind != loaded.kind or len(stored) != len(loaded.volumes):
        other = f"{len(stored)} of kind {kind}"
        raise InputError(path, f"{len(loaded.volumes)} of kind {loaded.kind}, as {loaded.path}", other)
    masks = []
    for volume in stored:
        require_same_grid(volume.grid, loaded.grid, str(path), str(loaded.path))
        moved = _resampled(reorient(volume), frame, kind, loaded.axis)
        masks.append(Volume.make(moved.array >= 0.5, moved.affine))
    return tuple(masks)


def planes(volumes: tuple[Volume, ...], axis: int | None) -> list[Shaped[np.ndarray, "..."]]:
    """Return every slice of a volume, or the volumes."""
    if axis is None:
        return [volume.array for volume in volumes]
    return list(np.moveaxis(volumes[0].array, axis, 0))


def _read(scan: ScanFiles, frame: FrameConfig) -> tuple[list[Volume], Kind]:
    """Read a file as volumes: a picture is a plane, and a stack of pictures a volume with the items along z."""
    path = scan.path
    if scans.kind_of(path) not in ("picture", "array"):
        return [scans.read_volume(scan, allow_plane=frame.is_sliced).volume], "volume"
    array = read_image(path, allow_constant=False, fill=scan.fill)
    if path.name.lower().endswith(PICTURE_SUFFIXES):
        array = drop_colour(array)
    return _as_volumes(array, path, frame)


def _as_volumes(array: Shaped[np.ndarray, "..."], path: Path, frame: FrameConfig) -> tuple[list[Volume], Kind]:
    """Place the pixels of a picture, or the items of an array."""
    if path.name.lower().endswith(PICTURE_SUFFIXES) and array.ndim != 2:
        raise InputError(path, "a grey picture", f"shape {array.shape}", "convert it, or split its pages")
    # In 3D a stack alone is welcome: three axes could be a stack of pictures as well.
    if array.ndim not in ((2, 3) if frame.is_sliced else (4,)):
        wanted = "2D pictures, or a stack of them," if frame.is_sliced else "NIfTI, or an array of item, x, y, z,"
        found, advice = f"{array.ndim}D of shape {array.shape}", "give --frame.size as many numbers as images have axes"
        raise InputError(path, f"{wanted} for images of {frame.size}", found, advice)
    if not frame.is_sliced:
        return [Volume.make(item, np.eye(4)) for item in array], "array"
    stack = array if array.ndim == 3 else array[None]
    kind: Kind = "stack" if array.ndim == 3 else "picture"
    return [Volume.make(np.ascontiguousarray(stack.transpose(2, 1, 0)), PICTURE_AFFINE)], kind


def _resampled(volume: Volume, frame: FrameConfig, kind: Kind, axis: int | None) -> Volume:
    if frame.spacing is None or kind != "volume":
        return volume
    wanted = frame.spacing
    x, y, z = (own if index == axis else wanted for index, own in enumerate(volume.spacing))
    return resample(volume, (x, y, z), order=1)


def _scaled(
    array: Shaped[np.ndarray, "x y z"], frame: FrameConfig, where: str, kind: Kind
) -> Float32[np.ndarray, "x y z"]:
    """Scale a volume at once, and the pictures of a stack one by one."""
    if kind != "stack":
        return _to_unit(array, frame, where)
    items = [_to_unit(array[..., item], frame, f"{where} item {item}") for item in range(array.shape[2])]
    return np.stack(items, axis=2)


def _to_unit(array: Shaped[np.ndarray, "..."], frame: FrameConfig, where: str) -> Float32[np.ndarray, "..."]:
    low, high = float(array.min()), float(array.max())
    if low == high:
        raise InputError(where, "an image with contrast", f"{low:g} everywhere")
    match frame.intensity:
        case "unit":
            # Interpolation and 16-bit floats may miss the ends by rounding.
            if low < -1e-3 or high > 1 + 1e-3:
                advice = "scale the file, or set --frame.intensity ct or percentile"
                raise InputError(where, "values in [0, 1]", f"values in [{low:g}, {high:g}]", advice)
            if high <= LEAST_UNIT * (1 + 1e-6):
                advice = "set --frame.intensity percentile (data of 12 bits or less, stored in 16?)"
                raise InputError(where, "values that reach across [0, 1]", f"values in [{low:g}, {high:g}]", advice)
            return np.clip(array, 0, 1).astype(np.float32)
        case "ct":
            if high - low < LEAST_HU:
                advice = "set --frame.intensity unit or percentile"
                raise InputError(where, "a CT scan in HU", f"values in [{low:g}, {high:g}]", advice)
            scaled = window(array, *frame.hu_window)
            if scaled.min() == scaled.max():
                expected = f"values inside the window of {frame.hu_window[0]:g} to {frame.hu_window[1]:g} HU"
                raise InputError(where, expected, f"values in [{low:g}, {high:g}]", "set --frame.hu-window")
            return scaled
        case "percentile":
            try:
                return percentile_range(array, *frame.percentiles, mask=np.ones(array.shape, bool))
            except InputError as error:
                advice = "set --frame.intensity unit, or other --frame.percentiles"
                raise InputError(where, error.expected, error.found, advice) from error


def _check_size(loaded: Loaded, frame: FrameConfig) -> None:
    lengths = planes(loaded.volumes, loaded.axis)[0].shape
    if any(length * LEAST_SHARE < size for length, size in zip(lengths, frame.size, strict=True)):
        least = " x ".join(str(-(-size // LEAST_SHARE)) for size in frame.size)
        found = " x ".join(map(str, lengths))
        advice = "use a smaller --frame.size, or a finer --frame.spacing"
        raise InputError(loaded.path, f"{least} voxels or more for images of {frame.size}", found, advice)
