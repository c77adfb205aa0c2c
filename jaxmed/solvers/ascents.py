"""Ascents of many problems, chunk by chunk on the host, without waiting for stragglers.

Every chunk gets a few iterations; the problems that are not done are gathered from all chunks of a block into new full
chunks, until none is left. A CPU takes as many chunks at once as it has cores: one program of this size keeps no more
than one core busy.
"""

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, PyTree

from jaxmed.arrays.batches import padded_rows
from jaxmed.arrays.platform import usable_cores
from jaxmed.solvers.least_squares import LmState, Point

BLOCK_CHUNKS = 16
"""Chunks among which stragglers are gathered; a fit can be interrupted between blocks."""
TAIL_SHARE = 8
"""A chunk of this share of the size takes the last stragglers."""


class Ascent(NamedTuple):
    """State of a chunk between calls, problem last.

    Attributes:
        state: State of the solver.
        other: A second start.
        tries_other: Whether it is worth an ascent.
        start: What `finish` wants to know of the start.
    """

    state: LmState
    other: Point
    tries_other: Bool[Array | np.ndarray, " problem"]
    start: PyTree


class Programs(NamedTuple):
    """The compiled steps of a fit; data have the problem first, all else has it last.

    Attributes:
        begin: Data -> `Ascent` at its start.
        advance: (data, ascent) -> ascent after some iterations.
        finish: (data, ascent) -> estimates.
    """

    begin: Callable[[Any], Ascent]
    advance: Callable[[Any, Ascent], Ascent]
    finish: Callable[[Any, Ascent], Any]


def ascend_blocks(
    programs: Programs, data: PyTree, size: int, max_iterations: int, damping: float, start: int = 0
) -> Iterator[Any]:
    """Fit problems from `start` on and yield the estimates of each block, problem first.

    Args:
        programs: The compiled steps.
        data: Of all problems, on the host.
        size: Problems of a chunk; the last one is filled up with repetitions.
        max_iterations: Most iterations of one ascent.
        damping: That an ascent starts with.
        start: Problems that were fitted before.
    """
    count = len(jax.tree.leaves(data)[0])
    # An accelerator is kept busy by one chunk while the next is prepared.
    workers = usable_cores() if jax.default_backend() == "cpu" else 2
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:

        def run(program, index, ascent=None, chosen=None, size=size):
            """Run a program over the chosen places of a block, a chunk at a time, and join what it returns."""
            chosen = np.arange(len(index)) if chosen is None else chosen

            def call(rows):
                places = chosen[rows.index]
                part = jax.tree.map(lambda leaf: np.ascontiguousarray(leaf[index[places]]), data)
                found = program(part) if ascent is None else program(part, _take(ascent, places))
                return _take(jax.device_get(found), slice(0, rows.count))

            return _join(list(pool.map(call, padded_rows(len(chosen), size))))

        for first in range(start, count, BLOCK_CHUNKS * size):
            index = np.arange(first, min(first + BLOCK_CHUNKS * size, count))
            ascent = run(programs.begin, index)
            # Second starts ascend beside the first ones, as if they were problems of their own.
            again = np.flatnonzero(ascent.tries_other)
            both, twice = _join([ascent, _restart(_take(ascent, again), damping)]), np.append(index, index[again])
            while len(active := np.flatnonzero(~both.state.done & (both.state.iterations < max_iterations))):
                # The last stragglers of a large chunk fill a small one.
                few = size >= 1024 and len(active) <= size // TAIL_SHARE
                moved = run(programs.advance, twice, both, active, size // TAIL_SHARE if few else size)
                both = _put(both, moved, active)
            ascent, second = _take(both, slice(0, len(index))), _take(both, slice(len(index), None))
            won = second.state.at.cost < ascent.state.at.cost[again]
            ascent = _put(ascent, _take(second, np.flatnonzero(won)), again[won])
            found = run(programs.finish, index, ascent)
            yield jax.tree.map(lambda leaf: np.ascontiguousarray(np.moveaxis(leaf, -1, 0)), found)


def _restart(ascent: Ascent, damping: float) -> Ascent:
    """Return ascents at their second start, to be evaluated by their first step."""
    state = jax.tree.map(np.zeros_like, ascent.state)
    at = state.at._replace(cost=np.full_like(state.at.cost, np.inf))
    damped, growth = np.full_like(state.damping, damping), np.full_like(state.growth, 2.0)
    return ascent._replace(state=state._replace(point=ascent.other, at=at, damping=damped, growth=growth))


def _join(parts):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=-1), *parts)


def _take(tree, places):
    return jax.tree.map(lambda leaf: np.ascontiguousarray(leaf[..., places]), tree)


def _put(tree, part, places):
    def put(whole, some):
        whole = np.array(whole)
        whole[..., places] = some
        return whole

    return jax.tree.map(put, tree, part)
