"""Normal desires against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmed.rl.gaussian import make_gaussian

pytestmark = pytest.mark.core


def test_density_entropy_and_moments_are_scipys(key):
    noise = np.random.default_rng(0)
    mean, log_std = noise.normal(size=(2, 3, 4)).astype("f"), noise.normal(size=(2, 3, 4)).astype("f") / 3
    action, family = noise.normal(size=(2, 3, 4)).astype("f"), make_gaussian()
    normal = (jnp.asarray(mean), jnp.asarray(log_std))
    law = scipy.stats.norm(mean, np.exp(log_std))
    np.testing.assert_allclose(
        family.log_prob(normal, jnp.asarray(action)), law.logpdf(action).sum(axis=(1, 2)), rtol=1e-5
    )
    np.testing.assert_allclose(family.entropy(normal), law.entropy().sum(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(family.mode(normal), mean)
    many = (jnp.full((20_000, 2), 0.5), jnp.full((20_000, 2), -1.0))
    drawn = family.sample(key, many)
    np.testing.assert_allclose(drawn.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose(drawn.std(axis=0), np.exp(-1), atol=0.01)
    assert jax.tree.structure(normal).num_leaves == 2
