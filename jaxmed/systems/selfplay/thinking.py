"""System II: think about images of a new task until the time is up, and answer with the best mask that was seen.

System I answers first. Then two players propose changes of the mask, its verifier judges, and the policy learns from
who wins (`rl.selfplay`); or proposals are random, or follow the verifier's gradient: the controls. Several images are
thought about together and share one policy.

Or they play the patch game (`game="patch"`, `rl.patch_play`): in turn each names the patch that shows most of the
object, as System I sees it, and what a game has named is a mask, which the verifier judges after every move. Games
begin with nothing, so that the answer is made of patches; System I's mask is where the curve begins, and no candidate.

Source: arXiv:2506.22075, and its reference implementation; arXiv:2405.16628 for the patch game.
Deviation: the answer is the best mask so far, never what a game happens to end with. Budgets, the stop at a plateau and
    rounds of re-adaptation are our own: the reference names them in comments only. In the patch game the scores of
    patches are System I's mean probabilities, in the place of a classifier's that learnt from labels of whole images.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxmed.arrays.tracing import require_values
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Length, NonNegative, Share, Whole, checked
from jaxmed.errors import InputError
from jaxmed.models.policy import GaussianMlpConfig, TopkUnetConfig
from jaxmed.rl import patch_play, pixel_game, search, selfplay, tournament
from jaxmed.rl.ascent import ascend
from jaxmed.rl.opponents import OpponentConfig
from jaxmed.rl.patch_game import PatchGame
from jaxmed.rl.patch_play import PatchPlayConfig, PatchProblem
from jaxmed.rl.pixel_game import PixelGame, expand_like
from jaxmed.rl.policies import Policy, make_policy
from jaxmed.rl.ppo import SB3, PpoConfig
from jaxmed.rl.search import SearchConfig, SearchState
from jaxmed.rl.selfplay import Problem, SelfPlayConfig
from jaxmed.rl.tournament import Debate
from jaxmed.systems.selfplay.system_one import AdaptConfig, SystemOne, SystemOneConfig, adapt, generate
from jaxmed.systems.selfplay.verifier import (
    Judge,
    choose_level,
    is_constant,
    judge_masks_jit,
    make_judge,
    score_masks,
)

Game = Literal["pixel", "patch"]
Stop = Literal["budget", "time", "plateau", "constant verifier"]


@dataclasses.dataclass(frozen=True)
@checked
class Budget:
    """When to stop.

    Attributes:
        steps: Steps of the game, over all games and images; 0 leaves System I's answer.
        seconds: After compilation; 0 for no limit.
        patience: Iterations without a better mask after which thinking ends; 0 never ends early.
        tolerance: What counts as better, in D.
    """

    steps: Whole = 65_536
    seconds: NonNegative = 0.0
    patience: Whole = 10
    tolerance: NonNegative = 1e-4


@dataclasses.dataclass(frozen=True)
@checked
class ThinkConfig:
    """How to think.

    Attributes:
        mode: learn: self-play with a policy that learns; propose: random proposals under the same rules; grad: flip
            what the verifier's gradient asks for; mcts: both players search a tree of flips (needs mctx, the extra
            "search"). A step of a game costs two looks of the verifier; a step of a searched one counts as
            `search.simulations` steps.
        play: Rules, players and learning; its mode is set by this one.
        search: The search of mode mcts.
        patch: Rules, players and learning of the patch game.
        policy: The network that proposes.
        prior_weight: How much System I's own evidence counts beside the verifier: the score's logit is that of D plus
            this times the log-likelihood ratio of a mask against System I's first one, per voxel of that (of the size
            it expects, where that is empty). 0, the reference, follows the verifier wherever it leads: on digits (6 and
            7, by which 3 was chosen) to masks that it likes and that are worse.
        levels: Thresholds of System I's probability besides its own: each image's thinking begins from the one of these
            masks that the verifier likes best. Where a structure is rare, half a probability is too strict, and single
            flips do not find what System I misses.
        rounds: Rounds of thinking; between two of them System I is adapted to what was found.
        guess_weight: Weight of the masks that were found beside true labels, in that adaptation.
        adapt: Steps and rate of it.
    """

    mode: Literal["learn", "propose", "grad", "mcts"] = "learn"
    play: SelfPlayConfig = SelfPlayConfig(game=PixelGame(rule="elitist", at_most_k=True), games=64, steps=64)
    search: SearchConfig = SearchConfig()
    patch: PatchPlayConfig = PatchPlayConfig(games=64)
    policy: TopkUnetConfig | GaussianMlpConfig = TopkUnetConfig()
    prior_weight: float = 3.0
    levels: tuple[Share, ...] = ()
    rounds: Length = 1
    guess_weight: float = 0.5
    adapt: AdaptConfig = AdaptConfig()

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds: expected 1 or more, found {self.rounds}")
        if self.prior_weight < 0:
            raise ValueError(f"prior_weight: expected 0 or more, found {self.prior_weight:g}")
        if not all(0 < level < 1 for level in self.levels):
            raise ValueError(f"levels: expected probabilities between 0 and 1, found {self.levels}")
        if not 0 <= self.guess_weight <= 1:
            raise ValueError(f"guess_weight: expected a number in [0, 1], found {self.guess_weight}")


LAPTOP = ThinkConfig(
    play=SelfPlayConfig(
        game=PixelGame(rule="elitist", at_most_k=True, flips=6), ppo=PpoConfig(value_loss="plain"), games=64, steps=32
    ),
    patch=PatchPlayConfig(games=64, turns=32),
    policy=TopkUnetConfig(widths=(8, 16), value_width=16),
)
"""For a CPU: the default policy's U-Net takes minutes for an iteration there, this one seconds."""

SMOKE = ThinkConfig(
    play=SelfPlayConfig(game=PixelGame(rule="elitist", at_most_k=True), games=16, steps=16),
    patch=PatchPlayConfig(game=PatchGame(patches=8), games=16, turns=16),
    policy=TopkUnetConfig(widths=(8, 16), value_width=16),
)
"""In seconds."""

PAPER = ThinkConfig(
    play=SelfPlayConfig(
        game=PixelGame(rule="fair"),
        ppo=SB3,
        opponents=OpponentConfig(schedule="latest", live=0.0, pool=1, every=2, groups=1),
        games=1,
        steps=4096,
        symmetric=False,
        scale_rewards=False,
    ),
    policy=GaussianMlpConfig(),
    prior_weight=0.0,
)
"""The released players: stable-baselines3's perceptron and PPO, one game an image, a rival renewed every 8,192 steps.

Deviation: both players flip 1 % of the pixels, where the release's rival flips about half of the image and ties flip
    together; `--think.play.game.rule repo` has the release's rule. The rival is a snapshot, not the learner itself.
"""


class Trace(NamedTuple):
    """The course of thinking, one entry before it and one after every iteration.

    Attributes:
        steps: Steps of the game so far.
        seconds: So far, without compilation.
        values: Score of the best mask of each image so far: D, or with a prior what `ThinkConfig` says.
        masks: Those masks.
    """

    steps: Int[np.ndarray, " point"]
    seconds: Float[np.ndarray, " point"]
    values: Float32[np.ndarray, "point image"]
    masks: Bool[np.ndarray, "point image *space"]


class Thought(NamedTuple):
    """An answer.

    Attributes:
        masks: Best masks.
        values: Their scores, between 0 and 1.
        agreement: Share of the games whose present mask holds each voxel; System I's probability where none was played.
        first: System I's masks.
        start: Where the game began: those, or what the verifier chose among `ThinkConfig.levels`.
        level: The threshold of System I's probability that belongs to `start`.
        probability: System I's probabilities.
        trace: How the answer came about.
        stop: Why it ended.
        policy: Parameters of the policy, to go on from with other images; None where none learnt.
        system: System I, adapted to what was found where there was more than one round.
    """

    masks: Bool[np.ndarray, "image *space"]
    values: Float32[np.ndarray, " image"]
    agreement: Float32[np.ndarray, "image *space"]
    first: Bool[np.ndarray, "image *space"]
    start: Bool[np.ndarray, "image *space"]
    level: Float32[np.ndarray, " image"]
    probability: Float32[np.ndarray, "image *space"]
    trace: Trace
    stop: Stop
    policy: Params | None
    system: SystemOne


def think(
    key: KeyArray,
    system: SystemOne,
    image: Float[Any, "*image_space"],
    budget: Budget | int = Budget(),
    config: ThinkConfig = ThinkConfig(),
    *,
    game: Game = "pixel",
    policy: Params | None = None,
    support: tuple[Float[Any, "case *space"], Bool[Any, "case *space"]] | None = None,
    watch: Callable[[int, float], None] | None = None,
) -> Thought:
    """Think about one image, or several of one task: the driver on the host, which watches the clock and the score.

    No jax transformation goes through it; an iteration of it does, `rl.selfplay.iterate`.

    Args:
        key: Consumed.
        system: System I, adapted to the task.
        image: In [0, 1]: [*space], or [image *space] for several.
        budget: When to stop; a number is one of steps.
        config: How to think.
        game: What is played: flips of pixels, or patches to be named, for which `config.mode` has to be learn.
        policy: Parameters of a policy of that game to begin with.
        support: Labelled images and masks, for the adaptation between rounds.
        watch: `watch(steps, mean best D)`, called after every iteration.

    Returns:
        The answer; the axis of images is there for a single one too.

    Raises:
        InputError: An argument is traced by jax, or nothing but learning is asked of the patch game.
    """
    require_values("selfplay.think", "rl.selfplay.iterate", key=key, image=image, params=system.params)
    budget = Budget(budget) if isinstance(budget, int) else budget
    images = jnp.asarray(image, jnp.float32)
    images = images[None] if images.ndim == system.config.generator.dimensions else images
    check_game(game, config, images.shape[1:])
    share = dataclasses.replace(budget, steps=budget.steps // config.rounds, seconds=budget.seconds / config.rounds)
    total = None
    for number in range(config.rounds):
        round_key, adapt_key = jax.random.split(jax.random.fold_in(key, number))
        found = _think_once(round_key, system, images, share, config, game, policy, watch, total)
        total = found if total is None else _joined(total, found)
        if found.stop == "constant verifier" or number + 1 == config.rounds:
            break
        system, policy = _readapt(adapt_key, system, config, images, found.masks, support), found.policy
    assert total is not None
    return total._replace(system=system)


def check_game(game: Game, config: ThinkConfig, shape: tuple[int, ...]) -> None:
    """Refuse what the patch game cannot do.

    Raises:
        InputError: Nobody is to learn, or images of this shape are not so many patches wide.
    """
    if game == "patch" and config.mode != "learn":
        raise InputError("think.mode", "learn for the patch game", config.mode, "or choose --game pixel")
    if game == "patch" and any(length % config.patch.game.patches for length in shape):
        raise InputError("think.patch.game.patches", f"a number that divides {shape}", config.patch.game.patches)


def _think_once(
    key: KeyArray,
    system: SystemOne,
    images: Array,
    budget: Budget,
    config: ThinkConfig,
    game: Game,
    policy: Params | None,
    watch: Callable[[int, float], None] | None,
    before: Thought | None,
) -> Thought:
    play_key, probe_key = jax.random.split(key)
    probability = _generate(system.config, system.params, images)
    first = probability > system.config.threshold
    known = first if before is None else jnp.asarray(before.masks)
    start, level, done = known, jnp.full(len(images), system.config.threshold), 0
    # Before anything is chosen: rounding would choose for a verifier that has no opinion.
    has_no_opinion = budget.steps > 0 and is_constant(probe_key, system, images, first)
    if config.levels and game == "pixel" and budget.steps and not has_no_opinion:
        start, level = choose_level(system, images, probability, known, config.levels)
        done = len(config.levels) * len(images)
    judge = make_judge(system, images, config.prior_weight, level)
    # From `start` on: what was known before can score no higher, since the verifier chose.
    points = [
        (steps, 0.0, np.asarray(judge_masks_jit(system.config, judge, jnp.arange(len(images)), masks * 1.0)), masks)
        for steps, masks in {0: np.asarray(known), done: np.asarray(start)}.items()
    ]

    def answer(stop: Stop, agreement: Array | None = None, policy: Params | None = None) -> Thought:
        trace = Trace(*(np.stack(column) for column in zip(*points, strict=True)))
        shown = probability if agreement is None else agreement
        return Thought(
            trace.masks[-1], trace.values[-1], np.asarray(shown), np.asarray(first), np.asarray(start),
            np.asarray(level), np.asarray(probability), trace, stop, policy, system,
        )  # fmt: skip

    if has_no_opinion:
        return answer("constant verifier", policy=policy)
    if done >= budget.steps:
        return answer("budget", policy=policy)
    plan = _plan(play_key, system.config, config, game, judge, images, start, probability, policy)
    state, spent, waited, stop = plan.first, 0.0, 0, "budget"
    while done < budget.steps:
        began = time.perf_counter()
        state = jax.block_until_ready(plan.advance(plan.problem, state))
        done, spent = done + plan.size, spent + time.perf_counter() - began
        points.append((done, spent, np.asarray(state.best.value), np.asarray(state.best.mask)))
        if watch is not None:
            watch(done, float(np.mean(points[-1][2])))
        gain = float(np.mean(points[-1][2] - points[-2][2]))
        waited = 0 if gain > budget.tolerance else waited + 1
        if budget.patience and waited >= budget.patience:
            stop = "plateau"
            break
        if budget.seconds and spent >= budget.seconds:
            stop = "time"
            break
    if isinstance(state, Ascent):
        return answer(stop, policy=policy)
    agreement = _agreement(state.game.image, state.game.mask, len(images))
    return answer(stop, agreement, state.params if config.mode == "learn" else policy)


class Plan(NamedTuple):
    """What is done in iterations.

    Attributes:
        size: Steps of the game in an iteration.
        advance: (problem, state) -> state, compiled: the clock runs afterwards.
        problem: What the program is given every time.
        first: The state to begin with; it has the field `best`.
    """

    size: int
    advance: Any
    problem: Any
    first: Any


class Ascent(NamedTuple):
    """Where the ascent along the verifier's gradient stands.

    Attributes:
        best: Masks and their scores.
        flips: Voxels that are tried next, for each image.
    """

    best: pixel_game.Best
    flips: Int[Array, " image"]


def _plan(
    key: KeyArray,
    system: SystemOneConfig,
    config: ThinkConfig,
    game: Game,
    judge: Judge,
    images: Array,
    start: Array,
    probability: Array,
    policy: Params | None,
) -> Plan:
    def plan(size: int, program: Any, settings: tuple[Any, ...], problem: Any, first: Any) -> Plan:
        return Plan(size, program.lower(system, *settings, problem, first).compile(), problem, first)

    if game == "patch":
        patches = patch_problem(system, config.patch, judge, images, probability)
        return plan(
            config.patch.steps_per_iteration, _iterate_patches, (config.patch,), patches,
            _begin_patches(config.patch, key, patches, policy),
        )  # fmt: skip
    if config.mode == "grad":
        flips = jnp.full(len(images), config.play.game.num_flips(images.shape[1:]))
        first = Ascent(pixel_game.Best(start, jnp.zeros(len(images))), flips)
        return plan(len(images) * config.play.steps, _ascend, (config.play.steps,), judge, first)
    # Every image gets as many games as every other.
    play = dataclasses.replace(config.play, games=-(-config.play.games // len(images)) * len(images))
    problem = selfplay.make_problem(partial(score_masks, system), judge, images, start)
    if config.mode == "mcts":
        search.require_mctx()
        return plan(
            play.steps_per_iteration * config.search.simulations, _search, (config.search, play.game, play.steps),
            problem, search.init(key, play.games, problem),
        )  # fmt: skip
    play, player = dataclasses.replace(play, mode=config.mode), player_of(config, images.shape[1:])
    first = _begin(play, player, key, problem, policy)
    return plan(play.steps_per_iteration, _iterate, (play, player), problem, first)


def player_of(config: ThinkConfig, shape: tuple[int, ...]) -> Policy:
    """Return what plays on images of a shape."""
    return _policy(config.policy, config.play.game, shape)


@lru_cache(maxsize=32)
def _policy(config: TopkUnetConfig | GaussianMlpConfig, game: PixelGame, shape: tuple[int, ...]) -> Policy:
    """One policy for equal settings, so that equal programs are recognised."""
    return make_policy(config, game, shape)


def patch_problem(
    system: SystemOneConfig, config: PatchPlayConfig, judge: Judge, images: Array, probability: Array
) -> PatchProblem:
    """Cut images into the patches that are played for, scored by System I's mean probability."""
    verify = partial(score_masks, system)
    return patch_play.make_patch_problem(config.game, verify, judge, images, probability)


@partial(jax.jit, static_argnums=(0, 1))
def _begin(
    play: SelfPlayConfig, player: Policy, key: KeyArray, problem: Problem, policy: Params | None
) -> selfplay.State:
    return selfplay.init(key, play, player, problem, policy)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _iterate(
    system: SystemOneConfig, play: SelfPlayConfig, player: Policy, problem: Problem, state: selfplay.State
) -> selfplay.State:
    return selfplay.iterate(play, player, partial(score_masks, system), problem, state)[0]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _search(
    system: SystemOneConfig, config: SearchConfig, game: PixelGame, steps: int, problem: Problem, state: SearchState
) -> SearchState:
    return search.iterate(config, game, partial(score_masks, system), steps, problem, state)


@partial(jax.jit, static_argnums=(0, 1))
def _ascend(system: SystemOneConfig, steps: int, judge: Judge, state: Ascent) -> Ascent:
    def score(masks: Array) -> Array:
        return score_masks(system, judge, jnp.arange(len(masks)), masks)

    masks, values, flips = ascend(score, state.best.mask, state.flips, steps)
    return Ascent(pixel_game.Best(masks, values), flips)


@partial(jax.jit, static_argnums=0)
def _begin_patches(
    config: PatchPlayConfig, key: KeyArray, problem: PatchProblem, policy: Params | None
) -> patch_play.State:
    return patch_play.init(key, config, patch_play.make_patch_policy(config), problem, policy)


@partial(jax.jit, static_argnums=(0, 1))
def _iterate_patches(
    system: SystemOneConfig, config: PatchPlayConfig, problem: PatchProblem, state: patch_play.State
) -> patch_play.State:
    model = patch_play.make_patch_policy(config)
    return patch_play.iterate(config, model, partial(score_masks, system), problem, state)[0]


@partial(jax.jit, static_argnums=0)
def _generate(config: SystemOneConfig, params: Params, images: Array) -> Array:
    return generate(config, params, images)


def _agreement(image: Array, masks: Array, count: int) -> Array:
    total = jax.ops.segment_sum(masks.astype(jnp.float32), image, count)
    games = jax.ops.segment_sum(jnp.ones(len(image)), image, count)
    return total / expand_like(jnp.maximum(games, 1), total)


def _readapt(
    key: KeyArray, system: SystemOne, config: ThinkConfig, images: Array, masks: np.ndarray, support: Any
) -> SystemOne:
    """Adapt System I to what was found, beside the labels that there are."""
    weights = jnp.full(len(images), config.guess_weight)
    found = jnp.asarray(masks)
    if support is not None:
        images = jnp.concatenate([images, jnp.asarray(support[0], jnp.float32)])
        found = jnp.concatenate([found, jnp.asarray(support[1])])
        weights = jnp.concatenate([weights, jnp.ones(len(support[0]))])
    return adapt(key, system, images, found, config.adapt, weights)[0]


def _joined(before: Thought, after: Thought) -> Thought:
    """Join two rounds: answers of the second, whose verifier knows more; first masks of the first."""
    old, new = before.trace, after.trace
    steps, seconds = new.steps[1:] + old.steps[-1], new.seconds[1:] + old.seconds[-1]
    trace = Trace(
        np.concatenate([old.steps, steps]),
        np.concatenate([old.seconds, seconds]),
        np.concatenate([old.values, new.values[1:]]),
        np.concatenate([old.masks, new.masks[1:]]),
    )
    return after._replace(first=before.first, probability=before.probability, trace=trace)


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
    """Let a policy play with itself from a mask, and keep the course; `level` as in `make_judge`.

    The patch game begins with nothing, and may be stopped before its last step.
    """
    images, start, verify = image[None], mask[None], partial(score_masks, system.config)
    judge = make_judge(system, images, config.prior_weight, level)
    if game == "patch":
        probability = _generate(system.config, system.params, images)
        problem = patch_problem(system.config, config.patch, judge, images, probability)
        return tournament.debate_patches(key, config.patch, verify, problem, policy, steps)
    player, problem = player_of(config, image.shape), selfplay.make_problem(verify, judge, images, start)
    return tournament.debate(key, config.play.game, player, verify, problem, policy, steps)
