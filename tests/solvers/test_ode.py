"""The ODE solver: closed forms, orders, gradients by every adjoint, events, and failures as data."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.solvers.fixed_grid import interpolate
from jaxmed.solvers.ode import GRID, OdeConfig, solve, solve_trajectory

pytestmark = pytest.mark.core
TIMES = jnp.array([0.0, 0.5, 2.0])


def oscillator(t, state, args):
    """A turning pair, and a decay beside it."""
    return {"pair": args * jnp.stack([-state["pair"][1], state["pair"][0]]), "decay": -t * state["decay"]}


START = {"pair": jnp.array([1.0, 0.0]), "decay": jnp.array(2.0)}


def exact(times):
    return np.stack([np.cos(1.5 * times), np.sin(1.5 * times)], axis=1), 2 * np.exp(-(times**2) / 2)


def test_states_at_the_times_asked_for_are_the_closed_form_and_back():
    run = jax.jit(lambda start, times: solve(oscillator, start, times, args=jnp.float32(1.5)))
    solution = run(START, TIMES)
    pair, decay = exact(np.asarray(TIMES))
    np.testing.assert_allclose(solution.states["pair"], pair, atol=1e-4)
    np.testing.assert_allclose(solution.states["decay"], decay, atol=1e-4)
    assert bool(solution.succeeded) and 0 < int(solution.num_steps) < 100
    end = jax.tree.map(lambda leaf: leaf[-1], solution.states)
    back = run(end, TIMES[::-1])
    np.testing.assert_allclose(back.states["pair"], pair[::-1], atol=2e-4)
    np.testing.assert_allclose(back.states["decay"], decay[::-1], atol=1e-3)


def test_fixed_steps_have_their_order():
    with jax.enable_x64(True):

        @jax.jit
        def run(rate):
            # Over one lifetime, so that a slower decay takes more steps of the same length.
            times = jnp.array([0.0, 1.0]) / rate
            return solve(lambda t, y, rate: -rate * y, jnp.array(1.0), times, OdeConfig("heun", step=0.1), rate)

        def error(rate):
            solution = run(rate)
            assert int(solution.num_steps) == round(10 / rate)
            return abs(float(solution.states[-1]) - np.exp(-1.0))

        assert abs(np.log2(error(1.0) / error(0.5)) - 2) < 0.1


@pytest.mark.slow
def test_stiff_equations_take_few_implicit_steps():
    with jax.enable_x64(True):
        times = jnp.array([0.0, 0.5, 2.0])

        def run(config):
            return solve(lambda t, y, args: -1e4 * (y - jnp.cos(t)), jnp.array(0.0), times, config)

        implicit, explicit = run(OdeConfig("kvaerno5", max_steps=100)), run(OdeConfig("heun", max_steps=100))
    assert bool(implicit.succeeded) and not bool(explicit.succeeded)
    np.testing.assert_allclose(implicit.states[1:], np.cos([0.5, 2.0]), atol=5e-4)


@pytest.mark.parametrize(
    "adjoint", ["checkpoint", *(pytest.param(name, marks=pytest.mark.slow) for name in ("direct", "backsolve"))]
)
def test_gradients_are_the_closed_form(adjoint):
    config = OdeConfig(adjoint=adjoint, max_steps=64)

    @jax.jit
    @jax.grad
    def slope(rate):
        return solve(lambda t, y, rate: -rate * y, jnp.float32(1.0), jnp.array([0.0, 1.0]), config, rate).states[-1]

    np.testing.assert_allclose(slope(jnp.float32(0.7)), -np.exp(-0.7), rtol=1e-4)


@pytest.mark.slow
def test_forward_mode_gives_directional_derivatives():
    def end(start):
        return solve(lambda t, y, args: -y, start, jnp.array([0.0, 1.0]), OdeConfig(adjoint="forward")).states[-1]

    _, tangent = jax.jvp(end, (jnp.float32(1.0),), (jnp.float32(2.0),))
    np.testing.assert_allclose(tangent, 2 * np.exp(-1.0), rtol=1e-4)


def test_failures_are_told_one_by_one():
    # y' = y^2 from y_0 is infinite at t = 1 / y_0: before the end for the second alone.
    def one(start):
        return solve(lambda t, y, args: y**2, start, jnp.array([0.0, 1.0]), OdeConfig(max_steps=64))

    solution = jax.jit(jax.vmap(one))(jnp.array([0.5, 2.0]))
    np.testing.assert_array_equal(solution.succeeded, [True, False])
    np.testing.assert_allclose(solution.states[0, -1], 1.0, rtol=1e-3)
    assert not np.isfinite(solution.states[1, -1])


def logistic(t, y, rate):
    return rate * y * (1 - y)


STARTS, GROWTH, YEARS = jnp.array([0.05, 0.02]), jnp.array([0.4, 0.3]), jnp.linspace(0.0, 20.0, 33)


def loss(rate, solver, config=GRID):
    course = solve_trajectory(logistic, STARTS, YEARS, rate, solver, config)
    return jnp.sum(interpolate(course, jnp.array([3.3, 11.1])) ** 2), course


@pytest.mark.parametrize(
    "adjoint",
    ["checkpoint", "forward", *(pytest.param(name, marks=pytest.mark.slow) for name in ("direct", "backsolve"))],
)
def test_both_solvers_give_one_trajectory_and_one_gradient(adjoint):
    differentiate = jax.jacfwd if adjoint == "forward" else jax.grad
    config = dataclasses.replace(GRID, adjoint=adjoint)
    slope, course = jax.jit(lambda rate: differentiate(loss, has_aux=True)(rate, "diffrax", config))(GROWTH)
    expected, fixed = jax.jit(lambda rate: jax.grad(loss, has_aux=True)(rate, "fixed"))(GROWTH)
    np.testing.assert_allclose(course.states, fixed.states, atol=1e-5)
    np.testing.assert_allclose(course.slopes, fixed.slopes, atol=1e-5)
    # Solved back in time the gradient is that of another approximation.
    np.testing.assert_allclose(slope, expected, rtol=1e-3 if adjoint == "backsolve" else 1e-5)


def test_a_solve_stops_where_the_mean_passes_a_value_and_stays():
    def stop(config, start):
        return solve(lambda t, y, _: y * (1 - y), start, jnp.linspace(0.0, 10.0, 21), config)

    for config in (OdeConfig(stop_at=0.5), dataclasses.replace(GRID, stop_at=0.5)):
        found = jax.jit(jax.vmap(functools.partial(stop, config)))(jnp.array([0.1, 1e-6]))
        np.testing.assert_allclose(found.end, [np.log(9), 10.0], atol=2e-3)
        assert found.succeeded.all() and int(found.num_steps[0]) < int(found.num_steps[1]) + 20
        np.testing.assert_allclose(found.states[0, 5:], 0.5, atol=1e-3)
        exact = 1 / (1 + 9 * np.exp(-np.linspace(0.0, 10.0, 21)))
        np.testing.assert_allclose(found.states[0, :5], exact[:5], atol=1e-3)


def test_a_solve_stops_where_nothing_moves():
    config = dataclasses.replace(GRID, steady=0.01)
    rate = jnp.array(1.0)
    course = jax.jit(lambda rate: solve_trajectory(logistic, STARTS, YEARS, rate, "diffrax", config))(rate)
    full = solve_trajectory(logistic, STARTS, YEARS, rate, "fixed")
    speed = np.abs(full.slopes).max(axis=1)
    after = int(np.argmax((speed < 0.01) & (np.arange(33) > 0)))
    np.testing.assert_allclose(course.states[: after + 1], full.states[: after + 1], atol=1e-6)
    np.testing.assert_array_equal(course.states[after:], np.broadcast_to(course.states[after], (33 - after, 2)))
    np.testing.assert_array_equal(course.slopes[after:], 0)


@pytest.mark.parametrize(("field", "value"), [("rtol", 0.0), ("atol", -1.0), ("max_steps", 0), ("step", 0.0)])
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        OdeConfig(**{field: value})
    with pytest.raises(ValueError, match="adjoint: expected one that can stop early"):
        OdeConfig(adjoint="backsolve", stop_at=0.5)
