"""The losses of a multi-task network of brain scans, one number per volume, from labels and maps.

Images, coordinates and residuals: mean absolute error, and that of the forward differences along each axis.
Segmentation: cross-entropy and Dice, from the labels themselves: a target of 56 channels would take a gigabyte.
Distances: mean absolute error; bias fields: mean squared error of the logarithm inside of the head.

Source: BrainFM, arXiv:2509.00549, official code; the contrastive loss: Brain-ID, arXiv:2311.16914, official code.
Deviation: the classes of the released cross-entropy and Dice of a batch are summed over it, here over each volume, so
that a batch is the mean of its volumes. Pathology has one channel, whose released cross-entropy counts lesions alone;
here both classes count. With uncertainty the negative log-likelihood takes the place of the error, for every voxel.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import Scalar
from jaxmed.config import NonNegative, Positive, checked
from jaxmed.models.unet_brain import BrainUnetConfig
from jaxmed.synthesis.brain_draws import MODALITIES

LEAST = 1e-5  # of a probability in the cross-entropy, and of the voxels of a class in Dice


@dataclasses.dataclass(frozen=True)
@checked
class BrainLossConfig:
    """What counts how much.

    Attributes:
        image: Factor of the images' losses.
        segmentation: Factor of cross-entropy and Dice.
        cross_entropy: Factor of the cross-entropy beside Dice. The paper's is a mean over voxels and classes; their
            number makes it the usual one, over voxels, which short runs need: Dice has hardly a slope while nothing is
            found yet.
        distance: Factor of the distances.
        bias_field: Factor of the bias field.
        registration: Factor of the coordinates.
        residual: Factor of the high-resolution residual.
        pathology: Factor of the lesions.
        age: Factor of the age.
        registration_gradient: Whether forward differences of coordinates count.
        clamp_distance: Whether predicted distances are cut to the limits before they are compared: beyond them nothing
            is learnt then, and a voxel of the wrong side far away stays so.
        contrastive: Factor of the contrastive loss of two images of one deformed subject; 0 leaves it out.
        temperatures: Of the contrastive loss: of agreement, of length, of other channels.
    """

    image: NonNegative = 1.0
    segmentation: NonNegative = 1.0
    cross_entropy: NonNegative = 1.0
    distance: NonNegative = 1.0
    bias_field: NonNegative = 1.0
    registration: NonNegative = 1.0
    residual: NonNegative = 1.0
    pathology: NonNegative = 1.0
    age: NonNegative = 1.0
    registration_gradient: bool = True
    clamp_distance: bool = True
    contrastive: NonNegative = 0.0
    temperatures: tuple[Positive, Positive, Positive] = (1.0, 1.0, 1.0)


def brain_loss(
    config: BrainUnetConfig,
    settings: BrainLossConfig,
    maps: Mapping[str, Float[Array, "*map"]],
    targets: Mapping[str, Array],
) -> tuple[Scalar, dict[str, Scalar]]:
    """Return the loss of one volume, and that of every task without its factor.

    Args:
        config: Of the network.
        settings: What counts how much.
        maps: What the network gives for the volume, by task.
        targets: The tasks' own by the same names, as `synthesis.brain.generate` returns them: images [x, y, z, 1] with
            "present" of MODALITIES, "segmentation" the numbers of classes [x, y, z], and so on; "weights" [x, y, z]
            of the images' voxels, "background" [x, y, z] where there is no head.
    """
    losses: dict[str, Scalar] = {}
    factors = {name: settings.image for name in MODALITIES} | {
        "segmentation": settings.segmentation,
        "distance": settings.distance,
        "bias_field_log": settings.bias_field,
        "registration": settings.registration,
        "high_res_residual": settings.residual,
        "pathology": settings.pathology,
        "age": settings.age,
    }
    for task in config.tasks:
        found, target, scale = maps[task], targets[task], maps.get(f"{task}_log_scale")
        match task:
            case "T1" | "T2" | "FLAIR" | "CT":
                is_present = targets["present"][MODALITIES.index(task)]
                # A placeholder stands where a modality is missing, and whatever it holds costs nothing.
                target, weight = jnp.where(is_present, target, found), targets["weights"][..., None]
                whole = _error(config, found, target, scale, weight) + gradient_error(found, target, weight)
                losses[task] = jnp.where(is_present, whole, 0)
            case "segmentation":
                cross, overlap = label_losses(found, target)
                losses |= {task: settings.cross_entropy * cross + overlap, "cross_entropy": cross, "dice": overlap}
            case "distance":
                limit = config.largest_distance
                found = jnp.clip(found, -limit, limit) if settings.clamp_distance else found
                losses[task] = _error(config, found, target[..., : config.surfaces], scale)
            case "bias_field_log":
                losses[task] = _squared(config, found, target, scale, 1.0 - targets["background"][..., None])
            case "registration":
                further = gradient_error(found, target) if settings.registration_gradient else 0.0
                losses[task] = _error(config, found, target, scale) + further
            case "high_res_residual":
                losses[task] = _error(config, found, target, scale) + gradient_error(found, target)
            case "pathology":
                losses[task] = lesion_loss(found, target)
            case "age":
                is_known = jnp.isfinite(target)
                losses[task] = jnp.where(is_known, jnp.abs(jnp.abs(found) - jnp.where(is_known, target, 0)), 0)
    total = sum((factors[task] * losses[task] for task in config.tasks), start=jnp.zeros(()))
    return total, losses


def gradient_error(
    found: Float[Array, "x y z channel"], target: Float[Array, "x y z channel"], weight: Array | float = 1.0
) -> Scalar:
    """Return the mean absolute error of the forward differences, summed over the axes; that of the last plane is 0."""
    error, total = found - target, jnp.zeros(())
    weight = jnp.broadcast_to(jnp.asarray(weight, error.dtype), error.shape)
    for axis in range(3):
        before = jax.lax.slice_in_dim(weight, 0, error.shape[axis] - 1, axis=axis)
        total += jnp.sum(before * jnp.abs(jnp.diff(error, axis=axis))) / error.size
    return total


def label_losses(logits: Float[Array, "x y z class"], labels: Int[Array, "x y z"]) -> tuple[Scalar, Scalar]:
    """Return cross-entropy and Dice loss, the mean over classes of each; a class that is nowhere costs its whole Dice.

    Args:
        logits: Before the softmax.
        labels: Number of the class of each voxel.
    """
    classes = logits.shape[-1]
    logs = jax.nn.log_softmax(logits)
    # Compared and summed in one pass: no array of a one-hot target is made.
    is_class = labels[..., None] == jnp.arange(classes)
    true_log = jnp.sum(jnp.where(is_class, logs, 0), axis=-1)
    cross = -jnp.mean(jnp.maximum(true_log, jnp.log(LEAST))) / classes
    probabilities, space = jnp.exp(logs), (0, 1, 2)
    shared = jnp.sum(jnp.where(is_class, probabilities, 0), axis=space)
    voxels = jnp.sum(probabilities, axis=space) + jnp.sum(is_class, axis=space)
    return cross, jnp.mean(1 - 2 * shared / jnp.maximum(voxels, LEAST))


def lesion_loss(logits: Float[Array, "x y z 1"], target: Float[Array, "x y z 1"]) -> Scalar:
    """Return cross-entropy and Dice loss of a mask; Dice only where there is one."""
    cross = jnp.mean(target * jax.nn.softplus(-logits) + (1 - target) * jax.nn.softplus(logits))
    probability = jax.nn.sigmoid(logits)
    overlap = 1 - 2 * jnp.sum(probability * target) / jnp.maximum(jnp.sum(probability + target), LEAST)
    return cross + jnp.where(jnp.any(target > 0), overlap, 0)


def contrastive_loss(
    first: Float[Array, "*space channel"],
    second: Float[Array, "*space channel"],
    temperatures: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Scalar:
    """Return how little the features of two images of one deformed subject agree, the mean over voxels.

    Args:
        first: Features of one image.
        second: Of the other, voxel by voxel.
        temperatures: Of agreement, of the length of a feature, and of the product of one channel with the others.
    """
    agreement, length, others = temperatures
    squares = jnp.square(first)
    crossed = first * jnp.sum(first, axis=-1, keepdims=True) - squares
    near = jax.nn.logsumexp(first * second / agreement, axis=-1)
    far = jnp.logaddexp(jax.nn.logsumexp(squares / length, axis=-1), jax.nn.logsumexp(crossed / others, axis=-1))
    return jnp.mean(far - near)


def _error(
    config: BrainUnetConfig, found: Array, target: Array, log_scale: Array | None, weight: Array | float = 1.0
) -> Scalar:
    """Return the mean absolute error, or the likelihood where a scale is predicted."""
    if log_scale is None:
        return jnp.mean(weight * jnp.abs(found - target))
    return _likelihood(config, found, target, log_scale, weight)


def _squared(config: BrainUnetConfig, found: Array, target: Array, log_scale: Array | None, weight: Array) -> Scalar:
    if log_scale is None:
        return jnp.mean(jnp.square(weight * (found - target)))
    return _likelihood(config, found, target, log_scale, weight)


def _likelihood(
    config: BrainUnetConfig, found: Array, target: Array, log_scale: Array, weight: Array | float
) -> Scalar:
    """Return the mean negative log-likelihood, without its constant."""
    error = (found - target) * jnp.exp(-log_scale)
    distance = jnp.square(error) / 2 if config.uncertainty == "gaussian" else jnp.abs(error)
    return jnp.mean(weight * (distance + log_scale))
