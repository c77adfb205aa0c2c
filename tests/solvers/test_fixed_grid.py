"""The fixed grid: order of the method and of its interpolation, gradients, and the matrix form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.solvers.fixed_grid import interpolate, interpolation_matrix, solve_fixed

pytestmark = pytest.mark.core


def field(t, y, rate):
    return jnp.stack([-rate * y[1], rate * y[0]]) * (1 + t)


def exact(t, rate=0.8):
    phase = rate * (t + t**2 / 2)
    return np.stack([np.cos(phase), np.sin(phase)], axis=-1)


START = (1.0, 0.0)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def solution(steps):
    return solve_fixed(field, jnp.array(START), jnp.linspace(0.0, 2.0, steps + 1), jnp.array(0.8))


def test_states_and_what_lies_between_have_order_four():
    at = jnp.linspace(0.01, 1.99, 57)
    grid, between = [], []
    for steps in (20, 40):
        found = solution(steps)
        grid.append(np.abs(found.states[-1] - exact(2.0)).max())
        between.append(np.abs(interpolate(found, at) - exact(np.asarray(at))).max())
    assert abs(np.log2(grid[0] / grid[1]) - 4) < 0.25
    assert abs(np.log2(between[0] / between[1]) - 4) < 0.25
    assert between[1] < 1e-5


def test_interpolation_keeps_grid_points_and_slopes_and_continues_outside():
    found = solution(20)
    np.testing.assert_allclose(interpolate(found, found.times), found.states, atol=1e-14)
    slope = jax.jacfwd(lambda t: interpolate(found, t))(found.times[7])
    np.testing.assert_allclose(slope, found.slopes[7], atol=1e-12)
    np.testing.assert_allclose(interpolate(found, jnp.array([2.01]))[0], exact(2.01), atol=1e-3)


def test_the_matrix_of_an_interpolation_is_the_interpolation():
    found, at = solution(20), jnp.array([0.0, 0.33, 1.7, 2.0])
    stacked = jnp.concatenate([found.states, found.slopes])
    np.testing.assert_allclose(interpolation_matrix(found.times, at) @ stacked, interpolate(found, at), atol=1e-13)


def test_gradients_are_finite_differences():
    def end(rate):
        trajectory = solve_fixed(field, jnp.array(START), jnp.linspace(0.0, 2.0, 21), rate)
        return interpolate(trajectory, jnp.array(1.23))[0]

    gradient, step = jax.grad(end)(jnp.array(0.8)), 1e-5
    difference = (end(jnp.array(0.8 + step)) - end(jnp.array(0.8 - step))) / (2 * step)
    np.testing.assert_allclose(gradient, difference, rtol=1e-8)
