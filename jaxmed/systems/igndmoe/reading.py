"""Read connectomes and tables of visits, and say what is wrong with them in one line."""

import csv
import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxmed.arrays.graphs import Edges, components, keep_strongest, matrix_of, rescale
from jaxmed.arrays.visits import Visits, pad_visits
from jaxmed.errors import InputError, nearest
from jaxmed.files import require_file
from jaxmed.io.tables import Table, read_table

EDGE_COLUMNS = ("source", "target", "weight")
KNOWN_COLUMNS = ("subject", "age", "split")
ASYMMETRY = 1e-6
"""Largest difference between a weight and its mirror image, relative to the largest weight."""
HIGHEST_SUVR = 20.0


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
        path: CSV file: a matrix, with a header of names or with `config.labels`, or the columns source, target, weight.
        config: Names and repairs.
        notes: What a reader must know is added.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    if path is None:
        raise InputError("connectome", "a file", "nothing", "give --connectome FILE, or try --preset smoke")
    rows = _rows(path)
    if tuple(cell.lower() for cell in rows[0]) == EDGE_COLUMNS:
        regions, matrix = _from_edges(path)
    else:
        regions, matrix = _from_matrix(path, rows, config.labels)
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
    return Connectome(path, regions, rescale(matrix, "max").astype(np.float32))


def _rows(path: Path) -> list[list[str]]:
    require_file(path, "a CSV file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(path, "a UTF-8 text", "other bytes", "save as CSV") from error
    rows = [
        [cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if any(cell.strip() for cell in row)
    ]
    if not rows:
        raise InputError(path, "a matrix", "only blank lines")
    return rows


def _from_edges(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    table = read_table(path, EDGE_COLUMNS)
    ends = list(zip(table.column("source"), table.column("target"), strict=True))
    regions = tuple(dict.fromkeys(name for pair in ends for name in pair))
    place = {name: index for index, name in enumerate(regions)}
    seen = set()
    for (one, other), line in zip(ends, table.lines, strict=True):
        if one == other:
            raise table.wrong(line, "edges between two regions", f"'{one}' connected with itself", "drop the row")
        if frozenset((one, other)) in seen:
            raise table.wrong(line, "each edge once", f"'{one}' and '{other}' again", "drop one of the rows")
        seen.add(frozenset((one, other)))
    senders, receivers = (np.array([place[pair[side]] for pair in ends], np.int32) for side in (0, 1))
    return regions, matrix_of(Edges(senders, receivers, np.array(table.floats("weight"))), len(regions))


def _from_matrix(path: Path, rows: list[list[str]], labels: Path | None) -> tuple[tuple[str, ...], np.ndarray]:
    header = None
    if not all(_is_number(cell) for cell in rows[0]):
        header, rows = rows[0], rows[1:]
        if rows and not _is_number(rows[0][0]):  # names of rows too
            header, rows = header[1:], [row[1:] for row in rows]
    width = len(rows[0]) if rows else 0
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows):
            raise InputError(path, f"a square matrix, {len(rows)} values in row {number}", f"{len(row)}")
        for column, cell in enumerate(row, 1):
            if not _is_number(cell) or not np.isfinite(float(cell)):
                raise InputError(path, f"a finite number in row {number}, column {column}", f"'{cell}'")
    if labels is not None:
        header = [cell for row in _rows(labels) for cell in row]
    if header is None:
        raise InputError(
            path, "names of regions", "none", "add a header line, or name a file of them by the option graph.labels"
        )
    if len(header) != width:
        raise InputError(labels or path, f"{width} names of regions", f"{len(header)}")
    doubles = sorted({name for name in header if header.count(name) > 1})
    if doubles:
        raise InputError(labels or path, "different names of regions", f"'{doubles[0]}' twice")
    return tuple(header), np.array(rows, float)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _checked(path: Path, regions: tuple[str, ...], matrix: np.ndarray, repair: bool, notes: list[str]) -> np.ndarray:
    if len(regions) < 2:
        raise InputError(path, "two regions or more", f"{len(regions)}")
    if (np.diag(matrix) != 0).any():
        notes.append(f"Connections of {np.count_nonzero(np.diag(matrix))} regions with themselves are left out.")
    matrix = matrix - np.diag(np.diag(matrix))
    largest = np.abs(matrix).max()
    if largest == 0:
        raise InputError(path, "a connection", "only zeros")
    difference = np.abs(matrix - matrix.T)
    advice = "the option graph.repair takes the mean of both, and 0 for negative weights"
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
        if name not in connectome.regions:
            raise InputError(field, "regions of the connectome", f"'{name}'", nearest(name, connectome.regions))
    return tuple(connectome.regions.index(name) for name in names)


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

    Args:
        path: CSV file.
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
            raise InputError(path, f"a column for region '{region}'", "none", nearest(region, others) if others else "")
    extra = [name for name in table.columns if name not in (*KNOWN_COLUMNS, *regions)]
    if extra:
        notes.append(f"Columns that are no region of the connectome are not used: {', '.join(extra)}.")
    ages = np.array(table.floats("age"))
    values = np.array([table.floats(region) for region in regions]).T
    _check_values(table, regions, ages, values, scaling)
    order = _rows_by_subject(table, ages, notes)
    low, high = _scale(path, values, scaling, scale, notes)
    scaled = ((values - low) / (high - low)).astype(np.float32)
    if scale is not None and (scaled.min() < -0.05 or scaled.max() > 1.05):
        text = f"Values reach from {values.min():g} to {values.max():g}, beyond those of the fit ({low:g} to {high:g})."
        notes.append(text)
    visits = pad_visits([scaled[rows] for rows in order.values()], [ages[rows] for rows in order.values()])
    counts = visits.present.sum(axis=1)
    if counts.max() == 1:
        notes.append("Every subject was seen once: nothing anchors the speed of the disease, stages have no true unit.")
    splits = _splits(table, order)
    return Cohort(tuple(order), np.array([ages[rows[0]] for rows in order.values()]), splits, visits, low, high)


def _check_values(
    table: Table, regions: tuple[str, ...], ages: np.ndarray, values: np.ndarray, scaling: Literal["minmax", "none"]
) -> None:
    for age, line in zip(ages, table.lines, strict=True):
        if not 0 <= age <= 120:
            raise table.wrong(line, "an age from 0 to 120 years", f"{age:g}", "ages are in years")
    highest = HIGHEST_SUVR if scaling == "minmax" else 1.0
    wrong = np.argwhere((values < 0) | (values > highest))
    if len(wrong):
        row, column = wrong[0]
        expected = f"a value from 0 to {highest:g} under '{regions[column]}'"
        advice = "check the units" if scaling == "minmax" else "give --data.scaling minmax for values on another scale"
        raise table.wrong(table.lines[row], expected, f"{values[row, column]:g}", advice)


def _rows_by_subject(table: Table, ages: np.ndarray, notes: list[str]) -> dict[str, np.ndarray]:
    rows: dict[str, list[int]] = {}
    for index, subject in enumerate(table.column("subject")):
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
    low, high = float(values.min()), float(values.max())
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
