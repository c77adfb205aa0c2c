"""Patches: what a token holds, in which order, and the way back."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.patches import patch_grid, patchify, pool_patches, unpatchify

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("space", "patch", "channels"), [((6, 8), (3, 2), 3), ((4, 6, 8), (2, 3, 4), 1), ((4, 4, 4), (2, 2, 2), 2)]
)
def test_unpatchify_inverts_patchify(space, patch, channels):
    image = np.random.default_rng(0).standard_normal((2, *space, channels)).astype(np.float32)
    patches = patchify(jnp.asarray(image), patch)
    grid = patch_grid(space, patch)
    assert patches.shape == (2, np.prod(grid), np.prod(patch) * channels)
    np.testing.assert_array_equal(unpatchify(patches, grid, patch), image)


def test_tokens_are_row_major_and_channels_fastest():
    image = np.random.default_rng(0).standard_normal((2, 4, 6, 8, 2)).astype(np.float32)
    patches = patchify(jnp.asarray(image), (2, 3, 4))
    # Grid 2 x 2 x 2: token (1, 0, 1) is number 5; its voxel (1, 2, 3), channel 1.
    np.testing.assert_array_equal(patches[:, 5], image[:, 2:4, 0:3, 4:8].reshape(2, -1))
    assert patches[1, 5, ((1 * 3 + 2) * 4 + 3) * 2 + 1] == image[1, 3, 2, 7, 1]


def test_patches_of_an_image():
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    assert patchify(image, (2, 2))[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(("space", "patch"), [((6, 8), (4, 2)), ((8, 8, 8), (4, 4))])
def test_a_patch_that_does_not_fit_is_refused(space, patch):
    with pytest.raises(ValueError, match="patch_size: expected"):
        patch_grid(space, patch)


def test_m3ds_tokens_are_pooled_in_row_major_order():
    """2048 tokens of a volume become 256: of an index ramp every block has its own mean."""
    grid = (8, 16, 16)
    ramp = np.arange(2048, dtype=np.float32).reshape(1, 2048, 1)
    found = np.asarray(pool_patches(jnp.asarray(np.repeat(ramp, 2, axis=0)), grid, 2))
    assert found.shape == (2, 256, 1)
    depth, height, width = np.unravel_index(np.arange(256), (4, 8, 8))
    # The mean of a block is that of its first and last token: half a step along every axis.
    expected = (2 * depth + 0.5) * 256 + (2 * height + 0.5) * 16 + 2 * width + 0.5
    np.testing.assert_allclose(found[0, :, 0], expected, rtol=1e-6)
    np.testing.assert_array_equal(pool_patches(jnp.asarray(ramp), grid, 1), ramp)
    with pytest.raises(ValueError, match="sizes that divide"):
        pool_patches(jnp.asarray(ramp), grid, 3)
