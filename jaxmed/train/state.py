"""What a training run carries from step to step, made in its place on the devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Int

from jaxmed.arrays.types import KeyArray, Params, PartitionRules
from jaxmed.train.log import at_work
from jaxmed.train.mesh import abstract, param_shardings

MANY = 50_000_000  # parameters


class TrainState(NamedTuple):
    """The state of a run.

    Attributes:
        step: Steps done.
        params: Trained parameters, float32.
        ema_params: Their exponential moving average, or None.
        opt_state: The optimizer's own state.
        key: Root key of the run. A step uses `fold_in(key, step)`, so a restart repeats the same randomness.
    """

    step: Int[Array, ""]
    params: Params
    ema_params: Params | None
    opt_state: Any
    key: KeyArray


def create_state(
    key: KeyArray,
    init: Callable[..., Params],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *arguments: Any,
    rules: PartitionRules = (),
    ema: bool = False,
) -> TrainState:
    """Make the first state, born sharded: no device ever holds the whole of a parameter that is split.

    Args:
        key: Split into one for `init` and the root key of the run.
        init: `init(key, *arguments) -> params`.
        optimizer: As optax makes it.
        mesh: Where the state lives.
        *arguments: Arrays that `init` needs, such as parameters read from a file.
        rules: The model's, see `mesh.param_shardings`.
        ema: Keep a moving average of the parameters.

    Returns:
        The state at step 0; the average starts at the parameters.
    """
    shapes = abstract_state(key, init, optimizer, mesh, *arguments, rules=rules, ema=ema)
    places: Any = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    options = draw_options(shapes.params, mesh)
    with at_work("Drawing the parameters"):
        create = jax.jit(_creator(init, optimizer, ema), out_shardings=places, compiler_options=options)
        return create(key, *arguments)


def abstract_state(
    key: KeyArray,
    init: Callable[..., Params],
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    *arguments: Any,
    rules: PartitionRules = (),
    ema: bool = False,
) -> TrainState:
    """Return the shapes of what `create_state` makes of the same arguments, with their shardings."""
    shapes = jax.eval_shape(_creator(init, optimizer, ema), key, *arguments)
    return abstract(shapes, param_shardings(shapes, mesh, rules))


def _creator(
    init: Callable[..., Params], optimizer: optax.GradientTransformation, ema: bool
) -> Callable[..., TrainState]:
    def create(key: KeyArray, *arguments: Any) -> TrainState:
        init_key, root_key = jax.random.split(key)
        params = init(init_key, *arguments)
        average = jax.tree.map(jnp.copy, params) if ema else None
        return TrainState(jnp.zeros((), jnp.int32), params, average, optimizer.init(params), root_key)

    return create


def draw_options(params: Params, mesh: Mesh) -> dict[str, int] | None:
    """Return how a program that draws parameters is compiled: on a CPU without optimising, where they are few.

    It runs once. Drawing a U-Net's 150,000 parameters takes 3 s of compilation so, and 22 s optimised; above some tens
    of millions the drawing itself takes longer than what is saved.
    """
    few = sum(leaf.size for leaf in jax.tree.leaves(params)) < MANY
    return {"xla_backend_optimization_level": 0} if few and mesh.devices.flat[0].platform == "cpu" else None
