"""What a compiled program does: products, bytes to and from memory, and messages between devices by axis of the mesh.

All figures are of one device and one call, loops multiplied out.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxmed.planning.program_text import Array, Calls, Computation, Instruction, Program, count_calls

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# What moves nothing by itself: names, views, and instructions whose body is counted.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "iota", "domain",
    *(f"{name}-done" for name in COLLECTIVES), "copy-done",
}  # fmt: skip


class Message(NamedTuple):
    """One kind of exchange along one axis.

    Attributes:
        kind: "all-gather" and so on.
        axis: "data", "model", "data+model" where a group spans both, or "none" for groups of one device.
        dtype: Of the largest array.
        calls: How often it happens in a step.
        payload: Bytes of a device's arrays before it, over all calls.
        sent: Bytes that a device sends, over all calls, by ring algorithms.
    """

    kind: str
    axis: str
    dtype: str
    calls: float
    payload: float
    sent: float


class Work(NamedTuple):
    """What one device does in one call.

    Attributes:
        flops: Operations of matrix products and convolutions; two for each multiplication that is added.
        bytes: Bytes read and written by instructions, whose operands are taken to come from memory every time.
        messages: Exchanges, the largest first.
    """

    flops: float
    bytes: float
    messages: tuple[Message, ...]


def measure_work(program: Program, mesh: Mapping[str, int]) -> Work:
    """Count what a program does.

    Args:
        program: Compiled for all devices of a mesh.
        mesh: Names and lengths of its axes, the slowest first; device k of the program is the k-th of the mesh.
    """
    flops = total = 0.0
    messages: dict[tuple[str, str, str], Message] = {}
    for name, calls in count_calls(program).items():
        computation = program.computations[name]
        for instruction in computation.instructions.values():
            flops += calls.count * product_flops(computation, instruction)
            if not calls.is_fused:
                total += calls.count * moved_bytes(program, computation, instruction)
            # A TPU sums and scatters in a fused operation of this name.
            is_scattered = name.startswith("all-reduce-scatter")
            if message := _message(computation, instruction, calls, mesh, is_scattered):
                key = message.kind, message.axis, message.dtype
                known = messages.get(key, message._replace(calls=0.0, payload=0.0, sent=0.0))
                messages[key] = known._replace(
                    calls=known.calls + message.calls, payload=known.payload + message.payload,
                    sent=known.sent + message.sent,
                )  # fmt: skip
    ordered = sorted(messages.values(), key=lambda message: -message.sent)
    return Work(flops, total, tuple(ordered))


# Products ------------------------------------------------------------------------------------------------------------


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """Return the operations of a matrix product or convolution; 0 of anything else."""
    size = sum(array.size for array in instruction.results[:1])
    if instruction.opcode == "dot":
        left = _operand(computation, instruction, 0)
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        contracted = [int(axis) for axis in axes[1].split(",") if axis] if axes else []
        return 2.0 * size * math.prod(left.shape[axis] for axis in contracted) if left else 0.0
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "custom-call" and re.search(r"matmul|gemm|dot", _target(instruction), re.IGNORECASE):
        left = _operand(computation, instruction, 0)
        return 2.0 * size * left.shape[-1] if left and left.shape else 0.0
    return 0.0


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """Count products where a place of the window lies on the input, and not on padding or between its values.

    TPUs write most products as convolutions: heads or the pairs of a batch are then an axis of a window that is as long
    as the output, of which each place of the output reaches one, or a few, inside the input.
    """
    image, kernel = (_operand(computation, instruction, number) for number in (0, 1))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if image is None or kernel is None or not labels or not instruction.results:
        return 0.0
    output = instruction.results[0]
    reached = 1.0
    for axis, window in enumerate(_windows(instruction.attributes)):
        places = [array.shape[text.index(str(axis))] for array, text in ((image, labels[1]), (output, labels[3]))]
        reached *= window.reached(*places)
    along = (output.shape[labels[3].index(name)] for name in "bf")
    return 2.0 * math.prod(along) * kernel.shape[labels[2].index("i")] * reached


class Window(NamedTuple):
    """A window along one axis.

    Attributes:
        size: Its places.
        stride: Between outputs.
        low: Padding before the input.
        lhs_dilate: Distance of the input's values, zeros between.
        rhs_dilate: Distance of the window's places.
    """

    size: int
    stride: int
    low: int
    lhs_dilate: int
    rhs_dilate: int

    def reached(self, length: int, outputs: int) -> int:
        """Return the pairs of an output and a place of its window that meet on a value of an input of this length."""
        begins = np.arange(outputs)[:, None] * self.stride - self.low
        places = begins + np.arange(self.size) * self.rhs_dilate
        is_inside = (places >= 0) & (places <= (length - 1) * self.lhs_dilate) & (places % self.lhs_dilate == 0)
        return int(is_inside.sum())


def _windows(attributes: str) -> list[Window]:
    """Return the window of a convolution along each axis."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}
    sizes = [int(size) for size in fields["size"].split("x")] if "size" in fields else []

    def each(name: str, otherwise: int) -> list[int]:
        # Of padding, "1_2x0_0", the lower end counts.
        return (
            [int(part.split("_")[0]) for part in fields[name].split("x")]
            if name in fields
            else [otherwise] * len(sizes)
        )

    steps = (each("stride", 1), each("pad", 0), each("lhs_dilate", 1), each("rhs_dilate", 1))
    return [Window(*parts) for parts in zip(sizes, *steps, strict=True)]


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def _operand(computation: Computation, instruction: Instruction, number: int) -> Array | None:
    if number >= len(instruction.operands):
        return None
    source = computation.instructions.get(instruction.operands[number])
    return source.results[0] if source and source.results else None


# Memory --------------------------------------------------------------------------------------------------------------


def moved_bytes(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Return the bytes that an instruction reads and writes: operands and results, of slices the slice alone."""
    if instruction.opcode in FREE:
        return 0.0
    written = _bytes(instruction.results)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * written
    sources = [_arrays(computation, name) for name in instruction.operands]
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * _bytes(sources[1]) if len(sources) > 1 else written
    if instruction.opcode == "fusion":
        inner = next((program.computations.get(name) for name in _bodies(instruction)), None)
        if inner is not None:
            return _fused_bytes(inner, sources, written)
    return written + sum(map(_bytes, sources))


def _bodies(instruction: Instruction) -> Iterator[str]:
    found = re.search(r"\bcalls=%?([\w.\-]+)", instruction.attributes)
    if found:
        yield found[1]


def _fused_bytes(inner: Computation, sources: Sequence[tuple[Array, ...]], written: float) -> float:
    """Return the bytes of a fused operation, which may look at a slice of an operand, or change one in place."""
    users: dict[str, list[Instruction]] = {}
    for instruction in inner.instructions.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    changed = [one for one in _final(inner) if one.opcode == "dynamic-update-slice" and len(one.operands) > 1]
    in_place = {_origin(inner, one.operands[0]) for one in changed}
    read = 0.0
    parameters = [one for one in inner.instructions.values() if one.opcode == "parameter"]
    for place, parameter in enumerate(parameters):
        if parameter.name in in_place:
            continue
        whole = _bytes(sources[place]) if place < len(sources) else _bytes(parameter.results)
        uses = users.get(parameter.name, [])
        is_sliced = uses and all(use.opcode == "dynamic-slice" and use.operands[0] == parameter.name for use in uses)
        read += sum(_bytes(use.results) for use in uses) if is_sliced else whole
    for one in changed:
        update = _bytes(_arrays(inner, one.operands[1]))
        written += update - _bytes(one.results)
    return max(written, 0.0) + read


def _final(inner: Computation) -> list[Instruction]:
    """Return what a fused operation ends with: its root, or the parts of it where that is a tuple."""
    root = inner.instructions.get(inner.root)
    if root is None:
        return []
    names = root.operands if root.opcode == "tuple" else (root.name,)
    return [inner.instructions[_origin(inner, name)] for name in names if name in inner.instructions]


def _origin(inner: Computation, name: str) -> str:
    """Return what a view is of."""
    while inner.instructions[name].opcode in ("bitcast", "copy", "convert", "reshape"):
        if inner.instructions[name].operands[0] not in inner.instructions:
            break
        name = inner.instructions[name].operands[0]
    return name


def _arrays(computation: Computation, name: str) -> tuple[Array, ...]:
    source = computation.instructions.get(name)
    return source.results if source else ()


def _bytes(arrays: Sequence[Array]) -> float:
    return sum(array.bytes for array in arrays)


# Messages ------------------------------------------------------------------------------------------------------------


def _message(
    computation: Computation, instruction: Instruction, calls: Calls, mesh: Mapping[str, int], is_scattered: bool
) -> Message | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    kind = "reduce-scatter" if is_scattered and kind == "all-reduce" else kind
    arrays = [array for name in instruction.operands for array in _arrays(computation, name)]
    payload = _bytes(arrays)
    axis, size = group_axis(instruction.attributes, mesh)
    largest = max(arrays, key=lambda array: array.bytes, default=Array("none", ()))
    sent = payload * sent_share(kind, size)
    return Message(kind, axis, largest.dtype, calls.count, calls.count * payload, calls.count * sent)


def sent_share(kind: str, size: int) -> float:
    """Return the bytes that a device sends for each byte that it holds before an exchange among `size` devices.

    By ring algorithms: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    """
    if size <= 1:
        return 0.0
    match kind:
        case "all-gather":
            return size - 1.0
        case "all-reduce":
            return 2.0 * (size - 1) / size
        case "reduce-scatter" | "all-to-all":
            return (size - 1.0) / size
    return 1.0


def group_axis(attributes: str, mesh: Mapping[str, int]) -> tuple[str, int]:
    """Return the axes along which the members of the first group differ, joined by "+", and its size.

    Args:
        attributes: Of an instruction, with replica_groups or source_target_pairs in any of XLA's spellings.
        mesh: Names and lengths of the mesh's axes, the slowest first.
    """
    pairs = re.search(r"source_target_pairs=\{(.*?\})\}", attributes)
    group = next((g for g in _groups(pairs[1]) if g[0] != g[1]), [0]) if pairs else first_group(attributes, mesh)
    places = [_coordinates(member, mesh) for member in group]
    axes = [name for name in mesh if len({place[name] for place in places}) > 1]
    return "+".join(axes) or "none", len(group)


def first_group(attributes: str, mesh: Mapping[str, int]) -> list[int]:
    """Return the devices of the first group of an exchange; all of them where no groups are told."""
    everyone = list(range(math.prod(mesh.values())))
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return _groups(found[1])[0]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _in_order(found[2])[: _numbers(found[1])[-1]]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\((.*?)\)+)?\s*\{([^}]*)\}", attributes):
        members = _mesh_group(found[1], found[3])
        order = _in_order(found[2]) if found[2] else everyone
        return [order[member] for member in members]
    return everyone


def _in_order(text: str) -> list[int]:
    """Return numbers in order, laid out as a shape whose axes are then turned: "[4,2]T(1,0)" is 0, 2, 4, 6, 1, ..."""
    found = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", text)
    assert found is not None
    source = _numbers(found[1])
    order = _numbers(found[2]) if found[2] else list(range(len(source)))
    steps = [math.prod(source[axis + 1 :]) for axis in range(len(source))]
    turned = itertools.product(*(range(source[axis]) for axis in order))
    return [sum(place * steps[axis] for place, axis in zip(index, order, strict=True)) for index in turned]


def _mesh_group(axes: str, chosen: str) -> list[int]:
    """Return the first group of a mesh such as 'a'=4,'b'=2 along some of its axes, or along a part of one: 'a':(2)2."""
    lengths = {name: int(length) for name, length in re.findall(r"'([^']*)'=(\d+)", axes)}
    names = list(lengths)
    steps = {name: math.prod(list(lengths.values())[place + 1 :]) for place, name in enumerate(names)}
    moves: list[list[int]] = []
    for name, before, length in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", chosen):
        if length:  # the part of an axis that comes after `before` others
            step = steps[name] * lengths[name] // (int(before) * int(length))
            moves.append([step * place for place in range(int(length))])
        else:
            moves.append([steps[name] * place for place in range(lengths[name])])
    return [sum(parts) for parts in itertools.product(*moves)]


def _groups(text: str) -> list[list[int]]:
    return [_numbers(group) for group in re.findall(r"\{([\d,\s]*)\}", text)] or [[0]]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number.strip()]


def _coordinates(member: int, mesh: Mapping[str, int]) -> dict[str, int]:
    found = {}
    for name in reversed(list(mesh)):
        found[name] = member % mesh[name]
        member //= mesh[name]
    return found
