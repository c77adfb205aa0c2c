"""What a killed run continues from, and what a finished one hands on.

Orbax writes and restores the arrays of a state, each process its own part, into any later mesh and number of
processes. Beside them lies a record in JSON: the run's configuration, the name, shape and kind of every array, and a
checksum of its bits. A restored state is compared with it, so that a damaged file is noticed and the newest good
checkpoint is taken.
"""

import contextlib
import errno
import gc
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from jaxmed.arrays.trees import named_leaves
from jaxmed.errors import InputError, Interrupted
from jaxmed.files import WRITE_ADVICE, make_folder, write_json
from jaxmed.io import safetensors
from jaxmed.train.processes import lost_sign


class Restored(NamedTuple):
    """A state from disk and the step it was saved at."""

    step: int
    state: Any


class Checkpoints:
    """The checkpoints of a run. Saving returns as soon as the arrays are copied; writing goes on behind."""

    def __init__(
        self, folder: Path, record: dict[str, Any] | None = None, keep: int | None = 2, keep_every: int = 0
    ) -> None:
        """Open a folder of checkpoints, made where it is missing.

        Args:
            folder: Its place.
            record: Configuration to keep beside every state.
            keep: How many of the newest stay; None keeps all.
            keep_every: Those of steps that it divides stay too; 0 for none.
        """
        make_folder(folder)
        self.folder, self.record = folder, record or {}
        # Orbax repeats on stderr, in paragraphs and from several threads, what becomes one line here.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )  # fmt: skip
        with self._writing():
            self._manager = ocp.CheckpointManager(folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            return self.close()
        # Of several processes one may be gone, for which the end of a save would wait: it is left to the next start.
        if jax.process_count() == 1 or issubclass(kind, InputError | Interrupted):
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self._manager.close()

    def steps(self) -> list[int]:
        """Return the steps that are saved, in rising order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any) -> None:
        """Save a state.

        Raises:
            InputError: This or the save before it could not be written: no space, or a read-only place.
        """
        stored = _storable(state)
        record = self.record | {"arrays": describe(stored), "checksums": _checksums(stored)}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(stored), record=ocp.args.JsonSave(record))
        with self._writing():
            # Found out here, a read-only place costs a moment; found out by Orbax's threads, a minute.
            os.rmdir(tempfile.mkdtemp(dir=self.folder, prefix=".writable-"))
            self._manager.save(step, args=arguments, force=True)

    def wait(self) -> None:
        """Wait until every save is on disk.

        Raises:
            InputError: One of them could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Wait, and release the folder."""
        self.wait()
        self._manager.close()

    def reached_preemption(self, step: int) -> bool:
        """Tell, in every process at the same step, whether one of them was told to stop."""
        return self._manager.reached_preemption(step)

    def restore(self, state: Any) -> Restored | None:
        """Read the newest good checkpoint into the places of a state.

        Damaged checkpoints are skipped with a warning and deleted: the run will write them again.

        Args:
            state: A fresh state; gives names, shapes, kinds and places.

        Returns:
            The restored state, or None where there is nothing to restore.

        Raises:
            InputError: A checkpoint of another model, or none is good.
        """
        reasons = []
        for step in reversed(self.steps()):
            try:
                found = self._read(step, state)
            except _Damaged as error:
                reasons.append(f"checkpoint {step} is damaged ({error})")
                continue
            for reason in reasons:
                warnings.warn(f"{self.folder}: {reason}; continuing from step {step}", stacklevel=2)
            self.discard_after(step)
            return Restored(step, found)
        if reasons:
            advice = "start anew with --no-resume or --overwrite"
            raise InputError(self.folder, "a good checkpoint", "; ".join(reasons), advice)
        return None

    def discard_after(self, step: int) -> None:
        """Delete checkpoints later than a step: the run that continues from there will write them again."""
        self.keep_only([other for other in self.steps() if other <= step])

    def keep_only(self, steps: Sequence[int]) -> None:
        """Delete every checkpoint but some."""
        for other in [other for other in self.steps() if other not in steps]:
            self._manager.delete(other)

    def _read(self, step: int, state: Any) -> Any:
        stored = _storable(state)
        record = self._restore(step, "record", ocp.args.JsonRestore())
        if not isinstance(record, dict) or not {"arrays", "checksums"} <= set(record):
            raise _Damaged("its record is not readable")
        compare_arrays(describe(stored), record["arrays"], str(self.folder / str(step)))
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), stored)
        arrays = self._restore(step, "state", ocp.args.StandardRestore(target))
        sums = _checksums(arrays)
        if wrong := [name for name, value in sums.items() if record["checksums"][name] != value]:
            raise _Damaged(f"the bits of {wrong[0]} differ from those saved")
        return jax.tree.map(_like, state, arrays)

    def _restore(self, step: int, item: str, arguments: Any) -> Any:
        try:
            with _quiet_readers():
                return self._manager.restore(step, args=ocp.args.Composite(**{item: arguments}))[item]
        except Exception as error:  # Orbax and TensorStore raise plain Exception for truncated chunks
            if jax.process_count() > 1 and lost_sign(error):
                raise
            line = " ".join(str(error).split())
            raise _Damaged(f"{type(error).__name__}: {line[:120]}") from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            code = _write_error(error)
            if code is None:
                raise
            expected, advice = WRITE_ADVICE[code]
            raise InputError(self.folder, expected, errno_text(code), advice) from error


class _Damaged(Exception):
    """A checkpoint that cannot be read back as it was saved."""


def compare_arrays(expected: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Check that two descriptions of a tree, name to [shape, kind], agree: of the model at hand, and of what is stored.

    Raises:
        InputError: Naming `where` and the first differences.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    differing = [name for name in expected if name in found and list(found[name]) != list(expected[name])]
    if not missing and not extra and not differing:
        return
    parts = [f"{name} of {found[name][0]} {found[name][1]}, not {expected[name][0]} {expected[name][1]}"
             for name in differing[:3]]  # fmt: skip
    parts += [f"no {name}" for name in missing[:3]] + [f"an unknown {name}" for name in extra[:3]]
    total = len(missing) + len(extra) + len(differing)
    ending = f" ({total} arrays differ)" if total > len(parts) else ""
    raise InputError(
        where, "a checkpoint of this model", "; ".join(parts) + ending, "give the configuration it was trained with"
    )


def export_parameters(folder: Path, params: Any, record: dict[str, Any]) -> None:
    """Write parameters alone, for other stages: parameters.safetensors and record.json.

    Every process calls it; process 0 writes.

    Args:
        folder: Where to write.
        params: A nested dict of arrays.
        record: Configuration of the model, and what a reader must know.
    """
    leaves = named_leaves(params)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        leaves = {name: multihost_utils.process_allgather(leaf, tiled=True) for name, leaf in leaves.items()}
    if jax.process_index() == 0:
        write_json(folder / "record.json", record)
        safetensors.write(folder / "parameters.safetensors", {name: np.asarray(leaf) for name, leaf in leaves.items()})


def errno_text(code: int) -> str:
    """Return the operating system's words for an error, in lower case."""
    return os.strerror(code).lower()


def _storable(state: Any) -> Any:
    """Return the state with typed keys as plain integers, which is what a file can hold."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)


def _like(old: Any, new: Any) -> Any:
    return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if _is_key(old) else new


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(tree: Any) -> dict[str, list[Any]]:
    """Return name to [shape, kind] of a tree of arrays or of their shapes."""
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named_leaves(tree).items()}


def _checksums(stored: Any) -> dict[str, int]:
    """Sum the bits of every array as unsigned words: the same on any mesh, other for any single changed bit."""
    leaves = named_leaves(stored)
    place = next((leaf.sharding for leaf in leaves.values()), None)
    everywhere = NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else None
    sums = jax.device_get(jax.jit(lambda leaves: jax.tree.map(_sum_bits, leaves), out_shardings=everywhere)(leaves))
    return {name: int(sums[name]) for name in leaves}


def _sum_bits(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        return jnp.sum(leaf, dtype=jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return _sum_bits(jnp.real(leaf)) + _sum_bits(jnp.imag(leaf))
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
    return jnp.sum(words, dtype=jnp.uint64 if leaf.dtype.itemsize == 8 else jnp.uint32)


def _write_error(error: BaseException) -> int | None:
    """Find the operating system's reason in a chain of errors; TensorStore gives it as text."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in WRITE_ADVICE:
            return seen.errno
        text = str(seen).lower()
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
            if errno_text(code) in text:
                return code
        seen = seen.__cause__ or seen.__context__
    return None


@contextlib.contextmanager
def _quiet_readers() -> Iterator[None]:
    """Keep Python from printing the coroutines that TensorStore leaves behind a failed read."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    except BaseException:
        gc.collect()
        raise
    finally:
        sys.unraisablehook = hook
