"""Moments of samples: Gaussian priors and quadratic decoders in closed form, chunks, devices, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmed.diffusion.averaging import Moments, average_samples, curvature_trace, merge
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.samplers import Ddim, SamplerState, draw_noise, plan, run, sample_keys
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.train.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.core
CHAIN = VpDiscrete(betas="scaled-linear")
SAMPLER = Ddim(times=CHAIN.leading_times(8))
MEAN, VARIANCE = jnp.array([0.5, -1.0, 0.2]), jnp.array([0.4, 1.0, 0.1])
FORM = jnp.array([[1.0, 0.3, 0.0], [0.3, 0.5, 0.2], [0.0, 0.2, 2.0]])


def denoise(x, t):
    """E[x_0 | x_t] of independent normal numbers."""
    alpha, sigma = CHAIN.alpha(t)[:, None], CHAIN.sigma(t)[:, None]
    return MEAN + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (x - alpha * MEAN)


PRIOR = Denoiser(denoise, CHAIN)


def quadratic(z):
    return jnp.einsum("bi,ij,bj->b", z, FORM, z)


def gain():
    """What DDIM makes of the start of each number: x' = keep x + pull D(x), with D linear."""
    steps, variance = plan(CHAIN, SAMPLER), np.asarray(VARIANCE, np.float64)
    result = np.ones(3)
    for time, keep, pull in zip(steps.time, steps.keep, steps.pull, strict=True):
        alpha, sigma = (float(level(np.array([time]))[0]) for level in (CHAIN.alpha, CHAIN.sigma))
        result = result * (keep + pull * alpha * variance / (alpha**2 * variance + sigma**2))
    return result


@functools.cache
def averaged(num_samples, chunk=None, read=lambda z: {"latent": z, "image": quadratic(z)}):
    return jax.jit(lambda key: average_samples(key, PRIOR, (3,), SAMPLER, num_samples, chunk=chunk, read=read))


def test_one_sample_is_plain_sampling(key):
    keys = sample_keys(key, jnp.arange(1))
    start = draw_noise(keys, 8, (3,))
    plain = jax.jit(lambda x: run(keys, PRIOR, SamplerState(x, jnp.zeros_like(x)), SAMPLER))(start)
    found = averaged(1)(key)
    np.testing.assert_allclose(found.mean["latent"], plain[0], rtol=1e-6)
    np.testing.assert_allclose(found.mean["image"], quadratic(plain)[0], rtol=1e-5)
    assert found.count == 1 and not found.std["latent"].any()


def test_chunks_change_nothing_and_moments_are_numpys(key):
    keys = sample_keys(key, jnp.arange(5))
    start = draw_noise(keys, 8, (3,))
    every = np.asarray(run(keys, PRIOR, SamplerState(start, jnp.zeros_like(start)), SAMPLER))
    for chunk in (1, 2, 4, None):  # the last chunk of 2 and of 4 is not full
        found = averaged(5, chunk)(key)
        assert found.count == 5
        np.testing.assert_allclose(found.mean["latent"], every.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.std["latent"], every.std(0, ddof=1), rtol=1e-5)
        np.testing.assert_allclose(found.mean["image"], np.asarray(quadratic(every)).mean(), rtol=1e-5)


def test_the_order_of_samples_does_not_matter(key):
    values = jax.random.normal(key, (6, 4))
    empty = Moments(jnp.zeros(()), jnp.zeros(4), jnp.zeros(4))
    real = jnp.ones(3, bool)
    found = [merge(merge(empty, order[:3], real), order[3:], real) for order in (values, values[::-1])]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *found)


def test_a_linear_decoder_makes_both_averages_one(key):
    matrix = jnp.array([[1.0, 2.0, 0.0], [0.0, -1.0, 0.5]])
    found = averaged(6, 3, lambda z: {"latent": z, "image": z @ matrix.T})(key)
    np.testing.assert_allclose(matrix @ found.mean["latent"], found.mean["image"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_samples", [2, 8])
def test_the_bias_of_averaging_before_a_quadratic_decoder_is_the_theorys(num_samples):
    """E[D(mean)] - E[D(z)] = (1/m - 1) Tr(A S)."""
    found = jax.vmap(averaged(num_samples))(jax.random.split(jax.random.key(3), 4000))
    difference = np.asarray(quadratic(found.mean["latent"]) - found.mean["image"], np.float64)
    expected = (1 / num_samples - 1) * np.trace(np.asarray(FORM, np.float64) @ np.diag(gain() ** 2))
    error = difference.std() / np.sqrt(len(difference))
    assert error < 0.05 * abs(expected) and abs(difference.mean() - expected) < 4 * error


def test_the_variance_of_the_mean_falls_with_the_number_of_samples():
    counts = (1, 4, 16)
    keys = jax.random.split(jax.random.key(4), 2000)
    variances = [np.asarray(jax.vmap(averaged(count))(keys).mean["latent"]).var(0) for count in counts]
    np.testing.assert_allclose(variances[0], gain() ** 2, rtol=0.15)
    slopes = np.polyfit(np.log(counts), np.log(variances), 1)[0]
    assert np.abs(slopes + 1).max() < 0.15


WIDE = Denoiser(lambda x, t: 0.5 * x, CHAIN)


def compiled(num_samples, sharding=None):
    def draw(key):
        return average_samples(key, WIDE, (64, 32), SAMPLER, num_samples, chunk=4, sharding=sharding)

    return jax.jit(draw).lower(jax.random.key(0)).compile()


def test_memory_does_not_grow_with_the_number_of_samples():
    few, many = (compiled(count).memory_analysis().temp_size_in_bytes for count in (8, 512))
    assert many < 1.05 * few


def test_a_chunk_spread_over_devices_gives_the_same(key):
    mesh = make_mesh(MeshConfig(data=4))
    spread = compiled(10, NamedSharding(mesh, PartitionSpec("data")))
    assert "all-reduce" in spread.as_text() and "[4,64,32]" not in spread.as_text()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), spread(key), compiled(10)(key))


def test_no_samples_are_refused(key):
    with pytest.raises(ValueError, match="num_samples, chunk"):
        average_samples(key, PRIOR, (3,), SAMPLER, 0)


def test_the_trace_of_a_quadratic_decoder_is_exact_and_predicts_the_bias():
    """D(z) = z'Az has the Hessian 2A everywhere; E[D(mean of m)] - E[D] = (1/m - 1) Tr(A S)."""
    rng = np.random.default_rng(0)
    matrix, std = jnp.asarray(rng.normal(size=(5, 5)), jnp.float32), jnp.asarray(rng.uniform(0.5, 2, 5), jnp.float32)
    decode = lambda z: jnp.stack([z @ matrix @ z, z @ jnp.diag(jnp.diag(matrix)) @ z])  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 400)
    found = jax.jit(lambda place: curvature_trace(decode, place, std, keys))(jnp.ones(5))
    trace = float(2 * (jnp.diag(matrix) * std**2).sum())
    assert float(found[1]) == pytest.approx(trace, rel=1e-4)  # signs cancel off the diagonal alone
    assert float(found[0]) == pytest.approx(trace, abs=0.15 * float(jnp.abs(matrix).sum()))
    m = 4
    samples = 1 + std * jax.random.normal(jax.random.key(1), (20_000, m, 5))
    each, mean = jax.vmap(jax.vmap(decode))(samples)[..., 1].mean(), jax.vmap(decode)(samples.mean(1))[:, 1].mean()
    assert float(mean - each) == pytest.approx(0.5 * (1 / m - 1) * trace, abs=0.25)
