"""A Flax module as two pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn

from jaxmed.arrays.types import KeyArray, Params


class Model(NamedTuple):
    """A network without state; parameters are a plain nested dict that the caller owns.

    Attributes:
        init: `init(key, *inputs) -> params`, float32.
        apply: `apply(params, *inputs, **options)`; options are those of the module's call.
    """

    init: Callable[..., Params]
    apply: Callable[..., Any]


def make_model(module: nn.Module) -> Model:
    """Turn a module into a `Model`."""

    def init(key: KeyArray, *inputs: Any, **options: Any) -> Params:
        return dict(module.init(key, *inputs, **options)["params"])

    def apply(params: Params, *inputs: Any, **options: Any) -> Any:
        return module.apply({"params": params}, *inputs, **options)

    return Model(init, apply)
