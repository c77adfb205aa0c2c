"""Train a KL autoencoder against a discriminator: the first stage of latent diffusion.

Both are trained at once, by one gradient: the autoencoder's part of the loss sees the discriminator as a constant, the
discriminator's part sees the reconstruction as one. So no gradient meets the wrong network, a batch may come in parts,
and one optimizer serves both (Adam has no number that both share).

Source: Rombach et al., arXiv:2112.10752; CoCoLIT, arXiv:2508.01292, official code.
Deviation: the released code adds the autoencoder's adversarial gradient to the discriminator's own before each of its
steps; `match_release` does the same. Both networks are moved at once, not in turn.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.config import NonNegative, checked
from jaxmed.models.autoencoder_kl import Autoencoder, AutoencoderKlConfig, autoencoder
from jaxmed.models.patch_discriminator import PatchDiscriminatorConfig, patch_discriminator
from jaxmed.nn.model import Model, Network
from jaxmed.objectives.autoencoding import discriminator_loss, least_squares, normal_divergence
from jaxmed.recipes.training import TrainConfig, TrainData, run_training, selected
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder

Augment: TypeAlias = Callable[[KeyArray, Float[Array, "*space channel"]], Float[Array, "*space channel"]]
# perceptual(keys, reconstruction, image), the distance of two batches of images.
Perceptual: TypeAlias = Callable[..., Scalar]


@dataclasses.dataclass(frozen=True)
@checked
class AutoencoderLossConfig:
    """What counts how much beside the mean absolute error of the reconstruction.

    Attributes:
        divergence: Weight of the latent's divergence from a standard normal distribution, a sum over its entries.
        perceptual: Weight of the distance of features, where their network is given.
        adversarial: Weight of both adversarial losses.
        match_release: Give the discriminator the autoencoder's adversarial gradient too, as the released code does.
    """

    divergence: NonNegative = 1e-7
    perceptual: NonNegative = 1e-3
    adversarial: NonNegative = 0.025
    match_release: bool = False


def train_autoencoder(
    config: TrainConfig,
    loss: AutoencoderLossConfig,
    model: AutoencoderKlConfig,
    discriminator: PatchDiscriminatorConfig,
    data: TrainData,
    size: tuple[int, ...],
    augment: Augment,
    *,
    folder: RunFolder,
    log: Log,
    start: Params | None = None,
    perceptual: Perceptual | None = None,
) -> Params:
    """Train autoencoder and discriminator, or continue a run of this folder.

    Args:
        config: The run; its optimizer serves both networks.
        loss: What counts how much.
        model: The autoencoder.
        discriminator: Its opponent, which is not handed on.
        data: The records; transformed, they are {"image": [*size, channels]}.
        size: Voxels of an image.
        augment: One image to a variant of it, on the device.
        folder: The run.
        log: Its log.
        start: Parameters of an autoencoder to start from.
        perceptual: Distance of features; None leaves that term out.

    Returns:
        The autoencoder's parameters: of the evaluation with the least error where records are held out.
    """
    coder = autoencoder(dataclasses.replace(model, dtype=config.dtype))
    critic = patch_discriminator(dataclasses.replace(discriminator, dtype=config.dtype))
    image = jnp.zeros((1, *size, model.channels))

    def init(key: KeyArray) -> Params:
        coder_key, critic_key = jax.random.split(key)
        return {"autoencoder": coder.init(coder_key, image), "discriminator": critic.init(critic_key, image)}

    def objective(params: Params, keys: Key[Array, " batch"], batch: Mapping[str, Array]) -> Any:
        pairs = jax.vmap(jax.random.split)(keys)
        shown = jax.vmap(augment)(pairs[:, 0], batch["image"].astype(jnp.float32))
        return adversarial_autoencoder_loss(coder, critic, loss, params, pairs[:, 1], shown, perceptual)

    def score(params: Params, keys: Key[Array, " batch"], batch: Mapping[str, Array]) -> dict[str, Array]:
        error = jnp.abs(coder.apply(params["autoencoder"], batch["image"])[0] - batch["image"])
        return {"error": error.mean(axis=tuple(range(1, error.ndim)))}

    loop = dataclasses.replace(config.loop, best="error", best_is="smallest")
    config = dataclasses.replace(config, loop=loop)
    given = None if start is None else {"autoencoder": start}
    state = run_training(
        config, Network(init, coder.apply), objective, data, folder=folder, log=log, start=given, score=score
    )
    return selected(config, data, folder, state)["autoencoder"]


def adversarial_autoencoder_loss(
    coder: Autoencoder,
    critic: Model,
    config: AutoencoderLossConfig,
    params: Params,
    keys: Key[Array, " batch"],
    image: Float[Array, "batch *space channel"],
    perceptual: Perceptual | None = None,
) -> tuple[Scalar, dict[str, Scalar]]:
    """Return the sum of the autoencoder's loss and the discriminator's, whose gradients do not mix, and the terms.

    Args:
        coder: The autoencoder.
        critic: The discriminator.
        config: What counts how much.
        params: "autoencoder" and "discriminator".
        keys: One for each image: draws its latent.
        image: In the network's unit.
        perceptual: Distance of features; None leaves it out.
    """
    own, opponent = params["autoencoder"], params["discriminator"]
    mean, deviation = coder.encode(own, image)
    latent_keys, feature_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    noise = jax.vmap(lambda key, one: jax.random.normal(key, one.shape))(latent_keys, mean)
    found = coder.decode(own, mean + deviation * noise)

    held = opponent if config.match_release else jax.lax.stop_gradient(opponent)
    both = jnp.concatenate([image, jax.lax.stop_gradient(found)])  # images do not see one another
    judged = jnp.split(critic.apply(opponent, both), 2)
    terms = {
        "reconstruction": jnp.mean(jnp.abs(found - image)),
        "divergence": jnp.mean(normal_divergence(mean, deviation)),
        "adversarial": least_squares(critic.apply(held, found), 1.0),
        "discriminator": discriminator_loss(*judged),
    }
    weights = {
        "reconstruction": 1.0, "divergence": config.divergence, "adversarial": config.adversarial,
        "discriminator": config.adversarial,
    }  # fmt: skip
    if perceptual is not None:
        terms["perceptual"], weights["perceptual"] = perceptual(feature_keys, found, image), config.perceptual
    return sum((weights[name] * term for name, term in terms.items()), jnp.float32(0)), terms
