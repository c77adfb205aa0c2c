"""Self-attention by the fastest road that a device and a length have."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.platform import is_planned, target_platform

AttentionKind: TypeAlias = Literal["auto", "products", "blocks", "xla", "cudnn"]

# Below this many tokens the whole map of weights is kept for the backward pass.
LONG = 1024
# XLA holds the whole map on accelerators too: 105 MB for each image and head of 5120 tokens.
LONG_XLA = 4096
# The largest depth that cuDNN's attention takes, by the first number of the compute capability from which it does.
DEEPEST = {9: 256, 8: 128}
BLOCK = 256
# A CPU works on the images of a batch at once, in this many parts, where all their maps have more entries than these:
# XLA makes one fused loop of a batch's whole attention, which leaves the caches (DINOv2-S/14, 8 images: 2.5 times).
PARTS, LARGE = 8, 2**20


def self_attention(
    qkv: Float[Array, "batch token 3 head depth"], kind: AttentionKind = "auto"
) -> Float[Array, "batch token head depth"]:
    """Return softmax(q k^T / sqrt(depth)) v; the softmax is in float32.

    Args:
        qkv: Queries, keys and values.
        kind: "products": two batched products over (batch x heads) with a backward pass of its own, the fastest on
            CPU, and it holds every weight; "blocks": queries in blocks of 256, recomputed in the backward pass, for
            long sequences; "xla" and "cudnn": `jax.nn.dot_product_attention`. "auto" takes cudnn for half precision
            on an NVIDIA GPU that has it for the depth, elsewhere on accelerators xla up to 4096 tokens, and on CPU
            products up to 1024 tokens; then blocks.
    """
    if kind == "auto":
        kind = _choose(qkv.shape[1], qkv.dtype, qkv.shape[4])
    if kind == "products":
        return _products(qkv)
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    if kind == "blocks":
        return _blocks(query, key, value)
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn" if kind == "cudnn" else "xla")


def _choose(num_tokens: int, dtype: Any, depth: int) -> AttentionKind:
    backend = target_platform()
    if backend == "cpu":
        return "products" if num_tokens <= LONG else "blocks"
    if backend == "gpu" and dtype in (jnp.bfloat16, jnp.float16):
        if is_planned():  # cuDNN cannot be lowered without a GPU; blocks hold as little
            return "blocks"
        major = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")[0]  # AMD's is no number
        if major.isdigit() and depth <= max((DEEPEST[first] for first in DEEPEST if int(major) >= first), default=0):
            return "cudnn"
    return "xla" if num_tokens <= LONG_XLA else "blocks"


def _products(qkv: Float[Array, "batch token 3 head depth"]) -> Float[Array, "batch token head depth"]:
    batch, tokens, _, heads, _ = qkv.shape
    # Images of several devices stay where they are.
    if jax.device_count() == 1 and batch * heads * tokens**2 > LARGE:
        return jnp.concatenate([_part(part) for part in jnp.array_split(qkv, min(batch, PARTS))])
    return _part(qkv)


def _part(qkv: Float[Array, "batch token 3 head depth"]) -> Float[Array, "batch token head depth"]:
    batch, tokens, _, heads, depth = qkv.shape
    query, key, value = qkv.transpose(2, 0, 3, 1, 4).reshape(3, batch * heads, tokens, depth)
    mixed = _mix(query * depth**-0.5, key, value)
    return mixed.reshape(batch, heads, tokens, depth).transpose(0, 2, 1, 3)


def _dot(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    axes = (((left_axis,), (right_axis,)), ((0,), (0,)))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=_wide(left.dtype))


def _wide(dtype: Any) -> Any:
    """Return the type of sums: float32, or float64 where the inputs are (tests)."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.custom_vjp
def _mix(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return _mix_forward(query, key, value)[0]


def _mix_forward(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
    weights = jax.nn.softmax(_dot(query, key, 2, 2), axis=-1).astype(value.dtype)
    return _dot(weights, value, 2, 1).astype(value.dtype), (query, key, value, weights)


def _mix_backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value, weights = saved
    by_weight = _dot(gradient, value, 2, 2)
    wide = weights.astype(_wide(weights.dtype))
    by_score = (wide * (by_weight - jnp.sum(by_weight * wide, axis=-1, keepdims=True))).astype(value.dtype)
    found = (_dot(by_score, key, 2, 1), _dot(by_score, query, 1, 1), _dot(weights, gradient, 1, 1))
    return tuple(part.astype(value.dtype) for part in found)  # pyright: ignore[reportReturnType]


# Autodiff of softmax and the einsum form hold copies of (batch, head, token, 1, token); this form was 1.1x of a whole
# training step on a CPU. It allows no forward-mode derivative.
_mix.defvjp(_mix_forward, _mix_backward)


def _blocks(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    batch, tokens, heads, depth = query.shape
    spare = -tokens % BLOCK
    blocks = jnp.pad(query * depth**-0.5, ((0, 0), (0, spare), (0, 0), (0, 0)))
    blocks = blocks.reshape(batch, -1, BLOCK, heads, depth).transpose(1, 0, 3, 2, 4)
    keys, values = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)

    @jax.checkpoint
    def mix(block: jax.Array) -> jax.Array:
        scores = jnp.einsum("bhqd,bhkd->bhqk", block, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        return jnp.einsum("bhqk,bhkd->bhqd", weights, values)

    mixed = jax.lax.map(mix, blocks).transpose(1, 0, 3, 2, 4)
    return mixed.reshape(batch, tokens + spare, heads, depth)[:, :tokens]
