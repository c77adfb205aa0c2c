"""Losses on labels: one number per example, so that a batch in parts has the mean of the whole batch.

Labels that are missing are NaN and cost nothing. A label's share of an example's loss does not depend on which other
labels are known: sums run over the known ones and are divided by the number of all.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.task import TaskKind


def binary_cross_entropy(
    logits: Float[Array, "batch label"],
    targets: Float[Array, "batch label"],
    positive_weight: Float[Array, "*batch label"] | float = 1.0,
) -> Float[Array, " batch"]:
    """Return the cross-entropy of independent labels, the mean over an example's labels.

    Args:
        logits: Before the sigmoid.
        targets: 0, 1, or NaN where not known.
        positive_weight: Factor on the loss of positives: of all labels, of each, or of each in each example.
    """
    is_known = jnp.isfinite(targets)
    known = jnp.where(is_known, targets, 0)
    each = positive_weight * known * jax.nn.softplus(-logits) + (1 - known) * jax.nn.softplus(logits)
    return jnp.where(is_known, each, 0).mean(axis=1)


def cross_entropy(
    logits: Float[Array, "batch class"],
    targets: Float[Array, "batch 1"],
    weights: Float[Array, "*batch class"] | float = 1.0,
    smoothing: float = 0.0,
) -> Float[Array, " batch"]:
    """Return the cross-entropy of one class per example.

    Args:
        logits: Before the softmax.
        targets: Numbers of classes, from 0.
        weights: Factor on the loss of each class.
        smoothing: Share of each target that is spread evenly over all classes.

    Source: label smoothing, arXiv:1512.00567, section 7.
    Deviation: PyTorch divides a batch by the sum of its examples' weights, so that the loss of an example depends on
        its neighbours; here every example counts by its weight alone. Weights whose mean over the training set is 1
        keep the scale.
    """
    classes = logits.shape[1]
    wanted = jax.nn.one_hot(targets[:, 0].astype(jnp.int32), classes) * (1 - smoothing) + smoothing / classes
    return -(weights * wanted * jax.nn.log_softmax(logits, axis=1)).sum(axis=1)


def squared_error(
    values: Float[Array, "batch target"], targets: Float[Array, "batch target"]
) -> Float[Array, " batch"]:
    """Return the squared error, the mean over an example's targets; NaN where a target is not known."""
    is_known = jnp.isfinite(targets)
    error = jnp.where(is_known, values - jnp.where(is_known, targets, 0), 0)
    return jnp.square(error).mean(axis=1)


def task_losses(
    kind: TaskKind,
    logits: Float[Array, "batch output"],
    targets: Float[Array, "batch column"],
    weights: Float[Array, "*batch output"] | float = 1.0,
    smoothing: float = 0.0,
) -> Float[Array, " batch"]:
    """Return each example's loss in a task.

    Args:
        kind: "binary" and "multilabel": cross-entropy of each label; "multiclass": of the class; "regression": squared
            error of standardised targets.
        logits: Outputs of the head.
        targets: One column per output; one column of class numbers for "multiclass".
        weights: Weights of positives (binary, multilabel) or classes (multiclass); of no meaning in regression.
        smoothing: Share of a label that is spread over all classes.
    """
    match kind:
        case "multiclass":
            return cross_entropy(logits, targets, weights, smoothing)
        case "regression":
            return squared_error(logits, targets)
    return binary_cross_entropy(logits, targets, weights)


def class_dice(found: Array, truth: Array, classes: int) -> tuple[Float[Array, " class"], Float[Array, " class"]]:
    """Return Dice of every class, 1 where neither has it, and the voxels that truly are of it.

    Args:
        found: Class of every voxel, as estimated.
        truth: The same, as it is.
        classes: Their number.
    """

    def count(mask: Array) -> Array:
        return jnp.zeros(classes).at[jnp.where(mask, truth, classes)].add(1.0, mode="drop")

    true, shared = count(jnp.ones_like(truth, bool)), count(found == truth)
    predicted = jnp.zeros(classes).at[found].add(1.0)
    total = true + predicted
    return jnp.where(total > 0, 2 * shared / jnp.maximum(total, 1), 1.0), true


def overlap(truth: Float[Array, "image *space"], estimate: Float[Array, "image *space"]) -> Float[Array, " image"]:
    """Return the Dice coefficient, 2 sum(t e) / (sum t + sum e); of two empty masks 1."""
    axes = tuple(range(1, truth.ndim))
    total = truth.sum(axes) + estimate.sum(axes)
    return jnp.where(total > 0, 2 * (truth * estimate).sum(axes) / jnp.maximum(total, 1e-6), 1.0)
