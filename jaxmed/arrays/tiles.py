"""A volume cut into overlapping tiles, and tiles blended back into a volume.

Tiles stand on a regular lattice, the last one of each axis moved back to end with the volume. Their weights fall off
linearly towards the sides and are divided by their sum axis by axis, so that the weights of all tiles over a voxel sum
to 1: blending what was cut gives the volume back. Numbers of tiles and their places are fixed by shapes alone.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxmed.errors import InputError


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How to cut.

    Attributes:
        size: Voxels of a tile along each spatial axis; its length sets the dimensionality.
        overlap: Share of a tile that its neighbour has too, in [0, 1).
    """

    size: tuple[int, ...] = (160, 160, 160)
    overlap: float = 0.5

    def __post_init__(self) -> None:
        if not self.size or min(self.size) < 1:
            raise ValueError(f"size: expected voxels of 1 or more per axis, found {self.size}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap: expected a share from 0 up to below 1, found {self.overlap}")


def tile_starts(shape: tuple[int, ...], config: TileConfig) -> tuple[tuple[int, ...], ...]:
    """Return the first voxel of each tile, per axis.

    Raises:
        InputError: The volume is smaller than a tile, or has another number of axes.
    """
    if len(shape) != len(config.size) or any(n < size for n, size in zip(shape, config.size, strict=True)):
        raise InputError(
            "tiles", f"a volume of {config.size} voxels or more", f"{shape}", "pad it, or use smaller tiles"
        )
    starts = []
    for count, size in zip(shape, config.size, strict=True):
        step = max(1, round(size * (1 - config.overlap)))
        starts.append(tuple(dict.fromkeys([*range(0, count - size, step), count - size])))
    return tuple(starts)


def cut(volume: Float[Array, "*space channel"], config: TileConfig) -> Float[Array, "tile *size channel"]:
    """Cut a volume into tiles, the last axis running fastest."""
    corners = _corners(volume.shape[:-1], config)

    def tile(corner: Array) -> Array:
        return jax.lax.dynamic_slice(volume, [*corner, 0], (*config.size, volume.shape[-1]))

    return jax.vmap(tile)(jnp.array(corners))


def blend(
    tiles: Float[Array, "tile *size channel"], shape: tuple[int, ...], config: TileConfig
) -> Float[Array, "*space channel"]:
    """Blend tiles, in the order of `cut`, into a volume.

    Args:
        tiles: One result per tile; any number of channels.
        shape: Spatial shape of the volume.
        config: As it was cut.
    """
    corners = jnp.array(_corners(shape, config))
    weights = [jnp.asarray(table, tiles.dtype) for table in axis_weights(shape, config)]
    # Which row of each axis's table belongs to a tile.
    rows = jnp.array(list(itertools.product(*(range(len(table)) for table in weights))))

    def add(volume: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        tile, corner, row = part
        for axis, table in enumerate(weights):
            tile = tile * table[row[axis]].reshape([-1 if a == axis else 1 for a in range(tile.ndim)])
        place = [*corner, 0]
        old = jax.lax.dynamic_slice(volume, place, tile.shape)
        return jax.lax.dynamic_update_slice(volume, old + tile, place), None

    empty = jnp.zeros((*shape, tiles.shape[-1]), tiles.dtype)
    return jax.lax.scan(add, empty, (tiles, corners, rows))[0]


def map_tiles(
    function: Callable[[Float[Array, "batch *size channel"]], Float[Array, "batch *size new"]],
    volume: Float[Array, "*space channel"],
    config: TileConfig,
    batch_size: int = 1,
) -> Float[Array, "*space new"]:
    """Apply a function to a volume tile by tile, and blend.

    A volume smaller than a tile is first extended by its outer voxels, to either side alike, and cut back at the end.

    Args:
        function: From a batch of tiles to a batch of results of the same size.
        volume: What to work on.
        config: How to cut.
        batch_size: Tiles at once.
    """
    shape = volume.shape[:-1]
    missing = [max(size - n, 0) for n, size in zip(shape, config.size, strict=True)]
    widths = [(lack // 2, lack - lack // 2) for lack in missing]
    padded = jnp.pad(volume, [*widths, (0, 0)], mode="edge") if any(missing) else volume
    tiles = cut(padded, config)
    results = jax.lax.map(lambda tile: function(tile[None])[0], tiles, batch_size=min(batch_size, len(tiles)))
    blended = blend(results, padded.shape[:-1], config)
    return blended[tuple(slice(low, low + n) for (low, _), n in zip(widths, shape, strict=True))]


def axis_weights(shape: tuple[int, ...], config: TileConfig) -> list[Float64[np.ndarray, "tile size"]]:
    """Return the weight of each tile's voxels along each axis; those of the tiles over one voxel sum to 1."""
    tables = []
    for count, size, starts in zip(shape, config.size, tile_starts(shape, config), strict=True):
        # A triangle that is positive at the outermost voxels too: where one tile is alone it has all the weight.
        slope = np.minimum(np.arange(1, size + 1), np.arange(size, 0, -1)).astype(np.float64)
        total = np.zeros(count)
        for start in starts:
            total[start : start + size] += slope
        tables.append(np.stack([slope / total[start : start + size] for start in starts]))
    return tables


def _corners(shape: tuple[int, ...], config: TileConfig) -> list[tuple[int, ...]]:
    return list(itertools.product(*tile_starts(shape, config)))
