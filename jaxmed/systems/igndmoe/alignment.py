"""Stage subjects on one trajectory, the gaps between their visits kept; and the error that training then lowers."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmed.arrays.types import Scalar
from jaxmed.arrays.visits import Visits, is_measured
from jaxmed.solvers.fixed_grid import (
    Trajectory,
    TrajectoryProducts,
    interpolate,
    interpolation_matrix,
    multiply_trajectory,
    squared_distances,
)

GOLDEN = 0.6180339887498949
# Of a subject's predictions, per year: slower, its stage says nothing.
SMALLEST_SLOPE = 1e-6


class Alignment(NamedTuple):
    """Where subjects are.

    Attributes:
        onsets: Stage at the first visit, in years on the trajectory.
        errors: Sum of squared errors over a subject's visits and measured regions.
        clipped: Whether the best stage lies at an end of the trajectory, so that the true one may be beyond.
    """

    onsets: Float[Array, " subject"]
    errors: Float[Array, " subject"]
    clipped: Bool[Array, " subject"]


def align(trajectory: Trajectory, visits: Visits, num_stages: int = 512, num_polish: int = 20) -> Alignment:
    """Give every subject the stage at which the trajectory is nearest to all of its visits.

    Args:
        trajectory: From stage 0; longer than any subject was followed.
        visits: Visits of subjects. One without visits gets stage 0 and no error.
        num_stages: Stages tried on a grid.
        num_polish: Golden-section steps inside the grid's best interval.

    Source: arXiv:2508.07032, the alignment step. Grid, polish and clipping are ours: the paper does not say.
    """
    onsets = _find_onsets(trajectory, visits, num_stages, num_polish)
    last = _last_onsets(trajectory, visits)
    step = last / (num_stages - 1)
    clipped = (onsets < step / 2) | (onsets > last - step / 2)
    return Alignment(onsets, subject_errors(trajectory, visits, onsets), clipped)


def subject_errors(
    trajectory: Trajectory, visits: Visits, onsets: Float[Array, " subject"]
) -> Float[Array, " subject"]:
    """Sum squared errors over visits and regions at given stages."""
    return _errors(_products(trajectory, visits), visits, onsets)


def _last_onsets(trajectory: Trajectory, visits: Visits) -> Array:
    followed = jnp.max(jnp.where(visits.present, visits.gaps, 0.0), axis=1)
    return jnp.maximum(trajectory.times[-1] - followed, 0.0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _find_onsets(trajectory: Trajectory, visits: Visits, num_stages: int, num_polish: int) -> Array:
    """Search the grid and its best interval; comparisons have no slope, so that is told apart (`_move_onsets`)."""
    products, last = _products(trajectory, visits), _last_onsets(trajectory, visits)
    shares = jnp.linspace(0.0, 1.0, num_stages, dtype=trajectory.times.dtype)
    # One stage at a time for all subjects: a table of all would not fit a cache.
    table = jax.lax.map(lambda share: _errors(products, visits, share * last), shares)
    best = jnp.argmin(table, axis=0)
    step = last / (num_stages - 1)
    low = jnp.maximum(best - 1, 0) * step
    high = jnp.minimum(best + 1, num_stages - 1) * step

    def shrink(bracket: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = bracket
        first, second = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        left = _errors(products, visits, first) < _errors(products, visits, second)
        return (jnp.where(left, low, first), jnp.where(left, second, high)), None

    (low, high), _ = jax.lax.scan(shrink, (low, high), length=num_polish)
    onsets = (low + high) / 2
    # Rounding must not push the last visit off the trajectory.
    return jnp.clip(onsets, 0.0, last)


@_find_onsets.defjvp
def _move_onsets(
    num_stages: int, num_polish: int, primals: tuple[Trajectory, Visits], tangents: Any
) -> tuple[Array, Array]:
    """Move stages as data and course do: where the slope of the errors is 0, it stays so (implicit differentiation)."""
    trajectory, visits = primals
    onsets = _find_onsets(trajectory, visits, num_stages, num_polish)

    def slope(trajectory: Trajectory, visits: Visits, at: Array) -> Array:
        products = _products(trajectory, visits)
        return jax.jvp(lambda t: _errors(products, visits, t), (at,), (jnp.ones_like(at),))[1]

    curvature = jax.jvp(lambda t: slope(trajectory, visits, t), (onsets,), (jnp.ones_like(onsets),))[1]
    change = jax.jvp(lambda course, seen: slope(course, seen, onsets), primals, tangents)[1]
    last = _last_onsets(trajectory, visits)
    step = last / (num_stages - 1)
    is_free = (onsets > step / 2) & (onsets < last - step / 2) & (curvature > 0)
    return onsets, jnp.where(is_free, -change / jnp.where(is_free, curvature, 1.0), 0.0)


def _products(trajectory: Trajectory, visits: Visits) -> TrajectoryProducts:
    return multiply_trajectory(trajectory, visits.values, None if visits.measured is None else is_measured(visits))


def _errors(products: TrajectoryProducts, visits: Visits, onsets: Array) -> Array:
    errors = squared_distances(products, onsets[:, None] + visits.gaps)
    return jnp.sum(jnp.where(visits.present, errors, 0.0), axis=1)


# --- The error of staged visits ----------------------------------------------------------------


class Staged(NamedTuple):
    """Visits at their stages, and where a change of stage would take them.

    Attributes:
        matrix: Takes states and slopes to all visits, times the root of the subject's weight.
        values: Values of all visits, times the same.
        directions: Where a subject's predictions go as its stage changes, of length 1; 0 where a stage cannot change.
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
        visits: Visits of subjects.
        onsets: Their stages, in years.
        weights: Weights of subjects, 0 for those that do not count.
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
