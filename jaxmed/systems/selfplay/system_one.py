"""System I: a generator of masks and a verifier of them, learnt on many familiar tasks, adapted by a few labels.

The generator G answers at once; the verifier D says how good an answer is, and is what System II thinks with. They are
trained against each other: D tells true masks from G's and from corrupted ones, G learns to please D. Reptile moves
both towards where a few steps on one task lead, so that a few steps suffice for a new one.

Source: arXiv:2506.22075, and its reference implementation (losses "adversarial", Reptile, constants).
Deviation: by default D estimates the overlap (Dice) of a mask with the truth, and learns from thresholded and from
    corrupted masks too, because those are what System II shows it, and from masks that its own gradient flatters it
    with, because those are what System II finds; in the reference it sees soft masks of G alone. A pixel loss helps
    G. Adaptation starts both networks from the averaged weights; the reference's verifier starts from those
    of the last inner loop (`MetaConfig.match_release`).
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.config import Length, NonNegative, Positive, Share, Size, checked
from jaxmed.data.augment import AS_THEY_ARE, AugmentConfig, make_variants
from jaxmed.models.mask_generator import DEMO_GENERATOR, GeneratorConfig, make_generator
from jaxmed.models.mask_verifier import DEMO_VERIFIER, Verifier, VerifierConfig, make_verifier
from jaxmed.objectives.segmentation import voxel_cross_entropy
from jaxmed.objectives.supervised import overlap
from jaxmed.recipes.few_shot import reptile
from jaxmed.synthesis.corruption import corrupt

LABEL_NOISE = 0.05
MOST_FLATTERING = 0.1
OPTIMIZER = optax.adam(1.0)
"""Its steps are multiplied by the rate, so that one program serves all rates."""


@dataclasses.dataclass(frozen=True)
@checked
class SystemOneConfig:
    """Networks and losses.

    Attributes:
        generator: Image to mask.
        verifier: Image and mask to a score.
        target: What the verifier learns: "overlap", the Dice of true, generated, corrupted and flattering masks with
            the truth; or "adversarial", 1 for true and 0 for generated masks.
        pixel_weight: Weight of the binary cross-entropy of G's mask with the true one.
        verifier_weight: Weight of the loss by which G pleases D.
        threshold: Probability of G above which a voxel is in the mask.
    """

    generator: GeneratorConfig = GeneratorConfig()
    verifier: VerifierConfig = VerifierConfig()
    target: Literal["overlap", "adversarial"] = "overlap"
    pixel_weight: NonNegative = 1.0
    verifier_weight: NonNegative = 0.1
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.generator.dimensions != self.verifier.dimensions:
            found = f"{self.generator.dimensions} and {self.verifier.dimensions}"
            raise ValueError(f"generator.dimensions, verifier.dimensions: expected the same number, found {found}")
        if not self.pixel_weight + self.verifier_weight:
            raise ValueError("pixel_weight, verifier_weight: expected not both 0")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold: expected a probability between 0 and 1, found {self.threshold}")

    @property
    def divisor(self) -> int:
        """What the voxels along every axis must be a multiple of."""
        return max(self.generator.divisor, self.verifier.divisor)


@dataclasses.dataclass(frozen=True)
@checked
class MetaConfig:
    """Reptile.

    Attributes:
        inner_steps: Steps on one task before the average moves.
        epsilon: Share of the way that it moves.
        rate: Learning rate of Adam, whose moments outlive tasks.
        augment: Fresh variants of the images of every step, so that few pictures are not learnt by heart.
        match_release: Hand on the verifier as the last task left it instead of its average, as the reference does.
    """

    inner_steps: Size = 4
    epsilon: Share = 0.1
    rate: Positive = 2e-4
    augment: AugmentConfig = AS_THEY_ARE
    match_release: bool = False


@dataclasses.dataclass(frozen=True)
@checked
class AdaptConfig:
    """Adaptation to a new task.

    Attributes:
        steps: On all labelled images at once.
        rate: Learning rate of a fresh Adam.
        decay: Whether it falls to 0 by half a cosine: for hundreds of steps.
        augment: Fresh variants of the labelled images in every step.
    """

    steps: Length = 16
    rate: Positive = 2e-4
    decay: bool = False
    augment: AugmentConfig = AS_THEY_ARE


class SystemOne(NamedTuple):
    """What System II thinks with: the parameters of both networks, and what the verifier's logits are divided by."""

    config: SystemOneConfig
    params: Params
    temperature: float = 1.0


class MetaState(NamedTuple):
    """State of meta-training.

    `params` are the averages of both networks, `opt_state` Adam's for each, `inner` the verifier as the last task left
    it.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    inner: Params
    key: KeyArray


def init_params(key: KeyArray, config: SystemOneConfig, size: tuple[int, ...]) -> Params:
    """Return fresh parameters for images of a size."""
    generator_key, verifier_key = jax.random.split(key)
    images = jnp.zeros((1, *size, 1))
    return {
        "generator": make_generator(config.generator).init(generator_key, images),
        "verifier": make_verifier(config.verifier).init(verifier_key, images, images[..., 0]),
    }


def init_meta(key: KeyArray, config: SystemOneConfig, meta: MetaConfig, params: Params) -> MetaState:
    """Start meta-training."""
    opt_state = {name: OPTIMIZER.init(value) for name, value in params.items()}
    return MetaState(jnp.zeros((), jnp.int32), params, opt_state, params["verifier"], key)


def generate(
    config: SystemOneConfig, params: Params, images: Float[Array, "image *space"]
) -> Float[Array, "image *space"]:
    """Return the probability of each voxel to be in the mask."""
    return jax.nn.sigmoid(make_generator(config.generator).apply(params["generator"], images[..., None]))


generate_jit = partial(jax.jit, static_argnums=0)(generate)


def verify(
    config: SystemOneConfig, params: Params, images: Float[Array, "image *space"], masks: Float[Array, "image *space"]
) -> Float[Array, " image"]:
    """Return D of each image and mask, between 0 and 1."""
    verifier = make_verifier(config.verifier)
    embedding = verifier.embed(params["verifier"], images[..., None])
    return jax.nn.sigmoid(verifier.score(params["verifier"], embedding, masks))


def meta_step(
    config: SystemOneConfig, meta: MetaConfig, state: MetaState, batch: dict[str, Array]
) -> tuple[MetaState, dict[str, Scalar]]:
    """Take one task: a few steps on it, then move the averages towards where they led.

    Not for `jit`: its parts are compiled. A loop inside a program would cost more than it saves, because on a CPU XLA
    computes the weight gradients of convolutions in loops at a hundredth of their speed. The batch has "image" and
    "mask", [batch step *space] in [0, 1], all of one task.
    """
    key = jax.random.fold_in(state.key, state.step)
    params, opt_state, found = state.params, state.opt_state, []
    for number, step_key in enumerate(jax.random.split(key, batch["image"].shape[1])):
        images, masks = batch["image"][:, number], batch["mask"][:, number]
        images, masks = make_variants(jax.random.fold_in(step_key, 1), meta.augment, images, masks)
        inputs = (step_key, images, masks, jnp.ones(len(images)))
        params, opt_state, metrics = _inner_step(config, jnp.float32(meta.rate), params, opt_state, *inputs)
        found.append(metrics)
    average = reptile(meta.epsilon, state.params, params)
    new = MetaState(state.step + 1, average, opt_state, params["verifier"], state.key)
    return new, jax.tree.map(lambda *values: jnp.mean(jnp.stack(values)), *found)


def handed_on(meta: MetaConfig, state: MetaState) -> Params:
    """Return the parameters that adaptation starts from."""
    return state.params | {"verifier": state.inner} if meta.match_release else state.params


def adapt(
    key: KeyArray,
    system: SystemOne,
    images: Float[Array, "image *space"],
    masks: Bool[Array, "image *space"],
    config: AdaptConfig,
    weights: Float[Array, " image"] | None = None,
) -> tuple[SystemOne, dict[str, Float[Array, " step"]]]:
    """Adapt both networks to a task by a few labelled images in [0, 1].

    With `weights`, 1 for each image by default, guesses count less than labels. Returns the adapted networks, and the
    losses of every step.
    """
    weights = jnp.ones(len(images)) if weights is None else weights
    images, masks, params = jnp.asarray(images), masks.astype(jnp.float32), system.params
    opt_state = {name: OPTIMIZER.init(value) for name, value in params.items()}
    rate = optax.cosine_decay_schedule(config.rate, max(config.steps, 1)) if config.decay else lambda _: config.rate
    found = []
    for number, step_key in enumerate(jax.random.split(key, config.steps)):
        seen = make_variants(jax.random.fold_in(step_key, 1), config.augment, images, masks)
        inputs = (step_key, *seen, weights)
        params, opt_state, metrics = _inner_step(system.config, jnp.float32(rate(number)), params, opt_state, *inputs)
        found.append(metrics)
    return system._replace(params=params), jax.tree.map(lambda *values: jnp.stack(values), *found) if found else {}


@partial(jax.jit, static_argnums=0)
def _inner_step(
    config: SystemOneConfig,
    rate: Array,
    params: Params,
    opt_state: Any,
    key: KeyArray,
    images: Array,
    masks: Array,
    weights: Array,
) -> tuple[Params, Any, dict[str, Scalar]]:
    """Train the verifier on true, generated and corrupted masks, then the generator through the frozen verifier."""
    verifier_loss = partial(_verifier_loss, config, key, params["generator"], images, masks, weights)
    value, gradient = jax.value_and_grad(verifier_loss)(params["verifier"])
    update, verifier_state = OPTIMIZER.update(gradient, opt_state["verifier"])
    verifier = jax.tree.map(lambda old, change: old + rate * change, params["verifier"], update)
    generator_loss = partial(_generator_loss, config, verifier, images, masks, weights)
    (total, metrics), gradient = jax.value_and_grad(generator_loss, has_aux=True)(params["generator"])
    update, generator_state = OPTIMIZER.update(gradient, opt_state["generator"])
    generator = jax.tree.map(lambda old, change: old + rate * change, params["generator"], update)
    new = {"generator": generator, "verifier": verifier}
    opt_state = {"generator": generator_state, "verifier": verifier_state}
    return new, opt_state, metrics | {"loss": value + total, "verifier": value, "generator": total}


def _verifier_loss(
    config: SystemOneConfig,
    key: KeyArray,
    generator: Params,
    images: Array,
    masks: Array,
    weights: Array,
    params: Params,
) -> Scalar:
    soft = jax.lax.stop_gradient(generate(config, {"generator": generator}, images))
    verifier = make_verifier(config.verifier)
    embedding = verifier.embed(params, images[..., None])
    first_key, second_key = jax.random.split(key)
    if config.target == "adversarial":
        shown = [masks, soft]
        targets = [1.0 + LABEL_NOISE * jax.random.uniform(first_key, (len(images),))]
        targets += [LABEL_NOISE * jax.random.uniform(second_key, (len(images),))]
    else:
        shown = [masks, soft, *_corrupted(first_key, masks, soft, config.threshold)]
        flatter = partial(_flatter, verifier, jax.lax.stop_gradient((params, embedding)))
        shown += [flatter(key, mask) for key, mask in zip(jax.random.split(second_key), (masks, soft), strict=True)]
        targets = [overlap(masks, candidate) for candidate in shown]
    count = len(shown)
    embedding = jax.tree.map(lambda leaf: jnp.tile(leaf, (count, *(1,) * (leaf.ndim - 1))), embedding)
    logits = verifier.score(params, embedding, jnp.concatenate(shown))
    losses = optax.sigmoid_binary_cross_entropy(logits, jnp.concatenate(targets))
    return _weighted(losses, jnp.tile(weights, count))


def _flatter(verifier: Verifier, judge: Any, key: KeyArray, masks: Array) -> Array:
    """Flip the voxels by which this verifier's score rises most, a random share of up to a tenth of them.

    These are the masks that thinking would find: what a verifier gets wrong it has to see.
    """
    hard = (masks > 0.5).astype(jnp.float32)
    slope = jax.grad(lambda masks: verifier.score(*judge, masks).sum())(hard)
    promise = (slope * (1 - 2 * hard)).reshape(len(hard), -1)
    share = MOST_FLATTERING * jax.random.uniform(key, (len(hard), 1))
    ranks = jnp.argsort(jnp.argsort(-promise, axis=1), axis=1)
    flips = (ranks < share * promise.shape[1]).reshape(hard.shape)
    return jnp.where(flips, 1 - hard, hard)


def _corrupted(key: KeyArray, masks: Array, soft: Array, threshold: float) -> list[Array]:
    """Return what System II will show: the generated mask as it starts from it, and corrupted masks."""
    hard = soft > threshold
    keys = jax.random.split(key, (2, len(masks)))
    wrong = jax.vmap(corrupt)
    shown = (hard, wrong(keys[0], masks > 0.5), wrong(keys[1], hard))
    return [candidate.astype(jnp.float32) for candidate in shown]


def _generator_loss(
    config: SystemOneConfig, verifier: Params, images: Array, masks: Array, weights: Array, params: Params
) -> tuple[Scalar, dict[str, Scalar]]:
    logits = make_generator(config.generator).apply(params, images[..., None])
    soft = jax.nn.sigmoid(logits)
    loss, metrics = jnp.zeros(()), {}
    if config.verifier_weight:
        functions = make_verifier(config.verifier)
        judged = functions.score(verifier, functions.embed(verifier, images[..., None]), soft)
        loss += config.verifier_weight * _weighted(optax.sigmoid_binary_cross_entropy(judged, jnp.ones(())), weights)
    if config.pixel_weight:
        loss += config.pixel_weight * _weighted(voxel_cross_entropy(logits[..., None], masks), weights)
    metrics["overlap"] = overlap(masks, (soft > config.threshold).astype(jnp.float32)).mean()
    return loss, metrics


def _weighted(values: Array, weights: Array) -> Scalar:
    return (values * weights).sum() / weights.sum()


def repo() -> tuple[SystemOneConfig, MetaConfig, AdaptConfig]:
    """Networks, losses and constants of the reference implementation, for 32 x 32 digits."""
    system = SystemOneConfig(
        DEMO_GENERATOR, DEMO_VERIFIER, "adversarial", pixel_weight=0.0, verifier_weight=1.0, threshold=0.508
    )
    return system, MetaConfig(epsilon=0.02, rate=1e-5, match_release=True), AdaptConfig(rate=1e-5)
