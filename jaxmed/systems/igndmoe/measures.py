"""How well a course describes visits: squared error, correlation over regions, and each region's share."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxmed.arrays.visits import Visits
from jaxmed.solvers.fixed_grid import interpolate
from jaxmed.systems.igndmoe.results import Course


def predictions(
    course: Course, visits: Visits, onsets: Float[np.ndarray, " subject"]
) -> Float[np.ndarray, "subject visit region"]:
    """Return the course at every visit, on [0, 1]."""
    last = float(course.trajectory.times[-1])
    at = jnp.asarray(np.minimum(onsets[:, None] + visits.gaps, last), jnp.float32)
    return np.asarray(interpolate(course.trajectory, at))


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
        sse over visits and regions; r, Pearson's correlation over regions, the mean of visits with a spread; mse;
        r2, the median over regions of the share of variance explained; visits.
    """
    present = np.asarray(visits.present) & chosen[:, None]
    if later:
        present = present & (np.arange(present.shape[1]) > 0)
    if not present.any():
        return {"sse": None, "r": None, "mse": None, "r2": None, "visits": 0}
    seen, predicted = np.asarray(visits.values)[present], predictions(course, visits, onsets)[present]
    errors = np.square(seen - predicted)
    spread = np.sum(np.square(seen - seen.mean(axis=0)), axis=0)
    has_spread = spread > 0
    r2 = 1 - errors.sum(axis=0)[has_spread] / spread[has_spread]
    correlations = row_correlations(seen, predicted)
    return {
        "sse": float(errors.sum()),
        "r": float(np.nanmean(correlations)) if np.isfinite(correlations).any() else None,
        "mse": float(errors.mean()),
        "r2": float(np.median(r2)) if has_spread.any() else None,
        "visits": len(seen),
    }


def row_correlations(
    first: Float[np.ndarray, "row region"], second: Float[np.ndarray, "row region"]
) -> Float[np.ndarray, " row"]:
    """Return Pearson's correlation of each pair of rows; NaN where one does not vary."""
    a, b = (rows - rows.mean(axis=1, keepdims=True) for rows in (first, second))
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.where(scale > 0, (a * b).sum(axis=1) / np.where(scale > 0, scale, 1.0), np.nan)
