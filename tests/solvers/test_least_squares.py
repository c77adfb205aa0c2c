"""Unrolled solvers against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxmed.solvers.least_squares import (
    Evaluation,
    Surface,
    invert_positive,
    lm_init,
    lm_run,
    solve_positive,
    weighted_linear,
)

pytestmark = pytest.mark.core


def test_positive_systems_are_solved():
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(50, 5, 8))
    matrix = (factor @ factor.transpose(0, 2, 1)).astype(np.float32)
    right = rng.normal(size=(50, 5)).astype(np.float32)
    solution = solve_positive(jnp.asarray(matrix.transpose(1, 2, 0)), jnp.asarray(right.T))
    expected = np.linalg.solve(matrix.astype(np.float64), right[..., None].astype(np.float64))[..., 0]
    np.testing.assert_allclose(solution.T, expected, rtol=2e-3, atol=2e-4)


def test_an_indefinite_system_says_so_by_not_being_finite():
    matrix = jnp.asarray(np.diag([1.0, -1.0]).astype(np.float32))[:, :, None]
    assert not np.isfinite(solve_positive(matrix, jnp.ones((2, 1)))).all()


def test_weighted_fits_equal_numpy():
    rng = np.random.default_rng(1)
    design = rng.normal(size=(30, 4)).astype(np.float32)
    values = rng.normal(size=(30, 7)).astype(np.float32)
    weights = rng.uniform(0.1, 2.0, size=(30, 7)).astype(np.float32)
    found = weighted_linear(jnp.asarray(design), jnp.asarray(values), jnp.asarray(weights))
    for column in range(7):
        root = np.sqrt(weights[:, column])
        expected = np.linalg.lstsq(design * root[:, None], values[:, column] * root, rcond=None)[0]
        np.testing.assert_allclose(found[:, column], expected, rtol=1e-3, atol=1e-4)


def test_positive_matrices_are_inverted():
    factor = np.random.default_rng(2).normal(size=(20, 4, 7)).astype(np.float32)
    matrix = factor @ factor.transpose(0, 2, 1)
    inverse = invert_positive(jnp.asarray(matrix.transpose(1, 2, 0)))
    np.testing.assert_allclose(
        np.asarray(inverse).transpose(2, 0, 1) @ matrix, np.tile(np.eye(4), (20, 1, 1)), atol=2e-3
    )


TIMES = np.linspace(0.0, 3.0, 30, dtype=np.float32)[:, None]
LOWER, UPPER = np.array([0.0, 0.1], np.float32)[:, None], np.array([2.0, 5.0], np.float32)[:, None]


def decay_surface(data):
    """Fit amplitude and rate of an exponential decay within bounds."""

    def evaluate(point):
        shape = jnp.exp(-point[1] * TIMES)
        residual = point[0] * shape - data
        columns = [shape, -point[0] * TIMES * shape]
        normal = jnp.stack([jnp.stack([jnp.sum(a * b, axis=0) for b in columns]) for a in columns])
        gradient = jnp.stack([jnp.sum(column * residual, axis=0) for column in columns])
        return Evaluation(0.5 * jnp.sum(residual**2, axis=0), normal, gradient)

    def move(point, update):
        there = jnp.clip(point + update, LOWER, UPPER)
        return there, there - point

    def blocked(point, gradient):
        return ((point <= LOWER) & (gradient > 0)) | ((point >= UPPER) & (gradient < 0))

    return Surface(evaluate, move, blocked)


def test_decays_are_fitted_within_their_bounds_as_scipy_does():
    rng = np.random.default_rng(3)
    # Some amplitudes lie beyond the bounds, where the answer is on one of them.
    truth = np.stack([rng.uniform(-0.5, 2.5, 40), rng.uniform(0.3, 4.0, 40)]).astype(np.float32)
    data = truth[0] * np.exp(-truth[1] * TIMES) + 0.02 * rng.normal(size=(30, 40)).astype(np.float32)
    surface = decay_surface(jnp.asarray(data))
    start = jnp.tile(jnp.array([[1.0], [1.0]]), (1, 40))
    state = jax.jit(lambda point: lm_run(surface, lm_init(surface, point), 1e-9, 50))(start)
    assert state.done.all() and np.median(state.iterations) < 12
    assert ((state.point >= LOWER) & (state.point <= UPPER)).all()
    for problem in range(40):
        found = scipy.optimize.least_squares(
            lambda x, problem=problem: x[0] * np.exp(-x[1] * TIMES[:, 0]) - data[:, problem],
            (1.0, 1.0),
            bounds=(LOWER[:, 0], UPPER[:, 0]),
            xtol=1e-12,
        )
        assert float(state.at.cost[problem]) <= found.cost * (1 + 1e-4) + 1e-7
    on_bound = truth[0] > 2.1
    np.testing.assert_array_equal(state.point[0][on_bound], 2.0)


def test_a_problem_that_is_done_does_not_move():
    data = jnp.exp(-TIMES) * jnp.ones((1, 2))
    surface = decay_surface(data)
    state = lm_init(surface, jnp.array([[1.0, 1.5], [1.0, 2.0]]))
    state = state._replace(done=jnp.array([False, True]))
    state = jax.jit(lambda state: lm_run(surface, state, 1e-9, 20))(state)
    np.testing.assert_array_equal(state.point[:, 1], [1.5, 2.0])
    assert state.done.all() and state.iterations[1] == 0
