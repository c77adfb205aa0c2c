"""Filters against scipy, and what each must keep: constants, ramps, sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jaxmed.arrays import filters

pytestmark = pytest.mark.core
RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(14, 11)).astype(np.float32)
VOLUME = RNG.normal(size=(9, 8, 7)).astype(np.float32)
blur = jax.jit(filters.gaussian_blur, static_argnames=("radius", "axes", "mode"))
difference = jax.jit(filters.finite_difference, static_argnames=("axis", "kind"))
sobel = jax.jit(filters.sobel)
magnitude = jax.jit(filters.sobel_magnitude, static_argnames="mode")
zoom = jax.jit(filters.zoom, static_argnames=("shape", "axes"))
SCIPY_MODES = {"zero": "constant", "reflect": "mirror", "edge": "nearest"}


@pytest.mark.parametrize("mode", SCIPY_MODES)
def test_blur_equals_scipy_in_2d_and_3d(mode):
    for image in (IMAGE, VOLUME):
        found = blur(image, 1.3, 4, mode=mode)
        expected = scipy.ndimage.gaussian_filter(image.astype(np.float64), 1.3, radius=4, mode=SCIPY_MODES[mode])
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("mode", SCIPY_MODES)
def test_the_matrix_is_the_blur(mode):
    matrix = jax.jit(lambda sigma: filters.blur_matrix(14, sigma, 5, mode))(1.7)
    expected = blur(IMAGE, 1.7, 5, axes=(0,), mode=mode)
    np.testing.assert_allclose(filters.along(matrix, jnp.asarray(IMAGE), 0), expected, atol=1e-6)


def test_blur_of_no_width_is_the_identity_and_its_width_has_a_gradient():
    def loss(sigma):
        blurred = filters.gaussian_blur(jnp.asarray(IMAGE), sigma, 6, mode="reflect")
        return (blurred**2).sum(), blurred

    slope = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def exact(sigma):
        blurred = scipy.ndimage.gaussian_filter(IMAGE.astype(np.float64), sigma, radius=6, mode="mirror")
        return (blurred**2).sum()

    (_, blurred), at_zero = slope(0.0)
    np.testing.assert_array_equal(blurred, IMAGE)
    assert at_zero == 0
    assert slope(1.1)[1] == pytest.approx((exact(1.1 + 1e-4) - exact(1.1 - 1e-4)) / 2e-4, rel=1e-5)


def test_a_width_per_axis_blurs_along_its_axis_only():
    found = blur(VOLUME, (0.0, 2.0, 0.0), 4)
    expected = scipy.ndimage.gaussian_filter1d(VOLUME.astype(np.float64), 2.0, axis=1, radius=4, mode="nearest")
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_cutoff_drops_the_taps_beyond_it():
    weights = np.asarray(filters.gaussian_weights(0.5, 4, cutoff=3.0))
    short = np.asarray(filters.gaussian_weights(0.5, 2))
    np.testing.assert_array_equal(weights[[0, 1, 7, 8]], 0)
    np.testing.assert_allclose(weights[2:7], short, rtol=1e-6)


@pytest.mark.parametrize("image", [IMAGE, VOLUME], ids=["2d", "3d"])
def test_sobel_equals_scipy_with_zeros_around(image):
    found = sobel(image)
    for axis in range(image.ndim):
        expected = scipy.ndimage.sobel(image.astype(np.float64), axis=axis, mode="constant")
        np.testing.assert_allclose(found[axis], expected, atol=1e-5)
    np.testing.assert_allclose(magnitude(image), np.sqrt((np.asarray(found) ** 2).sum(0) + 1e-7), rtol=1e-6)


def test_sobel_magnitude_has_a_gradient_in_flat_images():
    slope = jax.jit(jax.grad(lambda image: magnitude(image, mode="edge").sum()))(jnp.ones((6, 6)))
    np.testing.assert_array_equal(slope, 0)


def test_differences_of_a_ramp_are_its_slope():
    ramp = jnp.arange(6.0)[:, None] * 3 + jnp.zeros(4)
    np.testing.assert_array_equal(difference(ramp, 0, "central"), 3)
    forward, backward = (np.asarray(difference(ramp, 0, kind)) for kind in ("forward", "backward"))
    assert (forward[:-1] == 3).all() and (forward[-1] == 0).all()
    assert (backward[1:] == 3).all() and (backward[0] == 0).all()
    np.testing.assert_allclose(difference(jnp.asarray(VOLUME), 2, "central"), np.gradient(VOLUME, axis=2), atol=1e-6)


def slow_zoom(line, new):
    factor = new / len(line)
    result = np.empty(new)
    for k in range(new):
        place = min(max((1 - factor) / (2 * factor) + k / factor, 0), len(line) - 1)
        low = int(np.floor(place))
        high = min(low + 1, len(line) - 1)
        result[k] = line[low] + (place - low) * (line[high] - line[low])
    return result


@pytest.mark.parametrize("new", [3, 11, 14, 29])
def test_zoom_equals_a_slow_loop(new):
    found = zoom(IMAGE, (new,), axes=(0,))
    expected = np.stack([slow_zoom(IMAGE[:, column].astype(np.float64), new) for column in range(11)], 1)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_zoom_keeps_constants_and_ramps():
    np.testing.assert_allclose(zoom(jnp.full((5, 4, 3), 2.5), (9, 4, 7)), 2.5, rtol=1e-6)
    ramp = zoom(jnp.arange(8.0), (24,))
    np.testing.assert_allclose(np.diff(np.asarray(ramp)[2:-2]), 1 / 3, atol=1e-6)
    np.testing.assert_array_equal(zoom(IMAGE, (14, 11)), IMAGE)


def test_downsample_keeps_the_mean_and_refuses_broken_blocks():
    blocks = filters.downsample(jnp.arange(24.0).reshape(4, 6), 2)
    np.testing.assert_array_equal(blocks, [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]])
    with pytest.raises(ValueError, match="expected a multiple of 3 samples along axis 0, found 4"):
        filters.downsample(jnp.ones((4, 6)), 3)


def test_filters_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="expected more than 9 samples along axis 2, found 7"):
        filters.gaussian_blur(jnp.asarray(VOLUME), 3.0, 9, axes=(2,), mode="reflect")
    with pytest.raises(ValueError, match="expected an odd number of taps, found 4"):
        filters.correlate(jnp.asarray(IMAGE), jnp.ones(4), 0)


def test_matrices_along_all_axes_are_those_along_each():
    rng = np.random.default_rng(5)
    image = jnp.asarray(rng.normal(size=(5, 6, 4, 2)), jnp.float32)
    matrices = [jnp.asarray(rng.normal(size=(new, old)), jnp.float32) for new, old in ((3, 5), (7, 6), (4, 4))]
    expected = image
    for axis, matrix in enumerate(matrices):
        expected = filters.along(matrix, expected, axis)
    np.testing.assert_allclose(jax.jit(filters.along_all)(matrices, image), expected, atol=1e-4)
