"""Signed distances to the cortical surfaces, from a label map; on the host.

The white surface of a hemisphere bounds its white matter and what lies within (ventricles, deep grey matter); the pial
one its cortex too. Distances are those of voxel borders, negative inside.

Source: BrainFM (arXiv:2509.00549) stores them as 20 mm + 128; how its authors made them is not known.
"""

import numpy as np
from jaxtyping import Bool, Float32, Integer, UInt8
from scipy import ndimage

from jaxmed.data.label_table import LabelTable, Side, Surface

PER_MM, ZERO = 20.0, 128
SURFACES: tuple[tuple[Side, tuple[Surface, ...]], ...] = (
    ("left", ("inner", "cortex")),
    ("left", ("inner",)),
    ("right", ("inner", "cortex")),
    ("right", ("inner",)),
)
"""Left pial, left white, right pial, right white."""
REACH = 7
"""Voxels around a surface beyond which a stored distance is at its end anyway."""


def surface_distances(
    labels: Integer[np.ndarray, "x y z"], table: LabelTable, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> UInt8[np.ndarray, "x y z 4"]:
    """Return the distances to the four surfaces, as they are stored."""
    stored = [encode(signed_distance(_filled(table.part(labels, *which)), spacing)) for which in SURFACES]
    return np.stack(stored, -1)


def signed_distance(
    inside: Bool[np.ndarray, "x y z"], spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> Float32[np.ndarray, "x y z"]:
    """Return the distance to the border of a mask in mm, negative inside; far away it is `REACH` voxels at least.

    Half a voxel is taken off, since the border lies between voxels.
    """
    far = REACH * max(spacing)
    result = np.full(inside.shape, far, np.float32)
    if not inside.any():
        return result
    box = tuple(
        slice(max(found[0] - REACH, 0), found[-1] + 1 + REACH)
        for found in (np.flatnonzero(inside.any(tuple(o for o in range(3) if o != axis))) for axis in range(3))
    )
    part, half = inside[box], min(spacing) / 2
    outer = np.asarray(ndimage.distance_transform_edt(~part, spacing), np.float32)
    # A mask that fills the whole volume has no border in it.
    if part.all():
        result[box] = -far
        return result
    inner = np.asarray(ndimage.distance_transform_edt(part, spacing), np.float32)
    result[box] = np.where(part, half - inner, outer - half)
    return result


def encode(distance: Float32[np.ndarray, "x y z"]) -> UInt8[np.ndarray, "x y z"]:
    """Return distances in mm as they are stored."""
    return np.clip(np.rint(distance * PER_MM + ZERO), 0, 255).astype(np.uint8)


def _filled(mask: Bool[np.ndarray, "x y z"]) -> Bool[np.ndarray, "x y z"]:
    """Fill what is enclosed, such as lesions that belong to neither side."""
    return np.asarray(ndimage.binary_fill_holes(mask), bool)
