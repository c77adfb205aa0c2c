"""Separable filters on the device: Gaussian blur, Sobel and finite differences, linear resizing.

All axes of an array are spatial unless `axes` says which are. A filter along one axis takes two forms with the same
values: sums of shifted copies, right for short kernels, and a banded matrix, right for long ones and for chains (blur,
then sample: one matrix). Everything is differentiable, in the image and in the width of a Gaussian.

Outside the image a filter sees zeros ("zero"), the image mirrored about its outer samples ("reflect", which needs
more samples than its radius), or the outer samples repeated ("edge").
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Mode = Literal["zero", "reflect", "edge"]
Difference = Literal["forward", "backward", "central"]
Width = float | Float[Array, ""]

# Samples: a narrower Gaussian has all its weight on the centre in float32.
LEAST_SIGMA = 1e-6


def gaussian_weights(sigma: Width, radius: int, cutoff: float | None = None) -> Float[Array, " tap"]:
    """Sample a Gaussian at whole steps from -radius to radius, with a sum of 1.

    Args:
        sigma: Standard deviation, in samples; 0 gives the identity. May be traced.
        radius: Last tap to either side.
        cutoff: Taps beyond ceil(cutoff * sigma) are left out, which a traced sigma may need; None keeps all.
    """
    taps = jnp.arange(-radius, radius + 1)
    weights = jnp.exp(-0.5 * (taps / jnp.maximum(sigma, LEAST_SIGMA)) ** 2)
    if cutoff is not None:
        weights = jnp.where(jnp.abs(taps) <= jnp.ceil(cutoff * sigma), weights, 0.0)
    return weights / weights.sum()


def correlate(
    image: Float[Array, "..."], weights: Float[Array, " tap"], axis: int, mode: Mode = "edge"
) -> Float[Array, "..."]:
    """Weight each sample's neighbours along one axis; the kernel is not flipped.

    Args:
        image: What to filter.
        weights: An odd number of taps, the middle one for the sample itself.
        axis: Along which.
        mode: What lies outside.
    """
    radius, remainder = divmod(weights.shape[0], 2)
    if remainder == 0:
        raise ValueError(f"weights: expected an odd number of taps, found {weights.shape[0]}")
    size = image.shape[axis]
    padded = _pad(image, radius, axis, mode)
    shifted = (jax.lax.slice_in_dim(padded, tap, tap + size, axis=axis) for tap in range(2 * radius + 1))
    return sum((weights[tap] * part for tap, part in enumerate(shifted)), jnp.zeros((), image.dtype))


def gaussian_blur(
    image: Float[Array, "..."],
    sigma: Width | Sequence[Width],
    radius: int,
    *,
    axes: tuple[int, ...] | None = None,
    mode: Mode = "edge",
) -> Float[Array, "..."]:
    """Blur by a Gaussian cut to 2 radius + 1 taps.

    Args:
        image: What to blur.
        sigma: Standard deviation in samples, one for all axes or one per axis; may be traced.
        radius: Last tap to either side.
        axes: Which axes; None for all.
        mode: What lies outside.
    """
    axes = tuple(range(image.ndim)) if axes is None else axes
    sigmas = list(sigma) if isinstance(sigma, Sequence) else [sigma] * len(axes)
    for axis, width in zip(axes, sigmas, strict=True):
        image = correlate(image, gaussian_weights(width, radius).astype(image.dtype), axis, mode)
    return image


def blur_matrix(
    size: int, sigma: Width, radius: int, mode: Mode = "edge", cutoff: float | None = None
) -> Float[Array, "size size"]:
    """Return the matrix of `gaussian_blur` along an axis of `size` samples; rows are results."""
    weights = gaussian_weights(sigma, radius, cutoff)
    # Row i holds the taps around sample i of the padded line; padding is a matrix too, known beforehand.
    tap = np.arange(size + 2 * radius) - np.arange(size)[:, None]
    is_tap = (tap >= 0) & (tap <= 2 * radius)
    taps = jnp.where(is_tap, weights[np.clip(tap, 0, 2 * radius)], 0.0)
    padding = _pad(np.eye(size, dtype=np.float32), radius, 0, mode)
    return jnp.dot(taps, padding, precision=jax.lax.Precision.HIGHEST)


def linear_matrix(
    positions: Float[Array, " new"], size: int | Float[Array, ""], columns: int
) -> Float[Array, "new columns"]:
    """Return the matrix that interpolates linearly at positions, which are clamped to [0, size - 1].

    Args:
        positions: In samples; may be traced.
        size: Samples that there are; traced where a buffer is only partly filled.
        columns: Length of the axis that the matrix meets, at least `size`.
    """
    places = jnp.clip(positions, 0.0, size - 1)
    distance = jnp.abs(places[:, None] - jnp.arange(columns))
    return jnp.maximum(1 - distance, 0.0)


def zoom_positions(count: int, factor: Width) -> Float[Array, " count"]:
    """Return where samples k = 0, 1, ... of an axis stretched by `factor` lie on the old axis, its centre held.

    Source: BrainFM's generator, p_k = (1 - f) / (2 f) + k / f, which is (k + 1/2) / f - 1/2.
    """
    return (jnp.arange(count) + 0.5) / factor - 0.5


def zoom(
    image: Float[Array, "..."], shape: tuple[int, ...], axes: tuple[int, ...] | None = None
) -> Float[Array, "..."]:
    """Resize linearly over the same field of view, without anti-aliasing; outer samples are repeated.

    Args:
        image: What to resize.
        shape: New number of samples along each of the axes.
        axes: Which axes; None for all.
    """
    axes = tuple(range(image.ndim)) if axes is None else axes
    for axis, new in zip(axes, shape, strict=True):
        old = image.shape[axis]
        if new != old:
            # On the host, in double precision: in float32 a position of 200 is off by 1e-5.
            places = jnp.asarray((np.arange(new) + 0.5) * (old / new) - 0.5, jnp.float32)
            matrix = linear_matrix(places, old, old)
            image = along(matrix.astype(image.dtype), image, axis)
    return image


def downsample(image: Float[Array, "..."], factor: int, axes: tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """Average blocks of `factor` samples along each axis; the axes must be whole multiples of it."""
    axes = tuple(range(image.ndim)) if axes is None else axes
    for axis in axes:
        axis %= image.ndim
        size = image.shape[axis]
        if size % factor:
            raise ValueError(f"image: expected a multiple of {factor} samples along axis {axis}, found {size}")
        blocks = (*image.shape[:axis], size // factor, factor, *image.shape[axis + 1 :])
        image = image.reshape(blocks).mean(axis + 1)
    return image


def along(matrix: Float[Array, "new old"], image: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Multiply every line of an image along one axis by a matrix."""
    # Full precision: accelerators would round the factors of an interpolation otherwise.
    moved = jnp.tensordot(matrix, image, (1, axis), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(moved, 0, axis)


def along_all(matrices: Sequence[Float[Array, "_ _"]], image: Float[Array, "..."]) -> Float[Array, "..."]:
    """Multiply every line along the first axis by the first matrix, along the second by the second, and so on.

    The same as `along` for each, and faster: the first axis is multiplied, and comes last, so that axes turn round and
    nothing is transposed in between.
    """
    for matrix in matrices:
        image = jax.lax.dot_general(
            image, matrix.astype(image.dtype), (((0,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
        )
    count = len(matrices)
    return jnp.moveaxis(image, range(image.ndim - count, image.ndim), range(count))


def sobel(
    image: Float[Array, "..."], axes: tuple[int, ...] | None = None, mode: Mode = "zero"
) -> Float[Array, "direction ..."]:
    """Differentiate along each axis, (-1, 0, 1), and smooth along the others, (1, 2, 1), without a factor.

    Args:
        image: A 2D or 3D image.
        axes: Which axes are spatial; None for all.
        mode: What lies outside.

    Returns:
        One image per axis, in their order.
    """
    axes = tuple(range(image.ndim)) if axes is None else axes
    slope, smooth = (jnp.array(taps, image.dtype) for taps in ((-1.0, 0.0, 1.0), (1.0, 2.0, 1.0)))
    directions = []
    for along_axis in axes:
        found = image
        for axis in axes:
            found = correlate(found, slope if axis == along_axis else smooth, axis, mode)
        directions.append(found)
    return jnp.stack(directions)


def sobel_magnitude(
    image: Float[Array, "..."],
    axes: tuple[int, ...] | None = None,
    mode: Mode = "zero",
    epsilon: float = 1e-7,
) -> Float[Array, "..."]:
    """Return the length of `sobel`, sqrt(sum of squares + epsilon), which has a gradient in flat parts too."""
    return jnp.sqrt((sobel(image, axes, mode) ** 2).sum(0) + epsilon)


def finite_difference(image: Float[Array, "..."], axis: int, kind: Difference = "forward") -> Float[Array, "..."]:
    """Differentiate along one axis, per sample.

    "forward" gives x[i + 1] - x[i], 0 at the last sample; "backward" x[i] - x[i - 1], 0 at the first; "central" half
    of x[i + 1] - x[i - 1], and one-sided differences at both ends.
    """
    size = image.shape[axis]
    steps = jnp.diff(image, axis=axis)
    zero = jnp.zeros_like(jax.lax.slice_in_dim(image, 0, 1, axis=axis))
    match kind:
        case "forward":
            return jnp.concatenate([steps, zero], axis)
        case "backward":
            return jnp.concatenate([zero, steps], axis)
        case "central":
            if size < 2:
                return jnp.zeros_like(image)
            first = jax.lax.slice_in_dim(steps, 0, 1, axis=axis)
            last = jax.lax.slice_in_dim(steps, size - 2, size - 1, axis=axis)
            inner = jax.lax.slice_in_dim(steps, 0, size - 2, axis=axis) + jax.lax.slice_in_dim(
                steps, 1, size - 1, axis=axis
            )
            return jnp.concatenate([first, 0.5 * inner, last], axis)


def _pad(
    image: Float[Array, "..."] | Float[np.ndarray, "..."], radius: int, axis: int, mode: Mode
) -> Float[Array, "..."]:
    if mode == "reflect" and radius >= image.shape[axis]:
        raise ValueError(f"image: expected more than {radius} samples along axis {axis}, found {image.shape[axis]}")
    widths = [(0, 0)] * image.ndim
    widths[axis] = (radius, radius)
    return jnp.pad(image, widths, mode="constant" if mode == "zero" else mode)
