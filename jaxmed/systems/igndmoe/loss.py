"""The loss of a trajectory: squared errors at fixed stages, small neural experts, experts that differ.

With stages fixed, the squared error of all visits is a quadratic form of the trajectory's states and slopes. Its
coefficients are computed once per trajectory step, after which a step costs the same for any number of visits.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.types import Scalar
from jaxmed.arrays.visits import Visits
from jaxmed.solvers.fixed_grid import Trajectory, interpolation_matrix

# Below this product of squared norms two experts count as different: one of them is still nothing.
SMALLEST_NORM = 1e-12


class Quadratic(NamedTuple):
    """A sum of squared errors |Y - W Z|^2 as a form of Z, states and slopes at the grid.

    Attributes:
        squares: |Y|^2.
        cross: W^T Y.
        gram: W^T W.
    """

    squares: Scalar
    cross: Float[Array, "twice_time region"]
    gram: Float[Array, "twice_time twice_time"]


class Terms(NamedTuple):
    """Parts of the loss, without their weights.

    Attributes:
        data: Sum of squared errors.
        norm: Size of the neural experts along the trajectory.
        overlap: How much experts look alike.
    """

    data: Scalar
    norm: Scalar
    overlap: Scalar


def summarise_visits(
    times: Float[Array, " time"],
    visits: Visits,
    onsets: Float[Array, " subject"],
    weights: Float[Array, " subject"],
) -> Quadratic:
    """Collect what visits at fixed stages ask of a trajectory.

    Args:
        times: Its grid.
        visits: Of subjects.
        onsets: Their stages, in years.
        weights: Of subjects, 0 for those that do not count.
    """
    at = (onsets[:, None] + visits.gaps).reshape(-1)
    root = jnp.sqrt(jnp.where(visits.present, weights[:, None], 0.0)).reshape(-1, 1)
    matrix = interpolation_matrix(times, at) * root
    values = jnp.asarray(visits.values).reshape(len(at), -1) * root
    return Quadratic(jnp.sum(values**2), matrix.T @ values, matrix.T @ matrix)


def data_error(quadratic: Quadratic, trajectory: Trajectory) -> Scalar:
    """Return the sum of squared errors of a trajectory."""
    z = jnp.concatenate([trajectory.states, trajectory.slopes])
    return quadratic.squares + jnp.sum(z * (quadratic.gram @ z - 2 * quadratic.cross))


def regularisers(experts: Float[Array, "time expert region"], step: Scalar) -> tuple[Scalar, Scalar]:
    """Return the size of the neural experts and the overlap of all.

    Args:
        experts: Along the trajectory, unweighted; the first is the mechanistic one.
        step: Of the grid, in years.

    Source: arXiv:2508.07032, equation 10. Deviation: both are integrals over time, and the overlap of two experts is
    their squared correlation over regions, so that neither depends on the grid, the solver or the number of regions;
    the release adds one term per call of its solver.
    """
    energy = jnp.sum(experts[:, 1:] ** 2, axis=(0, 2)) * step
    # The root has no slope at 0, where neural experts start.
    norm = jnp.sum(jnp.where(energy > 0, jnp.sqrt(jnp.where(energy > 0, energy, 1.0)), 0.0))
    centred = experts - experts.mean(axis=-1, keepdims=True)
    products = jnp.einsum("tpn,tqn->tpq", centred, centred)
    squares = jnp.diagonal(products, axis1=1, axis2=2)
    alike = products**2 / (squares[:, :, None] * squares[:, None, :] + SMALLEST_NORM)
    return norm, jnp.sum(alike * (1 - jnp.eye(experts.shape[1]))) * step
