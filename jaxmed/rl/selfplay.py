"""System II of the pixel game: an iteration of self-play and PPO as one function to compile.

    problem = make_problem(verify, verifier, images, masks)
    state = init(key, config, policy, problem)
    advance = jax.jit(partial(iterate, config, policy, verify))
    state, metrics = advance(problem, state)          # config.games * config.steps steps of thought
    answer = state.best.mask                          # the best mask of each image so far

The program depends on shapes alone: other images, masks and parameters of the verifier reuse it. Everything that a
run needs to go on is in `State`. With `mode="propose"` nobody learns: both players propose at random.

Source: arXiv:2506.22075; constants are our own where it gives none.
Deviation: the opponent is a snapshot or the current policy by a schedule, never the object that is being trained; the
    answer is the best mask that was seen, which the reference's resets can lose; a game that is cut is valued by the
    state before its reset.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.config import Size, checked
from jaxmed.rl import opponents, pixel_game, ppo
from jaxmed.rl.opponents import OpponentConfig, Pool
from jaxmed.rl.pixel_game import Best, Cases, PixelGame
from jaxmed.rl.policies import Policy
from jaxmed.rl.ppo import SB3, Batch, PpoConfig

Verify = Callable[[Any, Int[Array, " game"], Float[Array, "game *shape"]], Float[Array, " game"]]
"""(parameters and embeddings of images, number of the image, mask) -> value of each game's mask."""


@dataclasses.dataclass(frozen=True)
@checked
class SelfPlayConfig:
    """Settings of System II.

    Attributes:
        game: Rules.
        ppo: How the policy learns.
        opponents: Whom it plays.
        games: Played at the same time.
        steps: Steps of every game in an iteration.
        mode: learn, or propose: random proposals under the same rules, the control.
        symmetric: In games against itself both players' moves are learnt from.
        scale_rewards: Divide rewards by their running deviation; they are differences of numbers in [0, 1]. The mean is
            not taken off: over both players it is 0.
    """

    game: PixelGame = PixelGame(at_most_k=True)
    ppo: PpoConfig = PpoConfig()
    opponents: OpponentConfig = OpponentConfig()
    games: Size = 256
    steps: Size = 64
    mode: Literal["learn", "propose"] = "learn"
    symmetric: bool = True
    scale_rewards: bool = True

    def __post_init__(self) -> None:
        samples = self.steps * (self.games + self.opponents.num_live(self.games) * self.symmetric)
        if self.mode == "learn" and samples % self.ppo.minibatches:
            raise ValueError(
                f"ppo.minibatches: expected a divisor of the {samples} samples of an iteration, "
                f"found {self.ppo.minibatches}"
            )

    @property
    def steps_per_iteration(self) -> int:
        """Steps of the environment in an iteration, over all games."""
        return self.games * self.steps

    def for_images(self, count: int) -> "SelfPlayConfig":
        """Return the settings with as many games on every one of so many images."""
        return dataclasses.replace(self, games=-(-self.games // count) * count)


RELEASED = SelfPlayConfig(
    game=PixelGame(rule="fair"),
    ppo=SB3,
    opponents=OpponentConfig(schedule="latest", live=0.0, pool=1, every=2, groups=1),
    games=1,
    steps=4096,
    symmetric=False,
    scale_rewards=False,
)
"""The released players: stable-baselines3's PPO, one game an image, a rival renewed every 8,192 steps.

Deviation: both players flip 1 % of the pixels, where the release's rival flips about half of the image and ties flip
    together; rule "repo" is the release's. The rival is a snapshot, not the learner itself.
"""


class Problem(NamedTuple):
    """What is thought about: images with the masks to begin with, and the first argument of `verify`."""

    cases: Cases
    verifier: Any


class State(NamedTuple):
    """A run: all that is needed to go on.

    Attributes:
        params: The policy.
        opt_state: State of its optimizer.
        game: Where the games stand.
        best: Best mask of each image so far.
        pool: Past selves.
        reward_square: Mean square of the rewards so far.
        iteration: Iterations so far.
        key: Root of the random numbers.
    """

    params: Params
    opt_state: optax.OptState
    game: pixel_game.State
    best: Best
    pool: Pool
    reward_square: Scalar
    iteration: Int[Array, ""]
    key: KeyArray


class Record(NamedTuple):
    """A step of all games, as the learner needs it.

    Attributes:
        state: Before the step.
        action: The player's.
        rival_action: The rival's, in the games against itself.
        log_prob: Log-probability of the player's action.
        rival_log_prob: Log-probability of the rival's.
        value: V of the observation.
        reward: The player's.
        is_done: The game was cut.
        final: V of the state before the reset, where it was.
        is_won: The player's proposal is at least as good.
    """

    state: pixel_game.State
    action: Array
    rival_action: Array
    log_prob: Float[Array, "*time game"]
    rival_log_prob: Float[Array, "*time live"]
    value: Float[Array, "*time game"]
    reward: Float[Array, "*time game"]
    is_done: Bool[Array, "*time game"]
    final: Float[Array, "*time game"]
    is_won: Bool[Array, "*time game"]


def make_problem(
    verify: Verify, verifier: Any, images: Float[Array, "image *shape"], masks: Bool[Array, "image *shape"]
) -> Problem:
    """Value the masks that games begin with."""
    return Problem(pixel_game.make_cases(partial(verify, verifier), images, masks), verifier)


def init(
    key: KeyArray, config: SelfPlayConfig, policy: Policy, problem: Problem, params: Params | None = None
) -> State:
    """Begin a run, the images spread evenly over the games, with a fresh policy or one to go on from."""
    root, init_key = jax.random.split(key)
    params = policy.init(init_key) if params is None else params
    cases = problem.cases
    game = pixel_game.reset(cases, jnp.arange(config.games) % len(cases.images))
    return State(
        params,
        ppo.make_optimizer(config.ppo).init(params),
        game,
        pixel_game.begin_best(cases),
        opponents.make_pool(config.opponents.pool, params),
        jnp.zeros(()),
        jnp.int32(0),
        root,
    )


def iterate(
    config: SelfPlayConfig, policy: Policy, verify: Verify, problem: Problem, state: State
) -> tuple[State, dict[str, Scalar]]:
    """Play `config.steps` steps of every game, and learn from them.

    Returns:
        The run after it, and means over games and steps. `reward` and `won` are the player's and hover about 0 and a
        half in games against itself: look at `best` for progress.
    """
    key = jax.random.fold_in(state.key, state.iteration)
    play_key, learn_key = jax.random.split(key)
    if config.mode == "propose":
        game, best, metrics = _propose(config, policy, verify, problem, state, play_key)
        return state._replace(game=game, best=best, iteration=state.iteration + 1), metrics
    game, best, records = _rollout(config, policy, verify, problem, state, play_key)
    square = jnp.mean(jnp.square(records.reward))
    average = state.reward_square + (square - state.reward_square) / (state.iteration + 1)
    _, last = policy.apply(state.params, pixel_game.observe(problem.cases.images, game))
    scale = jax.lax.rsqrt(jnp.maximum(average, 1e-16)) if config.scale_rewards else jnp.ones(())
    batch = _make_batch(config, records, last, scale)

    def apply(params: Params, seen: pixel_game.State) -> tuple[Any, Array]:
        return policy.apply(params, pixel_game.observe(problem.cases.images, seen))

    params, opt_state, losses = ppo.update(
        apply, policy.distribution, config.ppo, learn_key, state.params, state.opt_state, batch
    )
    is_due = (state.iteration + 1) % config.opponents.every == 0
    pool = opponents.take_snapshot(state.pool, params, is_due)
    metrics = losses | _summarise(records.reward, records.is_won, game, best)
    return State(params, opt_state, game, best, pool, average, state.iteration + 1, state.key), metrics


def _rollout(
    config: SelfPlayConfig, policy: Policy, verify: Verify, problem: Problem, state: State, key: KeyArray
) -> tuple[pixel_game.State, Best, Record]:
    cases, chance = problem.cases, policy.distribution
    judge = partial(verify, problem.verifier)
    live = config.opponents.num_live(config.games)
    opponent_key, step_key = jax.random.split(key)
    slots = opponents.draw(opponent_key, config.opponents.schedule, state.pool, config.opponents.groups)

    def act(params: Params, key: KeyArray, observation: Array) -> Array:
        return chance.sample(key, policy.apply(params, observation)[0])

    def advance(carry: tuple[pixel_game.State, Best], key: KeyArray) -> tuple[Any, Record]:
        game, best = carry
        own_key, live_key, past_key, image_key = jax.random.split(key, 4)
        observation = pixel_game.observe(cases.images, game)
        parameters, value = policy.apply(state.params, observation)
        action = chance.sample(own_key, parameters)
        # Against itself the same pass of the network serves both players.
        own = jax.tree.map(lambda leaf: leaf[:live], parameters)
        own_rival = chance.sample(live_key, own)
        rival = own_rival
        if live < config.games:
            past = opponents.answer_in_groups(act, past_key, state.pool, slots, observation[live:])
            rival = jnp.concatenate([own_rival, past])
        after, reward, is_done, info = pixel_game.step(config.game, judge, game, action, rival)
        final = jax.lax.cond(
            jnp.any(is_done),
            lambda: policy.apply(state.params, pixel_game.observe(cases.images, after))[1],
            lambda: jnp.zeros_like(value),
        )
        record = Record(
            game, action, own_rival, chance.log_prob(parameters, action), chance.log_prob(own, own_rival), value,
            reward, is_done, final, info.is_won,
        )  # fmt: skip
        return (restart(cases, after, is_done, image_key), pixel_game.update_best(best, after)), record

    (game, best), records = jax.lax.scan(advance, (state.game, state.best), jax.random.split(step_key, config.steps))
    return game, best, records


def restart(cases: Cases, game: pixel_game.State, is_done: Bool[Array, " game"], key: KeyArray) -> pixel_game.State:
    """Begin the games that were cut anew, on images drawn at random."""
    fresh = pixel_game.reset(cases, jax.random.randint(key, is_done.shape, 0, len(cases.images)))
    return pixel_game.choose(is_done, fresh, game)


def _make_batch(config: SelfPlayConfig, records: Record, last: Array, scale: Array) -> Batch:
    """Turn a rollout into samples; the rival's of games against itself follow the player's."""
    following = ppo.next_values(records.value, last, records.final, records.is_done)

    def samples(games: int, rewards: Array, action: Array, log_prob: Array) -> Batch:
        value, done = records.value[:, :games], records.is_done[:, :games]
        settings = config.ppo.discount, config.ppo.trace_decay
        advantage = ppo.advantages(rewards[:, :games] * scale, value, following[:, :games], done, *settings)
        state = jax.tree.map(lambda leaf: leaf[:, :games], records.state)
        batch = Batch(state, action, log_prob, value, advantage, advantage + value)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)

    own = samples(config.games, records.reward, records.action, records.log_prob)
    live = records.rival_log_prob.shape[1]
    if not config.symmetric or live == 0:
        return own
    # Each player's advantages from its own rewards: the rival's are the negative ones.
    theirs = samples(live, -records.reward, records.rival_action, records.rival_log_prob)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), own, theirs)


def _propose(
    config: SelfPlayConfig, policy: Policy, verify: Verify, problem: Problem, state: State, key: KeyArray
) -> tuple[pixel_game.State, Best, dict[str, Scalar]]:
    """Play with proposals from the distribution of a network that puts out zeros."""
    cases, judge = problem.cases, partial(verify, problem.verifier)
    observation = jax.eval_shape(pixel_game.observe, cases.images, state.game)
    shapes, _ = jax.eval_shape(policy.apply, state.params, observation)
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def advance(carry: tuple[pixel_game.State, Best], key: KeyArray) -> tuple[Any, tuple[Array, Array]]:
        game, best = carry
        own_key, rival_key, image_key = jax.random.split(key, 3)
        proposals = (policy.distribution.sample(key, blank) for key in (own_key, rival_key))
        after, reward, is_done, info = pixel_game.step(config.game, judge, game, *proposals)
        best = pixel_game.update_best(best, after)
        return (restart(cases, after, is_done, image_key), best), (reward, info.is_won)

    start = (state.game, state.best)
    (game, best), (reward, is_won) = jax.lax.scan(advance, start, jax.random.split(key, config.steps))
    return game, best, _summarise(reward, is_won, game, best)


def _summarise(reward: Array, is_won: Array, game: pixel_game.State, best: Best) -> dict[str, Scalar]:
    return {
        "reward": reward.mean(),
        "reward_deviation": jnp.sqrt(jnp.mean(jnp.square(reward))),
        "won": is_won.mean(dtype=jnp.float32),
        "value": game.value.mean(),
        "best": best.value.mean(),
    }
