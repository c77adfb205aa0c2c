"""Train a ControlNet beside a U-Net of latents that is held, and the decoder of the images with both.

The ControlNet is told of a condition, the latent of another image; what it adds inside the U-Net changes the noise that
is expected. Decoding the latent that follows, and comparing with the image itself, trains the decoder and, through the
expected noise, the ControlNet.

Source: Zhang et al., arXiv:2302.05543; the image space losses of CoCoLIT, arXiv:2508.01292, its abstract and official
code; without them, BrLP (its sibling).
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.diffusion.schedule import VpDiscrete, expand_like
from jaxmed.models.autoencoder_kl import AutoencoderKlConfig, autoencoder
from jaxmed.models.published.load import Published
from jaxmed.models.unet_latent import (
    Control,
    ControlNetConfig,
    LatentDenoiser,
    control_net,
    crop_latent,
    latent_unet,
)
from jaxmed.nn.model import Network
from jaxmed.objectives.autoencoding import time_weight, weighted_absolute_error

ImageLoss = Literal["wisl", "isl", "none"]


class ControlParts(NamedTuple):
    """The networks that are trained together.

    Attributes:
        unet: Held as it is.
        control: Trained.
        image: Sizes of the autoencoder whose decoder is trained too.
        chain: Of diffusion, of which the U-Net expects the noise.
    """

    unet: LatentDenoiser
    control: Control
    image: AutoencoderKlConfig
    chain: VpDiscrete


def control_loss(
    parts: ControlParts,
    kind: ImageLoss,
    params: Params,
    keys: Key[Array, " batch"],
    batch: Mapping[str, Array],
) -> tuple[Scalar, dict[str, Scalar]]:
    """Return the squared error of the noise that is expected given the condition, plus that of the image which follows.

    The image is the decoded latent that is expected at the drawn time, which is not clipped. Late times, where the
    error of the noise is multiplied by up to a hundred, count little in "wisl" and as all others in "isl".

    Args:
        parts: The networks.
        kind: "wisl" (weights fall with time), "isl" (all 1), or "none" (noise alone; the decoder stays).
        params: "unet" (constant), "controlnet" and "decoder", the last with what decoding reads.
        keys: One for each pair, for its time and its noise.
        batch: "condition" and "latent", padded [batch, i, j, k, channel]; for images "image" [batch, x, y, z, 1].

    Source: CoCoLIT, arXiv:2508.01292, official code.
    """
    latent, condition, chain = batch["latent"], batch["condition"], parts.chain
    time_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    t = chain.draw_times(time_keys)
    noise = jax.vmap(lambda key, one: jax.random.normal(key, one.shape))(noise_keys, latent)
    alpha, sigma = expand_like(chain.alpha(t), latent), expand_like(chain.sigma(t), latent)
    noisy = alpha * latent + sigma * noise
    held = jax.lax.stop_gradient(params["unet"])
    residuals = parts.control.apply(params["controlnet"], noisy, t, condition)
    found = parts.unet.apply(held, noisy, t, residuals)
    error = jnp.mean(jnp.square(found - noise))
    if kind == "none":
        return error, {"noise_error": error}
    weight = time_weight(t, chain.num_steps) if kind == "wisl" else jnp.ones_like(t)
    value = image_loss(parts.image, params["decoder"], (noisy - sigma * found) / alpha, batch["image"], weight)
    return error + value, {"noise_error": error, "image_error": value}


def image_loss(
    config: AutoencoderKlConfig,
    decoder: Params,
    latent: Float[Array, "batch i j k channel"],
    image: Float[Array, "batch x y z 1"],
    weight: Float[Array, " batch"],
) -> Scalar:
    """Return the weighted mean absolute error of decoded latents, whose padding is cut off.

    Args:
        config: Sizes of the autoencoder.
        decoder: Its parameters "from_latent" and "decoder".
        latent: Padded.
        image: In the autoencoder's unit.
        weight: Of each pair.
    """
    inner = tuple(length // config.divisor for length in image.shape[1:4])
    cut = jax.vmap(partial(crop_latent, shape=inner))(latent)
    return weighted_absolute_error(autoencoder(config).decode(decoder, cut), image, weight)


def decoder_of(params: Params) -> Params:
    """Return the part of an autoencoder's parameters that decoding reads."""
    return {name: params[name] for name in ("from_latent", "decoder")}


def make_control(
    config: ControlNetConfig,
    unet: Published,
    image: Published,
    chain: VpDiscrete,
    size: tuple[int, ...],
    kind: ImageLoss,
    *,
    from_unet: bool,
    remat_decoder: bool,
    dtype: Literal["float32", "bfloat16"],
) -> tuple[Network, ControlParts, Params]:
    """Return what is trained, the networks as the loss takes them, and the parameters that training starts from.

    Args:
        config: Sizes of the ControlNet.
        unet: The U-Net, which is held.
        image: The autoencoder of the images.
        chain: Of diffusion.
        size: Voxels of a padded latent.
        kind: As of `control_loss`; the decoder is held too where it is "none".
        from_unet: Start the ControlNet's encoder as a copy of the U-Net's; else at random.
        remat_decoder: Recompute the decoder's blocks in the backward pass.
        dtype: Type of the networks' products.
    """
    sizes = dataclasses.replace(config.unet, dtype=dtype)
    denoiser, net = latent_unet(sizes), control_net(dataclasses.replace(config, unet=sizes))
    decoder = dataclasses.replace(image.config, dtype=dtype, remat=remat_decoder)
    latent, condition = jnp.zeros((1, *size, sizes.channels)), jnp.zeros((1, *size, config.condition_channels))
    least, time = jnp.zeros((1, *(decoder.divisor,) * len(size), 1)), jnp.zeros(1)

    def init(key: KeyArray) -> Params:
        unet_key, control_key, decoder_key = jax.random.split(key, 3)
        return {
            "unet": denoiser.init(unet_key, latent, time),
            "controlnet": net.init(control_key, latent, time, condition),
            "decoder": decoder_of(autoencoder(decoder).init(decoder_key, least)),
        }

    start: Params = {"unet": unet.params, "decoder": decoder_of(image.params)}
    if from_unet:
        start["controlnet"] = {"encoder": unet.params["encoder"]}
    frozen = ("^unet/", *(("^decoder/",) if kind == "none" else ()))
    return Network(init, net.apply, frozen=frozen), ControlParts(denoiser, net, decoder, chain), start
