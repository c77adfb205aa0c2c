"""Matches between policies of the pixel game, without learning: the debate move by move, and tables of results."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.rl import pixel_game
from jaxmed.rl.pixel_game import PixelGame
from jaxmed.rl.policies import Policy
from jaxmed.rl.selfplay import Problem, Verify


class Trace(NamedTuple):
    """Games move by move.

    Attributes:
        image: Number of each game's image.
        mask: After each step.
        value: D of it.
        info: What both proposed, what it was worth, who won.
    """

    image: Int[Array, " game"]
    mask: Bool[Array, "time game *shape"]
    value: Float[Array, "time game"]
    info: pixel_game.Info


class Results(NamedTuple):
    """Every policy of a stack against every other.

    Attributes:
        rewards: Mean reward of the policy of the row against that of the column.
        scores: Share of steps that it won, ties half.
    """

    rewards: Float[Array, "player rival"]
    scores: Float[Array, "player rival"]


def play(
    key: KeyArray,
    game: PixelGame,
    policy: Policy,
    verify: Verify,
    problem: Problem,
    params: Params,
    rival: Params,
    games: int,
    steps: int,
    explore: bool = True,
) -> Trace:
    """Let two policies play.

    Args:
        key: Consumed.
        game: Rules; no game is cut.
        policy: The network of both.
        verify: What judges.
        problem: Images, spread evenly over the games.
        params: The player's.
        rival: The rival's.
        games: Played at the same time.
        steps: Of every game.
        explore: Draw actions; otherwise both take the likeliest.
    """
    cases, judge = problem.cases, partial(verify, problem.verifier)
    start = pixel_game.reset(cases, jnp.arange(games) % len(cases.images))

    def act(params: Params, key: KeyArray, observation: Array) -> Array:
        parameters, _ = policy.apply(params, observation)
        return policy.distribution.sample(key, parameters) if explore else policy.distribution.mode(parameters)

    def advance(state: pixel_game.State, key: KeyArray) -> tuple[pixel_game.State, Any]:
        own_key, rival_key = jax.random.split(key)
        observation = pixel_game.observe(cases.images, state)
        action, answer = act(params, own_key, observation), act(rival, rival_key, observation)
        state, _, _, info = pixel_game.step(game, judge, state, action, answer)
        return state, (state.mask, state.value, info)

    _, (mask, value, info) = jax.lax.scan(advance, start, jax.random.split(key, steps))
    return Trace(start.image, mask, value, info)


def compare(
    key: KeyArray,
    game: PixelGame,
    policy: Policy,
    verify: Verify,
    problem: Problem,
    params: Params,
    rivals: Params,
    games: int,
    steps: int,
) -> Results:
    """Let every policy of a stack play every one of another.

    Args:
        key: Consumed; all matches use the same random numbers.
        game: Rules.
        policy: The network of all.
        verify: What judges.
        problem: Images.
        params: Stacked parameters of the players.
        rivals: Stacked parameters of their rivals; a pool's, for a table of snapshots or for exploitability.
        games: Of each match.
        steps: Of every game.
    """

    def match(player: Params, rival: Params) -> tuple[Array, Array]:
        info = play(key, game, policy, verify, problem, player, rival, games, steps).info
        reward = info.value - info.rival_value
        return reward.mean(), ((reward > 0) + 0.5 * (reward == 0)).mean()

    rewards, scores = jax.lax.map(lambda player: jax.lax.map(lambda rival: match(player, rival), rivals), params)
    return Results(rewards, scores)
