"""Tables and angles that tell a transformer where a token stands, and the resizing of tables to another grid.

Tables are NumPy arrays of constants, made by the operations of the released code in its precision. Powers, sines and
cosines may still differ in their last bit between versions of NumPy and processors: by 1.2e-10 in entries of 1e-3.
"""

from typing import Any, Literal, TypeAlias

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


def sincos_3d_oblong(
    width: int, grid: tuple[int, int, int], layout: Literal["clean", "upstream"] = "clean", num_prefix: int = 1
) -> Float32[np.ndarray, "token width"]:
    """Return the table of ProFound: thirds of a row are [sin, cos] of three places, angles in float64.

    Args:
        width: Token width, divisible by 6.
        grid: Tokens along slices, rows and columns.
        layout: "clean" gives token (d, h, w) the codes of d, h and w. "upstream" is the released code's: it lays a grid
            whose first axis is the column over one whose first axis is the slice, so that each token has the place of
            another; on grids that are cubes rows and slices change places.
        num_prefix: Rows of zeros before the grid's (class token).

    Source: ProFound, arXiv:2603.03961, official code.
    """
    if width % 6:
        raise ValueError(f"width: expected a multiple of 6, got {width}")
    d, h, w = (np.arange(length, dtype=np.float64) for length in grid)
    places = np.meshgrid(d, h, w, indexing="ij") if layout == "clean" else np.meshgrid(d, w, h, indexing="xy")
    omega = 1.0 / 10000 ** (np.arange(width // 6, dtype=np.float64) / (width // 6))
    angles = [place.reshape(-1)[:, None] * omega for place in places]
    table = np.concatenate([function(angle) for angle in angles for function in (np.sin, np.cos)], axis=1)
    return np.concatenate([np.zeros((num_prefix, width)), table]).astype(np.float32)


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


def rotary_angles(
    depth: int, grid: tuple[int, ...], base: float = 100.0, stretch: float | Float[Array, ""] = 1.0
) -> Float[Any, "patch depth"]:
    """Return the angles of DINOv3's rotary positions, radians; features i and i + depth / 2 are a pair.

    Places are mapped to [-1, 1] along each axis by itself; the first half of the pairs turns with the row, the other
    with the column, with periods from 1 to nearly `base`.

    Args:
        depth: Of a head, divisible by 4.
        grid: Patches along rows and columns.
        base: Of the periods, base^(4 i / depth).
        stretch: Factor on the places: in training exp of a uniform number in [-log 2, log 2].

    Source: DINOv3, arXiv:2508.10104, released code.
    """
    quarter = depth // 4
    periods = base ** (np.arange(quarter, dtype=np.float32) / np.float32(quarter))
    axes = [2 * (np.arange(count, dtype=np.float32) + np.float32(0.5)) / count - 1 for count in grid]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    angles = (2 * np.pi * places[:, :, None] / periods).astype(np.float32).reshape(-1, 2 * quarter)
    return stretch * np.tile(angles, 2)


Interpolation: TypeAlias = Literal["linear", "size", "offset", "antialias"]


def resize_matrix(old: int, new: int, how: Interpolation) -> Float32[np.ndarray, "new old"]:
    """Return the weights of old places (across) in new ones (down); rows sum to 1.

    Args:
        old: Places.
        new: Places.
        how: "linear" between neighbours. The others are PyTorch's bicubic: "size" has half-pixel centres and repeats
            the border; "offset" stretches as if there were 0.1 new places more, as the released code of DINOv2 without
            registers does; "antialias" smooths as Pillow does, with registers and in timm.

    Source: `torch.nn.functional.interpolate`; Keys 1981 with a = -0.75, or -0.5 with antialiasing.
    """
    places = np.arange(new)[:, None] + 0.5
    if how == "antialias":
        ratio = old / new
        width = max(ratio, 1.0)
        distance = (np.arange(old)[None] + 0.5 - places * ratio) / width
        first, last = (np.trunc(np.maximum(places * ratio + side * 2 * width + 0.5, 0)) for side in (-1, 1))
        inside = (np.arange(old)[None] >= first) & (np.arange(old)[None] < last)
        weights = np.where(inside, keys_kernel(distance, -0.5), 0)
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    found = places * (old / (new + 0.1 * (how == "offset"))) - 0.5
    start, matrix = np.floor(found), np.zeros((new, old))
    for tap in range(-1, 3):
        place = start + tap
        distance = found - place
        weight = np.clip(1 - np.abs(distance), 0, None) if how == "linear" else keys_kernel(distance, -0.75)
        np.add.at(matrix, (np.arange(new)[:, None], np.clip(place, 0, old - 1).astype(int)), weight)
    return matrix.astype(np.float32)


def keys_kernel(x: Float[Any, "..."], a: float) -> Float[Any, "..."]:
    """Return the cubic convolution kernel of Keys 1981, of NumPy's arrays and of traced ones."""
    x = abs(x)
    inner = ((a + 2) * x - (a + 3)) * x**2 + 1
    outer = a * (((x - 5) * x + 8) * x - 4)
    return inner * (x <= 1) + outer * ((x > 1) & (x < 2))


def resize_table(
    table: Float[Array, "token width"],
    old: tuple[int, ...],
    new: tuple[int, ...],
    num_prefix: int = 1,
    how: Interpolation = "linear",
) -> Float[Array, "token2 width"]:
    """Interpolate a table to another grid, along each axis by itself; the prefix rows stay.

    "linear" is PyTorch's `interpolate(mode="trilinear", align_corners=False)`; see `resize_matrix` for the others.

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
    resized = jnp.reshape(table[num_prefix:], (*old, width))
    for axis, (length, wanted) in enumerate(zip(old, new, strict=True)):
        matrix = resize_matrix(length, wanted, how)
        resized = jnp.moveaxis(jnp.tensordot(matrix, resized, (1, axis), precision="highest"), 0, axis)
    return jnp.concatenate([table[:num_prefix], resized.reshape(-1, width)])
