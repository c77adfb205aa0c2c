"""Ordered classes, and several classes at once, as labels of 0 and 1 that a multi-label task learns.

Grades 0 to 3 under "grade" become "grade >= 1", "grade >= 2" and "grade >= 3": one output for each threshold, as a
reader of PI-RADS scores asks for them. Words under several columns become "side = left", "zone = inner" and so on: one
output for each word, of two words for the last. A name says how its cells follow from the column, so that a table read
later has the same.

Source: thresholds of ordered classes, Frank and Hall 2001.
"""

import dataclasses
import re
from collections.abc import Sequence

from jaxmed.data.labels import LabelConfig, as_number, is_unlabelled, plain_word, word_order
from jaxmed.errors import InputError
from jaxmed.io.tables import Table, require_columns

NAME = re.compile(r"(.+) (>=|=) (.+)")


def find_indicators(table: Table, config: LabelConfig) -> tuple[str, ...]:
    """Return the names of the labels that the classes of a table become.

    Args:
        table: Its cells are the classes.
        config: Of kind "ordinal" (numbers in one column, or several) or "fields" (words or numbers in several columns).

    Raises:
        InputError: A column has one class only, or, where they are ordered, a word.
    """
    require_columns(table, config.columns)
    names: list[str] = []
    for column in config.columns:
        cells = [cell for cell in table.column(column) if not is_unlabelled(cell)]
        words = sorted({plain_word(cell) for cell in cells}, key=word_order)
        if len(words) < 2:
            found = f"only '{words[0]}'" if words else "none"
            raise InputError(table.path, f"two or more classes under '{column}'", found)
        if config.kind == "ordinal":
            if word := next((word for word in words if as_number(word) is None), None):
                advice = "write grades as numbers, or take --label.kind fields"
                raise InputError(table.path, f"numbers under '{column}', which have an order", f"'{word}'", advice)
            names += [f"{column} >= {word}" for word in words[1:]]
        else:
            names += [f"{column} = {word}" for word in (words if len(words) > 2 else words[1:])]
    return tuple(names)


def with_indicators(table: Table, names: Sequence[str]) -> Table:
    """Add the columns of such names to a table, 0 or 1 and empty where the class is.

    Raises:
        InputError: A column is missing, or a cell is no number where there is an order.
    """
    require_columns(table, tuple(dict.fromkeys(column_of(name) for name in names)))
    rows = []
    for row, line in zip(table.rows, table.lines, strict=True):
        try:
            rows.append(row | {name: indicate(name, row) for name in names})
        except ValueError as error:
            raise table.wrong(line, "a grade as a number", str(error)) from error
    return dataclasses.replace(table, columns=(*table.columns, *names), rows=tuple(rows))


def known_rows(rows: Sequence[dict[str, str]], names: Sequence[str]) -> list[dict[str, str]]:
    """Return rows of a manifest with the cells of those outputs that are indicators of its columns.

    Raises:
        InputError: A cell is no number where there is an order.
    """
    present = rows[0] if rows else {}
    wanted = [name for name in names if name not in present and column_of(name) in present]
    try:
        return [row | {name: indicate(name, row) for name in wanted} for row in rows]
    except ValueError as error:
        raise InputError("data.manifest", "a grade as a number", str(error)) from error


def column_of(name: str) -> str:
    """Return the column that a name tells of; the name itself where it is no indicator's."""
    match = NAME.fullmatch(name)
    return match[1] if match else name


def indicate(name: str, row: dict[str, str]) -> str:
    """Return the cell of an indicator in a row: 1, 0, or empty where nothing is known.

    Raises:
        ValueError: There is an order, and the class is no number.
    """
    match = NAME.fullmatch(name)
    if match is None:
        return row[name]
    column, sign, word = match.groups()
    cell = row[column]
    if is_unlabelled(cell):
        return ""
    if sign == "=":
        return str(int(plain_word(cell) == word))
    value, least = as_number(cell), as_number(word)
    if value is None or least is None:
        raise ValueError(f"'{cell}' under '{column}'")
    return str(int(value >= least))
