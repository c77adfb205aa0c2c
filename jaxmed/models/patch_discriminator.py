"""The patch discriminator of pix2pix for images and volumes: a logit for each overlapping patch.

Convolutions of window 4 with one zero around: `layers` of them halve, one more does not, each followed by a norm of
every channel of every image by itself (not the first one) and by a leaky rectifier; a last one gives the logits.

Source: Isola et al., arXiv:1611.07004; MONAI, PatchDiscriminator; sizes of CoCoLIT, arXiv:2508.01292, official code.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.config import Size, checked
from jaxmed.nn.convolution import Convolution
from jaxmed.nn.model import Model, make_model

WINDOW, SLOPE, EPSILON = 4, 0.2, 1e-5


@dataclasses.dataclass(frozen=True)
@checked
class PatchDiscriminatorConfig:
    """A patch discriminator.

    Attributes:
        dimensions: Spatial axes.
        channels: Channels of the image.
        width: Channels of the first layer; each further one has twice as many.
        layers: Layers that halve.
        dtype: Type of activations and products; norms and logits are float32.
    """

    dimensions: Literal[2, 3] = 3
    channels: Size = 1
    width: Size = 32
    layers: Size = 3
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def least_size(self) -> int:
        """Voxels along an axis below which no logit is left."""
        return 3 * 2**self.layers  # the last two convolutions take one voxel each


class PatchDiscriminator(nn.Module):
    """Images to logits of patches; parts are layer_0 to layer_N and head."""

    config: PatchDiscriminatorConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch *space channel"]) -> Float[Array, "batch *space2 1"]:
        config = self.config
        if x.ndim != config.dimensions + 2 or x.shape[-1] != config.channels:
            expected = f"{config.dimensions} axes of space and {config.channels} channels"
            raise ValueError(f"image: expected {expected}, got {x.shape}")
        if min(x.shape[1:-1]) < config.least_size:
            raise ValueError(f"image: expected {config.least_size} voxels or more along each axis, got {x.shape}")
        kernel_init = nn.initializers.normal(0.02)
        for layer in range(config.layers + 1):
            x = Convolution(
                config.width * 2**layer, WINDOW, stride=1 if layer == config.layers else 2, dtype=config.dtype,
                kernel_init=kernel_init, use_bias=layer == 0, edges=(1, 1), name=f"layer_{layer}",
            )(x)  # fmt: skip
            x = nn.leaky_relu(normalise_channels(x) if layer else x, SLOPE)
        head = Convolution(1, WINDOW, dtype=config.dtype, kernel_init=kernel_init, edges=(1, 1), name="head")
        return head(x).astype(jnp.float32)


def normalise_channels(x: Float[Array, "batch *space channel"]) -> Float[Array, "batch *space channel"]:
    """Give every channel of every image mean 0 and deviation 1 over space, in float32 (instance norm)."""
    axes = tuple(range(1, x.ndim - 1))
    x = x.astype(jnp.float32)
    centred = x - x.mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + EPSILON)


def patch_discriminator(config: PatchDiscriminatorConfig) -> Model:
    """Return the discriminator of some sizes: `apply(params, image)`, the logits."""
    return make_model(PatchDiscriminator(config))


# Parameters are split by their size alone, as `train.mesh.param_shardings` does without rules.
SHARDING_RULES = ()

COCOLIT_DISCRIMINATOR = PatchDiscriminatorConfig()
