"""Perturbed images on the device: another phase, an affine move in mm about the centre, noise.

Source: MUPM's code, steps b3 of the method. Deviation: what the release feeds its model is an array of zeros, for it
fills the normalised image with 0; here every perturbed image is tested to hold a picture.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmed.config import Decay, NonNegative, Share, Size, checked
from jaxmed.data.augment import affine_places, noise, warp


@dataclasses.dataclass(frozen=True)
@checked
class ImageConfig:
    """Ranges of the perturbation; each is drawn evenly between minus and plus the value.

    Attributes:
        rotation: Angle about every axis, in degrees.
        zoom: Deviation of the scale of every axis from 1.
        shear: Angle of every shear, in degrees.
        shift: Share of the image's size along every axis.
        noise: Standard deviation of Gaussian noise on intensities in [0, 1].
        phase: Whether one phase of a cine is drawn; otherwise the first is taken.
        batch: Images moved at once on the device: what memory holds.
    """

    rotation: NonNegative = 15.0
    zoom: Decay = 0.2
    shear: NonNegative = 5.0
    shift: Share = 0.15
    noise: NonNegative = 0.1
    phase: bool = True
    batch: Size = 8

    def __post_init__(self) -> None:
        for name in ("rotation", "shear"):
            if getattr(self, name) >= 90:
                raise ValueError(f"{name}: expected an angle below 90 degrees, found {getattr(self, name)}")


FACTORS: dict[str, dict[str, float | bool]] = {
    "phase": {"phase": False},
    "affine": {"rotation": 0.0, "zoom": 0.0, "shear": 0.0, "shift": 0.0},
    "noise": {"noise": 0.0},
}
"""What is held still where a factor of the perturbation is left out."""


def hold_still(config: ImageConfig, factor: str) -> ImageConfig:
    """Return the perturbation without one of its `FACTORS`."""
    return dataclasses.replace(config, **FACTORS[factor])  # pyright: ignore[reportArgumentType]


def perturb_images(
    keys: Key[Array, " draw"], cine: Float[Array, "phase *space"], spacing: Sequence[float], config: ImageConfig
) -> Float[Array, "draw *space"]:
    """Return one perturbed image per key, of intensities from 0 to 1.

    Args:
        keys: Consumed; one names a perturbation, whatever else is in the batch.
        cine: Phases of an image, or one.
        spacing: Of its voxels, in mm.
        config: Ranges.
    """
    return jax.lax.map(partial(_perturb, cine=cine, spacing=spacing, config=config), keys, batch_size=config.batch)


def draw_move(
    key: Key[Array, ""], shape: tuple[int, ...], spacing: Sequence[float], config: ImageConfig
) -> Float[Array, "axis axis+1"]:
    """Draw an affine move: rotate, scale, shear, shift, in mm about the centre.

    Returns:
        As `data.augment.draw_affine`: from the offset of an output voxel from the centre to that of the voxel it shows.
    """
    ndim = len(shape)
    rotation_key, zoom_key, shear_key, shift_key = jax.random.split(key, 4)

    def even(key: Array, shape: tuple[int, ...]) -> Array:
        return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)

    angles = jnp.deg2rad(config.rotation) * even(rotation_key, (1 if ndim == 2 else 3,))
    zooms = 1 + config.zoom * even(zoom_key, (ndim,))
    shears = jnp.tan(jnp.deg2rad(config.shear) * even(shear_key, (ndim, ndim))) * (1 - jnp.eye(ndim))
    sizes = jnp.array(spacing)
    shift = config.shift * even(shift_key, (ndim,)) * jnp.array(shape) * sizes
    return move(rotation_matrix(angles), zooms, shears, shift, sizes)


def move(
    rotation: Float[Array, "axis axis"], zooms: Float[Array, " axis"], shears: Float[Array, "axis axis"],
    shift: Float[Array, " axis"], spacing: Float[Array, " axis"],
) -> Float[Array, "axis axis+1"]:  # fmt: skip
    """Turn a move in mm into where each output voxel looks; see `draw_move`."""
    ndim = len(zooms)
    product = partial(jnp.matmul, precision="highest")  # accelerators round a plain product to three digits
    forwards = product(jnp.eye(ndim) + shears, zooms[:, None] * rotation)
    backwards = jnp.linalg.inv(forwards)
    linear = backwards * spacing / spacing[:, None]
    return jnp.concatenate([linear, -(product(backwards, shift) / spacing)[:, None]], axis=1)


def rotation_matrix(angles: Float[Array, " angle"]) -> Float[Array, "axis axis"]:
    """Return the rotation by one angle in the plane, or in the planes yz, xz and xy after one another."""
    planes = [(0, 1)] if len(angles) == 1 else [(1, 2), (0, 2), (0, 1)]
    ndim = 2 if len(angles) == 1 else 3
    found = jnp.eye(ndim)
    for angle, (first, second) in zip(angles, planes, strict=True):
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        turn = jnp.eye(ndim).at[first, first].set(cosine).at[second, second].set(cosine)
        turn = turn.at[first, second].set(-sine).at[second, first].set(sine)
        found = jnp.matmul(turn, found, precision="highest")
    return found


def _perturb(key: Array, cine: Array, spacing: Sequence[float], config: ImageConfig) -> Array:
    phase_key, move_key, noise_key = jax.random.split(key, 3)
    phase = jax.random.randint(phase_key, (), 0, len(cine)) if config.phase else 0
    image = cine[phase][..., None]
    places = affine_places(draw_move(move_key, cine.shape[1:], spacing, config), cine.shape[1:])
    moved = noise(noise_key, warp(image, places), (config.noise, config.noise))[..., 0]
    low, high = moved.min(), moved.max()
    return (moved - low) / jnp.where(high > low, high - low, 1)
