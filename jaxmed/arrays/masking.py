"""Which tokens a masked autoencoder sees and which it has to guess."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from jaxmed.arrays.types import KeyArray


class Masking(NamedTuple):
    """A random split of the tokens of each image.

    Attributes:
        kept: Tokens that the encoder sees, in the order in which it sees them.
        hidden: The others.
    """

    kept: Int[Array, "batch keep"]
    hidden: Int[Array, "batch hide"]

    @property
    def order(self) -> Int[Array, "batch token"]:
        """All tokens, the kept ones first."""
        return jnp.concatenate([self.kept, self.hidden], axis=1)


def num_kept(num_tokens: int, mask_ratio: float) -> int:
    """Return how many tokens stay: the whole part of num_tokens (1 - mask_ratio), as in the released MAE."""
    return int(num_tokens * (1 - mask_ratio))


def draw_noise(keys: Key[Array, " batch"], num_tokens: int) -> Float[Array, "batch token"]:
    """Draw one uniform number per token, each image from a key of its own."""
    return jax.vmap(lambda key: jax.random.uniform(key, (num_tokens,)))(keys)


def random_masking(noise: Float[Array, "batch token"], mask_ratio: float) -> Masking:
    """Keep the tokens of smallest noise.

    Args:
        noise: One number per token, from `draw_noise`.
        mask_ratio: Fraction hidden, in [0, 1).

    Source: MAE, arXiv:2111.06377, section 3; the order of kept tokens is that of the noise, as in the released code.
    """
    order = jnp.argsort(noise, axis=1)
    keep = num_kept(noise.shape[1], mask_ratio)
    return Masking(order[:, :keep], order[:, keep:])


def choose_masking(
    batch: int,
    num_tokens: int,
    mask_ratio: float,
    noise: Float[Array, "batch token"] | None = None,
    key: KeyArray | None = None,
) -> Masking:
    """Return the masking of a model's call: by the noise where it is given, else drawn from the key, else of nothing.

    Args:
        batch: Number of images.
        num_tokens: Tokens of an image.
        mask_ratio: Fraction hidden, in [0, 1).
        noise: One uniform number per token, of which the smallest are kept, for a masking of the caller's.
        key: Each image draws from a key split from it.
    """
    if noise is None and key is not None:
        noise = draw_noise(jax.random.split(key, batch), num_tokens)
    return all_kept(batch, num_tokens) if noise is None else random_masking(noise, mask_ratio)


def all_kept(batch: int, num_tokens: int) -> Masking:
    """Return the masking that hides nothing."""
    kept = jnp.broadcast_to(jnp.arange(num_tokens), (batch, num_tokens))
    return Masking(kept, kept[:, :0])


def hidden_mask(masking: Masking) -> Bool[Array, "batch token"]:
    """Return a map of the tokens in their own order, True where hidden."""
    rows = jnp.arange(masking.hidden.shape[0])[:, None]
    tokens = masking.kept.shape[1] + masking.hidden.shape[1]
    return jnp.zeros((rows.shape[0], tokens), bool).at[rows, masking.hidden].set(True)


def take_tokens(
    tokens: Shaped[Array, "batch token width"], index: Int[Array, "batch some"]
) -> Shaped[Array, "batch some width"]:
    """Return some tokens of each image."""
    return jnp.take_along_axis(tokens, index[:, :, None], axis=1)


def restore_order(tokens: Shaped[Array, "batch token width"], masking: Masking) -> Shaped[Array, "batch token width"]:
    """Put tokens that stand in the order of `masking.order` back into their own order."""
    return take_tokens(tokens, jnp.argsort(masking.order, axis=1))
