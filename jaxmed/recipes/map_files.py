"""Many files through one function: what is done is not done again, and what fails does not stop the others.

`map_files` works on one file after the other; a file is done when its record stands in outputs/NAME.json.
`map_batches` takes files through a compiled model in batches of one shape, spread over a mesh, while threads read the
next ones; a batch is done when it stands in checkpoints/batches. Batches are made of neighbours in the list, whatever
was done before, so that a job in two parts gives the numbers of a job in one.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Shaped

from jaxmed.arrays.batches import padded_rows
from jaxmed.arrays.types import Params, PartitionRules
from jaxmed.config import Size, checked
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.scans import Record
from jaxmed.errors import InputError, reason_of
from jaxmed.files import make_folder, read_record, write_json
from jaxmed.io.numpy_files import restore_npz, write_npz
from jaxmed.io.tables import write_table
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.mesh import MeshConfig, gathered, make_mesh, param_shardings, shard_batch
from jaxmed.train.profile import tracing, waited
from jaxmed.train.run_folder import RunFolder

FAILED_COLUMNS = ("path", "id", "reason")
TABLES = ("summary", "scans", "volumes", "failed")
"""What a run writes of all files together: the results of a file do not have these names."""


@runtime_checkable
class File(Protocol):
    """What is worked on.

    Attributes:
        name: Name of its results, unique in the run.
        path: The file.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def path(self) -> Path: ...  # noqa: D102


AnyFile = TypeVar("AnyFile", bound=File)
Tell = Callable[[str], None]
Arrays: TypeAlias = dict[str, Shaped[np.ndarray, "..."]]


class FileResults(NamedTuple):
    """What came of the files.

    Attributes:
        rows: Records (of `map_files`) or outcomes (of `map_batches`) of those that are done, in the order of the files.
        failed: path, id and reason of the others.
        warnings: Name of a file and what is unexpected about it, failed ones included.
    """

    rows: list[Any]
    failed: list[dict[str, str]]
    warnings: list[tuple[str, str]]


def write_failed(outputs: Path, failed: Sequence[dict[str, str]]) -> None:
    """Write failed.csv where something failed, and take an earlier start's away where nothing did."""
    if failed:
        write_table(outputs / "failed.csv", FAILED_COLUMNS, failed)
    else:
        (outputs / "failed.csv").unlink(missing_ok=True)


# One file after the other --------------------------------------------------------------------------------------------


def map_files(
    files: Sequence[AnyFile],
    work: Callable[[int, AnyFile, Tell], dict[str, Any]],
    outputs: Path,
    log: Log,
    label: str,
    unit: str,
    seen: Callable[[dict[str, Any]], dict[str, float]],
    part: str = "",
) -> FileResults:
    """Work on every file, beside a progress bar; those that an earlier start has done are not done again.

    A file is done when its record is in outputs/NAME.json. Those that failed have none, so that the next start of the
    run tries them again.

    Args:
        files: Named, as `files.unique_names` does it.
        work: From number and file to its record, when all else that belongs to it is written. The third argument takes
            a line to show meanwhile.
        outputs: Folder of results of the run.
        log: Gets what fails.
        label: Of the progress bar: "Refining".
        unit: What is counted: "scans".
        seen: Figures of a record, for the log.
        part: What they are called there, PART/NAME, beside those of a training; empty where the log has no others.

    Raises:
        InputError: There is one file only, and it is broken: that is a mistake of the user, not a failure among many.
    """
    if len({file.name for file in files}) < len(files):
        raise ValueError("files: expected a name of its own for each, found one twice")
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    log.rewind(-1, part)  # an earlier start's numbers come again, from the records
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
                log.metrics(number, {f"{part}/{name}" if part else name: value for name, value in seen(row).items()})
            except (InputError, MemoryError) as error:
                if isinstance(error, InputError) and len(files) == 1:
                    raise
                failed.append(_failure(file, reason_of(error, file.path)))
                log.say(f"Failed: {failed[-1]['reason']}")
            update(number + 1)
    return FileResults(rows, failed, [])


# In batches over a mesh ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
@checked
class BatchConfig:
    """How scans go through a model.

    Attributes:
        size: Scans of a batch, over all devices.
        threads: Threads that read and prepare scans; each holds one scan in memory.
    """

    size: Size = 4
    threads: Size = 2


class Input(NamedTuple):
    """A file as the model takes it.

    Attributes:
        array: The model's input, without a batch axis.
        warnings: What is unexpected about the file.
        place: What `BatchModel.finish` needs besides, such as the grid of the scan.
    """

    array: Shaped[np.ndarray, "..."]
    warnings: tuple[str, ...] = ()
    place: Any = None


def read_input(preprocess: Preprocess, record: Record) -> Input:
    """Read a record for a model; its place is the grid of the scan, and of what it was cropped to."""
    found = preprocess.prepare(record.scan)
    return Input(found.image, found.notes, (found.grid, found.cropped))


class BatchModel(NamedTuple):
    """What is done with the files of a batch job.

    Attributes:
        read: A file to the model's input, on a thread; raises InputError, OSError or MemoryError where it cannot.
        compute: Parameters and a batch of inputs to arrays with the batch first; jitted.
        finish: Writes what belongs to one file, given its input and arrays; returns what to keep, and warnings.
        shape: Shape of one input.
        rules: Where the parameters live on the mesh.
    """

    read: Callable[[Any], Input]
    compute: Callable[[Params, Any], dict[str, Any]]
    finish: Callable[[Any, Input, Arrays], tuple[Arrays, tuple[str, ...]]]
    shape: tuple[int, ...]
    rules: PartitionRules = ()


class Outcome(NamedTuple):
    """What became of a file.

    Attributes:
        file: Which.
        warnings: What was unexpected about it.
        reason: Why it failed; empty when it did not.
        arrays: What was kept of it; empty when it failed.
    """

    file: Any
    warnings: tuple[str, ...]
    reason: str
    arrays: Arrays


def make_batch_mesh(config: BatchConfig, mesh: MeshConfig) -> Mesh:
    """Lay out the devices of a batch job.

    Raises:
        InputError: They do not suffice, the batch does not divide over them, or they belong to several processes.
    """
    devices = make_mesh(mesh)
    if jax.process_count() > 1:
        advice = "give each process a manifest of its own"
        raise InputError("mesh.distributed", "one process", jax.process_count(), advice)
    if config.size % devices.shape["data"]:
        expected = f"a multiple of the {devices.shape['data']} devices along data"
        raise InputError("batch.size", expected, config.size, "change it, or --mesh.data")
    return devices


def map_batches(
    files: Sequence[File],
    model: BatchModel,
    params: Params,
    config: BatchConfig,
    mesh: Mesh,
    folder: RunFolder,
    log: Log,
    label: str,
) -> FileResults:
    """Take every file through a model; an interrupted job goes on after its last whole batch.

    A batch in which files failed is computed again by the next start: they may have been repaired. When nothing has
    failed and the results are written, `clear_batches` removes what a killed job would have continued from.

    Args:
        files: Scans, say.
        model: What is done with them.
        params: Parameters of `model.compute`.
        config: Size of a batch, and threads.
        mesh: From `make_batch_mesh`.
        folder: The run, begun.
        log: Gets warnings and what fails.
        label: Of the progress bar: "Embedding".

    Raises:
        InputError: The place cannot be written.
    """
    parts = folder.checkpoints / "batches"
    make_folder(parts)
    chunks = [files[start : start + config.size] for start in range(0, len(files), config.size)]
    stored = [parts / f"{number:06d}.npz" for number in range(len(chunks))]
    failures = [_failures_in(path) for path in stored]
    todo = [number for number, count in enumerate(failures) if count is None or count]
    done = len(files) - sum(len(chunks[number]) for number in todo)
    if again := sum(count or 0 for count in failures):
        log.say(f"Trying {again:,} scans again that failed before.")
    elif done:
        log.say(f"Continuing after {done:,} scans of an interrupted run.")
    log.rewind(done)
    placed = gathered(jax.device_put(params, param_shardings(params, mesh, model.rules)))
    reads = _read_ahead([chunks[number] for number in todo], model.read, config)
    if todo:
        batch = jax.ShapeDtypeStruct((config.size, *model.shape), np.float32)
        announce(
            log, label, params=params, batch=batch, program=jax.make_jaxpr(model.compute)(params, batch),
            count=len(todo), unit="batches", devices=mesh.size, smaller=folder.smaller,
        )  # fmt: skip
    failed = 0
    with log.progress(label, len(files), "scans", done) as update, tracing(folder, log) as trace:
        trace(0)
        for count, (number, inputs) in enumerate(zip(todo, waited(reads), strict=True), 1):
            outcomes = _run_chunk(model, placed, chunks[number], inputs, config.size, mesh)
            _store(stored[number], outcomes)
            for outcome in outcomes:
                for warning in outcome.warnings:
                    log.say(f"Warning: {outcome.file.name}: {warning}")
                if outcome.reason:
                    log.say(f"Failed: {outcome.reason}")
            failed += sum(bool(outcome.reason) for outcome in outcomes)
            done += len(outcomes)
            log.metrics(done, {"scans": done, "failed": failed})
            update(done)
            trace(count)
    found = [outcome for path, chunk in zip(stored, chunks, strict=True) for outcome in _restore(path, chunk)]
    return FileResults(
        [outcome for outcome in found if not outcome.reason],
        [_failure(outcome.file, outcome.reason) for outcome in found if outcome.reason],
        [(outcome.file.name, warning) for outcome in found for warning in outcome.warnings],
    )


def clear_batches(folder: RunFolder, failed: Sequence[object]) -> None:
    """Delete what an interrupted job would have continued from; where files failed, the next start needs it."""
    if not failed:
        shutil.rmtree(folder.checkpoints, ignore_errors=True)


def _failure(file: File, reason: str) -> dict[str, str]:
    return dict(zip(FAILED_COLUMNS, (str(file.path), file.name, reason), strict=True))


def _read_ahead(
    chunks: Sequence[Sequence[File]], read: Callable[[Any], Input], config: BatchConfig
) -> Iterator[list[Input | str]]:
    """Yield the inputs of each chunk, or why there is none, while threads read the next one."""

    def try_reading(file: File) -> Input | str:
        try:
            return read(file)
        except (InputError, OSError, MemoryError) as error:
            return reason_of(error, file.path)

    pool = ThreadPoolExecutor(config.threads)
    try:
        waiting: list[list[Future[Input | str]]] = []
        for chunk in [*chunks, []]:
            waiting.append([pool.submit(try_reading, file) for file in chunk])
            if len(waiting) > 1:
                yield [future.result() for future in waiting.pop(0)]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_chunk(
    model: BatchModel, params: Params, chunk: Sequence[File], inputs: list[Input | str], size: int, mesh: Mesh
) -> list[Outcome]:
    good = [one for one in inputs if isinstance(one, Input)]
    rows: dict[str, Any] = {}
    if good:
        filled = next(padded_rows(len(good), size))
        batch = np.stack([good[row].array for row in filled.index])
        rows = jax.device_get(model.compute(params, shard_batch({"batch": batch}, mesh)["batch"]))
    outcomes, place = [], 0
    for file, one in zip(chunk, inputs, strict=True):
        if isinstance(one, str):
            outcomes.append(Outcome(file, (), one, {}))
            continue
        arrays = {name: np.asarray(values[place]) for name, values in rows.items()}
        place += 1
        bad = [name for name, values in arrays.items() if not np.isfinite(values).all()]
        if bad:
            reason = str(InputError(file.path, f"finite {bad[0]} from the model", "NaN or Inf", "check the weights"))
            outcomes.append(Outcome(file, one.warnings, reason, {}))
            continue
        kept, further = model.finish(file, one, arrays)
        outcomes.append(Outcome(file, (*one.warnings, *further), "", kept))
    return outcomes


def _store(path: Path, outcomes: list[Outcome]) -> None:
    arrays = {f"{place}/{name}": array for place, o in enumerate(outcomes) for name, array in o.arrays.items()}
    text = json.dumps([{"warnings": list(o.warnings), "reason": o.reason} for o in outcomes])
    write_npz(path, {"outcomes": np.array(text), **arrays})


def _failures_in(path: Path) -> int | None:
    """Return how many files failed in a stored batch; None where it is missing or damaged."""
    stored = restore_npz(path)
    return None if stored is None else sum(bool(one["reason"]) for one in json.loads(str(stored["outcomes"])))


def _restore(path: Path, chunk: Sequence[File]) -> list[Outcome]:
    stored = restore_npz(path)
    if stored is None:
        raise InputError(path, "a batch as it was stored", "a damaged one", "the same command computes it again")
    arrays: list[Arrays] = [{} for _ in chunk]
    for name, array in stored.items():
        place, _, rest = name.partition("/")
        if rest:
            arrays[int(place)][rest] = array
    return [
        Outcome(file, tuple(told["warnings"]), told["reason"], kept)
        for file, told, kept in zip(chunk, json.loads(str(stored["outcomes"])), arrays, strict=True)
    ]
