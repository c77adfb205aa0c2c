"""pix2pix for volumes: a U-Net from one image to another, by absolute error and against a discriminator that sees both.

The baseline of translation between modalities: what a method that draws samples in a latent space has to outperform.
Pairs stay in the device's memory and all steps are one program, as befits a small network; for anything larger see
`recipes.training`. Both networks are moved at once by one gradient, as in `recipes.adversarial_autoencoder`.

Source: Isola et al., arXiv:1611.07004, equation 4.
Deviation: the U-Net of guided diffusion without a time, and least squares instead of logarithms. Its last convolution
starts at 0, so that the first image is 0 in the network's unit.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.config import NonNegative, Number, Positive, Size, checked
from jaxmed.models.patch_discriminator import PatchDiscriminatorConfig, patch_discriminator
from jaxmed.models.unet_guided import GuidedUnetConfig, guided_unet
from jaxmed.objectives.autoencoding import discriminator_loss, least_squares

UNET = GuidedUnetConfig(
    dimensions=3, width=16, multipliers=(1, 2, 2), blocks=1, attention_factors=(), groups=8, with_time=False
)
MOMENTUM = 0.5
"""Of Adam, as published."""


@dataclasses.dataclass(frozen=True)
@checked
class Pix2PixConfig:
    """The baseline of image translation.

    Attributes:
        steps: Steps of training; 0 leaves the baseline out.
        batch: Pairs of a step.
        peak_lr: Learning rate of both networks; falls to 0 over the second half.
        error_weight: Weight of the mean absolute error beside the adversarial loss.
        model: The U-Net; volumes of full size want its attention "blocks", since its middle attends to all voxels.
        discriminator: Its opponent, of both images: two channels.
    """

    steps: Number = 2000
    batch: Size = 2
    peak_lr: Positive = 2e-4
    error_weight: NonNegative = 100.0
    model: GuidedUnetConfig = UNET
    discriminator: PatchDiscriminatorConfig = PatchDiscriminatorConfig(channels=2, width=16, layers=2)

    def __post_init__(self) -> None:
        if self.model.with_time or (self.model.channels, self.model.outputs) != (1, 1) or self.model.learn_sigma:
            raise ValueError("model: expected one channel in and out and no time")
        if self.discriminator.channels != 2 or self.discriminator.dimensions != self.model.dimensions:
            raise ValueError("discriminator: expected two channels, and as many axes as the model")


# Compiled here, as what follows: op by op a network takes minutes.
@partial(jax.jit, static_argnames=("config",))
def translate_image(config: Pix2PixConfig, params: Params, source: Float[Array, "batch *space 1"]) -> Array:
    """Return the images that a trained network makes of others."""
    return guided_unet(config.model, source.shape[1:-1]).apply(params, source)


def fit_files(
    config: Pix2PixConfig, seed: int, images: Sequence[tuple[Callable[[Path], np.ndarray], Sequence[Path]]]
) -> Params | None:
    """Train on files.

    Args:
        config: Sizes and lengths.
        seed: Of the start and of the order.
        images: Of the source, then of the target: how one is read as [x, y, z, 1], and the files, pair by pair.

    Returns:
        Parameters of the U-Net; None where there are no steps, or no pairs.
    """
    if not config.steps or not images[0][1]:
        return None
    source, target = (jnp.asarray(np.stack([read(path) for path in paths])) for read, paths in images)
    return fit_pix2pix(jax.random.key(seed), source, target, config)[0]


@partial(jax.jit, static_argnames=("config",))
def fit_pix2pix(
    key: KeyArray,
    source: Float[Array, "pair *space 1"],
    target: Float[Array, "pair *space 1"],
    config: Pix2PixConfig,
) -> tuple[Params, Float[Array, " step"]]:
    """Train on pairs.

    Args:
        key: Consumed.
        source: In the network's unit, near 0 and 1 in mean and deviation.
        target: Likewise.
        config: Sizes and lengths.

    Returns:
        Parameters of the U-Net, and the mean absolute error at every step.
    """
    generator = guided_unet(config.model, source.shape[1:-1])
    critic = patch_discriminator(config.discriminator)
    start_key, critic_key, step_key = jax.random.split(key, 3)
    both = jnp.concatenate([source[:1], target[:1]], -1)
    params = {"generator": generator.init(start_key), "discriminator": critic.init(critic_key, both)}
    rate = optax.linear_schedule(config.peak_lr, 0.0, max(config.steps // 2, 1), config.steps // 2)
    # As one vector: an operation for every tensor would take a third longer to compile.
    optimizer = optax.flatten(optax.adam(rate, b1=MOMENTUM))
    loss = partial(pix2pix_loss, generator.apply, critic.apply, config.error_weight)

    def step(state: Any, key: KeyArray) -> tuple[Any, Scalar]:
        params, moments = state
        rows = jax.random.randint(key, (config.batch,), 0, len(source))
        gradient, error = jax.grad(loss, has_aux=True)(params, source[rows], target[rows])
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), error

    keys = jax.random.split(step_key, config.steps)
    (params, _), errors = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params["generator"], errors


def pix2pix_loss(
    generate: Callable[..., Array],
    judge: Callable[..., Array],
    weight: float,
    params: Params,
    source: Float[Array, "batch *space 1"],
    target: Float[Array, "batch *space 1"],
) -> tuple[Scalar, Scalar]:
    """Return the sum of both networks' losses, whose gradients do not mix, and the mean absolute error.

    Args:
        generate: `(params, source) -> image`.
        judge: `(params, source and image in two channels) -> logits`.
        weight: Of the mean absolute error.
        params: "generator" and "discriminator".
        source: Images.
        target: What should become of them.
    """
    made, opponent = generate(params["generator"], source), params["discriminator"]
    error = jnp.mean(jnp.abs(made - target))
    held = jax.lax.stop_gradient(opponent)
    adversarial = least_squares(judge(held, jnp.concatenate([source, made], -1)), 1.0)
    both = jnp.concatenate([target, jax.lax.stop_gradient(made)])  # images do not see one another
    judged = jnp.split(judge(opponent, jnp.concatenate([jnp.concatenate([source, source]), both], -1)), 2)
    return weight * error + adversarial + discriminator_loss(*judged), error
