"""The report of a trained network, made from what the run left in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.config import read_record
from jaxmed.report.figures import agreement, curves
from jaxmed.report.page import Note, Section, Table, Text, write_report
from jaxmed.train.log import read_metrics
from jaxmed.train.run_folder import read_summary

DEFINED = 0.5
"""Estimates are compared where at least this share of the voxel lets the signal depend on the parameter."""


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json, metrics.jsonl and outputs/."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    lines = read_metrics(folder)
    settings = record["config"]["train"]
    write_report(
        folder / "report.html",
        title="A network for one protocol",
        subtitle=f"{summary['parameters']:,} parameters, trained on {settings['signals']:,} simulated signals of "
        f"{summary['images']} images with labels '{summary['labels']}'",
        summary=_tiles(summary, lines),
        sections=[_curves_section(summary, lines), _validation_section(folder, summary), _protocol_section(summary),
                  _reading_section()],
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )  # fmt: skip


def _tiles(summary: dict[str, Any], lines: list[dict[str, float]]) -> list[tuple[str, object, str]]:
    return [
        ("Epochs", len(lines), f"restart {summary['best'] + 1} was best"),
        ("Held-out loss", float(f"{summary['held_out_loss']:.3g}"), "mean squared error, share of each range"),
        ("Labels", summary["labels"].split()[0].upper(), "what the network learned"),
        ("Protocol", summary["protocol"][:8], "start of its hash; other tables are refused"),
    ]


def _curves_section(summary: dict[str, Any], lines: list[dict[str, float]]) -> Section:
    steps = np.array([line["step"] for line in lines])
    shown = {
        label: (steps, np.array([line[name] for line in lines]))
        for label, name in (("training", "loss"), ("held out", "held_out_loss"))
    }
    blocks: list[Any] = [Note(text) for text in summary["notes"]]
    what = "the reproduced signals" if summary["labels"] == "self" else "the labels, each as a share of its range"
    caption = f"Mean squared error of {what}, of the restart that was best in each epoch. Labels from fits hold the "
    caption += "fits' own spread, which no network can predict wholly: the curve does not reach 0."
    losses = np.concatenate([values for _, values in shown.values()])
    # Within a decade a logarithmic axis has no room for numbers.
    log = bool(losses.max() > 10 * losses.min())
    blocks.append(curves(shown, xlabel="epoch", ylabel="loss", log=log, caption=caption))
    return Section("Training", blocks)


def _validation_section(folder: Path, summary: dict[str, Any]) -> Section:
    with np.load(folder / "outputs" / "validation.npz", allow_pickle=False) as stored:
        truth, estimate, weight = stored["truth"], stored["estimate"], stored["weight"]
    truths, estimates, rows, units = {}, {}, [], {}
    for column, output in enumerate(summary["outputs"]):
        label = output["name"].replace("_", " ")
        label = label.upper() if len(label) == 3 else label.capitalize()
        inside = weight[:, column] >= DEFINED
        x, y = truth[inside, column], estimate[inside, column]
        truths[label], estimates[label] = x, y
        units[label] = "" if output["unit"] == "1" else output["unit"]
        error = y - x
        slope = float(np.polyfit(x, y, 1)[0])
        rows.append((label, float(error.mean()), float(error.std()), float(np.sqrt((error**2).mean())), slope, len(x)))
    return Section(
        "Against the truth",
        [
            agreement(truths, estimates, units=units,
                      caption=f"Fresh simulated signals at a signal-to-noise ratio of {summary['validation_snr']:g}; a "
                      "parameter is shown where at least half of the voxel lets the signal depend on it."),
            Table(("Parameter", "Bias", "Standard deviation", "RMSE", "Slope", "Voxels"), rows,
                  "Estimate against truth. A slope below 1 is shrinkage to the middle of the training range."),
        ],
    )  # fmt: skip


def _protocol_section(summary: dict[str, Any]) -> Section:
    rows = [(round(shell["bval"]), shell["images"]) for shell in summary["shells"]]
    return Section(
        "Protocol",
        [
            Table(("b (s/mm^2)", "Images"), rows, "Shells of the gradient table that the network belongs to."),
            Text([f"Protocol hash: {summary['protocol']}"]),
        ],
    )


def _reading_section() -> Section:
    return Section(
        "How to read this",
        [
            Text(
                [
                    "The network serves scans of this protocol in this order alone; its table travels with it. Apply "
                    "it with jaxmed noddi predict --weights RUN, compare it with fits by jaxmed noddi evaluate "
                    "--weights RUN, and take it to a scanner with jaxmed noddi export --weights RUN.",
                    "Labels that are fits of the noisy signals give estimates with little bias and the spread of a "
                    "fit; true parameters as labels give less spread and shrink every estimate to the middle.",
                    "After arXiv:2507.12632. For research only, not for diagnosis.",
                ]
            )
        ],
    )
