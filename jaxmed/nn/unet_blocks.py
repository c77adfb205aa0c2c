"""Blocks and levels of U-Nets and autoencoders of images and volumes, channels last."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.nn.attention import AttentionKind, self_attention
from jaxmed.nn.convolution import Convolution
from jaxmed.nn.group_norm import GroupNorm
from jaxmed.nn.transformer import Linear


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What all blocks of a network share.

    Attributes:
        groups: Groups of the norms; a divisor of all channels.
        epsilon: Added to the variance in norms.
        dtype: Type of activations and products; norms and softmax are float32.
        scale_shift: Whether the time scales and shifts the second norm, or is added before it.
        dropout: Before the last convolution of a block, while a key is given.
        first_halved: The first axis of space that is halved and doubled.
        zero_start: Whether the last map of every branch starts at 0, so that a fresh block passes its input on.
    """

    groups: int = 32
    epsilon: float = 1e-5
    dtype: str = "float32"
    scale_shift: bool = False
    dropout: float = 0.0
    first_halved: int = 0
    zero_start: bool = True


@dataclasses.dataclass(frozen=True)
class LevelConfig:
    """One level of a U-Net.

    Attributes:
        block: What all blocks share.
        width: Channels.
        blocks: Residual blocks of an encoder level; a decoder level has one for each skip.
        attends: Whether attention follows each of them.
        heads: Attention heads.
        attention: See `nn.attention.self_attention`.
        has_out: Whether a linear map follows the attention.
        resample: How the encoder halves, and the decoder doubles, what leaves the level: inside a residual block (mean
            of 2, nearest), by a convolution (strided, or after the nearest neighbour), or not at all.
    """

    block: BlockConfig
    width: int
    blocks: int
    attends: bool = True
    heads: int = 1
    attention: AttentionKind = "auto"
    has_out: bool = True
    resample: Literal["none", "block", "convolution"] = "none"


class DownLevel(nn.Module):
    """Blocks of an encoder level, each followed by attention where the level has it; then halved."""

    config: LevelConfig

    @nn.compact
    def __call__(self, h: jax.Array, time: jax.Array | None, key: Any = None) -> tuple[jax.Array, list[jax.Array]]:
        """Return what leaves the level, and every skip in order."""
        config, width = self.config, self.config.width
        keys, skips = _split(key, config.blocks + 1), []
        for number in range(config.blocks):
            h = ResidualBlock(config.block, width, name=f"block_{number}")(h, time, keys[number])
            if config.attends:
                h = _attention(config, number)(h)
            skips.append(h)
        if config.resample == "block":
            skips.append(ResidualBlock(config.block, width, "down", name="resample")(h, time, keys[-1]))
        elif config.resample == "convolution":
            first, dtype = config.block.first_halved, config.block.dtype
            skips.append(Convolution(width, stride=2, unstrided=first, dtype=dtype, name="resample")(h))
        return skips[-1], skips


class Middle(nn.Module):
    """Block, attention, block at the coarsest level."""

    config: LevelConfig

    @nn.compact
    def __call__(self, h: jax.Array, time: jax.Array | None, key: Any = None) -> jax.Array:
        config, keys = self.config, _split(key, 2)
        h = ResidualBlock(config.block, config.width, name="block_0")(h, time, keys[0])
        h = _attention(config, 0)(h)
        return ResidualBlock(config.block, config.width, name="block_1")(h, time, keys[1])


class UpLevel(nn.Module):
    """Blocks of a decoder level, each taking a skip and followed by attention where the level has it; then doubled."""

    config: LevelConfig

    @nn.compact
    def __call__(self, h: jax.Array, skips: list[jax.Array], time: jax.Array | None, key: Any = None) -> jax.Array:
        config, width = self.config, self.config.width
        keys = _split(key, len(skips) + 1)
        for number, skip in enumerate(skips):
            h = jnp.concatenate([h, skip], axis=-1)
            h = ResidualBlock(config.block, width, name=f"block_{number}")(h, time, keys[number])
            if config.attends:
                h = _attention(config, number)(h)
        if config.resample == "block":
            h = ResidualBlock(config.block, width, "up", name="resample")(h, time, keys[-1])
        elif config.resample == "convolution":
            h = double(h, config.block.first_halved)
            h = Convolution(width, dtype=config.block.dtype, name="resample")(h)
        return h


class ResidualBlock(nn.Module):
    """x + the branch: norm, SiLU, convolution, time, norm, SiLU, dropout, convolution; x by 1 x 1 where widths differ.

    Attributes:
        config: The network's.
        features: Channels of the result.
        resample: Halve or double x and the branch, the latter before its first convolution.
    """

    config: BlockConfig
    features: int
    resample: Literal["", "down", "up"] = ""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array | None = None, key: Any = None) -> jax.Array:
        config, features, dtype = self.config, self.features, self.config.dtype
        first = config.first_halved
        resize = {"": lambda image: image, "down": lambda image: halve(image, first),
                  "up": lambda image: double(image, first)}[self.resample]  # fmt: skip
        h = nn.silu(GroupNorm(config.groups, config.epsilon, name="norm1")(x)).astype(dtype)
        h = Convolution(features, dtype=dtype, name="conv1")(resize(h))
        x = resize(x)
        norm = GroupNorm(config.groups, config.epsilon, name="norm2")
        if time is None:
            h = norm(h)
        else:
            columns = 2 * features if config.scale_shift else features
            embedded = Linear(columns, dtype, name="embed")(time)
            embedded = embedded.reshape(embedded.shape[0], *(1,) * (x.ndim - 2), columns)
            if config.scale_shift:
                scale, shift = jnp.split(embedded, 2, axis=-1)
                h = norm(h) * (1 + scale) + shift
            else:
                h = norm(h + embedded)
        h = _drop(nn.silu(h).astype(dtype), config.dropout, key)
        start = nn.initializers.zeros if config.zero_start else Convolution.kernel_init
        h = Convolution(features, dtype=dtype, kernel_init=start, name="conv2")(h)
        if x.shape[-1] != features:
            x = Convolution(features, size=1, dtype=dtype, name="skip")(x)
        return x + h


class AttentionBlock(nn.Module):
    """x + attention over all voxels; the kernel "qkv" is [width, head, 3, depth]: heads are split before q, k, v.

    Attributes:
        config: The network's.
        heads: Attention heads.
        kind: See `nn.attention.self_attention`.
        has_out: Whether a linear map follows the attention.
    """

    config: BlockConfig
    heads: int = 1
    kind: AttentionKind = "auto"
    has_out: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, width, heads = self.config, x.shape[-1], self.heads
        tokens = GroupNorm(config.groups, config.epsilon, name="norm")(x)
        tokens = tokens.reshape(x.shape[0], -1, width).astype(config.dtype)
        qkv = Linear((heads, 3, width // heads), config.dtype, name="qkv")(tokens).swapaxes(2, 3)
        mixed = self_attention(qkv, self.kind).reshape(tokens.shape)
        if self.has_out:
            start = nn.initializers.zeros if config.zero_start else Linear.kernel_init
            mixed = Linear(width, config.dtype, start, name="out")(mixed)
        return x + mixed.reshape(x.shape)


def halve(x: Float[Array, "batch *space channel"], first: int = 0) -> Float[Array, "batch *half channel"]:
    """Return the mean of every 2 x 2 (x 2) voxels, along the axes of space from `first` on."""
    kept, lengths = x.shape[1 : 1 + first], [part for length in x.shape[1 + first : -1] for part in (length // 2, 2)]
    pairs = x.reshape(x.shape[0], *kept, *lengths, x.shape[-1])
    return pairs.mean(axis=range(2 + first, pairs.ndim - 1, 2))


def double(x: Float[Array, "batch *space channel"], first: int = 0) -> Float[Array, "batch *twice channel"]:
    """Return every voxel twice along the axes of space from `first` on (nearest neighbour)."""
    kept, lengths = x.shape[1 : 1 + first], x.shape[1 + first : -1]
    spread = jnp.expand_dims(x, [2 * axis + 2 + first for axis in range(len(lengths))])
    full = [part for length in lengths for part in (length, 2)]
    spread = jnp.broadcast_to(spread, (x.shape[0], *kept, *full, x.shape[-1]))
    return spread.reshape(x.shape[0], *kept, *(2 * length for length in lengths), x.shape[-1])


def double_linearly(x: Float[Array, "batch *space channel"]) -> Float[Array, "batch *twice channel"]:
    """Return twice as many voxels along every axis of space, linear between the centres of the old ones.

    The border is repeated: PyTorch's `interpolate(scale_factor=2, mode="trilinear", align_corners=False)`.
    """
    for axis in range(1, x.ndim - 1):
        first, last = (jax.lax.slice_in_dim(x, start, start + 1, axis=axis) for start in (0, x.shape[axis] - 1))
        before = jnp.concatenate([first, jax.lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis)], axis)
        after = jnp.concatenate([jax.lax.slice_in_dim(x, 1, x.shape[axis], axis=axis), last], axis)
        pairs = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
        x = pairs.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
    return x


def _attention(config: LevelConfig, number: int) -> AttentionBlock:
    return AttentionBlock(config.block, config.heads, config.attention, config.has_out, name=f"attention_{number}")


def _split(key: Any, count: int) -> list[Any]:
    return [None] * count if key is None else list(jax.random.split(key, count))


def _drop(h: jax.Array, rate: float, key: Any) -> jax.Array:
    if key is None or not rate:
        return h
    return jnp.where(jax.random.bernoulli(key, 1 - rate, h.shape), h / (1 - rate), 0).astype(h.dtype)
