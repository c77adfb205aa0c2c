"""The text of a compiled program, read: computations, their instructions, and how often each computation runs.

XLA prints one program for all devices, so shapes are those of one device's part. Loops state how often they run where
the compiler knows it (`known_trip_count`); of others the constant that their condition compares with is taken.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
START = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
ARRAY = re.compile(r"\b(pred|token|opaque|bf16|c64|c128|[suf]\d+\w*)\[([\d,]*)\]")
NAME = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    """Type and shape of an array: ("bf16", (8, 128))."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Bytes, without what a layout adds."""
        return self.size * bits_of(self.dtype) / 8


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: Its name.
        opcode: What it does: "dot", "while", "all-reduce".
        results: Its result, or the parts of a tuple.
        operands: Names of its operands.
        attributes: The rest of the line.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str


class Computation(NamedTuple):
    """A computation.

    Attributes:
        instructions: By name, in order.
        root: Name of the last one, whose result is the computation's.
    """

    instructions: Mapping[str, Instruction]
    root: str


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        computations: By name.
        entry: Name of the one that is called.
    """

    computations: Mapping[str, Computation]
    entry: str


class Calls(NamedTuple):
    """How often a computation runs in one call of the program.

    Attributes:
        count: How often.
        is_fused: Whether it is the body of a fused operation, whose intermediate results never reach memory.
    """

    count: float
    is_fused: bool


def bits_of(dtype: str) -> int:
    """Return the bits of an entry: 16 of "bf16", 8 of "f8e4m3fn" and "pred"."""
    if dtype in BITS:
        return BITS[dtype]
    found = re.match(r"[suf](\d+)", dtype)
    return int(found[1]) if found else 32


def parse_program(text: str) -> Program:
    """Read the text that `compiled.as_text()` returns.

    Raises:
        ValueError: It has no entry.
    """
    computations: dict[str, Computation] = {}
    instructions: dict[str, Instruction] = {}
    name, root, entry, is_inside = "", "", "", False
    for line in text.splitlines():
        if not is_inside:
            header = HEADER.match(line)
            if header:
                name, root, instructions, is_inside = header[2], "", {}, True
                entry = name if header[1] else entry
            continue
        if line.startswith("}"):
            computations[name], is_inside = Computation(instructions, root), False
            continue
        start = START.match(line)
        if start:
            found = _parse_instruction(start[2], line[start.end() :])
            instructions[found.name] = found
            root = found.name if start[1] or not root else root
    if not entry:
        raise ValueError("text: expected a compiled program with an ENTRY, got none")
    return Program(computations, entry)


def count_calls(program: Program) -> dict[str, Calls]:
    """Return how often each computation runs that does; loops are multiplied out, branches count as taken once."""
    found: dict[str, Calls] = {}

    def visit(name: str, count: float, is_fused: bool) -> None:
        if name not in program.computations:
            return
        known = found.get(name, Calls(0.0, is_fused))
        found[name] = Calls(known.count + count, known.is_fused and is_fused)
        for instruction in program.computations[name].instructions.values():
            for inner, times, fuses in called_by(program, instruction):
                visit(inner, count * times, is_fused or fuses)

    visit(program.entry, 1.0, False)
    return found


def called_by(program: Program, instruction: Instruction) -> list[tuple[str, float, bool]]:
    """Return the computations that an instruction runs, how often, and whether as a fused operation.

    What reductions, sorts and scatters apply to single numbers is left out.
    """
    attributes = instruction.attributes
    match instruction.opcode:
        case "while":
            body, condition = _named(attributes, "body"), _named(attributes, "condition")
            return [(name, trip_count(program, instruction), False) for name in (*body, *condition)]
        case "fusion":
            return [(name, 1.0, True) for name in _named(attributes, "calls")]
        case "call" | "async-start":
            names = (*_named(attributes, "to_apply"), *_named(attributes, "calls"))
            return [(name, 1.0, False) for name in names]
        case "conditional":
            several = re.search(r"branch_computations=\{([^}]*)\}", attributes)
            names = NAME.findall(several[1]) if several else [
                *_named(attributes, "true_computation"), *_named(attributes, "false_computation")
            ]  # fmt: skip
            return [(name, 1.0, False) for name in names]
    return []


def trip_count(program: Program, loop: Instruction) -> float:
    """Return how often the body of a loop runs; 1 where neither the compiler nor the condition tells."""
    if known := re.search(r'"?known_trip_count"?[=:]\s*\{"?n"?[=:]"?(\d+)"?\}', loop.attributes):
        return float(known[1])
    constants: set[int] = set()
    for name in _named(loop.attributes, "condition"):
        for instruction in program.computations[name].instructions.values():
            if instruction.opcode == "constant" and instruction.results[0].dtype in ("s32", "s64", "u32"):
                value = re.match(r"\d+", instruction.attributes)
                constants |= {int(value[0])} if value else set()
    return float(constants.pop()) if len(constants) == 1 else 1.0


def _named(attributes: str, key: str) -> tuple[str, ...]:
    found = _pattern(key).search(attributes)
    return (found[1],) if found else ()


@functools.cache
def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(rf"\b{key}=%?([\w.\-]+)")


def _parse_instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    results = tuple(
        Array(kind, tuple(int(length) for length in shape.split(",") if length))
        for kind, shape in ARRAY.findall(rest[:end])
    )
    rest = rest[end:].lstrip()
    begin = rest.find("(")
    if begin < 0:
        return Instruction(name, rest, results, (), "")
    close = _closing(rest, begin)
    inside, after = rest[begin + 1 : close], rest[close + 1 :].lstrip(", ")
    opcode = rest[:begin]
    if opcode == "constant":
        return Instruction(name, opcode, results, (), inside)
    # What a reader of the source is told says nothing about the work, and may hold any word.
    after = re.sub(r"metadata=\{[^}]*\}", "", after)
    return Instruction(name, opcode, results, tuple(NAME.findall(inside)), after)


def _closing(text: str, begin: int) -> int:
    depth = 0
    for place in range(begin, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
            if depth == 0:
                return place
    return len(text) - 1
