"""Cells of a text table as people save them: how they are encoded, separated and write decimals is found out.

Every table of the package is read here: manifests and cohorts (`jaxmed.io.tables`), connectomes
(`jaxmed.io.connectomes`). What is unambiguous is read, and `Sheet.note` says what was found where that is not the plain
case of commas, UTF-8 and decimal points; the rest is refused.
"""

import csv
import dataclasses
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxmed.errors import InputError
from jaxmed.files import require_file

MARKS = {"\t": "tabs", ";": "semicolons", ",": "commas", " ": "blanks"}
"""Separators; of two that fit a file as well, the first."""
MISSING = frozenset(("", "na", "n/a", "nan", "<na>", "#n/a", "null", "none", "."))
"""What programs write for a value that was not measured, in lower case."""
LARGEST = 2**30
"""Bytes; above, a file is no table."""
LOOKED_AT = 500
"""Records that decide on the separator."""
TEXT = "a table as text (UTF-8, UTF-16 or Latin-1)"
_COMMENT = ("#", "%")
_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": ("utf-8-sig", "UTF-8"),
    b"\xff\xfe\0\0": ("utf-32", "UTF-32"),
    b"\0\0\xfe\xff": ("utf-32", "UTF-32"),
    b"\xff\xfe": ("utf-16", "UTF-16"),
    b"\xfe\xff": ("utf-16", "UTF-16"),
}
_POINT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?inf(inity)?|nan", re.IGNORECASE)
_COMMA = re.compile(r"[-+]?\d*,\d+(e[-+]?\d+)?", re.IGNORECASE)
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(,\d{3})+")


@dataclasses.dataclass(frozen=True)
class Sheet:
    """The cells of a file, without blank lines and the comments above them; a row may be of empty cells.

    Attributes:
        path: The file.
        rows: Stripped cells; rows may differ in length.
        lines: Line of the file on which each row ends.
        comments: Lines above the first row that begin with # or %, without it.
        mark: What separates cells.
        decimal: "," or ".".
        encoding: By its usual name.
    """

    path: Path
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]
    comments: tuple[str, ...]
    mark: str
    decimal: str
    encoding: str

    @property
    def note(self) -> str:
        """Return what was found about the file in a sentence; empty for commas, UTF-8 and decimal points."""
        found = [f"of cells separated by {MARKS[self.mark]}"] if self.mark != "," and len(self.rows[0]) > 1 else []
        found += [f"in {self.encoding}"] if self.encoding != "UTF-8" else []
        found += ["with decimal commas"] if self.decimal == "," else []
        return f"{self.path.name} is read as a table {', '.join(found)}." if found else ""

    def is_number(self, cell: str) -> bool:
        """Say whether a cell is a number, NaN and infinity included."""
        return bool(_POINT.fullmatch(cell) or (self.decimal == "," and _COMMA.fullmatch(cell)))

    def number(self, cell: str) -> float:
        """Return a cell as a number.

        Raises:
            ValueError: It is none.
        """
        if not self.is_number(cell):
            raise ValueError(cell)
        return float(cell.replace(",", "."))

    def is_header(self, row: int) -> bool:
        """Say whether a row has a word where every row below has a number."""
        below = zip(*self.rows[row + 1 :], strict=False)
        pairs = zip(self.rows[row], below, strict=False)
        return any(not self.is_number(cell) and all(map(self.is_number, column)) for cell, column in pairs if column)

    def comment_as_header(self) -> tuple[str, ...]:
        """Return the cells of the last comment above where there are as many as in a row, as np.savetxt writes them."""
        if not self.comments:
            return ()
        cells = next(iter(_records(self.comments[-1], self.mark, self.path, 0)), (0, ()))[1]
        return cells if len(cells) == len(self.rows[0]) > 1 else ()


class _Text(NamedTuple):
    text: str
    encoding: str
    comments: tuple[str, ...]
    skipped: int


def read_sheet(path: str | Path, header: Sequence[str] = ()) -> Sheet:
    """Read the cells of a text file.

    Args:
        path: A table: separated by commas, semicolons, tabs or blanks; in UTF-8, UTF-16, UTF-32 or Latin-1.
        header: Names that the first row should hold; a separator that gives them is preferred.

    Raises:
        InputError: The file is missing, empty, too large, no text, or its quotes do not match.
    """
    path = require_file(path, TEXT, kinds=())
    source = _read_text(path)
    mark = _find_mark(source, path, header)
    found = list(_records(source.text, mark, path, source.skipped))
    if not any(map(any, (cells for _, cells in found))):
        raise InputError(path, "a table", "only blank lines" if not source.comments else "only comments")
    rows = [cells for _, cells in found]
    if len(rows) > 1 and all(len(cells) > 1 and not cells[-1] for cells in rows):
        rows = [cells[:-1] for cells in rows]  # a separator at the end of every line
    lines = tuple(line for line, _ in found)
    return Sheet(path, tuple(rows), lines, source.comments, mark, _find_decimal(rows), source.encoding)


def is_missing(cell: str) -> bool:
    """Say whether a cell stands for a value that was not measured."""
    return cell.lower() in MISSING


def _read_text(path: Path) -> _Text:
    if path.stat().st_size > LARGEST:
        raise InputError(path, f"a table of at most {LARGEST:,} bytes", f"{path.stat().st_size:,}", "check the path")
    text, encoding = _decode(path.read_bytes(), path)
    lines, skipped, comments = text.splitlines(keepends=True), 0, []
    for line in lines:
        if line.strip() and not line.lstrip().startswith(_COMMENT):
            break
        skipped += 1
        comments += [line.strip().lstrip("".join(_COMMENT)).strip()] if line.strip() else []
    return _Text("".join(lines[skipped:]), encoding, tuple(comments), skipped)


def _decode(content: bytes, path: Path) -> tuple[str, str]:
    codecs = [_BYTE_ORDER_MARKS[mark] for mark in _BYTE_ORDER_MARKS if content.startswith(mark)][:1]
    if not codecs and content.count(b"\0") > len(content) / 4:
        # Letters of the West have a zero byte in UTF-16: the second, or the first.
        codecs = [("utf-16-le" if content[1::2].count(b"\0") > content[::2].count(b"\0") else "utf-16-be", "UTF-16")]
    for codec, name in codecs or [("utf-8", "UTF-8"), ("cp1252", "Latin-1 (Windows-1252)")]:
        try:
            text = content.decode(codec)
        except UnicodeDecodeError:
            continue
        if not re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text):
            return text, name
    raise InputError(path, TEXT, "something that is not text", "check the path")


def _records(text: str, mark: str, path: Path, skipped: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the line and the cells of every row; a line without a separator and a word is none."""
    if mark == " ":
        text = "\n".join(" ".join(line.split()) for line in text.splitlines())
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True, skipinitialspace=True)
    try:
        for cells in reader:
            cells = tuple(cell.strip() for cell in cells)
            if any(cells) or len(cells) > 1:
                yield skipped + reader.line_num, cells
    except csv.Error as error:
        where = f"{path} line {skipped + reader.line_num}"
        raise InputError(where, "a CSV row", error, "check the quotes") from error


def _find_mark(source: _Text, path: Path, header: Sequence[str]) -> str:
    """Return the separator that cuts all rows alike, holds the header's names and leaves most numbers."""
    best, best_score, tried = ",", None, {}
    for place, mark in enumerate(MARKS):
        try:
            records = _records(source.text, mark, path, source.skipped)
            rows = [cells for _, cells in itertools.islice(records, LOOKED_AT) if any(cells)]
        except InputError:
            continue
        if not rows:
            continue
        tried[mark] = rows
        numbers = _count_numbers(rows, mark)
        if numbers is not None:
            score = (bool(header) and set(header) <= set(rows[0]), numbers, -place)
            if best_score is None or score > best_score:
                best, best_score = mark, score
    if best_score is not None:
        return best
    # Rows of different lengths, to be told with the separator that the header shows, or their numbers; or one column.
    widths = {mark: len(rows[0]) for mark, rows in tried.items() if mark != " "}
    if max(widths.values(), default=1) > 1:
        return max(widths, key=lambda mark: (bool(header) and set(header) <= set(tried[mark][0]), widths[mark]))
    for mark, rows in tried.items():
        if max(map(len, rows)) > 1 and all(_is_any_number(cell) for row in rows for cell in row):
            return mark
    return ","


def _count_numbers(rows: list[tuple[str, ...]], mark: str) -> int | None:
    """Return how many cells below the first row are numbers; None where the rows are not cut alike into several."""
    body = rows[1:] or rows
    width = len(body[0])
    if width < 2 or any(len(row) != width for row in body):
        return None
    columns = [[_is_any_number(cell) or is_missing(cell) for cell in column] for column in zip(*body, strict=True)]
    names_rows = len(rows[0]) == width - 1 > 1 and all(map(all, columns[1:]))  # R names rows without a header for them
    if len(rows[0]) != width and not names_rows:
        return None
    if mark == " " and not any(map(all, columns)):
        return None  # words of a sentence, or of names
    return sum(map(sum, columns))


def _is_any_number(cell: str) -> bool:
    return bool(_POINT.fullmatch(cell) or _COMMA.fullmatch(cell))


def _find_decimal(rows: Sequence[Sequence[str]]) -> str:
    """Return "," where numbers are written with decimal commas and none with a point.

    1,234 alone may be 1234 or 1.234: that decides nothing, and such a cell is then no number.
    """
    commas = [cell for row in rows for cell in row if _COMMA.fullmatch(cell)]
    if not commas or all(_THOUSANDS.fullmatch(cell) for cell in commas):
        return "."
    points = any("." in cell and _POINT.fullmatch(cell) for row in rows for cell in row)
    return "." if points else ","
