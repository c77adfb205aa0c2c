"""The pixel game: two players propose flips of a mask, a verifier judges, the better proposal stays.

A state is a mask of one image. Both players see image and mask and name the pixels that they would flip; the verifier
D values both results; the reward of the player is the difference, its rival's the negative of it. All functions stand
over a leading axis of games; shapes are of images or volumes.

Source: arXiv:2506.22075; the rules are those of its reference implementation, github.com/s-sd/system-II-vision
    (`rule="repo"`).
Deviation: the default rule is "fair": both players flip the same number of pixels, and desires are ranked before they
    are clipped to [0, 1]. In the reference the rival's desires are cast to bool, so that all its positive pixels flip,
    and clipped desires tie at 1, so that all ties flip.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxmed.config import Count, Size, checked

Verify: TypeAlias = Callable[[Int[Array, " game"], Float[Array, "game *shape"]], Float[Array, " game"]]
"""(number of the image, mask of zeros and ones) of each game -> value of the mask, the higher the better."""

Action: TypeAlias = Float[Array, "game *grid"] | Int[Array, "game flip"]
"""How much each pixel of the grid wants to flip; or numbers of the pixels to flip, ~number for one that stays."""


@dataclasses.dataclass(frozen=True)
@checked
class PixelGame:
    """Rules.

    Attributes:
        fraction: Share of the grid's pixels that a player flips: those at or above that percentile.
        flips: Their number, where it is not to follow from `fraction`.
        rule: "fair" (see the head of this file); "elitist": the old mask stays where both proposals are worse; "repo":
            the reference, for actions that are desires.
        at_most_k: Only named pixels with a positive desire flip, so that a player can
            correct a single pixel, or pass.
        horizon: A game is cut after this many steps and one, as the reference's counter does.
        super_pixel: Edge of the blocks that flip together, in voxels, for each axis or for all.
    """

    fraction: float = 0.01
    flips: Count | None = None
    rule: Literal["repo", "fair", "elitist"] = "fair"
    at_most_k: bool = False
    horizon: Count = 1024
    super_pixel: Size | tuple[Size, ...] = 1

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: expected a number above 0 and up to 1, found {self.fraction}")
        if self.rule == "repo" and (self.at_most_k or self.flips is not None):
            raise ValueError("rule: repo flips all pixels above a percentile; expected neither flips nor at_most_k")

    def blocks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the edges of a super-pixel of an image."""
        edges = self.super_pixel if isinstance(self.super_pixel, tuple) else (self.super_pixel,) * len(shape)
        if len(edges) != len(shape) or any(length % edge for length, edge in zip(shape, edges, strict=True)):
            raise ValueError(f"super_pixel: expected edges that divide {shape}, found {edges}")
        return edges

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of an action for images of a shape."""
        return tuple(length // edge for length, edge in zip(shape, self.blocks(shape), strict=True))

    def num_flips(self, shape: tuple[int, ...]) -> int:
        """Return how many pixels of the grid a player names: those that reach the percentile, where no two tie."""
        pixels = math.prod(self.grid(shape))
        if self.flips is None:
            # Rounded first: (1 - .01) * 100 must not become 100 pixels by its last digit.
            return pixels - math.ceil(round((1 - self.fraction) * (pixels - 1), 6))
        if self.flips > pixels:
            raise ValueError(f"flips: expected at most the {pixels} pixels of the grid, found {self.flips}")
        return self.flips


class Cases(NamedTuple):
    """The images that are played for.

    Attributes:
        images: Intensities, by the verifier's normalisation.
        masks: Where every game on an image begins.
        values: D of those masks.
    """

    images: Float[Array, "image *shape"]
    masks: Bool[Array, "image *shape"]
    values: Float[Array, " image"]


class State(NamedTuple):
    """Where the games stand.

    Attributes:
        image: Number of each game's image.
        mask: Present masks.
        value: D of them.
        steps: Steps since the reset.
    """

    image: Int[Array, " game"]
    mask: Bool[Array, "game *shape"]
    value: Float[Array, " game"]
    steps: Int[Array, " game"]


class Info(NamedTuple):
    """What a step showed.

    Attributes:
        value: D of the player's proposal.
        rival_value: D of the rival's.
        is_won: The player's proposal is at least as good.
        flips: Voxels that the player would flip.
        rival_flips: Voxels that the rival would flip.
    """

    value: Float[Array, " game"]
    rival_value: Float[Array, " game"]
    is_won: Bool[Array, " game"]
    flips: Bool[Array, "game *shape"]
    rival_flips: Bool[Array, "game *shape"]


class Best(NamedTuple):
    """The best mask of each image that any game has reached, and D of it; resets do not touch it."""

    mask: Bool[Array, "image *shape"]
    value: Float[Array, " image"]


def make_cases(verify: Verify, images: Float[Array, "image *shape"], masks: Bool[Array, "image *shape"]) -> Cases:
    """Value the masks that games begin with."""
    return Cases(images, masks, verify(jnp.arange(len(images)), masks.astype(jnp.float32)))


def reset(cases: Cases, image: Int[Array, " game"]) -> State:
    """Begin games on the images of these numbers."""
    return State(image, cases.masks[image], cases.values[image], jnp.zeros(image.shape, jnp.int32))


def choose(flag: Bool[Array, " game"], new: Any, old: Any) -> Any:
    """Return, of two records of games, the new one's games where the flag is set and the old one's elsewhere."""
    return jax.tree.map(lambda a, b: jnp.where(expand_like(flag, b), a, b), new, old)


def observe(images: Float[Array, "image *shape"], state: State) -> Float[Array, "game *shape 2"]:
    """Return what both players see: image and mask."""
    return jnp.stack([images[state.image], state.mask.astype(images.dtype)], axis=-1)


def step(
    game: PixelGame, verify: Verify, state: State, action: Action, rival: Action
) -> tuple[State, Float[Array, " game"], Bool[Array, " game"], Info]:
    """Let both players propose and keep the better proposal; a tie is the player's.

    The verifier is called once, with the player's proposals of all games before the rival's.

    Returns:
        The next state; the player's reward, D(its proposal) - D(the rival's); whether the game is cut here, which is
        for the caller to reset; and both proposals.
    """
    games, *shape = state.mask.shape
    flips, rival_flips = _mark_both(game, tuple(shape), action, rival)
    # Rows of voxels: on a CPU loops over two axes are several times faster than the same ones over three.
    mask = state.mask.reshape(games, -1)
    proposals = jnp.concatenate([mask ^ flips, mask ^ rival_flips])
    values = verify(jnp.tile(state.image, 2), proposals.reshape(2 * games, *shape).astype(jnp.float32))
    value, rival_value = values[:games], values[games:]
    reward = value - rival_value
    is_won = reward >= 0
    kept = jnp.where(is_won[:, None], flips, rival_flips)
    new_value = jnp.where(is_won, value, rival_value)
    if game.rule == "elitist":
        is_worse = new_value < state.value
        kept = kept & ~is_worse[:, None]
        new_value = jnp.where(is_worse, state.value, new_value)
    after = State(state.image, (mask ^ kept).reshape(state.mask.shape), new_value, state.steps + 1)
    info = Info(value, rival_value, is_won, *(each.reshape(state.mask.shape) for each in (flips, rival_flips)))
    return after, reward, after.steps > game.horizon, info


def mark_flips(game: PixelGame, shape: tuple[int, ...], action: Action) -> Bool[Array, "game *grid"]:
    """Mark the pixels of the grid that flip under the fair rule."""
    numbers, grid = _numbers(game, shape, action), game.grid(shape)
    rows, pixels = jnp.arange(len(numbers))[:, None], math.prod(grid)
    marked = jnp.zeros((len(numbers), pixels), bool)
    marked = marked.at[rows, jnp.where(numbers < 0, pixels, numbers)].set(True, mode="drop")
    return marked.reshape(len(numbers), *grid)


def _mark_both(
    game: PixelGame, shape: tuple[int, ...], action: Action, rival: Action
) -> tuple[Bool[Array, "game voxel"], Bool[Array, "game voxel"]]:
    """Mark the voxels that each player flips."""
    if game.rule == "repo":
        marked = _above_percentile(game.fraction, action), jnp.clip(rival, 0, 1) != 0
    else:
        marked = (mark_flips(game, shape, chosen) for chosen in (action, rival))
    flips, rival_flips = (spread_blocks(game.blocks(shape), each).reshape(len(each), -1) for each in marked)
    return flips, rival_flips


def _numbers(game: PixelGame, shape: tuple[int, ...], action: Action) -> Int[Array, "game flip"]:
    """Return the numbers of the pixels that a player names."""
    if not jnp.issubdtype(action.dtype, jnp.floating):
        return action
    grid = game.grid(shape)
    if action.shape[1:] != grid:
        raise ValueError(f"action: expected a desire for each pixel of the grid {grid}, found {action.shape[1:]}")
    desires, numbers = jax.lax.top_k(action.reshape(len(action), -1), game.num_flips(shape))
    return jnp.where(desires > 0, numbers, ~numbers) if game.at_most_k else numbers


def begin_best(cases: Cases) -> Best:
    """Return the masks that games begin with as the best so far."""
    return Best(cases.masks, cases.values)


def update_best(best: Best, state: State) -> Best:
    """Take the best mask of each image among the games where it beats the best so far."""
    is_own = state.image == jnp.arange(len(best.value))[:, None]
    values = jnp.where(is_own, state.value, -jnp.inf)
    winner = jnp.argmax(values, axis=1)
    value = jnp.take_along_axis(values, winner[:, None], axis=1)[:, 0]
    is_better = value > best.value
    mask = jnp.where(expand_like(is_better, best.mask), state.mask[winner], best.mask)
    return Best(mask, jnp.where(is_better, value, best.value))


def agreement(state: State, num_images: int) -> Float[Array, "image *shape"]:
    """Return the share of the games on each image whose present mask holds a voxel."""
    total = jax.ops.segment_sum(state.mask.astype(jnp.float32), state.image, num_images)
    games = jax.ops.segment_sum(jnp.ones(len(state.image)), state.image, num_images)
    return total / expand_like(jnp.maximum(games, 1), total)


def _above_percentile(fraction: float, action: Float[Array, "game *grid"]) -> Bool[Array, "game *grid"]:
    """Mark the clipped desires at or above the percentile, interpolated between neighbours, ties included."""
    clipped = jnp.clip(action, 0, 1).reshape(len(action), -1)
    pixels = clipped.shape[1]
    position = round((1 - fraction) * (pixels - 1), 6)
    below = math.floor(position)
    largest, _ = jax.lax.top_k(clipped, pixels - below)
    low, high = largest[:, -1], largest[:, max(pixels - below - 2, 0)]
    threshold = low + (position - below) * (high - low)
    return (clipped >= threshold[:, None]).reshape(action.shape)


def spread_blocks(edges: tuple[int, ...], grid: Bool[Array, "game *grid"]) -> Bool[Array, "game *shape"]:
    """Return a mask of voxels from one of super-pixels with these edges."""
    for axis, edge in enumerate(edges, start=1):
        if edge > 1:
            grid = jnp.repeat(grid, edge, axis=axis)
    return grid


def expand_like(values: Shaped[Array, " game"], array: Shaped[Array, "game ..."]) -> Shaped[Array, "game ..."]:
    """Give a value of each game as many axes as an array has."""
    return values.reshape(-1, *(1,) * (array.ndim - 1))
