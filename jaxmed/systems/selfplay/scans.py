"""A file to be segmented: the images that are cut from it, and what is found in them back on its grid."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Shaped

from jaxmed.arrays.grid import restore
from jaxmed.arrays.tiles import TileConfig, tile_starts
from jaxmed.errors import InputError
from jaxmed.files import atomic_path
from jaxmed.io import nifti
from jaxmed.io.images import PICTURE_SUFFIXES, write_png
from jaxmed.io.scans import ScanFiles
from jaxmed.systems.selfplay.frames import FrameConfig, Loaded, load, load_mask, planes
from jaxmed.volume import Volume


class Window(NamedTuple):
    """Where an image is cut from a file.

    Attributes:
        item: The slice, the picture of a stack, or the volume.
        starts: Voxel at the image's first, along each of its axes; negative where the file is extended by 0.
    """

    item: int
    starts: tuple[int, ...]


class Scan(NamedTuple):
    """The images of a file to be segmented.

    Attributes:
        images: In [0, 1].
        windows: Where each was cut.
        loaded: What they were cut from.
    """

    images: Float32[np.ndarray, "item *size"]
    windows: tuple[Window, ...]
    loaded: Loaded

    @property
    def names(self) -> tuple[str, ...]:
        """What to call each image."""
        return tuple(name_item(self.loaded, window.item) for window in self.windows)

    def restore(self, values: Shaped[np.ndarray, "item *size"]) -> Volume:
        """Bring a result per image back onto the grid of the file; 0 where no image lies.

        Where images overlap they are averaged; those count more in whose middle a voxel lies.

        Args:
            values: Masks (booleans), which come back as uint8, 1 from a mean of half on; or confidences.

        Returns:
            A volume with the affine of the file. Of pictures and .npy files, which have none, `as_stored` gives the
            array.
        """
        volume = _pasted(values, self.windows, self.loaded)
        if values.dtype == bool:
            return Volume.make((volume.array >= 0.5).astype(np.uint8), volume.affine)
        return volume

    def as_stored(self, volume: Volume) -> Shaped[np.ndarray, "..."]:
        """Return a restored volume as the file holds it: row, column for pictures, items first in arrays."""
        match self.loaded.kind:
            case "picture":
                return np.ascontiguousarray(volume.array[:, :, 0].T)
            case "stack":
                return np.ascontiguousarray(volume.array.transpose(2, 1, 0))
            case "array":
                return volume.array[None]
            case "volume":
                return volume.array


def write_result(folder: Path, name: str, scan: Scan, values: Shaped[np.ndarray, "item *size"]) -> Path:
    """Write a result per image as a file of the input's kind, on its grid.

    Args:
        folder: Where to.
        name: Of the file, without suffix.
        scan: The images.
        values: Masks (booleans), or confidences in [0, 1].

    Returns:
        NIfTI for a volume, PNG for a picture (masks as 0 and 255, confidences with 8 bits), .npy for an array.

    Raises:
        InputError: The place cannot be written.
    """
    volume = scan.restore(values)
    if scan.loaded.kind == "volume":
        path = folder / f"{name}.nii.gz"
        is_nifti = scan.loaded.path.name.lower().endswith(nifti.SUFFIXES)
        nifti.write(path, volume, reference=scan.loaded.path if is_nifti else None)
        return path
    array = scan.as_stored(volume)
    if scan.loaded.kind == "picture" and scan.loaded.path.name.lower().endswith(PICTURE_SUFFIXES):
        path = folder / f"{name}.png"
        # Means of numbers up to 1 may exceed it by rounding.
        write_png(path, array * np.uint8(255) if values.dtype == bool else np.clip(array, 0, 1))
        return path
    path = folder / f"{name}.npy"
    with atomic_path(path) as temporary:
        np.save(temporary, array, allow_pickle=False)
    return path


def name_item(loaded: Loaded, item: int) -> str:
    """Name an image after its file and its place in it; slices count from 0 along R, A or S."""
    if loaded.kind == "picture" or (loaded.axis is None and len(loaded.volumes) == 1):
        return loaded.path.name
    return f"{loaded.path.name} {'slice' if loaded.kind == 'volume' else 'item'} {item}"


def read_scan(
    scan: ScanFiles | Path,
    frame: FrameConfig,
    box: Path | None = None,
    *,
    tiles: bool = False,
    fill: float | None = None,
) -> Scan:
    """Read a file to be segmented.

    Args:
        scan: A NIfTI volume, a DICOM series, a picture, or a .npy file.
        frame: How it becomes images.
        box: A mask, such as a box, on the grid of the file, in whose middle each image stands; slices without it are
            left out. None takes the middle of the file, and all slices.
        tiles: Whether images cover the whole of a file that is larger than one; they overlap by half.
        fill: Value of voxels that have none; None refuses them.

    Raises:
        InputError: For whatever is wrong with the file or the box; see `load` and `load_mask`.
    """
    if box is not None and tiles:
        raise InputError("box, tiles", "one of them", "both", "drop one")
    loaded = load(scan, frame, fill)
    path = loaded.path
    if len(loaded.volumes) > 1:
        raise InputError(path, "one volume", f"a stack of {len(loaded.volumes)}", "give them one by one")
    images = planes(loaded.volumes, loaded.axis)
    windows = []
    if box is not None:
        for item, inside in enumerate(planes(load_mask(box, loaded, frame), loaded.axis)):
            if inside.any():
                windows.append(Window(item, place(inside.shape, frame.size, middle_of(inside))))
        if not windows:
            raise InputError(box, "a box with voxels inside", "none above 0")
    else:
        # What is shorter than a window is covered by the one in its middle.
        lengths = images[0].shape
        whole = tuple(max(length, size) for length, size in zip(lengths, frame.size, strict=True))
        corners = [place(lengths, frame.size)]
        if tiles and whole != frame.size:
            lead = [min(length - size, 0) // 2 for length, size in zip(lengths, frame.size, strict=True)]
            starts = np.array(np.meshgrid(*tile_starts(whole, TileConfig(frame.size)), indexing="ij"))
            corners = [tuple(corner) for corner in (starts.reshape(len(lead), -1).T + lead).tolist()]
        windows = [Window(item, corner) for item in range(len(images)) for corner in corners]
    cut = np.stack([cut_window(images[window.item], window.starts, frame.size) for window in windows])
    return Scan(cut, tuple(windows), loaded)


def read_truth(path: Path, scan: Scan, frame: FrameConfig, value: int | None = None) -> Bool[np.ndarray, "item *size"]:
    """Read the true mask of a scan, cut as its images are.

    Args:
        path: Of the mask; see `load_mask`.
        scan: The images.
        frame: As they were read.
        value: Which label counts.

    Raises:
        InputError: For whatever is wrong with the file.
    """
    masks = planes(load_mask(path, scan.loaded, frame, value), scan.loaded.axis)
    return np.stack([cut_window(masks[window.item], window.starts, frame.size) for window in scan.windows])


def middle_of(mask: Bool[np.ndarray, "..."]) -> tuple[int, ...]:
    """Return the voxel in the middle of the box around a mask that is not empty."""
    return tuple(int(found.min() + found.max() + 1) // 2 for found in np.nonzero(mask))


def place(lengths: tuple[int, ...], size: tuple[int, ...], center: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Return the first voxel of a window along each axis.

    A window stays inside of an axis that is long enough, and stands in the middle of one that is not.

    Args:
        lengths: Of the file.
        size: Of the window.
        center: What is to be in the middle of the window; by default the middle of the file.
    """
    starts = []
    for axis, (length, count) in enumerate(zip(lengths, size, strict=True)):
        spare = length - count
        start = spare // 2 if center is None or spare <= 0 else min(max(center[axis] - count // 2, 0), spare)
        starts.append(start)
    return tuple(starts)


def cut_window(
    array: Shaped[np.ndarray, "..."], starts: tuple[int, ...], size: tuple[int, ...]
) -> Shaped[np.ndarray, "..."]:
    """Cut a window; what lies beyond the array is 0."""
    result = np.zeros(size, array.dtype)
    inside, source = _overlap(array.shape, starts, size)
    result[inside] = array[source]
    return result


def _overlap(
    lengths: tuple[int, ...], starts: tuple[int, ...], size: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the part of a window that lies inside of an array, and the part of the array that it shows."""
    inside, source = [], []
    for start, count, length in zip(starts, size, lengths, strict=True):
        low, high = max(start, 0), min(start + count, length)
        source.append(slice(low, high))
        inside.append(slice(low - start, high - start))
    return tuple(inside), tuple(source)


def _pasted(values: Shaped[np.ndarray, "item *size"], windows: tuple[Window, ...], loaded: Loaded) -> Volume:
    """Return the weighted mean of the images over each voxel, on the grid of the file."""
    volume = loaded.volumes[0]
    total, weight = np.zeros(volume.array.shape), np.zeros(volume.array.shape)
    totals, weights = ([a] if loaded.axis is None else np.moveaxis(a, loaded.axis, 0) for a in (total, weight))
    size = values.shape[1:]
    table = _triangle(size)
    for image, window in zip(values, windows, strict=True):
        inside, source = _overlap(totals[0].shape, window.starts, size)
        totals[window.item][source] += (table * image)[inside]
        weights[window.item][source] += table[inside]
    mean = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    return restore(Volume.make(mean.astype(np.float32), volume.affine), loaded.grid, order=1)


def _triangle(size: tuple[int, ...]) -> Float64[np.ndarray, "..."]:
    """Return weights that fall off from the middle and are positive at the sides."""
    table = np.ones(())
    for count in size:
        table = table[..., None] * np.minimum(np.arange(1, count + 1), np.arange(count, 0, -1))
    return table
