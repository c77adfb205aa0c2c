"""A resumable grid of cells (arm, fraction, seed, ...): each runs once, is stored at once, and fails alone.

    RUN/outputs/study.json          configuration of the study, and the cells that were last asked for
    RUN/outputs/cells/CELL.json     a finished cell: its values on the axes, metrics, rows per subject
    RUN/outputs/failures/CELL.json  a cell that failed, with the traceback; gone when a later start finishes it
    RUN/outputs/failed.csv          the same, one line per cell

A cell counts as finished when its file stands under its own name, where it arrives by renaming: a killed study loses
only what it was computing. Several processes share a study by the rule cells[process_index::process_count], which needs
no lock and no clock; give each its own index, and start again with any other number of processes when all have ended.
Means, tests and tables of the results are in `study_tables.py`, what a page shows of them in `study_sections.py`.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.files import make_folder, read_record, remove_leftovers, write_json
from jaxmed.io.tables import write_table
from jaxmed.train.log import Log

Value = str | int | float | bool


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        key: Name and value on each axis, in the order of the axes.
    """

    key: tuple[tuple[str, Value], ...]

    def __getitem__(self, axis: str) -> Value:
        """Return the value on an axis."""
        values = dict(self.key)
        if axis not in values:
            raise InputError("axis of the study", f"one of {', '.join(values)}", f"'{axis}'")
        return values[axis]

    def __str__(self) -> str:
        """Return the key for reading: arm=mae, seed=0."""
        return ", ".join(f"{axis}={value}" for axis, value in self.key)

    @property
    def slug(self) -> str:
        """File name: readable, and distinct for distinct keys through the eight digits of their hash."""
        readable = re.sub(r"[^A-Za-z0-9.=_-]+", "-", "_".join(f"{axis}={value}" for axis, value in self.key))
        return f"{readable[:100].strip('.-')}-{_digest([list(pair) for pair in self.key])[:8]}"


class Outcome(NamedTuple):
    """What a cell gives.

    Attributes:
        metrics: Finite numbers by name; what is not defined in a cell is left out.
        subjects: One row per subject or scan, all with the same columns; may be empty. For means and tests over
            subjects a row has "subject", "case" where a subject has several, and numbers, None where not defined. What
            one cell finds out about several arms at once stands in rows with a column "arm".
    """

    metrics: Mapping[str, float]
    subjects: Sequence[Mapping[str, Any]] = ()


class Result(NamedTuple):
    """A finished cell."""

    cell: Cell
    metrics: dict[str, float]
    subjects: list[dict[str, Any]]


class Failure(NamedTuple):
    """A cell that failed, and why, in one line."""

    cell: Cell
    reason: str


class StudyRun(NamedTuple):
    """Where a study stands when this process has done its part.

    Attributes:
        results: All finished cells, whoever ran them, in the order of the cells.
        failures: All cells that failed and were not finished since.
        num_run: Cells that this call finished.
        num_skipped: Cells of this process that were finished before.
    """

    results: tuple[Result, ...]
    failures: tuple[Failure, ...]
    num_run: int
    num_skipped: int

    @property
    def exit_code(self) -> int:
        """1 when cells failed, for a stage to end with after it has written its tables; otherwise 0."""
        return int(bool(self.failures))


def make_cells(axes: Mapping[str, Sequence[Value]]) -> tuple[Cell, ...]:
    """Cross the axes of a study, the last one running fastest.

    Args:
        axes: Values by name, such as {"arm": ("mae", "dino"), "fraction": (0.1, 1.0), "seed": (0, 1, 2)}.

    Raises:
        InputError: An axis has no value, one twice, or one that is not finite.
    """
    if not axes:
        raise InputError("axes of the study", "at least one", "none")
    for name, values in axes.items():
        where = f"axis '{name}' of the study"
        if not values:
            raise InputError(where, "at least one value", "none")
        doubles = [value for index, value in enumerate(values) if value in values[:index]]
        if doubles:
            raise InputError(where, "different values", f"{doubles[0]!r} twice")
        for value in values:
            # NumPy's integers, say, have no form in JSON and would be another key than Python's.
            if not isinstance(value, Value) or (isinstance(value, float) and not math.isfinite(value)):
                raise InputError(where, "words, finite numbers or truth values", repr(value), "convert it by int(...)")
    return tuple(Cell(tuple(zip(axes, values, strict=True))) for values in itertools.product(*axes.values()))


def run_study(
    cells: Sequence[Cell],
    run_cell: Callable[[Cell], Mapping[str, float] | Outcome],
    folder: Path,
    config: object,
    *,
    process_index: int = 0,
    process_count: int = 1,
    log: Log | None = None,
) -> StudyRun:
    """Run the cells that are not finished yet.

    A cell that raises is recorded and the others go on; every start tries failed cells again. Being stopped (Ctrl-C, a
    signal) is no failure and passes through, as does an error in storing a result.

    Args:
        cells: The grid, the same for all processes.
        run_cell: Computes one cell; everything it depends on is in the cell and in `config`.
        folder: Run folder; the study lives in its `outputs`.
        config: What all cells share, a dataclass or JSON-like record. Results of another configuration are refused.
            More or other cells may be asked for later under the same configuration.
        process_index: Which part is this process's, from 0.
        process_count: Number of parts.
        log: Where to say how far it is.

    Raises:
        InputError: The folder holds results of another configuration, or cannot be written.
    """
    return run_groups(
        cells, lambda group: [run_cell(cell) for cell in group], folder, config, process_index=process_index,
        process_count=process_count, log=log,
    )  # fmt: skip


def run_groups(
    cells: Sequence[Cell],
    run_group: Callable[[Sequence[Cell]], Sequence[Mapping[str, float] | Outcome]],
    folder: Path,
    config: object,
    *,
    size: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    log: Log | None = None,
) -> StudyRun:
    """Run the cells that are not finished yet, several in one call: a program that serves many at once.

    Cells of a group are stored one by one as soon as it ends; one that raises fails all of its group. What is else is
    as for `run_study`.

    Args:
        cells: The grid.
        run_group: Computes some cells, and returns what each gives in their order; what a cell gives does not depend on
            the others.
        folder: Run folder.
        config: What all cells share.
        size: Most cells of a group, which are neighbours in the grid.
        process_index: Which part is this process's, from 0.
        process_count: Number of parts.
        log: Where to say how far it is.
    """
    if not 0 <= process_index < process_count:
        raise InputError("process_index", f"0 to {process_count - 1}", process_index)
    if len(set(cells)) < len(cells):
        raise InputError("cells of the study", "different ones", "one of them twice")
    digest = _open_study(cells, folder, config)
    if process_count == 1:
        remove_leftovers(folder / "outputs")  # of several processes, they may be another's work in progress
    parts = [cells[start : start + size] for start in range(0, len(cells), size)][process_index::process_count]
    ours = [cell for part in parts for cell in part]
    waiting = [cell for cell in ours if _read_result(folder, cell, digest) is None]
    num_skipped, num_run, done = len(ours) - len(waiting), 0, len(ours) - len(waiting)
    with _progress(log, len(ours), num_skipped) as update:
        for start in range(0, len(waiting), size):
            group = waiting[start : start + size]
            try:
                outcomes = [_checked(outcome) for outcome in run_group(group)]
            except Exception as error:
                for cell in group:
                    reason = _record_failure(folder, cell, digest, error)
                    if log is not None:
                        log.say(f"failed: {cell}: {reason}")
            else:
                for cell, outcome in zip(group, outcomes, strict=True):
                    _store(folder, cell, digest, outcome)
                num_run += len(group)
            done += len(group)
            update(done, str(group[-1]))
    results, failures = read_results(cells, folder, config), _read_failures(cells, folder)
    _write_failed(cells, failures, folder)
    return StudyRun(results, failures, num_run, num_skipped)


def read_study(folder: Path) -> StudyRun:
    """Read what a run folder holds of the cells that were last asked for; none counts as run.

    Raises:
        InputError: There is no study, or it is damaged.
    """
    record = read_record(folder / "outputs" / "study.json")
    cells = [Cell(tuple((axis, value) for axis, value in key)) for key in record["cells"]]
    results = read_results(cells, folder, record["config"])
    return StudyRun(results, _read_failures(cells, folder), 0, len(results))


def read_results(cells: Sequence[Cell], folder: Path, config: object) -> tuple[Result, ...]:
    """Read the finished ones among the cells, in their order.

    Raises:
        InputError: A result is of another configuration, or damaged.
    """
    digest = _digest(to_record(config))
    found = (_read_result(folder, cell, digest) for cell in cells)
    return tuple(result for result in found if result is not None)


def _read_failures(cells: Sequence[Cell], folder: Path) -> tuple[Failure, ...]:
    # A kill between storing a result and deleting its older failure leaves both: the result counts.
    waiting = (cell for cell in cells if not _cell_path(folder, cell).exists())
    places = ((cell, _failure_path(folder, cell)) for cell in waiting)
    return tuple(Failure(cell, read_record(path)["reason"]) for cell, path in places if path.exists())


def _open_study(cells: Sequence[Cell], folder: Path, config: object) -> str:
    """Refuse a folder of another study, or mark it as this one's; return the digest of the configuration."""
    path = folder / "outputs" / "study.json"
    record = {"config": to_record(config), "cells": [[list(pair) for pair in cell.key] for cell in cells]}
    before = read_record(path) if path.exists() else record
    found, wanted = before.get("config"), record["config"]
    if _digest(found) != _digest(wanted):
        raise InputError(
            path,
            "a study of this configuration",
            f"one that differs in {_first_difference(found, wanted)}",
            "choose another folder, or the configuration it was started with",
        )
    if before is record or before != record:
        write_json(path, {**record, "config": found})
    for name in ("cells", "failures"):
        make_folder(folder / "outputs" / name)
    return _digest(wanted)


def _store(folder: Path, cell: Cell, digest: str, outcome: Outcome) -> None:
    record = {
        "study": digest,
        "cell": dict(cell.key),
        "metrics": dict(outcome.metrics),
        "subjects": [dict(row) for row in outcome.subjects],
    }
    write_json(_cell_path(folder, cell), record)
    _failure_path(folder, cell).unlink(missing_ok=True)


def _read_result(folder: Path, cell: Cell, digest: str) -> Result | None:
    path = _cell_path(folder, cell)
    if not path.exists():
        return None
    record = read_record(path)
    if set(record) != {"study", "cell", "metrics", "subjects"} or record["cell"] != dict(cell.key):
        raise InputError(path, f"the result of {cell}", "something else", "delete the file to run the cell again")
    if record["study"] != digest:
        advice = "choose another folder, or the configuration it was run with"
        raise InputError(path, "a result of this configuration", "one of another", advice)
    return Result(cell, record["metrics"], record["subjects"])


def _checked(outcome: Mapping[str, float] | Outcome) -> Outcome:
    """Make plain numbers of what a cell returned, so that storing it cannot fail for its content."""
    outcome = outcome if isinstance(outcome, Outcome) else Outcome(outcome)
    metrics = {name: float(value) for name, value in outcome.metrics.items()}
    bad = [f"{name} = {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if bad or not metrics:
        raise InputError("metrics of the cell", "finite numbers", ", ".join(bad) or "none")
    subjects = [{name: _plain(value) for name, value in row.items()} for row in outcome.subjects]
    json.dumps(subjects, allow_nan=False)
    if len({tuple(row) for row in subjects}) > 1:
        raise InputError("rows per subject", "the same columns in all", "different ones")
    return Outcome(metrics, subjects)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _record_failure(folder: Path, cell: Cell, digest: str, error: Exception) -> str:
    reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    reason = " ".join(reason.split())
    details = traceback.format_exception(error)
    record = {"study": digest, "cell": dict(cell.key), "reason": reason, "traceback": details}
    write_json(_failure_path(folder, cell), record)
    return reason


def _write_failed(cells: Sequence[Cell], failures: Sequence[Failure], folder: Path) -> None:
    """Write failed.csv anew from the single records: right for any number of processes once the last has ended."""
    path = folder / "outputs" / "failed.csv"
    if not failures:
        path.unlink(missing_ok=True)
        return
    axes = list(dict.fromkeys(axis for cell in cells for axis, _ in cell.key))
    write_table(path, [*axes, "reason"], [{**dict(cell.key), "reason": reason} for cell, reason in failures])


def _cell_path(folder: Path, cell: Cell) -> Path:
    return folder / "outputs" / "cells" / f"{cell.slug}.json"


def _failure_path(folder: Path, cell: Cell) -> Path:
    return folder / "outputs" / "failures" / f"{cell.slug}.json"


def _digest(record: object) -> str:
    return hashlib.sha256(json.dumps(_canonical(record), sort_keys=True, allow_nan=False).encode()).hexdigest()


def _canonical(record: Any) -> Any:
    """Write equal numbers alike: 4 epochs of a preset come back from config.json as 4.0."""
    if isinstance(record, dict):
        return {name: _canonical(value) for name, value in record.items()}
    if isinstance(record, list | tuple):
        return [_canonical(value) for value in record]
    return int(record) if isinstance(record, float) and record.is_integer() else record


def _first_difference(found: Any, wanted: Any, path: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in dict.fromkeys([*found, *wanted]):
            if name not in found or name not in wanted:
                return f"{path}{name}, which only {'it' if name in found else 'the new one'} has"
            if found[name] != wanted[name]:
                return _first_difference(found[name], wanted[name], f"{path}{name}.")
    return f"{path.rstrip('.') or 'all'} ({json.dumps(found)} there, {json.dumps(wanted)} now)"


@contextlib.contextmanager
def _progress(log: Log | None, total: int, done: int) -> Iterator[Callable[..., None]]:
    if log is None:
        yield lambda amount, note="": None
        return
    with log.progress("study", total, "cells", done) as update:
        yield update
