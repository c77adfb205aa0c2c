"""Windows of a network's size: where they stand on slices or volumes, how they are cut, and pasted back; on the host.

An image is a slice across an axis, or a volume; what lies beyond it shows as 0. Windows that overlap are averaged on
the way back, by weights that fall off linearly from the middle of a window and are positive at its sides: pasting what
was cut gives the image back.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Shaped

from jaxmed.config import Decay, checked
from jaxmed.errors import InputError


class Window(NamedTuple):
    """Where an image of the network's size is cut.

    Attributes:
        item: Number of the slice, of the picture of a stack, or of the volume.
        starts: Voxel at the window's first, along each of its axes; negative where the image is extended.
    """

    item: int
    starts: tuple[int, ...]


def planes(array: Shaped[np.ndarray, "..."], axis: int | None) -> Shaped[np.ndarray, "item ..."]:
    """Return every slice across an axis, or the volume itself, along a new first axis; a view."""
    return array[None] if axis is None else np.moveaxis(array, axis, 0)


def middle_of(mask: Bool[np.ndarray, "..."]) -> tuple[int, ...]:
    """Return the voxel in the middle of the box around a mask that is not empty."""
    return tuple(int(found.min() + found.max() + 1) // 2 for found in np.nonzero(mask))


def place(
    lengths: Sequence[int], size: Sequence[int], center: Sequence[int] | None = None, *, follow: bool = False
) -> tuple[int, ...]:
    """Return the first voxel of a window along each axis.

    A window stays inside of an axis that is long enough.

    Args:
        lengths: Of the image.
        size: Of the window.
        center: What is to be in the middle of the window; by default the middle of the image.
        follow: Whether a window that is longer than the image follows the centre too, as far as it shows all of the
            image; it stands about the image's own middle otherwise.
    """
    starts = []
    for axis, (length, count) in enumerate(zip(lengths, size, strict=True)):
        spare = length - count
        if center is None or (spare <= 0 and not follow):
            starts.append(spare // 2 if spare > 0 else -(-spare // 2))
        else:
            starts.append(min(max(center[axis] - count // 2, min(0, spare)), max(0, spare)))
    return tuple(starts)


def tile(num_items: int, lengths: Sequence[int], size: Sequence[int], overlap: float = 0.5) -> tuple[Window, ...]:
    """Return windows that cover every image: a regular lattice, its last one moved back to end with the image.

    Args:
        num_items: Number of images.
        lengths: Of an image; an axis that is shorter than a window is covered by one about its middle.
        size: Of a window.
        overlap: Share of a window that its neighbour has too, in [0, 1).
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap: expected a share from 0 up to below 1, found {overlap:g}")
    axes = []
    for length, count in zip(lengths, size, strict=True):
        step = max(1, round(count * (1 - overlap)))
        last = length - count
        axes.append([*dict.fromkeys([*range(0, last, step), last])] if last > 0 else [-(-last // 2)])
    corners = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes)).tolist()
    return tuple(Window(item, tuple(corner)) for item in range(num_items) for corner in corners)


def cut_window(
    array: Shaped[np.ndarray, "..."], starts: Sequence[int], size: Sequence[int], fill: float = 0.0
) -> Shaped[np.ndarray, "..."]:
    """Cut a window along the first axes; what lies beyond the array is `fill`."""
    result = np.full((*size, *array.shape[len(size) :]), fill, array.dtype)
    inside, source = _overlap(array.shape, starts, size)
    result[inside] = array[source]
    return result


def cut(
    images: Sequence[Any] | Shaped[np.ndarray, "item ..."], windows: Sequence[Window], size: Sequence[int]
) -> Shaped[np.ndarray, "window ..."]:
    """Cut windows out of images, such as `planes`, one after the other."""
    return np.stack([cut_window(images[window.item], window.starts, size) for window in windows])


def cut_about(
    array: Shaped[np.ndarray, "x y z"],
    axis: int | None,
    size: Sequence[int],
    mask: Bool[np.ndarray, "x y z"] | None = None,
) -> tuple[Shaped[np.ndarray, "item ..."], tuple[Window, ...]]:
    """Cut one window out of every slice, all at the same place: about the middle of a mask, such as the head.

    Args:
        array: A volume.
        axis: Across the slices; None cuts the volume itself.
        size: Of a window.
        mask: What it stands about; the whole array where it is None or empty.
    """
    images = planes(array, axis)
    center = middle_of(mask) if mask is not None and mask.any() else tuple(n // 2 for n in array.shape)
    inner = [place for index, place in enumerate(center) if index != axis]
    starts = place(images.shape[1:], size, inner, follow=True)
    windows = tuple(Window(item, starts) for item in range(len(images)))
    return cut(images, windows, size), windows


def paste(
    values: Shaped[np.ndarray, "window ..."], windows: Sequence[Window], background: Shaped[np.ndarray, "x y z"],
    axis: int | None,
) -> Float32[np.ndarray, "x y z"]:  # fmt: skip
    """Put windows back where they were cut; the weighted mean where they overlap.

    Args:
        values: One result per window.
        windows: Where each stands.
        background: What shows where there is no window.
        axis: Across the slices; None where a window is a volume.
    """
    total, weight = np.zeros(background.shape), np.zeros(background.shape)
    totals, weights = planes(total, axis), planes(weight, axis)
    size = values.shape[1:]
    table = _triangle(size)
    for image, window in zip(values, windows, strict=True):
        inside, source = _overlap(totals.shape[1:], window.starts, size)
        totals[window.item][source] += (table * image)[inside]
        weights[window.item][source] += table[inside]
    result = np.array(background, np.float32)
    np.divide(total, weight, out=total, where=weight > 0)
    return np.where(weight > 0, total, result).astype(np.float32)


def blend(
    results: Iterable[Float32[np.ndarray, "..."]], windows: Sequence[Window], lengths: Sequence[int]
) -> Float32[np.ndarray, "x y z channel"]:
    """Average maps of windows of one volume, taken one by one, by the weights of `paste`; 0 where there is no window.

    Args:
        results: [x, y, z, channel] of each window.
        windows: Where each stands.
        lengths: Voxels of the volume.
    """
    total, weight = None, np.zeros(tuple(lengths), np.float32)
    for values, window in zip(results, windows, strict=True):
        size = values.shape[:3]
        table = _triangle(size).astype(np.float32)
        inside, source = _overlap(lengths, window.starts, size)
        total = np.zeros((*lengths, values.shape[3]), np.float32) if total is None else total
        total[source] += (table[..., None] * values)[inside]
        weight[source] += table[inside]
    if total is None:
        raise ValueError("results: expected one or more, got none")
    return np.divide(total, weight[..., None], out=total, where=weight[..., None] > 0)


@dataclasses.dataclass(frozen=True)
@checked
class TilingConfig:
    """How images larger than the network's are handled.

    Attributes:
        overlap: Share of a tile that its neighbour has too.
        least_head: Tiles with a smaller share of head are left as they are.
    """

    overlap: Decay = 0.5
    least_head: Decay = 0.01


class Tiles(NamedTuple):
    """Windows of the network's size over a volume, of which those are worked on that show something.

    Attributes:
        windows: All of them.
        kept: Which show something.
        size: Of a window.
        axis: Across the slices; None where a window is a volume.
    """

    windows: tuple[Window, ...]
    kept: Bool[np.ndarray, " window"]
    size: tuple[int, ...]
    axis: int | None

    def cut(self, volume: Shaped[np.ndarray, "x y z"]) -> Float32[np.ndarray, "tile ..."]:
        """Return the tiles that show something, with a channel; what is smaller than one is extended by zeros."""
        chosen = [window for window, keep in zip(self.windows, self.kept, strict=True) if keep]
        return cut(planes(volume, self.axis), chosen, self.size)[..., None].astype(np.float32)

    def blend(
        self, values: Float32[np.ndarray, "tile ..."], background: Shaped[np.ndarray, "x y z"]
    ) -> Float32[np.ndarray, "x y z"]:
        """Put one result for each tile that shows something into a volume; the others show the background."""
        every = cut(planes(background, self.axis), self.windows, self.size).astype(np.float32)
        every[self.kept] = values[..., 0]
        return paste(every, self.windows, np.zeros(background.shape, np.float32), self.axis)


def tile_head(head: Bool[np.ndarray, "x y z"], axis: int | None, size: tuple[int, ...], config: TilingConfig) -> Tiles:
    """Cover slices, or a volume, by tiles of a size, and tell which show a head."""
    inside = planes(head, axis)
    windows = tile(len(inside), inside.shape[1:], size, config.overlap)
    kept = cut(inside, windows, size).reshape(len(windows), -1).mean(1) > config.least_head
    return Tiles(windows, kept, size, axis)


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
    starts = [int(generator.integers(0, extra + 1)) if extra > 0 else -(-extra // 2) for extra in spare]
    return {name: cut_window(array, starts, size, (padding or {}).get(name, 0)) for name, array in fields.items()}


def _overlap(
    lengths: Sequence[int], starts: Sequence[int], size: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the part of a window that lies inside of an array, and the part of the array that it shows."""
    inside, source = [], []
    for start, count, length in zip(starts, size, lengths, strict=False):
        low = max(start, 0)
        high = max(min(start + count, length), low)
        source.append(slice(low, high))
        inside.append(slice(low - start, high - start))
    return tuple(inside), tuple(source)


def _triangle(size: Sequence[int]) -> Float64[np.ndarray, "..."]:
    """Return weights that fall off from the middle and are positive at the sides."""
    table = np.ones(())
    for count in size:
        table = table[..., None] * np.minimum(np.arange(1, count + 1), np.arange(count, 0, -1))
    return table
