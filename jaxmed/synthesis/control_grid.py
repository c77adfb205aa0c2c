"""Smooth random fields from coarse grids of normal numbers, the size of the grid drawn too.

The grid lives in a buffer of its largest size, so that shapes stay fixed while its size is drawn; zooming is one matrix
per axis, and rows of the buffer beyond the drawn size have no weight.

Source: BrainFM's generator (after SynthSeg): control values zoomed linearly to the output grid.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxmed.arrays.filters import along_all, linear_matrix, zoom_positions
from jaxmed.config import Range

PHOTO_AXIS = 1
"""The axis along which slabs of a dissected brain are photographed."""
LEAST_PHOTO_SPACING = 2.5
"""Thinnest slab in mm (or voxels of 1 mm); it bounds the buffer along that axis."""


class Photo(NamedTuple):
    """Whether an image stands for a stack of slab photographs, and the slabs' spacing in voxels."""

    is_on: Bool[Array, ""]
    spacing: Float[Array, ""]


def draw_field(
    key: Key[Array, ""],
    shape: tuple[int, ...],
    scale: Range,
    amplitude: Float[Array, ""] | float,
    num_channels: int,
    photo: Photo | None = None,
) -> Float[Array, "*space channel"]:
    """Draw a smooth field.

    Args:
        key: Consumed; draws the size of the control grid and its values.
        shape: Shape of the field.
        scale: Range of the control points per voxel of the output, drawn evenly, one number for all axes.
        amplitude: Standard deviation of the control values.
        num_channels: Independent fields.
        photo: In photo mode axis 1 has one control point per slab.
    """
    scale_key, value_key = jax.random.split(key)
    ratio = jax.random.uniform(scale_key, (), minval=scale[0], maxval=scale[1])
    counts, buffers = [], []
    for axis, size in enumerate(shape):
        count = jnp.maximum(jnp.round(ratio * size), 1)
        buffer = max(round(scale[1] * size), 1)
        if photo is not None and axis == PHOTO_AXIS:
            count = jnp.where(photo.is_on, jnp.maximum(jnp.round(size / photo.spacing), 1), count)
            buffer = max(round(size / LEAST_PHOTO_SPACING), buffer)
        counts.append(jnp.minimum(count, buffer))
        buffers.append(buffer)
    field = amplitude * jax.random.normal(value_key, (*buffers, num_channels))
    matrices = [
        linear_matrix(zoom_positions(size, size / count), count, buffer)
        for size, count, buffer in zip(shape, counts, buffers, strict=True)
    ]
    return along_all(matrices, field)
