"""Low-field acquisitions: their definitions, gradients, fit, and the simulator's statistics."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed.physics.lowfield
from jaxmed.physics.lowfield import (
    LOWFIELD2025,
    LOWFIELD2026,
    FitConfig,
    LowField,
    contrast,
    linear_part,
    make_operator,
    simulate,
)

pytestmark = pytest.mark.core

SHAPE = (32, 32)
fit = jax.jit(jaxmed.physics.lowfield.fit, static_argnames=("shape", "config", "options"))
value_and_slope = jax.jit(jax.vmap(jax.value_and_grad(contrast), (0, None)))


def head(shape):
    """A bright ellipse with darker ones inside, background 0, in [0, 2]."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    image = np.zeros(shape)
    rng = np.random.default_rng(0)
    image[(grid**2).sum(0) < 0.8] = 1.4
    for _ in range(6):
        centre = rng.uniform(-0.5, 0.5, len(shape)).reshape(-1, *[1] * len(shape))
        image[((grid - centre) ** 2).sum(0) < 0.05] = rng.uniform(0.2, 1.9)
    return jnp.asarray(image[..., None], jnp.float32)


@pytest.mark.parametrize("config", [LOWFIELD2025, LOWFIELD2026], ids=["2025", "2026"])
def test_linear_parts_have_adjoints_and_keep_constants(config):
    linear = linear_part(SHAPE, config)
    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(rng.normal(size=(*SHAPE, 1)), jnp.float32) for _ in range(2))
    left, right = np.vdot(linear(x), y), np.vdot(x, linear.adjoint(y))
    assert abs(left - right) < 1e-5 * np.linalg.norm(linear(x)) * np.linalg.norm(y)
    inner = linear(jnp.ones((*SHAPE, 1)))[12:-12, 12:-12]
    np.testing.assert_allclose(inner, 1.0, rtol=1e-5)


def test_measurements_are_the_parts_in_order():
    image = head(SHAPE)
    expected = linear_part(SHAPE, LOWFIELD2025)(jnp.where(image > 0, image, 0.0) ** 0.4 * (image > 0))
    np.testing.assert_allclose(make_operator(SHAPE, LOWFIELD2025)(image), expected, atol=1e-5)
    np.testing.assert_allclose(make_operator(SHAPE, LOWFIELD2026)(image), linear_part(SHAPE, LOWFIELD2026)(image))
    noisy = simulate(jax.random.key(0), image, SHAPE, dataclasses.replace(LOWFIELD2025, noise=0.05))
    np.testing.assert_allclose(np.std(noisy - expected), 0.05, rtol=0.1)


def test_thick_slices_leave_the_plane_alone():
    config = LowField(gamma=1.0, scale=(1.0, 1.0, 5.0), sigma=(0.0, 0.0, 0.0))
    volume = head((6, 7, 20))
    measured = make_operator((6, 7, 20), config)(volume)
    flat = jnp.broadcast_to(volume[:, :, 10:11], volume.shape)
    np.testing.assert_allclose(make_operator((6, 7, 20), config)(flat), flat, atol=1e-6)
    assert np.abs(measured - volume).max() > 0.1


@pytest.mark.parametrize("gamma", [0.4, 0.8, 1.0, 2.5])
def test_contrast_is_the_power_with_a_gradient_that_is_its_own_everywhere(gamma):
    x = np.concatenate([[-1.0, 0.0, 1e-12], np.geomspace(1e-6, 2.0, 200)]).astype(np.float32)
    value, slope = map(np.asarray, value_and_slope(x, gamma))
    np.testing.assert_allclose(value[x >= 1e-3], x[x >= 1e-3] ** gamma, rtol=1e-5)
    # Below it, never further from the power than the power itself at the floor.
    assert np.all(np.abs(value - np.maximum(x, 0.0) ** gamma)[x < 1e-3] <= 1e-3**gamma)
    assert np.all(np.isfinite(slope)) and np.all(slope >= 0)
    # The power's own slope at 1e-7 is 6e3 for gamma 0.4.
    assert slope.max() <= max((2 - gamma) * 1e-3 ** (gamma - 1), gamma * 2 ** (gamma - 1)) * 1.001
    # The slope belongs to the value: integrated, it gives the value back. The power's own slope would not at 0.
    fine = np.linspace(0.0, 4e-3, 4001, dtype=np.float32)
    values, slopes = map(np.asarray, value_and_slope(fine, gamma))
    area = np.cumsum(0.5 * (slopes[1:] + slopes[:-1])) * 1e-6
    np.testing.assert_allclose(area, values[1:], rtol=1e-3, atol=2e-3 * area[-1])


def test_gradients_through_an_acquisition_are_finite_in_the_background():
    image = head(SHAPE)
    operator = make_operator(SHAPE, LOWFIELD2025)
    target = operator(image * 0.9)
    gradient = jax.jit(jax.grad(lambda x: jnp.sqrt(jnp.sum((target - operator(x)) ** 2) + 1e-12)))(image)
    gradient, image = np.asarray(gradient), np.asarray(image)
    assert np.all(np.isfinite(gradient))
    # Background voxels were two thousand times a brain voxel's with the authors' power.
    background, brain = np.abs(gradient[image == 0]), np.abs(gradient[image > 0])
    assert background.max() < 300 * np.median(brain)


@pytest.mark.parametrize("gamma, sigma", [(0.6, 1.6), (1.4, 0.7)])
def test_fit_recovers_gamma_and_sigma(gamma, sigma):
    truth = LowField(gamma=gamma, scale=2.0, sigma=sigma, radius=6, noise=0.01)
    high = jnp.stack([head(SHAPE), head(SHAPE)[::-1] * 0.8])
    low = jax.vmap(partial(simulate, shape=SHAPE, config=truth))(jax.random.split(jax.random.key(0), 2), high)
    found = fit(high, low, SHAPE, LowField(scale=2.0, radius=6))
    np.testing.assert_allclose([found.gamma, found.sigma], [gamma, sigma], rtol=0.02)
    np.testing.assert_allclose(found.loss, 0.01**2, rtol=0.1)
    assert found.steps <= 1000


def test_fit_stops_when_nothing_improves():
    high = jnp.zeros((1, *SHAPE, 1))
    found = fit(high, high, SHAPE, LOWFIELD2025, FitConfig(patience=7))
    assert found.steps == 8 and found.loss == 0
    np.testing.assert_allclose([found.gamma, found.sigma], 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LowField(gamma=0.0),
        lambda: LowField(scale=(2.0, 0.5)),
        lambda: LowField(sigma=-1.0),
        lambda: LowField(floor=0.0),
        lambda: LowField(radius=0),
        lambda: LowField(noise=-1.0),
        lambda: FitConfig(patience=0),
        lambda: FitConfig(sigma_range=(2.0, 1.0)),
        lambda: make_operator((8, 8), LowField(scale=(2.0, 2.0, 2.0))),
    ],
)
def test_impossible_acquisitions_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        wrong()
