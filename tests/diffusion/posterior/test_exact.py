"""Exact-covariance guidance is the posterior's own denoiser for a Gaussian, and near it for two modes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_guidance import Exact, exact, guided_mean
from mixtures import covariance_matrices, make_mixture, posterior
from priors import MATRIX, MEASUREMENT, oracle, random_mixture

from jaxmed.diffusion.samplers import Ddim, Heun
from jaxmed.diffusion.schedule import Edm, VpDiscrete
from jaxmed.synthesis.phantoms.mixture import Mixture, denoise, responsibilities

pytestmark = pytest.mark.core
NOISE = 0.3
SCHEDULE = Edm(sigma_max=400.0)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def operator(image):
    return jnp.asarray(MATRIX) @ image


@jax.jit
def draws(prior: Mixture, measurement):
    """Posterior samples, one for each row of measurements."""
    config = Exact(noise_std=NOISE, solver_steps=2, sampler=Heun(60))
    initial = jnp.zeros((len(measurement), 3))
    return exact(jax.random.key(0), oracle(prior, SCHEDULE), measurement, operator, initial, config)


@pytest.mark.parametrize(
    "schedule", [pytest.param(SCHEDULE, marks=pytest.mark.slow), VpDiscrete()], ids=["edm", "cosine"]
)
def test_guided_mean_is_the_posteriors_denoiser(schedule):
    prior = random_mixture(6, 1, 3)
    truth = posterior(prior, jnp.asarray(MATRIX), jnp.asarray(MEASUREMENT), NOISE)
    t = jnp.asarray(schedule.times(6))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3))) * schedule.sigma(t)[:, None] + 0.3
    measurement = jnp.broadcast_to(jnp.asarray(MEASUREMENT), (6, 2))
    config = Exact(noise_std=NOISE, solver_steps=2)
    found = jax.jit(lambda x, t: guided_mean(oracle(prior, schedule), measurement, operator, config, x, t))(x, t)
    expected = denoise(truth, x, schedule.alpha(t), schedule.sigma(t))
    # At the end of the cosine chain alpha is 5e-5, and the score is divided by it.
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-7)


@pytest.mark.slow
def test_samples_of_a_gaussian_have_the_posteriors_mean_and_covariance():
    prior = random_mixture(6, 1, 3)
    truth = posterior(prior, jnp.asarray(MATRIX), jnp.asarray(MEASUREMENT), NOISE)
    count = 100_000
    x, info = draws(prior, jnp.broadcast_to(jnp.asarray(MEASUREMENT), (count, 2)))
    expected, matrix = np.asarray(truth.means[0]), np.asarray(covariance_matrices(truth)[0])
    deviation = np.sqrt(np.diag(matrix))
    width = np.sqrt((np.outer(deviation, deviation) ** 2 + matrix**2) / count)
    # Heun's 60 steps, from where the mean is hidden to 0.25 %, are within 0.5 % of the flow.
    np.testing.assert_array_less(
        np.abs(np.mean(x, axis=0) - expected), 5 * deviation / np.sqrt(count) + 0.005 * deviation
    )
    np.testing.assert_array_less(np.abs(np.cov(np.asarray(x).T) - matrix), 5 * width + 0.01 * np.max(matrix))
    assert info.residuals.shape == (60, count) and np.all(info.evaluations == 3 * 119)
    # Far from the prior's own covariance: the test can fail.
    assert np.abs(covariance_matrices(prior)[0] - matrix).max() > 0.1 * np.max(matrix)


def modes(direction, weights):
    """Two modes of one covariance, apart along a direction."""
    means = np.stack([-0.5 * np.asarray(direction), 0.5 * np.asarray(direction)])
    covariances = np.broadcast_to(0.1 * np.eye(3), (2, 3, 3))
    return make_mixture(jnp.asarray(weights), jnp.asarray(means), jnp.asarray(covariances))


@pytest.mark.slow
@pytest.mark.parametrize("is_seen", [True, False], ids=["seen", "unseen"])
def test_weights_of_two_modes(is_seen):
    # Seen, 2.2 standard deviations apart; or apart in the null space, where the measurement says nothing of the mode.
    direction, weights = ((0.6, 0.18, -0.3), (0.5, 0.5)) if is_seen else (3 * np.linalg.svd(MATRIX)[2][2], (0.3, 0.7))
    prior, measurement = modes(direction, weights), np.array([0.3, 0.1])
    truth = posterior(prior, jnp.asarray(MATRIX), jnp.asarray(measurement), NOISE)
    x, _ = draws(prior, jnp.broadcast_to(jnp.asarray(measurement), (20_000, 2)))
    share = np.mean(responsibilities(truth, x, jnp.ones(20_000), jnp.full(20_000, 1e-3)), axis=0)
    expected = np.exp(truth.log_weights)
    # Where the mode is seen, the image given x_t is not Gaussian between the modes, which costs a percent or two.
    np.testing.assert_allclose(share, expected, atol=0.03 if is_seen else 0.015)
    assert np.allclose(expected, weights) != is_seen


def test_any_differentiable_operator_and_sample_by_sample(key):
    prior = random_mixture(7, 2, 3)
    denoiser = oracle(prior, VpDiscrete(100))
    measurement = jnp.asarray([[0.2], [1.5], [0.7]])
    config = Exact(noise_std=0.1, solver_steps=1, sampler=Ddim(20, eta=1.0))

    def norm(image):
        return jnp.sum(image**2, keepdims=True)

    @jax.jit
    def run(order):
        return exact(key, denoiser, measurement[order], norm, jnp.zeros((3, 3)), config, order)

    whole, info = run(jnp.arange(3))
    turned, _ = run(jnp.array([2, 0, 1]))
    np.testing.assert_allclose(turned, whole[jnp.array([2, 0, 1])], rtol=1e-9)
    np.testing.assert_array_less(info.residuals[-1], 0.3)
    assert np.all(np.isfinite(whole))


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="noise_std"):
        Exact(noise_std=0.0)
    with pytest.raises(ValueError, match="solver_steps"):
        Exact(solver_steps=0)
