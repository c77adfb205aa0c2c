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
from jaxmed.nn.attention import AttentionKind
from jaxmed.nn.convolution import Convolution
from jaxmed.nn.group_norm import GroupNorm
from jaxmed.nn.model import Network, make_model
from jaxmed.nn.time_embed import TimeEmbed
from jaxmed.nn.unet_blocks import BlockConfig, DownLevel, LevelConfig, Middle, UpLevel


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

    def level(self, level: int, is_resampled: bool) -> LevelConfig:
        """Return what a level is made of.

        The official code scales queries and keys by depth^(-1/4) each, which is their product by depth^(-1/2).
        """
        block = BlockConfig(self.groups, 1e-5, self.dtype, self.scale_shift, self.dropout, self.first_halved)
        updown = "block" if self.resblock_updown else "convolution"
        width = self.widths[level]
        return LevelConfig(
            block, width, self.blocks, 2**level in self.attention_factors, self.heads_of(width), self.attention,
            resample=updown if is_resampled else "none",
        )  # fmt: skip

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
            is_halved = level + 1 < len(config.widths)
            h, found = down(config.level(level, is_halved), name=f"down_{level}")(h, time, keys.pop())
            skips += found
        h = Middle(config.level(-1, False), name="middle")(h, time, keys.pop())
        for level in reversed(range(len(config.widths))):
            taken = [skips.pop() for _ in range(config.blocks + 1)]
            h = up(config.level(level, level > 0), name=f"up_{level}")(h, taken, time, keys.pop())
        h = nn.silu(GroupNorm(config.groups, name="norm")(h))
        outputs = config.outputs * (2 if config.learn_sigma else 1)
        return Convolution(outputs, kernel_init=nn.initializers.zeros, name="head")(h)


def _check(config: GuidedUnetConfig, x: jax.Array, t: jax.Array | None) -> None:
    if x.ndim != config.dimensions + 2 or x.shape[-1] != config.channels:
        raise ValueError(f"x: expected {config.dimensions} axes of space and {config.channels} channels, got {x.shape}")
    if any(length % config.divisor for length in x.shape[1 + config.first_halved : -1]):
        which = "each axis but the first" if config.keeps_depth else "each axis"
        raise ValueError(f"x: expected multiples of {config.divisor} along {which}, got {x.shape[1:-1]}")
    if (t is None) == config.with_time:
        raise ValueError(f"t: expected {'a time' if config.with_time else 'none'}, as with_time says")


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
