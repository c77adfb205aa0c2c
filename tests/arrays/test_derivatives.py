"""A result that goes forward alone, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.derivatives import forward_only

pytestmark = pytest.mark.core


def halved(x):
    """x / 2 until it is below 1, and how often."""
    count, x = jax.lax.while_loop(lambda c: jnp.any(c[1] >= 1), lambda c: (c[0] + 1, c[1] / 2), (0, x))
    return forward_only((x, count), "halved: no reverse derivative, ask forward")


X = jnp.array([5.0, 0.5, 1.5])


def test_values_and_tangents_pass_under_every_transformation():
    (x, count), (tangent, _) = jax.jvp(lambda x: halved(x), (X,), (jnp.ones(3),))
    np.testing.assert_allclose([x, tangent], [X / 8, np.full(3, 0.125)])
    assert count == 3 and count.dtype == jnp.int32
    np.testing.assert_allclose(jax.jit(halved)(X)[0], X / 8)
    np.testing.assert_allclose(jax.vmap(halved)(X)[0], X / np.array([8, 1, 2]))
    np.testing.assert_allclose(jax.jit(jax.jacfwd(lambda x: halved(x)[0]))(X), np.eye(3) / 8)
    np.testing.assert_allclose(jax.vmap(jax.jacfwd(lambda x: halved(x)[0]))(X), 1 / np.array([8, 1, 2]))


@pytest.mark.parametrize(
    "around", [lambda f: f, jax.jit, jax.vmap, jax.checkpoint], ids=["bare", "jit", "vmap", "remat"]
)
def test_reverse_mode_says_why_not(around):
    with pytest.raises(TypeError, match="^halved: no reverse derivative, ask forward"):
        jax.grad(lambda x: around(halved)(x)[0].sum())(X)
    with pytest.raises(TypeError, match="ask forward"):
        around(jax.grad(lambda x: halved(x)[0].sum()))(X)
