"""Records by key in a file that only grows: what a killed run has paid for is never lost, nor paid for again.

A line is {"key": ..., "record": ...}. It is on the disk before `append` returns; what a kill leaves of a last line is
cut off by the next start.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxmed.errors import InputError
from jaxmed.files import WRITE_ADVICE, make_folder


def read_lines(path: Path) -> dict[str, Any]:
    """Return the records of a file by key; none where there is no file.

    Raises:
        InputError: A line other than the last one is damaged.
    """
    if not path.exists():
        return {}
    found: dict[str, Any] = {}
    *lines, _ = path.read_bytes().split(b"\n")  # after the last line there is nothing, or what a kill has torn
    for number, line in enumerate(lines, 1):
        try:
            one = json.loads(line)
            found[one["key"]] = one["record"]
        except (ValueError, KeyError, TypeError) as error:
            advice = "delete that line: its question is asked again"
            raise InputError(f"{path} line {number}", "a key and a record in JSON", "something else", advice) from error
    return found


@contextlib.contextmanager
def append_lines(path: Path) -> Iterator[Callable[[str, Any], None]]:
    """Yield a function that adds a key and its record to a file, and returns when they are on the disk.

    Raises:
        InputError: The place cannot be written or is full.
    """
    make_folder(path.parent)
    try:
        with path.open("ab+") as file:
            file.seek(0)
            whole = file.read()
            file.truncate(whole.rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)

            def append(key: str, record: Any) -> None:
                file.write(json.dumps({"key": key, "record": record}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())

            yield append
    except OSError as error:
        if error.errno in WRITE_ADVICE and error.filename in (None, str(path)):
            expected, advice = WRITE_ADVICE[error.errno]
            raise InputError(path, expected, error.strerror, advice) from error
        raise
