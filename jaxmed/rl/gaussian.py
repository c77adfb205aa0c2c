"""Independent normal desires to flip, one for each pixel, with deviations that do not depend on the state.

Log-densities are of the unclipped action, as in stable-baselines3.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.types import KeyArray
from jaxmed.rl.distribution import Distribution

Normal = tuple[Float[Array, "game *grid"], Float[Array, "game *grid"]]
"""Mean, and the logarithm of the standard deviation."""


def make_gaussian() -> Distribution:
    """Return the family whose parameters are (mean, log_std)."""
    return Distribution(sample, log_prob, entropy, lambda normal: normal[0])


def sample(key: KeyArray, normal: Normal) -> Float[Array, "game *grid"]:
    """Draw desires."""
    mean, log_std = normal
    return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, mean.dtype)


def log_prob(normal: Normal, action: Float[Array, "game *grid"]) -> Float[Array, " game"]:
    """Return the log-density, summed over pixels."""
    mean, log_std = normal
    squares = jnp.square((action - mean) * jnp.exp(-log_std))
    by_pixel = -0.5 * squares - log_std - 0.5 * math.log(2 * math.pi)
    return by_pixel.sum(axis=tuple(range(1, by_pixel.ndim)))


def entropy(normal: Normal) -> Float[Array, " game"]:
    """Return the entropy, summed over pixels."""
    by_pixel = normal[1] + 0.5 * (1 + math.log(2 * math.pi))
    return by_pixel.sum(axis=tuple(range(1, by_pixel.ndim)))
