"""Image-to-image jobs: scans in, maps on their grids out, one scan after the other.

A stage lists its scans and what belongs to each (`list_inputs`), and works on them (`map_images`); what it makes of one
is written, and shown, by `recipes.restoration`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxmed.config import from_record, to_record
from jaxmed.data.scans import ANY_KIND, find_partners, find_scans, name_scans
from jaxmed.io.scans import ScanFiles
from jaxmed.recipes.map_files import TABLES, Tell, map_files, write_failed
from jaxmed.train.log import Log, duration


class Inputs(NamedTuple):
    """A scan with what belongs to it.

    Attributes:
        name: Name of its results.
        scan: The scan.
        beside: Files that belong to it, such as its mask; None where there is none.
    """

    name: str
    scan: ScanFiles
    beside: dict[str, Path | None]

    @property
    def path(self) -> Path:
        """The file or folder of the scan."""
        return self.scan.path


Row = TypeVar("Row")


def list_inputs(
    place: Path, beside: Mapping[str, Path | None], maps: Sequence[str], series: str = "", fill: float | None = None
) -> tuple[list[Inputs], tuple[str, ...]]:
    """Find scans, and what belongs to each by its name.

    Args:
        place: A scan of any kind, or a folder of scans.
        beside: File or folder of what belongs to them, by what it is; None where nothing is given.
        maps: Names of the maps that are made of a scan.
        series: Which DICOM series is meant where a folder holds several.
        fill: Intensity of voxels that have none; None refuses them.

    Returns:
        The scans, named so that no two results share a file, and notes on what was passed over.

    Raises:
        InputError: There are none, or one has no partner.
    """
    scans, passed = find_scans(place, ANY_KIND, series, fill, apart=[*beside.values()])
    partners = {what: find_partners(scans, place, other) for what, other in beside.items()}
    return [
        Inputs(name, scan, {what: files[number] for what, files in partners.items()})
        for number, (name, scan) in enumerate(zip(name_scans(scans, place, maps, TABLES), scans, strict=True))
    ], passed


def map_images(
    inputs: Sequence[Inputs],
    work: Callable[[int, Inputs, Tell], Row],
    kind: type[Row],
    outputs: Path,
    log: Log,
    label: str,
    seen: Callable[[Row], dict[str, float]],
    part: str = "",
) -> tuple[tuple[Row, ...], int]:
    """Work on every scan as `map_files` does; say what is unexpected, and write failed.csv.

    Args:
        inputs: The scans.
        work: From number and scan to its record, when its maps are written; the third argument takes a line to show.
        kind: Type of the records, a frozen dataclass with name, path and notes.
        outputs: Folder of results of the run.
        log: Gets notes, and what fails.
        label: Of the progress bar: "Refining".
        seen: Figures of a record, for the log.
        part: As of `map_files`.

    Returns:
        The records of those that are done, and how many failed.

    Raises:
        InputError: There is one scan only, and it is broken.
    """

    def read(row: dict[str, Any]) -> Row:
        return from_record(kind, row, row["name"])

    found = map_files(
        inputs, lambda number, one, tell: to_record(work(number, one, tell)), outputs, log, label, "scans",
        lambda row: seen(read(row)), part,
    )  # fmt: skip
    for row in found.rows:
        for note in row["notes"]:
            log.say(f"Note: {row['name']}: {note}")
    write_failed(outputs, found.failed)
    return tuple(map(read, found.rows)), len(found.failed)


def tell_left(tell: Tell, name: str, total: int, unit: str) -> Callable[[int], None]:
    """Return the function that says how many parts of a scan are done, and how long the others may take."""
    first: list[tuple[int, float]] = []

    def progress(done: int) -> None:
        now, left = time.monotonic(), ""
        if first:  # the first batch waits for the compiler, and tells nothing of the others
            left = f", {duration((now - first[0][1]) / (done - first[0][0]) * (total - done))} left"
        first.append((done, now))
        tell(f"{name}: {done:,} of {total:,} {unit}{left}")

    return progress
