"""Lesions: currents without divergence, upstream differences, shapes, intensities (BrainFM specification, check 9)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.filters import finite_difference
from jaxmed.solvers.ode import OdeConfig
from jaxmed.synthesis.pathology import (
    Pathology,
    PathologyConfig,
    curl,
    draw_pathology,
    encode,
    perlin,
    spreading,
    transport,
    upwind,
)

pytestmark = pytest.mark.core
SHAPE = (20, 22, 18)
RNG = np.random.default_rng(8)
STEPS = OdeConfig("heun", step=1 / 16)
carry = jax.jit(functools.partial(transport, solver=STEPS))


def blob(center, width=2.5):
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    return jnp.asarray(np.exp(-0.5 * (((grid - center) / width) ** 2).sum(-1)), jnp.float32)


def test_a_current_has_no_divergence_inside():
    potentials = jax.random.normal(jax.random.key(1), (3, *SHAPE))
    velocity = curl(potentials)
    divergence = sum(finite_difference(velocity[axis], axis, "central") for axis in range(3))
    inner = np.asarray(divergence)[2:-2, 2:-2, 2:-2]
    assert np.abs(inner).max() < 1e-5 and np.abs(np.asarray(velocity)).max() > 1


def test_a_current_turns_to_the_right_about_a_potential():
    """The curl of (0, 0, y) is (1, 0, 0), of (0, 0, x) it is (0, -1, 0)."""
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in SHAPE), indexing="ij"))
    zero = np.zeros(SHAPE, np.float32)
    for potential, expected in ((grid[1], (1, 0, 0)), (grid[0], (0, -1, 0))):
        found = np.asarray(curl(jnp.stack([zero, zero, potential])))
        np.testing.assert_allclose(found, np.broadcast_to(np.reshape(expected, (3, 1, 1, 1)), found.shape), atol=1e-5)


def test_without_a_current_nothing_changes():
    share = blob((10, 11, 9))
    np.testing.assert_array_equal(upwind(share, jnp.zeros((3, *SHAPE))), 0.0)
    np.testing.assert_allclose(carry(share, jnp.zeros((3, *SHAPE))), share, atol=1e-6)


def test_a_constant_current_translates_and_an_upwind_step_of_a_voxel_is_exact():
    share = blob((7, 11, 9), 1.5)
    velocity = jnp.zeros((3, *SHAPE)).at[0].set(3.0)
    before, moved = np.asarray(share), np.asarray(carry(share, velocity))
    places = np.arange(SHAPE[0])[:, None, None]
    assert (moved * places).sum() / moved.sum() == pytest.approx((before * places).sum() / before.sum() + 3, abs=0.05)
    assert moved.sum() == pytest.approx(before.sum(), rel=1e-2)
    # A forward Euler step of length 1 / V moves by exactly one voxel.
    np.testing.assert_allclose(share - upwind(share, velocity / 3), np.roll(before, 1, 0), atol=2e-3)


def test_upstream_differences_by_hand():
    share, velocity = RNG.uniform(size=SHAPE), RNG.normal(size=(3, *SHAPE))
    expected = np.zeros(SHAPE)
    for index in np.ndindex(*SHAPE):
        for axis in range(3):
            v = velocity[(axis, *index)]
            other = list(index)
            other[axis] += -1 if v > 0 else 1
            if 0 <= other[axis] < SHAPE[axis]:
                slope = share[index] - share[tuple(other)] if v > 0 else share[tuple(other)] - share[index]
                expected[index] += v * slope
    found = upwind(jnp.asarray(share, jnp.float32), jnp.asarray(velocity, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_no_value_appears_that_was_not_there():
    share = (blob((10, 11, 9)) > 0.4).astype(np.float32)
    potentials = jnp.stack([perlin(one, SHAPE) for one in jax.random.split(jax.random.key(4), 3)])
    velocity = 30 * curl(potentials)
    assert float(jnp.abs(velocity).sum(0).max()) / 16 < 1  # a step is shorter than a voxel
    moved = np.asarray(carry(share, velocity))
    assert moved.min() >= -1e-6 and moved.max() <= 1 + 1e-6 and np.abs(moved - share).max() > 0.2


def test_adaptive_steps_agree_with_many_small_ones():
    share = blob((10, 11, 9))
    velocity = 20 * curl(jnp.stack([perlin(one, SHAPE) for one in jax.random.split(jax.random.key(5), 3)]))
    fine = jax.jit(functools.partial(transport, solver=OdeConfig("heun", step=1 / 64)))(share, velocity)
    np.testing.assert_allclose(jax.jit(transport)(share, velocity), fine, atol=3e-3)


def test_diffusion_keeps_the_whole_and_spreads_by_twice_the_coefficient():
    share = blob((10, 11, 9), 2.0)
    even = jnp.full(SHAPE, 0.4)
    assert abs(float(spreading(share, jnp.asarray(RNG.uniform(0.1, 1, SHAPE), jnp.float32)).sum())) < 1e-4
    spread, share = np.asarray(carry(share, jnp.zeros((3, *SHAPE)), even)), np.asarray(share)
    places = np.arange(SHAPE[2])

    def variance(image):
        line = image.sum((0, 1)) / image.sum()
        return (line * places**2).sum() - (line * places).sum() ** 2

    assert spread.sum() == pytest.approx(share.sum(), rel=1e-5)
    assert variance(spread) - variance(share) == pytest.approx(2 * 0.4, rel=0.02)


def test_noise_equals_the_textbook_and_repeats_along_its_first_axis():
    key, shape = jax.random.key(7), (8, 6, 10)
    found = np.asarray(perlin(key, shape))
    slopes = np.asarray(jax.random.normal(key, (3, 3, 3, 3)), np.float64)
    slopes /= np.linalg.norm(slopes, axis=-1, keepdims=True)
    slopes[-1] = slopes[0]
    for index in np.ndindex(*shape):
        place = np.array(index) * 2 / np.array(shape)
        cell = np.floor(place).astype(int)
        rest = place - cell
        fade = rest**3 * (rest * (rest * 6 - 15) + 10)
        value = 0.0
        for corner in np.ndindex(2, 2, 2):
            weight = np.prod(np.where(corner, fade, 1 - fade))
            value += weight * slopes[tuple(cell + corner)] @ (rest - corner)
        assert found[index] == pytest.approx(value, abs=1e-5)


@functools.cache
def drawn(config):
    return jax.jit(lambda key, brain, lesion: draw_pathology(key, brain, config, lesion))


def test_lesions_lie_in_the_brain_and_are_as_frequent_as_asked(key):
    brain = blob((10, 11, 9), 5.0) > 0.2
    config = PathologyConfig(probability=0.5, percentile=(85.0, 95.0))
    found = [drawn(config)(one, brain, None) for one in jax.random.split(key, 60)]
    shares = np.stack([one.share for one in found])
    has = shares.reshape(60, -1).max(1) > 0
    assert 15 < has.sum() < 45
    assert (shares[:, ~brain] == 0).all() and shares.max() == pytest.approx(1.0)
    for one in found:
        expected = one.share >= 0.5 * one.share.max() if one.share.max() > 0 else np.zeros(SHAPE, bool)
        np.testing.assert_array_equal(one.mask, expected)


def test_lesion_maps_flow_within_their_range(key):
    config = PathologyConfig(1.0, "lesion", threshold=0.2, flow="advection-diffusion", speed=200.0, solver=STEPS)
    share = blob((10, 11, 9))
    found = [drawn(config)(one, jnp.ones(SHAPE, bool), share) for one in jax.random.split(key, 3)]
    assert all(0 <= one.share.min() and one.share.max() <= 1 for one in found)
    assert any(np.abs(one.share - share).max() > 0.05 for one in found)
    with pytest.raises(ValueError, match=r"pathology\.shape: expected a lesion map"):
        draw_pathology(key, jnp.ones(SHAPE, bool), config)


def test_intensities_change_by_the_mean_inside_the_lesion():
    share = blob((10, 11, 9))
    pathology = Pathology(jnp.asarray(share), jnp.asarray(share > 0.5))
    image = jnp.full(SHAPE, 100.0)
    config = PathologyConfig(spread=0.0)
    change = jax.jit(jax.vmap(lambda key, bright: encode(key, image, pathology, bright, config), (0, None)))
    keys = jax.random.split(jax.random.key(3), 40)
    bright = np.asarray(change(keys, jnp.array(True)))[:, 10, 11, 9]
    dark = np.asarray(change(keys, jnp.array(False)))[:, 10, 11, 9]
    assert (bright >= 175).all() and (bright <= 200).all() and bright.std() > 3
    assert (dark >= 0).all() and (dark <= 25.001).all()
    noisy = dataclasses.replace(config, spread=0.25)
    spread = np.asarray(jax.jit(lambda key: encode(key, image, pathology, jnp.array(True), noisy))(keys[0]))
    assert spread[share < 1e-4] == pytest.approx(100.0, abs=0.1)
