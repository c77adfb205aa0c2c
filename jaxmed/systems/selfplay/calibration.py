"""Can this verifier be trusted? Its scores of spoilt masks against their true overlap.

Thinking finds the masks that the verifier likes, so a verifier that ranks masks wrongly makes them worse. Before it is
used, the labelled images of the task are spoilt in many ways; its scores have to rank those masks as their Dice does,
and a temperature brings the scores onto the scale of Dice.

Source: arXiv:2506.22075 names no calibration; this one is our own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats
from jaxtyping import Array, Bool, Float, Float64

from jaxmed.arrays.types import KeyArray
from jaxmed.systems.selfplay.corruption import corrupt
from jaxmed.systems.selfplay.system_one import SystemOne, generate, overlap
from jaxmed.systems.selfplay.thinking import CONSTANT, judge_masks

TEMPERATURES = np.geomspace(0.2, 5.0, 41)


class Calibration(NamedTuple):
    """How far a verifier can be trusted.

    Attributes:
        temperature: By which logits are divided, so that scores come close to Dice.
        rank: Mean over images of Spearman's correlation of score and Dice over spoilt masks; NaN for a constant one.
        is_constant: All scores are alike: there is nothing to think with.
        overlaps: Dice of each image's spoilt masks.
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
    spoilt: int = 32,
) -> Calibration:
    """Score spoilt masks of labelled images: of the true one and of the generator's.

    Args:
        key: Consumed.
        system: Both networks.
        images: Labelled images.
        masks: Their masks.
        spoilt: Masks of each image.
    """
    count = len(images)
    first = generate(system.config, system.params, images) > system.config.threshold
    keys = jax.random.split(key, (spoilt, count))
    half = spoilt // 2
    start = jnp.concatenate([jnp.stack([masks] * half), jnp.stack([first] * (spoilt - half))])
    shown = jax.jit(jax.vmap(jax.vmap(corrupt)))(keys, start).astype(jnp.float32)
    plain = system._replace(temperature=1.0)
    truth = masks.astype(jnp.float32)
    overlaps = np.stack([np.asarray(overlap(truth, one), np.float64) for one in shown], axis=1)
    scores = np.stack([np.asarray(judge_masks(plain, images, one), np.float64) for one in shown], axis=1)
    is_constant = bool(np.ptp(scores) < CONSTANT)
    logits = scipy.special.logit(np.clip(scores, 1e-7, 1 - 1e-7))
    errors = [np.mean((scipy.special.expit(logits / t) - overlaps) ** 2) for t in TEMPERATURES]
    temperature = 1.0 if is_constant else float(TEMPERATURES[int(np.argmin(errors))])
    ranks = [
        float(scipy.stats.spearmanr(score, dice)[0])  # pyright: ignore[reportArgumentType]
        for score, dice in zip(scores, overlaps, strict=True)
        if np.ptp(score) > 0 and np.ptp(dice) > 0
    ]
    rank = float(np.mean(ranks)) if ranks else float("nan")
    return Calibration(temperature, rank, is_constant, overlaps, scipy.special.expit(logits / temperature))
