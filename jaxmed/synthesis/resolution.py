"""Random resolution: slice thickness and spacing, the low-resolution image with its noise, and the way back.

Acquisitions are drawn in mm and told in voxels of the output grid, which are 1 mm unless stated. The low-resolution
image lives in a buffer of the output's shape; how much of it is filled is drawn, so shapes stay fixed. Blur and
sampling are one matrix per axis, the way back is another, and only the noise stands between.

Source: BrainFM's generator, steps 2, 3, 12 and 13, in its authors' public code.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmed.arrays.filters import along_all, blur_matrix, linear_matrix, zoom_positions
from jaxmed.config import Positive, Range, Share, checked
from jaxmed.synthesis.control_grid import LEAST_PHOTO_SPACING, PHOTO_AXIS, Photo

# Standard deviation of the slice profile per mm of thickness, the source's constant: at the Nyquist rate of samples one
# thickness apart the Gaussian's response is exp(-(ln 5)^2 / 2), about a quarter.
SIGMA_PER_THICKNESS = math.log(5) / math.pi
Border = Literal["repeat", "released"]


@dataclasses.dataclass(frozen=True)
@checked
class ResolutionConfig:
    """How acquisitions are drawn.

    Attributes:
        photo_probability: Probability of photo mode.
        photo_spacing: Range of the slabs' spacing in mm.
        low_only: Whether acquisitions of 1 mm, and of one thick axis, are left out (for super-resolution).
        fine_only: Whether every acquisition is of 1 mm, photographs apart.
        voxel: Size of the output grid's voxels in mm; what is finer than they are is as fine as they.
        noise_std: Range of the noise's standard deviation, at low resolution; 5 to 15 suits synthetic intensities of
            0 to 255, 0 to 0.02 real ones in [0, 1].
        border: What low-resolution samples beyond the outer voxels hold: those voxels, or ("released") zeros, which
            the released generator writes at coordinates of 0 and less too.
    """

    photo_probability: Share = 0.2
    photo_spacing: Range = (2.5, 12.5)
    low_only: bool = False
    fine_only: bool = False
    voxel: Positive = 1.0
    noise_std: Range = (5.0, 15.0)
    border: Border = "repeat"

    def __post_init__(self) -> None:
        if self.photo_spacing[0] < LEAST_PHOTO_SPACING:
            found = self.photo_spacing
            raise ValueError(f"photo_spacing: expected a range from {LEAST_PHOTO_SPACING} mm on, found {found}")
        if self.low_only and self.fine_only:
            raise ValueError("fine_only: expected one of low_only and fine_only at most, found both")


class Acquisition(NamedTuple):
    """Spacing of the samples and thickness of what each averages, along each axis, in voxels of the output grid."""

    resolution: Float[Array, " axis"]
    thickness: Float[Array, " axis"]


class LowResolution(NamedTuple):
    """A low-resolution image in a buffer.

    Attributes:
        image: Samples, zero beyond `size`.
        size: Samples along each axis.
    """

    image: Float[Array, "*space"]
    size: Float[Array, " axis"]


def draw_photo(key: Key[Array, ""], config: ResolutionConfig) -> Photo:
    """Draw whether an image is a stack of slab photographs, and the slabs' spacing; never where `low_only`."""
    on_key, spacing_key = jax.random.split(key)
    probability = 0.0 if config.low_only else config.photo_probability
    low, high = (length / config.voxel for length in config.photo_spacing)
    return Photo(jax.random.bernoulli(on_key, probability), jax.random.uniform(spacing_key, minval=low, maxval=high))


def draw_acquisition(
    key: Key[Array, ""], ndim: int, config: ResolutionConfig = ResolutionConfig(), photo: Photo | None = None
) -> Acquisition:
    """Draw spacing and thickness: a quarter each of 1 mm, one thick axis, clinical 5 mm slices, and thick everywhere.

    Args:
        key: Consumed.
        ndim: Spatial axes; in 2D the first axis of each recipe is left out.
        config: Whether the first two recipes are left out, or all but the first.
        photo: In photo mode slabs along axis 1 of thickness 0.1 mm, whatever was drawn.
    """
    class_key, axis_key, thick_key, thin_key, stack_key, iso_key = jax.random.split(key, 6)
    low, high = 0.5 if config.low_only else 0.0, 0.25 if config.fine_only else 1.0
    recipe = jax.random.uniform(class_key, minval=low, maxval=high)
    ones = jnp.ones(ndim)
    thick = 2.5 + 6 * jax.random.uniform(thick_key)
    slab = jnp.minimum(thick, 4 + 2 * jax.random.uniform(thin_key))
    is_thick = jnp.arange(ndim) == jax.random.randint(axis_key, (), 0, ndim)
    # The slice axis of a clinical stack is the last one, in 2D too.
    stack = jnp.array([1.3, 1.3, 4.8][-ndim:]) + 0.4 * jax.random.uniform(stack_key, (ndim,))
    everywhere = 2 + 3 * jax.random.uniform(iso_key, (ndim,))
    cases = [recipe < 0.25, recipe < 0.5, recipe < 0.75]
    resolution = jnp.select(cases, [ones, jnp.where(is_thick, thick, 1.0), stack], everywhere)
    thickness = jnp.select(cases, [ones, jnp.where(is_thick, slab, 1.0), stack], everywhere)
    resolution, thickness = jnp.maximum(resolution / config.voxel, 1.0), thickness / config.voxel
    if photo is not None:
        is_slab = jnp.arange(ndim) == PHOTO_AXIS
        resolution = jnp.where(photo.is_on, jnp.where(is_slab, photo.spacing, 1.0), resolution)
        thickness = jnp.where(photo.is_on, jnp.where(is_slab, 0.1, 1.0), thickness)
    return Acquisition(resolution, thickness)


def lower_resolution(
    key: Key[Array, ""],
    image: Float[Array, "*space"],
    acquisition: Acquisition,
    config: ResolutionConfig = ResolutionConfig(),
    *,
    max_thickness: float = 8.5,
    noise_std: Float[Array, ""] | None = None,
) -> LowResolution:
    """Blur by the slice profile, sample, add noise, cut off negative values.

    Args:
        key: Consumed; draws the width of the blur, the noise's standard deviation and the noise.
        image: On the output grid, negative values gone.
        acquisition: From `draw_acquisition`; a resolution below one voxel counts as one.
        config: Noise and border.
        max_thickness: Largest thickness there can be, in voxels; bounds the length of the blur.
        noise_std: Standard deviation of the noise; None draws it from the configuration's range.
    """
    width_key, std_key, noise_key = jax.random.split(key, 3)
    width = 0.85 + 0.3 * jax.random.uniform(width_key)
    sigma = jnp.where(acquisition.thickness > 1, width * SIGMA_PER_THICKNESS * acquisition.thickness, 0.0)
    radius = math.ceil(3 * 1.15 * SIGMA_PER_THICKNESS * max_thickness)
    sizes, matrices, mask = [], [], jnp.ones((), bool)
    for axis, full in enumerate(image.shape):
        # A hair more than the quotient, so that 160 / 1.0 is not 159 after rounding.
        size = jnp.clip(jnp.floor(full / acquisition.resolution[axis] + 1e-4), 1, full)
        matrices.append(_sampling_matrix(full, sigma[axis], radius, size, config.border))
        is_filled = jnp.arange(full) < size
        mask = mask & is_filled.reshape([-1 if a == axis else 1 for a in range(image.ndim)])
        sizes.append(size)
    if noise_std is None:
        noise_std = jax.random.uniform(std_key, (), minval=config.noise_std[0], maxval=config.noise_std[1])
    image = along_all(matrices, image)
    noisy = jnp.maximum(image + noise_std * jax.random.normal(noise_key, image.shape), 0.0)
    return LowResolution(jnp.where(mask, noisy, 0.0), jnp.stack(sizes))


def restore_grid(low: LowResolution) -> Float[Array, "*space"]:
    """Zoom a low-resolution image back to the output grid, linearly; not yet divided by its maximum."""
    matrices = []
    for axis, full in enumerate(low.image.shape):
        positions = zoom_positions(full, full / low.size[axis])
        matrices.append(linear_matrix(positions, low.size[axis], full))
    return along_all(matrices, low.image)


def _sampling_matrix(full: int, sigma: Array, radius: int, size: Array, border: Border) -> Float[Array, "full full"]:
    """Return blur and sampling in one: rows beyond `size` are zero."""
    positions = zoom_positions(full, size / full)
    is_kept = jnp.arange(full) < size
    if border == "released":
        is_kept &= (positions > 0) & (positions <= full - 1)
    sampling = jnp.where(is_kept[:, None], linear_matrix(positions, full, full), 0.0)
    blur = blur_matrix(full, sigma, min(radius, full - 1), "zero", cutoff=3.0)
    return jnp.dot(sampling, blur, precision=jax.lax.Precision.HIGHEST)
