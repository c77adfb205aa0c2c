"""Read connectomes and tables of visits, and say what is wrong with them in one line."""

import dataclasses
import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxmed.arrays.graphs import components, keep_strongest, mirror_triangle
from jaxmed.arrays.visits import Visits, pad_visits
from jaxmed.config import checked
from jaxmed.errors import SIDES, InputError, closest, nearest, side_of
from jaxmed.io.connectomes import Square, names_beside, order_by_name, read_names, read_square
from jaxmed.io.tables import Table, read_table

KNOWN_COLUMNS = ("subject", "age", "split")
ASYMMETRY = 1e-6
"""Largest difference between a weight and its mirror image, relative to the largest weight."""
HIGHEST_SUVR = 20.0
OLDEST, YOUNG = 120, 18
"""Years; a cohort whose median age is below the second may give times since a first visit."""


class Connectome(NamedTuple):
    """A graph with names.

    Attributes:
        path: Its file.
        regions: Names.
        adjacency: Symmetric, not negative, zero diagonal, largest weight 1.
    """

    path: Path
    regions: tuple[str, ...]
    adjacency: Float[np.ndarray, "region region"]


@dataclasses.dataclass(frozen=True)
@checked
class ConnectomeConfig:
    """What is done to a connectome as read.

    Attributes:
        labels: CSV file of region names in the order of the matrix, where the matrix has no header.
        repair: Take the mean of asymmetric weights and 0 for negative ones, and say so, in place of refusing them.
        density: Share of possible edges to keep, the strongest; None keeps all.
    """

    labels: Path | None = None
    repair: bool = False
    density: float | None = None

    def __post_init__(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density: expected a share above 0 and at most 1, found {self.density:g}")


@dataclasses.dataclass(frozen=True)
class ConnectomeDataConfig:
    """How a connectome is read where there is no cohort beside it, under the names of `job.DataConfig`.

    Attributes:
        graph: What is done to the connectome as read.
    """

    graph: ConnectomeConfig = dataclasses.field(default_factory=ConnectomeConfig)


class Cohort(NamedTuple):
    """A table of visits as arrays.

    Attributes:
        subjects: Names, in the order of their first rows.
        ages: At the first visit, in years.
        splits: Of each subject: "train", "validation", "test" or empty.
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


# --- Connectomes ------------------------------------------------------------------------------


def read_connectome(path: Path | None, config: ConnectomeConfig, notes: list[str]) -> Connectome:
    """Read a square matrix or a list of edges.

    Args:
        path: A text file; see `jaxmed.io.connectomes.read_square` for its forms.
        config: Names and repairs.
        notes: What a reader must know is added.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    if path is None:
        raise InputError("connectome", "a file", "nothing", "give --connectome FILE, or try --preset smoke")
    square = read_square(path, notes)
    regions, matrix = _name(path, square, config.labels, notes)
    matrix = _checked(path, regions, matrix, config.repair, notes)
    if config.density is not None:
        matrix = keep_strongest(matrix, config.density)
    labels = components(matrix)
    for region, strength in zip(regions, matrix.sum(axis=1), strict=True):
        if strength == 0:
            notes.append(f"Region '{region}' has no connection: what spreads never reaches it.")
    apart = [region for region, label in zip(regions, labels, strict=True) if label != np.bincount(labels).argmax()]
    if apart:
        notes.append(f"The connectome is not connected; apart from its largest part: {', '.join(apart)}.")
    return Connectome(path, regions, (matrix / matrix.max()).astype(np.float32))


def _name(path: Path, square: Square, labels: Path | None, notes: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Give a matrix its names: its own, or those of a file; both only where they say the same."""
    count = len(square.matrix)
    if labels is None:
        if square.regions is not None:
            return square.regions, square.matrix
        beside = names_beside(path, count)
        advice = "add a header line, or name a file of them by --data.graph.labels"
        if beside:
            advice = f"give --data.graph.labels {beside[0]}, which lies beside it and holds {count} names"
        raise InputError(path, "names of regions", "none", advice)
    names = read_names(labels, count)
    if square.regions is None:
        return names, square.matrix
    if all(name.isdecimal() for name in square.regions):
        numbers = [int(name) for name in square.regions]
        if sorted(numbers) not in (list(range(count)), list(range(1, count + 1))):
            expected = f"regions numbered from 0 to {count - 1} or from 1 to {count}"
            raise InputError(path, expected, f"numbers from {min(numbers)} to {max(numbers)}")
        order = np.argsort(numbers)
        return names, square.matrix[np.ix_(order, order)]
    absent = [name for name in square.regions if name not in names]
    if absent:
        advice = "drop --data.graph.labels, or the names in the connectome"
        raise InputError(labels, f"the names that {path.name} has", f"none '{absent[0]}'", advice)
    if names != square.regions:
        notes.append(f"The regions of {path.name} were put into the order of {labels.name} by their names.")
    return names, order_by_name(square, names, path, "rows")


def _checked(path: Path, regions: tuple[str, ...], matrix: np.ndarray, repair: bool, notes: list[str]) -> np.ndarray:
    if len(regions) < 2:
        raise InputError(path, "two regions or more", f"{len(regions)}")
    diagonal = np.nan_to_num(np.diag(matrix))
    if diagonal.any():
        notes.append(f"Connections of {np.count_nonzero(diagonal)} regions with themselves are left out.")
    matrix = np.where(np.eye(len(matrix), dtype=bool), 0.0, matrix)
    mirrored = mirror_triangle(matrix)
    if mirrored is not None:
        notes.append("One triangle of the connectome is filled: it is mirrored to the other.")
        matrix = mirrored
    if np.isnan(matrix).any():
        u, v = np.argwhere(np.isnan(matrix))[0]
        where = f"a finite number in row {u + 1}, column {v + 1}"
        raise InputError(path, where, f"'nan' from '{regions[u]}' to '{regions[v]}'", "write 0 for no connection")
    largest = np.abs(matrix).max()
    if largest == 0:
        raise InputError(path, "a connection", "only zeros")
    difference = np.abs(matrix - matrix.T)
    advice = "--data.graph.repair takes the mean of both, and 0 for negative weights"
    if difference.max() > ASYMMETRY * largest:
        u, v = np.unravel_index(difference.argmax(), difference.shape)
        found = f"{matrix[u, v]:g} from '{regions[u]}' to '{regions[v]}' and {matrix[v, u]:g} back"
        if not repair:
            raise InputError(path, "a symmetric matrix", found, advice)
        notes.append(f"The connectome was asymmetric ({found}, at most): the mean of both is used.")
    matrix = (matrix + matrix.T) / 2
    if matrix.min() < 0:
        u, v = np.unravel_index(matrix.argmin(), matrix.shape)
        found = f"{matrix[u, v]:g} between '{regions[u]}' and '{regions[v]}'"
        if not repair:
            raise InputError(path, "weights of 0 or more", found, advice)
        notes.append(f"{np.count_nonzero(np.triu(matrix) < 0)} negative weights ({found}, lowest) count as 0.")
    if matrix.max() <= 0:
        raise InputError(path, "a weight above 0", f"{matrix.max():g} at most")
    return np.maximum(matrix, 0.0)


def find_regions(names: tuple[str, ...], connectome: Connectome, field: str = "seeds") -> tuple[int, ...]:
    """Return the numbers of regions by name.

    Raises:
        InputError: One is unknown, or none is given.
    """
    if not names:
        advice = "for tau: --seeds and the two entorhinal regions"
        raise InputError(field, "names of the regions where the disease starts", "nothing", advice)
    for name in names:
        if name in connectome.regions:
            continue
        words = _words(name)
        sides = (
            [] if side_of(name) else [r for r in connectome.regions if side_of(r) and _words(r)[-len(words) :] == words]
        )
        if sides:
            advice = f"it may be {' or '.join(sides)}: name one of them, or both"
            raise InputError(field, "regions of the connectome", f"'{name}'", advice)
        raise InputError(field, "regions of the connectome", f"'{name}'", nearest(name, connectome.regions))
    return tuple(connectome.regions.index(name) for name in names)


def _words(region: str) -> list[str]:
    """Return the words of a region's name in lower case, without the one for its side."""
    return [word for word in re.findall(r"[^\W_]+", region.lower()) if word not in SIDES]


def read_centroids(path: Path, regions: tuple[str, ...]) -> Float[np.ndarray, "region 3"]:
    """Read where regions lie: columns region, x, y, z, in mm, RAS+.

    Raises:
        InputError: A region has no row or two, or a coordinate is no number.
    """
    table = read_table(path, ("region", "x", "y", "z"))
    names = table.column("region")
    points = np.array([table.floats(axis) for axis in "xyz"]).T
    for region in regions:
        if names.count(region) != 1:
            advice = nearest(region, names)
            raise InputError(path, f"one row for region '{region}'", f"{names.count(region)}", advice)
    return points[[names.index(region) for region in regions]]


# --- Visits -----------------------------------------------------------------------------------


def read_cohort(
    path: Path | None,
    regions: tuple[str, ...],
    scaling: Literal["minmax", "none"],
    notes: list[str],
    scale: tuple[float, float] | None = None,
) -> Cohort:
    """Read a table of visits: subject, age, optionally split, and a column for every region.

    An empty cell, or a word such as NA, is a value that was not measured; a visit at which nothing was is left out.

    Args:
        path: A text file; see `jaxmed.io.sheets.read_sheet` for its forms.
        regions: Of the connectome; each needs a column.
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
    return Cohort(tuple(order), np.array([ages[rows[0]] for rows in order.values()]), splits, visits, low, high)


def _check_values(
    table: Table,
    regions: tuple[str, ...],
    ages: np.ndarray,
    values: np.ndarray,
    scaling: Literal["minmax", "none"],
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


def _ask(ages: np.ndarray, values: np.ndarray, scaling: Literal["minmax", "none"], notes: list[str]) -> None:
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
    path: Path, values: np.ndarray, scaling: str, scale: tuple[float, float] | None, notes: list[str]
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
