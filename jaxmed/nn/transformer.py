"""The pre-norm transformer block of ViT: normalise, attend, add; normalise, MLP, add."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.types import KeyArray
from jaxmed.nn.attention import AttentionKind, self_attention


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
    """

    width: int
    heads: int
    hidden: int
    epsilon: float = 1e-6
    dtype: str = "float32"
    attention: AttentionKind = "auto"

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
    """y = x kernel + bias, over merged leading axes: one plain matrix product, which is what a CPU does fastest."""

    features: int | tuple[int, ...]
    dtype: str = "float32"
    kernel_init: Any = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch features"]:
        shape = (self.features,) if isinstance(self.features, int) else self.features
        columns = 1
        for length in shape:
            columns *= length

        def init(key: KeyArray, full: tuple[int, ...], dtype: Any) -> Any:
            return self.kernel_init(key, (full[0], columns), dtype).reshape(full)

        kernel = self.param("kernel", init, (x.shape[-1], *shape), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        product = jnp.dot(rows, kernel.reshape(x.shape[-1], columns).astype(self.dtype))
        return (product + bias.reshape(columns).astype(self.dtype)).reshape(*x.shape[:-1], columns)


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

    @nn.compact
    def __call__(self, x: Float[Array, "batch token width"]) -> Float[Array, "batch token width"]:
        config = self.config
        heads = (3, config.heads, config.width // config.heads)
        qkv = Linear(heads, config.dtype, name="qkv")(x).reshape(*x.shape[:2], *heads)
        mixed = self_attention(qkv, config.attention)
        return Linear(config.width, config.dtype, name="out")(mixed.reshape(*x.shape[:2], config.width))


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch token width"]) -> Float[Array, "batch token width"]:
        hidden = nn.gelu(Linear(self.config.hidden, self.config.dtype, name="fc1")(x), approximate=False)
        return Linear(self.config.width, self.config.dtype, name="fc2")(hidden)


class Block(nn.Module):
    """One block; the stream of tokens is float32."""

    config: BlockConfig

    def setup(self) -> None:
        self.norm1 = LayerNorm(self.config.epsilon)
        self.attention = Attention(self.config)
        self.norm2 = LayerNorm(self.config.epsilon)
        self.mlp = Mlp(self.config)

    def __call__(
        self, x: Float[Array, "batch token width"], drop: DropPath | None = None
    ) -> Float[Array, "batch token width"]:
        return self.after_norm(x, self.norm1(x), drop)

    def first_norm(self, x: Float[Array, "batch token width"]) -> Float[Array, "batch token width"]:
        """Return the first layer norm's output, on which Grad-CAM looks."""
        return self.norm1(x)

    def after_norm(
        self,
        x: Float[Array, "batch token width"],
        normed: Float[Array, "batch token width"],
        drop: DropPath | None = None,
    ) -> Float[Array, "batch token width"]:
        """Return the block's output, given the first layer norm's."""
        first, second = (None, None) if drop is None else jax.random.split(drop.key)
        x = x + _skip(self.attention(normed), drop, first)
        return x + _skip(self.mlp(self.norm2(x)), drop, second)


def _skip(branch: jax.Array, drop: DropPath | None, key: KeyArray | None) -> jax.Array:
    branch = branch.astype(jnp.float32)
    if drop is None or key is None:
        return branch
    keep = 1 - jnp.asarray(drop.rate, jnp.float32)
    kept = jax.random.bernoulli(key, keep, (branch.shape[0],) + (1,) * (branch.ndim - 1))
    return jnp.where(kept, branch / keep, 0)
