"""Measures of invented structure: what contradicts the measurement, what it cannot see, and lesions that are not there.

Pixel errors alone hardly tell a hallucination from blur. Three measures, each of one image against its truth (the
published metric of DynamicDPS is not known, so none of these is it):

- The error split by a linear operator A: A^+ A e contradicts the measurement (intrinsic), (I - A^+ A) e does not
  (extrinsic): only the prior can have put it there.
- False lesions: connected regions where the low-passed error exceeds a threshold, away from true lesions.
- A perceptual score: the softmax-weighted cosine distance of shallow features after a low-pass, which looks at the
  worst places instead of the average one (after SHAFE of the same authors' HalluGen).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from jaxtyping import Array, Bool, Float

from jaxmed.arrays.filters import along, blur_matrix, sobel
from jaxmed.config import Bounds, Count, Positive, Spread, Whole, checked
from jaxmed.errors import InputError

Linear = Callable[[Float[Array, "..."]], Float[Array, "..."]]
Features = Callable[[Float[Array, "*space"]], Float[Array, "*place feature"]]


class ErrorSplit(NamedTuple):
    """An error in two parts that sum to it.

    Attributes:
        measured: A^+ A e, which the measurement contradicts.
        null: (I - A^+ A) e, which the measurement cannot see.
        measured_norm: Euclidean length of the first.
        null_norm: Euclidean length of the second.
    """

    measured: Float[Array, "..."]
    null: Float[Array, "..."]
    measured_norm: Float[Array, ""]
    null_norm: Float[Array, ""]


class FalseLesions(NamedTuple):
    """Lesions found where there are none.

    Attributes:
        count: Connected regions.
        volume: Voxels in them.
        peak: Largest low-passed error away from true lesions, in the unit of the images.
    """

    count: int
    volume: int
    peak: float


@dataclasses.dataclass(frozen=True)
@checked
class LesionConfig:
    """What counts as a false lesion.

    Attributes:
        sigma: Standard deviation of the Gaussian low-pass, in voxels.
        threshold: Threshold of the low-passed error, in the unit of the images.
        least_volume: Fewest voxels of a region.
        margin: Voxels around true lesions that do not count: their borders may blur.
    """

    sigma: Spread = 1.5
    threshold: Positive = 0.15
    least_volume: Count = 4
    margin: Whole = 2


@dataclasses.dataclass(frozen=True)
@checked
class ShafeConfig:
    """The perceptual score.

    Attributes:
        radius: Radius of the circle of spatial frequencies that is kept, in periods per image.
        temperature: Temperature of the softmax over places; small looks at the worst place only.
    """

    radius: Annotated[float, Bounds(0, 100, above=True)] = 55.0
    temperature: Positive = 0.01


def split_error(error: Float[Array, "..."], apply: Linear, pseudo_inverse: Linear) -> ErrorSplit:
    """Split an error into what a linear measurement contradicts and what it cannot see.

    Args:
        error: Estimate minus truth, one image.
        apply: A, linear (for A with an offset, its linear part).
        pseudo_inverse: A^+.
    """
    measured = pseudo_inverse(apply(error))
    null = error - measured
    return ErrorSplit(measured, null, jnp.linalg.norm(measured.ravel()), jnp.linalg.norm(null.ravel()))


def false_lesions(
    truth: Float[np.ndarray, "*space"],
    estimate: Float[np.ndarray, "..."],
    mask: Bool[np.ndarray, "..."],
    lesion: Bool[np.ndarray, "..."],
    config: LesionConfig = LesionConfig(),
) -> FalseLesions:
    """Find lesions in an estimate that the truth has not.

    Args:
        truth: Image.
        estimate: Image.
        mask: Where lesions may be.
        lesion: True lesions; nothing is looked for there and in a margin around.
        config: What counts.

    Raises:
        InputError: The shapes differ.
    """
    if not truth.shape == estimate.shape == mask.shape == lesion.shape:
        found = truth.shape, estimate.shape, mask.shape, lesion.shape
        raise InputError("truth, estimate, mask and lesion", "one shape", found)
    error = estimate.astype(np.float64) - truth.astype(np.float64)
    if config.sigma:
        # Before the absolute value: noise cancels, a lesion is of one sign.
        error = scipy.ndimage.gaussian_filter(error, config.sigma, mode="nearest")
    near = scipy.ndimage.binary_dilation(lesion, iterations=config.margin) if config.margin else lesion
    size = np.abs(np.asarray(error)) * (mask & ~np.asarray(near, bool))
    regions, count = scipy.ndimage.label(size > config.threshold)  # pyright: ignore[reportGeneralTypeIssues]
    volumes = np.bincount(np.ravel(regions), minlength=count + 1)[1:]
    kept = volumes[volumes >= config.least_volume]
    return FalseLesions(len(kept), int(kept.sum()), float(size.max()))


def lesion_contrast(
    image: Float[Array, "*space"], lesion: Bool[Array, "*space"], around: Bool[Array, "*space"]
) -> Float[Array, ""]:
    """Return how much brighter an image is in a lesion than around it; its error is that of the lesion's contrast.

    Args:
        image: In any unit.
        lesion: Where the lesion is, or might be.
        around: Where the tissue around it is.
    """

    def mean(where: Array) -> Array:
        return (image * where).sum() / jnp.maximum(where.sum(), 1)

    return mean(lesion) - mean(around)


def shafe_score(
    truth: Float[Array, "*space"],
    estimate: Float[Array, "*space"],
    features: Features | None = None,
    config: ShafeConfig = ShafeConfig(),
) -> Float[Array, ""]:
    """Score invented structure from 0 (none) to 2: the cosine distance of features, weighted towards the worst places.

    Args:
        truth: Image.
        estimate: Image.
        features: From an image to one vector per place, such as the first blocks of a network; None takes
            `derivative_features`.
        config: Low-pass and temperature.

    Source: HalluGen's SHAFE, from its public description; its networks and exact low-pass are not reproduced.
    """
    describe = derivative_features if features is None else features
    ours, theirs = (describe(low_pass(image, config.radius)) for image in (estimate, truth))
    product = (ours * theirs).sum(-1)
    # Flat places have no direction: the small number gives them the distance 0 when both are flat.
    floor = 1e-6
    lengths = jnp.sqrt((ours**2).sum(-1) + floor) * jnp.sqrt((theirs**2).sum(-1) + floor)
    distance = jnp.clip(1 - (product + floor) / lengths, 0.0, 2.0).ravel()
    logits = distance / config.temperature
    weights = jnp.exp(logits - logits.max())
    return (weights * distance).sum() / weights.sum()


def low_pass(image: Float[Array, "*space"], radius: float) -> Float[Array, "*space"]:
    """Keep the spatial frequencies within a circle, given in periods per image along each axis."""
    squared = jnp.zeros(())
    for axis, size in enumerate(image.shape):
        frequency = jnp.fft.fftfreq(size) * size
        squared = squared + frequency.reshape([-1 if a == axis else 1 for a in range(image.ndim)]) ** 2
    return jnp.fft.ifftn(jnp.fft.fftn(image) * (squared <= radius**2)).real


def derivative_features(image: Float[Array, "*space"]) -> Float[Array, "*space feature"]:
    """Describe every place by intensity, slopes and curvatures at three scales (1, 2 and 4 voxels).

    Curvatures are slopes of slopes; each is multiplied by its scale so that all have one unit.
    """
    found = []
    for sigma in (1.0, 2.0, 4.0):
        smooth = image
        for axis, size in enumerate(image.shape):
            smooth = along(blur_matrix(size, sigma, int(3 * sigma)), smooth, axis)
        # Sobel's taps sum to 2 * 4^(n - 1) per unit of slope.
        unit = sigma / (2 * 4 ** (image.ndim - 1))
        slopes = sobel(smooth, mode="edge") * unit
        found.append(smooth)
        for slope in slopes:
            found.append(slope)
            found.extend(sobel(slope, mode="edge") * unit)
    return jnp.stack(found, -1)


def relative_volume_errors(truth: Mapping[str, float], estimate: Mapping[str, float]) -> dict[str, float]:
    """Return |V - V_true| / V_true by tissue.

    Raises:
        InputError: The tissues differ, or a true volume is not positive.
    """
    if set(truth) != set(estimate):
        raise InputError("tissue volumes", f"of {', '.join(truth)}", f"of {', '.join(estimate)}")
    for name, volume in truth.items():
        if not volume > 0:
            raise InputError(f"true volume of {name}", "a positive number", volume, "leave the tissue out")
    return {name: abs(estimate[name] - volume) / volume for name, volume in truth.items()}
