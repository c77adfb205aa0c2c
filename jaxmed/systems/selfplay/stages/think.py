"""Self-play think: segment images of a task by playing against oneself, for as long as one likes."""

import dataclasses
import os
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.arrays.types import Params
from jaxmed.config import Seed, checked
from jaxmed.data.scans import find_scans, partner_of
from jaxmed.errors import InputError
from jaxmed.files import unique_names, write_json
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.scans import NAME_ENDINGS, ScanFiles
from jaxmed.io.tables import write_table
from jaxmed.metrics.imaging import dice
from jaxmed.models.policy import TopkUnetConfig
from jaxmed.recipes.map_files import TABLES, Tell, map_files, write_failed
from jaxmed.rl.patch_game import PatchGame
from jaxmed.rl.patch_play import PatchPlayConfig
from jaxmed.rl.pixel_game import PixelGame
from jaxmed.rl.search import require_mctx
from jaxmed.rl.selfplay import SelfPlayConfig
from jaxmed.systems.selfplay.data import DataConfig, read_manifest
from jaxmed.systems.selfplay.debate import debate
from jaxmed.systems.selfplay.frames import KINDS
from jaxmed.systems.selfplay.networks import Trained, load_system_one
from jaxmed.systems.selfplay.policy_training import load_policy
from jaxmed.systems.selfplay.scans import Scan, read_scan, read_truth, write_result
from jaxmed.systems.selfplay.stages import adapt
from jaxmed.systems.selfplay.think_page import write_page
from jaxmed.systems.selfplay.thinking import LAPTOP, PAPER, Budget, Game, ThinkConfig, Thought, check_game, think
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, RunOptions, open_run, start, write_summary
from jaxmed.versions import software_versions

KEPT_STEPS = 12
"""Of the debate that the report shows."""
EMBEDDED_FILES = 2
TRIES_FAILED_AGAIN = True
PATCH_NOTE = (
    "The patch game is played: players name patches in turn, the one whose patch shows more of the object, by System "
    "I's mean probability, wins, and what a game has named is a mask."
)
ENDINGS = ("mask", "agreement", "thought")
"""Of the results of a file."""


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
        data: Embedded puzzles to think about instead of files.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Of the players.
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
    data: DataConfig = DataConfig()
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
    play = SelfPlayConfig(game=PixelGame(rule="elitist", at_most_k=True), games=16, steps=16)
    patch = PatchPlayConfig(game=PatchGame(patches=8), games=16, turns=16)
    config = ThinkConfig(play=play, patch=patch, policy=TopkUnetConfig(widths=(8, 16), value_width=16))
    return Config(budget=Budget(steps=1024), think=config, data=DataConfig(embedded=24))


class Job(NamedTuple):
    """A file to think about.

    Attributes:
        name: Of its results.
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


def run(config: Config, folder: RunFolder) -> int:
    """Think about every file; write masks, confidence and courses, and the report. Returns 1 when files failed."""
    began = time.monotonic()
    if config.data.embedded and (config.input is None or config.weights is None):
        config = make_embedded(config, folder)
    if config.input is None or config.weights is None:
        missing = "input" if config.input is None else "weights"
        raise InputError(missing, "images and System I", "nothing", f"give --{missing}, or try --preset smoke")
    if config.think.mode == "mcts":
        require_mctx()
    trained, policy = load_system_one(config.weights), None
    if config.policy_weights is not None:
        thinking, policy = load_policy(config.policy_weights, config.think, trained.frame.size)
        config = dataclasses.replace(config, think=thinking)
    check_game(config.game, config.think, trained.frame.size)
    jobs, passed = list_jobs(config)
    if len(jobs) == 1:
        read_scan(
            jobs[0].scan, trained.frame, jobs[0].box, tiles=config.tiles, fill=config.fill
        )  # a single broken file is a mistake
    start(folder)
    log = Log(folder.path, folder.options.quiet)
    notes = [*passed, *make_notes(trained, config)]
    for note in notes:
        log.say(f"Note: {note}")
    budget = f"{config.budget.seconds:g} s" if config.budget.seconds else f"{config.budget.steps:,} steps"
    announce(
        log, f"Thinking for {budget} about each", params=trained.system.params, count=len(jobs), unit="files",
        smaller=folder.smaller,
    )  # fmt: skip
    ready = time.monotonic()

    def work(number: int, job: Job, tell: Tell) -> dict[str, Any]:
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        return process(config, trained, policy, job, key, folder.outputs, tell)

    rows, failed, _ = map_files(
        jobs, work, folder.outputs, log, "Thinking", "files",
        lambda row: {"score": row["score"], "first_score": row["first_score"]},
    )  # fmt: skip
    for row in rows:
        if row["stop"] == "constant verifier":
            log.say(f"{row['name']}: the verifier gives every mask the same score; this is System I's answer.")
    thought = time.monotonic()
    write_scans(folder.outputs, rows)
    write_failed(folder.outputs, failed)
    summary = {
        "game": config.game,
        "scans": rows,
        "failed": len(failed),
        "task": trained.task,
        "notes": notes,
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed selfplay think --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read and check": ready - began, "think, compilation included": thought - ready},
    }
    write_summary(folder, summary)
    write_page(folder.path)
    return 1 if failed else 0


report = write_page


def make_embedded(config: Config, folder: RunFolder) -> Config:
    """Adapt a tiny System I to a novel family of puzzles where none is given, and think about them without files."""
    if config.input is not None:
        list_jobs(config)  # a mistake there costs no training
    prepared = adapt.make_embedded(dataclasses.replace(adapt.smoke(), data=config.data, weights=config.weights), folder)
    weights = config.weights
    if weights is None:
        settings = dataclasses.replace(prepared, data=prepared.data, seed=config.seed)
        nested = open_run("selfplay", "adapt", settings, RunOptions(folder.path / "inputs" / "adapted", quiet=True))
        if nested.status != "complete":
            text = f"Adapting it to '{settings.task}' by {settings.shots} labelled images."
            Log(folder.path, folder.options.quiet).say(text)
            adapt.run(settings, nested)
        weights = nested.path
    if config.input is not None:
        return dataclasses.replace(config, weights=weights)
    records = read_manifest(prepared.data, config.seed)
    chosen = [row for row in records if row.split == "test" and row.task == prepared.task][:EMBEDDED_FILES]
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
    scans, passed = find_scans(config.input, KINDS, config.series, apart=(config.mask, config.box))
    root = config.input if config.input.is_dir() and scans[0].path != config.input else config.input.parent
    places = [os.path.relpath(scan.path, root) for scan in scans]

    def partner(folder: Path | None, place: str, name: str) -> Path | None:
        if folder is None:
            return None
        found = partner_of(folder, place) if folder.is_dir() else folder
        if not found.exists():
            raise InputError(folder, f"a file {place}", "none", f"check --{name}")
        if not folder.is_dir() and len(scans) > 1:
            raise InputError(folder, f"a folder, as --input has {len(scans)} files", "one file", f"check --{name}")
        return found

    names = unique_names(places, NAME_ENDINGS, ENDINGS, TABLES)
    jobs = [
        Job(name, scan, partner(config.mask, place, "mask"), partner(config.box, place, "box"))
        for name, scan, place in zip(names, scans, places, strict=True)
    ]
    return jobs, passed


def make_notes(trained: Trained, config: Config) -> list[str]:
    """Say what a user should know about this run."""
    notes = [PATCH_NOTE] if config.game == "patch" else []
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
) -> dict[str, Any]:
    """Think about one file, write what comes of it, and return its record."""
    scan = read_scan(job.scan, trained.frame, job.box, tiles=config.tiles, fill=config.fill)
    think_key, debate_key = jax.random.split(key)

    def watch(steps: int, value: float) -> None:
        tell(f"{job.name}: {steps:,} steps, score {value:.3f}")

    found = think(
        think_key,
        trained.system,
        scan.images,
        config.budget,
        config.think,
        game=config.game,
        policy=policy,
        watch=watch,
    )
    truth = None if job.mask is None else read_truth(job.mask, scan, trained.frame)
    write_maps(outputs, job, scan, found)
    arrays: dict[str, np.ndarray] = {
        "images": scan.images, "first": found.first, "masks": found.masks, "agreement": found.agreement,
    }  # fmt: skip
    if truth is not None:
        arrays["truth"] = truth
    if found.policy is not None and config.think.mode == "learn":
        largest = int(np.argmax(found.values - found.trace.values[0]))
        course = debate(
            debate_key, found.system, config.think, found.policy, jnp.asarray(scan.images[largest]),
            jnp.asarray(found.start[largest]), KEPT_STEPS, jnp.asarray(found.level[largest : largest + 1]), config.game,
        )  # fmt: skip
        arrays |= {f"debate_{name}": value for name, value in course._asdict().items()}
        arrays["debate_image"] = scan.images[largest]
    write_npz(outputs / f"{job.name}_thought.npz", arrays, is_compressed=True)
    row = {
        "name": job.name,
        "images": len(scan.images),
        "stop": found.stop,
        "steps": int(found.trace.steps[-1]),
        "seconds": float(found.trace.seconds[-1]),
        "first_score": float(found.trace.values[0].mean()),
        "score": float(found.values.mean()),
        "scores": [float(value) for value in found.values],
        "voxels": int(found.masks.sum()),
        "curve": {
            "steps": found.trace.steps.tolist(),
            "seconds": found.trace.seconds.tolist(),
            "score": found.trace.values.mean(axis=1).tolist(),
        },
    }
    if truth is not None:
        answers = [*found.trace.masks, found.first]
        *course, first = (float(np.mean([dice(t, m) for t, m in zip(truth, masks, strict=True)])) for masks in answers)
        row["curve"]["dice"], row["dice"], row["first_dice"] = course, course[-1], first
    return row


def write_maps(outputs: Path, job: Job, scan: Scan, found: Thought) -> None:
    """Write mask and agreement on the grid of the file, with sidecars."""
    for name, values, definition in (
        ("mask", found.masks, "voxels of the best mask that was seen: 1 inside (255 in a picture)"),
        ("agreement", found.agreement, "share of the games whose mask holds the voxel at the end of thinking"),
    ):
        write_result(outputs, f"{job.name}_{name}", scan, values)
        sidecar = {
            "definition": definition,
            "unit": "1",
            "constants": {"stop": found.stop, "steps": int(found.trace.steps[-1])},
            "software": f"jaxmed {software_versions().get('jaxmed', 'unknown')}",
        }
        write_json(outputs / f"{job.name}_{name}.json", sidecar)


def write_scans(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write scans.csv."""
    columns = ["id", "images", "steps", "seconds", "stop", "first_score", "score", "voxels"]
    columns += ["first_dice", "dice"] if any("dice" in row for row in rows) else []
    table = [
        {"id": row["name"]}
        | {name: f"{row[name]:.6g}" if isinstance(row.get(name), float) else row.get(name, "") for name in columns[1:]}
        for row in rows
    ]
    write_table(folder / "scans.csv", columns, table)
