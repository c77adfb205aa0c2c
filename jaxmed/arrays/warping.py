"""Images sampled at arbitrary places on the device: displacement fields, their composition and their Jacobians.

Coordinates and displacements are in voxels; the last axis of both holds one number per spatial axis, in the order of
the axes. Images end in a channel axis, and all channels of a corner are fetched by one gather. 2D and 3D alike.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxmed.arrays.filters import finite_difference


def identity_grid(shape: tuple[int, ...]) -> Float[Array, "*space axis"]:
    """Return each voxel's own coordinates."""
    return jnp.stack(jnp.meshgrid(*(jnp.arange(size, dtype=jnp.float32) for size in shape), indexing="ij"), -1)


def sample(
    image: Shaped[Array, "*space channel"],
    coordinates: Float[Array, "*new axis"],
    *,
    order: int = 1,
    fill: float | Float[Array, ""] | Float[Array, " channel"] | None = None,
    includes_first: bool = True,
) -> Shaped[Array, "*new channel"]:
    """Interpolate an image at coordinates.

    Args:
        image: What to sample.
        coordinates: Where; differentiable for order 1.
        order: 1 linear, or 0 nearest (halves go to the even voxel), which keeps the type of labels.
        fill: Value where any coordinate lies outside [0, size - 1]; None repeats the outer voxels.
        includes_first: Whether a coordinate of exactly 0 lies inside. False is the rule of BrainFM's generator, which
            loses the first plane of each axis; it matters with `fill` only.
    """
    ndim = coordinates.shape[-1]
    if image.ndim != ndim + 1:
        raise ValueError(f"image: expected {ndim} spatial axes and one of channels, found shape {image.shape}")
    if order not in (0, 1):
        raise ValueError(f"order: expected 0 or 1, found {order}")
    sizes = image.shape[:-1]
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(ndim)]
    voxels = image.reshape(-1, image.shape[-1])
    places = [jnp.clip(coordinates[..., axis], 0, size - 1) for axis, size in enumerate(sizes)]
    if order == 0:
        index = sum(jnp.round(place).astype(jnp.int32) * stride for place, stride in zip(places, strides, strict=True))
        found = voxels.at[index].get(mode="promise_in_bounds")
    else:
        (found,) = _linear([voxels], places, sizes, strides)
    if fill is None:
        return found
    return jnp.where(is_inside(coordinates, sizes, includes_first)[..., None], found, jnp.asarray(fill, found.dtype))


def sample_stacks(
    stacks: Sequence[Shaped[Array, "*space _"]], coordinates: Float[Array, "*new axis"]
) -> tuple[Float[Array, "*new _"], ...]:
    """Interpolate several images of one grid linearly, the corners of each place found once; outer voxels repeat.

    Every stack keeps its type in memory and becomes floating after its corners are fetched, so that volumes stored in
    one or two bytes are never written out as four.

    Args:
        stacks: Images on one grid, with any number of channels and of any real type.
        coordinates: Where.
    """
    sizes = stacks[0].shape[:-1]
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    places = [jnp.clip(coordinates[..., axis], 0, size - 1) for axis, size in enumerate(sizes)]
    return tuple(_linear([stack.reshape(-1, stack.shape[-1]) for stack in stacks], places, sizes, strides))


def is_inside(
    coordinates: Float[Array, "*new axis"], sizes: tuple[int, ...], includes_first: bool = True
) -> Bool[Array, "*new"]:
    """Tell where every coordinate lies within [0, size - 1], or above 0 where the first voxel does not count."""
    last = jnp.array(sizes) - 1
    above = coordinates >= 0 if includes_first else coordinates > 0
    return (above & (coordinates <= last)).all(-1)


def warp(
    image: Shaped[Array, "*space channel"],
    displacement: Float[Array, "*space axis"],
    *,
    order: int = 1,
    fill: float | None = None,
) -> Shaped[Array, "*space channel"]:
    """Pull an image through a displacement field: the result at x is the image at x + displacement(x).

    Args:
        image: What to warp, on the grid of the field.
        displacement: In voxels.
        order: 1 linear, 0 nearest.
        fill: Value from outside the image; None repeats the outer voxels.
    """
    grid = identity_grid(displacement.shape[:-1])
    return sample(image, grid + displacement, order=order, fill=fill)


def compose(first: Float[Array, "*space axis"], second: Float[Array, "*space axis"]) -> Float[Array, "*space axis"]:
    """Return the displacement of x -> x + first(x), followed by that of `second` at the place reached."""
    return first + warp(second, first)


def compose_with_itself(displacement: Float[Array, "axis *space"]) -> Float[Array, "axis *space"]:
    """Return the displacement of x -> x + d(x) taken twice, where no component is larger than one voxel.

    Equal to `compose` there, and on a CPU twice as fast: every place lies between a voxel and its neighbours, so whole
    arrays are blended and nothing is looked up. Components stand first.

    Args:
        displacement: In voxels, each component of at most 1.
    """
    ndim = displacement.ndim - 1
    padded = jax.lax.optimization_barrier(jnp.pad(displacement, [(0, 0), *[(1, 1)] * ndim], mode="edge"))
    size = jnp.abs(displacement)

    def blend(part: Array, axis: int) -> Array:
        if axis == ndim:
            return part
        length = displacement.shape[axis + 1]
        before, here, after = (
            blend(jax.lax.slice_in_dim(part, start, start + length, axis=axis), axis + 1) for start in range(3)
        )
        return here + size[axis] * (jnp.where(displacement[axis] > 0, after, before) - here)

    return displacement + jnp.stack([blend(padded[axis], 0) for axis in range(ndim)])


def jacobian_determinant(displacement: Float[Array, "*space axis"]) -> Float[Array, "*space"]:
    """Return the local change of volume of x -> x + displacement(x), by central differences."""
    ndim = displacement.shape[-1]
    columns = [finite_difference(displacement, axis, "central") for axis in range(ndim)]
    return jnp.linalg.det(jnp.stack(columns, -1) + jnp.eye(ndim))


def _linear(stacks, places, sizes, strides):
    """Blend the corners of each place's cell, of every stack."""
    lows = [
        jnp.clip(jnp.floor(place), 0, max(size - 2, 0)).astype(jnp.int32)
        for place, size in zip(places, sizes, strict=True)
    ]
    shares = [place - low for place, low in zip(places, lows, strict=True)]
    first = sum(low * stride for low, stride in zip(lows, strides, strict=True))
    totals = [jnp.zeros((), jnp.promote_types(stack.dtype, jnp.float32)) for stack in stacks]
    for corner in itertools.product((0, 1), repeat=len(places)):
        # An axis of one voxel has no second corner, and its share is 0.
        offset = sum(step * stride for step, stride, size in zip(corner, strides, sizes, strict=True) if size > 1)
        weight = jnp.ones(())
        for step, share in zip(corner, shares, strict=True):
            weight = weight * (share if step else 1 - share)
        # Places were clamped: checks of the index would take a third of the time.
        found = [stack.at[first + offset].get(mode="promise_in_bounds") for stack in stacks]
        totals = [total + weight[..., None] * values for total, values in zip(totals, found, strict=True)]
    return totals
