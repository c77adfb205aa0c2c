"""What a policy draws actions from, as functions of a network's output: normal desires, or an ordered choice of pixels.

The ordered choice is without replacement: the first of all options by softmax, the next of those that are left, and so
on. Adding Gumbel noise to logits and taking the k largest draws from exactly this distribution, so that sampling is one
pass. The logarithm of an order's probability is sum_j [l_j - logsumexp(l_j, l_j+1, ..., those never chosen)].

Source: Kool et al., arXiv:1903.06059 (Gumbel top-k); Plackett 1975.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray


class Distribution(NamedTuple):
    """A family of distributions of actions, one for each game; every leaf of its parameters has games first.

    Attributes:
        sample: Draw actions.
        log_prob: Log-probability, or density, of actions.
        entropy: Entropy of the family, or of the part of it that the source names.
        mode: The actions that a policy takes when it does not explore.
    """

    sample: Callable[[KeyArray, Any], Array]
    log_prob: Callable[[Any, Array], Float[Array, " game"]]
    entropy: Callable[[Any], Float[Array, " game"]]
    mode: Callable[[Any], Array]


def make_gaussian() -> Distribution:
    """Return the family of independent normal desires whose parameters are (mean, log_std), games first.

    Log-densities are of the unclipped action, as in stable-baselines3.
    """

    def sample(key: KeyArray, normal: Any) -> Array:
        mean, log_std = normal
        return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, mean.dtype)

    def log_prob(normal: Any, action: Array) -> Array:
        mean, log_std = normal
        squares = jnp.square((action - mean) * jnp.exp(-log_std))
        return over_pixels(-0.5 * squares - log_std - 0.5 * math.log(2 * math.pi))

    def entropy(normal: Any) -> Array:
        return over_pixels(normal[1] + 0.5 * (1 + math.log(2 * math.pi)))

    def over_pixels(values: Array) -> Array:
        return values.sum(axis=tuple(range(1, values.ndim)))

    return Distribution(sample, log_prob, entropy, lambda normal: normal[0])


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
