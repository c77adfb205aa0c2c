"""Files as every reader and writer wants them: checked before opening, never half-written."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import stat
import struct
import time
import unicodedata
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.contents import NEVER, START, recognise
from jaxmed.errors import InputError

# The names that `atomic_path` and a check for a writable place use for a moment, and a kill leaves behind.
LEFTOVER = re.compile(r"\.([0-9a-f]{12}|writable)-")

# What a user can cause while writing, and what helps against it.
WRITE_ADVICE = {
    errno.ENOSPC: ("enough space to write", "free some space, or write elsewhere"),
    errno.EDQUOT: ("enough space to write", "free some of your quota, or write elsewhere"),
    errno.EFBIG: ("a file system for large files", "write elsewhere"),
    errno.EROFS: ("a writable place", "choose another output folder"),
    errno.EACCES: ("a writable place", "change its permissions, or choose another output folder"),
    errno.EPERM: ("a writable place", "change its permissions, or choose another output folder"),
    errno.ENOTDIR: ("a folder above the file", "choose another output folder"),
    errno.EEXIST: ("a folder above the file", "choose another output folder"),
    errno.EISDIR: ("a file name", "name a file, not a folder"),
    errno.ENAMETOOLONG: ("a shorter name", "choose a shorter file name"),
    errno.EIO: ("a working device", "check the disk, or write elsewhere"),
}


# What decoders raise on damaged files: many have no error of their own.
DAMAGED = (
    *(OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError),
    *(RuntimeError, SyntaxError, struct.error, zlib.error, zipfile.BadZipFile),
    UserWarning,  # what Pillow says before it fails, where warnings are errors
)
LONGEST_NAME = 120
"""Bytes of a name of results: endings and suffixes follow, and file systems end at 255."""
# Opening these may wait for ever.
SPECIAL = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
# What may be unpacked at any ratio, in bytes; above, at most so many times the size of the packed file. Scans shrink to
# a half or a tenth, and only images of almost nothing, which are small, to a hundredth and less.
FREELY_UNPACKED = 2**31
LARGEST_RATIO = 40


def require_given(path: Path | None, name: str, expected: str = "a file") -> Path:
    """Return a path that a stage cannot do without; `expected` says what it leads to.

    Raises:
        InputError: It was not given.
    """
    if path is None:
        raise InputError(name, expected, "nothing", f"give --{name} FILE, or try --preset smoke")
    return path


def require_file(path: str | Path, what: str, suffixes: Sequence[str] = (), kinds: Sequence[str] | None = None) -> Path:
    """Check that a file can be opened and looks like what is wanted.

    Pipes, sockets and devices are refused, unopened, and so is what stands in for a file that was not fetched: a Git
    LFS pointer, a web page.

    Args:
        path: The file.
        what: What it should be, for the message, such as "a NIfTI file".
        suffixes: Allowed endings in lower case; empty for any.
        kinds: What the first bytes may say (`contents.recognise`); None for anything. Content that is not recognised
            passes: its reader will tell.

    Returns:
        The same path.

    Raises:
        InputError: When it is missing, no regular file, of another suffix or content, empty or not readable.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(path, what, "a folder", "name the file itself")
        if not path.exists():
            raise InputError(path, what, "no such file", "check the path")
        if suffixes and not path.name.lower().endswith(tuple(suffixes)):
            found = f"the suffix '{path.suffix}'"
            raise InputError(path, what, found, f"use one of {', '.join(suffixes)}")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            found = SPECIAL.get(stat.S_IFMT(status.st_mode), "no regular file")
            raise InputError(path, what, found, "write its content to a file, and name that")
        if status.st_size == 0:
            raise InputError(path, what, "an empty file", "copy or make it again")
        with path.open("rb") as file:
            content = recognise(file.read(START))
    except OSError as error:
        raise InputError(path, f"{what} that can be read", _reason(error)) from error
    if content is not None and content.kind in (NEVER if kinds is None else {content.kind} - set(kinds)):
        raise InputError(path, what, content.name, content.advice)
    return path


def require_room(path: str | Path, num_bytes: int, packed: int | None = None) -> None:
    """Refuse what a file claims to hold, before memory is taken for it.

    Args:
        path: The file.
        num_bytes: Size of its content, as its header says.
        packed: Bytes of the compressed content; None where it is stored as it is.

    Raises:
        InputError: It is more than the machine's memory, or grows more than `LARGEST_RATIO` times beyond 2 GiB.
    """
    if packed is not None and num_bytes > max(FREELY_UNPACKED, LARGEST_RATIO * packed):
        limit = f"at most {_size(FREELY_UNPACKED)}, or {LARGEST_RATIO} times the size of the file"
        found = f"{_size(num_bytes)} packed into {_size(packed)}"
        raise InputError(path, f"{limit}, when unpacked", found, "unpack it yourself if it is what it should be")
    memory = _memory()
    if memory is not None and num_bytes > memory:
        expected = f"data that fit into this machine's memory of {_size(memory)}"
        raise InputError(path, expected, _size(num_bytes), "cut it, or use a larger machine")


def _memory() -> int | None:
    """Return the bytes of the machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _size(num_bytes: float) -> str:
    power = min(max(int(num_bytes).bit_length() - 1, 0) // 10, 4)
    return f"{num_bytes / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def expand_home(path: str | Path) -> Path:
    """Replace a leading ~ by the home of a user; a name such as ~$scan.nii, of no user, is left as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def walk_files(folder: str | Path) -> Iterator[Path]:
    """Yield the ordinary files under a folder in the order of their names.

    Hidden files and folders (".DS_Store", the "._" companions of macOS, our own temporary files) and "__MACOSX" are
    passed over, and so are pipes and devices. Links are followed; a file or folder that several names lead to comes
    once, under the name that does without a link where there is one.

    Args:
        folder: The folder; its own name may be hidden.

    Raises:
        InputError: A folder cannot be read, or is a pipe or a device.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        require_file(folder, "a file or a folder")  # says what a pipe or a device is
    linked: list[Path] = []
    seen: set[str] = set()

    def walk(place: str) -> Iterator[Path]:
        real = os.path.realpath(place)
        if real in seen:
            return
        seen.add(real)
        try:
            with os.scandir(place) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(place, "a folder that can be read", _reason(error), "change its permissions") from error
        for entry in ordered:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_symlink():
                linked.append(Path(entry.path))
            elif entry.is_dir():
                yield from walk(entry.path)
            elif entry.is_file() and (real := os.path.realpath(entry.path)) not in seen:
                seen.add(real)
                yield Path(entry.path)

    def everything() -> Iterator[Path]:
        yield from walk(os.fspath(folder))
        while linked:  # after what lies here itself
            path = linked.pop(0)
            if path.is_dir():
                yield from walk(os.fspath(path))
            elif path.is_file() and os.path.realpath(path) not in seen:
                seen.add(os.path.realpath(path))
                yield path

    yield from sorted(everything())


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling that takes the place of `path` when the block ends well.

    The sibling keeps the suffix, so that writers which look at it choose the right format. Missing
    folders above `path` are made. When the block fails, `path` is as it was before.

    Raises:
        InputError: When the place cannot be written or is full.
    """
    path = Path(path)
    make_folder(path.parent)
    if path.is_dir():
        raise InputError(path, "a file name", "a folder", "name a file, not a folder")
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}-{path.name[-200:]}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        # An error about some other file (say, one that the block reads) is not about writing.
        is_ours = error.filename is None or Path(os.fsdecode(error.filename)) in (path, temporary)
        if is_ours and error.errno in WRITE_ADVICE:
            expected, advice = WRITE_ADVICE[error.errno]
            raise InputError(path, expected, _reason(error), advice) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | Path, min_age: float = 0.0) -> None:
    """Delete what killed runs left half-written under temporary names in a folder and those below it.

    Args:
        folder: May be missing.
        min_age: Seconds since a file was last written; where others may be writing, a younger one is left alone.
    """
    latest = time.time() - min_age
    for place, folders, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if LEFTOVER.match(name) and (not min_age or path.stat().st_mtime < latest):
                path.unlink(missing_ok=True)
        for name in [name for name in folders if LEFTOVER.match(name)]:
            folders.remove(name)
            if not min_age:
                shutil.rmtree(Path(place, name))


def make_folder(path: str | Path) -> Path:
    """Make a folder and those above it.

    Raises:
        InputError: When it cannot be made.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        expected, advice = WRITE_ADVICE.get(error.errno or 0, ("a folder to write in", ""))
        raise InputError(path, expected, _reason(error), advice) from error
    return path


def unique_names(
    places: Sequence[str | Path], suffixes: Sequence[str] = (), endings: Sequence[str] = (), taken: Sequence[str] = ()
) -> list[str]:
    """Name the results of a job's files: each by a name of its own, made from where the file lies.

    No two differ in capitals or in the form of an accent alone, since some file systems do not tell these apart. Names
    hold no two underscores in a row and none at an end, so that what is put behind "__" is told from the name.

    Args:
        places: Paths of the files below their folder, such as "s1/T1.nii.gz".
        suffixes: What is left away at the end of a place, in lower case.
        endings: Results of NAME are called NAME itself and NAME_ENDING for each of these: x and x_mask are not both
            names where "mask" is one.
        taken: Names that a run has for files of its own.

    Returns:
        Their names, in the same order. The same places give the same names.
    """
    occupied = {_fold(name) for name in taken}
    names, numbers = [], dict[str, int]()
    for place in places:
        text = str(place)
        suffix = max((s for s in suffixes if text.lower().endswith(s)), key=len, default="")
        stem = _short(_plain_name(text[: len(text) - len(suffix)])) or "scan"
        number = numbers.get(stem, 1)  # of a thousand files called T1 not each tries all that are taken
        while True:
            name = stem if number == 1 else f"{stem}_{number}"
            own = {_fold(one) for one in (name, *(f"{name}_{ending}" for ending in endings))}
            number += 1
            if occupied.isdisjoint(own):
                break
        numbers[stem] = number
        occupied |= own
        names.append(name)
    return names


def _plain_name(text: str) -> str:
    """Keep letters of any script, digits and + - . _ of a text; folders above a file become a part of its name."""
    text = unicodedata.normalize("NFC", text)
    return re.sub(r"_+", "_", re.sub(r"[^\w.+-]+", "_", text)).strip("._-")


def _short(name: str) -> str:
    """Keep the end of a long name, where files of one kind differ."""
    return name.encode()[-LONGEST_NAME:].decode(errors="ignore").strip("._-")


def _fold(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, wholly or not at all; bytes of file names that are no UTF-8 are written as codes."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def write_json(path: str | Path, record: object) -> None:
    """Write a record as indented JSON, wholly or not at all.

    NumPy scalars and arrays become numbers and lists, paths become strings.

    Raises:
        InputError: A number is not finite: JSON has no word for it, and a run that ends with one has diverged.
    """
    try:
        text = json.dumps(record, indent=2, allow_nan=False, default=_plain)
    except ValueError as error:
        advice = "the run has diverged: try a lower rate, or look for extreme values in its input"
        raise InputError(path, "finite numbers", "NaN or Inf", advice) from error
    write_text(path, text + "\n")


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a JSON object, saying what is wrong with a file that is none."""
    path = require_file(path, "a JSON file", kinds=("json",))
    try:
        record = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_unique
        )
    except RecursionError as error:
        raise InputError(path, "a JSON object", "lists or objects nested too deeply") from error
    except ValueError as error:  # not UTF-8, not JSON, or a number that none of Python's holds
        reason = str(error).splitlines()[0].split("; use sys.")[0]
        reason = reason if len(reason) <= 200 else f"{reason[:200]}..."
        raise InputError(path, "a JSON object", f"text that is not JSON ({reason})") from error
    if not isinstance(record, dict):
        raise InputError(path, "a JSON object", f"a {type(record).__name__}")
    return record


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _finite(word: str) -> float:
    value = float(word)
    if math.isinf(value):
        raise ValueError(f"{word[:80]} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} twice")
    return record


def _plain(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _reason(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()
