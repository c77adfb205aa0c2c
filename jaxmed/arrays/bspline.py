"""Cubic B-spline resampling by the rule of ITK, on the host.

Output voxel o samples index o * old / new of the input, so voxel 0 stays and the last one does not (not the half-pixel
rule of `arrays.grid.resize`). Beyond the outermost voxels the spline is mirrored about them.

Source: SimpleITK's resampling with sitkBSpline to new_spacing = size * spacing / new_size, same origin and direction.
Deviation: SimpleITK leaves files of int16 in int16 and cuts the fraction of a resampled voxel off; here it stays, so
that voxels differ by up to 1. In floating point both agree to 1e-6 of the range of the intensities.
"""

from typing import Literal

import numpy as np
import scipy.ndimage
from jaxtyping import Float32, Float64, Shaped

Edge = Literal["clamp", "zero"]


def resize_bspline(
    array: Shaped[np.ndarray, "x y z"], size: tuple[int, int, int], edge: Edge = "clamp"
) -> Float32[np.ndarray, "d h w"]:
    """Resample the whole field of view to a size.

    Args:
        array: A volume.
        size: New number of voxels along each axis.
        edge: What stands beyond the field of view, half a voxel past the last centre, which is reached when an axis
            grows to twice its size or more: "clamp" repeats the last voxel; "zero" is 0, as in SimpleITK.
    """
    weights = [bspline_weights(old, new, edge) for old, new in zip(array.shape, size, strict=True)]
    return _apply(array, weights)


def _apply(
    array: Shaped[np.ndarray, "x y z"], weights: list[Float64[np.ndarray, "_ _"]]
) -> Float32[np.ndarray, "x2 y2 z2"]:
    """Multiply every axis by its matrix, in float32: 512 x 512 x 300 to 256^3 is 70 GFLOP of BLAS."""
    # Axes by their step in memory, so that every product reads its rows in place.
    memory = np.argsort([-abs(step) for step in array.strides], kind="stable")
    moved = np.ascontiguousarray(np.transpose(array, memory), np.float32)
    ordered = [weights[axis] for axis in memory]
    # The axis that shrinks most goes first: less is left for the others.
    for axis in sorted(range(3), key=lambda axis: ordered[axis].shape[0] / ordered[axis].shape[1]):
        matrix = ordered[axis].astype(np.float32)
        if matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix), dtype=np.float32)):
            continue
        if axis == 0:
            shape = moved.shape[1:]
            moved = (matrix @ moved.reshape(moved.shape[0], -1)).reshape(-1, *shape)
        elif axis == 1:
            moved = np.matmul(matrix, moved)
        else:
            moved = moved @ matrix.T
    return np.array(np.transpose(moved, np.argsort(memory)), order="C")


def bspline_weights(old: int, new: int, edge: Edge) -> Float64[np.ndarray, "new old"]:
    """Return the matrix of cubic B-spline interpolation, prefilter included, from `old` samples to `new`."""
    if old == new:
        return np.eye(old)
    places = np.arange(new) * (old / new)
    # ITK's buffer ends half a voxel after the last centre, which it does not include.
    is_outside = places > old - 0.5 - 1e-9
    places[is_outside] = old - 1
    basis = np.eye(old)
    if old > 1:
        basis = scipy.ndimage.spline_filter1d(basis, 3, axis=0, output=np.float64, mode="mirror")
    first = np.floor(places).astype(np.int64)
    t = places - first
    taps = (
        (1 - t) ** 3 / 6,
        (3 * t**3 - 6 * t**2 + 4) / 6,
        (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
        t**3 / 6,
    )
    weights = np.zeros((new, old))
    for step, tap in zip((-1, 0, 1, 2), taps, strict=True):
        weights += tap[:, None] * basis[_mirror(first + step, old)]
    if edge == "zero":
        weights[is_outside] = 0.0
    return weights


def _mirror(index: Shaped[np.ndarray, " new"], size: int) -> Shaped[np.ndarray, " new"]:
    """Reflect indices about the centres of the first and the last sample."""
    if size == 1:
        return np.zeros_like(index)
    index = np.abs(index) % (2 * size - 2)
    return np.minimum(index, 2 * size - 2 - index)
