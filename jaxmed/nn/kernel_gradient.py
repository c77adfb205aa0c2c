"""The gradient of a convolution by its kernel on a CPU, where an entry is the sum over o of x[o + tap - before] y[o].

XLA's own weight gradient is a convolution with a window as large as the image; inside a `scan` it runs at a thirtieth
of its speed outside. Two roads are faster.

Where oneDNN's call is there, each plane is a convolution forwards: along a row, voxels become channels, and channels
become a second axis of space, so that a window of whole columns sums over the plane and what comes out are taps
(`_by_planes`). Taps along the row are three images with the row shifted, taps across planes are further features.

Else a slab of a few rows or planes is cut out of both arrays, its shifts are laid side by side as columns, and one
product sums them for all taps and channels. Along the first axis of a volume y is shifted instead of x, so that a
third of the columns serve three products each.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxmed.nn import onednn
from jaxmed.nn.convolution_cpu import FEW_CHANNELS, Geometry, pad, shifts

ROW = 8  # a row of so many voxels, or a multiple, fills oneDNN's vectors
MANY = 32  # channels and features from which a call per plane is faster than columns
COLUMNS = 2**17  # numbers in the columns of a slab: half a megabyte, which a core's cache holds


def by_kernel(x: jax.Array, y: jax.Array, geometry: Geometry) -> jax.Array:
    """Return the gradient by the kernel; at stride s the voxels at each place between two windows have their taps."""
    parts = [jnp.zeros((*geometry.window, x.shape[-1] // geometry.groups, y.shape[-1]), _wide(x))]
    for place in itertools.product(*map(range, geometry.strides)):
        axes = [*zip(place, geometry.window, geometry.strides, geometry.edges, strict=True)]
        # Tap t of result o meets voxel stride * o + t - before, which is stride * (o + start) + at.
        first = [(at + before) % stride for at, _, stride, (before, _) in axes]
        starts = [(tap - before) // stride for tap, (_, _, stride, (before, _)) in zip(first, axes, strict=True)]
        window = [len(range(tap, edge, stride)) for tap, (_, edge, stride, _) in zip(first, axes, strict=True)]
        voxels = x[(slice(None), *(slice(at, None, stride) for at, _, stride, _ in axes))]
        if all(window) and voxels.size:
            part = correlate(voxels, y, window, starts, geometry.groups)
            between = [(tap, edge - tap - stride * (count - 1) - 1, stride - 1)
                       for tap, count, (_, edge, stride, _) in zip(first, window, axes, strict=True)]  # fmt: skip
            parts.append(jax.lax.pad(part, jnp.zeros((), part.dtype), [*between, (0, 0, 0), (0, 0, 0)]))
    return sum(parts[1:], parts[0]).astype(x.dtype)


def correlate(x: jax.Array, y: jax.Array, window: Sequence[int], starts: Sequence[int], groups: int) -> jax.Array:
    """Return the sum over o of x[o + start + tap] y[o] for all taps, channels of x and channels of y."""
    channels, features = x.shape[-1], y.shape[-1]
    if groups == 1 and features < channels:
        # Shifting the array of fewer channels moves less memory: x and y change places, and taps count backwards.
        starts = [1 - edge - start for edge, start in zip(window, starts, strict=True)]
        return jnp.flip(correlate(y, x, window, starts, 1), range(len(window))).swapaxes(-1, -2)
    if len(window) == 2:  # images are planes that no window joins
        return correlate(x[None], y[None], (1, *window), (0, *starts), groups)[0]
    # x gets all voxels that a tap meets, and no others.
    axes = zip(x.shape[1:-1], y.shape[1:-1], window, starts, strict=True)
    around = [(-start, length + edge - 1 + start - voxels) for voxels, length, edge, start in axes]
    if groups == channels == features:
        return _by_channel(pad(x, around), y, window)
    if channels <= FEW_CHANNELS and groups == 1:
        return _sum_slabs(pad(x, around), y, window, 1, 1)[0, 0].reshape(*window, channels, features)
    # Voxel d along the first axis meets y at d - start - tap.
    ahead = window[0] - 1 + starts[0]
    shifted = pad(y, [(ahead, x.shape[1] + window[0] - 1 - y.shape[1] - ahead)])
    is_whole = y.shape[3] % ROW == 0 and min(window[1:]) >= 3 and min(channels, features) >= MANY and groups == 1
    if is_whole and x.dtype == jnp.float32 and "float32" in onednn.find_road().dtypes:
        return _by_planes(pad(x, [(0, 0), *around[1:]]), shifted, window)
    total = _sum_slabs(pad(x, [(0, 0), *around[1:]]), shifted, (1, *window[1:]), window[0], groups)
    total = total.reshape(window[0], groups, *window[1:], channels // groups, features // groups)
    return jnp.moveaxis(total, 1, -2).reshape(*window, channels // groups, features)


def _by_planes(x: jax.Array, y: jax.Array, window: Sequence[int]) -> jax.Array:
    """`correlate` of padded arrays, by a call of oneDNN for each plane of x: [outer, tap, tap, channel, feature]."""
    outer, _, across = window
    height, width, planes, channels = y.shape[2], y.shape[3], x.shape[1], x.shape[-1]
    turned = x.swapaxes(-1, -2)  # rows last: they are the call's channels

    def plane(number: jax.Array | int) -> jax.Array:
        image, place = number // planes, number % planes
        near = jax.lax.dynamic_slice(turned, (image, place, 0, 0, 0), (1, 1, *turned.shape[2:]))[0, 0]
        shifted = jnp.stack([near[..., tap : tap + width] for tap in range(across)])
        met = jax.lax.dynamic_slice(y, (image, place, 0, 0, 0), (1, outer, *y.shape[2:]))[0]
        kernel = jnp.concatenate([met[tap] for tap in reversed(range(outer))], axis=-1)
        return onednn.convolve(shifted, kernel.reshape(height, 1, width, -1), (1, 1), ((0, 0), (0, 0)))

    count = x.shape[0] * planes
    found = plane(0)
    if count > 1:
        found = jax.lax.scan(lambda total, number: (total + plane(number), None), found, jnp.arange(1, count))[0]
    return found.reshape(across, -1, channels, outer, y.shape[-1]).transpose(3, 1, 0, 2, 4)


def _sum_slabs(x: jax.Array, y: jax.Array, inner: Sequence[int], outer: int, groups: int) -> jax.Array:
    """Return [outer, group, inner taps and channels, feature]: x shifted by `inner` times y shifted back by `outer`."""
    channels, features = x.shape[-1] // groups, y.shape[-1] // groups
    batch, planes, height, width = y.shape[0], y.shape[1] - outer + 1, *y.shape[2:4]
    # As many whole rows, planes and images as there is room for.
    rows = COLUMNS // (width * math.prod(inner) * x.shape[-1])
    high = _divisor(height, rows)
    deep = _divisor(planes, rows // height) if high == height else 1
    many = _divisor(batch, rows // (height * planes)) if deep == planes else 1
    grid = (batch // many, planes // deep, height // high)

    def slab(number: jax.Array | int) -> jax.Array:
        at = (number // (grid[1] * grid[2]) * many, number // grid[2] % grid[1] * deep, number % grid[2] * high, 0, 0)
        size = [many, deep, high, width]
        reach = [length + edge - 1 for length, edge in zip(size, (1, *inner), strict=True)]
        near = jax.lax.dynamic_slice(x, at, (*reach, x.shape[-1]))
        met = jax.lax.dynamic_slice(y, at, (many, deep + outer - 1, high, width, y.shape[-1]))
        columns = shifts(near, Geometry(near.shape[1:-1], tuple(inner), (1, 1, 1), ((0, 0),) * 3))
        others = [met[:, tap : tap + deep].reshape(-1, groups, features) for tap in reversed(range(outer))]
        if (
            groups == 1 and channels <= FEW_CHANNELS
        ):  # whole shifted images after one another: channels are too few to copy in runs
            columns = jnp.stack([image[..., channel].reshape(-1) for image in columns for channel in range(channels)])
            return jnp.dot(columns, others[0][:, 0], preferred_element_type=_wide(x))[None, None]
        columns = jnp.concatenate(columns, axis=-1)
        if groups == 1:
            # y first: twice as fast as the other order.
            columns, sides = columns.reshape(-1, columns.shape[-1]), (((0,), (0,)), ((), ()))
            found = [
                jax.lax.dot_general(other[:, 0], columns, sides, preferred_element_type=_wide(x)) for other in others
            ]
            return jnp.stack(found).swapaxes(-1, -2)[:, None]
        columns = columns.reshape(-1, math.prod(inner), groups, channels)
        found = [jnp.einsum("ntgc,ngf->gtcf", columns, other, preferred_element_type=_wide(x)) for other in others]
        return jnp.stack(found).reshape(outer, groups, -1, features)

    if math.prod(grid) == 1:
        return slab(0)
    empty = jnp.zeros(jax.eval_shape(slab, 0).shape, _wide(x))
    return jax.lax.scan(lambda total, number: (total + slab(number), None), empty, jnp.arange(math.prod(grid)))[0]


def _by_channel(x: jax.Array, y: jax.Array, window: Sequence[int]) -> jax.Array:
    """`correlate` of each channel with itself: elementwise products, bound by reading both arrays for every tap."""
    inner = Geometry((y.shape[1], *x.shape[2:-1]), (1, *window[1:]), (1, 1, 1), ((0, 0),) * 3)

    def tap(number: jax.Array) -> jax.Array:
        slab = jax.lax.dynamic_slice_in_dim(x, number, y.shape[1], axis=1)
        return jnp.stack([jnp.sum(image * y, axis=(0, 1, 2, 3), dtype=_wide(x)) for image in shifts(slab, inner)])

    return jax.lax.map(tap, jnp.arange(window[0])).reshape(*window, 1, -1)


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _divisor(count: int, most: int) -> int:
    return max(number for number in range(1, max(1, min(count, most)) + 1) if count % number == 0)
