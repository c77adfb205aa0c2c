"""A compiled step without a run: the function that a stage calls over and over, and the shapes of what it is given.

A stage that trains offers `plan_step(config, mesh) -> Workload`, made by the functions that its run makes its step by,
so that what is planned is what runs. Nothing is drawn, read or put on a device.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# What the fields of a state are to a reader of a plan; others count as "other state".
PARTS = {
    "params": "parameters",
    "student": "parameters",
    "ema_params": "averages and teachers",
    "teacher": "averages and teachers",
    "anchor": "averages and teachers",
    "opt_state": "optimiser",
}


class Workload(NamedTuple):
    """One step, and what it is given.

    Attributes:
        step: The jitted function; `step.trace(*arguments)` traces it without arrays.
        arguments: Shapes with their shardings (`train.mesh.abstract`), one for each argument of the step.
        parts: Which of these are what, for the table of memory: "parameters", "optimiser", "batch" and so on.
        records: How many records (or samples) one step takes in.
        record: Shape and type of each array of one record, as the host delivers it; empty where it delivers none.
        unit: What `records` counts, in the plural.
        notes: What was assumed about the inputs, in sentences.
    """

    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    parts: Mapping[str, Any]
    records: int
    record: Mapping[str, Any]
    unit: str = "records"
    notes: tuple[str, ...] = ()


def training_workload(
    step: Callable[..., Any],
    state: Any,
    batch: Mapping[str, Any],
    record: Mapping[str, Any],
    notes: tuple[str, ...] = (),
) -> Workload:
    """Return the workload of a training step.

    Args:
        step: `step(state, batch)`, jitted.
        state: Shapes of a NamedTuple, with shardings.
        batch: From `train.mesh.abstract_batch`.
        record: What `batch` was made of.
        notes: What was assumed about the inputs.
    """
    parts: dict[str, list[Any]] = {}
    for name, value in state._asdict().items():
        parts.setdefault(PARTS.get(name, "other state"), []).append(value)
    size = next(iter(batch.values())).shape[0]
    return Workload(step, (state, dict(batch)), parts | {"batch": dict(batch)}, size, record, notes=notes)
