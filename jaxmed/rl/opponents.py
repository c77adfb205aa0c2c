"""Opponents: past selves in one stacked tree, drawn by a schedule; their ratings; how far a policy can be beaten.

Source: arXiv:2405.16628 (prioritised fictitious self-play); github.com/s-sd/spurl, wss, for its constants.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.config import Count, Share, Size, checked

Schedule = Literal["live", "latest", "uniform", "prioritised"]


@dataclasses.dataclass(frozen=True)
@checked
class OpponentConfig:
    """Whom the policy plays.

    Attributes:
        schedule: live: itself, in all games; of the snapshots, latest: the newest, uniform: any, prioritised: number
            floor(h) with h ~ Normal(H / 2, H / 4) held inside [0, H - 1], of H from the oldest to the newest.
        live: Share of games against itself under the other schedules; they cost one pass of the network instead of two.
        pool: Snapshots that are kept.
        every: Iterations between snapshots.
        groups: Opponents drawn at a time; games are split among them. The chance of each opponent in each game is the
            schedule's, but the games of a group share theirs, so that a step takes as many products as groups.
    """

    schedule: Schedule = "prioritised"
    live: Share = 0.5
    pool: Size = 16
    every: Count = 8
    groups: Size = 4

    def num_live(self, games: int) -> int:
        """Return how many of the games are played against the current policy.

        The share is met as nearly as the others can be split evenly among the groups.
        """
        if self.schedule == "live":
            return games
        others = self.groups * round(games * (1 - self.live) / self.groups)
        return games - min(others, games // self.groups * self.groups)


class Pool(NamedTuple):
    """Snapshots in a ring.

    Attributes:
        params: Every leaf has the snapshots on its first axis.
        count: Snapshots ever taken.
    """

    params: Params
    count: Int[Array, ""]


def make_pool(size: int, params: Params) -> Pool:
    """Return a pool whose first snapshot is `params`."""
    return Pool(jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size, *leaf.shape)), params), jnp.int32(1))


def take_snapshot(pool: Pool, params: Params, is_due: Any = True) -> Pool:
    """Write parameters over the oldest snapshot, where it is time to."""
    slot = pool.count % _size(pool)

    def write(stack: Array, leaf: Array) -> Array:
        return stack.at[slot].set(jnp.where(is_due, leaf, stack[slot]))

    return Pool(jax.tree.map(write, pool.params, params), pool.count + jnp.asarray(is_due, jnp.int32))


def draw(key: KeyArray, schedule: Schedule, pool: Pool, count: int) -> Int[Array, " opponent"]:
    """Draw slots of opponents."""
    stored = jnp.minimum(pool.count, _size(pool))
    if schedule == "uniform":
        age = jax.random.randint(key, (count,), 0, stored)
    elif schedule == "prioritised":
        age = draw_prioritised(key, stored, count)
    else:
        age = jnp.full(count, stored - 1)
    return (pool.count - stored + age) % _size(pool)


def draw_prioritised(key: KeyArray, stored: Int[Array, ""], count: int) -> Int[Array, " opponent"]:
    """Draw numbers floor(h), h ~ Normal(H / 2, H / 4) held inside [0, H - 1]; 0 is the oldest."""
    drawn = stored / 2 + stored / 4 * jax.random.normal(key, (count,))
    return jnp.floor(jnp.clip(drawn, 0, stored - 1)).astype(jnp.int32)


def pick(pool: Pool, slot: Int[Array, ""]) -> Params:
    """Return one snapshot."""
    return jax.tree.map(lambda stack: stack[slot], pool.params)


def answer_in_groups(
    act: Callable[[Params, KeyArray, Any], Any], key: KeyArray, pool: Pool, slots: Int[Array, " group"], seen: Any
) -> Any:
    """Let groups of games play against snapshots, each in turn against its own.

    Args:
        act: (parameters, key, what some games see) -> their moves.
        key: Consumed.
        pool: Snapshots.
        slots: The snapshot of each group.
        seen: What all games see, games first; their number is a multiple of the groups'.
    """

    def play(group: tuple[KeyArray, Array, Any]) -> Any:
        key, slot, seen = group
        return act(pick(pool, slot), key, seen)

    parts = jax.tree.map(lambda leaf: leaf.reshape(len(slots), -1, *leaf.shape[1:]), seen)
    moves = jax.lax.map(play, (jax.random.split(key, len(slots)), slots, parts))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), moves)


def elo(scores: Float[Array, "player player"], rounds: int = 200) -> Float[Array, " player"]:
    """Rate players by their scores against each other.

    Args:
        scores: Share that the player of the row wins from the player of the column, ties half; the diagonal is ignored.
        rounds: Rounds of the fit.

    Returns:
        Ratings in Elo points with mean 0: 400 points are odds of ten to one. Scores are drawn to a tie by the weight
        of a hundredth of a match, so that one who never loses has a rating.

    Source: Bradley and Terry 1952; the fixed point of Hunter, Ann. Statist. 2004.
    """
    others = 1 - jnp.eye(len(scores))
    wins = (0.99 * scores + 0.005) * others
    matches = wins + wins.T

    def improve(strength: Array, _: None) -> tuple[Array, None]:
        expected = (matches / (strength[:, None] + strength)).sum(axis=1)
        strength = wins.sum(axis=1) / expected
        return strength / jnp.exp(jnp.log(strength).mean()), None

    strength, _ = jax.lax.scan(improve, jnp.ones(len(scores)), None, length=rounds)
    return 400 * jnp.log10(strength)


def exploitability(rewards: Float[Array, " rival"]) -> Scalar:
    """Return how much the best of some rivals gains on a policy per step, at least 0.

    Args:
        rewards: Mean reward of the policy against each rival, in a game of zero sum.
    """
    return jnp.maximum(-rewards.min(), 0.0)


def _size(pool: Pool) -> int:
    return len(jax.tree.leaves(pool.params)[0])
