"""Self-play compare: thinking curves of self-play and its controls, beside System I and supervised networks."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Count, Length, Size, checked
from jaxmed.data.augment import AS_THEY_ARE, AugmentConfig
from jaxmed.data.tasks import Cases, TaskData, draw_shots
from jaxmed.recipes.few_shot import MamlConfig, fit_baselines
from jaxmed.recipes.few_shot_stage import NewTask, TaskFlags, TaskInputs, read_new_task
from jaxmed.recipes.map_files import write_failed
from jaxmed.recipes.scan_job import trouble_sections
from jaxmed.recipes.segmentation_study import (
    Arms,
    comparison_sections,
    end_dices,
    gain_tiles,
    score_masks,
    tabulate,
)
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.study import Cell, Outcome, make_cells, read_study, run_study
from jaxmed.recipes.study_sections import failed_cells
from jaxmed.recipes.study_tables import write_tables
from jaxmed.report.page import Note, Section, Text
from jaxmed.rl.driver import check_game
from jaxmed.systems.selfplay.inputs import SHOTS, TASK, Trained, load_policy, open_inputs
from jaxmed.systems.selfplay.system_one import AdaptConfig, SystemOne, adapt, generate
from jaxmed.systems.selfplay.thinking import LAPTOP, SMOKE, Budget, ThinkConfig, think
from jaxmed.systems.selfplay.verifier import calibrate, choose_level, judge_masks
from jaxmed.train.announce import announce
from jaxmed.train.run_folder import RunFolder

Answer = tuple[str, int, np.ndarray]
"""Arm, budget and masks of all test images."""
ARMS = Arms(base="System I", thinking="self-play", control="random proposals")
LEVEL = "verifier's level"
MODES = {ARMS.thinking: "learn", ARMS.control: "propose", "verifier's gradient": "grad"}
LEVELS = (
    "Thinking begins from the threshold of System I's probability that the verifier likes best: what this gives is the "
    "arm 'verifier's level', and only what lies beyond it is the game's. To beat is one threshold for all, the best on "
    "the other subjects, which needs no verifier."
)


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """A comparison on a new task.

    Attributes:
        inputs: Rows of split support and test of the new task; of split train for the network supervised by all labels.
        task: The new task, where the manifest has several.
        shots: Labelled images to adapt by, drawn anew for every seed.
        adapt: Steps and rate of adaptation.
        budgets: Steps of the game at which masks are compared, ascending.
        think: How to think; its mode is set by the arms.
        patch_game: One more arm: self-play in the patch game, whose masks are made of patches.
        policy_weights: A run of train-policy: one more arm of self-play, which begins with its policy.
        cases: Test images, evenly over the task's; 0 takes all.
        together: Images that are thought about jointly.
        num_seeds: Draws of labelled images, adaptations and players.
        supervised_steps: Steps of the networks that are trained on labels alone.
        maml: The same network by MAML: a start learnt on the familiar tasks, a few plain steps on the labelled images.
        augment: Fresh variants of the familiar tasks' images for the network that is supervised by all labels: those
            of meta-training, or the comparison is not fair. Both supervised networks see the labelled images of the
            new task in the variants of `adapt.augment`, as System I does.
    """

    inputs: TaskFlags = TaskInputs()
    task: str = ""
    shots: Size = 8
    adapt: AdaptConfig = AdaptConfig()
    budgets: tuple[Count, ...] = (1024, 4096, 16_384, 65_536)
    think: ThinkConfig = ThinkConfig()
    patch_game: bool = False
    policy_weights: Path | None = None
    cases: Length = 32
    together: Size = 8
    num_seeds: Size = 3
    supervised_steps: Count = 400
    maml: MamlConfig = MamlConfig()
    augment: AugmentConfig = AS_THEY_ARE

    def __post_init__(self) -> None:
        if not self.budgets or min(self.budgets) < 1 or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets: expected ascending numbers of steps, found {self.budgets}")


def paper() -> Config:
    """Budgets up to a million steps, eight labels, five draws; our players under the verifier alone, not the release's.

    Its iterations of 4,096 steps for every image are too long for the small budgets of a thinking curve.
    """
    budgets = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
    return Config(budgets=budgets, num_seeds=5, think=ThinkConfig(prior_weight=0.0))


def laptop() -> Config:
    """Budgets up to 16,384 steps and a small policy: some ten minutes on two cores."""
    return Config(
        adapt=AdaptConfig(augment=dataclasses.replace(AS_THEY_ARE, shift=2)),
        budgets=(2048, 4096, 8192, 16_384),
        think=LAPTOP,
    )


def smoke() -> Config:
    """Tiny networks, in seconds: your images, or puzzles."""
    return Config(
        inputs=TaskInputs(TaskData(synthetic=24)), task=TASK, shots=SHOTS, adapt=AdaptConfig(steps=8, rate=1e-3),
        budgets=(256, 1024), think=SMOKE, cases=4, together=4, num_seeds=1, supervised_steps=30,
        maml=MamlConfig(steps=20, inner_steps=2),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was compared, and what came of self-play; see `segmentation_study.Comparison`. Distances are in `unit`."""

    task: str
    cases: int
    subjects: int
    shots: int
    unit: str
    seeds: int
    failed: int
    notes: tuple[str, ...]
    rank_of_budget: float | None
    area: float | None
    score_and_dice: float | None


def run(config: Config, folder: RunFolder) -> int:
    """Read, let every arm answer for every seed that is not finished, compare and report.

    Returns 1 when records or seeds failed.
    """
    clock, asked, taught = Clock(), config, None
    inputs, trained, preprocess = open_inputs(config.inputs, folder)
    if config.policy_weights is not None:
        thinking, taught = load_policy(config.policy_weights, config.think, trained.preprocess.size)
        # Every arm has its network, so that they differ in nothing else.
        config = dataclasses.replace(config, think=thinking)
    game, patches = "patch" if config.patch_game else "pixel", config.think.patch.game.patches
    check_game(game, config.think.mode, patches, preprocess.size)
    task = read_new_task(inputs, preprocess, config.task, ("support", "test"), ("train",))
    draw_shots(task.support, config.shots, inputs.seed)  # too few are a mistake, not a seed that failed
    assert task.test is not None
    test = task.test.spread(config.cases) if config.cases else task.test
    log = begin(folder)
    log.say(f"'{task.name}': {len(test.images)} test images of {len(set(test.subjects))} subjects.")
    clock.lap("read and cut")
    announce(
        log, f"Comparing on {len(test.images)} images up to {config.budgets[-1]:,} steps", count=config.num_seeds,
        params=trained.system.params, batch=test.images, unit="seeds", smaller=folder.smaller,
    )  # fmt: skip

    def run_cell(cell: Cell) -> Outcome:
        rows = answer(config, trained, taught, task, test, int(cell["seed"]))
        dices = end_dices(rows)
        for arm, value in dices.items():
            log.say(f"{cell}, {arm}: Dice {100 * value:.1f} %")
        return Outcome(dices, rows)

    cells = make_cells({"seed": tuple(range(inputs.seed, inputs.seed + config.num_seeds))})
    done = run_study(cells, run_cell, folder.path, asked, log=log)
    clock.lap("compare, compilation included")
    if task.failed:
        write_failed(folder.outputs, task.failed)
    found = tabulate(done.results, inputs.seed, ARMS)
    write_tables(folder.outputs, done.results, found.means, found.differences)
    notes = []
    if task.training is None:
        notes.append("The manifest has no familiar tasks: no network is supervised by all labels.")
    if len(set(test.subjects)) == 1:
        notes.append("All test images are of one subject: there are no intervals.")
    summary = Summary(
        task.name, len(test.images), len(set(test.subjects)), config.shots, "mm" if test.spacing else "pixels",
        config.num_seeds, len(task.failed), tuple(notes), found.rank_of_budget, found.area, found.score_and_dice,
    )  # fmt: skip
    finish(folder, config, summary, clock, page)
    return 1 if task.failed or done.failures else 0


def answer(
    config: Config, trained: Trained, taught: Params | None, task: NewTask, test: Cases, seed: int
) -> list[dict[str, Any]]:
    """Let every arm answer, with one draw of labelled images; return a row per arm, budget and case."""
    shots, rows = draw_shots(task.support, config.shots, seed), []
    adapt_key, probe_key, think_key = jax.random.split(jax.random.key(seed), 3)
    images, masks = jnp.asarray(shots.images), jnp.asarray(shots.masks)
    system, _ = adapt(adapt_key, trained.system, images, masks, config.adapt)
    system = system._replace(temperature=calibrate(probe_key, system, images, masks).temperature)
    at_once = answer_at_once(config, system, test.images, shots, task.training, seed)
    by_thought = answer_by_thought(config, system, test, taught, think_key)
    for arm, budget, found in itertools.chain(at_once, by_thought):
        score = np.asarray(judge_masks(system, jnp.asarray(test.images), jnp.asarray(found, jnp.float32)))
        rows += score_masks(test, arm, budget, found, score)
    return rows


def answer_at_once(
    config: Config, system: SystemOne, images: np.ndarray, shots: Cases, training: Cases | None, seed: int
) -> Iterator[Answer]:
    """Yield the masks of System I, at its threshold and at others, and of networks that learn from labels alone."""

    def probability(images: np.ndarray, params: Params = system.params) -> np.ndarray:
        return np.asarray(generate(system.config, params, jnp.asarray(np.ascontiguousarray(images))))

    own, threshold = probability(images), system.config.threshold
    yield ARMS.base, 0, own > threshold
    turned = [np.flip(probability(np.flip(images, axes)), axes) for axes in ((), (1,), (2,), (1, 2))]
    yield "System I, mean of flips", 0, np.mean(turned, axis=0) > threshold
    baselines = fit_baselines(
        seed, system.config.generator, shots, training, steps=config.supervised_steps, maml=config.maml,
        variants=config.augment, variants_of_shots=config.adapt.augment,
    )  # fmt: skip
    for arm, params in baselines:
        yield arm, 0, probability(images, {"generator": params}) > threshold
    levels = config.think.levels
    if levels:
        # Where thinking begins: what its arms add to is seen apart from what they start with.
        start, _ = choose_level(system, jnp.asarray(images), jnp.asarray(own), jnp.asarray(own > threshold), levels)
        yield LEVEL, 0, np.asarray(start)
    for level in levels:
        yield f"{ARMS.above}{level:g}", 0, own > level


def answer_by_thought(
    config: Config, system: SystemOne, test: Cases, taught: Params | None, key: KeyArray
) -> Iterator[Answer]:
    """Think about the test images, some at a time, in every way, and yield the best masks at every budget.

    A budget is one of each group of images; the policy goes on from group to group.
    """
    ways: list[Any] = [(arm, mode, "pixel", None) for arm, mode in MODES.items()]
    ways += [("patch game", "learn", "patch", None)] if config.patch_game else []
    ways += [("self-play, policy taught", "learn", "pixel", taught)] if taught is not None else []
    budget = Budget(config.budgets[-1], patience=0)
    for arm, mode, game, policy in ways:
        masks, settings = {limit: [] for limit in config.budgets}, dataclasses.replace(config.think, mode=mode)
        for first in range(0, len(test.images), config.together):
            group, own_key = test.images[first : first + config.together], jax.random.fold_in(key, first)
            found = think(own_key, system, group, budget, settings, game=game, policy=policy)
            policy = found.policy
            for limit in config.budgets:
                point = int(np.searchsorted(found.trace.steps, limit, side="right")) - 1
                masks[limit].append(found.trace.masks[point])
        for limit in config.budgets:
            yield arm, limit, np.concatenate(masks[limit])


def page(run: Finished[Config, Summary]) -> Page:
    """Show thinking curves, where each method ends, and whether the verifier knows."""
    summary, study = run.summary, read_study(run.path)
    found = tabulate(study.results, run.config.inputs.seed, ARMS)
    tiles = gain_tiles(found, summary.shots)
    if summary.score_and_dice is not None:
        tiles.append(("Verifier", f"{summary.score_and_dice:.2f}", "Spearman of score and Dice, all answers"))
    return Page(
        "Thinking, compared",
        f"Self-play reasoning on '{summary.task}', {summary.cases} images, {summary.seeds} seeds",
        tiles,
        [
            *trouble_sections(run.outputs, (), summary.failed),
            *failed_cells(study.failures),
            *([Section("Notes", [Note(text) for text in summary.notes])] if summary.notes else []),
            *comparison_sections(found, summary.unit),
            Section("How to read this", [Text([
                "All arms answer for the same test images. Thinking uses those images, but no label of them; budgets "
                f"are of {run.config.together} images that are thought about together. Every seed draws its own "
                "labelled images, adapts System I, and plays anew.",
                "Random proposals follow the same rules as self-play with a policy that knows nothing: what they gain "
                "is the verifier's doing, what self-play gains beyond is the policy's. If the score rises while Dice "
                "falls, the verifier is being exploited.",
                *([LEVELS] if run.config.think.levels else []),
                "Foundation models and human readers are not compared with: neither can be had here.",
            ])]),
        ],
    )  # fmt: skip
