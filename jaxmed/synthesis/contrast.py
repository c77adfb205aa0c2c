"""Random contrasts: an image from labels, every label with its own mean and spread; and a random gamma.

Labels are whole numbers from 0 to 255. Intensities are on the generator's scale, about 0 to 255.

Source: BrainFM's generator, steps 8 and 12, in its authors' public code.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Key

from jaxmed.config import Bounds, NonNegative, Range, Share, checked

NUM_LABELS = 256
Label = Annotated[int, Bounds(0, NUM_LABELS - 1)]
LESION, WHITE_MATTER = 77, 2
# Labels that share one mean in an image like CT, with the base and width of its range.
CT_GROUPS: tuple[tuple[tuple[int, ...], float, float], ...] = (
    ((4, 5, 14, 15, 24, 31, 72), 25.0, 10.0),
    ((2, 7, 16, 77, 30), 90.0, 20.0),
    ((3, 8, 17, 18, 28, 10, 11, 12, 13, 26), 110.0, 20.0),
)
GAMMA_FIXED_POINT = 300.0


@dataclasses.dataclass(frozen=True)
@checked
class ContrastConfig:
    """How contrasts are drawn.

    Attributes:
        mean: Range of a label's mean.
        std: Range of the standard deviation within a label.
        background_probability: That label 0 has the mean 0.
        ct_probability: That the labels of CT_GROUPS share their means, as in CT.
        partial_volume: Whether labels 100 to 250 are mixtures of the classes 1 (lesion), 2 (white matter), 3 (grey
            matter) and 4 (CSF), in steps of 2 %.
        means: Labels whose mean is not drawn, and that mean: one contrast for all images, such as that of T1w.
    """

    mean: Range = (25.0, 225.0)
    std: Range = (5.0, 25.0)
    background_probability: Share = 0.5
    ct_probability: Share = 0.0
    partial_volume: bool = True
    means: tuple[tuple[Label, NonNegative], ...] = ()

    def __post_init__(self) -> None:
        labels = [label for label, _ in self.means]
        if len(set(labels)) < len(labels):
            raise ValueError(f"means: expected each label once, found {labels}")


class Contrast(NamedTuple):
    """Mean and standard deviation of every label."""

    mean: Float[Array, "256"]
    std: Float[Array, "256"]


def draw_contrast(
    key: Key[Array, ""], config: ContrastConfig = ContrastConfig(), is_photo: Bool[Array, ""] | bool = False
) -> Contrast:
    """Draw mean and spread of every label.

    Args:
        key: Consumed.
        config: Ranges.
        is_photo: In photo mode the background's mean is always 0.
    """
    mean_key, std_key, ct_key, group_key, background_key = jax.random.split(key, 5)
    mean = jax.random.uniform(mean_key, (NUM_LABELS,), minval=config.mean[0], maxval=config.mean[1])
    std = jax.random.uniform(std_key, (NUM_LABELS,), minval=config.std[0], maxval=config.std[1])
    tied = mean
    for index, (labels, base, width) in enumerate(CT_GROUPS):
        shared = base + width * jax.random.uniform(jax.random.fold_in(group_key, index))
        tied = tied.at[jnp.array(labels)].set(shared)
    mean = jnp.where(jax.random.bernoulli(ct_key, config.ct_probability), tied, mean)
    is_dark = jax.random.bernoulli(background_key, config.background_probability) | is_photo
    mean = mean.at[0].set(jnp.where(is_dark, 0.0, mean[0]))
    if config.means:
        labels, values = zip(*config.means, strict=True)
        mean = mean.at[jnp.array(labels)].set(jnp.array(values, mean.dtype))
    if config.partial_volume:
        # Mixtures in the mean and in the variance.
        shares = jnp.asarray(partial_volume_shares(), mean.dtype)
        mean, std = shares @ mean, jnp.sqrt(shares @ std**2)
    return Contrast(mean, std)


def partial_volume_shares() -> Float[np.ndarray, "256 256"]:
    """Return what each label consists of: itself, or for 100 to 250 two neighbouring ones of the classes 1 to 4."""
    shares = np.eye(NUM_LABELS)
    for label in range(100, 251):
        lower, share = 1 + (label - 100) // 50, 0.02 * (label % 50)
        shares[label, label] = 0.0
        shares[label, lower] += 1 - share
        if share:
            shares[label, lower + 1] += share
    return shares


def render(key: Key[Array, ""], labels: Integer[Array, "*space"], contrast: Contrast) -> Float[Array, "*space"]:
    """Draw an image of a label map, at its own resolution: warp it afterwards.

    Label 77 (lesion) looks like white matter. Negative intensities become 0.

    Args:
        key: Consumed; one normal number per voxel.
        labels: 0 to 255.
        contrast: From `draw_contrast`.
    """
    labels = jnp.where(labels == LESION, WHITE_MATTER, labels.astype(jnp.int32))
    noise = jax.random.normal(key, labels.shape)
    return jnp.maximum(contrast.mean[labels] + contrast.std[labels] * noise, 0.0)


def apply_gamma(
    key: Key[Array, ""], image: Float[Array, "*space"], std: float | Float[Array, ""] = 0.1
) -> Float[Array, "*space"]:
    """Bend the intensities: I <- 300 (I / 300)^exp(std n), n normal; 0 and 300 stay.

    Args:
        key: Consumed.
        image: Intensities from 0 on, on the generator's scale.
        std: Standard deviation of the logarithm of the exponent.
    """
    exponent = jnp.exp(std * jax.random.normal(key))
    ratio = image / GAMMA_FIXED_POINT
    # The power's slope at 0 is infinite for exponents below 1: keep 0 out of it.
    bent = jnp.where(ratio > 0, jnp.where(ratio > 0, ratio, 1.0) ** exponent, 0.0)
    return GAMMA_FIXED_POINT * bent
