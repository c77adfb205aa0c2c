"""Segmentation tasks without end: find the shape of one family, at any pose, among distractors, under noise.

Each family of shapes is a task; five are familiar, one validates, two are novel. An image holds one bright shape of its
family, which is the mask, dimmer and smaller shapes of other families, a smooth gain and noise, clipped to [0, 1]. All
of it is a pure function of a key and of the family's number, in 2D and 3D.

Source: the families, the split, the noise and the range are those that stand in for public tasks in the specification
of selfplay (arXiv:2506.22075); noise and range are those of its authors' MNIST demonstration.
"""

import dataclasses
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmed.config import ASCENDING, Bounds, FractionRange, Length, NonNegative, Range, Share, ShareRange, checked
from jaxmed.synthesis.bias_field import BiasFieldConfig, apply_bias, draw_log_bias
from jaxmed.synthesis.phantoms.shapes import centered_points, inside

FAMILIES = ("disk", "ring", "square", "cross", "bar", "crescent", "blob", "star")
TRAIN_FAMILIES, VALIDATION_FAMILIES, NOVEL_FAMILIES = (0, 1, 2, 3, 4), (5,), (6, 7)
AtLeastOne = Annotated[float, Bounds(1, 3e38)]
NUM_WAVES = 4  # of a blob's outline


@dataclasses.dataclass(frozen=True)
@checked
class PuzzleConfig:
    """What is drawn; the defaults can be solved by eye at 32 x 32.

    Attributes:
        radius: Range of the radius of the sphere around the shape, as a share of half the image's shortest edge.
        intensity: Range of the shape's intensity.
        background: Intensity around shapes.
        num_distractors: Shapes of other families.
        distractor_radius: Range of their radius, likewise.
        distractor_intensity: Range of their intensity.
        bias_std: Range of the standard deviation of the gain's logarithm at its control points.
        bias_points: Range of the gain's control points along the longest edge.
        noise: Standard deviation of the noise, which is white and normal, before clipping to [0, 1].
    """

    radius: FractionRange = (0.4, 0.7)
    intensity: ShareRange = (0.8, 1.0)
    background: Share = 0.1
    num_distractors: Length = 2
    distractor_radius: FractionRange = (0.15, 0.3)
    distractor_intensity: ShareRange = (0.3, 0.6)
    bias_std: Range = (0.0, 0.3)
    bias_points: Annotated[tuple[AtLeastOne, AtLeastOne], ASCENDING] = (2.0, 4.0)
    noise: NonNegative = 0.4

    def __post_init__(self) -> None:
        if self.background >= self.intensity[0]:
            raise ValueError(f"background: expected from 0 up to below the intensity, found {self.background:g}")


class Puzzle(NamedTuple):
    """An image and what is to be found in it.

    Attributes:
        image: Intensity in [0, 1].
        mask: The shape of the family, where it fills more than half of a voxel.
    """

    image: Float[Array, "*space"]
    mask: Bool[Array, "*space"]


def make_puzzle(
    key: Key[Array, ""],
    family: Int[Array, ""] | int,
    shape: tuple[int, ...] = (32, 32),
    config: PuzzleConfig = PuzzleConfig(),
) -> Puzzle:
    """Make one puzzle; `vmap` over keys and families makes many.

    Pose, distractors' places, gain and noise of a key are the same whatever the family.

    Args:
        key: Consumed.
        family: Number within FAMILIES; may be traced, and is then clipped to them.
        shape: Pixels or voxels along each axis; static.
        config: Static.
    """
    if len(shape) not in (2, 3):
        raise ValueError(f"shape: expected 2 or 3 axes, found {shape}")
    draw_key, bias_key, noise_key = jax.random.split(key, 3)
    # Distractors first, the shape of the family last and on top.
    count = config.num_distractors
    drawn = _draw_poses(draw_key, count + 1, shape, jnp.array([config.distractor_radius] * count + [config.radius]))
    family = jnp.clip(jnp.asarray(family, jnp.int32), 0, len(FAMILIES) - 1)
    # A distractor has any family but this one: 1 to 7 steps around a circle.
    steps = 1 + jnp.floor((len(FAMILIES) - 1) * drawn.kind[:-1]).astype(jnp.int32)
    families = jnp.append((family + steps) % len(FAMILIES), family)
    low, high = jnp.array([config.distractor_intensity] * count + [config.intensity]).T
    levels = low + (high - low) * drawn.level
    points = jnp.stack(jnp.broadcast_arrays(*centered_points(shape, [1.0] * len(shape))))
    # One program for all shapes, mapped: eight families are much to compile.
    shares = jax.vmap(partial(_share, points))(families, drawn)
    image = jnp.full(shape, config.background)
    for level, share in zip(levels, shares, strict=True):
        image = image + share * (level - image)
    fewest, most = (min(number / max(shape), 1.0) for number in config.bias_points)
    gain = draw_log_bias(bias_key, shape, BiasFieldConfig((fewest, most), config.bias_std))
    noise = config.noise * jax.random.normal(noise_key, shape)
    return Puzzle(jnp.clip(apply_bias(image, gain) + noise, 0.0, 1.0), shares[-1] > 0.5)


class _Pose(NamedTuple):
    """How shapes stand and look; lengths in voxels. Mapped over shapes.

    Attributes:
        radius: Radius of the sphere around the shape.
        center: From the middle of the image.
        turn: Normal numbers, see `_rotation`.
        axes: Directions of a blob's waves, not yet of length 1.
        phases: Phases of these waves.
        level: Place within the range of intensities, in [0, 1).
        kind: Place within the families of distractors, in [0, 1).
    """

    radius: Float[Array, "*shape"]
    center: Float[Array, "*shape axis"]
    turn: Float[Array, "*shape 4"]
    axes: Float[Array, "*shape wave axis"]
    phases: Float[Array, "*shape wave"]
    level: Float[Array, "*shape"]
    kind: Float[Array, "*shape"]


def _draw_poses(key, count, shape, radii):
    """Draw `count` poses, wholly within the image; `radii` holds the ranges as shares of half the shortest edge."""
    even_key, normal_key = jax.random.split(key)
    ndim = len(shape)
    # Two draws for all numbers: every further one adds a tenth of a second to compilation.
    even = jax.random.uniform(even_key, (count, 3 + ndim + NUM_WAVES))
    size, level, kind, place, phases = jnp.split(even, [1, 2, 3, 3 + ndim], axis=1)
    turn, axes = jnp.split(jax.random.normal(normal_key, (count, 4 + NUM_WAVES * ndim)), [4], axis=1)
    radius = (radii[:, :1] + (radii[:, 1:] - radii[:, :1]) * size) * (min(shape) / 2)
    center = (jnp.array(shape) / 2 - radius) * (2 * place - 1)
    axes = axes.reshape(count, NUM_WAVES, ndim)
    return _Pose(radius[:, 0], center, turn, axes, 2 * jnp.pi * phases, level[:, 0], kind[:, 0])


def _share(points, family, pose):
    """Return the share of each voxel that a shape fills."""
    ndim = len(points)
    moved = points - pose.center.reshape(-1, *[1] * ndim)
    turned = jnp.einsum("ij,j...->i...", _rotation(pose.turn, ndim), moved) / pose.radius
    blob = partial(_blob, axes=pose.axes, phases=pose.phases)
    forms = [blob if name == "blob" else _FORMS[name] for name in FAMILIES]
    return inside(pose.radius * jax.lax.switch(family, forms, turned), 1.0)


def _rotation(turn, ndim):
    """Return a rotation, evenly drawn where `turn` is normal: a direction in 2D, a quaternion in 3D."""
    if ndim == 2:
        cos, sin = turn[:2] / jnp.linalg.norm(turn[:2])
        return jnp.array([[cos, -sin], [sin, cos]])
    w, x, y, z = turn / jnp.linalg.norm(turn)
    return jnp.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


# Signed distances to the border, negative inside, of shapes that fill the unit sphere. `place` is (axis, *space); in 3D
# a disk is a ball, a ring a torus, a square a cube, a bar a rod, a cross three rods, and a star a prism.


def _norm(place):
    return jnp.sqrt(jnp.sum(place**2, axis=0) + 1e-12)


def _box(place, half):
    """Return the distance to a box of half edges `half` along the axes."""
    beyond = jnp.abs(place) - jnp.array(half).reshape(-1, *[1] * (place.ndim - 1))
    return _norm(jnp.maximum(beyond, 0.0)) + jnp.minimum(jnp.max(beyond, axis=0), 0.0)


def _disk(place):
    return _norm(place) - 0.95


def _ring(place):
    middle = _norm(place[:2]) - 0.69
    return (jnp.abs(middle) if len(place) == 2 else _norm(jnp.stack([middle, place[2]]))) - 0.27


def _square(place):
    return _box(place, [0.95 / len(place) ** 0.5] * len(place))


def _cross(place):
    rods = [[0.9 if long == axis else 0.28 for axis in range(len(place))] for long in range(len(place))]
    return jnp.min(jnp.stack([_box(place, half) for half in rods]), axis=0)


def _bar(place):
    return _box(place, [0.9, *[0.28] * (len(place) - 1)])


def _crescent(place):
    bite = place.at[0].add(-0.45)
    return jnp.maximum(_norm(place) - 0.95, 0.75 - _norm(bite))


def _star(place):
    """Return the distance to a star of five points: to the edge of the one wedge of ten in which a point lies."""
    x, y = place[:2]
    wedge = jnp.pi / 5
    angle = jnp.abs((jnp.arctan2(y, x + 1e-12) + wedge) % (2 * wedge) - wedge)
    length = _norm(place[:2])
    inner = 0.45 * jnp.array([jnp.cos(wedge), jnp.sin(wedge)])
    edge = inner - jnp.array([0.95, 0.0])
    flat = (length * jnp.cos(angle) - 0.95) * edge[1] - length * jnp.sin(angle) * edge[0]
    flat = flat / jnp.linalg.norm(edge)
    return flat if len(place) == 2 else jnp.maximum(flat, jnp.abs(place[2]) - 0.3)


def _blob(place, axes, phases):
    """Return about the distance to a ball whose radius waves with direction; it lies within the unit sphere."""
    axes = 3.0 * axes / jnp.linalg.norm(axes, axis=1, keepdims=True)
    length = _norm(place)
    waves = jnp.einsum("wi,i...->w...", axes, place / length) + phases.reshape(-1, *[1] * (place.ndim - 1))
    return length - (0.68 + 0.065 * jnp.sum(jnp.sin(waves), axis=0))


_FORMS = {
    "disk": _disk, "ring": _ring, "square": _square, "cross": _cross, "bar": _bar, "crescent": _crescent, "star": _star
}  # fmt: skip
