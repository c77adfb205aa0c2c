"""What a run of adapt leaves behind: predictions of every set, how good they are, and what could not be read."""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmed.arrays.task import Task, predict_values, standardise
from jaxmed.data.cohort import Cohort
from jaxmed.data.inputs import PreparedField, input_source
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.records import ForgivingSource
from jaxmed.io.tables import write_table
from jaxmed.metrics.cohort import Score, score_set
from jaxmed.objectives.supervised import task_losses
from jaxmed.recipes.adapt import AdaptConfig, Adapted, score
from jaxmed.train.log import Log

FAILED_COLUMNS = ("path", "set", "reason")
METRIC_COLUMNS = ("set", "group", "label", "measure", "estimate", "low", "high", "undefined", "records", "subjects")


class Scored(NamedTuple):
    """A set that was scored.

    Attributes:
        name: "validation", "test" or an external set's.
        group: One of `labels.GROUPS`.
        cohort: Its scans that could be read.
        logits: Of these.
        scores: How well it went.
        failed: Files that could not be read, and why.
    """

    name: str
    group: str
    cohort: Cohort
    logits: Float[np.ndarray, "record output"]
    scores: list[Score]
    failed: list[tuple[Path, str]]


def score_cohort(
    recipe: AdaptConfig,
    adapted: Adapted,
    preprocess: Preprocess,
    task: Task,
    name: str,
    group: str,
    cohort: Cohort,
    threshold: float,
    log: Log,
) -> tuple[Scored, list[str]]:
    """Predict a set and score it; files that cannot be read are left out and told.

    Args:
        recipe: Of the run; its loader reads, its seed resamples.
        adapted: The model.
        preprocess: A file to a cube.
        task: What the outputs mean.
        name: Of the set.
        group: One of `labels.GROUPS`.
        cohort: Its scans.
        threshold: Probability from which a binary label counts as predicted.
        log: Of the run.

    Returns:
        The set, and in words what could not be scored.
    """
    log.say(f"Scoring {len(cohort.scans):,} scans of {name}.")
    source = ForgivingSource(input_source(cohort.scans, preprocess), (*preprocess.size, 1))
    # Reasons are noted where records are read, which has to be this process.
    reading = dataclasses.replace(recipe, loader=dataclasses.replace(recipe.loader, num_workers=0))
    logits = score(reading, adapted.config, adapted.params, source, PreparedField(preprocess))
    failed = [(cohort.paths[row], reason) for row, reason in sorted(source.reasons.items())]
    for _, reason in failed:
        log.say(f"Failed: {reason}")
    kept = np.array([row for row in range(len(cohort.scans)) if row not in source.reasons], np.int64)
    read, notes = cohort.take(kept), []
    scores: list[Score] = []
    if len(kept):
        found = jnp.asarray(logits[kept])
        losses = task_losses(task.kind, found, jnp.asarray(standardise(read.targets, task)))
        scores, notes = score_set(
            task, read.targets, np.asarray(predict_values(found, task)), read.subjects, seed=recipe.seed,
            threshold=threshold, losses=np.asarray(losses),
        )  # fmt: skip
    return Scored(name, group, read, logits[kept], scores, failed), notes


def write_tables(folder: Path, sets: list[Scored], adapted: Adapted, task: Task) -> int:
    """Write predictions, metrics, choices of a probe, and what failed. Returns the number of failed scans."""
    prefix = "value" if task.kind == "regression" else "probability"
    labels = (
        ["label"] if len(task.names) == 1 or task.kind == "multiclass" else [f"label_{name}" for name in task.names]
    )
    outputs = [f"{prefix}_{name}" for name in task.names]
    rows: list[dict[str, Any]] = []
    for one in sets:
        values = np.asarray(predict_values(jnp.asarray(one.logits), task))
        for number, path in enumerate(one.cohort.paths):
            row = {"path": path, "subject": one.cohort.subjects[number], "set": one.name, "group": one.group}
            row |= dict(zip(labels, one.cohort.cells[number], strict=True))
            rows.append(row | {name: f"{value:.9g}" for name, value in zip(outputs, values[number], strict=True)})
    write_table(folder / "predictions.csv", ["path", "subject", "set", "group", *labels, *outputs], rows)
    metrics = [
        {"set": one.name, "group": one.group, "label": found.label, "measure": found.measure,
         "estimate": found.interval.estimate, "low": _finite(found.interval.low), "high": _finite(found.interval.high),
         "undefined": found.interval.num_undefined, "records": found.records, "subjects": found.subjects}
        for one in sets for found in one.scores
    ]  # fmt: skip
    write_table(folder / "metrics.csv", METRIC_COLUMNS, metrics)
    if adapted.choices:
        write_table(folder / "probe.csv", list(adapted.choices[0]), adapted.choices)
    failed = [{"path": path, "set": one.name, "reason": reason} for one in sets for path, reason in one.failed]
    if failed:
        write_table(folder / "failed.csv", FAILED_COLUMNS, failed)
    return len(failed)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
