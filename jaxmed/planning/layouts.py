"""Which layouts of a run on a machine are worth compiling: meshes, parts of a batch, recomputation."""

import dataclasses
import math
from collections.abc import Iterator

MODEL_AXES = (1, 2, 4, 8)
"""Lengths of the axis "model" that are tried; beyond one host's chips its messages are seldom worth it."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a run is laid out.

    Attributes:
        data: Devices along the batch.
        model: Devices along tensor splits, or along x of large volumes.
        batch: Records of a step (samples of a chunk, where a step is a scan).
        accumulation: Parts in which a batch is processed.
        remat: Whether activations are computed again in the backward pass; None where nothing can be.
    """

    data: int
    model: int
    batch: int
    accumulation: int
    remat: bool | None

    @property
    def per_device(self) -> int:
        """Records that a device holds at once."""
        return max(self.batch // (self.data * self.accumulation), 1)

    @property
    def divides(self) -> bool:
        """Whether the parts of a batch divide over the devices."""
        return self.batch % (self.data * self.accumulation) == 0


def first_layout(asked: Layout, count: int) -> Layout:
    """Return the layout nearest to what is configured: its mesh where that fills the machine, else all along data."""
    if asked.data * asked.model == count:
        return asked
    model = asked.model if count % asked.model == 0 else 1
    return dataclasses.replace(asked, data=count // model, model=model)


def fitted(layout: Layout, can_accumulate: bool = True) -> Layout:
    """Return the layout with a batch that divides: as many parts as configured or fewer, else the next larger batch."""
    parts = range(layout.accumulation if can_accumulate else 1, 0, -1)
    for accumulation in parts:
        if layout.batch % (layout.data * accumulation) == 0:
            return dataclasses.replace(layout, accumulation=accumulation)
    batch = math.ceil(layout.batch / layout.data) * layout.data
    return dataclasses.replace(layout, batch=batch, accumulation=1)


def candidates(first: Layout, can_accumulate: bool = True) -> Iterator[Layout]:
    """Yield layouts in the order in which they are compiled: the configured one, then what costs least to change.

    Args:
        first: From `first_layout`.
        can_accumulate: Whether a batch may be processed in parts.
    """
    count, seen = first.data * first.model, set()

    def new(layout: Layout) -> Iterator[Layout]:
        if layout not in seen:
            seen.add(layout)
            yield layout

    base = fitted(first, can_accumulate)
    yield from new(base)
    if base.remat is not None:
        yield from new(dataclasses.replace(base, remat=not base.remat))
    others = [model for model in MODEL_AXES if count % model == 0 and model != first.model]
    meshes = [dataclasses.replace(first, data=count // model, model=model) for model in others]
    for layout in meshes:
        yield from new(fitted(layout, can_accumulate))
    # What needs least memory: one record on a device at a time, activations computed again.
    for layout in (base, *(fitted(layout, can_accumulate) for layout in meshes)):
        remat = None if layout.remat is None else True
        parts = layout.batch // layout.data if can_accumulate else layout.accumulation
        yield from new(dataclasses.replace(layout, accumulation=max(parts, 1), remat=remat))
    if not can_accumulate:
        for layout in (base, *(fitted(layout, can_accumulate) for layout in meshes)):
            remat = None if layout.remat is None else True
            yield from new(dataclasses.replace(layout, batch=layout.data, accumulation=1, remat=remat))
