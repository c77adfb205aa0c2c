"""Convolutions of images and volumes by the fastest road that a device and a shape have; channels last.

XLA runs a 3D convolution on a CPU at a tenth of what its 2D convolutions reach, so there volumes become batches of
planes: three 2D convolutions whose results are summed, four where Winograd's F(2, 3) along the first axis saves two of
six, one product where there are almost no input channels. Every other device gets the plain 3D convolution; which of
the two is compiled is decided when a program is lowered. All roads give the same numbers to rounding.

Edges are zeros: a window of odd edge k covers k // 2 voxels on both sides of its centre, also at stride 2, where XLA's
own "SAME" would put the spare voxel on one side only. A window that equals its stride tiles the image and needs no
edge; voxels that fill no tile are left out.

Gradients by the input are written by hand where a CPU is concerned: inside a loop, a sampler's say, XLA computes its
own ten to seventy times slower than the same convolution written forwards. So forward-mode derivatives do not pass;
gradients of gradients do.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FEW_CHANNELS = 4  # up to here the input channels of a 3D convolution join the window in one product
NARROW = 16  # up to here the output channels of three planes fit one 2D convolution
SMALL = 8  # pixels up to which a 2D convolution on a CPU is one product
TILE = 4  # planes at a time of a narrow convolution
DEEP = 64  # from here on the weight gradient of a convolution of few channels is a sum of products over planes
DEEP_CHANNELS = 32
SHIFTS = tuple((i, j, k) for i in range(3) for j in range(3) for k in range(3))

Kernel = Float[Array, "*window channel feature"]


class Convolution(nn.Module):
    """y = convolution of x with kernel + bias; as many spatial axes as x has, window and stride alike on each.

    Attributes:
        features: Channels of y.
        size: Edge of the window, in voxels.
        stride: Voxels between windows; with `size` also the rule at the edges (see above).
        unstrided: How many of the first axes of space have windows at every voxel all the same.
        dtype: Type of the products.
        kernel_init: Draws the kernel [*window, channel, feature]; by default uniform with variance 1 / (3 fan-in),
            PyTorch's, from which the published networks were trained. Deviation: biases start at 0.
    """

    features: int
    size: int = 3
    stride: int = 1
    unstrided: int = 0
    dtype: str = "float32"
    kernel_init: Any = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

    @nn.compact
    def __call__(self, x: Float[Array, "batch *space channel"]) -> Float[Array, "batch *space2 feature"]:
        window = (self.size,) * (x.ndim - 2)
        kernel = self.param("kernel", self.kernel_init, (*window, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        convolve = conv3d if x.ndim == 5 else conv2d
        # Of mixed strides there is no fast road: windows at every voxel, of which the rest is dropped.
        y = convolve(x.astype(self.dtype), jnp.asarray(kernel, self.dtype), 1 if self.unstrided else self.stride)
        if self.unstrided:
            kept, thinned = slice(None), slice(None, None, self.stride)
            y = y[(kept, *(kept,) * self.unstrided, *(thinned,) * (x.ndim - 2 - self.unstrided))]
        return y + bias.astype(self.dtype)


def conv2d(
    x: Float[Array, "batch x y channel"], kernel: Float[Array, "i j channel feature"], stride: int = 1
) -> Float[Array, "batch x2 y2 feature"]:
    """Convolve images; edges as the head of this file says.

    XLA's own 2D convolution is as fast as PyTorch's on a CPU; products serve windows that tile the image.
    """
    return _tiled(x, kernel, stride) if _is_tiled(kernel, stride) else _planar(x, kernel, stride)


def conv3d(
    x: Float[Array, "batch x y z channel"], kernel: Float[Array, "i j k channel feature"], stride: int = 1
) -> Float[Array, "batch x2 y2 z2 feature"]:
    """Convolve volumes; edges as the head of this file says."""
    if _is_tiled(kernel, stride):
        return _tiled(x, kernel, stride)
    on_cpu = _choose(x.shape, kernel.shape, stride, x.dtype)
    if on_cpu is _direct or jax.default_backend() != "cpu":
        return _direct(x, kernel, stride)
    # A process on a CPU may still lower for other devices, to plan a run on them.
    return jax.lax.platform_dependent(
        x, kernel, cpu=lambda x, kernel: on_cpu(x, kernel, stride), default=lambda x, kernel: _direct(x, kernel, stride)
    )


def _choose(shape: tuple[int, ...], kernel: tuple[int, ...], stride: int, dtype: Any) -> Callable[..., jax.Array]:
    """Return the road of a 3D convolution on a CPU.

    Times of each, against each other and against PyTorch, were taken per shape; the order at 16, 64 and 128 channels
    differs by factors, not by percents.
    """
    *window, channels, features = kernel
    if any(edge % 2 == 0 for edge in window) or stride > 2:
        return _direct
    if stride == 2:
        return _planes
    if window != [3, 3, 3]:
        return _planes
    if channels <= FEW_CHANNELS:
        return _few_channels
    forward = _forward(shape, features, dtype)
    # Tiles of planes are a loop, in which XLA's weight gradient runs at a fiftieth of its speed.
    if forward is _narrow or (shape[1] >= DEEP and min(channels, features) <= DEEP_CHANNELS):
        return _deep
    return forward


def _forward(shape: tuple[int, ...], features: int, dtype: Any) -> Callable[..., jax.Array]:
    if features <= NARROW and shape[1] % TILE == 0:
        return _narrow
    # Winograd's sums of inputs and of taps would lose half precision.
    return _winograd if shape[1] % 2 == 0 and dtype != jnp.bfloat16 else _planes


def _is_tiled(kernel: Kernel, stride: int) -> bool:
    return all(edge == stride for edge in kernel.shape[:-2])


def _tiled(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Windows that tile the image: one product of voxels of a tile and features."""
    *window, channels, features = kernel.shape
    if stride > 1:
        tiles = [length // stride for length in x.shape[1:-1]]
        x = x[tuple(slice(0, length) for length in (x.shape[0], *(count * stride for count in tiles)))]
        x = x.reshape(x.shape[0], *(part for count in tiles for part in (count, stride)), channels)
        spatial = len(tiles)
        axes = (0, *range(1, 2 * spatial, 2), *range(2, 2 * spatial + 1, 2), 2 * spatial + 1)
        x = x.transpose(axes).reshape(x.shape[0], *tiles, math.prod(window) * channels)
    rows = x.reshape(-1, x.shape[-1])
    return jnp.dot(rows, kernel.reshape(-1, features)).reshape(*x.shape[:-1], features)


def _planar(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A 2D convolution whose gradient by the input is as fast in a loop as outside, on a CPU."""
    if jax.default_backend() != "cpu" or any(edge % 2 == 0 for edge in kernel.shape[:-2]):
        return _direct(x, kernel, stride)
    if math.prod(x.shape[1:3]) <= SMALL:
        return jax.lax.platform_dependent(
            x, kernel, cpu=lambda x, kernel: _product(x, kernel, stride), default=lambda x, k: _direct(x, k, stride)
        )
    return _planar_conv(x, kernel, stride)


def _product(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The shifted images side by side, one product: XLA runs planes smaller than the window at a fiftieth of this."""
    rows, columns, channels, features = kernel.shape
    padded = jnp.pad(x, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
    height, width = x.shape[1:3]
    shifted = [padded[:, i : i + height : stride, j : j + width : stride] for i in range(rows) for j in range(columns)]
    return jnp.dot(jnp.concatenate(shifted, axis=-1), kernel.reshape(rows * columns * channels, features))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _planar_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return _direct(x, kernel, stride)


def _planar_backward(
    stride: int, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    by_x = functools.partial(_by_input, lengths=x.shape[1:3], stride=stride)

    def own(gradient: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: _direct(x, kernel, stride), x)[1](gradient)[0]

    (by_kernel,) = jax.vjp(lambda kernel: _direct(x, kernel, stride), kernel)[1](gradient)
    return jax.lax.platform_dependent(gradient, kernel, cpu=by_x, default=own), by_kernel


_planar_conv.defvjp(lambda x, kernel, stride: (_direct(x, kernel, stride), (x, kernel)), _planar_backward)


def _by_input(gradient: jax.Array, kernel: jax.Array, lengths: tuple[int, ...], stride: int) -> jax.Array:
    """Convolve the gradient, spread out by the stride, with the turned kernel: a convolution forwards."""
    batch, *counts, features = gradient.shape
    if stride > 1:
        spread = jnp.zeros((batch, counts[0], stride, counts[1], stride, features), gradient.dtype)
        spread = spread.at[:, :, 0, :, 0].set(gradient).reshape(batch, *(count * stride for count in counts), features)
        gradient = spread[:, : stride * (counts[0] - 1) + 1, : stride * (counts[1] - 1) + 1]
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    edges = [edge // 2 for edge in kernel.shape[:2]]
    after = [length - given + edge for length, given, edge in zip(lengths, gradient.shape[1:3], edges, strict=True)]
    return jax.lax.conv_general_dilated(
        gradient, turned, (1, 1), list(zip(edges, after, strict=True)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _direct(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    window = kernel.shape[:-2]
    if any(edge % 2 == 0 for edge in window):
        raise ValueError(f"kernel: expected an odd window, or one equal to the stride {stride}, got {window}")
    order = ("NHWC", "HWIO", "NHWC") if len(window) == 2 else ("NXYZC", "XYZIO", "NXYZC")
    edges = [(edge // 2, edge // 2) for edge in window]
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * len(window), edges, dimension_numbers=order)


def _pad_first(x: jax.Array, edge: int = 1) -> jax.Array:
    return jnp.pad(x, ((0, 0), (edge, edge), (0, 0), (0, 0), (0, 0)))


def _conv_planes(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """One 2D convolution of every plane: x [batch, x, y, z, channel], kernel [j, k, channel, feature]."""
    y = _planar(x.reshape(-1, *x.shape[2:]), kernel, stride)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _planes(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A 2D convolution for each tap along x, summed."""
    edge = kernel.shape[0] // 2
    padded = _pad_first(x, edge)
    last = stride * ((x.shape[1] - 1) // stride) + 1
    taps = (padded[:, tap : tap + last : stride] for tap in range(kernel.shape[0]))
    first, *others = (_conv_planes(plane, kernel[tap], stride) for tap, plane in enumerate(taps))
    return sum(others, first)


def _winograd(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """F(2, 3) along x, whose length is even: four 2D convolutions give two planes.

    Source: Lavin and Gray, arXiv:1509.09308, equation 5.
    """
    del stride
    padded = _pad_first(x)
    even, odd = padded[:, 0::2], padded[:, 1::2]
    a, b, c, d = even[:, :-1], odd[:, :-1], even[:, 1:], odd[:, 1:]
    outer, middle = kernel[0] + kernel[2], kernel[1]
    m0, m3 = _conv_planes(a - c, kernel[0]), _conv_planes(b - d, kernel[2])
    m1, m2 = _conv_planes(b + c, (outer + middle) / 2), _conv_planes(c - b, (outer - middle) / 2)
    pairs = jnp.stack([m0 + m1 + m2, m1 - m2 - m3], axis=2)
    return pairs.reshape(*x.shape[:2], *pairs.shape[3:])


def _few_channels(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The shifted volumes on a leading axis, one product."""
    del stride
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
    length, height, width = x.shape[1:4]
    columns = []
    for i, j, k in SHIFTS:
        shifted = padded[:, i : i + length, j : j + height, k : k + width]
        columns += [shifted[..., channel].reshape(-1) for channel in range(x.shape[-1])]
    rows = kernel.reshape(-1, kernel.shape[-1])
    product = jax.lax.dot_general(jnp.stack(columns), rows, (((0,), (0,)), ((), ())))
    return product.reshape(*x.shape[:4], kernel.shape[-1])


def _narrow(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The three taps along x side by side on the output channels of one 2D convolution, `TILE` planes at a time."""
    del stride
    features, padded = kernel.shape[-1], _pad_first(x)
    wide = jnp.concatenate([kernel[0], kernel[1], kernel[2]], axis=-1)

    def tile(number: jax.Array) -> jax.Array:
        slab = jax.lax.dynamic_slice_in_dim(padded, number * TILE, TILE + 2, axis=1)
        first, second, third = jnp.split(_conv_planes(slab, wide), (features, 2 * features), axis=-1)
        return first[:, :TILE] + second[:, 1:-1] + third[:, 2:]

    tiles = jnp.moveaxis(jax.lax.map(tile, jnp.arange(x.shape[1] // TILE)), 0, 1)
    return tiles.reshape(*x.shape[:2], *tiles.shape[3:])


def _deep(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    del stride
    return _deep_conv(x, kernel)


@jax.custom_vjp
def _deep_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _forward(x.shape, kernel.shape[-1], x.dtype)(x, kernel, 1)


def _deep_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    turned = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    by_x = _forward(gradient.shape, turned.shape[-1], x.dtype)(gradient, turned, 1)
    return by_x, _weight_gradient(x, gradient).astype(kernel.dtype)


_deep_conv.defvjp(lambda x, kernel: (_deep_conv(x, kernel), (x, kernel)), _deep_backward)


def _weight_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """A product for every plane along x, summed: convolutions inside a scan run at a fiftieth of its speed."""
    channels, features, (height, width) = x.shape[-1], gradient.shape[-1], x.shape[2:4]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))

    def plane(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        slab = jax.lax.dynamic_slice_in_dim(padded, number, 3, axis=1)
        columns = jnp.concatenate([slab[:, i, j : j + height, k : k + width] for i, j, k in SHIFTS], axis=-1)
        rows = jax.lax.dynamic_index_in_dim(gradient, number, 1, keepdims=False).reshape(-1, features)
        columns, sides = columns.reshape(-1, 27 * channels), (((0,), (0,)), ((), ()))
        return total + jax.lax.dot_general(rows, columns, sides, preferred_element_type=wide), None

    wide = jnp.promote_types(x.dtype, jnp.float32)
    total, _ = jax.lax.scan(plane, jnp.zeros((features, 27 * channels), wide), jnp.arange(x.shape[1]))
    return total.T.reshape(3, 3, 3, channels, features)
