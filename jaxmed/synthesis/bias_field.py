"""Random smooth bias fields: a gain that multiplies the image, drawn in the logarithm.

Source: BrainFM's generator, step 12, in its authors' public code.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmed.config import FractionRange, Range, checked
from jaxmed.synthesis.control_grid import Photo, draw_field


@dataclasses.dataclass(frozen=True)
@checked
class BiasFieldConfig:
    """Ranges of the field.

    Attributes:
        control_scale: FractionRange of control points per voxel.
        std: Range of the standard deviation of the control values, of the natural logarithm of the gain.
    """

    control_scale: FractionRange = (0.02, 0.04)
    std: Range = (0.1, 0.6)


SEVERE = BiasFieldConfig()
MILD = BiasFieldConfig(control_scale=(0.01, 0.02), std=(0.0, 0.02))


def draw_log_bias(
    key: Key[Array, ""],
    shape: tuple[int, ...],
    config: BiasFieldConfig = BiasFieldConfig(),
    photo: Photo | None = None,
) -> Float[Array, "*space"]:
    """Draw the logarithm of a gain; it is the target of bias regression.

    Args:
        key: Consumed.
        shape: Shape of the image, 2D or 3D.
        config: Ranges.
        photo: In photo mode each slab has its own gain along axis 1.
    """
    std_key, field_key = jax.random.split(key)
    std = jax.random.uniform(std_key, (), minval=config.std[0], maxval=config.std[1])
    return draw_field(field_key, shape, config.control_scale, std, 1, photo)[..., 0]


def apply_bias(image: Float[Array, "*space"], log_bias: Float[Array, "*space"]) -> Float[Array, "*space"]:
    """Multiply an image by its gain."""
    return image * jnp.exp(log_bias)
