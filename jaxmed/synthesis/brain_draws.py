"""What the brain generator draws: its configuration, and the random numbers that decide how an image will look.

Everything here is small (numbers and tables of 256), so that distributions are known without an image being made;
`synthesis.brain` turns it into volumes.

Source: BrainFM (arXiv:2509.00549), its authors' public code, read for the steps' ranges and defaults.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Key

from jaxmed.config import Count, NonNegative, Positive, Range, Share, Size, Whole, checked
from jaxmed.synthesis.bias_field import MILD, SEVERE, BiasFieldConfig
from jaxmed.synthesis.contrast import Contrast, ContrastConfig, draw_contrast
from jaxmed.synthesis.control_grid import Photo
from jaxmed.synthesis.deformation import Affine, DeformationConfig, draw_affine
from jaxmed.synthesis.pathology import PathologyConfig
from jaxmed.synthesis.resolution import Acquisition, ResolutionConfig, draw_acquisition, draw_photo

MODALITIES = ("T1", "T2", "FLAIR", "CT")
CT, SYNTHETIC = 3, 4
NUM_MIXED = 3
"""Modalities that are mixed with a synthetic image: CT never is."""
RELEASED_FLIP = 0.6914624612740131
"""The released code draws a normal number and compares it with 0.5."""
RELEASED_NOISE = {"synthetic": (5.0, 15.0), "real": (0.0, 0.02)}


@dataclasses.dataclass(frozen=True)
@checked
class Severity:
    """How badly an image is taken.

    Attributes:
        bias: The gain of the coil.
        gamma: Standard deviation of the logarithm of the exponent of intensities.
        noise: Range of the noise's standard deviation at low resolution, on a scale of 0 to 255.
    """

    bias: BiasFieldConfig = SEVERE
    gamma: NonNegative = 0.1
    noise: Range = (5.0, 15.0)


@dataclasses.dataclass(frozen=True)
@checked
class GeneratorConfig:
    """How images of a subject are drawn; the defaults are BrainFM's training configurations.

    Attributes:
        shape: Voxels along x, y and z, of 1 mm unless `resolution.voxel` is another size; the deformation's lengths are
            in voxels.
        read: Cumulative probabilities that T1, T2, FLAIR or CT are taken as they are, where there are such and the
            subject's data set states none; otherwise an image is drawn from the labels.
        flip: Probability that left and right are exchanged. The specification gives none; half is ours.
        contrast: Intensities of labels.
        deformation: Affine and nonlinear deformation; rotation alone (shear, scaling and amplitude 0) where age is
            learnt.
        resolution: Spacing, thickness, photographs of slabs.
        severe: Bias, gamma and noise of an image. The released YAML's noise of 0.05 to 1 is overwritten by its code
            with 5 to 15, which is the default here.
        mild: The same of the first `mild_samples` images.
        real_noise: Noise of a real image, as a share of its largest intensity.
        samples: Images of one subject that share deformation, resolution and targets.
        mild_samples: How many of them are mild; 2 of 4 in Brain-ID.
        mix: Probability that a synthetic image is mixed with the subject's real ones; 0.2 in the training
            configurations, 0 in the default file.
        pathology: Lesions; none in BrainFM, on in UNA.
        hemisphere: Whether images are of a left hemisphere: photographs always, never flipped, two distances, no CT.
        smooth_labels: Whether a voxel's class is that of the largest share of linear interpolation, which smooths
            borders, in place of the nearest voxel's; the release can take the shares themselves for targets.
        max_distance: Distances are cut off beyond this, in mm.
        match_release: Whether defects of the released code are kept: flips with a probability of .69, noise without
            regard to severity, mixtures in which synthetic images outweigh real ones 255 times and are flipped back,
            real images on their own scale, borders that lose their first plane, defacing masks that are not flipped.
    """

    shape: tuple[Size, Size, Size] = (160, 160, 160)
    read: tuple[Share, Share, Share, Share] = (0.5, 0.0, 0.0, 0.0)
    flip: Share = 0.5
    contrast: ContrastConfig = ContrastConfig()
    deformation: DeformationConfig = DeformationConfig()
    resolution: ResolutionConfig = ResolutionConfig()
    severe: Severity = Severity()
    mild: Severity = Severity(MILD, gamma=0.01, noise=(0.0, 0.02))
    real_noise: Range = (0.0, 0.02)
    samples: Count = 1
    mild_samples: Whole = 0
    mix: Share = 0.2
    pathology: PathologyConfig = PathologyConfig()
    hemisphere: bool = False
    smooth_labels: bool = False
    max_distance: Positive = 3.0
    match_release: bool = False

    def __post_init__(self) -> None:
        if self.mild_samples > self.samples:
            found = f"{self.mild_samples} of {self.samples}"
            raise ValueError(f"mild_samples: expected at most samples, found {found}")

    @property
    def flip_probability(self) -> float:
        """Of exchanging left and right."""
        if self.hemisphere:
            return 0.0
        return RELEASED_FLIP if self.match_release else self.flip

    @property
    def acquisitions(self) -> ResolutionConfig:
        """The resolution's configuration, with what the whole asks of it."""
        photo = 1.0 if self.hemisphere else self.resolution.photo_probability
        border = "released" if self.match_release else self.resolution.border
        return dataclasses.replace(self.resolution, photo_probability=photo, border=border)

    def severity(self, sample: int) -> Severity:
        """Return how badly an image is taken, by its number."""
        return self.mild if sample < self.mild_samples else self.severe


class SubjectDraw(NamedTuple):
    """What all images of a subject share.

    Attributes:
        source: Which of `MODALITIES` is taken as it is; `SYNTHETIC` for an image drawn from labels.
        photo: Photographs of slabs.
        is_flipped: Whether left and right are exchanged.
        acquisition: Spacing and thickness of slices.
        affine: Linear part of the deformation.
    """

    source: Integer[Array, ""]
    photo: Photo
    is_flipped: Bool[Array, ""]
    acquisition: Acquisition
    affine: Affine


class SampleDraw(NamedTuple):
    """What one image has of its own.

    Attributes:
        contrast: Mean and spread of every label.
        noise_std: Standard deviation of the noise at low resolution.
        shares: Of the synthetic image, T1, T2 and FLAIR in the mixture; they sum to 1.
    """

    contrast: Contrast
    noise_std: Float[Array, ""]
    shares: Float[Array, "4"]


def draw_shared(
    key: Key[Array, ""],
    present: Bool[Array, "4"],
    size: Integer[Array, "3"],
    read: Float[Array, "4"],
    config: GeneratorConfig,
) -> SubjectDraw:
    """Draw what all images of a subject share.

    Args:
        key: Consumed.
        present: Which of `MODALITIES` the subject has.
        size: Voxels of its volumes.
        read: Cumulative probabilities of taking them; where negative, the configuration's.
        config: Ranges.
    """
    source_key, photo_key, flip_key, acquisition_key, affine_key = jax.random.split(key, 5)
    is_taken = present & (jax.random.uniform(source_key) < jnp.where(read < 0, jnp.array(config.read), read))
    source = jnp.where(is_taken.any(), jnp.argmax(is_taken), SYNTHETIC)
    photo = draw_photo(photo_key, config.acquisitions)
    return SubjectDraw(
        source=source,
        photo=photo,
        is_flipped=jax.random.bernoulli(flip_key, config.flip_probability),
        acquisition=draw_acquisition(acquisition_key, 3, config.acquisitions, photo),
        affine=draw_affine(affine_key, size, config.shape, config.deformation),
    )


def draw_sample(
    key: Key[Array, ""],
    present: Bool[Array, "4"],
    shared: SubjectDraw,
    severity: Severity,
    config: GeneratorConfig,
) -> SampleDraw:
    """Draw what one image has of its own.

    Args:
        key: Consumed.
        present: Which of `MODALITIES` the subject has.
        shared: From `draw_shared`.
        severity: How badly it is taken.
        config: Ranges.
    """
    contrast_key, noise_key, mix_key, share_key = jax.random.split(key, 4)
    is_synthetic = shared.source == SYNTHETIC
    synthetic, real = severity.noise, config.real_noise
    unit = 1.0 if config.match_release else INTENSITY
    if config.match_release:
        synthetic, real = RELEASED_NOISE["synthetic"], RELEASED_NOISE["real"]
    low, high = (jnp.where(is_synthetic, ours, unit * theirs) for ours, theirs in zip(synthetic, real, strict=True))
    is_mixed = is_synthetic & present[:NUM_MIXED].any() & jax.random.bernoulli(mix_key, config.mix)
    return SampleDraw(
        contrast=draw_contrast(contrast_key, config.contrast, shared.photo.is_on),
        noise_std=low + (high - low) * jax.random.uniform(noise_key),
        shares=jnp.where(is_mixed, draw_shares(share_key, present), jnp.eye(1, 1 + NUM_MIXED)[0]),
    )


INTENSITY = 255.0
"""Largest intensity of a real image before gamma, bias and noise: the scale of synthetic ones."""


def draw_shares(key: Key[Array, ""], present: Bool[Array, "4"]) -> Float[Array, "4"]:
    """Draw the shares of the synthetic image, T1, T2 and FLAIR in a mixture: even numbers, scaled to a sum of 1.

    Args:
        key: Consumed.
        present: Which of `MODALITIES` the subject has; the others get nothing.
    """
    drawn = jax.random.uniform(key, (1 + NUM_MIXED,), minval=jnp.finfo(jnp.float32).tiny)
    shares = jnp.where(jnp.concatenate([jnp.ones(1, bool), present[:NUM_MIXED]]), drawn, 0.0)
    return shares / shares.sum()
