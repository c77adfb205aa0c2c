"""The loss of a masked autoencoder."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmed.arrays.masking import Masking, draw_noise, take_tokens
from jaxmed.arrays.patches import patchify
from jaxmed.arrays.types import Params, Scalar
from jaxmed.models.mae import MaskedModel


def masked_targets(
    model: MaskedModel, image: Float[Array, "batch ..."], masking: Masking
) -> Float[Array, "batch hide voxel"]:
    """Return the hidden patches, normalised one by one where the model says so (ddof 1, epsilon 1e-6)."""
    target = take_tokens(patchify(image, model.patch_size), masking.hidden)
    if not model.norm_target:
        return target
    mean, variance = target.mean(axis=-1, keepdims=True), target.var(axis=-1, keepdims=True, ddof=1)
    return (target - mean) * jax.lax.rsqrt(variance + 1e-6)


def masked_loss(
    model: MaskedModel, params: Params, keys: Key[Array, " batch"], batch: Mapping[str, Array]
) -> tuple[Scalar, dict[str, Scalar]]:
    """Return the mean squared error over the voxels of hidden patches.

    Args:
        model: Predicts hidden patches.
        params: Its parameters.
        keys: One per image, for the patches to hide.
        batch: "image" [batch, *image_size, channels].

    Returns:
        The loss; metrics hold the variance of the targets, which is the loss of the best constant.

    Source: MAE, arXiv:2111.06377, section 3 (loss on hidden patches only).
    """
    image = batch["image"]
    output = model.network.apply(params, image, draw_noise(keys, model.num_tokens))
    target = masked_targets(model, image, output.masking)
    error = jnp.mean(jnp.square(output.prediction - target))
    return error, {"target_variance": jnp.var(target)}
