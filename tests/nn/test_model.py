"""A module as two pure functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.nn.model import make_model

pytestmark = pytest.mark.core


class Affine(nn.Module):
    @nn.compact
    def __call__(self, x, *, negate=False):
        y = x * self.param("scale", nn.initializers.ones, ()) + self.param("shift", nn.initializers.zeros, (2,))
        return -y if negate else y


def test_parameters_are_a_plain_dict_and_apply_is_a_function_of_them():
    model = make_model(Affine())
    params = model.init(jax.random.key(0), jnp.ones(2))
    assert type(params) is dict and set(params) == {"scale", "shift"}
    params = {"scale": jnp.float32(2.0), "shift": jnp.array([1.0, -1.0])}
    np.testing.assert_array_equal(model.apply(params, jnp.ones(2)), [3.0, 1.0])
    np.testing.assert_array_equal(model.apply(params, jnp.ones(2), negate=True), [-3.0, -1.0])
    gradient = jax.grad(lambda params: model.apply(params, jnp.ones(2)).sum())(params)
    np.testing.assert_array_equal(gradient["scale"], 2.0)
