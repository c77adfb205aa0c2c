"""Limited-memory BFGS: known minima, the exact method on a quadratic, batches, and functions that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxmed.solvers import quasi_newton

pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def minimise(function, point, steps, memory=16):
    return jax.jit(lambda x: quasi_newton.run(jax.value_and_grad(function), x, steps, memory))(point)


def test_rosenbrocks_minimum_is_found_in_about_as_many_evaluations_as_scipy_needs():
    start = np.array([-1.2, 1.0, -0.5, 0.8])
    found = minimise(rosenbrock, jnp.asarray(start), 120)
    theirs = scipy.optimize.minimize(jax.value_and_grad(rosenbrock), start, jac=True, method="L-BFGS-B")
    np.testing.assert_allclose(found.point, 1.0, atol=1e-6)
    assert theirs.nfev > 30  # of 120
    assert float(found.value) < 1e-12


def test_a_quadratic_is_solved_and_the_value_never_rises():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(12, 12))
    matrix, wanted = jnp.asarray(root @ root.T + np.eye(12)), jnp.asarray(rng.normal(size=12))

    def function(x):
        return 0.5 * (x - wanted) @ matrix @ (x - wanted)

    values = [float(minimise(function, jnp.zeros(12), steps).value) for steps in (1, 10, 80)]
    assert values[0] >= values[1] >= values[2] and values[2] < 1e-14
    np.testing.assert_allclose(minimise(function, jnp.zeros(12), 80).point, wanted, atol=1e-6)


def test_a_batch_is_each_alone_whatever_steps_the_others_must_shorten():
    starts = jnp.array([[-1.2, 1.0], [2.0, 2.0], [30.0, -7.0]])
    together = jax.jit(jax.vmap(lambda x: quasi_newton.run(jax.value_and_grad(rosenbrock), x, 40)))(starts)
    for row, start in enumerate(starts):
        alone = minimise(rosenbrock, start, 40)
        np.testing.assert_allclose(together.point[row], alone.point, rtol=1e-8)
        assert int(together.rejected[row]) == int(alone.rejected)
    assert len(set(np.asarray(together.rejected).tolist())) > 1


def test_points_without_a_finite_value_are_not_accepted():
    # log x + 1 / x is not finite below 0, and its first full step leads there.
    def function(x):
        return jnp.sum(jnp.log(x) + 1 / x)

    found = minimise(function, jnp.array([8.0, 0.02]), 80)
    np.testing.assert_allclose(found.point, 1.0, atol=1e-5)
    assert int(found.rejected) > 0


def test_a_minimum_is_stayed_at():
    found = minimise(rosenbrock, jnp.ones(3), 5)
    np.testing.assert_array_equal(found.point, 1.0)
