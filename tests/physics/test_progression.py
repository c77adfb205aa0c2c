"""Diffusion and reaction on a connectome against matrix exponentials, printed values, closed forms and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

from jaxmed.arrays.graphs import laplacian
from jaxmed.physics.progression import fkpp, network_diffusion, weighted_fkpp
from jaxmed.solvers.ode import OdeConfig, solve

pytestmark = pytest.mark.core

PATH = np.array([[0.0, 1, 0, 0], [1, 0, 2, 0], [0, 2, 0, 1], [0, 0, 1, 0]])
TIGHT = OdeConfig(rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


# Specification, (i) 1: k t = 0.5 from the first node.
DIFFUSED = {
    "combinatorial": [0.66714043, 0.22618237, 0.08987791, 0.0167993],
    "random_walk": [0.63221559, 0.10440434, 0.01724138, 0.00284725],
}


@pytest.mark.parametrize("kind", DIFFUSED)
def test_network_diffusion_is_the_matrix_exponential(kind):
    start, matrix = jnp.eye(4)[0], laplacian(jnp.asarray(PATH), kind)
    np.testing.assert_allclose(scipy.linalg.expm(-0.5 * np.asarray(matrix))[:, 0], DIFFUSED[kind], atol=6e-9)
    solved = solve(
        lambda t, x, rate: network_diffusion(x, matrix, rate), start, jnp.array([0.0, 10.0]), TIGHT, jnp.array(0.05)
    )
    np.testing.assert_allclose(solved.states[1], DIFFUSED[kind], atol=6e-9)


def test_fkpp_has_the_printed_values():
    # Specification, (i) 2.
    matrix, start = laplacian(jnp.asarray(PATH), "combinatorial"), jnp.array([0.1, 0, 0, 0])
    rates = jnp.array([0.1, 0.3, 1.0])
    solved = solve(lambda t, c, r: fkpp(c, matrix, *r), start, jnp.array([0.0, 5, 10, 20]), TIGHT, rates)
    printed = [
        [0.23678712, 0.08760365, 0.03651216, 0.00706608],
        [0.48846419, 0.31674748, 0.22052721, 0.09806627],
        [0.91671082, 0.88517759, 0.86064258, 0.81088155],
    ]
    np.testing.assert_allclose(solved.states[1:], printed, atol=6e-9)


def test_without_diffusion_fkpp_is_logistic_growth():
    # Specification, (i) 3.
    times, start = jnp.array([5.0, 10, 20]), jnp.array([0.1, 0.0])
    closed = np.array([[0.33242786, 0.0], [0.69056786, 0.0], [0.97817805, 0.0]])
    np.testing.assert_allclose(closed[:, 0], 1 / (1 + 9 * np.exp(-0.3 * np.asarray(times))), atol=6e-9)
    matrix, rates = jnp.zeros((2, 2)), jnp.array([0.0, 0.3, 1.0])
    solved = solve(lambda t, c, r: fkpp(c, matrix, *r), start, jnp.concatenate([jnp.zeros(1), times]), TIGHT, rates)
    np.testing.assert_allclose(solved.states[1:], closed, atol=1e-8)


def test_weighted_fkpp_is_the_toolboxs_equation_as_scipy_solves_it():
    # Specification, (i) 9.
    rng = np.random.default_rng(0)
    weights = np.triu(rng.random((10, 10)) * (rng.random((10, 10)) < 0.4), 1)
    adjacency = weights + weights.T + np.diag(np.ones(9), 1) + np.diag(np.ones(9), -1)
    matrix = np.asarray(laplacian(jnp.asarray(adjacency), "random_walk"))
    amyloid, start = rng.random(10), np.eye(10)[3] * 0.2
    share, rate, strength = 0.4, 0.7, 0.6
    times = np.linspace(0, 30, 7)

    def toolbox(t, x):
        growth = (1 - strength) + strength * amyloid
        return share * (-rate * matrix @ x) + (1 - share) * growth * x * (1 - x)

    reference = scipy.integrate.solve_ivp(toolbox, (0, 30), start, "RK45", times, rtol=1e-9, atol=1e-9).y.T
    arguments = tuple(map(jnp.asarray, (matrix, share, rate, amyloid, strength)))
    config = OdeConfig(rtol=1e-6, atol=1e-6)
    solved = solve(
        lambda t, x, args: weighted_fkpp(x, *args), jnp.asarray(start), jnp.asarray(times), config, arguments
    )
    np.testing.assert_allclose(solved.states, reference, atol=1e-5)
