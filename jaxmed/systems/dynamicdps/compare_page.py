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
from jaxmed.systems.dynamicdps.scoring import MEASURES, MOST_EXAMPLES
from jaxmed.train.run_folder import read_summary

SHOWN = ("psnr", "residual", "volume_error", "false_lesions")
# Headings of the tables; what is not among them is in outputs/means.csv and differences.csv.
COLUMNS = {
    "psnr": "PSNR (dB)", "ssim": "SSIM", "residual": "residual", "volume_error": "volume error",
    "contradicted": "contra- dicted", "unseen": "unseen", "false_lesions": "false lesions", "perceptual": "perceptual",
}  # fmt: skip
TOLD = (
    "Volume error: relative, mean of CSF, grey and white matter. Contradicted, unseen: share of the error that the "
    "measurement contradicts, and that it cannot see, relative to the truth. False lesions: share of images with one. "
    "Perceptual: hallucination score."
)


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    cells = plan_cells(summary["arms"], summary["initials"], tuple(summary["conditions"]))
    study = read_record(folder / "outputs" / "study.json")["config"]
    results, failures = read_results(cells, folder, study), read_failures(cells, folder)
    means = _rows(folder / "outputs" / "means.csv")
    sections = []
    if results:
        sections = [_images(folder, results, summary), _means_section(means, results, summary)]
        sections += [_differences_section(folder, summary)]
    if failures:
        rows = [(str(failure.cell), failure.reason) for failure in failures]
        sections.append(
            Section("Failed", [Table(("Cell", "Reason"), rows, "Cells that failed; others were finished.")])
        )
    write_report(
        folder / "report.html",
        title="Comparison of methods that enhance low-field scans",
        subtitle=f"{summary['images']} images of {_count(summary['subjects'], 'subject')}, one prior, "
        f"{_count(len(summary['initials']), 'conditional model')}",
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
            Bar(_label(row, summary), float(row["mean"]), _number(row["low"]), _number(row["high"]), row["condition"])
            for row in means
            if row["measure"] == measure
        ]
        caption = f"{MEASURES[measure]}: {_over(summary)}."
        blocks.append(bars(found, xlabel=MEASURES[measure], caption=caption))
    budget = summary["budget"]
    told = f"{budget} evaluations" if budget else "the number of evaluations of their authors"
    for condition in summary["conditions"]:
        rows = [
            [_label(dict(result.cell.key), summary), *(result.metrics[name] for name in COLUMNS),
             result.metrics["evaluations"], result.metrics["steps"], result.metrics["seconds"]]
            for result in results if result.cell["condition"] == condition
        ]  # fmt: skip
        caption = (
            f"Means over subjects, {condition}. {TOLD} Evaluations are passes of the network, forward and backward "
            "counted together, steps those of the chain that were walked, seconds per image without compilation. "
            f"Fixed methods had {told}."
        )
        blocks.append(Table(("method", *COLUMNS.values(), "evalu- ations", "steps", "s"), rows, caption))
    return Section("Methods", blocks)


def _differences_section(folder: Path, summary: dict[str, Any]) -> Section:
    """Show what each method changes, one line per method: the measures side by side."""
    found = _rows(folder / "outputs" / "differences.csv")
    names = [name for name in COLUMNS if name not in ("ssim", "unseen")]
    blocks = []
    for condition in summary["conditions"]:
        places = dict.fromkeys((row["arm"], row["initial"]) for row in found if row["condition"] == condition)
        by_place = {(row["arm"], row["initial"], row["measure"]): row for row in found if row["condition"] == condition}
        several = len(summary["initials"]) > 1
        rows = [
            [
                f"{arm} against {initial}" if several else arm,
                *(_difference(by_place[arm, initial, name]) for name in names),
            ]
            for arm, initial in places
        ]  # fmt: skip
        caption = f"Each method minus the conditional model alone, {condition}, subject by subject: mean"
        if summary["subjects"] > 1:
            caption += ", 95 % bootstrap interval, and p of Wilcoxon's signed-rank test, by Holm over the methods."
        else:
            caption += ". One subject: there is neither an interval nor a test."
        blocks.append(Table(("method", *(COLUMNS[name] for name in names)), rows, caption))
    return Section("Against the conditional model", blocks)


def _difference(row: dict[str, str]) -> str:
    text = f"{float(row['difference']):+.3g}"
    if row["low"]:
        text += f" [{float(row['low']):+.3g}, {float(row['high']):+.3g}]"
    return text + (f", p {float(row['p_corrected']):.2g}" if row["p_corrected"] else "")


def _over(summary: dict[str, Any]) -> str:
    several = summary["subjects"] > 1
    return (
        "mean over subjects with its 95 % bootstrap interval" if several else "mean over the images of the one subject"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _images(folder: Path, results: tuple[Result, ...], summary: dict[str, Any]) -> Section:
    place = folder / "outputs" / "examples"
    blocks: list[Figure] = []
    for condition in dict.fromkeys(str(result.cell["condition"]) for result in results):
        shown = {"truth": _picture(place / "truth.npy"), "input": _picture(place / f"measurement, {condition}.npy")}
        for result in results:
            path = place / f"{result.cell.slug}.npy"
            if result.cell["condition"] == condition and path.exists():
                shown[_label(dict(result.cell.key), summary)] = _picture(path)
        styles = {name: MapStyle(colormap="gray", limits=(0.0, 2.0)) for name in shown}
        caption = f"Images spread over all, {condition}; intensities in [0, 2]."
        blocks.append(slice_maps(shown, (1.0, 1.0, 1.0), caption=caption, styles=styles, num_slices=MOST_EXAMPLES))
    return Section("Images", blocks)


def _picture(path: Path) -> np.ndarray:
    image = np.load(path, allow_pickle=False)
    return image[0] if image.ndim == 4 else np.moveaxis(image, 0, -1)


def _label(place: Any, summary: dict[str, Any]) -> str:
    """Name a method, and its conditional model where there are several."""
    initial = str(place["initial"])
    return str(place["arm"]) if initial == NOISE or len(summary["initials"]) == 1 else f"{initial}: {place['arm']}"


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
