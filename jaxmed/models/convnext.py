"""ConvNeXt V2 (arXiv:2301.00808) on 2D and 3D images, dense or with patches that it does not see.

A patch that is not seen is kept at zero before and after everything that looks at neighbours, so that what is seen is
what sparse convolutions would give, without a library for them. Patches are blocks of the coarsest grid, hence no
stride mixes what is seen with what is not.

Source: ConvNeXt V2; ProFound (arXiv:2603.03961), official code, for the three-dimensional network, whose last stage
keeps the grid of the one before.
"""

import dataclasses
import functools
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmed.arrays.masking import take_tokens
from jaxmed.arrays.patches import patch_grid
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Decay, Positive, Size, checked
from jaxmed.models.encoder import Encoder
from jaxmed.models.heads import Head, HeadConfig
from jaxmed.nn.convolution import Convolution
from jaxmed.nn.model import LayerRules, Model, make_model, nested_model
from jaxmed.nn.transformer import LayerNorm, Linear

EXPANSION = 4
TINY = 1e-12  # keeps the gradient of a norm finite where everything is 0
INIT = nn.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
@checked
class ConvNextConfig:
    """A ConvNeXt V2; the defaults are ProFound's.

    Attributes:
        image_size: Voxels along each spatial axis; two or three axes.
        channels: Of the image.
        depths: Blocks of each stage.
        widths: Channels of each stage.
        stem: Edge of the patches that enter the first stage, in voxels.
        strides: How much coarser each further stage is than the one before; its kernel has the same edge.
        kernel_size: Edge of the depthwise kernels; odd.
        epsilon: Added to the variance in layer norms.
        response_scope: Over what the norm of a channel's responses is taken: "sample", the voxels of one image, as in
            the dense network; "batch", those of all images of a batch, as in ProFound's sparse one.
        drop_path_rate: Probability of skipping the last block, growing linearly from 0 at the first.
        dtype: Type of the products.
        remat: Recompute blocks in the backward pass: less memory, a third more work.
    """

    image_size: tuple[Size, ...] = (64, 224, 224)
    channels: Size = 3
    depths: tuple[Size, ...] = (3, 3, 9, 3)
    widths: tuple[Size, ...] = (96, 192, 384, 768)
    stem: Size = 4
    strides: tuple[Size, ...] = (2, 2, 1)
    kernel_size: Size = 7
    epsilon: Positive = 1e-6
    response_scope: Literal["sample", "batch"] = "sample"
    drop_path_rate: Decay = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        if len(self.image_size) not in (2, 3):
            raise ValueError(f"image_size: expected 2 or 3 axes, found {self.image_size}")
        stages = len(self.depths)
        if len(self.widths) != stages or len(self.strides) != stages - 1:
            found = f"{stages} depths, {len(self.widths)} widths and {len(self.strides)} strides"
            raise ValueError(f"widths: expected as many as depths, and one stride less, found {found}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, found {self.kernel_size}")
        patch_grid(self.image_size, self.patch_size)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Voxels of the image along each axis of a place of the last stage."""
        return (self.stem * math.prod(self.strides),) * len(self.image_size)

    @property
    def grid(self) -> tuple[int, ...]:
        """Places of the last stage along each spatial axis."""
        return patch_grid(self.image_size, self.patch_size)

    @property
    def num_tokens(self) -> int:
        """Places of the last stage."""
        return math.prod(self.grid)


class ResponseNorm(nn.Module):
    """Global response normalisation: x grows with its channel's share of the response; equation 3 of ConvNeXt V2.

    y = scale x n / (mean of n over channels + epsilon) + bias + x, where n is the length of a channel over space.
    """

    epsilon: float = 1e-6
    over: Literal["sample", "batch"] = "sample"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *space channel"], seen: Float[Array, "batch *space 1"] | None = None
    ) -> Float[Array, "batch *space channel"]:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        axes = tuple(range(0 if self.over == "batch" else 1, x.ndim - 1))
        squares = jnp.square(x) if seen is None else jnp.square(x) * seen
        length = jnp.sqrt(jnp.maximum(squares.sum(axes, keepdims=True), TINY**2))
        share = length / (length.mean(axis=-1, keepdims=True) + self.epsilon)
        return scale * (x * share) + bias + x


class ConvNextBlock(nn.Module):
    """Depthwise convolution, layer norm, linear, GELU, response norm, linear; added to its input."""

    width: int
    kernel_size: int = 7
    epsilon: float = 1e-6
    over: Literal["sample", "batch"] = "sample"
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *space channel"],
        seen: Float[Array, "batch *space 1"] | None = None,
        skipped: Float[Array, " batch"] | None = None,
    ) -> Float[Array, "batch *space channel"]:
        """Return the block's output, float32; what is not seen stays 0 where it is 0.

        Args:
            x: Activations.
            seen: 1 where the image is seen, 0 elsewhere; everything by default.
            skipped: Factor of the branch for every image: stochastic depth.
        """
        depthwise = Convolution(
            self.width, self.kernel_size, groups=self.width, dtype=self.dtype, kernel_init=INIT, name="depthwise"
        )
        y = depthwise(x if seen is None else x * seen)
        y = LayerNorm(self.epsilon, name="norm")(y)
        y = Linear(EXPANSION * self.width, self.dtype, INIT, name="fc1")(y)
        y = nn.gelu(y, approximate=False)
        y = ResponseNorm(over=self.over, name="response")(y, seen)
        y = Linear(self.width, self.dtype, INIT, name="fc2")(y).astype(jnp.float32)
        if seen is not None:
            y = y * seen
        if skipped is not None:
            y = y * skipped.reshape(-1, *(1,) * (x.ndim - 1))
        return x + y


class ConvNext(nn.Module):
    """Image to the maps of all stages.

    Parameters are block_N, N running through the stages, and downsample_N with downsample_norm_N before block N, where
    0 is the stem.
    """

    config: ConvNextConfig

    def __call__(
        self,
        image: Float[Array, "batch ..."],
        kept: Int[Array, "batch keep"] | None = None,
        *,
        key: KeyArray | None = None,
    ) -> Float[Array, "batch token width"]:
        """Return a token for every place of the last stage, or for those that are kept, in their order.

        Args:
            image: [batch, *image_size, channels].
            kept: Patches that are seen; all by default.
            key: Switches stochastic depth on.
        """
        found = self.maps(image, None if kept is None else seen_map(kept, self.config.grid), key=key)[-1]
        tokens = found.reshape(found.shape[0], -1, found.shape[-1])
        return tokens if kept is None else take_tokens(tokens, kept)

    @nn.compact
    def maps(
        self,
        image: Float[Array, "batch ..."],
        seen: Bool[Array, "batch *grid"] | None = None,
        *,
        key: KeyArray | None = None,
    ) -> list[Float[Array, "batch *space width"]]:
        """Return the output of every stage, float32, finest first; 0 where a patch is not seen.

        Args:
            image: [batch, *image_size, channels].
            seen: Patches that are seen, on the grid of the last stage; all by default.
            key: Switches stochastic depth on.
        """
        config = self.config
        if image.shape[1:] != (*config.image_size, config.channels):
            raise ValueError(f"image: expected {(*config.image_size, config.channels)}, got {image.shape[1:]}")
        block_of = nn.remat(ConvNextBlock) if config.remat else ConvNextBlock
        x, mask, number, found = image, None, 0, []
        edges = (config.stem, *config.strides)
        for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            coarsen = Convolution(
                width, edges[stage], edges[stage], dtype=config.dtype, kernel_init=INIT, name=f"downsample_{number}"
            )
            norm = LayerNorm(config.epsilon, name=f"downsample_norm_{number}")
            x = coarsen(norm(x)).astype(jnp.float32) if stage else norm(coarsen(x))
            if seen is not None:
                mask = finer_map(seen, math.prod(config.strides[stage:]))[..., None].astype(jnp.float32)
                x = x * mask
            for _ in range(depth):
                block = block_of(
                    width, config.kernel_size, config.epsilon, config.response_scope, config.dtype,
                    name=f"block_{number}",
                )  # fmt: skip
                x = block(x, mask, self._factor(key, number, len(image)))
                number += 1
            found.append(x)
        return found

    def _factor(self, key: KeyArray | None, number: int, batch: int) -> Float[Array, " batch"] | None:
        """Return by what the branch of a block is multiplied for every image: 0, or 1 over the chance to be kept."""
        config = self.config
        rate = config.drop_path_rate * number / max(1, sum(config.depths) - 1)
        if key is None or not rate:
            return None
        is_kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, (batch,))
        return is_kept / jnp.float32(1 - rate)


def seen_map(kept: Int[Array, "batch keep"], grid: tuple[int, ...]) -> Bool[Array, "batch *grid"]:
    """Return which places of a grid are kept."""
    rows = jnp.arange(kept.shape[0])[:, None]
    return jnp.zeros((kept.shape[0], math.prod(grid)), bool).at[rows, kept].set(True).reshape(-1, *grid)


def finer_map(seen: Bool[Array, "batch *grid"], factor: int) -> Bool[Array, "batch *space"]:
    """Repeat every place along all axes of space."""
    for axis in range(1, seen.ndim):
        seen = jnp.repeat(seen, factor, axis=axis)
    return seen


@dataclasses.dataclass(frozen=True)
@checked
class ConvNextClassifierConfig:
    """A ConvNeXt and a head on the mean of its tokens; the defaults are ProFound's.

    Attributes:
        encoder: The network.
        head: What stands on it; its layer norm is the network's last.
    """

    encoder: ConvNextConfig = ConvNextConfig(drop_path_rate=0.1)
    head: HeadConfig = HeadConfig(pool="mean", hidden=256, hidden_layer="relu")

    def __post_init__(self) -> None:
        if self.head.pool != "mean":
            raise ValueError(f"head.pool: expected mean, of a network without a class token, found {self.head.pool}")


class ConvNextClassifier(nn.Module):
    """A ConvNeXt and a head; parameters are {"encoder": ..., "head": ...}."""

    config: ConvNextClassifierConfig

    def setup(self) -> None:
        self.encoder = ConvNext(self.config.encoder)
        self.head = Head(self.config.head, 0)

    def __call__(
        self, image: Float[Array, "batch ..."], *, key: KeyArray | None = None, training: bool = False
    ) -> tuple[Float[Array, "batch output"], dict[str, jax.Array]]:
        """Return logits and the moments of `Head`."""
        return self.head(self.encoder(image, key=key), training=training)


@functools.lru_cache(maxsize=128)
def convnext_model(config: ConvNextConfig) -> Model:
    """Return the network of parameters {"encoder": ...}, image to tokens."""
    return nested_model(make_model(ConvNext(config)), "encoder")


@functools.lru_cache(maxsize=128)
def convnext_encoder(config: ConvNextConfig) -> Encoder:
    """Return a ConvNeXt as an `Encoder`; heads that average its tokens bring the norm that follows."""
    model = make_model(ConvNext(config))

    def init(key: KeyArray) -> Params:
        return model.init(key, jnp.zeros((1, *config.image_size, config.channels)))

    return Encoder(
        config, config.image_size, config.channels, config.widths[-1], config.grid, init, model.apply,
        can_drop=True, is_random=config.drop_path_rate > 0, layers=LayerRules(sum(config.depths), (), LAYER),
    )  # fmt: skip


# Layer i + 1 is block i and what stands before it, the stem before block 0; the norm that follows is layer n + 1.
# Source: ProFound, official code ("single" layer decay).
LAYER = r"^encoder/(?:block|downsample|downsample_norm)_(\d+)/"

PROFOUND = ConvNextConfig()
# Blocks and channels of each stage. Source: ConvNeXt V2, arXiv:2301.00808, table 15, and ProFound, official code.
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": (PROFOUND.depths, PROFOUND.widths),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}


def of_size(config: ConvNextConfig, name: str) -> ConvNextConfig:
    """Return a network of one of SIZES, everything else as it is."""
    depths, widths = SIZES[name]
    return dataclasses.replace(config, depths=depths, widths=widths)
