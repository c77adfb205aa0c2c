"""How well an adapted model does on one set of scans: every measure with its interval over subjects."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64, Shaped

from jaxmed.errors import InputError
from jaxmed.metrics import weighted
from jaxmed.metrics.classification import intervals
from jaxmed.metrics.statistics import Interval, Statistics, bootstrap_all, weighted_mean
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
        Scores, and in words what could not be scored. Of all tasks "loss", without class weights or smoothing. binary,
        and each label of multilabel: those of `metrics.classification.score`. multilabel besides: auroc_macro and
        aupr_macro. multiclass: those of `score`, and of each class against the rest auroc, aupr and f1. regression:
        mse (unit squared), mae (unit) and r2.
    """
    scores: list[Score] = []
    notes: list[str] = []
    losses = np.asarray(task_losses(task.kind, jnp.asarray(logits), jnp.asarray(standardise(targets, task))))

    def add(label: str, rows: np.ndarray, measure: Callable[[], dict[str, Interval]]) -> None:
        about = "" if label == ALL else f"{label}: "
        try:
            found = measure()
        except InputError as error:
            notes.append(f"{about}{error}")
            return
        scores.extend(Score(label, n, i, int(rows.sum()), len(set(subjects[rows]))) for n, i in found.items())

    everything = np.ones(len(targets), bool)
    values = np.asarray(predict_values(jnp.asarray(logits), task), np.float64)
    add(ALL, everything, lambda: _bootstrap({"loss": weighted_mean(losses)}, subjects, seed))
    if task.kind == "multiclass":
        classes = targets[:, 0].astype(int)
        add(ALL, everything, lambda: intervals(classes, values, "multiclass", subjects, seed=seed))
        for number, name in enumerate(task.names):
            truth = (classes == number).astype(np.float64)
            add(name, everything, lambda truth=truth, number=number: _one_class(truth, values, number, subjects, seed))
        return scores, notes
    if task.kind == "multilabel":
        add(ALL, everything, lambda: _macro(targets, values, subjects, seed))
    for column, name in enumerate(task.names):
        rows = np.isfinite(targets[:, column])
        truth, estimate = targets[rows, column], values[rows, column]
        if task.kind == "regression":
            add(name, rows, lambda t=truth, e=estimate, r=rows: _errors(t, e, subjects[r], seed))
            continue
        add(
            name,
            rows,
            lambda t=truth, e=estimate, r=rows: intervals(
                t.astype(int), e, "binary", subjects[r], seed=seed, threshold=threshold
            ),
        )
    return scores, notes


def _bootstrap(
    statistics: dict[str, Callable[..., np.ndarray]], subjects: np.ndarray, seed: int
) -> dict[str, Interval]:
    run: Statistics = lambda weights: {name: statistic(weights) for name, statistic in statistics.items()}  # noqa: E731
    return bootstrap_all(run, subjects, seed=seed)


def _one_class(
    truth: Float64[np.ndarray, " record"], values: np.ndarray, number: int, subjects: np.ndarray, seed: int
) -> dict[str, Interval]:
    cells = 2 * truth.astype(int) + (values.argmax(axis=1) == number)
    return _bootstrap(
        {
            "auroc": lambda weights: weighted.auroc(truth, values[:, number], weights),
            "aupr": lambda weights: weighted.average_precision(truth, values[:, number], weights),
            "f1": lambda weights: weighted.f1(weighted.count_cells(cells, weights, 2))[:, 1],
        },
        subjects,
        seed,
    )


def _macro(targets: np.ndarray, values: np.ndarray, subjects: np.ndarray, seed: int) -> dict[str, Interval]:
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
    return _bootstrap({name: over_labels(measure) for name, measure in measures.items()}, subjects, seed)


def _errors(truth: np.ndarray, values: np.ndarray, subjects: np.ndarray, seed: int) -> dict[str, Interval]:
    truth = truth.astype(np.float64)
    squares = np.square(values - truth)

    def explained(weights: np.ndarray) -> np.ndarray:
        mean = weighted.mean(truth, weights)
        spread = weighted.mean(truth**2, weights) - mean**2
        spread = np.where(spread > 1e-12 * np.maximum(mean**2, 1), spread, 0.0)
        return 1 - weighted.divide(weighted.mean(squares, weights), spread)

    return _bootstrap(
        {"mse": weighted_mean(squares), "mae": weighted_mean(np.abs(values - truth)), "r2": explained}, subjects, seed
    )
