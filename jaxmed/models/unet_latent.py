"""The diffusion U-Net of MONAI on latents, and its ControlNet, for 2D and 3D grids.

The U-Net is that of `unet_guided` with a time that is added, attention without a linear map behind it, and residuals
of a ControlNet added to its skips and its middle. The ControlNet is the same encoder and middle; the condition is
convolved and added to what enters it, and linear maps that start at 0 follow each skip.

What a sampler computes once stands apart: `embed` of the time, which all latents of a step share, and `embed_condition`
of the condition, which all steps and all samples share.

Source: MONAI GenerativeModels, DiffusionModelUNet and ControlNet; Zhang et al., arXiv:2302.05543; sizes of CoCoLIT,
arXiv:2508.01292, official code.
Deviation: the linear map behind attention (`proj_attn`) that the released code holds and never applies is left out;
biases start at 0, PyTorch draws them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Length, Size, checked
from jaxmed.nn.attention import AttentionKind
from jaxmed.nn.convolution import Convolution
from jaxmed.nn.group_norm import GroupNorm
from jaxmed.nn.model import make_model
from jaxmed.nn.time_embed import TimeEmbed
from jaxmed.nn.unet_blocks import BlockConfig, DownLevel, LevelConfig, Middle, UpLevel

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
@checked
class LatentUnetConfig:
    """A diffusion U-Net of latents; their sizes are free, multiples of `divisor` along every axis.

    Attributes:
        dimensions: Spatial axes.
        channels: Channels of a latent.
        outputs: Channels of the prediction.
        widths: Channels of each level, finest first; the time has 4 times as many as the first.
        blocks: Residual blocks of each encoder level; a decoder level has one more.
        attention_levels: Whether a level attends; the middle always does.
        head_channels: Channels of an attention head; 0 for one head.
        resblock_updown: Halve and double inside residual blocks (mean of 2, nearest) instead of by a strided
            convolution and by nearest neighbour with a convolution.
        projection: Whether a linear map follows the attention, as in networks of MONAI's core with `include_fc`.
        groups: Groups of the norms; a divisor of every level's channels.
        dtype: Type of activations and products; norms, softmax, time and result are float32.
        remat: Recompute whole levels in the backward pass: less memory, a third more work.
        attention: See `nn.attention.self_attention`.
    """

    dimensions: Literal[2, 3] = 3
    channels: Size = 4
    outputs: Size = 4
    widths: tuple[Size, ...] = (256, 256, 256)
    blocks: tuple[Size, ...] = (2, 2, 2)
    attention_levels: tuple[bool, ...] = (False, True, True)
    head_channels: Length = 256
    resblock_updown: bool = True
    projection: bool = False
    groups: Size = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    attention: AttentionKind = "auto"

    def __post_init__(self) -> None:
        for name in ("blocks", "attention_levels"):
            found = getattr(self, name)
            if not self.widths or len(found) != len(self.widths):
                raise ValueError(f"{name}: expected one for each of {len(self.widths)} widths, found {found}")
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"groups: expected a divisor of all of {self.widths} channels, found {self.groups}")
        attending = {width for level, width in enumerate(self.widths) if self.attends(level)}
        if self.head_channels and any(width % self.head_channels for width in attending):
            raise ValueError(f"head_channels: expected a divisor of {sorted(attending)}, found {self.head_channels}")

    @property
    def divisor(self) -> int:
        """What the voxels of a latent along every axis must be a multiple of."""
        return 2 ** (len(self.widths) - 1)

    @property
    def time_width(self) -> int:
        """Entries of the embedded time."""
        return 4 * self.widths[0]

    def attends(self, level: int) -> bool:
        """Whether there is attention at a level, which at the last one is in the middle."""
        return self.attention_levels[level] or level + 1 == len(self.widths)

    def heads_of(self, width: int) -> int:
        """Attention heads over so many channels."""
        return width // self.head_channels if self.head_channels else 1

    def skip_widths(self) -> list[int]:
        """Channels of the skips, in the order in which the encoder hands them on."""
        skips = [self.widths[0]]
        for level, (width, count) in enumerate(zip(self.widths, self.blocks, strict=True)):
            skips += [width] * count + [width] * (level + 1 < len(self.widths))
        return skips

    def level(self, level: int, is_resampled: bool) -> LevelConfig:
        """Return what a level is made of."""
        width, updown = self.widths[level], "block" if self.resblock_updown else "convolution"
        return LevelConfig(
            BlockConfig(self.groups, EPSILON, self.dtype), width, self.blocks[level], self.attention_levels[level],
            self.heads_of(width) if self.attends(level) else 1, self.attention, self.projection,
            updown if is_resampled else "none",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
@checked
class ControlNetConfig:
    """The ControlNet of a latent U-Net.

    Attributes:
        unet: Sizes of the U-Net that takes the residuals; its outputs do not matter.
        condition_channels: Channels of the condition.
        condition_widths: Channels of the convolutions of the condition; each beyond the first one halves it before.
    """

    unet: LatentUnetConfig = LatentUnetConfig()
    condition_channels: Size = 4
    condition_widths: tuple[Size, ...] = (256,)

    def __post_init__(self) -> None:
        if not self.condition_widths:
            raise ValueError("condition_widths: expected one or more, found none")


class Encoder(nn.Module):
    """Noisy latents to skips and the middle; what U-Net and ControlNet share. Parts: time, stem, down_N, middle."""

    config: LatentUnetConfig

    def setup(self) -> None:
        config = self.config
        level = nn.remat(DownLevel) if config.remat else DownLevel
        last = len(config.widths) - 1
        self.time = TimeEmbed(config.widths[0], config.time_width)
        self.stem = Convolution(config.widths[0], dtype=config.dtype)
        self.down = [level(config.level(number, number < last)) for number in range(last + 1)]
        self.middle = Middle(config.level(last, False))

    def embed(self, t: Num[Array, " batch"]) -> Float[Array, "batch feature"]:
        """Return what every residual block is told of the time."""
        return nn.silu(self.time(t)).astype(self.config.dtype)

    def __call__(
        self, z: Float[Array, "batch *grid channel"], time: Float[Array, "times feature"], condition: Any = None
    ) -> tuple[list[jax.Array], jax.Array]:
        """Return the skips in order, and the middle."""
        config = self.config
        if z.ndim != config.dimensions + 2 or z.shape[-1] != config.channels:
            expected = f"{config.dimensions} axes of space and {config.channels} channels"
            raise ValueError(f"z: expected {expected}, got {z.shape}")
        if any(length % config.divisor for length in z.shape[1:-1]):
            raise ValueError(f"z: expected multiples of {config.divisor} along each axis, got {z.shape[1:-1]}")
        h = self.stem(z)
        h = h if condition is None else h + condition
        skips = [h]
        for level in self.down:
            h, found = level(h, time)
            skips += found
        return skips, self.middle(h, time)


class LatentUnet(nn.Module):
    """Noisy latents and time to the prediction; parts are encoder, up_N, norm and head."""

    config: LatentUnetConfig

    def setup(self) -> None:
        config = self.config
        level = nn.remat(UpLevel) if config.remat else UpLevel
        self.encoder = Encoder(config)
        self.up = [level(config.level(number, number > 0)) for number in range(len(config.widths))]
        self.norm = GroupNorm(config.groups, EPSILON)
        self.head = Convolution(config.outputs, kernel_init=nn.initializers.zeros)

    def __call__(
        self, z: Float[Array, "batch *grid channel"], t: Num[Array, " batch"], residuals: Any = None
    ) -> Float[Array, "batch *grid output"]:
        """Return the prediction (the noise), float32; arguments as of `denoise`, t in steps from 0 to 999."""
        return self.denoise(z, self.embed(t), residuals)

    def embed(self, t: Num[Array, " batch"]) -> Float[Array, "batch feature"]:
        """Return what every residual block is told of the time."""
        return self.encoder.embed(t)

    def denoise(
        self, z: Float[Array, "batch *grid channel"], time: Float[Array, "times feature"], residuals: Any = None
    ) -> Float[Array, "batch *grid output"]:
        """Return the prediction at a time that is embedded already.

        Args:
            z: Noisy latents; axes are multiples of the config's `divisor`.
            time: From `embed`; a batch of one serves all latents.
            residuals: What a ControlNet returns: one array for each skip, and one for the middle.
        """
        skips, h = self.encoder(z, time)
        if residuals is not None:
            extra, middle = residuals
            skips, h = [skip + more for skip, more in zip(skips, extra, strict=True)], h + middle
        for number in reversed(range(len(self.config.widths))):
            taken = [skips.pop() for _ in range(self.config.blocks[number] + 1)]
            h = self.up[number](h, taken, time)
        return self.head(nn.silu(self.norm(h)))


class ControlNet(nn.Module):
    """Noisy latents, time and condition to residuals; parts are encoder, condition, skip_N and after_middle."""

    config: ControlNetConfig

    def setup(self) -> None:
        unet = self.config.unet
        maps = (Convolution(width, 1, dtype=unet.dtype, kernel_init=nn.initializers.zeros)
                for width in (*unet.skip_widths(), unet.widths[-1]))  # fmt: skip
        self.encoder, self.condition = Encoder(unet), Condition(self.config)
        *self.skip, self.after_middle = maps

    def __call__(
        self,
        z: Float[Array, "batch *grid channel"],
        t: Num[Array, " batch"],
        condition: Float[Array, "batch *grid2 channel2"],
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Return residuals of the skips and of the middle; t in steps from 0 to 999, see `control`."""
        return self.control(z, self.embed(t), self.embed_condition(condition))

    def embed(self, t: Num[Array, " batch"]) -> Float[Array, "batch feature"]:
        """Return what every residual block is told of the time."""
        return self.encoder.embed(t)

    def embed_condition(self, condition: Float[Array, "batch *grid2 channel2"]) -> Float[Array, "batch *grid width"]:
        """Return what is added to the latents behind their first convolution."""
        return self.condition(condition)

    def control(
        self,
        z: Float[Array, "batch *grid channel"],
        time: Float[Array, "times feature"],
        embedded: Float[Array, "batch2 *grid width"],
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Return the residuals where time and condition are embedded already.

        Args:
            z: Noisy latents; axes are multiples of the U-Net's `divisor`.
            time: From `embed`; as of the condition, a batch of one serves all latents.
            embedded: From `embed_condition`.
        """
        skips, h = self.encoder(z, time, embedded)
        residuals = tuple(to_residual(skip) for to_residual, skip in zip(self.skip, skips, strict=True))
        return residuals, self.after_middle(h)


class Condition(nn.Module):
    """Convolutions with SiLU, a pair for each further width whose second one halves, then one that starts at 0."""

    config: ControlNetConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, self.config.unet.dtype
        if x.ndim != config.unet.dimensions + 2 or x.shape[-1] != config.condition_channels:
            expected = f"{config.unet.dimensions} axes of space and {config.condition_channels} channels"
            raise ValueError(f"condition: expected {expected}, got {x.shape}")
        h = nn.silu(Convolution(config.condition_widths[0], dtype=dtype, name="stem")(x))
        for number, width in enumerate(config.condition_widths[1:]):
            h = nn.silu(Convolution(h.shape[-1], dtype=dtype, name=f"conv_{number}")(h))
            h = nn.silu(Convolution(width, stride=2, dtype=dtype, name=f"down_{number}")(h))
        zeros = nn.initializers.zeros
        return Convolution(config.unet.widths[0], dtype=dtype, kernel_init=zeros, name="head")(h)


class LatentDenoiser(NamedTuple):
    """A U-Net of latents as pure functions of batches, channels last.

    Attributes:
        init: `init(key, z, t) -> params`, float32.
        apply: `apply(params, z, t, residuals=None)`, the prediction; residuals are those of a ControlNet.
        embed: `embed(params, t)`, the time as `denoise` takes it.
        denoise: `denoise(params, z, time, residuals=None)`, the prediction.
    """

    init: Callable[..., Params]
    apply: Callable[..., Array]
    embed: Callable[..., Array]
    denoise: Callable[..., Array]


class Control(NamedTuple):
    """A ControlNet as pure functions of batches, channels last.

    Attributes:
        init: `init(key, z, t, condition) -> params`, float32; `params["encoder"]` has the layout of the U-Net's.
        apply: `apply(params, z, t, condition) -> (residuals of the skips, residual of the middle)`.
        embed: `embed(params, t)`, the time as `control` takes it.
        embed_condition: `embed_condition(params, condition)`, the condition as `control` takes it.
        control: `control(params, z, time, embedded)`, the residuals.
    """

    init: Callable[..., Params]
    apply: Callable[..., tuple[tuple[Array, ...], Array]]
    embed: Callable[..., Array]
    embed_condition: Callable[..., Array]
    control: Callable[..., tuple[tuple[Array, ...], Array]]


def latent_unet(config: LatentUnetConfig) -> LatentDenoiser:
    """Return the U-Net of some sizes."""
    return LatentDenoiser(*_functions(LatentUnet(config), "embed", "denoise"))


def control_net(config: ControlNetConfig) -> Control:
    """Return the ControlNet of some sizes."""
    return Control(*_functions(ControlNet(config), "embed", "embed_condition", "control"))


def _functions(module: nn.Module, *methods: str) -> list[Callable[..., Any]]:
    model = make_model(module)

    def init(key: KeyArray, *inputs: Array) -> Params:
        # Each draw of threefry is a loop of its own to the compiler, see `unet_guided.guided_unet`.
        key = jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl="rbg")
        return model.init(key, *inputs)

    def call(method: str) -> Callable[..., Any]:
        return lambda params, *inputs, **options: model.apply(params, *inputs, method=method, **options)

    return [init, model.apply, *map(call, methods)]


def pad_latent(latent: Float[Array, "i j k channel"], multiple: int) -> Float[Array, "i2 j2 k2 channel"]:
    """Add zeros on both sides up to a multiple along each axis; of an odd number the larger part comes last."""
    extra = [-length % multiple for length in latent.shape[:3]]
    return jnp.pad(latent, [*((one // 2, one - one // 2) for one in extra), (0, 0)])


def crop_latent(latent: Float[Array, "i2 j2 k2 channel"], shape: tuple[int, ...]) -> Float[Array, "i j k channel"]:
    """Undo `pad_latent`."""
    starts = [(padded - length) // 2 for padded, length in zip(latent.shape[:3], shape, strict=True)]
    return latent[tuple(slice(start, start + length) for start, length in zip(starts, shape, strict=True))]


# Parameters are split by their size alone, as `train.mesh.param_shardings` does without rules.
SHARDING_RULES = ()

COCOLIT_UNET = LatentUnetConfig()
COCOLIT_CONTROL_NET = ControlNetConfig()
