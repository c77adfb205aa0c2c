"""How well a course describes visits: squared error, correlation over regions, and each region's share."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxmed.arrays.visits import Visits, is_measured
from jaxmed.solvers.fixed_grid import interpolate
from jaxmed.systems.igndmoe.results import Course


def predictions(
    course: Course, visits: Visits, onsets: Float[np.ndarray, " subject"]
) -> Float[np.ndarray, "subject visit region"]:
    """Return the course at every visit, on [0, 1]."""
    last = float(course.trajectory.times[-1])
    at = jnp.asarray(np.minimum(onsets[:, None] + visits.gaps, last), jnp.float32)
    return np.asarray(interpolate(course.trajectory, at))


def measured_values(visits: Visits) -> Float[np.ndarray, "subject visit region"]:
    """Return the values of visits, NaN on padding and where a region was not measured."""
    return np.where(np.asarray(is_measured(visits)), np.asarray(visits.values), np.nan)


def score(
    course: Course,
    visits: Visits,
    onsets: Float[np.ndarray, " subject"],
    chosen: Bool[np.ndarray, " subject"],
    later: bool = False,
) -> dict[str, float | int | None]:
    """Return the paper's measures over visits of some subjects.

    Args:
        course: Fitted.
        visits: On [0, 1].
        onsets: Stages.
        chosen: Subjects that count.
        later: Leave out first visits, for forecasts.

    Returns:
        sse over visits and measured regions; r, Pearson's correlation over regions, the mean of visits with a spread;
        mse; r2, the median over regions of the share of variance explained; visits.
    """
    present = np.asarray(visits.present) & chosen[:, None]
    if later:
        present = present & (np.arange(present.shape[1]) > 0)
    if not present.any():
        return {"sse": None, "r": None, "mse": None, "r2": None, "visits": 0}
    seen, predicted = measured_values(visits)[present], predictions(course, visits, onsets)[present]
    known = np.isfinite(seen)
    errors = np.where(known, np.square(seen - predicted), 0.0)
    means = np.where(known, seen, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    spread = np.sum(np.where(known, np.square(seen - means), 0.0), axis=0)
    has_spread = spread > 0
    r2 = 1 - errors.sum(axis=0)[has_spread] / spread[has_spread]
    correlations = row_correlations(seen, predicted)
    return {
        "sse": float(errors.sum()),
        "r": float(np.nanmean(correlations)) if np.isfinite(correlations).any() else None,
        "mse": float(errors.sum() / max(known.sum(), 1)),
        "r2": float(np.median(r2)) if has_spread.any() else None,
        "visits": len(seen),
    }


def row_correlations(
    first: Float[np.ndarray, "row region"], second: Float[np.ndarray, "row region"]
) -> Float[np.ndarray, " row"]:
    """Return Pearson's correlation of each pair of rows where both are known; NaN where one does not vary."""
    known = np.isfinite(first) & np.isfinite(second)
    count = np.maximum(known.sum(axis=1, keepdims=True), 1)
    filled = [np.where(known, rows, 0.0) for rows in (first, second)]
    a, b = (np.where(known, rows - rows.sum(axis=1, keepdims=True) / count, 0.0) for rows in filled)
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.where(scale > 0, (a * b).sum(axis=1) / np.where(scale > 0, scale, 1.0), np.nan)
