"""Connectomes as people have them: square matrices with or without names, and lists of edges.

Read as written, with a note for whatever was found out; that they are symmetric and not negative is for the reader to
check.
"""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxmed.errors import InputError
from jaxmed.io.sheets import Sheet, is_missing, read_sheet

ENDS = (("source", "target"), ("from", "to"))
"""Headers of the two ends of an edge."""
NAMES = ("label", "name", "region", "node", "roi", "parcel")
"""Parts of the names of files that may hold the names of regions."""
LARGEST_NAMES = 2**20
"""Bytes of a file of names."""
_WEIGHT = re.compile(r"""['"]weight['"]:\s*([^,}\s]+)""")
COUNTERS = ("", "index", "id", "no", "nr", "number", "row", "node")
"""Headers of a column that counts rows."""


class Square(NamedTuple):
    """A matrix of regions by regions.

    Attributes:
        regions: Names in the order of the matrix; None where the file has none.
        matrix: As written; NaN where a cell is empty or says so.
    """

    regions: tuple[str, ...] | None
    matrix: Float[np.ndarray, "region region"]


def read_square(path: Path, notes: list[str]) -> Square:
    """Read a matrix or a list of edges.

    A matrix may have a header of names, names or numbers of its rows (as pandas and R write them), and comments above.
    Rows named in another order than the columns are put into theirs. Edges are rows of source, target and weight, with
    a header of these names or without one, or as networkx writes them.

    Args:
        path: A text file; see `jaxmed.io.sheets.read_sheet` for its forms.
        notes: What was found out is added.

    Raises:
        InputError: It is neither, or could be read in two ways.
    """
    sheet = read_sheet(path)
    if any("{" in cell for cell in sheet.rows[0]):
        notes.append(f"{path.name} is read as a list of edges of networkx; their weight is 'weight'.")
        return _from_edges(sheet, _from_dictionaries(sheet), sheet.lines, notes)
    if sheet.note:
        notes.append(sheet.note)
    header = tuple(cell.lower() for cell in sheet.rows[0])
    ends = next((pair for pair in ENDS if set(pair) <= set(header)), None)
    if ends is not None:
        return _from_edges(sheet, *_named_columns(sheet, header, ends, notes), notes)
    body = sheet.rows[1:] if len(sheet.rows) > 1 else sheet.rows
    are_names = all(len(row) > 2 and not sheet.is_number(row[0]) and not sheet.is_number(row[1]) for row in body)
    if are_names or _is_numbered_edges(sheet):
        return _from_edges(sheet, *_bare_columns(sheet), notes)
    return _from_matrix(sheet, notes)


def order_by_name(square: Square, regions: Sequence[str], path: Path, what: str) -> Float[np.ndarray, "region region"]:
    """Return a matrix in the order of regions; one without names must have their number.

    Raises:
        InputError: Its names are others, or its size is.
    """
    if square.regions is None:
        if len(square.matrix) != len(regions):
            found = f"{len(square.matrix)} x {len(square.matrix)}"
            raise InputError(path, f"{len(regions)} x {len(regions)} {what}", found)
        return square.matrix
    absent = [name for name in regions if name not in square.regions]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise InputError(path, f"{what} of every region of the connectome", f"none of '{absent[0]}'{more}")
    place = [square.regions.index(name) for name in regions]
    return square.matrix[np.ix_(place, place)]


# --- Names in a file of their own -------------------------------------------------------------


def read_names(path: Path, count: int) -> tuple[str, ...]:
    """Read names of regions: in one line, one a line, or the one column of a table that is not of numbers.

    Args:
        path: A text file.
        count: How many there must be.

    Raises:
        InputError: There are more or fewer, or one stands twice.
    """
    sheet = read_sheet(path)
    rows = sheet.rows
    first = list(rows[0])
    names: tuple[str, ...]
    if len(rows) == 1:
        names = tuple(first if len(first) > 1 or count == 1 else first[0].split())
    elif sheet.mark == " " and not all(sheet.is_number(row[0]) for row in rows[1:]):
        names = tuple(" ".join(row) for row in rows)  # names of several words
    else:
        body = rows[1:] if first[-1].lower().rstrip("s") in NAMES or sheet.is_header(0) else rows
        columns = [column for column in zip(*body, strict=False) if not all(map(sheet.is_number, column))]
        columns = [column for column in columns if len(set(column)) == len(column)] or columns
        if len(columns) != 1:
            raise InputError(path, "one column of names", f"{len(columns)}", "keep the names alone")
        names = columns[0]
    if len(names) != count:
        raise InputError(path, f"{count} names of regions", f"{len(names)}")
    _refuse_doubles(path, names)
    return names


def names_beside(path: Path, count: int) -> list[Path]:
    """Return files in the folder of a matrix that hold as many names of regions, those named most like it first."""
    found = []
    for other in sorted(path.parent.iterdir()):
        is_named_so = other.suffix.lower() in (".csv", ".tsv", ".txt") and any(w in other.name.lower() for w in NAMES)
        if other != path and is_named_so and other.is_file() and other.stat().st_size <= LARGEST_NAMES:
            try:
                read_names(other, count)
            except InputError:
                continue
            found.append(other)
    return sorted(found, key=lambda other: -difflib.SequenceMatcher(None, path.stem, other.stem).ratio())


def _refuse_doubles(path: Path, names: Sequence[str]) -> None:
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise InputError(path, "different names of regions", f"'{doubles[0]}' twice")


# --- Edges ------------------------------------------------------------------------------------


def _from_dictionaries(sheet: Sheet) -> list[tuple[str, str, str]]:
    """Return edges as networkx writes them by default: two nodes and a dictionary of their data."""
    found = []
    for row, line in zip(sheet.rows, sheet.lines, strict=True):
        ends, _, data = sheet.mark.join(row).partition("{")
        nodes = [node.strip() for node in (ends.rstrip(" ,;").split(sheet.mark) if "," in ends else ends.split())]
        weight = _WEIGHT.search(data)
        if len(nodes) != 2 or weight is None:
            expected = "two regions without blanks and a dictionary with their 'weight'"
            raise InputError(f"{sheet.path} line {line}", expected, f"'{sheet.mark.join(row)[:60]}'")
        found.append((nodes[0], nodes[1], weight[1]))
    return found


def _is_numbered_edges(sheet: Sheet) -> bool:
    """Say whether three columns of numbers are edges between numbered regions: not square, whole, and of two ends."""
    rows = sheet.rows
    if {len(row) for row in rows} != {3} or len(rows) in (3, 4):
        return False
    return all(row[0].isdecimal() and row[1].isdecimal() and row[0] != row[1] for row in rows)


def _named_columns(
    sheet: Sheet, header: tuple[str, ...], ends: tuple[str, str], notes: list[str]
) -> tuple[list[tuple[str, ...]], tuple[int, ...]]:
    if "weight" not in header:
        raise InputError(sheet.path, "a column 'weight' beside the ends of edges", f"{', '.join(sheet.rows[0])}")
    others = [name for name in sheet.rows[0] if name and name.lower() not in (*ends, "weight")]
    if others:
        notes.append(f"Columns of edges that are not used: {', '.join(others)}.")
    place = [header.index(name) for name in (*ends, "weight")]
    for row, line in zip(sheet.rows, sheet.lines, strict=True):
        if len(row) != len(header):
            raise InputError(f"{sheet.path} line {line}", f"{len(header)} cells", f"{len(row)}")
    return [tuple(row[index] for index in place) for row in sheet.rows[1:]], sheet.lines[1:]


def _bare_columns(sheet: Sheet) -> tuple[list[tuple[str, ...]], tuple[int, ...]]:
    skip = 0 if all(map(sheet.is_number, sheet.rows[0][2:3])) and len(sheet.rows[0]) > 2 else 1
    rows, lines = sheet.rows[skip:], sheet.lines[skip:]
    for row, line in zip(rows, lines, strict=True):
        if len(row) != 3:
            advice = "name the columns source, target and weight in a header line"
            raise InputError(
                f"{sheet.path} line {line}", "an edge: two regions and a weight", f"{len(row)} cells", advice
            )
    return list(rows), lines


def _from_edges(sheet: Sheet, rows: Sequence[Sequence[str]], lines: Sequence[int], notes: list[str]) -> Square:
    if not rows:
        raise InputError(sheet.path, "at least one edge", "a header and nothing below it")
    regions = tuple(dict.fromkeys(name for row in rows for name in row[:2]))
    place = {name: index for index, name in enumerate(regions)}
    matrix, seen = np.zeros((len(regions), len(regions))), set()
    for (one, other, cell), line in zip(rows, lines, strict=True):
        where = f"{sheet.path} line {line}"
        if not one or not other:
            raise InputError(where, "edges between two regions", "an empty name")
        if one == other:
            raise InputError(where, "edges between two regions", f"'{one}' connected with itself", "drop the row")
        if (one, other) in seen:
            raise InputError(where, "each edge once", f"'{one}' and '{other}' again", "drop one of the rows")
        seen.add((one, other))
        matrix[place[one], place[other]] = _finite(sheet, cell, where, "weight")
    mutual = sum((other, one) in seen for one, other in seen)
    if mutual:
        notes.append(f"{mutual} of {len(seen)} edges are given in both directions.")
    for one, other in seen:
        if (other, one) not in seen:
            matrix[place[other], place[one]] = matrix[place[one], place[other]]
    return Square(regions, matrix)


def _finite(sheet: Sheet, cell: str, where: str, what: str) -> float:
    try:
        value = sheet.number(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(where, f"a number under '{what}'", f"'{cell}'" if cell else "an empty cell")
    return value


# --- Matrices ---------------------------------------------------------------------------------


def _from_matrix(sheet: Sheet, notes: list[str]) -> Square:
    path, header = sheet.path, None
    rows, lines = list(sheet.rows), sheet.lines
    width = len(rows[-1])
    if len(rows) not in (width, width + 1):  # rows of empty cells, but for those of a triangle
        rows, lines = zip(*((row, line) for row, line in zip(rows, lines, strict=True) if any(row)), strict=True)
    height = len(rows)
    words = [not sheet.is_number(cell) and not is_missing(cell) for cell in rows[0]]
    # A row that begins with a word alone is one with a name, unless there are rows enough for a header and a corner.
    has_corner = width > 1 and height >= width and (words[0] or rows[0][0] == "")
    if any(words[1:]) or words == [True] or has_corner or height == width + 1 or len(rows[0]) == width - 1:
        header, rows, lines = rows[0], rows[1:], lines[1:]
    for row, line in zip(rows, lines, strict=True):
        if len(row) != width:
            advice = "write every row in full, with 0 where there is no connection"
            raise InputError(
                f"{path} line {line}", f"a square matrix, {width} cells in every row", f"{len(row)}", advice
            )
    names_of_rows, counters = None, header is None or len(header) < width or header[0].lower() in COUNTERS
    if width == len(rows) + 1 and (counters or not all(sheet.is_number(row[0]) for row in rows)):
        names_of_rows, rows = [row[0] for row in rows], [row[1:] for row in rows]
        if header is not None and len(header) == width:
            header = header[1:]
    if not rows or len(rows[0]) != len(rows) or (header is not None and len(header) != len(rows)):
        found = f"{len(rows)} rows of {len(rows[0]) if rows else 0} values"
        if header is not None and rows and len(rows[0]) == len(rows):
            found = f"{len(header)} names above {len(rows)} columns"
        raise InputError(path, "a square matrix, or edges as source, target, weight", found)
    if header is None and names_of_rows is None and sheet.mark != " " and (header := sheet.comment_as_header() or None):
        notes.append(f"Names of regions are those in the comment above the matrix: {', '.join(header)}.")
    matrix = np.array([[_cell(sheet, cell, row, column) for column, cell in enumerate(cells, 1)] for row, cells in
                       enumerate(rows, 1)])  # fmt: skip
    columns = _as_names(sheet, header)
    return _match(path, columns, _as_names(sheet, names_of_rows), names_of_rows, Square(columns, matrix), notes)


def _cell(sheet: Sheet, cell: str, row: int, column: int) -> float:
    if is_missing(cell):
        return math.nan
    if not sheet.is_number(cell) or math.isinf(sheet.number(cell)):
        advice = "write decimals with a point and thousands without a mark" if "," in cell else ""
        raise InputError(sheet.path, f"a finite number in row {row}, column {column}", f"'{cell}'", advice)
    return sheet.number(cell)


def _as_names(sheet: Sheet, cells: Iterable[str] | None) -> tuple[str, ...] | None:
    """Return cells as names, or None where there are none or they only count."""
    if cells is None:
        return None
    names = tuple(cells)
    if all(map(sheet.is_number, names)):
        numbers = [sheet.number(name) for name in names]
        if any(numbers == list(range(first, first + len(names))) for first in (0, 1)):
            return None
        if not all(number.is_integer() for number in numbers):
            raise InputError(sheet.path, "a square matrix", "one row or column of numbers more")
    if "" in names:
        raise InputError(sheet.path, "a name for every region", f"none for number {names.index('') + 1}")
    _refuse_doubles(sheet.path, names)
    return names


def _match(
    path: Path,
    columns: tuple[str, ...] | None,
    rows: tuple[str, ...] | None,
    written: Sequence[str] | None,
    square: Square,
    notes: list[str],
) -> Square:
    """Bring rows into the order of columns by their names."""
    if columns is None or rows is None:
        if written is not None and rows is None and columns is None:
            notes.append(f"The first column of {path.name} counts its rows.")
        return square._replace(regions=columns or rows)
    if rows == columns:
        return square
    if set(rows) != set(columns):
        one = next(name for name in rows if name not in columns)
        other = next(name for name in columns if name not in rows)
        raise InputError(path, "the same names of rows and columns", f"a row '{one}' and a column '{other}'")
    notes.append(f"Rows of {path.name} stand in another order than its columns; they were put into theirs by name.")
    return square._replace(matrix=square.matrix[[rows.index(name) for name in columns]])
