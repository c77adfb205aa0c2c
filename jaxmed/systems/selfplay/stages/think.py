"""Self-play think: segment images of a task by playing against oneself, for as long as one likes."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.arrays.types import Params
from jaxmed.config import Seed, checked
from jaxmed.data.tasks import TaskData
from jaxmed.errors import InputError
from jaxmed.io.numpy_files import restore_npz, write_npz
from jaxmed.recipes.few_shot_stage import TaskInputs, copy_test_files
from jaxmed.recipes.map_files import Tell
from jaxmed.recipes.policy_sections import GAMES, STOPS, debate_panels
from jaxmed.recipes.scan_job import trouble_sections
from jaxmed.recipes.segment_files import (
    FilesConfig,
    FilesFlags,
    Job,
    ScanSummary,
    answer_panels,
    list_jobs,
    read_job,
    score_curves,
    score_tiles,
    segment_files,
    summarise,
    write_maps,
)
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, nested_run
from jaxmed.report.page import Block, Note, Section, Text
from jaxmed.rl.driver import check_game
from jaxmed.rl.search import require_mctx
from jaxmed.systems.selfplay.inputs import SHOTS, TASK, Trained, load_policy, load_system_one, make_inputs
from jaxmed.systems.selfplay.thinking import (
    LAPTOP,
    PAPER,
    SMOKE,
    Budget,
    Game,
    ThinkConfig,
    debate,
    think,
)
from jaxmed.train.announce import announce
from jaxmed.train.run_folder import RunFolder

KEPT_STEPS = 12
"""Of the debate that the report shows."""
SYNTHETIC_FILES = 2
TRIES_FAILED_AGAIN = True
ENDINGS = ("mask", "agreement", "thought")
"""Of the results of a file."""
MOST_FILES = 6


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Thinking about images of a task.

    Attributes:
        files: The images.
        weights: System I: a run of adapt (or of meta-train, for a familiar task).
        game: pixel: both players propose flips of the mask; patch: each names the patches of the image that show most
            of the object (RLSP), and what they have named is the mask.
        budget: When to stop; of each file. Zero steps give System I's answer.
        think: How to think.
        policy_weights: A run of train-policy, whose policy each file begins with; a fresh one when absent. It plays the
            pixel game.
        data: Synthetic puzzles to think about instead of files.
        seed: Seed of the players.
    """

    files: FilesFlags = FilesConfig()
    weights: Path | None = None
    game: Game = "pixel"
    budget: Budget = Budget()
    think: ThinkConfig = ThinkConfig()
    policy_weights: Path | None = None
    data: TaskData = TaskData()
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.game == "patch" and self.policy_weights is not None:
            raise ValueError("policy_weights: expected none for the patch game, found a policy of the pixel game")


def paper() -> Config:
    """The release's players, learning and 262,144 steps, under fair rules; --think.play.game.rule repo for its own."""
    return Config(budget=Budget(262_144, patience=0), think=PAPER)


def laptop() -> Config:
    """Up to a minute for each file."""
    return Config(budget=Budget(seconds=60.0), think=LAPTOP)


def smoke() -> Config:
    """A few steps, in seconds: your images or puzzles, your System I or a tiny one made on the spot."""
    return Config(budget=Budget(steps=1024), think=SMOKE, data=TaskData(synthetic=24))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What came of all files; the task is what System I is adapted to, empty where it is not."""

    game: Game
    scans: tuple[ScanSummary, ...]
    failed: int
    task: str
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> int:
    """Think about every file; write masks, confidence and courses, and the report. Returns 1 when files failed."""
    clock = Clock()
    if config.data.synthetic and (config.files.input is None or config.weights is None):
        config = make_files(config, folder)
    if config.files.input is None or config.weights is None:
        missing = "input" if config.files.input is None else "weights"
        raise InputError(missing, "images and System I", "nothing", f"give --{missing}, or try --preset smoke")
    if config.think.mode == "mcts":
        require_mctx()
    trained, policy = load_system_one(config.weights), None
    if config.policy_weights is not None:
        thinking, policy = load_policy(config.policy_weights, config.think, trained.preprocess.size)
        config = dataclasses.replace(config, think=thinking)
    check_game(config.game, config.think.mode, config.think.patch.game.patches, trained.preprocess.size)
    jobs, passed = list_jobs(config.files, ENDINGS)
    if len(jobs) == 1:  # a single broken file is a mistake
        read_job(config.files, trained.preprocess, jobs[0]._replace(mask=None))
    notes = (*passed, *make_notes(trained, config))
    log = begin(folder, notes)
    budget = f"{config.budget.seconds:g} s" if config.budget.seconds else f"{config.budget.steps:,} steps"
    announce(
        log, f"Thinking for {budget} about each", params=trained.system.params, count=len(jobs), unit="files",
        smaller=folder.smaller,
    )  # fmt: skip
    clock.lap("read and check")

    def work(number: int, job: Job, tell: Tell) -> ScanSummary:
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        return process(config, trained, policy, job, key, folder.outputs, tell)

    scans, failed = segment_files(jobs, work, folder.outputs, log, "Thinking")
    for scan in scans:
        if scan.stop == "constant verifier":
            log.say(f"{scan.name}: the verifier gives every mask the same score; this is System I's answer.")
    clock.lap("think, compilation included")
    finish(folder, config, Summary(config.game, scans, failed, trained.task, notes), clock, page)
    return 1 if failed else 0


def make_files(config: Config, folder: RunFolder) -> Config:
    """Adapt a tiny System I to a novel family of puzzles where none is given, and think about them without files."""
    files, weights = config.files, config.weights
    if files.input is not None:
        list_jobs(files, ENDINGS)  # a mistake there costs no training
    made = make_inputs(TaskInputs(config.data, weights=weights), folder)
    if weights is None:
        why = f"Adapting it to '{TASK}' by {SHOTS} labelled images."
        changes = {"inputs": dataclasses.replace(made, seed=config.seed)}
        weights = nested_run(folder, "selfplay adapt", changes, begin(folder), why).path
    if files.input is None:
        images, masks = copy_test_files(made.data, TASK, SYNTHETIC_FILES, config.seed, folder.path / "inputs")
        files = dataclasses.replace(files, input=images, mask=masks)
    return dataclasses.replace(config, files=files, weights=weights)


def make_notes(trained: Trained, config: Config) -> list[str]:
    """Say what a user should know about this run."""
    notes = [GAMES[config.game]]
    if trained.task:
        notes.append(f"System I is adapted to '{trained.task}'.")
    else:
        notes.append("System I is not adapted to a task: it answers for the familiar ones.")
    if config.budget.steps == 0:
        notes.append("The budget is 0: this is System I's answer.")
    if config.files.mask is not None:
        notes.append("True masks serve the report alone; the players never see them.")
    return notes


def process(
    config: Config, trained: Trained, policy: Params | None, job: Job, key: Any, outputs: Path, tell: Tell
) -> ScanSummary:
    """Think about one file, and write what comes of it."""
    scan, truth = read_job(config.files, trained.preprocess, job)
    think_key, debate_key = jax.random.split(key)

    def watch(steps: int, value: float) -> None:
        tell(f"{job.name}: {steps:,} steps, score {value:.3f}")

    found = think(
        think_key, trained.system, scan.images, config.budget, config.think, game=config.game, policy=policy,
        watch=watch,
    )  # fmt: skip
    trace = found.trace
    maps = {
        "mask": (found.masks, "voxels of the best mask that was seen: 1 inside (255 in a picture)"),
        "agreement": (found.agreement, "share of the games whose mask holds the voxel at the end of thinking"),
    }
    write_maps(outputs, job.name, scan, maps, {"stop": found.stop, "steps": int(trace.steps[-1])})
    arrays = {"images": scan.images, "first": found.first, "masks": found.masks, "agreement": found.agreement}
    if found.policy is not None and config.think.mode == "learn":
        largest = int(np.argmax(found.values - trace.values[0]))
        game = debate(
            debate_key, found.system, config.think, found.policy, jnp.asarray(scan.images[largest]),
            jnp.asarray(found.start[largest]), KEPT_STEPS, jnp.asarray(found.level[largest : largest + 1]), config.game,
        )  # fmt: skip
        arrays |= {f"debate_{name}": value for name, value in game._asdict().items()}
        arrays["debate_image"] = scan.images[largest]
    arrays |= {} if truth is None else {"truth": truth}
    write_npz(outputs / f"{job.name}_thought.npz", arrays, is_compressed=True)
    return summarise(job, trace, found.stop, truth)


def page(run: Finished[Config, Summary]) -> Page:
    """Show masks, debates and scores of the files."""
    summary, scans = run.summary, run.summary.scans
    sections = [*trouble_sections(run.outputs, (), summary.failed)]
    sections.append(Section("Notes", [Note(text) for text in summary.notes]))
    sections += [Section(scan.name, _pictures(run.outputs, scan, summary.game)) for scan in scans[:MOST_FILES]]
    if scans:
        sections.append(Section("Thinking", score_curves(scans)))
    sections.append(Section("How to read this", [Text([
        "The score is the verifier's opinion, lowered by System I's evidence against what was changed "
        "(think.prior-weight), and not the truth: thinking finds masks that it likes. Whether they are better depends "
        "on how well the verifier's scores follow Dice, which the report of the adapt stage shows.",
        "Agreement is the share of games whose mask holds a voxel when thinking ends: voxels near a half are those "
        "that the players keep flipping.",
        "The answer is the best mask that was seen, and could have been had at any time.",
    ])]))  # fmt: skip
    subtitle = f"Self-play reasoning on {len(scans)} files, by the {summary.game} game"
    return Page("Masks, thought about", subtitle, score_tiles(scans, summary.failed), sections)


def _pictures(outputs: Path, scan: ScanSummary, game: Game) -> list[Block]:
    """Show the masks of a file, and the debate of its players where they learnt."""
    arrays = restore_npz(outputs / f"{scan.name}_thought.npz")
    if arrays is None:
        return [Note("The masks are no longer in this folder.", "warning")]
    blocks: list[Block] = [answer_panels(arrays, scan, "System I", STOPS[scan.stop])]
    return blocks + ([debate_panels(arrays, game)] if "debate_masks" in arrays else [])
