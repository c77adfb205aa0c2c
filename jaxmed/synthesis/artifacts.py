"""Artefacts of a scan that did not go well: ghosts, and a head that moved; in k-space, of volumes of any unit.

Both change what was measured line after line along one axis, the phase encoding: a ghost scales every n-th line, motion
takes the lines of some stretches from the head at another place. The largest line, of no frequency, stays as it is.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.types import KeyArray


def ghost(
    image: Float[Array, "*space"], axis: int = 1, every: int = 2, strength: Array | float = 0.5
) -> Float[Array, "*space"]:
    """Return an image with faint copies along an axis.

    Args:
        image: Magnitudes.
        axis: Of the phase encoding.
        every: Lines of k-space from one that is scaled to the next: as many copies, 1 / every of the field apart.
        strength: Share that such a line loses, one for all or one per line; 0 changes nothing.
    """
    lines = jnp.fft.fft(image, axis=axis)
    number = jnp.arange(image.shape[axis])
    scale = jnp.where((number % every == 0) & (number > 0), 1.0 - strength, 1.0)
    return jnp.abs(jnp.fft.ifft(lines * _along(scale, axis, image.ndim), axis=axis)).astype(image.dtype)


def move(
    key: KeyArray, image: Float[Array, "x y z"], axis: int = 1, times: int = 3, most: float = 3.0
) -> Float[Array, "x y z"]:
    """Return an image during which the head moved.

    Args:
        key: Consumed.
        image: Magnitudes.
        axis: Of the phase encoding, whose lines are measured from the lowest frequency to the highest.
        times: Moves, at random moments; after each the head lies elsewhere. Where it is at the centre of k-space counts
            as its place.
        most: Largest shift along each axis, in voxels.
    """
    when_key, shift_key = jax.random.split(key)
    count = image.shape[axis]
    moments = jnp.sort(jax.random.uniform(when_key, (times,), maxval=count))
    shifts = jax.random.uniform(shift_key, (times + 1, 3), minval=-most, maxval=most)
    # Lines in the order of time: frequency -count / 2 first.
    order = jnp.round(jnp.fft.fftfreq(count) * count) + count // 2
    stretch = jnp.searchsorted(moments, order)
    middle = jnp.searchsorted(moments, jnp.array(count // 2, jnp.float32))
    own = (shifts - shifts[middle])[stretch]
    space = jnp.fft.fftn(image)
    phase = jnp.zeros(image.shape)
    for along in range(3):
        frequency = jnp.fft.fftfreq(image.shape[along])
        phase += _along(frequency, along) * _along(own[:, along], axis)
    return jnp.abs(jnp.fft.ifftn(space * jnp.exp(-2j * jnp.pi * phase))).astype(image.dtype)


def _along(values: Array, axis: int, ndim: int = 3) -> Array:
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)
