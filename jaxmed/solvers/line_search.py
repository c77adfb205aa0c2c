"""Step sizes along a descent direction for many independent problems at once.

`optax.scale_by_zoom_linesearch` searches for one problem, inside an optimizer, by values and full gradients of a
function of the parameters. Under `vmap` it needs as many evaluations as this search (11.9 for each of 512 problems in
1000 dimensions) and 1.9 times as long, as it cannot take the slope along the line alone. It cannot be stopped between
two evaluations so that a loop around it makes them, does not hand back what else was computed at the step, and has no
largest step, fallback or status of each problem.

`line_search` looks along phi(step) of every problem of a batch for a step that lowers it enough (sufficient decrease)
and ends where phi is flat enough (curvature). All problems advance together: one evaluation of phi for the whole batch
in each pass of one `while_loop`, until the last of them is done. A problem that is done keeps what it found. Who has a
loop already calls the parts instead: `begin`, `advance` until all are done, `finish`.

Nothing raises on values. A search that fails says why in `status` and still returns a step with the value there.

Source: Nocedal and Wright, Numerical Optimization, 2nd edition, algorithms 3.5 (bracketing) and 3.6 (zoom).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CONVERGED = 0
"""Both conditions hold."""
AT_MAXIMUM = 1
"""The largest step allowed lowers phi enough, but phi still falls steeply there."""
DECREASE_ONLY = 2
"""Evaluations ran out; the best step with sufficient decrease is returned, without the curvature condition."""
NO_DECREASE = 3
"""No step tried lowers phi enough; the fallback is returned."""
NOT_DESCENT = 4
"""phi does not fall at 0, or is not finite there: step 0, nothing was evaluated."""
BELOW_PRECISION = 5
"""No step lowers phi enough because the promised decrease is smaller than phi's rounding errors; the fallback."""

Trial: TypeAlias = Callable[[Float[Array, " batch"]], tuple[Any, ...]]
"""Steps (batch,) -> (value, slope) of phi there, each (batch,), and a third result where `extra` is given."""


@dataclasses.dataclass(frozen=True)
class Wolfe:
    """Bracketing and zoom with safeguarded cubic and quadratic interpolation.

    Attributes:
        sufficient_decrease: c1 in phi(a) <= phi(0) + c1 a phi'(0).
        curvature: c2; larger is laxer.
        condition: On the slope at the step: strong |phi'(a)| <= c2 |phi'(0)|; weak phi'(a) >= c2 phi'(0); armijo none.
        max_step: Largest step tried; may be infinite.
        fallback_step: Step where none lowers phi enough, evaluated like any other. 0 stays where it was.
        growth: Factor between two steps of the bracketing.
        max_bracketing: Evaluations of the bracketing.
        max_zoom: Evaluations of the zoom.
        max_evaluations: Evaluations in all, the fallback among them.
        scipy_compatible: Take every step that SciPy takes, its signed interpolation guards and unchecked last
            bracketing step included, and fail where it fails.
    """

    sufficient_decrease: float = 1e-3
    curvature: float = 0.8
    condition: Literal["strong", "weak", "armijo"] = "strong"
    max_step: float = 1.5
    fallback_step: float = 0.1
    growth: float = 2.0
    max_bracketing: int = 10
    max_zoom: int = 11
    max_evaluations: int = 22
    scipy_compatible: bool = False

    def __post_init__(self):
        """Refuse constants for which no search ends."""
        if not 0 < self.sufficient_decrease < self.curvature < 1:
            found = f"{self.sufficient_decrease}, {self.curvature}"
            raise ValueError(f"sufficient_decrease and curvature need 0 < c1 < c2 < 1, got {found}")
        if not self.max_step > 0:
            raise ValueError(f"max_step must be positive, got {self.max_step}")
        if not 0 <= self.fallback_step <= self.max_step:
            raise ValueError(f"fallback_step must lie in [0, max_step], got {self.fallback_step}")
        if not 1 < self.growth < math.inf:
            raise ValueError(f"growth must be finite and above 1, got {self.growth}")
        for name, least in (("max_bracketing", 1), ("max_zoom", 1), ("max_evaluations", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Heuristic:
    """The authors' rule of DynamicDPS: shrink where phi has not dropped enough, grow where its slope is wrong.

    Attributes:
        sufficient_decrease: c1.
        curvature: c2.
        min_step: Where shrinking stops.
        max_step: Where growing stops.
        shrink: Factor of a step that does not lower phi enough.
        growth: Factor of a step that does and fails the curvature test.
        grows_on: The slopes that make it grow: steep ones, |phi'(a)| > c2 |phi'(0)|, or flat ones.
        max_evaluations: Trials; then the step stands as it is.

    Source: github.com/edshkim98/DynamicDPS, of 2026-04-29 (steep) and of July 2025 (flat, reversed).
    """

    sufficient_decrease: float = 1e-3
    curvature: float = 0.8
    min_step: float = 0.1
    max_step: float = 1.5
    shrink: float = 0.75
    growth: float = 1.25
    grows_on: Literal["steep", "flat"] = "steep"
    max_evaluations: int = 10

    def __post_init__(self):
        """Refuse factors that do not move."""
        if not 0 < self.min_step <= self.max_step:
            raise ValueError(f"min_step must lie in (0, max_step], got {self.min_step}, {self.max_step}")
        if not 0 < self.shrink < 1 < self.growth:
            raise ValueError(f"shrink and growth lie on two sides of 1, got {self.shrink}, {self.growth}")
        if self.max_evaluations < 1:
            raise ValueError(f"max_evaluations must be at least 1, got {self.max_evaluations}")


Search: TypeAlias = Wolfe | Heuristic


class LineSearchResult(NamedTuple):
    """What a search found, per problem.

    Attributes:
        step: The step to take.
        value: phi there. `Heuristic` may have changed the step once more after its last evaluation; then value, slope
            and extra are those of that evaluation.
        slope: phi' there.
        evaluations: Evaluations of phi that this problem needed.
        status: `CONVERGED` or the reason for anything else.
        extra: Third result of phi there; None unless asked for.
    """

    step: Float[Array, " batch"]
    value: Float[Array, " batch"]
    slope: Float[Array, " batch"]
    evaluations: Int[Array, " batch"]
    status: Int[Array, " batch"]
    extra: Any = None


def line_search(
    phi: Trial,
    value0: Float[Array, " batch"],
    slope0: Float[Array, " batch"],
    initial_step: Float[Array, " batch"],
    config: Search = Wolfe(),
    extra0: Any = None,
    active: Bool[Array, " batch"] | None = None,
) -> LineSearchResult:
    """Find a step for every problem of a batch.

    Args:
        phi: The function along the direction and its derivative; a value or slope that is not finite counts as
            plus infinity.
        value0: phi at 0.
        slope0: phi' at 0, negative along a descent direction.
        initial_step: First steps tried; `Wolfe` cuts them at its largest.
        config: `Wolfe` or `Heuristic`.
        extra0: Third result of phi at 0: a pytree of arrays, batch first. With it, phi returns three results and the
            one at the step is handed back, so that what was computed there need not be computed again.
        active: Problems to search; the others get step 0 at no evaluation.
    """
    state = begin(value0, slope0, initial_step, config, extra0, active)

    def body(state: Any) -> Any:
        value, slope, *rest = phi(state.trial)
        return advance(state, value, slope, rest[0] if rest else None, config)

    return finish(jax.lax.while_loop(lambda state: ~jnp.all(state.is_done), body, state))


class Point(NamedTuple):
    """A step, phi and phi' there."""

    step: Float[Array, " batch"]
    value: Float[Array, " batch"]
    slope: Float[Array, " batch"]


class State(NamedTuple):
    """Where the searches of `Wolfe` stand.

    Attributes:
        start: phi at 0.
        first: The first step tried.
        trial: Steps to evaluate next.
        is_zoom: Past the bracketing.
        is_fallback: The trial is the fallback, taken as it comes.
        is_done: Finished; nothing changes any more.
        low: Bracketing: the step before. Zoom: the end of the interval with the lower phi.
        high: The other end.
        recent: The end that was given up last.
        tried: Evaluations in the present phase.
        kept: The step to return as things stand.
        extra: phi's third result there.
        evaluations: Evaluations in all.
        status: Valid once done.
    """

    start: Point
    first: Float[Array, " batch"]
    trial: Float[Array, " batch"]
    is_zoom: Bool[Array, " batch"]
    is_fallback: Bool[Array, " batch"]
    is_done: Bool[Array, " batch"]
    low: Point
    high: Point
    recent: Point
    tried: Int[Array, " batch"]
    kept: Point
    extra: Any
    evaluations: Int[Array, " batch"]
    status: Int[Array, " batch"]


class HeuristicState(NamedTuple):
    """Where the searches of `Heuristic` stand.

    Attributes:
        start: phi at 0.
        trial: Steps to evaluate next; once done, to take.
        is_done: Finished; nothing changes any more.
        at: The last trial.
        extra: phi's third result there.
        evaluations: Evaluations in all.
        status: Valid once done.
    """

    start: Point
    trial: Float[Array, " batch"]
    is_done: Bool[Array, " batch"]
    at: Point
    extra: Any
    evaluations: Int[Array, " batch"]
    status: Int[Array, " batch"]


def begin(
    value0: Float[Array, " batch"],
    slope0: Float[Array, " batch"],
    initial_step: Float[Array, " batch"],
    config: Search = Wolfe(),
    extra0: Any = None,
    active: Bool[Array, " batch"] | None = None,
) -> State | HeuristicState:
    """Begin a search; arguments are those of `line_search`. Its `trial` is to be evaluated first."""
    start = Point(jnp.zeros_like(value0), value0, slope0)
    if active is None:
        active = jnp.ones(value0.shape, bool)
    falls = jnp.isfinite(value0) & jnp.isfinite(slope0) & (slope0 < 0)
    is_done = ~(active & falls)
    zero = jnp.zeros(value0.shape, jnp.int32)
    status = jnp.where(active & ~falls, NOT_DESCENT, CONVERGED).astype(jnp.int32)
    match config:
        case Wolfe():
            trial, no = jnp.minimum(initial_step, config.max_step).astype(value0.dtype), zero > 0
            return State(
                start, trial, trial, no, no, is_done, start, start, start, zero, start, extra0, zero, status
            )  # fmt: skip
        case Heuristic():
            trial = jnp.where(is_done, 0.0, initial_step).astype(value0.dtype)
            return HeuristicState(start, trial, is_done, start, extra0, zero, status)


def advance(
    state: State | HeuristicState,
    value: Float[Array, " batch"],
    slope: Float[Array, " batch"],
    extra: Any,
    config: Search,
) -> State | HeuristicState:
    """Take note of phi at the trials, and choose the next; problems that are done stay as they are.

    Args:
        state: Its `trial` was evaluated.
        value: phi there; where it or the slope is not finite it counts as plus infinity with slope 0, which no rule
            ever prefers.
        slope: phi' there.
        extra: phi's third result there, of the form of `begin`'s; ignored where that had none.
        config: That of `begin`.
    """
    is_finite = jnp.isfinite(value) & jnp.isfinite(slope)
    at = Point(state.trial, jnp.where(is_finite, value, jnp.inf), jnp.where(is_finite, slope, 0.0))
    extra = None if state.extra is None else extra
    if isinstance(state, State):
        assert isinstance(config, Wolfe)
        moved = _advance(state, at, config)
        return moved._replace(extra=_where(_is_new(state, moved), extra, state.extra))
    assert isinstance(config, Heuristic)
    return _where(state.is_done, state, _advance_heuristic(state, at, extra, config))


def finish(state: State | HeuristicState) -> LineSearchResult:
    """Return what a search found whose problems are all done."""
    if isinstance(state, HeuristicState):
        return LineSearchResult(
            state.trial, state.at.value, state.at.slope, state.evaluations, state.status, state.extra
        )
    start = state.start
    rounding = 4 * float(jnp.finfo(start.value.dtype).eps) * jnp.abs(start.value)
    is_lost = (state.status == NO_DECREASE) & (-start.slope * state.first <= rounding)
    status = jnp.where(is_lost, BELOW_PRECISION, state.status)
    return LineSearchResult(*state.kept, state.evaluations, status, state.extra)


def _is_new(before: State, after: State) -> Bool[Array, " batch"]:
    """Return where the step kept is the one just tried."""
    return ~before.is_done & (after.kept.step == before.trial) & (after.kept.step != before.kept.step)


def _advance(state: State, at: Point, config: Wolfe) -> State:
    """Judge the trial, move the interval, and choose the next trial.

    Both phases judge alike: a trial that is too high becomes the high end; one that is low enough but rises towards
    the other end becomes the low end of an interval turned round. Only what follows differs.
    """
    start = state.start
    decreases = at.value <= start.value + config.sufficient_decrease * at.step * start.slope
    if not config.scipy_compatible:
        # Where the asked decrease is lost in rounding, an equal value is none.
        decreases &= at.value < start.value
    # The very first trial is compared with the line of sufficient decrease alone.
    has_low = state.is_zoom | (state.tried > 0)
    is_high = ~decreases | (has_low & (at.value >= state.low.value))
    holds = ~is_high & _is_flat(at.slope, start.slope, config)
    width = state.high.step - state.low.step
    turns = ~is_high & jnp.where(state.is_zoom, at.slope * width >= 0, at.slope >= 0)

    is_zoom = state.is_zoom | is_high | turns
    interval = state._replace(
        low=_where(is_high, state.low, at),
        high=_where(is_high, at, _where(turns, state.low, state.high)),
        recent=_where(is_high | turns, state.high, state.low),
        tried=jnp.where(is_zoom & ~state.is_zoom, 0, state.tried + 1),
        is_zoom=is_zoom,
        evaluations=state.evaluations + 1,
    )
    moved = _stop(state, interval, at, decreases, holds, config)
    # What is done must not change, and the fallback is the last trial of its problem.
    return _where(state.is_done, state, moved)


def _stop(
    state: State, moved: State, at: Point, decreases: Bool[Array, " batch"], holds: Bool[Array, " batch"], config: Wolfe
) -> State:
    """Decide what to keep, whether to stop, and else what to try next."""
    limit = jnp.where(moved.is_zoom, config.max_zoom, config.max_bracketing)
    if config.scipy_compatible:
        # SciPy evaluates one bracketing step more and returns it unchecked; a failed zoom returns nothing.
        unchecked = ~state.is_zoom & (state.tried >= config.max_bracketing)
        holds &= ~unchecked
        keeps, is_top = holds | unchecked, jnp.zeros_like(holds)
        is_spent = jnp.where(moved.is_zoom & ~unchecked, moved.tried >= limit, unchecked)
    else:
        is_top = ~moved.is_zoom & ~holds & (at.step >= config.max_step)
        keeps = holds | is_top | (decreases & (at.value < state.kept.value))
        is_spent = moved.tried >= limit
    is_finite = at.value < jnp.inf
    kept = _where(keeps | (state.is_fallback & is_finite), at, state.kept)

    # A step is owed: the last evaluation goes to the fallback while none with sufficient decrease is known.
    is_over = is_spent | (moved.evaluations >= config.max_evaluations)
    has_time = moved.evaluations < config.max_evaluations
    is_near = is_spent | (moved.evaluations >= config.max_evaluations - 1)
    to_fallback = is_near & has_time & (kept.step == 0) & ~state.is_fallback & (config.fallback_step > 0)
    is_done = holds | is_top | state.is_fallback | (is_over & ~to_fallback)
    status = jnp.where(decreases & is_finite, DECREASE_ONLY, NO_DECREASE)
    status = jnp.where(state.is_fallback, status, jnp.where(kept.step > 0, DECREASE_ONLY, NO_DECREASE))
    status = jnp.where(holds, CONVERGED, jnp.where(is_top, AT_MAXIMUM, status)).astype(jnp.int32)

    inside = _interpolate(moved, config.scipy_compatible)
    beyond = jnp.minimum(config.growth * at.step, config.max_step)
    trial = jnp.where(to_fallback, config.fallback_step, jnp.where(moved.is_zoom, inside, beyond))
    return moved._replace(trial=trial, is_fallback=to_fallback, is_done=is_done, kept=kept, status=status)


def _is_flat(slope: Array, slope0: Array, config: Wolfe) -> Bool[Array, " batch"]:
    match config.condition:
        case "strong":
            return jnp.abs(slope) <= -config.curvature * slope0
        case "weak":
            return slope >= config.curvature * slope0
        case "armijo":
            return jnp.ones(slope.shape, bool)


def _interpolate(state: State, signed: bool) -> Float[Array, " batch"]:
    """Choose the next step inside the interval: cubic, else quadratic, else the middle.

    The cubic passes through both ends and the end given up last, the quadratic through both ends; both have the slope
    of the low end. A minimum too near an end, a fifth or a tenth of the width, is refused.

    Args:
        state: With the interval.
        signed: Take the width with its sign in those guards, as SciPy does; where the interval lies to the left of its
            low end that lets steps outside it pass.
    """
    low, high, recent = state.low, state.high, state.recent
    width = high.step - low.step
    guard = width if signed else jnp.abs(width)
    left, right = jnp.minimum(low.step, high.step), jnp.maximum(low.step, high.step)
    quadratic = _quadratic_minimum(low, high)
    fits = jnp.isfinite(quadratic) & (quadratic <= right - 0.1 * guard) & (quadratic >= left + 0.1 * guard)
    step = jnp.where(fits, quadratic, low.step + 0.5 * width)
    cubic = _cubic_minimum(low, high, recent)
    fits = jnp.isfinite(cubic) & (cubic <= right - 0.2 * guard) & (cubic >= left + 0.2 * guard)
    # The interval's first trial knows two points only.
    return jnp.where(fits & (state.tried > 0), cubic, step)


def _quadratic_minimum(low: Point, high: Point) -> Float[Array, " batch"]:
    width = high.step - low.step
    curvature = (high.value - low.value - low.slope * width) / (width * width)
    return low.step - low.slope / (2.0 * curvature)


def _cubic_minimum(low: Point, high: Point, recent: Point) -> Float[Array, " batch"]:
    """Minimise low.value + C d + B d^2 + A d^3 through three points, d being the distance from low."""
    to_high, to_recent = high.step - low.step, recent.step - low.step
    rise_high = high.value - low.value - low.slope * to_high
    rise_recent = recent.value - low.value - low.slope * to_recent
    scale = (to_high * to_recent) ** 2 * (to_high - to_recent)
    a = (to_recent**2 * rise_high - to_high**2 * rise_recent) / scale
    b = (-(to_recent**3) * rise_high + to_high**3 * rise_recent) / scale
    return low.step + (-b + jnp.sqrt(b * b - 3 * a * low.slope)) / (3 * a)


def _where(is_so: Bool[Array, " batch"], yes: Any, no: Any) -> Any:
    """Choose between two records problem by problem; leaves may have axes after the batch."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(is_so.reshape(is_so.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, yes, no)


def _advance_heuristic(state: HeuristicState, at: Point, extra: Any, config: Heuristic) -> HeuristicState:
    """Shrink, grow or accept the trial."""
    start = state.start
    decreases = at.value <= start.value + config.sufficient_decrease * at.step * start.slope
    size, limit = jnp.abs(at.slope), config.curvature * jnp.abs(start.slope)
    grows = decreases & (size > limit if config.grows_on == "steep" else size < limit)
    accepts = decreases & ~grows
    step = at.step * jnp.where(accepts, 1.0, jnp.where(decreases, config.growth, config.shrink))
    is_small, is_large = ~decreases & (step < config.min_step), grows & (step > config.max_step)
    step = jnp.where(is_small, config.min_step, jnp.where(is_large, config.max_step, step))
    evaluations = state.evaluations + 1
    is_done = accepts | is_small | is_large | (evaluations >= config.max_evaluations)
    failure = jnp.where(is_large, AT_MAXIMUM, jnp.where(decreases, DECREASE_ONLY, NO_DECREASE))
    status = jnp.where(accepts, CONVERGED, failure).astype(jnp.int32)
    return HeuristicState(start, step, is_done, at, extra, evaluations, status)


STRICT = Wolfe()
SCIPY = Wolfe(
    sufficient_decrease=1e-4,
    curvature=0.9,
    max_step=math.inf,
    fallback_step=0.0,
    max_evaluations=32,
    scipy_compatible=True,
)
REPO2026 = Heuristic()
REPO2025 = Heuristic(min_step=0.3, max_step=1.0, growth=1.5, grows_on="flat")
