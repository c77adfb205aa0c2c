"""Say before long work how large it is and how long it may take.

Operations are counted in the traced program, before anything is compiled; the rate is that of a matrix product,
measured on the spot. Networks reach a share of it, so the time is told as an estimate.
"""

import functools
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxmed.errors import InputError
from jaxmed.nn import convolution
from jaxmed.train.log import Log, duration

# Share of the rate of a matrix product that a training step or a network reaches; measured on two cores: .1 to .4.
REACHED = 0.2
LONG_SECONDS = 600.0
# Parameters from which a model is no work for a CPU, where no program tells: ViT-S has 22 million.
LARGE_MODEL = 3e7


def announce(
    log: Log,
    label: str,
    *,
    params: Any = None,
    held: Any = None,
    batch: Any = None,
    program: core.ClosedJaxpr | None = None,
    count: int = 0,
    unit: str = "steps",
    devices: int = 1,
    smaller: str = "",
) -> float:
    """Say how large the model and its input are, and how long the work may take; compilation follows.

    Args:
        log: Where.
        label: What is about to be done: "Training".
        params: Arrays of the model, or their shapes.
        held: All that is held besides the batch, such as a state with moments; `params` where None.
        batch: Arrays of one turn, or their shapes.
        program: One turn, traced; without it no time is told.
        count: Turns; 0 where there is nothing to count.
        unit: What is counted, in the plural.
        devices: That share a turn.
        smaller: What fits a CPU, where this may not: `RunFolder.smaller`.

    Returns:
        The operations of one turn; 0 without a program.
    """
    held = params if held is None else held
    parts = [f"{label}: {count:,} {unit}" if count else label]
    if batch is not None:
        largest = max((leaf.shape for leaf in jax.tree.leaves(batch)), key=math.prod, default=())
        parts[0] += f" of {' x '.join(map(str, largest)) or 'one number'} ({_bytes(batch)})"
    if params is not None:
        parts.append(f"a model of {_count(params)} parameters ({_bytes(held)} held)")
    seconds, flops = 0.0, 0.0 if program is None else count_operations(program.jaxpr)
    if flops:
        seconds = flops / (REACHED * matmul_rate() * (1 if jax.default_backend() == "cpu" else devices))
        each, total = duration(seconds), duration(seconds * count)
        parts.append(f"{flops / 1e9:,.4g} GFLOP each, which may take {each}, and {total} in all")
    elif count:
        parts.append("the time left is told once the first is done")
    log.say("; ".join(parts) + ". Compiling comes first.")
    if jax.default_backend() == "cpu" and smaller:
        size = sum(_size(leaf) for leaf in jax.tree.leaves((held, batch)))
        is_large = flops == 0 and params is not None and num_parameters(params) > LARGE_MODEL
        if is_large or seconds * count > LONG_SECONDS or size > machine_memory():
            log.say(f"That is much for a CPU; {smaller} fits one.")
    return flops


def require_memory(
    needed: float,
    smaller: str,
    work: str = "a step",
    advice: str = "take a smaller batch, or more --accumulation",
) -> None:
    """Refuse work that does not fit into this machine's memory; devices of their own tell it themselves.

    Args:
        needed: Bytes.
        smaller: Presets that fit a machine; may be empty.
        work: What it is.
        advice: What to do about it.

    Raises:
        InputError: It does not.
    """
    if jax.default_backend() == "cpu" and needed > machine_memory():
        fits = f"; {smaller} fits" if smaller else ""
        expected = f"{work} that fits into the {machine_memory() / 1e9:,.1f} GB of this machine"
        raise InputError("memory", expected, f"one of {needed / 1e9:,.1f} GB", f"{advice}{fits}")


def count_operations(program: core.Jaxpr) -> float:
    """Count the floating-point operations of a traced program.

    Products and convolutions count two each, everything else one per number that it makes; the body of a loop counts as
    often as it runs where that is known, else once; of branches the longest counts.
    """
    total = 0.0
    for equation in program.eqns:
        name, parameters = equation.primitive.name, equation.params
        shapes: list[Any] = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
        inner = [count_operations(part) for part in _programs(tuple(parameters.values()))]
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            total += 2.0 * _numbers(equation) * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive is convolution.PRIMITIVE:
            (result,) = equation.outvars
            total += convolution.count_operations(parameters["gives"], *shapes, getattr(result.aval, "shape", ()))
        elif name == "conv_general_dilated":
            kernel = shapes[1]
            outputs = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * _numbers(equation) * math.prod(kernel) / max(outputs, 1)
        elif name == "scan":
            total += parameters["length"] * sum(inner)
        elif name == "cond":
            total += max(inner, default=0.0)
        elif inner:
            total += sum(inner)
        else:
            total += _numbers(equation)
    return total


@functools.cache
def matmul_rate() -> float:
    """Measure the floating-point operations a second of a float32 matrix product on the first device."""
    edge = 1024 if jax.default_backend() == "cpu" else 8192
    product = jax.jit(jnp.matmul)
    square = jnp.ones((edge, edge), jnp.float32)
    product(square, square).block_until_ready()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        product(square, square).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2.0 * edge**3 / min(seconds)


@functools.cache
def copy_rate() -> float:
    """Measure the bytes a second that the first device reads and writes in adding a number to a large array."""
    numbers = jnp.ones(2**25, jnp.float32)
    add = jax.jit(lambda numbers: numbers + 1)
    add(numbers).block_until_ready()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        add(numbers).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2.0 * numbers.nbytes / min(seconds)


def machine_memory() -> float:
    """Return the bytes of memory of this machine; infinite where nobody tells."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return math.inf


def _programs(values: tuple[Any, ...]) -> Iterator[core.Jaxpr]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _programs(tuple(value))


def _numbers(equation: core.JaxprEqn) -> float:
    return float(sum(math.prod(getattr(variable.aval, "shape", ())) for variable in equation.outvars))


def _size(leaf: Any) -> int:
    return math.prod(leaf.shape) * max(leaf.dtype.itemsize, 1)


def _bytes(tree: Any) -> str:
    amount = sum(_size(leaf) for leaf in jax.tree.leaves(tree))
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if amount >= 0.1 * size:
            return f"{amount / size:,.2f} {unit}"
    return f"{amount / 1e3:,.1f} kB"


def num_parameters(tree: Any) -> int:
    """Count the numbers in a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _count(tree: Any) -> str:
    amount = num_parameters(tree)
    return f"{amount / 1e6:,.1f} million" if amount >= 1e6 else f"{amount:,}"
