"""Signals of a chunk of voxels and their derivatives, measurement x voxel, for `objectives.gradient_signals`.

NODDI's derivatives are written out by hand, because forward-mode differentiation would evaluate the series once per
parameter; those of any other model come from forward mode.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmed.objectives.gradient_signals import Block, Forward, Point
from jaxmed.physics import noddi
from jaxmed.physics.microstructure import MicrostructureModel, tangent_frame, turn
from jaxmed.systems.noddi.protocol import FitConfig, Group, Protocol

S0_BOUNDS = (0.25, 4.0)
"""Bounds of s0, relative to the mean unweighted signal."""


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
