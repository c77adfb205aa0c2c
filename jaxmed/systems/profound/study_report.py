"""What a page shows of a quality study, and the summary that it is made from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmed.io.tables import read_table
from jaxmed.metrics.cohort import spell
from jaxmed.recipes.quality_findings import Findings, Measured, as_rows, grid_of, mixed_model
from jaxmed.recipes.quality_grid import ARMS, by_test_set
from jaxmed.recipes.stage import Finished, Page
from jaxmed.recipes.study import Result, read_study
from jaxmed.recipes.study_sections import difference_table, failed_cells, mean_curves, show_pictures
from jaxmed.recipes.study_tables import Difference, compare, summarise
from jaxmed.report.heatmap import heat_maps
from jaxmed.report.page import Note, Section, Table, Text, Tile

CAPTION = (
    "{}; intervals, and Student's test, not corrected, both {}. Gains are at equal shares in fine-tuning and testing, "
    "of a share of the labels."
)
READING = (
    "Both arms are the same model with the same recipe, records, order and augmentation; one starts from pre-trained "
    "weights. All sets of one kind have the same size and balance of labels; whole subjects are on one side.",
    "Intervals and tests of what follows join the variance over seeds with that over test patients, who are resampled "
    "with all their records. The tests cell by cell, those of the proposal and the mixed model are over seeds alone: "
    "they tell how much a repetition differs, not how other patients would. Study design: arXiv:2508.11864. For "
    "research only, not for diagnosis.",
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What suits a deployment.

    Attributes:
        deployed: Its share of high quality.
        own: That of the records at hand.
        chosen: That to fine-tune with, of those of the grid.
        gain: What that gains over the records' own share, read off the grid.
        low: Lower end of its interval.
        high: Upper end.
        effect: What the proposal gained when it was tried: "chosen" and "weighted", see `recipes.quality_deployment`.
    """

    deployed: float
    own: float
    chosen: float
    gain: float | None
    low: float | None
    high: float | None
    effect: dict[str, Measured] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the study found; every cell is in outputs/cells.csv.

    Attributes:
        task: Kind of what was learnt.
        metric: By which cells are compared.
        size: Records of the largest fine-tuning set.
        test_size: Records of every test set.
        high: Share of high quality among all records.
        cells: Their number.
        failed: Of them.
        seeds: Repetitions.
        findings: What was derived; None where every cell failed.
        choice: What suits the deployment; None without one.
        conclusion: In words.
        notes: What a user should know.
    """

    task: str
    metric: str
    size: int
    test_size: int
    high: float
    cells: int
    failed: int
    seeds: int
    findings: Findings | None
    choice: Choice | None
    conclusion: tuple[str, ...]
    notes: tuple[str, ...]


def compare_arms(results: Sequence[Result], metric: str) -> tuple[Difference, ...]:
    """Compare the arms cell by cell, over seeds."""
    if len({str(result.cell["arm"]) for result in results}) < 2:
        return ()
    return compare(results, ("labels", "tuned_high", "tested_high"), "scratch", metric, correction="holm")


def page(run: Finished[Any, Summary]) -> Page:
    """Show the conclusion, heat maps, what was derived, tests, and the records."""
    summary, outputs = run.summary, run.outputs
    study = read_study(run.path)
    sections = []
    if study.results and summary.findings is not None:
        results = by_test_set(study.results)
        sections = [
            Section("In words", [Text(list(summary.conclusion))]),
            _maps_section(results, summary.metric),
            _labels_section(results, summary.metric),
            _derived_section(summary.findings, results, summary.metric, (outputs / "intervals.csv").exists()),
        ]
        if summary.choice is not None:
            sections.append(_deployment_section(summary.choice, summary.metric))
        tests = compare_arms(results, summary.metric)
        if tests:
            caption = "Pre-trained against from scratch: paired two-sided t-tests over seeds alone, corrected by Holm."
            sections.append(Section("Cell by cell", [difference_table(tests, caption)]))
    shown = show_pictures(
        outputs, {"high quality": "high", "low quality": "low"}, (0.0, 1.0), "Images of high and of low quality."
    )
    records = read_table(outputs / "records.csv")
    rows = [list(row.values()) for row in records.rows]
    table = Table(
        records.columns,
        rows,
        "Records by split, label, quality and site: quality that goes with a label, "
        "or with a site, cannot be told from it.",
    )
    sections += [Section("Images", [shown, table]), Section("What was done", [Note(note) for note in summary.notes])]
    subtitle = f"{summary.task} task, {summary.size} fine-tuning records at most, test sets of {summary.test_size}"
    return Page(
        "ProFound quality study",
        subtitle,
        _tiles(summary),
        [*sections, *failed_cells(study.failures), Section("How to read this", [Text(list(READING))])],
    )


def _deployment_section(choice: Choice, metric: str) -> Section:
    names = {"chosen": "the chosen subset", "weighted": "all, weighted"}
    rows = [(names[name], gain.mean, gain.low, gain.high, gain.p_value) for name, gain in choice.effect.items()]
    caption = (
        f"{spell(metric)} over that of as many records as they come, on test records of which {choice.deployed:.0%} "
        "are of high quality; Student's interval and test over seeds. outputs/proposal.csv is a manifest with both."
    )
    return Section("For the deployment", [Table(("Fine-tuned on", "Gain", "95 % from", "to", "p"), rows, caption)])


def _tiles(summary: Summary) -> list[Tile]:
    found = summary.findings
    tiles: list[Tile] = []
    if found is not None and found.gains:
        share = "none" if found.break_even is None else f"{found.break_even:.0%}"
        tiles.append(("Break-even", share, "high quality from which pre-training helps"))
        saved = [factor for factor in found.labels_saved.values() if factor is not None]
        if saved:
            tiles.append(("Labels saved", round(max(saved), 2), "from scratch for one pre-trained, at best"))
    if found is not None:
        for arm, penalty in list(found.mismatch.items())[:1]:
            if penalty.mean is not None:
                tiles.append(("Mismatch penalty", round(penalty.mean, 4), f"{spell(summary.metric)}, {arm}"))
    return [*tiles, ("Cells", summary.cells, f"{summary.failed} failed")]


def _maps_section(results: Sequence[Result], metric: str) -> Section:
    arms = list(dict.fromkeys(str(result.cell["arm"]) for result in results))
    most = max(float(result.cell["labels"]) for result in results)
    grids = {arm: grid_of(results, metric, arm, most) for arm in arms}
    first = next(iter(grids.values()))
    means = {arm: np.nanmean(grid.values, axis=0) for arm, grid in grids.items()}
    names = [[f"{share:.0%}" for share in shares] for shares in (first.shares, first.tests)]
    axes = {"ylabel": "high quality in fine-tuning", "xlabel": "high quality in testing"}
    blocks: list[Any] = [heat_maps(means, *names, **axes, caption=f"{spell(metric)}, mean of seeds, with all labels.")]
    if len(means) == 2:
        gain = {"pretrained minus scratch": means[ARMS[0]] - means[ARMS[1]]}
        blocks.append(heat_maps(gain, *names, **axes, caption="What pre-training adds.", is_difference=True))
    return Section("Quality in fine-tuning and in testing", blocks)


def _labels_section(results: Sequence[Result], metric: str) -> Section:
    shared = sorted({float(r.cell["tuned_high"]) for r in results} & {float(r.cell["tested_high"]) for r in results})
    blocks: list[Any] = []
    for share in dict.fromkeys(shared[:1] + shared[-1:]):
        own = [r for r in results if float(r.cell["tuned_high"]) == share == float(r.cell["tested_high"])]
        means = summarise(own, ("arm", "labels"), metric)
        caption = f"{spell(metric)} by labels where {share:.0%} of fine-tuning and test images are of high quality."
        blocks.append(
            mean_curves(means, x="labels", xlabel="share of labels", ylabel=spell(metric), log_x=True, caption=caption)
        )
    return Section("Labels", blocks)


def _derived_section(found: Findings, results: Sequence[Result], metric: str, has_patients: bool) -> Section:
    heading = ("Measure", "Of", "Mean", "95 % from", "to", "p")
    rows = [
        *as_rows(found.mismatch, "mismatch penalty"),
        *as_rows(found.necessity, "slope along high quality"),
        *as_rows(found.gains, "pretrained minus scratch"),
    ]
    over = "over seeds and over resampled test patients" if has_patients else "over seeds alone"
    blocks: list[Any] = [Table(heading, rows, CAPTION.format(spell(metric), over))]
    if found.labels_saved:
        saved = [
            (
                f"{float(share):.0%}",
                factor,
                "from scratch never gets there" if float(share) in found.never_reached else "",
            )
            for share, factor in found.labels_saved.items()
        ]
        blocks.append(Table(("High quality", "Labels from scratch for one", ""), saved, "Labels saved."))
    model = mixed_model(results, metric)
    if model is not None:
        effects = [tuple(effect) for effect in model.effects]
        blocks.append(
            Table(
                ("Column", "Estimate", "95 % from", "to", "p"),
                effects,
                f"Mixed model of {spell(metric)} with a random intercept per seed, {model.rows} cells; "
                "cells of one seed share records, so that p says less than it seems.",
            )
        )
    return Section("What follows", blocks)
