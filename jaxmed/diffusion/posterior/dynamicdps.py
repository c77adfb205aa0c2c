"""DynamicDPS: refine the image of any conditional model by a prior and the measurement, and invent less.

The estimate is noised to a step of its own, the further back the less it fits (`start_time.py`). From there the prior
walks back; after each of its steps the image moves down the gradient of the data term, and every few steps a line
search says how far. The run is one loop over the steps left: samples whose start lies lower wait, and none influences
another. What comes back is the denoised image that fitted best on the way.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmed.arrays.types import KeyArray
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.chain import Chain, enter, make_chain, reverse
from jaxmed.diffusion.posterior.fidelity import FIDELITY2025, Evaluation, Fidelity, Operator, evaluate, norm
from jaxmed.diffusion.posterior.info import Info
from jaxmed.diffusion.posterior.start_time import StartTime, choose_start
from jaxmed.diffusion.samplers import Ancestral, Ddim, sample_keys
from jaxmed.diffusion.schedule import spread
from jaxmed.solvers import line_search
from jaxmed.solvers.line_search import NOT_DESCENT, Heuristic, Wolfe


@dataclasses.dataclass(frozen=True)
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
        noise_std: Of the measurement's noise, in its units: a sample stops at the first fit as good as the noise
            allows, |y - A(x)| <= noise_std sqrt(size of y). Absent walks to the end and may fit the noise.
        clip: Range of images: the estimate and the result are held inside.

    Source: arXiv:2503.01075; github.com/edshkim98/DynamicDPS (`REPO2025`, `REPO2026`); the default's search is
        Nocedal and Wright's.
    """

    start: StartTime = StartTime()
    sampler: Ancestral | Ddim = Ancestral()
    fidelity: Fidelity = Fidelity()
    search: Wolfe | Heuristic | None = Wolfe(max_evaluations=6)
    search_every: int = 5
    search_above: int = 5
    low_step: float | None = 0.1
    first_step: float = 1.0
    step_range: tuple[float, float] = (0.1, 1.5)
    restarts: bool = False
    line: Literal["moved", "mixed"] = "moved"
    level: Literal["next", "present"] = "next"
    noise_std: float | None = None
    clip: tuple[float, float] | None = (0.0, 2.0)

    def __post_init__(self):
        """Refuse steps that go nowhere."""
        if self.search_every < 1 or self.search_above < 0:
            found = f"{self.search_every}, {self.search_above}"
            raise ValueError(f"search_every, search_above: expected 1 or more and 0 or more, found {found}")
        if not self.first_step >= 0 or (self.low_step is not None and not self.low_step >= 0):
            raise ValueError(f"first_step, low_step: expected 0 or more, found {self.first_step}, {self.low_step}")
        if not 0 < self.step_range[0] <= self.step_range[1]:
            raise ValueError(f"step_range: expected 0 < low <= high, found {self.step_range}")
        if self.noise_std is not None and not self.noise_std >= 0:
            raise ValueError(f"noise_std: expected 0 or more, found {self.noise_std}")
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
        x: Noisy images.
        at: Data term at x, where it is known already.
        is_known: Whether it is: the trial that a search accepted was evaluated where the next step begins.
        step: Last step size found.
        best: Denoised image with the smallest residual so far.
        best_residual: That residual.
        is_stopped: Fits as well as the noise allows.
        info: Record so far.
    """

    left: Int[Array, ""]
    x: Float[Array, "batch ..."]
    at: Evaluation
    is_known: Bool[Array, " batch"]
    step: Float[Array, " batch"]
    best: Float[Array, "batch ..."]
    best_residual: Float[Array, " batch"]
    is_stopped: Bool[Array, " batch"]
    info: Info


class _Move(NamedTuple):
    """The data step of all samples."""

    x: Float[Array, "batch ..."]
    step: Float[Array, " batch"]
    at: Evaluation
    is_known: Bool[Array, " batch"]
    evaluations: Int[Array, " batch"]
    flags: Int[Array, " batch"]


def dynamicdps(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Operator,
    initial: Float[Array, "batch ..."],
    config: DynamicDps = DynamicDps(),
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Refine estimates of images.

    Args:
        key: Consumed.
        denoiser: The prior.
        measurement: y.
        operator: A, of one image; any differentiable function.
        initial: The conditional model's images.
        config: Settings.
        indices: Numbers of the samples, which name their random numbers; 0 to batch - 1 when absent. The same estimate
            under several numbers gives several samples of the posterior.

    Returns:
        The images, and the run's record with one row per step of the whole chain, most noise first; residuals of steps
        before a sample's start, or after it stopped, are NaN.
    """
    keys = sample_keys(key, jnp.arange(len(initial)) if indices is None else indices)
    chain = make_chain(denoiser.schedule, config.sampler, initial.dtype)
    num_steps = len(chain.time)
    _check_start(config.start, num_steps)
    if config.clip is not None:
        initial = jnp.clip(initial, *config.clip)
    start = choose_start(residuals(measurement, operator, initial), config.start)
    problem = _Problem(keys, denoiser, measurement, operator, chain, start, config)
    state = _begin(problem, initial)
    end = jax.lax.while_loop(
        lambda state: (state.left >= 0) & ~jnp.all(state.is_stopped), lambda state: _advance(problem, state), state
    )
    image = end.best if config.clip is None else jnp.clip(end.best, *config.clip)
    return image, end.info


def residuals(
    measurement: Float[Array, "batch ..."], operator: Operator, image: Float[Array, "batch ..."]
) -> Float[Array, " batch"]:
    """Return |y - A(x)| of each sample."""
    return jax.vmap(lambda y, x: norm(y - operator(x)))(measurement, image)


def _check_start(start: StartTime, num_steps: int) -> None:
    last = start.fixed + 1 if start.rule == "fixed" else len(start.means) * start.steps_per_bin
    if last > num_steps:
        raise ValueError(
            f"start: expected at most the {num_steps} steps of the chain, found a rule that reaches {last}"
        )


def _begin(problem: _Problem, initial: Float[Array, "batch ..."]) -> _State:
    x = enter(problem.chain, problem.keys, initial, problem.start)
    zero = jnp.zeros(len(x), x.dtype)
    rows = jnp.zeros((len(problem.chain.time), len(x)), x.dtype)
    count = jnp.zeros(len(x), jnp.int32)
    info = Info(rows + jnp.nan, rows, problem.start, count, rows.astype(jnp.int32))
    at = Evaluation(zero, zero, x, x)
    step = zero + problem.config.first_step
    return _State(jnp.max(problem.start), x, at, count > 0, step, initial, zero + jnp.inf, count > 0, info)


def _advance(problem: _Problem, state: _State) -> _State:
    """Evaluate, remember the best, and take the prior's and the data term's step."""
    config, left = problem.config, state.left
    is_running = (left <= problem.start) & ~state.is_stopped
    is_needed = is_running & ~state.is_known
    at = jax.lax.cond(
        jnp.any(is_needed),
        lambda: _choose(is_needed, _evaluate(problem, state.x, left), state.at),
        lambda: state.at,
    )
    is_better = is_running & (at.residual < state.best_residual)
    best, best_residual = _choose(is_better, (at.mean, at.residual), (state.best, state.best_residual))
    is_stopped = state.is_stopped
    if config.noise_std is not None:
        limit = config.noise_std * problem.measurement[0].size ** 0.5
        is_stopped |= is_running & (at.residual <= limit)
    is_moving = is_running & ~is_stopped

    moved = reverse(problem.chain, problem.keys, state.x, at.mean, left)
    move = _data_step(problem, state, at, moved, is_moving)
    row = len(problem.chain.time) - 1 - left
    info = state.info._replace(
        residuals=state.info.residuals.at[row].set(jnp.where(is_running, at.residual, jnp.nan)),
        step_sizes=state.info.step_sizes.at[row].set(jnp.where(is_moving, move.step, 0.0)),
        evaluations=state.info.evaluations + is_needed + jnp.where(is_moving, move.evaluations, 0),
        flags=state.info.flags.at[row].set(jnp.where(is_moving, move.flags, 0)),
    )
    return _State(
        left=left - 1,
        x=_choose(is_moving, move.x, state.x),
        at=move.at,
        is_known=is_moving & move.is_known,
        # A search that failed to find any step says nothing about the size of the next.
        step=jnp.where(is_moving & (move.step > 0), move.step, state.step),
        best=best,
        best_residual=best_residual,
        is_stopped=is_stopped,
        info=info,
    )


def _data_step(
    problem: _Problem,
    state: _State,
    at: Evaluation,
    moved: Float[Array, "batch ..."],
    is_moving: Bool[Array, " batch"],
) -> _Move:
    config, left = problem.config, state.left
    none = jnp.zeros(is_moving.shape, jnp.int32)

    def keep() -> _Move:
        step = state.step
        if config.low_step is not None:
            step = jnp.where(left <= config.search_above, config.low_step, step)
        is_finite = jnp.all(jnp.isfinite(at.gradient.reshape(len(moved), -1)), axis=1)
        step = jnp.where(is_finite, step, 0.0)
        flags = jnp.where(is_finite, none, NOT_DESCENT)
        return _Move(_descend(moved, step, at.gradient), step, at, none > 0, none, flags)

    def search() -> _Move:
        trial_left = left if config.level == "present" else jnp.maximum(left - 1, 0)
        first = jnp.clip(state.step, *config.step_range)
        if config.restarts:
            first = jnp.full_like(first, config.first_step)
        if config.line == "mixed":
            return _search_mixed(problem, at, moved, trial_left, first, is_moving)
        here = _evaluate(problem, moved, trial_left)
        return _search_moved(problem, here, moved, trial_left, first, is_moving)

    if config.search is None:
        return keep()
    return jax.lax.cond((left > config.search_above) & (left % config.search_every == 0), search, keep)


def _search_moved(
    problem: _Problem,
    here: Evaluation,
    moved: Float[Array, "batch ..."],
    trial_left: Int[Array, ""],
    first: Float[Array, " batch"],
    is_moving: Bool[Array, " batch"],
) -> _Move:
    """Search L along its gradient at the moved image; what the accepted trial computed begins the next step."""

    def phi(step: Float[Array, " batch"]) -> tuple[Array, Array, Evaluation]:
        there = _evaluate(problem, _descend(moved, step, here.gradient), trial_left)
        return there.loss, -_dot(there.gradient, here.gradient), there

    slope = -_dot(here.gradient, here.gradient)
    found = line_search.line_search(phi, here.loss, slope, first, problem.config.search or Wolfe(), here, is_moving)
    # Only at the level where the next step begins, and where the step is the one that was evaluated.
    is_reusable = problem.config.level == "next" and isinstance(problem.config.search, Wolfe)
    is_known = is_moving & is_reusable
    evaluations = found.evaluations + 1
    return _Move(
        _descend(moved, found.step, here.gradient), found.step, found.extra, is_known, evaluations, found.status
    )


def _search_mixed(
    problem: _Problem,
    at: Evaluation,
    moved: Float[Array, "batch ..."],
    trial_left: Int[Array, ""],
    first: Float[Array, " batch"],
    is_moving: Bool[Array, " batch"],
) -> _Move:
    """Search as the authors do: the residual, along the gradient of L where the prior's step began."""

    def phi(step: Float[Array, " batch"]) -> tuple[Array, Array]:
        there = _evaluate(problem, _descend(moved, step, at.gradient), trial_left)
        return there.residual, -_dot(there.gradient, at.gradient)

    slope = -_dot(at.gradient, at.gradient)
    found = line_search.line_search(phi, at.residual, slope, first, problem.config.search or Wolfe(), active=is_moving)
    x = _descend(moved, found.step, at.gradient)
    return _Move(x, found.step, at, jnp.zeros_like(is_moving), found.evaluations, found.status)


def _evaluate(problem: _Problem, x: Float[Array, "batch ..."], left: Int[Array, ""]) -> Evaluation:
    time = jnp.full(len(x), problem.chain.time[left])
    return evaluate(problem.denoiser, problem.measurement, problem.operator, problem.config.fidelity, x, time)


def _descend(
    x: Float[Array, "batch ..."], step: Float[Array, " batch"], gradient: Float[Array, "batch ..."]
) -> Float[Array, "batch ..."]:
    # Where no step is taken a gradient that is not finite must not matter.
    step = spread(step, x)
    return jnp.where(step > 0, x - step * gradient, x)


def _dot(a: Float[Array, "batch ..."], b: Float[Array, "batch ..."]) -> Float[Array, " batch"]:
    return jnp.sum((a * b).reshape(len(a), -1), axis=1)


def _choose(is_so: Bool[Array, " batch"], yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(is_so.reshape(-1, *[1] * (a.ndim - 1)), a, b), yes, no)


STRICT = DynamicDps()
FIXED = DynamicDps(start=StartTime(rule="fixed"), search=None, low_step=None)
REPO2026 = DynamicDps(
    start=StartTime(rule="repo"), search=line_search.REPO2026, restarts=True, line="mixed", level="present"
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
