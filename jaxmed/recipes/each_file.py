"""Work through files one after the other: what is done is not done again, and what fails does not stop the others."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from jaxmed.config import read_record
from jaxmed.errors import InputError
from jaxmed.files import write_json
from jaxmed.io.tables import write_table
from jaxmed.train.log import Log

FAILED_COLUMNS = ("path", "id", "reason")
TABLES = ("summary", "scans", "volumes", "failed")
"""What a run writes of all files together: the results of a file do not have these names."""


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
    """Work on every file, beside a progress bar; those that an earlier start has done are not done again.

    A file is done when its record is in outputs/NAME.json. Those that failed have none, so that the next start of the
    run tries them again.

    Args:
        files: Named, as `files.unique_names` does it.
        work: From number and file to its record, when all else that belongs to it is written. The third argument takes
            a line to show meanwhile.
        outputs: Of the run.
        log: Gets what fails.
        label: Of the progress bar: "Refining".
        unit: Of what is counted: "scans".
        seen: Figures of a record, for the log.

    Raises:
        InputError: There is one file only, and it is broken: that is a mistake of the user, not a failure among many.
    """
    if len({file.name for file in files}) < len(files):
        raise ValueError("files: expected a name of its own for each, found one twice")
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []

    def fail(file: File, reason: str) -> None:
        failed.append(dict(zip(FAILED_COLUMNS, (str(file.path), file.name, reason), strict=True)))
        log.say(f"Failed: {reason}")

    log.rewind(-1)  # an earlier start's numbers come again, from the records
    with log.progress(label, len(files), unit) as update:
        for number, file in enumerate(files):
            done = outputs / f"{file.name}.json"

            def tell(text: str, number: int = number) -> None:
                update(number, text)

            try:
                row = read_record(done) if done.exists() else {}
                if row.get("path") != str(file.path):  # none yet, or of a file that had this name in an earlier start
                    row = work(number, file, tell) | {"path": str(file.path)}
                    write_json(done, row)
                rows.append(row)
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
    """Write failed.csv where something failed, and take an earlier start's away where nothing did."""
    if failed:
        write_table(outputs / "failed.csv", FAILED_COLUMNS, failed)
    else:
        (outputs / "failed.csv").unlink(missing_ok=True)
