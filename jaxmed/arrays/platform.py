"""The kind of device that a program is made for: that of this machine, unless it is compiled ahead of time for another.

Some operations choose their algorithm by the device while they are traced, and a step reuses its state's memory on
accelerators alone. `jaxmed plan` traces for an accelerator on a machine that has none; everything else leaves this as
it is.
"""

import contextlib
import contextvars
import os
from collections.abc import Iterator
from typing import Literal, TypeAlias

import jax

Platform: TypeAlias = Literal["cpu", "gpu", "tpu"]
_planned: contextvars.ContextVar[Platform | None] = contextvars.ContextVar("planned", default=None)


def target_platform() -> str:
    """Return what programs that are traced now are made for: "cpu", "gpu" or "tpu"."""
    return _planned.get() or jax.default_backend()


def is_planned() -> bool:
    """Tell whether programs that are traced now run somewhere else, if at all."""
    return _planned.get() is not None


def usable_cores() -> int:
    """Return the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def compiling_for(platform: Platform) -> Iterator[None]:
    """Trace and compile for another kind of device inside the block."""
    token = _planned.set(platform)
    try:
        yield
    finally:
        _planned.reset(token)
