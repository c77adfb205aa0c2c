"""PnP-DPIR with a Gaussian prior: the rounds in NumPy, the image where they end, and the posterior's mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import covariance_matrices
from priors import MATRIX, MEASUREMENT, gaussian_mean, oracle, random_mixture

from jaxmed.diffusion.posterior.pnp_dpir import PnpDpir, pnp_dpir
from jaxmed.diffusion.schedule import VpDiscrete

pytestmark = pytest.mark.core
CHAIN = VpDiscrete(1000)
NOISE = 0.3


def run(key, config):
    prior = random_mixture(8, 1, 3)
    measurement = jnp.broadcast_to(jnp.asarray(MEASUREMENT), (2, 2))
    matrix = jnp.asarray(MATRIX)
    start = jnp.zeros((2, 3))
    go = jax.jit(lambda: pnp_dpir(key, oracle(prior, CHAIN), measurement, lambda x: matrix @ x, start, config))
    image, info = go()
    return prior, np.asarray(image), info


def best(prior, level, strength):
    """The minimum of |y - A x|^2 / noise^2 + strength (|x - z|^2 / level^2 + |z - m|^2 / C) over x and z, at z."""
    mean, covariance = np.asarray(prior.means[0]), np.asarray(covariance_matrices(prior)[0]) / strength
    total = MATRIX @ (covariance + level**2 / strength * np.eye(3)) @ MATRIX.T + NOISE**2 * np.eye(2)
    return mean + covariance @ MATRIX.T @ np.linalg.solve(total, MEASUREMENT - MATRIX @ mean)


def test_rounds_are_a_fit_in_closed_form_and_the_denoiser(key):
    with jax.enable_x64(True):
        config = PnpDpir(NOISE, strength=0.7, first_level=2.0, num_steps=5, solver_steps=2)
        prior, image, info = run(key, config)
        x = np.zeros((1, 3))
        for index, level in enumerate(np.geomspace(2.0, NOISE, 5)):
            t = CHAIN.time_at(np.array([level]))
            alpha, sigma = float(CHAIN.alpha(t)[0]), float(CHAIN.sigma(t)[0])
            np.testing.assert_allclose(sigma / alpha, level, rtol=1e-9)
            np.testing.assert_allclose(info.residuals[index], np.linalg.norm(MEASUREMENT - x @ MATRIX.T), rtol=1e-7)
            weight = 0.7 * NOISE**2 / level**2
            fitted = np.linalg.solve(MATRIX.T @ MATRIX + weight * np.eye(3), (MEASUREMENT @ MATRIX + weight * x).T).T
            x = gaussian_mean(prior, alpha * fitted, alpha, sigma)
        np.testing.assert_allclose(image, np.repeat(x, 2, 0), rtol=1e-7)
        assert np.all(info.evaluations == 5)


@pytest.mark.parametrize("level, strength", [(0.5, 1.0), (1.0, 0.3)])
def test_rounds_at_one_level_end_where_the_split_problem_has_its_minimum(level, strength, key):
    with jax.enable_x64(True):
        config = PnpDpir(NOISE, strength, levels=(level,) * 400, solver_steps=2)
        prior, image, _ = run(key, config)
        np.testing.assert_allclose(image[0], best(prior, level, strength), rtol=1e-6)


def test_falling_levels_end_at_the_mean_of_the_posterior(key):
    with jax.enable_x64(True):
        prior, image, _ = run(key, PnpDpir(NOISE, 1.0, levels=tuple(np.geomspace(2.0, 0.03, 1000)), solver_steps=2))
        np.testing.assert_allclose(image[0], best(prior, 0.0, 1.0), atol=0.03**2)


def test_settings_out_of_range_are_named():
    for name, value in (("noise_std", 0.0), ("strength", -1.0), ("first_level", 0.0), ("num_steps", 0),
                        ("solver_steps", 0), ("levels", ()), ("levels", (1.0, -1.0))):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            PnpDpir(**{name: value})
