"""Files segmented one by one, by a method whose masks get better step by step, and how a page shows them.

What belongs to a file bears its name: NAME_mask and further maps on its grid, NAME.json, and NAME_thought.npz for the
page.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Shaped

from jaxmed.config import checked, from_record, to_record
from jaxmed.data.cuts import Cuts, cut_scan, cut_truth, write_result
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.scans import ANY_KIND, find_partners, find_scans, name_scans
from jaxmed.errors import InputError
from jaxmed.io.maps import write_sidecar
from jaxmed.io.scans import ScanFiles
from jaxmed.io.tables import write_table
from jaxmed.metrics.imaging import dice
from jaxmed.recipes.map_files import TABLES, Tell, map_files, write_failed
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.report.figures import curves
from jaxmed.report.masks import Panel, mask_panels, plane
from jaxmed.report.page import Block, Figure, Table, Tile
from jaxmed.rl.driver import Trace
from jaxmed.train.log import Log

MOST_CURVES = 8
MOST_IMAGES = 8


@dataclasses.dataclass(frozen=True)
@checked
class FilesConfig:
    """Files to be segmented.

    Attributes:
        input: An image (NIfTI, PNG, JPEG, TIFF, .npy), or a folder of them.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        mask: True mask of the input, or a folder of them by the same file names: Dice is reported, nothing else.
        box: Mask of a region, or a folder of them, in whose middle each image stands; slices without it are left out.
        tiles: Cover files that are larger than an image by images that overlap.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
    """

    input: Path | None = None
    series: str = ""
    mask: Path | None = None
    box: Path | None = None
    tiles: bool = False
    fill: float | None = None


# The type of a stage's field `files`: on the command line its options carry no prefix.
FilesFlags: TypeAlias = Annotated[FilesConfig, NO_PREFIX]


class Job(NamedTuple):
    """A file to be segmented: the name of its results, the file, its true mask and its region."""

    name: str
    scan: ScanFiles
    mask: Path | None
    box: Path | None

    @property
    def path(self) -> Path:
        """The file, or the folder of slices."""
        return self.scan.path


def list_jobs(files: FilesConfig, endings: Sequence[str]) -> tuple[list[Job], tuple[str, ...]]:
    """Find the files, and what belongs to each by its name; return them, and notes on what was passed over.

    No file is named so that one with one of the endings could be taken for a result.

    Raises:
        InputError: There are none, or one has no partner.
    """
    if files.input is None or not files.input.exists():
        raise InputError(files.input or "input", "an image or a folder of images", "nothing", "check --input")
    scans, passed = find_scans(files.input, ANY_KIND, files.series, apart=(files.mask, files.box))
    names = name_scans(scans, files.input, endings, TABLES)
    masks, boxes = (find_partners(scans, files.input, place) for place in (files.mask, files.box))
    return [Job(*parts) for parts in zip(names, scans, masks, boxes, strict=True)], passed


def read_job(
    files: FilesConfig, preprocess: Preprocess, job: Job
) -> tuple[Cuts, Bool[np.ndarray, "item *size"] | None]:
    """Cut a file into images, and its true mask where there is one; see `cut_scan` and `cut_truth`."""
    cuts = cut_scan(job.scan, preprocess, job.box, tiles=files.tiles, fill=files.fill)
    return cuts, None if job.mask is None else cut_truth(job.mask, cuts, preprocess)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Means over the images of a file, before thinking and after every iteration; seconds without compilation."""

    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    score: tuple[float, ...]
    dice: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class ScanSummary:
    """What came of a file; the scores of its images are the method's own opinion."""

    name: str
    images: int
    stop: str
    scores: tuple[float, ...]
    voxels: int
    curve: Curve
    path: str = ""

    def row(self) -> dict[str, Any]:
        """Return its line of scans.csv; Dice, where the truth is known, of the first masks and of the answer."""
        curve = self.curve
        row = {
            "images": self.images, "steps": curve.steps[-1], "seconds": curve.seconds[-1], "stop": self.stop,
            "first_score": curve.score[0], "score": curve.score[-1], "voxels": self.voxels,
        }  # fmt: skip
        return row | ({"first_dice": curve.dice[0], "dice": curve.dice[-1]} if curve.dice else {})


def summarise(job: Job, trace: Trace, stop: str, truth: Bool[np.ndarray, "item *size"] | None) -> ScanSummary:
    """Return what came of a file, whose answer is where its course ends; Dice where the true mask is known."""
    trajectory = None
    if truth is not None:
        pairs = [list(zip(truth, masks, strict=True)) for masks in trace.masks]
        trajectory = tuple(float(np.mean([dice(*pair) for pair in point])) for point in pairs)
    columns = trace.steps, trace.seconds, trace.values.mean(axis=1), trace.values[-1]
    steps, seconds, scores, last = (tuple(values.tolist()) for values in columns)
    curve, voxels = Curve(steps, seconds, scores, trajectory), int(trace.masks[-1].sum())
    return ScanSummary(job.name, len(last), stop, last, voxels, curve, str(job.path))


def segment_files(
    jobs: Sequence[Job], work: Callable[[int, Job, Tell], ScanSummary], outputs: Path, log: Log, label: str
) -> tuple[tuple[ScanSummary, ...], int]:
    """Work on every file, and write scans.csv and failed.csv; return what came of them, and how many failed."""
    found = map_files(
        jobs, lambda number, job, tell: to_record(work(number, job, tell)), outputs, log, label, "files",
        lambda row: {"score": row["curve"]["score"][-1], "first_score": row["curve"]["score"][0]},
    )  # fmt: skip
    scans = tuple(from_record(ScanSummary, row, f"{row['name']}.json") for row in found.rows)
    rows = [
        {"id": scan.name} | {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in scan.row().items()}
        for scan in scans
    ]
    write_table(outputs / "scans.csv", tuple(max(rows, key=len, default={"id": ""})), rows)
    write_failed(outputs, found.failed)
    return scans, len(found.failed)


def write_maps(
    outputs: Path,
    name: str,
    cuts: Cuts,
    maps: Mapping[str, tuple[Shaped[np.ndarray, "item *size"], str]],
    constants: dict[str, Any],
) -> None:
    """Write maps of a file on its grid, by the ending of their names, each with its definition and constants."""
    for ending, (values, definition) in maps.items():
        write_result(outputs, f"{name}_{ending}", cuts, values)
        write_sidecar(outputs / f"{name}_{ending}.json", definition, "1", constants)


# On the page ---------------------------------------------------------------------------------------------------------


def score_tiles(scans: Sequence[ScanSummary], failed: int) -> list[Tile]:
    """Return files, score, steps, and Dice where the truth is known."""
    rows = [scan.row() for scan in scans]
    tiles: list[Tile] = [("Files", len(rows), f"{failed} failed")]
    if rows:
        first, last = (float(np.mean([row[name] for row in rows])) for name in ("first_score", "score"))
        tiles.append(("Score", f"{last:.3f}", f"mean over files; {first:.3f} before thinking"))
        steps, seconds = (sum(row[name] for row in rows) for name in ("steps", "seconds"))
        tiles.append(("Steps", f"{steps:,}", f"{seconds:.1f} s"))
    if scored := [(row["first_dice"], row["dice"]) for row in rows if "dice" in row]:
        first, last = 100 * np.mean(scored, axis=0)
        tiles.append(("Dice", f"{last:.1f} %", f"{first:.1f} % before thinking, {len(scored)} files"))
    return tiles


def answer_panels(arrays: Mapping[str, np.ndarray], scan: ScanSummary, first_name: str, ending: str) -> Figure:
    """Show some images of a file with its masks, each beside its map of agreement.

    Args:
        arrays: "images", "first", "masks" and "agreement" [item *size]; "truth" where it is known.
        scan: What came of the file.
        first_name: Whose the first masks are.
        ending: Why thinking ended.
    """
    count, panels = len(arrays["images"]), []
    for place in np.unique(np.linspace(0, count - 1, min(MOST_IMAGES, count)).round().astype(int)):
        image, first, last = (arrays[name][place] for name in ("images", "first", "masks"))
        guide = last if last.any() else first
        outlines = {first_name: plane(first, guide), "after thinking": plane(last, guide)}
        if "truth" in arrays:
            outlines["true"] = plane(arrays["truth"][place], guide)
        panels.append(Panel(plane(image, guide), f"score {scan.scores[place]:.2f}", outlines))
        panels.append(Panel(plane(arrays["agreement"][place], guide), "agreement"))
    return mask_panels(
        panels, columns=4, limits=(0.0, 1.0),
        caption=f"Masks before and after {scan.curve.steps[-1]:,} steps, and the share of games that hold each voxel; "
        f"{ending}.",
        alt=f"{len(panels) // 2} images with outlines of masks, each beside its map of agreement.",
    )  # fmt: skip


def score_curves(scans: Sequence[ScanSummary]) -> list[Block]:
    """Draw score and Dice against the steps, and list the files."""

    def draw(name: str, factor: float, ylabel: str, caption: str) -> Figure:
        shown = [scan for scan in scans if getattr(scan.curve, name)][:MOST_CURVES]
        lines = {
            scan.name: (np.array(scan.curve.steps, float), factor * np.array(getattr(scan.curve, name)))
            for scan in shown
        }
        return curves(lines, xlabel="steps of the game", ylabel=ylabel, caption=caption)

    blocks: list[Block] = [
        draw("score", 1, "score", "The score of the best masks so far, mean over the images of a file.")
    ]
    rows = [scan.row() for scan in scans]
    has_truth = any("dice" in row for row in rows)
    if has_truth:
        caption = (
            "Dice of the same masks with the true ones. Where the score rises and Dice falls, thinking has found what "
            "the verifier gets wrong."
        )
        blocks.append(draw("dice", 100, "Dice (%)", caption))
    columns = {
        "images": "images", "steps": "steps", "seconds": "seconds", "end": "stop", "score before": "first_score",
        "score": "score",
    } | ({"Dice before": "first_dice", "Dice": "dice"} if has_truth else {})  # fmt: skip
    cells = [[scan.name, *map(row.get, columns.values())] for scan, row in zip(scans, rows, strict=True)]
    return [*blocks, Table(("file", *columns), cells, "One line per file.")]
