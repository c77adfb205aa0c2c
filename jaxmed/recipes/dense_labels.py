"""A network that gives every voxel a label, trained on scans with label maps.

The network's `apply(params, images, key=None, training=False)` returns logits on the grid of the image, and those of an
auxiliary head or None, as `models.upernet` does.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxmed.arrays.types import Params, Scalar
from jaxmed.data.augment import AugmentConfig, augment
from jaxmed.nn.model import LayerRules, Network
from jaxmed.objectives.segmentation import dice_cross_entropy, predicted_dice
from jaxmed.recipes.training import TrainConfig, TrainData, handed_on, run_training
from jaxmed.train.log import Log
from jaxmed.train.loop import restore_best
from jaxmed.train.run_folder import RunFolder


class Trained(NamedTuple):
    """What a training ended with: the parameters of the lowest validation loss, and the step they are of."""

    params: Params
    step: int


def select_by_loss(config: TrainConfig) -> TrainConfig:
    """Return the settings under which the state of the lowest validation loss is kept."""
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, best="loss", best_is="smallest"))


def train_labels(
    config: TrainConfig,
    network: Network,
    data: TrainData,
    *,
    varied: AugmentConfig | None,
    auxiliary: float,
    layers: LayerRules | None,
    start: Params | None,
    folder: RunFolder,
    log: Log,
) -> Trained:
    """Train on records of "image" [*size, channels] and "label" [*size], or continue a run of this folder.

    Args:
        config: The run; the state of the lowest validation loss is kept.
        network: What is trained.
        data: The records, some of them held out.
        varied: What happens to training images, their labels moved alike; None for nothing.
        auxiliary: Weight of the auxiliary head's loss.
        layers: The network's layers, where the rate falls from one to the next.
        start: Parameters to start from; what is not among them is drawn.
        folder: The run.
        log: Its log.
    """
    state = run_training(
        select_by_loss(config), network, partial(label_loss, network, varied, auxiliary), data, folder=folder, log=log,
        layers=layers, start=start, score=partial(label_scores, network),
    )  # fmt: skip
    best = restore_best(folder, state)
    return Trained(handed_on(best), int(best.step))


def label_loss(
    network: Network,
    varied: AugmentConfig | None,
    auxiliary: float,
    params: Params,
    keys: Key[Array, " batch"],
    batch: Mapping[str, Array],
) -> tuple[Scalar, dict[str, Scalar]]:
    """Return Dice and cross-entropy of the network's labels, those of its auxiliary head weighted and added."""
    images, labels = batch["image"], batch["label"]
    pairs = jax.vmap(jax.random.split)(keys)
    if varied is not None:
        images, labels = jax.vmap(partial(_vary, varied))(pairs[:, 0], images, labels)
    logits, further = network.apply(params, images, key=pairs[0, 1], training=True)
    main = dice_cross_entropy(logits, labels).mean()
    total = main if further is None else main + auxiliary * dice_cross_entropy(further, labels).mean()
    return total, {"main_loss": main, "dice": predicted_dice(logits, labels).mean()}


def _vary(
    varied: AugmentConfig, key: Key[Array, ""], image: Float[Array, "*size channel"], label: Int[Array, "*size"]
) -> tuple[Array, Array]:
    image, moved = augment(key, image, varied, label)
    return image, jnp.asarray(moved)


def label_scores(
    network: Network, params: Params, keys: Key[Array, " batch"], batch: Mapping[str, Array]
) -> dict[str, Float[Array, " batch"]]:
    """Return the loss and Dice of every held-out record, on the network's grid."""
    logits, _ = network.apply(params, batch["image"])
    return {"loss": dice_cross_entropy(logits, batch["label"]), "dice": predicted_dice(logits, batch["label"])}


# One compiled program per network, whoever calls: a loop over scans must not trace each.
@partial(jax.jit, static_argnums=0)
def label_shares(apply: Any, params: Params, images: Float[Any, "batch ..."]) -> Float[Array, "batch ..."]:
    """Return the probability of every label in every voxel, [batch, *size, label], the background first.

    Args:
        apply: Of the network; static.
        params: Its parameters.
        images: Prepared scans.
    """
    logits, _ = apply(params, images)
    if logits.shape[-1] > 1:
        return jax.nn.softmax(logits, axis=-1)
    inside = jax.nn.sigmoid(logits)
    return jnp.concatenate([1 - inside, inside], axis=-1)
