"""Intensities to a range, and random windows of arrays, on the host. What is random takes the record's generator."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Shaped

from jaxmed.arrays.foreground import find_foreground
from jaxmed.errors import InputError


def window(image: Shaped[np.ndarray, "..."], low: float, high: float) -> Float32[np.ndarray, "..."]:
    """Map [low, high] to [0, 1] and clip what is beyond; for CT both are in HU."""
    scaled = np.subtract(image, np.float32(low), dtype=np.float32)
    scaled *= np.float32(1 / (high - low))
    return np.clip(scaled, 0, 1, out=scaled)


def percentile_range(
    image: Shaped[np.ndarray, "..."],
    low: float = 1.0,
    high: float = 99.0,
    mask: Bool[np.ndarray, "..."] | None = None,
    *,
    clip: bool = True,
) -> Float32[np.ndarray, "..."]:
    """Map the range between two percentiles to [0, 1].

    Args:
        image: Voxels; of a 4D volume each channel has its own range.
        low: In percent.
        high: In percent.
        mask: Voxels that count; by default the largest bright region (`arrays.foreground`), or all of a 2D image.
        clip: Whether values beyond the percentiles are clipped.

    Raises:
        InputError: When the percentiles coincide.
    """
    if image.ndim == 4:
        channels = (image[..., channel] for channel in range(image.shape[3]))
        return np.stack([percentile_range(channel, low, high, mask, clip=clip) for channel in channels], axis=-1)
    bottom, top = np.percentile(_counted(image, mask), (low, high))
    if not top > bottom:
        raise InputError("image", f"a spread between percentiles {low:g} and {high:g}", f"{bottom:g} for both")
    if clip:
        return window(image, bottom, top)
    return np.multiply(np.subtract(image, np.float32(bottom), dtype=np.float32), np.float32(1 / (top - bottom)))


def random_crop(
    fields: Mapping[str, Shaped[np.ndarray, "..."]],
    size: tuple[int, ...],
    generator: np.random.Generator,
    padding: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Cut the same random window out of several arrays; mapped arrays are read only there.

    Args:
        fields: Arrays of equal leading (spatial) axes, as many as `size` has; further axes are kept whole.
        size: Voxels along each spatial axis. An axis that is shorter is extended on both sides.
        generator: The record's.
        padding: Value of added voxels per field, 0 by default.

    Raises:
        InputError: When the arrays differ in shape.
    """
    shapes = {name: array.shape[: len(size)] for name, array in fields.items()}
    spatial = next(iter(shapes.values()))
    if len(set(shapes.values())) > 1 or len(spatial) != len(size):
        raise InputError("random_crop", f"arrays of one shape in {len(size)} axes", shapes)
    spare = [old - new for old, new in zip(spatial, size, strict=True)]
    start = [int(generator.integers(0, extra + 1)) if extra > 0 else 0 for extra in spare]
    inside = tuple(slice(first, first + new) for first, new in zip(start, size, strict=True))
    margins = [(max(0, -extra // 2), max(0, -extra - (-extra // 2))) for extra in spare]
    cut = {}
    for name, array in fields.items():
        part = np.array(array[inside])
        if any(map(any, margins)):
            rest = [(0, 0)] * (part.ndim - len(size))
            part = np.pad(part, margins + rest, constant_values=(padding or {}).get(name, 0))
        cut[name] = part
    return cut


def _counted(image: Shaped[np.ndarray, "..."], mask: Bool[np.ndarray, "..."] | None) -> Float[np.ndarray, " voxel"]:
    if mask is None and image.ndim == 3:
        mask = find_foreground(np.asarray(image, np.float32))
    values = np.asarray(image if mask is None else image[mask]).reshape(-1)
    if not values.size:
        raise InputError("image", "some foreground", "none", "give a mask, or check the image")
    return values.astype(np.float32, copy=False)
