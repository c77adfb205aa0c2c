"""How a page shows cases that were segmented, and the training of the network that did so."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.io.tables import read_table
from jaxmed.recipes.quality_range import quality_section
from jaxmed.recipes.scan_job import trouble_sections
from jaxmed.recipes.segment_cases import LabelScore, Summary
from jaxmed.recipes.stage import Finished, Page
from jaxmed.report.figures import curves
from jaxmed.report.masks import Panel, mask_panels
from jaxmed.report.page import Figure, Note, Section, Table, Text, Tile
from jaxmed.train.log import read_metrics, series


def segment_page(run: Finished[Any, Summary], title: str, source: str) -> Page:
    """Show how well labels are found, some cases, and the training where there was one.

    Args:
        run: The run.
        title: System and stage.
        source: Whose model it is, and what it is not for.
    """
    summary, lines, sections = run.summary, read_metrics(run.path), []
    if summary.scores:
        sections.append(Section("Scores", [score_table(summary.scores)]))
    if summary.shown:
        sections.append(Section("Cases", [case_figure(run.outputs, summary.shown, summary.labels)]))
    if summary.step:
        losses = {"training": series(lines, "main_loss"), "validation": series(lines, "evaluation/loss")}
        dices = {"training": series(lines, "dice"), "validation": series(lines, "evaluation/dice")}
        sections.append(
            Section("Training", [
                curves(losses, xlabel="step", ylabel="loss", caption="Dice and cross-entropy, without those of an "
                       f"auxiliary head. The parameters of step {summary.step:,} are kept."),
                curves(dices, xlabel="step", ylabel="Dice", caption="Mean over labels, on the network's grid."),
            ])
        )  # fmt: skip
    sections.append(Section("What was done", [Note(note) for note in summary.notes]))
    measured = run.outputs / "quality.csv"
    if measured.exists() and any((table := read_table(measured)).column("quality")):
        sections.append(quality_section(table, summary.tuned))
    sections += trouble_sections(run.outputs, summary.warnings, summary.failed)
    reading = (
        "Label maps, on the grid of each case, are in outputs/labels; outputs/cases.csv has a row for every case and "
        "label. They are as good as those that were learnt from.",
        source,
    )
    labels = ", ".join(map(str, summary.labels[1:]))
    subtitle = f"Labels {labels}; {', '.join(f'{count:,} {name}' for name, count in summary.counts.items())}"
    return Page(title, subtitle, score_tiles(summary), [*sections, Section("How to read this", [Text([*reading])])])


def score_tiles(summary: Summary) -> list[Tile]:
    """Return Dice of the split test, or of the last one that was scored, and how many cases failed."""
    splits = [score.split for score in summary.scores]
    tiles: list[Tile] = []
    for score in summary.scores:
        if score.split == ("test" if "test" in splits else splits[-1]):
            text = f"label {score.label}, {score.split}, {score.cases:,} cases"
            tiles.append(("Dice", f"{100 * score.dice:.1f} %", text))
    return [*tiles[:4], ("Failed", summary.failed, "cases")]


def score_table(scores: Sequence[LabelScore]) -> Table:
    """List every split and label."""
    rows = [
        (one.split, one.label, one.cases, one.present, 100 * one.dice, _span(one.dice_low, one.dice_high, 100),
         one.hausdorff_95, _span(one.hausdorff_low, one.hausdorff_high, 1))
        for one in scores
    ]  # fmt: skip
    columns = ("cases", "label", "number", "with it", "Dice (%)", "95 % interval", "HD95 (mm)", "95 % interval of it")
    caption = (
        "Means over cases, with intervals bootstrapped over subjects. Two empty maps agree; where one alone is empty, "
        "Dice is 0 and the surfaces are as far apart as the scan is long."
    )
    return Table(columns, rows, caption)


def _span(low: float | None, high: float | None, scale: float) -> str:
    return "one subject" if low is None or high is None else f"{scale * low:.1f} to {scale * high:.1f}"


def case_figure(outputs: Path, shown: Sequence[str], labels: Sequence[int]) -> Figure:
    """Draw some cases with the labels that were found, beside the true ones where they are known."""
    panels = []
    for name in shown:
        with np.load(outputs / "previews" / f"{name}.npz", allow_pickle=False) as stored:
            maps = {kind: stored[kind] for kind in ("found", "truth") if kind in stored}
            image = stored["image"]
        for kind, said in (("found", name), ("truth", "true")):
            if kind in maps:
                fills = {f"label {label}": maps[kind] == label for label in labels[1:]}
                panels.append(Panel(image, said, fills))
    caption = "The first sequence of some cases, in the slice with most of the labels: as found, and as they are."
    return mask_panels(panels, columns=4, caption=caption, alt=f"{len(panels)} slices with outlines of labels.")
