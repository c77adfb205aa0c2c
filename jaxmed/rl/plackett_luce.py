"""Ordered draws without replacement: the first of all options by softmax, the next of those that are left, and so on.

Adding Gumbel noise to logits and taking the k largest draws from exactly this distribution, so that sampling is one
pass. The logarithm of an order's probability is sum_j [l_j - logsumexp(l_j, l_j+1, ..., those never chosen)].

Source: Kool et al., arXiv:1903.06059 (Gumbel top-k); Plackett 1975.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.rl.distribution import Distribution


def make_plackett_luce(count: int, at_most: bool = False) -> Distribution:
    """Return the family of ordered choices of `count` pixels whose parameters are logits of all pixels.

    Args:
        count: Pixels that are named.
        at_most: Every pixel that is named flips with probability sigmoid(logit) and is written ~number otherwise.

    Deviation: under `at_most` a named pixel flips by a draw of its own, most likely where its logit is positive, and
        always or never so in `mode`. Were it by the sign alone, the log-probability would not know of it, because
        softmax does not change with the level of all logits: no gradient could ever teach when to pass.
    """
    if not at_most:
        return Distribution(
            lambda key, logits: sample(key, logits, count),
            log_prob,
            entropy,
            lambda logits: jax.lax.top_k(logits, count)[1],
        )

    def draw(key: KeyArray, logits: Array) -> Array:
        order_key, flip_key = jax.random.split(key)
        order = sample(order_key, logits, count)
        chosen = jnp.take_along_axis(logits, order, axis=-1)
        return jnp.where(jax.random.bernoulli(flip_key, jax.nn.sigmoid(chosen)), order, ~order)

    def likelihood(logits: Array, action: Array) -> Array:
        order = jnp.where(action < 0, ~action, action)
        chosen = jnp.take_along_axis(logits, order, axis=-1)
        flips = jax.nn.log_sigmoid(jnp.where(action < 0, -chosen, chosen))
        return log_prob(logits, order) + flips.sum(axis=-1)

    def mode(logits: Array) -> Array:
        chosen, order = jax.lax.top_k(logits, count)
        return jnp.where(chosen > 0, order, ~order)

    return Distribution(draw, likelihood, entropy, mode)


def sample(key: KeyArray, logits: Float[Array, "*batch option"], count: int) -> Int[Array, "*batch choice"]:
    """Draw `count` options in order."""
    noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    return jax.lax.top_k(noisy, count)[1]


def log_prob(logits: Float[Array, "*batch option"], order: Int[Array, "*batch choice"]) -> Float[Array, "*batch"]:
    """Return the log-probability of an order.

    One pass over the options that were never chosen and one backwards over the choices, instead of one over all
    options for each choice; nothing is subtracted, so that a near-certain choice keeps its digits.
    """
    chosen = jnp.take_along_axis(logits, order, axis=-1)
    tails = jax.lax.cumlogsumexp(chosen, axis=logits.ndim - 1, reverse=True)
    if order.shape[-1] < logits.shape[-1]:
        tails = jnp.logaddexp(tails, _log_sum_of_others(logits, order)[..., None])
    return jnp.sum(chosen - tails, axis=-1)


def entropy(logits: Float[Array, "*batch option"]) -> Float[Array, "*batch"]:
    """Return the entropy of the first draw; that of an order has no closed form."""
    log_probability = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_probability) * log_probability, axis=-1)


def _log_sum_of_others(logits: Float[Array, "*batch option"], order: Int[Array, "*batch choice"]) -> Array:
    rows, chosen = logits.reshape(-1, logits.shape[-1]), order.reshape(-1, order.shape[-1])
    others = rows.at[jnp.arange(len(rows))[:, None], chosen].set(-jnp.inf)
    return jax.nn.logsumexp(others, axis=-1).reshape(logits.shape[:-1])
