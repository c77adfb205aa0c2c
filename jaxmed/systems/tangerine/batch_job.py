"""A model over many scans: read ahead, compute in batches of one shape, keep what is done, go on past broken files."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Shaped

from jaxmed.arrays.types import Params
from jaxmed.config import Size, checked
from jaxmed.errors import InputError
from jaxmed.files import make_folder
from jaxmed.io.numpy_files import restore_npz, write_npz
from jaxmed.io.scans import ScanFiles
from jaxmed.models.published.preprocess import Preprocess
from jaxmed.models.vit import SHARDING_RULES
from jaxmed.systems.tangerine.inputs import Record, Scan, read_scan
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.mesh import MeshConfig, layout, make_mesh, shard_batch
from jaxmed.train.run_folder import RunFolder

Arrays: TypeAlias = dict[str, Shaped[np.ndarray, "..."]]


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

    def __post_init__(self) -> None:
        if self.size < 1 or self.threads < 1:
            raise ValueError(f"size, threads: expected 1 or more each, found {self.size, self.threads}")


class Outcome(NamedTuple):
    """What became of a scan.

    Attributes:
        record: Which.
        warnings: What was unexpected about it.
        reason: Why it failed; empty when it did not.
        arrays: What was kept of it; empty when it failed.
    """

    record: Record
    warnings: tuple[str, ...]
    reason: str
    arrays: Arrays


class Job(NamedTuple):
    """What a job does with scans.

    Attributes:
        compute: Parameters and a batch of cubes to arrays with the batch first; jitted.
        finish: Writes what belongs to one scan, given its arrays, and returns what to keep and further warnings.
        preprocess: A file to a cube.
    """

    compute: Callable[[Params, Any], dict[str, Any]]
    finish: Callable[[Record, Scan, Arrays], tuple[Arrays, tuple[str, ...]]]
    preprocess: Preprocess


def run_job(
    job: Job,
    params: Params,
    records: list[Record],
    config: BatchConfig,
    mesh: Mesh,
    folder: RunFolder,
    log: Log,
    label: str,
) -> list[Outcome]:
    """Take every record through the model; an interrupted job goes on after its last whole batch.

    Batches are made of neighbours in the list, whatever was done before, so that a job in two parts gives the numbers
    of a job in one. A batch in which scans failed is computed again: they may have been repaired.

    Returns:
        One outcome per record, in their order.

    Raises:
        InputError: The place cannot be written.
    """
    parts = folder.checkpoints / "batches"
    make_folder(parts)
    chunks = [records[start : start + config.size] for start in range(0, len(records), config.size)]
    stored = [parts / f"{number:06d}.npz" for number in range(len(chunks))]
    failures = [_failed_in(path, chunk) for path, chunk in zip(stored, chunks, strict=True)]
    again = {identity for found in failures for identity in found or ()}
    placed = jax.device_put(params, layout(params, mesh, SHARDING_RULES))
    todo = [number for number, found in enumerate(failures) if found is None or found]
    done = len(records) - sum(len(chunks[number]) for number in todo)
    if again:
        log.say(f"Trying {len(again):,} scans again that failed before.")
    elif done:
        log.say(f"Continuing after {done:,} scans of an interrupted run.")
    log.rewind(done)
    failed = 0
    reads = read_ahead([chunks[number] for number in todo], partial(read_or_reason, preprocess=job.preprocess), config)
    if todo:
        cubes = jax.ShapeDtypeStruct((config.size, *job.preprocess.size, 1), np.float32)
        program = jax.make_jaxpr(job.compute)(params, cubes)
        announce(
            log, label, params=params, batch=cubes, program=program, count=len(todo), unit="batches",
            devices=mesh.size, smaller=folder.smaller,
        )  # fmt: skip
    with log.progress(label, len(records), "scans", done) as update:
        for count, (number, scans) in enumerate(zip(todo, reads, strict=True), 1):
            if folder.options.profile and count == 1:
                jax.profiler.start_trace(folder.path / "profile")
            outcomes = _run_chunk(job, placed, chunks[number], scans, config.size, mesh)
            _store(stored[number], outcomes)
            for outcome in outcomes:
                _tell(outcome, log)
            failed += sum(bool(outcome.reason) for outcome in outcomes)
            done += len(outcomes)
            log.metrics(done, {"scans": done, "failed": failed})
            update(done)
            if folder.options.profile and count == min(folder.options.profile, len(todo)):
                jax.profiler.stop_trace()
    return [outcome for path, chunk in zip(stored, chunks, strict=True) for outcome in _restore(path, chunk)]


def lay_out(config: BatchConfig, mesh: MeshConfig) -> Mesh:
    """Lay out the devices of a job.

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


def read_ahead(
    chunks: list[list[Record]], read: Callable[[ScanFiles], Scan | str], config: BatchConfig
) -> Iterator[list[Scan | str]]:
    """Yield the scans of each chunk, while threads read the next one."""
    pool = ThreadPoolExecutor(config.threads)
    try:
        waiting: list[list[Future[Scan | str]]] = []
        for chunk in [*chunks, []]:
            waiting.append([pool.submit(read, record.scan) for record in chunk])
            if len(waiting) > 1:
                yield [future.result() for future in waiting.pop(0)]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_or_reason(scan: ScanFiles, preprocess: Preprocess) -> Scan | str:
    """Read a scan, or say why it cannot be."""
    try:
        return read_scan(scan, preprocess)
    except InputError as error:
        return str(error)
    except (OSError, MemoryError) as error:
        return f"{scan.path}: {type(error).__name__}: {error}"


def failures_of(outcomes: list[Outcome]) -> list[dict[str, str]]:
    """Return path, id and reason of the scans that failed."""
    failed = [outcome for outcome in outcomes if outcome.reason]
    return [{"path": str(o.record.path), "id": o.record.identity, "reason": o.reason} for o in failed]


def clear_checkpoints(folder: RunFolder, failed: int) -> None:
    """Delete what an interrupted job would have continued from; where scans failed, the next start needs it."""
    if not failed:
        shutil.rmtree(folder.checkpoints, ignore_errors=True)


def _run_chunk(
    job: Job, params: Params, chunk: list[Record], scans: list[Scan | str], size: int, mesh: Mesh
) -> list[Outcome]:
    good = [scan for scan in scans if isinstance(scan, Scan)]
    rows: dict[str, Any] = {}
    if good:
        # Short batches are filled up: one shape is one compilation.
        cubes = np.stack([good[min(place, len(good) - 1)].cube for place in range(size)])
        rows = jax.device_get(job.compute(params, shard_batch({"cubes": cubes}, mesh)["cubes"]))
    outcomes, place = [], 0
    for record, scan in zip(chunk, scans, strict=True):
        if isinstance(scan, str):
            outcomes.append(Outcome(record, (), scan, {}))
            continue
        arrays = {name: np.asarray(values[place]) for name, values in rows.items()}
        place += 1
        bad = [name for name, values in arrays.items() if not np.isfinite(values).all()]
        if bad:
            reason = str(InputError(record.path, f"finite {bad[0]} from the model", "NaN or Inf", "check the weights"))
            outcomes.append(Outcome(record, scan.warnings, reason, {}))
            continue
        kept, further = job.finish(record, scan, arrays)
        outcomes.append(Outcome(record, (*scan.warnings, *further), "", kept))
    return outcomes


def _tell(outcome: Outcome, log: Log) -> None:
    for warning in outcome.warnings:
        log.say(f"Warning: {outcome.record.identity}: {warning}")
    if outcome.reason:
        log.say(f"Failed: {outcome.reason}")


def _store(path: Path, outcomes: list[Outcome]) -> None:
    arrays = {f"{place}/{name}": array for place, o in enumerate(outcomes) for name, array in o.arrays.items()}
    text = json.dumps([{"warnings": list(o.warnings), "reason": o.reason} for o in outcomes])
    write_npz(path, {"outcomes": np.array(text), **arrays})


def _failed_in(path: Path, chunk: list[Record]) -> list[str] | None:
    """Return the identities of the scans that failed in a stored batch; None where it is missing or damaged."""
    stored = restore_npz(path)
    if stored is None:
        return None
    told = json.loads(str(stored["outcomes"]))
    return [record.identity for record, one in zip(chunk, told, strict=True) if one["reason"]]


def _restore(path: Path, chunk: list[Record]) -> list[Outcome]:
    stored = restore_npz(path)
    if stored is None:
        raise InputError(path, "a batch as it was stored", "a damaged one", "the same command computes it again")
    told = json.loads(str(stored["outcomes"]))
    arrays: list[Arrays] = [{} for _ in chunk]
    for name, array in stored.items():
        place, _, rest = name.partition("/")
        if rest:
            arrays[int(place)][rest] = array
    return [
        Outcome(record, tuple(one["warnings"]), one["reason"], kept)
        for record, one, kept in zip(chunk, told, arrays, strict=True)
    ]
