"""Halving and doubling of images and volumes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.nn.unet_blocks import double, double_linearly, halve


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 4, 2, 6, 3)])
def test_halving_averages_and_undoes_doubling(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    twice = double(x)
    assert twice.shape == (2, *(2 * length for length in shape[1:-1]), 3)
    corner = (slice(None), *(slice(1, None, 2),) * (len(shape) - 2))
    np.testing.assert_array_equal(twice[corner], x)
    np.testing.assert_allclose(halve(twice), x, rtol=1e-6)
    first = x[(0, *(slice(0, 2),) * (len(shape) - 2))].reshape(-1, 3).mean(axis=0)
    np.testing.assert_allclose(halve(x)[(0, *(0,) * (len(shape) - 2))], first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 5, 1, 2), (1, 3, 2, 4, 1)])
def test_linear_doubling_interpolates_between_centres(shape):
    """Against NumPy's interpolation along one axis after the other, the border repeated."""
    x = np.random.default_rng(0).standard_normal(shape)
    expected = x
    for axis in range(1, x.ndim - 1):
        old = np.arange(expected.shape[axis])
        new = (np.arange(2 * len(old)) + 0.5) / 2 - 0.5
        interpolate = functools.partial(np.interp, new, old)
        expected = np.apply_along_axis(interpolate, axis, expected)
    np.testing.assert_allclose(double_linearly(jnp.asarray(x, jnp.float32)), expected, atol=1e-6)
