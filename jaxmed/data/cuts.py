"""A file to be segmented: the images that are cut from it, and what is found in them back as a file of its kind."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Shaped

from jaxmed.data.preprocess import Loaded, Preprocess, images_of, load, load_mask
from jaxmed.data.windows import Window, cut, middle_of, paste, place, tile
from jaxmed.errors import InputError
from jaxmed.files import atomic_path
from jaxmed.io import nifti
from jaxmed.io.images import PICTURE_SUFFIXES, write_png
from jaxmed.io.scans import ScanFiles
from jaxmed.volume import Volume

LEAST_SHARE = 4
"""An image has to fill this part (one in so many voxels) of a window along each axis."""


class Cuts(NamedTuple):
    """The images of a file to be segmented.

    Attributes:
        images: In the network's unit.
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
            A volume with the affine of the file. Of pictures and .npy files, which have none, `Loaded.as_stored` gives
            the array.
        """
        background = np.zeros(self.loaded.volume.array.shape, np.float32)
        volume = self.loaded.restore(paste(values, self.windows, background, self.loaded.axis))
        return Volume.make((volume.array >= 0.5).astype(np.uint8), volume.affine) if values.dtype == bool else volume


def cut_scan(
    scan: ScanFiles | Path,
    preprocess: Preprocess,
    box: Path | None = None,
    *,
    tiles: bool = False,
    fill: float | None = None,
) -> Cuts:
    """Read a file to be segmented.

    Args:
        scan: A NIfTI volume, a DICOM series, a picture, or a .npy file.
        preprocess: How it becomes images.
        box: A mask, such as a box, on the grid of the file, in whose middle each image stands; slices without it are
            left out. None takes the middle of the file, and all slices.
        tiles: Whether images cover the whole of a file that is larger than one; they overlap by half.
        fill: Value of voxels that have none; None refuses them.

    Raises:
        InputError: For whatever is wrong with the file or the box; see `load` and `load_mask`.
    """
    if box is not None and tiles:
        raise InputError("box, tiles", "one of them", "both", "drop one")
    loaded = load_images(scan, preprocess, fill)
    if len(loaded.volumes) > 1:
        raise InputError(loaded.path, "one volume", f"a stack of {len(loaded.volumes)}", "give them one by one")
    images, size = loaded.images, preprocess.size
    lengths = images[0].shape
    if box is not None:
        found = enumerate(mask_images(box, loaded, preprocess))
        windows = tuple(Window(item, place(lengths, size, middle_of(one))) for item, one in found if one.any())
        if not windows:
            raise InputError(box, "a box with voxels inside", "none above 0")
    elif tiles:
        windows = tile(len(images), lengths, size)
    else:
        windows = tuple(Window(item, place(lengths, size)) for item in range(len(images)))
    return Cuts(cut(images, windows, size), windows, loaded)


def cut_truth(
    path: Path, cuts: Cuts, preprocess: Preprocess, value: int | None = None
) -> Bool[np.ndarray, "item *size"]:
    """Read the true mask of a file, cut as its images are.

    Args:
        path: Of the mask; see `load_mask`.
        cuts: The images.
        preprocess: As they were read.
        value: Which label counts.

    Raises:
        InputError: For whatever is wrong with the file.
    """
    return cut(mask_images(path, cuts.loaded, preprocess, value), cuts.windows, preprocess.size)


def write_result(folder: Path, name: str, cuts: Cuts, values: Shaped[np.ndarray, "item *size"]) -> Path:
    """Write a result per image as a file of the input's kind, on its grid.

    Args:
        folder: Where to.
        name: Of the file, without suffix.
        cuts: The images.
        values: Masks (booleans), or confidences in [0, 1].

    Returns:
        NIfTI for a volume, PNG for a picture (masks as 0 and 255, confidences with 8 bits), .npy for an array.

    Raises:
        InputError: The place cannot be written.
    """
    volume, source = cuts.restore(values), cuts.loaded.path
    if cuts.loaded.kind == "volume":
        path = folder / f"{name}.nii.gz"
        nifti.write(path, volume, reference=source if source.name.lower().endswith(nifti.SUFFIXES) else None)
        return path
    array = cuts.loaded.as_stored(volume)
    if cuts.loaded.kind == "picture" and source.name.lower().endswith(PICTURE_SUFFIXES):
        path = folder / f"{name}.png"
        # Means of numbers up to 1 may exceed it by rounding.
        write_png(path, array * np.uint8(255) if values.dtype == bool else np.clip(array, 0, 1))
        return path
    path = folder / f"{name}.npy"
    with atomic_path(path) as temporary:
        np.save(temporary, array, allow_pickle=False)
    return path


def load_images(scan: ScanFiles | Path, preprocess: Preprocess, fill: float | None = None) -> Loaded:
    """Read a file, or a stack, whose images are large enough for windows.

    Raises:
        InputError: As of `load`, or an image fills less than a quarter of a window along an axis.
    """
    loaded = load(scan, preprocess, fill, allow_stack=True)
    lengths = loaded.images[0].shape
    if any(length * LEAST_SHARE < size for length, size in zip(lengths, preprocess.size, strict=True)):
        least = " x ".join(str(-(-size // LEAST_SHARE)) for size in preprocess.size)
        expected, found = f"{least} voxels or more for images of {preprocess.size}", " x ".join(map(str, lengths))
        advice = "use a smaller --preprocess.size, or a finer --preprocess.spacing"
        raise InputError(loaded.path, expected, found, advice)
    return loaded


def mask_images(
    path: Path, loaded: Loaded, preprocess: Preprocess, value: int | None = None
) -> Sequence[Bool[np.ndarray, "..."]]:
    """Read the mask of a file, slice by slice as `Loaded.images`; see `load_mask`."""
    return images_of(load_mask(path, loaded, preprocess, value), loaded.axis)


def name_item(loaded: Loaded, item: int) -> str:
    """Name an image after its file and its place in it; slices count from 0 along R, A or S."""
    if loaded.kind == "picture" or (loaded.axis is None and len(loaded.volumes) == 1):
        return loaded.path.name
    return f"{loaded.path.name} {'slice' if loaded.kind == 'volume' else 'item'} {item}"
