"""The report of a pre-training run, made from what it left in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.arrays.grid import reorient
from jaxmed.config import read_record
from jaxmed.io import nifti
from jaxmed.report.figures import MapStyle, curves, slice_maps
from jaxmed.report.page import Note, Section, Table, Text, write_report
from jaxmed.train.log import read_metrics
from jaxmed.train.run_folder import read_summary

STYLE = MapStyle(colormap="gray", limits=(0.0, 1.0))


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json, metrics.jsonl and outputs/."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    lines = read_metrics(folder)
    write_report(
        folder / "report.html",
        title="TANGERINE pre-training",
        subtitle=f"A 3D masked autoencoder of {summary['parameters']:,} parameters, "
        f"trained on {summary['volumes']['train']:,} volumes without labels",
        summary=_tiles(summary, lines),
        sections=[_curves_section(lines, summary), *_pictures_section(folder, summary), _reading_section()],
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def series(lines: list[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values of a metric."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    return np.array([step for step, _ in found]), np.array([value for _, value in found])


def _tiles(summary: dict[str, Any], lines: list[dict[str, float]]) -> list[tuple[str, object, str]]:
    steps, losses = series(lines, "loss")
    tiles: list[tuple[str, object, str]] = [
        ("Steps", int(steps[-1]), f"{summary['volumes']['train']:,} volumes"),
        ("Loss", float(f"{losses[-1]:.3g}"), "mean squared error of hidden voxels, last line"),
    ]
    explained = series(lines, "evaluation/explained")[1]
    if len(explained):
        tiles.append(("Explained", f"{explained[-1]:.1%}", "of the variance of hidden voxels, held-out volumes"))
    return tiles


def _curves_section(lines: list[dict[str, float]], summary: dict[str, Any]) -> Section:
    blocks: list[Any] = [Note(text, "warning") for text in summary["notes"]]
    shown = {"training": series(lines, "loss")}
    shown["constant, training"] = series(lines, "target_variance")
    if len(series(lines, "evaluation/error")[0]) > 1:
        shown["held out"] = series(lines, "evaluation/error")
        shown["constant, held out"] = series(lines, "evaluation/variance")
    low, high = summary["window"]
    caption = (
        f"Mean squared error of hidden voxels, intensities in [0, 1] ({low:g} to {high:g} HU), and that of the best "
        "constant: the variance of the hidden voxels."
    )
    blocks.append(curves(shown, xlabel="step", ylabel="error", caption=caption))
    blocks.append(
        curves({"rate": series(lines, "learning_rate")}, xlabel="step", ylabel="learning rate",
               caption="Learning rate: warm-up, then half a cosine.")
    )  # fmt: skip
    return Section("Training", blocks)


def _pictures_section(folder: Path, summary: dict[str, Any]) -> list[Section]:
    if not summary["errors"]:
        return []
    scale = summary["window"][1] - summary["window"][0]
    blocks: list[Any] = []
    for number, found in enumerate(summary["errors"]):
        names = {"Input": "image", "Seen": "seen", "Completed": "completed"}
        volumes = {
            label: reorient(nifti.read(folder / "outputs" / f"held_out_{number}_{name}.nii.gz"))
            for label, name in names.items()
        }
        spacing = volumes["Input"].spacing
        caption = (
            f"Held-out volume {number + 1}, on the model's grid: the input, what the encoder sees of it (hidden "
            "patches black), and the input with hidden patches as predicted. Root mean square error "
            f"{scale * found['error'] ** 0.5:.0f} HU."
        )
        arrays = {label: volume.array for label, volume in volumes.items()}
        x, y, z = map(float, spacing)
        blocks.append(slice_maps(arrays, (x, y, z), caption=caption, styles=dict.fromkeys(names, STYLE), num_slices=4))
    rows = [
        (i + 1, e["error"], e["variance"], 1 - e["error"] / e["variance"], scale * e["error"] ** 0.5)
        for i, e in enumerate(summary["errors"])
    ]
    columns = ("Volume", "Error", "Variance", "Explained", "Root mean square error (HU)")
    caption = (
        "Hidden voxels of held-out volumes, intensities in [0, 1]. Variance is the error of the best constant; "
        "explained is 1 - error / variance."
    )
    blocks.append(Table(columns, rows, caption))
    return [Section("What the model completes", blocks)]


def _reading_section() -> Section:
    return Section(
        "How to read this",
        [
            Text(
                [
                    "Three quarters of the patches are hidden from the encoder, and the decoder has to fill them in. "
                    "The error is told on hidden patches only; a model that knows nothing predicts a constant, whose "
                    "error is the variance. What counts is not the picture but whether the encoder's features help "
                    "afterwards: jaxmed tangerine adapt.",
                    "Model: TANGERINE, arXiv:2507.01881. For research only, not for diagnosis.",
                ]
            )
        ],
    )
