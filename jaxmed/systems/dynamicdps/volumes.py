"""A scan through an enhancement of slices or volumes: cut into tiles of the prior's size, refined, blended back."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32

from jaxmed.arrays.batches import map_rows
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import checked
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.windows import cut, paste, planes, tile
from jaxmed.systems.dynamicdps.enhancement import Program, Samples, draw_samples
from jaxmed.systems.dynamicdps.reading import MAX_INTENSITY


@dataclasses.dataclass(frozen=True)
@checked
class TilingConfig:
    """How images larger than the prior's are handled.

    Attributes:
        overlap: Share of a tile that its neighbour has too.
        least_head: Tiles with a smaller share of head are left as they are.
    """

    overlap: float = 0.5
    least_head: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1 or not 0 <= self.least_head < 1:
            raise ValueError(f"overlap, least_head: expected [0, 1) both, found {self.overlap:g}, {self.least_head:g}")


class Tiles(NamedTuple):
    """A volume in tiles.

    Attributes:
        measurement: Of the tiles that hold head, (tile, *size, 1).
        initial: The same of the estimate.
        kept: Which of all tiles those are.
        blend: All tiles to the volume they were cut from.
        all_initial: Estimate in all tiles.
    """

    measurement: Float32[np.ndarray, "tile ..."]
    initial: Float32[np.ndarray, "tile ..."]
    kept: Bool[np.ndarray, " all"]
    blend: Callable[[np.ndarray], np.ndarray]
    all_initial: Float32[np.ndarray, "all ..."]


def cut_tiles(
    measurement: Float32[np.ndarray, "x y z"],
    initial: Float32[np.ndarray, "x y z"],
    head: Bool[np.ndarray, "x y z"],
    preprocess: Preprocess,
    config: TilingConfig,
) -> Tiles:
    """Cut slices, or the volume, into tiles of the prior's size; what is smaller is extended by zeros.

    Args:
        measurement: In [0, 2], RAS+.
        initial: The estimate, on its grid.
        head: Where there is something to refine.
        preprocess: Size and axis of the prior's images.
        config: Overlap.
    """
    axis, size = preprocess.slice_axis, preprocess.size
    y, x, inside = (planes(volume, axis) for volume in (measurement, initial, head))
    windows = tile(len(y), y.shape[1:], size, config.overlap)
    kept = cut(inside, windows, size).reshape(len(windows), -1).mean(1) > config.least_head

    def blend(values: np.ndarray) -> np.ndarray:
        return paste(values[..., 0], windows, np.zeros(measurement.shape, np.float32), axis)

    all_initial = cut(x, windows, size)[..., None].astype(np.float32)
    first = cut(y, [window for window, keep in zip(windows, kept, strict=True) if keep], size) if kept.any() else y[:0]
    return Tiles(first[..., None].astype(np.float32), all_initial[kept], kept, blend, all_initial)


class Refined(NamedTuple):
    """A refined volume.

    Attributes:
        image: Mean of the samples, in [0, 2].
        uncertainty: Standard deviation of the samples.
        samples: Record of all tiles; None where no tile held any head.
    """

    image: Float32[np.ndarray, "x y z"]
    uncertainty: Float32[np.ndarray, "x y z"]
    samples: Samples | None


def refine(
    program: Program,
    params: Params,
    key: KeyArray,
    tiles: Tiles,
    num_samples: int,
    progress: Callable[[int], None] | None = None,
) -> Refined:
    """Refine the tiles of a volume and blend them.

    Tiles over one voxel are samples of their own: blending averages them, and the standard deviations too.
    """
    image, std = tiles.all_initial.copy(), np.zeros_like(tiles.all_initial)
    samples = None
    if tiles.kept.any():
        samples = draw_samples(program, params, key, tiles.measurement, tiles.initial, num_samples, progress)
        image[tiles.kept], std[tiles.kept] = samples.mean, samples.std
    return Refined(tiles.blend(image), tiles.blend(std), samples)


def apply_network(
    apply: Callable[..., Any], params: Params, tiles: Tiles, batch_size: int
) -> Float32[np.ndarray, "x y z"]:
    """Return the estimate of a conditional network, tile by tile; where no tile holds head, the measurement."""
    program = jax.jit(lambda params, x: jnp.clip(apply(params, x), 0.0, MAX_INTENSITY))
    images, measurement = tiles.all_initial.copy(), tiles.measurement
    if len(measurement):
        images[tiles.kept] = map_rows(lambda rows: program(params, measurement[rows]), len(measurement), batch_size)
    return tiles.blend(images)
