"""Fresh variants of labelled images: a random deformation of image and mask, and noise on the image."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.types import KeyArray
from jaxmed.arrays.warping import sample
from jaxmed.synthesis.deformation import DeformationConfig, draw_deformation


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How variants differ from what is in the files.

    Attributes:
        noise: Standard deviation of normal noise on images in [0, 1], which are then clipped.
        deformation: Ranges; still by default.
    """

    noise: float = 0.0
    deformation: DeformationConfig = DeformationConfig(rotation=0.0, shear=0.0, scaling=0.0, amplitude=0.0)

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"noise: expected 0 or more, found {self.noise:g}")

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
    shape_key, noise_key = jax.random.split(key)
    if not config.is_still:
        shape = images.shape[1:]

        def deform(key: Array, image: Array, mask: Array) -> tuple[Array, Array]:
            places, _ = draw_deformation(key, shape, shape, config.deformation)
            return sample(image[..., None], places)[..., 0], sample(mask[..., None], places)[..., 0]

        images, masks = jax.vmap(deform)(jax.random.split(shape_key, len(images)), images, masks)
        masks = (masks > 0.5).astype(images.dtype)
    if config.noise:
        images = jnp.clip(images + config.noise * jax.random.normal(noise_key, images.shape), 0.0, 1.0)
    return images, masks
