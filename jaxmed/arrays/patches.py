"""Images cut into the patches that a vision transformer reads, and put together again."""

import math

from jaxtyping import Array, Float, Shaped


def patch_grid(space: tuple[int, ...], patch_size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the number of patches along each spatial axis.

    Raises:
        ValueError: When a patch does not fit a whole number of times.
    """
    if len(space) != len(patch_size) or any(size % patch for size, patch in zip(space, patch_size, strict=True)):
        raise ValueError(f"patch_size: expected {len(space)} sizes that divide the image {space}, got {patch_size}")
    return tuple(size // patch for size, patch in zip(space, patch_size, strict=True))


def patchify(image: Shaped[Array, "batch ..."], patch_size: tuple[int, ...]) -> Shaped[Array, "batch token voxel"]:
    """Cut images into non-overlapping patches, tokens in row-major order of the patch grid.

    Args:
        image: [batch, *space, channel].
        patch_size: Patch edge per spatial axis, in voxels.

    Returns:
        Per token the voxels in row-major order, channels fastest.

    Source: MAE, arXiv:2111.06377, released code (target layout ph, pw, C).
    """
    batch, *space, channels = image.shape
    grid = patch_grid(tuple(space), patch_size)
    axes = len(grid)
    split = [length for pair in zip(grid, patch_size, strict=True) for length in pair]
    order = (0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    patches = image.reshape(batch, *split, channels).transpose(order)
    return patches.reshape(batch, math.prod(grid), math.prod(patch_size) * channels)


def pool_patches(
    tokens: Float[Array, "batch token width"], grid: tuple[int, ...], factor: int
) -> Float[Array, "batch pooled width"]:
    """Average the tokens of neighbouring patches, in blocks of `factor` along every axis of the grid.

    Args:
        tokens: Of patches alone, in row-major order of the grid.
        grid: Patches along each spatial axis.
        factor: Edge of a block; divides the grid.

    Returns:
        Blocks in row-major order.

    Source: M3D, arXiv:2404.00578, released code: a volume's grid of 8 x 16 x 16 becomes 4 x 8 x 8 in blocks of 2.
    """
    coarse = patch_grid(grid, (factor,) * len(grid))
    split = [length for pair in zip(coarse, (factor,) * len(grid), strict=True) for length in pair]
    blocks = tokens.reshape(tokens.shape[0], *split, tokens.shape[2])
    pooled = blocks.mean(axis=tuple(range(2, 2 * len(grid) + 1, 2)))
    return pooled.reshape(tokens.shape[0], math.prod(coarse), tokens.shape[2])


def unpatchify(
    patches: Shaped[Array, "batch token voxel"], grid: tuple[int, ...], patch_size: tuple[int, ...]
) -> Shaped[Array, "batch ..."]:
    """Put the patches of `patchify` together again.

    Args:
        patches: As `patchify` returns them.
        grid: Patches along each spatial axis.
        patch_size: Patch edge per spatial axis, in voxels.

    Returns:
        [batch, *space, channel].
    """
    batch, axes = patches.shape[0], len(grid)
    channels = patches.shape[2] // math.prod(patch_size)
    order = (
        0,
        *(axis for pair in zip(range(1, axes + 1), range(axes + 1, 2 * axes + 1), strict=True) for axis in pair),
    )
    image = patches.reshape(batch, *grid, *patch_size, channels).transpose(*order, 2 * axes + 1)
    return image.reshape(batch, *(g * p for g, p in zip(grid, patch_size, strict=True)), channels)
