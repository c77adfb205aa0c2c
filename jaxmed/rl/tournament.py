"""Matches between policies without learning: debates move by move, and tables of results of the pixel game."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.rl import patch_game, patch_play, pixel_game
from jaxmed.rl.opponents import OpponentConfig, elo, exploitability
from jaxmed.rl.patch_play import PatchPlayConfig, PatchProblem
from jaxmed.rl.pixel_game import PixelGame
from jaxmed.rl.policies import Policy
from jaxmed.rl.selfplay import Problem, SelfPlayConfig, Verify


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


class Debate(NamedTuple):
    """A game of the policy against itself.

    Attributes:
        masks: Before each step, and after the last.
        flips: What the player would flip; the patch that it names.
        rival_flips: What the rival would.
        values: D of the player's proposal; the object's probability in its patch.
        rival_values: The same of the rival's.
        is_won: The player's is at least as good.
        scores: D of `masks`.
    """

    masks: Bool[np.ndarray, "step_1 *space"]
    flips: Bool[np.ndarray, "step *space"]
    rival_flips: Bool[np.ndarray, "step *space"]
    values: Float32[np.ndarray, " step"]
    rival_values: Float32[np.ndarray, " step"]
    is_won: Bool[np.ndarray, " step"]
    scores: Float32[np.ndarray, " step_1"]


class Match(NamedTuple):
    """Snapshots of a policy against each other.

    Attributes:
        scores: Share of the steps that the snapshot of the row wins from that of the column, ties half.
        elo: Rating of each, with mean 0.
        exploitability: What the best of the others gains on each, in D per step, at least 0.
    """

    scores: Float[np.ndarray, "snapshot snapshot"]
    elo: Float[np.ndarray, " snapshot"]
    exploitability: Float[np.ndarray, " snapshot"]


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
    """Let two policies play games without learning, spread evenly over the images of a problem; no game is cut.

    They draw their actions where they `explore`, and take the likeliest otherwise.
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
    """Let every policy of a stack play every one of another; all matches use the same random numbers."""

    def match(player: Params, rival: Params) -> tuple[Array, Array]:
        info = play(key, game, policy, verify, problem, player, rival, games, steps).info
        reward = info.value - info.rival_value
        return reward.mean(), ((reward > 0) + 0.5 * (reward == 0)).mean()

    rewards, scores = jax.lax.map(lambda player: jax.lax.map(lambda rival: match(player, rival), rivals), params)
    return Results(rewards, scores)


def rate_policies(
    key: KeyArray, config: SelfPlayConfig, policy: Policy, verify: Verify, problem: Problem, params: list[Params]
) -> Match:
    """Let policies play each other, as many games and steps as of an iteration of `config`; compiled here."""
    config = config.for_images(len(problem.cases.images))

    @jax.jit
    def play_all(problem: Problem, stacked: Params) -> Results:
        return compare(key, config.game, policy, verify, problem, stacked, stacked, config.games, config.steps)

    found = play_all(problem, jax.tree.map(lambda *leaves: jnp.stack(leaves), *params))
    gains = np.array([float(exploitability(row)) for row in found.rewards])
    return Match(np.asarray(found.scores), np.asarray(elo(found.scores)), gains)


# Compiled here, once for equal rules: a debate is shown of every file that is thought about.
_play = partial(jax.jit, static_argnums=(1, 2, 3, 7, 8))(play)


def debate(
    key: KeyArray, game: PixelGame, policy: Policy, verify: Verify, problem: Problem, params: Params, steps: int
) -> Debate:
    """Let a policy play a game with itself, on the first image of a problem; compiled here."""
    trace, cases = _play(key, game, policy, verify, problem, params, params, 1, steps), problem.cases
    info = jax.tree.map(lambda leaf: np.asarray(leaf)[:, 0], trace.info)
    masks, scores = (
        np.concatenate([np.asarray(first[:1]), np.asarray(later)[:, 0]])
        for first, later in ((cases.masks, trace.mask), (cases.values, trace.value))
    )
    return Debate(masks, info.flips, info.rival_flips, info.value, info.rival_value, info.is_won, scores)


def debate_patches(
    key: KeyArray, config: PatchPlayConfig, verify: Verify, problem: PatchProblem, params: Params, turns: int
) -> Debate:
    """Let a policy play the patch game with itself, on the only image of a problem, until it is stopped."""
    alone = OpponentConfig(schedule="live", groups=1, pool=1)
    config = dataclasses.replace(config, games=1, turns=turns, minibatches=1, opponents=alone)
    trajectory, count = jax.tree.map(np.asarray, _play_patches(key, config, verify, problem, params))
    return Debate(*(part[: count + (len(part) > turns)] for part in trajectory))


@partial(jax.jit, static_argnums=(1, 2))
def _play_patches(
    key: KeyArray, config: PatchPlayConfig, verify: Verify, problem: PatchProblem, params: Params
) -> tuple[tuple[Array, ...], Array]:
    """Return what a debate keeps, a row for each turn, and how many turns were played."""
    model, shape = patch_play.make_patch_policy(config), problem.cases.images.shape[1:]
    found = patch_play.rollout(config, model, problem, patch_play.init(key, config, model, problem, params), key)
    last = patch_game.erase(jax.tree.map(lambda leaf: leaf[-1, 1], found.state), found.patch[-1, 1])
    named = jnp.concatenate([found.state.is_erased[:, 0, 0], last.is_erased]) & ~problem.is_empty
    chosen = jax.nn.one_hot(found.patch[..., 0].T, named.shape[1], dtype=bool)
    masks, flips, rival_flips = (patch_game.mark_patches(config.game, shape, part) for part in (named, *chosen))
    scores = verify(problem.verifier, jnp.zeros(config.turns + 1, jnp.int32), masks.astype(jnp.float32))
    info = jax.tree.map(lambda leaf: leaf[:, 0], found.info)
    return (masks, flips, rival_flips, *info, scores), found.is_played[:, 0, 0].sum()
