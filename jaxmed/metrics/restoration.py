"""What restored images are worth against their truth: fidelity, residual, tissue volumes and hallucination."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

from jaxmed.metrics.hallucination import (
    LesionConfig,
    Linear,
    ShafeConfig,
    false_lesions,
    relative_volume_errors,
    shafe_score,
    split_error,
)
from jaxmed.metrics.imaging import psnr, ssim
from jaxmed.metrics.tissue import TISSUES, tissue_volumes

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

Split: TypeAlias = Callable[[Any, Any], tuple[Array, Array]]
"""(truths, estimates), on host or device, -> two numbers of each pair."""


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """How hallucination is measured.

    Attributes:
        lesions: What counts as a false lesion.
        shafe: The perceptual score; its radius is for 256 voxels, and scaled with the image.
    """

    lesions: LesionConfig = LesionConfig()
    shafe: ShafeConfig = ShafeConfig()


def make_split(apply: Linear, pseudo_inverse: Linear, before: Linear = lambda image: image) -> Split:
    """Return the compiled function from truths and estimates (image, *space) to the parts of each error.

    They are what a measurement contradicts and what it cannot see, each relative to the truth.

    Args:
        apply: The measurement's linear part, of an image (*space, 1).
        pseudo_inverse: Its pseudo-inverse, whose cutoff says what counts as seen.
        before: What the measurement does to intensities before.
    """

    def split(truth: Array, image: Array) -> tuple[Array, Array]:
        bent, true = (before(one)[..., None] for one in (image, truth))
        parts = split_error(bent - true, apply, pseudo_inverse)
        whole = jnp.maximum(jnp.linalg.norm(true.ravel()), 1e-6)
        return parts.measured_norm / whole, parts.null_norm / whole

    return jax.jit(jax.vmap(split))


def score_images(
    truth: Float32[np.ndarray, "image ..."],
    estimate: Float32[np.ndarray, "image ..."],
    brain: Bool[np.ndarray, "image ..."],
    lesions: Bool[np.ndarray, "image ..."],
    split: Split,
    data_range: float,
    config: ScoreConfig = ScoreConfig(),
) -> dict[str, float]:
    """Return MEASURES but the residual of a subject's images, means over them; but volumes are summed first.

    Args:
        truth: (image, *space).
        estimate: Like the truth.
        brain: Where tissue is measured and lesions are looked for.
        lesions: True lesions.
        split: For the acquisition, by `make_split`.
        data_range: Largest minus smallest intensity that an image may have.
        config: How hallucination is measured.
    """
    contradicted, unseen = split(truth, estimate)
    pairs = list(zip(truth, estimate, strict=True))
    places = list(zip(brain, lesions, strict=True))
    shafe = dataclasses.replace(config.shafe, radius=config.shafe.radius * min(truth.shape[1:]) / 256)
    found = {
        "psnr": [psnr(*pair, data_range) for pair in pairs],
        "ssim": [ssim(*pair, data_range) for pair in pairs],
        **volume_errors(truth, estimate, brain),
        "contradicted": contradicted,
        "unseen": unseen,
        "false_lesions": [
            false_lesions(*pair, *where, config.lesions).count > 0 for pair, where in zip(pairs, places, strict=True)
        ],
        "perceptual": _perceptual(truth, estimate, shafe),
    }
    return {name: float(np.mean(np.asarray(values, np.float64))) for name, values in found.items()}


# Compiled here, once for all conditions of a comparison: it takes 1 to 2 s.
@partial(jax.jit, static_argnames="config")
def _perceptual(truth: Array, image: Array, config: ShafeConfig) -> Array:
    return jax.vmap(lambda *pair: shafe_score(*pair, features=None, config=config))(truth, image)


def volume_errors(
    truth: Float32[np.ndarray, "image ..."], estimate: Float32[np.ndarray, "image ..."], mask: Bool[np.ndarray, "..."]
) -> dict[str, float]:
    """Return relative volume errors, by one estimator on truth and estimate; the mean is over tissues there are."""
    if not mask.any():
        return {name: 0.0 for name in MEASURES if name.startswith("volume_error")}
    # A volume stays itself; slices make one, the number of the slice last.
    images, inside = (
        [stack[0] if stack.ndim == 4 else np.moveaxis(stack, 0, -1) for stack in stacks]
        for stacks in ((truth, estimate), (mask,))
    )
    true, found = tissue_volumes(dict(enumerate(images)), inside[0], 1.0, is_cropped=False).values()
    present = {name: volume for name, volume in true.items() if volume >= LEAST_VOLUME}
    errors = relative_volume_errors(present, {name: found[name] for name in present})
    named = {f"volume_error_{name}": errors.get(name, 0.0) for name in TISSUES}
    return {"volume_error": float(np.mean([*errors.values()])), **named}
