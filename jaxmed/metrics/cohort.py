"""How well a model does on a set of subjects: every measure of its task, or means of scores, with intervals.

One vocabulary for all systems. Of classes and labels: auroc, aupr, accuracy, f1, sensitivity, specificity, brier, and
what else `metrics.classification.score` names, with "_macro" for means over classes or labels. Of values: mse (unit
squared), mae and bias (unit; estimate minus truth), r2 and correlation (Pearson's). "loss" is the training loss.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Shaped

from jaxmed.arrays.task import Task, TaskKind
from jaxmed.errors import InputError
from jaxmed.metrics import classification, weighted
from jaxmed.metrics.classification import intervals
from jaxmed.metrics.statistics import Interval, Statistic, bootstrap, bootstrap_all, weighted_mean

ALL = "all"
MEASURES: dict[TaskKind, tuple[str, ...]] = {
    "binary": ("auroc", "aupr", "accuracy", "f1", "sensitivity", "specificity", "brier", "ece_equal_width", "loss"),
    "multiclass": ("auroc_macro", "auroc", "aupr_macro", "aupr", "accuracy", "balanced_accuracy", "f1_macro", "f1",
                   "brier", "ece_equal_width", "loss"),
    "multilabel": ("auroc_macro", "auroc_micro", "auroc_any", "auroc", "aupr_macro", "aupr", "accuracy", "f1",
                   "sensitivity", "specificity", "brier", "ece_equal_width", "loss"),
    "regression": ("r2", "correlation", "mae", "bias", "mse", "loss"),
}  # fmt: skip
"""Measures to show of each task, in this order; a table may hold more."""
HEADLINE: dict[TaskKind, str] = {
    "binary": "auroc", "multiclass": "auroc_macro", "multilabel": "auroc_macro", "regression": "r2"
}  # fmt: skip
SPELT = {"auroc": "AUROC", "aupr": "AUPRC", "f1": "F1", "r2": "R2", "mse": "MSE", "mae": "MAE", "rmse": "RMSE",
         "sse": "SSE", "mcc": "MCC", "ece": "ECE", "psnr": "PSNR", "ssim": "SSIM", "snr": "SNR"}  # fmt: skip


def spell(measure: str) -> str:
    """Return the name of a measure for reading."""
    return " ".join(SPELT.get(part, part) for part in measure.split("_"))


class Average(NamedTuple):
    """The mean of scores, and how sure it is.

    Attributes:
        mean: Over all rows.
        low: Lower end of its 95 % interval; None where there are not two subjects.
        high: Upper end.
        error: Standard error over subjects.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    error: float | None = None


def average_subjects(scores: Float[np.ndarray, " row"], subjects: Shaped[np.ndarray, " row"], seed: int) -> Average:
    """Average scores, every row alike, with an interval bootstrapped over subjects.

    Args:
        scores: Finite.
        subjects: Whose row each is.
        seed: Seed of the resamples.
    """
    own = subject_means(scores, subjects)
    if len(own) < 2:
        return Average(float(scores.mean()))
    found = bootstrap(weighted_mean(scores), subjects, seed=seed)
    return Average(found.estimate, found.low, found.high, float(own.std(ddof=1) / np.sqrt(len(own))))


def subject_means(
    scores: Float[np.ndarray, " row"], subjects: Shaped[np.ndarray, " row"]
) -> Float64[np.ndarray, " subject"]:
    """Return the mean score of each subject, in the order of their names."""
    _, place = np.unique(subjects, return_inverse=True)
    return np.bincount(place, scores) / np.bincount(place)


class Score(NamedTuple):
    """One measure of one set.

    Attributes:
        label: Class, label or target that it is about; "all" for all together.
        measure: Its name.
        interval: Estimate and 95 % interval.
        records: Scans that it rests on.
        subjects: Their subjects.
    """

    label: str
    measure: str
    interval: Interval
    records: int
    subjects: int


def score_set(
    task: Task,
    targets: Float[np.ndarray, "record column"],
    values: Float[np.ndarray, "record output"],
    subjects: Shaped[np.ndarray, " record"],
    *,
    seed: int,
    threshold: float = 0.5,
    losses: Float[np.ndarray, " record"] | None = None,
) -> tuple[list[Score], list[str]]:
    """Score the predictions of one set.

    Args:
        task: What the outputs mean.
        targets: Labels, values in their unit; NaN where missing.
        values: Probabilities, or values in the unit of the labels: `arrays.task.predict_values` of a head's outputs.
        subjects: Whose scan each is: subjects are resampled with all their scans.
        seed: Seed of the resamples.
        threshold: Probability from which a binary label counts as predicted.
        losses: Loss of each record, without class weights or smoothing; None leaves the measure "loss" out.

    Returns:
        Scores, and in words what could not be scored; of a single subject there are scores without intervals (NaN).
        binary, and each label of multilabel: those of `metrics.classification.score`. multilabel besides: auroc_macro
        and aupr_macro, and of records with all labels auroc_micro, over all pairs of a record and a label (zones of an
        organ, say), and auroc_any, of the largest probability for having any label. multiclass: those of `score`, and
        of each class against the rest auroc, aupr and f1.
        regression: mse, mae, bias, r2 and correlation.
    """
    scores: list[Score] = []
    notes: list[str] = []

    def add(label: str, rows: np.ndarray, measure: Measure) -> None:
        try:
            found, note = _measured(measure, subjects[rows], seed)
        except InputError as error:
            found, note = {}, str(error)
        if note:
            notes.append(note if label == ALL else f"{label}: {note}")
        scores.extend(Score(label, n, i, int(rows.sum()), len(set(subjects[rows]))) for n, i in found.items())

    everything = np.ones(len(targets), bool)
    values = values.astype(np.float64)
    if losses is not None:
        add(ALL, everything, _statistics({"loss": weighted_mean(losses)}, len(losses)))
    if task.kind == "multiclass":
        rows = np.isfinite(targets[:, 0])
        classes = targets[rows, 0].astype(int)
        add(ALL, rows, _classification(classes, values[rows], "multiclass", threshold))
        for number, name in enumerate(task.names):
            add(name, rows, _one_class((classes == number).astype(np.float64), values[rows], number))
        return scores, list(dict.fromkeys(notes))
    if task.kind == "multilabel":
        add(ALL, everything, _macro(targets, values))
        whole = np.asarray(np.isfinite(targets).all(axis=1))
        if len(np.unique((targets[whole] > 0).any(axis=1))) == 2:
            add(ALL, whole, _pooled(targets[whole].astype(np.float64), values[whole]))
    for column, name in enumerate(task.names):
        rows = np.isfinite(targets[:, column])
        truth, estimate = targets[rows, column], values[rows, column]
        if not rows.any():
            notes.append(f"{name}: no record has a label")
            continue
        if task.kind == "regression":
            add(name, rows, _statistics(error_statistics(truth, estimate), len(truth)))
            add(name, rows, _statistics({"correlation": correlation_statistic(truth, estimate)}, len(truth)))
        else:
            add(name, rows, _classification(truth.astype(int), estimate, "binary", threshold))
    return scores, list(dict.fromkeys(notes))


def error_statistics(truth: Float[np.ndarray, " row"], values: Float[np.ndarray, " row"]) -> dict[str, Statistic]:
    """Return mse, mae, bias and r2 of estimated values, as statistics for `metrics.statistics.bootstrap_all`."""
    truth = truth.astype(np.float64)
    squares = np.square(values - truth)

    def explained(weights: np.ndarray) -> np.ndarray:
        mean = weighted.mean(truth, weights)
        spread = weighted.mean(np.square(truth - truth.mean()), weights) - np.square(mean - truth.mean())
        return 1 - weighted.divide(
            weighted.mean(squares, weights), np.where(spread > 1e-12 * np.ptp(truth), spread, 0.0)
        )

    return {
        "mse": weighted_mean(squares),
        "mae": weighted_mean(np.abs(values - truth)),
        "bias": weighted_mean(values - truth),
        "r2": explained,
    }


def correlation_statistic(truth: Float[np.ndarray, " row"], values: Float[np.ndarray, " row"]) -> Statistic:
    """Return Pearson's correlation as a statistic; it is not defined where one side does not vary."""
    x, y = (side.astype(np.float64) - side.mean(dtype=np.float64) for side in (truth, values))

    def correlation(weights: np.ndarray) -> np.ndarray:
        def covariance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return weighted.mean(a * b, weights) - weighted.mean(a, weights) * weighted.mean(b, weights)

        one, other = covariance(x, x), covariance(y, y)
        varies = (one > 1e-12 * np.square(x).max(initial=0)) & (other > 1e-12 * np.square(y).max(initial=0))
        return weighted.divide(covariance(x, y), np.where(varies, np.sqrt(np.abs(one * other)), 0.0))

    return correlation


def headline_statistic(
    task: Task, targets: Float[np.ndarray, "record column"], values: Float[np.ndarray, "record output"]
) -> Statistic:
    """Return the measure of `HEADLINE` as a function of row weights: NaN where a resample lacks a class.

    Args:
        task: What the outputs mean.
        targets: Labels without missing ones; of a regression the first column counts.
        values: Probabilities, or values in the unit of the labels.
    """
    match task.kind:
        case "regression":
            return error_statistics(targets[:, 0], values[:, 0])["r2"]
        case "multiclass":
            classes = (targets[:, :1] == np.arange(len(task.names))).astype(np.float64)
        case _:
            classes = targets.astype(np.float64)

    def areas(weights: np.ndarray) -> np.ndarray:
        pairs = zip(classes.T, values.T, strict=True)
        return np.mean([weighted.auroc(truth, estimate, weights) for truth, estimate in pairs], axis=0)

    return areas


class Measure(NamedTuple):
    """Measures of one kind, with intervals and without.

    Attributes:
        with_intervals: Subjects and a seed to intervals.
        alone: To estimates.
    """

    with_intervals: Callable[[np.ndarray, int], dict[str, Interval]]
    alone: Callable[[], dict[str, float]]


def _measured(measure: Measure, subjects: np.ndarray, seed: int) -> tuple[dict[str, Interval], str]:
    """Return measures, and why they have no interval where they have none.

    Raises:
        InputError: They are not defined.
    """
    try:
        return measure.with_intervals(subjects, seed), ""
    except InputError as error:
        found = measure.alone()
        if not all(map(math.isfinite, found.values())):
            raise
        return {name: Interval(value, math.nan, math.nan) for name, value in found.items()}, f"no intervals: {error}"


def _classification(
    labels: np.ndarray, values: np.ndarray, kind: Literal["binary", "multiclass"], threshold: float
) -> Measure:
    return Measure(
        lambda subjects, seed: intervals(labels, values, kind, subjects, seed=seed, threshold=threshold),
        lambda: classification.score(labels, values, kind, threshold=threshold),
    )


def _statistics(statistics: dict[str, Callable[[np.ndarray], np.ndarray]], rows: int) -> Measure:
    def run(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {name: statistic(weights) for name, statistic in statistics.items()}

    return Measure(
        lambda subjects, seed: bootstrap_all(run, subjects, seed=seed),
        lambda: {name: float(values[0]) for name, values in run(np.ones((1, rows))).items()},
    )


def _one_class(truth: Float64[np.ndarray, " record"], values: np.ndarray, number: int) -> Measure:
    cells = 2 * truth.astype(int) + (values.argmax(axis=1) == number)
    return _statistics(
        {
            "auroc": lambda weights: weighted.auroc(truth, values[:, number], weights),
            "aupr": lambda weights: weighted.average_precision(truth, values[:, number], weights),
            "f1": lambda weights: weighted.f1(weighted.count_cells(cells, weights, 2))[:, 1],
        },
        len(truth),
    )


def _macro(targets: np.ndarray, values: np.ndarray) -> Measure:
    """Average over labels, each on the records where it is known."""

    def over_labels(measure: Callable[..., np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        def statistic(weights: np.ndarray) -> np.ndarray:
            columns = []
            for truth, estimate in zip(targets.T, values.T, strict=True):
                known = np.isfinite(truth)
                columns.append(measure(truth[known].astype(np.float64), estimate[known], weights[:, known]))
            return np.mean(columns, axis=0)

        return statistic

    measures = {"auroc_macro": weighted.auroc, "aupr_macro": weighted.average_precision}
    return _statistics({name: over_labels(measure) for name, measure in measures.items()}, len(targets))


def _pooled(targets: Float64[np.ndarray, "record label"], values: Float64[np.ndarray, "record label"]) -> Measure:
    """Take every label of a record as a record of its own, and the largest as that of the whole."""
    labels = targets.shape[1]
    return _statistics(
        {
            "auroc_micro": lambda weights: weighted.auroc(
                targets.reshape(-1), values.reshape(-1), weights.repeat(labels, axis=1)
            ),
            "auroc_any": lambda weights: weighted.auroc(targets.max(axis=1), values.max(axis=1), weights),
        },
        len(targets),
    )
