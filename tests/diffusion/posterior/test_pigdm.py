"""PiGDM is exact where its covariance is: on white images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import covariance_matrices, posterior
from priors import MATRIX, MEASUREMENT, oracle

from jaxmed.diffusion.posterior.pigdm import Pigdm, guided_mean, pigdm
from jaxmed.diffusion.samplers import Heun
from jaxmed.diffusion.schedule import Edm, VpDiscrete
from jaxmed.synthesis.phantoms.mixture import denoise, make_isotropic

pytestmark = pytest.mark.core


NOISE = 0.2


def white(std):
    """A white prior, and its posterior given the measurement."""
    prior = make_isotropic(jnp.ones(1), jnp.array([[0.3, -0.2, 0.1]]), jnp.array([std]))
    return prior, posterior(prior, jnp.asarray(MATRIX), jnp.asarray(MEASUREMENT), NOISE)


def test_guided_mean_of_white_images_is_the_posteriors_denoiser():
    with jax.enable_x64(True):
        prior, truth = white(0.4)
        schedule = VpDiscrete()
        t = jnp.asarray(schedule.times(7)[1:])
        x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)))
        measurement = jnp.broadcast_to(jnp.asarray(MEASUREMENT), (6, 2))
        config = Pigdm(noise_std=NOISE, data_std=0.4, solver_steps=2)

        @jax.jit
        def run(x, t):
            found = guided_mean(oracle(prior, schedule), measurement, lambda x: jnp.asarray(MATRIX) @ x, config, x, t)
            return found, denoise(truth, x, schedule.alpha(t), schedule.sigma(t))

        found, expected = run(x, t)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("std", [1.0, 0.4])
def test_samples_of_white_images_have_the_posteriors_mean_and_covariance(std, key):
    with jax.enable_x64(True):
        count = 50_000
        prior, truth = white(std)
        denoiser = oracle(prior, Edm(sigma_max=40.0))
        config = Pigdm(noise_std=NOISE, data_std=std, solver_steps=2, sampler=Heun(40))
        measurement = jnp.broadcast_to(jnp.asarray(MEASUREMENT), (count, 2))
        run = jax.jit(
            lambda: pigdm(key, denoiser, measurement, lambda x: jnp.asarray(MATRIX) @ x, jnp.zeros((count, 3)), config)
        )
        x, info = run()
        matrix = np.asarray(covariance_matrices(truth)[0])
        deviation = np.sqrt(np.diag(matrix))
        width = np.sqrt((np.outer(deviation, deviation) ** 2 + matrix**2) / count)
        off = np.abs(np.mean(x, axis=0) - truth.means[0])
        np.testing.assert_array_less(off, 5 * deviation / np.sqrt(count) + 0.005 * deviation)
        np.testing.assert_array_less(np.abs(np.cov(np.asarray(x).T) - matrix), 5 * width + 0.01 * np.max(matrix))
        assert np.all(info.evaluations == 79)
        # At the last step the guided mean is the image.
        np.testing.assert_allclose(info.residuals[-1], np.linalg.norm(x @ MATRIX.T - MEASUREMENT, axis=1), atol=1e-5)


def test_settings_out_of_range_are_named():
    for name, value in (("noise_std", -1.0), ("data_std", 0.0), ("solver_steps", 0)):
        with pytest.raises(ValueError, match=name):
            Pigdm(**{name: value})
