"""The files that a configuration names: their sizes and times, and which have changed since a run began.

A run of the same configuration on other files is another run. Every path of the configuration counts, and NAME=CSV
too: a file; the files that the cells of a table name; what lies in a folder, of an older run its outputs alone. What
a run writes itself does not count: its own folder, that of the run around it, and caches.
"""

import contextlib
import csv
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from jaxmed.errors import InputError
from jaxmed.files import read_record, walk_files
from jaxmed.io.sheets import read_sheet

# Per folder, per file: size in bytes and time of the last change in ns.
Inputs: TypeAlias = dict[str, dict[str, list[int]]]
TABLES = (".csv", ".tsv")


def find_inputs(config: object, run: Path) -> Inputs:
    """Look at every file that a configuration names.

    Args:
        config: A stage's configuration.
        run: Its folder, which need not exist.
    """
    own = [run, *(parent for parent in run.parents if _is_around(parent, run))]
    found: Inputs = {}
    for place in _named(config):
        for path in _files(place):
            if not any(path.is_relative_to(folder) for folder in own):
                try:
                    status = path.stat()
                except OSError:  # the stage will say what is wrong with it
                    continue
                found.setdefault(str(path.parent), {})[path.name] = [status.st_size, status.st_mtime_ns]
    return found


def changed_inputs(run: Path, inputs: Inputs) -> list[str]:
    """Say what has changed since a run began; files that it failed on may be repaired.

    Args:
        run: Its folder.
        inputs: As they are now.
    """
    if not (run / "inputs.json").is_file():
        return []
    then, now = _by_path(read_record(run / "inputs.json")), _by_path(inputs)
    failed = _failed(run / "outputs" / "failed.csv")
    words = []
    for path in sorted({*then, *now}):
        real = os.path.realpath(path)
        if then.get(path) != now.get(path) and failed.isdisjoint((real, *map(str, Path(real).parents))):
            what = "changed" if path in then and path in now else "gone" if path in then else "new"
            words.append(f"{path} {what}")
    return words


def _is_around(parent: Path, run: Path) -> bool:
    return run.relative_to(parent).parts[0] in ("inputs", "checkpoints") and (parent / "config.json").is_file()


def _named(value: object, name: str = "") -> Iterator[Path]:
    if name == "cache":
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _named(getattr(value, field.name), field.name)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _named(item)
    elif isinstance(value, Path):
        yield value.absolute()
    elif isinstance(value, str) and "=" in value and os.path.exists(value.partition("=")[2]):
        yield Path(value.partition("=")[2]).absolute()


def _files(place: Path) -> Iterator[Path]:
    """Yield a file and what it names, or the files of a folder."""
    if place.is_dir():
        if (place / "config.json").is_file() and (place / "outputs").is_dir():
            place = place / "outputs"
        with contextlib.suppress(InputError):  # the stage will say what is wrong with it
            yield from walk_files(place)
    elif place.is_file():
        yield place
        if place.suffix.lower() in TABLES:
            for path in _cells(place):
                yield from _files(path) if path.suffix.lower() not in TABLES else [path]


def _cells(table: Path) -> Iterator[Path]:
    """Yield the files and folders that cells of a table name."""
    try:
        sheet = read_sheet(table)
    except InputError:  # its reader will say what is wrong with it
        return
    for row in sheet.rows:
        for cell in row:
            if ("." in cell or "/" in cell) and not sheet.is_number(cell):
                path = table.parent / os.path.expanduser(cell)
                if os.path.exists(path) and path != table.parent:
                    yield Path(os.path.normpath(path))


def _by_path(inputs: Inputs) -> dict[str, list[int]]:
    return {os.path.join(folder, name): entry for folder, names in inputs.items() for name, entry in names.items()}


def _failed(path: Path) -> set[str]:
    """Return the records that failed (folders among them), and the files that the reasons name, such as a mask."""
    if not path.is_file():
        return set()
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("path")]
    told = [(row.get("reason") or "").partition(": expected ")[0] for row in rows]
    return {os.path.realpath(name) for name in (*(row["path"] for row in rows), *filter(os.path.isabs, told))}
