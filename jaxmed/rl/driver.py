"""Games driven from the host: ways to play as compiled functions, and the budget for which one is played.

All ways stand over problems of the same form and keep the best mask of each image, so that they can be compared: a
policy that learns, random proposals, the ascent along the verifier's gradient, tree search, and the patch game.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import NonNegative, Whole, checked
from jaxmed.errors import InputError
from jaxmed.models.policy import GaussianMlpConfig, TopkUnetConfig
from jaxmed.rl import ascent, patch_play, search, selfplay
from jaxmed.rl.patch_game import PatchGame
from jaxmed.rl.patch_play import PatchPlayConfig, PatchProblem
from jaxmed.rl.policies import make_policy
from jaxmed.rl.search import SearchConfig
from jaxmed.rl.selfplay import Problem, SelfPlayConfig, Verify

Mode = Literal["learn", "propose", "grad", "mcts"]
Game = Literal["pixel", "patch"]


@dataclasses.dataclass(frozen=True)
@checked
class Budget:
    """When to stop.

    Attributes:
        steps: Steps of the game, over all games and images; 0 leaves System I's answer.
        seconds: After compilation; 0 for no limit.
        patience: Iterations without a better mask after which thinking ends; 0 never ends early.
        tolerance: What counts as better, in D.
    """

    steps: Whole = 65_536
    seconds: NonNegative = 0.0
    patience: Whole = 10
    tolerance: NonNegative = 1e-4


class Point(NamedTuple):
    """The best so far: after how many steps of the game and seconds, the score of each image's mask, and the masks."""

    steps: int
    seconds: float
    values: Float32[np.ndarray, " image"]
    masks: Bool[np.ndarray, "image *space"]


class Trace(NamedTuple):
    """The course of thinking, one entry before it and one after every iteration.

    Attributes:
        steps: Steps of the game so far.
        seconds: So far, without compilation.
        values: Score of the best mask of each image so far.
        masks: Those masks.
    """

    steps: Int[np.ndarray, " point"]
    seconds: Float[np.ndarray, " point"]
    values: Float32[np.ndarray, "point image"]
    masks: Bool[np.ndarray, "point image *space"]


class Way(NamedTuple):
    """A way to play.

    Attributes:
        size: Steps of the game in an iteration.
        begin: (key, problem, parameters of a policy or None) -> state, which has the field `best`.
        advance: (problem, state) -> state.
    """

    size: int
    begin: Any
    advance: Any


def check_game(game: Game, mode: Mode, patches: int, shape: tuple[int, ...]) -> None:
    """Refuse what the patch game cannot do.

    Raises:
        InputError: Nobody is to learn, or images of this shape are not so many patches wide.
    """
    if game == "patch" and mode != "learn":
        raise InputError("think.mode", "learn for the patch game", mode, "or choose --game pixel")
    if game == "patch" and any(length % patches for length in shape):
        raise InputError("think.patch.game.patches", f"a number that divides {shape}", patches)


def make_problem(
    game: Game,
    rules: PatchGame,
    verify: Verify,
    judge: Any,
    images: Float[Array, "image *space"],
    start: Bool[Array, "image *space"],
    probability: Float[Array, "image *space"],
) -> Problem | PatchProblem:
    """Return the images as a game has them: with the masks it begins from, or in patches, scored by a probability."""
    if game == "patch":
        return patch_play.make_patch_problem(rules, verify, judge, images, probability)
    return selfplay.make_problem(verify, judge, images, start)


@lru_cache(maxsize=32)
def make_way(
    game: Game,
    mode: Mode,
    verify: Verify,
    shape: tuple[int, ...],
    play: SelfPlayConfig,
    patch: PatchPlayConfig,
    searching: SearchConfig,
    network: TopkUnetConfig | GaussianMlpConfig,
) -> Way:
    """Return a way to play on images [image *space] of a shape; equal arguments are compiled once.

    The pixel game has as many games on each image, and its proposals come from `mode`; patches are played for by a
    policy that learns, whatever the mode. `play`, `searching` and `network` are the pixel game's, `patch` the other's.
    """
    if game == "patch":
        size, model = patch.steps_per_iteration, patch_play.make_patch_policy(patch)

        def begin(key: KeyArray, problem: Any, policy: Params | None) -> Any:
            return patch_play.init(key, patch, model, problem, policy)

        def advance(problem: Any, state: Any) -> Any:
            return patch_play.iterate(patch, model, verify, problem, state)[0]

    elif mode == "grad":
        size = shape[0] * play.steps

        def begin(key: KeyArray, problem: Any, policy: Params | None) -> Any:
            return ascent.init(problem, play.game.num_flips(shape[1:]))

        def advance(problem: Any, state: Any) -> Any:
            return ascent.iterate(verify, play.steps, problem, state)

    elif mode == "mcts":
        search.require_mctx()
        play = play.for_images(shape[0])
        size = play.steps_per_iteration * searching.simulations

        def begin(key: KeyArray, problem: Any, policy: Params | None) -> Any:
            return search.init(key, play.games, problem)

        def advance(problem: Any, state: Any) -> Any:
            return search.iterate(searching, play.game, verify, play.steps, problem, state)

    else:
        play = dataclasses.replace(play.for_images(shape[0]), mode=mode)
        size, player = play.steps_per_iteration, make_policy(network, play.game, shape[1:])

        def begin(key: KeyArray, problem: Any, policy: Params | None) -> Any:
            return selfplay.init(key, play, player, problem, policy)

        def advance(problem: Any, state: Any) -> Any:
            return selfplay.iterate(play, player, verify, problem, state)[0]

    return Way(size, jax.jit(begin), jax.jit(advance))


def play_for(
    budget: Budget,
    way: Way,
    key: KeyArray,
    problem: Any,
    policy: Params | None,
    points: list[Point],
    watch: Callable[[int, float], None] | None = None,
) -> tuple[Any, Literal["budget", "time", "plateau"]]:
    """Play until the budget is spent, the time is up, or nothing gets better; return the state, and why it ended.

    The last of `points` is where the run stands, whose steps count; one is added after every iteration, and
    `watch(steps, mean best D)` is called.
    """
    state = way.begin(key, problem, policy)
    advance = way.advance.lower(problem, state).compile()  # the clock runs afterwards
    done, spent, waited = points[-1].steps, 0.0, 0
    while done < budget.steps:
        began = time.perf_counter()
        state = jax.block_until_ready(advance(problem, state))
        done, spent = done + way.size, spent + time.perf_counter() - began
        points.append(Point(done, spent, np.asarray(state.best.value), np.asarray(state.best.mask)))
        if watch is not None:
            watch(done, float(np.mean(points[-1].values)))
        gain = float(np.mean(points[-1].values - points[-2].values))
        waited = 0 if gain > budget.tolerance else waited + 1
        if budget.patience and waited >= budget.patience:
            return state, "plateau"
        if budget.seconds and spent >= budget.seconds:
            return state, "time"
    return state, "budget"
