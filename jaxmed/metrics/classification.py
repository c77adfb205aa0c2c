"""Measures of classification and calibration, with intervals over subjects.

NumPy on the host; `weighted.py` holds the arithmetic. Conventions:

- A row is positive when its probability is at least the threshold; the class of several is the most probable, the first
  among equals.
- Labels of one class only leave AUROC, AUPR, sensitivity, specificity, kappa, MCC, and measures averaged over classes
  undefined: `score` refuses them, and a resample without some class is left out of the interval and counted.
- Predictions of one class only are defined: F1 of a class never predicted, MCC and kappa are 0; AUROC of one constant
  score is 0.5.
- Macro means are over classes or labels, each with the same weight.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Real, Shaped

from jaxmed.errors import InputError
from jaxmed.metrics import weighted
from jaxmed.metrics.statistics import (
    Interval,
    IntervalMethod,
    Seed,
    Statistics,
    bootstrap_all,
)

Task = Literal["binary", "multiclass", "multilabel"]
OPERATING_POINT = 0.9


class ReliabilityCurve(NamedTuple):
    """Calibration by bins; bins without rows are left out.

    Attributes:
        confidence: Mean predicted probability in each bin.
        frequency: Share of rows in each bin that are of the predicted class.
        num_rows: Rows in each bin.
    """

    confidence: Float64[np.ndarray, " bin"]
    frequency: Float64[np.ndarray, " bin"]
    num_rows: Int[np.ndarray, " bin"]


class OperatingCurve(NamedTuple):
    """What each threshold gives, from the strictest (nothing is positive) to the loosest (everything is).

    Attributes:
        thresholds: Rows with at least this score are positive; the first is infinite.
        sensitivity: Share of positives found.
        specificity: Share of negatives left alone.
    """

    thresholds: Float64[np.ndarray, " threshold"]
    sensitivity: Float64[np.ndarray, " threshold"]
    specificity: Float64[np.ndarray, " threshold"]


def score(
    labels: Shaped[np.ndarray, "row ..."],
    probabilities: Real[np.ndarray, "row ..."],
    task: Task,
    *,
    threshold: float | Sequence[float] = 0.5,
    names: Sequence[str] = (),
) -> dict[str, float]:
    """Score predicted probabilities.

    Args:
        labels: 0 or 1 for "binary", one column per label for "multilabel"; a class from 0 up for "multiclass".
        probabilities: Those of class 1, or one column per class (rows adding up to 1) or label.
        task: What the labels are.
        threshold: Probability from which a row is positive, for "binary", or for all labels or each of "multilabel";
            choose it on validation data.
        names: Names of the labels of "multilabel", for the keys; empty for their numbers.

    Returns:
        binary: auroc, aupr (average precision), accuracy, balanced_accuracy, sensitivity, specificity, f1, mcc,
        kappa_unweighted, sensitivity_at_90_specificity, specificity_at_90_sensitivity (thresholds from these same
        rows), brier, and the expected calibration errors ece_equal_width and ece_equal_mass (15 bins of the
        probability of class 1).
        multiclass: auroc_macro and aupr_macro (one class against the rest), accuracy, balanced_accuracy (the macro
        recall), f1_macro, precision_macro, jaccard_macro, hamming (wrong labels among a column for each class), mcc,
        kappa_unweighted, kappa_linear and kappa_quadratic (for ordered classes), brier (summed over classes, 0 to 2),
        ece_equal_width and ece_equal_mass (of the most probable class).
        multilabel: auroc, aupr, accuracy, f1 and brier of each label, as "auroc/NAME", and their macro means, as
        "auroc_macro".

    Raises:
        InputError: Labels and probabilities do not fit each other or the task, or a class has no row.
    """
    found = _statistics(labels, probabilities, task, threshold, names)(np.ones((1, len(labels))))
    for name, values in found.items():
        if not np.isfinite(values[0]):
            raise InputError(name, "labels of two or more classes", "labels for which it is not defined")
    return {name: float(values[0]) for name, values in found.items()}


def intervals(
    labels: Shaped[np.ndarray, "row ..."],
    probabilities: Real[np.ndarray, "row ..."],
    task: Task,
    subjects: Shaped[np.ndarray, " row"],
    *,
    seed: Seed,
    threshold: float | Sequence[float] = 0.5,
    names: Sequence[str] = (),
    num_resamples: int = 2000,
    level: float = 0.95,
    method: IntervalMethod = "percentile",
) -> dict[str, Interval]:
    """Score predicted probabilities, with bootstrap intervals over subjects.

    Args:
        labels: As for `score`.
        probabilities: As for `score`.
        task: As for `score`.
        subjects: Subject of each row; all rows of a subject are drawn together.
        seed: Seed of the resamples.
        threshold: As for `score`.
        names: As for `score`.
        num_resamples: Draws.
        level: Coverage.
        method: "percentile" or "bca".

    Raises:
        InputError: As for `score`, there are fewer than two subjects, or most resamples lack a class.
    """
    _check_subjects(subjects, len(labels))
    statistics = _statistics(labels, probabilities, task, threshold, names)
    return bootstrap_all(statistics, subjects, seed=seed, num_resamples=num_resamples, level=level, method=method)


def confusion_matrix(
    labels: Shaped[np.ndarray, " row"], predictions: Shaped[np.ndarray, " row"], num_classes: int
) -> Int[np.ndarray, "truth prediction"]:
    """Count rows by true (down) and predicted class (across)."""
    if len(labels) != len(predictions):
        raise InputError("predictions", f"one per label, {len(labels)}", len(predictions))
    truth, predicted = _classes(labels, num_classes, "labels"), _classes(predictions, num_classes, "predictions")
    return np.bincount(truth * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def auroc(labels: Shaped[np.ndarray, " row"], scores: Real[np.ndarray, " row"]) -> float:
    """Return the area under the receiver operating characteristic: ties between a positive and a negative count half.

    Raises:
        InputError: A class has no row, or a score is not finite.
    """
    return float(weighted.auroc(_checked_positives(labels, scores), scores, np.ones((1, len(labels))))[0])


def operating_curve(labels: Shaped[np.ndarray, " row"], scores: Real[np.ndarray, " row"]) -> OperatingCurve:
    """Return sensitivity and specificity at every threshold that changes a prediction.

    Raises:
        InputError: A class has no row, or a score is not finite.
    """
    is_positive = _checked_positives(labels, scores)
    sensitivity, false_alarms = weighted.rates(is_positive, scores, np.ones((1, len(labels))))
    thresholds = np.concatenate([[np.inf], np.unique(scores.astype(np.float64))[::-1]])
    return OperatingCurve(thresholds, sensitivity[0], 1 - false_alarms[0])


def reliability_curve(
    labels: Shaped[np.ndarray, " row"],
    probabilities: Real[np.ndarray, "row ..."],
    *,
    num_bins: int = weighted.NUM_BINS,
    binning: weighted.Binning = "equal_width",
) -> ReliabilityCurve:
    """Compare predicted probabilities with what happened, by bins.

    With one probability per row it is that of class 1 against the share of class 1; with a column per class it is that
    of the most probable class against the share of rows where it is right.

    Args:
        labels: 0 or 1, or a class from 0 up.
        probabilities: Those of class 1, or one column per class.
        num_bins: Most bins.
        binning: "equal_width" for ((m - 1) / M, m / M], with 0 in the first; "equal_mass" for as many rows in each as
            possible, where equal probabilities stay together.

    Source: Guo et al., arXiv:1706.04599, section 2; equal mass: Nixon et al., arXiv:1904.01685, section 3.2.
    """
    confidence, is_right = _confidence(labels, probabilities)
    _check_bins(num_bins)
    counts, expected, right = weighted.bins(confidence, is_right, np.ones((1, len(labels))), num_bins, binning)
    kept = counts[0] > 0
    return ReliabilityCurve(
        expected[0][kept] / counts[0][kept], right[0][kept] / counts[0][kept], counts[0][kept].astype(int)
    )


def expected_calibration_error(
    labels: Shaped[np.ndarray, " row"],
    probabilities: Real[np.ndarray, "row ..."],
    *,
    num_bins: int = weighted.NUM_BINS,
    binning: weighted.Binning = "equal_width",
) -> float:
    """Return the mean distance of the reliability curve from the diagonal, weighted by rows; see `reliability_curve`.

    Source: Guo et al., arXiv:1706.04599, equation 3.
    """
    confidence, is_right = _confidence(labels, probabilities)
    _check_bins(num_bins)
    return float(weighted.calibration_error(confidence, is_right, np.ones((1, len(labels))), num_bins, binning)[0])


def _statistics(
    labels: np.ndarray, probabilities: np.ndarray, task: Task, threshold: float | Sequence[float], names: Sequence[str]
) -> Statistics:
    """Check the data once and return all measures of the task as a function of weights."""
    if len(labels) != len(probabilities):
        raise InputError("probabilities", f"one row per label, {len(labels)}", len(probabilities))
    if not len(labels):
        raise InputError("labels", "at least one row", "none")
    match task:
        case "binary":
            if not isinstance(threshold, int | float):
                raise InputError("threshold", "one number for one label", threshold)
            return _binary(labels, probabilities, float(threshold))
        case "multiclass":
            return _multiclass(labels, probabilities)
        case "multilabel":
            return _multilabel(labels, probabilities, threshold, names)


def _binary(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> Statistics:
    if labels.ndim != 1 or probabilities.ndim != 1:
        shapes = f"{labels.shape} and {probabilities.shape}"
        raise InputError("labels and probabilities", "one number per row", f"the shapes {shapes}", "pass column 1")
    _check_probabilities(probabilities)
    positives = _checked_positives(labels, probabilities)
    confidence = probabilities.astype(np.float64)
    cells = 2 * positives.astype(int) + (confidence >= threshold)

    def statistics(weights: weighted.Weights) -> dict[str, weighted.Values]:
        counts = weighted.count_cells(cells, weights, 2)
        measures = weighted.from_confusion(counts)
        rates = weighted.divide(np.einsum("rkk->rk", counts), counts.sum(axis=2))
        f1 = weighted.f1(counts)[:, 1]
        return {
            "auroc": weighted.auroc(positives, confidence, weights),
            "aupr": weighted.average_precision(positives, confidence, weights),
            "accuracy": measures["accuracy"],
            "balanced_accuracy": measures["balanced_accuracy"],
            "sensitivity": rates[:, 1],
            "specificity": rates[:, 0],
            "f1": f1,
            "mcc": measures["mcc"],
            "kappa_unweighted": measures["kappa_unweighted"],
            "sensitivity_at_90_specificity": weighted.best_rate(
                positives, confidence, weights, OPERATING_POINT, "sensitivity"
            ),
            "specificity_at_90_sensitivity": weighted.best_rate(
                positives, confidence, weights, OPERATING_POINT, "specificity"
            ),
            "brier": weighted.mean((confidence - positives) ** 2, weights),
            **weighted.calibration_errors(confidence, positives, weights),
        }

    return statistics


def _multiclass(labels: np.ndarray, probabilities: np.ndarray) -> Statistics:
    if labels.ndim != 1 or probabilities.ndim != 2 or probabilities.shape[1] < 2:
        shapes = f"{labels.shape} and {probabilities.shape}"
        raise InputError("labels and probabilities", "a class and a column per class", f"the shapes {shapes}")
    confidence, is_right = _confidence(labels, probabilities)
    probabilities = probabilities.astype(np.float64)
    num_classes = probabilities.shape[1]
    truth = _classes(labels, num_classes, "labels")
    one_hot = np.eye(num_classes)[truth]
    _require_classes(one_hot.sum(axis=0))
    cells = truth * num_classes + probabilities.argmax(axis=1)
    squared = ((probabilities - one_hot) ** 2).sum(axis=1)

    def statistics(weights: weighted.Weights) -> dict[str, weighted.Values]:
        def macro(measure: Callable[..., weighted.Values]) -> weighted.Values:
            each = [measure(one_hot[:, k], probabilities[:, k], weights) for k in range(num_classes)]
            return np.mean(each, axis=0)

        return {
            "auroc_macro": macro(weighted.auroc),
            "aupr_macro": macro(weighted.average_precision),
            **weighted.from_confusion(weighted.count_cells(cells, weights, num_classes)),
            "brier": weighted.mean(squared, weights),
            **weighted.calibration_errors(confidence, is_right, weights),
        }

    return statistics


def _multilabel(
    labels: np.ndarray, probabilities: np.ndarray, threshold: float | Sequence[float], names: Sequence[str]
) -> Statistics:
    if labels.ndim != 2 or labels.shape != probabilities.shape or not labels.shape[1]:
        shapes = f"{labels.shape} and {probabilities.shape}"
        raise InputError("labels and probabilities", "a column per label in both", f"the shapes {shapes}")
    number = labels.shape[1]
    thresholds = [threshold] * number if isinstance(threshold, int | float) else list(threshold)
    names = list(names) or [str(index) for index in range(number)]
    for what, given in (("threshold", thresholds), ("names", names)):
        if len(given) != number:
            raise InputError(what, f"one per label, {number}", len(given))
    if len(set(names)) < number:
        raise InputError("names", "a different name for every label", ", ".join(names))
    each = {}
    for index, name in enumerate(names):
        try:
            each[name] = _binary(labels[:, index], probabilities[:, index], thresholds[index])
        except InputError as error:
            raise InputError(f"label {name}, {error.where}", error.expected, error.found, error.advice) from error

    def statistics(weights: weighted.Weights) -> dict[str, weighted.Values]:
        by_label = {name: binary(weights) for name, binary in each.items()}
        found = {}
        for measure in ("auroc", "aupr", "accuracy", "f1", "brier"):
            found[f"{measure}_macro"] = np.mean([values[measure] for values in by_label.values()], axis=0)
            found |= {f"{measure}/{name}": values[measure] for name, values in by_label.items()}
        return found

    return statistics


def _confidence(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability that is to be calibrated, and whether it came true."""
    if labels.ndim != 1 or probabilities.ndim > 2 or len(labels) != len(probabilities) or not len(labels):
        shapes = f"{labels.shape} and {probabilities.shape}"
        raise InputError("labels and probabilities", "one or more rows, the same in both", f"the shapes {shapes}")
    _check_probabilities(probabilities)
    if probabilities.ndim == 1:
        return probabilities.astype(np.float64), _classes(labels, 2, "labels").astype(np.float64)
    totals = probabilities.astype(np.float64).sum(axis=1)
    wrong = np.flatnonzero(np.abs(totals - 1) > 1e-2)
    if wrong.size:
        where = f"probabilities, row {wrong[0]}"
        raise InputError(where, "a sum of 1", f"{totals[wrong[0]]:.4g}", "apply softmax to logits first")
    truth = _classes(labels, probabilities.shape[1], "labels")
    return probabilities.max(axis=1).astype(np.float64), (probabilities.argmax(axis=1) == truth).astype(np.float64)


def _checked_positives(labels: np.ndarray, scores: np.ndarray) -> Float64[np.ndarray, " row"]:
    if len(labels) != len(scores):
        raise InputError("scores", f"one per label, {len(labels)}", len(scores))
    positives = _classes(labels, 2, "labels").astype(np.float64)
    _require_classes(np.array([(positives == 0).sum(), positives.sum()]))
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise InputError(f"scores, row {row}", "a finite number", scores[row])
    return positives


def _classes(labels: np.ndarray, num_classes: int, what: str) -> Int[np.ndarray, " row"]:
    numbers = labels.astype(np.float64)
    wrong = np.flatnonzero(~np.isin(numbers, np.arange(num_classes)))
    if wrong.size:
        expected = f"a class from 0 to {num_classes - 1}"
        raise InputError(f"{what}, row {wrong[0]}", expected, labels[wrong[0]])
    return numbers.astype(int)


def _require_classes(counts: np.ndarray) -> None:
    missing = np.flatnonzero(counts == 0)
    if missing.size:
        found = f"none of class {missing[0]}" + (f" and {missing.size - 1} more" if missing.size > 1 else "")
        raise InputError(
            "labels", f"rows of each of the {len(counts)} classes", found, "measure on data with all of them"
        )


def _check_probabilities(probabilities: np.ndarray) -> None:
    wrong = np.argwhere(~((probabilities >= 0) & (probabilities <= 1)))
    if len(wrong):
        value = probabilities[tuple(wrong[0])]
        advice = "apply sigmoid or softmax to logits first"
        raise InputError(f"probabilities, row {wrong[0][0]}", "numbers from 0 to 1", value, advice)


def _check_subjects(subjects: np.ndarray, num_rows: int) -> None:
    if len(subjects) != num_rows:
        raise InputError("subjects", f"one per row, {num_rows}", len(subjects))


def _check_bins(num_bins: int) -> None:
    if num_bins < 1:
        raise InputError("num_bins", "1 or more", num_bins)
