"""Which model, which mechanism: models on the same folds, what each mechanism moves, and planted cohorts."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Float

from jaxmed.arrays.graphs import GraphsTuple, LaplacianKind, make_graph
from jaxmed.arrays.visits import Visits, count_values
from jaxmed.data.splits import draw_folds
from jaxmed.models.graph_diffusion import Equation, ProgressionConfig
from jaxmed.recipes.fitted_course import score
from jaxmed.recipes.study import Outcome
from jaxmed.solvers.fixed_grid import Trajectory
from jaxmed.synthesis.phantoms.connectome import Cohort, CohortConfig, simulate_cohort
from jaxmed.systems.igndmoe.dual import FitConfig, Problem
from jaxmed.systems.igndmoe.fitting import Fit, fit_problems, fit_runs, make_problem

ORDER: tuple[Equation, ...] = (
    "ndm", "fkpp", "weighted_fkpp", "grand", "ndcn", "neural_ode_local", "neural_ode_cross_node", "igndmoe"
)  # fmt: skip
"""As tables list them, from what is understood to what is only fitted."""


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
    fold_of = draw_folds(len(subjects), folds, config.seed)
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
