"""The report of a prediction run, made from what it left in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.arrays.task import Task
from jaxmed.config import from_record, read_record
from jaxmed.data.preprocess import WARMEST_AIR
from jaxmed.io.tables import Table as Rows
from jaxmed.io.tables import read_table
from jaxmed.metrics.cohort import HEADLINE, spell
from jaxmed.report.figures import histograms
from jaxmed.report.overlay import Slices, overlay_slices
from jaxmed.report.page import Note, Section, Table, Text, write_report
from jaxmed.report.slices import display_range
from jaxmed.systems.tangerine.embed_page import SHOWN, troubles
from jaxmed.train.run_folder import read_summary

FEWEST_FOR_HISTOGRAM = 8
MOST_HISTOGRAMS = 12


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    task = from_record(Task, summary["task"], str(folder / "outputs" / "summary.json"))
    sections = [Section("Weights", [Note(text) for text in summary["notes"]])]
    if summary["scans"]:
        sections.append(_predictions_section(read_table(folder / "outputs" / "predictions.csv"), task, summary))
    if summary["scores"]:
        sections.append(_scores_section(summary))
    sections += _maps_section(folder, task, summary)
    sections += troubles(folder, summary)
    sections.append(_reading_section(task))
    scans = f"{summary['scans']:,} scan{'' if summary['scans'] == 1 else 's'}"
    write_report(
        folder / "report.html",
        title="TANGERINE predictions",
        subtitle=f"{', '.join(task.names)} ({task.kind}), predicted for {scans}",
        summary=_tiles(summary, task),
        sections=sections,
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def output_columns(table: Rows, task: Task) -> dict[str, np.ndarray]:
    """Return the values of every output by its name."""
    prefix = "value" if task.kind == "regression" else "probability"
    return {name: np.array(table.floats(f"{prefix}_{name}"), np.float64) for name in task.names}


def _tiles(summary: dict[str, Any], task: Task) -> list[tuple[str, object, str]]:
    tiles: list[tuple[str, object, str]] = [("Scans", summary["scans"], f"{summary['failed']:,} failed")]
    further = {"multilabel": "auroc", "regression": "correlation"}.get(task.kind)
    for row in summary["scores"]:
        if row["measure"] in (HEADLINE[task.kind], further) and row["rows"] != "split train":
            text = row["rows"]
            if row["low"] is not None:
                text = f"95 % interval {row['low']:.2f} to {row['high']:.2f}, {text}"
            tiles.append((spell(row["measure"]), round(row["estimate"], 3), text))
    return tiles[:5]


def _predictions_section(table: Rows, task: Task, summary: dict[str, Any]) -> Section:
    outputs = output_columns(table, task)
    blocks: list[Any] = []
    if len(table) >= FEWEST_FOR_HISTOGRAM:
        shown = dict(list(outputs.items())[:MOST_HISTOGRAMS])
        kind = "Values, in the unit of the labels" if task.kind == "regression" else "Predicted probabilities"
        blocks.append(histograms(shown, caption=f"{kind}, over all scans.", bins=20))
    labelled = "label" in table.columns
    columns = ["Scan", *outputs, "Predicted", *(["Label"] if labelled else [])]
    rows = [
        [row["id"], *(float(values[n]) for values in outputs.values()), row["predicted"],
         *([row["label"]] if labelled else [])]
        for n, row in enumerate(table.rows[:SHOWN])
    ]  # fmt: skip
    caption = "Probabilities." if task.kind != "regression" else "Values, in the unit of the labels."
    if task.kind in ("binary", "multilabel"):
        caption += f" Predicted from {summary['threshold']:g} on."
    if len(table) > SHOWN:
        caption += f" The first {SHOWN} of {len(table):,}."
    blocks.append(Table(columns, rows, caption + " outputs/predictions.csv has all."))
    return Section("Predictions", blocks)


def _scores_section(summary: dict[str, Any]) -> Section:
    rows = [
        (row["rows"], row["scans"], row["label"], spell(row["measure"]), row["estimate"], row["low"], row["high"])
        for row in summary["scores"]
    ]
    caption = "Against the manifest's labels; 95 % intervals by 2000 bootstrap resamples of subjects."
    columns = ("Rows", "Scans", "Of", "Measure", "Estimate", "Low", "High")
    return Section("Against the labels", [Table(columns, rows, caption)])


def _maps_section(folder: Path, task: Task, summary: dict[str, Any]) -> list[Section]:
    blocks: list[Any] = []
    low, high = summary["limits"]
    unit = "probability" if task.kind != "regression" else "value"
    for preview in summary["previews"]:
        name = task.names[preview["output"]]
        with np.load(folder / "outputs" / "previews" / preview["file"], allow_pickle=False) as stored:
            slices = Slices(
                stored["image"], stored["overlay"], tuple(stored["index"].tolist()), tuple(stored["spacing"].tolist()),
                int(stored["axis"]), float(stored["largest"]),
            )  # fmt: skip
        caption = f"{preview['id']}: {name}, {unit} {preview['values'][preview['output']]:.3g}."
        if not slices.largest:
            caption += " The map is 0 everywhere: no patch raises this output."
        # What is no CT in HU, and was warned of, would be all white in the window of the model.
        is_hu = float(slices.image.min()) < WARMEST_AIR
        limits = (low, high) if is_hu else display_range(slices.image.reshape(-1).astype(np.float64))
        unit_shown = "HU" if is_hu else "as stored"
        blocks.append(
            overlay_slices(slices, caption=caption, limits=limits, names=("Scan", "With map"), unit=unit_shown)
        )
    if not blocks:
        return []
    text = (
        "Bright where the image raised the output named below (Grad-CAM on the last block's patch tokens). Among the "
        "slices is the one with the map's largest value. Whole maps, on the grid of each scan, are in outputs/maps."
    )
    return [Section("What moved them", [Text([text]), *blocks])]


def _reading_section(task: Task) -> Section:
    values = (
        "Values are in the unit of the labels that the weights were adapted to."
        if task.kind == "regression"
        else "Probabilities are as good as the labels and the scanners that the weights were adapted to: on other "
        "scanners and populations they may order scans well and still be too high or too low."
    )
    return Section(
        "How to read this",
        [
            Text(
                [
                    values,
                    "A map shows where the network's evidence for an output comes from, at the coarse grid of its "
                    "patches. It is no segmentation, it says nothing about evidence against the output, and maps of "
                    "different scans are scaled each by itself here.",
                    "Model: TANGERINE, arXiv:2507.01881. For research only, not for diagnosis.",
                ]
            )
        ],
    )
