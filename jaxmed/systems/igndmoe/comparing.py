"""Which model, which mechanism, how sure.

Every model on the same folds and seeds, and the simplest that is good enough; weights of mechanisms with bands over
draws of subjects, and what is left when one is taken out; planted cohorts, to see what would be found.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Float

from jaxmed.arrays.graphs import GraphsTuple, LaplacianKind, make_graph
from jaxmed.arrays.types import KeyArray
from jaxmed.arrays.visits import Visits, count_values
from jaxmed.models.graph_diffusion import Equation, ProgressionConfig
from jaxmed.solvers.fixed_grid import Trajectory
from jaxmed.synthesis.phantoms.connectome import Cohort, CohortConfig, simulate_cohort
from jaxmed.systems.igndmoe.cohort_fit import FittedTrajectory, score
from jaxmed.systems.igndmoe.dual import FitConfig, Problem
from jaxmed.systems.igndmoe.fitting import Fit, fit_problems, fit_runs, make_problem

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
        held = FittedTrajectory(Trajectory(*(leaf[index] for leaf in fitted.trajectory)), stages=stages)
        chosen = fold_of == fold
        measures = score(held, visits, np.asarray(fitted.onsets[index]), chosen)
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


def best_of(results: Sequence[Held]) -> tuple[Held, list[Held]]:
    """Return the model of the lowest held-out error, and all whose errors are finite."""
    finite = [held for held in results if np.isfinite(held.subject_errors).all()]
    return min(finite, key=lambda held: held.subject_errors.mean()), finite


def choose(results: Sequence[Held]) -> str:
    """Return the simplest model within one standard error of the lowest held-out error.

    The simplest has the fewest parameters; the standard error is that of the best model's mean over subjects.

    Source: the rule of Breiman et al. 1984, section 3.4.3.
    """
    best, finite = best_of(results)
    errors = best.subject_errors
    limit = errors.mean() + errors.std(ddof=1) / np.sqrt(len(errors))
    good = [held for held in finite if held.subject_errors.mean() <= limit]
    return min(good, key=lambda held: (held.parameters, ORDER.index(held.model))).model


# --- Mechanisms ---------------------------------------------------------------------------------

IDENTIFIABLE = ProgressionConfig(structure="incidence", local="per_region", clock=False, width=8, latent=4)
"""A mixture whose experts cannot stand in for each other: edges only move what is there, the reaction sees one region
at a time, and neither sees the time, so that what changes with stage must show in the weights."""

ATTRIBUTION = FitConfig(
    model=IDENTIFIABLE,
    grid_steps=32,
    loops=12,
    steps=50,
    norm_weight=1e-3,
    overlap_weight=0.0,
    tolerance=0.0,
    patience=12,
)
"""For weights that are to be read. On the specification's simulator (200 patients, noise 0.03) they change as planted
with this and not with the paper's experts, which fit as well whatever the weights: one that sees all regions and the
time can be any function along a single course. The overlap is not penalised, because mechanisms in nature may look
alike (logistic growth and a local reaction do), and every round is done, because weights settle after the error."""
LOW, HIGH = 5.0, 95.0
"""Percentiles of the bands."""


class Bands(NamedTuple):
    """Percentiles over bootstrap draws.

    Attributes:
        middle: Median.
        low: 5th percentile.
        high: 95th percentile.
    """

    middle: Float[np.ndarray, "*row column"]
    low: Float[np.ndarray, "*row column"]
    high: Float[np.ndarray, "*row column"]


def draw_weights(key: KeyArray, train: Float[np.ndarray, " subject"], draws: int) -> Float[np.ndarray, "run subject"]:
    """Return weights of runs: the cohort itself, then draws of its training subjects with replacement."""
    inside = np.flatnonzero(train > 0)
    weights = np.zeros((draws + 1, len(train)), np.float32)
    weights[0] = train
    weights[1:, inside] = bootstrap_weights(key, len(inside), draws)
    return weights


def bands(values: Float[np.ndarray, "draw *row column"]) -> Bands:
    """Return the median and the ends of the 90% band over draws."""
    low, middle, high = np.percentile(values, [LOW, 50.0, HIGH], axis=0)
    return Bands(middle, low, high)


def contributions(fit: Fit) -> Float[np.ndarray, "run time expert"]:
    """Return each mechanism's share of what moves an average region: weight x size of its rate, summing to 1.

    A weight alone says little, since a network can grow while its weight shrinks; their product is what counts.
    """
    size = np.sqrt(np.mean(np.square(np.asarray(fit.experts, float)), axis=-1)) * np.asarray(fit.weights, float)
    return size / np.maximum(size.sum(axis=-1, keepdims=True), 1e-12)


def ablations(model: ProgressionConfig) -> dict[str, ProgressionConfig]:
    """Return the mixture, and what is left when a part is taken out."""
    change = dataclasses.replace
    found = {
        "complete": model,
        "weights that do not change with stage": change(model, gate="constant"),
        "mechanistic alone": change(model, equation="fkpp"),
        "mechanistic without growth": change(model, reaction=False),
    }
    if not model.quirks:
        found["without graph diffusion"] = change(model, structure="none")
        found["without local reaction"] = change(model, local="none")
    return found


def bootstrap_weights(key: KeyArray, count: int, draws: int) -> Float[np.ndarray, "draw subject"]:
    """Draw subjects with replacement; return how often each is drawn."""
    chosen = jax.random.randint(key, (draws, count), 0, count)
    return np.asarray(jax.vmap(lambda row: jnp.bincount(row, length=count))(chosen), np.float32)


# --- Planted cohorts ----------------------------------------------------------------------------


class Planted(NamedTuple):
    """Cohorts of one kind and size.

    Attributes:
        problems: Stacked; a fifth of the subjects validates and a third is held out.
        cohorts: With their truth.
        held_out: Subjects that no fit saw.
    """

    problems: Problem
    cohorts: list[Cohort]
    held_out: slice


def plant_on(
    adjacencies: Sequence[Float[np.ndarray, "region region"]],
    start: tuple[int, ...],
    seeds: Sequence[int],
    config: CohortConfig,
    laplacian: LaplacianKind = "random_walk",
) -> Planted:
    """Simulate a cohort on every connectome.

    Args:
        adjacencies: Symmetric, not negative, of one size.
        start: Regions where the disease starts.
        seeds: Of the patients, one per connectome.
        config: Mechanisms and patients.
        laplacian: Of the fitted equations; the truth has the random walk's.
    """
    fifth = config.subjects // 5
    held_out = slice(fifth, fifth + config.subjects // 3)
    validation, train = np.zeros(config.subjects, np.float32), np.ones(config.subjects, np.float32)
    validation[:fifth], train[: held_out.stop] = 1, 0
    num_edges = max(int(np.count_nonzero(np.triu(adjacency))) for adjacency in adjacencies)
    cohorts, problems = [], []
    for seed, adjacency in zip(seeds, adjacencies, strict=True):
        cohorts.append(simulate_cohort(jax.random.key(seed), adjacency, start, config))
        graph = make_graph(adjacency, laplacian, num_edges)
        problems.append(make_problem(cohorts[-1].visits, graph, start, train, validation))
    return Planted(jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems), cohorts, held_out)


def stage_correlations(fitted: Fit, cohorts: Sequence[Cohort]) -> Float[np.ndarray, " cohort"]:
    """Return Spearman's correlation of estimated with planted stages."""
    pairs = zip(np.asarray(fitted.onsets), cohorts, strict=True)
    return np.array([scipy.stats.spearmanr(found, cohort.onsets)[0] for found, cohort in pairs])


def stage_curve(
    planted_as: Callable[[CohortConfig], Planted],
    config: CohortConfig,
    recipe: FitConfig,
    visits: Sequence[int],
    irregularities: Sequence[float],
) -> list[dict[str, float]]:
    """Return stage recovery by the visits of each patient and how unevenly they are spaced.

    Args:
        planted_as: Simulates cohorts as a configuration says.
        config: Mechanisms and patients; visits and gaps are replaced.
        recipe: Of the fits.
        visits: Of each patient.
        irregularities: Gaps are uniform on m (1 +- irregularity), m the middle of the configuration's; below 1.

    Returns:
        A row per number of visits and irregularity: Spearman's correlation of estimated with planted stages, its mean
        and its lowest over cohorts, and the mean absolute error in years.
    """
    rows = []
    middle = sum(config.gap) / 2
    for count in visits:
        # One visit has no gaps.
        for irregularity in irregularities if count > 1 else irregularities[:1]:
            gap = (middle * (1 - irregularity), middle * (1 + irregularity))
            planted = planted_as(dataclasses.replace(config, most_visits=count, every_visit=True, gap=gap))
            fitted = fit_problems(planted.problems, recipe, np.arange(len(planted.cohorts)))
            found = stage_correlations(fitted, planted.cohorts)
            years = [np.abs(np.asarray(fitted.onsets[i]) - c.onsets).mean() for i, c in enumerate(planted.cohorts)]
            rows.append(
                {
                    "visits": count,
                    "irregularity": irregularity,
                    "spearman": float(found.mean()),
                    "lowest": float(found.min()),
                    "years": float(np.mean(years)),
                }
            )
    return rows
