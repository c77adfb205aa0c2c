"""Classification measures of weighted rows: the arithmetic behind `classification.py`.

NumPy on the host. Each takes many sets of row weights at once and gives one value for each set, so that an interval
from 2000 resamples is a few array operations: all measures of 200 rows took 0.13 s where as many calls of scikit-learn,
to whose values the tests hold them, would take 16 s (2000 rows: 0.8 s and 19 s; two CPU cores, scikit-learn's times
extrapolated from 50 resamples). NaN stands for "not defined on this resample" and goes no further than
`statistics.py`, which counts it. Nothing here checks its arguments.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float64, Int

Binning = Literal["equal_width", "equal_mass"]
NUM_BINS = 15

Values = Float64[np.ndarray, " resample"]
Weights = Float64[np.ndarray, "resample row"]


def cumulate(
    positives: np.ndarray, scores: np.ndarray, weights: Weights
) -> tuple[Float64[np.ndarray, "resample threshold"], Float64[np.ndarray, "resample threshold"]]:
    """Weight of positives and of negatives at or above each distinct score, highest first, after a column of zeros."""
    order = np.argsort(-scores.astype(np.float64), kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    sorted_weights, is_positive = weights[:, order], positives[order].astype(np.float64)
    found = (np.cumsum(sorted_weights * side, axis=1)[:, ends] for side in (is_positive, 1 - is_positive))
    above, false = (np.pad(sums, ((0, 0), (1, 0))) for sums in found)
    return above, false


def rates(positives: np.ndarray, scores: np.ndarray, weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Sensitivity and false positive rate at each threshold; NaN where a resample lacks that class."""
    above, false = cumulate(positives, scores, weights)
    return divide(above, above[:, -1:]), divide(false, false[:, -1:])


def auroc(positives: np.ndarray, scores: np.ndarray, weights: Weights) -> Values:
    """Area under the receiver operating characteristic, by trapezoids: a tie of two classes counts half."""
    sensitivity, false_alarms = rates(positives, scores, weights)
    return (np.diff(false_alarms) * (sensitivity[:, 1:] + sensitivity[:, :-1])).sum(axis=1) / 2


def average_precision(positives: np.ndarray, scores: np.ndarray, weights: Weights) -> Values:
    """Sum over thresholds of the step in recall times the precision."""
    above, false = cumulate(positives, scores, weights)
    total = above + false
    precision = np.divide(above, total, out=np.zeros_like(above), where=total > 0)
    areas = (np.diff(above) * precision[:, 1:]).sum(axis=1)
    # Without a negative the precision is 1 whatever the scores: as undefined as the AUROC.
    return np.where(false[:, -1] > 0, divide(areas, above[:, -1]), np.nan)


def best_rate(
    positives: np.ndarray,
    scores: np.ndarray,
    weights: Weights,
    least: float,
    wanted: Literal["sensitivity", "specificity"],
) -> Values:
    """Largest sensitivity (or specificity) at any threshold where the other of the two is at least `least`."""
    sensitivity, false_alarms = rates(positives, scores, weights)
    specificity = 1 - false_alarms
    pair = (sensitivity, specificity) if wanted == "sensitivity" else (specificity, sensitivity)
    is_defined = np.isfinite(sensitivity[:, -1]) & np.isfinite(specificity[:, -1])
    # 1 - 2 / 20 is below 0.9 in floating point.
    best = np.where(pair[1] >= least - 1e-12, pair[0], 0.0).max(axis=1)
    return np.where(is_defined, best, np.nan)


def count_cells(
    cells: Int[np.ndarray, " row"], weights: Weights, num_classes: int
) -> Float64[np.ndarray, "resample truth prediction"]:
    """Confusion matrices from each row's place in them, counted row by row of the flattened matrix."""
    counts = [np.bincount(cells, row, num_classes**2) for row in weights]
    return np.stack(counts).reshape(-1, num_classes, num_classes)


def from_confusion(counts: Float64[np.ndarray, "resample truth prediction"]) -> dict[str, Values]:
    """Measures of confusion matrices; NaN where one needs a class that a resample lacks."""
    truth, predicted = counts.sum(axis=2), counts.sum(axis=1)
    total = truth.sum(axis=1)
    right = np.einsum("rkk->rk", counts)
    recall = divide(right, truth)
    lacks_class = (truth == 0).any(axis=1)
    has_one_class = (truth > 0).sum(axis=1) < 2
    # Gorodkin, Computational Biology and Chemistry 28 (2004), 367, equation 8.
    covariance = right.sum(axis=1) * total - (truth * predicted).sum(axis=1)
    spread = np.sqrt((total**2 - (predicted**2).sum(axis=1)) * (total**2 - (truth**2).sum(axis=1)))
    mcc = np.divide(covariance, spread, out=np.zeros_like(total), where=spread > 0)
    found = {
        "accuracy": right.sum(axis=1) / total,
        "balanced_accuracy": recall.mean(axis=1),
        "f1_macro": np.where(lacks_class, np.nan, f1(counts).mean(axis=1)),
        # A class that is never predicted has precision 0, as in scikit-learn with zero_division=0.
        "precision_macro": np.where(lacks_class, np.nan, np.nan_to_num(divide(right, predicted)).mean(axis=1)),
        "jaccard_macro": np.where(lacks_class, np.nan, divide(right, truth + predicted - right).mean(axis=1)),
        # Of the labels one against the rest, as scikit-learn has it for a column per class.
        "hamming": 2 * (1 - right.sum(axis=1) / total) / counts.shape[1],
        "mcc": np.where(has_one_class, np.nan, mcc),
    }
    grade = np.arange(counts.shape[1])
    distance = np.abs(grade[:, None] - grade[None, :]).astype(np.float64)
    chance = truth[:, :, None] * predicted[:, None, :] / total[:, None, None]
    # Cohen, Psychological Bulletin 70 (1968), 213.
    for name, cost in (("unweighted", np.sign(distance)), ("linear", distance), ("quadratic", distance**2)):
        by_chance = (chance * cost).sum(axis=(1, 2))
        kappa = 1 - divide((counts * cost).sum(axis=(1, 2)), by_chance)
        found[f"kappa_{name}"] = np.where(has_one_class, np.nan, kappa)
    return found


def f1(counts: Float64[np.ndarray, "resample truth prediction"]) -> Float64[np.ndarray, "resample class"]:
    """F1 of each class; NaN for a class that is neither true nor predicted anywhere."""
    both = counts.sum(axis=1) + counts.sum(axis=2)
    return divide(2 * np.einsum("rkk->rk", counts), both)


def mean(values: Float64[np.ndarray, " row"], weights: Weights) -> Values:
    """Weighted mean of the rows."""
    return weights @ values / weights.sum(axis=1)


def calibration_errors(confidence: np.ndarray, is_right: np.ndarray, weights: Weights) -> dict[str, Values]:
    """Expected calibration error under both kinds of bins, by name."""
    kinds: tuple[Binning, Binning] = ("equal_width", "equal_mass")
    return {f"ece_{kind}": calibration_error(confidence, is_right, weights, NUM_BINS, kind) for kind in kinds}


def calibration_error(
    confidence: np.ndarray, is_right: np.ndarray, weights: Weights, num_bins: int, binning: Binning
) -> Values:
    """Expected calibration error: distance of mean confidence from the share that is right, weighted by bin."""
    counts, expected, right = bins(confidence, is_right, weights, num_bins, binning)
    return np.abs(expected - right).sum(axis=1) / counts.sum(axis=1)


def bins(
    confidence: np.ndarray, is_right: np.ndarray, weights: Weights, num_bins: int, binning: Binning
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight, weighted confidence and weight of right rows of each bin, each (resample, bin)."""
    if binning == "equal_width":
        # The rounding keeps 0.3 in the bin that ends at 3 / 10, whichever way the two are stored.
        places = np.clip(np.ceil(np.round(confidence * num_bins, 9)).astype(int) - 1, 0, num_bins - 1)
        membership = np.eye(num_bins)[places]
        columns = [membership, membership * confidence[:, None], membership * is_right[:, None]]
        counts, expected, right = (weights @ column for column in columns)
        return counts, expected, right
    order = np.argsort(confidence, kind="stable")
    ordered, sorted_weights = confidence[order], weights[:, order]
    before = np.pad(np.cumsum(sorted_weights, axis=1), ((0, 0), (1, 0)))
    first_equal = np.searchsorted(ordered, ordered, side="left")
    places = np.floor(before[:, first_equal] * num_bins / before[:, -1:]).astype(int)
    # A row of weight zero at the end has all the weight before it.
    places = np.minimum(places, num_bins - 1) + num_bins * np.arange(len(weights))[:, None]
    size = num_bins * len(weights)
    columns = [sorted_weights, sorted_weights * ordered, sorted_weights * is_right[order]]
    sums = (np.bincount(places.ravel(), column.ravel(), size).reshape(-1, num_bins) for column in columns)
    counts, expected, right = sums
    return counts, expected, right


def divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide, with NaN where there is nothing to divide by."""
    below = np.broadcast_to(below, above.shape)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
