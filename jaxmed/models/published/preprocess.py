"""From a CT scan to the cube that published weights were trained on, and back; on the host.

`Preprocess` travels with the weights: it is TANGERINE's by default. The whole field of view becomes a cube without
reorientation, by cubic B-splines, then the HU window becomes [0, 1].

Conventions: output voxel o samples stored index o * old / new, so voxel 0 stays and the last one does not (not the
half-pixel rule of `arrays.grid.resize`). Beyond the outermost voxels the spline is mirrored about them.

Source: TANGERINE, arXiv:2507.01881, preprocessing of the official 3D-MAE code: SimpleITK's resampling with sitkBSpline
to new_spacing = size * spacing / 256, same origin and direction, then a clip to [-1200, 800] HU.
Deviation: SimpleITK leaves files of int16 in int16 and cuts the fraction of a resampled voxel off; here it stays, so
that voxels differ by up to 1 HU (0.0005 of the window). In floating point both agree to 0.002 HU.
"""

import dataclasses
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.ndimage
from jaxtyping import Float, Float32, Float64, Shaped

from jaxmed.arrays.grid import orientation
from jaxmed.config import Size, checked
from jaxmed.errors import InputError
from jaxmed.files import require_file
from jaxmed.io.images import ARRAY_SUFFIXES
from jaxmed.io.numpy_files import array_names, read_array, read_member
from jaxmed.io.scans import ScanFiles, read_volume
from jaxmed.volume import Grid, Volume, require_intensities

# What each axis of the cube should run along: D, H, W.
ANATOMY = (("superior-inferior", "SI"), ("anterior-posterior", "AP"), ("left-right", "LR"))
WARMEST_AIR = -200.0  # HU: the lowest value of a chest CT is that of air, about -1000
RANGE_TOLERANCE = 1e-3  # of normalised cubes; float16 files round by less


@dataclasses.dataclass(frozen=True)
@checked
class Preprocess:
    """What published weights expect of a scan. Picklable; called with a volume or a path.

    Attributes:
        size: Voxels of the cube along D, H, W.
        axis_order: Stored axes (x the first of the file, z the last) that become D, H, W. "zyx" is SimpleITK's array
            order, slices first for axial scans; "xyz" is the (W, H, D) order of older sets.
        low: HU that becomes 0.
        high: HU that becomes 1.
        edge: What stands beyond the field of view, half a voxel past the last one, which is reached when an axis
            grows to twice its size or more: "clamp" repeats the last voxel; "zero" is 0 HU, as in the original.
    """

    size: tuple[Size, Size, Size] = (256, 256, 256)
    axis_order: Literal["zyx", "xyz", "zxy", "yzx", "yxz", "xzy"] = "zyx"
    low: float = -1200.0
    high: float = 800.0
    edge: Literal["clamp", "zero"] = "clamp"

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size: expected three positive numbers, found {self.size}")
        if sorted(self.axis_order) != ["x", "y", "z"]:
            raise ValueError(f"axis_order: expected x, y and z in some order, found '{self.axis_order}'")
        if not self.low < self.high:
            raise ValueError(f"low, high: expected low below high in HU, found {self.low, self.high}")
        if self.edge not in ("clamp", "zero"):
            raise ValueError(f"edge: expected clamp or zero, found '{self.edge}'")

    def __call__(self, image: Volume | ScanFiles | str | Path) -> Float32[np.ndarray, "d h w 1"]:
        """Return the cube that the model sees, in [0, 1].

        Args:
            image: A CT in HU; or its NIfTI file, or DICOM folder or multi-frame file.

        Raises:
            InputError: It cannot be read, is not 3D, or holds NaN, Inf or one single value.
        """
        # Resampling comes before the clip: the clip removes the overshoot of the spline.
        cube = self.resample(image)
        cube -= np.float32(self.low)
        cube /= np.float32(self.high - self.low)
        return np.clip(cube, 0.0, 1.0, out=cube)[..., None]

    def resample(self, image: Volume | ScanFiles | str | Path) -> Float32[np.ndarray, "d h w"]:
        """Return the cube in HU, before the window.

        Args:
            image: As in a call.

        Raises:
            InputError: As in a call.
        """
        if isinstance(image, Volume):
            where, volume = "volume", image
        else:
            scan = image if isinstance(image, ScanFiles) else ScanFiles(Path(image))
            where, volume = str(scan.path), read_volume(scan).volume
        _check_array(where, volume.array)
        stored = np.transpose(volume.array, self._permutation)
        return _spline_resize(stored, self.size, self.edge)

    def inverse_map(self, cube: Float[np.ndarray, "d h w"], volume: Volume) -> Volume:
        """Put a map on the model's grid (attribution, reconstruction) back onto the grid of the scan, linearly.

        Args:
            cube: Values on the whole grid `size`, in any unit.
            volume: The scan that the cube was made from; only its shape and affine count.

        Returns:
            Float32 values on the stored axes of the scan, with its affine.

        Raises:
            InputError: The map has another size.
        """
        if cube.shape != self.size:
            advice = "bring token maps to the size of the input first"
            raise InputError("cube", f"a map of shape {self.size}", f"{cube.shape}", advice)
        back = np.transpose(cube.astype(np.float32), np.argsort(self._permutation))
        weights = [_linear_weights(new, old) for new, old in zip(back.shape, volume.grid.shape, strict=True)]
        return Volume.make(_apply(back, weights), volume.affine)

    def check(self, volume: Volume) -> list[str]:
        """Return warnings of a scan that can be read and is yet unlike those of training; empty when all is well."""
        return self.check_orientation(volume) + self.check_values(volume)

    def check_orientation(self, volume: Volume) -> list[str]:
        """Warn when D, H, W do not run superior-inferior, anterior-posterior, left-right: a cube hides such errors."""
        return self.check_axes(orientation(volume.affine))

    def check_axes(self, codes: str) -> list[str]:
        """Do what `check_orientation` does, given where the stored axes point, such as "RAS"."""
        warnings = []
        for axis, (stored, (name, letters)) in enumerate(zip(self._permutation, ANATOMY, strict=True)):
            if codes[stored] not in letters:
                found = next(other for other, pair in ANATOMY if codes[stored] in pair)
                warnings.append(
                    f"axis {'DHW'[axis]} of the cube runs {found} (stored axis {'xyz'[stored]} of {codes}), "
                    f"expected {name}; use axis_order='{_best_order(codes)}' unless the weights were trained this way"
                )
        return warnings

    def cube_affine(self, grid: Grid) -> Float64[np.ndarray, "4 4"]:
        """Return the affine of the cube made from a scan: where each of its voxels stands in the scan's world.

        Args:
            grid: Of the scan, in stored axes.
        """
        affine = grid.affine.copy()
        for axis, stored in enumerate(self._permutation):
            affine[:, axis] = grid.affine[:, stored] * (grid.shape[stored] / self.size[axis])
        return affine

    def check_values(self, volume: Volume) -> list[str]:
        """Warn when the values cannot be HU: a chest CT holds air, at about -1000."""
        lowest, highest = float(volume.array.min()), float(volume.array.max())
        if lowest < WARMEST_AIR:
            return []
        return [
            f"values from {lowest:g} to {highest:g} do not look like CT in HU, where air is about -1000; "
            "apply the rescale slope and intercept first, and give no masks or other modalities"
        ]

    @property
    def _permutation(self) -> list[int]:
        """Return the stored axis of each of D, H, W."""
        return ["xyz".index(letter) for letter in self.axis_order]


def load_input(scan: ScanFiles | str | Path, preprocess: Preprocess) -> Float32[np.ndarray, "d h w 1"]:
    """Return the model's cube for a file of any kind.

    Args:
        scan: A CT in HU as NIfTI, or DICOM folder or multi-frame file; or a cube that is normalised to [0, 1] already,
            with axes D, H, W: .npz with the array "volume" (as in pre-training), or .npy. Axes of length 1 before or
            after are dropped, and a cube of another size is resampled.
        preprocess: What the weights expect; the window and the axis order concern scans only.

    Raises:
        InputError: The file cannot be read, or is not what its kind has to be.
    """
    path = scan.path if isinstance(scan, ScanFiles) else Path(scan)
    if path.is_dir() or path.suffix.lower() not in ARRAY_SUFFIXES:
        return preprocess(scan)
    cube = _load_cube(path)
    _check_array(str(path), cube)
    low, high = float(cube.min()), float(cube.max())
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        advice = "give scans in HU as NIfTI or DICOM, which are normalised here"
        raise InputError(path, "values normalised to [0, 1]", f"[{low:g}, {high:g}]", advice)
    cube = _spline_resize(cube, preprocess.size, preprocess.edge)
    return np.clip(cube, 0.0, 1.0, out=cube)[..., None]


def _load_cube(path: Path) -> Shaped[np.ndarray, "..."]:
    require_file(path, "a NumPy file", kinds=("npy", "zip"))
    try:
        if not zipfile.is_zipfile(path):
            cube = read_array(path)
        elif "volume" in (names := array_names(path)):
            cube = read_member(path, "volume")
        else:
            advice = "save it with np.savez(path, volume=cube)"
            raise InputError(path, "an array named 'volume'", ", ".join(names) or "none", advice)
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(path, "a NumPy file of numbers", f"a damaged one or one of objects ({error})") from error
    if cube.dtype.kind not in "biuf":
        raise InputError(path, "real numbers", f"{cube.dtype}")
    while cube.ndim > 3 and 1 in (cube.shape[0], cube.shape[-1]):
        cube = cube[0] if cube.shape[0] == 1 else cube[..., 0]
    return cube


def _check_array(where: str, array: Shaped[np.ndarray, "..."]) -> None:
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(where, "a 3D volume", f"shape {array.shape}", "choose one volume of it")
    if array.dtype.kind == "f":
        require_intensities(array, where)
    low, high = array.min(), array.max()
    if low == high:
        raise InputError(where, "an image with contrast", f"a constant volume, {low:g} everywhere")


def _best_order(codes: str) -> str:
    return "".join("xyz"[axis] for _, pair in ANATOMY for axis in range(3) if codes[axis] in pair)


def _spline_resize(
    array: Shaped[np.ndarray, "x y z"], size: tuple[int, int, int], edge: Literal["clamp", "zero"]
) -> Float32[np.ndarray, "d h w"]:
    weights = [_spline_weights(old, new, edge) for old, new in zip(array.shape, size, strict=True)]
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


def _spline_weights(old: int, new: int, edge: Literal["clamp", "zero"]) -> Float64[np.ndarray, "new old"]:
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


def _linear_weights(new: int, old: int) -> Float64[np.ndarray, "old new"]:
    """Return the matrix that samples a cube's axis of `new` voxels at the `old` voxels of the scan."""
    places = np.minimum(np.arange(old) * (new / old), new - 1)
    first = np.minimum(places.astype(np.int64), max(new - 2, 0))
    weights = np.zeros((old, new))
    rows = np.arange(old)
    weights[rows, first] = 1 - (places - first)
    weights[rows, np.minimum(first + 1, new - 1)] += places - first
    return weights
