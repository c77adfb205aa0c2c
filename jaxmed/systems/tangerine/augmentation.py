"""The augmentation of TANGERINE's fine-tuning: noise, smoothing and contrast, on the device, one volume at a time."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import erf
from jaxtyping import Array, Float, Key

from jaxmed.config import NonNegative, Positive, Share, Spread, checked
from jaxmed.data.augment import noise

RADIUS = 4  # voxels on each side: four of the largest standard deviations


@dataclasses.dataclass(frozen=True)
@checked
class Augmentation:
    """What may happen to a volume in fine-tuning, in this order; values are not clipped to [0, 1] afterwards.

    Attributes:
        noise_probability: Of Gaussian noise.
        noise_deviation: Largest standard deviation; each noise draws its own, evenly from 0.
        smooth_probability: Of Gaussian smoothing.
        smooth_sigma: Range of its standard deviation in voxels, drawn for every axis.
        gamma_probability: Of a power of the intensities within the volume's own range.
        gamma: Range of the exponent, drawn evenly.

    Source: TANGERINE, arXiv:2507.01881, released code (MONAI's transforms with these numbers).
    Deviation: smoothing repeats the edge outwards, where the original takes 0 there.
    """

    noise_probability: Share = 0.1
    noise_deviation: NonNegative = 0.1
    smooth_probability: Share = 0.2
    smooth_sigma: tuple[Spread, Spread] = (0.5, 1.0)
    gamma_probability: Share = 0.15
    gamma: tuple[Positive, Positive] = (0.75, 1.25)

    def __post_init__(self) -> None:
        for name in ("noise_probability", "smooth_probability", "gamma_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], found {getattr(self, name)}")
        if self.noise_deviation < 0:
            raise ValueError(f"noise_deviation: expected 0 or more, found {self.noise_deviation}")
        for name in ("smooth_sigma", "gamma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}: expected a range above 0 from low to high, found {low, high}")
        if self.smooth_sigma[1] > RADIUS / 3:
            raise ValueError(f"smooth_sigma: expected at most {RADIUS / 3:.3g} voxels, found {self.smooth_sigma[1]}")

    @property
    def is_on(self) -> bool:
        """Whether anything can happen."""
        return max(self.noise_probability, self.smooth_probability, self.gamma_probability) > 0

    def __call__(self, key: Key[Array, ""], image: Float[Array, "x y z channel"]) -> Float[Array, "x y z channel"]:
        """Return the volume with what chance does to it."""
        noise_key, smooth_key, gamma_key = jax.random.split(key, 3)
        image = _sometimes(
            noise_key, self.noise_probability, image, lambda key: noise(key, image, (0.0, self.noise_deviation))
        )
        noisy = image
        image = _sometimes(
            smooth_key,
            self.smooth_probability,
            noisy,
            lambda key: smooth(
                noisy, jax.random.uniform(key, (3,), minval=self.smooth_sigma[0], maxval=self.smooth_sigma[1])
            ),
        )
        smoothed = image
        return _sometimes(
            gamma_key,
            self.gamma_probability,
            smoothed,
            lambda key: change_contrast(smoothed, jax.random.uniform(key, minval=self.gamma[0], maxval=self.gamma[1])),
        )


def smooth(image: Float[Array, "x y z channel"], sigma: Float[Array, " 3"]) -> Float[Array, "x y z channel"]:
    """Convolve with a Gaussian that is integrated over each voxel, axis by axis; the edge is repeated outwards.

    Args:
        image: Any intensities.
        sigma: Standard deviation along each axis, in voxels.
    """
    for axis in range(3):
        places = jnp.arange(-RADIUS, RADIUS + 1)
        scale = jnp.sqrt(2.0) * sigma[axis]
        weights = 0.5 * (erf((places + 0.5) / scale) - erf((places - 0.5) / scale))
        margins = [(RADIUS, RADIUS) if axis == other else (0, 0) for other in range(4)]
        padded = jnp.pad(image, margins, mode="edge")
        # Shifted sums: see `data.augment.blur`.
        image = sum(
            weights[tap] * jax.lax.slice_in_dim(padded, tap, tap + image.shape[axis], axis=axis)
            for tap in range(2 * RADIUS + 1)
        )  # pyright: ignore[reportAssignmentType]
    return image


def change_contrast(image: Float[Array, "x y z channel"], exponent: Float[Array, ""]) -> Float[Array, "x y z channel"]:
    """Raise intensities to a power within the volume's own range, which stays."""
    low, high = image.min(), image.max()
    share = jnp.clip((image - low) / jnp.where(high > low, high - low, 1), jnp.finfo(image.dtype).tiny, 1)
    return low + (high - low) * share**exponent


def _sometimes(key: Array, probability: float, image: Array, change: Callable[[Array], Array]) -> Array:
    if probability == 0:
        return image
    chance_key, draw_key = jax.random.split(key)
    return jnp.where(jax.random.bernoulli(chance_key, float(probability)), change(draw_key), image)
