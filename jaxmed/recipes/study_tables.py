"""What a study found: means with intervals, paired comparisons with a baseline, tables, and curves for the report.

Rows stand in the order in which their cells first appear, and numbers are written in full, so that the same results
give the same bytes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from jaxmed.errors import InputError, nearest
from jaxmed.io.tables import write_table
from jaxmed.metrics.statistics import bonferroni, cohen_dz, holm, mean_interval, paired_t, wilcoxon
from jaxmed.recipes.study import Result, Value
from jaxmed.report.bands import Band, banded_curves
from jaxmed.report.page import Figure, Table

Test = Literal["paired_t", "wilcoxon"]
Correction = Literal["holm", "bonferroni"]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean of a metric over the cells that agree on some axes.

    Attributes:
        group: Value on each of those axes.
        metric: Name.
        mean: Mean of the cells.
        low: Lower end of Student's 95 % interval of the mean; None for a single cell.
        high: Upper end.
        num_cells: Cells.
    """

    group: tuple[tuple[str, Value], ...]
    metric: str
    mean: float
    low: float | None
    high: float | None
    num_cells: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm against the baseline, over pairs of cells.

    Attributes:
        group: Value on each axis that is neither the arm nor paired over.
        arm: The arm.
        baseline: What it is compared with.
        metric: Name.
        num_pairs: Pairs of finished cells.
        num_unpaired: Cells of the two left out because their partner is missing.
        difference: Mean of arm minus baseline; None without pairs.
        low: Lower end of Student's 95 % interval of it; None where there is none.
        high: Upper end.
        effect_size: Cohen's d of the differences (d_z).
        test: "paired_t" or "wilcoxon".
        statistic: Statistic of the test; None where it cannot be made.
        p_value: Two-sided.
        correction: "holm" or "bonferroni", over all rows of the table that have a p-value.
        p_corrected: After it.
        note: Why there is no p-value, or empty.
    """

    group: tuple[tuple[str, Value], ...]
    arm: str
    baseline: str
    metric: str
    num_pairs: int
    num_unpaired: int
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


def summarise(results: Sequence[Result], by: Sequence[str], metric: str) -> tuple[Summary, ...]:
    """Average a metric over all axes but some.

    Args:
        results: Finished cells.
        by: Axes to keep, such as ("arm", "fraction").
        metric: Name.

    Raises:
        InputError: An axis or the metric is unknown.
    """
    groups: dict[tuple[tuple[str, Value], ...], list[float]] = {}
    for result in results:
        group = tuple((axis, result.cell[axis]) for axis in by)
        groups.setdefault(group, []).append(_metric(result, metric))
    rows = []
    for group, values in groups.items():
        low, high = mean_interval(np.array(values))[1:3] if len(values) > 1 else (None, None)
        rows.append(Summary(group, metric, float(np.mean(values)), low, high, len(values)))
    return tuple(rows)


def compare(
    results: Sequence[Result],
    baseline: str,
    metric: str,
    *,
    arm: str = "arm",
    pair_by: Sequence[str] = ("seed",),
    test: Test = "paired_t",
    correction: Correction = "holm",
) -> tuple[Comparison, ...]:
    """Compare every arm with the baseline, separately for each value on the remaining axes.

    Args:
        results: Finished cells.
        baseline: Arm to compare with.
        metric: Name.
        arm: Axis of the arms.
        pair_by: Axes whose equal values make a pair.
        test: "paired_t" or "wilcoxon".
        correction: For the number of rows of this table; several metrics are not corrected together.

    Raises:
        InputError: An axis, the metric or the baseline is unknown.
    """
    arms = list(dict.fromkeys(result.cell[arm] for result in results))
    if baseline not in arms:
        raise InputError("baseline", "an arm of the study", f"'{baseline}'", nearest(baseline, map(str, arms)))
    axes = [axis for axis, _ in results[0].cell.key]
    kept = [axis for axis in axes if axis != arm and axis not in pair_by]
    tables: dict[tuple[tuple[str, Value], ...], dict[Value, dict[tuple[Value, ...], float]]] = {}
    for result in results:
        group = tuple((axis, result.cell[axis]) for axis in kept)
        pair = tuple(result.cell[axis] for axis in pair_by)
        tables.setdefault(group, {}).setdefault(result.cell[arm], {})[pair] = _metric(result, metric)
    rows = []
    for group, table in tables.items():
        for name in arms:
            if name != baseline:
                ours, theirs = table.get(name, {}), table.get(baseline, {})
                pairs = [pair for pair in ours if pair in theirs]
                first = np.array([ours[pair] for pair in pairs], np.float64)
                second = np.array([theirs[pair] for pair in pairs], np.float64)
                unpaired = len(ours) + len(theirs) - 2 * len(pairs)
                row = Comparison(
                    group, str(name), baseline, metric, len(pairs), unpaired, **_tested(first, second, test),
                    test=test, correction=correction, p_corrected=None,
                )  # fmt: skip
                rows.append(row)
    return _corrected(rows, correction)


def write_tables(
    folder: Path,
    results: Sequence[Result],
    summaries: Sequence[Summary] = (),
    comparisons: Sequence[Comparison] = (),
) -> None:
    """Write cells.csv, and summary.csv and comparisons.csv where there is something to write, into a folder.

    Raises:
        InputError: There is no result, or the folder cannot be written.
    """
    if not results:
        raise InputError(folder, "a study with finished cells", "none", "see failed.csv for the reasons")
    cells = [{**dict(result.cell.key), **result.metrics} for result in results]
    write_table(folder / "cells.csv", _columns(cells), cells)
    for name, rows in (("summary.csv", summaries), ("comparisons.csv", comparisons)):
        if rows:
            records = [_flat(row) for row in rows]
            write_table(folder / name, _columns(records), records)


def summary_table(summaries: Sequence[Summary], caption: str = "") -> Table:
    """Make the report's table of means."""
    records = [_flat(row) for row in summaries]
    return _table(records, {"low": "95 % from", "high": "to", "num_cells": "cells"}, caption)


def comparison_table(comparisons: Sequence[Comparison], caption: str = "") -> Table:
    """Make the report's table of comparisons."""
    headings = {
        "low": "95 % from", "high": "to", "num_pairs": "pairs", "num_unpaired": "unpaired", "effect_size": "d_z",
        "p_value": "p", "p_corrected": "p corrected",
    }  # fmt: skip
    return _table([_flat(row) for row in comparisons], headings, caption)


def summary_curves(
    summaries: Sequence[Summary],
    *,
    x: str,
    caption: str,
    arm: str = "arm",
    xlabel: str = "",
    ylabel: str = "",
    log_x: bool = False,
) -> Figure:
    """Draw the mean of a metric against a numeric axis, a line with its interval for each arm.

    Args:
        summaries: Summaries of one metric, by `arm` and `x` only.
        x: Axis along the figure, such as "fraction".
        caption: Text under the figure.
        arm: Axis of the lines.
        xlabel: Name and unit of x; empty for the axis's name.
        ylabel: Name and unit of the metric; empty for its name.
        log_x: Whether x has a logarithmic axis.

    Raises:
        InputError: There is nothing to draw, x is no number, or there are other metrics or axes.
    """
    metrics = {row.metric for row in summaries}
    if len(metrics) != 1 or any({axis for axis, _ in row.group} != {arm, x} for row in summaries):
        raise InputError("curves of a study", f"summaries of one metric by {arm} and {x}", "others")
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in summaries:
        group = dict(row.group)
        position = group[x]
        if isinstance(position, str):
            raise InputError(f"axis '{x}' of the study", "numbers to draw along", f"'{position}'")
        low, high = (row.mean if end is None else end for end in (row.low, row.high))
        lines.setdefault(str(group[arm]), []).append((float(position), row.mean, low, high))
    bands = {name: Band(*np.array(sorted(points), np.float64).T) for name, points in lines.items()}
    return banded_curves(bands, xlabel=xlabel or x, ylabel=ylabel or metrics.pop(), caption=caption, log_x=log_x)


def _tested(first: np.ndarray, second: np.ndarray, test: Test) -> dict:
    """Test what can be tested; a row without a p-value says why."""
    empty = dict.fromkeys(("difference", "low", "high", "effect_size", "statistic", "p_value"))
    if len(first) < 2:
        difference = float((first - second).mean()) if len(first) else None
        return {**empty, "difference": difference, "note": f"{len(first)} pairs: no test"}
    try:
        found = paired_t(first, second) if test == "paired_t" else wilcoxon(first, second)
        effect = cohen_dz(first, second)
    except InputError as error:
        return {**empty, "difference": float((first - second).mean()), "note": f"no test: {error}"}
    return {
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "effect_size": effect,
        "statistic": found.statistic,
        "p_value": found.p_value,
        "note": "",
    }


def _corrected(rows: Sequence[Comparison], correction: Correction) -> tuple[Comparison, ...]:
    p_values = np.array([row.p_value for row in rows if row.p_value is not None], np.float64)
    corrected = iter((holm if correction == "holm" else bonferroni)(p_values))
    return tuple(
        row if row.p_value is None else dataclasses.replace(row, p_corrected=float(next(corrected))) for row in rows
    )


def _metric(result: Result, name: str) -> float:
    if name not in result.metrics:
        raise InputError(
            f"metric of {result.cell}", "a metric of the study", f"'{name}'", nearest(name, result.metrics)
        )
    return result.metrics[name]


def _flat(row: Summary | Comparison) -> dict[str, object]:
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row) if field.name != "group"}
    return {**dict(row.group), **fields}


def _columns(records: Sequence[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record))


def _table(records: Sequence[Mapping[str, object]], headings: Mapping[str, str], caption: str) -> Table:
    columns = _columns(records)
    rows = [[record.get(name) for name in columns] for record in records]
    return Table([headings.get(name, name) for name in columns], rows, caption)
