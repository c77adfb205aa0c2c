"""Compile a stage's step for devices that may not be here, and tell what it takes of them.

The step comes from the stage itself (`plan_step(config, mesh)`), its arguments are shapes. What is laid out anew is a
configuration of the stage with another mesh, batch, number of parts, or recomputation; wherever in it these stand.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, cast

import jax

from jaxmed.arrays.platform import compiling_for
from jaxmed.config import walk
from jaxmed.errors import InputError
from jaxmed.planning.estimate import USABLE, Memory, Rates, needed_input, predict, sent_by_axis
from jaxmed.planning.layouts import Layout
from jaxmed.planning.program_text import parse_program
from jaxmed.planning.topologies import Topology
from jaxmed.planning.traffic import Work, measure_work
from jaxmed.recipes.training import TrainConfig
from jaxmed.train.announce import count_operations
from jaxmed.train.log import at_work
from jaxmed.train.mesh import MeshConfig, make_mesh
from jaxmed.train.workload import Workload

UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a layout takes, of one chip unless said otherwise; what was not compiled has a problem and zeros.

    Attributes:
        layout: Mesh, batch, parts, recomputation.
        changes: Fields that differ from the configuration that was asked for, by dotted path.
        problem: Why it does not run: refused, or too large; empty where it runs.
        memory: Bytes by part.
        total: Bytes at most at once.
        capacity: Bytes that a program may take.
        flops: Operations of products in a step.
        traced: Operations of the traced program, of all chips together, recomputation included.
        bytes: Traffic to and from memory in a step.
        messages: Kind, axis, type, calls, bytes held and bytes sent, of a step.
        sent: Bytes sent in a step, by axis of the mesh.
        seconds: Predicted time of a step.
        quickest: See `planning.estimate.ASSUMPTIONS`.
        slowest: See `planning.estimate.ASSUMPTIONS`.
        parts: Seconds of products, of traffic, and of messages by axis.
        utilisation: Share of the peak of products.
        bound: What takes longest.
        records: Records (or scans) that a step takes in, of all chips.
        unit: What these are, in the plural.
        rate: Records each second, of all chips.
        input: Megabytes each second from all hosts, and records and megabytes each second from each.
        compile_seconds: Tracing included.
        notes: What was assumed about the inputs.
    """

    layout: Layout
    changes: dict[str, int | bool] = dataclasses.field(default_factory=dict)
    problem: str = ""
    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    total: float = 0.0
    capacity: float = 0.0
    flops: float = 0.0
    traced: float = 0.0
    bytes: float = 0.0
    messages: tuple[tuple[str, str, str, float, float, float], ...] = ()
    sent: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    quickest: float = 0.0
    slowest: float = 0.0
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    utilisation: float = 0.0
    bound: str = ""
    records: int = 0
    unit: str = "records"
    rate: float = 0.0
    input: dict[str, float] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        """Whether it compiles and fits."""
        return not self.problem


def evaluate(
    module: ModuleType, config: Any, layout: Layout, topology: Topology, devices: Sequence[Any], rates: Rates
) -> Outcome:
    """Compile the step of a stage in a layout, and count.

    Args:
        module: The stage.
        config: Its configuration as it was asked for.
        layout: How it is laid out.
        topology: The machine.
        devices: Its devices, or as many CPU devices in place of GPUs.
        rates: Of one chip.
    """
    arranged = arrange(config, layout)
    changes = dict(differences(config, arranged))
    mesh, capacity, began = MeshConfig(layout.data, layout.model), USABLE * rates.memory, time.monotonic()
    label = f"mesh {layout.data} x {layout.model}, batch {layout.batch} in {layout.accumulation} part(s)"
    try:
        with compiling_for(topology.kind), at_work(f"Compiling for {topology.word}, {label}"):
            workload: Workload = module.plan_step(arranged, make_mesh(mesh, devices))
            traced = workload.step.trace(*workload.arguments)  # pyright: ignore[reportFunctionMemberAccess]
            compiled = traced.lower().compile()
    except InputError as error:
        return Outcome(layout, changes, f"{error.where}: expected {error.expected}, found {error.found}")
    except (ValueError, NotImplementedError) as error:  # axes that do not divide, or do not lie in a torus
        if isinstance(error, ValueError) and "divi" not in str(error):
            raise
        return Outcome(layout, changes, f"refused: {str(error).splitlines()[0][:200]}")
    except RuntimeError as error:  # of the compiler
        needed = needed_memory(str(error))
        if needed is None:
            raise
        return Outcome(layout, changes, too_large(needed, capacity), total=needed, capacity=capacity)
    memory = measure_memory(compiled, workload.parts)
    work = measure_work(parse_program(compiled.as_text()), {"data": layout.data, "model": layout.model})
    operations = count_operations(traced.jaxpr.jaxpr)
    if not work.flops:  # a compiler whose products are calls that do not tell their shapes
        work = work._replace(flops=operations / len(devices))
    return describe(
        Outcome(layout, changes, compile_seconds=time.monotonic() - began), workload, memory, work, operations, rates,
        topology,
    )  # fmt: skip


def describe(
    begun: Outcome, workload: Workload, memory: Memory, work: Work, operations: float, rates: Rates, topology: Topology
) -> Outcome:
    """Return an outcome with what was counted, and what is predicted from it."""
    found, capacity = predict(work, rates), USABLE * rates.memory
    host = needed_input(
        workload.records, record_bytes(workload.record), found.seconds, topology.count,
        topology.count if topology.chip is None else topology.chip.per_host,
    )  # fmt: skip
    problem = too_large(memory.total, capacity) if memory.total > capacity else ""
    parts = {"products": found.products, "traffic": found.traffic}
    parts |= {f"messages along {axis}": seconds for axis, seconds in found.messages.items()}
    shares = {**memory.arguments, "activations and temporaries": memory.temporaries, "outputs": memory.outputs}
    return dataclasses.replace(
        begun, problem=problem, memory=shares | {"program": memory.code}, total=memory.total, capacity=capacity,
        flops=work.flops, traced=operations, bytes=work.bytes, messages=tuple(tuple(one) for one in work.messages),
        sent=sent_by_axis(work.messages), seconds=found.seconds, quickest=found.quickest, slowest=found.slowest,
        parts=parts, utilisation=found.utilisation, bound=found.bound, records=workload.records, unit=workload.unit,
        rate=host.records, notes=workload.notes,
        input={"megabytes_per_second": host.megabytes, "records_per_second_and_host": host.records_per_host,
               "megabytes_per_second_and_host": host.megabytes_per_host},
    )  # fmt: skip


# Memory --------------------------------------------------------------------------------------------------------------


def measure_memory(compiled: Any, parts: Mapping[str, Any]) -> Memory:
    """Return the bytes of one device that a compiled step takes, by part.

    Args:
        compiled: What `lower().compile()` returns.
        parts: Which arguments are what; what is left of the compiler's own number for them is padding.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("memory_analysis: expected the compiler's figures, got none")
    arguments = {name: device_bytes(part) for name, part in parts.items()}
    arguments = {name: size for name, size in arguments.items() if size}
    rest = float(analysis.argument_size_in_bytes) - sum(arguments.values())
    if rest > 0:
        arguments["padding of arguments"] = rest
    outputs = float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    return Memory(
        arguments, float(analysis.temp_size_in_bytes), max(outputs, 0.0), float(analysis.generated_code_size_in_bytes)
    )


def device_bytes(tree: Any) -> float:
    """Return the bytes of one device that arrays of these shapes and shardings take, without padding."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * max(leaf.dtype.itemsize, 1)
            for leaf in jax.tree.leaves(tree)
        )
    )


def record_bytes(record: Mapping[str, Any]) -> float:
    """Return the bytes of one record as the host delivers it."""
    return float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in record.values()))


def too_large(needed: float, capacity: float) -> str:
    """Say that a program does not fit; 0 bytes where the compiler did not tell how many."""
    amount = f"{needed / 1e9:,.1f} GB" if needed else "more memory"
    return f"needs {amount} of a chip, which has {capacity / 1e9:,.1f} GB for a program"


def needed_memory(message: str) -> float | None:
    """Return the bytes that a compiler said it would need.

    Returns:
        0 where it does not tell how many, None where its message is about something else.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    return float(found[1]) * UNITS[found[2]] if found else 0.0


# Configurations ------------------------------------------------------------------------------------------------------


def asked_layout(config: Any) -> tuple[Layout, bool]:
    """Return the layout that a configuration asks for, and whether its batch may be processed in parts."""
    records = list(walk(config))
    mesh = next((record for record in records if isinstance(record, MeshConfig)), MeshConfig())
    train = next((record for record in records if isinstance(record, TrainConfig)), None)
    remats = [record.remat for record in records if isinstance(getattr(record, "remat", None), bool)]
    remat = any(remats) if remats else None
    if train is not None:
        return Layout(mesh.data or 1, mesh.model, train.loader.batch_size, train.accumulation, remat), True
    chunk = next((record.chunk for record in records if isinstance(getattr(record, "chunk", None), int)), 1)
    return Layout(mesh.data or 1, mesh.model, chunk, 1, remat), False


def arrange(config: Any, layout: Layout) -> Any:
    """Return a configuration with mesh, batch, parts and recomputation as laid out, wherever in it they stand."""
    has_training = any(isinstance(record, TrainConfig) for record in walk(config))

    def change(record: Any) -> Any:
        if isinstance(record, MeshConfig):
            return dataclasses.replace(record, data=layout.data, model=layout.model)
        if isinstance(record, TrainConfig):
            loader = dataclasses.replace(record.loader, batch_size=layout.batch)
            return dataclasses.replace(record, loader=loader, accumulation=layout.accumulation)
        changes: dict[str, Any] = {}
        if layout.remat is not None and isinstance(getattr(record, "remat", None), bool):
            changes["remat"] = layout.remat
        if not has_training and isinstance(getattr(record, "chunk", None), int):
            changes["chunk"] = layout.batch
        return dataclasses.replace(record, **changes) if changes else record

    return rewrite(config, change)


def rewrite(record: Any, change: Callable[[Any], Any]) -> Any:
    """Return a configuration with a change applied to every record in it, the innermost first."""
    if not dataclasses.is_dataclass(record):
        return record
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record) if field.init}
    changed = {name: rewrite(value, change) for name, value in values.items()}
    changed = {name: value for name, value in changed.items() if value != values[name]}
    return change(dataclasses.replace(cast(Any, record), **changed) if changed else record)


def differences(first: Any, second: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields in which two configurations of one kind differ, by dotted path, with the second's values."""
    for field in dataclasses.fields(first):
        one, other, name = getattr(first, field.name), getattr(second, field.name), f"{place}{field.name}"
        if dataclasses.is_dataclass(one) and type(one) is type(other):
            yield from differences(one, other, f"{name}.")
        elif one != other:
            yield name, other
