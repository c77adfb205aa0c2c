"""The KL autoencoder of MAISI, for images and volumes: an image to a Gaussian over latents, and a latent to an image.

Encoder levels of residual blocks, halved between levels by a strided convolution with one zero behind each axis;
decoder levels of as many, doubled by linear interpolation and a convolution. A norm stands before the last convolution
of both, without an activation. Sizes are free: halving rounds down, so that the image of a latent is as large as the
one it came from where that had multiples of `divisor` voxels.

Source: MONAI, AutoencoderKlMaisi; sizes of CoCoLIT, arXiv:2508.01292, official code.
Deviation: convolutions are not cut into overlapping halves, which changes nothing at the released sizes; norms are
float32 throughout; biases start at 0, PyTorch draws them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Size, checked
from jaxmed.nn.convolution import Convolution
from jaxmed.nn.group_norm import GroupNorm
from jaxmed.nn.model import make_model
from jaxmed.nn.unet_blocks import BlockConfig, ResidualBlock, double_linearly

LOG_VARIANCES = (-30.0, 20.0)  # where the logarithm of the variance is cut off
EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
@checked
class AutoencoderKlConfig:
    """A KL autoencoder.

    Attributes:
        dimensions: Spatial axes.
        channels: Channels of the image.
        outputs: Channels of the reconstruction.
        latent_channels: Channels of a latent.
        widths: Channels of each level, finest first.
        blocks: Residual blocks of each level, in encoder and decoder.
        groups: Groups of the norms; a divisor of every level's channels.
        dtype: Type of activations and products; norms, latents and reconstructions are float32.
        remat: Recompute blocks in the backward pass: less memory, a third more work.
    """

    dimensions: Literal[2, 3] = 3
    channels: Size = 1
    outputs: Size = 1
    latent_channels: Size = 4
    widths: tuple[Size, ...] = (64, 128, 256)
    blocks: tuple[Size, ...] = (2, 2, 2)
    groups: Size = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        if not self.widths or len(self.blocks) != len(self.widths):
            raise ValueError(f"blocks: expected a number for each of {len(self.widths)} widths, found {self.blocks}")
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"groups: expected a divisor of all of {self.widths} channels, found {self.groups}")

    @property
    def divisor(self) -> int:
        """Voxels of the image that one of the latent stands for, along an axis."""
        return 2 ** (len(self.widths) - 1)

    @property
    def block(self) -> BlockConfig:
        """What all blocks share."""
        return BlockConfig(self.groups, EPSILON, self.dtype, zero_start=False)


class AutoencoderKl(nn.Module):
    """An image to its reconstruction; parts are encoder, to_mean, to_log_variance, from_latent and decoder."""

    config: AutoencoderKlConfig

    def setup(self) -> None:
        config = self.config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.to_mean, self.to_log_variance, self.from_latent = (
            Convolution(config.latent_channels, size=1) for _ in range(3)
        )

    def __call__(
        self, image: Float[Array, "batch *space channel"], *, key: Any = None
    ) -> tuple[
        Float[Array, "batch *space2 output"], Float[Array, "batch *grid latent"], Float[Array, "batch *grid latent"]
    ]:
        """Return the reconstruction, and mean and deviation of the latent.

        Args:
            image: One, or more, with any number of voxels.
            key: Draws the latent that is decoded; the mean is decoded where None.
        """
        mean, deviation = self.encode(image)
        latent = mean if key is None else mean + deviation * jax.random.normal(key, mean.shape)
        return self.decode(latent), mean, deviation

    def encode(
        self, image: Float[Array, "batch *space channel"]
    ) -> tuple[Float[Array, "batch *grid latent"], Float[Array, "batch *grid latent"]]:
        """Return mean and deviation of the latent; the mean is what a diffusion model calls the latent."""
        config = self.config
        if image.ndim != config.dimensions + 2 or image.shape[-1] != config.channels:
            expected = f"{config.dimensions} axes of space and {config.channels} channels"
            raise ValueError(f"image: expected {expected}, got {image.shape}")
        if min(image.shape[1:-1]) < config.divisor:
            raise ValueError(f"image: expected {config.divisor} voxels or more along each axis, got {image.shape}")
        h = self.encoder(image)
        return self.to_mean(h), jnp.exp(0.5 * jnp.clip(self.to_log_variance(h), *LOG_VARIANCES))

    def decode(self, latent: Float[Array, "batch *grid latent"]) -> Float[Array, "batch *space output"]:
        """Return the image of a latent, `divisor` times as large along each axis."""
        return self.decoder(self.from_latent(latent))


class Encoder(nn.Module):
    """An image to the features that mean and variance are linear in."""

    config: AutoencoderKlConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, self.config.dtype
        block = nn.remat(ResidualBlock) if config.remat else ResidualBlock
        h = Convolution(config.widths[0], dtype=dtype, name="stem")(x)
        for level, (width, count) in enumerate(zip(config.widths, config.blocks, strict=True)):
            for number in range(count):
                h = block(config.block, width, name=f"block_{level}_{number}")(h)
            if level + 1 < len(config.widths):
                h = Convolution(width, stride=2, dtype=dtype, edges=(0, 1), name=f"down_{level}")(h)
        h = GroupNorm(config.groups, EPSILON, name="norm")(h)
        return Convolution(config.latent_channels, name="head")(h)


class Decoder(nn.Module):
    """Features to an image; levels are numbered as the encoder's."""

    config: AutoencoderKlConfig

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        config, dtype = self.config, self.config.dtype
        block = nn.remat(ResidualBlock) if config.remat else ResidualBlock
        h = Convolution(config.widths[-1], dtype=dtype, name="stem")(h)
        for level in reversed(range(len(config.widths))):
            for number in range(config.blocks[level]):
                h = block(config.block, config.widths[level], name=f"block_{level}_{number}")(h)
            if level:
                h = Convolution(config.widths[level], dtype=dtype, name=f"up_{level}")(double_linearly(h))
        h = GroupNorm(config.groups, EPSILON, name="norm")(h)
        return Convolution(config.outputs, name="head")(h)


class Autoencoder(NamedTuple):
    """A KL autoencoder as pure functions of batches, channels last.

    Attributes:
        init: `init(key, image) -> params`, float32.
        apply: `apply(params, image, key=None) -> (reconstruction, mean, deviation)`; a key draws the latent.
        encode: `encode(params, image) -> (mean, deviation)` of the latent.
        decode: `decode(params, latent) -> image`; it reads the parameters "from_latent" and "decoder" alone.
    """

    init: Callable[..., Params]
    apply: Callable[..., Any]
    encode: Callable[..., tuple[Array, Array]]
    decode: Callable[..., Array]


def autoencoder(config: AutoencoderKlConfig) -> Autoencoder:
    """Return the autoencoder of some sizes; images are [batch, *space, channel], latents [batch, *grid, channel]."""
    model = make_model(AutoencoderKl(config))

    def init(key: KeyArray, image: Float[Array, "batch *space channel"]) -> Params:
        # Each draw of threefry is a loop of its own to the compiler, see `unet_guided.guided_unet`.
        key = jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl="rbg")
        return model.init(key, image)

    def encode(params: Params, image: Float[Array, "batch *space channel"]) -> tuple[Array, Array]:
        return model.apply(params, image, method="encode")

    def decode(params: Params, latent: Float[Array, "batch *grid latent"]) -> Array:
        return model.apply(params, latent, method="decode")

    return Autoencoder(init, model.apply, encode, decode)


# Parameters are split by their size alone, as `train.mesh.param_shardings` does without rules.
SHARDING_RULES = ()

COCOLIT_AUTOENCODER = AutoencoderKlConfig()
