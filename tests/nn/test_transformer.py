"""The block and its parts against NumPy, and stochastic depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxmed.arrays.layers import Holding, holding_layers
from jaxmed.nn.model import make_model
from jaxmed.nn.transformer import Block, BlockConfig, DropPath, LayerNorm, Linear

pytestmark = pytest.mark.core
CONFIG = BlockConfig(width=12, heads=3, hidden=20)


def disturbed(params, seed=0):
    """Move every parameter, or zeros and ones would hide mistakes."""
    leaves, tree = jax.tree.flatten(params)
    generator = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [leaf + 0.1 * generator.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    )


@pytest.fixture(scope="module")
def block():
    model = make_model(Block(CONFIG))
    x = jax.random.normal(jax.random.key(1), (2, 7, 12))
    return model, disturbed(jax.jit(model.init)(jax.random.key(0), x)), x


def norm(x, params):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * params["scale"] + params["bias"]


def test_block_equals_numpy_in_double_precision(block):
    model, params, x = block
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    tokens = np.asarray(x, np.float64)
    normed = norm(tokens, p["norm1"])
    qkv = np.einsum("btw,wchd->cbhtd", normed, p["attention"]["qkv"]["kernel"])
    qkv += p["attention"]["qkv"]["bias"][:, None, :, None]
    weights = scipy.special.softmax(qkv[0] @ qkv[1].swapaxes(-1, -2) / 2.0, axis=-1)  # depth 4
    mixed = (weights @ qkv[2]).transpose(0, 2, 1, 3).reshape(2, 7, 12)
    tokens = tokens + mixed @ p["attention"]["out"]["kernel"] + p["attention"]["out"]["bias"]
    hidden = norm(tokens, p["norm2"]) @ p["mlp"]["fc1"]["kernel"] + p["mlp"]["fc1"]["bias"]
    hidden = 0.5 * hidden * (1 + scipy.special.erf(hidden / np.sqrt(2)))
    expected = tokens + hidden @ p["mlp"]["fc2"]["kernel"] + p["mlp"]["fc2"]["bias"]
    np.testing.assert_allclose(model.apply(params, x), expected, rtol=0, atol=3e-6)


def test_parameter_paths_and_shapes(block):
    shapes = jax.tree.map(jnp.shape, block[1])
    assert shapes["attention"]["qkv"] == {"kernel": (12, 3, 3, 4), "bias": (3, 3, 4)}
    assert shapes["attention"]["out"] == {"kernel": (12, 12), "bias": (12,)}
    assert shapes["mlp"] == {"fc1": {"kernel": (12, 20), "bias": (20,)}, "fc2": {"kernel": (20, 12), "bias": (12,)}}
    assert shapes["norm1"] == shapes["norm2"] == {"scale": (12,), "bias": (12,)}


def test_a_norm_of_a_large_mean_keeps_its_digits():
    """In one pass, E[x^2] - E[x]^2, nothing of a variance of 1e-4 on a mean of 100 would be left."""
    x = jnp.asarray(100 + 0.01 * np.random.default_rng(0).standard_normal((4, 64)), jnp.float32)
    model = make_model(LayerNorm())
    found = model.apply(model.init(jax.random.key(0), x), x)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, exact, atol=5e-3)


def test_kernels_start_xavier_uniform_over_the_flat_matrix():
    model = make_model(Linear((3, 8, 16)))
    params = model.init(jax.random.key(0), jnp.zeros((1, 128)))
    bound = np.sqrt(6 / (128 + 384))
    kernel = np.asarray(params["kernel"])
    assert kernel.shape == (128, 3, 8, 16) and np.abs(kernel).max() <= bound
    assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert not params["bias"].any()


def test_compute_in_bfloat16_keeps_parameters_and_stream_in_float32(block):
    _, params, x = block
    model = make_model(Block(BlockConfig(12, 3, 20, dtype="bfloat16")))
    fresh = model.init(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype(jnp.float32)}
    found, expected = model.apply(params, x), block[0].apply(params, x)
    assert found.dtype == jnp.float32 and bool(jnp.isfinite(found).all())
    np.testing.assert_allclose(found, expected, atol=0.05)
    assert float(jnp.abs(found - expected).max()) > 1e-5  # it really computed in another precision


@pytest.mark.parametrize(("silenced", "last"), [("mlp", "fc2"), ("attention", "out")])
def test_drop_path_skips_a_branch_of_whole_images_and_keeps_its_mean(block, silenced, last):
    model, params, x = block
    quiet = jax.tree.map(jnp.zeros_like, params[silenced][last])
    params = {**params, silenced: {**params[silenced], last: quiet}}  # leaves one branch to look at
    branch = model.apply(params, x[:1]) - x[:1]

    @jax.jit
    def change(key):
        return model.apply(params, jnp.broadcast_to(x[:1], (2000, 7, 12)), DropPath(key, 0.4)) - x[:1]

    found = np.asarray(change(jax.random.key(3)))
    is_kept = np.abs(found).max(axis=(1, 2)) > 0
    assert is_kept.mean() == pytest.approx(0.6, abs=0.05)  # deviation of the share: 0.011
    np.testing.assert_allclose(found[is_kept], np.broadcast_to(branch / 0.6, found[is_kept].shape), atol=3e-6)


def test_a_rate_of_zero_and_no_key_drop_nothing(block):
    model, params, x = block
    expected = model.apply(params, x)
    np.testing.assert_array_equal(model.apply(params, x, DropPath(jax.random.key(0), 0.0)), expected)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="heads: expected a divisor of the width 12, found 5"):
        BlockConfig(12, 5, 20)


def test_a_kernel_of_several_axes_is_merged_but_in_a_step_that_splits_it():
    """Apart, the kernel's gradient is transposed, which costs a step on a CPU a tenth."""
    linear, x = Linear((3, 2, 4)), jnp.ones((5, 8))
    params = disturbed(linear.init(jax.random.key(0), x))

    def lowered():
        return jax.jit(lambda params: linear.apply(params, x)).lower(params).as_text()

    merged = linear.apply(params, x)
    assert "tensor<5x24xf32>" in lowered()
    with holding_layers(Holding(has_tensor_splits=True)):
        np.testing.assert_allclose(linear.apply(params, x), merged, rtol=1e-6)
        assert "tensor<5x24xf32>" not in lowered()
