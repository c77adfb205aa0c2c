"""The roads of a convolution and of its gradient by the input on a CPU.

oneDNN's call (`onednn.py`) serves nearly everything where this process has it. Otherwise volumes become batches of
planes, because XLA runs a 3D convolution at a tenth of what its 2D convolutions reach. Two roads are faster than either
at some shapes: one product where there are few voxels, and Winograd's F(2, 3) along the first axis, which saves two of
six 2D convolutions.

The gradient by the input is convolutions forwards, with the kernel turned round; at stride s one for each of the s
places that a voxel can have between two windows, so that nothing is multiplied with zeros. The gradient by the kernel
is in `kernel_gradient.py`.

CPU milliseconds on one core (Zen 4, float32, batch 1, PyTorch in its faster memory format):

| shape | pass | PyTorch | XLA | planes | oneDNN | here |
|---|---|---|---|---|---|---|
| 16 channels, 64^3 | forward, by input | 42 | 378 | 68 | 33 | oneDNN |
| 32 channels, 32^3 | forward, by input | 16 | 98 | 15 | 16 | oneDNN |
| 64 channels, 32^3 | forward, by input | 62 | 235 | 55 | 62 | Winograd |
| 256 channels, 8^3 | forward, by input | 23 | 27 | 14 | 14 | oneDNN |
| 1 to 16 channels, 64^3 | forward | 12 | 139 | 55 | 4 | oneDNN |
| stride 2, 32 to 64 channels, 32^3 | forward | 4.8 | 15 | 6 | 4.6 | oneDNN |
| | by input | 5.1 | 823 | 22 | 5.3 | oneDNN |
| 64 channels, 64^2, batch 4 | forward, by input | 11 | 12 | | 11 | oneDNN |
| depthwise 7^3, 96 channels, 16x24x24 | forward | 7.8 | 5250 | | 7.7 | oneDNN |
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmed.nn import onednn

FEW_CHANNELS = 4  # up to here channels join the window in one product, whose columns are whole images
NARROW = 16  # up to here the output channels of three planes fit one 2D convolution of XLA's
TILE = 4  # planes at a time of a narrow convolution
SMALL = 8  # voxels of an image up to which a convolution is one product
WINOGRAD_CHANNELS = (48, 192)  # between them Winograd's form is faster than oneDNN
LARGE = 2**31  # numbers from which oneDNN's call has not been tried


class Geometry(NamedTuple):
    """A convolution, but for its batch and channels.

    Attributes:
        space: Voxels of the input along each axis.
        window: Edges of the window.
        strides: Voxels between windows.
        edges: Zeros before and after each axis; negative where voxels are left out.
        groups: Groups of channels.
    """

    space: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    groups: int = 1

    @property
    def lengths(self) -> tuple[int, ...]:
        """Voxels of the result along each axis."""
        axes = zip(self.space, self.window, self.strides, self.edges, strict=True)
        return tuple((voxels + sum(edges) - edge) // stride + 1 for voxels, edge, stride, edges in axes)

    @property
    def is_tiled(self) -> bool:
        """Whether windows tile the image, edge to edge."""
        return self.window == self.strides and self.groups == 1 and not any(map(any, self.edges))


# --- Forwards ---------------------------------------------------------------------------------


def forward(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolve x [batch, *space, channel] with kernel [*window, group_channel, feature]."""
    cut = [(min(before, 0), min(after, 0)) for before, after in geometry.edges]
    if not x.size or any(length + sum(pair) <= 0 for length, pair in zip(geometry.space, cut, strict=True)):
        return jnp.zeros((x.shape[0], *geometry.lengths, kernel.shape[-1]), x.dtype)
    if any(map(any, cut)):
        x = pad(x, cut)
        edges = tuple((max(before, 0), max(after, 0)) for before, after in geometry.edges)
        geometry = geometry._replace(space=x.shape[1:-1], edges=edges)
    return choose_forward(x.shape, kernel.shape, geometry, x.dtype)(x, kernel, geometry)


def choose_forward(
    x: Sequence[int], kernel: Sequence[int], geometry: Geometry, dtype: jnp.dtype
) -> Callable[[jax.Array, jax.Array, Geometry], jax.Array]:
    """Return the road of a convolution of these shapes."""
    channels, features = kernel[-2:]
    is_usual = geometry.window == (3, 3, 3) and geometry.strides == (1, 1, 1) and geometry.groups == 1
    # Winograd's sums of inputs and of taps would lose half precision.
    has_winograd = is_usual and geometry.lengths[0] % 2 == 0 and dtype != jnp.bfloat16
    if geometry.is_tiled:
        return tiled
    if math.prod(geometry.lengths) <= SMALL and geometry.groups == 1:
        return product
    largest = max(math.prod(x), math.prod((x[0], *geometry.lengths, features)))
    if dtype.name in onednn.find_road().dtypes and 0 < largest < LARGE:
        least, most = WINOGRAD_CHANNELS
        is_between = least <= min(channels, features) and max(channels, features) <= most
        return winograd if has_winograd and is_between else call_onednn
    if geometry.groups > 1:
        return by_taps
    if len(geometry.window) != 3:
        return direct
    if is_usual and channels <= FEW_CHANNELS:
        return few_channels
    if is_usual and features <= NARROW and geometry.lengths[0] % TILE == 0:
        return narrow
    return winograd if has_winograd else planes


def call_onednn(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """OneDNN's call."""
    return onednn.convolve(x, kernel, geometry.strides, geometry.edges, geometry.groups)


def direct(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """XLA's own convolution."""
    axes = "XYZ"[: len(geometry.window)]
    order = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return jax.lax.conv_general_dilated(
        x, kernel, geometry.strides, geometry.edges, dimension_numbers=order, feature_group_count=geometry.groups
    )


def tiled(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Windows that tile the image: one product of voxels of a tile and features."""
    *window, channels, features = kernel.shape
    if max(window) > 1:
        counts, space = geometry.lengths, len(window)
        x = x[(slice(None), *(slice(0, count * edge) for count, edge in zip(counts, window, strict=True)))]
        x = x.reshape(x.shape[0], *itertools.chain(*zip(counts, window, strict=True)), channels)
        axes = (0, *range(1, 2 * space, 2), *range(2, 2 * space + 1, 2), 2 * space + 1)
        x = x.transpose(axes).reshape(x.shape[0], *counts, math.prod(window) * channels)
    return jnp.dot(x.reshape(-1, x.shape[-1]), kernel.reshape(-1, features)).reshape(*x.shape[:-1], features)


def product(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """The shifted images side by side, one product: XLA runs planes smaller than the window at a fiftieth of this."""
    shifted = jnp.concatenate(shifts(pad(x, geometry.edges), geometry), axis=-1)
    return jnp.dot(shifted, kernel.reshape(-1, kernel.shape[-1]))


def few_channels(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """The shifted volumes on a leading axis, one product."""
    shifted = shifts(pad(x, geometry.edges), geometry)
    columns = jnp.stack([image[..., channel].reshape(-1) for image in shifted for channel in range(x.shape[-1])])
    rows = kernel.reshape(-1, kernel.shape[-1])
    found = jax.lax.dot_general(columns, rows, (((0,), (0,)), ((), ())))
    return found.reshape(x.shape[0], *geometry.lengths, kernel.shape[-1])


def planes(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """A 2D convolution of every plane for each tap along the first axis, summed."""
    (stride, *_), (count, *_) = geometry.strides, geometry.lengths
    padded = pad(x, geometry.edges[:1])
    last = stride * (count - 1) + 1
    taps = (padded[:, tap : tap + last : stride] for tap in range(geometry.window[0]))
    first, *others = (by_plane(plane, kernel[tap], geometry) for tap, plane in enumerate(taps))
    return sum(others, first)


def winograd(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """F(2, 3) along the first axis, whose result is of even length: four 2D convolutions give two planes.

    Source: Lavin and Gray, arXiv:1509.09308, equation 5.
    """
    padded = pad(x, geometry.edges[:1])
    even, odd = padded[:, 0::2], padded[:, 1::2]
    a, b, c, d = even[:, :-1], odd[:, :-1], even[:, 1:], odd[:, 1:]
    outer, middle = kernel[0] + kernel[2], kernel[1]
    m0, m3 = by_plane(a - c, kernel[0], geometry), by_plane(b - d, kernel[2], geometry)
    m1, m2 = by_plane(b + c, (outer + middle) / 2, geometry), by_plane(c - b, (outer - middle) / 2, geometry)
    pairs = jnp.stack([m0 + m1 + m2, m1 - m2 - m3], axis=2)
    return pairs.reshape(x.shape[0], *geometry.lengths, kernel.shape[-1])


def narrow(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """The three taps along the first axis side by side on the output channels, `TILE` planes at a time."""
    features, padded = kernel.shape[-1], pad(x, geometry.edges[:1])
    wide = jnp.concatenate([kernel[0], kernel[1], kernel[2]], axis=-1)

    def tile(number: jax.Array) -> jax.Array:
        slab = jax.lax.dynamic_slice_in_dim(padded, number * TILE, TILE + 2, axis=1)
        first, second, third = jnp.split(by_plane(slab, wide, geometry), (features, 2 * features), axis=-1)
        return first[:, :TILE] + second[:, 1:-1] + third[:, 2:]

    tiles = jnp.moveaxis(jax.lax.map(tile, jnp.arange(geometry.lengths[0] // TILE)), 0, 1)
    return tiles.reshape(x.shape[0], *geometry.lengths, features)


def by_taps(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Groups: shifted images times taps, summed; a loop over taps of the first axis, within which the rest fuses."""
    *window, channels, features = kernel.shape
    groups = geometry.groups
    padded = pad(x, geometry.edges)
    count, stride = geometry.lengths[0], geometry.strides[0]
    inner = geometry._replace(window=(1, *window[1:]))

    def add(total: jax.Array, tap: jax.Array) -> tuple[jax.Array, None]:
        slab = jax.lax.dynamic_slice_in_dim(padded, tap, stride * (count - 1) + 1, axis=1)
        taps = jax.lax.dynamic_index_in_dim(kernel, tap, keepdims=False).reshape(
            -1, channels, groups, features // groups
        )
        for shifted, weights in zip(shifts(slab, inner), taps, strict=True):
            grouped = shifted.reshape(*shifted.shape[:-1], groups, channels)
            if channels == 1:
                part = grouped * weights[0]
            else:
                part = jnp.einsum("...gc,cgf->...gf", grouped, weights)
            total = total + part.reshape(total.shape)
        return total, None

    total = jnp.zeros((x.shape[0], *geometry.lengths, features), x.dtype)
    return jax.lax.scan(add, total, jnp.arange(window[0]))[0]


def by_plane(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolve every plane of a volume with a kernel of two axes."""
    flat = Geometry(x.shape[2:-1], kernel.shape[:-2], geometry.strides[1:], geometry.edges[1:])
    y = forward(x.reshape(-1, *x.shape[2:]), kernel, flat)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def pad(x: jax.Array, edges: Sequence[tuple[int, int]]) -> jax.Array:
    """Put zeros before and after the first axes of space; negative numbers cut voxels off."""
    whole = [(0, 0, 0)] * (x.ndim - 1 - len(edges))
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*pair, 0) for pair in edges), *whole])


def shifts(padded: jax.Array, geometry: Geometry) -> list[jax.Array]:
    """Return what each tap of the window meets, in the order of a kernel's taps."""
    spans = [stride * (count - 1) + 1 for stride, count in zip(geometry.strides, geometry.lengths, strict=True)]
    found = []
    for taps in itertools.product(*map(range, geometry.window)):
        cut = (slice(tap, tap + span, stride) for tap, span, stride in zip(taps, spans, geometry.strides, strict=True))
        found.append(padded[(slice(None), *cut)])
    return found


# --- By the input -----------------------------------------------------------------------------


def by_input(kernel: jax.Array, y: jax.Array, geometry: Geometry) -> jax.Array:
    """Return the gradient by x: for each place between two windows a convolution of y with the taps that meet it."""
    turned = turn(kernel, geometry.groups)
    counts = tuple(-(-length // stride) for length, stride in zip(geometry.space, geometry.strides, strict=True))
    parts = []
    for place in itertools.product(*map(range, geometry.strides)):
        axes = zip(place, counts, geometry.window, geometry.strides, geometry.edges, geometry.lengths, strict=True)
        met = [_meet(*axis) for axis in axes]
        taps = turned[tuple(taps for taps, _ in met)]
        if taps.size:
            part = geometry._replace(space=geometry.lengths, window=taps.shape[:-2], strides=(1,) * len(place),
                                     edges=tuple(edges for _, edges in met))  # fmt: skip
            parts.append(forward(y, taps, part))
        else:
            parts.append(jnp.zeros((y.shape[0], *counts, turned.shape[-1]), y.dtype))
    if len(parts) == 1:
        return parts[0]
    # The last places may lie beyond the image.
    stacked = jnp.stack(parts, axis=-2).reshape(y.shape[0], *counts, *geometry.strides, -1)
    return interleave(stacked)[(slice(None), *(slice(0, length) for length in geometry.space))]


def _meet(
    at: int, voxels: int, edge: int, stride: int, edges: tuple[int, int], count: int
) -> tuple[slice, tuple[int, int]]:
    """Return the taps of the turned kernel that meet voxels stride * m + at along an axis, and y's edges around them.

    A tap meets result o = m + (at + before - tap) / stride, where that is whole.
    """
    taps = [tap for tap in range(edge) if (at + edges[0] - tap) % stride == 0]
    if not taps:
        return slice(0, 0), (0, 0)
    first, last = ((at + edges[0] - tap) // stride for tap in (taps[-1], taps[0]))
    return slice(edge - 1 - taps[-1], edge - taps[0], stride), (-first, voxels + last - count)


def turn(kernel: jax.Array, groups: int) -> jax.Array:
    """Turn the window round, and exchange channels and features within each group."""
    *window, channels, features = kernel.shape
    turned = jnp.flip(kernel, range(len(window))).reshape(*window, channels, groups, features // groups)
    return turned.swapaxes(-1, -3).reshape(*window, features // groups, groups * channels)


def interleave(parts: jax.Array) -> jax.Array:
    """Put parts [batch, *space, *place, channel] between one another: [batch, *(space * place), channel]."""
    space = (parts.ndim - 2) // 2
    axes = (0, *itertools.chain(*((1 + axis, 1 + space + axis) for axis in range(space))), 1 + 2 * space)
    lengths = [parts.shape[1 + axis] * parts.shape[1 + space + axis] for axis in range(space)]
    return parts.transpose(axes).reshape(parts.shape[0], *lengths, parts.shape[-1])
