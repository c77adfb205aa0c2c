"""Features of an encoder by kind, and what its class token looks at.

They are the class token after the last block ("class"), the mean of the patch tokens ("pooled"), one after the other
("concat"), what enters the head after its layer norm ("pre_logits"), the register tokens ("registers"), and the class
tokens of several blocks ("layers").
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.types import Params
from jaxmed.errors import InputError
from jaxmed.models.encoder import Encoder
from jaxmed.models.heads import Head, HeadConfig, pool_tokens
from jaxmed.nn.model import make_model

Kind: TypeAlias = Literal["class", "pooled", "concat", "pre_logits", "registers", "layers"]
BASIC: tuple[Kind, ...] = ("class", "pooled", "concat", "pre_logits")
LAYERS = 4  # of DINOv2's linear probes
DEFINITIONS = {
    "class": "the class token after the last block, before any final norm",
    "pooled": "the mean of the patch tokens after the last block, before any final norm",
    "concat": "class and pooled, one after the other",
    "pre_logits": "what enters the head: concat (or what the head pools) after its layer norm",
    "registers": "the register tokens after the last block and the final norm, one after the other",
    "layers": "the class tokens of the last blocks (--layers), each after the final norm, one after the other",
}
ATTENTION_DEFINITION = (
    "how much the class token looks at each patch in the last block: its softmax weights, mean of the heads; what is "
    "missing to a sum of 1 goes to the class token and registers; interpolated linearly to the grid of the scan"
)


def require_kinds(encoder: Encoder, kinds: Sequence[Kind], layers: int = LAYERS, *, attention: bool = False) -> None:
    """Refuse what an encoder does not have.

    Raises:
        InputError: It has no registers, no class token or not as many blocks.
    """
    if "registers" in kinds and encoder.prefix < 2:
        raise InputError("kinds", "no registers, of weights without such tokens", "registers", "take pre_logits")
    if (attention or "layers" in kinds) and (encoder.prefix < 1 or encoder.layers is None):
        what = "attention" if attention else "kinds"
        raise InputError(what, "a transformer with a class token", "weights of another network")
    if "layers" in kinds and encoder.layers is not None and layers > encoder.layers.depth:
        raise InputError("layers", f"at most the encoder's {encoder.layers.depth} blocks", layers)


# One compiled program per model and batch size, whoever calls: a loop over scans in a notebook must not trace each.
@partial(jax.jit, static_argnums=(0, 1), static_argnames=("kinds", "layers", "attention"))
def features(
    encoder: Encoder,
    head: HeadConfig,
    params: Params,
    images: Float[Any, "batch ..."],
    *,
    kinds: tuple[Kind, ...] = BASIC,
    layers: int = LAYERS,
    attention: bool = False,
) -> dict[str, Float[Array, "batch ..."]]:
    """Return features by kind, by one pass through the encoder.

    Args:
        encoder: The encoder; static.
        head: The head, for "pre_logits"; static.
        params: {"encoder": ..., "head": ...}.
        images: Prepared scans.
        kinds: Which; static, and held by `require_kinds`.
        layers: Blocks of the kind "layers"; static.
        attention: Whether there is "attention" too, on the grid of the patches; static.
    """
    own = params["encoder"]
    tokens = encoder.apply(own, images)
    pooled, normed = pool_tokens(tokens, encoder.prefix), encoder.norm(own, tokens)
    found = {"class": pooled.class_token, "pooled": pooled.pooled, "concat": pooled.concat}
    if "pre_logits" in kinds:
        joined = normed if head.layers == 1 else encoder.tokens(own, images, head.layers)
        found["pre_logits"] = make_model(Head(head, encoder.prefix)).apply(params["head"], joined, method="features")
    if "registers" in kinds:
        found["registers"] = normed[:, 1 : encoder.prefix].reshape(len(images), -1)
    if "layers" in kinds and encoder.hidden_states is not None:
        states = encoder.hidden_states(own, images)[-layers:]
        found["layers"] = jnp.concatenate([encoder.norm(own, state)[:, 0] for state in states], axis=-1)
    if attention and encoder.attention is not None:
        weights = encoder.attention(own, images)[:, :, 0, encoder.prefix :].mean(axis=1)
        found["attention"] = weights.reshape(-1, *encoder.grid)
    return {name: found[name] for name in (*kinds, *["attention"] * attention)}
