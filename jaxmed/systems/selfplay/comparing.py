"""What arms of a comparison achieved: Dice by case and budget, means with intervals, and the tests that matter."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float

from jaxmed.errors import InputError
from jaxmed.io.tables import read_table
from jaxmed.metrics.imaging import dice, jaccard, match_regions, surface_distances
from jaxmed.metrics.statistics import bootstrap, weighted_mean
from jaxmed.systems.selfplay.data import Cases

BASE = "System I"
LEARNT = "self-play"
RANDOM = "random proposals"
LEVEL = "verifier's level"
ABOVE = "System I above "
COLUMNS = {
    "dice": "dice", "jaccard": "iou", "hausdorff_95": "hausdorff_95", "region_f1": "region_f1", "score": "score",
}  # fmt: skip
"""Of cases.csv, by the field of an outcome."""
ELSEWHERE = "System I, threshold from other subjects"


class Outcome(NamedTuple):
    """Masks of all test images by one arm, with one seed, at one budget.

    Attributes:
        arm: Which.
        seed: Seed of labelled images, training and players.
        budget: Steps of thought; 0 for arms that do not think.
        dice: Dice of each case with the true mask.
        jaccard: The same as intersection over union.
        hausdorff_95: 95th percentile of the distance of the surfaces, in mm; in pixels where images have no spacing.
        region_f1: F1 of connected regions, such as lesions.
        score: The verifier's.
    """

    arm: str
    seed: int
    budget: int
    dice: Float[np.ndarray, " case"]
    jaccard: Float[np.ndarray, " case"]
    hausdorff_95: Float[np.ndarray, " case"]
    region_f1: Float[np.ndarray, " case"]
    score: Float[np.ndarray, " case"]

    @classmethod
    def measure(
        cls,
        arm: str,
        seed: int,
        budget: int,
        truth: Bool[np.ndarray, "case *space"],
        masks: Bool[np.ndarray, "case *space"],
        score: Float[np.ndarray, " case"],
        spacing: float = 1.0,
    ) -> "Outcome":
        """Compare masks with the true ones, of a voxel size."""
        lengths = (spacing,) * (truth.ndim - 1)
        overlaps, unions, distances, regions = np.array([
            (dice(t, m), jaccard(t, m), surface_distances(t, m, lengths).hausdorff_95, match_regions(t, m).f1)
            for t, m in zip(truth, masks, strict=True)
        ]).T  # fmt: skip
        return cls(arm, seed, budget, overlaps, unions, distances, regions, score.astype(np.float64))

    def rows(self, cases: Cases) -> list[dict[str, object]]:
        """Return a line per case, for cases.csv."""
        rows: list[dict[str, object]] = []
        for place, (name, subject) in enumerate(zip(cases.names, cases.subjects, strict=True)):
            row: dict[str, object] = {"arm": self.arm, "seed": self.seed, "budget": self.budget}
            row |= {"case": name, "subject": subject}
            row |= {column: round(float(getattr(self, field)[place]), 6) for field, column in COLUMNS.items()}
            rows.append(row)
        return rows


def read_outcomes(paths: Sequence[Path]) -> tuple[list[Outcome], tuple[str, ...]]:
    """Read the cases.csv of one comparison, or of several that left out one subject each, side by side.

    Returns:
        Outcomes over the cases of all, and the subject of each case.

    Raises:
        InputError: A table is not one, or its arms, seeds and budgets are not those of the first.
    """
    numbers = tuple(COLUMNS.values())
    parts: list[dict[tuple[str, int, int], list[tuple[str, tuple[float, ...]]]]] = []
    for path in paths:
        table = read_table(path, required=("arm", "seed", "budget", "subject", *numbers))
        seeds, budgets = table.floats("seed"), table.floats("budget")
        values = zip(*map(table.floats, numbers), strict=True)
        groups: dict[tuple[str, int, int], list[tuple[str, tuple[float, ...]]]] = {}
        for row, number, budget, found in zip(table.rows, seeds, budgets, values, strict=True):
            groups.setdefault((row["arm"], int(number), int(budget)), []).append((row["subject"], found))
        if parts and groups.keys() != parts[0].keys():
            raise InputError(path, f"the arms, seeds and budgets of {paths[0]}", "others")
        parts.append(groups)
    outcomes, subjects = [], ()
    for key in parts[0]:
        cases = [case for groups in parts for case in groups[key]]
        subjects = tuple(subject for subject, _ in cases)
        outcomes.append(Outcome(*key, *np.array([found for _, found in cases]).T))
    return outcomes, subjects


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean, its interval bootstrapped over subjects, and its standard error; of one subject the mean alone."""

    mean: float
    low: float | None = None
    high: float | None = None
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """An arm at a budget: its Dice as an interval, the gain of Dice over System I, and means of other measures."""

    budget: int
    mean: float
    low: float | None
    high: float | None
    error: float | None
    gain: Interval
    jaccard: float
    hausdorff_95: float
    region_f1: float
    score: float


@dataclasses.dataclass(frozen=True)
class Tests:
    """What a comparison is about; None where an arm for it is missing.

    Attributes:
        against_random: Dice of self-play over random proposals' at the largest budget.
        rank_of_budget: Mean over cases of Spearman's correlation of budget and Dice of self-play.
        area: Mean Dice of self-play over the budgets.
        level_against_threshold: Dice of the verifier's choice of a level over that of the best on other subjects.
        score_and_dice: Spearman's correlation over all answers.
    """

    against_random: Interval | None = None
    rank_of_budget: float | None = None
    area: float | None = None
    level_against_threshold: Interval | None = None
    score_and_dice: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What all arms achieved, budgets in order; points are Dice and score of some answers."""

    arms: dict[str, tuple[Entry, ...]]
    tests: Tests
    points: tuple[tuple[float, float], ...]


def summarise(outcomes: Sequence[Outcome], subjects: Sequence[str], seed: int) -> Comparison:
    """Return means with intervals of every arm and budget, the gain over System I, and the verifier's worth.

    Where System I answered at several thresholds, so does an arm that takes for each subject the one that is best on
    all others: what the verifier's choice has to beat.

    Args:
        outcomes: All arms, seeds and budgets, over the same cases.
        subjects: Subject of each case.
        seed: Seed of the draws.
    """
    overlaps = np.concatenate([outcome.dice for outcome in outcomes])
    scores = np.concatenate([outcome.score for outcome in outcomes])
    outcomes = [*outcomes, *_thresholds_from_others(outcomes, subjects)]

    def mean(arm: str, budget: int = 0, name: str = "dice") -> np.ndarray:
        return _mean(outcomes, arm, budget, name)

    def interval(values: np.ndarray) -> Interval:
        return _interval(values, subjects, seed)

    base, arms = mean(BASE), {}
    for arm in dict.fromkeys(outcome.arm for outcome in outcomes):
        entries = []
        for budget in sorted({outcome.budget for outcome in outcomes if outcome.arm == arm}):
            own = interval(mean(arm, budget))
            others = (float(np.mean(mean(arm, budget, name))) for name in list(COLUMNS)[1:])
            gain = interval(mean(arm, budget) - base)
            entries.append(Entry(budget, own.mean, own.low, own.high, own.error, gain, *others))
        arms[arm] = tuple(entries)
    tests = Tests(score_and_dice=_spearman(scores, overlaps))
    budgets = sorted({outcome.budget for outcome in outcomes if outcome.budget})
    if budgets and LEARNT in arms:
        courses = np.stack([base, *(mean(LEARNT, budget) for budget in budgets)])
        rank, area = _correlations(np.arange(len(courses)), courses), float(np.mean(courses[1:]))
        random = interval(courses[-1] - mean(RANDOM, budgets[-1])) if RANDOM in arms else None
        tests = dataclasses.replace(tests, against_random=random, rank_of_budget=rank, area=area)
    if {ELSEWHERE, LEVEL} <= arms.keys():
        tests = dataclasses.replace(tests, level_against_threshold=interval(mean(LEVEL) - mean(ELSEWHERE)))
    places = np.linspace(0, len(overlaps) - 1, min(600, len(overlaps))).round().astype(int)
    points = zip(overlaps[places].round(4).tolist(), scores[places].round(4).tolist(), strict=True)
    return Comparison(arms, tests, tuple(points))


def _thresholds_from_others(outcomes: Sequence[Outcome], subjects: Sequence[str]) -> list[Outcome]:
    """Return System I at the threshold that is best on all subjects but the one at hand, for every seed."""
    levels = list(dict.fromkeys(outcome.arm for outcome in outcomes if outcome.arm.startswith(ABOVE)))
    listed = np.array(subjects)
    if not levels or len(np.unique(listed)) == 1:
        return []
    arms = [BASE, *levels]
    means = np.stack([_mean(outcomes, arm, 0) for arm in arms])
    best = np.zeros(len(listed), int)
    for subject in np.unique(listed):
        best[listed == subject] = means[:, listed != subject].mean(axis=1).argmax()
    found = []
    for seed in dict.fromkeys(outcome.seed for outcome in outcomes):
        of_seed = {outcome.arm: outcome for outcome in outcomes if outcome.seed == seed and not outcome.budget}
        columns = (
            np.stack([getattr(of_seed[arm], name) for arm in arms])[best, np.arange(len(best))] for name in COLUMNS
        )
        found.append(Outcome(ELSEWHERE, seed, 0, *columns))
    return found


def _mean(outcomes: Sequence[Outcome], arm: str, budget: int, name: str = "dice") -> np.ndarray:
    """Return the mean over seeds of each case."""
    return np.mean([getattr(o, name) for o in outcomes if o.arm == arm and o.budget == budget], axis=0)


def _interval(values: np.ndarray, subjects: Sequence[str], seed: int) -> Interval:
    listed = np.array(subjects)
    by_subject = [values[listed == subject].mean() for subject in np.unique(listed)]
    if len(by_subject) == 1:
        return Interval(float(values.mean()))
    found = bootstrap(weighted_mean(values), listed, seed=seed)
    error = float(np.std(by_subject, ddof=1) / np.sqrt(len(by_subject)))
    return Interval(found.estimate, found.low, found.high, error)


def _correlations(order: np.ndarray, courses: np.ndarray) -> float | None:
    """Return the mean over cases of Spearman's correlation of budget and Dice; cases without change count as 0."""
    found = [_spearman(order, course) or 0.0 for course in courses.T]
    return float(np.mean(found)) if found else None


def _spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(scipy.stats.spearmanr(first, second)[0])  # pyright: ignore[reportArgumentType]
