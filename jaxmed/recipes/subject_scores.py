"""Subjects with several images, and what is known of them beside: images averaged, and covariates as a baseline.

Of a subject's images, such as those of two eyes, the predicted probabilities are averaged before anything is scored.
Covariates, such as age and sex, are never seen by the network. Instead two logistic regressions are fitted, on the
covariates alone and on them with the network's log odds beside them: what the images add is the difference. Both are
fitted on the validation set, since the network's log odds of the scans it was trained on are too good, and scored on
the others.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special
from jaxtyping import Float, Float64, Int
from sklearn.linear_model import LogisticRegression

from jaxmed.arrays.task import Task, TaskKind
from jaxmed.data.cohort import Cohort
from jaxmed.errors import InputError
from jaxmed.metrics import weighted
from jaxmed.metrics.cohort import Score
from jaxmed.metrics.statistics import bootstrap

PENALTY = 100.0
"""Factor C on the sum of the losses beside half the squared norm of the coefficients, of standardised columns: hardly a
penalty, it keeps them finite where classes can be told without an error."""
FITTED_ON = "validation"
BASELINE, BOTH = "covariates", "covariates + model"


class Predicted(NamedTuple):
    """A set, and a model's outputs for it, a row per image or per subject."""

    name: str
    cohort: Cohort
    logits: Float[np.ndarray, "record output"]


def merge_images(cohort: Cohort, where: object) -> Cohort:
    """Return a cohort with one record per subject, in the order of their names.

    Its scan and written labels are the first image's, its covariates their mean.

    Args:
        cohort: With a record per image.
        where: The table, for messages.

    Raises:
        InputError: Two images of a subject have different labels.
    """
    names, first, place = np.unique(cohort.subjects, return_index=True, return_inverse=True)
    targets = np.full((len(names), cohort.targets.shape[1]), np.nan, np.float32)
    for row, own in enumerate(place):
        known = np.isfinite(cohort.targets[row])
        if (known & np.isfinite(targets[own]) & (cohort.targets[row] != targets[own])).any():
            told = " and ".join("/".join(cohort.cells[other]) for other in (first[own], row))
            expected = f"one label for all images of subject '{names[own]}'"
            raise InputError(where, expected, told, "correct it, or score images: --average image")
        targets[own] = np.where(known, cohort.targets[row], targets[own])
    merged = cohort.take(first)
    return merged._replace(targets=targets, covariates=_means(cohort.covariates, place, len(names)))


def average_images(
    kind: TaskKind, logits: Float[np.ndarray, "record output"], cohort: Cohort
) -> Float64[np.ndarray, "subject output"]:
    """Return outputs whose probabilities are the means over each subject's images; of a regression their means.

    Args:
        kind: Of the task.
        logits: Of the images.
        cohort: Whose they are; subjects come in the order of their names.
    """
    names, place = np.unique(cohort.subjects, return_inverse=True)
    logits, count = logits.astype(np.float64), np.bincount(place)[:, None]

    def log_mean(values: np.ndarray) -> np.ndarray:
        total = np.full((len(names), values.shape[1]), -np.inf)
        np.logaddexp.at(total, place, values)
        return total - np.log(count)

    match kind:
        case "multiclass":
            return log_mean(scipy.special.log_softmax(logits, axis=1))
        case "regression":
            return _means(logits, place, len(names))
    return log_mean(scipy.special.log_expit(logits)) - log_mean(scipy.special.log_expit(-logits))


def by_subject(task: Task, one: Predicted) -> Predicted:
    """Return a set with one row per subject.

    Raises:
        InputError: As of `merge_images`.
    """
    return Predicted(one.name, merge_images(one.cohort, one.name), average_images(task.kind, one.logits, one.cohort))


def score_covariates(task: Task, sets: Sequence[Predicted], seed: int) -> tuple[dict[str, list[Score]], list[str]]:
    """Score covariates alone, and beside a model's log odds, on every set but that on which they are fitted.

    Args:
        task: Binary, multiclass (each class against the rest) or multilabel.
        sets: All sets; the regressions are fitted on FITTED_ON.
        seed: Seed of the resamples.

    Returns:
        By set, AUROCs with intervals over subjects, under the labels BASELINE and BOTH, followed by the class or label
        where there are several; and what could not be scored, in words. Records without a label or with a missing
        covariate are left out.
    """
    scores: dict[str, list[Score]] = {one.name: [] for one in sets}
    notes = [f"The regressions on covariates were fitted on the {FITTED_ON} set, and are scored on the others."]
    known = {one.name: one for one in sets}
    if FITTED_ON not in known:
        return scores, [f"Covariates were not scored: there is no {FITTED_ON} set to fit them on."]
    for number, name in enumerate(task.names):
        ending = f", {name}" if len(task.names) > 1 else ""
        rows = _rows(task, known[FITTED_ON], number)
        if len(set(rows.truth.tolist())) < 2:
            notes.append(f"{BASELINE}{ending}: one class only in the {FITTED_ON} set, or no covariates are known there")
            continue
        for label, columns in ((BASELINE, slice(1, None)), (BOTH, slice(None))):
            predict = _fit(rows.columns[:, columns], rows.truth)
            for one in sets:
                if one.name == FITTED_ON:
                    continue
                other = _rows(task, one, number)
                found = _score(label + ending, other, predict(other.columns[:, columns]), seed)
                if isinstance(found, Score):
                    scores[one.name].append(found)
                else:
                    notes.append(f"{one.name}, {label}{ending}: {found}")
    return scores, notes


class _Rows(NamedTuple):
    """What a regression takes: the model's log odds and the covariates, 0 or 1, and whose they are."""

    columns: Float64[np.ndarray, "row column"]
    truth: Int[np.ndarray, " row"]
    subjects: np.ndarray


def _rows(task: Task, one: Predicted, number: int) -> _Rows:
    logits = one.logits.astype(np.float64)
    if task.kind == "multiclass":
        truth = np.where(np.isfinite(one.cohort.targets[:, 0]), one.cohort.targets[:, 0] == number, np.nan)
        odds = logits[:, number] - np.logaddexp.reduce(np.delete(logits, number, axis=1), axis=1)
    else:
        truth, odds = one.cohort.targets[:, number], logits[:, number]
    columns = np.concatenate([odds[:, None], one.cohort.covariates.astype(np.float64)], axis=1)
    kept = np.isfinite(truth) & np.isfinite(columns).all(axis=1)
    return _Rows(columns[kept], truth[kept].astype(np.int64), one.cohort.subjects[kept])


def _fit(columns: np.ndarray, truth: np.ndarray) -> Any:
    """Return the function from columns to log odds of a logistic regression."""
    mean, spread = columns.mean(axis=0), columns.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    model = LogisticRegression(C=PENALTY, max_iter=10_000).fit((columns - mean) / spread, truth)
    return lambda other: model.decision_function((other - mean) / spread) if len(other) else np.zeros(0)


def _score(label: str, rows: _Rows, odds: np.ndarray, seed: int) -> Score | str:
    """Return the AUROC with its interval, or why there is none."""
    if len(set(rows.truth.tolist())) < 2:
        return "one class only among the records whose covariates are known"
    truth = rows.truth.astype(np.float64)
    try:
        found = bootstrap(lambda weights: weighted.auroc(truth, odds, weights), rows.subjects, seed=seed)
    except InputError as error:
        return str(error)
    return Score(label, "auroc", found, len(truth), len(set(rows.subjects.tolist())))


def _means(values: np.ndarray, place: np.ndarray, number: int) -> np.ndarray:
    """Return the mean of each subject's rows, of what is known of them; NaN where nothing is."""
    known = np.isfinite(values)
    total, count = (np.zeros((number, values.shape[1])) for _ in range(2))
    np.add.at(total, place, np.where(known, values, 0))
    np.add.at(count, place, known)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(values.dtype)
