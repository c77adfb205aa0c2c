"""A Flax module as two pure functions."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from jaxmed.arrays.types import KeyArray, Params, PartitionRules
from jaxmed.errors import InputError


class Model(NamedTuple):
    """A network without state; parameters are a plain nested dict that the caller owns.

    Attributes:
        init: `init(key, *inputs) -> params`, float32.
        apply: `apply(params, *inputs, key=None, **options)`; a key switches on what is random in the module (dropout,
            stochastic depth, masking), options are those of the module's call.
    """

    init: Callable[..., Params]
    apply: Callable[..., Any]


class Network(NamedTuple):
    """A network of fixed input sizes, as training takes it.

    Attributes:
        init: `init(key) -> params`, float32.
        apply: `apply(params, *inputs)`, as the loss calls it.
        rules: How its parameters are split over the devices.
        frozen: Regular expressions of parameters that are constants.
    """

    init: Callable[[KeyArray], Params]
    apply: Callable[..., Any]
    rules: PartitionRules = ()
    frozen: tuple[str, ...] = ()


class LayerRules(NamedTuple):
    """Where the layers of a model are, for layer-wise learning rates; kept beside the model.

    Attributes:
        depth: Number of blocks.
        embedding: Regular expressions of layer 0: patch embedding, position table, class token.
        block: Regular expression of block i, with one group that matches the digits of i; it is layer i + 1.
        stacked: Regular expressions of parameters that hold all blocks along their first axis.
    """

    depth: int
    embedding: tuple[str, ...]
    block: str
    stacked: tuple[str, ...] = ()


def make_model(module: nn.Module) -> Model:
    """Turn a module into a `Model`; equal modules are one model, so that what was compiled for one serves the other."""
    return _make_model(module)  # pyright: ignore[reportArgumentType]  modules are frozen, and hashed by their fields


@functools.lru_cache(maxsize=128)
def nested_model(model: Model, name: str) -> Model:
    """Return a model whose parameters stand under a name, as in files that hold more beside them."""

    def init(key: KeyArray, *inputs: Any, **options: Any) -> Params:
        return {name: model.init(key, *inputs, **options)}

    def apply(params: Params, *inputs: Any, **options: Any) -> Any:
        return model.apply(params[name], *inputs, **options)

    return Model(init, apply)


@functools.lru_cache(maxsize=128)
def _make_model(module: nn.Module) -> Model:
    is_random = "key" in inspect.signature(module.__call__).parameters  # pyright: ignore[reportAttributeAccessIssue]

    def init(key: KeyArray, *inputs: Any, **options: Any) -> Params:
        return dict(module.init(key, *inputs, **options)["params"])

    def apply(params: Params, *inputs: Any, key: KeyArray | None = None, **options: Any) -> Any:
        # Nothing is random in a module that takes no key.
        random = {} if key is None or not (is_random or "method" in options) else {"key": key}
        return module.apply({"params": params}, *inputs, **random, **options)

    return Model(init, apply)


def require_shapes(params: Params, model: Model, *inputs: Any, where: object) -> None:
    """Check that parameters are a model's.

    Args:
        params: As they were read.
        model: The model that they are said to be of.
        *inputs: Arrays of the shapes that it takes.
        where: Where they were read from, for the message.

    Raises:
        InputError: Names or shapes differ.
    """
    expected = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    found, wanted = jax.tree.map(np.shape, params), jax.tree.map(np.shape, expected)
    if found != wanted:
        raise InputError(where, f"parameters of shapes {wanted}", f"{found}", "the files belong to two networks")
