"""Unrolled solvers against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.solvers.least_squares import solve_positive, weighted_linear

pytestmark = pytest.mark.core


def test_positive_systems_are_solved():
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(50, 5, 8))
    matrix = (factor @ factor.transpose(0, 2, 1)).astype(np.float32)
    right = rng.normal(size=(50, 5)).astype(np.float32)
    solution = solve_positive(jnp.asarray(matrix.transpose(1, 2, 0)), jnp.asarray(right.T))
    expected = np.linalg.solve(matrix.astype(np.float64), right[..., None].astype(np.float64))[..., 0]
    np.testing.assert_allclose(solution.T, expected, rtol=2e-3, atol=2e-4)


def test_an_indefinite_system_says_so_by_not_being_finite():
    matrix = jnp.asarray(np.diag([1.0, -1.0]).astype(np.float32))[:, :, None]
    assert not np.isfinite(solve_positive(matrix, jnp.ones((2, 1)))).all()


def test_weighted_fits_equal_numpy():
    rng = np.random.default_rng(1)
    design = rng.normal(size=(30, 4)).astype(np.float32)
    values = rng.normal(size=(30, 7)).astype(np.float32)
    weights = rng.uniform(0.1, 2.0, size=(30, 7)).astype(np.float32)
    found = weighted_linear(jnp.asarray(design), jnp.asarray(values), jnp.asarray(weights))
    for column in range(7):
        root = np.sqrt(weights[:, column])
        expected = np.linalg.lstsq(design * root[:, None], values[:, column] * root, rcond=None)[0]
        np.testing.assert_allclose(found[:, column], expected, rtol=1e-3, atol=1e-4)
