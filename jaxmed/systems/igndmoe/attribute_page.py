"""The report of an attribution, made from what the run left in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.config import read_record
from jaxmed.io.tables import read_table
from jaxmed.models.graph_diffusion import EXPERTS
from jaxmed.report.bands import Band, banded_curves
from jaxmed.report.figures import histograms
from jaxmed.report.page import Figure, Note, Section, Table, Text, Tile, write_report
from jaxmed.train.run_folder import read_summary

FEWER = 4
"""Every fourth point of a curve is drawn: its marks would touch otherwise."""


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record, outputs = read_record(folder / "config.json"), folder / "outputs"
    summary = read_summary(outputs.parent)
    tiles: list[Tile] = [
        (
            f"{name.capitalize()} falls",
            f"{100 * share:.0f}%",
            f"of {summary['draws']} draws: its share late below early",
        )
        for name, share in summary["falls"].items()
    ]
    stages = read_table(outputs / "stages.csv")
    widths = np.array(stages.floats("high")) - np.array(stages.floats("low"))
    uncertain = histograms(
        {"width of a stage's band": widths},
        units={"width of a stage's band": "years"},
        caption="How far a subject's stage moves over draws of the cohort.",
        bins=20,
    )
    curves = [
        _figure(outputs / "contributions.csv", "share of the change", "What moves an average region: weight x size."),
        _figure(outputs / "weights.csv", "weight", "Weights alone."),
    ]
    rows = [(name, s["sse"], s["mse"], s["r"], s["visits"]) for name, s in summary["ablations"].items()]
    table = Table(("Model", "SSE", "MSE", "R over regions", "Visits"), rows, "Held-out subjects, values on [0, 1].")
    text = Text(
        [
            "Bands are the 5th to 95th percentile over draws of the training subjects, each fitted anew from its own "
            "first weights, so they hold the uncertainty of subjects and of the optimisation.",
            "Weights are not contributions: a network can grow while its weight shrinks. Only differences that a part "
            "left out makes on held-out subjects say that this part is needed.",
        ]
    )
    write_report(
        folder / "report.html",
        title="Mechanisms over stage",
        subtitle=f"{summary['subjects']} subjects, {summary['draws']} bootstrap draws",
        summary=tiles,
        sections=[
            Section("Mechanisms", curves),
            Section("Left out", [table]),
            Section("Stages", [uncertain]),
            Section("How to read it", [*(Note(note) for note in summary["notes"]), text]),
        ],
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _figure(path: Path, ylabel: str, caption: str) -> Figure:
    table: Any = read_table(path)
    stage = np.array(table.floats("stage"))[::FEWER]
    found = {}
    for name in EXPERTS:
        key = name.replace(" ", "_")
        columns = (np.array(table.floats(f"{key}_{part}"))[::FEWER] for part in ("median", "low", "high"))
        found[name] = Band(stage, *columns)
    told = f"{caption} Lines are medians over draws, bands 90%."
    return banded_curves(found, xlabel="stage (years)", ylabel=ylabel, caption=told)
