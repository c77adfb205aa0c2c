"""Self-play compare: thinking curves of self-play and its controls, beside System I and supervised networks."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.arrays.batches import evenly
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Count, Length, Seed, Size, checked
from jaxmed.data.augment import AS_THEY_ARE, AugmentConfig
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.tasks import Cases, TaskData, choose_task, draw_shots, read_splits
from jaxmed.recipes.few_shot import MamlConfig, adapt_maml, fit_maml, fit_supervised
from jaxmed.recipes.map_files import write_failed
from jaxmed.recipes.scan_job import trouble_sections
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.study import Cell, Outcome, make_cells, read_study, run_study
from jaxmed.recipes.study_sections import failed_cells, mean_bars, mean_curves
from jaxmed.recipes.study_tables import Difference, Mean, write_tables
from jaxmed.report.page import Figure, Note, Section, Table, Text
from jaxmed.report.scatter import scatter
from jaxmed.systems.selfplay.comparing import (
    ABOVE,
    BASE,
    LEARNT,
    LEVEL,
    MEASURES,
    RANDOM,
    Comparison,
    score_masks,
    tabulate,
)
from jaxmed.systems.selfplay.inputs import SHOTS, TASK, Trained, load_for, load_policy, with_inputs
from jaxmed.systems.selfplay.system_one import AdaptConfig, SystemOne, adapt, generate
from jaxmed.systems.selfplay.thinking import LAPTOP, SMOKE, Budget, ThinkConfig, check_game, think
from jaxmed.systems.selfplay.verifier import calibrate, choose_level, judge_masks
from jaxmed.train.announce import announce
from jaxmed.train.run_folder import RunFolder

Answer = tuple[str, int, np.ndarray]
"""Arm, budget and masks of all test images."""
MODES = {"self-play": "learn", "random proposals": "propose", "verifier's gradient": "grad"}
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
        data: Rows of split support and test of the new task; of split train for the network supervised by all labels.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        weights: A run of meta-train.
        preprocess: How files become images; read from the weights where it is left alone.
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
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: The first.
    """

    data: TaskData = TaskData()
    series: str = ""
    weights: Path | None = None
    preprocess: Preprocess | None = None
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
    fill: float | None = None
    seed: Seed = 0

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
        data=TaskData(synthetic=24), task=TASK, shots=SHOTS, adapt=AdaptConfig(steps=8, rate=1e-3),
        budgets=(256, 1024), think=SMOKE, cases=4, together=4, num_seeds=1, supervised_steps=30,
        maml=MamlConfig(steps=20, inner_steps=2),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was compared, and what came of self-play; see `comparing.Comparison`. Distances are in `unit`."""

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
    clock, asked = Clock(), config
    config = with_inputs(config, folder)
    (trained, preprocess), taught = load_for(config.weights, config.preprocess), None
    if config.policy_weights is not None:
        thinking, taught = load_policy(config.policy_weights, config.think, trained.preprocess.size)
        # Every arm has its network, so that they differ in nothing else.
        config = dataclasses.replace(config, think=thinking)
    check_game("patch" if config.patch_game else "pixel", config.think, preprocess.size)
    material = read_material(config, preprocess)
    log = begin(folder)
    test = material.test
    log.say(f"'{material.task}': {len(test.images)} test images of {len(set(test.subjects))} subjects.")
    clock.lap("read and cut")
    announce(
        log, f"Comparing on {len(test.images)} images up to {config.budgets[-1]:,} steps", count=config.num_seeds,
        params=trained.system.params, batch=test.images, unit="seeds", smaller=folder.smaller,
    )  # fmt: skip

    def run_cell(cell: Cell) -> Outcome:
        rows = answer(config, trained, taught, material, int(cell["seed"]))
        ends = {row["arm"]: row["budget"] for row in rows}
        dices = {
            arm: float(np.mean([row["dice"] for row in rows if (row["arm"], row["budget"]) == (arm, end)]))
            for arm, end in ends.items()
        }
        for arm, value in dices.items():
            log.say(f"{cell}, {arm}: Dice {100 * value:.1f} %")
        return Outcome(dices, rows)

    cells = make_cells({"seed": tuple(range(config.seed, config.seed + config.num_seeds))})
    done = run_study(cells, run_cell, folder.path, asked, log=log)
    clock.lap("compare, compilation included")
    if material.failed:
        write_failed(folder.outputs, material.failed)
    found = tabulate(done.results, config.seed)
    write_tables(folder.outputs, done.results, found.means, found.differences)
    summary = Summary(
        material.task, len(test.images), len(set(test.subjects)), config.shots, "mm" if test.spacing else "pixels",
        config.num_seeds, len(material.failed), material.notes, found.rank_of_budget, found.area, found.score_and_dice,
    )  # fmt: skip
    finish(folder, config, summary, clock, page)
    return 1 if material.failed or done.failures else 0


class Material(NamedTuple):
    """What is compared on.

    Attributes:
        task: The new task.
        support: Its labelled images.
        test: Its test images.
        training: Cases of familiar tasks; None where the manifest has none.
        failed: Records that could not be used.
        notes: What a reader should know.
    """

    task: str
    support: Cases
    test: Cases
    training: Cases | None
    failed: tuple[Any, ...]
    notes: tuple[str, ...]


def read_material(config: Config, preprocess: Preprocess) -> Material:
    """Read all cases.

    Raises:
        InputError: For whatever is wrong with the manifest or its files.
    """
    cases, failed = read_splits(
        config.data, preprocess, ("support", "test"), ("train",), config.seed, config.series, config.fill
    )
    support, task = choose_task(cases["support"], config.task)
    test, notes = choose_task(cases["test"], task)[0], []
    if config.cases and config.cases < len(test.images):
        test = test.select(evenly(config.cases, len(test.images)))
    if "train" not in cases:
        notes.append("The manifest has no familiar tasks: no network is supervised by all labels.")
    if len(set(test.subjects)) == 1:
        notes.append("All test images are of one subject: there are no intervals.")
    draw_shots(support, config.shots, config.seed)
    return Material(task, support, test, cases.get("train"), failed, tuple(notes))


def answer(
    config: Config, trained: Trained, taught: Params | None, material: Material, seed: int
) -> list[dict[str, Any]]:
    """Let every arm answer, with one draw of labelled images; return a row per arm, budget and case."""
    shots, test, rows = draw_shots(material.support, config.shots, seed), material.test, []
    adapt_key, probe_key, think_key = jax.random.split(jax.random.key(seed), 3)
    images, masks = jnp.asarray(shots.images), jnp.asarray(shots.masks)
    system, _ = adapt(adapt_key, trained.system, images, masks, config.adapt)
    system = system._replace(temperature=calibrate(probe_key, system, images, masks).temperature)
    at_once = answer_at_once(config, system, material, shots, seed)
    by_thought = answer_by_thought(config, system, test, taught, think_key)
    for arm, budget, found in itertools.chain(at_once, by_thought):
        score = np.asarray(judge_masks(system, jnp.asarray(test.images), jnp.asarray(found, jnp.float32)))
        rows += score_masks(test, arm, budget, found, score)
    return rows


def answer_at_once(config: Config, system: SystemOne, material: Material, shots: Cases, seed: int) -> Iterator[Answer]:
    """Yield the masks of System I, at its threshold and at others, and of networks that learn from labels alone."""
    images, training, network = material.test.images, material.training, system.config.generator

    def probability(images: np.ndarray, params: Params = system.params) -> np.ndarray:
        return np.asarray(generate(system.config, params, jnp.asarray(np.ascontiguousarray(images))))

    own, threshold = probability(images), system.config.threshold
    yield "System I", 0, own > threshold
    turned = [np.flip(probability(np.flip(images, axes)), axes) for axes in ((), (1,), (2,), (1, 2))]
    yield "System I, mean of flips", 0, np.mean(turned, axis=0) > threshold
    labelled = {"supervised, few labels": (shots.images, shots.masks)}
    if training is not None:
        labelled["supervised, all labels"] = (
            np.concatenate([training.images, shots.images]), np.concatenate([training.masks, shots.masks])
        )  # fmt: skip
    for arm, (seen, truth) in labelled.items():
        params = fit_supervised(
            seed, network, seen, truth, steps=config.supervised_steps, variants=config.augment,
            few=len(shots.images), variants_of_few=config.adapt.augment,
        )  # fmt: skip
        yield arm, 0, probability(images, {"generator": params}) > threshold
    if training is not None and config.maml.steps:
        params = fit_maml(seed, network, config.maml, training, len(shots.images), config.augment)
        params = adapt_maml(network, config.maml, params, shots.images, shots.masks)
        yield "MAML", 0, probability(images, {"generator": params}) > threshold
    levels = config.think.levels
    if levels:
        # Where thinking begins: what its arms add to is seen apart from what they start with.
        start, _ = choose_level(system, jnp.asarray(images), jnp.asarray(own), jnp.asarray(own > threshold), levels)
        yield LEVEL, 0, np.asarray(start)
    for level in levels:
        yield f"{ABOVE}{level:g}", 0, own > level


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
    found = tabulate(study.results, run.config.seed)
    ends = {str(row.group[0][1]): row for row in found.means if row.measure == "dice"}
    caption = "Mean Dice at the largest budget, with 95 % intervals bootstrapped over subjects."
    last = mean_bars([*ends.values()], lambda row: row.group[0][1], xlabel="Dice (%)", caption=caption, scale=100)
    points = scatter(
        {"answers": np.array(found.points, float)}, xlabel="Dice with the true mask", ylabel="verifier's score",
        caption="Every answer of every arm: the verifier's score against Dice. Thinking can be trusted as far as one "
        "rises with the other.",
    )  # fmt: skip
    return Page(
        "Thinking, compared",
        f"Self-play reasoning on '{summary.task}', {summary.cases} images, {summary.seeds} seeds",
        _tiles(found, summary),
        [
            *trouble_sections(run.outputs, (), summary.failed),
            *failed_cells(study.failures),
            *([Section("Notes", [Note(text) for text in summary.notes])] if summary.notes else []),
            Section("Thinking curves", [_curves(found)]),
            Section("Where each method ends", [last, _table(found, summary.unit)]),
            Section("Does the verifier know?", [points]),
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


def _tiles(found: Comparison, summary: Summary) -> list[tuple[str, object, str]]:
    base, budget = found.course(BASE)[0], found.course(LEARNT)[-1].group[1][1]
    tiles: list[tuple[str, object, str]] = [
        ("System I", f"{100 * base.mean:.1f} %", f"Dice, {summary.shots} labelled images")
    ]
    for title, baseline in (("Thinking adds", BASE), ("Beyond random", RANDOM)):
        gain = found.gain(LEARNT, int(budget), baseline)
        if gain is not None and gain.difference is not None:
            tiles.append((title, f"{100 * gain.difference:+.1f}", f"points of Dice, {_span(gain)}"))
    if summary.score_and_dice is not None:
        tiles.append(("Verifier", f"{summary.score_and_dice:.2f}", "Spearman of score and Dice, all answers"))
    return tiles


def _span(row: Mean | Difference, sign: str = "+") -> str:
    low, high = row.low, row.high
    return "one subject" if low is None or high is None else f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def _curves(found: Comparison) -> Figure:
    base, points = found.course(BASE)[0], []
    for arm in dict.fromkeys(row.group[0][1] for row in found.means):
        course = [row for row in found.course(str(arm)) if row.group[1][1]]
        if course:
            start = ("arm", arm), ("budget", float(course[0].group[1][1]) / 4)
            points += [dataclasses.replace(base, group=start), *course]
    return mean_curves(
        points, x="budget", xlabel="steps of the game", ylabel="Dice (%)", log_x=True, band="error", scale=100,
        caption="Dice of the best masks so far against the budget; the first point is System I. Bands: one standard "
        "error over subjects.",
    )  # fmt: skip


def _table(found: Comparison, unit: str) -> Table:
    rows = []
    by_place = {(row.group, row.measure): row for row in found.means}
    for row in (row for row in found.means if row.measure == "dice"):
        (_, arm), (_, budget) = row.group
        gain = found.gain(str(arm), int(budget))
        change = (
            (None, None) if gain is None or gain.difference is None else (round(100 * gain.difference, 2), _span(gain))
        )
        distance, regions, score = (by_place[row.group, name].mean for name in MEASURES[2:])
        rows.append([arm, budget or None, round(100 * row.mean, 2), _span(row, ""), *change, round(distance, 2),
                     round(100 * regions, 1), score])  # fmt: skip
    columns = ("method", "steps", "Dice (%)", "95 % interval", "gain (points)", "95 % interval of the gain",
               f"HD95 ({unit})", "region F1 (%)", "score")  # fmt: skip
    return Table(columns, rows, "Means over cases and seeds; the gain is over System I. A mask without voxels is as "
                 "far from the truth as the image is wide; a region is found by a single shared voxel.")  # fmt: skip
