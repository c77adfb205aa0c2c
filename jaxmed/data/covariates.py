"""What is known of subjects beside their scans, such as age and sex: columns of a table as numbers; on the host."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32

from jaxmed.errors import InputError
from jaxmed.io.sheets import is_missing
from jaxmed.io.tables import Table, require_columns

Levels = Mapping[str, tuple[str, str] | None]
"""Of each covariate the two words that are 0 and 1; None where it is a number."""


def find_levels(table: Table, names: Sequence[str]) -> Levels:
    """Decide what the cells of covariates mean: numbers, or two words, of which the second in the alphabet is 1.

    Raises:
        InputError: A column is not there, has no cell, or holds one word or more than two.
    """
    require_columns(table, names)
    levels: dict[str, tuple[str, str] | None] = {}
    for name in names:
        cells = {cell for cell in table.column(name) if not is_missing(cell)}
        if cells and all(_number(table, cell) is not None for cell in cells):
            levels[name] = None
            continue
        words = sorted(cells)
        if len(words) != 2:
            found = f"{len(words)}: {', '.join(words[:4])}" if words else "empty cells"
            raise InputError(table.path, f"numbers, or two words, under '{name}'", found, "leave the covariate out")
        levels[name] = (words[0], words[1])
    return levels


def read_covariates(table: Table, levels: Levels) -> Float32[np.ndarray, "record covariate"]:
    """Return covariates as numbers; NaN where a cell is empty, or the table lacks the column.

    Raises:
        InputError: A cell is no number, or another word; its line is named.
    """
    columns = []
    for name, words in levels.items():
        column = []
        for row, line in zip(table.rows, table.lines, strict=True):
            cell = row.get(name, "")
            value = math.nan
            if not is_missing(cell):
                found = _number(table, cell) if words is None else {words[0]: 0.0, words[1]: 1.0}.get(cell)
                if found is None:
                    expected = "a number" if words is None else f"{words[0]} or {words[1]}"
                    raise table.wrong(line, f"{expected} under '{name}'", f"'{cell}'")
                value = found
            column.append(value)
        columns.append(column)
    return np.array(columns, np.float32).reshape(len(levels), len(table)).T


def _number(table: Table, cell: str) -> float | None:
    try:
        value = table.sheet.number(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
