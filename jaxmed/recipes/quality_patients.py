"""How far a quality study's figures would differ with other test patients: every cell again on resampled ones.

All cells are scored on the same test records, so that one set of resamples of patients, who bring all their records,
serves all of them: differences between cells are of the same patients. The test sets of the study's shares are parts
of the test records, and a patient counts in each as often as it was drawn.

Source: the protocol of arXiv:2508.11864 as our specification reads it: bootstrap by patient within a seed, then
Student's t over seeds.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Float64, Shaped

from jaxmed.metrics.cohort import headline_statistic
from jaxmed.recipes.quality_findings import Draws, over_seeds
from jaxmed.recipes.quality_grid import GradedImages, Plan, places_in_test
from jaxmed.recipes.study import Cell, Result

RESAMPLES = 500


def draw_patients(
    subjects: Shaped[np.ndarray, " record"], seed: int, count: int = RESAMPLES
) -> Float64[np.ndarray, "resample record"]:
    """Draw subjects with replacement; return how often each record then counts."""
    names, place = np.unique(subjects, return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), count)
    return drawn[:, place].astype(np.float64)


def resample_cells(
    results: Sequence[Result],
    read: Callable[[Cell], Float[np.ndarray, "test output"] | None],
    data: GradedImages,
    plan: Plan,
    seed: int,
    count: int = RESAMPLES,
) -> Draws | None:
    """Return the headline measure of every cell and test set on resampled test patients, NaN where not defined.

    Args:
        results: Cells of the grid, before `by_test_set`.
        read: What a cell predicted for the records of the split test; None where that is lost.
        data: The records.
        plan: Their test sets.
        seed: Seed of the draws.
        count: Resamples.

    Returns:
        None where predictions of a cell are lost.
    """
    cohort, task = data.sets.cohort, data.sets.meaning.task
    weights = draw_patients(cohort.subjects[cohort.rows("test")], seed, count)
    found = {}
    for result in results:
        values = read(result.cell)
        if values is None:
            return None
        for share, rows in plan.tests.items():
            own = places_in_test(data, rows)
            statistic = headline_statistic(task, cohort.targets[rows], values[own].astype(np.float64))
            found[Cell((*result.cell.key, ("tested_high", float(f"{share:g}"))))] = statistic(weights[:, own])
    return found


def cell_intervals(results: Sequence[Result], metric: str, draws: Draws) -> list[dict[str, object]]:
    """Return a row per arm, share of labels, share in fine-tuning and in testing: the mean over seeds and its interval.

    Args:
        results: Of `by_test_set`.
        metric: By name.
        draws: Of `resample_cells`.
    """
    groups: dict[tuple[tuple[str, object], ...], list[Result]] = {}
    for result in results:
        if metric in result.metrics:
            key = tuple(pair for pair in result.cell.key if pair[0] != "seed")
            groups.setdefault(key, []).append(result)
    rows = []
    for key, own in groups.items():
        values = np.array([result.metrics[metric] for result in own], np.float64)
        again = np.stack([draws[result.cell] for result in own], axis=1)
        both, patients = over_seeds(values, again), np.nanstd(again.mean(axis=1), ddof=1)
        seeds = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
        rows.append({**dict(key), "measure": metric, "mean": both.mean, "low": both.low, "high": both.high,
                     "error_of_seeds": seeds, "error_of_patients": float(patients), "seeds": len(own)})  # fmt: skip
    return rows
