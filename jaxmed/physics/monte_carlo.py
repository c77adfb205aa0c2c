"""Estimators on simulated voxels: what they answer to repeated noise on known parameters, and the least spread.

An estimator is a function of simulated voxels to their parameters, [voxel, parameter].
"""

import functools
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxmed.arrays.batches import padded_rows
from jaxmed.io.gradient_match import Table
from jaxmed.physics.acquisition import add_rician_noise
from jaxmed.physics.cramer_rao import cramer_rao
from jaxmed.physics.microstructure import MicrostructureModel, Simulated, draw_directions

Estimator: TypeAlias = Callable[[Simulated], np.ndarray]
BLOCK = 8192
BOUND_DIRECTIONS = 16
"""Fibre directions over which the bound is averaged."""


def estimate(
    key: Key[Array, ""],
    model: MicrostructureModel,
    table: Table,
    estimators: Mapping[str, Estimator],
    grid: Float[np.ndarray, "point parameter"],
    repeats: int,
    snr: float,
    on_block: Callable[[int], None] | None = None,
) -> dict[str, Float[np.ndarray, "point repeat parameter"]]:
    """Apply estimators at one noise level; every repetition has a fibre direction and noise of its own.

    Args:
        key: Consumed.
        model: Makes the signals.
        table: The protocol.
        estimators: By name; all see the same voxels.
        grid: True parameters.
        repeats: Repetitions of each point.
        snr: Signal-to-noise ratio at b = 0.
        on_block: Called with the voxels done so far.
    """
    truth = np.repeat(grid, repeats, axis=0)
    found: dict[str, list[np.ndarray]] = {name: [] for name in estimators}
    for rows in padded_rows(len(truth), min(BLOCK, len(truth))):
        start = int(rows.index[0])
        voxels = _measure(model, table, jax.random.fold_in(key, start), truth[rows.index].astype(np.float32), 1 / snr)
        for name, estimator in estimators.items():
            found[name].append(np.asarray(estimator(voxels))[: rows.count])
        if on_block is not None:
            on_block(start + rows.count)
    shape = (len(grid), repeats, len(model.parameters))
    return {name: np.concatenate(parts).reshape(shape) for name, parts in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(model: MicrostructureModel, table: Table, key, parameters, noise) -> Simulated:
    direction_key, noise_key = jax.random.split(key)
    direction = draw_directions(direction_key, len(parameters))
    sigma = jnp.full(len(parameters), noise)
    clean = model.signal(parameters, direction, np.array(table.bvals), np.array(table.bvecs))
    return Simulated(add_rician_noise(noise_key, clean, sigma[:, None]), parameters, direction, sigma)


def average_bound(
    key: Key[Array, ""],
    model: MicrostructureModel,
    table: Table,
    grid: Float[np.ndarray, "point parameter"],
    snr: float,
) -> Float[np.ndarray, "point parameter"]:
    """Return the smallest standard deviation of an unbiased estimator, root mean square over fibre directions.

    Direction and unweighted signal are unknown too, as for a fit.

    Args:
        key: Consumed: draws the directions.
        model: Makes the signals.
        table: The protocol.
        grid: True parameters, inside their ranges.
        snr: Signal-to-noise ratio at b = 0.
    """
    truth = np.repeat(grid, BOUND_DIRECTIONS, axis=0)
    direction = np.asarray(draw_directions(key, len(truth)))
    bound = cramer_rao(model, truth, direction, np.array(table.bvals), np.array(table.bvecs), 1 / snr, s0_known=False)
    return np.sqrt((bound.errors**2).reshape(len(grid), BOUND_DIRECTIONS, -1).mean(axis=1))
