"""DAPS with a Gaussian prior: mean and covariance of its images by matrices, and what its parts are exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import covariance_matrices
from priors import MATRIX, MEASUREMENT, oracle, random_mixture

from jaxmed.diffusion.posterior.daps import Daps, daps, spaced
from jaxmed.diffusion.schedule import VpDiscrete

pytestmark = pytest.mark.core
CHAIN = VpDiscrete(1000)
NOISE, BATCH = 0.3, 20_000


def run(key, config):
    prior = random_mixture(8, 1, 3)
    measurement = jnp.broadcast_to(jnp.asarray(MEASUREMENT), (BATCH, 2))
    matrix = jnp.asarray(MATRIX)
    start = jnp.zeros((BATCH, 3))
    go = jax.jit(lambda: daps(key, oracle(prior, CHAIN), measurement, lambda x: matrix @ x, start, config))
    image, info = go()
    return np.asarray(prior.means[0]), np.asarray(covariance_matrices(prior)[0]), np.asarray(image), info


def by_matrices(mean, covariance, config):
    """The mean and covariance of the images after every level."""
    gain = np.linalg.norm(MATRIX, 2)
    assert config.gain == gain
    x_mean, x_cov, one = np.zeros(3), np.zeros((3, 3)), np.eye(3)
    for level in spaced(config.first_level, config.last_level, config.num_levels, config.rho):
        x_cov = x_cov + level**2 * one
        walk = spaced(level, config.last_level, config.ode_steps, config.rho)
        shift, factor = np.zeros(3), one
        for here, there in zip(walk, [*walk[1:], 0.0], strict=True):
            # E[x_0 | x] = m + C (C + s^2)^-1 (x - m), and a step keeps there / here of what is noise.
            pull = covariance @ np.linalg.inv(covariance + here**2 * one)
            step = pull + there / here * (one - pull)
            shift, factor = step @ shift + (1 - there / here) * (mean - pull @ mean), step @ factor
        curvature = MATRIX.T @ MATRIX / NOISE**2 + one / (config.spread * level) ** 2
        size = config.langevin_step / (gain**2 / NOISE**2 + 1 / (config.spread * level) ** 2)
        centre, spread = shift + factor @ x_mean, factor @ x_cov @ factor.T
        towards = MATRIX.T @ MEASUREMENT / NOISE**2 + centre / (config.spread * level) ** 2
        moved, kept, added = centre, one, np.zeros((3, 3))
        # What is drawn around the centre moves with it: keep follows the start and the pull of the centre alike.
        for _ in range(config.langevin_steps):
            shrink = one - size * curvature
            moved = shrink @ moved + size * towards
            kept = shrink @ kept + size * one / (config.spread * level) ** 2
            added = shrink @ added @ shrink.T + 2 * size * one
        x_mean, x_cov = moved, kept @ spread @ kept.T + added
    return x_mean, x_cov


def posterior(mean, covariance):
    total = MATRIX @ covariance @ MATRIX.T + NOISE**2 * np.eye(2)
    gain = covariance @ MATRIX.T @ np.linalg.inv(total)
    return mean + gain @ (MEASUREMENT - MATRIX @ mean), covariance - gain @ MATRIX @ covariance


def settings(**changes):
    return Daps(NOISE, gain=float(np.linalg.norm(MATRIX, 2)), **changes)


@pytest.mark.parametrize(
    "config",
    [settings(num_levels=1, ode_steps=3, langevin_steps=4), settings(num_levels=12, langevin_steps=8, last_level=0.1)],
    ids=["one level", "twelve levels"],
)
def test_images_have_the_mean_and_covariance_of_the_recursion(config, key):
    mean, covariance, image, info = run(key, config)
    expected_mean, expected_cov = by_matrices(mean, covariance, config)
    deviation = np.sqrt(np.diag(expected_cov))
    np.testing.assert_allclose(image.mean(0) / deviation, expected_mean / deviation, atol=4 / np.sqrt(BATCH))
    apart = (np.cov(image.T) - expected_cov) / np.outer(deviation, deviation)
    assert np.abs(apart).max() < 0.04
    assert np.all(info.evaluations == config.num_levels * config.ode_steps)


def test_langevin_steps_draw_from_the_image_given_both(key):
    """One level: a Gaussian around where the walk led, times the likelihood, once the steps are many and small."""
    config = settings(num_levels=1, ode_steps=1, langevin_steps=200, langevin_step=0.1, first_level=1.0)
    mean, covariance, image, _ = run(key, config)
    # A walk of one step ends at E[x_0 | x], of x drawn from N(0, 1).
    pull = covariance @ np.linalg.inv(covariance + np.eye(3))
    exact = np.linalg.inv(np.eye(3) + MATRIX.T @ MATRIX / NOISE**2)
    expected = exact @ (mean - pull @ mean + MATRIX.T @ MEASUREMENT / NOISE**2)
    np.testing.assert_allclose(image.mean(0), expected, atol=0.03)
    total = exact + exact @ pull @ pull.T @ exact
    np.testing.assert_allclose(np.cov(image.T), total, atol=0.05 * np.abs(total).max())


def test_many_levels_come_near_the_mean_of_the_posterior():
    """By matrices: DAPS takes an image given its noisy version for white, which an image is not."""
    prior = random_mixture(8, 1, 3)
    mean, covariance = np.asarray(prior.means[0]), np.asarray(covariance_matrices(prior)[0])
    found, _ = by_matrices(mean, covariance, settings(num_levels=200, langevin_steps=100))
    expected, _ = posterior(mean, covariance)
    assert np.linalg.norm(found - expected) < 0.25 * np.linalg.norm(mean - expected)


def test_settings_out_of_range_are_named():
    for name, value in (("noise_std", 0.0), ("gain", 0.0), ("spread", 0.0), ("last_level", 0.0), ("rho", 0.0),
                        ("num_levels", 0), ("ode_steps", 0), ("langevin_steps", 0), ("langevin_step", 2.0),
                        ("first_level", 0.01)):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            Daps(**{name: value})
