"""The convolution that trains inside loops is the plain one, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.nn import loop_convolution
from jaxmed.nn.loop_convolution import LoopConvolution, convolve
from jaxmed.nn.model import make_model

pytestmark = pytest.mark.core


@pytest.mark.parametrize(("shape", "order"), [((5, 4, 3), "NHWC"), ((5, 3, 3, 2), "NXYZC")])
def test_value_and_gradients_are_xlas_own(shape, order, key, monkeypatch):
    # Slices of two images, and one left over.
    monkeypatch.setattr(loop_convolution, "SLICE", 2 * 3 ** (len(shape) - 1) * 2 * int(np.prod(shape[1:])))
    x = jax.random.normal(key, (*shape, 2))
    kernel = jax.random.normal(jax.random.key(1), (*(3,) * (len(shape) - 1), 2, 4))
    weight = jax.random.normal(jax.random.key(2), (*shape, 4))
    window = "HWIO" if len(shape) == 3 else "XYZIO"

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1,) * (len(shape) - 1), "SAME", dimension_numbers=(order, window, order)
        )

    def both(function):
        return jax.jit(jax.value_and_grad(lambda x, kernel: jnp.sum(weight * function(x, kernel)), argnums=(0, 1)))

    value, gradients = both(convolve)(x, kernel)
    expected, own = both(plain)(x, kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(gradients, own, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_module_adds_its_bias(key):
    model = make_model(LoopConvolution(3))
    x = jax.random.normal(key, (2, 4, 4, 2))
    params = model.init(key, x)
    moved = {**params, "bias": jnp.array([1.0, 2.0, 3.0])}
    np.testing.assert_allclose(
        model.apply(moved, x) - model.apply(params, x), np.broadcast_to([1, 2, 3], (2, 4, 4, 3)), atol=1e-5
    )
