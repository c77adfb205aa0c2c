"""Tables of visits: subject, age, optionally split, and a column for every region, read into padded arrays."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxmed.arrays.visits import Visits, pad_visits
from jaxmed.errors import InputError, closest
from jaxmed.io.tables import Table, read_table

KNOWN_COLUMNS = ("subject", "age", "split")
HIGHEST_SUVR = 20.0
OLDEST, YOUNG = 120, 18
"""Years; a cohort whose median age is below the second may give times since a first visit."""
Scaling = Literal["minmax", "none"]


class VisitTable(NamedTuple):
    """A table of visits as arrays.

    Attributes:
        subjects: Names, in the order of their first rows.
        ages: At the first visit, in years.
        splits: Split of each subject: "train", "validation", "test" or empty.
        visits: Values scaled to [0, 1].
        low: Measurement at 0.
        high: Measurement at 1.
    """

    subjects: tuple[str, ...]
    ages: Float[np.ndarray, " subject"]
    splits: tuple[str, ...]
    visits: Visits
    low: float
    high: float


def read_visits(
    path: Path | None,
    regions: tuple[str, ...],
    scaling: Scaling,
    notes: list[str],
    scale: tuple[float, float] | None = None,
) -> VisitTable:
    """Read a table of visits: subject, age, optionally split, and a column for every region.

    An empty cell, or a word such as NA, is a value that was not measured; a visit at which nothing was is left out.

    Args:
        path: A text file; see `jaxmed.io.sheets.read_sheet` for its forms.
        regions: Regions of the connectome; each needs a column.
        scaling: "minmax" brings the smallest value of all subjects and regions to 0 and the largest to 1; "none" takes
            values as they are, on [0, 1].
        notes: What a reader must know is added.
        scale: Measurements at 0 and 1, of an earlier fit, in place of the table's own.

    Raises:
        InputError: For whatever a user can have wrong in this table.
    """
    if path is None:
        raise InputError("table", "a file", "nothing", "give --table FILE, or try --preset smoke")
    table = read_table(path, ("subject", "age"), ("split",))
    for region in regions:
        if region not in table.columns:
            others = [name for name in table.columns if name not in KNOWN_COLUMNS]
            near = closest(region, others)
            advice = f"did you mean '{near}'?" if near else "give it one of empty cells if it was not measured"
            raise InputError(path, f"a column for region '{region}'", "none", advice)
    extra = [name for name in table.columns if name not in (*KNOWN_COLUMNS, *regions)]
    if extra:
        notes.append(f"Columns that are no region of the connectome are not used: {', '.join(extra)}.")
    if table.note:
        notes.append(table.note)
    ages = np.array(table.floats("age"))
    values = np.array([table.floats(region, allow_missing=True) for region in regions]).T
    _check_values(table, regions, ages, values, scaling)
    _ask(ages, values, scaling if scale is None else "none", notes)
    _note_missing(table, regions, values, notes)
    order = _rows_by_subject(table, ages, np.atleast_1d(np.isfinite(values).any(axis=1)), notes)
    low, high = _scale(path, values, scaling, scale, notes)
    scaled = ((values - low) / (high - low)).astype(np.float32)
    if scale is not None and (np.nanmin(scaled) < -0.05 or np.nanmax(scaled) > 1.05):
        reach = f"from {np.nanmin(values):g} to {np.nanmax(values):g}"
        notes.append(f"Values reach {reach}, beyond those of the fit ({low:g} to {high:g}).")
    visits = pad_visits([scaled[rows] for rows in order.values()], [ages[rows] for rows in order.values()])
    counts = visits.present.sum(axis=1)
    if counts.max() == 1:
        notes.append("Every subject was seen once: nothing anchors the speed of the disease, stages have no true unit.")
    splits = _splits(table, order)
    return VisitTable(tuple(order), np.array([ages[rows[0]] for rows in order.values()]), splits, visits, low, high)


def _check_values(
    table: Table,
    regions: tuple[str, ...],
    ages: np.ndarray,
    values: np.ndarray,
    scaling: Scaling,
) -> None:
    for age, line in zip(ages, table.lines, strict=True):
        if not 0 <= age <= OLDEST:
            is_months = OLDEST < ages.max() <= 12 * OLDEST and ages.min() >= 0
            advice = f"are they months (up to {ages.max():g})? divide by 12" if is_months else "ages are in years"
            raise table.wrong(line, f"an age from 0 to {OLDEST} years", f"{age:g}", advice)
    if np.isnan(values).all():
        raise InputError(table.path, "values of regions", "only empty cells")
    highest = HIGHEST_SUVR if scaling == "minmax" else 1.0
    wrong = np.argwhere((values < 0) | (values > highest))
    if len(wrong):
        row, column = wrong[0]
        expected = f"a value from 0 to {highest:g} under '{regions[column]}'"
        advice = "give --data.scaling minmax for values on another scale"
        if scaling == "minmax":
            advice = "leave the cell empty if it was not measured" if values[row, column] < 0 else "check the units"
        raise table.wrong(table.lines[row], expected, f"{values[row, column]:g}", advice)


def _ask(ages: np.ndarray, values: np.ndarray, scaling: Scaling, notes: list[str]) -> None:
    """Ask about units that are possible and look like others."""
    if np.median(ages) < YOUNG:
        reach = f"from {ages.min():g} to {ages.max():g}"
        notes.append(f"Ages reach {reach} and are read as years. Are they months since a first visit? Divide by 12.")
    below = int((values < 1).sum())
    if scaling == "minmax" and below and np.nanmin(values) >= 0:
        share = f"{below} of {np.isfinite(values).sum()} values are below 1, the lowest {np.nanmin(values):g}"
        notes.append(
            f"{share}. Are they SUVR? A region without uptake has about 1. If they are scaled to [0, 1] already, give "
            "--data.scaling none."
        )


def _note_missing(table: Table, regions: tuple[str, ...], values: np.ndarray, notes: list[str]) -> None:
    missing = np.isnan(values)
    if not missing.any():
        return
    notes.append(f"{missing.sum()} of {missing.size} values were not measured; they are left out of errors and scores.")
    never = [
        region for region, is_missing in zip(regions, np.atleast_1d(missing.all(axis=0)), strict=True) if is_missing
    ]
    if never:
        notes.append(f"Never measured: {', '.join(never)}. What the course says there rests on the connectome alone.")
    empty = np.flatnonzero(missing.all(axis=1))
    if len(empty):
        subjects = table.column("subject")
        named = ", ".join(f"'{subjects[row]}' (line {table.lines[row]})" for row in empty[:5])
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        notes.append(f"Visits without any value are left out: {named}{more}.")


def _rows_by_subject(table: Table, ages: np.ndarray, is_used: np.ndarray, notes: list[str]) -> dict[str, np.ndarray]:
    rows: dict[str, list[int]] = {}
    for index, subject in enumerate(table.column("subject")):
        if is_used[index]:
            rows.setdefault(subject, []).append(index)
    order, out_of_order = {}, 0
    for subject, indices in rows.items():
        times = ages[indices]
        ranks = np.argsort(times, kind="stable")
        out_of_order += bool((np.diff(times) < 0).any())
        order[subject] = np.array(indices)[ranks]
        same = np.flatnonzero(np.diff(times[ranks]) == 0)
        if len(same):
            line = table.lines[int(order[subject][same[0] + 1])]
            found = f"subject '{subject}' again at age {times[ranks][same[0]]:g}"
            raise table.wrong(line, "one row per visit", found, "drop one of the rows, or correct the age")
    if out_of_order:
        notes.append(f"Visits of {out_of_order} subjects were not in the order of age; they were sorted.")
    return order


def _scale(
    path: Path, values: np.ndarray, scaling: Scaling, scale: tuple[float, float] | None, notes: list[str]
) -> tuple[float, float]:
    if scale is not None:
        return scale
    if scaling == "none":
        return 0.0, 1.0
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low == high:
        raise InputError(path, "values that differ", f"{low:g} everywhere")
    notes.append(f"Values from {low:g} to {high:g}, over all subjects and regions, are scaled to [0, 1].")
    return low, high


def _splits(table: Table, order: dict[str, np.ndarray]) -> tuple[str, ...]:
    if "split" not in table.columns:
        return ("",) * len(order)
    column = table.column("split")
    found = []
    for subject, rows in order.items():
        names = {column[row] for row in rows}
        line = table.lines[int(rows[-1])]
        if len(names) > 1:
            raise table.wrong(line, f"one split for subject '{subject}'", " and ".join(sorted(names)))
        name = names.pop()
        if name not in ("", "train", "validation", "test"):
            raise table.wrong(line, "train, validation, test or nothing under 'split'", f"'{name}'")
        found.append(name)
    return tuple(found)
