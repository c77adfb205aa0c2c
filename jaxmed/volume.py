"""A volume and the grid it is sampled on: what io reads and arrays/grid.py moves."""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Shaped

from jaxmed.errors import InputError


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


def require_same_grid(a: Volume | Grid, b: Volume | Grid, name_a: str, name_b: str, tolerance: float = 1e-3) -> None:
    """Refuse two volumes that are not sampled at the same points.

    Args:
        a: The volume to check.
        b: The volume it has to match.
        name_a: File or field of `a`.
        name_b: File or field of `b`.
        tolerance: Largest distance allowed between equal corners, in mm.

    Raises:
        InputError: When shapes differ, or a corner voxel lies elsewhere.
    """
    a, b = (item.grid if isinstance(item, Volume) else item for item in (a, b))
    advice = "resample one onto the other first"
    if a.shape != b.shape:
        raise InputError(name_a, f"the shape of {name_b}, {b.shape}", f"{a.shape}", advice)
    distance = corner_distance(a, b)
    if not distance <= tolerance:
        raise InputError(name_a, f"the grid of {name_b}", f"an affine that differs by {distance:.3g} mm", advice)


def corner_distance(a: Grid, b: Grid) -> float:
    """Return the largest distance in mm between equal corner voxels of two grids of one shape."""
    corners = np.array([*itertools.product(*((0, n - 1) for n in a.shape))], float)
    difference = a.affine - b.affine
    return float(np.linalg.norm(corners @ difference[:3, :3].T + difference[:3, 3], axis=1).max())
