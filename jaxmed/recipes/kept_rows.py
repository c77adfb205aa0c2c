"""A long estimate of many voxels, block by block, that keeps what is finished and continues after it."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from jaxmed.errors import InputError
from jaxmed.io.numpy_files import restore_npz, write_npz
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.profile import tracing
from jaxmed.train.run_folder import RunFolder

SECONDS_BETWEEN_SAVES = 20.0
Rows = TypeVar("Rows")


def run_in_folder(
    estimate: Callable[..., Rows],
    kind: Any,
    signals: Float[np.ndarray, "voxel measurement"],
    folder: RunFolder,
    log: Log,
    said: str,
) -> Rows:
    """Estimate all voxels, continuing from and saving to RUN/checkpoints/fit.npz.

    Args:
        estimate: Takes `finished`, rows of an earlier start or None, and `on_block`, to be called with (voxels done,
            voxels in all, rows so far).
        kind: The NamedTuple of rows, arrays with the voxel first.
        signals: What is estimated from: rows of other data are refused.
        folder: Of the run.
        log: Of the run.
        said: What is done, for the log.

    Raises:
        InputError: The rows that were kept are those of other signals.
    """
    saved, total = folder.checkpoints / "fit.npz", len(signals)
    digest = hashlib.sha256(np.ascontiguousarray(signals).data).hexdigest()
    finished = restore_rows(saved, digest, kind)
    done = 0 if finished is None else len(finished[0])
    if done:
        log.say(f"Continuing after {done:,} voxels of an interrupted run.")
    announce(log, said, count=total - done, unit="voxels")
    last_save, blocks = time.monotonic(), 0
    with log.progress("Fitting", total, "voxels", done) as update, tracing(folder, log) as trace:

        def on_block(count: int, total: int, rows: Any) -> None:
            nonlocal last_save, blocks
            blocks += 1
            trace(blocks)
            update(count)
            if time.monotonic() - last_save > SECONDS_BETWEEN_SAVES and count < total:
                save_rows(saved, digest, rows)
                last_save = time.monotonic()

        trace(0)
        rows = estimate(finished=finished, on_block=on_block)
    return rows


def save_rows(path: Path, digest: str, rows: Any) -> None:
    """Keep finished rows beside the digest of their data."""
    write_npz(path, {"digest": np.array(digest), **rows._asdict()})


def restore_rows(path: Path, digest: str, kind: Any) -> Any:
    """Read them back; None where there are none.

    Raises:
        InputError: They are those of other data.
    """
    stored = restore_npz(path)
    if stored is None:
        return None
    if str(stored["digest"]) != digest:
        raise InputError(path, "rows of this scan", "rows of another", "start anew with --no-resume")
    return kind._make(stored[name] for name in kind._fields)
