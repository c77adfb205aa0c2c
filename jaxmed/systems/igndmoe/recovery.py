"""Can the tool find out what it was built to find out? Cohorts with planted mechanisms, and what comes back.

Three questions: is the equation that made a cohort the one chosen among rivals; do the weights of the experts fall and
rise as planted; how well are stages recovered, by the number of visits and how unevenly they are spaced.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Float

from jaxmed.arrays.graphs import LaplacianKind, make_graph
from jaxmed.arrays.visits import count_values
from jaxmed.models.graph_diffusion import Equation
from jaxmed.synthesis.phantoms.connectome import Cohort, CohortConfig, random_connectome, simulate_cohort
from jaxmed.systems.igndmoe import dual
from jaxmed.systems.igndmoe.comparing import Held, choose
from jaxmed.systems.igndmoe.fitting import Fit, fit_problems, make_problem
from jaxmed.systems.igndmoe.options import FitConfig

CANDIDATES: tuple[Equation, ...] = ("ndm", "fkpp", "grand", "neural_ode_cross_node", "igndmoe")


class Planted(NamedTuple):
    """Cohorts of one kind and size.

    Attributes:
        problems: Stacked; a fifth of the subjects validates and a third is held out.
        cohorts: With their truth.
        held_out: Subjects that no fit saw.
    """

    problems: dual.Problem
    cohorts: list[Cohort]
    held_out: slice


class Slopes(NamedTuple):
    """Change of the weights over the stages where patients are.

    Attributes:
        mechanistic: Of the first expert's weight, from the first to the last of these stages.
        log_ratio: Of the logarithm of the third expert's weight over the first's.
    """

    mechanistic: Float[np.ndarray, " cohort"]
    log_ratio: Float[np.ndarray, " cohort"]


def plant(seeds: Sequence[int], nodes: int, config: CohortConfig, laplacian: LaplacianKind = "random_walk") -> Planted:
    """Simulate a cohort per seed, each on its own connectome of random points.

    Args:
        seeds: Of connectome and patients.
        nodes: Regions.
        config: Mechanisms and patients.
        laplacian: Of the fitted equations; the truth has the random walk's.
    """
    adjacencies = [random_connectome(seed, nodes).adjacency for seed in seeds]
    return plant_on(adjacencies, (0, (nodes + 1) // 2), seeds, config, laplacian)


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


def choices(planted: Planted, recipes: dict[Equation, FitConfig]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Fit every candidate to every cohort; return the model chosen for each and all held-out errors.

    Returns:
        A name per cohort, and per model the sum of squared errors of held-out subjects, (cohort,).
    """
    counts = np.asarray(count_values(planted.problems.visits))
    errors, parameters = {}, {}
    for equation, recipe in recipes.items():
        fitted = fit_problems(planted.problems, recipe, np.arange(len(planted.cohorts)))
        errors[equation] = np.asarray(fitted.errors, float)[:, planted.held_out]
        parameters[equation] = sum(leaf[0].size for leaf in jax.tree.leaves(fitted.params))
    counts = counts[:, planted.held_out]
    chosen = []
    for row in range(len(planted.cohorts)):
        held = [Held(name, parameters[name], [], found[row] / counts[row]) for name, found in errors.items()]
        chosen.append(choose(held))
    return chosen, {name: found.sum(axis=1) for name, found in errors.items()}


def weight_slopes(fitted: Fit, config: CohortConfig) -> Slopes:
    """Return how weights change between the first and the last stage at which patients are seen."""
    times, weights = np.asarray(fitted.course.times[0]), np.asarray(fitted.weights, float)
    inside = (times >= config.onset[0]) & (times <= config.onset[1])
    span = config.onset[1] - config.onset[0]

    def slope(curves: np.ndarray) -> np.ndarray:
        return span * np.array([np.polyfit(times[inside], curve[inside], 1)[0] for curve in curves])

    return Slopes(slope(weights[..., 0]), slope(np.log(weights[..., 2] / weights[..., 0])))


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
