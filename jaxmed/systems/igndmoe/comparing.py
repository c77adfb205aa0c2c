"""Which model, which mechanism, how sure.

Every model on the same folds and seeds, and the simplest that is good enough; weights of mechanisms with bands over
draws of subjects, and what is left when one is taken out; planted cohorts, to see what would be found.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
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
from jaxmed.recipes.fitted_course import score
from jaxmed.recipes.study import Outcome, Result
from jaxmed.recipes.study_tables import Difference, Mean, collect, compare, summarise
from jaxmed.solvers.fixed_grid import Trajectory
from jaxmed.synthesis.phantoms.connectome import Cohort, CohortConfig, simulate_cohort
from jaxmed.systems.igndmoe.dual import FitConfig, Problem
from jaxmed.systems.igndmoe.fitting import Fit, fit_problems, fit_runs, make_problem

ORDER: tuple[Equation, ...] = (
    "ndm", "fkpp", "weighted_fkpp", "grand", "ndcn", "neural_ode_local", "neural_ode_cross_node", "igndmoe"
)  # fmt: skip
"""As tables list them, from what is understood to what is only fitted."""
MEASURES = ("sse", "r", "mse", "r2")
"""Of a run; see `metrics.regional.score_regions`."""


def make_folds(count: int, folds: int, seed: int) -> np.ndarray:
    """Assign subjects to folds of nearly equal size."""
    order = np.random.default_rng(seed).permutation(count)
    found = np.empty(count, int)
    found[order] = np.arange(count) % folds
    return found


def hold_out(
    visits: Visits,
    subjects: Sequence[str],
    graph: GraphsTuple,
    seeds: tuple[int, ...],
    config: FitConfig,
    model: Equation,
    folds: int,
    starts: int,
) -> dict[tuple[int, int], Outcome]:
    """Fit a model to every fold from every start, as one program, and score the subjects that were held out.

    Args:
        visits: Of all subjects.
        subjects: Their names.
        graph: Connectome.
        seeds: Where the disease starts.
        config: Recipe; its validation share is taken from each fold's training subjects.
        model: Name.
        folds: Number of folds.
        starts: Runs per fold from different first weights.

    Returns:
        By fold and start: the measures of the run, what is not defined left out; and the mean squared error of every
        subject.
    """
    fold_of = make_folds(len(subjects), folds, config.seed)
    runs = [(fold, start) for fold in range(folds) for start in range(starts)]
    train = np.stack([(fold_of != fold).astype(np.float32) for fold, _ in runs])
    validation = np.zeros_like(train)
    draw = np.random.default_rng(config.seed + 1).permutation(len(subjects))
    for row in range(len(runs)):
        inside = draw[train[row, draw] > 0]
        validation[row, inside[: round(config.validation * len(inside))]] = 1
    recipe = dataclasses.replace(config, model=dataclasses.replace(config.model, equation=model))
    numbers = np.array([config.seed + start for _, start in runs])
    fitted = fit_runs(visits, graph, recipe, seeds, train * (1 - validation), validation, numbers)
    errors = np.asarray(fitted.errors) / np.asarray(count_values(visits))
    parameters, found = sum(leaf[0].size for leaf in jax.tree.leaves(fitted.params)), {}
    for index, (fold, start) in enumerate(runs):
        held = Trajectory(*(leaf[index] for leaf in fitted.trajectory))
        measures = score(held, visits, np.asarray(fitted.onsets[index]), fold_of == fold)
        defined = {name: value for name, value in measures.items() if value is not None and np.isfinite(value)}
        metrics = {"finite": int(fitted.succeeded[index]), "parameters": parameters, **defined}
        own = ((subjects[one], float(errors[index, one])) for one in map(int, np.flatnonzero(fold_of == fold)))
        rows = [{"subject": name, "error": error if math.isfinite(error) else None} for name, error in own]
        found[fold, start] = Outcome(metrics, rows)
    return found


def tabulate(results: Sequence[Result], subjects: int, seed: int) -> tuple[list[Mean], tuple[Difference, ...], str]:
    """Return means of the runs' measures, tests of every model against the best, and the model to choose.

    Args:
        results: Of `hold_out`, by model, fold and start; models that have a run that is not finite are not tested.
        subjects: How many there are.
        seed: Seed for resampling them.
    """
    measures = [name for name in ("parameters", *MEASURES) if any(name in result.metrics for result in results)]
    means = [row for name in measures for row in summarise(results, ("model",), name)]
    parameters = {str(row.group[0][1]): round(row.mean) for row in means if row.measure == "parameters"}
    errors = {}
    for model in parameters:
        own = [result for result in results if result.cell["model"] == model]
        if all(result.metrics["finite"] for result in own):
            (found,) = collect(own, (), "error", is_per_subject=True).values()
            errors |= {model: np.array([*found.values()])} if len(found) == subjects else {}
    best, chosen = choose(errors, parameters)
    finite = [result for result in results if result.cell["model"] in errors]
    return means, compare(finite, (), best, "error", arm="model", seed=seed, test="wilcoxon"), chosen


def choose(errors: Mapping[str, Float[np.ndarray, " subject"]], parameters: Mapping[str, int]) -> tuple[str, str]:
    """Return the model of the lowest held-out error, and the simplest within one standard error of it.

    The simplest has the fewest parameters; the standard error is that of the best model's mean over subjects.

    Args:
        errors: Mean squared error of every subject when held out, by model; one that is not finite is not chosen.
        parameters: Of each model.

    Source: the rule of Breiman et al. 1984, section 3.4.3.
    """
    means = {model: found.mean() for model, found in errors.items() if np.isfinite(found).all()}
    best = min(means, key=lambda model: means[model])
    limit = means[best] + errors[best].std(ddof=1) / np.sqrt(len(errors[best]))
    good = [model for model, mean in means.items() if mean <= limit]
    return best, min(good, key=lambda model: (parameters[model], [*ORDER].index(model)))


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
    if not model.match_release:
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
