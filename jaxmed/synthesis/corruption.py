"""Masks that are wrong in known ways, for a verifier to learn from and to be tested with; pure functions of a key."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmed.arrays.types import KeyArray, Scalar

KINDS = ("shifted", "dilated", "eroded", "hole", "blob", "flipped")


def corrupt(key: KeyArray, mask: Bool[Array, "*space"], strength: Scalar | float = 1.0) -> Bool[Array, "*space"]:
    """Corrupt a mask in one of `KINDS`, drawn at random, and by a random amount.

    Args:
        key: Consumed.
        mask: A mask in 2D or 3D.
        strength: 1 moves borders by up to an eighth of the image and flips up to a tenth of the pixels; 0 does nothing
            visible.
    """
    kind_key, key = jax.random.split(key)
    kind = jax.random.randint(kind_key, (), 0, len(KINDS))
    return jax.lax.switch(kind, [_shift, _dilate, _erode, _hole, _blob, _flip], key, mask, jnp.asarray(strength))


def _shift(key: KeyArray, mask: Array, strength: Scalar) -> Array:
    reach = strength * _reach(mask)
    moves = jnp.round(jax.random.uniform(key, (mask.ndim,), minval=-reach, maxval=reach)).astype(jnp.int32)
    for axis in range(mask.ndim):
        mask = jnp.roll(mask, moves[axis], axis)
    return mask


def _dilate(key: KeyArray, mask: Array, strength: Scalar) -> Array:
    """Grow by up to two voxels."""
    twice = jax.random.uniform(key) < strength / 2
    grown = _grow(mask)
    return jnp.where(strength > 0, jnp.where(twice, _grow(grown), grown), mask)


def _erode(key: KeyArray, mask: Array, strength: Scalar) -> Array:
    return ~_dilate(key, ~mask, strength)


def _hole(key: KeyArray, mask: Array, strength: Scalar) -> Array:
    """Take a ball around a voxel of the mask out of it."""
    return mask & ~_ball(key, mask, strength)


def _blob(key: KeyArray, mask: Array, strength: Scalar) -> Array:
    """Add a ball around a voxel outside the mask."""
    return mask | _ball(key, ~mask, strength)


def _flip(key: KeyArray, mask: Array, strength: Scalar) -> Array:
    share_key, key = jax.random.split(key)
    share = 0.1 * strength * jax.random.uniform(share_key)
    return mask ^ (jax.random.uniform(key, mask.shape) < share)


def _grow(mask: Array) -> Array:
    """Dilate by one voxel along every axis."""
    for axis in range(mask.ndim):
        wide = jnp.pad(mask, [(int(a == axis),) * 2 for a in range(mask.ndim)])
        length = mask.shape[axis]
        parts = [jax.lax.slice_in_dim(wide, start, start + length, axis=axis) for start in range(3)]
        mask = parts[0] | parts[1] | parts[2]
    return mask


def _ball(key: KeyArray, where: Array, strength: Scalar) -> Array:
    """Return a ball around a random voxel of `where`, which may be empty."""
    radius_key, key = jax.random.split(key)
    radius = strength * _reach(where) * jax.random.uniform(radius_key, minval=0.3, maxval=1.0)
    noise = jax.random.uniform(key, where.shape)
    center = jnp.unravel_index(jnp.argmax(jnp.where(where, noise, -1.0)), where.shape)
    square: Float[Array, "*space"] = jnp.zeros(where.shape)
    for axis, place in enumerate(center):
        line = jnp.arange(where.shape[axis]) - place
        square = square + (line**2).reshape([-1 if a == axis else 1 for a in range(where.ndim)])
    return (square <= radius**2) & jnp.any(where)


def _reach(mask: Array) -> float:
    """An eighth of the edge, at least one voxel."""
    return max(1.0, math.prod(mask.shape) ** (1 / mask.ndim) / 8)
