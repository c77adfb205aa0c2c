"""Predictions against the labels of a manifest, where it has them."""

import math
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


def read_targets(
    rows: list[dict[str, str]], task: Task, columns: tuple[str, ...] = ()
) -> Float[np.ndarray, "row column"] | None:
    """Return what the manifest says of each row: 0 or 1 per label, a class number, or values; NaN where empty.

    Args:
        rows: Of the manifest.
        task: What the outputs mean. Of a binary task whose name is a word, one other word stands for 0.
        columns: Where the labels are: one for a multi-class task, else one per output. Where empty, those of the
            outputs' names; "label" for a multi-class task, and where a single output has no column of its name.

    Returns:
        None where there are no such columns and none were asked for.

    Raises:
        InputError: A column that was asked for is not there, or a cell is not a label of this task.
    """
    number = 1 if task.kind == "multiclass" else len(task.names)
    if columns and len(columns) != number:
        raise InputError("label.columns", f"{number}, for {', '.join(task.names)}", f"{', '.join(columns)}")
    present = rows[0] if rows else {}
    found = columns or (("label",) if task.kind == "multiclass" else task.names)
    if not columns and number == 1 and found[0] not in present:
        found = ("label",)
    missing = [name for name in found if name not in present]
    if missing and columns:
        raise InputError("label.columns", f"columns of the manifest, {', '.join(present)}", f"'{missing[0]}'")
    if missing:
        return None
    values = [_read_column([row[column] for row in rows], column, task, place) for place, column in enumerate(found)]
    return np.array(values, np.float64).T


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


def _read_column(cells: list[str], column: str, task: Task, place: int) -> list[float]:
    name = task.names[place]
    # A word that stands for the negative class: what is neither the positive one nor a number.
    others = {cell for cell in cells if cell.lower() not in MISSING and cell != name and _number(cell) is None}
    negative = next(iter(others)) if task.kind == "binary" and len(others) == 1 else None
    values = []
    for cell in cells:
        number = _number(cell)
        plain = str(int(number)) if number is not None and number == int(number) else cell
        if cell.lower() in MISSING:
            values.append(math.nan)
        elif task.kind == "multiclass" and (cell in task.names or plain in task.names):
            values.append(float(task.names.index(cell if cell in task.names else plain)))
        elif task.kind == "regression" and number is not None:
            values.append(number)
        elif task.kind in ("binary", "multilabel") and (cell in (name, negative) or number in (0.0, 1.0)):
            values.append(float(cell == name) if number is None else number)
        else:
            kinds = {"multiclass": f"one of {', '.join(task.names)}", "regression": "a number"}
            expected = kinds.get(task.kind, f"0, 1 or '{name}'")
            raise InputError(f"column {column}", expected, f"'{cell}'", "or leave the cell empty")
    return values


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


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
