"""Score estimators on simulated voxels: bias, spread and error over a grid of parameters and noise levels.

An estimator is a function of `Simulated` voxels; networks and fits are scored on the same noise. Beside them stands the
Cramer-Rao bound of the Rician likelihood: no unbiased estimator has a smaller spread, and a biased one may.

Source: the sister study on training labels (a 10 x 10 x 10 grid, 500 repetitions).
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxmed.physics.acquisition import add_rician_noise
from jaxmed.physics.microstructure import MicrostructureModel, Simulated, draw_directions
from jaxmed.systems.noddi.information import cramer_rao
from jaxmed.systems.noddi.labels import LabelStart, fit_labels
from jaxmed.systems.noddi.network import ForwardConfig, Network, predict
from jaxmed.systems.noddi.table import Table, match_table

Estimator = Callable[[Simulated], np.ndarray]
BLOCK = 8192
DEFINED = 0.5
"""A parameter is scored where at least this share of the voxel lets the signal depend on it."""
BOUND_DIRECTIONS = 16
"""Fibre directions over which the bound is averaged."""


class Scores(NamedTuple):
    """Of one estimator at one noise level.

    Attributes:
        bias: Mean error at each point of the grid.
        sd: Standard deviation of the estimates there, over repetitions.
        rmse: Root mean squared error there.
    """

    bias: Float[np.ndarray, "point parameter"]
    sd: Float[np.ndarray, "point parameter"]
    rmse: Float[np.ndarray, "point parameter"]


def make_grid(model: MicrostructureModel, points: int) -> Float[np.ndarray, "point parameter"]:
    """Return every combination of `points` values of each parameter, half a step inside its simulated range."""
    axes = []
    for parameter in model.parameters:
        low, high = parameter.draw
        axes.append(low + (high - low) * (np.arange(points) + 0.5) / points)
    return np.array(list(itertools.product(*axes)))


def network_estimator(network: Network, table: Table, where: object = "weights") -> Estimator:
    """Return a network as an estimator of voxels measured by a protocol, in whatever order it has the network's rows.

    Raises:
        InputError: The protocol is not the network's.
    """
    order = match_table(network.description.table, *table.gradients[:2], where).order
    return lambda voxels: predict(network, voxels.signals[:, order])


def fit_estimator(forward: ForwardConfig, table: Table, start: LabelStart = "grid") -> Estimator:
    """Return the maximum-likelihood fit, told the true noise level, as an estimator."""
    model = forward.build(np.array(table.bvals))
    return lambda voxels: np.asarray(fit_labels(voxels, model, table, start, forward))


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
    size = min(BLOCK, len(truth))
    for start in range(0, len(truth), size):
        block = truth[start : start + size]
        # The last block is filled up: one compiled program for all.
        padded = np.concatenate([block, np.repeat(block[-1:], size - len(block), axis=0)])
        voxels = _measure(model, table, jax.random.fold_in(key, start), padded.astype(np.float32), 1 / snr)
        for name, estimator in estimators.items():
            found[name].append(np.asarray(estimator(voxels))[: len(block)])
        if on_block is not None:
            on_block(start + len(block))
    shape = (len(grid), repeats, len(model.parameters))
    return {name: np.concatenate(parts).reshape(shape) for name, parts in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(model: MicrostructureModel, table: Table, key, parameters, noise) -> Simulated:
    direction_key, noise_key = jax.random.split(key)
    direction = draw_directions(direction_key, len(parameters))
    sigma = jnp.full(len(parameters), noise)
    clean = model.signal(parameters, direction, np.array(table.bvals), np.array(table.bvecs))
    return Simulated(add_rician_noise(noise_key, clean, sigma[:, None]), parameters, direction, sigma)


def score(estimates: Float[np.ndarray, "point repeat parameter"], grid: Float[np.ndarray, "point parameter"]) -> Scores:
    """Compare estimates with the truth at each point of the grid."""
    error = estimates.astype(np.float64) - grid[:, None]
    spread = error.std(axis=1, ddof=1) if error.shape[1] > 1 else np.zeros_like(error[:, 0])
    return Scores(error.mean(axis=1), spread, np.sqrt((error**2).mean(axis=1)))


def correlation(
    estimates: Float[np.ndarray, "point repeat parameter"],
    others: Float[np.ndarray, "point repeat parameter"],
    weight: Float[np.ndarray, "point parameter"],
) -> list[float]:
    """Return Pearson's r between two estimators of the same voxels, for each parameter where it is defined."""
    found = []
    for column in range(weight.shape[1]):
        inside = weight[:, column] >= DEFINED
        first, second = (part[inside, :, column].ravel() for part in (estimates, others))
        found.append(float(np.corrcoef(first, second)[0, 1]))
    return found


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


def summarise(scores: Scores, weight: Float[np.ndarray, "point parameter"]) -> list[dict[str, float]]:
    """Return bias, absolute bias, sd and RMSE of each parameter over the points where it is defined.

    Bias is the mean over points, absolute bias the mean of its size, sd and RMSE are root means of squares.
    """
    rows = []
    for column in range(weight.shape[1]):
        inside = weight[:, column] >= DEFINED
        bias, sd, rmse = (part[inside, column] for part in scores)
        rows.append(
            {
                "bias": float(bias.mean()),
                "absolute_bias": float(np.abs(bias).mean()),
                "sd": float(np.sqrt((sd**2).mean())),
                "median_sd": float(np.median(sd)),
                "rmse": float(np.sqrt((rmse**2).mean())),
            }
        )
    return rows


def shrinkage(scores: Scores, grid: np.ndarray, weight: np.ndarray) -> list[float]:
    """Return the slope of the mean estimate on the truth for each parameter: below 1 estimates shrink to the middle."""
    slopes = []
    for column in range(grid.shape[1]):
        inside = weight[:, column] >= DEFINED
        truth = grid[inside, column]
        slopes.append(float(np.polyfit(truth, truth + scores.bias[inside, column], 1)[0]))
    return slopes


def bias_curve(
    scores: Scores, grid: np.ndarray, weight: np.ndarray, column: int
) -> tuple[Float[np.ndarray, " value"], Float[np.ndarray, " value"], Float[np.ndarray, " value"]]:
    """Return the values of one parameter, and mean bias and root mean squared sd over the others at each."""
    values = np.unique(grid[:, column])
    defined = weight[:, column] >= DEFINED
    bias, sd = [], []
    for value in values:
        inside = defined & (grid[:, column] == value)
        # A value that is defined nowhere on the grid leaves a gap.
        bias.append(scores.bias[inside, column].mean() if inside.any() else np.nan)
        sd.append(np.sqrt((scores.sd[inside, column] ** 2).mean()) if inside.any() else np.nan)
    return values, np.array(bias), np.array(sd)


def names_of(networks: Sequence[Network]) -> list[str]:
    """Name networks by their labels, NN_MLE and NN_GT as the paper does; equal ones are numbered."""
    names: list[str] = []
    for network in networks:
        labels = network.description.labels
        name = f"NN_{labels.split()[0].upper()}" + (" (truth start)" if "truth" in labels else "")
        names.append(name)
    return [
        f"{name} {names[: index + 1].count(name)}" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]
