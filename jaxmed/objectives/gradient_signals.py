"""The likelihood of signals along gradients as a surface to descend, for any model of values and one direction.

A model gives its signals measurement by voxel, with their derivatives: neighbouring voxels share vector instructions
and nothing is transposed between steps.

The Rician likelihood is maximised by least squares on pseudo-data (expectation-maximisation over the unknown phase):
m I1(z) / I0(z) with z = m s / sigma^2 takes the place of the magnitude m. Each accepted step lowers the exact cost, so
the likelihood rises with every iteration.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmed.physics import rician
from jaxmed.physics.microstructure import turn
from jaxmed.solvers.least_squares import Evaluation, Surface, invert_positive

Noise: TypeAlias = Literal["gaussian", "rician"]
LARGEST_MOVE = 0.5
"""Largest move of a value in one step, as a share of its range: further away the model bends too much to promise."""
LARGEST_TURN = 1.0
"""Largest turn of a direction in one step, as the tangent of the angle."""


class Point(NamedTuple):
    """Parameters of a chunk: values within their bounds, the last one s0 where it is fitted, and the direction."""

    values: Float[Array, "parameter voxel"]
    direction: Float[Array, "3 voxel"]


class Block(NamedTuple):
    """Some rows of the signal, and its derivatives by the values and the two tangents of the direction."""

    predicted: Float[Array, "row voxel"]
    columns: tuple[Float[Array, "row voxel"], ...]


class Forward(NamedTuple):
    """A forward model as the fit wants it.

    Attributes:
        names: Names of the values.
        lower: Their lower bounds.
        upper: Their upper bounds.
        blocks: Point -> blocks over the fitted rows, in order, relative to the mean of the unweighted ones.
        unweighted: Point -> that mean relative to the signal at b = 0, below 1 where it holds rows of b = 60; where s0
            is not fitted.
        rows: Fitted rows, by their place in the gradient table.
    """

    names: tuple[str, ...]
    lower: np.ndarray
    upper: np.ndarray
    blocks: Callable[[Point], list[Block]]
    unweighted: Callable[[Point], Array]
    rows: Array


def make_surface(
    forward: Forward,
    noise: Noise,
    measured: Float[Array, "row voxel"],
    precision: Float[Array, " voxel"],
) -> Surface:
    """Return the negative log-likelihood over values and direction.

    Args:
        forward: The model.
        noise: The likelihood.
        measured: Fitted rows, relative to S0.
        precision: 1 / sigma^2, relative to S0; 1 where the noise is not known.
    """
    lower, upper = (jnp.asarray(bound)[:, None] for bound in (forward.lower, forward.upper))
    number = len(forward.names)

    def evaluate(point: Point) -> Evaluation:
        size = number + 2
        cost = jnp.zeros_like(precision)
        gradient = [jnp.zeros_like(precision)] * size
        normal = {(i, j): jnp.zeros_like(precision) for i in range(size) for j in range(i + 1)}
        start = 0
        for block in forward.blocks(point):
            rows = measured[start : start + block.predicted.shape[0]]
            start += block.predicted.shape[0]
            if noise == "gaussian":
                target = rows
                costs = 0.5 * precision * (block.predicted - rows) ** 2
            else:
                costs, target = rician.cost_and_target(rows, block.predicted, precision)
            residual = block.predicted - target
            cost = cost + jnp.sum(costs, axis=0)
            for i, column in enumerate(block.columns):
                gradient[i] = gradient[i] + jnp.sum(column * residual, axis=0)
                for j in range(i + 1):
                    normal[i, j] = normal[i, j] + jnp.sum(column * block.columns[j], axis=0)
        return Evaluation(cost, _symmetric(normal, size) * precision, jnp.stack(gradient) * precision)

    def move(point: Point, update: Array) -> tuple[Point, Array]:
        reach = LARGEST_MOVE * (upper - lower)
        values = jnp.clip(point.values + jnp.clip(update[:number], -reach, reach), lower, upper)
        tilts = jnp.clip(update[number:], -LARGEST_TURN, LARGEST_TURN)
        there = Point(values, turn(point.direction, tilts))
        return there, jnp.concatenate([values - point.values, tilts])

    def blocked(point: Point, gradient: Array) -> Array:
        at_lower, at_upper = point.values <= lower, point.values >= upper
        held = (at_lower & (gradient[:number] > 0)) | (at_upper & (gradient[:number] < 0))
        return jnp.concatenate([held, jnp.zeros((2, held.shape[1]), bool)])

    return Surface(evaluate, move, blocked)


def _symmetric(entries, size):
    return jnp.stack([jnp.stack([entries[max(i, j), min(i, j)] for j in range(size)]) for i in range(size)])


class Optimum(NamedTuple):
    """What the data say about a fitted point.

    Attributes:
        errors: Standard error of each value.
        direction_error: Root mean square angle of the direction's cone of uncertainty, in degrees.
        residual: Root mean squared residual over the fitted rows.
        at_bound: Whether a value lies on a bound.
    """

    errors: Float[Array, "parameter voxel"]
    direction_error: Float[Array, " voxel"]
    residual: Float[Array, " voxel"]
    at_bound: Float[Array, " voxel"]


def describe_optimum(
    forward: Forward,
    noise: Noise,
    measured: Float[Array, "row voxel"],
    precision: Float[Array, " voxel"] | None,
    point: Point,
) -> Optimum:
    """Return Laplace standard errors from the Fisher information at a point.

    As much information as a range gives is added to each value's own (and one radian to the direction's): errors never
    exceed the range, and a parameter that the data say nothing about has one as wide as its range.

    Args:
        forward: The model.
        noise: The likelihood; the information about a Rician signal is that of its exact density.
        measured: Fitted rows, relative to S0.
        precision: 1 / sigma^2, relative to S0; None estimates it from the residuals.
        point: The maximum.
    """
    blocks = forward.blocks(point)
    size = len(forward.names) + 2
    squares, start = 0.0, 0
    for block in blocks:
        rows = measured[start : start + block.predicted.shape[0]]
        start += block.predicted.shape[0]
        squares = squares + jnp.sum((block.predicted - rows) ** 2, axis=0)
    if precision is None:
        precision = (start - size) / jnp.maximum(squares, 1e-12)
    normal = {}
    for block in blocks:
        weight = precision * jnp.ones_like(block.predicted)
        if noise == "rician":
            weight = weight * rician.information(block.predicted * jnp.sqrt(precision))
        for i in range(size):
            weighted = weight * block.columns[i]
            for j in range(i + 1):
                normal[i, j] = normal.get((i, j), 0.0) + jnp.sum(weighted * block.columns[j], axis=0)
    widths = jnp.concatenate([jnp.asarray(forward.upper - forward.lower), jnp.ones(2)])
    # In units of the ranges, so that float32 inverts what it is given.
    scaled = _symmetric(normal, size) * widths[:, None, None] * widths[None, :, None] + jnp.eye(size)[:, :, None]
    covariance = invert_positive(scaled)
    variance = jnp.einsum("iiv->iv", covariance) * widths[:, None] ** 2
    lower, upper = (jnp.asarray(bound)[:, None] for bound in (forward.lower, forward.upper))
    return Optimum(
        errors=jnp.sqrt(variance[:-2]),
        direction_error=jnp.degrees(jnp.sqrt(variance[-2] + variance[-1])),
        residual=jnp.sqrt(squares / start),
        at_bound=jnp.any((point.values <= lower) | (point.values >= upper), axis=0).astype(jnp.float32),
    )
