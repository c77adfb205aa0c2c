"""DynamicDPS: refine the image of any conditional model by a prior and the measurement, and invent less.

The estimate is noised to a step of its own, the further back the less it fits (`start_time.py`). From there the prior
walks back; after each of its steps the image moves down the gradient of the data term, and every few steps a line
search says how far. The run is one loop over the steps left: samples whose start lies lower wait, and none influences
another. What comes back is the denoised image that fitted best on the way.

Each pass of that loop runs the network at most once, for whichever phase the run is in: ARRIVE at a step of the chain,
LOOK at where the prior's step led, TRY a step of a line search. So the network stands in the program once: with a copy
for each phase it takes three times as long to trace, and longer to compile.
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmed.arrays.derivatives import forward_only
from jaxmed.arrays.types import KeyArray
from jaxmed.config import Count, NonNegative, PositiveRange, Whole, checked
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.fidelity import (
    FIDELITY2025,
    FIDELITY2026,
    Evaluation,
    Fidelity,
    Operator,
    evaluate,
)
from jaxmed.diffusion.posterior.frame import (
    Chain,
    Info,
    add_noise,
    make_chain,
    residual_norms,
    reverse_step,
    root_keys,
)
from jaxmed.diffusion.posterior.start_time import StartTime, choose_start
from jaxmed.diffusion.samplers import Ancestral, Ddim
from jaxmed.diffusion.schedule import expand_like
from jaxmed.solvers import line_search
from jaxmed.solvers.line_search import NOT_DESCENT, Heuristic, Wolfe

ARRIVE, TRY, LOOK = 0, 1, 2
"""Phases of a run."""
NO_REVERSE = (
    "dynamicdps: expected a configuration without searches for a gradient in reverse, found a line search, which ends "
    "when its values say so; give search=None, or differentiate forward (jax.jvp, jax.jacfwd)"
)


@dataclasses.dataclass(frozen=True)
@checked
class DynamicDps:
    """Settings of DynamicDPS.

    Attributes:
        start: Where samples enter the chain.
        sampler: The chain.
        fidelity: The data term L.
        search: How step sizes are found; absent means that every step is `first_step`.
        search_every: A search where the number of steps left is a multiple of this.
        search_above: And larger than this.
        low_step: Step from there down to the image; absent keeps the last one found.
        first_step: Step before the first search, and where that search begins.
        step_range: Where searches begin later: at the last step found, held inside.
        restarts: Begin every search at `first_step`.
        line: moved: L along its own gradient at the image that the prior's step has reached, which costs an evaluation
            and is a true descent. mixed: the authors', the residual along the gradient of L before the prior's step,
            with trials that start after it.
        level: Noise level at which trials are denoised: that of the next step, which they are at, or the present one.
        noise_std: Deviation of the measurement's noise, in its units: a sample stops at the first fit as good as the
            noise allows, |y - A(x)| <= noise_std sqrt(size of y). Absent walks to the end and may fit the noise.
        clip: Range of images: the estimate and the result are held inside.

    Source: arXiv:2503.01075; github.com/edshkim98/DynamicDPS (`REPO2025`, `REPO2026`); the default's search is
        Nocedal and Wright's.
    """

    start: StartTime = StartTime()
    sampler: Ancestral | Ddim = Ancestral()
    fidelity: Fidelity = Fidelity()
    search: Wolfe | Heuristic | None = Wolfe(max_evaluations=6)
    search_every: Count = 5
    search_above: Whole = 5
    low_step: NonNegative | None = 0.1
    first_step: NonNegative = 1.0
    step_range: PositiveRange = (0.1, 1.5)
    restarts: bool = False
    line: Literal["moved", "mixed"] = "moved"
    level: Literal["next", "present"] = "next"
    noise_std: NonNegative | None = None
    clip: tuple[float, float] | None = (0.0, 2.0)

    def __post_init__(self):
        """Refuse steps that go nowhere."""
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip: expected low < high, found {self.clip}")


class _Problem(NamedTuple):
    """What stays the same during a run."""

    keys: Key[Array, " batch"]
    denoiser: Denoiser
    measurement: Float[Array, "batch ..."]
    operator: Operator
    chain: Chain
    start: Int[Array, " batch"]
    config: DynamicDps


class _State(NamedTuple):
    """Where a run stands.

    Attributes:
        left: Steps left, of all samples.
        phase: ARRIVE, TRY or LOOK.
        x: Noisy images: before the prior's step when they arrive, after it while a step size is looked for.
        at: Data term where they arrived; after a search, where its step led.
        is_known: Whether that is where they arrive next: the accepted trial was evaluated there.
        is_moving: Samples that take this step.
        direction: Gradient that a search goes down.
        search: Where that stands; None without searches.
        step: Last step size found.
        best: Denoised image with the smallest residual so far.
        best_residual: That residual.
        is_stopped: Fits as well as the noise allows.
        info: Record so far.
    """

    left: Int[Array, ""]
    phase: Int[Array, ""]
    x: Float[Array, "batch ..."]
    at: Evaluation
    is_known: Bool[Array, " batch"]
    is_moving: Bool[Array, " batch"]
    direction: Float[Array, "batch ..."]
    search: Any
    step: Float[Array, " batch"]
    best: Float[Array, "batch ..."]
    best_residual: Float[Array, " batch"]
    is_stopped: Bool[Array, " batch"]
    info: Info


def dynamicdps(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Operator,
    initial: Float[Array, "batch ..."],
    config: DynamicDps = DynamicDps(),
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Refine a conditional model's images, `initial`; see `jaxmed.diffusion.posterior` for the arguments.

    The same estimate under several numbers (`indices`) gives several samples of the posterior. The record has one row
    per step of the whole chain, most noise first; residuals of steps before a sample's start, or after it stopped, are
    NaN.

    Raises:
        TypeError: Its gradient is taken in reverse with searches on. `jit`, `vmap` and forward mode take every
            configuration, reverse mode those with `search=None`. Which step a sample starts at, which image of the walk
            comes back and when a search ends are choices, whose derivatives are 0.
    """
    keys = root_keys(key, initial, indices)
    chain = make_chain(denoiser.schedule, config.sampler, initial.dtype)
    num_steps = len(chain.time)
    _check_start(config.start, num_steps)
    if config.clip is not None:
        initial = jnp.clip(initial, *config.clip)
    start = choose_start(residual_norms(operator, initial, measurement), config.start)
    problem = _Problem(keys, denoiser, measurement, operator, chain, start, config)
    end = _run(problem, _begin(problem, initial))
    image = end.best if config.clip is None else jnp.clip(end.best, *config.clip)
    return (image, end.info) if config.search is None else forward_only((image, end.info), NO_REVERSE)


def _run(problem: _Problem, state: _State) -> _State:
    """Advance until no step is left, or none is wanted."""
    config = problem.config

    def is_going(state: _State) -> Bool[Array, ""]:
        return (state.left >= 0) & ~jnp.all(state.is_stopped)

    if config.search is not None:
        return jax.lax.while_loop(is_going, partial(_advance, problem), state)

    # Every pass is a step, so that their number has a bound, which reverse mode needs. It keeps where each began, and
    # runs the network once more on its way back.
    @partial(jax.checkpoint, prevent_cse=False)
    def advance(state: _State, _: None) -> tuple[_State, None]:
        return jax.lax.cond(is_going(state), partial(_advance, problem), lambda state: state, state), None

    length = config.start.fixed + 1 if config.start.rule == "fixed" else len(problem.chain.time)
    return jax.lax.scan(advance, state, length=length)[0]


def _check_start(start: StartTime, num_steps: int) -> None:
    last = start.fixed + 1 if start.rule == "fixed" else len(start.means) * start.steps_per_bin
    if last > num_steps:
        raise ValueError(
            f"start: expected at most the {num_steps} steps of the chain, found a rule that reaches {last}"
        )


def _begin(problem: _Problem, initial: Float[Array, "batch ..."]) -> _State:
    config = problem.config
    x = add_noise(problem.chain, problem.keys, initial, problem.start)
    zero = jnp.zeros(len(x), x.dtype)
    rows = jnp.zeros((len(problem.chain.time), len(x)), x.dtype)
    count = jnp.zeros(len(x), jnp.int32)
    no = count > 0
    info = Info(rows + jnp.nan, rows, problem.start, count, rows.astype(jnp.int32))
    at = Evaluation(zero, zero, x, x)
    search = None
    if config.search is not None:
        extra = at if config.line == "moved" else None
        search = line_search.begin(zero, zero, zero, config.search, extra, active=no)
    return _State(
        left=jnp.max(problem.start), phase=jnp.int32(ARRIVE), x=x, at=at, is_known=no, is_moving=no,
        direction=jnp.zeros_like(x), search=search, step=zero + config.first_step, best=initial,
        best_residual=zero + jnp.inf, is_stopped=no, info=info,
    )  # fmt: skip


def _advance(problem: _Problem, state: _State) -> _State:
    """Run the network where the present phase wants it, and let that phase go on."""
    config = problem.config
    is_trying = state.phase == TRY
    left = state.left if config.level == "present" else jnp.maximum(state.left - 1, 0)
    left = jnp.where(state.phase == ARRIVE, state.left, left)
    trial = jnp.zeros_like(state.step) if state.search is None else jnp.where(is_trying, state.search.trial, 0.0)
    is_wanted = jnp.any(_is_running(problem, state) & ~state.is_known) | (state.phase != ARRIVE)
    if state.search is not None:
        is_wanted &= ~(is_trying & jnp.all(state.search.is_done))
    found = jax.lax.cond(
        is_wanted,
        lambda: _evaluate(problem, _descend(state.x, trial, state.direction), left),
        lambda: state.at,
    )
    phases = [_arrive]
    if config.search is not None:
        phases += [_try, _look] if config.line == "moved" else [_try]
    # What is common to all branches is bound, not passed: a problem holds functions.
    return jax.lax.switch(state.phase, [partial(phase, problem) for phase in phases], state, found)


def _is_running(problem: _Problem, state: _State) -> Bool[Array, " batch"]:
    return (state.left <= problem.start) & ~state.is_stopped


def _arrive(problem: _Problem, state: _State, found: Evaluation) -> _State:
    """Remember the best, take the prior's step, and begin a search or take the data term's step."""
    config, left = problem.config, state.left
    is_running = _is_running(problem, state)
    is_needed = is_running & ~state.is_known
    at = _choose(is_needed, found, state.at)
    is_better = is_running & (at.residual < state.best_residual)
    best, best_residual = _choose(is_better, (at.mean, at.residual), (state.best, state.best_residual))
    is_stopped = state.is_stopped
    if config.noise_std is not None:
        limit = config.noise_std * problem.measurement[0].size ** 0.5
        is_stopped |= is_running & (at.residual <= limit)
    is_moving = is_running & ~is_stopped
    row = len(problem.chain.time) - 1 - left
    residuals = state.info.residuals.at[row].set(jnp.where(is_running, at.residual, jnp.nan))
    moved = state._replace(
        x=_choose(is_moving, reverse_step(problem.chain, problem.keys, state.x, at.mean, left), state.x),
        at=at,
        is_moving=is_moving,
        best=best,
        best_residual=best_residual,
        is_stopped=is_stopped,
        info=state.info._replace(residuals=residuals, evaluations=state.info.evaluations + is_needed),
    )
    if config.search is None:
        return _keep(problem, moved)
    is_due = (left > config.search_above) & (left % config.search_every == 0)
    begin = (
        partial(_begin_mixed, config) if config.line == "mixed" else lambda state: state._replace(phase=jnp.int32(LOOK))
    )
    return jax.lax.cond(is_due, begin, partial(_keep, problem), moved)


def _keep(problem: _Problem, state: _State) -> _State:
    """Take the step size that there is, down the gradient where the samples arrived."""
    config, at = problem.config, state.at
    step = state.step
    if config.low_step is not None:
        step = jnp.where(state.left <= config.search_above, config.low_step, step)
    is_finite = jnp.all(jnp.isfinite(at.gradient.reshape(len(state.x), -1)), axis=1)
    step = jnp.where(is_finite, step, 0.0)
    flags = jnp.where(is_finite, 0, NOT_DESCENT)
    return _go_on(problem, state, _descend(state.x, step, at.gradient), step, flags)


def _look(problem: _Problem, state: _State, found: Evaluation) -> _State:
    """Begin a search of L along its gradient at the moved image."""
    config, slope = problem.config, -_dot(found.gradient, found.gradient)
    first = _first_step(config, state)
    return state._replace(
        phase=jnp.int32(TRY),
        direction=found.gradient,
        search=line_search.begin(found.loss, slope, first, config.search or Wolfe(), found, state.is_moving),
        info=state.info._replace(evaluations=state.info.evaluations + state.is_moving),
    )


def _begin_mixed(config: DynamicDps, state: _State) -> _State:
    """Begin a search as the authors do: the residual, along the gradient of L where the prior's step began."""
    at, slope = state.at, -_dot(state.at.gradient, state.at.gradient)
    search = line_search.begin(
        at.residual, slope, _first_step(config, state), config.search or Wolfe(), active=state.is_moving
    )
    return state._replace(phase=jnp.int32(TRY), direction=at.gradient, search=search)


def _first_step(config: DynamicDps, state: _State) -> Float[Array, " batch"]:
    first = jnp.clip(state.step, *config.step_range)
    return jnp.full_like(first, config.first_step) if config.restarts else first


def _try(problem: _Problem, state: _State, found: Evaluation) -> _State:
    """Judge a trial; when the last search of the batch is done, take the steps found."""
    config, is_moved = problem.config, problem.config.line == "moved"
    value = found.loss if is_moved else found.residual
    slope = -_dot(found.gradient, state.direction)
    search = line_search.advance(state.search, value, slope, found if is_moved else None, config.search or Wolfe())

    def conclude(state: _State) -> _State:
        result = line_search.finish(state.search)
        x = _descend(state.x, result.step, state.direction)
        info = state.info._replace(evaluations=state.info.evaluations + result.evaluations)
        # What the accepted trial computed begins the next step, if it was at that step's level and at this very step.
        is_reusable = is_moved and config.level == "next" and isinstance(config.search, Wolfe)
        state = state._replace(at=result.extra if is_moved else state.at, info=info)
        return _go_on(problem, state, x, result.step, result.status, state.is_moving & is_reusable)

    state = state._replace(search=search)
    return jax.lax.cond(jnp.all(search.is_done), conclude, lambda state: state, state)


def _go_on(
    problem: _Problem,
    state: _State,
    x: Float[Array, "batch ..."],
    step: Float[Array, " batch"],
    flags: Int[Array, " batch"],
    is_known: Bool[Array, " batch"] | None = None,
) -> _State:
    """Move the samples that move, write this step down, and go to the next."""
    is_moving, info = state.is_moving, state.info
    row = len(problem.chain.time) - 1 - state.left
    info = info._replace(
        step_sizes=info.step_sizes.at[row].set(jnp.where(is_moving, step, 0.0)),
        flags=info.flags.at[row].set(jnp.where(is_moving, flags, 0)),
    )
    return state._replace(
        left=state.left - 1,
        phase=jnp.int32(ARRIVE),
        x=_choose(is_moving, x, state.x),
        is_known=jnp.zeros_like(is_moving) if is_known is None else is_known,
        # A search that failed to find any step says nothing about the size of the next.
        step=jnp.where(is_moving & (step > 0), step, state.step),
        info=info,
    )


def _evaluate(problem: _Problem, x: Float[Array, "batch ..."], left: Int[Array, ""]) -> Evaluation:
    time = jnp.full(len(x), problem.chain.time[left])
    return evaluate(problem.denoiser, problem.measurement, problem.operator, problem.config.fidelity, x, time)


def _descend(
    x: Float[Array, "batch ..."], step: Float[Array, " batch"], gradient: Float[Array, "batch ..."]
) -> Float[Array, "batch ..."]:
    # Where no step is taken a gradient that is not finite must not matter.
    step = expand_like(step, x)
    return jnp.where(step > 0, x - step * gradient, x)


def _dot(a: Float[Array, "batch ..."], b: Float[Array, "batch ..."]) -> Float[Array, " batch"]:
    return jnp.sum((a * b).reshape(len(a), -1), axis=1)


def _choose(is_so: Bool[Array, " batch"], yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(is_so.reshape(-1, *[1] * (a.ndim - 1)), a, b), yes, no)


STRICT = DynamicDps()
FIXED = DynamicDps(start=StartTime(rule="fixed"), search=None, low_step=None)
REPO2026 = DynamicDps(
    start=StartTime(rule="repo"),
    fidelity=FIDELITY2026,
    search=line_search.REPO2026,
    restarts=True,
    line="mixed",
    level="present",
)
REPO2025 = DynamicDps(
    start=StartTime(rule="repo"),
    fidelity=FIDELITY2025,
    search=line_search.REPO2025,
    search_every=1,
    search_above=0,
    low_step=None,
    restarts=True,
    line="mixed",
)
