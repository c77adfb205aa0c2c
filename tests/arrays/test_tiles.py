"""Tiles: weights that sum to 1, what was cut comes back, functions of tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.tiles import TileConfig, axis_weights, blend, cut, map_tiles, tile_starts
from jaxmed.errors import InputError

pytestmark = pytest.mark.core
jitted = jax.jit(map_tiles, static_argnums=(0, 2, 3))
RNG = np.random.default_rng(2)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("shape", [(16, 13, 9), (9, 8, 8), (8, 8, 31)])
def test_weights_are_an_exact_partition_of_unity(shape, overlap):
    config = TileConfig((8, 8, 8), overlap)
    for count, starts, table in zip(shape, tile_starts(shape, config), axis_weights(shape, config), strict=True):
        total = np.zeros(count)
        for start, row in zip(starts, table, strict=True):
            total[start : start + 8] += row
        np.testing.assert_allclose(total, 1.0, rtol=0, atol=1e-15)
        assert (table > 0).all() and starts[-1] + 8 == count and max(np.diff(starts), default=0) <= 8


@pytest.mark.parametrize(
    ("shape", "config"), [((16, 13, 9), TileConfig((8, 8, 8))), ((21, 17), TileConfig((8, 9), 0.3))]
)
def test_blending_what_was_cut_gives_the_volume(shape, config):
    volume = RNG.normal(size=(*shape, 2)).astype(np.float32)
    tiles, blended = jax.jit(lambda volume: (tiles := cut(volume, config), blend(tiles, shape, config)))(volume)
    np.testing.assert_allclose(blended, volume, atol=1e-6)
    first = tiles[0]
    np.testing.assert_array_equal(first, volume[tuple(slice(size) for size in config.size)])


def test_one_tile_is_the_function_itself():
    volume = jnp.asarray(RNG.normal(size=(8, 9, 1)).astype(np.float32))
    result = jitted(lambda batch: jnp.concatenate([batch**2, batch], -1), volume, TileConfig((8, 9)))
    np.testing.assert_allclose(result, np.concatenate([volume**2, volume], -1), rtol=1e-6)


def test_pointwise_functions_do_not_see_tiles_nor_batches():
    volume = jnp.asarray(RNG.normal(size=(20, 15, 1)).astype(np.float32))
    for batch_size in (1, 4):
        result = jitted(lambda batch: 3 * batch + 1, volume, TileConfig((8, 8)), batch_size)
        np.testing.assert_allclose(result, 3 * volume + 1, atol=1e-5)


def test_small_volumes_are_extended_and_cut_back():
    volume = jnp.asarray(RNG.normal(size=(5, 12, 1)).astype(np.float32))
    seen = []

    def function(batch):
        seen.append(batch.shape)
        return batch

    np.testing.assert_allclose(jitted(function, volume, TileConfig((8, 8))), volume, atol=1e-6)
    assert seen[0] == (1, 8, 8, 1)
    with pytest.raises(InputError, match="pad it, or use smaller tiles"):
        cut(volume, TileConfig((8, 8)))


def test_impossible_configurations_are_refused():
    with pytest.raises(ValueError, match="overlap: expected a share from 0 up to below 1, found 1.0"):
        TileConfig((8, 8), 1.0)
    with pytest.raises(ValueError, match="size: expected voxels of 1 or more per axis"):
        TileConfig((8, 0))
