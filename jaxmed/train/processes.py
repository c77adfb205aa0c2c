"""Several processes as one run: joined by jax's own service, and ended together where one of them fails.

A process that dies leaves the others in a sum over devices that never ends. Where its connections break, jax raises an
error in them; where nothing breaks (a node without power), jax's service misses its heartbeats and ends the others with
SIGABRT. Both become one line here, and the process leaves without Python's usual end: there jax waits for all
processes to arrive, minutes for one that is gone.
"""

import ctypes
import dataclasses
import os
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from jaxmed.errors import InputError, Interrupted

HEARTBEAT_SECONDS = 45
# At the end of a run the others wait while the first writes the report.
SHUTDOWN_SECONDS = 1800
# Whoever watches the processes should see the exit code of the one that failed first.
GRACE_SECONDS = 3.0
# Below 2: of several codes `srun` returns the highest, and a user's mistake in one process must win.
LOST = 1
# What jax says when another process does not answer. Gloo's errors come as a ValueError, all others as a RuntimeError.
SIGNS = (
    "Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "coordination service", "Connection reset",
    "Connection closed", "Socket closed",
)  # fmt: skip


@dataclasses.dataclass
class Member:
    """This process among those of the run.

    Attributes:
        name: How it is called in messages.
        code: Exit code that it is leaving with; None while it works.
    """

    name: str = "this process"
    code: int | None = None


_MEMBER = Member()


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connect the processes of one command; what is None is found by jax on SLURM, Open MPI and TPU pods.

    Args:
        coordinator: Address and port of process 0.
        processes: Their number.
        process: The number of this one.

    Raises:
        InputError: jax knows no such cluster, or the numbers do not fit.
    """
    if os.name == "posix":
        ctypes.CDLL(None).signal(signal.SIGABRT, _ON_ABORT)
    try:
        jax.distributed.initialize(
            coordinator, processes, process,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )  # fmt: skip
    except ValueError as error:
        expected = "SLURM, Open MPI or a TPU pod, or the fields coordinator, processes and process of mesh"
        raise InputError("mesh.distributed", expected, str(error).rstrip("."), "see scripts/launch/ --help") from error
    _MEMBER.name = f"process {jax.process_index()} of {jax.process_count()}"


def wait_for_all(what: str) -> None:
    """Wait until every process has come this far.

    Args:
        what: Name of the place, the same in all processes.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def lost_sign(error: BaseException) -> str:
    """Return what an error says of another process that does not answer; empty where it is about something else."""
    text = " ".join(str(error).split())
    is_kind = isinstance(error, RuntimeError | ValueError) and not isinstance(error, InputError)
    return text[:160] if is_kind and any(sign in text for sign in SIGNS) else ""


def lost_line(sign: str) -> str:
    """Return the line that is shown when another process does not answer."""
    advice = "look for the first line of theirs, then start all again: the run continues after its last save"
    return (
        f"jaxmed: {_MEMBER.name}: expected the other processes to answer, found that one has ended ({sign}); {advice}"
    )


def leave_if_several(error: BaseException, code: int | None) -> None:
    """End this process at once because of an error, where others may be waiting for it; else do nothing.

    A run that was told to stop ends in the usual way: all of its processes stop at one step.

    Args:
        error: What ended the run in this process.
        code: Exit code of an error that has been told; None where it has not.
    """
    if isinstance(error, Interrupted | SystemExit) or not jax.distributed.is_initialized():
        return
    is_told = code is not None or _MEMBER.code is not None
    _MEMBER.code = LOST if code is None else code
    if not is_told:
        if sign := lost_sign(error):
            print(lost_line(sign), file=sys.stderr)
        else:
            traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if code is None:
        time.sleep(GRACE_SECONDS)
    os._exit(_MEMBER.code)


def _tell_abort(number: int) -> NoReturn:
    """Say in one line that jax has ended this process; called from C, where Python's own handlers never run."""
    if _MEMBER.code is None:
        _MEMBER.code = LOST
        os.write(2, f"{lost_line('the lines above are what jax knows of it')}\n".encode())
        time.sleep(GRACE_SECONDS)
    os._exit(_MEMBER.code)


# C keeps no reference of what it is given.
_ON_ABORT: Any = ctypes.CFUNCTYPE(None, ctypes.c_int)(_tell_abort)
