"""A volume and the grid it is sampled on: what io reads and arrays/grid.py moves."""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Shaped

from jaxmed.errors import InputError

# Beyond these no scanner measures: what is larger stands for "no value" (-3.4e38, -1e30, 9.97e36, the ends of int32),
# and squares of what is smaller leave single precision.
LARGEST_INTENSITY = 1e9
SMALLEST_INTENSITY = 1e-15
LEAST_GAP = 1e3
GRID_TOLERANCE = 0.01
"""Distance in voxels, of the smallest edge, between equal corners of two grids that are one: float32 and quaternions
round by less than a thousandth, numbers written with four decimals by some thousandths."""


class Grid(NamedTuple):
    """Where voxels stand.

    Attributes:
        shape: Number of voxels along each of the three array axes.
        affine: Voxel index to world position, RAS+, in mm; index 0 is a voxel's centre.
    """

    shape: tuple[int, int, int]
    affine: Float64[np.ndarray, "4 4"]


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """An image with its place in the world.

    Attributes:
        array: Voxels in stored axis order, 3D, or 4D with channels (or time points) last.
        affine: Voxel index to world position, RAS+, in mm.
        spacing: Voxel size along each array axis, in mm: the lengths of the affine's columns.
    """

    array: Shaped[np.ndarray, "..."]
    affine: Float64[np.ndarray, "4 4"]
    spacing: tuple[float, float, float]

    def __post_init__(self):
        if self.array.ndim not in (3, 4):
            raise InputError("volume.array", "3 or 4 axes", f"shape {self.array.shape}")
        if 0 in self.array.shape:
            raise InputError("volume.array", "at least one voxel", f"shape {self.array.shape}")
        check_affine(self.affine, "volume.affine")
        if not np.allclose(self.spacing, affine_spacing(self.affine), rtol=1e-4, atol=0):
            raise InputError(
                "volume.spacing",
                f"the column lengths of the affine {affine_spacing(self.affine)} mm",
                self.spacing,
                "build volumes with Volume.make",
            )

    @classmethod
    def make(cls, array: Shaped[np.ndarray, "..."], affine: Float[np.ndarray, "4 4"]) -> "Volume":
        """Build a volume whose spacing follows from its affine."""
        affine = np.array(affine, np.float64)
        return cls(array, affine, affine_spacing(affine))

    @property
    def grid(self) -> Grid:
        """Shape and affine, without the voxels."""
        x, y, z = self.array.shape[:3]
        return Grid((x, y, z), self.affine)


def affine_spacing(affine: Float[np.ndarray, "4 4"]) -> tuple[float, float, float]:
    """Return the voxel size along each array axis, in the affine's unit (mm)."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return x, y, z


def affine_shear(affine: Float[np.ndarray, "4 4"]) -> float:
    """Return the largest cosine between two array axes: 0 for orthogonal axes."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.abs(axes.T @ axes - np.eye(3)).max())


def check_affine(affine: Float[np.ndarray, "4 4"], where: str) -> None:
    """Refuse an affine that does not map voxels one to one into space.

    Raises:
        InputError: When it is not finite, its last row is not 0 0 0 1, or it is singular.
    """
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise InputError(where, "a finite 4 by 4 affine", f"{affine.tolist()}")
    if not np.array_equal(affine[3], [0, 0, 0, 1]):
        raise InputError(where, "an affine whose last row is 0 0 0 1", f"{affine[3].tolist()}")
    # The determinant of the unit axes does not depend on the voxel size; a legal rotation has 1.
    spacing = affine_spacing(affine)
    if min(spacing) == 0 or abs(np.linalg.det(affine[:3, :3] / np.array(spacing))) < 1e-6:
        raise InputError(
            where,
            "an invertible affine",
            f"a singular one, {affine[:3].tolist()}",
            "repair the header, for example from the original DICOM",
        )


def require_same_grid(a: Volume | Grid, b: Volume | Grid, name_a: str, name_b: str) -> None:
    """Refuse two volumes that are not sampled at the same points, up to `GRID_TOLERANCE` of a voxel.

    Args:
        a: The volume to check.
        b: The volume it has to match.
        name_a: File or field of `a`.
        name_b: File or field of `b`.

    Raises:
        InputError: When shapes differ, or a corner voxel lies elsewhere.
    """
    a, b = (item.grid if isinstance(item, Volume) else item for item in (a, b))
    advice = "resample one onto the other first"
    if a.shape != b.shape:
        raise InputError(name_a, f"the shape of {name_b}, {b.shape}", f"{a.shape}", advice)
    if not is_same_grid(a, b):
        limit = GRID_TOLERANCE * min(affine_spacing(b.affine))
        found = f"an affine that differs by {corner_distance(a, b):.3g} mm"
        raise InputError(name_a, f"the grid of {name_b}, to {limit:.2g} mm", found, advice)


def is_same_grid(a: Grid, b: Grid) -> bool:
    """Return whether two grids of one shape are one, up to `GRID_TOLERANCE` of the smallest edge of a voxel."""
    return corner_distance(a, b) <= GRID_TOLERANCE * min(affine_spacing(b.affine))


def corner_distance(a: Grid, b: Grid) -> float:
    """Return the largest distance in mm between equal corner voxels of two grids of one shape."""
    corners = np.array([*itertools.product(*((0, n - 1) for n in a.shape))], float)
    difference = a.affine - b.affine
    return float(np.linalg.norm(corners @ difference[:3, :3].T + difference[:3, 3], axis=1).max())


def require_intensities(
    array: Shaped[np.ndarray, "..."], where: object, *, fill: float | None = None, allow_missing: bool = False
) -> Shaped[np.ndarray, "..."]:
    """Refuse intensities that are none: NaN, Inf, and beyond `LARGEST_INTENSITY`.

    Args:
        array: Floating point.
        where: The file, for messages.
        fill: What takes their place; None refuses them.
        allow_missing: Whether some voxels may be without a value; all of them come as NaN.

    Returns:
        The array; a copy where voxels were replaced.

    Raises:
        InputError: Some voxels have no value (with `allow_missing`, all), intensities run on beyond the bound, or the
            largest is so small that its square is 0.
    """
    # NaN shows in both ends, and the rule below holds for none of its comparisons.
    with np.errstate(invalid="ignore"):
        low, high = float(array.min()), float(array.max())
        if -LARGEST_INTENSITY <= low and high <= LARGEST_INTENSITY:
            _require_size(max(-low, high), where)
            return array
        has_value = np.abs(array) <= LARGEST_INTENSITY
    finite = np.isfinite(array)
    bad = array.size - int(finite.sum())
    absurd = array[finite & ~has_value]
    if absurd.size:
        # A fill value stands far from all others; what reaches up to the bound is a scan in another unit.
        largest = float(np.abs(array[has_value]).max(initial=0))
        is_scaled = float(np.abs(absurd).min()) < LEAST_GAP * largest if largest else True
        if is_scaled and (fill is None or not largest):
            expected = f"intensities of at most {LARGEST_INTENSITY:g} in size"
            found = f"{absurd.size} voxels of {array.size} beyond, such as {absurd[0]:.3g}"
            raise InputError(where, expected, found, "divide the intensities by a power of ten")
    if has_value.any() and (fill is not None or allow_missing):
        result = np.where(has_value, array, array.dtype.type(np.nan if fill is None else fill))
        _require_size(float(np.nanmax(np.abs(result))), where)
        return result
    if absurd.size:
        expected = f"intensities of at most {LARGEST_INTENSITY:g} in size"
        found = f"{absurd.size} voxels of {array.size} beyond, such as {absurd[0]:.3g} (a fill value?)"
        raise InputError(where, expected, found, "replace them with --fill VALUE")
    advice = "check the file" if allow_missing else "repair them, or replace them with --fill VALUE"
    raise InputError(where, "finite voxels", f"{bad} NaN or Inf voxels of {array.size}", advice)


def _require_size(largest: float, where: object) -> None:
    if 0 < largest < SMALLEST_INTENSITY:
        expected = f"a largest intensity above {SMALLEST_INTENSITY:g} in size"
        raise InputError(where, expected, f"{largest:.3g}", "multiply the intensities by a power of ten")
