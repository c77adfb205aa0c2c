"""Variants of labelled images: masks follow shapes, noise stays on images, and nothing happens unasked."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.data.augment import AS_THEY_ARE, make_variants

TURNED = dataclasses.replace(
    AS_THEY_ARE, affine_probability=1.0, rotation=30.0, shear=0.1, scale=(0.9, 1.1), stretch=1.0
)


def noisy(sigma):
    return dataclasses.replace(AS_THEY_ARE, noise_probability=1.0, noise_sigma=(sigma, sigma))


@pytest.fixture
def bars():
    masks = np.zeros((6, 16, 16), np.float32)
    masks[:, 4:12, 6:9] = 1
    return jnp.asarray(0.8 * masks), jnp.asarray(masks)


def test_the_default_changes_nothing(key, bars):
    images, masks = make_variants(key, AS_THEY_ARE, *bars)
    np.testing.assert_array_equal(images, bars[0])
    np.testing.assert_array_equal(masks, bars[1])


def test_masks_follow_their_images_each_in_its_own_way(key, bars):
    images, masks = make_variants(key, TURNED, *bars)
    # The mask is where the image is above half of its height, so it stays so.
    np.testing.assert_array_equal(masks, images > 0.4)
    assert set(np.unique(masks)) == {0.0, 1.0}
    assert len({array.tobytes() for array in np.asarray(masks)}) == len(masks)


def test_moves_and_mirrors_keep_every_value(key, bars):
    # A block that is not symmetric, far from the edges.
    images = jnp.zeros((32, 16, 16)).at[:, 5:9, 6:8].set(0.5).at[:, 5, 6].set(1.0)
    moved, masks = make_variants(
        key, dataclasses.replace(AS_THEY_ARE, shift=3, flip_axes=(0, 1)), images, (images > 0) * 1.0
    )
    np.testing.assert_array_equal(masks, moved > 0)
    np.testing.assert_allclose(moved.sum((1, 2)), images.sum((1, 2)), rtol=1e-6)
    corners = np.argwhere(np.asarray(moved) == 1.0)
    assert len(corners) == 32 and np.array_equal(np.unique(corners[:, 0]), np.arange(32))
    # Mirrored or not, the corner lies within 3 voxels of where it was.
    places = corners[:, 1:]
    reach = np.stack([[2, 8], [3, 9]]), np.stack([[7, 13], [6, 12]])
    inside = [((places >= box[:, 0]) & (places <= box[:, 1])) for box in reach]
    assert np.all(inside[0] | inside[1]) and len({tuple(place) for place in places}) > 16


def test_noise_is_on_images_alone_and_of_the_size_asked_for(key, bars):
    gray = jnp.full((64, 16, 16), 0.5)
    images, masks = make_variants(key, noisy(0.1), gray, jnp.ones_like(gray))
    assert abs(float(images.std()) - 0.1) < 0.002 and abs(float(images.mean()) - 0.5) < 0.002
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    np.testing.assert_array_equal(masks, 1.0)
