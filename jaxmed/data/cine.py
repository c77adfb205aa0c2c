"""Pictures, volumes and cines as one picture, for models that look at PNGs: phases of [0, 1], slices side by side."""

import math
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Shaped

from jaxmed.io import nifti
from jaxmed.io.images import encode_png, read_image
from jaxmed.io.scans import kind_of


def read_cine(path: Path) -> tuple[Float32[np.ndarray, "phase *space"], tuple[float, ...]]:
    """Read phases of a picture or a volume, intensities from 0 to 1, and the voxels' size in mm (1 if unknown).

    Raises:
        InputError: The file is broken, constant or of another kind.
    """
    if kind_of(path) == "nifti":
        volume = nifti.read(path, dimensions=(3, 4), allow_constant=False)
        array = volume.array if volume.array.ndim == 4 else volume.array[..., None]
        cine, spacing = np.moveaxis(array, 3, 0), tuple(float(size) for size in volume.spacing)
    else:
        image = read_image(path, allow_constant=False)
        if image.ndim == 3 and image.shape[2] == 3:
            image = image.mean(axis=2)
        cine = image if image.ndim > 2 else image[None]
        spacing = (1.0,) * (cine.ndim - 1)
    low, high = float(cine.min()), float(cine.max())
    return ((cine - low) / (high - low)).astype(np.float32), spacing


def montage(image: Shaped[np.ndarray, "row column *slice"], slices: int) -> Shaped[np.ndarray, "height width"]:
    """Lay slices of a volume beside one another, evenly spaced along the last axis; a picture stays as it is."""
    if image.ndim == 2:
        return image
    places = np.unique(np.linspace(0, image.shape[2] - 1, slices).round().astype(int))
    columns = math.ceil(math.sqrt(len(places)))
    tiles = [np.rot90(image[..., place]) for place in places]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[row : row + columns], 1) for row in range(0, len(tiles), columns)], 0)


def picture_of(path: Path, slices: int) -> Float32[np.ndarray, "height width"]:
    """Return a PNG in grey, intensities from 0 to 1 as stored, and of any other scan the montage of its first phase.

    Raises:
        InputError: The file is broken, or of another kind; constant, where it is no PNG.
    """
    if path.suffix.lower() == ".png":
        image = read_image(path)
        return image.mean(axis=2) if image.ndim == 3 else image
    return montage(read_cine(path)[0][0], slices)


def png_of(path: Path, slices: int) -> bytes:
    """Return the bytes of a PNG, and of any other scan those of `picture_of`.

    Raises:
        InputError: As of `picture_of`.
    """
    picture = picture_of(path, slices)  # a broken file fails here, before anyone is asked about it
    return path.read_bytes() if path.suffix.lower() == ".png" else encode_png(picture, path)
