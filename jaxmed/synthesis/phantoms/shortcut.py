"""A task in which a conditional model learns to hallucinate: phantom brains whose lesions follow a bright cue.

Where the conditional model is trained, a lesion lies beside every bright spot in the cortex and nowhere else, and the
measurement does not show it. In the images of the prior, lesions and bright spots come independently of each other.
Cases to be tested have the bright spot and no lesion: what a model draws there it has not from the measurement. All
three are drawn by keys, so that there is no end of them.

Source: the specification is ours; the paper's own test images are not public.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmed.arrays.types import KeyArray, Scalar
from jaxmed.metrics.hallucination import lesion_contrast
from jaxmed.physics.lowfield import LowField, make_operator, simulate
from jaxmed.synthesis.phantoms.brain import TISSUES, BrainConfig, BrainPhantom


@dataclasses.dataclass(frozen=True)
class ShortcutConfig:
    """The task.

    Attributes:
        size: Voxels along x and y.
        brain: Anatomy and contrast. Its probability of a lesion is the prior's; of a cue, the prior's too.
        acquisition: From image to measurement.
    """

    size: tuple[int, int] = (64, 64)
    brain: BrainConfig = BrainConfig(
        intensity=(0.35, 0.9, 1.3, 0.3, 0.8), lesion_probability=0.2, cue_probability=0.3, texture=0.02
    )
    acquisition: LowField = LowField(gamma=1.0, scale=2.0, sigma=1.0, noise=0.05)

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 16:
            raise ValueError(f"size: expected two numbers of 16 or more, found {self.size}")

    @property
    def operator(self) -> Callable[[Float[Array, "..."]], Float[Array, "..."]]:
        """Noise-free measurement of one image, (x, y, channel)."""
        return make_operator(self.size, self.acquisition)


SMALL = ShortcutConfig(
    size=(32, 32),
    brain=dataclasses.replace(ShortcutConfig().brain, lesion_radius=(13.0, 18.0), cue_radius=8.0, anatomy_spread=0.05),
)
"""Larger lesions in fewer voxels: networks for it train in minutes on a processor."""


class Case(NamedTuple):
    """A test case: cue, no lesion.

    Attributes:
        image: The truth, (x, y, 1).
        measurement: On the same grid.
        labels: Tissues, as in `synthesis.phantoms.brain.LABELS`.
        brain: Not background.
        lesion: Where the cue suggests a lesion.
        around: White matter around that place.
    """

    image: Float[Array, "*batch x y 1"]
    measurement: Float[Array, "*batch x y 1"]
    labels: Int[Array, "*batch x y"]
    brain: Bool[Array, "*batch x y"]
    lesion: Bool[Array, "*batch x y"]
    around: Bool[Array, "*batch x y"]


def make_case(key: KeyArray, brain: BrainPhantom, image: Float[Array, "x y"], config: ShortcutConfig) -> Case:
    """Measure an image of a phantom that has no lesion.

    Args:
        key: Consumed.
        brain: Says where a lesion would be.
        image: The truth; the phantom's own, or one like it.
        config: The task.
    """
    white = brain.shares[..., TISSUES.index("white")] > 0.99
    around = _grow(brain.lesion, 3) & ~_grow(brain.lesion, 1) & white
    truth = image[..., None]
    measurement = simulate(key, truth, config.size, config.acquisition)
    return Case(truth, measurement, brain.labels, brain.labels > 0, brain.lesion, around)


def lesion_error(case: Case, estimate: Float[Array, "x y 1"]) -> Scalar:
    """Return how far the contrast at the suggested place is from the truth's; of one case."""
    found, true = (lesion_contrast(image[..., 0], case.lesion, case.around) for image in (estimate, case.image))
    return jnp.abs(found - true)


def _grow(mask: Bool[Array, "x y"], steps: int) -> Bool[Array, "x y"]:
    for _ in range(steps):
        padded = jnp.pad(mask, 1)
        mask = padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2] | mask
    return mask
