"""How good is this mask of this image? The judge of self-play reasoning, cut where the mask comes in.

An image stays the same through thousands of proposals, so a verifier is two functions: `embed(params, images)`, once
per image, and `score(params, embedding, masks)`, for every proposal. The logit of a score is what comes out; its
sigmoid is D.

Source: arXiv:2506.22075; the plain network is that of the reference implementation, github.com/s-sd/system-II-vision:
    two branches that share nothing, of five 3x3 convolutions with ReLU and pooling, joined by four dense layers,
    3,435,777 parameters for 32 x 32.
Deviation: the networks of the medical runs are not published. The plain network sees image and mask together only after
    both are single vectors, and cannot tell a good pixel from a bad one; the default lets every level of the mask's
    branch see the image's features, and pools the features under the mask and outside.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxmed.arrays.types import Params
from jaxmed.config import Size, checked
from jaxmed.models.mask_generator import GeneratorConfig, unet
from jaxmed.nn.convolution import Convolution
from jaxmed.nn.transformer import Linear
from jaxmed.nn.unet_blocks import halve


@dataclasses.dataclass(frozen=True)
@checked
class VerifierConfig:
    """A judge of masks.

    Attributes:
        kind: "joint", or "plain", the reference's two branches.
        dimensions: Spatial axes.
        widths: Channels of each level; levels are halved.
        dense: Widths of the dense layers before the logit.
        dtype: Type of activations and products.
    """

    kind: Literal["joint", "plain"] = "joint"
    dimensions: Literal[2, 3] = 2
    widths: tuple[Size, ...] = (16, 32, 64)
    dense: tuple[Size, ...] = (64,)
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("widths: expected one or more, found none")
        if self.kind == "joint":
            GeneratorConfig(widths=self.widths)  # the image's branch is a U-Net of these widths

    @property
    def divisor(self) -> int:
        """What the voxels along every axis must be a multiple of."""
        return 2 ** (len(self.widths) - (self.kind == "joint"))


class Verifier(NamedTuple):
    """The two halves of a judge, as pure functions.

    Attributes:
        init: `init(key, images, masks) -> params`.
        embed: `embed(params, images) -> embedding`, images [batch *space 1]; every leaf has the batch axis first.
        score: `score(params, embedding, masks) -> logits`, masks [batch *space] between 0 and 1.
    """

    init: Callable[..., Params]
    embed: Callable[..., PyTree]
    score: Callable[..., Float[Array, " batch"]]


def make_verifier(config: VerifierConfig) -> Verifier:
    """Return the functions of a verifier."""
    module = Plain(config) if config.kind == "plain" else Joint(config)

    def init(key: Any, images: jax.Array, masks: jax.Array) -> Params:
        return dict(module.init(key, images, masks)["params"])

    def embed(params: Params, images: jax.Array) -> PyTree:
        return module.apply({"params": params}, images, method="embed")

    def score(params: Params, embedding: PyTree, masks: jax.Array) -> jax.Array:
        logits = module.apply({"params": params}, embedding, masks, method="score")
        assert isinstance(logits, jax.Array)
        return logits

    return Verifier(init, embed, score)


class Joint(nn.Module):
    """A U-Net on the image; on the mask a pyramid, each level of which sees the image's features of its size."""

    config: VerifierConfig

    def setup(self) -> None:
        config = self.config
        sizes = GeneratorConfig("unet", config.dimensions, config.widths, 1, config.dtype)
        self.image = unet(sizes, config.widths[0], "image")
        self.enter = [Convolution(w, dtype=config.dtype, name=f"enter_{i}") for i, w in enumerate(config.widths)]
        self.see = [Convolution(w, 1, dtype=config.dtype, name=f"see_{i}") for i, w in enumerate(config.widths)]
        self.leave = [Convolution(w, dtype=config.dtype, name=f"leave_{i}") for i, w in enumerate(config.widths)]
        self.dense = [Linear(w, name=f"dense_{i}") for i, w in enumerate(config.dense)]
        self.head = Linear(1, name="head")

    def __call__(self, images: Float[Array, "batch *space 1"], masks: Float[Array, "batch *space"]) -> Array:
        return self.score(self.embed(images), masks)

    def embed(self, images: Float[Array, "batch *space 1"]) -> PyTree:
        """Return the image's features at full size, and what each level of the mask's branch adds of them."""
        features = self.image(images)
        seen, h = [], features
        for level, see in enumerate(self.see):
            h = halve(h) if level else h
            seen.append(see(h))
        return {"features": features, "seen": tuple(seen)}

    def score(self, embedding: PyTree, masks: Float[Array, "batch *space"]) -> Float[Array, " batch"]:
        """Return the logit of each mask's score."""
        signs = 2 * masks[..., None] - 1
        axes = tuple(range(1, signs.ndim - 1))
        h = signs
        for level, (enter, seen, leave) in enumerate(zip(self.enter, embedding["seen"], self.leave, strict=True)):
            h = halve(h) if level else h
            h = nn.relu(leave(nn.relu(enter(h) + seen)))
        features = embedding["features"]
        # Agreement of mask and image, pixel by pixel: what an overlap is made of.
        agreement = jnp.mean(features * signs, axis=axes)
        h = jnp.concatenate([jnp.mean(h, axis=axes), agreement, features.mean(axes), signs.mean(axes)], axis=-1)
        for dense in self.dense:
            h = nn.relu(dense(h))
        return self.head(h)[..., 0].astype(jnp.float32)


class Plain(nn.Module):
    """Image and mask in two branches, joined as vectors."""

    config: VerifierConfig

    def setup(self) -> None:
        self.image = Branch(self.config, name="image")
        self.mask = Branch(self.config, name="mask")
        glorot = nn.initializers.glorot_uniform()
        self.dense = [nn.Dense(w, kernel_init=glorot, name=f"dense_{i}") for i, w in enumerate(self.config.dense)]
        self.head = nn.Dense(1, kernel_init=glorot, name="head")

    def __call__(self, images: Float[Array, "batch *space 1"], masks: Float[Array, "batch *space"]) -> Array:
        return self.score(self.embed(images), masks)

    def embed(self, images: Float[Array, "batch *space 1"]) -> Float[Array, "batch feature"]:
        """Return the vector of each image."""
        return self.image(images)

    def score(
        self, embedding: Float[Array, "batch feature"], masks: Float[Array, "batch *space"]
    ) -> Float[Array, " batch"]:
        """Return the logit of each mask's score."""
        h = jnp.concatenate([embedding, self.mask(masks[..., None])], axis=-1)
        for dense in self.dense:
            h = nn.relu(dense(h))
        return self.head(h)[..., 0].astype(jnp.float32)


class Branch(nn.Module):
    """Convolutions, each with ReLU and the maximum of 2 along every axis, and what is left as a vector."""

    config: VerifierConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch *space 1"]) -> Float[Array, "batch feature"]:
        window = (2,) * (x.ndim - 2)
        glorot = nn.initializers.glorot_uniform()
        for number, width in enumerate(self.config.widths):
            x = nn.relu(Convolution(width, dtype=self.config.dtype, kernel_init=glorot, name=f"layer_{number}")(x))
            x = nn.max_pool(x, window, window)
        return x.reshape(len(x), -1)


DEMO_VERIFIER = VerifierConfig("plain", widths=(32, 128, 256, 256, 256), dense=(512, 256, 64))
"""The reference's network for 32 x 32 digits."""
