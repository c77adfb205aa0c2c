"""Train small networks side by side from different parameters, on records that the device holds, and keep the best.

An epoch is one compiled program: for networks whose steps are shorter than the way from the host to the device.
"""

import functools
import itertools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig, fit
from jaxmed.train.optimizer import OptimizerConfig, make_optimizer
from jaxmed.train.run_folder import RunFolder


class State(NamedTuple):
    """Training between two epochs.

    Attributes:
        epoch: Epochs done.
        params: Parameters of all restarts, along a new first axis.
        opt_state: The optimizer's.
        key: Root key of the order of records.
        losses: Mean loss over the steps of each epoch done, and on held-out records; per restart.
    """

    epoch: Array
    params: Params
    opt_state: optax.OptState
    key: KeyArray
    losses: Float[Array, "epoch 2 restart"]


Step: TypeAlias = Callable[[State, Any], tuple[State, dict[str, float]]]


def start_restarts(
    key: KeyArray,
    init: Callable[[KeyArray], Params],
    optimizer: OptimizerConfig,
    restarts: int,
    epochs: int,
    steps_per_epoch: int,
) -> State:
    """Draw the parameters of every restart."""
    init_key, root_key = jax.random.split(key)
    params = jax.vmap(init)(jax.random.split(init_key, restarts))
    opt_state = make_optimizer(optimizer, epochs * steps_per_epoch).init(params)
    return State(jnp.zeros((), jnp.int32), params, opt_state, root_key, jnp.zeros((epochs, 2, restarts)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))  # jitted here so that a second training compiles nothing
def run_epoch(
    loss: Callable[..., Array],
    fixed: tuple[Hashable, ...],
    optimizer: OptimizerConfig,
    batch_size: int,
    state: State,
    records: PyTree,
    held_out: PyTree,
    scaling: PyTree,
) -> State:
    """Pass over all records once, in an order of its own; those that fill no batch wait for another epoch.

    Args:
        loss: (*fixed, scaling, params, batch) -> mean loss of one network.
        fixed: What the compiled program holds.
        optimizer: Its schedule runs over all epochs.
        batch_size: Records per step.
        state: Before.
        records: Arrays with the record first.
        held_out: Records that choose the best restart.
        scaling: What was measured on the records.
    """
    one_loss = functools.partial(loss, *fixed, scaling)
    count = len(jax.tree.leaves(records)[0])
    transform = make_optimizer(optimizer, len(state.losses) * (count // batch_size))
    order = jax.random.permutation(jax.random.fold_in(state.key, state.epoch), count)
    batches = order[: count // batch_size * batch_size].reshape(-1, batch_size)
    all_losses = jax.vmap(one_loss, in_axes=(0, None))

    def step(carry, rows):
        params, opt_state = carry
        batch = jax.tree.map(lambda leaf: leaf[rows], records)

        def total(params):
            # Restarts share no parameter: the gradient of the sum is each one's own.
            losses = all_losses(params, batch)
            return losses.sum(), losses

        gradient, losses = jax.grad(total, has_aux=True)(params)
        updates, opt_state = transform.update(gradient, opt_state, params)
        moved: Any = optax.apply_updates(params, updates)
        return (moved, opt_state), losses

    (params, opt_state), losses = jax.lax.scan(step, (state.params, state.opt_state), batches)
    # One restart after the other: activations of all held-out records at once are large enough.
    final = jax.lax.map(lambda one: one_loss(one, held_out), params)
    told = state.losses.at[state.epoch].set(jnp.stack([losses.mean(axis=0), final]))
    return State(state.epoch + 1, params, opt_state, state.key, told)


def newest_losses(state: State) -> dict[str, float]:
    """Return the losses of the last epoch, of the restart that was best in it."""
    newest = np.asarray(state.losses[int(state.epoch) - 1])
    seen, unseen = newest[:, newest[1].argmin()]
    return {"loss": float(seen), "held_out_loss": float(unseen)}


def run_epochs(state: State, step: Step) -> State:
    """Take all epochs that are left."""
    for epoch in range(int(state.epoch), len(state.losses)):
        state, losses = step(state, None)
        if not np.isfinite(list(losses.values())).all():
            raise ValueError(f"loss: expected finite numbers, found {losses} in epoch {epoch + 1}")
    return state


def run_epochs_in_folder(state: State, step: Step, folder: RunFolder, log: Log) -> State:
    """Take them with a line of metrics each, saved to and continued from RUN/checkpoints."""
    epochs, turns = LoopConfig(steps=len(state.losses), log_every=1, save_every=1), itertools.repeat(())
    return fit(epochs, state, step, lambda _: turns, mesh=None, folder=folder, log=log, unit="epoch")
