"""Ordinary differential equations, solved by diffrax; a failure is told, not raised."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class OdeConfig:
    """How an equation is solved.

    Attributes:
        solver: "tsit5" is explicit, of order 5; "dopri5" likewise, as other packages have it; "heun" explicit, of
            order 2, for cheap fixed steps; "kvaerno5" implicit, of order 5, for stiff equations; in float32 it needs
            tolerances of 1e-3.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance, in units of the state.
        step: Length of fixed steps in place of steps by tolerance, in units of time; the same work for every member
            of a batch, which by tolerance waits for its slowest.
        max_steps: Steps after which a solve has failed.
        adjoint: Gradients: "checkpoint" differentiates the steps taken, with memory for the square root of their
            number; "direct" keeps all, faster for few; "backsolve" solves back in time with no memory, reaches only
            what comes through `args` and is not exact; "forward" is for jvp.
    """

    solver: Literal["tsit5", "dopri5", "heun", "kvaerno5"] = "tsit5"
    rtol: float = 1e-5
    atol: float = 1e-5
    step: float | None = None
    max_steps: int = 4096
    adjoint: Literal["checkpoint", "direct", "backsolve", "forward"] = "checkpoint"

    def __post_init__(self):
        for name in ("rtol", "atol", "max_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.step is not None and not self.step > 0:
            raise ValueError(f"step: expected a positive length, got {self.step}")


class OdeSolution(NamedTuple):
    """The state at the times asked for.

    Attributes:
        states: Pytree like the initial state, with the times first; infinite after a failure.
        num_steps: Steps tried.
        succeeded: Whether the last time was reached with finite numbers.
    """

    states: Any
    num_steps: Int[Array, ""]
    succeeded: Bool[Array, ""]


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
        config: Method and tolerances.
        args: Passed to the field, for example parameters.
    """
    backward = times[-1] < times[0]
    if config.step is None:
        controller, first = diffrax.PIDController(rtol=config.rtol, atol=config.atol), None
    else:
        controller, first = diffrax.ConstantStepSize(), jnp.where(backward, -config.step, config.step)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        _solver(config),
        t0=times[0],
        t1=times[-1],
        dt0=first,
        y0=initial,
        args=args,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=controller,
        adjoint=_adjoint(config),
        max_steps=config.max_steps,
        throw=False,
    )
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(solution.ys)]
    succeeded = (solution.result == diffrax.RESULTS.successful) & jnp.all(jnp.stack(finite))
    return OdeSolution(solution.ys, solution.stats["num_steps"], succeeded)


def _solver(config: OdeConfig) -> Any:
    match config.solver:
        case "tsit5":
            return diffrax.Tsit5()
        case "dopri5":
            return diffrax.Dopri5()
        case "heun":
            return diffrax.Heun()
        case "kvaerno5":
            return diffrax.Kvaerno5()
    raise ValueError(f"solver: expected tsit5, dopri5, heun or kvaerno5, got {config.solver!r}")


def _adjoint(config: OdeConfig) -> Any:
    match config.adjoint:
        case "checkpoint":
            return diffrax.RecursiveCheckpointAdjoint()
        case "direct":
            return diffrax.DirectAdjoint()
        case "backsolve":
            return diffrax.BacksolveAdjoint()
        case "forward":
            return diffrax.ForwardMode()
    raise ValueError(f"adjoint: expected checkpoint, direct, backsolve or forward, got {config.adjoint!r}")
