"""The report of a comparison, made from what the run left in its folder."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.config import read_record
from jaxmed.io.tables import read_table
from jaxmed.recipes.study import Result, read_failures, read_results
from jaxmed.report.figures import Bar, MapStyle, bars, slice_maps
from jaxmed.report.page import Figure, Note, Section, Table, Text, write_report
from jaxmed.systems.dynamicdps.comparison import NOISE, plan_cells
from jaxmed.systems.dynamicdps.scoring import MEASURES

SHOWN = ("psnr", "residual", "volume_error", "false_lesions")


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record = read_record(folder / "config.json")
    summary = read_record(folder / "outputs" / "summary.json")
    cells = plan_cells(summary["arms"], summary["initials"], tuple(summary["conditions"]))
    study = read_record(folder / "outputs" / "study.json")["config"]
    results, failures = read_results(cells, folder, study), read_failures(cells, folder)
    means = _rows(folder / "outputs" / "means.csv")
    sections = []
    if results:
        sections = [_means_section(means, results, summary), _differences_section(folder), _images(folder, results)]
    if failures:
        rows = [(str(failure.cell), failure.reason) for failure in failures]
        sections.append(
            Section("Failed", [Table(("Cell", "Reason"), rows, "Cells that failed; others were finished.")])
        )
    write_report(
        folder / "report.html",
        title="Comparison of methods that enhance low-field scans",
        subtitle=f"{summary['images']} images of {summary['subjects']} subjects, one prior, "
        f"{len(summary['initials'])} conditional models",
        summary=_tiles(results, summary),
        sections=[*sections, _reading_section(summary)],
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _rows(path: Path) -> list[dict[str, str]]:
    return [*read_table(path).rows] if path.exists() else []


def _tiles(results: tuple[Result, ...], summary: dict[str, Any]) -> list[tuple[str, object, str]]:
    tiles: list[tuple[str, object, str]] = [("Cells", summary["cells"], f"{summary['failed']} failed")]
    first = next(iter(summary["conditions"]))
    for arm in ("conditional", "dynamicdps"):
        found = [r.metrics["psnr"] for r in results if r.cell["arm"] == arm and r.cell["condition"] == first]
        if found:
            tiles.append(("PSNR", round(float(np.mean(found)), 2), f"dB, {arm}, {first}"))
    return tiles


def _means_section(means: list[dict[str, str]], results: tuple[Result, ...], summary: dict[str, Any]) -> Section:
    blocks: list[Any] = []
    for measure in SHOWN:
        found = [
            Bar(_label(row), float(row["mean"]), _number(row["low"]), _number(row["high"]), row["condition"])
            for row in means
            if row["measure"] == measure
        ]
        caption = f"{MEASURES[measure]}: mean over subjects with its 95 % bootstrap interval."
        blocks.append(bars(found, xlabel=MEASURES[measure], caption=caption))
    headings = ["condition", "method", *MEASURES.values(), "evaluations", "steps", "seconds"]
    rows = [
        [result.cell["condition"], _label(dict(result.cell.key)), *(result.metrics[name] for name in MEASURES),
         result.metrics["evaluations"], result.metrics["steps"], result.metrics["seconds"]]
        for result in results
    ]  # fmt: skip
    budget = summary["budget"]
    told = f"{budget} evaluations" if budget else "the number of evaluations of their authors"
    caption = (
        "Means over subjects. Evaluations are passes of the network, forward and backward counted together, steps "
        f"those of the chain that were walked, seconds per image without compilation. Fixed methods had {told}."
    )
    blocks.append(Table(headings, rows, caption))
    return Section("Methods", blocks)


def _differences_section(folder: Path) -> Section:
    rows = _rows(folder / "outputs" / "differences.csv")
    columns = ("condition", "initial", "arm", "measure", "difference", "low", "high", "p_value", "p_corrected", "pairs")
    headings = ("condition", "conditional model", "method", "measure", "difference", "95 % from", "to", "p",
                "p corrected", "pairs")  # fmt: skip
    words = ("condition", "initial", "arm", "measure")
    cells = [[row[name] if name in words else _number(row[name]) for name in columns] for row in rows]
    caption = (
        "Each method minus the conditional model alone, subject by subject: mean with its bootstrap interval, and "
        "Wilcoxon's signed-rank test, corrected by Holm over the methods."
    )
    return Section("Against the conditional model", [Table(headings, cells, caption)])


def _images(folder: Path, results: tuple[Result, ...]) -> Section:
    place = folder / "outputs" / "examples"
    blocks: list[Figure] = []
    for condition in dict.fromkeys(str(result.cell["condition"]) for result in results):
        shown = {"truth": _picture(place / "truth.npy"), "input": _picture(place / f"measurement, {condition}.npy")}
        for result in results:
            path = place / f"{result.cell.slug}.npy"
            if result.cell["condition"] == condition and path.exists():
                shown[_label(dict(result.cell.key))] = _picture(path)
        styles = {name: MapStyle(colormap="gray", limits=(0.0, 2.0)) for name in shown}
        caption = f"The first image, {condition}."
        blocks.append(slice_maps(shown, (1.0, 1.0, 1.0), caption=caption, styles=styles, num_slices=1))
    return Section("Images", blocks)


def _picture(path: Path) -> np.ndarray:
    image = np.load(path, allow_pickle=False)
    return image[0] if image.ndim == 4 else np.moveaxis(image, 0, -1)


def _label(place: Any) -> str:
    initial = str(place["initial"])
    return str(place["arm"]) if initial == NOISE else f"{place['arm']}, {initial}"


def _number(cell: str) -> float:
    return float(cell) if cell else math.nan


def _reading_section(summary: dict[str, Any]) -> Section:
    conditions = "; ".join(f"{name}: gamma {gamma:g}" for name, gamma in summary["conditions"].items())
    return Section(
        "How to read this",
        [
            Note(f"Conditions: {conditions}. The conditional models were trained for the first."),
            Text(
                [
                    "All methods see the same prior and the same measurements; those that start from an estimate get "
                    "it from the conditional model that is named. Scores have a fixed range of intensities, 2. Volumes "
                    "are measured by one estimator on truth and estimate.",
                    "The published measure of hallucination is not known. Three stand in: the share of the error that "
                    "the measurement contradicts and the share that it cannot see; false lesions; and a perceptual "
                    "score that looks at the worst places.",
                    "DDRM, DDNM and CCDF are made for linear operators: they see the measurement with its contrast "
                    "undone, which is exact for gamma 1 only. Their steps, and DPS's, are not tuned to this data.",
                    "Source: DynamicDPS, arXiv:2503.01075. For research only, not for diagnosis.",
                ]
            ),
        ],
    )
