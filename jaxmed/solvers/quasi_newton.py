"""Limited-memory BFGS that spends one evaluation per step, so that a batch of minimisations stays in step.

A step tries one point. Where the function has decreased enough the point is accepted and its curvature remembered;
otherwise the next step tries a quarter of the distance. Nothing is nested: under `jax.vmap` a run that must shorten
its step costs the others nothing, and the function is compiled once.

`optax.lbfgs` searches along every direction in a loop of its own, which under `jax.vmap` waits for the slowest run: 16
minimisations of Rosenbrock's function in 24 dimensions take 292 evaluations of the batch, here 178, though each alone
needs as many in both (about 160). Nor can that loop be differentiated in reverse.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxmed.arrays.trees import choose
from jaxmed.arrays.types import Scalar

SUFFICIENT = 1e-4
"""Share of the decrease promised by the slope that makes a point acceptable (Armijo)."""
SHORTER = 0.25
SHORTEST = 0.02
"""Of the direction's full length; below it the memory is misleading, and steepest descent begins anew."""

ValueAndGradient = Callable[[Array], tuple[Scalar, Float[Array, " parameter"]]]


class State(NamedTuple):
    """A point, where to try next, and remembered curvature.

    Attributes:
        point: The best so far.
        value: There.
        gradient: There.
        direction: To try, at full length.
        length: Share of the direction tried next.
        moves: Differences of accepted points, the latest last; 0 where there are none yet.
        changes: Differences of their gradients.
        curvatures: Products of moves and changes; 0 where there are none yet.
        rejected: Points that were not accepted.
    """

    point: Float[Array, " parameter"]
    value: Scalar
    gradient: Float[Array, " parameter"]
    direction: Float[Array, " parameter"]
    length: Scalar
    moves: Float[Array, "memory parameter"]
    changes: Float[Array, "memory parameter"]
    curvatures: Float[Array, " memory"]
    rejected: Int[Array, ""]


def init(point: Float[Array, " parameter"], memory: int = 16) -> State:
    """Return the state before anything was evaluated: the first `step` evaluates the function at the point itself."""
    none = jnp.zeros((memory, len(point)), point.dtype)
    one, worst = jnp.ones((), point.dtype), jnp.full((), jnp.inf, point.dtype)
    still = jnp.zeros_like(point)
    return State(point, worst, still, still, one, none, none, none[:, 0], jnp.zeros((), jnp.int32))


def step(state: State, function: ValueAndGradient) -> State:
    """Try one point."""
    trial = state.point + state.length * state.direction
    value, gradient = function(trial)
    promised = state.length * jnp.vdot(state.gradient, state.direction)
    is_accepted = jnp.isfinite(value) & jnp.all(jnp.isfinite(gradient)) & (value <= state.value + SUFFICIENT * promised)
    accepted = _accept(state, trial, value, gradient)
    shorter = state._replace(length=SHORTER * state.length, rejected=state.rejected + 1)
    forgotten = shorter._replace(
        direction=_steepest(state.gradient, state.moves),
        length=jnp.ones_like(state.length),
        moves=jnp.zeros_like(state.moves),
        changes=jnp.zeros_like(state.changes),
        curvatures=jnp.zeros_like(state.curvatures),
    )
    # Steepest descent itself may go on to be shortened: without memory there is nothing to forget.
    is_misled = (state.length < SHORTEST) & jnp.any(state.curvatures > 0)
    return choose(is_accepted, accepted, choose(is_misled, forgotten, shorter))


def run(function: ValueAndGradient, point: Float[Array, " parameter"], steps: int, memory: int = 16) -> State:
    """Minimise from a point.

    Args:
        function: Value and gradient; where either is not finite a point is not accepted.
        point: Start, where both are finite.
        steps: Evaluations after the first.
        memory: Pairs of moves and changes.

    Source: Nocedal and Wright, Numerical Optimization, algorithms 7.4 and 7.5. Deviation: backtracking in place of a
    Wolfe search; pairs without positive curvature are not remembered.
    """
    # The first evaluation is a step like the others, so that a program holds the function once.
    start = init(point, memory)
    return jax.lax.scan(lambda state, _: (step(state, function), None), start, length=steps + 1)[0]


def _accept(state: State, trial: Array, value: Array, gradient: Array) -> State:
    move, change = trial - state.point, gradient - state.gradient
    curvature = jnp.vdot(move, change)
    is_useful = curvature > 1e-8 * jnp.linalg.norm(move) * jnp.linalg.norm(change)

    def remember(rows: Array, new: Array) -> Array:
        return jnp.where(is_useful, jnp.concatenate([rows[1:], new[None]]), rows)

    moves, changes = remember(state.moves, move), remember(state.changes, change)
    curvatures = remember(state.curvatures, curvature)
    direction = -_inverse_hessian(gradient, moves, changes, curvatures)
    is_descent = jnp.vdot(direction, gradient) < 0
    direction = jnp.where(jnp.any(curvatures > 0) & is_descent, direction, _steepest(gradient, moves))
    return State(trial, value, gradient, direction, jnp.ones_like(state.length), moves, changes, curvatures,
                 state.rejected)  # fmt: skip


def _inverse_hessian(gradient: Array, moves: Array, changes: Array, curvatures: Array) -> Array:
    """Apply the two-loop recursion; pairs of curvature 0 are not there."""
    inverse = jnp.where(curvatures > 0, 1 / jnp.where(curvatures > 0, curvatures, 1.0), 0.0)

    def backward(q: Array, pair: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        move, change, inverse = pair
        alpha = inverse * jnp.vdot(move, q)
        return q - alpha * change, alpha

    q, alphas = jax.lax.scan(backward, gradient, (moves, changes, inverse), reverse=True)
    square = jnp.vdot(changes[-1], changes[-1])
    r = q * jnp.where(square > 0, curvatures[-1] / jnp.where(square > 0, square, 1.0), 1.0)

    def forward(r: Array, pair: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        move, change, inverse, alpha = pair
        return r + move * (alpha - inverse * jnp.vdot(change, r)), None

    return jax.lax.scan(forward, r, (moves, changes, inverse, alphas))[0]


def _steepest(gradient: Array, moves: Array) -> Array:
    """Return the downhill direction, as long as the last move; without one a tenth at most: no scale is known."""
    # Safe norms have the slope 0 at 0, so that a whole minimisation can be differentiated.
    norm, last = optax.safe_norm(gradient, jnp.finfo(gradient.dtype).tiny), optax.safe_norm(moves[-1], 0.0)
    return -gradient * jnp.where(last > 0, last / norm, jnp.minimum(1.0, 0.1 / norm))
