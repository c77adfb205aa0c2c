"""Losses of latent diffusion's autoencoders: what a latent may say, whether images look real, and images of latents.

Source: Rombach et al., arXiv:2112.10752; CoCoLIT, arXiv:2508.01292, its abstract and official code.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxmed.arrays.types import Scalar

SLOPE = 0.05
"""Of the rectifier through which logits go before they are squared."""


def normal_divergence(
    mean: Float[Array, "batch *grid latent"], deviation: Float[Array, "batch *grid latent"]
) -> Float[Array, " batch"]:
    """Return the Kullback-Leibler divergence of each latent's normal distribution from the standard one, in nats.

    A sum over the entries of a latent, not a mean: the published weight of 1e-7 is one for the sum over 155,648.
    """
    each = 0.5 * (jnp.square(mean) + jnp.square(deviation) - 2 * jnp.log(deviation) - 1)
    return each.sum(axis=tuple(range(1, each.ndim)))


def least_squares(logits: Float[Array, "..."], target: float) -> Scalar:
    """Return the mean squared distance of rectified logits from what they should be: 1 for real images, 0 for others.

    Source: least squares GAN, arXiv:1611.04076; MONAI's PatchAdversarialLoss for the leaky rectifier.
    """
    return jnp.mean(jnp.square(jax.nn.leaky_relu(logits, SLOPE) - target))


def discriminator_loss(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Scalar:
    """Return half the least-squares losses of the logits of real and of made images, which is 1/4 where all are 1/2."""
    return 0.5 * (least_squares(real, 1.0) + least_squares(fake, 0.0))


def time_weight(t: Num[Array, " batch"], num_steps: int) -> Float[Array, " batch"]:
    """Return lambda_t = (T - t) / T, by which the image of a latent that was expected at time t counts.

    Source: the Weighted Image Space Loss (WISL) of CoCoLIT, arXiv:2508.01292, official code.
    """
    return (num_steps - t) / num_steps


def weighted_absolute_error(
    found: Float[Array, "batch ..."], image: Float[Array, "batch ..."], weight: Float[Array, " batch"]
) -> Scalar:
    """Return the mean over images of weight times mean absolute error over voxels: WISL, with weights of `time_weight`.

    With weights of 1 it is the plain image space loss (ISL).
    """
    error = jnp.abs(found - image).mean(axis=tuple(range(1, image.ndim)))
    return jnp.mean(weight * error)
