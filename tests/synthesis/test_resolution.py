"""Resolutions: recipes, buffers, borders, noise, the way back (BrainFM specification, checks 2 and 7)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from jaxmed.synthesis.control_grid import Photo
from jaxmed.synthesis.resolution import (
    SIGMA_PER_THICKNESS,
    Acquisition,
    ResolutionConfig,
    draw_acquisition,
    draw_photo,
    lower_resolution,
    restore_grid,
)

pytestmark = pytest.mark.core
KEYS = jax.random.split(jax.random.key(3), 4000)
RNG = np.random.default_rng(4)


def acquisitions(config=ResolutionConfig(), ndim=3):
    drawn = jax.jit(jax.vmap(lambda key: draw_acquisition(key, ndim, config)))(KEYS)
    return np.asarray(drawn.resolution), np.asarray(drawn.thickness)


def recipe(resolution):
    """Which of the four recipes it was: 1 mm, one thick axis, clinical stack, thick everywhere."""
    is_one = resolution == 1
    stack = (
        (resolution[:, 0] >= 1.3) & (resolution[:, 0] <= 1.7) & (resolution[:, 2] >= 4.8) & (resolution[:, 1] <= 1.7)
    )
    return np.select([is_one.all(1), is_one.sum(1) == 2, stack], [0, 1, 2], 3)


def test_each_recipe_has_a_quarter():
    resolution, thickness = acquisitions()
    kinds = recipe(resolution)
    counts = np.bincount(kinds, minlength=4)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    thick = kinds == 1
    axes = np.argmax(resolution[thick], 1)
    assert scipy.stats.chisquare(np.bincount(axes, minlength=3)).pvalue > 1e-3
    largest, slab = resolution[thick].max(1), thickness[thick].max(1)
    assert scipy.stats.kstest(largest, "uniform", (2.5, 6)).pvalue > 1e-3
    assert (slab <= largest).all() and slab.max() <= 6 and (slab[largest > 6] >= 4).all()
    np.testing.assert_array_equal(resolution[kinds >= 2], thickness[kinds >= 2])
    assert ((resolution[kinds == 3] >= 2) & (resolution[kinds == 3] <= 5)).all()


def test_low_resolution_only_leaves_out_the_fine_recipes():
    counts = np.bincount(recipe(acquisitions(ResolutionConfig(low_only=True))[0]), minlength=4)
    assert (counts[:2] == 0).all() and scipy.stats.chisquare(counts[2:]).pvalue > 1e-3


def test_fine_acquisitions_are_all_of_1_mm():
    resolution, thickness = acquisitions(ResolutionConfig(fine_only=True))
    assert (np.asarray(resolution) == 1).all() and (np.asarray(thickness) == 1).all()
    with pytest.raises(ValueError, match="fine_only: expected one of low_only and fine_only"):
        ResolutionConfig(low_only=True, fine_only=True)


def test_acquisitions_are_the_same_millimetres_on_a_coarser_grid():
    resolution, thickness = map(np.asarray, acquisitions())
    coarse, thin = map(np.asarray, acquisitions(ResolutionConfig(voxel=2.0)))
    np.testing.assert_allclose(coarse, np.maximum(resolution / 2, 1), rtol=1e-6)
    np.testing.assert_allclose(2 * thin, thickness, rtol=1e-6)
    config = ResolutionConfig(voxel=2.0)
    photos = jax.jit(jax.vmap(lambda key: draw_photo(key, config)))(KEYS)
    assert scipy.stats.kstest(np.asarray(photos.spacing), "uniform", (1.25, 5)).pvalue > 1e-3


def test_photographs_are_thin_slabs_far_apart():
    config = ResolutionConfig()
    photos = jax.jit(jax.vmap(lambda key: draw_photo(key, config)))(KEYS)
    is_on = np.asarray(photos.is_on)
    assert scipy.stats.binomtest(int(is_on.sum()), len(is_on), 0.2).pvalue > 1e-3
    assert scipy.stats.kstest(np.asarray(photos.spacing), "uniform", (2.5, 10)).pvalue > 1e-3
    photo = Photo(jnp.array(True), jnp.array(7.0))
    found = jax.jit(lambda key: draw_acquisition(key, 3, config, photo))(KEYS[0])
    np.testing.assert_allclose(found.resolution, [1, 7, 1])
    np.testing.assert_allclose(found.thickness, [1, 0.1, 1], rtol=1e-6)


def slow(image, resolution, thickness, width, border):
    """Blur and sample by scipy and loops, without noise."""
    size = [int(n / r) for n, r in zip(image.shape, resolution, strict=True)]
    sigma = [width * SIGMA_PER_THICKNESS * t if t > 1 else 0 for t in thickness]
    radius = [int(np.ceil(3 * s)) for s in sigma]
    blurred = scipy.ndimage.gaussian_filter(image.astype(np.float64), sigma, radius=radius, mode="constant")
    factors = [new / old for new, old in zip(size, image.shape, strict=True)]
    places = [(1 - f) / (2 * f) + np.arange(n) / f for f, n in zip(factors, size, strict=True)]
    grid = np.stack(np.meshgrid(*places, indexing="ij"))
    low = scipy.ndimage.map_coordinates(blurred, grid, order=1, mode="nearest")
    if border == "released":
        last = np.array(image.shape).reshape(-1, *([1] * image.ndim)) - 1
        low[~((grid > 0) & (grid <= last)).all(0)] = 0
    return low


@functools.cache
def lowered(border, shape, low=0.0, high=0.0):
    config = ResolutionConfig(noise_std=(low, high), border=border)

    @jax.jit
    def lower(key, image, resolution, thickness):
        found = lower_resolution(key, image, Acquisition(resolution, thickness), config)
        return found, restore_grid(found)

    return lower


@pytest.mark.parametrize("border", ["repeat", "released"])
@pytest.mark.parametrize(
    ("shape", "resolution", "thickness"),
    [((20, 24, 18), (1.0, 4.3, 1.0), (1.0, 4.0, 1.0)), ((33, 40), (2.3, 3.1), (2.3, 3.1))],
)
def test_low_resolution_equals_a_slow_version(shape, resolution, thickness, border):
    image = RNG.uniform(0, 200, shape).astype(np.float32)
    key = jax.random.key(5)
    width = 0.85 + 0.3 * float(jax.random.uniform(jax.random.split(key, 3)[0]))
    low, _ = lowered(border, shape)(key, image, jnp.array(resolution), jnp.array(thickness))
    expected = slow(image, resolution, thickness, width, border)
    np.testing.assert_array_equal(low.size, expected.shape)
    filled = tuple(slice(n) for n in expected.shape)
    np.testing.assert_allclose(low.image[filled], expected, atol=2e-3)
    rest = np.asarray(low.image).copy()
    rest[filled] = 0
    assert (rest == 0).all()


def test_one_millimetre_is_the_image_itself(key):
    image = RNG.uniform(0, 200, (20, 24, 18)).astype(np.float32)
    _, back = lowered("repeat", (20, 24, 18))(key, image, jnp.ones(3), jnp.ones(3))
    np.testing.assert_allclose(back, image, rtol=1e-5)


def test_constants_come_back_away_from_the_border(key):
    thick = jnp.array([3.0, 1.0])
    _, back = lowered("repeat", (33, 40))(key, jnp.full((33, 40), 80.0), thick, thick)
    np.testing.assert_allclose(back[8:-8, 8:-8], 80.0, rtol=1e-5)


def test_noise_has_its_deviation_at_low_resolution(key):
    thick = jnp.array([4.0, 1.0])
    image = jnp.full((60, 60), 400.0)
    lower = lowered("repeat", (60, 60), 5.0, 15.0)
    level = jax.jit(jax.vmap(lambda key: lower(key, image, thick, thick)[0].image[3:12, 8:-8].std()))
    found = np.asarray(level(jax.random.split(key, 300)))
    assert scipy.stats.kstest(found, "uniform", (5, 10)).pvalue > 1e-3


def test_impossible_ranges_are_refused():
    with pytest.raises(ValueError, match="photo_spacing: expected a range from 2.5 mm on"):
        ResolutionConfig(photo_spacing=(1.0, 5.0))
    with pytest.raises(ValueError, match="noise_std"):
        ResolutionConfig(noise_std=(2.0, 1.0))
