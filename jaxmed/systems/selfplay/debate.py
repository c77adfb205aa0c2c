"""One game step by step: who proposed what, what the verifier said, who won."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.rl import patch_game, patch_play, pixel_game
from jaxmed.rl.opponents import OpponentConfig
from jaxmed.rl.patch_game import mark_patches
from jaxmed.rl.patch_play import PatchPlayConfig
from jaxmed.systems.selfplay.system_one import SystemOne, generate
from jaxmed.systems.selfplay.thinking import (
    Game,
    Judge,
    ThinkConfig,
    make_judge,
    patch_problem,
    player_of,
    score_masks,
)


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


def debate(
    key: KeyArray,
    system: SystemOne,
    config: ThinkConfig,
    policy: Params,
    image: Float[Array, "*space"],
    mask: Bool[Array, "*space"],
    steps: int,
    level: Float[Array, " one"] | None = None,
    game: Game = "pixel",
) -> Debate:
    """Play a game from a mask, and keep its course; `level` as in `make_judge`.

    The patch game begins with nothing, and may be stopped before its last step.
    """
    judge = make_judge(system, image[None], config.prior_weight, level)
    if game == "patch":
        return _debate_patches(key, system, config.patch, policy, image, mask, steps, judge)
    player, verify = player_of(config, image.shape), partial(score_masks, system.config, judge)
    cases = pixel_game.make_cases(verify, image[None], mask[None])

    def advance(state: pixel_game.State, key: KeyArray) -> tuple[pixel_game.State, Any]:
        own_key, rival_key = jax.random.split(key)
        parameters, _ = player.apply(policy, pixel_game.observe(cases.images, state))
        proposals = (player.distribution.sample(key, parameters) for key in (own_key, rival_key))
        after, _, _, info = pixel_game.step(config.play.game, verify, state, *proposals)
        return after, (after.mask[0], after.value[0], jax.tree.map(lambda leaf: leaf[0], info))

    @jax.jit
    def play(keys: Array) -> Any:
        return jax.lax.scan(advance, pixel_game.reset(cases, jnp.zeros(1, jnp.int32)), keys)[1]

    masks, scores, info = jax.tree.map(np.asarray, play(jax.random.split(key, steps)))
    return Debate(
        np.concatenate([np.asarray(mask)[None], masks]), info.flips, info.rival_flips, info.value, info.rival_value,
        info.is_won, np.concatenate([np.asarray(cases.values), scores]),
    )  # fmt: skip


def _debate_patches(
    key: KeyArray,
    system: SystemOne,
    config: PatchPlayConfig,
    policy: Params,
    image: Array,
    mask: Array,
    turns: int,
    judge: Judge,
) -> Debate:
    alone = OpponentConfig(schedule="live", groups=1, pool=1)
    config = dataclasses.replace(config, games=1, turns=turns, minibatches=1, opponents=alone)
    model, verify = patch_play.make_patch_policy(config), partial(score_masks, system.config)
    probability = generate(system.config, system.params, image[None])

    @jax.jit
    def play(key: KeyArray, policy: Params) -> Any:
        problem = patch_problem(system.config, config, judge, image[None], mask[None], probability)
        state = patch_play.init(key, config, model, problem, policy)
        found = patch_play.rollout(config, model, problem, state, key)
        last = patch_game.erase(jax.tree.map(lambda leaf: leaf[-1, 1], found.state), found.patch[-1, 1])
        named = jnp.concatenate([found.state.is_erased[:, 0, 0], last.is_erased]) & ~problem.is_empty
        chosen = jax.nn.one_hot(found.patch[..., 0].T, named.shape[1], dtype=bool)
        masks, flips, answers = (mark_patches(config.game, image.shape, part) for part in (named, *chosen))
        scores = verify(judge, jnp.zeros(turns + 1, jnp.int32), masks.astype(jnp.float32))
        info = jax.tree.map(lambda leaf: leaf[:, 0], found.info)
        return (masks, flips, answers, *info, scores), found.is_played[:, 0, 0].sum()

    course, count = jax.tree.map(np.asarray, play(key, policy))
    return Debate(*(part[: count + (len(part) > turns)] for part in course))
