"""Every model on the same folds and seeds: held-out errors, criteria, tests, and the simplest that is good enough."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxmed.arrays.graphs import GraphsTuple
from jaxmed.arrays.visits import Visits, count_values
from jaxmed.models.graph_diffusion import Equation
from jaxmed.solvers.fixed_grid import Trajectory
from jaxmed.systems.igndmoe.fitting import Fit, fit_runs
from jaxmed.systems.igndmoe.measures import score
from jaxmed.systems.igndmoe.options import FitConfig
from jaxmed.systems.igndmoe.results import Course

ORDER: tuple[Equation, ...] = (
    "ndm", "fkpp", "weighted_fkpp", "grand", "ndcn", "neural_ode_local", "neural_ode_cross_node", "igndmoe"
)  # fmt: skip
"""As tables list them, from what is understood to what is only fitted."""


class Held(NamedTuple):
    """Held-out results of one model.

    Attributes:
        model: Its name.
        parameters: Of its equation and seeds.
        rows: One per run: fold, seed and the measures of its held-out subjects.
        subject_errors: Mean squared error of every subject when held out, the mean over seeds.
    """

    model: str
    parameters: int
    rows: list[dict[str, float | int | None]]
    subject_errors: Float[np.ndarray, " subject"]


def make_folds(count: int, folds: int, seed: int) -> np.ndarray:
    """Assign subjects to folds of nearly equal size."""
    order = np.random.default_rng(seed).permutation(count)
    found = np.empty(count, int)
    found[order] = np.arange(count) % folds
    return found


def compare_models(
    visits: Visits,
    graph: GraphsTuple,
    seeds: tuple[int, ...],
    config: FitConfig,
    models: Sequence[Equation],
    folds: int,
    starts: int,
    on_model: Callable[[Held], None] | None = None,
) -> list[Held]:
    """Fit every model to every fold from every start; the runs of a model are one program.

    Args:
        visits: Of all subjects.
        graph: Connectome.
        seeds: Where the disease starts.
        config: Recipe; its validation share is taken from each fold's training subjects.
        models: Names.
        folds: Number of folds.
        starts: Runs per fold from different first weights.
        on_model: Called with each model's results.
    """
    count = len(visits.present)
    fold_of = make_folds(count, folds, config.seed)
    runs = [(fold, start) for fold in range(folds) for start in range(starts)]
    train = np.stack([(fold_of != fold).astype(np.float32) for fold, _ in runs])
    validation = np.zeros_like(train)
    draw = np.random.default_rng(config.seed + 1).permutation(count)
    for row in range(len(runs)):
        inside = draw[train[row, draw] > 0]
        validation[row, inside[: round(config.validation * len(inside))]] = 1
    train = train * (1 - validation)
    results = []
    for model in models:
        recipe = dataclasses.replace(config, model=dataclasses.replace(config.model, equation=model))
        numbers = np.array([config.seed + start for _, start in runs])
        fitted = fit_runs(visits, graph, recipe, seeds, train, validation, numbers)
        held = _collect(model, fitted, visits, fold_of, runs, config.stages)
        results.append(held)
        if on_model is not None:
            on_model(held)
    return results


def _collect(
    model: str, fitted: Fit, visits: Visits, fold_of: np.ndarray, runs: list[tuple[int, int]], stages: int
) -> Held:
    counts = np.asarray(count_values(visits))
    errors, rows = np.zeros(len(counts)), []
    starts = sum(fold == 0 for fold, _ in runs)
    for index, (fold, start) in enumerate(runs):
        course = Course(Trajectory(*(leaf[index] for leaf in fitted.course)), (), (0.0, 1.0), stages)
        chosen = fold_of == fold
        measures = score(course, visits, np.asarray(fitted.onsets[index]), chosen)
        rows.append({"fold": fold, "start": start, "finite": int(fitted.succeeded[index]), **measures})
        errors += np.where(chosen, np.asarray(fitted.errors[index]) / counts / starts, 0.0)
    parameters = sum(leaf[0].size for leaf in jax.tree.leaves(fitted.params))
    return Held(model, parameters, rows, errors)


def criteria(held: Held, values: int, subjects: int) -> tuple[float | None, float | None]:
    """Return AICc and BIC of Gaussian errors, the stages of subjects counted as parameters.

    Args:
        held: Held-out results; their mean squared error stands for the likelihood.
        values: Measurements, of all regions at all visits.
        subjects: Number of stages fitted.

    Returns:
        None for both where there are not more values than parameters + 1.
    """
    k = held.parameters + subjects + 1
    mse = float(np.mean([row["mse"] for row in held.rows if row["mse"] is not None]))
    if values <= k + 1 or not mse > 0:
        return None, None
    likelihood = values * np.log(mse)
    return likelihood + 2 * k + 2 * k * (k + 1) / (values - k - 1), likelihood + k * np.log(values)


def choose(results: Sequence[Held]) -> str:
    """Return the simplest model within one standard error of the lowest held-out error.

    The simplest has the fewest parameters; the standard error is that of the best model's mean over subjects.

    Source: the rule of Breiman et al. 1984, section 3.4.3.
    """
    finite = [held for held in results if np.isfinite(held.subject_errors).all()]
    best = min(finite, key=lambda held: held.subject_errors.mean())
    errors = best.subject_errors
    limit = errors.mean() + errors.std(ddof=1) / np.sqrt(len(errors))
    good = [held for held in finite if held.subject_errors.mean() <= limit]
    return min(good, key=lambda held: (held.parameters, ORDER.index(held.model))).model
