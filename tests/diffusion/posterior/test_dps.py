"""DPS and CCDF against their steps by hand and against what a Gaussian mixture makes exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_operators import from_function, mask
from mixtures import posterior
from priors import oracle, random_mixture

import jaxmed.diffusion.posterior.ccdf
import jaxmed.diffusion.posterior.dps
from jaxmed.diffusion.posterior.ccdf import Ccdf
from jaxmed.diffusion.posterior.dps import Dps
from jaxmed.diffusion.samplers import Ddim, draw_noise, sample_keys
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.physics.operators import LinearOperator

pytestmark = pytest.mark.core

SCHEDULE = VpDiscrete(60)
MIXTURE = random_mixture(0, 2, 5, spread=2.0)
PRIOR = oracle(MIXTURE, SCHEDULE)
MATRIX = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
INVERSE = np.linalg.pinv(MATRIX).astype(np.float32)
KEY = jax.random.key(4)
OPERATOR = from_function(lambda x: MATRIX @ x, (5,), lambda y: INVERSE @ y)
dps = jax.jit(jaxmed.diffusion.posterior.dps.dps, static_argnames=("denoiser", "operator", "config"))
ccdf = jax.jit(jaxmed.diffusion.posterior.ccdf.ccdf, static_argnames=("denoiser", "operator", "config"))


def chain_at(t):
    """keep, pull, noise of the ancestral step from t, from its definition."""
    table, beta = SCHEDULE.alpha_bar_table, SCHEDULE.beta_table[t]
    before = table[t - 1] if t else 1.0
    scale = 1 - table[t]
    return (1 - before) * np.sqrt(1 - beta) / scale, beta * np.sqrt(before) / scale, np.sqrt(beta) if t else 0.0


def noise_at(keys, t):
    return np.asarray(jax.jit(draw_noise, static_argnames="shape")(keys, t, (5,)))


def test_dps_takes_the_steps_of_its_definition():
    y = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3)), jnp.float32)
    image, info = dps(KEY, PRIOR, y, OPERATOR, jnp.zeros((2, 5)), Dps(scale=0.2))

    @jax.jit
    @jax.grad
    def slope(x, t):
        mean = PRIOR.denoise(x, jnp.full(2, t, jnp.float32))
        return jnp.sum(jnp.linalg.norm(y - mean @ MATRIX.T, axis=1))

    keys = sample_keys(KEY, jnp.arange(2))
    x = np.sqrt(1 - SCHEDULE.alpha_bar_table[59]) * noise_at(keys, 60)
    for t in range(59, -1, -1):
        keep, pull, noise = chain_at(t)
        mean = np.asarray(PRIOR.denoise(jnp.asarray(x, jnp.float32), jnp.full(2, t, jnp.float32)))
        np.testing.assert_allclose(info.residuals[59 - t], np.linalg.norm(y - mean @ MATRIX.T, axis=1), rtol=1e-3)
        x = keep * x + pull * mean + noise * noise_at(keys, t) - 0.2 * np.asarray(slope(np.float32(x), t))
    np.testing.assert_allclose(image, x, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(info.evaluations, 60)
    np.testing.assert_array_equal(info.start_time, 59)


def test_dps_comes_closer_to_the_posterior_than_the_prior_does():
    """Not equal to it: its Gaussian leaves out the covariance of the image given its noisy version."""
    noise_std, count = 0.1, 2000
    y = jnp.asarray([1.0, -2.0, 0.5])
    exact = posterior(MIXTURE, jnp.asarray(MATRIX), y, noise_std)
    mean = np.exp(exact.log_weights) @ exact.means
    many = jnp.broadcast_to(y, (count, 3))
    guided, info = dps(KEY, PRIOR, many, OPERATOR, jnp.zeros((count, 5)), Dps(scale=0.3))
    free, free_info = dps(KEY, PRIOR, many, OPERATOR, jnp.zeros((count, 5)), Dps(scale=0.0))
    errors = [np.linalg.norm(images.mean(0) - mean) for images in (guided, free)]
    assert errors[0] < 0.5 * errors[1]
    assert info.residuals[-1].mean() < 0.3 * free_info.residuals[-1].mean()


def test_members_of_a_batch_do_not_matter_to_each_other():
    rng = np.random.default_rng(5)
    y, initial = (jnp.asarray(rng.normal(size=(4, n)), jnp.float32) for n in (3, 5))
    order = jnp.array([3, 1, 0, 2])
    for run, config in ((dps, Dps(sampler=Ddim(10, eta=0.5))), (ccdf, Ccdf(start=6, sampler=Ddim(10, eta=0.5)))):
        together, info = run(KEY, PRIOR, y, OPERATOR, initial, config)
        crowd, _ = run(KEY, PRIOR, y.at[1].set(9.0), OPERATOR, initial.at[1].set(9.0), config)
        np.testing.assert_allclose(crowd[jnp.array([0, 2, 3])], together[jnp.array([0, 2, 3])], rtol=1e-5, atol=1e-6)
        moved, _ = run(KEY, PRIOR, y[order], OPERATOR, initial[order], config, indices=order)
        np.testing.assert_allclose(moved, together[order], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(info.evaluations, 10 if run is dps else 7)


def test_ccdf_ends_on_the_measurement_and_keeps_what_it_does_not_see_near_the_estimate():
    """From few steps back the part that A does not see moves by the noise of the start, not more."""
    rng = np.random.default_rng(6)
    y, initial = (jnp.asarray(rng.normal(size=(64, n)), jnp.float32) for n in (3, 5))
    image, info = ccdf(KEY, PRIOR, y, OPERATOR, initial, Ccdf(start=2))
    np.testing.assert_allclose(image @ MATRIX.T, y, atol=1e-5)
    unseen = np.eye(5) - INVERSE @ MATRIX
    moved = [np.linalg.norm((image - initial) @ unseen.T, axis=1).mean()]
    far, _ = ccdf(KEY, PRIOR, y, OPERATOR, initial, Ccdf(start=40))
    moved.append(np.linalg.norm((far - initial) @ unseen.T, axis=1).mean())
    assert moved[0] < 0.4 and moved[1] > 2 * moved[0]
    np.testing.assert_array_equal(info.start_time, 2)


def test_ccdf_fills_what_a_mask_leaves_out():
    """The unseen coordinates are drawn from the prior given the seen ones, once the start is far enough back."""
    keep = np.array([True, True, True, False, False])
    truth = jnp.asarray(MIXTURE.means[0])
    exact = posterior(MIXTURE, jnp.eye(5)[:3], truth[:3], 1e-3)
    y = jnp.broadcast_to(jnp.where(keep, truth, 0.0), (500, 5))
    image, _ = ccdf(KEY, PRIOR, y, mask(keep), jnp.zeros((500, 5)), Ccdf(start=50))
    np.testing.assert_allclose(image[:, :3], y[:, :3], atol=1e-5)
    mean = np.exp(exact.log_weights) @ exact.means
    blank = np.linalg.norm(mean[3:])
    assert np.linalg.norm(image[:, 3:].mean(0) - mean[3:]) < 0.35 * blank


def test_what_cannot_run_is_refused():
    y, initial = jnp.zeros((1, 3)), jnp.zeros((1, 5))
    with pytest.raises(ValueError, match="pseudo-inverse"):
        ccdf(KEY, PRIOR, y, LinearOperator(OPERATOR.apply, OPERATOR.adjoint), initial, Ccdf(start=5))
    with pytest.raises(ValueError, match="less than the chain's 60 steps"):
        ccdf(KEY, PRIOR, y, OPERATOR, initial, Ccdf(start=60))
    with pytest.raises(ValueError, match="start: expected"):
        Ccdf(start=-1)
    with pytest.raises(ValueError, match="scale: expected"):
        Dps(scale=-1.0)
