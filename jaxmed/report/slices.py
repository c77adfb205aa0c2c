"""From a volume in RAS+ to the pictures of its slices, as a radiologist holds them.

Every picture has its first row on top and its first column on the left. Patient right is on the
left of axial and coronal slices; anterior is on top of axial and on the left of sagittal slices;
superior is on top of coronal and sagittal slices. NumPy, on the host.
"""

import numpy as np
from jaxtyping import Bool, Float64, Real, Shaped

# Index: the array axis that the slices are cut across.
PLANES = ("sagittal", "coronal", "axial")
EDGES = (("A", "P"), ("R", "L"), ("R", "L"))


def choose_axis(shape: tuple[int, int, int]) -> int:
    """Return the axis to cut across: axial, unless its slices are strips.

    A plane is taken when its shorter side has at least half as many voxels as that of the best
    plane; axial is tried first, then coronal, then sagittal.
    """
    shorter = [min(n for i, n in enumerate(shape) if i != axis) for axis in range(3)]
    return next(axis for axis in (2, 1, 0) if 2 * shorter[axis] >= max(shorter))


def choose_slices(mask: Bool[np.ndarray, "x y z"], axis: int, num_slices: int) -> tuple[int, ...]:
    """Return at most `num_slices` indices, evenly spread over the part that the mask fills.

    An empty mask counts as a full one.
    """
    others = tuple(i for i in range(3) if i != axis)
    filled = np.flatnonzero(mask.any(axis=others))
    first, last = (int(filled[0]), int(filled[-1])) if filled.size else (0, mask.shape[axis] - 1)
    extent = last - first + 1
    num = max(min(num_slices, extent), 1)
    return tuple(first + int((i + 0.5) * extent / num) for i in range(num))


def slice_image(volume: Shaped[np.ndarray, "x y z"], axis: int, index: int) -> Shaped[np.ndarray, "row column"]:
    """Cut one slice and turn it the radiological way; the file's docstring says which."""
    return volume.take(index, axis)[::-1, ::-1].T


def slice_spacing(spacing: tuple[float, float, float], axis: int) -> tuple[float, float]:
    """Return the height of a row and the width of a column, in mm."""
    column, row = (spacing[i] for i in range(3) if i != axis)
    return row, column


def crop_box(mask: Bool[np.ndarray, "x y z"], axis: int, margin: int = 1) -> tuple[slice, slice]:
    """Return rows and columns of a picture that hold the whole mask, in every slice.

    Args:
        mask: The voxels to show; an empty mask counts as a full one.
        axis: The axis that the slices are cut across.
        margin: Voxels to leave around the mask.
    """
    shadow = slice_image(np.any(mask, axis=axis, keepdims=True), axis, 0)
    box = []
    for other in (1, 0):
        filled = np.flatnonzero(shadow.any(axis=other))
        length = shadow.shape[1 - other]
        first, last = (int(filled[0]), int(filled[-1])) if filled.size else (0, length - 1)
        box.append(slice(max(first - margin, 0), min(last + 1 + margin, length)))
    return box[0], box[1]


def finite_values(volume: Real[np.ndarray, "x y z"], mask: Bool[np.ndarray, "x y z"]) -> Float64[np.ndarray, " voxel"]:
    """Return the finite voxels inside the mask."""
    values = volume[mask].astype(np.float64)
    return values[np.isfinite(values)]


def display_range(values: Float64[np.ndarray, " value"]) -> tuple[float, float]:
    """Return the first and last percentile of finite values, pulled apart when they are equal."""
    if not values.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, [1, 99]))
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) / 2 or 1.0
        return low - pad, high + pad
    return low, high
