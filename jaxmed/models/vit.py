"""Vision transformer of ViT (arXiv:2010.11929), for 2D and 3D images."""

import dataclasses
import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmed.arrays.masking import take_tokens
from jaxmed.arrays.patches import patch_grid, patchify
from jaxmed.arrays.position import sincos
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Decay, Positive, Size, checked
from jaxmed.models.encoder import Encoder
from jaxmed.nn.attention import AttentionKind
from jaxmed.nn.model import LayerRules, make_model
from jaxmed.nn.transformer import Block, BlockConfig, DropPath, LayerNorm, Linear

FINAL_EPSILON = 1e-6  # of the final norm


@dataclasses.dataclass(frozen=True)
@checked
class VitConfig:
    """A vision transformer.

    Attributes:
        image_size: Voxels along each spatial axis; two or three axes.
        patch_size: Patch edge along each spatial axis, in voxels.
        channels: Of the image.
        width: Token width.
        depth: Transformer blocks.
        heads: Attention heads.
        hidden: Width inside the MLPs.
        patch_gain: Factor on the patch kernel as it is first drawn. Volumes in [0, 1] differ between subjects by
            hundredths, which is little beside position codes of unit size; 8 lets a small model see them in minutes.
        final_norm: Whether a layer norm follows the last block.
        drop_path_rate: Probability of skipping a branch of the last block, growing linearly from 0 at the first.
        dtype: Of the matrix products.
        remat: Recompute blocks in the backward pass: less memory, a third more work.
        scan: Compile one block and loop over it: quicker to compile for deep models; parameters keep their layout.
        attention: See `nn.attention.self_attention`.
    """

    image_size: tuple[Size, ...] = (256, 256, 256)
    patch_size: tuple[Size, ...] = (16, 16, 16)
    channels: Size = 1
    width: Size = 1024
    depth: Size = 24
    heads: Size = 16
    hidden: Size = 4096
    patch_gain: Positive = 1.0
    final_norm: bool = True
    drop_path_rate: Decay = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    scan: bool = False
    attention: AttentionKind = "auto"

    def __post_init__(self) -> None:
        if len(self.image_size) not in (2, 3):
            raise ValueError(f"image_size: expected 2 or 3 axes, found {self.image_size}")
        patch_grid(self.image_size, self.patch_size)
        self.block  # noqa: B018  refuses heads that do not divide the width

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each spatial axis."""
        return patch_grid(self.image_size, self.patch_size)

    @property
    def num_tokens(self) -> int:
        """Patch tokens of an image, without the class token."""
        return math.prod(self.grid)

    @property
    def block(self) -> BlockConfig:
        """What every block is."""
        return BlockConfig(self.width, self.heads, self.hidden, 1e-6, self.dtype, self.attention)


class Blocks(nn.Module):
    """A column of blocks, unrolled or scanned; parameters are one tree per block either way."""

    block: BlockConfig
    depth: int
    drop_path_rate: float = 0.0
    remat: bool = False
    scan: bool = False

    def setup(self) -> None:
        kind = nn.remat(Block) if self.remat else Block
        self.layer = [kind(self.block) for _ in range(self.depth)]

    def __call__(
        self, x: Float[Array, "batch token width"], key: KeyArray | None = None
    ) -> Float[Array, "batch token width"]:
        drops = self._drops(key)
        if self.scan and not self.is_initializing():
            return self._scan(x, drops)
        for number, block in enumerate(self.layer):
            x = block(x, None if drops is None else jax.tree.map(lambda leaf: leaf[number], drops))  # noqa: B023
        return x

    def before_last(self, x: Float[Array, "batch token width"]) -> tuple[Any, Any]:
        """Return the last block's input and its first layer norm of it."""
        for block in self.layer[:-1]:
            x = block(x)
        return x, self.layer[-1].first_norm(x)

    def last(self, x: Float[Array, "batch token width"], normed: Float[Array, "batch token width"]) -> Any:
        """Return the last block's output."""
        return self.layer[-1].after_norm(x, normed)

    def _drops(self, key: KeyArray | None) -> DropPath | None:
        if key is None or not self.drop_path_rate:
            return None
        return DropPath(jax.random.split(key, self.depth), jnp.linspace(0.0, self.drop_path_rate, self.depth))

    def _scan(self, x: jax.Array, drops: DropPath | None) -> jax.Array:
        params = [block.variables["params"] for block in self.layer]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        block = Block(self.block, parent=None)

        def advance(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            params, drop = layer
            return block.apply({"params": params}, x, drop), None  # pyright: ignore[reportReturnType]

        return jax.lax.scan(jax.checkpoint(advance) if self.remat else advance, x, (stacked, drops))[0]


class Vit(nn.Module):
    """Image to tokens: the class token first, then the patch tokens that are kept."""

    config: VitConfig

    def setup(self) -> None:
        config = self.config
        self.patch_embed = Linear(
            config.width, config.dtype, _scaled(nn.initializers.xavier_uniform(), config.patch_gain)
        )
        self.class_token = self.param("class_token", nn.initializers.normal(0.02), (config.width,))
        self.position = self.param("position", _position_init(config.width, config.grid))
        self.blocks = Blocks(config.block, config.depth, config.drop_path_rate, config.remat, config.scan)
        if config.final_norm:
            self.norm = LayerNorm(FINAL_EPSILON)

    def __call__(
        self,
        image: Float[Array, "batch ..."],
        kept: Int[Array, "batch keep"] | None = None,
        *,
        key: KeyArray | None = None,
    ) -> Float[Array, "batch token width"]:
        """Return tokens after the last block (and the final norm, where there is one).

        Args:
            image: [batch, *image_size, channels].
            kept: Patch tokens to process, in this order; all by default.
            key: Switches stochastic depth on.
        """
        return self._finish(self.blocks(self.embed(image, kept), key))

    def embed(
        self, image: Float[Array, "batch ..."], kept: Int[Array, "batch keep"] | None = None
    ) -> Float[Array, "batch token width"]:
        """Return class token and embedded patches, positions added: only kept patches are ever multiplied."""
        config = self.config
        if image.shape[1:] != (*config.image_size, config.channels):
            raise ValueError(f"image: expected {(*config.image_size, config.channels)}, got {image.shape[1:]}")
        patches = patchify(image, config.patch_size)
        position = self.position[None, 1:]
        if kept is not None:
            patches = take_tokens(patches, kept)
            position = jnp.asarray(self.position)[1:][kept]  # NumPy's own cannot be asked by traced places
        tokens = self.patch_embed(patches).astype(jnp.float32) + position
        first = jnp.broadcast_to(self.class_token + self.position[0], (image.shape[0], 1, config.width))
        return jnp.concatenate([first, tokens], axis=1)

    def before_last(self, image: Float[Array, "batch ..."]) -> tuple[Any, Any]:
        """Return the last block's input and its first layer norm of it, for Grad-CAM."""
        return self.blocks.before_last(self.embed(image))

    def last(self, x: Float[Array, "batch token width"], normed: Float[Array, "batch token width"]) -> Any:
        """Return the tokens of `__call__`, given what `before_last` returns."""
        return self._finish(self.blocks.last(x, normed))

    def _finish(self, tokens: jax.Array) -> jax.Array:
        return self.norm(tokens) if self.config.final_norm else tokens


def _scaled(init: Any, gain: float) -> Any:
    return lambda key, shape, dtype: gain * init(key, shape, dtype)


def _position_init(width: int, grid: tuple[int, ...]) -> Any:
    return lambda key: jnp.asarray(sincos(width, grid))


# Layouts over the mesh axis "model": columns of the first product of each branch, rows of the second.
SHARDING_RULES = (
    (r"attention/qkv/kernel$", PartitionSpec(None, None, "model", None)),
    (r"attention/qkv/bias$", PartitionSpec(None, "model", None)),
    (r"attention/out/kernel$", PartitionSpec("model", None)),
    (r"mlp/fc1/kernel$", PartitionSpec(None, "model")),
    (r"mlp/fc1/bias$", PartitionSpec("model")),
    (r"mlp/fc2/kernel$", PartitionSpec("model", None)),
)

# The position table is a constant; layer 0 is what makes tokens of an image, block i is layer i + 1.
FROZEN = (r"(^|/)position$",)
EMBEDDING, BLOCK = (r"^encoder/(patch_embed|class_token|position)(/|$)",), r"^encoder/blocks/layer_(\d+)/"


class _Encoding(nn.Module):
    """The encoder of a classifier, under whose name it is drawn."""

    config: VitConfig

    def setup(self) -> None:
        self.encoder = Vit(self.config)

    def __call__(self, image: Float[Array, "batch ..."]) -> Float[Array, "batch token width"]:
        return self.encoder(image)


@functools.lru_cache(maxsize=128)
def vit_encoder(config: VitConfig) -> Encoder:
    """Return a vision transformer as an `Encoder`."""
    bare = make_model(Vit(dataclasses.replace(config, final_norm=False)))

    def init(key: KeyArray) -> Params:
        return make_model(_Encoding(config)).init(key, jnp.zeros((1, *config.image_size, config.channels)))["encoder"]

    def norm(params: Params, tokens: jax.Array) -> jax.Array:
        return make_model(LayerNorm(FINAL_EPSILON)).apply(params["norm"], tokens) if config.final_norm else tokens

    return Encoder(
        config, config.image_size, config.channels, config.width, config.grid, init, bare.apply, norm,
        functools.partial(bare.apply, method="before_last"), functools.partial(bare.apply, method="last"), prefix=1,
        can_drop=True, is_random=config.drop_path_rate > 0, layers=LayerRules(config.depth, EMBEDDING, BLOCK),
        rules=SHARDING_RULES, frozen=FROZEN,
    )  # fmt: skip


VIT_L16_3D = VitConfig()
VIT_L16_2D = VitConfig(image_size=(224, 224), patch_size=(16, 16), channels=3)
