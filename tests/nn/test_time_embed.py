"""Times as vectors: the order and the frequencies of the published code."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.nn.model import make_model
from jaxmed.nn.time_embed import TimeEmbed, sinusoids

pytestmark = pytest.mark.core


@pytest.mark.parametrize("width", [8, 7])
def test_cosines_come_before_sines_and_odd_widths_end_in_zero(width):
    times, half = (0, 3, 999, 12.5), width // 2
    expected = np.zeros((4, width))
    for row, time in enumerate(times):
        for k in range(half):
            angle = time * math.exp(-math.log(10_000) * k / half)
            expected[row, k], expected[row, half + k] = math.cos(angle), math.sin(angle)
    np.testing.assert_allclose(sinusoids(jnp.asarray(times), width), expected, atol=1e-4)
    np.testing.assert_allclose(sinusoids(jnp.asarray(times[:2]), width), expected[:2], atol=1e-6)


def test_whole_steps_and_the_same_number_in_floating_point_are_one():
    np.testing.assert_array_equal(sinusoids(jnp.array([5, 7]), 6), sinusoids(jnp.array([5.0, 7.0]), 6))


def test_the_network_is_linear_silu_linear_on_the_sinusoids():
    model, times = make_model(TimeEmbed(6, 10)), jnp.array([0.0, 41.0])
    params = jax.jit(model.init)(jax.random.key(0), times)
    params["fc1"]["bias"] = jnp.arange(10.0)
    hidden = sinusoids(times, 6) @ params["fc1"]["kernel"] + params["fc1"]["bias"]
    expected = (hidden / (1 + jnp.exp(-hidden))) @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    np.testing.assert_allclose(model.apply(params, times), expected, rtol=1e-5)
