"""Rows of arrays, on the host: a few of them, or all in batches of one shape that one compiled program serves."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float32, Int


class Rows(NamedTuple):
    """The rows of a batch.

    Attributes:
        index: Row of each place of the batch; places past the last row hold the last one again, so that what fills a
            batch is ordinary data.
        count: Places that are real; what the others give is to be left out.
    """

    index: Int[np.ndarray, " place"]
    count: int

    @property
    def is_real(self) -> Bool[np.ndarray, " place"]:
        """Whether each place is a row of its own."""
        return np.arange(len(self.index)) < self.count


def evenly(count: int, total: int) -> Int[np.ndarray, " chosen"]:
    """Return at most so many numbers below a total, evenly spread from first to last."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))


def padded_rows(total: int, size: int) -> Iterator[Rows]:
    """Yield the numbers of rows in batches of one size, in order.

    Args:
        total: Number of rows; none yields no batch.
        size: Places of a batch.
    """
    for first in range(0, total, size):
        yield Rows(np.minimum(np.arange(first, first + size), total - 1), min(size, total - first))


def map_rows(
    function: Callable[[Int[np.ndarray, " place"]], Any],
    total: int,
    size: int,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Apply a function of a batch to all rows and join what it returns.

    Args:
        function: Takes the numbers of a batch's rows; returns arrays, or a tree of arrays, with a first axis of places.
        total: Number of rows, at least one.
        size: Places of a batch.
        progress: Told how many rows are done.

    Returns:
        The same tree with the rows in place of the places, on the host.
    """
    parts = []
    for rows in padded_rows(total, size):
        found = jax.device_get(function(rows.index))
        parts.append(jax.tree.map(lambda leaf, count=rows.count: leaf[:count], found))
        if progress is not None:
            progress(int(rows.index[0]) + rows.count)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def apply_in_batches(
    function: Callable[..., Array], size: int, *arrays: Float32[np.ndarray, "image ..."]
) -> Float32[np.ndarray, "image ..."]:
    """Apply a compiled function to a batch of images at a time."""
    return map_rows(lambda rows: function(*(array[rows] for array in arrays)), len(arrays[0]), size)
