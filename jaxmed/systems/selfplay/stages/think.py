"""Self-play think: segment images of a task by playing against oneself, for as long as one likes."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.arrays.types import Params
from jaxmed.config import Seed, checked, from_record, to_record
from jaxmed.data.cuts import cut_scan, cut_truth, write_result
from jaxmed.data.scans import ANY_KIND, find_partners, find_scans, name_scans
from jaxmed.data.tasks import TaskData, read_manifest
from jaxmed.errors import InputError
from jaxmed.io.maps import write_sidecar
from jaxmed.io.numpy_files import restore_npz, write_npz
from jaxmed.io.scans import ScanFiles
from jaxmed.io.tables import write_table
from jaxmed.metrics.imaging import dice
from jaxmed.recipes.map_files import TABLES, Tell, map_files, write_failed
from jaxmed.recipes.scan_job import trouble_sections
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, nested_run
from jaxmed.report.figures import curves
from jaxmed.report.masks import Panel, mask_panels, plane
from jaxmed.report.page import Block, Note, Section, Table, Text, Tile
from jaxmed.rl.search import require_mctx
from jaxmed.rl.tournament import Debate
from jaxmed.systems.selfplay import inputs
from jaxmed.systems.selfplay.inputs import SHOTS, TASK, Trained, load_policy, load_system_one
from jaxmed.systems.selfplay.thinking import (
    LAPTOP,
    PAPER,
    SMOKE,
    Budget,
    Game,
    ThinkConfig,
    check_game,
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
MOST_IMAGES = 8
DEBATES = {
    "pixel": "A debate of the trained policy with itself, from where the game began. In every step both players name "
    "voxels to flip; the titles give the scores of both results. The better one becomes the next mask, unless both are "
    "worse than what there is and the rules keep it.",
    "patch": "A patch game of the trained policy with itself, until it was stopped or the figure ends. In every turn "
    "both players name a patch, the second when the first one's is gone; the titles give System I's mean probability "
    "in both. The mask is what has been named so far.",
}
GAMES = {
    "pixel": "The pixel game: two players propose flips of the mask, the verifier judges, the better proposal stays.",
    "patch": "The patch game (RLSP): two players name patches of the image in turn, the one whose patch shows more of "
    "the object wins, and either may end the game. The patches that a game has named are a mask; the verifier judges "
    "it after every move. So the answer is made of whole patches (think.patch.game.patches); System I's mask is where "
    "the curve begins, and no candidate.",
}
STOPS = {
    "budget": "the budget was used up",
    "time": "the time was up",
    "plateau": "no better mask was found any more",
    "constant verifier": "the verifier gives every mask the same score: this is System I's answer",
}


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Thinking about images of a task.

    Attributes:
        input: An image (NIfTI, PNG, JPEG, TIFF, .npy), or a folder of them.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        weights: System I: a run of adapt (or of meta-train, for a familiar task).
        mask: True mask of the input, or a folder of them by the same file names: Dice is reported, nothing else.
        box: Mask of a region, or a folder of them, in whose middle each image stands; slices without it are left out.
        tiles: Cover files that are larger than an image by images that overlap.
        game: pixel: both players propose flips of the mask; patch: each names the patches of the image that show most
            of the object (RLSP), and what they have named is the mask.
        budget: When to stop; of each file. Zero steps give System I's answer.
        think: How to think.
        policy_weights: A run of train-policy, whose policy each file begins with; a fresh one when absent. It plays the
            pixel game.
        data: Synthetic puzzles to think about instead of files.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Seed of the players.
    """

    input: Path | None = None
    series: str = ""
    weights: Path | None = None
    mask: Path | None = None
    box: Path | None = None
    tiles: bool = False
    game: Game = "pixel"
    budget: Budget = Budget()
    think: ThinkConfig = ThinkConfig()
    policy_weights: Path | None = None
    data: TaskData = TaskData()
    fill: float | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.game == "patch" and self.think.mode != "learn":
            raise ValueError(f"think.mode: expected learn for the patch game, found {self.think.mode}")
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


class Job(NamedTuple):
    """A file to think about.

    Attributes:
        name: Name of its results.
        scan: The file.
        mask: Its true mask.
        box: Its region.
    """

    name: str
    scan: ScanFiles
    mask: Path | None
    box: Path | None

    @property
    def path(self) -> Path:
        """The file, or the folder of slices."""
        return self.scan.path


@dataclasses.dataclass(frozen=True)
class Curve:
    """Means over the images of a file, before thinking and after every iteration; seconds without compilation."""

    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    score: tuple[float, ...]
    dice: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class ScanSummary:
    """What came of a file; the scores of its images are the verifier's."""

    name: str
    images: int
    stop: str
    scores: tuple[float, ...]
    voxels: int
    curve: Curve
    path: str = ""

    def row(self) -> dict[str, Any]:
        """Return its line of scans.csv; Dice, where the truth is known, of System I's masks and of the answer."""
        curve = self.curve
        row = {
            "images": self.images, "steps": curve.steps[-1], "seconds": curve.seconds[-1], "stop": self.stop,
            "first_score": curve.score[0], "score": curve.score[-1], "voxels": self.voxels,
        }  # fmt: skip
        return row | ({"first_dice": curve.dice[0], "dice": curve.dice[-1]} if curve.dice else {})


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
    if config.data.synthetic and (config.input is None or config.weights is None):
        config = make_inputs(config, folder)
    if config.input is None or config.weights is None:
        missing = "input" if config.input is None else "weights"
        raise InputError(missing, "images and System I", "nothing", f"give --{missing}, or try --preset smoke")
    if config.think.mode == "mcts":
        require_mctx()
    trained, policy = load_system_one(config.weights), None
    if config.policy_weights is not None:
        thinking, policy = load_policy(config.policy_weights, config.think, trained.preprocess.size)
        config = dataclasses.replace(config, think=thinking)
    check_game(config.game, config.think, trained.preprocess.size)
    jobs, passed = list_jobs(config)
    if len(jobs) == 1:  # a single broken file is a mistake
        cut_scan(jobs[0].scan, trained.preprocess, jobs[0].box, tiles=config.tiles, fill=config.fill)
    notes = (*passed, *make_notes(trained, config))
    log = begin(folder, notes)
    budget = f"{config.budget.seconds:g} s" if config.budget.seconds else f"{config.budget.steps:,} steps"
    announce(
        log, f"Thinking for {budget} about each", params=trained.system.params, count=len(jobs), unit="files",
        smaller=folder.smaller,
    )  # fmt: skip
    clock.lap("read and check")

    def work(number: int, job: Job, tell: Tell) -> dict[str, Any]:
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        return to_record(process(config, trained, policy, job, key, folder.outputs, tell))

    found = map_files(
        jobs, work, folder.outputs, log, "Thinking", "files",
        lambda row: {"score": row["curve"]["score"][-1], "first_score": row["curve"]["score"][0]},
    )  # fmt: skip
    scans = tuple(from_record(ScanSummary, row, f"{row['name']}.json") for row in found.rows)
    for scan in scans:
        if scan.stop == "constant verifier":
            log.say(f"{scan.name}: the verifier gives every mask the same score; this is System I's answer.")
    clock.lap("think, compilation included")
    rows = [
        {"id": scan.name} | {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in scan.row().items()}
        for scan in scans
    ]
    write_table(folder.outputs / "scans.csv", tuple(max(rows, key=len, default={"id": ""})), rows)
    write_failed(folder.outputs, found.failed)
    summary = Summary(config.game, scans, len(found.failed), trained.task, notes)
    finish(folder, config, summary, clock, page)
    return 1 if found.failed else 0


def make_inputs(config: Config, folder: RunFolder) -> Config:
    """Adapt a tiny System I to a novel family of puzzles where none is given, and think about them without files."""
    if config.input is not None:
        list_jobs(config)  # a mistake there costs no training
    made, weights = inputs.make_inputs(config.data, None, config.weights, 0, folder), config.weights
    if weights is None:
        why = f"Adapting it to '{TASK}' by {SHOTS} labelled images."
        changes = made | {"seed": config.seed}
        weights = nested_run(folder, "selfplay adapt", changes, begin(folder), why).path
    if config.input is not None:
        return dataclasses.replace(config, weights=weights)
    records = read_manifest(made["data"], config.seed)
    chosen = [row for row in records if row.split == "test" and row.task == TASK][:SYNTHETIC_FILES]
    places = {"images": folder.path / "inputs" / "test", "masks": folder.path / "inputs" / "test_masks"}
    for row in chosen:
        for place, source in ((places["images"], row.path), (places["masks"], row.mask)):
            place.mkdir(parents=True, exist_ok=True)
            (place / row.path.name).write_bytes(source.read_bytes())
    return dataclasses.replace(config, input=places["images"], mask=places["masks"], weights=weights)


def list_jobs(config: Config) -> tuple[list[Job], tuple[str, ...]]:
    """Find the files, and what belongs to each by its name; return them, and notes on what was passed over.

    Raises:
        InputError: There are none, or one has no partner.
    """
    assert config.input is not None
    if not config.input.exists():
        raise InputError(config.input, "an image or a folder of images", "nothing", "check --input")
    scans, passed = find_scans(config.input, ANY_KIND, config.series, apart=(config.mask, config.box))
    names = name_scans(scans, config.input, ENDINGS, TABLES)
    masks, boxes = (find_partners(scans, config.input, place) for place in (config.mask, config.box))
    return [Job(*parts) for parts in zip(names, scans, masks, boxes, strict=True)], passed


def make_notes(trained: Trained, config: Config) -> list[str]:
    """Say what a user should know about this run."""
    notes = [GAMES[config.game]]
    if trained.task:
        notes.append(f"System I is adapted to '{trained.task}'.")
    else:
        notes.append("System I is not adapted to a task: it answers for the familiar ones.")
    if config.budget.steps == 0:
        notes.append("The budget is 0: this is System I's answer.")
    if config.mask is not None:
        notes.append("True masks serve the report alone; the players never see them.")
    return notes


def process(
    config: Config, trained: Trained, policy: Params | None, job: Job, key: Any, outputs: Path, tell: Tell
) -> ScanSummary:
    """Think about one file, and write what comes of it."""
    scan = cut_scan(job.scan, trained.preprocess, job.box, tiles=config.tiles, fill=config.fill)
    truth = None if job.mask is None else cut_truth(job.mask, scan, trained.preprocess)
    think_key, debate_key = jax.random.split(key)

    def watch(steps: int, value: float) -> None:
        tell(f"{job.name}: {steps:,} steps, score {value:.3f}")

    found = think(
        think_key, trained.system, scan.images, config.budget, config.think, game=config.game, policy=policy,
        watch=watch,
    )  # fmt: skip
    trace = found.trace
    for name, values, definition in (
        ("mask", found.masks, "voxels of the best mask that was seen: 1 inside (255 in a picture)"),
        ("agreement", found.agreement, "share of the games whose mask holds the voxel at the end of thinking"),
    ):
        write_result(outputs, f"{job.name}_{name}", scan, values)
        constants = {"stop": found.stop, "steps": int(trace.steps[-1])}
        write_sidecar(outputs / f"{job.name}_{name}.json", definition, "1", constants)
    arrays = {"images": scan.images, "first": found.first, "masks": found.masks, "agreement": found.agreement}
    if found.policy is not None and config.think.mode == "learn":
        largest = int(np.argmax(found.values - trace.values[0]))
        game = debate(
            debate_key, found.system, config.think, found.policy, jnp.asarray(scan.images[largest]),
            jnp.asarray(found.start[largest]), KEPT_STEPS, jnp.asarray(found.level[largest : largest + 1]), config.game,
        )  # fmt: skip
        arrays |= {f"debate_{name}": value for name, value in game._asdict().items()}
        arrays["debate_image"] = scan.images[largest]
    trajectory = None
    if truth is not None:
        arrays["truth"] = truth
        pairs = [list(zip(truth, masks, strict=True)) for masks in trace.masks]
        trajectory = tuple(float(np.mean([dice(*pair) for pair in point])) for point in pairs)
    write_npz(outputs / f"{job.name}_thought.npz", arrays, is_compressed=True)
    steps, seconds, scores, last = (
        tuple(values.tolist()) for values in (trace.steps, trace.seconds, trace.values.mean(axis=1), found.values)
    )
    curve = Curve(steps, seconds, scores, trajectory)
    return ScanSummary(
        job.name, len(scan.images), found.stop, last, int(found.masks.sum()), curve, str(job.path)
    )  # fmt: skip


def page(run: Finished[Config, Summary]) -> Page:
    """Show masks, debates and scores of the files."""
    summary, scans = run.summary, run.summary.scans
    sections = [*trouble_sections(run.outputs, (), summary.failed)]
    sections.append(Section("Notes", [Note(text) for text in summary.notes]))
    sections += [Section(scan.name, _pictures(run.outputs, scan, summary.game)) for scan in scans[:MOST_FILES]]
    if scans:
        sections.append(Section("Thinking", _courses(scans)))
    sections.append(Section("How to read this", [Text([
        "The score is the verifier's opinion, lowered by System I's evidence against what was changed "
        "(think.prior-weight), and not the truth: thinking finds masks that it likes. Whether they are better depends "
        "on how well the verifier's scores follow Dice, which the report of the adapt stage shows.",
        "Agreement is the share of games whose mask holds a voxel when thinking ends: voxels near a half are those "
        "that the players keep flipping.",
        "The answer is the best mask that was seen, and could have been had at any time.",
    ])]))  # fmt: skip
    subtitle = f"Self-play reasoning on {len(scans)} files, by the {summary.game} game"
    return Page("Masks, thought about", subtitle, _tiles(summary), sections)


def _tiles(summary: Summary) -> list[Tile]:
    rows = [scan.row() for scan in summary.scans]
    tiles: list[Tile] = [("Files", len(rows), f"{summary.failed} failed")]
    if rows:
        first, last = (float(np.mean([row[name] for row in rows])) for name in ("first_score", "score"))
        tiles.append(("Score", f"{last:.3f}", f"mean over files; {first:.3f} before thinking"))
        steps, seconds = (sum(row[name] for row in rows) for name in ("steps", "seconds"))
        tiles.append(("Steps", f"{steps:,}", f"{seconds:.1f} s"))
    if scored := [(row["first_dice"], row["dice"]) for row in rows if "dice" in row]:
        first, last = 100 * np.mean(scored, axis=0)
        tiles.append(("Dice", f"{last:.1f} %", f"{first:.1f} % before thinking, {len(scored)} files"))
    return tiles


def _pictures(outputs: Path, scan: ScanSummary, game: Game) -> list[Block]:
    """Show the masks of a file, and the debate of its players where they learnt."""
    arrays = restore_npz(outputs / f"{scan.name}_thought.npz")
    if arrays is None:
        return [Note("The masks are no longer in this folder.", "warning")]
    count, panels = len(arrays["images"]), []
    for place in np.unique(np.linspace(0, count - 1, min(MOST_IMAGES, count)).round().astype(int)):
        image, first, last = (arrays[name][place] for name in ("images", "first", "masks"))
        guide = last if last.any() else first
        outlines = {"System I": plane(first, guide), "after thinking": plane(last, guide)}
        if "truth" in arrays:
            outlines["true"] = plane(arrays["truth"][place], guide)
        panels.append(Panel(plane(image, guide), f"score {scan.scores[place]:.2f}", outlines))
        panels.append(Panel(plane(arrays["agreement"][place], guide), "agreement"))
    blocks: list[Block] = [mask_panels(
        panels, columns=4, limits=(0.0, 1.0),
        caption=f"Masks before and after {scan.curve.steps[-1]:,} steps, and the share of games that hold each voxel; "
        f"{STOPS[scan.stop]}.",
        alt=f"{len(panels) // 2} images with outlines of masks, each beside its map of agreement.",
    )]  # fmt: skip
    if "debate_masks" in arrays:
        told = Debate(*(arrays[f"debate_{name}"] for name in Debate._fields))
        guide, panels = told.masks[-1] if told.masks[-1].any() else np.ones_like(told.masks[-1]), []
        for step, (value, rival_value) in enumerate(zip(told.values, told.rival_values, strict=True)):
            flips = {"first player": told.flips[step], "second player": told.rival_flips[step]}
            title = f"{step + 1}: {value:.3f} {'>' if told.is_won[step] else '<'} {rival_value:.3f}"
            fills = {name: plane(flip, guide) for name, flip in flips.items()}
            panels.append(
                Panel(plane(arrays["debate_image"], guide), title, {"mask": plane(told.masks[step], guide)}, fills)
            )
        blocks.append(mask_panels(
            panels, columns=6, limits=(0.0, 1.0), caption=DEBATES[game],
            alt=f"{len(panels)} steps of a game: the mask and the voxels that both players would flip.",
        ))  # fmt: skip
    return blocks


def _courses(scans: tuple[ScanSummary, ...]) -> list[Block]:
    def course(name: str, factor: float, ylabel: str, caption: str) -> Block:
        shown = {
            scan.name: (scan.curve.steps, getattr(scan.curve, name)) for scan in scans if getattr(scan.curve, name)
        }
        lines = {name: (np.array(x, float), factor * np.array(y)) for name, (x, y) in list(shown.items())[:8]}
        return curves(lines, xlabel="steps of the game", ylabel=ylabel, caption=caption)

    blocks = [course("score", 1, "score", "The score of the best masks so far, mean over the images of a file.")]
    rows = [scan.row() for scan in scans]
    has_truth = any("dice" in row for row in rows)
    if has_truth:
        caption = (
            "Dice of the same masks with the true ones. Where the score rises and Dice falls, thinking has found what "
            "the verifier gets wrong."
        )
        blocks.append(course("dice", 100, "Dice (%)", caption))
    columns = {
        "images": "images", "steps": "steps", "seconds": "seconds", "end": "stop", "score before": "first_score",
        "score": "score",
    } | ({"Dice before": "first_dice", "Dice": "dice"} if has_truth else {})  # fmt: skip
    cells = [[scan.name, *map(row.get, columns.values())] for scan, row in zip(scans, rows, strict=True)]
    return [*blocks, Table(("file", *columns), cells, "One line per file.")]
