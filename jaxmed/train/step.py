"""One step of training: gradients of a batch, in one piece or in several, and the update."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Key, Shaped

from jaxmed.arrays.layers import holding_layers
from jaxmed.arrays.platform import target_platform
from jaxmed.arrays.trees import exponential_average, map_named, matches
from jaxmed.arrays.types import Params, Scalar
from jaxmed.train.mesh import hold_layers, hold_split, hold_whole
from jaxmed.train.state import TrainState

# loss(params, keys, batch) -> (scalar, metrics); keys holds one key for each example of the batch.
Loss: TypeAlias = Callable[[Params, Key[Array, " batch"], Mapping[str, Shaped[Array, "batch ..."]]], Any]
Metrics: TypeAlias = dict[str, Scalar]


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    state: TrainState,
    accumulation: int = 1,
    ema_decay: float | optax.Schedule | None = None,
    schedule: optax.Schedule | None = None,
    frozen: tuple[str, ...] = (),
    donate: bool | None = None,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """Compile the step of a run.

    The loss is a mean over examples, and each example has its own key, derived from the run's root key, the step and
    its place in the batch. So a batch cut into `accumulation` parts gives the gradient of the whole batch, random
    masks and augmentation included.

    Args:
        loss: `loss(params, keys, batch) -> (scalar, metrics)`; every array of the batch has the batch axis first.
        optimizer: From `make_optimizer`, or any of optax.
        state: A state of the run, or its shapes with their shardings; the new one lies on the devices as it does.
        accumulation: Parts in which a batch is processed, one after the other. The batch divided by it must still
            divide over the devices.
        ema_decay: Decay of the moving average, a number or a function of the steps done; needs a state that has one.
        schedule: Learning rate to report.
        frozen: Regular expressions of parameters to leave out of the backward pass; the optimizer must freeze them
            too.
        donate: Reuse the old state's memory. By default not on CPU, where it costs more copies than it saves.

    Returns:
        `step(state, batch) -> (state, metrics)`, compiled. Metrics are the loss's own, averaged over the parts, and
        `loss`, `grad_norm` and `learning_rate`.

    Raises:
        ValueError: `ema_decay` and a state without an average, or the reverse.
    """
    if (ema_decay is None) != (state.ema_params is None):
        raise ValueError("ema_decay: expected a decay exactly where the state keeps an average")

    def hold(name: str, leaf: Any) -> Any:
        return jax.lax.stop_gradient(leaf) if matches(name, frozen) else leaf

    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    layers = hold_layers(placement.params)

    def differentiate(params: Params, keys: Any, batch: Any) -> tuple[Params, Metrics]:
        def objective(params: Params) -> Any:
            with holding_layers(layers):
                return loss(map_named(hold, hold_whole(params, placement.params)), keys, batch)

        (value, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        return hold_split(gradient, placement.params), {"loss": value, **metrics}

    def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        count = jax.tree.leaves(batch)[0].shape[0]
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), count)
        if accumulation == 1:
            gradient, metrics = differentiate(state.params, keys, batch)
        else:
            gradient, metrics = _accumulate(differentiate, state.params, keys, batch, accumulation)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        average = state.ema_params
        if ema_decay is not None:
            decay = ema_decay(state.step) if callable(ema_decay) else ema_decay
            average = exponential_average(average, params, decay)
        metrics["grad_norm"] = optax.tree.norm(gradient)
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return TrainState(state.step + 1, params, average, opt_state, state.key), metrics

    donate = target_platform() != "cpu" if donate is None else donate
    return jax.jit(step, out_shardings=(placement, _replicated(state)), donate_argnums=(0,) if donate else ())


def _accumulate(
    differentiate: Callable[..., tuple[Params, Metrics]], params: Params, keys: Any, batch: Any, parts: int
) -> tuple[Params, Metrics]:
    """Average gradients and metrics over parts of a batch.

    Part i takes examples i, i + parts, ...: a batch split over devices by its first axis then stays where it is.
    """

    def cut(leaf: Any) -> Any:
        if leaf.shape[0] % parts:
            raise ValueError(f"accumulation: expected a batch that {parts} divides, got {leaf.shape[0]}")
        return jnp.moveaxis(leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]), 1, 0)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, differentiate(params, *part)), None

    slices = jax.tree.map(cut, (keys, dict(batch)))
    first = jax.tree.map(lambda leaf: leaf[0], slices)
    shapes = jax.eval_shape(differentiate, params, *first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, slices)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def _replicated(state: TrainState) -> NamedSharding | None:
    sharding = state.step.sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
