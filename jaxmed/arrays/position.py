"""Sine-cosine tables that tell a transformer where a token stands, and their resizing to another grid.

Tables are NumPy arrays of constants, made by the operations of the released code in its precision. Powers, sines and
cosines may still differ in their last bit between versions of NumPy and processors: by 1.2e-10 in entries of 1e-3.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32


def sincos_1d(width: int, positions: Float32[np.ndarray, " position"]) -> Float32[np.ndarray, "position width"]:
    """Return [sin(p omega), cos(p omega)] with omega_i = 10000^(-i / half), half = width // 2, in float32.

    An odd width has one more entry, sin(p / 10000).

    Source: TANGERINE, released code; for even widths Transformer, arXiv:1706.03762, section 3.5.
    """
    half = width // 2
    omega = np.arange(half, dtype=np.float32) / np.float32(half)
    omega = np.float32(1) / np.float32(10000) ** omega
    angles = positions[:, None] * omega[None, :]
    columns = [np.sin(angles), np.cos(angles)]
    if width % 2:
        columns.append(np.sin(positions[:, None] / np.float32(10000)))
    return np.concatenate(columns, axis=1)


def sincos_3d(width: int, grid: tuple[int, int, int], num_prefix: int = 1) -> Float32[np.ndarray, "token width"]:
    """Return the table of TANGERINE: token (d, h, w) has [code(d), code(h), code(w)].

    Args:
        width: Token width; thirds that do not come out even are given to the last codes.
        grid: Tokens along each axis.
        num_prefix: Rows of zeros before the grid's (class token).

    Source: TANGERINE, arXiv:2507.01881, released code.
    Deviation: for grids that are no cube the release scrambles positions by a reshape; here (d, h, w) keep their
        meaning. Cubes are equal, up to the last bit of each entry.
    """
    base, rest = divmod(width, 3)
    widths = (base, base + (rest > 1), base + (rest > 0))
    if base < 2:
        raise ValueError(f"width: expected 6 or more for a 3D table, got {width}")
    axes = np.meshgrid(*(np.arange(length, dtype=np.float32) for length in grid), indexing="ij")
    codes = [sincos_1d(part, axis.reshape(-1)) for part, axis in zip(widths, axes, strict=True)]
    table = np.concatenate(codes, axis=1)
    return np.concatenate([np.zeros((num_prefix, width), np.float32), table])


def sincos_2d(width: int, grid: tuple[int, int], num_prefix: int = 1) -> Float32[np.ndarray, "token width"]:
    """Return the table of MAE: token (y, x) has [code(x), code(y)], angles in float64.

    Args:
        width: Token width, divisible by 4.
        grid: Tokens along each axis.
        num_prefix: Rows of zeros before the grid's (class token).

    Source: MAE, arXiv:2111.06377, released code (the column comes first).
    """
    if width % 4:
        raise ValueError(f"width: expected a multiple of 4 for a 2D table, got {width}")
    quarter = width // 4
    omega = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
    rows, columns = np.meshgrid(*(np.arange(length, dtype=np.float64) for length in grid), indexing="ij")
    angles = [axis.reshape(-1)[:, None] * omega for axis in (columns, rows)]
    table = np.concatenate([function(angle) for angle in angles for function in (np.sin, np.cos)], axis=1)
    return np.concatenate([np.zeros((num_prefix, width)), table]).astype(np.float32)


def sincos(width: int, grid: tuple[int, ...], num_prefix: int = 1) -> Float32[np.ndarray, "token width"]:
    """Return the table for a grid of two or three axes."""
    if len(grid) == 2:
        return sincos_2d(width, grid, num_prefix)
    if len(grid) == 3:
        return sincos_3d(width, grid, num_prefix)
    raise ValueError(f"grid: expected 2 or 3 axes, got {grid}")


def resize_table(
    table: Float[Array, "token width"], old: tuple[int, ...], new: tuple[int, ...], num_prefix: int = 1
) -> Float[Array, "token2 width"]:
    """Interpolate a table to another grid, linearly along each axis; the prefix rows stay.

    Half-pixel centres and no smoothing, as PyTorch's `interpolate(mode="trilinear", align_corners=False)`.

    Raises:
        ValueError: When the table has not the rows that `old` says, or the grids differ in their number of axes.
    """
    rows = num_prefix + int(np.prod(old))
    if len(old) != len(new):
        raise ValueError(f"new: expected {len(old)} axes as in {old}, got {new}")
    if table.shape[0] != rows:
        raise ValueError(f"table: expected {rows} rows for a grid {old}, got {table.shape[0]}")
    if old == new:
        return table
    width = table.shape[1]
    grid = jnp.reshape(table[num_prefix:], (*old, width))
    resized = jax.image.resize(grid, (*new, width), "linear", antialias=False)
    return jnp.concatenate([table[:num_prefix], resized.reshape(-1, width)])
