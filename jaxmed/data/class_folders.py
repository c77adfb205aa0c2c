"""A folder of classes as a labelled table: root/SPLIT/CLASS/picture, or root/CLASS/picture.

The names of the class folders are the labels, in sorted order; pictures may lie in folders below them. Splits are
called train, test, and val, valid or validation. Without split folders the split is drawn, as for a table that has no
column of it.

A picture's subject is its name without suffix, as long as no other picture has that name (names such as 1.png say
nothing); else its whole path. A pattern, or a table of the pictures, tells subjects who have several.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxmed.data.splits import SPLITS
from jaxmed.errors import InputError
from jaxmed.files import walk_files
from jaxmed.io.images import PICTURE_SUFFIXES
from jaxmed.io.tables import Table, make_table, read_table

SPLIT_FOLDERS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation",
                 "test": "test"}  # fmt: skip
ALONE = (
    "Every picture counts as a subject of its own. Where subjects have several, tell them by a pattern of their names "
    "(--data.subject-pattern) or a table (--data.subjects)."
)


class Subjects(NamedTuple):
    """How the subject of a picture is told.

    Attributes:
        pattern: Regular expression that is looked for in the picture's name without suffix; its first group is the
            subject, or the whole of what it finds where it has none. Empty for the name itself.
        table: CSV with the columns path (of the picture below the folder of classes, or its bare name) and, where it
            tells them, subject; its further columns, such as age and sex, become those of the pictures.
    """

    pattern: str = ""
    table: Path | None = None


class _Picture(NamedTuple):
    """A picture's path, its place below the root, and what the folders say of it."""

    path: Path
    place: str
    label: str
    split: str


def read_class_folders(
    root: Path, subjects: Subjects = Subjects(), *, is_whole: bool = True
) -> tuple[Table, list[str]]:
    """Read a folder of classes as a table.

    Args:
        root: Holds train, val and, where there is one, test, each with a folder per class; or the class folders.
        subjects: How the subject of a picture is told.
        is_whole: Whether train and validation, and every class in every split, have to be there; a set that is only
            scored may lack them.

    Returns:
        A table with the columns path, label, subject, split where there are split folders, and those of the subjects'
        table; and notes on what a user should know.

    Raises:
        InputError: A split or a class is missing in part, a class folder is empty, there is no picture, or something
            else lies among them; the subjects are not told for all.
    """
    parts = _parts(root, is_whole)
    found = [picture for split, folder in parts.items() for picture in _read_split(root, folder, split)]
    if not found:
        raise InputError(root, f"folders of pictures ({', '.join(PICTURE_SUFFIXES)})", "no picture", "check the path")
    if is_whole:
        _require_classes(root, parts, found)
    names = _subject_names(found, subjects.pattern)
    # Cells are relative to the folder that holds the root, as those of a table are to its own.
    rows = [
        {"path": f"{root.name}/{one.place}", "label": one.label, "subject": name}
        | ({"split": one.split} if one.split else {})
        for one, name in zip(found, names, strict=True)
    ]
    if subjects.table is not None:
        rows = _joined(rows, found, subjects.table)
    notes = _copies(found)
    if is_whole and parts.keys() == {""}:
        notes.append(f"{root} has no folders train and val: subjects are drawn into splits.")
    if is_whole and len({row["subject"] for row in rows}) == len(rows):
        notes.append(ALONE)
    return make_table(root, list(rows[0]), rows), notes


def _parts(root: Path, is_whole: bool) -> dict[str, Path]:
    """Return the folder of each split; the root itself under "" where it holds the classes."""
    folders = _folders(root)
    splits = {folder.name: folder for folder in folders if folder.name.lower() in SPLIT_FOLDERS}
    if not splits:
        return {"": root}
    if others := [folder.name for folder in folders if folder.name not in splits]:
        advice = "take it out, or give the splits one folder of their own"
        raise InputError(root, "folders train, val and test alone", f"'{others[0]}' beside them", advice)
    parts: dict[str, Path] = {}
    for name, folder in splits.items():
        split = SPLIT_FOLDERS[name.lower()]
        if split in parts:
            raise InputError(root, f"one folder for {split}", f"'{parts[split].name}' and '{name}'", "merge them")
        parts[split] = folder
    for split in ("train", "validation") if is_whole else ():
        if split not in parts:
            found = f"only {', '.join(sorted(splits))}"
            raise InputError(root, f"a folder {'val' if split == 'validation' else split}", found, "add it")
    return {split: parts[split] for split in SPLITS if split in parts}


def _folders(place: Path) -> list[Path]:
    """Return the folders in a folder by name; hidden ones are passed over."""
    try:
        found = [path for path in place.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX"))]
    except OSError as error:
        raise InputError(place, "a folder that can be read", error.strerror, "change its permissions") from error
    return sorted(found, key=lambda path: path.name)


def _read_split(root: Path, folder: Path, split: str) -> list[_Picture]:
    loose = [path for path in folder.iterdir() if path.is_file() and path.name.lower().endswith(PICTURE_SUFFIXES)]
    if loose:
        raise InputError(folder, "a folder per class", f"the picture '{loose[0].name}'", "move it into its class")
    found = []
    for label in _folders(folder):
        # Class by class: a link to a picture of another class or split is a picture here too, and is told as such.
        for path in walk_files(label):
            if not path.name.lower().endswith(PICTURE_SUFFIXES):
                expected = f"pictures alone ({', '.join(PICTURE_SUFFIXES)})"
                raise InputError(label, expected, f"'{path.relative_to(label)}'", "take it out")
            found.append(_Picture(path, path.relative_to(root).as_posix(), label.name, split))
    return found


def _require_classes(root: Path, parts: Mapping[str, Path], found: Sequence[_Picture]) -> None:
    names = sorted({folder.name for part in parts.values() for folder in _folders(part)})
    present = {(one.split, one.label) for one in found}
    for split, part in parts.items():
        for name in names:
            if (split, name) not in present:
                what = "an empty folder" if (part / name).is_dir() else "no such folder"
                advice = "fill it, take the class out everywhere, or give the pictures as a CSV table"
                raise InputError(part / name, f"pictures of the class '{name}'", what, advice)
    if len(names) < 2:
        raise InputError(root, "two or more class folders", f"only '{names[0]}'")


def _subject_names(found: Sequence[_Picture], pattern: str) -> list[str]:
    """Return whose picture each is.

    Raises:
        InputError: The pattern is none, or a name does not hold it.
    """
    stems = [one.path.stem for one in found]
    if not pattern:
        counts = Counter(stems)
        return [
            stem if counts[stem] == 1 else one.place.removesuffix(one.path.suffix)
            for stem, one in zip(stems, found, strict=True)
        ]
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise InputError("data.subject_pattern", "a regular expression", f"'{pattern}' ({error})") from error
    names = []
    for stem, one in zip(stems, found, strict=True):
        match = wanted.search(stem)
        name = match.group(1 if wanted.groups else 0) if match else None
        if not name:
            raise InputError(one.path, f"a name that holds the pattern '{pattern}'", f"'{stem}'", "change the pattern")
        names.append(name)
    return names


def _joined(rows: Sequence[dict[str, str]], found: Sequence[_Picture], path: Path) -> list[dict[str, str]]:
    """Return rows with the cells of a table of the pictures.

    Raises:
        InputError: A picture is not in it, a row is of no one picture, or a column has the name of one of ours.
    """
    table = read_table(path, required=("path",), optional=("subject",))
    if clash := [name for name in ("label", "split") if name in table.columns]:
        advice = "folders tell it: take the column out"
        raise InputError(path, "a table of subjects", f"a column '{clash[0]}'", advice)
    bare = Counter(one.path.name for one in found)
    keys = {one.place: place for place, one in enumerate(found)}
    keys |= {one.path.name: place for place, one in enumerate(found) if bare[one.path.name] == 1}
    cells: dict[int, dict[str, str]] = {}
    for row, line in zip(table.rows, table.lines, strict=True):
        name = Path(row["path"]).as_posix()
        if bare[name] > 1:
            raise table.wrong(line, "one picture of this name", f"{bare[name]} '{name}'", "write SPLIT/CLASS/NAME")
        if (place := keys.get(name)) is not None:
            cells[place] = {column: cell for column, cell in row.items() if column != "path"}
    if lost := [one for place, one in enumerate(found) if place not in cells]:
        expected = f"a row for each of the {len(found):,} pictures"
        raise InputError(path, expected, f"none for {len(lost):,}, such as '{lost[0].place}'", "add them")
    return [row | cells[place] for place, row in enumerate(rows)]


def _copies(found: Sequence[_Picture]) -> list[str]:
    """Say which pictures are, byte for byte, in two splits."""
    sizes: dict[int, list[_Picture]] = {}
    for one in found:
        sizes.setdefault(one.path.stat().st_size, []).append(one)
    pairs = []
    for same in sizes.values():  # files of different length need not be read
        if len({one.split for one in same}) > 1:
            first: dict[bytes, _Picture] = {}
            for one in same:
                other = first.setdefault(hashlib.sha256(one.path.read_bytes()).digest(), one)
                if other.split != one.split:
                    pairs.append((other, one))
    if not pairs:
        return []
    (one, other), number = pairs[0], len(pairs)
    told = f"{one.place} and {other.place}"
    return [f"{number:,} picture{'s are' * (number > 1) or ' is'} byte for byte in two splits, such as {told}: scores "
            "on these are too good."]  # fmt: skip
