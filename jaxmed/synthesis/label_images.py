"""Images of contrasts that no scanner took, drawn from label maps: how a broad prior is had from few subjects.

The labels are deformed, every structure gets an intensity, and texture, partial volume at borders and a bias field are
added. Half of the images keep the order of a T1-weighted scan (fluid dark, grey matter between, white matter bright),
the others take any contrast.

Source: the generator of BrainFM (arXiv:2509.00549) and SynthSeg, `synthesis/`; the two kinds of contrast, the blur and
the scale to [0, 2] are ours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.arrays.filters import downsample, gaussian_blur
from jaxmed.arrays.types import KeyArray
from jaxmed.arrays.warping import sample
from jaxmed.config import ASCENDING, NonNegative, Range, Share, Spread, checked
from jaxmed.synthesis.bias_field import BiasFieldConfig, apply_bias, draw_log_bias
from jaxmed.synthesis.contrast import NUM_LABELS, Contrast, ContrastConfig, apply_gamma, draw_contrast, render
from jaxmed.synthesis.deformation import DeformationConfig, draw_deformation

FULL = 255.0  # of the generator's scale, which becomes 2
FLUID = (4, 5, 14, 15, 24, 31, 72)
WHITE = (2, 7, 16, 28, 77, 85)
DEEP = (10, 11, 12, 13, 26)  # grey matter with myelin: between cortex and white matter


@dataclasses.dataclass(frozen=True)
@checked
class SyntheticConfig:
    """How images are drawn from label maps.

    Attributes:
        t1_probability: That a contrast has the order of a T1-weighted scan.
        spread: Standard deviation within a structure, on a scale of 0 to 255.
        blur: Standard deviation of the blur that mixes structures at their borders, in voxels.
        gamma: Standard deviation of the logarithm of a random exponent.
        bias: The gain of the coil.
        deformation: How the labels are deformed.
    """

    t1_probability: Share = 0.5
    spread: Range = (2.0, 12.0)
    blur: Annotated[tuple[Spread, Spread], ASCENDING] = (0.4, 0.8)
    gamma: NonNegative = 0.1
    bias: BiasFieldConfig = BiasFieldConfig(std=(0.0, 0.15))
    deformation: DeformationConfig = DeformationConfig(rotation=10.0, shear=0.05, scaling=0.1, amplitude=2.0)


def draw_image(
    key: KeyArray, labels: Int[Array, "*space"], config: SyntheticConfig = SyntheticConfig()
) -> Float[Array, "*space"]:
    """Draw an image in [0, 2].

    Args:
        key: Consumed.
        labels: Structures, both sides with one label; 2 or 3 axes; 0 stays dark.
        config: Ranges.
    """
    place_key, kind_key, contrast_key, noise_key, blur_key, bias_key, gamma_key = jax.random.split(key, 7)
    places, _ = draw_deformation(place_key, labels.shape, labels.shape, config.deformation)
    moved = sample(labels[..., None], places, order=0)[..., 0]
    any_key, t1_key = jax.random.split(contrast_key)
    drawn = draw_contrast(any_key, ContrastConfig(std=config.spread, background_probability=1.0, partial_volume=False))
    is_t1 = jax.random.bernoulli(kind_key, config.t1_probability)
    mean = jnp.where(is_t1, draw_t1_means(t1_key), drawn.mean)
    image = render(noise_key, moved, Contrast(mean, drawn.std.at[0].set(0.0)))
    low, high = config.blur
    sigma = jax.random.uniform(blur_key, (), minval=low, maxval=high)
    image = gaussian_blur(image, sigma, max(1, round(3 * high)))
    image = apply_gamma(gamma_key, image, config.gamma)
    image = apply_bias(image, draw_log_bias(bias_key, labels.shape, config.bias))
    return jnp.clip(image * (2.0 / FULL), 0.0, 2.0)


def draw_t1_means(key: KeyArray) -> Float[Array, "256"]:
    """Draw the mean of every label in the order of a T1-weighted scan, on a scale of 0 to 255."""
    fluid_key, grey_key, white_key, deep_key, own_key = jax.random.split(key, 5)
    fluid = jax.random.uniform(fluid_key, minval=15.0, maxval=60.0)
    grey = jax.random.uniform(grey_key, minval=85.0, maxval=135.0)
    white = jax.random.uniform(white_key, minval=160.0, maxval=215.0)
    deep = grey + (white - grey) * jax.random.uniform(deep_key, minval=0.1, maxval=0.6)
    mean = jnp.full(NUM_LABELS, grey).at[jnp.array(FLUID)].set(fluid)
    mean = mean.at[jnp.array(WHITE)].set(white).at[jnp.array(DEEP)].set(deep)
    mean = mean + 3.0 * jax.random.normal(own_key, (NUM_LABELS,))
    return jnp.maximum(mean, 0.0).at[0].set(0.0)


@dataclasses.dataclass(frozen=True)
class ImageMaker:
    """A record of `data.images.ImageSource` to one training image, on the device; called with a key.

    Attributes:
        synthetic: How contrasts are drawn from labels; None where no record holds labels, which spares the drawing.
        supersample: Voxels of a record per voxel of the image, along each axis.
        axis: Axis of the image that runs from left to right; None where none does.
        flip: Probability that left and right are exchanged.
    """

    synthetic: SyntheticConfig | None
    supersample: int = 1
    axis: int | None = 0
    flip: float = 0.5

    def __call__(self, key: KeyArray, fields: Mapping[str, Array]) -> Float[Array, "*space channel"]:
        """Return an image in [0, 2], the channel last: the scan, or a contrast drawn from its labels."""
        draw_key, flip_key = jax.random.split(key)
        image = fields["voxels"]
        if self.synthetic is not None:
            drawn = draw_image(draw_key, image.astype(jnp.int32), self.synthetic)
            image = jnp.where(fields["is_labels"], drawn, image)
        if self.supersample > 1:
            image = downsample(image, self.supersample)
        if self.axis is not None:
            image = jnp.where(jax.random.bernoulli(flip_key, self.flip), jnp.flip(image, self.axis), image)
        return image[..., None]
