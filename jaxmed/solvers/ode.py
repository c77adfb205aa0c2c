"""Ordinary differential equations, solved by diffrax; a failure is told, not raised."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, cast

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from jaxmed.config import Positive, Size, checked
from jaxmed.solvers.fixed_grid import Trajectory, solve_fixed

Solver = Literal["diffrax", "fixed"]


@dataclasses.dataclass(frozen=True)
@checked
class OdeConfig:
    """How diffrax solves an equation.

    Attributes:
        method: "tsit5" is explicit, of order 5; "dopri5" likewise, as other packages have it; "rk4" the classical
            method of order 4, "heun" of order 2, for fixed steps; "kvaerno5" implicit, of order 5, for stiff equations;
            in float32 it needs tolerances of 1e-3.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance, in units of the state.
        step: Length of fixed steps, in units of time; "grid" for one step between the times asked for; None for steps
            by tolerance, where a batch waits for its slowest member.
        max_steps: Steps after which a solve has failed; on a grid there are as many as it has.
        adjoint: Gradients: "checkpoint" differentiates the steps taken, with memory for few of them, or for all of a
            grid; "direct" gives forward derivatives too; "backsolve" solves back in time with no memory, reaches only
            what comes through `args` and the initial state, and is not exact; "forward" is for jvp.
        stop_at: Stop where the mean of the state passes this value, from below or above; what comes after stays.
        steady: Stop once no component changes faster than this, in units of the state and time; likewise.
    """

    method: Literal["tsit5", "dopri5", "rk4", "heun", "kvaerno5"] = "tsit5"
    rtol: Positive = 1e-5
    atol: Positive = 1e-5
    step: Literal["grid"] | Positive | None = None
    max_steps: Size = 4096
    adjoint: Literal["checkpoint", "direct", "backsolve", "forward"] = "checkpoint"
    stop_at: Positive | None = None
    steady: Positive | None = None

    def __post_init__(self):
        if self.has_event and self.adjoint == "backsolve":
            raise ValueError("adjoint: expected one that can stop early (stop_at, steady), found backsolve")

    @property
    def has_event(self) -> bool:
        """Whether a solve may stop before its last time."""
        return self.stop_at is not None or self.steady is not None


GRID = OdeConfig("rk4", step="grid")
"""The method of `solve_fixed`, step by step."""


class OdeSolution(NamedTuple):
    """The state at the times asked for.

    Attributes:
        states: Pytree like the initial state, with the times first; infinite after a failure.
        num_steps: Steps tried.
        succeeded: Whether the last time, or what stops the solve, was reached with finite numbers.
        end: Time at which the solve stopped; from there on the state stays as it was.
    """

    states: Any
    num_steps: Int[Array, ""]
    succeeded: Bool[Array, ""]
    end: Float[Array, ""]


def solve(
    field: Callable[..., Any],
    initial: Any,
    times: Float[Array, " time"],
    config: OdeConfig = OdeConfig(),
    args: Any = None,
) -> OdeSolution:
    """Solve d state / dt = field(t, state, args).

    Args:
        field: The right-hand side, (t, state, args) -> its derivative; for a batch of equations with their own steps,
            `vmap` the whole solve.
        initial: State at the first time, a pytree of floating arrays.
        times: Where the state is wanted, from the first to the last time; may descend.
        config: Method, steps, gradients and what stops it.
        args: Passed to the field, for example parameters.
    """
    # Back in time a solve takes other steps than those of the grid, of the same length.
    is_on_grid = config.step == "grid" and config.adjoint != "backsolve"
    saves_steps = is_on_grid and not config.has_event
    if config.step is None:
        controller, first = diffrax.PIDController(rtol=config.rtol, atol=config.atol), None
    elif is_on_grid:
        controller, first = diffrax.StepTo(times), None
    else:
        length = (times[-1] - times[0]) / (len(times) - 1) if config.step == "grid" else config.step
        first = length if config.step == "grid" else jnp.where(times[-1] < times[0], -length, length)
        controller = diffrax.ConstantStepSize()
    wanted = diffrax.SubSaveAt(t0=True, steps=True) if saves_steps else diffrax.SubSaveAt(ts=times)
    max_steps = len(times) - 1 if is_on_grid else config.max_steps
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        _method(config),
        t0=times[0],
        t1=times[-1],
        dt0=first,
        y0=initial,
        args=args,
        saveat=diffrax.SaveAt(subs=[wanted, diffrax.SubSaveAt(t1=True)] if config.has_event else wanted),
        stepsize_controller=controller,
        adjoint=_adjoint(config, max_steps if is_on_grid else None),
        event=_event(config) if config.has_event else None,
        max_steps=max_steps,
        throw=False,
    )
    states, end = solution.ys, times[-1]
    if config.has_event:
        (states, last), (_, (end,)) = cast(Any, (solution.ys, solution.ts))
        is_after = (times > end) == (times[-1] > times[0])
        stays = (solution.result == diffrax.RESULTS.event_occurred) & is_after & (times != end)
        states = jax.tree.map(
            lambda leaf, one: jnp.where(stays.reshape(-1, *[1] * (leaf.ndim - 1)), one, leaf), states, last
        )
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(states)]
    succeeded = diffrax.is_okay(solution.result) & jnp.all(jnp.stack(finite))
    return OdeSolution(states, solution.stats["num_steps"], succeeded, end)


def solve_trajectory(
    field: Callable[[Array, Array, Any], Array],
    initial: Float[Array, " state"],
    times: Float[Array, " time"],
    args: Any = None,
    solver: Solver = "diffrax",
    config: OdeConfig = GRID,
) -> Trajectory:
    """Solve on a grid for later interpolation, by diffrax or by the scan of `solve_fixed`.

    Args:
        field: The right-hand side.
        initial: State at the first time.
        times: Uniform grid, ascending.
        args: Passed to the field; what gradients reach.
        solver: "fixed" is the fast path; `GRID` gives the same numbers but for rounding.
        config: Options of diffrax.
    """
    if solver == "fixed":
        return solve_fixed(field, initial, times, args)
    solution = solve(field, initial, times, config, args)
    slopes = jax.vmap(lambda t, state: field(t, state, args))(times, solution.states)
    if config.has_event:
        slopes = jnp.where((times < solution.end)[:, None] | (solution.end == times[-1]), slopes, 0.0)
    return Trajectory(times, solution.states, slopes)


def value_and_gradient(function: Callable[[Array], Array], config: OdeConfig) -> Callable[[Array], tuple[Array, Array]]:
    """Return a function's value and gradient, by forward derivatives where the solves in it have those alone."""
    if config.adjoint != "forward":
        return jax.value_and_grad(function)

    def along(point: Array, direction: Array) -> tuple[Array, Array]:
        return jax.jvp(function, (point,), (direction,))

    return lambda point: jax.vmap(along, (None, 0), (None, 0))(point, jnp.eye(len(point), dtype=point.dtype))


class _Classical(diffrax.AbstractERK):
    """The tableau of Kutta 1901, which diffrax leaves out; its error is told by the midpoint rule inside it."""

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=(np.array([1 / 2]), np.array([0, 1 / 2]), np.array([0.0, 0, 1])),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=np.array([1 / 6, -2 / 3, 1 / 3, 1 / 6]),
        c=np.array([1 / 2, 1 / 2, 1]),
    )
    interpolation_cls: ClassVar[Callable[..., Any]] = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms: Any) -> int:
        return 4


def _method(config: OdeConfig) -> Any:
    if config.method == "kvaerno5":
        return diffrax.Kvaerno5(root_finder=diffrax.VeryChord(rtol=config.rtol, atol=config.atol))
    explicit = {"tsit5": diffrax.Tsit5, "dopri5": diffrax.Dopri5, "rk4": _Classical, "heun": diffrax.Heun}
    return explicit[config.method]()


def _adjoint(config: OdeConfig, checkpoints: int | None) -> Any:
    if config.adjoint == "checkpoint":
        return diffrax.RecursiveCheckpointAdjoint(checkpoints)
    others = {"direct": diffrax.DirectAdjoint, "backsolve": diffrax.BacksolveAdjoint, "forward": diffrax.ForwardMode}
    return others[config.adjoint]()


def _event(config: OdeConfig) -> diffrax.Event:
    conditions: list[Callable[..., Any]] = []
    if (level := config.stop_at) is not None:
        conditions.append(lambda t, y, args, **_: jnp.mean(ravel_pytree(y)[0]) - level)
    if config.steady is not None:
        conditions.append(diffrax.steady_state_event(0.0, config.steady, norm=optimistix.max_norm))
    return diffrax.Event(conditions, optimistix.Newton(1e-5, 1e-5))
