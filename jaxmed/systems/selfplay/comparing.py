"""What arms of a comparison achieved: scores by case and budget, means with intervals, and the tests that matter.

A cell of the study is a seed: its rows are the cases of every arm at every budget.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float

from jaxmed.arrays.batches import evenly
from jaxmed.data.tasks import Cases
from jaxmed.errors import InputError
from jaxmed.metrics.imaging import dice, jaccard, match_regions, surface_distances
from jaxmed.recipes.study import Result, read_study
from jaxmed.recipes.study_tables import Difference, Mean, collect, compare, summarise

BASE = "System I"
LEARNT = "self-play"
RANDOM = "random proposals"
LEVEL = "verifier's level"
ABOVE = "System I above "
ELSEWHERE = "System I, threshold from other subjects"
MEASURES = ("dice", "iou", "hausdorff_95", "region_f1", "score")
"""Dice and intersection over union; 95th percentile of the distance of the surfaces, in mm, or in pixels where images
have no spacing; F1 of connected regions, such as lesions; the verifier's score."""
MOST_POINTS = 600


def score_masks(
    cases: Cases, arm: str, budget: int, masks: Bool[np.ndarray, "case *space"], score: Float[np.ndarray, " case"]
) -> list[dict[str, Any]]:
    """Compare an arm's masks with the true ones.

    Args:
        cases: What was answered for.
        arm: Which.
        budget: Steps of thought; 0 for arms that do not think.
        masks: Its answers.
        score: The verifier's.

    Returns:
        A row per case.
    """
    rows, lengths = [], (cases.spacing or 1.0,) * (masks.ndim - 1)
    for place, (name, subject) in enumerate(zip(cases.names, cases.subjects, strict=True)):
        pair = cases.masks[place], masks[place]
        distance, regions = surface_distances(*pair, lengths).hausdorff_95, match_regions(*pair).f1
        values = dice(*pair), jaccard(*pair), distance, regions, float(score[place])
        case = name if cases.names.count(name) == 1 else f"{name} ({place + 1})"
        row = {"arm": arm, "budget": budget, "case": case, "subject": subject}
        rows.append(row | dict(zip(MEASURES, values, strict=True)))
    return rows


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
        means: Of every measure, by arm and budget.
        differences: Of Dice, by budget: against System I, against random proposals at the same budget, and of what does
            not think against one threshold for all, the best on the other subjects.
        rank_of_budget: Mean over cases of Spearman's correlation of budget and Dice of self-play; None without it.
        area: Mean Dice of self-play over the budgets.
        score_and_dice: Spearman's correlation over all answers; None where one does not vary.
        points: Dice and score of some answers.
    """

    means: tuple[Mean, ...]
    differences: tuple[Difference, ...]
    rank_of_budget: float | None
    area: float | None
    score_and_dice: float | None
    points: tuple[tuple[float, float], ...]

    def course(self, arm: str) -> list[Mean]:
        """Return an arm's Dice, budgets in order; empty for an arm that is not there."""
        return [row for row in self.means if row.measure == "dice" and row.group[0][1] == arm]

    def gain(self, arm: str, budget: int, baseline: str = BASE) -> Difference | None:
        """Return the difference of an arm at a budget from another one; None where one of them is missing."""
        wanted = (arm, budget, baseline)
        found = [row for row in self.differences if (row.arm, row.group[0][1], row.baseline) == wanted]
        return found[0] if found else None


def tabulate(results: Sequence[Result], seed: int) -> Comparison:
    """Return means with intervals of every arm and budget, the gain over System I, and the verifier's worth.

    Where System I answered at several thresholds, so does an arm that takes for each subject the one that is best on
    all others: what the verifier's choice has to beat.

    Args:
        results: All seeds.
        seed: Seed of the draws.
    """
    given, results = results, _with_thresholds_from_others(results)
    means = [row for name in MEASURES for row in summarise(results, ("arm", "budget"), name, seed=seed)]
    arms = {str(row.group[0][1]) for row in means}
    differences = [
        row
        for baseline in (BASE, RANDOM, ELSEWHERE) if baseline in arms
        for row in compare(results, ("budget",), baseline, "dice", seed=seed, test="wilcoxon",
                           shared={"budget": 0} if baseline == BASE else None)
    ]  # fmt: skip
    dices = collect(results, ("arm", "budget"), "dice", is_per_subject=True)
    rank = area = None
    if LEARNT in arms:
        courses = np.array([[*dices[group].values()] for group in dices if group[0][1] in (BASE, LEARNT)])
        # Cases without change count as 0.
        rank = float(np.mean([_spearman(np.arange(len(courses)), course) or 0.0 for course in courses.T]))
        area = float(np.mean(courses[1:]))
    pairs = np.array([(row["dice"], row["score"]) for result in given for row in result.subjects])
    shown = pairs[evenly(MOST_POINTS, len(pairs))].round(4).tolist()
    points = tuple((overlap, score) for overlap, score in shown)
    return Comparison(tuple(means), tuple(differences), rank, area, _spearman(*pairs.T), points)


def _with_thresholds_from_others(results: Sequence[Result]) -> Sequence[Result]:
    """Add System I at the threshold that is best on all subjects but the one at hand, for every seed."""
    dices = collect(results, ("arm", "budget"), "dice", is_per_subject=True)
    levels = {arm: cases for ((_, arm), _), cases in dices.items() if arm == BASE or str(arm).startswith(ABOVE)}
    subjects = {subject for subject, _ in levels[BASE]}
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
                *({**row, "arm": ELSEWHERE} for row in result.subjects if row["arm"] == best[str(row["subject"])]),
            ]
        )
        for result in results
    ]


def _spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(scipy.stats.spearmanr(first, second)[0])  # pyright: ignore[reportArgumentType]
