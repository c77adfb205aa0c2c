"""What a study found: means with intervals, paired comparisons with a baseline, and their tables.

A measure is read either from the cells, each of which is one observation (replicates differ in seed, say), or, where a
seed for resampling is given, from the rows that cells have per subject. Then rows of one case are averaged over all
axes that are not kept, and intervals come from whole subjects drawn with replacement.

Rows stand in the order in which their cells first appear, and numbers are written in full, so that the same results
give the same bytes.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxmed.errors import InputError, nearest
from jaxmed.io.tables import write_table
from jaxmed.metrics.cohort import Average, average_subjects, subject_means
from jaxmed.metrics.statistics import bonferroni, cohen_dz, holm, mean_interval, paired_t, wilcoxon
from jaxmed.recipes.study import Result, Value

Test = Literal["paired_t", "wilcoxon"]
Correction = Literal["holm", "bonferroni"]
Group = tuple[tuple[str, Value], ...]


@dataclasses.dataclass(frozen=True)
class Mean:
    """Mean of a measure over the cells, or the subjects, that agree on some axes.

    Attributes:
        group: Value on each of those axes.
        measure: Name.
        mean: Over cells, or over cases.
        low: Lower end of its 95 % interval, Student's over cells or bootstrapped over subjects; None for a single one.
        high: Upper end.
        error: Standard error.
        count: Cells, or cases.
    """

    group: Group
    measure: str
    mean: float
    low: float | None
    high: float | None
    error: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """An arm against the baseline, over pairs of cells or subjects.

    Attributes:
        group: Value on each axis that keeps comparisons apart.
        arm: The arm.
        baseline: What it is compared with.
        measure: Name.
        pairs: Pairs of finished cells, or cases that both have.
        unpaired: Cells or cases of the two left out because their partner is missing.
        difference: Mean of arm minus baseline; None without pairs.
        low: Lower end of its 95 % interval, Student's over cells or bootstrapped over subjects; None without one.
        high: Upper end.
        effect_size: Cohen's d of the differences (d_z), of subjects where there are any.
        test: "paired_t" or "wilcoxon", of the same pairs.
        statistic: Statistic of the test; None where it cannot be made.
        p_value: Two-sided.
        correction: "holm" or "bonferroni", over all rows of a family that have a p-value.
        p_corrected: After it.
        note: Why there is no p-value, or empty.
    """

    group: Group
    arm: str
    baseline: str
    measure: str
    pairs: int
    unpaired: int
    difference: float | None
    low: float | None
    high: float | None
    effect_size: float | None
    test: Test
    statistic: float | None
    p_value: float | None
    correction: Correction
    p_corrected: float | None
    note: str


def summarise(
    results: Sequence[Result], by: Sequence[str], measure: str, *, seed: int | None = None
) -> tuple[Mean, ...]:
    """Average a measure over all axes but some.

    Args:
        results: Finished cells; those in which the measure is not defined are left out.
        by: Axes to keep, such as ("arm", "fraction").
        measure: Name.
        seed: Seed for resampling subjects; None averages cells.

    Raises:
        InputError: An axis or the measure is unknown.
    """
    rows = []
    for group, values in collect(results, by, measure, is_per_subject=seed is not None).items():
        found = _average(np.array([*values.values()]), [*values], seed)
        rows.append(Mean(group, measure, *found, len(values)))
    return tuple(rows)


def compare(
    results: Sequence[Result],
    by: Sequence[str],
    baseline: str,
    measure: str,
    *,
    arm: str = "arm",
    seed: int | None = None,
    shared: Mapping[str, Value] | None = None,
    test: Test = "paired_t",
    correction: Correction = "holm",
    family: Sequence[str] = (),
) -> tuple[Difference, ...]:
    """Compare every arm with the baseline, separately for each value on some axes where the baseline was run.

    Args:
        results: Finished cells; those in which the measure is not defined are left out.
        by: Axes that keep comparisons apart. Cells pair by equal values on all others, cases by their name, averaged
            over all others.
        baseline: Arm to compare with.
        measure: Name.
        arm: Axis of the arms.
        seed: Seed for resampling subjects; None compares cells.
        shared: Values on axes of `by` that go with all: {"initial": "noise"} where an arm needs no initial estimate.
        test: "paired_t" or "wilcoxon".
        correction: For the number of rows of a family; several measures are not corrected together.
        family: Axes of `by` on which the rows of a family agree; by default all rows are one.

    Raises:
        InputError: An axis, the measure or the baseline is unknown.
    """
    found = collect(results, (arm, *by), measure, is_per_subject=seed is not None)
    arms = list(dict.fromkeys(group[0][1] for group in found))
    if baseline not in arms:
        raise InputError("baseline", "an arm of the study", f"'{baseline}'", nearest(baseline, map(str, arms)))
    sides = [(group[0][1], group[1:], values) for group, values in found.items()]
    families: dict[Group, list[Difference]] = {}
    for where, theirs in [(place, values) for name, place, values in sides if name == baseline]:
        for name, place, ours in sides:
            group = _joined(place, where, shared or {})
            if name != baseline and group is not None:
                row = Difference(
                    group, str(name), baseline, measure, **_tested(ours, theirs, test, seed), test=test,
                    correction=correction, p_corrected=None,
                )  # fmt: skip
                families.setdefault(tuple(pair for pair in group if pair[0] in family), []).append(row)
    return tuple(row for rows in families.values() for row in _corrected(rows, correction))


def collect(
    results: Sequence[Result], by: Sequence[str], measure: str, *, is_per_subject: bool
) -> dict[Group, dict[tuple[Any, ...], float]]:
    """Return a measure by group and, in it, by cell or by (subject, case), the mean over all that agree on these.

    Raises:
        InputError: An axis or the measure is unknown, or there is no result.
    """
    if not results:
        raise InputError("study", "finished cells", "none", "see outputs/failed.csv for the reasons")
    found: dict[Group, dict[tuple[Any, ...], list[float]]] = {}
    names: dict[str, None] = {}
    for place, row in _observations(results, is_per_subject):
        unknown = [axis for axis in by if axis not in place]
        if unknown:
            raise InputError("axis of the study", f"one of {', '.join(place)}", f"'{unknown[0]}'")
        names |= dict.fromkeys(row)
        if row.get(measure) is not None:
            group = tuple((axis, place[axis]) for axis in by)
            unit = tuple(value for axis, value in place.items() if axis not in by)
            if is_per_subject:
                unit = str(row["subject"]), str(row.get("case", ""))
            found.setdefault(group, {}).setdefault(unit, []).append(float(row[measure]))
    if not found:
        raise InputError("measure", "one of the study", f"'{measure}'", nearest(measure, names))
    return {group: {unit: float(np.mean(v)) for unit, v in units.items()} for group, units in found.items()}


def write_tables(
    folder: Path, results: Sequence[Result], means: Sequence[Mean] = (), differences: Sequence[Difference] = ()
) -> None:
    """Write cells.csv, and subjects.csv, means.csv and differences.csv where there is something to write.

    Raises:
        InputError: There is no result, or the folder cannot be written.
    """
    if not results:
        raise InputError(folder, "a study with finished cells", "none", "see failed.csv for the reasons")
    tables: dict[str, list[Mapping[str, object]]] = {
        "cells": [{**dict(result.cell.key), **result.metrics} for result in results],
        "subjects": [place | dict(row) for place, row in _observations(results, is_per_subject=True)],
        "means": [as_record(row) for row in means],
        "differences": [as_record(row) for row in differences],
    }
    for name, records in tables.items():
        if records:
            columns = list(dict.fromkeys(column for record in records for column in record))
            write_table(folder / f"{name}.csv", columns, records)


def as_record(row: Mean | Difference) -> dict[str, object]:
    """Return a row of a table, its group spread over columns.

    Raises:
        ValueError: An axis has the name of a column, which would take its place.
    """
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row) if field.name != "group"}
    if taken := [axis for axis, _ in row.group if axis in fields]:
        raise ValueError(f"group: expected axes of other names than the columns, found {', '.join(taken)}")
    return {**dict(row.group), **fields}


def _observations(
    results: Sequence[Result], is_per_subject: bool
) -> Iterator[tuple[dict[str, Value], Mapping[str, Any]]]:
    """Yield values on the axes beside the row of measures; columns of words in a subject's row are axes too."""
    for result in results:
        if not is_per_subject:
            yield dict(result.cell.key), result.metrics
            continue
        for row in result.subjects:
            yield {**dict(result.cell.key), **row}, row


def _joined(place: Group, where: Group, shared: Mapping[str, Value]) -> Group | None:
    """Return the group in which two cells meet, or None."""
    group = []
    for (axis, one), (_, other) in zip(place, where, strict=True):
        if one != other and shared.get(axis) not in (one, other):
            return None
        group.append((axis, other if one == shared.get(axis) else one))
    return tuple(group)


def _average(values: np.ndarray, units: Sequence[tuple[Any, ...]], seed: int | None) -> Average:
    if seed is not None:
        return average_subjects(values, np.array([unit[0] for unit in units]), seed)
    if len(values) < 2:
        return Average(float(values.mean()))
    mean, low, high, _ = mean_interval(values)
    return Average(mean, low, high, float(values.std(ddof=1) / np.sqrt(len(values))))


def _tested(ours: Mapping[Any, float], theirs: Mapping[Any, float], test: Test, seed: int | None) -> dict[str, Any]:
    """Test what can be tested; a row without a p-value says why."""
    pairs = [unit for unit in ours if unit in theirs]
    first, second = (np.array([side[unit] for unit in pairs], np.float64) for side in (ours, theirs))
    found: dict[str, Any] = dict.fromkeys(("difference", "low", "high", "effect_size", "statistic", "p_value"))
    found |= {"pairs": len(pairs), "unpaired": len(ours) + len(theirs) - 2 * len(pairs), "note": ""}
    if pairs:
        found["difference"] = float((first - second).mean())
    if pairs and seed is not None:
        subjects = np.array([unit[0] for unit in pairs])
        found["difference"], found["low"], found["high"], _ = average_subjects(first - second, subjects, seed)
        first, second = subject_means(first, subjects), subject_means(second, subjects)
    if len(first) < 2:
        return found | {"note": f"{len(first)} pairs: no test"}
    try:
        tested = paired_t(first, second) if test == "paired_t" else wilcoxon(first, second)
    except InputError as error:
        return found | {"note": f"no test: {error}"}
    found |= {"statistic": tested.statistic, "p_value": tested.p_value}
    if seed is None:
        found |= {"difference": tested.difference, "low": tested.low, "high": tested.high}
    with contextlib.suppress(InputError):  # all differences are equal
        found["effect_size"] = cohen_dz(first, second)
    return found


def _corrected(rows: Sequence[Difference], correction: Correction) -> Iterator[Difference]:
    p_values = np.array([row.p_value for row in rows if row.p_value is not None], np.float64)
    corrected = iter((holm if correction == "holm" else bonferroni)(p_values))
    for row in rows:
        yield row if row.p_value is None else dataclasses.replace(row, p_corrected=float(next(corrected)))
