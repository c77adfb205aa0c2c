"""Fresh variants of labelled images: image and mask mirrored, moved and deformed, and noise on the image."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.types import KeyArray
from jaxmed.arrays.warping import sample
from jaxmed.config import Length, NonNegative, checked
from jaxmed.synthesis.deformation import DeformationConfig, draw_deformation


@dataclasses.dataclass(frozen=True)
@checked
class AugmentConfig:
    """How variants differ from what is in the files.

    Attributes:
        noise: Standard deviation of normal noise on images in [0, 1], which are then clipped.
        shift: Largest move along each axis, in whole voxels, which leaves noise as it is; edges are repeated.
        mirror: Whether each axis is turned around in half of the variants.
        deformation: Ranges; still by default.
    """

    noise: NonNegative = 0.0
    shift: Length = 0
    mirror: bool = False
    deformation: DeformationConfig = DeformationConfig(rotation=0.0, shear=0.0, scaling=0.0, amplitude=0.0)

    def __post_init__(self) -> None:
        for name in ("noise", "shift"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, found {getattr(self, name):g}")

    @property
    def is_still(self) -> bool:
        """Whether shapes stay as they are."""
        found = self.deformation
        return not (found.rotation or found.shear or found.scaling or found.amplitude)


@functools.partial(jax.jit, static_argnums=1)
def augment(
    key: KeyArray, config: AugmentConfig, images: Float[Array, "image *space"], masks: Float[Array, "image *space"]
) -> tuple[Float[Array, "image *space"], Float[Array, "image *space"]]:
    """Return a variant of each image and its mask.

    Args:
        key: Consumed.
        config: Ranges.
        images: In [0, 1].
        masks: 0 or 1; stay so.
    """
    shape_key, noise_key, move_key, mirror_key = jax.random.split(key, 4)
    shape = images.shape[1:]
    pairs = jnp.stack([images, masks], axis=1)
    if config.mirror:
        turns = jax.random.bernoulli(mirror_key, shape=(len(images), len(shape)))
        for axis in range(len(shape)):
            is_turned = turns[:, axis].reshape(-1, *(1,) * (pairs.ndim - 1))
            pairs = jnp.where(is_turned, jnp.flip(pairs, axis + 2), pairs)
    if config.shift:
        padded = jnp.pad(pairs, [(0, 0), (0, 0)] + [(config.shift, config.shift)] * len(shape), mode="edge")
        starts = jax.random.randint(move_key, (len(images), len(shape)), 0, 2 * config.shift + 1)
        pairs = jax.vmap(lambda pair, start: jax.lax.dynamic_slice(pair, (0, *start), pair.shape[:1] + shape))(
            padded, starts
        )
    images, masks = pairs[:, 0], pairs[:, 1]
    if not config.is_still:

        def deform(key: Array, image: Array, mask: Array) -> tuple[Array, Array]:
            places, _ = draw_deformation(key, shape, shape, config.deformation)
            return sample(image[..., None], places)[..., 0], sample(mask[..., None], places)[..., 0]

        images, masks = jax.vmap(deform)(jax.random.split(shape_key, len(images)), images, masks)
        masks = (masks > 0.5).astype(images.dtype)
    if config.noise:
        images = jnp.clip(images + config.noise * jax.random.normal(noise_key, images.shape), 0.0, 1.0)
    return images, masks
