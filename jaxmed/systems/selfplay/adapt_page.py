"""The report of an adaptation, made from what the run left in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.config import read_record
from jaxmed.report.figures import curves
from jaxmed.report.page import Figure, Note, Section, Table, Text, write_report
from jaxmed.report.scatter import scatter
from jaxmed.systems.selfplay.meta_page import example_figure
from jaxmed.train.log import read_metrics
from jaxmed.train.run_folder import read_summary


def write_page(folder: Path) -> None:
    """Write report.html of an adapt run."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    sections = [Section("Warnings", [Note(text, "warning") for text in summary["warnings"]])]
    if summary["failed"]:
        text = f"Records that could not be used: {summary['failed']}; see outputs/failed.csv."
        sections.append(Section("Failed records", [Note(text, "warning")]))
    sections += [
        Section("Can the verifier be trusted?", [_calibration(summary)]),
        Section("What the generator makes of the task", [example_figure(folder / "outputs" / "examples.npz")]),
        Section("Adaptation", [_losses(folder), _shots(summary)]),
        Section("How to read this", [Text([
            "Labelled masks, and the generator's of the same images, are spoilt: shifted, grown, shrunk, with holes "
            "and blobs, pixels flipped. A verifier that is good enough to think with gives the higher score to the "
            "mask that overlaps more with the true one. This is looked at on the labelled images; on others it is "
            "worse.",
            "The temperature brings the scores close to Dice; it does not change which mask is preferred.",
        ])]),
    ]  # fmt: skip
    write_report(
        folder / "report.html",
        title="System I, adapted",
        subtitle=f"Self-play reasoning on '{summary['task']}' by {len(summary['shots'])} labelled images",
        summary=_tiles(summary),
        sections=[section for section in sections if section.blocks],
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _tiles(summary: dict[str, Any]) -> list[tuple[str, object, str]]:
    rank = summary["rank"]
    tiles: list[tuple[str, object, str]] = [
        ("Verifier", "constant" if rank is None else f"{rank:.2f}", "Spearman of score and Dice, labelled images"),
        ("Temperature", f"{summary['temperature']:.2f}", "of the verifier's logits"),
    ]
    if summary["cases"]:
        before, after = (np.mean([row[name] for row in summary["cases"]]) for name in ("dice_before", "dice"))
        count = len(summary["cases"])
        tiles.append(("Dice", f"{100 * after:.1f} %", f"of {count} test images; {100 * before:.1f} % before"))
    return tiles


def _calibration(summary: dict[str, Any]) -> Figure:
    overlaps, scores = (np.asarray(summary[name], float).ravel() for name in ("overlaps", "scores"))
    return scatter(
        {"spoilt masks": np.stack([overlaps, scores], 1)}, xlabel="Dice with the true mask", ylabel="verifier's score",
        caption="Spoilt masks of the labelled images: the verifier's score, at its temperature, against their Dice.",
    )  # fmt: skip


def _losses(folder: Path) -> Figure:
    lines = read_metrics(folder)
    steps = np.array([line["step"] for line in lines], float)
    series = {name: (steps, np.array([line[name] for line in lines])) for name in ("generator", "verifier") if lines}
    return curves(series, xlabel="step", ylabel="loss", caption="Losses on the labelled images.")


def _shots(summary: dict[str, Any]) -> Table:
    return Table(("labelled image",), [[name] for name in summary["shots"]], "What the task was learnt from.")
