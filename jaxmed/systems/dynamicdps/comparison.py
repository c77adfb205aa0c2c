"""What a comparison of methods found: means over subjects with intervals, and paired tests against the conditional."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxmed.errors import InputError
from jaxmed.metrics.statistics import bootstrap, holm, weighted_mean, wilcoxon
from jaxmed.recipes.study import Cell, Result, Value
from jaxmed.systems.dynamicdps.arms import ARMS, STARTS_FROM_ESTIMATE
from jaxmed.systems.dynamicdps.scoring import MEASURES

NOISE = "noise"
"""Where methods begin that take no estimate: their value on the axis "initial"."""
BASELINE = "conditional"
AXES = ("condition", "initial", "arm")


@dataclasses.dataclass(frozen=True)
class Mean:
    """A measure of one method.

    Attributes:
        condition: Contrast of the measurement.
        initial: The conditional model, or NOISE.
        arm: The method.
        measure: One of MEASURES.
        mean: Over subjects.
        low: Lower end of the 95 % bootstrap interval over subjects; None for one subject.
        high: Upper end.
        subjects: How many.
    """

    condition: str
    initial: str
    arm: str
    measure: str
    mean: float
    low: float | None
    high: float | None
    subjects: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """A method against the conditional model alone, subject by subject.

    Attributes:
        condition: Contrast of the measurement.
        initial: The conditional model that is compared with.
        arm: The method.
        measure: One of MEASURES.
        difference: Mean of method minus conditional.
        low: Lower end of its 95 % bootstrap interval over subjects; None where there is none.
        high: Upper end.
        p_value: Of Wilcoxon's signed ranks, two-sided; None for fewer than two pairs.
        p_corrected: After Holm, over the methods of this condition, conditional model and measure.
        pairs: Subjects that both have.
    """

    condition: str
    initial: str
    arm: str
    measure: str
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    p_corrected: float | None
    pairs: int


def plan_cells(arms: Sequence[str], initials: Sequence[str], conditions: Sequence[str]) -> tuple[Cell, ...]:
    """Return one cell per condition, conditional model and method; methods that begin in noise once per condition.

    Raises:
        InputError: A list is empty or names something twice, or an arm is unknown.
    """
    for name, names in (("arms", arms), ("initial", initials), ("conditions", conditions)):
        if not names or len(set(names)) < len(names):
            raise InputError(name, "one or more, each once", ", ".join(names) or "none")
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise InputError("arms", f"some of {', '.join(ARMS)}", f"'{unknown[0]}'")
    cells = []
    for condition in conditions:
        for arm in arms:
            for initial in initials if arm in STARTS_FROM_ESTIMATE else (NOISE,):
                values: dict[str, Value] = {"condition": condition, "initial": initial, "arm": arm}
                cells.append(Cell(tuple(values.items())))
    return tuple(cells)


def average(results: Sequence[Result], seed: int = 0) -> tuple[Mean, ...]:
    """Return the mean of every measure of every cell, with its bootstrap interval over subjects."""
    found = []
    for result in results:
        place = {axis: str(result.cell[axis]) for axis in AXES}
        for measure in (*MEASURES, "evaluations"):
            values = np.array([row[measure] for row in result.subjects], np.float64)
            low, high = _interval(values, seed)
            found.append(Mean(**place, measure=measure, mean=float(values.mean()), low=low, high=high,
                              subjects=len(values)))  # fmt: skip
    return tuple(found)


def compare(results: Sequence[Result], seed: int = 0) -> tuple[Difference, ...]:
    """Compare every method with the conditional model alone, on the same subjects."""
    by_place = {tuple(str(result.cell[axis]) for axis in AXES): _by_subject(result) for result in results}
    found: list[Difference] = []
    for (condition, initial, arm), baseline in by_place.items():
        if arm != BASELINE:
            continue
        rivals = {
            other: rows for (where, start, other), rows in by_place.items()
            if where == condition and start in (initial, NOISE) and other != BASELINE
        }  # fmt: skip
        for measure in MEASURES:
            rows = [_difference(condition, initial, other, measure, theirs, baseline, seed)
                    for other, theirs in rivals.items()]  # fmt: skip
            found += _corrected(rows)
    return tuple(found)


def _difference(
    condition: str,
    initial: str,
    arm: str,
    measure: str,
    ours: Mapping[str, Mapping[str, Any]],
    baseline: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> Difference:
    shared = [name for name in baseline if name in ours]
    first, second = (np.array([rows[name][measure] for name in shared], np.float64) for rows in (ours, baseline))
    low, high = _interval(first - second, seed)
    p_value = wilcoxon(first, second).p_value if len(shared) > 1 else None
    mean = float((first - second).mean()) if shared else 0.0
    return Difference(condition, initial, arm, measure, mean, low, high, p_value, None, len(shared))


def _corrected(rows: list[Difference]) -> list[Difference]:
    tested = np.array([row.p_value for row in rows if row.p_value is not None], np.float64)
    corrected = iter(holm(tested)) if tested.size else iter(())
    return [
        row if row.p_value is None else dataclasses.replace(row, p_corrected=float(next(corrected))) for row in rows
    ]


def _interval(values: Float64[np.ndarray, " subject"], seed: int) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    found = bootstrap(weighted_mean(values), np.arange(len(values)), seed=seed)
    return found.low, found.high


def _by_subject(result: Result) -> dict[str, dict[str, Any]]:
    return {str(row["subject"]): row for row in result.subjects}
