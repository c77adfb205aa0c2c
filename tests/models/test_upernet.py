"""UPerNet: sizes of its maps, averages and interpolation by their formulas, both heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.convnext import ConvNextConfig
from jaxmed.models.upernet import UperNet, UperNetConfig, average_map, resize_map
from jaxmed.nn.model import make_model

pytestmark = pytest.mark.core

CONFIG = UperNetConfig(
    ConvNextConfig((16, 24), 2, (1, 1, 1), (4, 8, 8), stem=2, strides=(2, 1), kernel_size=3), 3, 6, 5, (1, 2)
)


def test_averages_are_those_of_windows_that_cover_the_map():
    found = np.random.default_rng(0).standard_normal((2, 7, 3, 4)).astype(np.float32)
    for count in (1, 2, 3, 6):
        expected = np.zeros((2, count, count, 4))
        for i in range(count):
            for j in range(count):
                rows = slice(i * 7 // count, -(-(i + 1) * 7 // count))
                columns = slice(j * 3 // count, -(-(j + 1) * 3 // count))
                expected[:, i, j] = found[:, rows, columns].mean((1, 2))
        np.testing.assert_allclose(average_map(jnp.asarray(found), count), expected, rtol=0, atol=1e-6)


def test_interpolation_is_linear_between_centres_and_keeps_what_has_the_size():
    ramp = jnp.asarray(np.arange(6.0, dtype=np.float32).reshape(1, 6, 1, 1))
    doubled = np.asarray(resize_map(ramp, (12, 3)))
    expected = np.clip((np.arange(12) + 0.5) / 2 - 0.5, 0, 5)
    np.testing.assert_allclose(doubled[0, :, :, 0], np.repeat(expected[:, None], 3, 1), atol=1e-6)
    np.testing.assert_array_equal(resize_map(ramp, (6, 1)), ramp)


def test_logits_of_every_voxel_and_of_the_auxiliary_head_in_training_alone():
    model, image = make_model(UperNet(CONFIG)), jax.random.normal(jax.random.key(1), (2, 16, 24, 2))
    params = jax.jit(lambda key: model.init(key, image[:1], training=True))(jax.random.key(0))
    assert set(params) == {"encoder", "hidden_norm", "decoder", "auxiliary"}
    run = jax.jit(model.apply, static_argnames="training")
    logits, none = run(params, image)
    assert logits.shape == (2, 16, 24, 3) and none is None and logits.dtype == jnp.float32
    again, auxiliary = run(params, image, training=True)
    np.testing.assert_allclose(again, logits, rtol=0, atol=1e-6)
    assert auxiliary.shape == logits.shape and np.std(np.asarray(auxiliary)) > 0
    # The maps of all stages reach the logits.
    gradient = jax.jit(jax.grad(lambda params: jnp.square(run(params, image)[0]).sum()))(params)
    assert all(np.abs(leaf).max() > 0 for name, leaf in gradient["hidden_norm"].items() for leaf in leaf.values())


def test_an_auxiliary_head_needs_a_third_stage():
    with pytest.raises(ValueError, match="auxiliary_width: expected 0"):
        UperNetConfig(ConvNextConfig((8, 8), 1, (1, 1), (4, 4), stem=2, strides=(2,)))
