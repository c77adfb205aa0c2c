"""How well an adapted model does on one set of scans: every measure with its interval over subjects."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64, Shaped

from jaxmed.errors import InputError
from jaxmed.metrics import classification, weighted
from jaxmed.metrics.classification import intervals
from jaxmed.metrics.statistics import Interval, bootstrap_all, weighted_mean
from jaxmed.models.heads import Task, predict_values
from jaxmed.objectives.supervised import task_losses
from jaxmed.recipes.adapt import standardise

ALL = "all"


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
    logits: Float[np.ndarray, "record output"],
    subjects: Shaped[np.ndarray, " record"],
    *,
    seed: int,
    threshold: float = 0.5,
) -> tuple[list[Score], list[str]]:
    """Score the predictions of one set.

    Args:
        task: What the outputs mean.
        targets: Labels, values in their unit; NaN where missing.
        logits: Outputs of the head.
        subjects: Whose scan each is: subjects are resampled with all their scans.
        seed: Of the resamples.
        threshold: Probability from which a binary label counts as predicted.

    Returns:
        Scores, and in words what could not be scored; of a single subject there are scores without intervals (NaN).
        Of all tasks "loss", without class weights or smoothing. binary, and each label of multilabel: those of
        `metrics.classification.score`. multilabel besides: auroc_macro and aupr_macro. multiclass: those of `score`,
        and of each class against the rest auroc, aupr and f1. regression: mse (unit squared), mae (unit) and r2.
    """
    scores: list[Score] = []
    notes: list[str] = []
    losses = np.asarray(task_losses(task.kind, jnp.asarray(logits), jnp.asarray(standardise(targets, task))))

    def add(label: str, rows: np.ndarray, measure: Measure) -> None:
        try:
            found, note = _measured(measure, subjects[rows], seed)
        except InputError as error:
            found, note = {}, str(error)
        if note:
            notes.append(note if label == ALL else f"{label}: {note}")
        scores.extend(Score(label, n, i, int(rows.sum()), len(set(subjects[rows]))) for n, i in found.items())

    everything = np.ones(len(targets), bool)
    values = np.asarray(predict_values(jnp.asarray(logits), task), np.float64)
    add(ALL, everything, _statistics({"loss": weighted_mean(losses)}, len(losses)))
    if task.kind == "multiclass":
        classes = targets[:, 0].astype(int)
        add(ALL, everything, _classification(classes, values, "multiclass", threshold))
        for number, name in enumerate(task.names):
            add(name, everything, _one_class((classes == number).astype(np.float64), values, number))
        return scores, notes
    if task.kind == "multilabel":
        add(ALL, everything, _macro(targets, values))
    for column, name in enumerate(task.names):
        rows = np.isfinite(targets[:, column])
        truth, estimate = targets[rows, column], values[rows, column]
        if task.kind == "regression":
            add(name, rows, _errors(truth, estimate))
        else:
            add(name, rows, _classification(truth.astype(int), estimate, "binary", threshold))
    return scores, list(dict.fromkeys(notes))


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


def _errors(truth: np.ndarray, values: np.ndarray) -> Measure:
    truth = truth.astype(np.float64)
    squares = np.square(values - truth)

    def explained(weights: np.ndarray) -> np.ndarray:
        mean = weighted.mean(truth, weights)
        spread = weighted.mean(np.square(truth - truth.mean()), weights) - np.square(mean - truth.mean())
        return 1 - weighted.divide(
            weighted.mean(squares, weights), np.where(spread > 1e-12 * np.ptp(truth), spread, 0.0)
        )

    return _statistics(
        {"mse": weighted_mean(squares), "mae": weighted_mean(np.abs(values - truth)), "r2": explained}, len(truth)
    )
