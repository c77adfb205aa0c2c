"""Maximum-likelihood labels of simulated signals, for any forward model.

NODDI from a grid is the fit of `fitting.py`, as a scan gets it. Everything else, that is other models and fits that
start at the truth, is Levenberg-Marquardt on Rician pseudo-data with exact derivatives of the model by forward mode:
slower per voxel, and in need of nothing but the model's function.
"""

import functools
import itertools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import i0e, i1e
from jaxtyping import Array, Bool, Float

from jaxmed.physics.microstructure import MicrostructureModel, Simulated
from jaxmed.systems.noddi import fitting
from jaxmed.systems.noddi.fitting import FitConfig
from jaxmed.systems.noddi.network import Table

LabelStart = Literal["grid", "truth"]
MAX_ITERATIONS = 40
MARGIN = 0.01
"""Of a parameter's range: starts keep this distance from its ends, where logits are infinite."""


def fit_labels(
    block: Simulated, model: MicrostructureModel, table: Table, start: LabelStart
) -> Float[Array, "voxel parameter"]:
    """Estimate the parameters of simulated voxels by maximum likelihood.

    Args:
        block: Signals, with the noise level that the likelihood is told, and the truth for fits that start there.
        model: The forward model.
        table: The protocol.
        start: A grid, as on a scan, or the truth: the nearest maximum, which a perfect search would find too.
    """
    bvals, bvecs = np.array(table.bvals), np.array(table.bvecs)
    config = FitConfig(b0_threshold=table.b0_threshold)
    if start == "grid" and model.names == ("ndi", "odi", "fwf"):
        maps = fitting.make_fit(bvals, bvecs, "rician", config)(block.signals.T, block.sigma)
        return jnp.stack([maps.ndi, maps.odi, maps.fwf], axis=-1)
    if start == "truth":
        parameters, direction = block.parameters, block.direction
    else:
        prepared = fitting.prepare(bvals, bvecs, config)
        direction = _tensor_direction(prepared, block.signals)
        parameters = search(model, table, block.signals, direction)
    return maximise(model, table, block.signals, block.sigma, parameters, direction).parameters


@jax.jit
def _tensor_direction(prepared: fitting.Protocol, signals: jax.Array) -> jax.Array:
    s0 = prepared.is_b0 @ signals.T
    return fitting.fit_tensor(prepared, signals.T / jnp.maximum(s0, 1e-6)).direction.T


@functools.partial(jax.jit, static_argnums=(0, 1))
def search(
    model: MicrostructureModel,
    table: Table,
    signals: Float[Array, "voxel image"],
    direction: Float[Array, "voxel 3"],
) -> Float[Array, "voxel parameter"]:
    """Find the best of the model's starting values at a known direction, by squares."""
    measured = _over_b0(table, signals)
    grid = jnp.array(list(itertools.product(*(parameter.starts for parameter in model.parameters))))

    def attempt(best, values):
        parameters = jnp.broadcast_to(values, (len(signals), len(values)))
        predicted = model.signal(parameters, direction, np.array(table.bvals), np.array(table.bvecs))
        cost = jnp.sum((predicted - measured) ** 2, axis=-1)
        better = cost < best[0]
        return (jnp.where(better, cost, best[0]), jnp.where(better[:, None], parameters, best[1])), None

    start = (jnp.full(len(signals), jnp.inf), jnp.zeros((len(signals), len(model.parameters))))
    return jax.lax.scan(attempt, start, grid)[0][1]


class Maximum(NamedTuple):
    """Where a likelihood is largest, near its start.

    Attributes:
        parameters: In their own units.
        direction: Of the fibre, unit length.
        cost: Negative log-likelihood, without what does not depend on the parameters.
        converged: Whether the last step promised too little to matter.
    """

    parameters: Float[Array, "voxel parameter"]
    direction: Float[Array, "voxel 3"]
    cost: Float[Array, " voxel"]
    converged: Bool[Array, " voxel"]


class _State(NamedTuple):
    logits: jax.Array
    direction: jax.Array
    cost: jax.Array
    damping: jax.Array
    done: jax.Array
    iteration: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def maximise(
    model: MicrostructureModel,
    table: Table,
    signals: Float[Array, "voxel image"],
    sigma: Float[Array, " voxel"],
    parameters: Float[Array, "voxel parameter"],
    direction: Float[Array, "voxel 3"],
) -> Maximum:
    """Climb the Rician likelihood of every voxel from a start.

    Source: noddi.fit's steps (pseudo-data, damping, bounds by logits), with derivatives from `jax.jacfwd`.
    """
    b0 = jnp.mean(signals[:, np.flatnonzero(table.is_b0)], axis=1)
    measured, relative = _over_b0(table, signals), jnp.maximum(sigma / b0, fitting.SIGMA_FLOOR)
    low, high = (jnp.array(end) for end in zip(*(parameter.bounds for parameter in model.parameters), strict=True))
    unit = jnp.clip((parameters - low) / (high - low), MARGIN, 1 - MARGIN)
    bvals, bvecs = np.array(table.bvals), np.array(table.bvecs)
    number = len(model.parameters)

    def move(logits, direction, update):
        moved = direction + update[number] * _tangent(direction, 0) + update[number + 1] * _tangent(direction, 1)
        return jnp.clip(logits + update[:number], -12.0, 12.0), moved / jnp.sqrt(jnp.sum(moved**2))

    def predict(logits, direction):
        return model.signal(low + (high - low) * jax.nn.sigmoid(logits), direction, bvals, bvecs)

    def one(measured, sigma, unit, direction) -> Maximum:
        def cost_of(predicted):
            z = measured * predicted / sigma**2
            return jnp.sum((predicted - measured) ** 2 / (2 * sigma**2) - jnp.log(i0e(z)))

        def step(state: _State) -> _State:
            predicted = predict(state.logits, state.direction)
            jacobian = jax.jacfwd(lambda update: predict(*move(state.logits, state.direction, update)))(
                jnp.zeros(number + 2)
            )
            z = measured * predicted / sigma**2
            gradient = jacobian.T @ (predicted - measured * i1e(z) / i0e(z)) / sigma**2
            normal = jacobian.T @ jacobian / sigma**2
            diagonal = jnp.diagonal(normal)
            extra = state.damping * diagonal + 1e-7 * diagonal.max() + 1e-12
            update = jnp.clip(jnp.linalg.solve(normal + jnp.diag(extra), -gradient), -3.0, 3.0)
            logits, moved = move(state.logits, state.direction, update)
            cost = cost_of(predict(logits, moved))
            better = cost < state.cost
            promised = 0.5 * jnp.sum(update * (extra * update - gradient))
            done = (promised <= 1e-8 * jnp.abs(state.cost)) | (~better & (state.damping >= 1e6))
            return _State(
                jnp.where(better, logits, state.logits),
                jnp.where(better, moved, state.direction),
                jnp.where(better, cost, state.cost),
                jnp.clip(jnp.where(better, state.damping / 10, state.damping * 10), 1e-8, 1e7),
                done,
                state.iteration + 1,
            )

        logits = jnp.log(unit / (1 - unit))
        first = _State(logits, direction, cost_of(predict(logits, direction)), jnp.array(1e-2), jnp.array(False), 0)  # pyright: ignore
        last = jax.lax.while_loop(lambda state: ~state.done & (state.iteration < MAX_ITERATIONS), step, first)
        return Maximum(low + (high - low) * jax.nn.sigmoid(last.logits), last.direction, last.cost, last.done)

    return jax.vmap(one)(measured, relative, unit, direction)


def _over_b0(table: Table, signals: jax.Array) -> jax.Array:
    return signals / jnp.mean(signals[:, np.flatnonzero(table.is_b0)], axis=1, keepdims=True)


def _tangent(direction: jax.Array, which: int) -> jax.Array:
    """Return one of two unit vectors that complete a direction to a frame.

    Source: Duff et al., J. Comput. Graph. Tech. 2017.
    """
    x, y, z = direction
    sign = jnp.where(z >= 0, 1.0, -1.0)
    a = -1 / (sign + z)
    b = x * y * a
    return jnp.stack([1 + sign * x * x * a, sign * b, -sign * x] if which == 0 else [b, sign + y * y * a, -y])
