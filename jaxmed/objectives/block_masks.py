"""Block-wise masks: rectangles of patches that a student does not see and has to guess.

Source: BEiT, arXiv:2106.08254, algorithm 1; iBOT, arXiv:2111.07832; drawn as in DINOv2's official code, on the device.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.config import Count, Fraction, Share, ShareRange, checked


@dataclasses.dataclass(frozen=True)
@checked
class BlockMaskConfig:
    """Which patches are hidden.

    Attributes:
        images: Share of the images of which any are hidden.
        ratio: Least and largest share of an image's patches that may be hidden. The images share this range between
            them in equal intervals, one each.
        smallest: Patches of a block, at least, unless fewer may still be hidden.
        largest: Share of the grid that one block may cover.
        aspect: Height over width of a block, at least; at most one over it.
        tries: Blocks drawn without success before an image is left with what it has.
    """

    images: Share = 0.5
    ratio: ShareRange = (0.1, 0.5)
    smallest: Count = 4
    largest: Fraction = 0.5
    aspect: Fraction = 0.3
    tries: Count = 10


def most_hidden(config: BlockMaskConfig, num_images: int, num_patches: int) -> int:
    """Return how many patches of a batch can be hidden at most: the largest of every image's interval."""
    return sum(_limits(config, num_images, num_patches))


def block_masks(
    key: KeyArray, num_images: int, grid: tuple[int, int], config: BlockMaskConfig = BlockMaskConfig()
) -> Bool[Array, "image patch"]:
    """Draw the masks of a batch, True where a patch is hidden.

    Args:
        key: Consumed.
        num_images: Images of the batch; which of them are masked, and how much each, is drawn too.
        grid: Patches along rows and columns.
        config: See there.
    """
    order_key, ratio_key, block_key = jax.random.split(key, 3)
    num_patches, (low, high) = math.prod(grid), config.ratio
    limits = _limits(config, num_images, num_patches)
    rank = jax.random.permutation(order_key, num_images)
    place = (rank + jax.random.uniform(ratio_key, (num_images,))) / max(int(num_images * config.images), 1)
    budget = (num_patches * (low + (high - low) * place)).astype(jnp.int32)
    budget = jnp.minimum(budget, jnp.asarray(limits)[rank])
    keys = jax.random.split(block_key, num_images)
    masks = jax.vmap(lambda key, budget: _hide(key, budget, grid, config))(keys, budget)
    return masks.reshape(num_images, num_patches)


def _limits(config: BlockMaskConfig, num_images: int, num_patches: int) -> list[int]:
    """Return the most patches that may be hidden at each place of the order: ends of equal intervals, then 0."""
    count, (low, high) = int(num_images * config.images), config.ratio
    limits = [int(num_patches * (low + (high - low) * (rank + 1) / count)) for rank in range(count)]
    return limits + [0] * (num_images - count)


def _hide(key: KeyArray, budget: Int[Array, ""], grid: tuple[int, int], config: BlockMaskConfig) -> Array:
    """Add blocks until as many patches are hidden as may be, or none fits any more."""
    rows, columns = grid
    largest = config.largest * rows * columns

    def is_unfinished(state: tuple[Array, Array, Array]) -> Array:
        mask, failures, _ = state
        return (mask.sum() < budget) & (failures < config.tries)

    def add(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mask, failures, number = state
        left = jnp.minimum(budget - mask.sum(), largest)
        numbers: Float[Array, " 4"] = jax.random.uniform(jax.random.fold_in(key, number), (4,))
        area = config.smallest + numbers[0] * (left - config.smallest)
        aspect = config.aspect ** (1 - 2 * numbers[1])
        height = jnp.round(jnp.sqrt(area * aspect))
        width = jnp.round(jnp.sqrt(area / aspect))
        first_row = jnp.floor(numbers[2] * (rows - height + 1))
        first_column = jnp.floor(numbers[3] * (columns - width + 1))
        row, column = jnp.arange(rows)[:, None], jnp.arange(columns)[None]
        block = (row >= first_row) & (row < first_row + height)
        block &= (column >= first_column) & (column < first_column + width)
        gained = (block & ~mask).sum()
        fits = (height < rows) & (width < columns) & (gained > 0) & (gained <= left)
        return jnp.where(fits, mask | block, mask), jnp.where(fits, 0, failures + 1), number + 1

    start = (jnp.zeros(grid, bool), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(is_unfinished, add, start)[0]
