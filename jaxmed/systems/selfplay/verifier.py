"""What the verifier says of masks, and whether it can be trusted.

Thinking finds the masks that the verifier likes, so a verifier that ranks masks wrongly makes them worse. Before it is
used, the labelled images of the task are corrupted in many ways; its scores have to rank those masks as their Dice
does, and a temperature brings the scores onto the scale of Dice.

Source: arXiv:2506.22075 names no calibration, and no evidence beside the verifier's; both are our own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Bool, Float, Float64, Int

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.metrics.statistics import spearman
from jaxmed.models.mask_verifier import make_verifier
from jaxmed.rl.pixel_game import expand_like
from jaxmed.rl.selfplay import Verify
from jaxmed.synthesis.corruption import corrupt
from jaxmed.systems.selfplay.system_one import SystemOne, SystemOneConfig, generate, overlap

CONSTANT = 1e-6  # a verifier whose scores of corrupted masks differ by less judges nothing
PROBES = 16
TEMPERATURES = np.geomspace(0.2, 5.0, 41)


class Judge(NamedTuple):
    """What scores masks of known images.

    Attributes:
        params: Parameters of the verifier.
        embedding: Embedding of each image.
        temperature: By which its logits are divided.
        evidence: System I's for each voxel, weighted: what a logit gains by the voxel's being in the mask.
        first: The sum of it over System I's mask at that level, so that this mask's logit is the verifier's.
    """

    params: Params
    embedding: Any
    temperature: Float[Array, ""]
    evidence: Float[Array, "image *space"]
    first: Float[Array, " image"]


def choose_level(
    system: SystemOne,
    images: Float[Array, "image *space"],
    probability: Float[Array, "image *space"],
    known: Bool[Array, "image *space"],
    levels: tuple[float, ...],
) -> tuple[Bool[Array, "image *space"], Float[Array, " image"]]:
    """Return the masks that the verifier likes best among those that are known and System I's at other thresholds.

    The threshold of each comes with it: System I's own for what is known.
    """
    masks = jnp.stack([known, *(probability > level for level in levels)])
    judge, places = make_judge(system, images), jnp.arange(len(images))
    scores = jnp.stack([judge_masks_jit(system.config, judge, places, candidate * 1.0) for candidate in masks])
    best, thresholds = scores.argmax(axis=0), jnp.array([system.config.threshold, *levels])
    return masks[best, places], thresholds[best]


def make_judge(
    system: SystemOne,
    images: Float[Array, "image *space"],
    prior_weight: float = 0.0,
    level: Float[Array, " image"] | None = None,
) -> Judge:
    """Prepare to score masks of images; evidence is against System I's masks at its own threshold, or at a level."""
    embedding = _embed(system.config, system.params, images)
    if prior_weight:
        level = jnp.full(len(images), system.config.threshold) if level is None else level
        evidence, first = _weigh(system.config, system.params, images, level, jnp.float32(prior_weight))
    else:
        evidence, first = jnp.zeros(images.shape), jnp.zeros(len(images))
    return Judge(system.params["verifier"], embedding, jnp.float32(system.temperature), evidence, first)


@functools.partial(jax.jit, static_argnums=0)
def _weigh(config: SystemOneConfig, params: Params, images: Array, level: Array, weight: Array) -> tuple[Array, Array]:
    probability = generate(config, params, images)
    axes = tuple(range(1, images.ndim))
    level = expand_like(level, probability)
    mask = probability > level
    logits = jax.scipy.special.logit(jnp.clip(probability, 1e-6, 1 - 1e-6))
    # Where System I finds nothing, what it expects: else the smallest doubt would outweigh every verifier.
    size = mask.sum(axes, keepdims=True)
    size = jnp.where(size > 0, size, jnp.maximum(probability.sum(axes, keepdims=True), 1.0))
    evidence = weight * (logits - jax.scipy.special.logit(level)) / size
    return evidence, jnp.where(mask, evidence, 0.0).sum(axes)


def judge_masks(
    system: SystemOne, images: Float[Array, "image *space"], masks: Float[Array, "image *space"]
) -> Float[Array, " image"]:
    """Return D of each mask, at the verifier's temperature."""
    judge = make_judge(system, images)
    return judge_masks_jit(system.config, judge, jnp.arange(len(images)), masks.astype(jnp.float32))


def is_constant(
    key: KeyArray, system: SystemOne, images: Float[Array, "image *space"], masks: Bool[Array, "image *space"]
) -> bool:
    """Tell whether the verifier scores corrupted masks all alike, so that there is nothing to think with."""
    keys = jax.random.split(key, PROBES * len(masks))
    many = jax.jit(jax.vmap(corrupt))(keys, jnp.tile(masks, (PROBES, *(1,) * (masks.ndim - 1))))
    judge = make_judge(system, images)
    places = jnp.tile(jnp.arange(len(images)), PROBES)
    values = judge_masks_jit(system.config, judge, places, many.astype(jnp.float32))
    return bool(jnp.ptp(values) < CONSTANT)


@functools.partial(jax.jit, static_argnums=0)
def _embed(config: SystemOneConfig, params: Params, images: Array) -> Any:
    return make_verifier(config.verifier).embed(params["verifier"], images[..., None])


def score_masks(
    config: SystemOneConfig, judge: Judge, index: Int[Array, " game"], masks: Float[Array, "game *space"]
) -> Float[Array, " game"]:
    """Return the scores of masks of numbered images: D, and System I's evidence where the judge weighs it."""
    seen = jax.tree.map(lambda leaf: leaf[index], judge.embedding)
    logits = make_verifier(config.verifier).score(judge.params, seen, masks) / judge.temperature
    evidence = (masks * judge.evidence[index]).sum(tuple(range(1, masks.ndim))) - judge.first[index]
    return jax.nn.sigmoid(logits + evidence)


@functools.lru_cache(maxsize=32)
def verify_by(config: SystemOneConfig) -> Verify:
    """Return what judges a game; equal settings give the same function, so that equal programs are recognised."""
    return functools.partial(score_masks, config)


judge_masks_jit = functools.partial(jax.jit, static_argnums=0)(score_masks)


class Calibration(NamedTuple):
    """How far a verifier can be trusted.

    Attributes:
        temperature: By which logits are divided, so that scores come close to Dice.
        rank: Mean over images of Spearman's correlation of score and Dice over corrupted masks; NaN for a constant one.
        is_constant: All scores are alike: there is nothing to think with.
        overlaps: Dice of each image's corrupted masks.
        scores: D of them, at the temperature.
    """

    temperature: float
    rank: float
    is_constant: bool
    overlaps: Float64[np.ndarray, "image mask"]
    scores: Float64[np.ndarray, "image mask"]


def calibrate(
    key: KeyArray,
    system: SystemOne,
    images: Float[Array, "image *space"],
    masks: Bool[Array, "image *space"],
    corrupted: int = 32,
) -> Calibration:
    """Score so many corrupted masks of each labelled image: half of the true one, half of the generator's."""
    count = len(images)
    first = generate(system.config, system.params, images) > system.config.threshold
    keys = jax.random.split(key, (corrupted, count))
    half = corrupted // 2
    start = jnp.concatenate([jnp.stack([masks] * half), jnp.stack([first] * (corrupted - half))])
    shown = jax.jit(jax.vmap(jax.vmap(corrupt)))(keys, start).astype(jnp.float32)
    plain = system._replace(temperature=1.0)
    truth = masks.astype(jnp.float32)
    overlaps = np.stack([np.asarray(overlap(truth, one), np.float64) for one in shown], axis=1)
    scores = np.stack([np.asarray(judge_masks(plain, images, one), np.float64) for one in shown], axis=1)
    is_constant = bool(np.ptp(scores) < CONSTANT)
    logits = scipy.special.logit(np.clip(scores, 1e-7, 1 - 1e-7))
    errors = [np.mean((scipy.special.expit(logits / t) - overlaps) ** 2) for t in TEMPERATURES]
    temperature = 1.0 if is_constant else float(TEMPERATURES[int(np.argmin(errors))])
    ranks = [rank for pair in zip(scores, overlaps, strict=True) if (rank := spearman(*pair)) is not None]
    rank = float(np.mean(ranks)) if ranks else float("nan")
    return Calibration(temperature, rank, is_constant, overlaps, scipy.special.expit(logits / temperature))
