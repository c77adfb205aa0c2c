"""Masks of every kind of file, by the values that are found in them: which voxels are inside, or why that is open.

A mask holds two values, and the larger is inside: 0 and 1, 0 and 255, two greys, False and True, -1 and 1. One value
alone is inside where it is above 0. Of colours, black is outside, and palettes count by their numbers. Label maps
(whole numbers from 0 on) are masks where a caller takes all labels, or asks for one. All else is refused, its values
told.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Shaped

from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.images import ARRAY_SUFFIXES, PICTURE_SUFFIXES, read_levels
from jaxmed.volume import Grid

SMEARED = (".jpg", ".jpeg")
# Of JPEG masks: as a share of the range, how near to its ends how many pixels lie.
NEAR, MOST = 0.25, 0.8


def read_mask(
    path: str | Path, *, value: int | None = None, allow_labels: bool = False
) -> tuple[Bool[np.ndarray, "..."], Grid | None]:
    """Read a mask, or one label of a label map.

    Args:
        path: .nii, .nii.gz (3D), .png, .jpg, .jpeg, .tif, .tiff, .npy or .npz.
        value: Which label counts; None where the file is a mask.
        allow_labels: Whether all labels of a NIfTI label map count.

    Returns:
        What is inside, in the axes of the file, and its grid; None for pictures and arrays, which have none.

    Raises:
        InputError: For whatever is wrong with the file, or where its values leave open what is inside.
    """
    name = Path(path).name.lower()
    if name.endswith((*PICTURE_SUFFIXES, *ARRAY_SUFFIXES)):
        return to_mask(read_levels(path), path, value=value, is_smeared=name.endswith(SMEARED)), None
    volume = nifti.read(path, dimensions=(3,), allow_nonfinite=True)
    return to_mask(volume.array, path, value=value, allow_labels=allow_labels), volume.grid


def fill_mask(rows: Shaped[np.ndarray, "inside ..."], mask: Bool[np.ndarray, "*voxel"]) -> Shaped[np.ndarray, "..."]:
    """Put the rows of the voxels inside a mask back in their places, 0 outside."""
    full = np.zeros((*mask.shape, *rows.shape[1:]), rows.dtype)
    full[mask] = rows
    return full


def to_mask(
    array: Shaped[np.ndarray, "..."],
    where: object,
    *,
    value: int | None = None,
    allow_labels: bool = False,
    is_smeared: bool = False,
) -> Bool[np.ndarray, "..."]:
    """Return what is inside, from the values of a mask; see the top of this file.

    Args:
        array: Values as they are stored.
        where: The file, for messages.
        value: Which label counts; None where the array is a mask.
        allow_labels: Whether all labels of a label map count.
        is_smeared: Whether compression has spread the two values (JPEG).

    Raises:
        InputError: The values leave open what is inside.
    """
    if array.dtype.kind == "b" and value is None:
        return array
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = array.size - int(np.isfinite(array).sum())
        raise InputError(where, "a mask of finite values", f"{bad} NaN or Inf of {array.size}", "set them to 0")
    if value is not None:
        if not (array == value).any():
            raise InputError(where, f"the label {value}", _told(array, "labels"))
        return array == value
    low, high = float(array.min()), float(array.max())
    if is_smeared:
        return _sharpen(array, where, low, high)
    if not ((array == low) | (array == high)).all():
        if allow_labels and low == 0 and (array == np.rint(array)).all():
            return array > 0
        advice = "give one mask, or one label of it"
        if 0 <= low and high <= 1:
            advice = "cut probabilities at one half first"
        raise InputError(where, "a mask of two values, such as 0 and 1", _told(array), advice)
    if low < 0 and (low, high) != (-1.0, 1.0):
        raise InputError(where, "a mask of 0 and 1", _told(array), "0 is outside, and 1 inside")
    return np.full(array.shape, high > 0) if low == high else array == high


def _sharpen(array: Shaped[np.ndarray, "..."], where: object, low: float, high: float) -> Bool[np.ndarray, "..."]:
    """Cut a mask halfway between its ends, near which nearly all of its pixels have to lie."""
    if high - low < NEAR * 255:
        return np.full(array.shape, low + high > 255)
    spread = np.minimum(array - low, high - array) / (high - low)
    if np.mean(spread <= NEAR) < MOST:
        raise InputError(where, "a mask of two greys", _told(array), "give a mask, not an image")
    return array > (low + high) / 2


def _told(array: Shaped[np.ndarray, "..."], noun: str = "values") -> str:
    """Say which values an array holds."""
    values = np.unique(array)
    shown = ", ".join(f"{value + 0.0:g}" for value in values[:8].tolist())
    return f"the {noun} {shown}" + (f", ... ({len(values)} in all)" if len(values) > 8 else "")
