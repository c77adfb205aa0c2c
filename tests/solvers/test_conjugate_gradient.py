"""Conjugate gradients: exact after as many steps as dimensions, system by system."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.solvers.conjugate_gradient import conjugate_gradient

pytestmark = pytest.mark.core


def test_systems_are_solved_each_for_itself():
    rng = np.random.default_rng(0)
    roots = rng.standard_normal((3, 6, 6))
    matrices = roots @ roots.transpose(0, 2, 1) + 0.5 * np.eye(6)
    right = rng.standard_normal((3, 6))
    right[1] = 0.0  # solved before it begins
    right[2] *= 1e4
    with jax.enable_x64(True):
        system = jnp.asarray(matrices)
        found = conjugate_gradient(lambda x: jnp.einsum("bij,bj->bi", system, x), jnp.asarray(right), 8)
    np.testing.assert_allclose(found, np.linalg.solve(matrices, right[..., None])[..., 0], rtol=1e-8, atol=1e-12)


def test_as_many_steps_as_distinct_eigenvalues_suffice():
    diagonal = jnp.array([[1.0, 1.0, 4.0, 4.0]])
    found = conjugate_gradient(lambda x: diagonal * x, jnp.ones((1, 4)), 2)
    np.testing.assert_allclose(found, 1 / diagonal, rtol=1e-6)
    assert np.abs(conjugate_gradient(lambda x: diagonal * x, jnp.ones((1, 4)), 1) - 1 / diagonal).max() > 0.1
