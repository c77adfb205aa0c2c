"""Convolutions: every road gives XLA's own 3D convolution, in value and in both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.nn import convolution
from jaxmed.nn.convolution import Convolution, conv2d, conv3d
from jaxmed.nn.model import make_model


def plain(x, kernel, stride, edge):
    order = ("NHWC", "HWIO", "NHWC") if x.ndim == 4 else ("NXYZC", "XYZIO", "NXYZC")
    edges = [(edge, edge)] * (x.ndim - 2)
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * (x.ndim - 2), edges, dimension_numbers=order)


def draw(shape, window, features, seed=0):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((*window, shape[-1], features)) / np.sqrt(np.prod(window) * shape[-1])
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


ROADS = {
    # name: shape, window, features, stride, road on a CPU
    "few channels": ((2, 3, 4, 5, 2), 3, 7, 1, "_few_channels"),
    "narrow": ((2, 8, 5, 6, 5), 3, 4, 1, "_deep"),
    "narrow but odd": ((2, 7, 5, 6, 5), 3, 4, 1, "_planes"),
    "winograd": ((2, 6, 5, 4, 5), 3, 17, 1, "_winograd"),
    "odd depth": ((1, 5, 4, 6, 5), 3, 17, 1, "_planes"),
    "window of 5": ((1, 6, 5, 7, 5), 5, 3, 1, "_planes"),
    "stride 2": ((1, 6, 1, 4, 3), 3, 5, 2, "_planes"),
    "stride 2, odd sizes": ((1, 7, 5, 9, 3), 3, 5, 2, "_planes"),
    "stride 3": ((1, 7, 5, 9, 3), 5, 5, 3, "_direct"),
}


@pytest.mark.core
@pytest.mark.parametrize("name", ROADS)
def test_volumes_agree_with_the_direct_form_in_value_and_gradients(name):
    shape, edge, features, stride, road = ROADS[name]
    x, kernel = draw(shape, (edge,) * 3, features)
    assert convolution._choose(shape, kernel.shape, stride, x.dtype).__name__ == road
    agree(lambda x, k: conv3d(x, k, stride), lambda x, k: plain(x, k, stride, edge // 2), x, kernel)


@pytest.mark.core
@pytest.mark.parametrize(("channels", "features"), [(5, 4), (4, 17)])
def test_the_handwritten_weight_gradient_of_deep_volumes(channels, features, monkeypatch):
    monkeypatch.setattr(convolution, "DEEP", 8)
    monkeypatch.setattr(convolution, "FEW_CHANNELS", 1)
    x, kernel = draw((2, 8, 3, 4, channels), (3, 3, 3), features)
    assert convolution._choose(x.shape, kernel.shape, 1, x.dtype) is convolution._deep
    agree(conv3d, lambda x, k: plain(x, k, 1, 1), x, kernel)


@pytest.mark.core
@pytest.mark.parametrize(("spatial", "size"), [((6, 4, 6), 1), ((7, 5, 4), 2), ((7, 6), 3)])
def test_windows_that_tile_the_image(spatial, size):
    x, kernel = draw((2, *spatial, 3), (size,) * len(spatial), 5)
    convolve = conv2d if len(spatial) == 2 else conv3d
    agree(lambda x, k: convolve(x, k, size), lambda x, k: plain(x, k, size, 0), x, kernel)


@pytest.mark.core
@pytest.mark.parametrize(("edge", "stride"), [(3, 1), (3, 2), (5, 1), (5, 3)])
@pytest.mark.parametrize("spatial", [(7, 6), (2, 4), (1, 1)])
def test_images_agree_with_the_direct_form(edge, stride, spatial):
    x, kernel = draw((2, *spatial, 3), (edge, edge), 4)
    agree(lambda x, k: conv2d(x, k, stride), lambda x, k: plain(x, k, stride, edge // 2), x, kernel)


@pytest.mark.core
def test_stride_2_sees_one_voxel_beyond_both_sides_and_not_what_same_pads():
    """The window of output 0 is centred on voxel 0, as in PyTorch with padding 1."""
    x = jnp.arange(6.0).reshape(1, 6, 1, 1, 1) * jnp.ones((1, 6, 2, 2, 1))
    kernel = jnp.zeros((3, 3, 3, 1, 1)).at[:, 1, 1, 0, 0].set(jnp.array([100.0, 10.0, 1.0]))
    # Planes (., 0, 1), (1, 2, 3), (3, 4, 5).
    np.testing.assert_array_equal(conv3d(x, kernel, 2)[0, :, 0, 0, 0], [1.0, 123.0, 345.0])
    np.testing.assert_array_equal(conv2d(x[:, :, 0], kernel[:, :, 1], 2)[0, :, 0, 0], [1.0, 123.0, 345.0])


@pytest.mark.core
@pytest.mark.parametrize("shape", [(2, 4, 3, 3, 5), (2, 6, 3, 3, 6)])
def test_mapped_over_inputs_and_over_kernels(shape):
    """Narrow and Winograd under vmap; each map equals the loop."""
    features = 17 if shape[-1] == 6 else 4
    x, kernel = draw((3, *shape), (3, 3, 3), features)
    kernels = jnp.stack([kernel, -kernel, 2 * kernel])
    by_input = jax.jit(jax.vmap(conv3d, (0, None)))(x, kernel)
    by_both = jax.jit(jax.vmap(conv3d))(x, kernels)
    for number in range(3):
        np.testing.assert_allclose(by_input[number], plain(x[number], kernel, 1, 1), atol=5e-6)
        np.testing.assert_allclose(by_both[number], plain(x[number], kernels[number], 1, 1), atol=1e-5)


@pytest.mark.core
@pytest.mark.parametrize("spatial", [(4, 3, 3), (5, 4), (2, 3)])
def test_gradients_of_gradients(spatial):
    window = (3,) * len(spatial)
    x, kernel = draw((1, *spatial, 5), window, 17)
    tangent, _ = draw(x.shape, window, 17, seed=1)
    convolve = conv2d if len(spatial) == 2 else conv3d

    @jax.jit
    def curvature(x, kernel):
        return jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(convolve(x, kernel) ** 3))(x) * tangent))(x)

    inner = jax.grad(lambda x: jnp.sum(plain(x, kernel, 1, 1) ** 3))
    expected = jax.jvp(inner, (x,), (tangent,))[1]
    np.testing.assert_allclose(curvature(x, kernel), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.core
def test_other_devices_get_the_direct_form(monkeypatch):
    """Lowered for a CPU, planes; lowered for an accelerator, one 3D convolution."""
    x, kernel = draw((1, 4, 3, 3, 5), (3, 3, 3), 17)
    traced = jax.jit(conv3d).trace(x, kernel)
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    elsewhere = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert on_cpu.count("stablehlo.convolution") == 4 and elsewhere.count("stablehlo.convolution") == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    fresh = jax.make_jaxpr(lambda x, kernel: conv3d(x, kernel))(x, kernel)
    assert str(fresh).count("conv_general_dilated") == 1


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
    np.testing.assert_allclose(
        model.apply({"kernel": kernel, "bias": bias}, x), plain(x, kernel, 2, 1) + bias, atol=2e-6
    )


@pytest.mark.core
@pytest.mark.parametrize("shape", [(1, 4, 3, 3, 5), (1, 6, 3, 3, 6), (1, 6, 6, 3)])
def test_bfloat16_is_close(shape):
    x, kernel = draw(shape, (3,) * (len(shape) - 2), 17 if shape[-1] == 6 else 4)
    convolve = conv3d if len(shape) == 5 else conv2d
    found = value_and_gradients(convolve, x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    expected = value_and_gradients(lambda x, k: plain(x, k, 1, 1), x, kernel)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.01 * max(1.0, float(jnp.abs(other).max())))


@pytest.mark.core
def test_even_windows_that_tile_nothing_are_refused():
    x, kernel = draw((1, 4, 4, 4, 3), (2, 2, 2), 5)
    with pytest.raises(ValueError, match="expected an odd window, or one equal to the stride 1"):
        conv3d(x, kernel)
