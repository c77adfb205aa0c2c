"""Train an image-to-image network: a diffusion prior, or a conditional network, by its loss.

Any network serves; what it learns is the loss's business. Records are prepared on the device, each with its own key:
cuts, flips, drawn contrasts, simulated measurements. Held-out records are scored with keys of their own, the same in
every evaluation.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.nn.model import Network
from jaxmed.recipes.training import TrainConfig, TrainData, plan_training, run_training, selected
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.step import Loss
from jaxmed.train.workload import Workload

# loss(apply, params, keys, batch) -> (scalar, metrics), a mean over examples; apply(params, x, t) is the network.
NetworkLoss: TypeAlias = Callable[..., tuple[Scalar, dict[str, Scalar]]]
# prepare(key, fields of one record) -> fields of one example.
Prepare: TypeAlias = Callable[[KeyArray, Mapping[str, Array]], Mapping[str, Array]]


def train_denoiser(
    config: TrainConfig,
    network: Network,
    loss: NetworkLoss,
    data: TrainData,
    prepare: Prepare,
    *,
    folder: RunFolder,
    log: Log,
    start: Params | None = None,
) -> Params:
    """Train a network, or continue a run of this folder.

    Args:
        config: The run.
        network: What is trained, such as `models.unet_guided.guided_unet`.
        loss: What is to be small, such as `partial(diffusion.denoiser.denoising_loss, ...)`; see `NetworkLoss`.
        data: The records.
        prepare: A transformed record to one example of the loss's batch, on the device.
        folder: The run.
        log: Its log.
        start: Parameters to start from; what is not among them is drawn.

    Returns:
        The parameters: their moving average where the run keeps one, and those of the best evaluation where
        `loop.best` names what that goes by.
    """
    prepared_loss = _prepared(network, loss, prepare)

    def score(params: Params, keys: Key[Array, " batch"], batch: Mapping[str, Array]) -> dict[str, Array]:
        def score_one(key: KeyArray, fields: Mapping[str, Array]) -> dict[str, Array]:
            value, metrics = prepared_loss(params, key[None], {name: fields[name][None] for name in fields})
            return {"loss": value, **metrics}

        return jax.vmap(score_one)(keys, batch)

    state = run_training(config, network, prepared_loss, data, folder=folder, log=log, start=start, score=score)
    return selected(config, data, folder, state)


def plan_denoiser(
    config: TrainConfig,
    network: Network,
    loss: NetworkLoss,
    record: Mapping[str, Any],
    prepare: Prepare,
    mesh: Mesh,
    notes: tuple[str, ...] = (),
) -> Workload:
    """Return the step of `train_denoiser` and the shapes of its arguments; see `training.plan_training`."""
    return plan_training(config, network, _prepared(network, loss, prepare), record, mesh, notes=notes)


def _prepared(network: Network, loss: NetworkLoss, prepare: Prepare) -> Loss:
    def prepared_loss(params: Params, keys: Key[Array, " batch"], batch: Mapping[str, Array]) -> Any:
        fields = {name: array for name, array in batch.items() if name != "record"}
        pairs = jax.vmap(jax.random.split)(keys)
        return loss(network.apply, params, pairs[:, 1], jax.vmap(prepare)(pairs[:, 0], fields))

    return prepared_loss
