"""The U-Net of guided diffusion, for images and volumes, with or without a time.

Encoder levels of residual blocks, halved between levels; a middle of block, attention, block; decoder levels with one
block more, each taking the newest skip: [h, skip] along channels. A residual block normalises, applies SiLU and
convolves twice; between, the time scales and shifts. The last convolution of every branch starts at 0.

Source: Dhariwal and Nichol, "Diffusion models beat GANs on image synthesis", arXiv:2105.05233, and the official code
(UNetModel); sizes of the prior: DynamicDPS, arXiv:2503.01075, official code.
Deviation: biases start at 0, PyTorch draws them.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Num

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Decay, Length, Size, checked
from jaxmed.errors import InputError
from jaxmed.nn.attention import AttentionKind, self_attention
from jaxmed.nn.convolution import Convolution
from jaxmed.nn.group_norm import GroupNorm
from jaxmed.nn.model import Network, make_model
from jaxmed.nn.time_embed import TimeEmbed
from jaxmed.nn.transformer import Linear


@dataclasses.dataclass(frozen=True)
@checked
class GuidedUnetConfig:
    """A guided-diffusion U-Net; sizes of images are free, multiples of `divisor` along every axis.

    Attributes:
        dimensions: Spatial axes.
        channels: Channels of the input.
        outputs: Channels of the result, without those of `learn_sigma`.
        width: Channels that the multipliers multiply.
        multipliers: Multipliers of the width, one per level, finest first.
        blocks: Residual blocks of an encoder level; a decoder level has one more.
        attention_factors: Levels with attention, by how often their voxels fit into one of theirs: 1, 2, 4, ...
        heads: Attention heads, where `head_channels` is 0.
        head_channels: Channels of a head, which decide their number; 0 where `heads` does.
        with_time: Whether a time is an input; a conditional enhancer has none.
        scale_shift: Whether the time scales and shifts the second norm, or is added before it.
        resblock_updown: Halve and double inside residual blocks (mean of 2, nearest) instead of by a strided
            convolution and by nearest neighbour with a convolution.
        learn_sigma: Twice the outputs; the second half interpolates the logarithm of the variance.
        dropout: Before the last convolution of a block, while a key is given.
        groups: Groups of the norms; a divisor of every level's channels.
        dtype: Type of activations and products; norms, softmax, time and result are float32.
        remat: Recompute whole levels in the backward pass: less memory, a third more work.
        attention: See `nn.attention.self_attention`; "blocks" serves volumes with many tokens.
        keeps_depth: Whether the first axis of a volume is never halved, as in the official code, which made it for
            slices far apart; our own networks halve every axis.
    """

    dimensions: Literal[2, 3] = 2
    channels: Size = 1
    outputs: Size = 1
    width: Size = 128
    multipliers: tuple[Size, ...] = (1, 1, 2, 2, 4, 4)
    blocks: Size = 2
    attention_factors: tuple[Size, ...] = (16, 32)
    heads: Size = 4
    head_channels: Length = 0
    with_time: bool = True
    scale_shift: bool = True
    resblock_updown: bool = False
    learn_sigma: bool = False
    dropout: Decay = 0.0
    groups: Size = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    attention: AttentionKind = "xla"
    keeps_depth: bool = False

    def __post_init__(self) -> None:
        if self.keeps_depth and self.dimensions != 3:
            raise ValueError(f"keeps_depth: expected volumes, found {self.dimensions} dimensions")
        if self.dimensions not in (2, 3):
            raise ValueError(f"dimensions: expected 2 or 3, found {self.dimensions}")
        if not self.multipliers:
            raise ValueError("multipliers: expected one or more, found none")
        factors = tuple(2**level for level in range(len(self.multipliers)))
        if set(self.attention_factors) - set(factors):
            raise ValueError(f"attention_factors: expected some of {factors}, found {self.attention_factors}")
        for level, width in enumerate(self.widths):
            if width % self.groups:
                raise ValueError(f"groups: expected a divisor of {width} channels, found {self.groups}")
            # The middle attends at the last level.
            attends = 2**level in self.attention_factors or level + 1 == len(self.multipliers)
            if attends and width % (self.head_channels or self.heads):
                name = "head_channels" if self.head_channels else "heads"
                raise ValueError(f"{name}: expected a divisor of {width} channels, found {getattr(self, name)}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def divisor(self) -> int:
        """What the voxels along every axis that is halved must be a multiple of."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def time_width(self) -> int:
        """Entries of the embedded time."""
        return 4 * self.width

    @property
    def first_halved(self) -> int:
        """The first axis of space that is halved between levels."""
        return 1 if self.keeps_depth else 0

    def heads_of(self, width: int) -> int:
        """Attention heads over so many channels."""
        return width // self.head_channels if self.head_channels else self.heads

    def skip_widths(self) -> list[int]:
        """Channels of what the encoder hands on, in the order in which it does."""
        skips = [self.widths[0]]
        for level, width in enumerate(self.widths):
            skips += [width] * self.blocks + [width] * (level + 1 < len(self.widths))
        return skips


class GuidedUnet(nn.Module):
    """Noisy image and time to the prediction; parts are time, stem, down_N, middle, up_N, norm and head."""

    config: GuidedUnetConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *space channel"],
        t: Num[Array, " batch"] | None = None,
        *,
        key: Any = None,
    ) -> Float[Array, "batch *space output"]:
        """Return `outputs` channels (twice as many with `learn_sigma`), float32.

        Args:
            x: Images or volumes; axes are multiples of the config's `divisor`.
            t: Time of each image, in steps; none where the config has no time.
            key: Switches dropout on.
        """
        config = self.config
        _check(config, x, t)
        keys = [None] * (2 * len(config.widths) + 1)
        if key is not None and config.dropout:
            keys = list(jax.random.split(key, len(keys)))
        time = None
        if t is not None:
            time = nn.silu(TimeEmbed(config.width, config.time_width, name="time")(t)).astype(config.dtype)
        down, up = (DownLevel, UpLevel) if not config.remat else (nn.remat(DownLevel), nn.remat(UpLevel))
        h = Convolution(config.widths[0], dtype=config.dtype, name="stem")(x)
        skips = [h]
        for level in range(len(config.widths)):
            h, found = down(config, level, name=f"down_{level}")(h, time, keys.pop())
            skips += found
        h = Middle(config, name="middle")(h, time, keys.pop())
        for level in reversed(range(len(config.widths))):
            taken = [skips.pop() for _ in range(config.blocks + 1)]
            h = up(config, level, name=f"up_{level}")(h, taken, time, keys.pop())
        h = nn.silu(GroupNorm(config.groups, name="norm")(h))
        outputs = config.outputs * (2 if config.learn_sigma else 1)
        return Convolution(outputs, kernel_init=nn.initializers.zeros, name="head")(h)


class DownLevel(nn.Module):
    """Blocks of an encoder level, each followed by attention where the level has it; halved, but for the last."""

    config: GuidedUnetConfig
    level: int

    @nn.compact
    def __call__(self, h: jax.Array, time: jax.Array | None, key: Any = None) -> tuple[jax.Array, list[jax.Array]]:
        config, width = self.config, self.config.widths[self.level]
        keys, skips = _split(key, config.blocks + 1), []
        for number in range(config.blocks):
            h = ResidualBlock(config, width, name=f"block_{number}")(h, time, keys[number])
            if 2**self.level in config.attention_factors:
                h = AttentionBlock(config, name=f"attention_{number}")(h)
            skips.append(h)
        if self.level + 1 < len(config.widths):
            if config.resblock_updown:
                h = ResidualBlock(config, width, "down", name="resample")(h, time, keys[-1])
            else:
                first = config.first_halved
                h = Convolution(width, stride=2, unstrided=first, dtype=config.dtype, name="resample")(h)
            skips.append(h)
        return h, skips


class Middle(nn.Module):
    """Block, attention, block at the coarsest level."""

    config: GuidedUnetConfig

    @nn.compact
    def __call__(self, h: jax.Array, time: jax.Array | None, key: Any = None) -> jax.Array:
        width, keys = self.config.widths[-1], _split(key, 2)
        h = ResidualBlock(self.config, width, name="block_0")(h, time, keys[0])
        h = AttentionBlock(self.config, name="attention_0")(h)
        return ResidualBlock(self.config, width, name="block_1")(h, time, keys[1])


class UpLevel(nn.Module):
    """Blocks of a decoder level, each taking a skip; doubled after the last one, but for the finest level."""

    config: GuidedUnetConfig
    level: int

    @nn.compact
    def __call__(self, h: jax.Array, skips: list[jax.Array], time: jax.Array | None, key: Any = None) -> jax.Array:
        config, width = self.config, self.config.widths[self.level]
        keys = _split(key, len(skips) + 1)
        for number, skip in enumerate(skips):
            h = jnp.concatenate([h, skip], axis=-1)
            h = ResidualBlock(config, width, name=f"block_{number}")(h, time, keys[number])
            if 2**self.level in config.attention_factors:
                h = AttentionBlock(config, name=f"attention_{number}")(h)
        if self.level:
            if config.resblock_updown:
                h = ResidualBlock(config, width, "up", name="resample")(h, time, keys[-1])
            else:
                h = Convolution(width, dtype=config.dtype, name="resample")(double(h, config.first_halved))
        return h


class ResidualBlock(nn.Module):
    """x + the branch: norm, SiLU, convolution, time, norm, SiLU, dropout, convolution; x by 1 x 1 where widths differ.

    Attributes:
        config: The network's.
        features: Channels of the result.
        resample: Halve or double x and the branch, the latter before its first convolution.
    """

    config: GuidedUnetConfig
    features: int
    resample: Literal["", "down", "up"] = ""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array | None, key: Any = None) -> jax.Array:
        config, features, dtype = self.config, self.features, self.config.dtype
        first = config.first_halved
        resize = {"": lambda image: image, "down": lambda image: halve(image, first),
                  "up": lambda image: double(image, first)}[self.resample]  # fmt: skip
        h = nn.silu(GroupNorm(config.groups, name="norm1")(x)).astype(dtype)
        h = Convolution(features, dtype=dtype, name="conv1")(resize(h))
        x = resize(x)
        norm = GroupNorm(config.groups, name="norm2")
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
        h = Convolution(features, dtype=dtype, kernel_init=nn.initializers.zeros, name="conv2")(h)
        if x.shape[-1] != features:
            x = Convolution(features, size=1, dtype=dtype, name="skip")(x)
        return x + h


class AttentionBlock(nn.Module):
    """x + attention over all voxels; the kernel "qkv" is [width, head, 3, depth]: heads are split before q, k, v.

    Queries and keys are each scaled by depth^(-1/4) in the official code, which is their product by depth^(-1/2).
    """

    config: GuidedUnetConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, width = self.config, x.shape[-1]
        heads = config.heads_of(width)
        tokens = GroupNorm(config.groups, name="norm")(x).reshape(x.shape[0], -1, width).astype(config.dtype)
        qkv = Linear((heads, 3, width // heads), config.dtype, name="qkv")(tokens)
        qkv = qkv.reshape(*tokens.shape[:2], heads, 3, width // heads).swapaxes(2, 3)
        mixed = self_attention(qkv, config.attention).reshape(tokens.shape)
        return x + Linear(width, config.dtype, nn.initializers.zeros, name="out")(mixed).reshape(x.shape)


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


def _check(config: GuidedUnetConfig, x: jax.Array, t: jax.Array | None) -> None:
    if x.ndim != config.dimensions + 2 or x.shape[-1] != config.channels:
        raise ValueError(f"x: expected {config.dimensions} axes of space and {config.channels} channels, got {x.shape}")
    if any(length % config.divisor for length in x.shape[1 + config.first_halved : -1]):
        which = "each axis but the first" if config.keeps_depth else "each axis"
        raise ValueError(f"x: expected multiples of {config.divisor} along {which}, got {x.shape[1:-1]}")
    if (t is None) == config.with_time:
        raise ValueError(f"t: expected {'a time' if config.with_time else 'none'}, as with_time says")


def _split(key: Any, count: int) -> list[Any]:
    return [None] * count if key is None else list(jax.random.split(key, count))


def _drop(h: jax.Array, rate: float, key: Any) -> jax.Array:
    if key is None or not rate:
        return h
    return jnp.where(jax.random.bernoulli(key, 1 - rate, h.shape), h / (1 - rate), 0).astype(h.dtype)


def guided_unet(config: GuidedUnetConfig, size: tuple[int, ...]) -> Network:
    """Return the U-Net for images of one size: `apply(params, x, t)`, or `apply(params, x)` without a time.

    Args:
        config: Its sizes.
        size: Voxels of an image along each axis.

    Raises:
        InputError: The network cannot halve the images.
    """
    if len(size) != config.dimensions:
        expected = f"{config.dimensions} numbers, as many as model.dimensions"
        raise InputError("size", expected, f"{size}", "change the size, or --model.dimensions")
    if any(length < 1 or length % config.divisor for length in size):
        expected = f"multiples of {config.divisor} voxels, which the network halves"
        raise InputError("size", expected, f"{size}", "change the size, or --model.multipliers")
    model = make_model(GuidedUnet(config))

    def init(key: KeyArray) -> Params:
        image = jnp.zeros((1, *size, config.channels))
        # A start has as many draws as parameters, and each threefry is a loop of its own to the compiler: with XLA's
        # own generator a small network's start compiles in 2.6 s instead of 7.5 s, and it is the same on any mesh.
        key = jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl="rbg")
        return model.init(key, image, *((jnp.zeros(1),) if config.with_time else ()))

    return Network(init, model.apply, SHARDING_RULES)


# Layouts over the mesh axis "model": heads of attention; channels of the hidden activations of blocks and of the time.
SHARDING_RULES = (
    (r"attention_\d+/qkv/kernel$", PartitionSpec(None, "model", None, None)),
    (r"attention_\d+/qkv/bias$", PartitionSpec("model", None, None)),
    (r"attention_\d+/out/kernel$", PartitionSpec("model", None)),
    (r"time/fc1/kernel$", PartitionSpec(None, "model")),
    (r"time/fc1/bias$", PartitionSpec("model")),
    (r"time/fc2/kernel$", PartitionSpec("model", None)),
)

DYNAMICDPS_PRIOR = GuidedUnetConfig()
CI_PRIOR = GuidedUnetConfig(width=32, multipliers=(1, 2, 2), blocks=1, attention_factors=(4,))
ADM_256 = GuidedUnetConfig(
    channels=3, outputs=3, width=256, attention_factors=(8, 16, 32), head_channels=64, resblock_updown=True,
    learn_sigma=True,
)  # fmt: skip
ENHANCER = GuidedUnetConfig(width=64, with_time=False)
