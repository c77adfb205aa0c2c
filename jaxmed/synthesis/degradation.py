"""Scans and pictures made worse in one known way, by a strength from 0 (as it is) to 1 (hardly of use).

Pure functions of a key on one image in two or three dimensions, traceable in the strength, so that a training step can
draw it. What a strength means is told in shares of the signal, the 98th percentile, and of the field of view, so that
it is the same for every modality and size.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.filters import finite_difference, gaussian_blur, zoom
from jaxmed.arrays.grid import thick_axis
from jaxmed.arrays.types import KeyArray
from jaxmed.arrays.warping import warp
from jaxmed.physics.acquisition import add_rician_noise
from jaxmed.synthesis.artifacts import ghost

Kind: TypeAlias = Literal["noise", "ghosting", "blur", "distortion", "field", "low-quality"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PICTURE_KINDS: tuple[Kind, ...] = ("noise", "blur")
"""What a camera can show; the others come from k-space or from the magnet."""
NOISE = 0.15
"""Standard deviation of the noise at strength 1, as a share of the signal."""
GHOST = 0.6
"""Share that every second line of k-space loses at strength 1."""
BLUR, LEAST_BLUR = 1 / 128, 1.5
"""Standard deviation of the blur at strength 1: a share of the field of view, and at least so many voxels."""
SHIFT = 0.04
"""Root mean square of the displacement at strength 1, as a share of the field of view; at most about 2.5 times that."""
CONTROL, CONTROL_PLANES = 4, 2
"""Control points of a distortion along each axis of a plane, and from plane to plane."""


def degrade(
    key: KeyArray,
    image: Float[Array, "*space"],
    kind: Kind,
    strength: Float[Array, ""] | float,
    spacing: Sequence[float] = (),
    *,
    is_magnitude: bool = True,
) -> Float[Array, "*space"]:
    """Return an image with one fault.

    Args:
        key: Consumed; draws noise, the lines that ghosts come from, and the field of a distortion.
        image: Not negative.
        kind: "noise": Rician of a magnitude image, Gaussian of a picture. "ghosting": every second line of k-space
            loses a part, which varies from line to line. "blur": Gaussian in the planes. "distortion": shifts along the
            phase encoding, with the pile-up of signal that they bring. "field": what a weaker magnet gives: less
            contrast, coarser voxels, more noise. "low-quality": distortion, blur, ghosting and noise at half the
            strength each, as far as the image can show them.
        strength: From 0 to 1.
        spacing: Voxel size in mm along each axis; by default ones. The thickest axis runs from plane to plane; phase
            is encoded along the second of the others.
        is_magnitude: Whether the image is the magnitude of a complex one; a picture's values are clipped to [0, 1].
    """
    strength = jnp.asarray(strength, jnp.float32)
    axes = plane_axes(image.ndim, spacing)
    signal = jnp.percentile(image, 98)
    phase = axes[1]
    if kind == "noise":
        return _add_noise(key, image, NOISE * strength * signal, is_magnitude)
    if kind == "ghosting":
        lost = jnp.clip(GHOST * strength * jax.random.uniform(key, (image.shape[phase],), minval=0.8, maxval=1.2), 0, 1)
        return ghost(image, phase, 2, lost)
    if kind == "blur":
        return _blur(image, strength, axes)
    if kind == "distortion":
        return _distort(key, image, strength, axes)
    if kind == "field":
        middle = jnp.median(image)
        flat = image + 0.5 * strength * (middle - image) * (image > 0.1 * signal)
        return _add_noise(key, _blur(flat, 0.5 * strength, axes), 0.7 * NOISE * strength * signal, is_magnitude)
    for part, name in zip(jax.random.split(key, 4), ("distortion", "blur", "ghosting", "noise"), strict=True):
        if not is_magnitude and name not in PICTURE_KINDS:
            continue
        image = degrade(part, image, name, 0.5 * strength, spacing, is_magnitude=is_magnitude)
    return image


def plane_axes(ndim: int, spacing: Sequence[float]) -> tuple[int, int]:
    """Return the two axes of a plane: all but the thickest."""
    thick = thick_axis(tuple(spacing) or (1.0,) * ndim) if ndim == 3 else None
    first, second = (axis for axis in range(ndim) if axis != thick)
    return first, second


def _add_noise(key: KeyArray, image: Array, sigma: Array, is_magnitude: bool) -> Array:
    if is_magnitude:
        return add_rician_noise(key, image, sigma)
    return jnp.clip(image + sigma * jax.random.normal(key, image.shape), 0.0, 1.0)


def _blur(image: Array, strength: Array, axes: tuple[int, int]) -> Array:
    most = max(LEAST_BLUR, BLUR * max(image.shape[axis] for axis in axes))
    return gaussian_blur(image, strength * most, int(3 * most) + 1, axes=axes)


def _distort(key: KeyArray, image: Array, strength: Array, axes: tuple[int, int]) -> Array:
    """Shift along the second axis of a plane by a smooth field, and pile the signal up where the field squeezes it."""
    axis = axes[1]
    control = tuple(CONTROL if along in axes else CONTROL_PLANES for along in range(image.ndim))
    field = zoom(jax.random.normal(key, control), image.shape)
    field = field * (strength * SHIFT * image.shape[axis] * jax.lax.rsqrt(jnp.maximum((field**2).mean(), 1e-12)))
    shift = jnp.zeros((*image.shape, image.ndim)).at[..., axis].set(field)
    density = jnp.maximum(1 + finite_difference(field, axis, "central"), 0.0)
    return warp(image[..., None], shift)[..., 0] * density
