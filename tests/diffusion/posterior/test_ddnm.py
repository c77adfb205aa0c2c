"""DDNM: consistent to the last digit, the prior's chain where nothing was measured, a matrix recursion with noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_operators import mask
from priors import MATRIX, MEASUREMENT, gaussian_mean, oracle, random_mixture

from jaxmed import diffusion
from jaxmed.diffusion.posterior.ddnm import Ddnm, ddnm
from jaxmed.diffusion.samplers import Ancestral, Ddim, draw_noise, sample_keys
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.physics.operators import LinearOperator
from jaxmed.synthesis.phantoms.mixture import make_isotropic

pytestmark = pytest.mark.core
CHAIN = VpDiscrete(200)
TIMES = (190.0, 120.0, 60.0, 20.0, 4.0)


def matrix_operator():
    matrix, inverse = jnp.asarray(MATRIX), jnp.asarray(np.linalg.pinv(MATRIX))
    return LinearOperator(lambda x: matrix @ x, lambda y: matrix.T @ y, lambda y: inverse @ y)


def test_masked_images_keep_what_was_seen_and_the_chain_elsewhere(key):
    # Coordinates of a white prior do not know each other: the unseen ones are those of the plain sampler.
    denoiser = oracle(make_isotropic(jnp.ones(1), jnp.full((1, 6), 0.4), jnp.array([0.3])), CHAIN)
    keep = np.array([[True, False, True], [False, False, True]])
    measurement = jnp.where(keep, jax.random.normal(jax.random.key(1), (4, 2, 3)), 0.0)
    sampler = Ddim(20, eta=0.85)
    config, zeros = Ddnm(sampler=sampler), jnp.zeros((4, 2, 3))
    image, info = jax.jit(lambda y: ddnm(key, denoiser, y, mask(keep), zeros, config))(measurement)
    np.testing.assert_allclose(image[:, keep], measurement[:, keep], atol=1e-6)
    free = diffusion.sample(key, denoiser, (4, 2, 3), sampler)
    np.testing.assert_allclose(image[:, ~keep], free[:, ~keep], rtol=1e-4, atol=1e-5)
    assert np.all(info.evaluations == 20) and np.all(info.step_sizes == 1)


@pytest.mark.parametrize("noise", [pytest.param(0.0, marks=pytest.mark.slow), 0.15])
def test_run_is_the_papers_recursion(noise, key):
    with jax.enable_x64(True):
        prior = random_mixture(8, 1, 3)
        sampler = Ancestral(variance="posterior", times=TIMES)
        measurement = jnp.broadcast_to(jnp.asarray(MEASUREMENT), (5, 2))
        run = jax.jit(
            lambda: ddnm(
                key, oracle(prior, CHAIN), measurement, matrix_operator(), jnp.zeros((5, 3)), Ddnm(noise, sampler)
            )
        )
        image, info = run()
        keys = sample_keys(key, jnp.arange(5))

        def noise_of(left):
            return np.asarray(draw_noise(keys, left, (3,), jnp.float64))

        inverse = np.linalg.pinv(MATRIX)
        levels = [(float(CHAIN.alpha(np.array([t]))[0]), float(CHAIN.sigma(np.array([t]))[0])) for t in TIMES]
        x = levels[0][1] * noise_of(5)
        for index, ((a, s), (a2, s2)) in enumerate(zip(levels, [*levels[1:], (1.0, 0.0)], strict=True)):
            mean = gaussian_mean(prior, x, a, s)
            beta = 1 - a**2 / a2**2
            deviation = np.sqrt(beta) * s2 / s
            share = beta * a2 / s**2  # the paper's a_t
            brought = share * noise
            factor = 1.0 if deviation >= brought else deviation / brought
            own = np.sqrt(max(deviation**2 - (factor * brought) ** 2, 0.0))
            misfit = MEASUREMENT - mean @ MATRIX.T
            np.testing.assert_allclose(info.residuals[index], np.linalg.norm(misfit, axis=1), rtol=1e-6)
            mean = mean + factor * misfit @ inverse.T
            z = noise_of(4 - index)
            seen = z @ (inverse @ MATRIX).T
            x = share * mean + s2**2 * a / a2 / s**2 * x + deviation * (z - seen) + own * seen
        np.testing.assert_allclose(image, x, rtol=1e-9, atol=1e-9)
        if noise == 0:
            np.testing.assert_allclose(image @ MATRIX.T, measurement, atol=1e-12)


def test_operators_without_a_pseudo_inverse_are_refused(key):
    bare = LinearOperator(lambda x: x, lambda y: y)
    denoiser = oracle(make_isotropic(jnp.ones(1), jnp.zeros((1, 3)), jnp.ones(1)), CHAIN)
    with pytest.raises(ValueError, match="pseudo-inverse"):
        ddnm(key, denoiser, jnp.zeros((1, 3)), bare, jnp.zeros((1, 3)), Ddnm())
    with pytest.raises(ValueError, match="noise_std"):
        Ddnm(noise_std=-1.0)
