"""What estimates are worth: fidelity, residual, tissue volumes and hallucination, one row per subject."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from jaxmed.metrics.hallucination import (
    LesionConfig,
    ShafeConfig,
    false_lesions,
    relative_volume_errors,
    shafe_score,
    split_error,
)
from jaxmed.metrics.imaging import psnr, ssim
from jaxmed.metrics.tissue import TISSUES, fit_tissue, mixture_volumes
from jaxmed.physics.lowfield import LowField, contrast, linear_part, make_operator
from jaxmed.recipes.study import Result
from jaxmed.recipes.study_tables import Difference, Mean, compare, summarise
from jaxmed.synthesis.phantoms.brain import LABELS

DATA_RANGE = 2.0
LEAST_VOLUME = 1.0
"""Voxels: a tissue of which the truth has less has no relative error."""
MEASURES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "residual": "residual |y - A(x)|",
    "volume_error": "relative volume error, mean of tissues",
    **{f"volume_error_{tissue}": f"relative volume error, {tissue}" for tissue in TISSUES},
    "contradicted": "error that the measurement contradicts",
    "unseen": "error that the measurement cannot see",
    "false_lesions": "share of images with a false lesion",
    "perceptual": "hallucination score",
}
AXES = ("condition", "initial", "arm")
BASELINE = "conditional"
NOISE = "noise"
"""Where methods begin that take no estimate: their value on the axis "initial"."""

# Of two stacks of images, host or device.
Measure: TypeAlias = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """How hallucination is measured.

    Attributes:
        lesions: What counts as a false lesion.
        shafe: The perceptual score; its radius is for 256 voxels, and scaled with the image.
    """

    lesions: LesionConfig = LesionConfig()
    shafe: ShafeConfig = ShafeConfig()


class Subject(NamedTuple):
    """A subject's images.

    Attributes:
        name: Who it is.
        images: Truth in [0, 2].
        brain: Voxels in which tissue is measured and lesions are looked for.
        lesions: True lesions.
    """

    name: str
    images: Float32[np.ndarray, "image ..."]
    brain: Bool[np.ndarray, "image ..."]
    lesions: Bool[np.ndarray, "image ..."]


class Scorer(NamedTuple):
    """Compiled parts of the measures, for one acquisition and one size.

    Attributes:
        residual: (measurement, image) -> |y - A(x)| of each.
        split: (truth, image) -> what the measurement contradicts of the error and what it cannot see, each relative to
            the truth, after the contrast.
        perceptual: (truth, image) -> hallucination score of each.
        volumes: (stack, mask) -> volume of each of TISSUES, in voxels.
        config: What counts as a lesion.
    """

    residual: Measure
    split: Measure
    perceptual: Measure
    volumes: Measure
    config: ScoreConfig


def make_scorer(size: tuple[int, ...], acquisition: LowField, config: ScoreConfig = ScoreConfig()) -> Scorer:
    """Prepare the measures.

    Args:
        size: Axes of space of an image.
        acquisition: The condition's.
        config: What counts as hallucination.
    """
    operator = make_operator(size, acquisition)
    # The pseudo-inverse's cutoff says what counts as seen: contrast of a hundredth is none.
    linear = linear_part(size, acquisition)
    assert linear.pseudo_inverse is not None
    inverse = linear.pseudo_inverse
    shafe = dataclasses.replace(config.shafe, radius=config.shafe.radius * min(size) / 256)

    def residual(measurement: Array, image: Array) -> Array:
        return jnp.linalg.norm((measurement - operator(image[..., None])).ravel())

    def split(truth: Array, image: Array) -> tuple[Array, Array]:
        bent, true = (contrast(one, acquisition.gamma, acquisition.floor)[..., None] for one in (image, truth))
        parts = split_error(bent - true, linear.apply, inverse)
        whole = jnp.maximum(jnp.linalg.norm(true.ravel()), 1e-6)
        return parts.measured_norm / whole, parts.null_norm / whole

    return Scorer(
        jax.jit(jax.vmap(residual)), jax.jit(jax.vmap(split)), partial(_perceptual, config=shafe), _tissue, config
    )


# Compiled here, once for all conditions of a comparison: each takes 1 to 2 s.
@partial(jax.jit, static_argnames="config")
def _perceptual(truth: Array, image: Array, config: ShafeConfig) -> Array:
    return jax.vmap(lambda *pair: shafe_score(*pair, features=None, config=config))(truth, image)


@jax.jit
def _tissue(stack: Array, mask: Array) -> Array:
    return mixture_volumes(fit_tissue(stack, mask), 1.0)


def score_subject(
    scorer: Scorer,
    subject: Subject,
    measurement: Float32[np.ndarray, "image ..."],
    estimate: Float32[np.ndarray, "image ..."],
    evaluations: Float32[np.ndarray, " image"],
) -> dict[str, float]:
    """Score a subject's images; each number is the mean over them, but volumes, which are summed first.

    Args:
        scorer: For the condition.
        subject: Truth.
        measurement: (image, *space, 1).
        estimate: Like the truth.
        evaluations: Evaluations of the network, per image.
    """
    truth = subject.images
    contradicted, unseen = scorer.split(truth, estimate)
    lesions = [
        false_lesions(*parts, scorer.config.lesions)
        for parts in zip(truth, estimate, subject.brain, subject.lesions, strict=True)
    ]
    pairs = list(zip(truth, estimate, strict=True))
    return {
        "psnr": _mean([psnr(*pair, DATA_RANGE) for pair in pairs]),
        "ssim": _mean([ssim(*pair, DATA_RANGE) for pair in pairs]),
        "residual": _mean(scorer.residual(measurement, estimate)),
        **volume_errors(scorer, subject, estimate),
        "contradicted": _mean(contradicted),
        "unseen": _mean(unseen),
        "false_lesions": _mean([float(found.count > 0) for found in lesions]),
        "perceptual": _mean(scorer.perceptual(truth, estimate)),
        "evaluations": _mean(evaluations),
    }


def volume_errors(scorer: Scorer, subject: Subject, estimate: Float32[np.ndarray, "image ..."]) -> dict[str, float]:
    """Return relative volume errors, by one estimator on truth and estimate; the mean is over tissues there are."""
    mask = _stacked(subject.brain)
    if not mask.any():
        return {"volume_error": 0.0, **{f"volume_error_{name}": 0.0 for name in TISSUES}}
    truth, found = (_volumes(scorer, images, mask) for images in (subject.images, estimate))
    present = {name: volume for name, volume in truth.items() if volume >= LEAST_VOLUME}
    errors = relative_volume_errors(present, {name: found[name] for name in present})
    named = {f"volume_error_{name}": errors.get(name, 0.0) for name in TISSUES}
    return {"volume_error": _mean(list(errors.values())), **named}


def _volumes(scorer: Scorer, images: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    return dict(zip(TISSUES, map(float, scorer.volumes(_stacked(images), mask)), strict=True))


def make_subject(
    name: str, images: Float32[np.ndarray, "image ..."], labels: Int32[np.ndarray, "image ..."] | None
) -> Subject:
    """Gather a subject's images; without labels the brain is what is not dark, and there are no lesions."""
    if labels is None:
        brain = images > 0.05
        return Subject(name, images, brain, np.zeros_like(brain))
    return Subject(name, images, labels > 0, labels == LABELS["lesion"])


def _stacked(images: np.ndarray) -> np.ndarray:
    """Make one volume of slices, the number of the slice last; a volume stays itself."""
    return images[0] if images.ndim == 4 else np.moveaxis(images, 0, -1)


def tabulate(results: Sequence[Result], seed: int) -> tuple[list[Mean], list[Difference]]:
    """Return means of every method, and its differences from the conditional model alone on the same subjects."""
    means = [row for name in (*MEASURES, "evaluations") for row in summarise(results, AXES, name, seed=seed)]
    differences = [
        row
        for name in MEASURES if any(result.cell["arm"] == BASELINE for result in results)
        for row in compare(results, AXES[:2], BASELINE, name, seed=seed, shared={"initial": NOISE}, test="wilcoxon",
                           family=AXES[:2])
    ]  # fmt: skip
    return means, differences


def _mean(values: object) -> float:
    return float(np.mean(np.asarray(values, np.float64)))
