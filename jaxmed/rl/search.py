"""Tree search in the pixel game: both players look ahead by simulation before they propose a flip.

A turn of the tree is one player's proposal. The first names a pixel, the rival answers, the better mask stays, as in
`pixel_game.step`; a player's reward is the difference of the verifier's values, the other's the negative of it.
Nothing is learnt: the verifier's slope at the mask says which pixels to look at first, and simulations use the true
game. Every mask that a simulation reaches counts as seen.

Needs mctx (an extra): Gumbel MuZero's sequential halving at the root, its improved policy below.

Source: arXiv:2506.22075 names no search; the algorithm is Danihelka et al., ICLR 2022. Discounts of -1 between players
    follow the advice of mctx's maintainers.
Deviation: one pixel of the grid (or super-pixel) is flipped in a turn, so that a proposal is one of as many actions.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmed.arrays.patches import patchify
from jaxmed.arrays.types import KeyArray
from jaxmed.config import NonNegative, Size, checked
from jaxmed.errors import require_extra
from jaxmed.rl import pixel_game
from jaxmed.rl.pixel_game import Best, PixelGame, expand_like, spread_blocks
from jaxmed.rl.selfplay import Problem, Verify, restart


@dataclasses.dataclass(frozen=True)
@checked
class SearchConfig:
    """Settings of the search.

    Attributes:
        simulations: Simulations of each turn; each costs one look of the verifier.
        considered: Pixels that the root looks at, the most promising ones by slope and chance.
        sharpness: How strongly the slope decides what is looked at first: the most promising pixel of an image has this
            as its logit, one that promises nothing has 0.
        noise: Scale of the Gumbel noise by which the root explores; 0 searches without chance.
    """

    simulations: Size = 32
    considered: Size = 16
    sharpness: NonNegative = 4.0
    noise: NonNegative = 1.0


class Turn(NamedTuple):
    """Where a game stands between two proposals.

    Attributes:
        image: Number of each game's image.
        mask: The mask before the round.
        value: D of it.
        proposal: What the first player has proposed in this round; the mask itself where it is its turn.
        proposal_value: D of that.
        is_second: Whether the rival is to answer.
    """

    image: Int[Array, " game"]
    mask: Bool[Array, "game *shape"]
    value: Float[Array, " game"]
    proposal: Bool[Array, "game *shape"]
    proposal_value: Float[Array, " game"]
    is_second: Bool[Array, " game"]


class SearchState(NamedTuple):
    """A run: all that is needed to go on.

    Attributes:
        game: Where the games stand.
        best: Best mask of each image so far, of the games and of all simulations.
        iteration: Iterations so far.
        key: Root of the random numbers.
    """

    game: pixel_game.State
    best: Best
    iteration: Int[Array, ""]
    key: KeyArray


def require_mctx() -> Any:
    """Import the package of the search, or say that it is missing."""
    otherwise = ", or choose another think.mode"
    return require_extra("mctx", "search", "think.mode", "for tree search", otherwise)


def init(key: KeyArray, games: int, problem: Problem) -> SearchState:
    """Begin games, the images spread evenly over them."""
    cases = problem.cases
    game = pixel_game.reset(cases, jnp.arange(games) % len(cases.images))
    return SearchState(game, pixel_game.begin_best(cases), jnp.int32(0), key)


def iterate(
    config: SearchConfig, game: PixelGame, verify: Verify, steps: int, problem: Problem, state: SearchState
) -> SearchState:
    """Play some steps of every game, both proposals of each found by search.

    Of the rules' numbers of flips none counts: a turn flips one pixel of the grid.
    """

    def advance(carry: tuple[pixel_game.State, Best], key: KeyArray) -> tuple[Any, None]:
        now, best = carry
        own_key, rival_key, image_key = jax.random.split(key, 3)
        turn = Turn(now.image, now.mask, now.value, now.mask, now.value, jnp.zeros(len(now.image), bool))
        for turn_key in (own_key, rival_key):
            found = search(config, game, partial(verify, problem.verifier), turn_key, turn)
            best = pixel_game.update_best(best, found.seen)
            turn = found.turn
        after = pixel_game.State(now.image, turn.mask, turn.value, now.steps + 1)
        return (restart(problem.cases, after, after.steps > game.horizon, image_key), best), None

    keys = jax.random.split(jax.random.fold_in(state.key, state.iteration), steps)
    (now, best), _ = jax.lax.scan(advance, (state.game, state.best), keys)
    return SearchState(now, best, state.iteration + 1, state.key)


class Found(NamedTuple):
    """What a search of one turn ends with.

    Attributes:
        action: Number of the pixel of the grid that the player names.
        value: Value of the turn for the player to move, by the search.
        action_values: The same after each pixel of the grid, for the same player; the turn's own where none was tried.
        turn: After the action.
        seen: Every mask that a simulation reached, as states; those that none did have the value -inf.
    """

    action: Int[Array, " game"]
    value: Float[Array, " game"]
    action_values: Float[Array, "game action"]
    turn: Turn
    seen: pixel_game.State


def search(config: SearchConfig, game: PixelGame, verify: pixel_game.Verify, key: KeyArray, turn: Turn) -> Found:
    """Search the best proposal of the player to move, for all games at once.

    The rules give the grid, and whether the old mask may stay.
    """
    library = require_mctx()  # records of chex dataclasses: their fields are unknown to type checkers
    shape = turn.mask.shape[1:]
    slope, scale = _slope(verify, turn)

    def logits(turn: Turn) -> Array:
        """Promise of every pixel of the grid by the root's slope: what is linear in a flip."""
        promise = patchify((slope * (1 - 2 * turn.mask.astype(slope.dtype)))[..., None], game.blocks(shape))
        return config.sharpness * promise.sum(axis=2) / scale[:, None]

    def simulate(_: Any, __: Any, action: Array, turn: Turn) -> tuple[Any, Turn]:
        after, reward = play(game, verify, turn, action)
        discount = -jnp.ones_like(reward)
        output = library.RecurrentFnOutput(
            reward=reward, discount=discount, prior_logits=logits(after), value=_outlook(after)
        )
        return output, after

    root = library.RootFnOutput(prior_logits=logits(turn), value=_outlook(turn), embedding=turn)
    found = library.gumbel_muzero_policy(
        None, key, root, simulate, config.simulations,
        max_num_considered_actions=config.considered, gumbel_scale=config.noise,
    )  # fmt: skip
    tree = found.search_tree
    after, _ = play(game, verify, turn, found.action)
    value, was_tried = tree.node_values[:, 0], tree.children_visits[:, 0] > 0
    action_values = tree.children_rewards[:, 0] + tree.children_discounts[:, 0] * tree.children_values[:, 0]
    action_values = jnp.where(was_tried, action_values, value[:, None])
    return Found(found.action, value, action_values, after, _all_seen(tree))


def play(
    game: PixelGame, verify: pixel_game.Verify, turn: Turn, action: Int[Array, " game"]
) -> tuple[Turn, Float[Array, " game"]]:
    """Let the player to move flip a pixel of the grid; after the rival's answer the better mask stays.

    Returns:
        The next turn, and the reward of the player who moved: 0 for the first, D(its proposal) - D(the first's) for the
        rival. A tie is the first player's.
    """
    flips = pixel_game.mark_flips(game, turn.mask.shape[1:], action[:, None])
    flips = spread_blocks(game.blocks(turn.mask.shape[1:]), flips)
    candidate = turn.mask ^ flips
    value = verify(turn.image, candidate.astype(jnp.float32))
    is_first_kept = turn.proposal_value >= value
    mask = jnp.where(expand_like(is_first_kept, candidate), turn.proposal, candidate)
    kept = jnp.where(is_first_kept, turn.proposal_value, value)
    if game.rule == "elitist":
        is_worse = kept < turn.value
        mask = jnp.where(expand_like(is_worse, mask), turn.mask, mask)
        kept = jnp.where(is_worse, turn.value, kept)
    second = turn.is_second
    is_second = expand_like(second, candidate)
    after = Turn(
        turn.image,
        jnp.where(is_second, mask, turn.mask),
        jnp.where(second, kept, turn.value),
        jnp.where(is_second, mask, candidate),
        jnp.where(second, kept, value),
        ~second,
    )
    return after, jnp.where(second, value - turn.proposal_value, 0.0)


def _outlook(turn: Turn) -> Float[Array, " game"]:
    """Value a turn for the player to move without looking ahead: an answer is as good as the mask that stands."""
    return jnp.where(turn.is_second, turn.value - turn.proposal_value, 0.0)


def _slope(verify: pixel_game.Verify, turn: Turn) -> tuple[Float[Array, "game *shape"], Float[Array, " game"]]:
    """Return the verifier's slope at the masks, and the largest promise of a flip anywhere."""
    soft = turn.mask.astype(jnp.float32)
    slope = jax.grad(lambda masks: verify(turn.image, masks).sum())(soft)
    promise = jnp.abs(slope).reshape(len(soft), -1).max(axis=1)
    return slope, jnp.where(promise > 0, promise, 1.0)


def _all_seen(tree: Any) -> pixel_game.State:
    """Return the masks of all nodes: proposals that wait for an answer, and what stayed after one."""
    turn: Turn = tree.embeddings
    pending = turn.is_second
    masks = jnp.where(pending.reshape(*pending.shape, *(1,) * (turn.mask.ndim - 2)), turn.proposal, turn.mask)
    values = jnp.where(pending, turn.proposal_value, turn.value)
    values = jnp.where(tree.node_visits > 0, values, -jnp.inf)
    image, masks, values = (leaf.reshape(-1, *leaf.shape[2:]) for leaf in (turn.image, masks, values))
    return pixel_game.State(image, masks, values, jnp.zeros(image.shape, jnp.int32))
