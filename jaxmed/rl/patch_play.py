"""RLSP: a policy of the patch game learns by REINFORCE against its past selves, then segments alone.

    problem = make_patch_problem(config.game, verify, verifier, images, probability)
    state = init(key, config, model, problem)
    advance = jax.jit(partial(iterate, config, model, verify))
    state, metrics = advance(problem, state)          # config.games * config.turns turns
    answer = state.best.mask                          # the best mask of each image so far

An iteration of it has the form of one of the pixel game (`rl.selfplay`): the patches that a game has named after each
move are a mask, a verifier values it, and the best mask of each image is kept.

Source: arXiv:2405.16628; github.com/s-sd/spurl, folder wss.
Deviation: games are played many at a time, and an iteration learns from all of them; gradients are clipped by their
    norm over all parameters instead of each one's; a policy sees features of the patches that are left, which may be
    their pixels. The source draws every stop by a coin (`match_release` of the game keeps that), and has no verifier:
    its answer is `segment`'s.
Limitation: on grids of 3 x 3 the policy learned which patches hold the object, but not when to stop: after 1500
    iterations of 64 games it named every patch (benchmarks/results/slow/selfplay_rl.txt).
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxmed.arrays.patches import patchify
from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.config import NonNegative, Share, Size, checked
from jaxmed.models.policy import PatchMlp, PatchMlpConfig
from jaxmed.nn.model import Model, make_model
from jaxmed.rl import opponents, patch_game, pixel_game
from jaxmed.rl.opponents import OpponentConfig, Pool
from jaxmed.rl.patch_game import Move, PatchGame, mark_patches
from jaxmed.rl.pixel_game import Best, Cases
from jaxmed.rl.selfplay import Verify


@dataclasses.dataclass(frozen=True)
@checked
class PatchPlayConfig:
    """Settings of RLSP.

    Attributes:
        game: Rules.
        network: Layers of the policy.
        opponents: Whom it plays; the player is always the newest policy. A snapshot an iteration is one every `games`
            episodes; the source takes one every 4.
        games: Episodes of an iteration.
        turns: Longest part of an episode that is played.
        learning_rate: Learning rate of Adam.
        discount: gamma.
        explore: Share of patches drawn uniformly.
        max_norm: Largest norm of the gradient.
        epsilon: Adam's.
        minibatches: Updates an iteration; their number divides the moves, two a turn and game.
        from_rival: Learn from the rival's moves too, as the source does, though a past self made them.
    """

    game: PatchGame = PatchGame()
    network: PatchMlpConfig = PatchMlpConfig()
    opponents: OpponentConfig = OpponentConfig(live=0.0, every=1)
    games: Size = 4
    turns: Size = 64
    learning_rate: NonNegative = 1e-3
    discount: Share = 0.99
    explore: Share = 0.05
    max_norm: NonNegative = 10.0
    epsilon: NonNegative = 1e-5
    minibatches: Size = 1
    from_rival: bool = True

    def __post_init__(self) -> None:
        if 2 * self.games * self.turns % self.minibatches:
            raise ValueError(
                f"minibatches: expected a divisor of {2 * self.games * self.turns} moves, found {self.minibatches}"
            )

    @property
    def steps_per_iteration(self) -> int:
        """Turns in an iteration, over all games; those that a stop leaves out are counted."""
        return self.games * self.turns


class PatchProblem(NamedTuple):
    """The images that are played for.

    Attributes:
        features: What the policy sees of each patch.
        scores: Probability of the object in it, by the frozen classifier.
        is_empty: Whether it is all zeros.
        cases: The images, and the empty masks that games begin with.
        verifier: First argument of what values masks.
    """

    features: Float[Array, "image patch feature"]
    scores: Float[Array, "image patch"]
    is_empty: Bool[Array, "image patch"]
    cases: Cases
    verifier: Any


class State(NamedTuple):
    """A run: all that is needed to go on.

    Attributes:
        params: The policy.
        opt_state: State of its optimizer.
        game: The best mask of each game of the last iteration, and D of it.
        best: Best mask of each image so far.
        pool: Past selves.
        iteration: Iterations so far.
        key: Root of the random numbers.
    """

    params: Params
    opt_state: optax.OptState
    game: pixel_game.State
    best: Best
    pool: Pool
    iteration: Int[Array, ""]
    key: KeyArray


class Turns(NamedTuple):
    """Moves of games; an axis of two has player and rival.

    Attributes:
        state: What the mover saw.
        patch: The patch that it named.
        stop: Whether it ended the game.
        reward: Reward of the turn.
        is_played: The game was not over yet.
        info: What both showed.
    """

    state: patch_game.State
    patch: Int[Array, "turn 2 game"]
    stop: Bool[Array, "turn 2 game"]
    reward: Float[Array, "turn 2 game"]
    is_played: Bool[Array, "turn 2 game"]
    info: patch_game.Info


def make_patch_problem(
    game: PatchGame,
    verify: Verify,
    verifier: Any,
    images: Float[Array, "image *shape"],
    probability: Float[Array, "image *shape"],
) -> PatchProblem:
    """Cut images into patches.

    Args:
        game: Gives the patches.
        verify: What judges.
        verifier: Its parameters and what it keeps of images.
        images: A patch without intensities is empty; the others' are what a policy sees.
        probability: Probability of the object in each voxel; the mean over a patch is the patch's score.
    """
    edges = game.edges(images.shape[1:])
    features, chance = (patchify(array[..., None], edges) for array in (images, probability))
    cases = pixel_game.make_cases(partial(verify, verifier), images, jnp.zeros(images.shape, bool))
    return PatchProblem(features, chance.mean(axis=2), ~jnp.any(features, axis=2), cases, verifier)


def make_patch_policy(config: PatchPlayConfig) -> Model:
    """Return the network; `apply(params, features)` gives logits of patches and of stopping."""
    return make_model(PatchMlp(config.network))


def init(
    key: KeyArray, config: PatchPlayConfig, model: Model, problem: PatchProblem, params: Params | None = None
) -> State:
    """Begin a run, with a fresh policy or one to go on from."""
    root, init_key = jax.random.split(key)
    params = model.init(init_key, problem.features[:1]) if params is None else params
    pool, cases = opponents.make_pool(config.opponents.pool, params), problem.cases
    game = pixel_game.reset(cases, jnp.arange(config.games) % len(cases.images))
    best = pixel_game.begin_best(cases)
    return State(params, _optimizer(config).init(params), game, best, pool, jnp.int32(0), root)


def iterate(
    config: PatchPlayConfig, model: Model, verify: Verify, problem: PatchProblem, state: State
) -> tuple[State, dict[str, Scalar]]:
    """Play `config.games` episodes, learn from them, and keep the best masks that they named."""
    key = jax.random.fold_in(state.key, state.iteration)
    play_key, learn_key = jax.random.split(key)
    turns = rollout(config, model, problem, state, play_key)
    returns = normalised_returns(turns.reward, turns.is_played, config.discount)
    params, opt_state, loss = _learn(config, model, problem, state, turns, returns, learn_key)
    iteration = state.iteration + 1
    pool = opponents.take_snapshot(state.pool, params, iteration % config.opponents.every == 0)
    game, best = judge_turns(config, verify, problem, turns, state.best)
    played = turns.is_played[:, 0].sum(axis=0)
    metrics = {
        "loss": loss,
        "reward": (turns.reward[:, 0] * turns.is_played[:, 0]).sum(axis=0).mean(),
        "turns": played.mean(dtype=jnp.float32),
        "stopped": (turns.stop & turns.is_played).any(axis=(0, 1)).mean(dtype=jnp.float32),
        "best": best.value.mean(),
    }
    return State(params, opt_state, game, best, pool, iteration, state.key), metrics


def judge_turns(
    config: PatchPlayConfig, verify: Verify, problem: PatchProblem, turns: Turns, best: Best
) -> tuple[pixel_game.State, Best]:
    """Value what each game has named after every move; return each game's best mask, and each image's so far."""
    image, shape = turns.state.image[0, 0], problem.cases.images.shape[1:]
    middle = jax.tree.map(lambda leaf: leaf[:, 1], turns.state)
    erased = jnp.stack([middle.is_erased, jax.vmap(patch_game.erase)(middle, turns.patch[:, 1]).is_erased], axis=1)

    def judge(carry: tuple[pixel_game.State, Best], now: tuple[Array, Array]) -> tuple[Any, None]:
        kept, best = carry
        mask = mark_patches(config.game, shape, now[0] & ~problem.is_empty[image])
        value = jnp.where(now[1], verify(problem.verifier, image, mask.astype(jnp.float32)), -jnp.inf)
        seen = pixel_game.State(image, mask, value, kept.steps + 1)
        return (pixel_game.choose(value > kept.value, seen, kept), pixel_game.update_best(best, seen)), None

    blank = pixel_game.reset(problem.cases, image)._replace(value=jnp.full(image.shape, -jnp.inf))
    moves = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), (erased, turns.is_played))
    return jax.lax.scan(judge, (blank, best), moves)[0]


def rollout(config: PatchPlayConfig, model: Model, problem: PatchProblem, state: State, key: KeyArray) -> Turns:
    """Play episodes of the newest policy against opponents of the schedule."""
    image_key, opponent_key, turn_key = jax.random.split(key, 3)
    images = jax.random.randint(image_key, (config.games,), 0, len(problem.scores))
    start = patch_game.reset(problem.is_empty, images), jnp.ones(config.games, bool)
    live = config.opponents.num_live(config.games)
    slots = opponents.draw(opponent_key, config.opponents.schedule, state.pool, config.opponents.groups)
    choose = partial(act, config, model, problem)

    def answer(key: KeyArray, seen: patch_game.State) -> Move:
        own_key, past_key = jax.random.split(key)
        own, past = jax.tree.map(lambda leaf: leaf[:live], seen), jax.tree.map(lambda leaf: leaf[live:], seen)
        moves = [choose(state.params, own_key, own)] if live else []
        if live < config.games:
            moves.append(opponents.answer_in_groups(choose, past_key, state.pool, slots, past))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *moves)

    def advance(carry: tuple[patch_game.State, Array], key: KeyArray) -> tuple[Any, Turns]:
        game, is_played = carry
        own_key, rival_key = jax.random.split(key)
        move = choose(state.params, own_key, game)
        seen = patch_game.erase(game, move.patch)
        rival = answer(rival_key, seen)
        after, reward, is_over, info = patch_game.step(config.game, problem.scores, game, move, rival)
        views, moves = jax.tree.map(lambda a, b: jnp.stack([a, b]), (game, move), (seen, rival))
        record = Turns(views, moves.patch, moves.stop, reward.T, jnp.stack([is_played, is_played]), info)
        return (after, is_played & ~is_over), record

    return jax.lax.scan(advance, start, jax.random.split(turn_key, config.turns))[1]


def act(
    config: PatchPlayConfig, model: Model, problem: PatchProblem, params: Params, key: KeyArray, seen: patch_game.State
) -> Move:
    """Draw moves of a policy."""
    patch_key, stop_key, explore_key, uniform_key = jax.random.split(key, 4)
    patch_logits, stop_logits = model.apply(params, patch_game.observe(problem.features, seen))
    patch = jax.random.categorical(patch_key, patch_logits)
    uniform = jax.random.randint(uniform_key, patch.shape, 0, patch_logits.shape[1])
    patch = jnp.where(jax.random.bernoulli(explore_key, config.explore, patch.shape), uniform, patch)
    if config.game.match_release:
        stop_logits = jnp.zeros_like(stop_logits)
    return Move(patch.astype(jnp.int32), jax.random.categorical(stop_key, stop_logits) == 1)


def normalised_returns(
    reward: Float[Array, "turn *game"], is_played: Bool[Array, "turn *game"], discount: float
) -> Float[Array, "turn *game"]:
    """Return discounted sums of rewards, with mean 0 and deviation 1 over each player's turns of an episode."""
    reward = jnp.where(is_played, reward, 0.0)

    def back(later: Array, now: Array) -> tuple[Array, Array]:
        total = now + discount * later
        return total, total

    returns = jax.lax.scan(back, jnp.zeros_like(reward[0]), reward, reverse=True)[1]
    count = is_played.sum(axis=0)
    centred = jnp.where(is_played, returns - (returns * is_played).sum(axis=0) / count, 0.0)
    return centred / (jnp.sqrt(jnp.square(centred).sum(axis=0) / count) + 1e-8)


def segment(config: PatchPlayConfig, model: Model, params: Params, problem: PatchProblem) -> Bool[Array, "image patch"]:
    """Let a policy play alone on every image until it stops, and return the patches that it named.

    It takes the likeliest patch of those that are left; patches that were empty from the start are not named.
    """
    images = jnp.arange(len(problem.scores))
    start = patch_game.reset(problem.is_empty, images), jnp.ones(len(images), bool)

    def advance(carry: tuple[patch_game.State, Array], _: None) -> tuple[Any, None]:
        game, is_played = carry
        patch_logits, stop_logits = model.apply(params, patch_game.observe(problem.features, game))
        patch = jnp.argmax(jnp.where(game.is_erased, -jnp.inf, patch_logits), axis=1).astype(jnp.int32)
        after = patch_game.erase(game, patch)
        game = game._replace(is_erased=jnp.where(is_played[:, None], after.is_erased, game.is_erased))
        return (game, is_played & (stop_logits[:, 1] <= stop_logits[:, 0])), None

    turns = min(config.game.max_turns, problem.scores.shape[1])
    (game, _), _ = jax.lax.scan(advance, start, None, length=turns)
    return game.is_erased & ~problem.is_empty


def loss(
    model: Model,
    problem: PatchProblem,
    params: Params,
    seen: patch_game.State,
    patch: Int[Array, " move"],
    stop: Bool[Array, " move"],
    weight: Float[Array, " move"],
) -> Scalar:
    """Return -mean of weight (log pi(patch) + log pi(stop)); a weight is the return, 0 for moves after the end."""
    patch_logits, stop_logits = model.apply(params, patch_game.observe(problem.features, seen))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(patch_logits), patch[:, None], axis=1)[:, 0]
    stopped = jnp.take_along_axis(jax.nn.log_softmax(stop_logits), stop[:, None].astype(jnp.int32), axis=1)[:, 0]
    return -jnp.mean(weight * (chosen + stopped))


def _learn(
    config: PatchPlayConfig,
    model: Model,
    problem: PatchProblem,
    state: State,
    turns: Turns,
    returns: Float[Array, "turn 2 game"],
    key: KeyArray,
) -> tuple[Params, optax.OptState, Scalar]:
    weight = jnp.where(turns.is_played, returns, 0.0)
    if not config.from_rival:
        weight = weight.at[:, 1].set(0.0)
    moves = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), (turns.state, turns.patch, turns.stop, weight))
    count = len(moves[-1])
    # Moves after the end are in the mean's count: their share is told to the rest.
    used = turns.is_played.sum() if config.from_rival else turns.is_played[:, 0].sum()
    scale = count / jnp.maximum(used, 1)
    optimizer = _optimizer(config)
    gradient = jax.value_and_grad(partial(loss, model, problem))

    def learn(carry: tuple[Params, optax.OptState], chosen: Array) -> tuple[Any, Scalar]:
        params, opt_state = carry
        seen, patch, stop, weight = jax.tree.map(lambda leaf: leaf[chosen], moves)
        value, gradients = gradient(params, seen, patch, stop, weight * scale)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    order = jax.random.permutation(key, count).reshape(config.minibatches, -1)
    (params, opt_state), values = jax.lax.scan(learn, (state.params, state.opt_state), order)
    return params, opt_state, values.mean()


def _optimizer(config: PatchPlayConfig) -> optax.GradientTransformation:
    adam = optax.adam(config.learning_rate, eps=config.epsilon)
    return optax.chain(optax.clip_by_global_norm(config.max_norm), adam)
