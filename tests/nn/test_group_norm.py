"""Group normalisation: moments of groups, what the scale does, half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.nn.group_norm import GroupNorm
from jaxmed.nn.model import make_model

pytestmark = pytest.mark.core


def draw(shape):
    return 3 + 2 * jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("space", [(5, 4), (3, 4, 2)])
def test_neighbouring_channels_are_normalised_together(space):
    x, scale, bias = draw((2, *space, 6)), jnp.arange(1.0, 7.0), jnp.arange(6.0)
    found = make_model(GroupNorm(3)).apply({"scale": scale, "bias": bias}, x)
    expected = np.empty(x.shape)
    for image in range(2):
        for group in range(3):
            part = np.asarray(x[image, ..., 2 * group : 2 * group + 2], np.float64)
            expected[image, ..., 2 * group : 2 * group + 2] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    np.testing.assert_allclose(found, expected * scale + bias, atol=2e-5)


def test_a_large_mean_does_not_drown_the_spread():
    """Variance in one pass would lose it: 1000^2 has no digit left for 1e-2 in float32."""
    x = 1000 + 0.1 * draw((1, 8, 8, 4))
    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    found = make_model(GroupNorm(2)).apply(params, x)
    assert abs(float(found.std()) - 1) < 1e-2


def test_half_precision_is_normalised_in_float32_and_groups_must_divide():
    model = make_model(GroupNorm(2))
    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    found = model.apply(params, draw((1, 8, 8, 4)).astype(jnp.bfloat16))
    assert found.dtype == jnp.float32 and abs(float(found.mean())) < 1e-5
    with pytest.raises(ValueError, match="groups: expected a divisor of 5 channels, got 2"):
        model.init(jax.random.key(0), draw((1, 2, 2, 5)))
