"""Losses of label maps, one number per image: cross-entropy of every voxel, and soft Dice of every class.

A network gives one channel, before a sigmoid, for a mask, or one channel per class, before a softmax, the background
first.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxmed.objectives.supervised import overlap

SMOOTH = 1e-5
"""Added above and below the line, so that a class that is nowhere, and found nowhere, costs nothing (MONAI)."""


def label_channels(labels: Num[Array, "batch *space"], channels: int) -> Float[Array, "batch *space channel"]:
    """Return label maps as channels of 0 and 1: of one channel whether a voxel has a label, else one for each class."""
    if channels == 1:
        return (labels > 0)[..., None].astype(jnp.float32)
    return jax.nn.one_hot(labels, channels)


def voxel_cross_entropy(
    logits: Float[Array, "batch *space channel"], labels: Num[Array, "batch *space"]
) -> Float[Array, " batch"]:
    """Return the cross-entropy of each image, the mean over its voxels.

    Args:
        logits: One channel, or one per class.
        labels: Numbers of classes, 0 the background; of one channel a mask of 0 and 1.
    """
    truth = label_channels(labels, logits.shape[-1])
    if logits.shape[-1] == 1:
        each = truth * jax.nn.softplus(-logits) + (1 - truth) * jax.nn.softplus(logits)
    else:
        each = -truth * jax.nn.log_softmax(logits, axis=-1)
    return each.sum(axis=-1).mean(axis=tuple(range(1, labels.ndim)))


def dice_cross_entropy(
    logits: Float[Array, "batch *space channel"], labels: Num[Array, "batch *space"]
) -> Float[Array, " batch"]:
    """Return 1 - soft Dice, the mean over classes without the background, plus the cross-entropy of a voxel.

    Args:
        logits: One channel, or one per class.
        labels: Numbers of classes, 0 the background.

    Source: MONAI's DiceCELoss as ProFound, arXiv:2603.03961, uses it (official code).
    """
    truth, space, first = label_channels(labels, logits.shape[-1]), tuple(range(1, labels.ndim)), _first(logits)
    share = jax.nn.softmax(logits, axis=-1) if first else jax.nn.sigmoid(logits)
    both = (share * truth).sum(space)[:, first:]
    total = (share + truth).sum(space)[:, first:]
    dice = (2 * both + SMOOTH) / (total + SMOOTH)
    return 1 - dice.mean(axis=-1) + voxel_cross_entropy(logits, labels)


def predicted_dice(
    logits: Float[Array, "batch *space channel"], labels: Num[Array, "batch *space"]
) -> Float[Array, " batch"]:
    """Return Dice of the predicted label maps, the mean over classes without the background; 1 where both are empty."""
    channels, first = logits.shape[-1], _first(logits)
    found = jax.nn.one_hot(logits.argmax(-1), channels) if first else (logits > 0).astype(jnp.float32)
    each = jax.vmap(overlap, in_axes=-1, out_axes=-1)(label_channels(labels, channels), found)
    return each[:, first:].mean(axis=-1)


def _first(logits: Float[Array, "..."]) -> int:
    """Return the first channel that is no background."""
    return int(logits.shape[-1] > 1)
