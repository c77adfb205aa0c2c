"""LLaVA: CLIP's image transformer, a projector of two layers, and a Llama decoder that reads images among words.

Features of the image take the places of placeholder tokens, which are found by their number and counted: no other token
is lost, whatever stands before them. A picture and the words before it are read once for all texts that follow
(`read_prefix`), and texts are answered in batches (`answer_texts`): the probabilities of the first token need one pass
and no decoding.

Source: LLaVA, arXiv:2304.08485, and LLaVA-1.5, arXiv:2310.03744; CLIP, arXiv:2103.00020; the Hugging Face code.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmed.arrays.patches import patch_grid, patchify, pool_patches
from jaxmed.arrays.types import Params
from jaxmed.config import Positive, Size, checked
from jaxmed.errors import InputError
from jaxmed.models.llama import Llama, LlamaConfig, Segment, empty_segment, write_segment
from jaxmed.models.vit import Blocks
from jaxmed.nn.model import Model
from jaxmed.nn.transformer import BlockConfig, LayerNorm, Linear


@dataclasses.dataclass(frozen=True)
@checked
class ClipConfig:
    """CLIP's image transformer.

    Attributes:
        image_size: Pixels along both axes.
        patch_size: Pixels of a patch along both axes.
        channels: Of the image.
        width: Token width.
        depth: Blocks.
        heads: Attention heads.
        hidden: Width inside the MLPs.
        epsilon: Added to variances in layer norms.
        mlp: The activation: "quick_gelu" as OpenAI trained it, or "gelu".
        layer: Hidden state that is handed on: -1 is that after the last block, 0 what enters the first.
        class_token: Whether the class token is handed on too.
        pool: Edge of the blocks of patches whose mean is handed on, as M3D's projector does; 1 hands on each patch.
    """

    image_size: Size = 336
    patch_size: Size = 14
    channels: Size = 3
    width: Size = 1024
    depth: Size = 24
    heads: Size = 16
    hidden: Size = 4096
    epsilon: Positive = 1e-5
    mlp: Literal["gelu", "quick_gelu"] = "quick_gelu"
    layer: int = -2
    class_token: bool = False
    pool: Size = 1

    def __post_init__(self) -> None:
        patch_grid(patch_grid((self.image_size,) * 2, (self.patch_size,) * 2), (self.pool,) * 2)
        if self.class_token and self.pool > 1:
            raise ValueError(f"pool: expected 1 where the class token is handed on, found {self.pool}")
        if not -self.depth - 1 <= self.layer <= self.depth:
            raise ValueError(f"layer: expected a hidden state of {self.depth} blocks, found {self.layer}")

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Tokens that are handed on."""
        return self.patches // self.pool**2 + self.class_token

    def block(self, dtype: str) -> BlockConfig:
        """Return what every block is."""
        return BlockConfig(self.width, self.heads, self.hidden, self.epsilon, dtype, mlp=self.mlp)


@dataclasses.dataclass(frozen=True)
@checked
class LlavaConfig:
    """A LLaVA model; its matrix products have the type of `text.dtype`.

    Attributes:
        vision: The image transformer.
        text: The decoder.
        image_token: Number of the placeholder token.
    """

    vision: ClipConfig = ClipConfig()
    text: LlamaConfig = LlamaConfig()
    image_token: int = 32000


class Clip(nn.Module):
    """Image to the tokens of one hidden state."""

    config: ClipConfig
    dtype: str

    def setup(self) -> None:
        config, normal = self.config, nn.initializers.normal(0.02)
        self.patch_embed = Linear(config.width, self.dtype, use_bias=False)
        self.class_token = self.param("class_token", normal, (config.width,))
        self.position = self.param("position", normal, (1 + config.patches, config.width))
        self.first_norm = LayerNorm(config.epsilon)
        self.blocks = Blocks(config.block(self.dtype), config.depth)

    def __call__(self, image: Float[Array, "batch row column channel"]) -> Float[Array, "batch token width"]:
        config, size = self.config, self.config.image_size
        if image.shape[1:] != (size, size, config.channels):
            raise ValueError(f"image: expected {(size, size, config.channels)}, got {image.shape[1:]}")
        patches = self.patch_embed(patchify(image, (config.patch_size,) * 2)).astype(jnp.float32)
        first = jnp.broadcast_to(jnp.asarray(self.class_token), (len(image), 1, config.width))
        x = self.first_norm(jnp.concatenate([first, patches], axis=1) + jnp.asarray(self.position))
        # Blocks behind the state that is wanted are dropped by the compiler.
        state = [x, *self.blocks.each(x)][config.layer]
        if config.class_token:
            return state
        return pool_patches(state[:, 1:], (size // config.patch_size,) * 2, config.pool)


class Projector(nn.Module):
    """Linear, exact GELU, linear: image tokens to the width of words."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch token width"]) -> Float[Array, "batch token features"]:
        x = nn.gelu(Linear(self.width, self.dtype, name="fc1")(x), approximate=False)
        return Linear(self.width, self.dtype, name="fc2")(x).astype(jnp.float32)


class Llava(nn.Module):
    """Images and tokens to logits; or the same in parts."""

    config: LlavaConfig

    def setup(self) -> None:
        text = self.config.text
        self.vision = Clip(self.config.vision, text.dtype)
        self.projector = Projector(text.width, text.dtype)
        self.language = Llama(text)

    def __call__(
        self, image: Float[Array, "batch row column channel"], tokens: Int[Array, "batch token"]
    ) -> Float[Array, "batch token token_id"]:
        """Return the logits after every token.

        Args:
            image: Normalised, [batch, *size, channel].
            tokens: Texts of one length, each with `vision.tokens` placeholders; see `require_placeholders`.
        """
        x, _ = self.read(image, tokens)
        return self.language.logits(x)

    def read(
        self, image: Float[Array, "batch row column channel"], tokens: Int[Array, "batch token"]
    ) -> tuple[Float[Array, "batch token width"], Segment]:
        """Return the stream of texts that begin here, with images among them, and what is kept of it."""
        x = splice(self.language.embed(tokens), tokens == self.config.image_token, self.projector(self.vision(image)))
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.language(x, positions, jnp.ones(tokens.shape, bool))

    def read_on(
        self,
        tokens: Int[Array, "batch token"],
        positions: Int[Array, "batch token"],
        is_valid: Bool[Array, "batch token"],
        past: tuple[Segment, ...],
    ) -> tuple[Float[Array, "batch token width"], Segment]:
        """Return the stream of words that follow what was read, and what is kept of it."""
        return self.language(self.language.embed(tokens), positions, is_valid, past)

    def logits(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch token_id"]:
        """Return the logits of the next token."""
        return self.language.logits(x)


def splice(
    words: Float[Array, "batch token width"],
    is_image: Bool[Array, "batch token"],
    features: Float[Array, "batch place width"],
) -> Float[Array, "batch token width"]:
    """Put features into the places of placeholders, in order; as many of these as there are features.

    Deviation: M3D overwrites the places after the first token, whatever stands there, and loses the words before the
    placeholders.
    """
    place = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, features.shape[1] - 1)
    return jnp.where(is_image[..., None], jnp.take_along_axis(features, place[..., None], axis=1), words)


def require_placeholders(tokens: Int[np.ndarray, "batch token"], config: LlavaConfig) -> None:
    """Refuse texts that have other numbers of placeholders than an image has tokens; on the host.

    Raises:
        InputError: One has.
    """
    counts = (np.asarray(tokens) == config.image_token).sum(axis=1)
    for count in counts:
        if count != config.vision.tokens:
            expected = f"{config.vision.tokens} placeholders, token {config.image_token}, for one image"
            raise InputError("tokens", expected, int(count))


class Texts(NamedTuple):
    """Texts that follow what was read, of different lengths.

    Attributes:
        tokens: Padded behind with any token.
        lengths: Tokens of each, at least 1.
    """

    tokens: Int[Array, "batch token"]
    lengths: Int[Array, " batch"]


class Sampling(NamedTuple):
    """How answers are drawn.

    Attributes:
        tokens: Of an answer, at most.
        temperature: 0 takes the likeliest token.
        top_p: Mass of likely tokens that one is drawn of.
        end: Token that ends an answer: it is repeated to the end.
    """

    tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    end: int = 2


def read_prefix(
    model: Model, params: Params, image: Float[Array, "batch row column channel"], tokens: Int[Array, "batch token"]
) -> Segment:
    """Read images and the words before and after them, for whatever texts follow.

    Args:
        model: Of `Llava`.
        params: Its parameters.
        image: One, for many texts; or one for each.
        tokens: With the placeholders.
    """
    return model.apply(params, image, tokens, method="read")[1]


def next_logits(
    model: Model, params: Params, prefix: Segment, texts: Texts
) -> tuple[Float[Array, "batch token_id"], Segment]:
    """Return the logits of the token that follows each text, and what is kept of the texts."""
    batch, length = texts.tokens.shape
    positions = jnp.broadcast_to(prefix.keys.shape[2] + jnp.arange(length), (batch, length))
    is_valid = jnp.arange(length) < texts.lengths[:, None]
    x, segment = model.apply(params, texts.tokens, positions, is_valid, (prefix,), method="read_on")
    last = jnp.take_along_axis(x, (texts.lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.apply(params, last, method="logits"), segment


def answer_texts(
    model: Model,
    params: Params,
    config: LlavaConfig,
    prefix: Segment,
    texts: Texts,
    keys: Key[Array, " batch"],
    sampling: Sampling,
) -> Int[Array, "batch answer"]:
    """Write an answer to every text.

    Args:
        model: Of `Llava`.
        params: Its parameters.
        config: Its sizes.
        prefix: What was read before: of one image for all texts, or of one for each.
        texts: Questions.
        keys: One per text, consumed; what is drawn for one depends on nothing else in the batch.
        sampling: How.
    """
    batch = len(texts.tokens)
    logits, segment = next_logits(model, params, prefix, texts)
    start = prefix.keys.shape[2] + texts.lengths
    first = choose(logits, _fold(keys, 0), sampling)
    answers = empty_segment(config.text, batch, sampling.tokens)

    def step(carry: Any, number: Array) -> tuple[Any, Array]:
        token, answers, is_over = carry
        ones = jnp.ones((batch, 1), bool)
        x, new = model.apply(
            params, token[:, None], (start + number)[:, None], ones, (prefix, segment, answers), method="read_on"
        )
        answers = write_segment(answers, new, number)
        is_over = is_over | (token == sampling.end)
        found = choose(model.apply(params, x[:, 0], method="logits"), _fold(keys, number + 1), sampling)
        found = jnp.where(is_over, sampling.end, found)
        return (found, answers, is_over), found

    carry = (first, answers, jnp.zeros(batch, bool))
    _, rest = jax.lax.scan(step, carry, jnp.arange(sampling.tokens - 1))
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def choose(
    logits: Float[Array, "batch token_id"], keys: Key[Array, " batch"], sampling: Sampling
) -> Int[Array, " batch"]:
    """Return the likeliest token, or draw one of the likely ones: the fewest that hold `top_p` of the probability."""
    if not sampling.temperature:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / sampling.temperature
    ordered = jnp.sort(scaled, axis=-1)[:, ::-1]
    shares = jax.nn.softmax(ordered, axis=-1)
    is_kept = jnp.cumsum(shares, axis=-1) - shares < sampling.top_p  # the mass before it
    least = jnp.min(jnp.where(is_kept, ordered, jnp.inf), axis=-1, keepdims=True)
    kept = jnp.where(scaled >= least, scaled, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def _fold(keys: Key[Array, " batch"], number: Int[Array, ""] | int) -> Key[Array, " batch"]:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


LLAVA_15_7B = LlavaConfig()
"""LLaVA-1.5-7B: CLIP ViT-L/14 at 336 pixels, 576 tokens, and Vicuna 7B."""
