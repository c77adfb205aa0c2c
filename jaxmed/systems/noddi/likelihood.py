"""Signals of a chunk of voxels with their derivatives, measurement x voxel, and the likelihood as a surface to descend.

NODDI's derivatives are written out by hand, because forward-mode differentiation would evaluate the series once per
parameter; those of any other model come from forward mode. Neighbouring voxels share vector instructions and
nothing is transposed between steps.

The Rician likelihood is maximised by least squares on pseudo-data (expectation-maximisation over the unknown phase):
m I1(z) / I0(z) with z = m s / sigma^2 takes the place of the magnitude m. Each accepted step lowers the exact cost, so
the likelihood rises with every iteration.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmed.physics import noddi, rician
from jaxmed.physics.microstructure import MicrostructureModel, tangent_frame, turn
from jaxmed.solvers.least_squares import Evaluation, Surface, invert_positive
from jaxmed.systems.noddi.protocol import FitConfig, Group, Noise, Protocol

S0_BOUNDS = (0.25, 4.0)
"""Bounds of s0, relative to the mean unweighted signal."""
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


def noddi_forward(
    protocol: Protocol, model: MicrostructureModel, config: FitConfig, gradient_map: Array | None = None
) -> Forward:
    """Return NODDI with derivatives by hand.

    Args:
        protocol: Tables of the gradient table.
        model: Names and bounds.
        config: Which NODDI.
        gradient_map: (3, 3, voxel): gradients of a voxel are this matrix times those of the table. Its change of
            length changes b. Source: Bammer et al., Magn. Reson. Med. 2003.
    """
    groups = [*protocol.groups, *([] if protocol.weak is None else [protocol.weak])]
    # The voxels' own tables are made here, outside the loop that moves the point.
    varying = [
        None if gradient_map is None else _varying_tables(protocol, group, gradient_map, config) for group in groups
    ]

    def signals(point: Point, weak: bool) -> list[Block]:
        moments, by_odi = _moments(protocol, point.values[1])
        tangents = tangent_frame(point.direction)
        found = []
        start = len(protocol.groups)
        for index in range(start, len(groups)) if weak else range(start):
            group = groups[index]
            tables = _tables(protocol, group, varying[index], moments, by_odi)
            cosine, tilts = _angles(group.bvecs, point.direction, tangents, gradient_map)
            if weak:  # the only rows whose direction may not be known, see `noddi.cosines`
                known = jnp.any(group.bvecs != 0, axis=1, keepdims=True)
                cosine = jnp.where(known, cosine, 3**-0.5)
                tilts = tuple(jnp.where(known, tilt, 0.0) for tilt in tilts)
            found.append(_block(protocol, tables, config, point.values, moments, by_odi, cosine, tilts))
        return found

    return _forward(protocol, model, config, signals)


def model_forward(protocol: Protocol, model: MicrostructureModel, config: FitConfig) -> Forward:
    """Return any model with derivatives by forward mode."""
    number = len(model.parameters)

    def signals(point: Point, weak: bool) -> list[Block]:
        rows = protocol.unweighted[: len(protocol.weak.bvecs)] if weak and protocol.weak else protocol.order
        bvals, bvecs = protocol.bvals[rows], protocol.bvecs[rows]

        def signal(update):
            moved = turn(point.direction, update[number:])
            return model.signal((point.values[:number] + update[:number]).T, moved.T, bvals, bvecs).T

        zero = jnp.zeros((number + 2, point.values.shape[1]))
        predicted, jvp = jax.linearize(signal, zero)
        columns = [jvp(zero.at[index].set(1.0)) for index in range(number + 2)]
        if config.s0 == "free":
            s0 = point.values[-1]
            columns = [s0 * column for column in columns]
            columns.insert(number, predicted)
            predicted = s0 * predicted
        return [Block(predicted, tuple(columns))]

    return _forward(protocol, model, config, signals)


def _bounds(model: MicrostructureModel, config: FitConfig):
    free = config.s0 == "free"
    bounds = [parameter.bounds for parameter in model.parameters] + ([S0_BOUNDS] if free else [])
    lower, upper = np.array(bounds, np.float32).T
    return (*model.names, *(("s0",) if free else ())), lower, upper


def _forward(
    protocol: Protocol, model: MicrostructureModel, config: FitConfig, signals: Callable[[Point, bool], list[Block]]
) -> Forward:
    """Return a forward model from its signals relative to b = 0: of weighted rows (False) or of weak ones (True)."""
    names, lower, upper = _bounds(model, config)
    free, count = config.s0 == "free", protocol.unweighted.shape[0]
    num_weak = 0 if protocol.weak is None else protocol.weak.bvecs.shape[0]

    def blocks(point: Point) -> list[Block]:
        found = signals(point, False)
        weak = signals(point, True) if num_weak else []
        if free:
            return found + weak + _still_blocks(count - num_weak, point)
        return [_divide(block, weak[0], count) for block in found] if weak else found

    def unweighted(point: Point) -> Array:
        if not num_weak:
            return jnp.ones_like(point.values[0])
        return 1 + jnp.sum(signals(point, True)[0].predicted - 1, axis=0) / count

    rows = jnp.concatenate([protocol.order, protocol.unweighted]) if free else protocol.order
    return Forward(names, lower, upper, blocks, unweighted, rows)


def _still_blocks(count: int, point: Point) -> list[Block]:
    """Return the rows at b = 0, which only s0 changes."""
    ones = jnp.ones((count, 1)) * jnp.ones_like(point.values[-1])
    zero = jnp.zeros_like(ones)
    number = len(point.values)
    columns = tuple(ones if index == number - 1 else zero for index in range(number + 2))
    return [Block(point.values[-1] * ones, columns)] if count else []


def _divide(block: Block, weak: Block, count: int) -> Block:
    """Divide by the mean of `count` unweighted rows, of which the weak ones have fallen; the others are 1."""
    mean = 1 + jnp.sum(weak.predicted - 1, axis=0) / count
    slopes = [jnp.sum(column, axis=0) / count for column in weak.columns]
    predicted = block.predicted / mean
    columns = ((column - predicted * slope) / mean for column, slope in zip(block.columns, slopes, strict=True))
    return Block(predicted, tuple(columns))


def _moments(protocol: Protocol, odi):
    """Return the Watson moments and their derivatives by odi, degree x voxel."""
    kappa = noddi.odi_to_kappa(odi)
    weights, squares = protocol.nodes[:, :, None]
    density = weights * jnp.exp(kappa * (squares - 1))
    both = protocol.polynomials @ density / jnp.sum(density, axis=0)
    plain, squared = jnp.split(both, 2)
    by_kappa = squared - plain * squared[0]
    return plain, by_kappa * (-(jnp.pi / 2) * (1 + kappa**2))


class _Tables(NamedTuple):
    """What the rows of a group need: share is 1 or rows, voxel may be 1."""

    attenuation: Array  # share x voxel
    free: Array  # share x voxel
    coefficients: Array  # power x share x voxel
    by_odi: Array  # power x share x voxel


def _tables(protocol: Protocol, group: Group, varying, moments, by_odi) -> _Tables:
    if varying is not None:
        attenuation, free, radial = varying
        series = [jnp.einsum("kl,lrv->krv", protocol.powers, part[:, None] * radial) for part in (moments, by_odi)]
        return _Tables(attenuation, free, *series)
    series = [jnp.einsum("kls,lv->ksv", group.series, part) for part in (moments, by_odi)]
    return _Tables(group.attenuation[:, None], group.free[:, None], *series)


def _varying_tables(protocol: Protocol, group: Group, gradient_map: Array, config: FitConfig):
    """Return attenuations and radial moments where every voxel has gradients of its own."""
    known = jnp.any(group.bvecs != 0, axis=1, keepdims=True)
    scale = jnp.sum(jnp.einsum("ijv,rj->irv", gradient_map, group.bvecs) ** 2, axis=0)
    scale = jnp.where(known, scale, jnp.sum(gradient_map**2, axis=(0, 1)) / 3)
    attenuation = group.attenuation[:, None] * scale
    free = jnp.exp(-attenuation * (config.tissue.free_diffusivity / config.tissue.parallel_diffusivity))
    return attenuation, free, _radial(protocol, attenuation)[0]


def _radial(protocol: Protocol, attenuation: Float[Array, "share voxel"]):
    """Return h_l(a) and its derivative by a, degree x share x voxel; node by node, to hold no table of nodes."""
    polynomials = jnp.split(protocol.polynomials, 2)[0]

    def add(total, node):
        weight, square, values = node
        term = weight * jnp.exp(-attenuation * square)
        value = values[:, None, None] * term
        return (total[0] + value, total[1] - square * value), None

    zero = jnp.zeros((polynomials.shape[0], *attenuation.shape))
    return jax.lax.scan(add, (zero, zero), (*protocol.nodes, polynomials.T))[0]


def _angles(bvecs, direction, tangents, gradient_map):
    """Return the cosine between gradients and direction, and its derivatives by the tangents."""

    def along(vector):
        return sum(bvecs[:, axis : axis + 1] * vector[axis] for axis in range(3))

    if gradient_map is None:
        return along(direction), tuple(along(tangent) for tangent in tangents)
    # (A g) . mu = g . (A^T mu), and the gradient's length drops out of the cosine.
    turned = jnp.einsum("ijv,rj->irv", gradient_map, bvecs)
    length = jnp.sqrt(jnp.maximum(jnp.sum(turned**2, axis=0), 1e-12))
    back = [jnp.einsum("ijv,iv->jv", gradient_map, vector) for vector in (direction, *tangents)]
    cosine, *tilts = (along(vector) / length for vector in back)
    return cosine, tuple(tilts)


def _horner(coefficients, u):
    """Return a polynomial and its derivative."""
    value, slope = coefficients[-1] + 0 * u, jnp.zeros_like(u)
    for coefficient in coefficients[-2::-1]:
        slope = slope * u + value
        value = value * u + coefficient
    return value, slope


def _block(protocol, tables, config, values, moments, by_odi, cosine, tilts) -> Block:
    ndi, odi, fwf = values[:3]
    u = 2 * cosine**2 - 1
    intra, intra_by_u = _horner(tables.coefficients, u)
    intra_by_odi, _ = _horner(tables.by_odi, u)
    outside = _averaged_tensor if config.extra_cellular == "averaged_tensor" else _convolved
    extra, extra_by_ndi, extra_by_odi, extra_by_u = outside(protocol, tables, ndi, moments, by_odi, u)
    tissue = ndi * intra + (1 - ndi) * extra
    water = 1 - fwf
    by_cosine = 4 * cosine * water * (ndi * intra_by_u + (1 - ndi) * extra_by_u)
    total = water * tissue + fwf * tables.free
    columns = [
        water * (intra - extra + (1 - ndi) * extra_by_ndi),
        water * (ndi * intra_by_odi + (1 - ndi) * extra_by_odi),
        tables.free - tissue,
        by_cosine * tilts[0],
        by_cosine * tilts[1],
    ]
    if config.dot:
        dot = values[3]
        columns = [(1 - dot) * column for column in columns]
        columns.insert(3, 1 - total)
        total = total + dot * (1 - total)
    if config.s0 == "free":
        s0 = values[-1]
        columns = [s0 * column for column in columns]
        columns.insert(len(columns) - 2, total)
        total = s0 * total
    return Block(total, tuple(columns))


def _averaged_tensor(protocol, tables, ndi, moments, by_odi, u):
    """Return the extra-cellular signal and its derivatives by ndi, odi and u; P_2 is (3 u + 1) / 4."""
    second = 0.75 * u + 0.25
    kept = 1 - moments[1] * second
    extra = jnp.exp(-tables.attenuation * (1 - (2 / 3) * ndi * kept))
    slope = (2 / 3) * tables.attenuation * extra
    return extra, slope * kept, -slope * ndi * by_odi[1] * second, -0.75 * slope * ndi * moments[1]


def _convolved(protocol, tables, ndi, moments, by_odi, u):
    """Return the zeppelin averaged over directions, exp(-a (1 - ndi)) A(a ndi), and the same derivatives."""
    across = jnp.exp(-tables.attenuation * (1 - ndi))
    radial, by_argument = _radial(protocol, tables.attenuation * ndi)

    def series(moment, part):
        return jnp.einsum("kl,lrv->krv", protocol.powers, moment[:, None] * part)

    value, by_u = _horner(series(moments, radial), u)
    by_odi_part, _ = _horner(series(by_odi, radial), u)
    by_ndi_part, _ = _horner(series(moments, by_argument), u)
    by_ndi = tables.attenuation * across * (value + by_ndi_part)
    return across * value, by_ndi, across * by_odi_part, across * by_u
