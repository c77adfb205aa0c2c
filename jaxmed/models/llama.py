"""A Llama decoder that reads on from what it has read: RMSNorm, rotary positions, grouped queries, SwiGLU.

What was read is a list of `Segment`s of keys and values. A segment that all texts of a batch begin with is held once:
it has a batch of 1, and no copy of it is made.

Source: Llama, arXiv:2302.13971; grouped queries, arXiv:2305.13245; rotary positions, arXiv:2104.09864. Names and
conventions are those of the Hugging Face implementation: rotations pair feature i with i + depth / 2.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmed.config import Positive, Size, checked
from jaxmed.nn.transformer import Linear, Rotation, rotate

VOCABULARY = 2_000_000


@dataclasses.dataclass(frozen=True)
@checked
class LlamaConfig:
    """A decoder.

    Attributes:
        vocabulary: Tokens.
        width: Token width.
        depth: Blocks.
        heads: Heads of queries.
        key_heads: Heads of keys and values, a divisor of `heads`.
        head_width: Features of a head.
        hidden: Width inside the MLPs.
        epsilon: Added to mean squares.
        theta: Base of the rotations' wavelengths.
        tied: Whether logits use the table of embeddings.
        dtype: Type of the matrix products; parameters, norms, softmax and sums stay float32.
    """

    vocabulary: int = 32064
    width: Size = 4096
    depth: Size = 32
    heads: Size = 32
    key_heads: Size = 32
    head_width: Size = 128
    hidden: Size = 11008
    epsilon: Positive = 1e-5
    theta: Positive = 10_000.0
    tied: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if not 1 < self.vocabulary < VOCABULARY:
            raise ValueError(f"vocabulary: expected 2 to {VOCABULARY:,}, found {self.vocabulary}")
        if self.heads % self.key_heads or self.head_width % 2:
            found = f"{self.heads} heads, {self.key_heads} of keys, {self.head_width} features each"
            raise ValueError(f"key_heads: expected a divisor of heads, and an even width of each, found {found}")


class Segment(NamedTuple):
    """Keys and values of some tokens.

    Attributes:
        keys: Turned by their positions; of a batch of 1 where all texts share them.
        values: Of the same.
        is_valid: False for padding, and for places that are not filled yet.
    """

    keys: Float[Array, "layer batch token key_head depth"]
    values: Float[Array, "layer batch token key_head depth"]
    is_valid: Bool[Array, "batch token"]


def empty_segment(config: LlamaConfig, batch: int, length: int) -> Segment:
    """Return places for tokens to come."""
    zeros = jnp.zeros((config.depth, batch, length, config.key_heads, config.head_width), config.dtype)
    return Segment(zeros, zeros, jnp.zeros((batch, length), bool))


def write_segment(segment: Segment, new: Segment, place: Int[Array, ""] | int) -> Segment:
    """Put new tokens into places of a segment."""
    parts = [
        jax.lax.dynamic_update_slice_in_dim(old, part.astype(old.dtype), place, axis)
        for old, part, axis in zip(segment, new, (2, 2, 1), strict=True)
    ]
    return Segment(*parts)


class RmsNorm(nn.Module):
    """x / sqrt(mean of squares + epsilon) scale, in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon) * scale


class LlamaBlock(nn.Module):
    """Normalise, attend to what was read and to oneself, add; normalise, gated MLP, add."""

    config: LlamaConfig

    def setup(self) -> None:
        config = self.config
        self.norm1 = RmsNorm(config.epsilon)
        self.query = self._linear((config.heads, config.head_width))
        self.key = self._linear((config.key_heads, config.head_width))
        self.value = self._linear((config.key_heads, config.head_width))
        self.out = self._linear(config.width)
        self.norm2 = RmsNorm(config.epsilon)
        self.gate = self._linear(config.hidden)
        self.up = self._linear(config.hidden)
        self.down = self._linear(config.width)

    def _linear(self, features: int | tuple[int, ...]) -> Linear:
        return Linear(features, self.config.dtype, use_bias=False)

    def __call__(self, x: Any, rotation: Rotation, past: Sequence[Segment], is_valid: Any) -> tuple[Any, Any, Any]:
        """Return the stream, and keys and values of its tokens; `past` has no axis of layers."""
        config, (batch, tokens, _) = self.config, x.shape
        normed = self.norm1(x)
        query = _turn(self.query(normed).reshape(batch, tokens, config.heads, config.head_width), rotation)
        shape = (batch, tokens, config.key_heads, config.head_width)
        key, value = _turn(self.key(normed).reshape(shape), rotation), self.value(normed).reshape(shape)
        mixed = attend(query, [*past, Segment(key, value, is_valid)])
        x = x + self.out(mixed.reshape(batch, tokens, -1)).astype(jnp.float32)
        normed = self.norm2(x)
        hidden = nn.silu(self.gate(normed)) * self.up(normed)
        return x + self.down(hidden).astype(jnp.float32), key, value


def attend(
    query: Float[Array, "batch token head depth"], segments: Sequence[Segment]
) -> Float[Array, "batch token head depth"]:
    """Mix the values of all segments; of the last one, which are the tokens themselves, those up to each token.

    Args:
        query: Turned by their positions.
        segments: Without an axis of layers.
    """
    batch, tokens, heads, depth = query.shape
    scores = []
    for number, (keys, _, is_valid) in enumerate(segments):
        grouped = query.reshape(batch, tokens, keys.shape[2], -1, depth)
        if keys.shape[0] == 1:  # shared: one product for the whole batch
            found = jnp.einsum("btkgd,skd->bkgts", grouped, keys[0], preferred_element_type=jnp.float32)
        else:
            found = jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=jnp.float32)
        seen = is_valid[:, None, None, None, :]
        if number == len(segments) - 1:
            seen = seen & jnp.tril(jnp.ones((tokens, tokens), bool))
        # Not -inf: a row of padding that sees nothing shall stay finite.
        scores.append(jnp.where(seen, found * depth**-0.5, jnp.finfo(jnp.float32).min))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    mixed, start = jnp.zeros((batch, tokens, heads, depth), jnp.float32), 0
    for keys, values, _ in segments:
        part = weights[..., start : start + keys.shape[1]].astype(values.dtype)
        start += keys.shape[1]
        letters = ("skd", values[0]) if keys.shape[0] == 1 else ("bskd", values)
        found = jnp.einsum(f"bkgts,{letters[0]}->btkgd", part, letters[1], preferred_element_type=jnp.float32)
        mixed = mixed + found.reshape(mixed.shape)
    return mixed.astype(query.dtype)


class Llama(nn.Module):
    """Tokens, or what stands in their places, to the stream after the last norm."""

    config: LlamaConfig

    def setup(self) -> None:
        config = self.config
        shape = (config.vocabulary, config.width)
        self.table = self.param("table", nn.initializers.normal(0.02), shape, jnp.float32)
        self.layer = [LlamaBlock(config) for _ in range(config.depth)]
        self.norm = RmsNorm(config.epsilon)
        if not config.tied:
            self.head = Linear(config.vocabulary, config.dtype, use_bias=False)

    def embed(self, tokens: Int[Array, "batch token"]) -> Float[Array, "batch token width"]:
        """Return the embeddings of tokens."""
        return jnp.asarray(self.table)[tokens]

    def __call__(
        self,
        x: Float[Array, "batch token width"],
        positions: Int[Array, "batch token"],
        is_valid: Bool[Array, "batch token"],
        past: Sequence[Segment] = (),
    ) -> tuple[Float[Array, "batch token width"], Segment]:
        """Read on.

        Args:
            x: Embeddings.
            positions: Of each token in its text, from 0 on.
            is_valid: False for padding, which nothing attends to.
            past: What was read before.

        Returns:
            The stream after the last norm, and the segment of these tokens.
        """
        rotation = rotation_at(positions, self.config)
        keys, values = [], []
        for number, block in enumerate(self.layer):
            before = [Segment(one.keys[number], one.values[number], one.is_valid) for one in past]
            x, key, value = block(x, rotation, before, is_valid)
            keys.append(key)
            values.append(value)
        return self.norm(x), Segment(jnp.stack(keys), jnp.stack(values), is_valid)

    def logits(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch token_id"]:
        """Return the logits of the next token, float32."""
        if self.config.tied:
            return jnp.dot(x.astype(self.config.dtype), jnp.asarray(self.table).T.astype(self.config.dtype)).astype(
                jnp.float32
            )
        return self.head(x).astype(jnp.float32)


def rotation_at(positions: Int[Array, "batch token"], config: LlamaConfig) -> Rotation:
    """Return the turns of tokens: position / theta^(2 i / depth) for the pair i."""
    frequencies = config.theta ** -(jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def _turn(x: jax.Array, rotation: Rotation) -> jax.Array:
    return rotate(x.astype(jnp.float32)[:, :, None], rotation)[:, :, 0].astype(x.dtype)
