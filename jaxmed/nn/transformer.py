"""The pre-norm transformer block of ViT: normalise, attend, add; normalise, MLP, add.

With what DINOv2 (arXiv:2304.07193) and DINOv3 (arXiv:2508.10104) add to it: factors on both branches, gated MLPs, and
positions as rotations of queries and keys.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.layers import layer_holding
from jaxmed.arrays.types import KeyArray
from jaxmed.nn.attention import AttentionKind, self_attention

MlpKind: TypeAlias = Literal["gelu", "swiglu", "quick_gelu"]
BiasKind: TypeAlias = Literal["all", "all but keys", "none"]


class Rotation(NamedTuple):
    """Turns of queries and keys, the same for all heads; of a token without a place cosine 1 and sine 0.

    Attributes:
        cosine: Of the angles.
        sine: Of the angles.
    """

    cosine: Float[Array, "*batch token depth"]
    sine: Float[Array, "*batch token depth"]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One transformer block.

    Attributes:
        width: Token width.
        heads: Attention heads.
        hidden: Width inside the MLP.
        epsilon: Added to the variance in layer norms.
        dtype: Type of the matrix products; parameters, norms, softmax and sums stay float32.
        attention: See `nn.attention.self_attention`.
        mlp: "gelu"; "swiglu": silu(a) b of two linear maps a and b; or "quick_gelu": CLIP's a sigmoid(1.702 a).
        layer_scale: What the factors on the features of both branches begin with; 0 for none.
        qkv_bias: Which of queries, keys and values have a constant. "all but keys" keeps one for keys and takes it for
            0, as DINOv3 does, whose files hold it.
    """

    width: int
    heads: int
    hidden: int
    epsilon: float = 1e-6
    dtype: str = "float32"
    attention: AttentionKind = "auto"
    mlp: MlpKind = "gelu"
    layer_scale: float = 0.0
    qkv_bias: BiasKind = "all"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of the width {self.width}, found {self.heads}")


class DropPath(NamedTuple):
    """Stochastic depth of one block: which images skip its two branches.

    Attributes:
        key: Consumed.
        rate: Probability of a skip, in [0, 1).
    """

    key: KeyArray
    rate: Float[Array, ""] | float


class Linear(nn.Module):
    """y = x kernel + bias, over merged leading axes: one plain matrix product, which is what a CPU does fastest.

    Several axes of features are merged for the product, but in a step that splits an inner one over devices: merged,
    the split could not be told any more, and the compiler would gather the whole kernel on each. Apart, the kernel's
    gradient is transposed, which costs a step on a CPU a tenth.

    The bias of `without_bias`, a place along the first axis of `features`, is there and counts as 0.
    """

    features: int | tuple[int, ...]
    dtype: str = "float32"
    kernel_init: Any = nn.initializers.xavier_uniform()
    use_bias: bool = True
    without_bias: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "..."]:
        shape = (self.features,) if isinstance(self.features, int) else self.features
        columns = 1
        for length in shape:
            columns *= length

        def init(key: KeyArray, full: tuple[int, ...], dtype: Any) -> Any:
            return self.kernel_init(key, (full[0], columns), dtype).reshape(full)

        kernel = self.param("kernel", init, (x.shape[-1], *shape), jnp.float32)
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        merged = shape if layer_holding().has_tensor_splits else (columns,)
        product = jnp.tensordot(rows, kernel.reshape(x.shape[-1], *merged).astype(self.dtype), 1)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
            if self.without_bias is not None:
                bias = jnp.asarray(bias).at[self.without_bias].set(0)
            product = product + bias.reshape(merged).astype(self.dtype)
        return product.reshape(*x.shape[:-1], *shape)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) scale + bias over the last axis, variance in two passes, float32."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias


class Attention(nn.Module):
    """Multi-head self-attention; the kernel "qkv" is [width, 3, head, depth]."""

    config: BlockConfig

    def setup(self) -> None:
        config = self.config
        without = 1 if config.qkv_bias == "all but keys" else None
        self.qkv = Linear(self.heads, config.dtype, use_bias=config.qkv_bias != "none", without_bias=without)
        self.out = Linear(config.width, config.dtype)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Shape of a token's queries, keys and values."""
        return 3, self.config.heads, self.config.width // self.config.heads

    def __call__(
        self, x: Float[Array, "batch token width"], rotation: Rotation | None = None
    ) -> Float[Array, "batch token width"]:
        mixed = self_attention(self._split(x, rotation), self.config.attention)
        return self.out(mixed.reshape(*x.shape[:2], self.config.width))

    def weights(
        self, x: Float[Array, "batch token width"], rotation: Rotation | None = None
    ) -> Float[Array, "batch head token token"]:
        """Return how much each token (down) looks at each (across), to be looked at; rows sum to 1."""
        qkv = self._split(x, rotation).astype(jnp.float32)
        scores = jnp.einsum("bqhd,bkhd->bhqk", qkv[:, :, 0] * self.heads[2] ** -0.5, qkv[:, :, 1])
        return jax.nn.softmax(scores, axis=-1)

    def _split(self, x: jax.Array, rotation: Rotation | None) -> Float[Array, "batch token 3 head depth"]:
        qkv = self.qkv(x)
        if rotation is None:
            return qkv
        turned = rotate(qkv[:, :, :2].astype(jnp.float32), rotation).astype(qkv.dtype)
        return jnp.concatenate([turned, qkv[:, :, 2:]], axis=2)


def rotate(
    x: Float[Array, "batch token part head depth"], rotation: Rotation
) -> Float[Array, "batch token part head depth"]:
    """Turn pairs of features, the first of each pair in the first half: x cos + (-second, first) sin."""
    cosine, sine = (angles[..., None, None, :] for angles in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cosine + jnp.concatenate([-second, first], axis=-1) * sine


class Mlp(nn.Module):
    """Linear, exact (erf) or quick GELU, linear; or, with two maps in "fc1", silu of one times the other, linear."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch token width"]) -> Float[Array, "batch token width"]:
        width = self.config.hidden
        if self.config.mlp == "swiglu":
            both = Linear((2, width), self.config.dtype, name="fc1")(x)
            hidden = nn.silu(both[..., 0, :]) * both[..., 1, :]
        else:
            linear = Linear(width, self.config.dtype, name="fc1")(x)
            is_quick = self.config.mlp == "quick_gelu"
            hidden = linear * nn.sigmoid(1.702 * linear) if is_quick else nn.gelu(linear, approximate=False)
        return Linear(self.config.width, self.config.dtype, name="fc2")(hidden)


class Block(nn.Module):
    """One block; the stream of tokens is float32."""

    config: BlockConfig

    def setup(self) -> None:
        self.norm1 = LayerNorm(self.config.epsilon)
        self.attention = Attention(self.config)
        self.norm2 = LayerNorm(self.config.epsilon)
        self.mlp = Mlp(self.config)
        if self.config.layer_scale:
            init = nn.initializers.constant(self.config.layer_scale)
            self.scale1 = self.param("scale1", init, (self.config.width,), jnp.float32)
            self.scale2 = self.param("scale2", init, (self.config.width,), jnp.float32)

    def __call__(
        self, x: Float[Array, "batch token width"], drop: DropPath | None = None, rotation: Rotation | None = None
    ) -> Float[Array, "batch token width"]:
        return self.after_norm(x, self.norm1(x), drop, rotation)

    def attention_weights(
        self, x: Float[Array, "batch token width"], rotation: Rotation | None = None
    ) -> Float[Array, "batch head token token"]:
        """Return how much each token looks at each."""
        return self.attention.weights(self.norm1(x), rotation)

    def first_norm(self, x: Float[Array, "batch token width"]) -> Float[Array, "batch token width"]:
        """Return the first layer norm's output, on which Grad-CAM looks."""
        return self.norm1(x)

    def after_norm(
        self,
        x: Float[Array, "batch token width"],
        normed: Float[Array, "batch token width"],
        drop: DropPath | None = None,
        rotation: Rotation | None = None,
    ) -> Float[Array, "batch token width"]:
        """Return the block's output, given the first layer norm's."""
        first, second = (None, None) if drop is None else jax.random.split(drop.key)
        scale1, scale2 = (self.scale1, self.scale2) if self.config.layer_scale else (1, 1)
        x = x + scale1 * _skip(self.attention(normed, rotation), drop, first)
        return x + scale2 * _skip(self.mlp(self.norm2(x)), drop, second)


def _skip(branch: jax.Array, drop: DropPath | None, key: KeyArray | None) -> jax.Array:
    branch = branch.astype(jnp.float32)
    if drop is None or key is None:
        return branch
    keep = 1 - jnp.asarray(drop.rate, jnp.float32)
    kept = jax.random.bernoulli(key, keep, (branch.shape[0],) + (1,) * (branch.ndim - 1))
    return jnp.where(kept, branch / keep, 0)
