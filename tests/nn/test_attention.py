"""Attention: every kind is softmax(q k^T / sqrt(depth)) v, in value and in gradient."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.nn import attention
from jaxmed.nn.attention import self_attention


def plain(qkv):
    """The formula, with autodiff all the way."""
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(query.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), value)


def draw(tokens, dtype=jnp.float32, scale=1.0):
    qkv = scale * jax.random.normal(jax.random.key(0), (2, tokens, 3, 2, 8))
    return qkv.astype(dtype), jax.random.normal(jax.random.key(1), (2, tokens, 2, 8))


def value_and_gradient(function, qkv, weight):
    loss = lambda qkv: jnp.sum(function(qkv) * weight)  # noqa: E731
    return jax.jit(lambda qkv: (function(qkv), jax.grad(loss)(qkv)))(qkv)


@pytest.mark.core
@pytest.mark.parametrize("kind", ["products", "blocks", "xla"])
@pytest.mark.parametrize("tokens", [17, 24])  # with blocks of 8: padded, and whole
def test_kinds_agree_in_value_and_gradient(kind, tokens, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 8)
    qkv, weight = draw(tokens)
    expected = value_and_gradient(plain, qkv, weight)
    found = value_and_gradient(lambda qkv: self_attention(qkv, kind), qkv, weight)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=3e-6)


@pytest.mark.core
def test_a_batch_in_parts_equals_the_whole(monkeypatch):
    qkv = jax.random.normal(jax.random.key(0), (3, 17, 3, 2, 8))
    weight = jax.random.normal(jax.random.key(1), (3, 17, 2, 8))
    expected = value_and_gradient(plain, qkv, weight)
    parts = []
    monkeypatch.setattr(attention, "_part", lambda part, run=attention._part: (parts.append(len(part)), run(part))[1])
    monkeypatch.setattr(attention, "PARTS", 2)
    monkeypatch.setattr(attention, "LARGE", 3 * 2 * 17**2 - 1)
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # the tests have eight
    found = value_and_gradient(lambda qkv: self_attention(qkv, "products"), qkv, weight)
    assert set(parts) == {1, 2}
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=3e-6)


@pytest.mark.core
def test_gradient_against_finite_differences():
    """In float64: the backward pass of "products" is written by hand."""
    with jax.enable_x64(True):
        draw = np.random.default_rng(0).standard_normal
        qkv, direction, weight = (
            jnp.asarray(draw(shape)) for shape in ((1, 5, 3, 2, 4), (1, 5, 3, 2, 4), (1, 5, 2, 4))
        )

        @jax.jit
        @jax.value_and_grad
        def loss(qkv):
            return jnp.sum(self_attention(qkv, "products") * weight)

        step = 1e-5
        difference = (loss(qkv + step * direction)[0] - loss(qkv - step * direction)[0]) / (2 * step)
        np.testing.assert_allclose(jnp.sum(loss(qkv)[1] * direction), difference, rtol=1e-8)


@pytest.mark.core
def test_constant_values_pass_unchanged_and_large_scores_do_not_overflow():
    qkv, _ = draw(17, scale=100.0)
    qkv = qkv.at[:, :, 2].set(3.0)
    for kind in ("products", "blocks", "xla"):
        np.testing.assert_allclose(jax.jit(self_attention, static_argnums=1)(qkv, kind), 3.0, rtol=1e-6)


@pytest.mark.core
@pytest.mark.parametrize("kind", ["products", "blocks", "xla"])
def test_bfloat16_is_finite_and_close(kind):
    qkv, weight = draw(17, jnp.bfloat16)
    value, gradient = value_and_gradient(lambda qkv: self_attention(qkv, kind), qkv, weight)
    assert value.dtype == gradient.dtype == jnp.bfloat16
    expected = value_and_gradient(plain, qkv.astype(jnp.float32), weight)
    for one, other in zip((value, gradient), expected, strict=True):
        assert bool(jnp.isfinite(one).all())
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.05)


@pytest.mark.core
def test_long_sequences_on_a_cpu_go_block_by_block():
    assert attention._choose(1024, jnp.float32, 64) == "products"
    assert attention._choose(1025, jnp.float32, 64) == "blocks"


@pytest.mark.core
@pytest.mark.parametrize(
    ("backend", "capability", "tokens", "dtype", "depth", "kind"),
    [
        ("gpu", "8.0", 5120, jnp.bfloat16, 64, "cudnn"),
        ("gpu", "8.0", 5120, jnp.bfloat16, 256, "blocks"),
        ("gpu", "9.0", 5120, jnp.bfloat16, 256, "cudnn"),
        ("gpu", "7.0", 640, jnp.float16, 64, "xla"),
        ("gpu", "gfx942", 640, jnp.bfloat16, 64, "xla"),
        ("gpu", "9.0", 5120, jnp.float32, 64, "blocks"),
        ("tpu", None, 640, jnp.bfloat16, 64, "xla"),
    ],
)
def test_an_accelerator_takes_what_it_has_for_depth_and_length(
    backend, capability, tokens, dtype, depth, kind, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert attention._choose(tokens, dtype, depth) == kind


@pytest.mark.accelerator
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tokens", [17, 1025])
def test_cudnn_agrees_with_xla(tokens):
    qkv, weight = draw(tokens, jnp.bfloat16)
    found = value_and_gradient(lambda qkv: self_attention(qkv, "cudnn"), qkv, weight)
    expected = value_and_gradient(plain, qkv.astype(jnp.float32), weight)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.05)
