"""Bias fields: moments, smoothness, mild and severe (BrainFM specification, checks 7 and 8)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.synthesis.bias_field import MILD, SEVERE, BiasFieldConfig, apply_bias, draw_log_bias
from jaxmed.synthesis.control_grid import Photo

pytestmark = pytest.mark.core
SHAPE = (100, 90)
KEYS = jax.random.split(jax.random.key(1), 400)


def fields(config):
    return np.asarray(jax.jit(jax.vmap(lambda key: draw_log_bias(key, SHAPE, config)))(KEYS))


def test_log_fields_have_no_mean_and_at_most_the_drawn_spread():
    found = fields(BiasFieldConfig(std=(0.4, 0.4)))
    means = found.mean((1, 2))
    assert abs(means.mean()) < 4 * means.std() / np.sqrt(len(means))
    assert 0.2 < found.std() < 0.4
    # Outer samples are control values themselves.
    assert found[:, 0, 0].std() == pytest.approx(0.4, rel=0.1)


def test_fields_are_lines_between_control_points():
    """At most four control points along 100 voxels: a second difference at four places, nothing faster."""
    found = fields(BiasFieldConfig(control_scale=(0.04, 0.04)))
    curvature = np.abs(np.diff(found[:, :, 45], 2, axis=1)) > 1e-4
    assert 1 <= curvature.any(1).mean() and curvature.sum(1).max() <= 2 * 4
    spectrum = np.abs(np.fft.rfft(np.concatenate([found[:, :, 45], found[:, ::-1, 45]], 1), axis=1)) ** 2
    # Control points 25 voxels apart: their Nyquist rate is 4 periods in the 200 voxels of the mirrored line.
    assert spectrum[:, 1:5].sum() / spectrum[:, 1:].sum() > 0.95


def test_mild_fields_are_weaker_than_severe_ones():
    mild, severe = fields(MILD), fields(SEVERE)
    assert mild.std() < 0.1 * severe.std()
    # Severe: the spread is even on [0.1, 0.6], so control values have the root mean square of that.
    assert severe[:, 0, 0].std() == pytest.approx(np.sqrt((0.6**3 - 0.1**3) / (3 * 0.5)), rel=0.1)


def test_no_spread_leaves_the_image_and_3d_slabs_get_their_own_gain(key):
    flat = jnp.asarray(fields(BiasFieldConfig(std=(0.0, 0.0)))[0])
    image = jnp.ones(SHAPE)
    np.testing.assert_array_equal(apply_bias(image, flat), image)
    photo = Photo(jnp.array(True), jnp.array(5.0))
    field = jax.jit(lambda key: draw_log_bias(key, (24, 30, 20), SEVERE, photo))(key)
    assert field.shape == (24, 30, 20)
    assert (np.abs(np.diff(np.asarray(field)[12, :, 10], 2)) > 1e-4).sum() > 2


def test_impossible_ranges_are_refused():
    with pytest.raises(ValueError, match="std: expected a range in order"):
        BiasFieldConfig(std=(0.5, 0.1))
