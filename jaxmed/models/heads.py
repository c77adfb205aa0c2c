"""Heads on the tokens of an encoder: pooling, classifiers, and the published ones with BatchNorm."""

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Length, Size, checked
from jaxmed.models.vit import Vit, VitConfig
from jaxmed.nn.model import make_model
from jaxmed.nn.transformer import LayerNorm, Linear


class Pooled(NamedTuple):
    """Features of an image.

    Attributes:
        class_token: The first token.
        pooled: The mean of the tokens of the grid.
    """

    class_token: Float[Array, "batch width"]
    pooled: Float[Array, "batch width"]

    @property
    def concat(self) -> Float[Array, "batch width2"]:
        """Both, one after the other."""
        return jnp.concatenate([self.class_token, self.pooled], axis=-1)


def pool_tokens(tokens: Float[Array, "batch token width"], prefix: int = 1) -> Pooled:
    """Return the class token, and the mean of the tokens after the prefix."""
    return Pooled(tokens[:, 0], tokens[:, prefix:].mean(axis=1))


@dataclasses.dataclass(frozen=True)
@checked
class HeadConfig:
    """A classifier or regressor on pooled tokens.

    Attributes:
        outputs: Logits or values.
        pool: "concat" (class token and mean of the patch tokens) or "mean", both with a layer norm of their own;
            "class" takes the class token after the encoder's final norm.
        hidden: Width of a hidden layer with leaky ReLU and BatchNorm; 0 for a linear head.
        norm: Whether "concat" and "mean" have their layer norm; a logistic probe stands on the features as they are.
        second_hidden: Width of a second hidden layer like the first; 0 for none. Such heads are run, not trained.
    """

    outputs: Size = 1
    pool: Literal["concat", "mean", "class"] = "concat"
    hidden: Length = 0
    norm: bool = True
    second_hidden: Length = 0

    def __post_init__(self) -> None:
        if self.second_hidden and not self.hidden:
            raise ValueError(f"second_hidden: expected 0, or a width beside hidden, found {self.second_hidden}")

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """Widths of the hidden layers."""
        return tuple(width for width in (self.hidden, self.second_hidden) if width)


class BatchNorm(nn.Module):
    """Normalise features by stored moments, or by the batch's in training.

    Parameters "mean" and "var" are moments, not trained: `MOMENTS` names them, and `fold_moments` moves them.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch width"], training: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        width = x.shape[-1]
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale = self.param("scale", ones, (width,), jnp.float32)
        bias = self.param("bias", zeros, (width,), jnp.float32)
        mean = self.param("mean", zeros, (width,), jnp.float32)
        var = self.param("var", ones, (width,), jnp.float32)
        moments = {}
        if training:
            mean, var = x.mean(axis=0), x.var(axis=0)
            # The stored variance is the unbiased one, the batch is normalised by the biased one, as in PyTorch.
            moments = {"mean": mean, "var": var * len(x) / max(len(x) - 1, 1)}
        return (x - mean) * jax.lax.rsqrt(var + self.epsilon) * scale + bias, moments


class Head(nn.Module):
    """Pooled tokens to logits; `prefix` tokens stand before those that are averaged, see `models.encoder.Encoder`."""

    config: HeadConfig
    prefix: int = 1

    def setup(self) -> None:
        config = self.config
        if config.pool != "class" and config.norm:
            self.norm = LayerNorm(1e-6)
        if config.hidden:
            self.hidden = Linear(config.hidden)
            self.batch_norm = BatchNorm()
        if config.second_hidden:
            self.hidden_2 = Linear(config.second_hidden)
            self.batch_norm_2 = BatchNorm()
        # PyTorch truncates at 2, not at two deviations: nothing is cut.
        self.linear = Linear(config.outputs, kernel_init=nn.initializers.normal(2e-5))

    def __call__(
        self, tokens: Float[Array, "batch token width"], *, training: bool = False
    ) -> tuple[Float[Array, "batch output"], dict[str, jax.Array]]:
        """Return logits, and in training the moments of the batch where there is BatchNorm."""
        features, moments = self.features(tokens), {}
        if self.config.hidden:
            features = nn.leaky_relu(self.hidden(features), 0.01)
            features, moments = self.batch_norm(features, training)
        if self.config.second_hidden:
            if training:
                raise ValueError("training: expected a head with at most one hidden layer, found two")
            features = nn.leaky_relu(self.hidden_2(features), 0.01)
            features, _ = self.batch_norm_2(features)
        return self.linear(features), moments

    def features(self, tokens: Float[Array, "batch token width"]) -> Float[Array, "batch feature"]:
        """Return what enters the head after its layer norm ("pre_logits")."""
        pooled = pool_tokens(tokens, self.prefix)
        if self.config.pool == "class":
            return pooled.class_token
        features = pooled.concat if self.config.pool == "concat" else pooled.pooled
        return self.norm(features) if self.config.norm else features


def init_head(config: HeadConfig, width: int, prefix: int, key: KeyArray) -> Params:
    """Draw a head on tokens of some width, as a classifier with that head draws it."""
    return make_model(_Headed(config, prefix)).init(key, jnp.zeros((1, prefix + 1, width)))["head"]


class _Headed(nn.Module):
    config: HeadConfig
    prefix: int

    def setup(self) -> None:
        self.head = Head(self.config, self.prefix)

    def __call__(self, tokens: Float[Array, "batch token width"]) -> Any:
        return self.head(tokens)


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """An encoder and a head on its tokens; the defaults are TANGERINE's.

    Attributes:
        encoder: The vision transformer; it has a final norm where the head pools "class", and none where the head has
            a layer norm of its own.
        head: What stands on it.
    """

    encoder: VitConfig = VitConfig(final_norm=False)
    head: HeadConfig = HeadConfig()

    def __post_init__(self) -> None:
        has_own = self.head.pool != "class" and self.head.norm
        if (self.head.pool == "class" and not self.encoder.final_norm) or (has_own and self.encoder.final_norm):
            raise ValueError(
                f"head.pool: expected 'class' exactly where the encoder has its final norm, found '{self.head.pool}'"
            )


class Classifier(nn.Module):
    """An encoder and a head; parameters are {"encoder": ..., "head": ...}."""

    config: ClassifierConfig

    def setup(self) -> None:
        self.encoder = Vit(self.config.encoder)
        self.head = Head(self.config.head, self.config.encoder.prefix)

    def __call__(
        self,
        image: Float[Array, "batch ..."],
        kept: Int[Array, "batch keep"] | None = None,
        *,
        key: KeyArray | None = None,
        training: bool = False,
    ) -> tuple[Float[Array, "batch output"], dict[str, jax.Array]]:
        """Return logits and the moments of `Head`.

        Args:
            image: [batch, *image_size, channels].
            kept: Patch tokens to process; all by default.
            key: Switches stochastic depth on.
            training: Whether BatchNorm takes the batch's moments.
        """
        return self.head(self.encoder(image, kept, key=key), training=training)

    def features(self, image: Float[Array, "batch ..."]) -> Float[Array, "batch feature"]:
        """Return what enters the head after its layer norm."""
        return self.head.features(self.encoder(image))


# BatchNorm's stored moments are moved by `fold_moments`, never by an optimizer.
MOMENTS = (r"batch_norm/(mean|var)$",)
MOMENTUM = 0.1


def fold_moments(stored: dict[str, jax.Array], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return BatchNorm parameters whose moments went a step towards the batch's."""
    return {**stored, **{name: (1 - MOMENTUM) * stored[name] + MOMENTUM * value for name, value in batch.items()}}
