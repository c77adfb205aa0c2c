"""Volumes moved between grids, on the host: reorientation, resampling, cropping, and the way back.

Conventions, for all functions here:
- A voxel is a box around its centre; the field of view reaches half a voxel past outer centres.
- Resampling keeps the centre of the field of view; where the new voxels fit, both its edges too.
- Interpolation is B-spline: order 0 nearest, 1 linear, 3 cubic with prefilter, so that it passes
  through the samples. Inside the field of view the edge voxel is repeated outwards; beyond it there
  is the `fill` value. Voxels are taken to be finite.
- Anti-aliasing, when voxels grow: Gaussian blur before interpolation, per array axis, with a full
  width at half maximum of sqrt(new^2 - old^2) in mm, so that a box-like response of width `old`
  becomes one of width `new`: sigma = sqrt(new^2 - old^2) / sqrt(8 ln 2). Not for order 0.
- Results are float32 (float64 stays, and order 0 keeps the type).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.ndimage
from jaxtyping import Float, Float64, Shaped

from jaxmed.errors import InputError
from jaxmed.volume import Grid, Volume, affine_spacing, check_affine

SIGMA_PER_FWHM = 1 / math.sqrt(8 * math.log(2))
# Voxels: grids that differ by less count as the same lattice; headers round to float32.
LATTICE_TOLERANCE = 1e-3
LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))


def orientation(affine: Float[np.ndarray, "4 4"]) -> str:
    """Return where the three array axes point, such as "RAS" (right, anterior, superior).

    Oblique axes count for the nearest anatomical one; the strongest axis chooses first.

    Source: nibabel.orientations.io_orientation, with which it agrees.
    """
    check_affine(np.asarray(affine, np.float64), "affine")
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # The nearest rotation, by polar decomposition, so that shear does not favour an axis.
    left, _, right = np.linalg.svd(axes)
    rotation = left @ right
    codes = ["", "", ""]
    for axis in np.argsort(-np.abs(rotation).max(axis=0), kind="stable"):
        world = int(np.argmax(np.abs(rotation[:, axis])))
        codes[axis] = LETTERS[world][int(rotation[world, axis] > 0)]
        rotation[world] = 0
    return "".join(codes)


def thick_axis(spacing: Sequence[float]) -> int:
    """Return the axis from plane to plane: the one of largest spacing, the last of several."""
    return max(range(len(spacing)), key=lambda axis: (round(spacing[axis], 3), axis))


def reorient(volume: Volume, codes: str = "RAS") -> Volume:
    """Permute and flip the array axes so that they point to `codes`; nothing is interpolated.

    `reorient(reorient(v, "RAS"), orientation(v.affine))` has the voxels of `v`, and its affine
    to the last digit of float64; `restore` returns the very affine.

    Args:
        volume: What to turn; channels stay last.
        codes: Three letters, one of each pair L/R, P/A, I/S.
    """
    wanted, found = _directions(codes), _directions(orientation(volume.affine))
    permutation = [[world for world, _ in found].index(world) for world, _ in wanted]
    is_flipped = [found[old][1] != sign for old, (_, sign) in zip(permutation, wanted, strict=True)]
    return _turn(volume, permutation, is_flipped)


def resample(
    volume: Volume,
    spacing: float | tuple[float, float, float],
    *,
    order: int = 3,
    antialias: bool = True,
) -> Volume:
    """Change the voxel size, along the same axes.

    The spacing is exactly as asked and the centre of the field of view stays, so the shape is
    round(length / spacing) and each edge moves by at most a quarter of a new voxel.

    Args:
        volume: What to resample.
        spacing: New voxel size along each array axis, in mm.
        order: 0 (labels), 1 or 3.
        antialias: Whether to blur along axes whose voxels grow.
    """
    return resample_to(volume, spaced(volume.grid, spacing), order=order, antialias=antialias, fill=None)


def resize(volume: Volume, shape: tuple[int, int, int], *, order: int = 3, antialias: bool = True) -> Volume:
    """Change the number of voxels over exactly the same field of view.

    Args:
        volume: What to resample.
        shape: New number of voxels along each array axis; the spacing follows.
        order: 0 (labels), 1 or 3.
        antialias: Whether to blur along axes whose voxels grow.
    """
    return resample_to(volume, stretched(volume.grid, shape), order=order, antialias=antialias, fill=None)


def spaced(grid: Grid, spacing: float | tuple[float, float, float]) -> Grid:
    """Return the grid of `resample`."""
    new = np.broadcast_to(np.asarray(spacing, np.float64), 3)
    if not (np.isfinite(new).all() and (new > 0).all()):
        raise InputError("spacing", "positive numbers in mm", f"{spacing}")
    ratio = new / affine_spacing(grid.affine)
    x, y, z = (max(1, round(n / r)) for n, r in zip(grid.shape, ratio, strict=True))
    return _scaled(grid, (x, y, z), ratio)


def spaced_from_first(grid: Grid, spacing: float | tuple[float, float, float]) -> Grid:
    """Return the grid of another voxel size whose first voxel has the old first one's centre.

    The last centre lies within half a new voxel of the old last one.

    Source: MONAI, `Spacing` (compute_shape_offset without scale_extent).
    """
    ratio = np.asarray(spacing, np.float64) / affine_spacing(grid.affine)
    x, y, z = np.round((np.array(grid.shape) - 1) / ratio + 1).astype(int).tolist()
    affine = grid.affine.copy()
    affine[:3, :3] *= ratio
    return Grid((x, y, z), affine)


def stretched(grid: Grid, shape: tuple[int, int, int]) -> Grid:
    """Return the grid of `resize`."""
    if len(shape) != 3 or min(shape) < 1:
        raise InputError("shape", "three positive numbers", f"{shape}")
    return _scaled(grid, shape, np.divide(grid.shape, shape))


def resample_to(
    volume: Volume,
    grid: Grid,
    *,
    order: int = 1,
    antialias: bool = True,
    fill: float | None = 0.0,
) -> Volume:
    """Interpolate a volume at the voxels of another grid, whose affine the result carries exactly.

    Args:
        volume: What to resample.
        grid: Where to.
        order: 0 (labels), 1 or 3.
        antialias: Whether to blur along axes whose voxels grow.
        fill: Value outside the volume's field of view; None repeats the edge.
    """
    if order not in (0, 1, 3):
        raise InputError("order", "0, 1 or 3", f"{order}")
    check_affine(grid.affine, "grid.affine")
    transform = np.linalg.solve(volume.affine, grid.affine)
    # Input voxels per output voxel, along each input axis: the growth for anti-aliasing.
    growth = np.linalg.norm(transform[:3, :3], axis=1)
    sigma = np.sqrt(np.maximum(growth**2 - 1, 0)) * SIGMA_PER_FWHM
    sigma[(growth < 1 + 1e-6) | (not antialias) | (order == 0)] = 0
    array = volume.array
    if order > 0 and array.dtype != np.float64:
        array = array.astype(np.float32)
    off_axis = transform[:3, :3] - np.diag(np.diag(transform[:3, :3]))
    if np.abs(off_axis).max() * max(grid.shape) < 1e-9:
        moved = _along_axes(array, transform, grid.shape, order, sigma)
    else:
        moved = _oblique(array, transform, grid.shape, order, sigma)
    if fill is not None:
        moved[_is_outside(transform, volume.grid.shape, grid.shape)] = fill
    return Volume.make(moved, grid.affine)


def crop_or_pad(
    volume: Volume,
    shape: tuple[int, int, int],
    *,
    center: tuple[int, int, int] | None = None,
    fill: float = 0.0,
) -> Volume:
    """Cut or extend to a shape by whole voxels; world positions stay.

    Args:
        volume: What to cut.
        shape: New number of voxels along each array axis.
        center: Voxel that comes to index shape // 2; by default the volume's own, n // 2.
        fill: Value of added voxels.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise InputError("shape", "three positive numbers", f"{shape}")
    middle = center if center is not None else [n // 2 for n in volume.grid.shape]
    start = [c - n // 2 for c, n in zip(middle, shape, strict=True)]
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.array(start, np.float64)
    return Volume.make(_window(volume.array, start, [*shape], fill), affine)


def restore(volume: Volume, grid: Grid, *, order: int = 1, fill: float = 0.0) -> Volume:
    """Bring a volume back onto the grid of an input.

    When the two differ by flips, permutation and whole voxels only (what `reorient` and
    `crop_or_pad` do), voxels are copied bit by bit. Otherwise they are interpolated.

    Args:
        volume: A result on another grid.
        grid: The grid of the input, `read(path).grid`; the result has exactly its affine.
        order: Interpolation, where needed: 0 (labels), 1 or 3.
        fill: Value outside the volume's field of view.
    """
    transform = np.linalg.solve(volume.affine, grid.affine)
    whole = np.rint(transform)
    corners = np.array([[0, n - 1] for n in grid.shape])
    error = np.abs(transform - whole)[:3]
    farthest = (error[:, :3] @ corners[:, 1] + error[:, 3]).max()
    steps = np.abs(whole[:3, :3])
    is_lattice = (steps.sum(0) == 1).all() and (steps.sum(1) == 1).all()
    if not is_lattice or farthest > LATTICE_TOLERANCE:
        return resample_to(volume, grid, order=order, fill=fill)
    permutation = [int(np.argmax(steps[:, axis])) for axis in range(3)]
    is_flipped = [bool(whole[old, axis] < 0) for axis, old in enumerate(permutation)]
    turned = _turn(volume, permutation, is_flipped)
    start = np.rint(np.linalg.solve(turned.affine, grid.affine)[:3, 3]).astype(int)
    return Volume.make(_window(turned.array, start.tolist(), [*grid.shape], fill), grid.affine)


def _directions(codes: str) -> list[tuple[int, int]]:
    """Return world axis and sign of each letter."""
    table = {letter: (axis, sign) for axis, pair in enumerate(LETTERS) for sign, letter in enumerate(pair)}
    found = [table[letter] for letter in codes if letter in table]
    if len(codes) != 3 or {axis for axis, _ in found} != {0, 1, 2}:
        raise InputError("codes", "three letters, one each of L/R, P/A, I/S", f"'{codes}'")
    return found


def _turn(volume: Volume, permutation: list[int], is_flipped: list[bool]) -> Volume:
    """Take new axis i from old axis permutation[i], and flip it where asked."""
    array = np.transpose(volume.array, [*permutation, *range(3, volume.array.ndim)])
    affine = volume.affine.copy()
    affine[:3, :3] = volume.affine[:3, permutation]
    for axis, flip in enumerate(is_flipped):
        if flip:
            array = np.flip(array, axis)
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
    return Volume.make(np.ascontiguousarray(array), affine)


def _scaled(grid: Grid, shape: tuple[int, int, int], ratio: Float64[np.ndarray, "3"]) -> Grid:
    """Return a grid whose voxels are `ratio` times as large, about the centre of the field of view."""
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ ((np.array(grid.shape) - 1) / 2 - ratio * (np.array(shape) - 1) / 2)
    affine[:3, :3] *= ratio
    return Grid(shape, affine)


def _window(
    array: Shaped[np.ndarray, "x y z *channel"], start: list[int], shape: list[int], fill: float
) -> Shaped[np.ndarray, "x2 y2 z2 *channel"]:
    result = np.full((*shape, *array.shape[3:]), fill, array.dtype)
    inside, source = [], []
    for first, count, size in zip(start, shape, array.shape[:3], strict=True):
        low, high = max(first, 0), max(min(first + count, size), max(first, 0))
        source.append(slice(low, high))
        inside.append(slice(low - first, high - first))
    part = array[tuple(source)]
    if part.size:
        result[tuple(inside)] = part
    return result


def _along_axes(
    array: Shaped[np.ndarray, "x y z *channel"],
    transform: Float64[np.ndarray, "4 4"],
    shape: tuple[int, int, int],
    order: int,
    sigma: Float64[np.ndarray, "3"],
) -> Shaped[np.ndarray, "x2 y2 z2 *channel"]:
    """Interpolate one axis after the other: a tensor-product spline is a matrix per axis."""
    # The axis that shrinks most goes first: less is left for the others.
    for axis in sorted(range(3), key=lambda axis: shape[axis] / array.shape[axis]):
        step, offset = transform[axis, axis], transform[axis, 3]
        size = array.shape[axis]
        places = offset + step * np.arange(shape[axis])
        if shape[axis] == size and np.abs(places - np.arange(size)).max() < 1e-9:
            continue
        if order == 0:
            nearest = np.clip(np.floor(places + 0.5), 0, size - 1).astype(np.int64)
            array = np.take(array, nearest, axis)
            continue
        weights = _weights(size, places, order, float(sigma[axis])).astype(array.dtype)
        array = np.moveaxis(np.tensordot(weights, array, (1, axis)), 0, axis)
    return np.array(array, order="C")


def _weights(
    size: int, places: Float64[np.ndarray, " new"], order: int, sigma: float
) -> Float64[np.ndarray, "new size"]:
    """Return the matrix that blurs `size` samples and interpolates them at `places`.

    It is found by sending unit vectors through scipy, so it is scipy's spline to the last bit.
    """
    basis = np.eye(size)
    if sigma > 0:
        basis = scipy.ndimage.gaussian_filter1d(basis, sigma, axis=0, mode="nearest")
    interpolate: Callable[..., np.ndarray] = scipy.ndimage.map_coordinates
    columns = [interpolate(basis[:, column], places[None], order=order, mode="nearest") for column in range(size)]
    return np.stack(columns, axis=1)


def _oblique(
    array: Shaped[np.ndarray, "x y z *channel"],
    transform: Float64[np.ndarray, "4 4"],
    shape: tuple[int, int, int],
    order: int,
    sigma: Float64[np.ndarray, "3"],
) -> Shaped[np.ndarray, "x2 y2 z2 *channel"]:
    channels = array.reshape(*array.shape[:3], -1)
    moved = np.empty((*shape, channels.shape[3]), array.dtype)
    # scipy reads any sequence as one offset per axis; its annotation knows a single number only.
    interpolate: Callable[..., np.ndarray] = scipy.ndimage.affine_transform
    for index in range(channels.shape[3]):
        channel = channels[..., index]
        if sigma.any():
            channel = scipy.ndimage.gaussian_filter(channel, sigma, mode="nearest")
        moved[..., index] = interpolate(
            channel, transform[:3, :3], transform[:3, 3], shape, order=order, mode="nearest"
        )
    return moved.reshape(*shape, *array.shape[3:])


def _is_outside(
    transform: Float64[np.ndarray, "4 4"],
    old: tuple[int, int, int],
    new: tuple[int, int, int],
) -> Shaped[np.ndarray, "x2 y2 z2"]:
    """Return which new voxels have their centre beyond the old field of view."""
    indices = np.ogrid[tuple(slice(n) for n in new)]
    is_outside = np.zeros(new, bool)
    for axis, size in enumerate(old):
        row = transform[axis]
        place = row[0] * indices[0] + row[1] * indices[1] + row[2] * indices[2] + row[3]
        # A hair of tolerance keeps voxels whose centre is on the edge, whatever was rounded.
        is_outside |= (place < -0.5 - 1e-6) | (place > size - 0.5 + 1e-6)
    return is_outside
