"""The ascent along the gradient: it reaches what it can, and never makes a mask worse."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.rl.ascent import ascend


def test_ascending_a_linear_score_reaches_its_best_mask():
    weights = jax.random.normal(jax.random.key(0), (3, 4, 4))

    def score(masks):
        return (weights * masks).sum((1, 2))

    masks, values, flips = ascend(score, jnp.zeros((3, 4, 4), bool), jnp.full(3, 4), 12)
    np.testing.assert_array_equal(masks, weights > 0)
    np.testing.assert_allclose(values, jnp.maximum(weights, 0).sum((1, 2)), rtol=1e-6)
    assert flips.tolist() == [0, 0, 0]


def test_ascending_never_makes_it_worse():
    table = np.random.default_rng(0).uniform(size=16).astype(np.float32)
    cells = np.array(list(itertools.product([0, 1], repeat=4)), np.float32)

    def score(masks):
        """Any function of four pixels, extended to soft masks linearly in each."""
        flat = masks.reshape(len(masks), 1, 4)
        return (jnp.prod(cells * flat + (1 - cells) * (1 - flat), axis=2) * table).sum(1)

    start = jnp.asarray(cells.reshape(-1, 2, 2) > 0.5)
    masks, values, _ = ascend(score, start, jnp.full(16, 2), 8)
    assert (np.asarray(values) >= table - 1e-6).all()
    np.testing.assert_allclose(values, score(masks.astype(jnp.float32)), atol=1e-6)
