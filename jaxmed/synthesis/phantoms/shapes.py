"""Soft shapes in 2D and 3D: coordinates in mm, signed distances, and the share of a voxel inside a border."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def centered_points(shape: tuple[int, ...], spacing: Sequence[float]) -> list[Float[Array, "..."]]:
    """Return the coordinates of voxel centres in mm, the origin in the middle; one array per axis, broadcastable."""
    places = [(jnp.arange(size) - (size - 1) / 2) * step for size, step in zip(shape, spacing, strict=True)]
    return list(jnp.meshgrid(*places, indexing="ij", sparse=True))


def inside(distance: Float[Array, "..."], width: float) -> Float[Array, "..."]:
    """Return the share of a voxel on the negative side of a border: a ramp of `width` mm, exactly 0 and 1 beyond."""
    return jnp.clip(0.5 - distance / width, 0.0, 1.0)


def ellipsoid(
    points: Sequence[Float[Array, "..."]], center: Float[Array, " axis"], radius: Float[Array, " axis"]
) -> Float[Array, "..."]:
    """Return the signed distance to an ellipsoid along the axes; close to its surface, by first-order expansion.

    Args:
        points: Coordinates in mm, one array per axis.
        center: In mm.
        radius: Semi-axes in mm.
    """
    scaled = [(place - center[axis]) / radius[axis] for axis, place in enumerate(points)]
    # The small numbers keep the slope finite at the centre.
    length = jnp.sqrt(sum((s**2 for s in scaled), jnp.float32(1e-6)))
    slope = jnp.sqrt(sum(((s / radius[axis]) ** 2 for axis, s in enumerate(scaled)), jnp.float32(1e-9)))
    return (length - 1) * length / slope
