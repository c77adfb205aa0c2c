"""Features of every scan as CSV and NPZ, their neighbours and their plane: what an embed stage does.

Features are the class token after the last block ("class"), the mean of the patch tokens ("pooled"), one after the
other ("concat"), and what enters the head after its layer norm ("pre_logits").
"""

import csv
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxmed.arrays.types import Params
from jaxmed.config import checked, to_record
from jaxmed.files import atomic_path, write_json
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.tables import Table as Rows
from jaxmed.io.tables import read_table, write_table
from jaxmed.metrics.feature_space import DUPLICATE, find_neighbours, principal_plane
from jaxmed.models.encoder import Encoder
from jaxmed.models.heads import Head, HeadConfig, pool_tokens
from jaxmed.models.published.load import Published
from jaxmed.nn.model import make_model
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
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.report.page import Note, Section, Table, Text, Tile
from jaxmed.report.scatter import scatter
from jaxmed.train.run_folder import RunFolder
from jaxmed.versions import software_versions

Kind: TypeAlias = Literal["class", "pooled", "concat", "pre_logits"]
DEFINITIONS = {
    "class": "the class token after the last block, before any final norm",
    "pooled": "the mean of the patch tokens after the last block, before any final norm",
    "concat": "class and pooled, one after the other",
    "pre_logits": "what enters the head: concat (or what the head pools) after its layer norm",
}
MOST_GROUPS = 12
MOST_NAMES = 16  # written beside the points of the picture


@dataclasses.dataclass(frozen=True)
@checked
class EmbedConfig:
    """Features of scans.

    Attributes:
        scans: The scans, and how they go through the model.
        kinds: class and pooled (as many numbers as the tokens are wide), concat and pre_logits (twice as many).
    """

    scans: ScansFlags = ScansConfig()
    kinds: tuple[Kind, ...] = ("concat",)

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
    """

    scans: int
    failed: int
    lengths: dict[str, int]
    kind: str
    explained: tuple[float, float] | None
    agreement: dict[str, float] | None
    notes: tuple[str, ...]
    warnings: tuple[tuple[str, str], ...]


# One compiled program per model and batch size, whoever calls: a loop over scans in a notebook must not trace each.
@partial(jax.jit, static_argnums=(0, 1))
def features(
    encoder: Encoder, head: HeadConfig, params: Params, images: Float[Any, "batch ..."]
) -> dict[str, Float[Array, "batch feature"]]:
    """Return every kind of features, by one pass through the encoder.

    Args:
        encoder: The encoder; static.
        head: The head, for "pre_logits"; static.
        params: {"encoder": ..., "head": ...}.
        images: Prepared scans.
    """
    tokens = encoder.apply(params["encoder"], images)
    pooled = pool_tokens(tokens, encoder.prefix)
    normed = encoder.norm(params["encoder"], tokens)
    joined = normed if head.layers == 1 else encoder.tokens(params["encoder"], images, head.layers)
    last = make_model(Head(head, encoder.prefix)).apply(params["head"], joined, method="features")
    return {"class": pooled.class_token, "pooled": pooled.pooled, "concat": pooled.concat, "pre_logits": last}


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
    told = [*job.notes, *describe(job.published, embed.kinds)]
    log = begin(folder, told)
    model = view(job.published, scans.dtype)
    clock.lap("read and check")
    batches = job.batch_model(partial(features, model.encoder, model.head), partial(_keep, embed.kinds), model)
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
        tuple(told), tuple(warnings),
    )  # fmt: skip
    clear_batches(folder, failed)
    finish(folder, config, summary, clock, page)
    return 1 if failed else 0


def _keep(kinds: tuple[Kind, ...], file: Any, scan: Input, arrays: Arrays) -> tuple[Arrays, tuple[str, ...]]:
    return {kind: arrays[kind] for kind in kinds}, ()


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


def _reading_section(source: str) -> Section:
    text = [
        "Features are for other tools: a probe, a search, a clustering. Single numbers among them mean nothing, and "
        "features of different weights, precision or preprocessing do not compare.",
        "The picture shows only the two directions in which these scans differ most, which may be scanner and field of "
        "view rather than disease.",
        source,
    ]
    return Section("How to read this", [Text(text)])
