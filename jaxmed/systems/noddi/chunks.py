"""Fits of many voxels, chunk by chunk, without waiting for stragglers.

Every chunk gets a few iterations; the voxels that are not done are gathered from all chunks of a block into new full
chunks, until none is left. A CPU takes as many chunks at once as it has cores: one program of this size keeps no more
than one core busy.
"""

import concurrent.futures
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxmed.solvers.least_squares import LmState
from jaxmed.systems.noddi.derivatives import Point

BLOCK_CHUNKS = 16
"""Chunks among which stragglers are gathered; a fit can be interrupted between blocks."""
TAIL_SHARE = 8
"""A chunk of this share of the size takes the last stragglers."""


class Voxels(NamedTuple):
    """Data of some voxels, voxel first, as scans are stored.

    Attributes:
        signals: Magnitudes.
        sigma: Noise of each channel, in the same unit; 0 where not known.
        gradient_map: Matrix that a voxel's gradients are multiplied by; None where all have the table's.
    """

    signals: Float[Array | np.ndarray, "voxel measurement"]
    sigma: Float[Array | np.ndarray, " voxel"]
    gradient_map: Float[Array | np.ndarray, "voxel 3 3"] | None

    def take(self, index: np.ndarray) -> "Voxels":
        """Return some of them."""
        return jax.tree.map(lambda leaf: np.ascontiguousarray(leaf[index]), self)


class Climb(NamedTuple):
    """State of a chunk between calls, voxel last.

    Attributes:
        state: Of the solver.
        other: A second start.
        tries_other: Whether it is worth a climb.
        tensor: What the maps want of the start: mean diffusivity and anisotropy.
    """

    state: LmState
    other: Point
    tries_other: Array | np.ndarray
    tensor: Array | np.ndarray


class Programs(NamedTuple):
    """The compiled steps of a fit.

    Attributes:
        begin: Voxels -> Climb at its start.
        advance: (Voxels, Climb) -> Climb after some iterations.
        finish: (Voxels, Climb) -> a record of estimates, voxel last.
    """

    begin: Callable
    advance: Callable
    finish: Callable


def run_blocks(
    programs: Programs, voxels: Voxels, size: int, max_iterations: int, damping: float, start: int = 0
) -> Iterator[NamedTuple]:
    """Fit voxels from `start` on and yield the estimates of each block, voxel first.

    Args:
        programs: The compiled steps.
        voxels: All of them.
        size: Voxels of a chunk; the last one is filled up with repetitions.
        max_iterations: Of one climb.
        damping: That a climb starts with.
        start: Voxels that were fitted before.
    """
    count = len(voxels.signals)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # An accelerator is kept busy by one chunk while the next is prepared.
    workers = workers if jax.default_backend() == "cpu" else 2
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        while start < count:
            stop = min(start + BLOCK_CHUNKS * size, count)
            yield _run_block(programs, voxels, np.arange(start, stop), size, max_iterations, damping, pool)
            start = stop


def _run_block(programs, voxels, index, size, max_iterations, damping, pool):
    climb = _map(lambda part, _: programs.begin(part), voxels, index, None, np.arange(len(index)), size, pool)
    # Second starts climb beside the first ones, as if they were voxels of their own.
    again = np.flatnonzero(climb.tries_other)
    both = _join([climb, _restart(_take(climb, again), damping)])
    both = _until_done(programs, voxels, np.concatenate([index, index[again]]), both, size, max_iterations, pool)
    climb, second = _take(both, slice(0, len(index))), _take(both, slice(len(index), None))
    won = second.state.at.cost < climb.state.at.cost[again]
    climb = _scatter(climb, _take(second, np.flatnonzero(won)), again[won])
    rows = _map(programs.finish, voxels, index, climb, np.arange(len(index)), size, pool)
    return jax.tree.map(lambda leaf: np.ascontiguousarray(np.moveaxis(leaf, -1, 0)), rows)


def _restart(climb: Climb, damping: float) -> Climb:
    """Return climbs at their second start, to be evaluated by their first step."""
    state = climb.state
    nothing = jax.tree.map(np.zeros_like, state)
    at = nothing.at._replace(cost=np.full_like(state.at.cost, np.inf))
    growth = np.full_like(state.growth, 2.0)
    return climb._replace(
        state=nothing._replace(point=climb.other, at=at, damping=np.full_like(state.damping, damping), growth=growth)
    )


def _until_done(programs, voxels, index, climb, size, max_iterations, pool):
    while True:
        active = np.flatnonzero(~climb.state.done & (climb.state.iterations < max_iterations))
        if not len(active):
            return climb
        # The last stragglers of a large chunk fill a small one.
        fitting = size // TAIL_SHARE if size >= 1024 and len(active) <= size // TAIL_SHARE else size
        climb = _scatter(climb, _map(programs.advance, voxels, index, climb, active, fitting, pool), active)


def _map(program, voxels, index, climb, chosen, size, pool):
    """Run a program over the chosen places of a block, a chunk at a time, and join what it returns."""

    def call(start):
        places = chosen[start : start + size]
        filled = np.resize(places, size)
        result = program(voxels.take(index[filled]), None if climb is None else _take(climb, filled))
        return _take(jax.device_get(result), slice(0, len(places)))

    return _join(list(pool.map(call, range(0, len(chosen), size))))


def _join(parts):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=-1), *parts)


def _take(tree, places):
    return jax.tree.map(lambda leaf: np.ascontiguousarray(leaf[..., places]), tree)


def _scatter(tree, part, places):
    def put(whole, some):
        whole = np.array(whole)
        whole[..., places] = some
        return whole

    return jax.tree.map(put, tree, part)
