"""Dual optimisation: fit a trajectory to staged visits, stage the visits on the trajectory, and again.

`init` starts at the mechanistic curve, `step` is one round, both for one run; `jax.vmap` makes them many runs (folds,
seeds, bootstrap draws), which differ in their keys and in the weights of subjects. Parameters are
{"field": of the equation, "seed": logit of the seeds' state at stage 0}.

Source: arXiv:2508.07032, section on dual optimisation.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from jaxmed.arrays.graphs import GraphsTuple, LaplacianKind, Matrix, operator
from jaxmed.arrays.trees import choose
from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.arrays.visits import Visits, count_values
from jaxmed.config import Bounds, Decay, NonNegative, Seed, Size, checked
from jaxmed.models.graph_diffusion import ProgressionConfig, Rates, make_progression_model, set_mechanism
from jaxmed.nn.model import Model
from jaxmed.physics.progression import fkpp
from jaxmed.solvers import quasi_newton
from jaxmed.solvers.fixed_grid import Trajectory
from jaxmed.solvers.ode import GRID, OdeConfig, Solver, solve_trajectory, value_and_gradient
from jaxmed.systems.igndmoe.alignment import align, profiled_error, stage_visits

# The mechanistic start: rates tried, then rounds of steps on log rates with stages updated between them.
TRIED_DIFFUSION = (0.01, 0.03, 0.1, 0.3, 1.0)
TRIED_GROWTH = (0.05, 0.1, 0.2, 0.4, 0.8)
TRIED_SEEDS = (0.1, 0.2, 0.4, 0.6, 0.9)
START_ROUNDS, START_STEPS = 4, 15
# Below this product of squared norms two experts count as different: one of them is still nothing.
SMALLEST_NORM = 1e-12
# Of an expert along the course, in the norm's unit; one that moves 20 regions by 0.01 a year for 30 years has 0.24.
ROUNDING = 0.1


@dataclasses.dataclass(frozen=True)
@checked
class FitConfig:
    """How a trajectory is fitted to visits.

    Attributes:
        model: The equation.
        laplacian: Kind of Laplacian. "random_walk" and "symmetric" weigh regions by their strength; "combinatorial" is
            that of the paper's equation 1.
        grid_steps: Steps of the solver from stage 0 to the model's horizon.
        loops: Most rounds of a trajectory step and an alignment step.
        steps: Evaluations of loss and gradient in a trajectory step.
        memory: Steps whose curvature a trajectory step remembers.
        norm_weight: lambda 1, of the size of neural experts.
        overlap_weight: lambda 2, of experts looking alike.
        tolerance: Relative change of the loss between rounds that ends a fit.
        patience: Rounds without a better validation error that end a fit.
        validation: Share of training subjects kept for early stopping.
        seed_value: State of the seeds at stage 0 where the fit begins.
        stages: Stages tried in an alignment.
        seed: Seed of the networks and of the choice of validation subjects.
        solver: "diffrax" solves the equation as `ode` says; "fixed" is a scan of four evaluations a step, the fast
            path, with the same numbers as diffrax's defaults here but for rounding.
        ode: Options of diffrax.

    Source: arXiv:2508.07032, dual optimisation. The paper gives no optimiser, number of steps or criterion;
    overlap_weight is the release's. Deviation: the specification proposes AdamW, 500 steps in each of 10 rounds. The
    whole cohort is one batch and its loss has no noise, so a trajectory step is limited-memory BFGS, on an error that
    lets subjects move along the course to first order (`alignment.profiled_error`). With AdamW at fixed stages the
    weights of the experts hardly left their start in 5000 steps.
    """

    model: ProgressionConfig = dataclasses.field(default_factory=ProgressionConfig)
    laplacian: LaplacianKind = "random_walk"
    grid_steps: Size = 64
    loops: Size = 20
    steps: Size = 50
    memory: Size = 16
    norm_weight: NonNegative = 1e-2
    overlap_weight: NonNegative = 0.1
    tolerance: NonNegative = 1e-4
    patience: Size = 4
    validation: Decay = 0.2
    seed_value: Annotated[float, Bounds(0, 1, above=True, below=True)] = 0.15
    stages: Annotated[int, Bounds(8, 65_536)] = 512
    seed: Seed = 0
    solver: Annotated[Solver, tyro.conf.arg(name="solver", prefix_name=False)] = "diffrax"
    ode: Annotated[OdeConfig, tyro.conf.arg(name="ode", prefix_name=False)] = GRID

    def __post_init__(self) -> None:
        if self.solver == "fixed" and self.ode != GRID:
            raise ValueError("ode: expected nothing beside solver 'fixed', found options of diffrax")


class Problem(NamedTuple):
    """What is fitted.

    Attributes:
        visits: Visits of all subjects.
        graph: Connectome.
        seeds: 1 where the disease starts, 0 elsewhere.
        train: Weight of subjects in the loss.
        validation: Weight of subjects in early stopping; all 0 for none, then the training error decides.
    """

    visits: Visits
    graph: GraphsTuple
    seeds: Float[Array, " region"]
    train: Float[Array, " subject"]
    validation: Float[Array, " subject"]


class Best(NamedTuple):
    """The best round so far.

    Attributes:
        params: Parameters.
        error: Its validation error, mean square per visit and region.
    """

    params: Params
    error: Scalar


class DualState(NamedTuple):
    """What the next round needs.

    Attributes:
        params: Parameters after the last round.
        onsets: Stage of every subject, in years.
        error: Mean squared training error, per visit and region.
        best: The round that validation prefers.
        waited: Rounds since then.
        loop: Rounds done.
        finished: Whether further rounds change nothing.
    """

    params: Params
    onsets: Float[Array, " subject"]
    error: Scalar
    best: Best
    waited: Int[Array, ""]
    loop: Int[Array, ""]
    finished: Bool[Array, ""]


class Info(NamedTuple):
    """What a round did.

    Attributes:
        train: Mean squared training error, per visit and region.
        validation: The same of validation subjects; of training ones where there are none.
        norm: Size of neural experts.
        overlap: How much experts look alike.
        shift: Mean absolute change of stages, in years.
        clipped: Subjects at an end of the trajectory.
        rejected: Points tried in the trajectory step that did not lower the loss.
    """

    train: Scalar
    validation: Scalar
    norm: Scalar
    overlap: Scalar
    shift: Scalar
    clipped: Int[Array, ""]
    rejected: Int[Array, ""]


class Terms(NamedTuple):
    """Parts of the loss, without their weights.

    Attributes:
        data: Sum of squared errors.
        norm: Size of the neural experts along the trajectory.
        overlap: How much experts look alike.
    """

    data: Scalar
    norm: Scalar
    overlap: Scalar


def time_grid(config: FitConfig) -> Float[Array, " time"]:
    """Return the solver's grid from stage 0 to the horizon, in years."""
    return jnp.linspace(0.0, config.model.horizon, config.grid_steps + 1)


def solve_equation(
    model: Model, params: Params, graph: GraphsTuple, seeds: Float[Array, " region"], config: FitConfig
) -> Trajectory:
    """Solve the equation from the seeds to the horizon."""
    initial = jax.nn.sigmoid(params["seed"]) * seeds

    # Everything comes through the arguments: a solve back in time differentiates nothing else.
    def field(t: Array, c: Array, args: tuple[Params, GraphsTuple, Array]) -> Array:
        field_params, graph, initial = args
        return model.apply(field_params, c, t, graph, initial).total

    args = (params["field"], graph, initial)
    return solve_trajectory(field, initial, time_grid(config), args, config.solver, config.ode)


def rates_along(
    model: Model, params: Params, graph: GraphsTuple, seeds: Float[Array, " region"], course: Trajectory
) -> Rates:
    """Return experts and weights at every point of a course."""
    initial = jax.nn.sigmoid(params["seed"]) * seeds
    return jax.vmap(lambda c, t: model.apply(params["field"], c, t, graph, initial))(course.states, course.times)


def init(key: KeyArray, problem: Problem, config: FitConfig) -> DualState:
    """Fit the mechanistic expert alone, stage every subject on its curve, and start the equation there.

    Args:
        key: Key of the networks' first weights.
        problem: Data and graph.
        config: Recipe.
    """
    model = make_progression_model(config.model)
    rates, onsets = mechanistic_start(problem, config)
    initial = jax.nn.sigmoid(rates.seed) * problem.seeds
    field = model.init(key, initial, jnp.zeros(()), problem.graph, initial)
    params = {"field": _start_field(model, field, rates, problem, initial, config.model), "seed": rates.seed}
    staged = align(solve_equation(model, params, problem.graph, problem.seeds, config), problem.visits, config.stages)
    # Equations without a mechanistic part start flat, where stages mean nothing: theirs are the mechanistic curve's.
    has_start = config.model.equation in ("igndmoe", "ndm", "fkpp", "weighted_fkpp") and not config.model.match_release
    onsets = staged.onsets if has_start else onsets
    train, validation = _mean_errors(problem, staged.errors)
    return DualState(params, onsets, train, Best(params, validation), jnp.array(0), jnp.array(0), jnp.array(False))


def step(state: DualState, problem: Problem, config: FitConfig) -> tuple[DualState, Info]:
    """Do one round: train at fixed stages, then stage all subjects; a finished run stays as it is."""
    model = make_progression_model(config.model)
    params, course, terms, rejected = _trajectory_step(model, state, problem, config)
    staged = align(course, problem.visits, config.stages)
    train, validation = _mean_errors(problem, staged.errors)
    # NaN is never better, so a run that breaks ends with its best round.
    improved = validation < state.best.error
    waited = jnp.where(improved, 0, state.waited + 1)
    loop = state.loop + 1
    settled = jnp.abs(train - state.error) < config.tolerance * state.error
    finished = settled | (waited >= config.patience) | (loop >= config.loops) | ~jnp.isfinite(train)
    best = choose(improved, Best(params, validation), state.best)
    new = DualState(params, staged.onsets, train, best, waited, loop, finished)
    info = Info(
        train,
        validation,
        terms.norm,
        terms.overlap,
        jnp.mean(jnp.abs(staged.onsets - state.onsets)),
        jnp.sum(staged.clipped & (problem.train > 0)),
        rejected,
    )
    return choose(state.finished, state, new), info


# --- The mechanistic start --------------------------------------------------------------------


class StartRates(NamedTuple):
    """Rates of the mechanistic curve, per year, and the logit of the seeds' state.

    Attributes:
        diffusion: k.
        growth: alpha.
        ceiling: v.
        seed: Logit.
    """

    diffusion: Scalar
    growth: Scalar
    ceiling: Scalar
    seed: Scalar


def mechanistic_start(problem: Problem, config: FitConfig) -> tuple[StartRates, Float[Array, " subject"]]:
    """Fit k, alpha, v and the seeds' state, staging subjects anew between rounds; from the best of a grid of rates."""
    times, grows = time_grid(config), config.model.grows

    def course(logs: Array) -> Trajectory:
        rates = _from_logs(logs, grows)
        initial, args = jax.nn.sigmoid(rates.seed) * problem.seeds, (rates, operator(problem.graph, "laplacian"))
        return solve_trajectory(_fkpp_field, initial, times, args, config.solver, config.ode)

    def score(logs: Array) -> Array:
        total = jnp.sum(problem.train * align(course(logs), problem.visits, 64, 0).errors)
        return jnp.where(jnp.isfinite(total), total, jnp.inf)

    k = jnp.log(jnp.array(TRIED_DIFFUSION))[:, None]
    if grows:
        second, seed = jnp.log(jnp.array(TRIED_GROWTH))[None], jnp.full((1, 1), _logit(config.seed_value))
    else:
        second, seed = jnp.zeros((1, 1)), jax.vmap(_logit)(jnp.array(TRIED_SEEDS))[None]
    shape = (len(TRIED_DIFFUSION), max(second.shape[1], seed.shape[1]))
    tried = jnp.stack([jnp.broadcast_to(part, shape) for part in (k, second, jnp.zeros((1, 1)), seed)], axis=-1)
    tried = tried.reshape(-1, 4)
    logs = tried[jnp.argmin(jax.lax.map(score, tried))]

    def one_round(logs: Array, _: None) -> tuple[Array, None]:
        before = course(logs)
        onsets = align(before, problem.visits, config.stages).onsets
        staged = stage_visits(before, problem.visits, onsets, problem.train)
        function = value_and_gradient(lambda x: profiled_error(staged, course(x)), config.ode)
        return quasi_newton.run(function, logs, START_STEPS).point, None

    logs, _ = jax.lax.scan(one_round, logs, length=START_ROUNDS)
    return _from_logs(logs, grows), align(course(logs), problem.visits, config.stages).onsets


def _fkpp_field(t: Array, c: Array, args: tuple[StartRates, Matrix]) -> Array:
    rates, laplacian = args
    return fkpp(c, laplacian, rates.diffusion, rates.growth, rates.ceiling)


def _from_logs(logs: Array, grows: bool) -> StartRates:
    growth = jnp.exp(logs[1]) if grows else jnp.zeros(())
    return StartRates(jnp.exp(logs[0]), growth, jnp.exp(logs[2]), logs[3])


def _logit(share: Array | float) -> Array:
    return jnp.log(share) - jnp.log1p(-jnp.asarray(share))


def _start_field(
    model: Model, field: Params, rates: StartRates, problem: Problem, initial: Array, config: ProgressionConfig
) -> Params:
    """Put mechanistic rates into an equation's parameters, so that its first course is the mechanistic one."""
    k, alpha, v = rates.diffusion, rates.growth, rates.ceiling
    match config.equation:
        case "ndm":
            return set_mechanism(field, k, None, None)
        case "fkpp":
            return set_mechanism(field, k, alpha, v)
        case "weighted_fkpp":
            # Its share starts at one half: alpha' v (-k' L / 2 + ...) is FKPP at these.
            return set_mechanism(field, k / (alpha * v), 2 * alpha * v, v)
        case "igndmoe" if not config.match_release:
            # The gate's first weight, so that the product with the expert is the fitted rate.
            weight = model.apply(field, initial, jnp.zeros(()), problem.graph, initial).weights[0]
            if not config.reaction:
                return set_mechanism(field, k / weight, None, None)
            return set_mechanism(field, k / weight, alpha / weight, v)
    return field


# --- The trajectory step ----------------------------------------------------------------------


def _trajectory_step(
    model: Model, state: DualState, problem: Problem, config: FitConfig
) -> tuple[Params, Trajectory, Terms, Array]:
    first = solve_equation(model, state.params, problem.graph, problem.seeds, config)
    staged = stage_visits(first, problem.visits, state.onsets, problem.train)
    flat, unravel = ravel_pytree(state.params)

    def terms_of(params: Params) -> tuple[Terms, Trajectory]:
        course = solve_equation(model, params, problem.graph, problem.seeds, config)
        norm = overlap = jnp.zeros(())
        if config.model.equation == "igndmoe":
            experts = rates_along(model, params, problem.graph, problem.seeds, course).experts
            norm, overlap = regularisers(experts, course.times[1] - course.times[0])
        return Terms(profiled_error(staged, course), norm, overlap), course

    def loss(point: Array) -> Array:
        terms, _ = terms_of(unravel(point))
        return terms.data + config.norm_weight * terms.norm + config.overlap_weight * terms.overlap

    end = quasi_newton.run(value_and_gradient(loss, config.ode), flat, config.steps, config.memory)
    params = unravel(end.point)
    terms, course = terms_of(params)
    return params, course, terms, end.rejected


def regularisers(experts: Float[Array, "time expert region"], step: Scalar) -> tuple[Scalar, Scalar]:
    """Return the size of the neural experts and the overlap of all.

    Args:
        experts: Along the trajectory, unweighted; the first is the mechanistic one.
        step: Length of a step of the grid, in years.

    Source: arXiv:2508.07032, equation 10. Deviation: both are integrals over time, and the overlap of two experts is
    their squared correlation over regions, so that neither depends on the grid, the solver or the number of regions;
    the release adds one term per call of its solver.
    """
    energy = jnp.sum(experts[:, 1:] ** 2, axis=(0, 2)) * step
    # Rounded off near 0, where neural experts start and the root has a kink that holds them.
    norm = jnp.sum(jnp.sqrt(energy + ROUNDING**2) - ROUNDING)
    centred = experts - experts.mean(axis=-1, keepdims=True)
    products = jnp.einsum("tpn,tqn->tpq", centred, centred)
    squares = jnp.diagonal(products, axis1=1, axis2=2)
    alike = products**2 / (squares[:, :, None] * squares[:, None, :] + SMALLEST_NORM)
    return norm, jnp.sum(alike * (1 - jnp.eye(experts.shape[1]))) * step


def _mean_errors(problem: Problem, errors: Array) -> tuple[Array, Array]:
    """Return mean squared errors of training and validation subjects, per value."""
    counts = count_values(problem.visits)

    def mean(weights: Array) -> Array:
        return jnp.sum(weights * errors) / jnp.maximum(jnp.sum(weights * counts), 1.0)

    train = mean(problem.train)
    return train, jnp.where(jnp.any(problem.validation > 0), mean(problem.validation), train)
