"""The pixel game without players: flip the voxels for which the verifier's gradient asks, as long as it pays."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmed.rl.pixel_game import Best, begin_best, expand_like
from jaxmed.rl.selfplay import Problem, Verify


class State(NamedTuple):
    """Where the ascent stands: the best masks, and the voxels that are tried next for each image."""

    best: Best
    flips: Int[Array, " image"]


def init(problem: Problem, flips: int) -> State:
    """Begin with the masks of a problem."""
    return State(begin_best(problem.cases), jnp.full(len(problem.cases.images), flips))


def iterate(verify: Verify, steps: int, problem: Problem, state: State) -> State:
    """Take some steps of `ascend`."""
    judge = partial(verify, problem.verifier, jnp.arange(len(state.flips)))
    masks, values, flips = ascend(judge, state.best.mask, state.flips, steps)
    return State(Best(masks, values), flips)


def ascend(
    score: Callable[[Float[Array, "image *space"]], Float[Array, " image"]],
    masks: Bool[Array, "image *space"],
    flips: Int[Array, " image"],
    steps: int,
) -> tuple[Bool[Array, "image *space"], Float[Array, " image"], Int[Array, " image"]]:
    """Ascend the verifier's score.

    A step flips the voxels whose flip promises most by the gradient, up to `flips` of those that promise anything. The
    new mask stays where it scores higher; otherwise the image's number of flips is halved, and after one flip that
    does not pay nothing more is tried (0).

    Args:
        score: D of masks between 0 and 1; each image's by itself.
        masks: To begin with.
        flips: Voxels to flip at once, for each image.
        steps: At most; each costs a gradient and an evaluation.

    Returns:
        The best masks, their scores, and the flips that were tried last.
    """
    flat = (len(masks), -1)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        masks, flips = carry
        soft = masks.astype(jnp.float32)
        value, pullback = jax.vjp(score, soft)
        (slope,) = pullback(jnp.ones_like(value))
        promise = (slope * (1 - 2 * soft)).reshape(flat)
        order = jnp.argsort(jnp.argsort(-promise, axis=1), axis=1)
        chosen = ((order < flips[:, None]) & (promise > 0)).reshape(masks.shape)
        proposal = masks ^ chosen
        is_better = score(proposal.astype(jnp.float32)) > value
        kept = jnp.where(expand_like(is_better, masks), proposal, masks)
        return (kept, jnp.where(is_better, flips, flips // 2)), None

    (masks, flips), _ = jax.lax.scan(step, (masks, flips), length=steps)
    return masks, score(masks.astype(jnp.float32)), flips
