"""ProFound quality: score scans and pictures without a reference, and compare the score with given labels."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.arrays.filters import zoom
from jaxmed.config import Number, Seed, checked
from jaxmed.data.scans import ANY_KIND, Record, find_records, read_manifest
from jaxmed.errors import InputError
from jaxmed.files import make_folder
from jaxmed.io.images import read_image, write_png
from jaxmed.io.tables import read_table, resolve_path, write_table
from jaxmed.metrics.image_quality import Quality
from jaxmed.recipes.map_files import map_files, write_failed
from jaxmed.recipes.quality_records import read_scores
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.study_sections import keep_examples, show_pictures
from jaxmed.report.figures import histograms
from jaxmed.report.page import Note, Section, Table, Text, Tile
from jaxmed.report.scatter import scatter
from jaxmed.synthesis.degradation import degrade
from jaxmed.synthesis.phantoms.write_retina import write_retina_cohort
from jaxmed.systems.profound.scoring import Agreement, agree, find_reference, measure_file
from jaxmed.train.run_folder import RunFolder, start

TRIES_FAILED_AGAIN = True
EDGE = 64
SHOWN, SHOWN_EDGE = 4, 192
READING = (
    "A score is for images of one kind: a T2-weighted scan is not to be compared with a diffusion scan. It is measured "
    "without a reference, so that it knows noise, blur and ghosts and not whether the gland is in the picture. For "
    "research only, not for diagnosis."
)
COLUMNS = ("number", "name", "path", "subject", "label", *Quality._fields)


@dataclasses.dataclass(frozen=True)
@checked
class QualityData:
    """Which files are scored.

    Attributes:
        manifest: CSV with path, and optionally subject, quality (PI-QUAL 1 to 5 or 1 to 3, or true and false) and
            reference (T2w scan of a diffusion scan).
        column: Column of the given quality.
        synthetic: Phantom pictures of known quality to write where no files are given.
    """

    manifest: Path | None = None
    column: str = "quality"
    synthetic: Number = 0


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Scores of files.

    Attributes:
        data: The files, as a table.
        input: A scan, a picture, or a folder of such, instead of a table. A diffusion scan (adc, hbv or dwi in its
            name) is compared with the T2w scan beside it.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Seed of the intervals, and of what is synthetic.
    """

    data: QualityData = QualityData()
    input: Path | None = None
    series: str = ""
    fill: float | None = None
    seed: Seed = 0


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was found; every file is in outputs/quality.csv.

    Attributes:
        files: That were scored.
        failed: That could not be.
        median: Score in the middle.
        low: Lowest score.
        high: Highest score.
        labelled: Files with a given label.
        rank: Spearman's correlation with it, and the ends of its interval; None without enough labels.
        kappa: Weighted kappa, likewise.
        notes: What a user should know.
    """

    files: int
    failed: int
    median: float
    low: float
    high: float
    labelled: int
    rank: tuple[float, float, float] | None
    kappa: tuple[float, float, float] | None
    notes: tuple[str, ...]


def paper() -> Config:
    """Your files, as many as there are."""
    return Config()


def smoke() -> Config:
    """Twenty phantom pictures of known quality, or your files."""
    return Config(QualityData(synthetic=20))


def run(config: Config, folder: RunFolder) -> int:
    """Measure every file, write the table and compare it with given labels.

    Returns:
        1 when files failed.
    """
    clock = Clock()
    config_used = _with_synthetic(config, folder)
    data = config_used.data
    records, notes = find_records(data.manifest, config_used.input, "", config.series, config.fill, ANY_KIND)
    labels = _labels(config_used)
    log = begin(folder, notes)
    clock.lap("find")

    def work(number: int, record: Record, tell: Any) -> dict[str, Any]:
        found = measure_file(record.scan, _reference_of(record, data.manifest))
        for note in found.notes:
            log.say(f"{record.name}: {note}")
        plane = _small(found.plane)
        keep_examples(folder.outputs, f"plane_{number}", plane[None])
        return {"number": number, **found.quality}

    results = map_files(records, work, folder.outputs, log, "Measuring", "files", lambda row: {"score": row["score"]})
    write_failed(folder.outputs, results.failed)
    clock.lap("measure")
    rows = []
    for row in results.rows:
        record = records[row["number"]]
        label = "" if labels is None or not np.isfinite(labels[row["number"]]) else labels[row["number"]]
        subject = record.row.get("subject") or record.name
        rows.append(
            {
                "number": row["number"],
                "name": record.name,
                "path": str(record.path),
                "subject": subject,
                "label": label,
                **{name: row.get(name, "") for name in Quality._fields},
            }
        )
    if not rows:
        raise InputError("input", "a file that can be scored", "none", "see outputs/failed.csv")
    write_table(folder.outputs / "quality.csv", COLUMNS, rows)
    scores = np.array([row["score"] for row in rows], np.float64)
    known = np.array([row["label"] != "" for row in rows])
    found = None
    if known.any():
        given = np.array([float(row["label"]) for row in rows if row["label"] != ""])
        owners = np.array([str(row["subject"]) for row in rows])[known]
        found = agree(scores[known], given, owners, config.seed)
        if found is not None:
            log.say(_say(found))
    clock.lap("compare with labels")
    pairs = [None, None] if found is None else [(one.estimate, one.low, one.high) for one in (found.rank, found.kappa)]
    summary = Summary(
        len(rows),
        len(results.failed),
        float(np.median(scores)),
        float(scores.min()),
        float(scores.max()),
        int(known.sum()),
        pairs[0],
        pairs[1],
        tuple(notes),
    )
    finish(folder, config, summary, clock, page)
    return int(bool(results.failed))


def _labels(config: Config) -> np.ndarray | None:
    if config.data.manifest is None:
        return None
    table = read_manifest(config.data.manifest)
    return read_scores(table, config.data.column) if config.data.column in table.columns else None


def _reference_of(record: Record, manifest: Path | None) -> Path | None:
    cell = record.row.get("reference", "")
    if cell and manifest is not None:
        return resolve_path(cell, manifest.parent)
    return find_reference(record.path)


def _small(plane: np.ndarray) -> np.ndarray:
    """Return a plane on a grid of its own for the page, the signal at 1."""
    scale = float(np.percentile(plane, 98)) or 1.0
    shape = (SHOWN_EDGE, SHOWN_EDGE)
    return np.clip(np.asarray(zoom(jnp.asarray(plane / scale, jnp.float32), shape)), 0, 1.2)


def _with_synthetic(config: Config, folder: RunFolder) -> Config:
    """Write phantom eyes of five known qualities where no files are given."""
    if not config.data.synthetic or config.data.manifest is not None or config.input is not None:
        return config
    start(folder)
    place = folder.path / "inputs"
    eyes = read_table(write_retina_cohort(place, config.seed, max(config.data.synthetic // 2, 1), EDGE))
    worsen = jax.jit(
        jax.vmap(
            lambda key, image, s: degrade(key, image, "low-quality", s, is_magnitude=False),
            in_axes=(0, -1, None),
            out_axes=-1,
        )
    )
    rows, made = [], make_folder(place / "graded")
    for number, row in enumerate(eyes.rows):
        grade, path = 5 - number % 5, made / Path(row["path"]).name
        if not path.exists():
            keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), number), 3)
            image = worsen(keys, jnp.asarray(read_image(eyes.path.parent / row["path"])), (5 - grade) / 4)
            write_png(path, np.clip(np.asarray(image), 0, 1))
        rows.append({"path": str(path), "subject": row["subject"], "quality": grade})
    table = place / "graded.csv"
    write_table(table, ("path", "subject", "quality"), rows)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, manifest=table))


def _say(found: Agreement) -> str:
    told = [f"{one.estimate:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in (found.rank, found.kappa)]
    return f"Agreement with {found.records} given labels: Spearman {told[0]}, weighted kappa {told[1]}."


# The page ------------------------------------------------------------------------------------------------------------


def page(run: Finished[Config, Summary]) -> Page:
    """Show the best and the worst, every measure, and the agreement with labels."""
    summary, table = run.summary, read_table(run.outputs / "quality.csv")
    rows = sorted(table.rows, key=lambda row: -float(row["score"]))
    numbers = {row["name"]: row["number"] for row in table.rows}
    few = rows[:SHOWN] + rows[max(len(rows) - SHOWN, SHOWN) :]
    shown = {f"{row['name'][:24]}: {float(row['score']):.1f}": f"plane_{numbers[row['name']]}" for row in few}
    measured = {
        name: values
        for name in Quality._fields
        if len(values := np.array([float(row[name]) for row in rows if row[name]], np.float64))
    }
    listing = [
        [row["name"], row["label"] or None, *(float(row[n]) if row[n] else None for n in Quality._fields)]
        for row in few
    ]
    sections = [
        Section(
            "Best and worst",
            [
                show_pictures(
                    run.outputs, shown, (0.0, 1.2), "The plane in the middle of the best files, then of the worst."
                ),
                Table(("file", "label", *Quality._fields), listing, "Their measures; all files are in quality.csv."),
            ],
        ),
        Section("Measures", [histograms(measured, caption="Every measure over all files.")]),
    ]
    if summary.rank is not None and summary.kappa is not None:
        points = np.array([[float(row["label"]), float(row["score"])] for row in rows if row["label"]], np.float64)
        lines = [("Spearman's correlation", *summary.rank), ("Kappa, weighted by squares", *summary.kappa)]
        sections.insert(
            0,
            Section(
                "Agreement with given labels",
                [
                    scatter(
                        {"files": points},
                        xlabel="given quality",
                        ylabel="score",
                        caption="Score against given quality.",
                    ),
                    Table(("", "Estimate", "95 % from", "to"), lines, "Intervals bootstrapped over subjects."),
                ],
            ),
        )
    sections += [
        Section("What was done", [Note(note) for note in summary.notes]),
        Section("How to read this", [Text([READING])]),
    ]
    tiles: list[Tile] = [
        ("Files", summary.files, f"{summary.failed} failed"),
        ("Median score", round(summary.median, 1), f"{summary.low:.1f} to {summary.high:.1f}"),
    ]
    if summary.rank is not None:
        tiles.append(("Agreement", round(summary.rank[0], 2), f"Spearman, {summary.labelled} labels"))
    return Page("ProFound image quality", f"{summary.files} files scored without a reference", tiles, sections)
