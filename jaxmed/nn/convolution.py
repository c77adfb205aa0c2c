"""Convolutions of images and volumes, channels last, by the fastest road that a device and a shape have.

`conv` is one operation to JAX, a primitive, and becomes a program only when it is lowered: GPUs and TPUs get XLA's own
convolution, a CPU one of the roads of `py`, and `jax.export` XLA's, whatever the device, because what
it writes must run elsewhere. All roads give the same numbers to rounding.

Edges are zeros: a window of odd edge k covers k // 2 voxels on both sides of its centre, also at stride 2, where XLA's
own "SAME" would put the spare voxel on one side only. A window that equals its stride tiles the image and needs no
edge; voxels that fill no tile are left out.

Why a primitive. The pairing <y, convolution of x with kernel> is linear in each of x, kernel and y. Convolution, its
gradient by the input and its gradient by the kernel are its derivatives by y, x and kernel, so the derivative of any
of the three is another one of the three. One primitive with three results therefore has all derivatives, forwards,
backwards and mixed, and one rule for `vmap`. Every one of them takes its own fast road: XLA's own gradients are ten to
seventy times slower on a CPU inside a loop, a sampler's say, and four times at stride 2.
"""

import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxmed.arrays.platform import target_platform
from jaxmed.nn.convolution_cpu import Geometry, by_input, direct, forward, interleave, tiled
from jaxmed.nn.kernel_gradient import by_kernel


class Convolution(nn.Module):
    """y = convolution of x with kernel + bias; as many spatial axes as x has, the same window on each.

    Attributes:
        features: Channels of y.
        size: Edge of the window, in voxels.
        stride: Voxels between windows; with `size` also the rule at the edges (see above).
        unstrided: How many of the first axes of space have windows at every voxel all the same.
        groups: Groups of channels, each with features of its own; as many as channels for a depthwise convolution.
        dtype: Type of the products.
        kernel_init: Draws the kernel [*window, channel, feature]; by default uniform with variance 1 / (3 fan-in),
            PyTorch's, from which the published networks were trained. Deviation: biases start at 0.
        use_bias: Whether there is one.
        edges: Zeros before and after each axis; as the head of this file says where None.
    """

    features: int
    size: int = 3
    stride: int = 1
    unstrided: int = 0
    groups: int = 1
    dtype: str = "float32"
    kernel_init: Any = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    use_bias: bool = True
    edges: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch *space channel"]) -> Float[Array, "batch *space2 feature"]:
        space = x.ndim - 2
        shape = (*(self.size,) * space, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        stride = (1,) * self.unstrided + (self.stride,) * (space - self.unstrided)
        edge = 0 if self.size == self.stride else self.size // 2
        edges = self.edges or (edge, edge)
        kernel = jnp.asarray(kernel, self.dtype)
        y = conv(x.astype(self.dtype), kernel, stride, self.groups, (edges,) * space)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y + bias.astype(self.dtype)


def conv(
    x: Float[Array, "batch *space channel"],
    kernel: Float[Array, "*window group_channel feature"],
    stride: int | tuple[int, ...] = 1,
    groups: int = 1,
    edges: tuple[tuple[int, int], ...] | None = None,
) -> Float[Array, "batch *space2 feature"]:
    """Convolve images or volumes.

    Args:
        x: One, two or three axes of space.
        kernel: Of the same type.
        stride: Voxels between windows, on every axis or along each.
        groups: Groups of channels, each with features of its own.
        edges: Zeros before and after each axis; as the head of this file says where None.

    Raises:
        ValueError: Channels do not fit the kernel, or an even window neither tiles the image nor is told its edges.
    """
    *window, channels, features = kernel.shape
    strides = (stride,) * len(window) if isinstance(stride, int) else stride
    if len(window) != x.ndim - 2 or channels * groups != x.shape[-1] or features % groups or x.dtype != kernel.dtype:
        expected = f"{x.ndim - 2} axes of window, {x.shape[-1]} channels in {groups} groups, {x.dtype}"
        raise ValueError(f"kernel: expected {expected}, got {kernel.shape}, {kernel.dtype}")
    if edges is None:
        edges = ((0, 0),) * len(window)
        if tuple(window) != strides:
            if any(edge % 2 == 0 for edge in window):
                raise ValueError(f"kernel: expected an odd window, or one equal to the stride {stride}, got {window}")
            edges = tuple((edge // 2, edge // 2) for edge in window)
    geometry = Geometry(x.shape[1:-1], tuple(window), strides, edges, groups)
    if geometry.is_tiled:
        return tiled(x, kernel, geometry)
    return _bind("y", geometry, x=x, kernel=kernel)


def conv_transposed(
    x: Float[Array, "batch *space channel"], kernel: Float[Array, "*window channel feature"], stride: int
) -> Float[Array, "batch *space2 feature"]:
    """Return `stride` times as many voxels along each axis: what `conv` at that stride would have been the gradient of.

    PyTorch's ConvTranspose of the same stride, where the window equals it; or with padding k // 2 and output padding
    stride - 1, where the window has an odd edge k.
    """
    *window, channels, features = kernel.shape
    if all(edge == stride for edge in window):
        spread = jnp.dot(x, kernel.reshape(-1, channels, features).swapaxes(0, 1).reshape(channels, -1))
        return interleave(spread.reshape(*x.shape[:-1], *window, features))
    if any(edge % 2 == 0 for edge in window):
        raise ValueError(f"kernel: expected an odd window, or one equal to the stride {stride}, got {tuple(window)}")
    space = tuple(stride * length for length in x.shape[1:-1])
    edges = tuple((edge // 2, edge // 2) for edge in window)
    geometry = Geometry(space, tuple(window), (stride,) * len(window), edges, 1)
    return _bind("x", geometry, kernel=kernel.swapaxes(-1, -2), y=x)


# --- The primitive ----------------------------------------------------------------------------

Slot = Literal["x", "kernel", "y"]
# What the operands are, in their order, where the result is one of the three.
OPERANDS: dict[Slot, tuple[Slot, Slot]] = {"x": ("kernel", "y"), "kernel": ("x", "y"), "y": ("x", "kernel")}

PRIMITIVE = core.Primitive("convolution")


def count_operations(gives: Slot, *shapes: tuple[int, ...]) -> float:
    """Count the floating-point operations of the primitive from the shapes of its operands and of its result."""
    named = dict(zip((*OPERANDS[gives], gives), shapes, strict=True))
    return 2.0 * math.prod(named["y"]) * math.prod(named["kernel"][:-1])


def _bind(gives: Slot, geometry: Geometry, devices: Any = None, **arrays: jax.Array) -> jax.Array:
    """Return the derivative of <y, convolution of x with kernel> by one of the three, given the two others."""
    # Inside a `shard_map` both operands vary over the same axes of the mesh, as those of JAX's own operations do.
    varied = {slot: frozenset(jax.typeof(array).manual_axis_type.varying) for slot, array in arrays.items()}
    for slot, own in varied.items():
        if missing := frozenset.union(*varied.values()) - own:
            arrays[slot] = jax.lax.pcast(arrays[slot], tuple(missing), to="varying")
    if devices is None and target_platform() == "cpu" and jax.device_count() > 1:
        devices = _partitioned_call()
    return PRIMITIVE.bind(*(arrays[slot] for slot in OPERANDS[gives]), gives=gives, geometry=geometry, devices=devices)


@functools.cache
def _partitioned_call() -> core.ClosedJaxpr:
    """Return a program that holds a partitioned call: JAX tells a lowering its devices where parameters hold one."""
    call = custom_partitioning(lambda x: x)
    call.def_partition(partition=None, sharding_rule="i -> i")
    return jax.make_jaxpr(call)(jax.ShapeDtypeStruct((1,), jnp.float32))


@functools.partial(jax.jit, static_argnames=("gives", "geometry", "devices"))
def _run(*operands: jax.Array, gives: Slot, geometry: Geometry, devices: Any) -> jax.Array:
    """Outside of a program: compile the operation alone."""
    return PRIMITIVE.bind(*operands, gives=gives, geometry=geometry, devices=devices)


PRIMITIVE.def_impl(_run)


@PRIMITIVE.def_abstract_eval
def _shape(first: Any, second: Any, *, gives: Slot, geometry: Geometry, devices: Any) -> Any:
    del devices
    arrays = dict(zip(OPERANDS[gives], (first, second), strict=True))
    match gives:
        case "y":
            shape = (arrays["x"].shape[0], *geometry.lengths, arrays["kernel"].shape[-1])
        case "x":
            shape = (arrays["y"].shape[0], *geometry.space, arrays["kernel"].shape[-2] * geometry.groups)
        case "kernel":
            shape = (*geometry.window, arrays["x"].shape[-1] // geometry.groups, arrays["y"].shape[-1])
    # On a mesh of explicit axes the batch stays where it is, and all else is whole.
    specs = {slot: tuple(array.sharding.spec) for slot, array in arrays.items()}
    for slot, spec in specs.items():
        if any(spec if slot == "kernel" else spec[1:]):
            raise ValueError(f"{slot}: expected nothing but its batch over explicit axes of the mesh, got {spec}")
    batch = specs["y" if gives == "x" else "x"][:1] if gives != "kernel" else ()
    sharding = NamedSharding(first.sharding.mesh, PartitionSpec(*batch, *(None,) * (len(shape) - len(batch))))
    return first.update(shape=shape, weak_type=False, sharding=sharding)


def _derivative(index: int, cotangent: Any, *operands: Any, gives: Slot, geometry: Geometry, devices: Any) -> jax.Array:
    """Return the derivative by the operand of that index: what the operand stands for becomes the result."""
    slots = OPERANDS[gives]
    arrays = {gives: cotangent, slots[1 - index]: operands[1 - index]}
    return _bind(slots[index], geometry, devices, **arrays)


ad.defbilinear(PRIMITIVE, functools.partial(_derivative, 0), functools.partial(_derivative, 1))


def _map(operands: Any, axes: Any, *, gives: Slot, geometry: Geometry, devices: Any) -> tuple[jax.Array, int]:
    """Fold the mapped axis into one that the mapped arrays share: batch, channels, features, or groups for all three.

    Where groups are taken and one operand is not mapped, it is repeated.
    """
    slots = OPERANDS[gives]
    (size,) = {array.shape[axis] for array, axis in zip(operands, axes, strict=True) if axis is not None}
    arrays = {slot: jnp.moveaxis(array, axis, 0) if axis is not None else array
              for slot, array, axis in zip(slots, operands, axes, strict=True)}  # fmt: skip
    mapped = {gives, *(slot for slot, axis in zip(slots, axes, strict=True) if axis is not None)}
    if len(mapped) == 2 and geometry.groups > 1 and "kernel" in mapped:
        arrays = {slot: array if slot in mapped else jnp.broadcast_to(array, (size, *array.shape))
                  for slot, array in arrays.items()}  # fmt: skip
        mapped = set(OPERANDS)
    # Which axis of each array takes the mapped one in, counted from the end where it is the channels'.
    if mapped == {"x", "y"}:
        place = {"x": 0, "y": 0}
    elif mapped == {"x", "kernel"}:
        place = {"x": -1, "kernel": -2}
    elif mapped == {"kernel", "y"}:
        place = {"kernel": -1, "y": -1}
    else:
        place = {"x": -1, "kernel": -1, "y": -1}
        geometry = geometry._replace(groups=size * geometry.groups)
    folded = {slot: _fold(array, place[slot]) if slot in mapped else array for slot, array in arrays.items()}
    found = _bind(gives, geometry, devices, **folded)
    axis = place[gives] % found.ndim
    shape = (*found.shape[:axis], size, found.shape[axis] // size, *found.shape[axis + 1 :])
    return found.reshape(shape), axis


def _fold(array: jax.Array, axis: int) -> jax.Array:
    """Join the first axis with another one, as its slower part."""
    axis = axis % (array.ndim - 1)
    moved = jnp.moveaxis(array, 0, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])


batching.primitive_batchers[PRIMITIVE] = _map


# --- Programs ---------------------------------------------------------------------------------


def _lower(ctx: Any, *operands: Any, gives: Slot, geometry: Geometry, devices: Any, on_cpu: bool) -> Any:
    context = ctx.module_context
    num_devices = getattr(context.axis_context, "num_devices", 1)
    if not on_cpu or context.lowering_parameters.for_export or (num_devices > 1 and devices is None):
        program = functools.partial(_xla, gives=gives, geometry=geometry)
    else:
        program = functools.partial(ON_CPU[gives], geometry=geometry)
        if num_devices > 1:
            program = _by_batch(program, gives)
    # Roads are plain programs of arrays: what a `shard_map` knows of its arrays does not concern them.
    plain = [ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
    return mlir.lower_fun(program, multiple_results=False)(ctx.replace(avals_in=plain), *operands)


ON_CPU = {"y": forward, "x": by_input, "kernel": by_kernel}

mlir.register_lowering(PRIMITIVE, functools.partial(_lower, on_cpu=False))
mlir.register_lowering(PRIMITIVE, functools.partial(_lower, on_cpu=True), platform="cpu")


def _xla(first: jax.Array, second: jax.Array, *, gives: Slot, geometry: Geometry) -> jax.Array:
    """Return XLA's own convolution or derivative."""
    convolve = functools.partial(direct, geometry=geometry)
    match gives:
        case "y":
            return convolve(first, second)
        case "x":
            x = jax.ShapeDtypeStruct((second.shape[0], *geometry.space, first.shape[-2] * geometry.groups), first.dtype)
            return jax.linear_transpose(lambda x: convolve(x, first), x)(second)[0]
        case "kernel":
            shape = (*geometry.window, first.shape[-1] // geometry.groups, second.shape[-1])
            kernel = jax.ShapeDtypeStruct(shape, first.dtype)
            return jax.linear_transpose(lambda kernel: convolve(first, kernel), kernel)(second)[0]


def _by_batch(program: Any, gives: Slot) -> Any:
    """Let every device compute its part of the batch; kernels are whole on each, and their derivatives summed."""
    slots = OPERANDS[gives]

    def place(operands: Any, result: Any) -> tuple[Any, dict[Slot, PartitionSpec]]:
        arrays = [*zip(slots, operands, strict=True), (gives, result)]
        specs = [getattr(array.sharding, "spec", ()) for slot, array in arrays if slot != "kernel"]
        axes = next((spec[0] for spec in specs if spec and spec[0] is not None), None)
        return axes, {slot: PartitionSpec(None if slot == "kernel" else axes) for slot in OPERANDS}

    def partition(mesh: Any, operands: Any, result: Any) -> Any:
        axes, specs = place(operands, result)

        def run(first: jax.Array, second: jax.Array) -> jax.Array:
            found = program(first, second)
            if gives != "kernel" or axes is None:
                return found
            return jax.lax.psum(found.astype(jnp.promote_types(found.dtype, jnp.float32)), axes).astype(found.dtype)

        where = {slot: NamedSharding(mesh, spec) for slot, spec in specs.items()}
        return mesh, run, where[gives], tuple(where[slot] for slot in slots)

    def infer(mesh: Any, operands: Any, result: Any) -> NamedSharding:
        return NamedSharding(mesh, place(operands, result)[1][gives])

    def rule(mesh: Any, operands: Any, results: Any) -> tuple[str, dict[str, Any]]:
        # Shardy's notation, in which all factors but the batch stay whole; listed as they appear.
        space = operands[0].rank - 2
        names = {"x": "pqr"[:space] + "c", "kernel": "ijk"[:space] + "de", "y": "stu"[:space] + "f"}
        texts = {slot: " ".join(name if slot == "kernel" else "n" + name) for slot, name in names.items()}
        whole = tuple("".join(names[slot] for slot in (*slots, gives)))
        summed = {"reduction_factors": ("n",)} if gives == "kernel" else {}
        text = f"{texts[slots[0]]}, {texts[slots[1]]} -> {texts[gives]}"
        return text, {"need_replication_factors": whole, **summed}

    call = custom_partitioning(lambda first, second: program(first, second))
    call.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return call
