"""Scores of regional values against predictions, where some regions were not measured."""

import numpy as np
from jaxtyping import Float

Scores = dict[str, float | int | None]
NOTHING: Scores = {"sse": None, "r": None, "mse": None, "r2": None, "visits": 0}
"""The scores of no visits."""


def score_regions(seen: Float[np.ndarray, "visit region"], predicted: Float[np.ndarray, "visit region"]) -> Scores:
    """Return the measures of a paper on progression over visits; NaN among the seen was not measured.

    Returns:
        sse over visits and measured regions; r, Pearson's correlation over regions, the mean of visits with a spread;
        mse; r2, the median over regions of the share of variance explained; visits.
    """
    if not len(seen):
        return NOTHING
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
