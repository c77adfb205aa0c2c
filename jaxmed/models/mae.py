"""Masked autoencoder (arXiv:2111.06377) around a vision transformer, for 2D and 3D images."""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.masking import Masking, choose_masking
from jaxmed.arrays.position import sincos, sincos_3d_oblong
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Share, Size, checked
from jaxmed.models.vit import FROZEN, Blocks, Vit, VitConfig
from jaxmed.models.vit import SHARDING_RULES as VIT_RULES
from jaxmed.nn.model import Network, make_model
from jaxmed.nn.transformer import BlockConfig, LayerNorm, Linear


@dataclasses.dataclass(frozen=True)
@checked
class MaeConfig:
    """A masked autoencoder; the defaults are TANGERINE's.

    Attributes:
        encoder: The vision transformer that sees kept patches.
        decoder_width: Token width of the decoder.
        decoder_depth: Its blocks.
        decoder_heads: Its attention heads.
        decoder_hidden: Width inside its MLPs.
        mask_ratio: Fraction of patches hidden, in (0, 1).
        norm_target: Whether each target patch is normalised to mean 0 and variance 1.
        sigmoid: Whether predictions pass a sigmoid, for targets in [0, 1].
    """

    encoder: VitConfig = VitConfig()
    decoder_width: Size = 512
    decoder_depth: Size = 8
    decoder_heads: Size = 16
    decoder_hidden: Size = 2048
    mask_ratio: Share = 0.75
    norm_target: bool = False
    sigmoid: bool = True

    def __post_init__(self) -> None:
        tokens = self.encoder.num_tokens
        if not 1 <= int(tokens * (1 - self.mask_ratio)) < tokens:
            raise ValueError(f"mask_ratio: expected some of {tokens} patches kept and some hidden, "
                             f"found {self.mask_ratio:g}")  # fmt: skip
        if self.norm_target and self.sigmoid:
            raise ValueError("norm_target: expected no sigmoid beside it (normalised targets leave [0, 1]), found one")
        self.block  # noqa: B018  refuses heads that do not divide the width

    @property
    def block(self) -> BlockConfig:
        """What every block of the decoder is."""
        encoder = self.encoder
        return BlockConfig(
            self.decoder_width, self.decoder_heads, self.decoder_hidden, 1e-6, encoder.dtype, encoder.attention
        )


class MaeOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        tokens: The encoder's: class token and kept patches.
        prediction: Voxels of the hidden patches, in the order of `masking.hidden`; of all patches in the order of
            `masking.order` where asked for.
        masking: Which patches were kept and hidden.
    """

    tokens: Float[Array, "batch token width"]
    prediction: Float[Array, "batch patch voxel"]
    masking: Masking


class MaskedModel(NamedTuple):
    """Any encoder of visible patches with its decoder, in two or three dimensions, as its loss and its recipe see it.

    Attributes:
        network: `apply(params, image, noise)` hides the patches of largest noise and returns a `MaeOutput`.
        image_size: Voxels of an image along each axis.
        channels: Of an image.
        patch_size: Voxels of a patch along each axis.
        norm_target: Whether each target patch is normalised to mean 0 and variance 1.
    """

    network: Network
    image_size: tuple[int, ...]
    channels: int
    patch_size: tuple[int, ...]
    norm_target: bool = False

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along each axis."""
        return tuple(size // patch for size, patch in zip(self.image_size, self.patch_size, strict=True))

    @property
    def num_tokens(self) -> int:
        """Patches of an image."""
        return math.prod(self.grid)


class Decoder(nn.Module):
    """Tokens of kept patches to voxels.

    Tokens stay in the order of the masking, kept ones first: attention does not care, and the hidden ones are then a
    slice. Only positions are gathered.
    """

    config: MaeConfig

    def setup(self) -> None:
        config = self.config
        encoder = config.encoder
        self.embed = Linear(config.decoder_width, encoder.dtype)
        self.mask_token = self.param("mask_token", nn.initializers.normal(0.02), (config.decoder_width,))
        self.position = self.param("position", lambda key: jnp.asarray(sincos(config.decoder_width, encoder.grid)))
        self.blocks = Blocks(config.block, config.decoder_depth, 0.0, encoder.remat, encoder.scan)
        self.norm = LayerNorm(1e-6)
        voxels = encoder.channels
        for edge in encoder.patch_size:
            voxels *= edge
        self.prediction = Linear(voxels, encoder.dtype)

    def __call__(
        self, tokens: Float[Array, "batch token width"], masking: Masking, all_patches: bool = False
    ) -> Float[Array, "batch patch voxel"]:
        seen = self.embed(tokens).astype(jnp.float32)
        batch, hidden = masking.hidden.shape
        guessed = jnp.broadcast_to(self.mask_token, (batch, hidden, self.config.decoder_width))
        patches = jnp.concatenate([seen[:, 1:], guessed], axis=1) + jnp.asarray(self.position)[1:][masking.order]
        x = jnp.concatenate([seen[:, :1] + self.position[0], patches], axis=1)
        x = self.norm(self.blocks(x)[:, 1 if all_patches else tokens.shape[1] :])
        prediction = self.prediction(x).astype(jnp.float32)
        return jax.nn.sigmoid(prediction) if self.config.sigmoid else prediction


class Mae(nn.Module):
    """Hide patches, encode the rest, predict the hidden ones."""

    config: MaeConfig

    def setup(self) -> None:
        self.encoder = Vit(self.config.encoder)
        self.decoder = Decoder(self.config)

    def __call__(
        self,
        image: Float[Array, "batch ..."],
        noise: Float[Array, "batch token"] | None = None,
        *,
        key: KeyArray | None = None,
        all_patches: bool = False,
    ) -> MaeOutput:
        """Return tokens, prediction and masking; with neither key nor noise nothing is hidden.

        Args:
            image: [batch, *image_size, channels].
            noise: One uniform number per patch (`arrays.masking.draw_noise`), of which the smallest are kept, for a
                masking of the caller's; drawn from the key by default.
            key: Switches masking on.
            all_patches: Predict kept patches too, to look at.
        """
        config = self.config
        masking = choose_masking(image.shape[0], config.encoder.num_tokens, config.mask_ratio, noise, key)
        tokens = self.encoder(image, masking.kept)
        return MaeOutput(tokens, self.decoder(tokens, masking, all_patches), masking)


SHARDING_RULES = VIT_RULES


@functools.lru_cache(maxsize=8)  # one record for one configuration, so that what was compiled for it serves again
def masked_model(config: MaeConfig) -> MaskedModel:
    """Return the masked autoencoder around a vision transformer."""
    model, encoder = make_model(Mae(config)), config.encoder

    def init(key: KeyArray) -> Params:
        return model.init(
            key, jnp.zeros((1, *encoder.image_size, encoder.channels)), jnp.zeros((1, encoder.num_tokens))
        )

    network = Network(init, model.apply, SHARDING_RULES, FROZEN)
    return MaskedModel(network, encoder.image_size, encoder.channels, encoder.patch_size, config.norm_target)


TANGERINE_LARGE = MaeConfig()
TANGERINE_BASE = MaeConfig(VitConfig(width=768, depth=12, heads=12, hidden=3072))
# The workload "S" of benchmarks/bench_mae3d.py.
MAE_S_96 = MaeConfig(
    VitConfig((96, 96, 96), (16, 16, 16), width=384, depth=6, heads=6, hidden=1536),
    decoder_width=192,
    decoder_depth=4,
    decoder_heads=6,
    decoder_hidden=768,
)


def oblong_positions(config: MaeConfig, layout: Literal["clean", "upstream"]) -> Params:
    """Return both transformers' tables of positions in ProFound's form; see `arrays.position.sincos_3d_oblong`."""
    x, y, z = config.encoder.grid
    widths = {"encoder": config.encoder.width, "decoder": config.decoder_width}
    return {name: {"position": sincos_3d_oblong(width, (x, y, z), layout)} for name, width in widths.items()}


def small_mae(edge: int, patch: int, width: int, depth: int) -> MaeConfig:
    """Return a masked autoencoder of cubes that a laptop can train."""
    encoder = VitConfig(
        (edge,) * 3, (patch,) * 3, width=width, depth=depth, heads=width // 32, hidden=4 * width, patch_gain=8.0
    )
    return MaeConfig(
        encoder, decoder_width=width // 2, decoder_depth=2, decoder_heads=width // 32, decoder_hidden=2 * width
    )


MAE_LAPTOP_3D = small_mae(32, 8, 96, 3)
MAE_SMOKE_3D = small_mae(32, 8, 64, 2)
