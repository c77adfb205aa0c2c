"""Affine registration of images, tissue maps or label maps, by optimisation; on the device.

Centres of mass and sizes are brought together first, then a matrix exponential is improved by Adam, from blurred to
sharp. Places are in mm of each image's own affine, so that grids may be of any spacing and orientation.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxmed.arrays.filters import gaussian_blur
from jaxmed.arrays.histogram import mutual_information
from jaxmed.arrays.warping import identity_grid, sample
from jaxmed.config import Count, NonNegative, Positive, checked

PULL = 60.0
"""Distance in mm at which a change of the matrix moves a place as far as the same change of the shift."""
TAPS = 4
"""Taps to either side per voxel of blur: enough where the moving image's voxels are somewhat smaller."""
SQUARINGS, TERMS = 4, 5


@dataclasses.dataclass(frozen=True)
@checked
class RegistrationConfig:
    """How two images are aligned.

    Attributes:
        similarity: "squares" for images of one scale, such as tissue or label shares; "correlation" for one contrast;
            "information" (mutual) for any two contrasts, of single-channel images.
        kind: Rotation and shift, or any affine map.
        blurs: Standard deviations of the Gaussian, in voxels of the fixed image, one per level; the moving one is
            blurred as much in mm.
        steps: Of each level.
        rate: First length of a step, in mm; it falls to nothing.
    """

    similarity: Literal["squares", "correlation", "information"] = "squares"
    kind: Literal["rigid", "affine"] = "affine"
    blurs: tuple[NonNegative, ...] = (3.0, 1.5, 0.7)
    steps: Count = 160
    rate: Positive = 2.0


class Registration(NamedTuple):
    """An alignment.

    Attributes:
        matrix: Place in the fixed image, in mm, to the place in the moving one.
        loss: What was left, at every step of every level.
    """

    matrix: Float[Array, "4 4"]
    loss: Float[Array, "level step"]


def register_affine(
    fixed: Float[Array, "x y z channel"],
    fixed_affine: Float[Array, "4 4"],
    moving: Float[Array, "i j k channel"],
    moving_affine: Float[Array, "4 4"],
    config: RegistrationConfig = RegistrationConfig(),
) -> Registration:
    """Find the affine map under which the moving image looks like the fixed one.

    Args:
        fixed: Not negative, background near 0.
        fixed_affine: Voxel to mm.
        moving: Likewise, with the same channels.
        moving_affine: Voxel to mm.
        config: Static.
    """
    places = _world(fixed_affine, identity_grid(fixed.shape[:3]))
    fixed_center, fixed_size = _moments(fixed, places)
    center, size = _moments(moving, _world(moving_affine, identity_grid(moving.shape[:3])))
    scale = size / fixed_size if config.kind == "affine" else jnp.ones(())
    inverse = jnp.linalg.inv(moving_affine)
    around = (places - fixed_center) * scale
    # Voxels of the moving image per voxel of the fixed one, along each axis of both.
    spacing, moving_spacing = (jnp.linalg.norm(one[:3, :3], axis=0) for one in (fixed_affine, moving_affine))
    ratios = spacing.mean() / spacing, scale * spacing.mean() / moving_spacing

    def matrix_of(parameters: Float[Array, " parameter"]) -> tuple[Array, Array]:
        return _exponential(parameters[3:] / PULL), center + parameters[:3]

    losses = []
    parameters = jnp.zeros(6 if config.kind == "rigid" else 12)
    for blur in config.blurs:
        radius = max(1, round(TAPS * blur))
        target, sharp = (
            gaussian_blur(image, list(blur * ratio), radius, axes=(0, 1, 2))
            for image, ratio in zip((fixed, moving), ratios, strict=True)
        )

        def loss(parameters: Array, sharp: Array = sharp, target: Array = target) -> Array:
            matrix, shift = matrix_of(parameters)
            reached = _world(jnp.column_stack([matrix, shift]), around)
            found = sample(sharp, _world(inverse, reached), fill=0.0)
            return dissimilarity(found, target, config.similarity)

        parameters, history = _descend(loss, parameters, config)
        losses.append(history)
    matrix, shift = matrix_of(parameters)
    matrix = matrix * scale
    whole = jnp.eye(4).at[:3, :3].set(matrix).at[:3, 3].set(shift - matrix @ fixed_center)
    return Registration(whole, jnp.stack(losses))


def dissimilarity(
    found: Float[Array, "x y z channel"], target: Float[Array, "x y z channel"], similarity: str
) -> Float[Array, ""]:
    """Return how unlike two images are: 0 for equal ones with "squares" and "correlation"."""
    match similarity:
        case "squares":
            return ((found - target) ** 2).mean() / jnp.maximum((target**2).mean(), 1e-12)
        case "correlation":
            one, two = found - found.mean((0, 1, 2)), target - target.mean((0, 1, 2))
            length = jnp.sqrt((one**2).sum() * (two**2).sum() + 1e-12)
            return 1 - (one * two).sum() / length
        case _:
            return -mutual_information(found.reshape(-1), target.reshape(-1))


def _descend(loss, parameters, config):
    """Improve the parameters by Adam, whose steps shorten to nothing; keep the best."""
    optimizer = optax.adam(optax.cosine_decay_schedule(config.rate, config.steps))

    def step(carry, _):
        parameters, state, best, least = carry
        value, slope = jax.value_and_grad(loss)(parameters)
        best = jnp.where(value < least, parameters, best)
        change, state = optimizer.update(slope, state)
        carry = parameters + change, state, best, jnp.minimum(value, least)
        return carry, value

    start = parameters, optimizer.init(parameters), parameters, jnp.array(jnp.inf)
    (_, _, best, _), history = jax.lax.scan(step, start, length=config.steps)
    return best, history


def _exponential(entries: Float[Array, " entry"]) -> Float[Array, "3 3"]:
    """Return a rotation for three numbers, any orientation-keeping matrix for nine: by squaring a Taylor sum."""
    if len(entries) == 3:
        x, y, z = entries
        zero = jnp.zeros(())
        entries = jnp.stack([zero, -z, y, z, zero, -x, -y, x, zero])
    small = entries.reshape(3, 3) / 2**SQUARINGS
    result = jnp.eye(3)
    for term in range(TERMS, 0, -1):
        result = jnp.eye(3) + _product(small, result) / term
    for _ in range(SQUARINGS):
        result = _product(result, result)
    return result


def _product(one: Float[Array, "3 3"], two: Float[Array, "3 3"]) -> Float[Array, "3 3"]:
    return jnp.matmul(one, two, precision=jax.lax.Precision.HIGHEST)


def _moments(image, places):
    """Return centre and size in mm: the standard deviation of the distance, over all channels."""
    weights = jnp.maximum(image.sum(-1), 0.0)[..., None]
    total = jnp.maximum(weights.sum(), 1e-12)
    center = (weights * places).sum((0, 1, 2)) / total
    return center, jnp.sqrt((weights * (places - center) ** 2).sum() / total)


def _world(affine, places):
    """Apply an affine; in full precision, or accelerators would lose millimetres."""
    moved = jnp.einsum("ij,...j->...i", affine[:3, :3], places, precision=jax.lax.Precision.HIGHEST)
    return moved + affine[:3, 3]
