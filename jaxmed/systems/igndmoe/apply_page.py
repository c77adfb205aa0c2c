"""The reports of staging and forecasting, made from what the run left in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.config import read_record
from jaxmed.io.tables import read_table
from jaxmed.report.figures import agreement, histograms
from jaxmed.report.page import Block, Note, Section, Table, Text, Tile, write_report
from jaxmed.train.run_folder import read_summary


def write_stage_page(folder: Path) -> None:
    """Write report.html of a staging run."""
    outputs = folder / "outputs"
    summary = read_summary(outputs.parent)
    table = read_table(outputs / "stages.csv")
    stages, errors = np.array(table.floats("stage")), np.array(table.floats("rms_error"))
    figure = histograms(
        {"stage": stages, "error": errors},
        units={"stage": "years", "error": "root mean square, unit of the table"},
        caption="Stages at the first visit, and how far visits lie from the course there.",
        bins=20,
    )
    text = "outputs/stages.csv has a row per subject. A large error says that this subject does not follow the course."
    tiles = [
        ("Subjects", summary["subjects"], f"{summary['visits']} visits"),
        ("R", summary["score"]["r"], "mean correlation over regions with the course at the stage"),
        ("At an end", summary["clipped"], "subjects at the first or last point of the course"),
    ]
    sections = [Section("Stages", [figure]), Section("How to read it", [*_notes(summary), Text([text])])]
    _write(folder, "Stages on a course of disease", "New subjects on a fitted course", tiles, sections, summary)


def write_forecast_page(folder: Path) -> None:
    """Write report.html of a forecasting run."""
    outputs = folder / "outputs"
    summary = read_summary(outputs.parent)
    rows = [(name, s["visits"], s["mse"], s["r"], s["r2"]) for name, s in summary["scores"].items()]
    blocks: list[Block] = [
        Table(
            ("Later visits predicted from", "Visits", "MSE", "R over regions", "R2, median region"),
            rows,
            "Later visits of subjects seen more than once, values on [0, 1]. Only the first row is a forecast by the "
            "course; the last is what it must beat.",
        )
    ]
    if summary["followed"]:
        with np.load(outputs / "later_visits.npz") as stored:
            is_known = np.isfinite(stored["measured"])
            measured, forecast = stored["measured"][is_known], stored["forecast"][is_known]
        caption = "Regional values at later visits, forecast from the first visit alone."
        blocks.append(agreement({"value": measured}, {"value": forecast}, caption=caption))
    text = "outputs/forecasts.csv has a row per subject and horizon, in the unit of the table."
    first = summary["scores"]["staged with the first visit"]
    tiles: list[Tile] = [
        ("Subjects", summary["subjects"], f"{summary['followed']} seen more than once"),
        ("Forecast error", first["mse"], "mean squared, values on [0, 1], from the first visit"),
        ("Horizons", ", ".join(f"{h:g}" for h in summary["horizons"]), "years after the last visit"),
    ]
    sections = [Section("How good", blocks), Section("How to read it", [*_notes(summary), Text([text])])]
    _write(
        folder, "Forecasts on a course of disease", "Subjects followed along a fitted course", tiles, sections, summary
    )


def _notes(summary: dict[str, Any]) -> list[Note]:
    return [Note(note) for note in summary["notes"]]


def _write(
    folder: Path, title: str, subtitle: str, tiles: list[Tile], sections: list[Section], summary: dict[str, Any]
) -> None:
    record = read_record(folder / "config.json")
    write_report(
        folder / "report.html",
        title=title,
        subtitle=subtitle,
        summary=tiles,
        sections=sections,
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )
