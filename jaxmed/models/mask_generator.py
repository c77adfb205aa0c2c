"""From an image to the mask of what is sought: the fast system of self-play reasoning.

Source: arXiv:2506.22075; the plain network is that of the reference implementation, github.com/s-sd/system-II-vision:
    ten 3x3 convolutions with ReLU (32, then nine times 64 channels) and one more to a single channel, at full
    resolution, 314,817 parameters.
Deviation: the networks of the medical runs are not published; the default is a residual U-Net with group norms.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
from jaxtyping import Array, Float

from jaxmed.config import Size, checked
from jaxmed.models.unet_guided import GuidedUnet, GuidedUnetConfig
from jaxmed.nn.convolution import Convolution
from jaxmed.nn.model import Model, make_model


@dataclasses.dataclass(frozen=True)
@checked
class GeneratorConfig:
    """A segmenting network.

    Attributes:
        kind: "unet", or "plain", the reference's stack of convolutions.
        dimensions: Spatial axes.
        widths: Channels of each level of the U-Net, multiples of the first; or of each plain convolution.
        blocks: Residual blocks of an encoder level of the U-Net.
        dtype: Type of activations and products.
    """

    kind: Literal["unet", "plain"] = "unet"
    dimensions: Literal[2, 3] = 2
    widths: tuple[Size, ...] = (16, 32, 64)
    blocks: Size = 1
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("widths: expected one or more, found none")
        if self.kind == "unet" and (self.widths[0] % 8 or any(width % self.widths[0] for width in self.widths)):
            raise ValueError(f"widths: expected multiples of the first, a multiple of 8; found {self.widths}")

    @property
    def divisor(self) -> int:
        """What the voxels along every axis must be a multiple of."""
        return 2 ** (len(self.widths) - 1) if self.kind == "unet" else 1


def make_generator(config: GeneratorConfig) -> Model:
    """Return the functions of a generator: images [batch *space 1] to logits [batch *space]."""
    return make_model(Generator(config))


class Generator(nn.Module):
    """Images to logits of the mask."""

    config: GeneratorConfig

    @nn.compact
    def __call__(self, image: Float[Array, "batch *space 1"]) -> Float[Array, "batch *space"]:
        config = self.config
        body = Plain(config, name="plain") if config.kind == "plain" else unet(config, 1, "unet")
        return body(image)[..., 0]


class Plain(nn.Module):
    """Convolutions at full resolution."""

    config: GeneratorConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch *space 1"]) -> Float[Array, "batch *space 1"]:
        glorot = nn.initializers.glorot_uniform()
        dtype = self.config.dtype
        for number, width in enumerate(self.config.widths):
            x = nn.relu(Convolution(width, dtype=dtype, kernel_init=glorot, name=f"layer_{number}")(x))
        return Convolution(1, dtype=dtype, kernel_init=glorot, name="head")(x).astype("float32")


def unet(config: GeneratorConfig, outputs: int, name: str) -> GuidedUnet:
    """Return a U-Net of these sizes without time and attention but in its middle."""
    first = config.widths[0]
    return GuidedUnet(
        GuidedUnetConfig(
            dimensions=config.dimensions,
            outputs=outputs,
            width=first,
            multipliers=tuple(width // first for width in config.widths),
            blocks=config.blocks,
            attention_factors=(),
            heads=2,
            groups=8,
            with_time=False,
            dtype=config.dtype,
        ),
        name=name,
    )


DEMO_GENERATOR = GeneratorConfig("plain", widths=(32, *(64,) * 9))
"""The reference's network for 32 x 32 digits."""
