"""Heads on the tokens of an encoder: pooling, classifiers, the published ones with BatchNorm, nearest neighbours."""

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.arrays.task import TaskKind
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Count, Length, NonNegative, Positive, Size, checked
from jaxmed.models.encoder import join_layers
from jaxmed.models.vit import Vit, VitConfig
from jaxmed.nn.model import make_model
from jaxmed.nn.transformer import LayerNorm, Linear

STANDARDISE_EPSILON = 1e-6  # of MAE's probe
LEAST_SHARE = 1e-6


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
class Neighbours:
    """A vote of the nearest training records, which are kept as parameters: features "bank", and their labels.

    Attributes:
        count: Neighbours that vote.
        records: Records that are kept.
        kind: What the labels are.
        temperature: A neighbour's vote counts exp(cosine similarity / temperature).

    Source: the weighted k-NN of DINO, arXiv:2104.14294, released code.
    """

    count: Size = 20
    records: Count = 20
    kind: TaskKind = "multiclass"
    temperature: Positive = 0.07

    def __post_init__(self) -> None:
        if self.count > self.records:
            raise ValueError(f"count: expected at most the {self.records} records, found {self.count}")


@dataclasses.dataclass(frozen=True)
@checked
class HeadConfig:
    """A classifier or regressor on pooled tokens.

    Attributes:
        outputs: Logits or values.
        pool: "concat" (class token and mean of the patch tokens) or "mean", both with a layer norm of their own;
            "class" takes the class token after the encoder's final norm.
        hidden: Width of a hidden layer; 0 for a linear head.
        hidden_layer: "leaky" is a map, leaky ReLU and BatchNorm, TANGERINE's; "relu" a map, BatchNorm and ReLU,
            ProFound's.
        norm: Whether "concat" and "mean" have their layer norm; a probe stands on the features as they are.
        second_hidden: Width of a second hidden layer like the first; 0 for none. Such heads are run, not trained.
        norm_repeats: How often that layer norm is applied, with the same parameters. RETFound's code of 2025 applies
            it twice, once in its own encoder and once in timm's head: files that it fine-tuned need 2.
        init_std: Standard deviation with which a linear head is drawn.
        layers: Last blocks whose class tokens, one after the other, stand in place of the last one's: DINOv2's probes.
        standardise: Whether a linear head has BatchNorm without factors before it, as MAE's probe in training;
            `fold_standardise` makes a plain linear head of it.
        neighbours: A vote of training records in place of a linear map.
    """

    outputs: Size = 1
    pool: Literal["concat", "mean", "class"] = "concat"
    hidden: Length = 0
    norm: bool = True
    second_hidden: Length = 0
    norm_repeats: Size = 1
    init_std: NonNegative = 2e-5
    layers: Size = 1
    standardise: bool = False
    neighbours: Neighbours | None = None
    hidden_layer: Literal["leaky", "relu"] = "leaky"

    def __post_init__(self) -> None:
        if self.second_hidden and self.hidden_layer == "relu":
            raise ValueError(f"second_hidden: expected 0 beside hidden_layer relu, found {self.second_hidden}")
        if self.second_hidden and not self.hidden:
            raise ValueError(f"second_hidden: expected 0, or a width beside hidden, found {self.second_hidden}")
        if self.layers > 1 and self.pool == "mean":
            raise ValueError(f"layers: expected 1 for the mean of the patch tokens, found {self.layers}")
        if self.hidden and (self.standardise or self.neighbours is not None):
            raise ValueError(f"hidden: expected 0 for a linear or neighbours' head, found {self.hidden}")

    def num_features(self, width: int) -> int:
        """Return how many numbers enter the head, given the width of a token."""
        return width * {"concat": self.layers + 1, "mean": 1, "class": self.layers}[self.pool]

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """Widths of the hidden layers."""
        return tuple(width for width in (self.hidden, self.second_hidden) if width)


class BatchNorm(nn.Module):
    """Normalise features by stored moments, or by the batch's in training.

    Parameters "mean" and "var" are moments, not trained: `MOMENTS` names them, and `fold_moments` moves them.
    """

    epsilon: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch width"], training: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        width = x.shape[-1]
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale = self.param("scale", ones, (width,), jnp.float32) if self.affine else 1.0
        bias = self.param("bias", zeros, (width,), jnp.float32) if self.affine else 0.0
        mean = self.param("mean", zeros, (width,), jnp.float32)
        var = self.param("var", ones, (width,), jnp.float32)
        moments = {}
        if training:
            mean, var = x.mean(axis=0), x.var(axis=0)
            # The stored variance is the unbiased one, the batch is normalised by the biased one, as in PyTorch.
            moments = {"mean": mean, "var": var * len(x) / max(len(x) - 1, 1)}
        return (x - mean) * jax.lax.rsqrt(var + self.epsilon) * scale + bias, moments


class Vote(nn.Module):
    """Logits of a weighted vote, so that sigmoid or softmax gives the shares of the votes; of values their mean.

    Parameters are "bank" [record, feature], of unit length; "targets" [record, output], 0 or 1 for a label or class, or
    a value; and "known" of the same shape, 0 where a label is missing. A share is held within 1e-6 of 0 and 1.
    """

    config: Neighbours
    outputs: int

    @nn.compact
    def __call__(self, features: Float[Array, "batch feature"]) -> Float[Array, "batch output"]:
        settings, zeros, shape = self.config, nn.initializers.zeros, (self.config.records, self.outputs)
        bank = self.param("bank", zeros, (settings.records, features.shape[-1]), jnp.float32)
        targets = jnp.asarray(self.param("targets", zeros, shape, jnp.float32))
        known = jnp.asarray(self.param("known", zeros, shape, jnp.float32))
        similarity = jnp.matmul(unit_length(features), jnp.asarray(bank).T, precision="highest")
        nearest, places = jax.lax.top_k(similarity, settings.count)
        votes = jax.nn.softmax(nearest / settings.temperature, axis=-1)[..., None] * known[places]
        total = votes.sum(axis=1)
        found = (votes * targets[places]).sum(axis=1) / jnp.where(total > 0, total, 1)
        if settings.kind == "regression":
            return found
        share = jnp.clip(found, LEAST_SHARE, 1 - LEAST_SHARE)
        return jnp.log(share) - (0 if settings.kind == "multiclass" else jnp.log1p(-share))


def unit_length(features: Float[Array, "batch feature"]) -> Float[Array, "batch feature"]:
    """Divide every row by its length."""
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


class Head(nn.Module):
    """Tokens to logits; see `models.encoder.Encoder.tokens`.

    `prefix` tokens stand before those that are averaged, and before them, where the head looks at several blocks, the
    class tokens of all but the last.
    """

    config: HeadConfig
    prefix: int = 1

    def setup(self) -> None:
        config = self.config
        if config.pool != "class" and config.norm:
            self.norm = LayerNorm(1e-6)
        if config.neighbours is not None:
            self.vote = Vote(config.neighbours, config.outputs)
            return
        if config.hidden:
            self.hidden = Linear(config.hidden)
            self.batch_norm = BatchNorm()
        if config.standardise:
            self.batch_norm = BatchNorm(STANDARDISE_EPSILON, affine=False)
        if config.second_hidden:
            self.hidden_2 = Linear(config.second_hidden)
            self.batch_norm_2 = BatchNorm()
        # PyTorch truncates at 2, not at two deviations: nothing is cut.
        self.linear = Linear(config.outputs, kernel_init=nn.initializers.normal(config.init_std))

    def __call__(
        self, tokens: Float[Array, "batch token width"], *, training: bool = False
    ) -> tuple[Float[Array, "batch output"], dict[str, jax.Array]]:
        """Return logits, and in training the moments of the batch where there is BatchNorm."""
        features, moments = self.features(tokens), {}
        if self.config.neighbours is not None:
            return self.vote(features), moments
        if self.config.hidden:
            features = self.hidden(features)
            if self.config.hidden_layer == "relu":
                features, moments = self.batch_norm(features, training)
                features = nn.relu(features)
            else:
                features, moments = self.batch_norm(nn.leaky_relu(features, 0.01), training)
        if self.config.standardise:
            features, moments = self.batch_norm(features, training)
        if self.config.second_hidden:
            if training:
                raise ValueError("training: expected a head with at most one hidden layer, found two")
            features = nn.leaky_relu(self.hidden_2(features), 0.01)
            features, _ = self.batch_norm_2(features)
        return self.linear(features), moments

    def features(self, tokens: Float[Array, "batch token width"]) -> Float[Array, "batch feature"]:
        """Return what enters the head after its layer norm ("pre_logits")."""
        config = self.config
        # By sizes that are known: an exported batch has none.
        classes = tokens[:, : config.layers].reshape(tokens.shape[0], config.layers * tokens.shape[2])
        if config.pool == "class":
            return classes
        features = tokens[:, self.prefix + config.layers - 1 :].mean(axis=1)
        if config.pool == "concat":
            features = jnp.concatenate([classes, features], axis=-1)
        for _ in range(config.norm_repeats if config.norm else 0):
            features = self.norm(features)
        return features


def init_head(config: HeadConfig, width: int, prefix: int, key: KeyArray) -> Params:
    """Draw a head on tokens of some width, as a classifier with that head draws it."""
    return make_model(_Headed(config, prefix)).init(key, jnp.zeros((1, prefix + config.layers, width)))["head"]


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
        return self.head(self._tokens(image, kept, key), training=training)

    def features(self, image: Float[Array, "batch ..."]) -> Float[Array, "batch feature"]:
        """Return what enters the head after its layer norm."""
        return self.head.features(self._tokens(image, None, None))

    def _tokens(self, image: jax.Array, kept: jax.Array | None, key: KeyArray | None) -> jax.Array:
        layers = self.config.head.layers
        if layers == 1:
            return self.encoder(image, kept, key=key)
        return join_layers(self.encoder.last_states(image, layers))


# BatchNorm's stored moments are moved by `fold_moments`, never by an optimizer.
MOMENTS = (r"batch_norm/(mean|var)$",)
MOMENTUM = 0.1


def fold_moments(stored: dict[str, jax.Array], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return BatchNorm parameters whose moments went a step towards the batch's."""
    return {**stored, **{name: (1 - MOMENTUM) * stored[name] + MOMENTUM * value for name, value in batch.items()}}


def fold_standardise(config: HeadConfig, params: Params) -> tuple[HeadConfig, Params]:
    """Return the plain linear head that gives the logits of one with BatchNorm before it: w / s, and b - m w / s."""
    moments, linear = params["batch_norm"], params["linear"]
    kernel = linear["kernel"] * jax.lax.rsqrt(moments["var"] + STANDARDISE_EPSILON)[:, None]
    bias = linear["bias"] - jnp.matmul(moments["mean"], kernel, precision="highest")
    kept = {name: params[name] for name in params if name not in ("batch_norm", "linear")}
    return dataclasses.replace(config, standardise=False), {**kept, "linear": {"kernel": kernel, "bias": bias}}
