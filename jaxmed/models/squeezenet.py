"""SqueezeNet 1.1 as LPIPS looks through it: features of seven depths, and how different two images are.

Source: Iandola et al., arXiv:1602.07360, and torchvision (squeezenet1_1: first window of 3, pools after the 1st, 3rd
and 5th layer); Zhang et al., arXiv:1801.03924, equation 1, and the authors' LPIPS 0.1 (net "squeeze").
Deviation: features are divided by the root of the sum of their squares plus 1e-20, so that a voxel whose features are
all 0 has a gradient; distances change by less than rounding.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.config import checked
from jaxmed.nn.convolution import Convolution
from jaxmed.nn.model import Model, make_model

STEM = 64
FIRES = ((3, 16, 128), (4, 16, 128), (6, 32, 256), (7, 32, 256), (9, 48, 384), (10, 48, 384), (11, 64, 512),
         (12, 64, 512))  # fmt: skip
"""Number of a fire module in torchvision's list, channels it squeezes to, and channels it expands to."""
POOLED = (3, 6, 9)
"""Modules before which is pooled."""
READ = (4, 7, 9, 10, 11, 12)
"""Modules after which LPIPS reads, beside the first convolution."""
WIDTHS = (STEM, *(width for number, _, width in FIRES if number in READ))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of LPIPS's first layer, for images from -1 to 1; an image of one channel becomes three."""
LEAST = 17
"""Pixels along an axis below which the last pool has nothing left."""


@dataclasses.dataclass(frozen=True)
@checked
class LpipsConfig:
    """The network of LPIPS; its sizes are fixed.

    Attributes:
        dtype: Type of activations and products; distances are float32.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"


class Fire(nn.Module):
    """Squeeze to few channels, expand by windows of 1 and of 3; parts are squeeze, expand_1 and expand_3."""

    squeezed: int
    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "image row column channel"]) -> Float[Array, "image row column width"]:
        x = nn.relu(Convolution(self.squeezed, 1, dtype=self.dtype, name="squeeze")(x))
        both = [
            Convolution(self.width // 2, edge, dtype=self.dtype, name=f"expand_{edge}")(x) for edge in (1, 3)
        ]  # fmt: skip
        return nn.relu(jnp.concatenate(both, -1))


class SqueezeFeatures(nn.Module):
    """Images to the activations that LPIPS reads; parts are stem and fire_N."""

    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "image row column 3"]) -> tuple[Array, ...]:
        x = nn.relu(Convolution(STEM, 3, stride=2, dtype=self.dtype, edges=(0, 0), name="stem")(x))
        found = [x]
        for number, squeezed, width in FIRES:
            if number in POOLED:
                x = pool(x)
            x = Fire(squeezed, width, self.dtype, name=f"fire_{number}")(x)
            if number in READ:
                found.append(x)
        return tuple(found)


class Lpips(nn.Module):
    """Two batches of images to the distance of each pair; parts are features and lin."""

    config: LpipsConfig = LpipsConfig()

    @nn.compact
    def __call__(
        self, one: Float[Array, "image row column channel"], other: Float[Array, "image row column channel"]
    ) -> Float[Array, " image"]:
        if one.shape != other.shape or one.shape[-1] not in (1, 3) or min(one.shape[1:3]) < LEAST:
            expected = f"two batches of one shape, 1 or 3 channels, {LEAST} pixels or more along each axis"
            raise ValueError(f"images: expected {expected}, got {one.shape} and {other.shape}")
        both = (jnp.concatenate([one, other]) - jnp.array(SHIFT)) / jnp.array(SCALE)
        features = SqueezeFeatures(self.config.dtype, name="features")(both)
        weights = Linear(name="lin")()
        total = jnp.zeros(len(one))
        for found, weight in zip(features, weights, strict=True):
            first, second = jnp.split(unit_length(found.astype(jnp.float32)), 2)
            total += (jnp.square(first - second) @ weight).mean((1, 2))
        return total


class Linear(nn.Module):
    """How much each channel counts, at each depth."""

    @nn.compact
    def __call__(self) -> tuple[Float[Array, " channel"], ...]:
        start = nn.initializers.constant
        return tuple(
            jnp.asarray(self.param(f"level_{level}", start(1 / width), (width,))) for level, width in enumerate(WIDTHS)
        )  # fmt: skip


def pool(x: Float[Array, "image row column channel"]) -> Float[Array, "image row2 column2 channel"]:
    """Return the largest of every 3 x 3 pixels, two apart; a window may reach beyond the end, as in ceil_mode."""
    ends = tuple((0, (length - 3) % 2) for length in x.shape[1:3])
    return nn.max_pool(x, (3, 3), (2, 2), ends)  # pyright: ignore[reportArgumentType] (flax says str alone)


def unit_length(x: Float[Array, "*pixel channel"]) -> Float[Array, "*pixel channel"]:
    """Divide each pixel's features by their length."""
    return x / (jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-20) + 1e-10)


def lpips(config: LpipsConfig = LpipsConfig()) -> Model:
    """Return LPIPS by SqueezeNet: `apply(params, one, other)`, the distance of each pair of images."""
    return make_model(Lpips(config))


# Parameters are few and never trained: every device has them all.
SHARDING_RULES = ()
