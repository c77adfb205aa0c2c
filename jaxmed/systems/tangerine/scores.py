"""Predictions against the labels of a manifest, where it has them."""

from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from jaxmed.errors import InputError
from jaxmed.metrics.classification import intervals
from jaxmed.metrics.statistics import Interval, bootstrap_all, one_by_one, weighted_mean
from jaxmed.models.heads import Task

MISSING = ("", "na", "nan")
SHOWN = {
    "binary": ("auroc", "aupr", "accuracy", "sensitivity", "specificity", "brier"),
    "multiclass": ("auroc_macro", "accuracy", "balanced_accuracy", "brier"),
}


def read_targets(rows: list[dict[str, str]], task: Task) -> Float[np.ndarray, "row column"] | None:
    """Return what the manifest says of each row: 0 or 1 per label, a class number, or values; NaN where empty.

    A binary task and a regression of one target read the column of their name, or else "label"; a multi-class task
    reads "label", which holds names of classes; other tasks read a column per name.

    Returns:
        None where the columns are not there.

    Raises:
        InputError: A cell is not a label of this task.
    """
    columns = [_column(rows, task, name) for name in (("label",) if task.kind == "multiclass" else task.names)]
    if any(column is None for column in columns):
        return None
    return np.array([[_value(row[str(c)], str(c), task, n) for n, c in enumerate(columns)] for row in rows], np.float64)


def score_rows(
    targets: Float[np.ndarray, "row column"],
    values: Float[np.ndarray, "row output"],
    task: Task,
    subjects: Shaped[np.ndarray, " row"],
    threshold: float,
    seed: int,
) -> dict[str, Interval]:
    """Score predictions with bootstrap intervals over subjects; rows without a label are left out.

    Returns:
        Measures by name; of a multi-label task "auroc/NAME" and so on.

    Raises:
        InputError: There are too few rows, or one class only.
    """
    found: dict[str, Interval] = {}
    for column in range(targets.shape[1]):
        known = np.isfinite(targets[:, column])
        truth, who = targets[known, column], subjects[known]
        ending = f"/{task.names[column]}" if targets.shape[1] > 1 else ""
        if task.kind == "regression":
            measures = _regression(truth, values[known, column].astype(np.float64), who, seed)
        elif task.kind == "multiclass":
            measures = intervals(truth, values[known], "multiclass", who, seed=seed)
        else:
            chosen = values[known, column]
            measures = intervals(truth, chosen, "binary", who, seed=seed, threshold=threshold)
        shown = SHOWN.get("multiclass" if task.kind == "multiclass" else "binary", ())
        found |= {name + ending: measures[name] for name in (shown if task.kind != "regression" else measures)}
    return found


def _column(rows: list[dict[str, str]], task: Task, name: str) -> str | None:
    for candidate in (name, "label") if len(task.names) == 1 else (name,):
        if rows and candidate in rows[0]:
            return candidate
    return None


def _value(cell: str, column: str, task: Task, place: int) -> float:
    if cell.lower() in MISSING:
        return float("nan")
    if task.kind == "multiclass":
        if cell in task.names:
            return float(task.names.index(cell))
        raise InputError(f"column {column}", f"one of {', '.join(task.names)}", f"'{cell}'")
    if task.kind != "regression" and cell == task.names[place]:
        return 1.0
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value) or (task.kind != "regression" and value not in (0.0, 1.0)):
        expected = "a number" if task.kind == "regression" else f"0, 1 or '{task.names[place]}'"
        raise InputError(f"column {column}", expected, f"'{cell}'")
    return value


def _regression(
    truth: Float[np.ndarray, " row"], values: Float[np.ndarray, " row"], subjects: Shaped[np.ndarray, " row"], seed: int
) -> dict[str, Interval]:
    if len(truth) < 3 or not np.ptp(truth):
        raise InputError("label", "three or more values that differ", f"{len(truth)} of {len(set(truth))} kinds")

    def correlate(rows: np.ndarray) -> float:
        x, y = truth[rows], values[rows]
        return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else float("nan")

    statistics: dict[str, Any] = {
        "mean_absolute_error": weighted_mean(np.abs(values - truth)),
        "bias": weighted_mean(values - truth),
        "correlation": one_by_one(correlate),
    }
    return bootstrap_all(
        lambda weights: {name: statistic(weights) for name, statistic in statistics.items()}, subjects, seed=seed
    )
