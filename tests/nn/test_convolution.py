"""Convolutions: every road gives XLA's own convolution, in value, in both gradients and under every transformation."""

import functools
import re
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmed.nn import convolution_cpu, kernel_gradient, onednn
from jaxmed.nn.convolution import Convolution, conv, conv_transposed
from jaxmed.nn.convolution_cpu import Geometry, choose_forward
from jaxmed.nn.model import make_model


@pytest.fixture(autouse=True)
def uncached():
    """Programs with oneDNN's call cannot be stored; where the suite runs with a cache, not here."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)


@pytest.fixture(params=["xla", "auto"])
def road(request, monkeypatch):
    """Both ways of a CPU: without oneDNN's call, and with it where this machine has it."""
    monkeypatch.setenv(onednn.SWITCH, request.param)
    return request.param


def plain(x, kernel, stride=1, edges=None, groups=1):
    """Return XLA's own convolution; by default with the edges of an odd window."""
    axes = "XYZ"[: x.ndim - 2]
    edges = [(edge // 2, edge // 2) for edge in kernel.shape[:-2]] if edges is None else edges
    strides = (stride,) * len(axes) if isinstance(stride, int) else stride
    order = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return jax.lax.conv_general_dilated(x, kernel, strides, edges, dimension_numbers=order, feature_group_count=groups)


def draw(shape, window, features, seed=0, groups=1):
    rng = np.random.default_rng(seed)
    channels = shape[-1] // groups
    kernel = rng.standard_normal((*window, channels, features)) / np.sqrt(np.prod(window) * channels)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32), jnp.asarray(kernel, jnp.float32)


def value_and_gradients(function, x, kernel):
    """Return the value and the pull-back of one random cotangent, in one program."""

    @jax.jit
    def run(x, kernel):
        y, pull = jax.vjp(function, x, kernel)
        weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype)
        return y, *pull(weight)

    return run(x, kernel)


def agree(function, peer, x, kernel, tolerance=3e-6):
    found, expected = value_and_gradients(function, x, kernel), value_and_gradients(peer, x, kernel)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1.0, float(jnp.abs(other).max())))


def name_of_road(shape, kernel, stride, dtype=jnp.float32, groups=1):
    edges = tuple((edge // 2, edge // 2) for edge in kernel[:-2])
    geometry = Geometry(shape[1:-1], kernel[:-2], (stride,) * len(edges), edges, groups)
    return choose_forward(shape, kernel, geometry, jnp.dtype(dtype)).__name__


ROADS = {
    # name: shape, window, features, stride, road on a CPU without oneDNN
    "few channels": ((2, 3, 4, 5, 2), 3, 7, 1, "few_channels"),
    "narrow": ((2, 8, 5, 6, 5), 3, 4, 1, "narrow"),
    "narrow but odd": ((2, 7, 5, 6, 5), 3, 4, 1, "planes"),
    "winograd": ((2, 6, 5, 4, 5), 3, 17, 1, "winograd"),
    "odd depth": ((1, 5, 4, 6, 5), 3, 17, 1, "planes"),
    "window of 5": ((1, 6, 5, 7, 5), 5, 3, 1, "planes"),
    "stride 2": ((1, 6, 1, 4, 3), 3, 5, 2, "product"),
    "stride 2, odd sizes": ((1, 7, 5, 9, 3), 3, 5, 2, "planes"),
    "stride 3": ((1, 7, 5, 9, 3), 5, 5, 3, "planes"),
}


@pytest.mark.core
@pytest.mark.parametrize("name", ROADS)
def test_volumes_agree_with_the_direct_form_in_value_and_gradients(name, road):
    shape, edge, features, stride, expected = ROADS[name]
    x, kernel = draw(shape, (edge,) * 3, features)
    if road == "xla":
        assert name_of_road(shape, kernel.shape, stride) == expected
    agree(functools.partial(conv, stride=stride), functools.partial(plain, stride=stride), x, kernel)


@pytest.mark.core
def test_the_table_of_roads(monkeypatch):
    """With oneDNN: its call; Winograd from 48 to 192 channels, but in bfloat16; a product of few voxels."""
    monkeypatch.setattr(onednn, "find_road", lambda: onednn.Road("onednn", "", ("float32", "bfloat16")))
    volume = functools.partial(name_of_road, stride=1)
    assert volume((1, 64, 64, 64, 16), (3, 3, 3, 16, 16)) == "call_onednn"
    assert volume((1, 32, 32, 32, 64), (3, 3, 3, 64, 64)) == "winograd"
    assert volume((1, 33, 32, 32, 64), (3, 3, 3, 64, 64)) == "call_onednn"
    assert volume((1, 8, 8, 8, 256), (3, 3, 3, 256, 256)) == "call_onednn"
    assert volume((1, 32, 32, 32, 64), (3, 3, 3, 64, 64), dtype=jnp.bfloat16) == "call_onednn"
    assert volume((1, 2, 2, 2, 64), (3, 3, 3, 64, 64)) == "product"
    assert name_of_road((4, 64, 64, 64), (3, 3, 64, 128), 2) == "call_onednn"
    assert name_of_road((1, 16, 24, 24, 96), (7, 7, 7, 1, 96), 1, groups=96) == "call_onednn"
    assert volume((1, 640, 640, 640, 16), (3, 3, 3, 16, 16)) == "narrow", "arrays of 2^31 numbers have not been tried"
    monkeypatch.setattr(onednn, "find_road", lambda: onednn.Road("onednn", "", ("float32",)))
    assert volume((1, 33, 32, 32, 64), (3, 3, 3, 64, 64), dtype=jnp.bfloat16) == "planes"
    assert name_of_road((1, 16, 24, 24, 96), (7, 7, 7, 1, 96), 1, jnp.bfloat16, groups=96) == "by_taps"


@pytest.mark.core
@pytest.mark.parametrize(
    ("shape", "features", "window"),
    [
        ((2, 8, 3, 4, 5), 6, 3),
        ((3, 4, 6, 2, 4), 17, 3),
        ((2, 5, 4, 6, 7), 3, 3),
        ((5, 4, 3, 2), 4, 3),
        ((5, 3, 3, 2), 4, 3),
    ],
)
@pytest.mark.parametrize("columns", [1, 500, 10**6])
def test_the_gradient_by_the_kernel_is_summed_over_slabs(shape, features, window, columns, monkeypatch):
    """Slabs of one row, of some planes or images, and of everything; few channels; images that no slab divides."""
    monkeypatch.setattr(kernel_gradient, "COLUMNS", columns)
    x, kernel = draw(shape, (window,) * (len(shape) - 2), features)
    agree(conv, plain, x, kernel)


@pytest.mark.core
@pytest.mark.parametrize(
    ("shape", "features", "window"),
    [((2, 3, 5, 8, 32), 40, (3, 3, 3)), ((1, 4, 6, 16, 48), 32, (1, 5, 3)), ((3, 7, 8, 33), 32, (3, 3))],
)
def test_the_gradient_by_the_kernel_is_a_convolution_of_each_plane(shape, features, window, road, monkeypatch):
    """Rows of 8 and 16 voxels with many channels, where oneDNN's call is there; and that it was taken."""
    taken = []
    planes = kernel_gradient._by_planes
    monkeypatch.setattr(kernel_gradient, "_by_planes", lambda *given: taken.append(1) or planes(*given))
    x, kernel = draw(shape, window, features)
    agree(conv, plain, x, kernel)
    assert bool(taken) == ("float32" in onednn.find_road().dtypes)


@pytest.mark.core
@pytest.mark.parametrize(("spatial", "size"), [((6, 4, 6), 1), ((7, 5, 4), 2), ((7, 6), 3)])
def test_windows_that_tile_the_image(spatial, size):
    x, kernel = draw((2, *spatial, 3), (size,) * len(spatial), 5)
    edges = [(0, 0)] * len(spatial)
    agree(functools.partial(conv, stride=size), functools.partial(plain, stride=size, edges=edges), x, kernel)


@pytest.mark.core
@pytest.mark.parametrize(("edge", "stride"), [(3, 1), (3, 2), (5, 1), (5, 3)])
@pytest.mark.parametrize("spatial", [(7, 6), (2, 4), (1, 1)])
def test_images_agree_with_the_direct_form(edge, stride, spatial, road):
    x, kernel = draw((2, *spatial, 3), (edge, edge), 4)
    agree(functools.partial(conv, stride=stride), functools.partial(plain, stride=stride), x, kernel)


@pytest.mark.core
@pytest.mark.parametrize(
    ("shape", "window", "features", "groups", "stride"),
    [((2, 5, 6, 4, 6), (7, 7, 7), 6, 6, 1), ((2, 5, 6, 6), (3, 3), 4, 2, 2), ((1, 6, 5, 5, 6), (3, 3, 3), 12, 3, 1)],
    ids=["depthwise", "groups of images at stride 2", "groups of volumes"],
)
def test_groups_of_channels(shape, window, features, groups, stride, road):
    x, kernel = draw(shape, window, features, groups=groups)
    options = {"stride": stride, "groups": groups}
    agree(functools.partial(conv, **options), functools.partial(plain, **options), x, kernel)


@pytest.mark.core
@pytest.mark.parametrize(
    ("window", "stride", "edges"),
    [
        ((3, 3, 3), (1, 2, 2), ((1, 1), (1, 1), (1, 1))),
        ((2, 4, 3), (1, 3, 2), ((1, 0), (0, 3), (2, 2))),
        ((1, 2, 1), (3, 3, 2), ((0, 0), (1, 0), (0, 0))),
    ],
    ids=["one axis at every voxel", "even windows, uneven edges", "voxels that no window meets"],
)
def test_strides_and_edges_of_their_own_on_every_axis(window, stride, edges, road):
    x, kernel = draw((2, 5, 7, 6, 3), window, 5)
    agree(
        functools.partial(conv, stride=stride, edges=edges),
        functools.partial(plain, stride=stride, edges=edges),
        x,
        kernel,
    )


def drawn_shapes(count, most_operations, seed):
    """Draw shapes of 1 to 256 channels and 1 to 65 voxels along each axis, batches of 1 to 5."""
    rng = np.random.default_rng(seed)
    while count:
        space, groups = int(rng.integers(2, 4)), int(rng.choice([1, 1, 1, 1, 2, 4]))
        channels, features = (groups * int(2 ** rng.uniform(0, 8) / groups + 1) for _ in range(2))
        if rng.random() < 0.15:
            groups = features = channels
        shape = (int(rng.integers(1, 6)), *(int(2 ** rng.uniform(0, 6.03)) for _ in range(space)), min(channels, 256))
        features, groups = min(features, 256), min(groups, shape[-1])
        window = (int(rng.choice([1, 3, 3, 3, 5, 7])),) * space
        operations = 2 * np.prod(shape) * np.prod(window) * features / groups
        if operations < most_operations and features % groups == shape[-1] % groups == 0:
            count -= 1
            yield shape, window, features, groups, int(rng.choice([1, 1, 2, 3]))


def compare_drawn(shape, window, features, groups, stride):
    x, kernel = draw(shape, window, features, groups=groups)
    edges = tuple((edge // 2, edge // 2) for edge in window)
    options = {"stride": stride, "groups": groups, "edges": edges}
    agree(functools.partial(conv, **options), functools.partial(plain, **options), x, kernel, 1e-5)


@pytest.mark.core
def test_drawn_shapes(road):
    for case in drawn_shapes(5, 2e7, seed=1):
        compare_drawn(*case)


@pytest.mark.slow
def test_sixty_drawn_shapes(road):
    for case in drawn_shapes(60, 2e9, seed=2):
        compare_drawn(*case)


@pytest.mark.core
def test_stride_2_sees_one_voxel_beyond_both_sides_and_not_what_same_pads():
    """The window of output 0 is centred on voxel 0, as in PyTorch with padding 1."""
    x = jnp.arange(6.0).reshape(1, 6, 1, 1, 1) * jnp.ones((1, 6, 2, 2, 1))
    kernel = jnp.zeros((3, 3, 3, 1, 1)).at[:, 1, 1, 0, 0].set(jnp.array([100.0, 10.0, 1.0]))
    # Planes (., 0, 1), (1, 2, 3), (3, 4, 5).
    np.testing.assert_array_equal(conv(x, kernel, 2)[0, :, 0, 0, 0], [1.0, 123.0, 345.0])
    np.testing.assert_array_equal(conv(x[:, :, 0], kernel[:, :, 1], 2)[0, :, 0, 0], [1.0, 123.0, 345.0])


@pytest.mark.core
@pytest.mark.parametrize(("edge", "stride"), [(2, 2), (3, 2), (3, 1)])
def test_transposed_convolutions_are_the_gradient_of_convolutions(edge, stride):
    x, kernel = draw((2, 3, 4, 5), (edge, edge), 6)
    y = jax.jit(functools.partial(conv_transposed, stride=stride))(x, kernel)
    assert y.shape == (2, 3 * stride, 4 * stride, 6)
    edges = [(0, 0)] * 2 if edge == stride else None
    forward = functools.partial(plain, kernel=kernel.swapaxes(2, 3), stride=stride, edges=edges)
    np.testing.assert_allclose(y, jax.vjp(forward, jnp.zeros_like(y))[1](x)[0], atol=2e-6)
    with pytest.raises(ValueError, match="expected an odd window, or one equal to the stride 3"):
        conv_transposed(x, kernel[:2, :2], 3)


@pytest.mark.core
@pytest.mark.parametrize("shape", [(2, 4, 3, 3, 5), (2, 6, 3, 3, 6)])
def test_mapped_over_inputs_and_over_kernels(shape, road):
    """Narrow and Winograd under vmap; each map equals the loop."""
    features = 17 if shape[-1] == 6 else 4
    x, kernel = draw((3, *shape), (3, 3, 3), features)
    kernels = jnp.stack([kernel, -kernel, 2 * kernel])
    by_input = jax.jit(jax.vmap(conv, (0, None)))(x, kernel)
    by_both = jax.jit(jax.vmap(conv))(x, kernels)
    for number in range(3):
        np.testing.assert_allclose(by_input[number], plain(x[number], kernel), atol=5e-6)
        np.testing.assert_allclose(by_both[number], plain(x[number], kernels[number]), atol=1e-5)


@pytest.mark.core
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (1, 0)])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_mapped_over_inputs_and_over_kernels(axes, groups):
    """Examples' own gradients, which fold into the batch, the channels, the features or groups."""
    x, kernel = draw((3, 2, 5, 4, 4), (3, 3), 6, groups=groups)
    kernels, x = jnp.stack([kernel, -kernel, 2 * kernel]), jnp.moveaxis(x, 0, axes[0]) if axes[0] else x
    given = (x if axes[0] is not None else x[0], kernels if axes[1] is not None else kernel)

    def run(function):
        gradients = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(function(x, kernel, 2, groups=groups))), (0, 1))
        return jax.jit(jax.vmap(gradients, axes))(*given)

    for one, other in zip(run(conv), run(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6 * float(jnp.abs(other).max()))


@pytest.mark.core
@pytest.mark.parametrize("spatial", [(4, 3, 3), (5, 4), (2, 3)])
def test_gradients_of_gradients(spatial, road):
    window = (3,) * len(spatial)
    x, kernel = draw((1, *spatial, 5), window, 17)
    tangent, _ = draw(x.shape, window, 17, seed=1)

    @jax.jit
    def curvature(x, kernel):
        return jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(conv(x, kernel) ** 3))(x) * tangent))(x)

    inner = jax.grad(lambda x: jnp.sum(plain(x, kernel) ** 3))
    expected = jax.jvp(inner, (x,), (tangent,))[1]
    np.testing.assert_allclose(curvature(x, kernel), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.core
def test_derivatives_forwards_and_mixed():
    x, kernel = draw((1, 5, 4, 3), (3, 3), 4)
    tangents = draw(x.shape, (3, 3), 4, seed=1)

    def run(function):
        both = jax.grad(lambda x, kernel: jnp.sum(function(x, kernel, 2) ** 3), (0, 1))
        return jax.jit(lambda: jax.jvp(both, (x, kernel), tangents))()

    for one, other in zip(jax.tree.leaves(run(conv)), jax.tree.leaves(run(plain)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.core
def test_inside_a_loop_whose_steps_are_recomputed(road):
    x, kernel = draw((2, 6, 5, 4, 6), (3, 3, 3), 6)

    def run(function):
        step = jax.checkpoint(lambda x, kernel: jnp.tanh(function(x, kernel)))
        loop = lambda x, kernel: jax.lax.scan(lambda x, _: (step(x, kernel), None), x, None, length=3)[0]  # noqa: E731
        return jax.jit(jax.grad(lambda x, kernel: jnp.sum(loop(x, kernel) ** 2), (0, 1)))(x, kernel)

    for one, other in zip(run(conv), run(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))


def on_mesh(spec, shape, axis_type, stride=1, groups=1):
    """Return value and gradients of a convolution on eight devices, XLA's own, and the compiled program."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    x, kernel = draw(shape, (3,) * (len(shape) - 2), 6, groups=groups)

    def run(function):
        value = functools.partial(function, stride=stride, groups=groups)
        return jax.jit(lambda x, k: (value(x, k), *jax.grad(lambda x, k: jnp.sum(jnp.sin(value(x, k))), (0, 1))(x, k)))

    expected = run(plain)(x, kernel)
    x, kernel = (jax.device_put(array, NamedSharding(mesh, s)) for array, s in ((x, spec), (kernel, PartitionSpec())))
    program = run(conv).lower(x, kernel).compile()
    return program(x, kernel), expected, program.as_text()


@pytest.mark.core
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("axes", "shape", "stride", "groups"),
    [("data", (8, 6, 5, 4, 6), 1, 1), (("data", "model"), (8, 7, 6, 6), 2, 3), (None, (3, 5, 4, 6), 1, 1)],
)
def test_eight_devices_keep_their_part_of_the_batch(axis_type, axes, shape, stride, groups):
    """Nothing is gathered; the gradient by the kernel is summed once."""
    found, expected, text = on_mesh(PartitionSpec(axes), shape, axis_type, stride, groups)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))
    assert "all-gather" not in text and text.count("all-reduce(") == (axes is not None)
    places = [tuple(array.sharding.spec)[:1] for array in found]
    assert axes is None or places[:2] == [(axes,)] * 2
    assert not any(found[2].sharding.spec)


@pytest.mark.core
def test_eight_devices_gather_other_axes():
    spec = PartitionSpec(None, None, None, "data", "model")
    found, expected, _ = on_mesh(spec, (3, 6, 5, 8, 6), AxisType.Auto)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))
    with pytest.raises(ValueError, match="x: expected nothing but its batch over explicit axes of the mesh"):
        on_mesh(spec, (3, 6, 5, 8, 6), AxisType.Explicit)


@pytest.mark.core
@pytest.mark.parametrize("check", [True, False])
def test_inside_shard_map(check):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, kernel = draw((8, 5, 4, 3), (3, 3), 4)
    specs = (PartitionSpec("data"), PartitionSpec())

    def loss(function):
        return lambda x, kernel: jnp.sum(jnp.sin(function(x, kernel)))

    mapped = jax.shard_map(
        lambda x, kernel: jax.lax.psum(loss(conv)(x, kernel), "data"),
        mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check,
    )  # fmt: skip
    found, expected = jax.jit(jax.grad(mapped, (0, 1)))(x, kernel), jax.grad(loss(plain), (0, 1))(x, kernel)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.core
def test_other_devices_get_the_direct_form(monkeypatch):
    """Lowered for a CPU without oneDNN, planes; lowered for an accelerator, one 3D convolution."""
    monkeypatch.setenv(onednn.SWITCH, "xla")
    x, kernel = draw((1, 4, 3, 3, 5), (3, 3, 3), 17)
    traced = jax.jit(conv).trace(x, kernel)
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    elsewhere = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert on_cpu.count("stablehlo.convolution") == 4 and elsewhere.count("stablehlo.convolution") == 1
    gradients = jax.jit(jax.grad(lambda x, kernel: conv(x, kernel, 2).sum(), (0, 1))).trace(x, kernel)
    assert gradients.lower(lowering_platforms=("tpu",)).as_text().count("stablehlo.convolution") == 2


@pytest.mark.core
def test_exported_programs_hold_xlas_own_form(road):
    """What `jax.export` writes runs elsewhere: no call of oneDNN's, any batch."""
    x, kernel = draw((3, 5, 6, 3), (3, 3), 4)
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(lambda x: conv(x, kernel, 2)), platforms=("cpu", "tpu"))(shape)
    text = exported.mlir_module()
    assert "stablehlo.convolution" in text and "onednn" not in text
    again = jax.export.deserialize(bytearray(exported.serialize()))
    np.testing.assert_allclose(again.call(x), plain(x, kernel, 2), atol=2e-6)


@pytest.mark.core
@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_layer_has_a_kernel_and_a_bias(dimensions):
    x, _ = draw((2, *(4,) * dimensions, 3), (3,) * dimensions, 5)
    model = make_model(Convolution(5, stride=2))
    params = jax.jit(model.init)(jax.random.key(0), x)
    kernel, bias = params["kernel"], jnp.arange(5.0)
    assert kernel.shape == (*(3,) * dimensions, 3, 5) and not params["bias"].any()
    limit = (3**dimensions * 3) ** -0.5
    assert 0.9 * limit < float(jnp.abs(kernel).max()) <= limit
    np.testing.assert_allclose(model.apply({"kernel": kernel, "bias": bias}, x), plain(x, kernel, 2) + bias, atol=2e-6)


@pytest.mark.core
def test_a_layer_may_keep_its_first_axis_and_have_groups():
    x, _ = draw((2, 5, 6, 7, 4), (3, 3, 3), 8)
    model = make_model(Convolution(8, stride=2, unstrided=1, groups=2))
    params = model.init(jax.random.key(0), x)
    assert params["kernel"].shape == (3, 3, 3, 2, 8)
    np.testing.assert_allclose(
        model.apply(params, x), plain(x, params["kernel"], 1, groups=2)[:, :, ::2, ::2], atol=2e-6
    )


@pytest.mark.core
@pytest.mark.parametrize("shape", [(1, 4, 3, 3, 5), (1, 6, 3, 3, 6), (1, 6, 6, 3)])
def test_bfloat16_is_close(shape, road):
    x, kernel = draw(shape, (3,) * (len(shape) - 2), 17 if shape[-1] == 6 else 4)
    found = value_and_gradients(conv, x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    expected = value_and_gradients(plain, x, kernel)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.01 * max(1.0, float(jnp.abs(other).max())))


@pytest.mark.core
def test_even_windows_that_tile_nothing_are_refused():
    x, kernel = draw((1, 4, 4, 4, 3), (2, 2, 2), 5)
    with pytest.raises(ValueError, match="expected an odd window, or one equal to the stride 1"):
        conv(x, kernel)


@pytest.mark.core
@pytest.mark.parametrize("change", [{"groups": 3}, {"x": jnp.zeros((1, 4, 4, 3))}, {"x": jnp.zeros((1, 4, 4, 4, 4))}])
def test_kernels_that_do_not_fit_are_refused(change):
    given = {"x": jnp.zeros((1, 4, 4, 4, 3)), "kernel": jnp.zeros((3, 3, 3, 3, 5)), **change}
    with pytest.raises(ValueError, match=re.escape("kernel: expected")):
        conv(**given)
    with pytest.raises(ValueError, match="float32, got"):
        conv(jnp.zeros((1, 4, 4, 3)), jnp.zeros((3, 3, 3, 5), jnp.bfloat16))


@pytest.mark.core
def test_nothing_else_calls_xlas_convolution():
    package = Path(convolution_cpu.__file__).parents[1]
    callers = {path.name for path in package.rglob("*.py") if "lax.conv" in path.read_text()}
    assert callers == {"convolution_cpu.py"}
