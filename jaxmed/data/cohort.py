"""Whose each record of a manifest is, and in which split: one rule for every system.

Records belong together where they have the same subject or show the same file, however its path is written: `a.nii` and
`./a.nii`, a link, a hard link, an absolute path, a folder and a file inside it. What belongs together is drawn into one
split, and refused where a manifest puts it into two. An empty cell under "subject" says nothing: that record is a
subject of its own, and not one with all the others whose cell is empty.
"""

import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

from jaxmed.data.splits import SPLITS, split_subjects
from jaxmed.errors import InputError
from jaxmed.io.sheets import is_missing
from jaxmed.io.tables import Table, require_disjoint_subjects, resolve_path


def subjects_of(table: Table, column: str = "path") -> list[str]:
    """Return whose each record is: its subject, or that of a record of the same file, or else the file.

    Args:
        table: With the column `column`, and optionally subject.
        column: Of the files.
    """
    groups = groups_of(table, column)
    return [name or group for name, group in zip(_stated_subjects(table), groups, strict=True)]


def groups_of(table: Table, column: str = "path") -> list[str]:
    """Return one name for all records that belong together; the order of the rows plays no part.

    Args:
        table: With the column `column`, and optionally subject.
        column: Of the files.
    """
    cells = table.column(column)
    subjects = _stated_subjects(table)
    roots = _join(
        list(range(len(cells))),
        file_keys(resolve_path(cell, table.path.parent) for cell in cells),
        [f"subject {name}" if name else f"row {row}" for row, name in enumerate(subjects)],
    )
    named, filed = _smallest(roots, subjects), _smallest(roots, cells)
    return [named.get(root) or filed[root] for root in roots]


def groups_of_files(paths: Sequence[Path]) -> list[str]:
    """Return one name for all paths that lead to the same file."""
    keys = file_keys(paths)
    names = _smallest(keys, [str(path) for path in paths])
    return [names[key] for key in keys]


def file_keys(paths: Iterable[Path]) -> list[str]:
    """Return a key for each path, equal where two lead to the same file, or one into the folder of another."""
    places = [os.path.realpath(path) for path in paths]
    known = set(places)
    # The outermost folder that is itself listed stands for what lies inside it.
    outer = [next((str(p) for p in reversed(Path(place).parents) if str(p) in known), place) for place in places]
    return [_identity(place) for place in outer]


def stated_splits(table: Table, names: Sequence[str] = SPLITS, column: str = "path") -> list[str] | None:
    """Return the table's own column "split", checked; None where it has none.

    Args:
        table: The manifest.
        names: Allowed words.
        column: Of the files.

    Raises:
        InputError: A split has another name, or the same subject or file stands in two splits.
    """
    if "split" not in table.columns:
        return None
    splits = table.column("split")
    for split, line in zip(splits, table.lines, strict=True):
        if split not in names:
            raise table.wrong(line, f"one of {', '.join(names)} under 'split'", f"'{split}'")
    if "subject" in table.columns:
        require_disjoint_subjects(table)
    cells = table.column(column)
    told = [f"'{cell}' (line {line})" for cell, line in zip(cells, table.lines, strict=True)]
    require_files_apart(table.path, [resolve_path(cell, table.path.parent) for cell in cells], splits, told)
    return splits


def require_files_apart(
    where: object, paths: Sequence[Path], splits: Sequence[str], told: Sequence[str] | None = None
) -> None:
    """Refuse records of one file in two splits.

    Args:
        where: The table, for messages.
        paths: File of each record.
        splits: Split of each record.
        told: What to call each record; its path where None.

    Raises:
        InputError: There are such.
    """
    told = [f"'{path}'" for path in paths] if told is None else told
    first: dict[str, int] = {}
    for row, key in enumerate(file_keys(paths)):
        other = first.setdefault(key, row)
        if splits[other] != splits[row]:
            found = " and ".join(f"{told[place]} in {splits[place]}" for place in (other, row))
            advice = "keep all records of a scan in one split"
            raise InputError(where, "every file in one split", f"{found}, the same scan", advice)


def split_unlabelled(table: Table, share: float, seed: int) -> list[str]:
    """Return "train", "validation" or "test" per row: the table's own column "split", or a draw of subjects.

    Args:
        table: With the column path, and optionally subject and split.
        share: Of the subjects to draw for validation; at least one where there are two or more, none at 0.
        seed: Of the draw.

    Raises:
        InputError: A split has another name, or the same subject or file stands in two splits.
    """
    return stated_splits(table) or hold_out(groups_of(table), share, seed)


def hold_out(subjects: Sequence[str], share: float, seed: int) -> list[str]:
    """Return "train" or "validation" per record: a draw of whole subjects, all "train" where there is but one."""
    if not share or len(set(subjects)) < 2:
        return ["train"] * len(subjects)
    return split_subjects(subjects, (1 - share, share, 0.0), seed)


def subject_notes(table: Table) -> list[str]:
    """Say what a table does not say about subjects: who stands in two splits then, nobody can see."""
    if "subject" not in table.columns:
        return ["Without a column 'subject' every scan counts as a subject of its own."]
    empty = _stated_subjects(table).count("")
    if not empty:
        return []
    return [f"{empty:,} of {len(table):,} records have no subject: each of these counts as a subject of its own."]


def _stated_subjects(table: Table) -> list[str]:
    """Return the cells under "subject", empty where nothing is said."""
    if "subject" not in table.columns:
        return [""] * len(table)
    return ["" if is_missing(cell) else cell for cell in table.column("subject")]


def _identity(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:  # not there: the stage will say so
        return path
    return f"{status.st_dev}:{status.st_ino}"  # a hard link has another path


def _smallest(keys: Iterable[Hashable], words: Sequence[str]) -> dict[Hashable, str]:
    """Return the first word in the alphabet that stands beside each key; an empty one only where there is no other."""
    found: dict[Hashable, str] = {}
    for key, word in zip(keys, words, strict=True):
        found[key] = min(filter(None, (found.get(key), word)), default="")
    return found


def _join(roots: list[int], *columns: Sequence[str]) -> list[int]:
    """Return, per row, the first row that it is joined with by equal keys in any of some columns."""

    def root_of(row: int) -> int:
        while roots[row] != row:
            roots[row] = roots[roots[row]]
            row = roots[row]
        return row

    for column in columns:
        first: dict[str, int] = {}
        for row, key in enumerate(column):
            one, other = sorted((root_of(first.setdefault(key, row)), root_of(row)))
            roots[other] = one
    return [root_of(row) for row in range(len(roots))]
