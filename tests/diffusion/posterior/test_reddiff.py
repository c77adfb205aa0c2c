"""RED-diff with a Gaussian prior: its steps with the same noise in NumPy, and the image where they stand still."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import covariance_matrices
from priors import MATRIX, MEASUREMENT, gaussian_mean, oracle, random_mixture

from jaxmed.diffusion.posterior.reddiff import Reddiff, reddiff
from jaxmed.diffusion.samplers import draw_noise, sample_keys
from jaxmed.diffusion.schedule import VpDiscrete

pytestmark = pytest.mark.core
CHAIN = VpDiscrete(200)


def run(key, config, batch):
    prior = random_mixture(8, 1, 3)
    measurement = jnp.broadcast_to(jnp.asarray(MEASUREMENT), (batch, 2))
    matrix = jnp.asarray(MATRIX)
    start = jnp.zeros((batch, 3))
    go = jax.jit(lambda: reddiff(key, oracle(prior, CHAIN), measurement, lambda x: matrix @ x, start, config))
    return prior, *go()


def levels(t):
    return float(CHAIN.alpha(np.array([t]))[0]), float(CHAIN.sigma(np.array([t]))[0])


def test_steps_are_those_of_adam_on_the_papers_gradient(key):
    with jax.enable_x64(True):
        times = (150.0, 90.0, 40.0, 10.0)
        prior, image, info = run(key, Reddiff(0.4, rate=0.2, times=times), 3)
        keys = sample_keys(key, jnp.arange(3))
        x, first, second = np.zeros((3, 3)), 0.0, 0.0
        for index, t in enumerate(times):
            (alpha, sigma), noise = levels(t), np.asarray(draw_noise(keys, 3 - index, (3,), jnp.float64))
            noisy = alpha * x + sigma * noise
            predicted = (noisy - alpha * gaussian_mean(prior, noisy, alpha, sigma)) / sigma
            misfit = MEASUREMENT - x @ MATRIX.T
            np.testing.assert_allclose(info.residuals[index], np.linalg.norm(misfit, axis=1), rtol=1e-9)
            gradient = 0.4 * sigma / alpha * (predicted - noise) - misfit @ MATRIX
            first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
            step = first / (1 - 0.9 ** (index + 1)) / (np.sqrt(second / (1 - 0.99 ** (index + 1))) + 1e-8)
            x = x - 0.2 * step
        np.testing.assert_allclose(image, x, rtol=1e-7)
        assert np.all(info.evaluations == 4)


def test_at_one_noise_level_it_ends_where_data_and_prior_balance(key):
    """(A^T A + lambda sigma^2 (alpha^2 C + sigma^2)^-1) (x - m) = A^T (y - A m), by the mean over the noise."""
    with jax.enable_x64(True):
        t, strength = 60.0, 0.5
        prior, image, _ = run(key, Reddiff(strength, rate=0.01, times=(t,) * 1500), 256)
        alpha, sigma = levels(t)
        mean, covariance = np.asarray(prior.means[0]), np.asarray(covariance_matrices(prior)[0])
        pull = strength * sigma**2 * np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(3))
        expected = mean + np.linalg.solve(MATRIX.T @ MATRIX + pull, MATRIX.T @ (MEASUREMENT - MATRIX @ mean))
        spread = np.asarray(image).std(0) / 16
        assert np.abs(expected - mean).max() > 0.15 and spread.max() < 0.01
        np.testing.assert_allclose(np.asarray(image).mean(0), expected, atol=0.02)


def test_settings_out_of_range_are_named():
    for name, value in (("rate", 0.0), ("first_level", 0.0), ("strength", -1.0), ("num_steps", 0), ("times", ())):
        with pytest.raises(ValueError, match=name):
            Reddiff(**{name: value})
