"""Work through files one after the other: what is done is not done again, and what fails does not stop the others."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from jaxmed.config import read_record
from jaxmed.errors import InputError
from jaxmed.io.tables import write_table
from jaxmed.train.log import Log

FAILED_COLUMNS = ("path", "id", "reason")


@runtime_checkable
class File(Protocol):
    """What is worked on.

    Attributes:
        name: Of its results.
        path: The file.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def path(self) -> Path: ...  # noqa: D102


AnyFile = TypeVar("AnyFile", bound=File)
Tell = Callable[[str], None]


class Worked(NamedTuple):
    """What came of the files.

    Attributes:
        rows: Records of those that are done, in the order of the files.
        failed: path, id and reason of the others.
    """

    rows: list[dict[str, Any]]
    failed: list[dict[str, str]]


def each_file(
    files: Sequence[AnyFile],
    work: Callable[[int, AnyFile, Tell], dict[str, Any]],
    outputs: Path,
    log: Log,
    label: str,
    unit: str,
    seen: Callable[[dict[str, Any]], dict[str, float]],
) -> Worked:
    """Work on every file, beside a progress bar.

    Args:
        files: Named; no two alike.
        work: From number and file to its record, which it writes to outputs/NAME.json when all else is written. The
            third argument takes a line to show meanwhile.
        outputs: Of the run.
        log: Gets what fails.
        label: Of the progress bar: "Refining".
        unit: Of what is counted: "scans".
        seen: Figures of a record, for the log.

    Raises:
        InputError: There is one file only, and it is broken: that is a mistake of the user, not a failure among many.
    """
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []

    def fail(file: File, reason: str) -> None:
        failed.append(dict(zip(FAILED_COLUMNS, (str(file.path), file.name, reason), strict=True)))
        log.say(f"Failed: {reason}")

    with log.progress(label, len(files), unit) as update:
        for number, file in enumerate(files):
            done = outputs / f"{file.name}.json"

            def tell(text: str, number: int = number) -> None:
                update(number, text)

            try:
                rows.append(read_record(done) if done.exists() else work(number, file, tell))
                log.metrics(number, seen(rows[-1]))
            except InputError as error:
                if len(files) == 1:
                    raise
                fail(file, str(error))
            except MemoryError as error:
                fail(file, f"{file.path}: not enough memory {error}".rstrip())
            update(number + 1)
    return Worked(rows, failed)


def write_failed(outputs: Path, failed: Sequence[dict[str, str]]) -> None:
    """Write failed.csv where something failed."""
    if failed:
        write_table(outputs / "failed.csv", FAILED_COLUMNS, failed)
