"""The patch game of RLSP: two players name patches in turn, and the one that shows more of the object wins.

The image is cut into patches; an object-presence classifier, trained from labels of whole images, has scored every
patch before the game begins, so that a turn is a look-up. The player's patch is erased, then the rival's; the higher
score wins 1 and the other loses 1; naming a patch that is empty costs 1. Either player may stop the game, which
multiplies what this turn won: the good moment to stop is when the rival has no object left to show.

Source: arXiv:2405.16628; github.com/s-sd/spurl, folder wss.
Deviation, undone by `match_release`: the rival's patch is scored after the player's is erased, scores are compared by
    the object's probability and a tie wins nothing, and a game that ends too early or too late costs each player 1. The
    source scores both patches as they were, takes the largest of four probabilities instead of two, so that the player
    wins only where its own absence of the object is the largest, and takes both penalties from the player. Patches
    that are empty from the start are told by the caller, and any grid will do. As in the source's code, though not in
    its abstract, the turn of a stop is the last.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmed.config import NonNegative, Share, Size, Whole, checked
from jaxmed.rl.pixel_game import spread_blocks


@dataclasses.dataclass(frozen=True)
@checked
class PatchGame:
    """Rules.

    Attributes:
        patches: Patches along each axis of an image; the source cuts 512 pixels into 16.
        min_turns: Ending before so many turns have passed costs 1.
        max_turns: So does ending after so many; two turns later the game is cut.
        stop_factor: What the turn of a stop counts.
        empty_score: Probability of the object in an erased patch, by the classifier.
        match_release: Play by the source's slips (see the head of this file).
    """

    patches: Size = 16
    min_turns: Whole = 2
    max_turns: Whole = 2048
    stop_factor: NonNegative = 100.0
    empty_score: Share = 0.0
    match_release: bool = False

    def __post_init__(self) -> None:
        if self.min_turns > self.max_turns:
            raise ValueError(f"min_turns, max_turns: expected min <= max, found {self.min_turns}, {self.max_turns}")

    def edges(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the edges of a patch of an image, in voxels."""
        if any(length % self.patches for length in shape):
            raise ValueError(f"patches: expected a number that divides {shape}, found {self.patches}")
        return tuple(length // self.patches for length in shape)


class State(NamedTuple):
    """Where the games stand.

    Attributes:
        image: Number of each game's image.
        is_erased: Patches that are gone, or were empty from the start.
        turns: Turns since the reset.
    """

    image: Int[Array, " game"]
    is_erased: Bool[Array, "game patch"]
    turns: Int[Array, " game"]


class Info(NamedTuple):
    """What a turn showed.

    Attributes:
        value: Probability of the object in the player's patch.
        rival_value: Probability in the rival's.
        is_won: The player's shows at least as much.
    """

    value: Float[Array, " game"]
    rival_value: Float[Array, " game"]
    is_won: Bool[Array, " game"]


class Move(NamedTuple):
    """What one player does.

    Attributes:
        patch: The patch that it names.
        stop: Whether it ends the game.
    """

    patch: Int[Array, " game"]
    stop: Bool[Array, " game"]


def reset(is_empty: Bool[Array, "image patch"], image: Int[Array, " game"]) -> State:
    """Begin games on the images of these numbers."""
    return State(image, is_empty[image], jnp.zeros(image.shape, jnp.int32))


def erase(state: State, patch: Int[Array, " game"]) -> State:
    """Return what the rival sees once the player has named its patch."""
    return state._replace(is_erased=state.is_erased.at[jnp.arange(len(patch)), patch].set(True))


def observe(features: Float[Array, "image patch feature"], state: State) -> Float[Array, "game patch feature"]:
    """Return the patches' features, zeros where they are erased; pixels are features too."""
    return jnp.where(state.is_erased[..., None], 0.0, features[state.image])


def step(
    game: PatchGame, scores: Float[Array, "image patch"], state: State, move: Move, rival: Move
) -> tuple[State, Float[Array, "game 2"], Bool[Array, " game"], Info]:
    """Play a turn.

    Args:
        game: Rules.
        scores: Probability of the object in each patch, from the classifier.
        state: Before.
        move: The player's.
        rival: The rival's, that has seen the player's patch erased.

    Returns:
        The next state, the rewards of player and rival, whether the game is over, and what both showed.
    """
    empty = _at(state.is_erased, move.patch)
    rival_empty = _at(state.is_erased, rival.patch)
    if not game.match_release:
        rival_empty = rival_empty | (move.patch == rival.patch)
    shown = jnp.where(empty, game.empty_score, scores[state.image, move.patch])
    rival_shown = jnp.where(rival_empty, game.empty_score, scores[state.image, rival.patch])
    if game.match_release:
        is_first = 1 - shown >= jnp.maximum(shown, jnp.maximum(1 - rival_shown, rival_shown))
        won = jnp.where(is_first, 1.0, -1.0)
    else:
        won = jnp.sign(shown - rival_shown)
    stop = move.stop | rival.stop
    won = jnp.where(stop, won * game.stop_factor, won)
    is_over = stop | (state.turns >= game.max_turns + 2)
    is_late_or_early = (state.turns < game.min_turns) | (state.turns > game.max_turns)
    is_untimely = (stop if game.match_release else is_over) & is_late_or_early
    penalty = jnp.where(is_untimely, 1.0, 0.0)
    own = won - penalty * (2.0 if game.match_release else 1.0) - empty
    theirs = -won - (0.0 if game.match_release else penalty) - rival_empty
    after = erase(erase(state, move.patch), rival.patch)._replace(turns=state.turns + 1)
    return after, jnp.stack([own, theirs], axis=-1), is_over, Info(shown, rival_shown, shown >= rival_shown)


def mark_patches(
    game: PatchGame, shape: tuple[int, ...], marked: Bool[Array, "game patch"]
) -> Bool[Array, "game *shape"]:
    """Return the masks of images of a shape that some of their patches make."""
    return spread_blocks(game.edges(shape), marked.reshape(len(marked), *(game.patches,) * len(shape)))


def _at(flags: Bool[Array, "game patch"], patch: Int[Array, " game"]) -> Bool[Array, " game"]:
    return jnp.take_along_axis(flags, patch[:, None], axis=1)[:, 0]
