"""Heads of nested ellipsoids as label maps with two sides, in FreeSurfer's numbering; a pure function of a key.

Scalp, skull and fluid around two hemispheres with cortex, white matter, ventricles, thalami and putamina, a cerebellum
and a brainstem. Not anatomy: structures of known place and size, for the generator's smoke runs and for tests.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxmed.synthesis.phantoms.shapes import centered_points, ellipsoid

SCALP, SKULL, FLUID, BRAINSTEM = 516, 515, 24, 16
# Label on the left and on the right, centre and semi-axes in mm on the right side, in the order of painting.
SIDED: tuple[tuple[int, int, tuple[float, float, float], tuple[float, float, float]], ...] = (
    (3, 42, (33.0, 0.0, 8.0), (32.0, 82.0, 58.0)),
    (2, 41, (32.0, 0.0, 8.0), (25.0, 70.0, 46.0)),
    (4, 43, (14.0, 4.0, 14.0), (7.0, 30.0, 10.0)),
    (10, 49, (13.0, -8.0, 0.0), (8.0, 13.0, 9.0)),
    (12, 51, (28.0, 10.0, 0.0), (6.0, 16.0, 10.0)),
    (8, 47, (25.0, -52.0, -40.0), (24.0, 24.0, 20.0)),
    (7, 46, (22.0, -50.0, -40.0), (14.0, 13.0, 10.0)),
)
# Centre and semi-axes of what lies around both sides.
AROUND: tuple[tuple[int, tuple[float, float, float], tuple[float, float, float]], ...] = (
    (SCALP, (0.0, 0.0, -2.0), (80.0, 100.0, 84.0)),
    (SKULL, (0.0, 0.0, -1.0), (74.0, 94.0, 78.0)),
    (FLUID, (0.0, 0.0, 0.0), (69.0, 88.0, 72.0)),
)
STEM = ((0.0, -26.0, -46.0), (12.0, 12.0, 30.0))
LEVELS = {SCALP: 150.0, SKULL: 30.0, FLUID: 25.0, BRAINSTEM: 150.0, 3: 95.0, 2: 165.0, 4: 25.0, 10: 125.0, 12: 115.0}
LEVELS |= {8: 95.0, 7: 160.0}
"""Mean intensity of a T1-weighted scan."""


class Head(NamedTuple):
    """A head.

    Attributes:
        labels: In FreeSurfer's numbering.
        image: Like a T1-weighted scan, from 0 on.
    """

    labels: Int[Array, "x y z"]
    image: Float[Array, "x y z"]


def draw_head(key: Key[Array, ""], shape: tuple[int, int, int], spacing: float, spread: float = 0.08) -> Head:
    """Make one head, its middle in the middle of the volume.

    Args:
        key: Consumed.
        shape: Voxels along x (left to right), y (back to front) and z (foot to head).
        spacing: Voxel edge in mm.
        spread: Standard deviation of semi-axes and places between subjects, relative; 0 for the same head always.
    """
    size_key, shape_key, noise_key = jax.random.split(key, 3)
    points = centered_points(shape, [spacing] * 3)
    whole = 1 + spread * jax.random.normal(size_key, (3,))
    own = 1 + spread * jax.random.normal(shape_key, (len(SIDED), 3))
    labels = jnp.zeros(shape, jnp.int32)

    def paint(labels: Array, value: int | Array, points: list[Array], center: tuple, radius: Array) -> Array:
        distance = ellipsoid(points, jnp.array(center) * whole, radius * whole)
        return jnp.where(distance <= 0, value, labels)

    for value, center, radius in AROUND:
        labels = paint(labels, value, points, center, jnp.array(radius))
    mirrored = [jnp.abs(points[0]), *points[1:]]
    is_left = points[0] < 0
    labels = paint(labels, BRAINSTEM, points, STEM[0], jnp.array(STEM[1]))
    for row, (left, right, center, radius) in enumerate(SIDED):
        labels = paint(labels, jnp.where(is_left, left, right), mirrored, center, jnp.array(radius) * own[row])
    levels = jnp.zeros(600).at[jnp.array(list(LEVELS))].set(jnp.array(list(LEVELS.values())))
    for left, right, *_ in SIDED:
        levels = levels.at[right].set(LEVELS[left])
    image = levels[labels] + 6.0 * jax.random.normal(noise_key, shape)
    return Head(labels, jnp.where(labels > 0, jnp.maximum(image, 0.0), 0.0))
