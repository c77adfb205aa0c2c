"""The report of an embedding run, made from what it left in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.config import read_record
from jaxmed.io.tables import Table as Rows
from jaxmed.io.tables import read_table
from jaxmed.report.page import Note, Section, Table, Text, write_report
from jaxmed.report.scatter import scatter
from jaxmed.systems.tangerine.embedding import DEFINITIONS
from jaxmed.systems.tangerine.feature_space import DUPLICATE
from jaxmed.train.run_folder import read_summary

SHOWN = 20  # rows of a table
MOST_GROUPS = 12
MOST_NAMES = 16  # written beside the points of the picture


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    sections = [_notes_section(summary)]
    if summary["explained"]:
        sections.append(_plane_section(read_table(folder / "outputs" / "plane.csv"), summary))
        sections.append(_neighbours_section(read_table(folder / "outputs" / "neighbours.csv"), summary))
    sections += troubles(folder, summary)
    sections.append(_reading_section(summary))
    scans = f"{summary['scans']:,} scan{'' if summary['scans'] == 1 else 's'}"
    write_report(
        folder / "report.html",
        title="TANGERINE features",
        subtitle=f"What the encoder says of {scans}: {', '.join(summary['lengths']) or 'nothing, all failed'}",
        summary=_tiles(summary),
        sections=sections,
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def troubles(folder: Path, summary: dict[str, Any]) -> list[Section]:
    """Return what is unexpected about scans, and which failed: sections of any batch job's page."""
    sections = []
    if summary["warnings"]:
        rows = summary["warnings"][:SHOWN]
        rest = len(summary["warnings"]) - len(rows)
        caption = "These scans were used as they are." + (f" {rest:,} more are in log.txt." if rest else "")
        sections.append(Section("Unexpected", [Table(("Scan", "What is unexpected"), rows, caption)]))
    if summary["failed"]:
        table = read_table(folder / "outputs" / "failed.csv")
        rows = [(row["id"], row["reason"]) for row in table.rows[:SHOWN]]
        text = f"{summary['failed']:,} scans could not be used; outputs/failed.csv lists them all."
        sections.append(Section("Failed", [Note(text, "warning"), Table(("Scan", "Reason"), rows)]))
    return sections


def _tiles(summary: dict[str, Any]) -> list[tuple[str, object, str]]:
    tiles: list[tuple[str, object, str]] = [("Scans", summary["scans"], f"{summary['failed']:,} failed")]
    tiles += [(kind, length, "numbers per scan") for kind, length in summary["lengths"].items()]
    return tiles


def _notes_section(summary: dict[str, Any]) -> Section:
    blocks: list[Any] = [Note(text) for text in summary["notes"]]
    rows = [(kind, length, DEFINITIONS[kind]) for kind, length in summary["lengths"].items()]
    if rows:
        blocks.append(Table(("Features", "Numbers", "What they are"), rows, "In outputs/embeddings.csv and .npz."))
    return Section("Features", blocks)


def _plane_section(table: Rows, summary: dict[str, Any]) -> Section:
    places = np.array([table.floats("first"), table.floats("second")], np.float64).T
    labels = np.array(table.column("label"))
    groups = group_points(places, labels)
    ids = group_points(np.array(table.column("id")), labels) if len(labels) <= MOST_NAMES else {}
    names = {name: texts.tolist() for name, texts in ids.items()}
    first, second = summary["explained"]
    caption = (
        f"Every scan by its {summary['kind']} features, on the plane of their largest spread (principal components of "
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


def _neighbours_section(table: Rows, summary: dict[str, Any]) -> Section:
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
    if summary["agreement"]:
        found = summary["agreement"]
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


def _reading_section(summary: dict[str, Any]) -> Section:
    return Section(
        "How to read this",
        [
            Text(
                [
                    "Features are for other tools: a probe, a search, a clustering. Single numbers among them mean "
                    "nothing, and features of different weights, precision or preprocessing do not compare.",
                    "The picture shows only the two directions in which these scans differ most, which may be scanner "
                    "and field of view rather than disease.",
                    "Model: TANGERINE, arXiv:2507.01881. For research only, not for diagnosis.",
                ]
            )
        ],
    )
