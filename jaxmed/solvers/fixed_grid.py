"""The classical Runge-Kutta method on a fixed grid, cubic interpolation between its points, and distances from them.

The fast path for one small system that many observations share: the grid is solved once by a scan, every observation
reads from it. Nothing adapts, so a batch of solves does the same work for each member.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Trajectory(NamedTuple):
    """A solution on a uniform grid.

    Attributes:
        times: The grid, ascending.
        states: At the grid.
        slopes: Time derivatives at the grid.
    """

    times: Float[Array, " time"]
    states: Float[Array, "time state"]
    slopes: Float[Array, "time state"]


class HermiteWeights(NamedTuple):
    """How a state between grid points is made of its two neighbours.

    Attributes:
        left: Grid point at or before the time.
        states: Weights of the states left and right.
        slopes: Weights of the slopes left and right, in units of time.
    """

    left: Int[Array, "*batch"]
    states: Float[Array, "*batch 2"]
    slopes: Float[Array, "*batch 2"]


def solve_fixed(
    field: Callable[[Array, Array, Any], Array],
    initial: Float[Array, " state"],
    times: Float[Array, " time"],
    args: Any = None,
) -> Trajectory:
    """Solve d state / dt = field(t, state, args) with one step of order 4 between grid points.

    Args:
        field: The right-hand side.
        initial: State at the first time.
        times: Uniform grid, ascending, in the time unit of the field.
        args: Passed to the field.

    Source: Kutta 1901, the classical tableau.
    """
    step = (times[-1] - times[0]) / (len(times) - 1)

    def advance(state: Array, time: Array) -> tuple[Array, tuple[Array, Array]]:
        k1 = field(time, state, args)
        k2 = field(time + step / 2, state + step / 2 * k1, args)
        k3 = field(time + step / 2, state + step / 2 * k2, args)
        k4 = field(time + step, state + step * k3, args)
        return state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4), (state, k1)

    last, (states, slopes) = jax.lax.scan(advance, initial, times[:-1])
    end = field(times[-1], last, args)
    return Trajectory(times, jnp.concatenate([states, last[None]]), jnp.concatenate([slopes, end[None]]))


def hermite_weights(times: Float[Array, " time"], at: Float[Array, "*batch"]) -> HermiteWeights:
    """Find the neighbours of times and their weights; outside the grid the first or last cubic continues.

    Args:
        times: Uniform grid, ascending.
        at: Where states are wanted.
    """
    step = (times[-1] - times[0]) / (len(times) - 1)
    place = (at - times[0]) / step
    left = jnp.clip(jnp.floor(place), 0, len(times) - 2).astype(jnp.int32)
    s = place - left
    states = jnp.stack([(1 + 2 * s) * (1 - s) ** 2, s**2 * (3 - 2 * s)], axis=-1)
    slopes = jnp.stack([s * (1 - s) ** 2, s**2 * (s - 1)], axis=-1) * step
    return HermiteWeights(left, states, slopes)


def interpolate(trajectory: Trajectory, at: Float[Array, "*batch"]) -> Float[Array, "*batch state"]:
    """Return states between grid points by the cubic through both states and slopes; its error is of order 4."""
    weights = hermite_weights(trajectory.times, at)
    pairs = weights.left[..., None] + jnp.arange(2)
    from_states = jnp.einsum("...k,...ks->...s", weights.states, trajectory.states[pairs])
    return from_states + jnp.einsum("...k,...ks->...s", weights.slopes, trajectory.slopes[pairs])


def interpolation_matrix(times: Float[Array, " time"], at: Float[Array, " place"]) -> Float[Array, "place twice_time"]:
    """Return the matrix that takes states and slopes, one under the other, to states at given times."""
    weights = hermite_weights(times, at)
    count = len(times)
    rows = jnp.arange(len(at))[:, None]
    columns = weights.left[:, None] + jnp.arange(2)
    matrix = jnp.zeros((len(at), 2 * count), times.dtype)
    return matrix.at[rows, columns].add(weights.states).at[rows, columns + count].add(weights.slopes)


# --- Distances to a trajectory ------------------------------------------------------------------


class TrajectoryProducts(NamedTuple):
    """Inner products that distances from points to a trajectory are made of.

    Attributes:
        times: The grid.
        squares: |y|^2 of every point.
        cross: Products of points with states, then slopes, of the grid.
        gram: Products of states and slopes with each other; where components are missing, of the two states and slopes
            of each interval, over the components of each point.
    """

    times: Float[Array, " time"]
    squares: Float[Array, "*batch"]
    cross: Float[Array, "*batch twice_time"]
    gram: Float[Array, "twice_time twice_time"] | Float[Array, "*batch interval 4 4"]


def multiply_trajectory(
    trajectory: Trajectory,
    points: Float[Array | np.ndarray, "*batch state"],
    known: Bool[Array | np.ndarray, "*batch state"] | None,
) -> TrajectoryProducts:
    """Prepare `squared_distances`, which then need no loop over components.

    A point of the trajectory is a combination z w of the states and slopes at two grid points, so that |y - z w|^2 =
    |y|^2 - 2 w (z y) + w (z z') w, with z y of all points from one matrix product and z z' computed once. Where
    components are missing, z z' is a sum over the others: then it is computed for every point and interval.

    Args:
        trajectory: On its grid.
        points: y; 0 where a component is missing.
        known: Where components are there; None where all are.
    """
    z, y = jnp.concatenate([trajectory.states, trajectory.slopes]), jnp.asarray(points)
    if known is None:
        gram = z @ z.T
    else:
        ends = (trajectory.states[:-1], trajectory.states[1:], trajectory.slopes[:-1], trajectory.slopes[1:])
        pairs = jnp.stack(ends, axis=1)  # interval, which of four, state
        gram = jnp.einsum("...n,tjn,tkn->...tjk", jnp.asarray(known, z.dtype), pairs, pairs)
    return TrajectoryProducts(trajectory.times, jnp.sum(y**2, axis=-1), y @ z.T, gram)


def squared_distances(products: TrajectoryProducts, at: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return the squared distance of every point from the trajectory at a time of its own."""
    count = len(products.times)
    weights = hermite_weights(products.times, at)
    pair = weights.left[..., None] + jnp.arange(2)
    place = jnp.concatenate([pair, pair + count], axis=-1)
    w = jnp.concatenate([weights.states, weights.slopes], axis=-1)
    cross = jnp.sum(w * jnp.take_along_axis(products.cross, place, axis=-1), axis=-1)
    if products.gram.ndim == 2:
        gram = products.gram[place[..., :, None], place[..., None, :]]
    else:
        gram = jnp.take_along_axis(products.gram, weights.left[..., None, None, None], axis=-3)[..., 0, :, :]
    return jnp.maximum(products.squares - 2 * cross + jnp.einsum("...j,...jk,...k->...", w, gram, w), 0.0)
