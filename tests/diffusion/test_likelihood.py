"""Likelihoods by the probability flow against densities in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import draw, log_density
from priors import oracle, random_mixture

from jaxmed.diffusion.likelihood import LikelihoodConfig, log_likelihood
from jaxmed.diffusion.schedule import Edm, VpDiscrete
from jaxmed.solvers.ode import OdeConfig
from jaxmed.synthesis.phantoms.mixture import make_isotropic

pytestmark = pytest.mark.core
S, DIM = 0.8, 4


def centred():
    return make_isotropic(jnp.ones(1), jnp.zeros((1, DIM)), jnp.array([S]))


def compute(key, denoiser, x, config):
    return jax.jit(lambda x: log_likelihood(key, denoiser, x, config))(x)


@pytest.mark.parametrize(
    ("schedule", "divergence"),
    [pytest.param(Edm(), "exact", marks=pytest.mark.slow), (VpDiscrete(), "hutchinson")],
    ids=["edm exact", "cosine hutchinson"],
)
def test_gaussian_flow_is_the_closed_form(schedule, divergence, key):
    # The Jacobian of a round Gaussian is a multiple of 1, whose trace one probe of signs gives exactly.
    low, high = 0.02, 40.0
    config = LikelihoodConfig(divergence, ratio_min=low, ratio_max=high, bin_width=2 / 256)
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (3, 2, 2))
        found = jax.device_get(compute(key, oracle(centred(), schedule), x, config))
    x = np.asarray(x)
    growth = (S**2 + high**2) / (S**2 + low**2)
    np.testing.assert_allclose(found.latent, x * np.sqrt(growth) / high, rtol=5e-4)
    square = np.sum(np.square(np.asarray(x)), axis=(1, 2)) * growth / high**2
    expected = -0.5 * square - 0.5 * DIM * np.log(2 * np.pi * high**2) + 0.5 * DIM * np.log(growth)
    np.testing.assert_allclose(found.log_density, expected, atol=5e-4)
    assert np.all(found.succeeded)
    # 256 grey levels over a range of 2: each is 2^-7 wide.
    np.testing.assert_allclose(found.bits_per_dim, 7 - expected / (DIM * np.log(2)), atol=5e-4)


@pytest.mark.slow
def test_mixture_density_within_a_thousandth_per_dimension(key):
    with jax.enable_x64(True):
        prior = random_mixture(5, 3, DIM)
        x, _ = draw(key, prior, 8)
        # Noise at the end hides the mean of the images to one part in 5000.
        denoiser = oracle(prior, Edm(sigma_min=0.01, sigma_max=5000.0))
        found = compute(key, denoiser, x, LikelihoodConfig())
        expected = log_density(prior, x, jnp.ones(8), jnp.full(8, 0.01))
        np.testing.assert_allclose(found.log_density, expected, atol=1e-3 * DIM)


@pytest.mark.slow
def test_probes_agree_with_the_trace_on_average_and_differ_between_images(key):
    prior = random_mixture(5, 3, DIM)
    x = jnp.broadcast_to(draw(key, prior, 1)[0], (200, DIM))
    denoiser, ode = oracle(prior, Edm()), OdeConfig(rtol=1e-3, atol=1e-3)
    probed = compute(key, denoiser, x, LikelihoodConfig("hutchinson", ode=ode)).log_density
    traced = log_density(prior, x[:1], jnp.ones(1), jnp.full(1, 0.002))
    spread = np.std(probed)
    assert spread > 0.01
    assert abs(np.mean(probed) - traced[0]) < 4 * spread / np.sqrt(200) + 0.01


@pytest.mark.slow
def test_failures_are_told(key):
    config = LikelihoodConfig(ode=OdeConfig(max_steps=2))
    assert not np.any(compute(key, oracle(centred(), Edm()), jnp.ones((2, DIM)), config).succeeded)


def test_settings_out_of_range_are_named(key):
    with pytest.raises(ValueError, match="num_probes"):
        LikelihoodConfig(num_probes=0)
    with pytest.raises(ValueError, match="ratio_min"):
        log_likelihood(key, oracle(centred(), Edm()), jnp.zeros((1, DIM)), LikelihoodConfig(ratio_min=100.0))
