"""The loss of a trajectory: squared errors of staged visits, small neural experts, experts that differ."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.types import Scalar
from jaxmed.arrays.visits import Visits, is_measured
from jaxmed.solvers.fixed_grid import Trajectory, interpolate, interpolation_matrix

# Below this product of squared norms two experts count as different: one of them is still nothing.
SMALLEST_NORM = 1e-12
# Of an expert along the course, in the norm's unit; one that moves 20 regions by 0.01 a year for 30 years has 0.24.
ROUNDING = 0.1
# Of a subject's predictions, per year: slower, its stage says nothing.
SMALLEST_SLOPE = 1e-6


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


class Staged(NamedTuple):
    """Visits at their stages, and where a change of stage would take them.

    Attributes:
        matrix: Takes states and slopes to all visits, times the root of the subject's weight.
        values: Of all visits, times the same.
        directions: Of a subject's predictions as its stage changes, of length 1; 0 where a stage cannot change.
        measured: 1 where a visit has a value of a region, else 0; None where every visit has all.
    """

    matrix: Float[Array, "row twice_time"]
    values: Float[Array, "row region"]
    directions: Float[Array, "subject visit region"]
    measured: Float[Array, "row region"] | None


def stage_visits(
    course: Trajectory, visits: Visits, onsets: Float[Array, " subject"], weights: Float[Array, " subject"]
) -> Staged:
    """Prepare visits at given stages for `profiled_error`.

    Args:
        course: On which the subjects were staged.
        visits: Of subjects.
        onsets: Their stages, in years.
        weights: Of subjects, 0 for those that do not count.
    """
    at = onsets[:, None] + visits.gaps
    root = jnp.sqrt(jnp.where(visits.present, weights[:, None], 0.0)).reshape(-1, 1)
    values = jnp.asarray(visits.values).reshape(at.size, -1) * root
    slopes = jax.jvp(lambda t: interpolate(course, t), (at,), (jnp.ones_like(at),))[1]
    slopes = jnp.where(is_measured(visits), slopes, 0.0)
    length = jnp.sqrt(jnp.sum(slopes**2, axis=(1, 2), keepdims=True))
    # At an end of the course a stage can only stay.
    last = course.times[-1] - jnp.max(jnp.where(visits.present, visits.gaps, 0.0), axis=1)
    margin = 1e-3 * course.times[-1]
    is_free = ((onsets > margin) & (onsets < last - margin))[:, None, None] & (length > SMALLEST_SLOPE)
    directions = jnp.where(is_free, slopes / jnp.where(is_free, length, 1.0), 0.0)
    measured = None
    if visits.measured is not None:
        measured = jnp.asarray(is_measured(visits), values.dtype).reshape(values.shape)
    return Staged(interpolation_matrix(course.times, at.reshape(-1)) * root, values, directions, measured)


def profiled_error(staged: Staged, course: Trajectory) -> Scalar:
    """Return the sum of squared errors that is left when every subject moves to its best stage, to first order.

    A course that runs faster or slower everywhere fits as well as before once subjects are staged anew. With stages
    held that looks like an error, and training and staging in turn hardly move; without what a change of stage can
    mend, it does not.

    Source: variable projection, Golub and Pereyra 1973, in Kaufman's form.
    """
    residuals = staged.values - staged.matrix @ jnp.concatenate([course.states, course.slopes])
    if staged.measured is not None:
        residuals = residuals * staged.measured
    along = jnp.sum(staged.directions * residuals.reshape(staged.directions.shape), axis=(1, 2))
    return jnp.sum(residuals**2) - jnp.sum(along**2)


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
    # Rounded off near 0, where neural experts start and the root has a kink that holds them.
    norm = jnp.sum(jnp.sqrt(energy + ROUNDING**2) - ROUNDING)
    centred = experts - experts.mean(axis=-1, keepdims=True)
    products = jnp.einsum("tpn,tqn->tpq", centred, centred)
    squares = jnp.diagonal(products, axis1=1, axis2=2)
    alike = products**2 / (squares[:, :, None] * squares[:, None, :] + SMALLEST_NORM)
    return norm, jnp.sum(alike * (1 - jnp.eye(experts.shape[1]))) * step
