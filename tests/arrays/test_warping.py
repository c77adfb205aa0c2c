"""Sampling and displacement fields against scipy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jaxmed.arrays import warping

pytestmark = pytest.mark.core
RNG = np.random.default_rng(1)
VOLUME = RNG.normal(size=(7, 6, 5, 2)).astype(np.float32)
sample = jax.jit(warping.sample, static_argnames=("order", "includes_first"))
IMAGE = RNG.normal(size=(9, 8, 1)).astype(np.float32)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("image", [VOLUME, IMAGE], ids=["3d", "2d"])
def test_sampling_equals_scipy_at_random_places(image, order):
    sizes = image.shape[:-1]
    places = RNG.uniform(-2, np.array(sizes) + 1, (40, len(sizes))).astype(np.float32)
    found = sample(image, places, order=order)
    for channel in range(image.shape[-1]):
        expected = scipy.ndimage.map_coordinates(image[..., channel], places.T, order=order, mode="nearest")
        np.testing.assert_allclose(found[:, channel], expected, atol=1e-5)


def test_the_identity_grid_returns_the_image_and_whole_shifts_are_exact():
    grid = warping.identity_grid(VOLUME.shape[:-1])
    np.testing.assert_array_equal(sample(VOLUME, grid), VOLUME)
    shifted = sample(VOLUME, grid + jnp.array([2.0, -1.0, 0.0]), fill=0.0)
    np.testing.assert_array_equal(shifted[:-2, 1:], VOLUME[2:, :-1])
    assert (np.asarray(shifted[-2:]) == 0).all() and (np.asarray(shifted[:, 0]) == 0).all()


def test_the_released_rule_loses_first_planes_only():
    grid = warping.identity_grid(VOLUME.shape[:-1])
    found = np.asarray(sample(VOLUME, grid, fill=0.0, includes_first=False))
    np.testing.assert_array_equal(found[1:, 1:, 1:], VOLUME[1:, 1:, 1:])
    assert (found[0] == 0).all() and (found[:, 0] == 0).all() and (found[:, :, 0] == 0).all()


def test_labels_keep_their_type_and_fill_may_differ_by_channel():
    labels = jnp.arange(12, dtype=jnp.uint8).reshape(4, 3, 1)
    found = sample(labels, jnp.array([[0.5, 1.0], [1.5, 1.0], [9.0, 0.0]]), order=0, fill=None)
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found[:, 0], [1, 7, 9])  # halves go to the even row
    outside = sample(VOLUME, jnp.full((1, 3), -4.0), fill=jnp.array([3.0, 5.0]))
    np.testing.assert_array_equal(outside, [[3.0, 5.0]])


def test_gradient_in_the_coordinates_is_the_slope():
    ramp = (2 * jnp.arange(6.0)[:, None] - 3 * jnp.arange(5.0))[..., None]
    slope = jax.grad(lambda place: sample(ramp, place)[0])(jnp.array([2.3, 1.6]))
    np.testing.assert_allclose(slope, [2.0, -3.0], rtol=1e-6)


def test_a_linear_field_has_its_determinant_and_composes():
    matrix = jnp.array([[0.1, 0.02, 0.0], [0.0, -0.05, 0.03], [0.01, 0.0, 0.08]])
    grid = warping.identity_grid((8, 9, 7)) - 3.0
    field = grid @ matrix.T
    expected = np.linalg.det(np.eye(3) + np.asarray(matrix))
    np.testing.assert_allclose(jax.jit(warping.jacobian_determinant)(field), expected, rtol=1e-5)
    both = np.asarray(jax.jit(warping.compose)(field, field))[2:-2, 2:-2, 2:-2]
    square = np.asarray(grid @ ((jnp.eye(3) + matrix) @ (jnp.eye(3) + matrix) - jnp.eye(3)).T)
    np.testing.assert_allclose(both, square[2:-2, 2:-2, 2:-2], atol=1e-5)


def test_unfit_arguments_are_refused():
    with pytest.raises(ValueError, match="expected 3 spatial axes and one of channels"):
        sample(IMAGE, jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match="order: expected 0 or 1, found 3"):
        sample(IMAGE, jnp.zeros((4, 2)), order=3)


@pytest.mark.parametrize("shape", [(9, 8, 7), (11, 6)])
def test_a_small_displacement_composes_with_itself_as_by_looking_up(shape):
    field = jnp.asarray(np.random.default_rng(3).uniform(-1, 1, (*shape, len(shape))), jnp.float32)
    found = jax.jit(warping.compose_with_itself)(jnp.moveaxis(field, -1, 0))
    np.testing.assert_allclose(jnp.moveaxis(found, 0, -1), jax.jit(warping.compose)(field, field), atol=1e-5)
