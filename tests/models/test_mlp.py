"""The network of microstructure parameters: shape, widths, heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.mlp import Mlp, MlpConfig, Spread, layers, on_raw_inputs, to_unit
from jaxmed.nn.model import make_model

pytestmark = pytest.mark.core


@pytest.mark.parametrize(("width", "expected"), [(16, 16), ("M", 7)])
def test_layers_have_the_width_that_was_asked_for(key, width, expected):
    params = make_model(Mlp(MlpConfig(width=width), 3)).init(key, jnp.ones((1, 7)))
    shapes = [kernel.shape for kernel, _ in layers(params)]
    assert shapes == [(7, expected), (expected, expected), (expected, expected), (expected, 3)]


@pytest.mark.parametrize(("activation", "head"), [("elu", "sigmoid"), ("relu", "abs")])
def test_the_network_is_what_its_layers_say(key, activation, head):
    config = MlpConfig(depth=2, width=5, activation=activation, head=head)
    model = make_model(Mlp(config, 2))
    x = jax.random.normal(key, (11, 4))
    params = model.init(key, x)
    value = np.asarray(x, np.float64)
    *hidden, (kernel, bias) = layers(params)
    for matrix, offset in hidden:
        value = value @ matrix + offset
        value = np.where(value > 0, value, np.expm1(value) if activation == "elu" else 0)
    value = value @ kernel + bias
    value = 1 / (1 + np.exp(-value)) if head == "sigmoid" else np.abs(value)
    np.testing.assert_allclose(to_unit(config, model.apply(params, x)), value, atol=1e-6)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="depth: expected a whole number from 1 to 65,536, found 0"):
        MlpConfig(depth=0)
    with pytest.raises(ValueError, match="width: expected a whole number from 1 to 65,536, found 0"):
        MlpConfig(width=0)


def test_folding_the_spread_into_a_network_keeps_its_answer(key):
    model = make_model(Mlp(MlpConfig(width=24), 3))
    params = model.init(key, jnp.zeros((1, 20)))
    inputs = jax.random.uniform(key, (50, 20))
    spread = Spread(inputs.mean(0), inputs.std(0))
    expected = model.apply(params, (inputs - spread.centre) / spread.scale)
    np.testing.assert_allclose(model.apply(on_raw_inputs(params, spread), inputs), expected, atol=2e-5)
