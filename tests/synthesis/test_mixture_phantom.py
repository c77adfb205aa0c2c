"""The mixture prior itself: densities by integration, scores by automatic differentiation, posteriors by Bayes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import covariance_matrices, draw, log_density, make_mixture, posterior, score
from priors import random_mixture
from scipy.stats import multivariate_normal

from jaxmed.synthesis.phantoms.mixture import denoise, make_isotropic, responsibilities

pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def points(count=6, dim=3):
    return jnp.asarray(2 * np.random.default_rng(0).standard_normal((count, dim)))


def levels(count=6, alpha=0.8, sigma=0.4):
    return jnp.full(count, alpha), jnp.full(count, sigma)


def test_density_is_that_of_the_noised_mixture():
    mixture = random_mixture(0, 3, 3)
    weights, means, matrices = (np.asarray(part) for part in (*mixture[:2], covariance_matrices(mixture)))
    expected = sum(
        np.exp(weights[mode])
        * multivariate_normal(0.8 * means[mode], 0.64 * matrices[mode] + 0.16 * np.eye(3)).pdf(np.asarray(points()))
        for mode in range(3)
    )
    np.testing.assert_allclose(np.exp(log_density(mixture, points(), *levels())), expected, rtol=1e-11)


@pytest.mark.parametrize("dim", [2, 16])
def test_score_is_the_gradient_and_gives_the_denoiser(dim):
    mixture, x = random_mixture(dim, 3, dim), points(dim=dim)
    alpha, sigma = jnp.linspace(0.1, 1.0, 6), jnp.linspace(2.0, 0.05, 6)

    @jax.jit
    def both(x):
        gradient = jax.grad(lambda x: jnp.sum(log_density(mixture, x, alpha, sigma)))(x)
        return gradient, score(mixture, x, alpha, sigma), denoise(mixture, x, alpha, sigma)

    gradient, found, mean = both(x)
    np.testing.assert_allclose(found, gradient, rtol=1e-10, atol=1e-10)
    tweedie = (x + sigma[:, None] ** 2 * gradient) / alpha[:, None]
    np.testing.assert_allclose(mean, tweedie, rtol=1e-10, atol=1e-10)


def test_denoiser_is_the_mean_of_the_image_by_integration():
    mixture = make_mixture(jnp.array([0.3, 0.7]), jnp.array([[-1.0], [0.5]]), jnp.array([[[0.04]], [[0.09]]]))
    grid = np.linspace(-4, 4, 20001)
    prior = sum(w * np.exp(-0.5 * (grid - m) ** 2 / v) / np.sqrt(v) for w, m, v in ((0.3, -1, 0.04), (0.7, 0.5, 0.09)))
    weight = prior * np.exp(-0.5 * ((0.2 - 0.8 * grid) / 0.4) ** 2)
    found = denoise(mixture, jnp.array([[0.2]]), *levels(1))
    np.testing.assert_allclose(found[0, 0], np.sum(weight * grid) / np.sum(weight), rtol=1e-9)


def test_round_modes_are_full_ones_with_equal_variances():
    weights, means = jnp.array([1.0, 3.0]), jnp.array([[0.0, 1.0, 2.0], [1.0, 0.0, -1.0]])
    round_ = make_isotropic(weights, means, jnp.array([0.3, 0.5]))
    full = make_mixture(weights, means, jnp.eye(3) * jnp.array([0.09, 0.25])[:, None, None])
    for function in (log_density, responsibilities, denoise, score):
        one, other = (jax.jit(function)(mixture, points(), *levels()) for mixture in (round_, full))
        np.testing.assert_allclose(one, other, rtol=1e-12)
    np.testing.assert_allclose(covariance_matrices(round_), covariance_matrices(full), atol=1e-15)


def test_posterior_is_bayes_rule():
    mixture = random_mixture(0, 3, 3)
    matrix, measurement = np.array([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]]), np.array([0.4, -0.3])
    found = jax.jit(posterior)(mixture, jnp.asarray(matrix), jnp.asarray(measurement), jnp.float64(0.2))
    likelihood = -0.5 * np.sum(((measurement - np.asarray(points()) @ matrix.T) / 0.2) ** 2, axis=1)
    # Prior times likelihood over posterior is the evidence, the same at every point.
    prior, after = (log_density(one, points(), *levels(6, 1.0, 0.0)) for one in (mixture, found))
    evidence = np.asarray(prior) + likelihood - np.asarray(after)
    np.testing.assert_allclose(evidence, evidence[0], rtol=1e-9)


def test_draws_have_the_modes_moments(key):
    mixture = random_mixture(0, 3, 3)
    places, modes = draw(key, mixture, 40000)
    share = np.mean(np.asarray(modes) == 1)
    expected = np.exp(mixture.log_weights[1])
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 40000)
    first = np.asarray(places)[np.asarray(modes) == 0]
    np.testing.assert_allclose(first.mean(axis=0), mixture.means[0], atol=4 * first.std() / np.sqrt(len(first)))
    np.testing.assert_allclose(np.cov(first.T), covariance_matrices(mixture)[0], atol=0.06)
