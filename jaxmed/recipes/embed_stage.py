"""Features of every scan as CSV and NPZ, their neighbours and their plane: what an embed stage does."""

import csv
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
from jaxtyping import Float, Float32

from jaxmed.config import Size, checked, to_record
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.scans import Record
from jaxmed.data.stored import as_pixels
from jaxmed.files import atomic_path, write_json
from jaxmed.io.images import read_image, write_png
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.scans import kind_of
from jaxmed.io.tables import Table as Rows
from jaxmed.io.tables import read_table, write_table
from jaxmed.metrics.feature_space import DUPLICATE, find_neighbours, principal_plane
from jaxmed.models.published.load import Published
from jaxmed.recipes.encoder_features import ATTENTION_DEFINITION, DEFINITIONS, LAYERS, Kind, features, require_kinds
from jaxmed.recipes.map_files import Arrays, Input, Outcome, clear_batches, map_batches, write_failed
from jaxmed.recipes.scan_job import (
    SHOWN,
    Model,
    ScansConfig,
    ScansFlags,
    count_scans,
    further_columns,
    open_job,
    trouble_sections,
)
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.token_maps import write_map
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.report.masks import Panel, mask_panels
from jaxmed.report.overlay import LARGEST, blend, picture_slice
from jaxmed.report.page import Note, Section, Table, Text, Tile
from jaxmed.report.scatter import scatter
from jaxmed.train.run_folder import RunFolder
from jaxmed.versions import software_versions

MOST_SHOWN = 4  # pictures with what the class token looks at
MOST_GROUPS = 12
MOST_NAMES = 16  # written beside the points of the picture


@dataclasses.dataclass(frozen=True)
@checked
class EmbedConfig:
    """Features of scans.

    Attributes:
        scans: The scans, and how they go through the model.
        kinds: class and pooled (as many numbers as the tokens are wide), concat and pre_logits (twice as many),
            registers (of encoders that have them) and layers.
        layers: Last blocks whose class tokens the kind layers holds.
        attention: Write what the class token looks at in the last block: a map on the grid of each scan, and on
            pictures as colours (outputs/attention).
    """

    scans: ScansFlags = ScansConfig()
    kinds: tuple[Kind, ...] = ("concat",)
    layers: Size = LAYERS
    attention: bool = False

    def __post_init__(self) -> None:
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds: expected one or more, each once, found {' '.join(self.kinds) or 'none'}")


# The type of a stage's field `embed`: on the command line its options carry no prefix.
EmbedFlags: TypeAlias = Annotated[EmbedConfig, NO_PREFIX]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What an embedding run found.

    Attributes:
        scans: Scans that were embedded.
        failed: Those that could not be.
        lengths: Numbers of each kind of features.
        kind: The kind that picture and neighbours are made of.
        explained: Shares of the variance along both axes of the picture; None for a single scan.
        agreement: How often the nearest other scan has the same label ("nearest"), and how often any other has ("any").
        notes: What a user should know.
        warnings: A scan and what is unexpected about it.
        shown: Pictures in outputs/attention for the page, without suffix.
    """

    scans: int
    failed: int
    lengths: dict[str, int]
    kind: str
    explained: tuple[float, float] | None
    agreement: dict[str, float] | None
    notes: tuple[str, ...]
    warnings: tuple[tuple[str, str], ...]
    shown: tuple[str, ...] = ()


def run_embed(
    config: Any,
    embed: EmbedConfig,
    scans: ScansConfig,
    load: Callable[[Path], Published],
    view: Callable[[Published, str], Model],
    describe: Callable[[Published, tuple[Kind, ...]], list[str]],
    page: Callable[[Finished[Any, Summary]], Page],
    folder: RunFolder,
    notes: Sequence[str] = (),
) -> int:
    """Read and check, embed every scan, write tables, picture and report. Returns 1 when scans failed.

    Args:
        config: Configuration of the stage.
        embed: Its part that all systems share.
        scans: Its scans, synthetic ones written where they were asked for.
        load: Reads weights of the system's family, with its preprocessing.
        view: Weights and a dtype to an encoder with a head.
        describe: What a reader of these features must know of the weights, in sentences.
        page: Of the stage.
        folder: The run.
        notes: What a user should know about the inputs.
    """
    clock = Clock()
    job = open_job(scans, load, notes)
    model = view(job.published, scans.dtype)
    require_kinds(model.encoder, embed.kinds, embed.layers, attention=embed.attention)
    told = [*job.notes, *describe(job.published, embed.kinds)]
    log = begin(folder, told)
    clock.lap("read and check")
    compute = partial(
        features, model.encoder, model.head, kinds=embed.kinds, layers=embed.layers, attention=embed.attention
    )
    keep = partial(_keep, embed, folder.outputs, job.preprocess)
    batches = job.batch_model(compute, keep, model)
    done, failed, warnings = map_batches(
        job.records, batches, model.params, scans.batch, job.mesh, folder, log, "Embedding"
    )
    clock.lap("embed, compilation included")
    write_embeddings(folder.outputs, done, embed.kinds, job.published)
    space = describe_space(done, main_kind(embed.kinds))
    if space:
        write_table(folder.outputs / "neighbours.csv", list(space["neighbours"][0]), space["neighbours"])
        write_table(folder.outputs / "plane.csv", list(space["plane"][0]), space["plane"])
    write_failed(folder.outputs, failed)
    lengths = {kind: int(done[0].arrays[kind].shape[0]) for kind in embed.kinds} if done else {}
    summary = Summary(
        len(done), len(failed), lengths, main_kind(embed.kinds), space.get("explained"), space.get("agreement"),
        tuple(told), tuple(warnings), tuple(_pictures(done) if embed.attention else ()),
    )  # fmt: skip
    clear_batches(folder, failed)
    finish(folder, config, summary, clock, page)
    return 1 if failed else 0


def _keep(
    embed: EmbedConfig, outputs: Path, preprocess: Preprocess, record: Record, scan: Input, arrays: Arrays
) -> tuple[Arrays, tuple[str, ...]]:
    if embed.attention:
        write_attention(outputs, preprocess, record, scan, arrays["attention"])
    return {kind: arrays[kind] for kind in embed.kinds}, ()


def write_attention(
    outputs: Path, preprocess: Preprocess, record: Record, scan: Input, weights: Float[np.ndarray, "*grid"]
) -> None:
    """Write what the class token looks at on the grid of its scan; of a picture also its colours under that map.

    There it is drawn from the least weight, clear, to the largest: no patch is left out altogether.
    """
    stem = outputs / "attention" / record.name
    told = {"definition": ATTENTION_DEFINITION, "unit": "1", "sum": float(weights.sum())}
    volume = write_map(stem, weights, preprocess, record, scan, told)
    if kind_of(record.path) == "picture":
        low, high = float(weights.min()), float(weights.max())
        heat = np.clip((as_pixels(volume)[0] - low) / ((high - low) or 1.0), 0, 1)
        shown = picture_slice(read_image(record.path, fill=record.scan.fill), heat, largest=None)
        write_png(stem.with_name(f"{stem.name}_overlay.png"), blend(shown.image[0], shown.overlay[0]))


def _pictures(done: list[Outcome]) -> list[str]:
    return [outcome.file.name for outcome in done if kind_of(outcome.file.path) == "picture"][:MOST_SHOWN]


def write_embeddings(folder: Path, done: list[Outcome], kinds: tuple[Kind, ...], published: Published) -> None:
    """Write embeddings.csv (a row per scan), embeddings.npz (an array per kind) and what they are."""
    further = further_columns([outcome.file for outcome in done], ())
    arrays = {kind: np.array([outcome.arrays[kind] for outcome in done], np.float32) for kind in kinds}
    columns = [f"{kind}_{place}" for kind in kinds if done for place in range(arrays[kind].shape[1])]
    # Row by row: 100,000 scans of 2048 features are not held as text.
    with (
        atomic_path(folder / "embeddings.csv") as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "id", *further, "warnings", *columns])
        for place, outcome in enumerate(done):
            record = outcome.file
            numbers = [f"{value:.9g}" for kind in kinds for value in arrays[kind][place].tolist()]
            cells = [record.row.get(name, "") for name in further]
            writer.writerow([record.path, record.name, *cells, "; ".join(outcome.warnings), *numbers])
    texts = {"id": [o.file.name for o in done], "path": [str(o.file.path) for o in done]}
    texts |= {name: [o.file.row.get(name, "") for o in done] for name in further if name not in texts | arrays}
    write_npz(folder / "embeddings.npz", {**arrays, **{name: np.array(values, str) for name, values in texts.items()}})
    write_json(
        folder / "embeddings.json",
        {
            "definition": {kind: DEFINITIONS[kind] for kind in kinds},
            "unit": "1",
            "constants": {"preprocess": to_record(published.preprocess), "model": to_record(published.config)},
            "weights": {"family": published.report.family, "kind": published.report.kind},
            "licence": published.report.licence,
            "software": f"jaxmed {software_versions().get('jaxmed', 'unknown')}",
        },
    )


def main_kind(kinds: tuple[Kind, ...]) -> Kind:
    """Return the kind that picture and neighbours are made of: concat where there is one, else the first."""
    return "concat" if "concat" in kinds else kinds[0]


def describe_space(done: list[Outcome], kind: Kind) -> dict[str, Any]:
    """Return the scans' places in the plane of largest spread, and their neighbours; nothing for one scan."""
    if len(done) < 2:
        return {}
    found: Float32[np.ndarray, "scan feature"] = np.array([outcome.arrays[kind] for outcome in done], np.float32)
    plane, near = principal_plane(found), find_neighbours(found)
    names = [outcome.file.name for outcome in done]
    labels = [outcome.file.row.get("label", "") for outcome in done]
    rows = [
        {
            "id": name,
            "nearest": names[int(other)],
            "relative_distance": float(f"{distance:.6g}"),
            "near_duplicate": int(distance < DUPLICATE),
            "label": labels[place],
            "nearest_label": labels[int(other)],
        }
        for place, (name, other, distance) in enumerate(zip(names, near.index, near.distance, strict=True))
    ]
    places = [
        {"id": name, "label": label, "first": float(f"{x:.6g}"), "second": float(f"{y:.6g}")}
        for name, label, (x, y) in zip(names, labels, plane.places, strict=True)
    ]
    return {
        "plane": places,
        "explained": plane.explained,
        "neighbours": rows,
        "agreement": _agreement(labels, near.index) if all(labels) and len(set(labels)) > 1 else None,
    }


def _agreement(labels: list[str], nearest: np.ndarray) -> dict[str, float]:
    """Return how often the nearest other scan has the same label, and how often any other scan has."""
    words = np.array(labels)
    counts = np.array([(words == word).sum() for word in words])
    return {"nearest": float((words == words[nearest]).mean()), "any": float(((counts - 1) / (len(words) - 1)).mean())}


# The page ------------------------------------------------------------------------------------------------------------


def embed_page(run: Finished[Any, Summary], title: str, source: str) -> Page:
    """Show features of scans.

    Args:
        run: The run.
        title: System and stage.
        source: Whose model it is, and what it is not for.
    """
    summary = run.summary
    sections = [_notes_section(summary)]
    if summary.explained:
        sections.append(_plane_section(read_table(run.outputs / "plane.csv"), summary, summary.explained))
        sections.append(_neighbours_section(read_table(run.outputs / "neighbours.csv"), summary))
    if summary.shown:
        sections.append(_attention_section(run.outputs / "attention", summary.shown))
    sections += [*trouble_sections(run.outputs, summary.warnings, summary.failed), _reading_section(source)]
    shown = ", ".join(summary.lengths) or "nothing, all failed"
    return Page(title, f"What the encoder says of {count_scans(summary.scans)}: {shown}", _tiles(summary), sections)


def _tiles(summary: Summary) -> list[Tile]:
    tiles: list[Tile] = [("Scans", summary.scans, f"{summary.failed:,} failed")]
    tiles += [(kind, length, "numbers per scan") for kind, length in summary.lengths.items()]
    return tiles


def _notes_section(summary: Summary) -> Section:
    blocks: list[Any] = [Note(text) for text in summary.notes]
    rows = [(kind, length, DEFINITIONS[kind]) for kind, length in summary.lengths.items()]
    if rows:
        blocks.append(Table(("Features", "Numbers", "What they are"), rows, "In outputs/embeddings.csv and .npz."))
    return Section("Features", blocks)


def _plane_section(table: Rows, summary: Summary, explained: tuple[float, float]) -> Section:
    places = np.array([table.floats("first"), table.floats("second")], np.float64).T
    labels = np.array(table.column("label"))
    groups = group_points(places, labels)
    ids = group_points(np.array(table.column("id")), labels) if len(labels) <= MOST_NAMES else {}
    names = {name: texts.tolist() for name, texts in ids.items()}
    first, second = explained
    caption = (
        f"Every scan by its {summary.kind} features, on the plane of their largest spread (principal components of "
        f"the centred features; {first:.0%} and {second:.0%} of the variance)."
    )
    if len(groups) > 1:
        caption += " Coloured by label."
    return Section(
        "Scans side by side",
        [scatter(groups, xlabel="first component", ylabel="second component", caption=caption, names=names)],
    )


def group_points(places: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Split points by label; one group where labels are missing, or as many as values of a measurement."""
    words = sorted(set(labels.tolist()))
    if len(words) > MOST_GROUPS or words == [""]:
        return {"scans": places}
    return {(f"label {word}" if word else "no label"): places[labels == word] for word in words}


def _neighbours_section(table: Rows, summary: Summary) -> Section:
    order = sorted(range(len(table)), key=lambda row: float(table.rows[row]["relative_distance"]))
    seen, rows = set(), []
    for row in (table.rows[place] for place in order):
        pair = frozenset((row["id"], row["nearest"]))
        if pair not in seen:
            seen.add(pair)
            rows.append(
                (row["id"], row["nearest"], float(row["relative_distance"]), row["label"], row["nearest_label"])
            )
    duplicates = sum(row[2] < DUPLICATE for row in rows)
    blocks: list[Any] = []
    if duplicates:
        text = (
            f"{duplicates} pair{'s' if duplicates > 1 else ''} of scans can hardly be told apart: the same scan twice? "
        )
        blocks.append(Note(text + "Keep such pairs in one split.", "warning"))
    if summary.agreement:
        found = summary.agreement
        blocks.append(
            Text([f"The nearest other scan has the same label in {found['nearest']:.0%} of scans; any other scan, "
                  f"in {found['any']:.0%}."])
        )  # fmt: skip
    labelled = any(row[3] or row[4] for row in rows)
    columns = (
        ("Scan", "Nearest", "Distance", "Label", "Label of nearest") if labelled else ("Scan", "Nearest", "Distance")
    )
    caption = (
        "The closest pairs; 1 is the root mean squared distance between two scans, below "
        f"{DUPLICATE:g} counts as a near duplicate. outputs/neighbours.csv has every scan."
    )
    blocks.append(Table(columns, [row[: len(columns)] for row in rows[:SHOWN]], caption))
    return Section("Nearest scans", blocks)


def _attention_section(folder: Path, names: Sequence[str]) -> Section:
    panels = []
    for name in names:
        image = read_image(folder / f"{name}_overlay.png")
        step = -(-max(image.shape) // LARGEST)
        panels.append(Panel(image[::step, ::step], name))
    caption = (
        "How much the class token attends to each patch in the last block, mean of the heads: clear where it does "
        "least, bright where most. outputs/attention has every picture, and its map as NIfTI."
    )
    alt = f"{len(panels)} pictures under maps of attention."
    return Section("What it looks at", [mask_panels(panels, columns=4, caption=caption, alt=alt)])


def _reading_section(source: str) -> Section:
    text = [
        "Features are for other tools: a probe, a search, a clustering. Single numbers among them mean nothing, and "
        "features of different weights, precision or preprocessing do not compare.",
        "The picture shows only the two directions in which these scans differ most, which may be scanner and field of "
        "view rather than disease.",
        source,
    ]
    return Section("How to read this", [Text(text)])
