"""From an MRI, prepared as the networks want it, to a map of SUVR: functions on arrays.

Source: CoCoLIT, arXiv:2508.01292, official code (its sampler, and latent average stabilisation).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from jaxmed.arrays.types import KeyArray
from jaxmed.config import Size, checked
from jaxmed.diffusion.averaging import average_samples, curvature_trace
from jaxmed.diffusion.denoiser import Denoiser, make_denoiser
from jaxmed.diffusion.samplers import Ddim
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.models.autoencoder_kl import autoencoder
from jaxmed.models.published.load import Published
from jaxmed.models.unet_latent import control_net, crop_latent, latent_unet, pad_latent

CHAIN = VpDiscrete(betas="scaled-linear")
CLIP = (-1.0, 1.0)
"""Where the released sampler holds the expected latent."""
POSITIVE = 1.326
"""SUVR above which amyloid counts as positive; the released tool prints it."""


class Models(NamedTuple):
    """The networks; a pytree, so that jit and vmap take it as it is.

    Attributes:
        mri: Autoencoder of MRI.
        pet: Autoencoder of SUVR maps; mean and deviation of its `preprocess` turn its images into SUVR.
        unet: The U-Net of SUVR latents.
        controlnet: What tells it of the MRI.
    """

    mri: Published
    pet: Published
    unet: Published
    controlnet: Published


@dataclasses.dataclass(frozen=True)
@checked
class SamplingConfig:
    """How latents are drawn.

    Attributes:
        steps: Steps of DDIM, each one pass of U-Net and ControlNet.
        clip: Hold the expected latent within [-1, 1] at every step, as the released tool does; latents have no such
            range, so that this cuts off what is extreme.
        chunk: Samples in memory at a time; shared by the devices of mesh.data.
        spread: Decode every sample too: the standard deviation of the maps, and their mean, which has no bias.
    """

    steps: Size = 50
    clip: bool = True
    chunk: Size = 4
    spread: bool = True


class Translation(NamedTuple):
    """A synthesised map.

    Attributes:
        suvr: The decoded mean of the latents.
        spread: Standard deviation of the decoded samples, in SUVR; 0 for one sample, None where samples were not
            decoded.
        mean_map: Mean of the decoded samples; its difference from `suvr` is the bias of averaging latents.
        latent: Mean of the latents, padded as the U-Net wants it.
        latent_spread: Their standard deviation.
        at_limit: Share of the samples' entries at or beyond -1 and 1.
    """

    suvr: Float[Array, "x y z"]
    spread: Float[Array, "x y z"] | None
    mean_map: Float[Array, "x y z"] | None
    latent: Float[Array, "i j k channel"]
    latent_spread: Float[Array, "i j k channel"]
    at_limit: Float[Array, ""]


# Compiled here, once for every shape, number of samples and setting: networks run op by op take minutes to compile.
@partial(jax.jit, static_argnames=("m", "config", "sharding"))
def translate(
    key: KeyArray,
    models: Models,
    mri: Float[Array, "x y z"],
    m: int = 64,
    config: SamplingConfig = SamplingConfig(),
    sharding: NamedSharding | None = None,
) -> Translation:
    """Synthesise a map of SUVR from an MRI; one program, whose memory does not grow with the number of samples.

    jit, vmap and grad go through.

    Args:
        key: Consumed. Sample i has the same noise in any chunk and on any devices.
        models: The networks.
        mri: As the MRI's autoencoder wants it (`preparation.prepare`): padded, then scaled; multiples of its divisor.
        m: Latents that are averaged; 64 in the paper. Static, as what follows.
        config: How they are drawn.
        sharding: Of the samples of a chunk over devices; None leaves them where they are.

    Source: CoCoLIT, arXiv:2508.01292, official code. With Jacobian and Hessian H of the decoder and covariance S of the
        latents, decoding the mean of m differs from the mean map by (1/m - 1) Tr(H S) / 2 to second order.
    """
    condition, decode = encode(models, mri), make_decoder(models, mri)
    sampler, clip = Ddim(times=CHAIN.leading_times(config.steps)), CLIP if config.clip else None

    def read(latents: Float[Array, "chunk i j k channel"]) -> dict[str, Array]:
        found = {"latent": latents, "at_limit": jnp.mean(jnp.abs(latents) >= 1, axis=(1, 2, 3, 4))}
        if config.spread:
            # One after the other where they are on one device: a map at full size has gigabytes of activations.
            found["map"] = jax.lax.map(decode, latents) if sharding is None else jax.vmap(decode)(latents)
        return found

    moments = average_samples(
        key, latent_denoiser(models, condition), condition.shape, sampler, m, chunk=config.chunk, clip=clip, read=read,
        sharding=sharding,
    )  # fmt: skip
    mean, std = moments.mean, moments.std
    return Translation(
        decode(mean["latent"]), std.get("map"), mean.get("map"), mean["latent"], std["latent"], mean["at_limit"]
    )


@partial(jax.jit, static_argnames=("m", "directions"))
def predict_bias(
    key: KeyArray, models: Models, found: Translation, m: int = 64, directions: int = 8
) -> Float[Array, "x y z"]:
    """Return by how much theory has the map differ from the mean of the decoded samples, in SUVR.

    Args:
        key: Consumed; draws directions.
        models: The networks.
        found: A translation, of which mean and spread of the latents count.
        m: Latents that were averaged.
        directions: Over which the decoder's second derivative is averaged.

    Source: as of `translate`; see `diffusion.averaging.curvature_trace`.
    """
    keys = jax.random.split(key, directions)
    trace = curvature_trace(make_decoder(models, found.suvr), found.latent, found.latent_spread, keys)
    return 0.5 * (1 / m - 1) * trace


def encode(models: Models, mri: Float[Array, "x y z"]) -> Float[Array, "i j k channel"]:
    """Return the mean latent of an MRI, padded with zeros on both sides to what the U-Net can halve."""
    latent = autoencoder(models.mri.config).encode(models.mri.params, mri[None, ..., None])[0][0]
    return pad_latent(latent, models.unet.config.divisor)


def make_decoder(
    models: Models, mri: Float[Array, "x y z"]
) -> Callable[[Float[Array, "i j k channel"]], Float[Array, "x y z"]]:
    """Return the function from a padded latent to its map, in SUVR and of the size of an MRI."""
    pet = models.pet
    (mean,), (std,) = pet.preprocess.intensity.mean, pet.preprocess.intensity.std
    inner = tuple(length // pet.config.divisor for length in mri.shape)

    def decode(latent: Float[Array, "i j k channel"]) -> Float[Array, "x y z"]:
        image = autoencoder(pet.config).decode(pet.params, crop_latent(latent, inner)[None])
        return std * image[0, ..., 0].astype(jnp.float32) + mean

    return decode


def latent_denoiser(models: Models, condition: Float[Array, "i j k channel"]) -> Denoiser:
    """Return the expected SUVR latent given its noisy version and the MRI's latent, which is embedded once."""
    unet, control = latent_unet(models.unet.config), control_net(models.controlnet.config)
    params, told = models.unet.params, models.controlnet.params
    embedded = control.embed_condition(told, condition[None])

    def predict(z: Float[Array, "batch i j k channel"], t: Float[Array, " batch"]) -> Array:
        residuals = control.control(told, z, control.embed(told, t), embedded)
        return unet.denoise(params, z, unet.embed(params, t), residuals)

    return make_denoiser(predict, CHAIN, "epsilon")
