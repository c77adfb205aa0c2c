"""One game step by step: who proposed what, what the verifier said, who won."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.rl import environment
from jaxmed.systems.selfplay.system_one import SystemOne
from jaxmed.systems.selfplay.thinking import ThinkConfig, make_judge, player_of, score_masks


class Debate(NamedTuple):
    """A game of the policy against itself.

    Attributes:
        masks: Before each step, and after the last.
        flips: What the player would flip.
        rival_flips: What the rival would.
        values: D of the player's proposal.
        rival_values: D of the rival's.
        is_won: The player's proposal is at least as good.
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
) -> Debate:
    """Play a game from a mask, and keep its course; `level` as in `make_judge`."""
    player = player_of(config, image.shape)
    verify = partial(score_masks, system.config, make_judge(system, image[None], config.prior_weight, level))
    cases = environment.make_cases(verify, image[None], mask[None])

    def advance(game: environment.State, key: KeyArray) -> tuple[environment.State, Any]:
        own_key, rival_key = jax.random.split(key)
        parameters, _ = player.apply(policy, environment.observe(cases.images, game))
        proposals = (player.distribution.sample(key, parameters) for key in (own_key, rival_key))
        after, _, _, info = environment.step(config.play.game, verify, game, *proposals)
        return after, (after.mask[0], after.value[0], jax.tree.map(lambda leaf: leaf[0], info))

    @jax.jit
    def play(keys: Array) -> Any:
        return jax.lax.scan(advance, environment.reset(cases, jnp.zeros(1, jnp.int32)), keys)[1]

    masks, scores, info = jax.tree.map(np.asarray, play(jax.random.split(key, steps)))
    return Debate(
        np.concatenate([np.asarray(mask)[None], masks]), info.flips, info.rival_flips, info.value, info.rival_value,
        info.is_won, np.concatenate([np.asarray(cases.values), scores]),
    )  # fmt: skip
