"""Volumes for the viewer of a page: small enough to carry, in the colours of the static slices."""

import itertools
import math
from collections.abc import Collection, Mapping
from types import MappingProxyType

import matplotlib
import numpy as np
from jaxtyping import Bool

from jaxmed.io import nifti
from jaxmed.report.figures import MapStyle, slice_maps
from jaxmed.report.page import Block
from jaxmed.report.viewer import Layer, Viewer
from jaxmed.volume import Volume

MOST_VOXELS = 2_000_000
"""Of all volumes of a viewer together: about as many bytes in the page, before compression."""
STEPS = 255  # shown ones; the lowest of 256 stands for voxels that are not


def show_volumes(
    volumes: Mapping[str, Volume],
    *,
    caption: str,
    styles: Mapping[str, MapStyle] = MappingProxyType({}),
    mask: Bool[np.ndarray, "x y z"] | None = None,
    whole: Collection[str] = (),
    is_viewed: bool = True,
) -> list[Block]:
    """Show volumes in four slices each, and in a viewer where that is wanted; arguments as of `view_volumes`."""
    arrays, spacing = {name: volume.array for name, volume in volumes.items()}, next(iter(volumes.values())).spacing
    blocks: list[Block] = [slice_maps(arrays, spacing, caption=caption, styles=styles, mask=mask, num_slices=4)]
    if is_viewed:
        blocks += view_volumes(volumes, caption=caption, styles=styles, mask=mask, whole=whole)
    return blocks


def view_volumes(
    volumes: Mapping[str, Volume],
    *,
    caption: str,
    styles: Mapping[str, MapStyle] = MappingProxyType({}),
    mask: Bool[np.ndarray, "x y z"] | None = None,
    whole: Collection[str] = (),
) -> list[Viewer]:
    """Show volumes in a viewer, the first beneath one of the others.

    Every n-th voxel along each axis is kept where they are too many, n as small as it can be; values are rounded to
    255 steps between the limits of their style.

    Args:
        volumes: 3D, on one grid, by title.
        caption: What to see.
        styles: As of `figures.slice_maps`, by title.
        mask: Voxels to show; NaN is never shown.
        whole: Titles of what is shown outside of the mask too.

    Returns:
        One block of a page, for which `slice_maps` shows the same in slices; none for an image of a single slice.
    """
    first_name, first = next(iter(volumes.items()))
    if min(first.array.shape) == 1:
        return []
    every = thinning(first.array.shape, MOST_VOXELS // len(volumes))
    layers = []
    for name, volume in volumes.items():
        where = np.isfinite(volume.array)
        if mask is not None and name not in whole:
            where &= mask
        layers.append(make_layer(name, volume, where, styles.get(name, MapStyle()), every))
    which = {2: "second", 3: "third"}.get(every, f"{every}th")
    told = caption + (f" Every {which} voxel along each axis is shown." if every > 1 else "")
    # A map over a scan is chosen at first, else the first map.
    return [Viewer(layers, told, chosen=1 if first_name in whole and len(layers) > 1 else 0)]


def view_overlay(scan: Volume, overlay: Volume, *, caption: str, style: MapStyle) -> list[Viewer]:
    """Show a scan, and a map over it where the map has a tenth of its largest value or more; nothing for a map of 0.

    Args:
        scan: 3D.
        overlay: The map, from 0 up, on the same grid.
        caption: What to see.
        style: Of the scan.
    """
    largest = float(overlay.array.max())
    if not largest > 0:
        return []
    styles = {"Scan": style, "Map": MapStyle(limits=(0.0, largest), colormap="magma")}
    mask = overlay.array >= largest / 10
    return view_volumes({"Scan": scan, "Map": overlay}, caption=caption, styles=styles, mask=mask, whole=("Scan",))


def thinning(shape: tuple[int, ...], most: int = MOST_VOXELS) -> int:
    """Return the smallest n for which every n-th voxel along each axis makes `most` voxels at the most."""
    return next(n for n in itertools.count(1) if math.prod(-(-length // n) for length in shape) <= max(most, 1))


def thin(volume: Volume, every: int) -> Volume:
    """Keep every so many voxels along each axis, where they are."""
    affine = volume.affine.copy()
    affine[:3, :3] *= every
    return Volume.make(np.ascontiguousarray(volume.array[(slice(None, None, every),) * 3]), affine)


def make_layer(name: str, volume: Volume, where: Bool[np.ndarray, "x y z"], style: MapStyle, every: int = 1) -> Layer:
    """Round a volume to 255 steps, and pack it as a NIfTI file.

    Args:
        name: Of the layer.
        volume: 3D.
        where: Voxels to show.
        style: Limits, colours and unit.
        every: Keep every so many voxels along each axis.
    """
    low, high = style.limits_for(volume.array[where].astype(np.float64)) if where.any() else (0.0, 1.0)
    kept, shown = thin(volume, every), where[(slice(None, None, every),) * 3]
    step = (high - low) / (STEPS - 1)
    steps = np.rint((np.where(shown, kept.array, low).astype(np.float64).clip(low, high) - low) / step) + 1
    file = nifti.pack_steps(np.where(shown, steps, 0).astype(np.uint8), kept.affine, step, low - step)
    return Layer(name, style.unit, file, low, high, color_table(style.colormap))


def color_table(colormap: str) -> dict[str, list[int]]:
    """Return a colour map of matplotlib as NiiVue's table over 256 steps, the lowest clear, or black beneath all."""
    places = [0, 1, *range(15, 256, 15)]
    colors = matplotlib.colormaps[colormap](np.array([max(place - 1, 0) / (STEPS - 1) for place in places]))
    colors[0] = 0
    red, green, blue = np.rint(255 * colors[:, :3]).astype(int).T.tolist()
    return {"R": red, "G": green, "B": blue, "A": [0, *(255 for _ in places[1:])], "I": places}
