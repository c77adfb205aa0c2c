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
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from jaxmed.arrays.tracing import require_values
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import NonNegative, Share, Size, checked
from jaxmed.models.policy import GaussianMlpConfig, TopkUnetConfig
from jaxmed.rl import pixel_game, tournament
from jaxmed.rl.driver import Budget, Game, Mode, Point, Trace, check_game, make_problem, make_way, play_for
from jaxmed.rl.patch_game import PatchGame
from jaxmed.rl.patch_play import PatchPlayConfig, PatchProblem
from jaxmed.rl.pixel_game import PixelGame
from jaxmed.rl.policies import make_policy
from jaxmed.rl.ppo import PpoConfig
from jaxmed.rl.search import SearchConfig
from jaxmed.rl.selfplay import RELEASED, SelfPlayConfig
from jaxmed.rl.tournament import Debate
from jaxmed.systems.selfplay.system_one import AdaptConfig, SystemOne, adapt, generate_jit
from jaxmed.systems.selfplay.verifier import (
    choose_level,
    is_constant,
    judge_masks_jit,
    make_judge,
    verify_by,
)

Stop = Literal["budget", "time", "plateau", "constant verifier"]


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

    mode: Mode = "learn"
    play: SelfPlayConfig = SelfPlayConfig(game=PixelGame(rule="elitist", at_most_k=True), games=64, steps=64)
    search: SearchConfig = SearchConfig()
    patch: PatchPlayConfig = PatchPlayConfig(games=64)
    policy: TopkUnetConfig | GaussianMlpConfig = TopkUnetConfig()
    prior_weight: NonNegative = 3.0
    levels: tuple[Share, ...] = ()
    rounds: Size = 1
    guess_weight: Share = 0.5
    adapt: AdaptConfig = AdaptConfig()

    def __post_init__(self) -> None:
        if not all(0 < level < 1 for level in self.levels):
            raise ValueError(f"levels: expected probabilities between 0 and 1, found {self.levels}")


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
    play=RELEASED,
    policy=GaussianMlpConfig(),
    prior_weight=0.0,
)
"""The released players: stable-baselines3's perceptron beside `rl.selfplay.RELEASED`."""


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
        InputError: An argument is traced by jax, or the patch game is asked for what it cannot do.
    """
    require_values("selfplay.think", "rl.selfplay.iterate", key=key, image=image, params=system.params)
    budget = Budget(budget) if isinstance(budget, int) else budget
    images = jnp.asarray(image, jnp.float32)
    images = images[None] if images.ndim == system.config.generator.dimensions else images
    check_game(game, config.mode, config.patch.game.patches, images.shape[1:])
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
    probability = generate_jit(system.config, system.params, images)
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
        Point(
            steps, 0.0, np.asarray(judge_masks_jit(system.config, judge, jnp.arange(len(images)), masks * 1.0)), masks
        )
        for steps, masks in {0: np.asarray(known), done: np.asarray(start)}.items()
    ]
    stop: Stop = "constant verifier" if has_no_opinion else "budget"
    agreement = probability
    if not has_no_opinion and done < budget.steps:
        way = make_way(
            game, config.mode, verify_by(system.config), images.shape, config.play, config.patch, config.search,
            config.policy,
        )  # fmt: skip
        problem = make_problem(game, config.patch.game, verify_by(system.config), judge, images, start, probability)
        state, stop = play_for(budget, way, play_key, problem, policy, points, watch)
        if config.mode != "grad":
            agreement = pixel_game.agreement(state.game, len(images))
        if config.mode == "learn":
            policy = state.params
    trace = Trace(*(np.stack(column) for column in zip(*points, strict=True)))
    return Thought(
        trace.masks[-1], trace.values[-1], np.asarray(agreement), np.asarray(first), np.asarray(start),
        np.asarray(level), np.asarray(probability), trace, stop, policy, system,
    )  # fmt: skip


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
    later = Trace(new.steps + old.steps[-1], new.seconds + old.seconds[-1], new.values, new.masks)
    trace = Trace(*(np.concatenate([one, other[1:]]) for one, other in zip(old, later, strict=True)))
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
    images, verify = image[None], verify_by(system.config)
    judge = make_judge(system, images, config.prior_weight, level)
    probability = generate_jit(system.config, system.params, images) if game == "patch" else images
    problem = make_problem(game, config.patch.game, verify, judge, images, mask[None], probability)
    if isinstance(problem, PatchProblem):
        return tournament.debate_patches(key, config.patch, verify, problem, policy, steps)
    player = make_policy(config.policy, config.play.game, image.shape)
    return tournament.debate(key, config.play.game, player, verify, problem, policy, steps)
