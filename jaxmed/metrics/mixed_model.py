"""A linear mixed model with one random intercept: rows of one group, such as a seed or subject, share a shift.

    y = X beta + u[group] + e,    u ~ N(0, between),  e ~ N(0, within)

NumPy on the host. With the ratio of the two variances known the model is least squares on values from which a share of
their group's mean is taken off, so that the ratio is all that is searched for: by restricted maximum likelihood, in one
dimension.

Source: Pinheiro and Bates, Mixed-Effects Models in S and S-PLUS, 2000, sections 2.2 and 2.4; the share that is taken
off: Fuller and Battese, Journal of the American Statistical Association 68 (1973), 626.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Float64, Real, Shaped

from jaxmed.errors import InputError

INTERCEPT = "intercept"
# Logarithms of the ratio of the variances that are tried; below, the groups count as alike.
LEAST, MOST = -16.0, 16.0


class Effect(NamedTuple):
    """What one column does.

    Attributes:
        name: Of the column.
        estimate: Change of the values per unit of the column.
        low: Lower end of its interval.
        high: Upper end.
        p_value: Two-sided, of no effect.
    """

    name: str
    estimate: float
    low: float
    high: float
    p_value: float


class MixedModel(NamedTuple):
    """A fitted model.

    Attributes:
        effects: The intercept, then one per column.
        between: Variance of the groups' shifts.
        within: Variance of what is left.
        groups: Number of groups.
        rows: Number of values.
    """

    effects: tuple[Effect, ...]
    between: float
    within: float
    groups: int
    rows: int


def fit_random_intercept(
    values: Real[np.ndarray, " row"],
    columns: Mapping[str, Real[np.ndarray, " row"]],
    groups: Shaped[np.ndarray, " row"],
    level: float = 0.95,
) -> MixedModel:
    """Fit by restricted maximum likelihood.

    Intervals and tests are Student's t with as many degrees of freedom as there are rows beyond columns and groups'
    shifts, which is exact for columns that vary within groups alone and balanced rows.

    Args:
        values: What is explained.
        columns: What explains it; an intercept is added.
        groups: Group of each row.
        level: Coverage of the intervals.

    Raises:
        InputError: There are too few rows or groups, a value is not finite, or a column follows from the others.
    """
    names = (INTERCEPT, *columns)
    design = np.stack([np.ones(len(values)), *columns.values()], axis=1).astype(np.float64)
    response = values.astype(np.float64)
    labels, member = np.unique(groups, return_inverse=True)
    freedom = len(response) - len(names) - len(labels) + 1
    if len(labels) < 2 or freedom < 1:
        found = f"{len(response)} rows of {len(labels)} groups for {len(names)} columns"
        raise InputError("mixed model", "two or more groups, and more rows than columns and groups", found)
    if not (np.isfinite(response).all() and np.isfinite(design).all()):
        raise InputError("mixed model", "finite numbers", "some that are not")
    if np.linalg.matrix_rank(design) < len(names):
        raise InputError("mixed model", "columns that do not follow from each other", ", ".join(columns))
    counts = np.bincount(member)

    def solve(ratio: float) -> tuple[np.ndarray, np.ndarray, float, float]:
        """Return coefficients, inverse of X'X, variance and the negative restricted log-likelihood."""
        share = 1 - 1 / np.sqrt(1 + counts * ratio)
        x, y = (_less_mean(array, member, counts, share) for array in (design, response[:, None]))
        inverse = np.linalg.inv(x.T @ x)
        beta = inverse @ (x.T @ y)[:, 0]
        variance = max(float(((y[:, 0] - x @ beta) ** 2).sum()) / (len(response) - len(names)), 1e-300)
        logs = (len(response) - len(names)) * np.log(variance) + np.log1p(counts * ratio).sum()
        return beta, inverse, variance, float(0.5 * (logs - np.linalg.slogdet(inverse)[1]))

    best = scipy.optimize.minimize_scalar(
        lambda log: solve(np.exp(log))[3], bounds=(LEAST, MOST), method="bounded", options={"xatol": 1e-7}
    )
    ratio = float(np.exp(best.x))  # pyright: ignore[reportAttributeAccessIssue]
    ratio = 0.0 if solve(0.0)[3] <= solve(ratio)[3] + 1e-6 else ratio  # the search ends short of its bound
    beta, inverse, variance, _ = solve(ratio)
    errors = np.sqrt(variance * np.diag(inverse))
    half = float(scipy.stats.t.ppf((1 + level) / 2, freedom)) * errors
    p_values = 2 * scipy.stats.t.sf(np.abs(beta) / np.maximum(errors, 1e-300), freedom)
    rows = zip(names, beta, beta - half, beta + half, p_values, strict=True)
    effects = tuple(Effect(name, *(float(number) for number in numbers)) for name, *numbers in rows)
    return MixedModel(effects, ratio * variance, variance, len(labels), len(response))


def _less_mean(
    array: Float64[np.ndarray, "row column"], member: np.ndarray, counts: np.ndarray, share: np.ndarray
) -> Float64[np.ndarray, "row column"]:
    """Take a share of its group's mean off every row."""
    means = np.stack([np.bincount(member, column) for column in array.T], axis=1) / counts[:, None]
    return array - (share[:, None] * means)[member]
