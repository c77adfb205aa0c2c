"""Bands over bootstrap draws: subjects drawn with replacement as weights of runs, and percentiles of what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmed.arrays.types import KeyArray

LOW, HIGH = 5.0, 95.0
"""Percentiles of the bands."""


def draw_weights(key: KeyArray, train: Float[np.ndarray, " subject"], draws: int) -> Float[np.ndarray, "run subject"]:
    """Return weights of runs: the cohort itself, then draws of its training subjects with replacement."""
    inside = np.flatnonzero(train > 0)
    weights = np.zeros((draws + 1, len(train)), np.float32)
    weights[0] = train
    weights[1:, inside] = bootstrap_weights(key, len(inside), draws)
    return weights


def bootstrap_weights(key: KeyArray, count: int, draws: int) -> Float[np.ndarray, "draw subject"]:
    """Draw subjects with replacement; return how often each is drawn."""
    chosen = jax.random.randint(key, (draws, count), 0, count)
    return np.asarray(jax.vmap(lambda row: jnp.bincount(row, length=count))(chosen), np.float32)


def bands(values: Float[np.ndarray, "draw *row column"]) -> Float[np.ndarray, "3 *row column"]:
    """Return the median over draws, and the lower and the upper end of their 90 % band."""
    return np.percentile(values, [50.0, LOW, HIGH], axis=0)
