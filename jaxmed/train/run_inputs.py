"""The files that a configuration names: their sizes, times and digests, and which have changed since a run began.

A run of the same configuration on other files is another run. Every path of the configuration counts, and NAME=CSV
too: a file; the files that the cells of a table name; what lies in a folder, of an older run its outputs alone. What
a run writes itself does not count: its own folder, that of the run around it, and caches.

Sizes and times are looked at on every start. Times change where data are copied anew, to the disk of another node say;
so the first start keeps a digest of every file, which is compared only where the size is the same and the time is not.
The smallest files are digested whole, 2 GB in all, tables among them; of each other file its beginning, middle and end.
An edit shows there in whatever is compressed or ends in a checksum (.nii.gz, .npz, .png). As it might not elsewhere,
such a digest counts only where no file of the folder kept its date, as after a copy of the folder, and the line that
tells of new dates says what was compared.
"""

import contextlib
import csv
import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from jaxmed.errors import InputError
from jaxmed.files import read_record, walk_files
from jaxmed.io.sheets import read_sheet

# Per folder, per file: size in bytes, time of the last change in ns and, once a run has begun, a digest.
Inputs: TypeAlias = dict[str, dict[str, list[Any]]]
TABLES = (".csv", ".tsv")
WHOLE_BYTES = 2 * 10**9
PART_BYTES = 2**16
# Reading waits for disks and networks more than it computes.
THREADS = 16


class Comparison(NamedTuple):
    """Input files as they are, against those that a run began with.

    Attributes:
        changed: What has changed, in words, one file each.
        redated: Files whose dates alone are new.
        in_part: Those of them that were not compared whole.
    """

    changed: list[str]
    redated: int
    in_part: int

    @property
    def note(self) -> str:
        """The line that tells of new dates; empty where there are none."""
        if not self.redated:
            return ""
        part = f"; {self.in_part:,} of them were compared at beginning, middle and end" if self.in_part else ""
        return f"{self.redated:,} input file(s) have new dates and the contents that this run began with{part}."


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


def compare_inputs(run: Path, inputs: Inputs) -> Comparison:
    """Say what has changed since a run began; files that it failed on may be repaired.

    Args:
        run: Its folder.
        inputs: As they are now; those that have not changed get the digests that they had.
    """
    if not (run / "inputs.json").is_file():
        return Comparison([], 0, 0)
    then, now = _by_path(read_record(run / "inputs.json")), _by_path(inputs)
    failed = _failed(run / "outputs" / "failed.csv")
    same = {path for path in {*then} & {*now} if then[path][:2] == now[path][:2]}
    dated = [path for path in {*then} & {*now} if path not in same and then[path][0] == now[path][0] and then[path][2:]]
    digests = _digests((path, _is_whole(then[path][2])) for path in dated)
    kept = {os.path.dirname(path) for path in same}
    redated = {
        path for path in dated
        if digests[path] == then[path][2] and (_is_whole(digests[path]) or os.path.dirname(path) not in kept)
    }  # fmt: skip
    for path in same | redated:
        now[path][2:] = then[path][2:]
    words = []
    for path in sorted({*then, *now} - same - redated):
        real = os.path.realpath(path)
        if failed.isdisjoint((real, *map(str, Path(real).parents))):
            what = "changed" if path in then and path in now else "gone" if path in then else "new"
            words.append(f"{path} {what}")
    return Comparison(words, len(redated), sum(not _is_whole(then[path][2]) for path in redated))


def add_digests(inputs: Inputs) -> None:
    """Give every file that has no digest one, in place."""
    entries = {path: entry for path, entry in _by_path(inputs).items() if len(entry) == 2}
    total, wanted = 0, []
    for path, (size, _) in sorted(entries.items(), key=lambda item: item[1][0]):
        total += size
        wanted.append((path, total <= WHOLE_BYTES or size <= 3 * PART_BYTES))
    for path, digest in _digests(wanted).items():
        entries[path] += [digest] if digest else []


def _digests(files: Iterable[tuple[str, bool]]) -> dict[str, str]:
    """Return a digest of each file, whole or of parts; an empty one where it cannot be read."""
    files = list(files)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip((path for path, _ in files), pool.map(lambda file: _digest(*file), files), strict=True))


def _digest(path: str, is_whole: bool) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            if is_whole:
                while block := file.read(2**20):
                    digest.update(block)
            else:
                size = os.fstat(file.fileno()).st_size
                for start in (0, size // 2, max(size - PART_BYTES, 0)):
                    file.seek(start)
                    digest.update(file.read(PART_BYTES))
    except OSError:  # the stage will say what is wrong with it
        return ""
    return f"{'whole' if is_whole else 'parts'}:{digest.hexdigest()}"


def _is_whole(digest: str) -> bool:
    return digest.startswith("whole:")


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


def _by_path(inputs: Inputs) -> dict[str, list[Any]]:
    return {os.path.join(folder, name): entry for folder, names in inputs.items() for name, entry in names.items()}


def _failed(path: Path) -> set[str]:
    """Return the records that failed (folders among them), and the files that the reasons name, such as a mask."""
    if not path.is_file():
        return set()
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("path")]
    told = [(row.get("reason") or "").partition(": expected ")[0] for row in rows]
    return {os.path.realpath(name) for name in (*(row["path"] for row in rows), *filter(os.path.isabs, told))}
