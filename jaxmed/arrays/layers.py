"""How a step holds the parameters of a column of layers, one layer at a time.

Were all parameters gathered from the devices before the first layer, every device would hold the whole model at once,
and a loop over layers would stack it besides. A step that splits parameters therefore says how one layer's are split
and gathered, and a model's column of layers does so for each in its turn, again where the backward pass computes it
again. Models know no mesh: outside of such a step nothing is changed.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


def _same(params: Any) -> Any:
    return params


class Holding(NamedTuple):
    """What to do with the parameters of one layer.

    Attributes:
        split: Keeps them as they are stored.
        whole: Gathers them, to be used.
        has_tensor_splits: Whether kernels are split over devices along axes of their features, at use too.
    """

    split: Callable[[Any], Any] = _same
    whole: Callable[[Any], Any] = _same
    has_tensor_splits: bool = False

    @property
    def is_active(self) -> bool:
        """Whether anything is done."""
        return self.whole is not _same


_holding: contextvars.ContextVar[Holding | None] = contextvars.ContextVar("holding", default=None)


def layer_holding() -> Holding:
    """Return what the step that is being traced does with the parameters of a layer."""
    return _holding.get() or Holding()


@contextlib.contextmanager
def holding_layers(holding: Holding) -> Iterator[None]:
    """Hold the parameters of layers in this way while the block traces a model."""
    token = _holding.set(holding)
    try:
        yield
    finally:
        _holding.reset(token)
