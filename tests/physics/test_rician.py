"""Rician magnitudes: density, pseudo-data and information."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxmed.physics import rician
from jaxmed.physics.acquisition import add_rician_noise

pytestmark = pytest.mark.core


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("z", [1e-3, 1.0, 700.0, 1e4, 1e8])
def test_density_is_finite_with_its_gradient(z):
    sigma = jnp.float32(1 / np.sqrt(z))
    value, slope = jax.value_and_grad(lambda s: rician.log_rician(jnp.float32(1.0), s, sigma))(jnp.float32(1.0))
    assert np.isfinite(value) and np.isfinite(slope)


def test_density_integrates_to_one(double):
    m = jnp.linspace(1e-6, 3.0, 200_001)
    density = jnp.exp(rician.log_rician(m, jnp.full_like(m, 0.4), jnp.full_like(m, 0.2)))
    np.testing.assert_allclose(jnp.trapezoid(density, m), 1.0, atol=1e-6)


def test_bessel_functions_equal_scipys():
    z = np.concatenate([np.linspace(0, 20, 4001), np.geomspace(20, 1e8, 500), [-1.0, -30.0]]).astype(np.float32)
    log_scaled, ratio = rician.log_i0e_and_ratio(jnp.asarray(z))
    exact = z.astype(np.float64)
    np.testing.assert_allclose(log_scaled, np.log(scipy.special.i0e(exact)), atol=1e-6, rtol=2e-7)
    np.testing.assert_allclose(ratio, scipy.special.i1e(exact) / scipy.special.i0e(exact), atol=1e-6)


def test_bessel_functions_are_exact_in_double_precision(double):
    z = np.concatenate([np.linspace(0, 20, 401), np.geomspace(20, 1e8, 50), [-1.0, -30.0]])
    log_scaled, ratio = rician.log_i0e_and_ratio(jnp.asarray(z))
    np.testing.assert_allclose(log_scaled, np.log(scipy.special.i0e(z)), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(ratio, scipy.special.i1e(z) / scipy.special.i0e(z), rtol=1e-12)


@pytest.mark.parametrize("snr", [0.1, 1.0, 3.0, 30.0, 1000.0])
def test_target_gives_the_gradient_of_the_cost(double, snr):
    measured, sigma = jnp.array([0.3, 1.0, 1.4]), jnp.array(1 / snr)
    predicted = jnp.array([0.4, 0.9, 1.2])
    slope = jax.grad(lambda s: -rician.log_rician(measured, s, sigma).sum())(predicted)
    _, target = rician.cost_and_target(measured, predicted, 1 / sigma**2)
    np.testing.assert_allclose((predicted - target) / sigma**2, slope, rtol=1e-9, atol=1e-9 * snr**2)


def test_cost_differs_from_the_log_density_by_a_constant(double):
    measured, sigma = jnp.full(9, 0.7), jnp.array(0.2)
    predicted = jnp.linspace(0.0, 2.0, 9)
    cost, _ = rician.cost_and_target(measured, predicted, 1 / sigma**2)
    spread = cost + rician.log_rician(measured, predicted, sigma)
    np.testing.assert_allclose(spread, spread[0], rtol=0, atol=1e-12)


def test_information_has_its_known_limits():
    limits = rician.integrate_information(np.array([0.0, 0.05, 16.0]))
    np.testing.assert_allclose(limits, [0.0, 0.05**2, 1 - 0.5 / 16**2], rtol=5e-3, atol=2e-5 * 0.05**2)
    assert limits[2] == pytest.approx(1 - 0.5 / 16**2, abs=2e-5)
    snr = np.array([0.03, 0.4, 1.0, 2.2, 7.7, 15.99, 16.01, 50.0])
    found = rician.information(jnp.asarray(snr, jnp.float32))
    np.testing.assert_allclose(found, rician.integrate_information(snr), rtol=2e-4)


@pytest.mark.parametrize("snr", [0.7, 2.0])
def test_information_is_the_variance_of_the_score(key, snr):
    measured = add_rician_noise(key, jnp.full(400_000, snr), 1.0)
    _, target = rician.cost_and_target(measured, jnp.full_like(measured, snr), jnp.array(1.0))
    assert float(jnp.var(target - snr)) == pytest.approx(float(rician.information(jnp.array(snr))), rel=0.01)
