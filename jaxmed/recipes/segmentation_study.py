"""Ways to segment, compared on the same cases, by case and budget, and how a page shows what was found.

A cell of the study is a seed: its rows are the cases of every arm at every budget, in steps; arms that answer at once
have the budget 0.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxmed.arrays.batches import evenly
from jaxmed.data.tasks import Cases
from jaxmed.errors import InputError
from jaxmed.metrics.imaging import score_mask
from jaxmed.metrics.statistics import spearman
from jaxmed.recipes.study import Result, read_study
from jaxmed.recipes.study_sections import mean_bars, mean_curves
from jaxmed.recipes.study_tables import Difference, Mean, collect, compare, summarise
from jaxmed.report.page import Figure, Section, Table, Tile
from jaxmed.report.scatter import scatter

MEASURES = ("dice", "iou", "hausdorff_95", "region_f1", "score")
"""Dice and intersection over union; 95th percentile of the distance of the surfaces, in mm, or in pixels where images
have no spacing; F1 of connected regions, such as lesions; the method's own opinion of its mask."""
MOST_POINTS = 600


class Arms(NamedTuple):
    """Arms that others are compared with.

    Attributes:
        base: Answers at once, and is where the others begin.
        thinking: Answers better the more steps it takes; this is what the study is about.
        control: Takes as many steps without what is to be shown.
    """

    base: str
    thinking: str
    control: str

    @property
    def above(self) -> str:
        """What the names of `base` at other thresholds begin with; the threshold follows."""
        return f"{self.base} above "

    @property
    def elsewhere(self) -> str:
        """`base` at the threshold that is best on the other subjects."""
        return f"{self.base}, threshold from other subjects"


def score_masks(
    cases: Cases, arm: str, budget: int, masks: Bool[np.ndarray, "case *space"], score: Float[np.ndarray, " case"]
) -> list[dict[str, Any]]:
    """Compare an arm's masks with the true ones, and return a row per case; `score` is its own opinion of each."""
    rows, lengths = [], (cases.spacing or 1.0,) * (masks.ndim - 1)
    for place, (name, subject) in enumerate(zip(cases.names, cases.subjects, strict=True)):
        found = score_mask(cases.masks[place], masks[place], lengths)
        values = *(found[name] for name in ("dice", "jaccard", "hausdorff_95_mm", "region_f1")), float(score[place])
        case = name if cases.names.count(name) == 1 else f"{name} ({place + 1})"
        row = {"arm": arm, "budget": budget, "case": case, "subject": subject}
        rows.append(row | dict(zip(MEASURES, values, strict=True)))
    return rows


def end_dices(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean Dice of each arm at its largest budget, of rows of `score_masks` with budgets in order."""
    ends = {row["arm"]: row["budget"] for row in rows}
    return {
        arm: float(np.mean([row["dice"] for row in rows if (row["arm"], row["budget"]) == (arm, end)]))
        for arm, end in ends.items()
    }


def read_runs(runs: Sequence[Path]) -> list[Result]:
    """Read the results of one comparison, or of several that left out one subject each, side by side.

    Raises:
        InputError: A run is not one, or its arms, seeds and budgets are not those of the first.
    """
    found = [read_study(run).results for run in runs]
    asked = [{(r.cell["seed"], row["arm"], row["budget"]) for r in results for row in r.subjects} for results in found]
    for run, own in zip(runs, asked, strict=True):
        if own != asked[0]:
            raise InputError(run, f"the arms, seeds and budgets of {runs[0]}", "others")
    return [
        parts[0]._replace(
            subjects=[
                {**row, "case": f"{number} {row['case']}"} for number, part in enumerate(parts, 1)
                for row in part.subjects
            ]
        )
        for parts in zip(*found, strict=True)
    ]  # fmt: skip


class Comparison(NamedTuple):
    """What all arms achieved.

    Attributes:
        arms: Those that others are compared with.
        means: Of every measure, by arm and budget.
        differences: Of Dice, by budget: against the base, against the control at the same budget, and of what answers
            at once against one threshold for all, the best on the other subjects.
        rank_of_budget: Mean over cases of Spearman's correlation of budget and Dice of `arms.thinking`; None without.
        area: Mean Dice of `arms.thinking` over the budgets.
        score_and_dice: Spearman's correlation over all answers; None where one does not vary.
        points: Dice and score of some answers.
    """

    arms: Arms
    means: tuple[Mean, ...]
    differences: tuple[Difference, ...]
    rank_of_budget: float | None
    area: float | None
    score_and_dice: float | None
    points: tuple[tuple[float, float], ...]

    def course(self, arm: str) -> list[Mean]:
        """Return an arm's Dice, budgets in order; empty for an arm that is not there."""
        return [row for row in self.means if row.measure == "dice" and row.group[0][1] == arm]

    def gain(self, arm: str, budget: int, baseline: str = "") -> Difference | None:
        """Return the difference of an arm at a budget from another one, or from the base; None where one is missing."""
        wanted = (arm, budget, baseline or self.arms.base)
        found = [row for row in self.differences if (row.arm, row.group[0][1], row.baseline) == wanted]
        return found[0] if found else None


def tabulate(results: Sequence[Result], seed: int, arms: Arms) -> Comparison:
    """Return means with intervals of every arm and budget, the gain over the base, and the worth of the scores.

    Where the base answered at several thresholds, so does an arm that takes for each subject the one that is best on
    all others.
    """
    given, results = results, _with_thresholds_from_others(results, arms)
    means = [row for name in MEASURES for row in summarise(results, ("arm", "budget"), name, seed=seed)]
    known = {str(row.group[0][1]) for row in means}
    differences = [
        row
        for baseline in (arms.base, arms.control, arms.elsewhere) if baseline in known
        for row in compare(results, ("budget",), baseline, "dice", seed=seed, test="wilcoxon",
                           shared={"budget": 0} if baseline == arms.base else None)
    ]  # fmt: skip
    dices = collect(results, ("arm", "budget"), "dice", is_per_subject=True)
    rank = area = None
    if arms.thinking in known:
        courses = np.array([[*dices[group].values()] for group in dices if group[0][1] in (arms.base, arms.thinking)])
        # Cases without change count as 0.
        rank = float(np.mean([spearman(np.arange(len(courses)), course) or 0.0 for course in courses.T]))
        area = float(np.mean(courses[1:]))
    pairs = np.array([(row["dice"], row["score"]) for result in given for row in result.subjects])
    shown = pairs[evenly(MOST_POINTS, len(pairs))].round(4).tolist()
    points = tuple((overlap, score) for overlap, score in shown)
    return Comparison(arms, tuple(means), tuple(differences), rank, area, spearman(*pairs.T), points)


def _with_thresholds_from_others(results: Sequence[Result], arms: Arms) -> Sequence[Result]:
    """Add the base at the threshold that is best on all subjects but the one at hand, for every seed."""
    dices = collect(results, ("arm", "budget"), "dice", is_per_subject=True)
    levels = {
        arm: cases for ((_, arm), _), cases in dices.items() if arm == arms.base or str(arm).startswith(arms.above)
    }
    subjects = {subject for subject, _ in levels[arms.base]}
    if len(levels) == 1 or len(subjects) == 1:
        return results

    def best_without(subject: str) -> Any:
        def elsewhere(arm: Any) -> float:
            return float(np.mean([value for (other, _), value in levels[arm].items() if other != subject]))

        return max(levels, key=elsewhere)

    best = {subject: best_without(subject) for subject in subjects}
    return [
        result._replace(
            subjects=[
                *result.subjects,
                *({**row, "arm": arms.elsewhere} for row in result.subjects if row["arm"] == best[str(row["subject"])]),
            ]
        )
        for result in results
    ]


def gain_tiles(found: Comparison, shots: int) -> list[Tile]:
    """Return the base's Dice, and what thinking adds at the largest budget."""
    arms, base = found.arms, found.course(found.arms.base)[0]
    budget = int(found.course(arms.thinking)[-1].group[1][1])
    tiles: list[Tile] = [(arms.base, f"{100 * base.mean:.1f} %", f"Dice, {shots} labelled images")]
    for title, baseline in (("Thinking adds", arms.base), ("Beyond random", arms.control)):
        gain = found.gain(arms.thinking, budget, baseline)
        if gain is not None and gain.difference is not None:
            tiles.append((title, f"{100 * gain.difference:+.1f}", f"points of Dice, {_span(gain)}"))
    return tiles


def comparison_sections(found: Comparison, unit: str) -> list[Section]:
    """Show thinking curves, where each method ends, and whether its score knows; `unit` is that of distances."""
    points = scatter(
        {"answers": np.array(found.points, float)}, xlabel="Dice with the true mask", ylabel="verifier's score",
        caption="Every answer of every arm: the verifier's score against Dice. Thinking can be trusted as far as one "
        "rises with the other.",
    )  # fmt: skip
    return [
        Section("Thinking curves", [budget_curves(found)]),
        Section("Where each method ends", [end_bars(found), arm_table(found, unit)]),
        Section("Does the verifier know?", [points]),
    ]


def budget_curves(found: Comparison) -> Figure:
    """Draw Dice against the budget, a line for each arm that has one; all begin with the base."""
    base, points = found.course(found.arms.base)[0], []
    for arm in dict.fromkeys(row.group[0][1] for row in found.means):
        course = [row for row in found.course(str(arm)) if row.group[1][1]]
        if course:
            start = ("arm", arm), ("budget", float(course[0].group[1][1]) / 4)
            points += [dataclasses.replace(base, group=start), *course]
    return mean_curves(
        points, x="budget", xlabel="steps of the game", ylabel="Dice (%)", log_x=True, band="error", scale=100,
        caption=f"Dice of the best masks so far against the budget; the first point is {found.arms.base}. Bands: one "
        "standard error over subjects.",
    )  # fmt: skip


def end_bars(found: Comparison) -> Figure:
    """Draw the Dice of every arm at its largest budget."""
    ends = {str(row.group[0][1]): row for row in found.means if row.measure == "dice"}
    caption = "Mean Dice at the largest budget, with 95 % intervals bootstrapped over subjects."
    return mean_bars([*ends.values()], lambda row: row.group[0][1], xlabel="Dice (%)", caption=caption, scale=100)


def arm_table(found: Comparison, unit: str) -> Table:
    """List every arm at every budget; `unit` is that of distances."""
    rows = []
    by_place = {(row.group, row.measure): row for row in found.means}
    for row in (row for row in found.means if row.measure == "dice"):
        (_, arm), (_, budget) = row.group
        gain = found.gain(str(arm), int(budget))
        change = (
            (None, None) if gain is None or gain.difference is None else (round(100 * gain.difference, 2), _span(gain))
        )
        distance, regions, score = (by_place[row.group, name].mean for name in MEASURES[2:])
        rows.append([arm, budget or None, round(100 * row.mean, 2), _span(row, ""), *change, round(distance, 2),
                     round(100 * regions, 1), score])  # fmt: skip
    columns = ("method", "steps", "Dice (%)", "95 % interval", "gain (points)", "95 % interval of the gain",
               f"HD95 ({unit})", "region F1 (%)", "score")  # fmt: skip
    return Table(columns, rows, f"Means over cases and seeds; the gain is over {found.arms.base}. A mask without "
                 "voxels is as far from the truth as the image is wide; a region is found by a single shared voxel."
                 )  # fmt: skip


def _span(row: Mean | Difference, sign: str = "+") -> str:
    low, high = row.low, row.high
    return "one subject" if low is None or high is None else f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"
