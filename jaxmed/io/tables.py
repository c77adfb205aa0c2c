"""Tables with named columns: one row per record, checked columns.

How a file is encoded and separated is found out by `jaxmed.io.sheets`. Cells stay strings until a column is asked for
as numbers, and every complaint names the line of the file.
"""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxmed.errors import InputError, closest
from jaxmed.files import expand_home, write_text
from jaxmed.io.sheets import Sheet, is_missing, read_sheet


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as read.

    Attributes:
        path: The file it came from; relative paths in its cells start at its folder.
        columns: Names of the columns, in the order of the file.
        rows: One dict of strings per record; empty cells are empty strings.
        lines: Line of the file on which each record ends.
        sheet: The cells it was made of.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    lines: tuple[int, ...]
    sheet: Sheet

    @property
    def note(self) -> str:
        """Return how the file is separated, encoded and writes decimals, where that is out of the ordinary."""
        return self.sheet.note

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.rows)

    def column(self, name: str) -> list[str]:
        """Return one column as strings."""
        require_columns(self, (name,))
        return [row[name] for row in self.rows]

    def floats(self, name: str, *, allow_missing: bool = False) -> list[float]:
        """Return one column as finite numbers; cells such as "" and NaN are NaN where they may be missing."""
        values = []
        for cell, line in zip(self.column(name), self.lines, strict=True):
            if allow_missing and is_missing(cell):
                values.append(math.nan)
                continue
            try:
                value = self.sheet.number(cell)
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                advice = "write decimals with a point and thousands without a mark" if "," in cell else ""
                raise self.wrong(line, f"a number under '{name}'", _shown(cell), advice)
            values.append(value)
        return values

    def integers(self, name: str) -> list[int]:
        """Return one column as whole numbers; 3.0 counts as 3."""
        values = self.floats(name)
        for cell, value, line in zip(self.column(name), values, self.lines, strict=True):
            if value != int(value):
                raise self.wrong(line, f"a whole number under '{name}'", _shown(cell))
        return [int(value) for value in values]

    def one_per(self, key: str, name: str) -> tuple[str, ...] | None:
        """Return the cell of every different value of `key`, in order; None where one has several."""
        cells: dict[str, str] = {}
        for which, cell in zip(self.column(key), self.column(name), strict=True):
            if cells.setdefault(which, cell) != cell:
                return None
        return tuple(cells.values())

    def wrong(self, line: int, expected: str, found: str, advice: str = "") -> InputError:
        """Return the error that names a line of this table."""
        return InputError(f"{self.path} line {line}", expected, found, advice)


def read_table(path: str | Path, required: Sequence[str] = (), optional: Sequence[str] = ()) -> Table:
    """Read a table and check its columns.

    Args:
        path: A text file with a header line; see `jaxmed.io.sheets.read_sheet` for its forms.
        required: Columns that must be there, with no empty cell.
        optional: Columns that are understood when they are there. Columns of other names are
            kept, unless the name is a near miss of an absent optional one.

    Raises:
        InputError: When the file is missing or empty, has no record, a required column is absent or
            has an empty cell, a header is double, or a row is longer or shorter than the header.
    """
    sheet = read_sheet(path, required)
    path = sheet.path
    cells, lines = zip(
        *((row, line) for row, line in zip(sheet.rows, sheet.lines, strict=True) if any(row)), strict=True
    )
    above = sheet.comment_as_header()
    if required and set(required) <= set(above) and not set(required) <= set(cells[0]):
        columns = above
    else:
        columns, cells, lines = cells[0], cells[1:], lines[1:]
    if columns[0] == "" and all(row[0] == str(index) for index, row in enumerate(cells)):
        columns, cells = columns[1:], tuple(row[1:] for row in cells)  # pandas numbers its rows
    columns = _checked_header(path, columns)
    for row, line in zip(cells, lines, strict=True):
        if len(row) != len(columns):
            advice = "quote cells that hold a separator" if len(row) > len(columns) else ""
            raise InputError(f"{path} line {line}", f"{len(columns)} cells", f"{len(row)}", advice)
    if not cells:
        raise InputError(path, "at least one record", "a header and nothing below it")
    rows = tuple(dict(zip(columns, row, strict=True)) for row in cells)
    table = Table(path, columns, rows, lines, sheet)
    require_columns(table, required)
    _refuse_near_misses(table, optional)
    for name in required:
        for row, line in zip(table.rows, table.lines, strict=True):
            if not row[name]:
                advice = "fill it in, or drop the row"
                raise table.wrong(line, f"a value under '{name}'", "an empty cell", advice)
    return table


def make_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Table:
    """Make a table of records that come from no file of cells, such as those found in a folder.

    Args:
        path: Where they come from, for messages.
        columns: Their fields.
        rows: A cell for every field of each.
    """
    cells = tuple(tuple(row[name] for name in columns) for row in rows)
    lines = tuple(range(1, len(rows) + 1))
    return Table(path, tuple(columns), tuple(map(dict, rows)), lines, Sheet(path, cells, lines, (), ",", ".", "UTF-8"))


def write_table(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a comma-separated table, wholly or not at all; None becomes an empty cell.

    Raises:
        ValueError: When a row has a column that is not listed.
        InputError: When the place is not writable.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_columns(path: str | Path, columns: Mapping[str, Iterable[object]]) -> None:
    """Write a comma-separated table by its columns, all of one length; None and NaN become empty cells.

    Raises:
        InputError: When the place is not writable.
    """
    cells = [np.asarray(column).tolist() if hasattr(column, "dtype") else column for column in columns.values()]
    rows = [
        {name: None if value != value else value for name, value in zip(columns, row, strict=True)}
        for row in zip(*cells, strict=True)
    ]
    write_table(path, tuple(columns), rows)


def require_columns(table: Table, names: Sequence[str]) -> None:
    """Refuse a table that lacks a column, and suggest the nearest name.

    Raises:
        InputError: When a column is absent.
    """
    for name in names:
        if name not in table.columns:
            near = closest(name, table.columns)
            advice = f"did you mean '{near}'?" if near else "add it, or name another column"
            found = f"the columns {', '.join(table.columns)}"
            raise InputError(table.path, f"a column '{name}'", found, advice)


def require_disjoint_subjects(table: Table, subject: str = "subject", split: str = "split") -> None:
    """Refuse a table in which one subject stands in two splits: its scans would leak.

    Raises:
        InputError: When there is such a subject.
    """
    splits: dict[str, set[str]] = {}
    for name, part in zip(table.column(subject), table.column(split), strict=True):
        if not is_missing(name):  # an empty cell says nothing about who it is
            splits.setdefault(name, set()).add(part)
    torn = {name: parts for name, parts in splits.items() if len(parts) > 1}
    if torn:
        name, parts = next(iter(torn.items()))
        found = f"{_shown(name)} in {' and '.join(sorted(parts))}"
        if len(torn) > 1:
            found += f", and {len(torn) - 1} more such subjects"
        advice = "keep all records of a subject in one split"
        raise InputError(table.path, "every subject in one split", found, advice)


def resolve_path(cell: str, folder: str | Path) -> Path:
    """Return the file that a cell names: relative to `folder`, absolute as it is.

    "~/" is the user's home; nothing else is replaced, neither variables nor back-slashes.
    """
    return Path(folder) / expand_home(cell)


def resolve_paths(table: Table, column: str = "path") -> list[Path]:
    """Return the files that a column names, relative to the table's folder.

    Raises:
        InputError: When some do not exist; the first three are named.
    """
    paths = [resolve_path(cell, table.path.parent) for cell in table.column(column)]
    missing = [f"{path} (line {line})" for path, line in zip(paths, table.lines, strict=True) if not path.exists()]
    if missing:
        found = f"{len(missing)} of {len(paths)} missing: {', '.join(missing[:3])}"
        found += ", ..." if len(missing) > 3 else ""
        cells = [cell for cell, path in zip(table.column(column), paths, strict=True) if not path.exists()]
        advice = _path_advice(cells[0]) or f"paths start at the table's folder {table.path.parent}"
        raise InputError(table.path, f"existing files under '{column}'", found, advice)
    return paths


def _path_advice(cell: str) -> str:
    """Say what is odd about a path that leads nowhere."""
    if "://" in cell:
        return "write the path of the file itself, not an address"
    if re.search(r"(^|[/\\])\$\{?\w|%\w+%", cell):
        return "variables in a cell are taken as they are: write the whole path"
    if "\\" in cell:
        return "write / between folders, not a back-slash"
    return ""


def _checked_header(path: Path, cells: tuple[str, ...]) -> tuple[str, ...]:
    doubles = sorted({cell for cell in cells if cells.count(cell) > 1})
    if "" in cells:
        raise InputError(path, "a name for every column", f"column {cells.index('') + 1} without")
    if doubles:
        raise InputError(path, "different column names", f"'{doubles[0]}' twice", "rename one")
    return cells


def _refuse_near_misses(table: Table, optional: Sequence[str]) -> None:
    # A misspelt optional column would be ignored in silence, and the run would look fine.
    for name in set(optional) - set(table.columns):
        near = closest(name, table.columns, cutoff=0.8)
        if near and near not in optional:
            raise InputError(table.path, f"a column '{name}' or none", f"'{near}'", "rename it")


def _shown(cell: str) -> str:
    return f"'{cell}'" if cell else "an empty cell"
