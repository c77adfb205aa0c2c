"""What a DINO student learns: the teacher's prototypes of class tokens and of hidden patches, and to spread its tokens.

Targets are distributions over prototypes, rows of sum 1, made of the teacher's scores by a centre or by Sinkhorn-Knopp.
All sums are over the whole batch, which under `jit` is that of all devices.

Source: DINO, arXiv:2104.14294; iBOT, arXiv:2111.07832; DINOv2, arXiv:2304.07193, and its official code; DINOv3,
arXiv:2508.10104 (the similarity of patches).
Deviation: the official code looks for the nearest neighbour of KoLeo among the images of one device, here among all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.types import Scalar
from jaxmed.models.dino import unit


def centred_targets(
    scores: Float[Array, "*token prototype"], centre: Float[Array, " prototype"], temperature: Scalar | float
) -> Float[Array, "*token prototype"]:
    """Return the softmax of scores less their centre.

    Source: DINO, arXiv:2104.14294, section 3.1.
    """
    return jax.nn.softmax((scores - centre) / temperature, axis=-1)


def move_centre(
    centre: Float[Array, " prototype"],
    scores: Float[Array, "token prototype"],
    weight: Float[Array, " token"],
    momentum: float,
) -> Float[Array, " prototype"]:
    """Return the centre moved towards the mean score.

    Args:
        centre: Average over the steps before.
        scores: What the teacher's head gives.
        weight: 1 for a token, 0 for a row that fills up the array; where all are 0 the centre stays.
        momentum: What stays of the centre.

    Source: DINO, arXiv:2104.14294, equation 4.
    """
    count = weight.sum()
    mean = (weight[:, None] * scores).sum(axis=0) / jnp.maximum(count, 1)
    return jnp.where(count > 0, momentum * centre + (1 - momentum) * mean, centre)


def sinkhorn_targets(
    scores: Float[Array, "token prototype"],
    weight: Float[Array, " token"],
    temperature: Scalar | float,
    iterations: int = 3,
) -> Float[Array, "token prototype"]:
    """Return targets that use every prototype about as often: rows sum to 1, columns nearly to tokens / prototypes.

    Args:
        scores: What the teacher's head gives.
        weight: 1 for a token, 0 for a row that fills up the array, whose target is 0.
        temperature: Divides the scores before the exponential.
        iterations: How often sums of prototypes, then of tokens, are divided by.

    Source: SwAV, arXiv:2006.09882, section 3.1, as DINOv2's official code has it. The largest score is taken off first,
        which its division by the total makes no difference to.
    """
    is_token = weight[:, None] > 0
    scaled = jnp.where(is_token, scores / temperature, -jnp.inf)
    shares = jnp.exp(scaled - jnp.where(is_token.any(), scaled.max(), 0))
    count, prototypes = weight.sum(), scores.shape[1]
    for _ in range(iterations):
        shares = shares / (_not_zero(shares.sum(axis=0)) * prototypes)
        shares = shares / (_not_zero(shares.sum(axis=1, keepdims=True)) * jnp.maximum(count, 1))
    return shares * count


class ClassTokenLosses(NamedTuple):
    """The two parts of the loss of class tokens; their sum is the mean over all pairs of different crops."""

    of_locals: Scalar
    of_globals: Scalar


def class_token_losses(
    global_scores: Float[Array, "image 2 prototype"],
    local_scores: Float[Array, "image crop prototype"],
    targets: Float[Array, "image 2 prototype"],
    temperature: float = 0.1,
) -> ClassTokenLosses:
    """Return the cross-entropy of each crop with the targets of the global crops other than itself.

    Args:
        global_scores: The student's, of the two global crops of each image.
        local_scores: The student's, of its local crops.
        targets: The teacher's, of the global crops.
        temperature: The student's temperature.

    Source: DINO, arXiv:2104.14294, equation 3; weights of DINOv2's official code.
    """
    images, crops, _ = local_scores.shape
    pairs = 2 + 2 * crops
    of_locals = jax.nn.log_softmax(local_scores / temperature, axis=-1)
    of_globals = jax.nn.log_softmax(global_scores / temperature, axis=-1)
    # The sum over pairs of a local and a global crop is the product of two sums.
    local_sum = -(of_locals.sum(axis=1) * targets.sum(axis=1)).sum()
    global_sum = -(of_globals * targets[:, ::-1]).sum()
    return ClassTokenLosses(local_sum / (images * pairs), global_sum / (images * pairs))


def patch_loss(
    scores: Float[Array, "token prototype"],
    targets: Float[Array, "token prototype"],
    weight: Float[Array, " token"],
    num_images: int,
    temperature: float = 0.1,
) -> Scalar:
    """Return the cross-entropy of hidden patches, a mean over those of each image and then over images.

    Args:
        scores: The student's, which did not see these patches.
        targets: The teacher's, which did.
        weight: One over the number of hidden patches of the token's image; 0 for a row that fills up the array.
        num_images: Global crops, those with nothing hidden included.
        temperature: The student's temperature.

    Source: iBOT, arXiv:2111.07832, equation 2; weights of DINOv2's official code.
    """
    entropy = -(targets * jax.nn.log_softmax(scores / temperature, axis=-1)).sum(axis=-1)
    return (weight * entropy).sum() / num_images


def koleo(tokens: Float[Array, "image width"]) -> Scalar:
    """Return minus the mean logarithm of the distance to the nearest other token, all of length 1; at least 2 images.

    Source: Sablayrolles et al., arXiv:1806.03198, equation 4; epsilons of DINOv2's official code.
    """
    directions = unit(tokens.astype(jnp.float32), 1e-8)
    held = jax.lax.stop_gradient(directions)
    cosines = jnp.dot(held, held.T, precision="highest")
    nearest = jnp.argmax(jnp.where(jnp.eye(len(tokens), dtype=bool), -1.0, cosines), axis=1)
    distance = jnp.linalg.norm(directions - directions[nearest] + 1e-8, axis=-1)
    return -jnp.log(distance + 1e-8).mean()


def gram_loss(patches: Float[Array, "view patch width"], anchors: Float[Array, "view patch width"]) -> Scalar:
    """Return how far the cosines between the patches of a view are from those of an anchor's, as a mean square.

    Args:
        patches: The student's, after its last norm.
        anchors: Those of a network that stays as it is, of the same views with nothing hidden; held constant.

    Source: DINOv3, arXiv:2508.10104, section 4 (gram anchoring), the cosines of each image by themselves; a mean in
        place of the sum, as in its official code.
    """
    found, wanted = (unit(tokens.astype(jnp.float32), 1e-12) for tokens in (patches, jax.lax.stop_gradient(anchors)))
    found, wanted = (jnp.einsum("vpw,vqw->vpq", tokens, tokens) for tokens in (found, wanted))
    return jnp.square(found - wanted).mean()


def target_entropy(targets: Float[Array, "token prototype"], weight: Float[Array, " token"]) -> Scalar:
    """Return the mean entropy of targets, in nats: the least that the student's cross-entropy can be.

    Args:
        targets: Distributions over prototypes.
        weight: 1 for a token, 0 for a row that fills up the array.
    """
    entropy = -jax.scipy.special.xlogy(targets, targets).sum(axis=-1)
    return (weight * entropy).sum() / jnp.maximum(weight.sum(), 1)


def _not_zero(sums: Array) -> Array:
    return jnp.where(sums > 0, sums, 1)
