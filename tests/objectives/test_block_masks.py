"""Block-wise masks: how many images and patches are hidden, and that they are those of the published algorithm."""

import math
import random

import jax
import numpy as np
import pytest

from jaxmed.objectives.block_masks import BlockMaskConfig, block_masks, most_hidden

pytestmark = pytest.mark.core
IMAGES, GRID = 32, (16, 16)


@pytest.fixture(scope="module")
def masks():
    """Masks of 20 batches, [batch, image, row, column]."""
    draw = jax.jit(jax.vmap(lambda key: block_masks(key, IMAGES, GRID)))
    return np.asarray(draw(jax.random.split(jax.random.key(0), 20))).reshape(20, IMAGES, *GRID)


def test_half_of_the_images_share_the_range_of_ratios(masks):
    counts = masks.sum(axis=(2, 3))
    assert ((counts > 0).sum(axis=1) == IMAGES // 2).all()
    # Image by image in rising order, none is above the end of its interval.
    ends = [int(256 * (0.1 + 0.4 * (rank + 1) / 16)) for rank in range(16)]
    assert (np.sort(counts, axis=1)[:, 16:] <= ends).all()
    assert counts.max() <= 128  # half of the grid
    assert 0.27 < counts[counts > 0].mean() / 256 < 0.3
    assert most_hidden(BlockMaskConfig(), IMAGES, 256) == sum(ends) >= counts.sum(axis=1).max()


def test_other_images_are_masked_in_other_steps(masks):
    is_masked = masks.any(axis=(2, 3))
    assert len(np.unique(is_masked, axis=0)) == 20
    assert (is_masked.mean(axis=0) > 0.05).all() and (is_masked.mean(axis=0) < 0.95).all()


def as_published(budget, generator):
    """The algorithm with Python's own random numbers."""
    mask = np.zeros(GRID, bool)
    while mask.sum() < budget:
        left, before = min(budget - mask.sum(), 128), mask.sum()
        for _ in range(10):
            area = generator.uniform(4, left)
            aspect = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if width < GRID[1] and height < GRID[0]:
                row, column = generator.randint(0, GRID[0] - height), generator.randint(0, GRID[1] - width)
                block = np.zeros(GRID, bool)
                block[row : row + height, column : column + width] = True
                if 0 < (block & ~mask).sum() <= left:
                    mask |= block
                    break
        if mask.sum() == before:
            break
    return mask


def borders(masks):
    """Neighbours of which one is hidden, per hidden patch: the less, the larger the blocks."""
    across = (masks[..., 1:, :] != masks[..., :-1, :]).sum() + (masks[..., 1:] != masks[..., :-1]).sum()
    return across / masks.sum()


def test_blocks_are_as_large_and_as_scattered_as_published(masks):
    generator, edges = random.Random(0), np.linspace(0.1, 0.5, 17)
    peer = np.stack(
        [
            as_published(int(256 * generator.uniform(*edges[rank : rank + 2])), generator)
            for _ in range(20)
            for rank in range(16)
        ]
    )
    ours = masks[masks.any(axis=(2, 3))]
    assert ours.shape == peer.shape
    np.testing.assert_allclose(ours.mean(), peer.mean(), rtol=0.01)
    np.testing.assert_allclose(borders(ours), borders(peer), rtol=0.06)
    # Where blocks lie: the middle is hidden more often than the corners.
    corners = (slice(None), [0, 0, -1, -1], [0, -1, 0, -1])
    for part in ((slice(None), slice(6, 10), slice(6, 10)), corners):
        np.testing.assert_allclose(ours[part].mean(), peer[part].mean(), atol=0.05)


def test_any_grid_and_share_will_do():
    wide = np.asarray(block_masks(jax.random.key(1), 6, (4, 7), BlockMaskConfig(images=1.0, ratio=(0.3, 0.5))))
    assert wide.shape == (6, 28) and (wide.sum(axis=1) <= 14).all() and (wide.sum(axis=1) > 0).all()
    none = block_masks(jax.random.key(1), 3, (4, 4), BlockMaskConfig(images=0.0))
    assert not np.asarray(none).any() and most_hidden(BlockMaskConfig(images=0.0), 3, 16) == 0
    same = block_masks(jax.random.key(1), 6, (4, 7), BlockMaskConfig(images=1.0, ratio=(0.3, 0.5)))
    np.testing.assert_array_equal(same, wide)
