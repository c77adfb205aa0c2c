"""Fit a cohort: one run, or folds, seeds and bootstrap draws as one program."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmed.arrays.graphs import GraphsTuple, regional_map
from jaxmed.arrays.tracing import require_values
from jaxmed.arrays.types import Params
from jaxmed.arrays.visits import Visits, is_measured, mark_missing, pad_visits
from jaxmed.metrics.regional import row_correlations
from jaxmed.models.graph_diffusion import make_progression_model
from jaxmed.recipes.regional_map import MapScore
from jaxmed.solvers.fixed_grid import Trajectory
from jaxmed.systems.igndmoe import dual
from jaxmed.systems.igndmoe.alignment import align
from jaxmed.systems.igndmoe.dual import FitConfig


class Fit(NamedTuple):
    """A fitted course and where subjects are on it; with a leading axis for many runs.

    Attributes:
        params: Parameters of the equation and the seeds, from the round that validation preferred.
        trajectory: States and their slopes from stage 0 to the horizon.
        experts: Rates of the experts along the course, before their weights.
        weights: Weights of the experts along the course.
        onsets: Stage of each subject's first visit, in years.
        errors: Sum of squared errors of each subject.
        clipped: Whether a subject's stage lies at an end of the course.
        rounds: Rounds done.
        succeeded: Whether all numbers are finite.
    """

    params: Params
    trajectory: Trajectory
    experts: Float[Array, "*run time expert region"]
    weights: Float[Array, "*run time expert"]
    onsets: Float[Array, "*run subject"]
    errors: Float[Array, "*run subject"]
    clipped: Bool[Array, "*run subject"]
    rounds: Int[Array, "*run"]
    succeeded: Bool[Array, "*run"]


def fit(
    visits: Visits, graph: GraphsTuple, config: FitConfig = FitConfig(), seeds: tuple[int, ...] | None = None
) -> Fit:
    """Fit the course of a disease to the visits of a cohort: the host's driver, which stops when the fit has settled.

    It looks at numbers between rounds, so it runs compiled programs and cannot itself be traced: under `jax.jit` or
    `jax.vmap` call `fit_on_device`, which also says what has a derivative.

    Args:
        visits: Regional values on [0, 1], NaN where not measured, and years since the first visit.
        graph: Connectome, from `arrays.graphs.make_graph`.
        config: Equation and recipe; a share of subjects is kept for early stopping.
        seeds: Numbers of the regions where the disease starts. None takes the one with the highest mean value, a guess
            that knows nothing of anatomy: give them where they are known, for tau the two entorhinal ones.

    Raises:
        InputError: It is traced.
        ValueError: There is a seed that is no region.
    """
    require_values("igndmoe.fit", "igndmoe.fit_on_device", visits=visits, graph=graph)
    train, validation = _keep_validation(len(visits.present), config)
    runs = fit_runs(visits, graph, config, seeds, train[None], validation[None], np.array([config.seed]))
    return jax.tree.map(lambda leaf: leaf[0], runs)


def fit_on_device(
    visits: Visits, graph: GraphsTuple, config: FitConfig = FitConfig(), seeds: tuple[int, ...] | None = None
) -> Fit:
    """Fit as `fit` does, in one function to trace: for `jax.jit`, and `jax.vmap` over cohorts and graphs.

    Rounds that a settled fit no longer needs are computed and dropped. It has no derivative and says so: a grid of
    rates is searched and steps are kept or not, so that a fit changes in jumps. What has one is each part of it, with
    stages by the implicit function theorem: `alignment.align`, `alignment.profiled_error`, `dual.solve_equation`.

    Args:
        visits: As in `fit`, but values are finite: `arrays.visits.mark_missing` sets apart what was not measured.
        graph: Connectome.
        config: Equation and recipe, static.
        seeds: As in `fit`, static.

    Raises:
        ValueError: It is differentiated, or there is a seed that is no region.
    """
    train, validation = _keep_validation(len(visits.present), config)

    @jax.custom_jvp
    def run(visits: Visits, graph: GraphsTuple) -> Fit:
        problem = make_problem(visits, graph, seeds, train, validation)
        state = dual.init(jax.random.key(config.seed), problem, config)
        state, _ = jax.lax.scan(lambda s, _: (dual.step(s, problem, config)[0], None), state, length=config.loops)
        return _finish(state, problem, config)

    @run.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise ValueError(
            "igndmoe.fit_on_device: expected no derivative of a whole fit, which changes in jumps; differentiate "
            "alignment.align or alignment.profiled_error"
        )

    return run(visits, graph)


def _keep_validation(count: int, config: FitConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return weights of subjects in the loss and in early stopping."""
    validation = np.zeros(count, np.float32)
    validation[np.random.default_rng(config.seed).permutation(count)[: round(config.validation * count)]] = 1
    return 1 - validation, validation


def fit_runs(
    visits: Visits,
    graph: GraphsTuple,
    config: FitConfig,
    seeds: tuple[int, ...] | None,
    train: Float[np.ndarray, "run subject"],
    validation: Float[np.ndarray, "run subject"],
    run_seeds: Int[np.ndarray, " run"],
) -> Fit:
    """Fit many runs at once: they share visits and graph and differ in weights of subjects and in seeds.

    Args:
        visits: Visits of all subjects.
        graph: Connectome.
        config: Equation and recipe.
        seeds: Regions where the disease starts; None as in `fit`.
        train: Weights of subjects in the loss; counts of a bootstrap draw, or 0 and 1.
        validation: Weights in early stopping.
        run_seeds: Seeds of the networks.
    """
    problem = make_problem(mark_missing(visits), graph, seeds, train, validation)
    return fit_problems(problem, config, run_seeds, is_shared=True)


def fit_problems(
    problems: dual.Problem, config: FitConfig, run_seeds: Int[np.ndarray, " run"], *, is_shared: bool = False
) -> Fit:
    """Fit many cohorts of one size at once, each on its own graph.

    Args:
        problems: With a leading axis everywhere, as `jax.tree.map(jnp.stack, ...)` makes it.
        config: Equation and recipe.
        run_seeds: Seeds of the networks.
        is_shared: Whether visits and graph are the same for all, and have no leading axis.
    """
    start, advance, finish = programs(config, is_shared)
    state = start(jax.vmap(jax.random.key)(run_seeds), problems)
    while not bool(jnp.all(state.finished)):
        state, _ = advance(state, problems)
    return finish(state, problems)


def make_problem(
    visits: Visits,
    graph: GraphsTuple,
    seeds: tuple[int, ...] | None,
    train: Float[np.ndarray, "*run subject"],
    validation: Float[np.ndarray, "*run subject"],
) -> dual.Problem:
    """Put visits, graph and weights on the device.

    Raises:
        ValueError: There is no seed, or one that is no region.
    """
    regions = regional_map(graph).shape[-1]
    if seeds is not None and (not seeds or min(seeds) < 0 or max(seeds) >= regions):
        raise ValueError(f"seeds: expected numbers of regions from 0 to {regions - 1}, got {seeds}")
    if visits.values.shape[-1] != regions:
        raise ValueError(f"visits: expected {regions} regions as in the graph, got {visits.values.shape[-1]}")
    on_device = jax.tree.map(jnp.asarray, visits)
    if seeds is None:
        known = is_measured(on_device)
        place = jnp.argmax(jnp.sum(on_device.values * known, axis=(0, 1)) / jnp.maximum(known.sum(axis=(0, 1)), 1))
    else:
        place = jnp.array(seeds)
    mask = jnp.zeros(regions, on_device.values.dtype).at[place].set(1.0)
    return dual.Problem(on_device, graph, mask, jnp.asarray(train, jnp.float32), jnp.asarray(validation, jnp.float32))


# Data and graph are shared; keys and weights of subjects differ.
_AXES = dual.Problem(visits=None, graph=None, seeds=None, train=0, validation=0)  # pyright: ignore[reportArgumentType]


@functools.lru_cache(maxsize=32)
def programs(config: FitConfig, is_shared: bool = True) -> tuple[Callable, Callable, Callable]:
    """Return start, one round and the result of many runs, compiled once per configuration and shape.

    Args:
        config: Equation and recipe.
        is_shared: Whether all runs have the same visits and graph.
    """
    axes = (0, _AXES if is_shared else 0)
    start = jax.jit(jax.vmap(functools.partial(dual.init, config=config), in_axes=axes))
    advance = jax.jit(jax.vmap(functools.partial(dual.step, config=config), in_axes=axes))
    finish = jax.jit(jax.vmap(functools.partial(_finish, config=config), in_axes=axes))
    return start, advance, finish


def _finish(state: dual.DualState, problem: dual.Problem, config: FitConfig) -> Fit:
    model, params = make_progression_model(config.model), state.best.params
    trajectory = dual.solve_equation(model, params, problem.graph, problem.seeds, config)
    rates = dual.rates_along(model, params, problem.graph, problem.seeds, trajectory)
    staged = align(trajectory, problem.visits, config.stages)
    succeeded = jnp.all(jnp.isfinite(trajectory.states)) & jnp.all(jnp.isfinite(staged.errors))
    return Fit(params, trajectory, rates.experts, rates.weights, *staged, state.loop, succeeded)


stage_subjects = jax.jit(align, static_argnums=2)
"""`align`, compiled once per number of stages and shape: for new subjects on a fitted course."""


def fit_map(
    config: FitConfig,
    graph: GraphsTuple,
    target: Float[np.ndarray, " region"],
    known: Bool[np.ndarray, " region"],
    preference: Float[np.ndarray, " region"],
    num_seeds: int,
    update: Callable[[int], None],
) -> MapScore:
    """Fit the mixture to the map as one subject seen once.

    Args:
        config: Recipe.
        graph: Connectome.
        target: The map.
        known: Where it has a value.
        preference: Score of every seed, such as what FKPP reaches from it; the highest are tried.
        num_seeds: How many.
        update: Called with the number of seeds done.
    """
    low, high = np.nanmin(target), np.nanmax(target)
    visits = pad_visits([((target - low) / (high - low))[None].astype(np.float32)], [np.zeros(1)])
    recipe = dataclasses.replace(config, validation=0.0, model=dataclasses.replace(config.model, equation="igndmoe"))
    by_seed, best = np.full(len(target), np.nan), None
    for done, seed in enumerate(np.argsort(-preference)[:num_seeds].tolist(), 1):
        found = fit(visits, graph, recipe, (seed,))
        stage = float(found.onsets[0])
        predicted = np.asarray(found.trajectory.states, float)[np.abs(found.trajectory.times - stage).argmin()]
        r = float(row_correlations(predicted[None, known], target[None, known])[0])
        r = by_seed[seed] = r if np.isfinite(r) else 0.0
        if best is None or r > best.r:
            setting = f"stage {stage:.3g} years, in sample, best of {num_seeds} seeds"
            parameters = sum(leaf.size for leaf in jax.tree.leaves(found.params)) + 2
            best = MapScore("igndmoe", r, by_seed, seed, setting, predicted, parameters)
        update(done)
    assert best is not None
    return best
