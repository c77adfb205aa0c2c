"""The ODE solver: closed forms, orders, gradients by every adjoint, and failures as data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.solvers.ode import OdeConfig, solve

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


@pytest.mark.parametrize(("field", "value"), [("rtol", 0.0), ("atol", -1.0), ("max_steps", 0), ("step", 0.0)])
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        OdeConfig(**{field: value})
