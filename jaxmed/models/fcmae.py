"""Fully convolutional masked autoencoder (arXiv:2301.00808) around a ConvNeXt V2, for 2D and 3D images."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.masking import Masking, choose_masking, hidden_mask, take_tokens
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Share, Size, checked
from jaxmed.models.convnext import INIT, PROFOUND, ConvNext, ConvNextBlock, ConvNextConfig
from jaxmed.models.mae import MaeOutput, MaskedModel
from jaxmed.nn.model import Network, make_model
from jaxmed.nn.transformer import Linear


@dataclasses.dataclass(frozen=True)
@checked
class FcmaeConfig:
    """A fully convolutional masked autoencoder; the defaults are ProFound's.

    Attributes:
        encoder: The network that sees kept patches.
        decoder_width: Channels of the decoder.
        decoder_depth: Its blocks.
        mask_ratio: Fraction of patches hidden, in (0, 1).
        norm_target: Whether each target patch is normalised to mean 0 and variance 1.
    """

    encoder: ConvNextConfig = PROFOUND
    decoder_width: Size = 512
    decoder_depth: Size = 1
    mask_ratio: Share = 0.6
    norm_target: bool = True

    def __post_init__(self) -> None:
        places = self.encoder.num_tokens
        if not 1 <= int(places * (1 - self.mask_ratio)) < places:
            expected = f"some of {places} patches kept and some hidden"
            raise ValueError(f"mask_ratio: expected {expected}, found {self.mask_ratio:g}")


class Fcmae(nn.Module):
    """Hide patches, encode the rest, predict the hidden ones; parameters are encoder and decoder."""

    config: FcmaeConfig

    def setup(self) -> None:
        self.encoder = ConvNext(self.config.encoder)
        self.decoder = FcmaeDecoder(self.config)

    def __call__(
        self,
        image: Float[Array, "batch ..."],
        noise: Float[Array, "batch token"] | None = None,
        *,
        key: KeyArray | None = None,
        all_patches: bool = False,
    ) -> MaeOutput:
        """Return tokens of kept patches, prediction and masking, as `models.mae.Mae` does."""
        config = self.config
        masking = choose_masking(len(image), config.encoder.num_tokens, config.mask_ratio, noise, key)
        seen = self.encoder(image, masking.kept)
        return MaeOutput(seen, self.decoder(seen, masking, all_patches), masking)


class FcmaeDecoder(nn.Module):
    """Tokens of kept patches to voxels: a linear map, mask tokens in the other places, blocks, a linear map."""

    config: FcmaeConfig

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "batch keep width"], masking: Masking, all_patches: bool = False
    ) -> Float[Array, "batch patch voxel"]:
        """Return the voxels of hidden patches, or of all of them, in the order of the masking."""
        config, encoder = self.config, self.config.encoder
        mask_token = self.param("mask_token", INIT, (config.decoder_width,), jnp.float32)
        known = Linear(config.decoder_width, encoder.dtype, INIT, name="embed")(tokens).astype(jnp.float32)
        places = jnp.zeros((len(tokens), encoder.num_tokens), jnp.int32)
        rows = jnp.arange(len(tokens))[:, None]
        places = places.at[rows, masking.kept].set(jnp.arange(tokens.shape[1])[None])
        x = jnp.where(hidden_mask(masking)[..., None], mask_token, take_tokens(known, places))
        x = x.reshape(len(tokens), *encoder.grid, config.decoder_width)
        for number in range(config.decoder_depth):
            block = ConvNextBlock(
                config.decoder_width, encoder.kernel_size, encoder.epsilon, dtype=encoder.dtype, name=f"block_{number}"
            )
            x = block(x)
        x = x.reshape(len(tokens), encoder.num_tokens, config.decoder_width)
        asked = masking.order if all_patches else masking.hidden
        voxels = math.prod(encoder.patch_size) * encoder.channels
        return Linear(voxels, encoder.dtype, INIT, name="prediction")(take_tokens(x, asked)).astype(jnp.float32)


@functools.lru_cache(maxsize=8)  # one record for one configuration, so that what was compiled for it serves again
def fcmae_model(config: FcmaeConfig) -> MaskedModel:
    """Return the masked autoencoder around a ConvNeXt."""
    model, encoder = make_model(Fcmae(config)), config.encoder

    def init(key: KeyArray) -> Params:
        image = jnp.zeros((1, *encoder.image_size, encoder.channels))
        return model.init(key, image, jnp.zeros((1, encoder.num_tokens)))

    return MaskedModel(
        Network(init, model.apply), encoder.image_size, encoder.channels, encoder.patch_size, config.norm_target
    )
