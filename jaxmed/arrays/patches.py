"""Images cut into the patches that a vision transformer reads, and put together again."""

import math

from jaxtyping import Array, Shaped


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
