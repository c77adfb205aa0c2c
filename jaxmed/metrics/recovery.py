"""How estimators recover known parameters: bias, spread, error and shrinkage over a grid of truths."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

DEFINED = 0.5
"""A parameter is scored where at least this share of what is measured depends on it."""
BOUND = "Cramer-Rao bound"
"""Stands among estimators as the one without bias that no other unbiased one surpasses."""


class Scores(NamedTuple):
    """Scores of one estimator at one noise level.

    Attributes:
        bias: Mean error at each point of the grid.
        sd: Standard deviation of the estimates there, over repetitions.
        rmse: Root mean squared error there.
    """

    bias: Float[np.ndarray, "point parameter"]
    sd: Float[np.ndarray, "point parameter"]
    rmse: Float[np.ndarray, "point parameter"]


def make_grid(ranges: Sequence[tuple[float, float]], points: int) -> Float[np.ndarray, "point parameter"]:
    """Return every combination of `points` values of each parameter, half a step inside its range."""
    axes = [low + (high - low) * (np.arange(points) + 0.5) / points for low, high in ranges]
    return np.array(list(itertools.product(*axes)))


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
    """Return Pearson's r between two estimators of the same measurements, for each parameter where it is defined."""
    found = []
    for column in range(weight.shape[1]):
        inside = weight[:, column] >= DEFINED
        first, second = (part[inside, :, column].ravel() for part in (estimates, others))
        found.append(float(np.corrcoef(first, second)[0, 1]))
    return found


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


def tabulate(
    names: Sequence[str], scores: Mapping[str, Scores], grid: np.ndarray, weight: np.ndarray
) -> list[dict[str, Any]]:
    """Return what is known of each parameter by each estimator, a row each; the bound has a slope of 1."""
    rows = []
    for name, one in scores.items():
        slopes = [1.0] * len(names) if name == BOUND else shrinkage(one, grid, weight)
        for parameter, numbers, slope in zip(names, summarise(one, weight), slopes, strict=True):
            rows.append({"estimator": name, "parameter": parameter, **numbers, "slope": slope})
    return rows
