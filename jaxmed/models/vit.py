"""Vision transformers on 2D and 3D images: ViT (arXiv:2010.11929), DINOv2 (2304.07193) and DINOv3 (2508.10104)."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxmed.arrays.layers import layer_holding
from jaxmed.arrays.masking import take_tokens
from jaxmed.arrays.patches import patch_grid, patchify
from jaxmed.arrays.position import rotary_angles, sincos
from jaxmed.arrays.types import KeyArray, Params, PartitionRules
from jaxmed.config import Decay, Length, NonNegative, Positive, Size, checked
from jaxmed.models.encoder import Encoder
from jaxmed.nn.attention import AttentionKind
from jaxmed.nn.model import LayerRules, Model, make_model, nested_model
from jaxmed.nn.transformer import BiasKind, Block, BlockConfig, DropPath, LayerNorm, Linear, MlpKind, Rotation


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
        positions: What tells where a token stands: "sincos", a table that stays as it is; "learned", one that is
            trained; "rope", rotations of queries and keys in every block (2D).
        registers: Tokens without a place after the class token, that belong to no output.
        mask_token: Whether there is a token that stands in for hidden patches.
        mlp: See `nn.transformer.BlockConfig`.
        layer_scale: See `nn.transformer.BlockConfig`.
        qkv_bias: See `nn.transformer.BlockConfig`.
        epsilon: Added to the variance in layer norms.
        drop_path_uniform: Whether every block skips its branches with `drop_path_rate`, as in DINOv2's training.
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
    positions: Literal["sincos", "learned", "rope"] = "sincos"
    registers: Length = 0
    mask_token: bool = False
    mlp: MlpKind = "gelu"
    layer_scale: NonNegative = 0.0
    qkv_bias: BiasKind = "all"
    epsilon: Positive = 1e-6
    drop_path_uniform: bool = False

    def __post_init__(self) -> None:
        if len(self.image_size) not in (2, 3):
            raise ValueError(f"image_size: expected 2 or 3 axes, found {self.image_size}")
        if self.positions == "rope" and (len(self.image_size) != 2 or self.width // self.heads % 4):
            found = f"{len(self.image_size)} axes and heads of {self.width / self.heads:g}"
            raise ValueError(f"positions: expected an image of 2 axes and heads of 4, 8, ... for rope, found {found}")
        patch_grid(self.image_size, self.patch_size)
        self.block  # noqa: B018  refuses heads that do not divide the width

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each spatial axis."""
        return patch_grid(self.image_size, self.patch_size)

    @property
    def num_tokens(self) -> int:
        """Patch tokens of an image, without class token and registers."""
        return math.prod(self.grid)

    @property
    def prefix(self) -> int:
        """Tokens before those of patches: the class token and registers."""
        return 1 + self.registers

    @property
    def block(self) -> BlockConfig:
        """What every block is."""
        return BlockConfig(
            self.width, self.heads, self.hidden, self.epsilon, self.dtype, self.attention, self.mlp, self.layer_scale,
            self.qkv_bias,
        )  # fmt: skip


class Blocks(nn.Module):
    """A column of blocks, unrolled or scanned; parameters are one tree per block either way."""

    block: BlockConfig
    depth: int
    drop_path_rate: float = 0.0
    remat: bool = False
    scan: bool = False
    drop_path_uniform: bool = False

    def setup(self) -> None:
        kind = nn.remat(Block) if self.remat else Block
        self.layer = [kind(self.block) for _ in range(self.depth)]

    def __call__(
        self, x: Float[Array, "batch token width"], key: KeyArray | None = None, rotation: Rotation | None = None
    ) -> Float[Array, "batch token width"]:
        drops = self._drops(key)
        if self.scan and not self.is_initializing():
            return self._scan(x, drops, rotation)
        for number, block in enumerate(self.layer):
            drop = None if drops is None else jax.tree.map(lambda leaf: leaf[number], drops)  # noqa: B023
            x = self._held(block)(x, drop, rotation)
        return x

    def each(
        self, x: Float[Array, "batch token width"], rotation: Rotation | None = None
    ) -> list[Float[Array, "batch token width"]]:
        """Return the output of every block."""
        found = []
        for block in self.layer:
            x = self._held(block)(x, None, rotation)
            found.append(x)
        return found

    def before_last(self, x: Float[Array, "batch token width"], rotation: Rotation | None = None) -> tuple[Any, Any]:
        """Return the last block's input and its first layer norm of it."""
        for block in self.layer[:-1]:
            x = block(x, None, rotation)
        return x, self.layer[-1].first_norm(x)

    def last(
        self,
        x: Float[Array, "batch token width"],
        normed: Float[Array, "batch token width"],
        rotation: Rotation | None = None,
    ) -> Any:
        """Return the last block's output."""
        return self.layer[-1].after_norm(x, normed, None, rotation)

    def last_weights(self, x: Float[Array, "batch token width"], rotation: Rotation | None = None) -> Any:
        """Return how much each token looks at each in the last block."""
        x, _ = self.before_last(x, rotation)
        return self.layer[-1].attention_weights(x, rotation)

    def _drops(self, key: KeyArray | None) -> DropPath | None:
        if key is None or not self.drop_path_rate:
            return None
        first = self.drop_path_rate if self.drop_path_uniform else 0.0
        return DropPath(jax.random.split(key, self.depth), jnp.linspace(first, self.drop_path_rate, self.depth))

    def _held(self, block: Any) -> Callable[..., jax.Array]:
        """Return a block as a function, of parameters that are held as the step says."""
        holding = layer_holding()
        if not holding.is_active or self.is_initializing():
            return block
        bare = Block(self.block, parent=None)

        def call(params: Params, *inputs: Any) -> Any:
            return bare.apply({"params": holding.whole(params)}, *inputs)

        return functools.partial(jax.checkpoint(call) if self.remat else call, block.variables["params"])

    def _scan(self, x: jax.Array, drops: DropPath | None, rotation: Rotation | None) -> jax.Array:
        holding = layer_holding()
        params = [holding.split(block.variables["params"]) for block in self.layer]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        block = Block(self.block, parent=None)

        def advance(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            params, drop = layer
            held = holding.whole(holding.split(params))
            return block.apply({"params": held}, x, drop, rotation), None  # pyright: ignore[reportReturnType]

        return jax.lax.scan(jax.checkpoint(advance) if self.remat else advance, x, (stacked, drops))[0]


class Vit(nn.Module):
    """Image to tokens: the class token first, registers, then the patch tokens that are kept."""

    config: VitConfig

    def setup(self) -> None:
        config = self.config
        self.patch_embed = Linear(
            config.width, config.dtype, _scaled(nn.initializers.xavier_uniform(), config.patch_gain)
        )
        self.class_token = self.param("class_token", nn.initializers.normal(0.02), (config.width,))
        if config.positions != "rope":
            self.position = self.param("position", _position_init(config))
        if config.registers:
            shape = (config.registers, config.width)
            self.register_tokens = self.param("register_tokens", nn.initializers.normal(0.02), shape)
        if config.mask_token:
            self.mask_token = self.param("mask_token", nn.initializers.zeros, (config.width,))
        self.blocks = Blocks(
            config.block, config.depth, config.drop_path_rate, config.remat, config.scan, config.drop_path_uniform
        )
        if config.final_norm:
            self.norm = LayerNorm(config.epsilon)

    def __call__(
        self,
        image: Float[Array, "batch ..."],
        kept: Int[Array, "batch keep"] | None = None,
        *,
        hidden: Bool[Array, "batch patch"] | None = None,
        key: KeyArray | None = None,
        rotation: Rotation | None = None,
    ) -> Float[Array, "batch token width"]:
        """Return tokens after the last block (and the final norm, where there is one).

        Args:
            image: [batch, *image_size, channels].
            kept: Patch tokens to process, in this order; all by default.
            hidden: Patches in whose place the mask token is seen; none by default.
            key: Switches stochastic depth on.
            rotation: Turns in place of the configured ones, of every token.
        """
        turns = self._rotation(kept) if rotation is None else rotation
        return self._finish(self.blocks(self.embed(image, kept, hidden), key, turns))

    def embed(
        self,
        image: Float[Array, "batch ..."],
        kept: Int[Array, "batch keep"] | None = None,
        hidden: Bool[Array, "batch patch"] | None = None,
    ) -> Float[Array, "batch token width"]:
        """Return class token, registers and embedded patches, positions added: only kept patches are multiplied.

        Registers have no position.
        """
        config = self.config
        if image.shape[1:] != (*config.image_size, config.channels):
            raise ValueError(f"image: expected {(*config.image_size, config.channels)}, got {image.shape[1:]}")
        patches = patchify(image, config.patch_size)
        if kept is not None:
            patches = take_tokens(patches, kept)
        tokens = self.patch_embed(patches).astype(jnp.float32)
        if hidden is not None:
            hidden = hidden if kept is None else jnp.take_along_axis(hidden, kept, axis=1)
            tokens = jnp.where(hidden[..., None], self.mask_token, tokens)
        first = self.class_token
        if config.positions != "rope":
            table = jnp.asarray(self.position)  # NumPy's own cannot be asked by traced places
            tokens = tokens + (table[None, 1:] if kept is None else table[1:][kept])
            first = first + table[0]
        prefix = jnp.broadcast_to(first, (image.shape[0], 1, config.width))
        if config.registers:
            shape = (image.shape[0], config.registers, config.width)
            prefix = jnp.concatenate([prefix, jnp.broadcast_to(self.register_tokens, shape)], axis=1)
        return jnp.concatenate([prefix, tokens], axis=1)

    def hidden_states(self, image: Float[Array, "batch ..."]) -> list[Float[Array, "batch token width"]]:
        """Return the embedded tokens and the output of every block, before the final norm."""
        x = self.embed(image)
        return [x, *self.blocks.each(x, self._rotation(None))]

    def last_states(self, image: Float[Array, "batch ..."], layers: int) -> list[Float[Array, "batch token width"]]:
        """Return the output of the last blocks, each after the final norm."""
        return [self._finish(state) for state in self.hidden_states(image)[-layers:]]

    def attention(self, image: Float[Array, "batch ..."]) -> Float[Array, "batch head token token"]:
        """Return how much each token (down) looks at each (across) in the last block."""
        return self.blocks.last_weights(self.embed(image), self._rotation(None))

    def before_last(self, image: Float[Array, "batch ..."]) -> tuple[Any, Any]:
        """Return the last block's input and its first layer norm of it, for Grad-CAM."""
        return self.blocks.before_last(self.embed(image), self._rotation(None))

    def last(self, x: Float[Array, "batch token width"], normed: Float[Array, "batch token width"]) -> Any:
        """Return the tokens of `__call__`, given what `before_last` returns."""
        return self._finish(self.blocks.last(x, normed, self._rotation(None)))

    def _finish(self, tokens: jax.Array) -> jax.Array:
        return self.norm(tokens) if self.config.final_norm else tokens

    def _rotation(self, kept: jax.Array | None) -> Rotation | None:
        config = self.config
        if config.positions != "rope":
            return None
        turns = rotation_of(rotary_angles(config.width // config.heads, config.grid), config.prefix)
        if kept is None:
            return turns
        return Rotation(*(_with_prefix(part, kept, config.prefix) for part in turns))


def rotation_of(angles: Float[Any, "patch depth"], prefix: int) -> Rotation:
    """Return the turns of all tokens of an image, given the angles of patches: those of the prefix do not turn."""
    angles = jnp.pad(jnp.asarray(angles), ((prefix, 0), (0, 0)))
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def _with_prefix(part: jax.Array, kept: jax.Array, prefix: int) -> jax.Array:
    first = jnp.broadcast_to(part[:prefix], (kept.shape[0], prefix, part.shape[1]))
    return jnp.concatenate([first, part[prefix:][kept]], axis=1)


def _scaled(init: Any, gain: float) -> Any:
    return lambda key, shape, dtype: gain * init(key, shape, dtype)


def _position_init(config: "VitConfig") -> Any:
    if config.positions == "learned":
        shape = (1 + config.num_tokens, config.width)
        return lambda key: 0.02 * jax.random.truncated_normal(key, -2, 2, shape, jnp.float32)
    return lambda key: jnp.asarray(sincos(config.width, config.grid))


# Layouts over the mesh axis "model": columns of the first product of each branch, rows of the second. Tables of
# positions stay whole: rows are gathered of them, and split by columns they would send every image's tokens around.
SHARDING_RULES = (
    (r"(^|/)position$", PartitionSpec()),
    (r"attention/qkv/kernel$", PartitionSpec(None, None, "model", None)),
    (r"attention/qkv/bias$", PartitionSpec(None, "model", None)),
    (r"attention/out/kernel$", PartitionSpec("model", None)),
    (r"mlp/fc1/kernel$", PartitionSpec(None, "model")),
    (r"mlp/fc1/bias$", PartitionSpec("model")),
    (r"mlp/fc2/kernel$", PartitionSpec("model", None)),
)

# The table of sines is a constant; layer 0 is what makes tokens of an image, block i is layer i + 1.
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
        return make_model(LayerNorm(config.epsilon)).apply(params["norm"], tokens) if config.final_norm else tokens

    def call(method: str) -> Any:
        return functools.partial(bare.apply, method=method)

    return Encoder(
        config, config.image_size, config.channels, config.width, config.grid, init, bare.apply, norm,
        call("before_last"), call("last"), call("hidden_states"), call("attention"), prefix=config.prefix,
        can_drop=True, is_random=config.drop_path_rate > 0, layers=LayerRules(config.depth, EMBEDDING, BLOCK),
        rules=gated_rules(config.mlp), frozen=FROZEN if config.positions == "sincos" else (),
    )  # fmt: skip


@functools.lru_cache(maxsize=128)
def vit_model(config: VitConfig) -> Model:
    """Return the transformer alone, image to tokens, with parameters {"encoder": ...} as in files."""
    return nested_model(make_model(Vit(config)), "encoder")


def gated_rules(mlp: MlpKind) -> PartitionRules:
    """Return the layouts of transformers: the two maps of a gated MLP are split alike."""
    if mlp != "swiglu":
        return SHARDING_RULES
    return (
        (r"mlp/fc1/kernel$", PartitionSpec(None, None, "model")),
        (r"mlp/fc1/bias$", PartitionSpec(None, "model")),
        *SHARDING_RULES,
    )


VIT_L16_3D = VitConfig()
VIT_L16_2D = VitConfig(image_size=(224, 224), patch_size=(16, 16), channels=3)
