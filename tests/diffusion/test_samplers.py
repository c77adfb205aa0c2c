"""Samplers against matrix recursions, against each other, against the order they promise, and batch against single."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from mixtures import covariance_matrices
from priors import oracle, random_mixture

from jaxmed import diffusion
from jaxmed.diffusion.denoiser import Denoiser, make_denoiser
from jaxmed.diffusion.samplers import (
    Ancestral,
    Ddim,
    DpmSolver,
    Heun,
    SamplerState,
    draw_noise,
    grid,
    plan,
    sample_keys,
    step,
)
from jaxmed.diffusion.schedule import Edm, VpContinuous, VpDiscrete

pytestmark = pytest.mark.core
CHAIN = VpDiscrete(200)
GAUSSIAN = (1, 1, 3)


@jax.jit
def first_noise(keys, left):
    return draw_noise(keys, left, (3,), jnp.float64)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@functools.cache
def prepared(schedule, number, has_noise):
    """A prior in double precision and its step, compiled once for all samplers whose rows are of one kind."""
    prior = random_mixture(*number)
    denoiser = oracle(prior, schedule)
    return prior, jax.jit(lambda keys, state, row: step(keys, denoiser, state, row, has_noise))


def rows(steps):
    return [type(steps)(*values) for values in zip(*steps, strict=True)]


# Textbook steps in NumPy, on a pair (x, D of the step before); affine wherever D is.
def ddpm(mean_of, level, state, z, large):
    (a, s), (a2, s2) = level
    x, _ = state
    product, product2 = a**2, a2**2
    beta = 1 - product / product2
    c1 = beta * np.sqrt(product2) / (1 - product)
    c2 = (1 - product2) * np.sqrt(product / product2) / (1 - product)
    variance = beta if large else beta * (1 - product2) / (1 - product)
    mean = mean_of(x, a, s)
    return c1 * mean + c2 * x + (np.sqrt(variance) * z if s2 > 0 else 0.0), mean


def ddim(mean_of, level, state, z, eta):
    (a, s), (a2, s2) = level
    x, _ = state
    mean = mean_of(x, a, s)
    width = eta * np.sqrt((1 - a2**2) / (1 - a**2)) * np.sqrt(1 - a**2 / a2**2)
    return a2 * mean + np.sqrt(s2**2 - width**2) * (x - a * mean) / s + width * z, mean


def multistep(mean_of, levels, index, state):
    x, before = state
    (a, s), (a2, s2) = levels[index], levels[index + 1]
    mean = mean_of(x, a, s)
    if s2 == 0:
        return mean, mean
    lam = [np.log(a / s) for a, s in levels[:-1]]
    h = lam[index + 1] - lam[index]
    if index == 0:
        blend = mean
    else:
        r = (lam[index] - lam[index - 1]) / h
        blend = (1 + 1 / (2 * r)) * mean - before / (2 * r)
    return s2 / s * x - a2 * (np.exp(-h) - 1) * blend, mean


def heun(mean_of, level, state, z, gamma):
    """EDM's algorithm 2, alpha = 1."""
    (_, s), (_, s2) = level
    x, _ = state
    hat = s * (1 + gamma)
    x = x + np.sqrt(hat**2 - s**2) * z
    mean = mean_of(x, 1.0, hat)
    slope = (x - mean) / hat
    moved = x + (s2 - hat) * slope
    if s2 > 0:
        moved = x + (s2 - hat) * 0.5 * (slope + (moved - mean_of(moved, 1.0, s2)) / s2)
    return moved, mean


VP_TIMES = (190.0, 150.0, 110.0, 70.0, 30.0, 3.0)
EDM_TIMES = (20.0, 8.0, 3.0, 1.0, 0.3, 0.05)
CASES = {
    "ddpm large": (CHAIN, Ancestral(times=VP_TIMES), lambda f, v, i, s, z: ddpm(f, v[i : i + 2], s, z, True)),
    "ddpm posterior": (
        CHAIN,
        Ancestral(variance="posterior", times=VP_TIMES),
        lambda f, v, i, s, z: ddpm(f, v[i : i + 2], s, z, False),
    ),
    "ddim": (CHAIN, Ddim(times=VP_TIMES), lambda f, v, i, s, z: ddim(f, v[i : i + 2], s, z, 0.0)),
    "ddim eta": (CHAIN, Ddim(eta=0.7, times=VP_TIMES), lambda f, v, i, s, z: ddim(f, v[i : i + 2], s, z, 0.7)),
    "2m": (CHAIN, DpmSolver(times=VP_TIMES), lambda f, v, i, s, z: multistep(f, v, i, s)),
    # Euler's step in sigma / alpha is DDIM's.
    "euler": (CHAIN, Heun(order=1, times=VP_TIMES), lambda f, v, i, s, z: ddim(f, v[i : i + 2], s, z, 0.0)),
    "heun": (Edm(), Heun(times=EDM_TIMES), lambda f, v, i, s, z: heun(f, v[i : i + 2], s, z, 0.0)),
    "heun churn": (
        Edm(),
        Heun(churn=1.5, times=EDM_TIMES),
        lambda f, v, i, s, z: heun(f, v[i : i + 2], s, z, 1.5 / 6),
    ),
}


@functools.cache
def moments():
    prior, _ = prepared(CHAIN, GAUSSIAN, True)
    return np.asarray(prior.means[0]), np.asarray(covariance_matrices(prior)[0])


def gaussian_mean(x, alpha, sigma):
    """E[x_0 | x_t] of the Gaussian prior, rows of x, by solving with the full covariance."""
    mean, covariance = moments()
    total = alpha**2 * covariance + sigma**2 * np.eye(3)
    return mean + alpha * (x - alpha * mean) @ np.linalg.solve(total, covariance)


def affine(reference, levels, index):
    """The reference step as matrices: (x, D)' = M (x, D) + c + N z."""

    def apply(vector, z):
        return np.concatenate(reference(gaussian_mean, levels, index, (vector[:3], vector[3:]), z))

    constant = apply(np.zeros(6), np.zeros(3))
    matrix = np.stack([apply(unit, np.zeros(3)) - constant for unit in np.eye(6)], axis=1)
    noise = np.stack([apply(np.zeros(6), unit) - constant for unit in np.eye(3)], axis=1)
    return matrix, constant, noise


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_the_matrix_recursion_of_a_gaussian(name, double, key):
    schedule, sampler, reference = CASES[name]
    count = 100_000
    _, move = prepared(schedule, GAUSSIAN, True)
    times = grid(schedule, sampler)
    levels = [*zip(schedule.alpha(times), schedule.sigma(times), strict=True), (1.0, 0.0)]
    keys = sample_keys(key, jnp.arange(count))
    x = levels[0][1] * draw_noise(keys, len(times), (3,), jnp.float64)
    state = SamplerState(x, jnp.zeros_like(x))
    # The exact law of the augmented state (x, D before): D before starts at zero.
    mean, covariance = np.zeros(6), np.diag([levels[0][1] ** 2] * 3 + [0.0] * 3)
    for index, row in enumerate(rows(plan(schedule, sampler))):
        before = tuple(np.asarray(part[:50]) for part in state)
        state = move(keys, state, row)
        expected, _ = reference(gaussian_mean, levels, index, before, np.asarray(first_noise(keys[:50], row.left)))
        np.testing.assert_allclose(state.x[:50], expected, rtol=1e-9, atol=1e-9)
        matrix, constant, noise = affine(reference, levels, index)
        mean = matrix @ mean + constant
        covariance = matrix @ covariance @ matrix.T + noise @ noise.T
        exact = covariance[:3, :3]
        deviation = np.sqrt(np.diag(exact))
        np.testing.assert_array_less(np.abs(np.mean(state.x, axis=0) - mean[:3]), 5 * deviation / np.sqrt(count))
        # The variance of a sample covariance of Gaussians is (S_ii S_jj + S_ij^2) / n.
        width = np.sqrt((np.outer(deviation, deviation) ** 2 + exact**2) / count)
        np.testing.assert_array_less(np.abs(np.cov(np.asarray(state.x).T) - exact), 5 * width)


def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance(double):
    one, other = plan(CHAIN, Ddim(20, eta=1.0)), plan(CHAIN, Ancestral(20, "posterior"))
    for name in one._fields:
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (lambda times: Ddim(times=times), 1),
        (lambda times: Heun(order=1, times=times), 1),
        (lambda times: Heun(times=times), 2),
        (lambda times: DpmSolver(times=times), 2),
    ],
    ids=["ddim", "euler", "heun", "2m"],
)
def test_probability_flow_converges_with_the_promised_order(make, order, double):
    schedule = Edm()
    # One program per kind of row, walked from Python: a scan would be compiled for each number of steps.
    _, move = prepared(schedule, (3, 3, 4), False)
    keys = sample_keys(jax.random.key(0), jnp.arange(16))
    start = 10.0 * draw_noise(keys, 0, (4,), jnp.float64)

    def endpoint(sampler):
        state = SamplerState(start, jnp.zeros_like(start))
        for row in rows(plan(schedule, sampler, to_image=False)):
            state = move(keys, state, row)
        return state.x

    def times(count):
        return tuple(np.geomspace(10.0, 0.1, count + 1))

    exact = endpoint(Heun(times=times(2000)))
    counts = np.array([32, 64, 128, 256])
    errors = [float(jnp.sqrt(jnp.mean((endpoint(make(times(count))) - exact) ** 2))) for count in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.25, (slope, errors)


@pytest.mark.parametrize(
    "sampler",
    [Ancestral(8), pytest.param(DpmSolver(8), marks=pytest.mark.slow), Heun(5, churn=2.0)],
    ids=lambda s: type(s).__name__,
)
def test_a_sample_does_not_depend_on_its_batch(sampler, key):
    denoiser = oracle(random_mixture(4, 2, 3), CHAIN)
    draw = jax.jit(lambda indices: diffusion.sample(key, denoiser, (8, 3), sampler, indices=indices))
    whole = draw(jnp.arange(8))
    assert whole.dtype == jnp.float32 and np.unique(np.asarray(whole), axis=0).shape == (8, 3)
    # Sample 3 in another place, among others.
    np.testing.assert_allclose(draw(jnp.array([9, 3, 11, 12, 13, 14, 15, 16]))[1], whole[3], rtol=1e-5, atol=1e-5)
    if isinstance(sampler, Ancestral):
        chunked = jax.jit(lambda: diffusion.sample(key, denoiser, (8, 3), sampler, chunk=3))()
        np.testing.assert_allclose(chunked, whole, rtol=1e-5, atol=1e-5)
        # Spread over eight devices.
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        layout = NamedSharding(mesh, PartitionSpec("data"))
        sharded = draw(jax.device_put(jnp.arange(8), layout))
        assert sharded.sharding.is_equivalent_to(layout, sharded.ndim)
        np.testing.assert_allclose(sharded, whole, rtol=1e-5, atol=1e-5)


def test_chain_numbers_its_noise_by_time():
    np.testing.assert_array_equal(plan(CHAIN, Ancestral()).left, np.arange(200)[::-1])
    np.testing.assert_array_equal(plan(CHAIN, Ancestral()).time, np.arange(200)[::-1])


@pytest.mark.parametrize("schedule", [VpDiscrete(), VpContinuous(), Edm()], ids=["cosine", "continuous", "edm"])
def test_every_sampler_visits_every_schedule(schedule):
    for sampler in (Ancestral(10), Ddim(10), DpmSolver(10), Heun(10), Heun(10, churn=40.0)):
        steps = plan(schedule, sampler)
        assert len(steps.time) == 10 and all(np.all(np.isfinite(column)) for column in steps)
        first, last = schedule.times(2)
        assert last <= steps.time[-1] and np.all(steps.time <= first * np.sqrt(2))


def test_five_lines_of_python(key):
    network = lambda x, t: 0.1 * x  # noqa: E731
    denoiser = make_denoiser(network, VpDiscrete(), "epsilon", clip=(0.0, 2.0))
    images = diffusion.sample(key, denoiser, (2, 8, 8, 1), Ddim(num_steps=4))
    assert images.shape == (2, 8, 8, 1)
    assert float(images.min()) >= 0.0 and float(images.max()) <= 2.0


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Ancestral(variance="small"), "variance"),
        (lambda: Ddim(eta=2.0), "eta"),
        (lambda: Ddim(0), "num_steps"),
        (lambda: Ddim(times=(1.0, 2.0)), "times"),
        (lambda: Heun(order=3), "order"),
        (lambda: Heun(churn=-1.0), "churn"),
        (lambda: DpmSolver(rho=0.0), "rho"),
        (lambda: plan(Edm(), Ancestral()), "num_steps"),
    ],
)
def test_settings_out_of_range_are_named(make, names):
    with pytest.raises((ValueError, TypeError), match=names):
        make()


def test_counts_that_do_not_fit_are_named(key):
    denoiser = Denoiser(lambda x, t: x, CHAIN)
    with pytest.raises(ValueError, match="indices"):
        diffusion.sample(key, denoiser, (3, 2), Ddim(2), indices=jnp.arange(2))
    with pytest.raises(ValueError, match="chunk"):
        diffusion.sample(key, denoiser, (3, 2), Ddim(2), chunk=0)


@pytest.mark.parametrize("sampler", [Ddim(4, eta=0.5), Heun(3)], ids=["chain", "Heun"])
def test_the_call_composes_with_jit_vmap_and_grad(sampler, key):
    """The images move with what the denoiser closes over: a Gaussian prior's mean and variance."""

    def draw(key, mean, log_variance):
        def denoise(x, t):
            alpha, sigma = CHAIN.alpha(t)[:, None], CHAIN.sigma(t)[:, None]
            variance = jnp.exp(log_variance)
            return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)

        return diffusion.sample(key, Denoiser(denoise, CHAIN), (2, 3), sampler)

    inputs = jnp.array([0.3, -0.2, 1.0]), jnp.array([-0.5, 0.2, 0.0])
    jitted = jax.jit(draw)
    whole = jitted(key, *inputs)
    keys = jnp.stack([key, jax.random.key(7)])
    mapped = jax.jit(jax.vmap(draw, (0, None, None)))(keys, *inputs)
    np.testing.assert_allclose(mapped[0], whole, rtol=1e-5, atol=1e-5)
    assert np.abs(mapped[1] - mapped[0]).max() > 0.1
    total = lambda *inputs: jnp.sum(jnp.sin(jitted(key, *inputs)))  # noqa: E731
    towards = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.3, 1.0, -1.0])
    ahead, behind = (total(*(x + h * d for x, d in zip(inputs, towards, strict=True))) for h in (1e-2, -1e-2))
    gradient = jax.grad(total, (0, 1))(*inputs)
    found = sum(jnp.vdot(g, d) for g, d in zip(gradient, towards, strict=True))
    np.testing.assert_allclose(found, (ahead - behind) / 2e-2, rtol=5e-3)
    np.testing.assert_allclose(jax.jvp(total, inputs, towards)[1], found, rtol=1e-4)
