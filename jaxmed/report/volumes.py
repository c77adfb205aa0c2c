"""Volumes for the viewer of a page: small enough to carry, in the colours of the static slices."""

import gzip
from collections.abc import Mapping
from types import MappingProxyType

import matplotlib
import nibabel as nib
import numpy as np
from jaxtyping import Bool

from jaxmed.report.figures import MapStyle
from jaxmed.report.viewer import Layer, Viewer
from jaxmed.volume import Volume

MOST_VOXELS = 2_000_000
"""Of all volumes of a viewer together: about as many bytes in the page, before compression."""
STEPS = 255  # shown ones; the lowest of 256 stands for voxels that are not


def view_volumes(
    volumes: Mapping[str, Volume],
    *,
    caption: str,
    styles: Mapping[str, MapStyle] = MappingProxyType({}),
    mask: Bool[np.ndarray, "x y z"] | None = None,
) -> Viewer:
    """Show volumes in a viewer, the first beneath one of the others.

    Every n-th voxel along each axis is kept where they are too many, n as small as it can be; values are rounded to
    255 steps between the limits of their style.

    Args:
        volumes: 3D, by title; on whatever grids.
        caption: What to see.
        styles: As of `figures.slice_maps`, by title.
        mask: Voxels to show of all but the first, on their grid; NaN is never shown.

    Returns:
        A block of a page, for which `slice_maps` shows the same in slices.
    """
    share = MOST_VOXELS / sum(volume.array.size for volume in volumes.values())
    every = max(int(np.ceil(share ** (-1 / 3))), 1)
    layers = []
    for number, (name, volume) in enumerate(volumes.items()):
        where = np.isfinite(volume.array)
        if mask is not None and number > 0:
            where &= mask
        layers.append(make_layer(name, volume, where, styles.get(name, MapStyle()), every))
    note = "" if every == 1 else f" Every {every}th voxel along each axis is shown." if every > 3 else (
        f" Every {'second' if every == 2 else 'third'} voxel along each axis is shown."
    )  # fmt: skip
    return Viewer(layers, caption + note)


def make_layer(name: str, volume: Volume, where: Bool[np.ndarray, "x y z"], style: MapStyle, every: int = 1) -> Layer:
    """Round a volume to 255 steps, and pack it as a NIfTI file.

    Args:
        name: Of the layer.
        volume: 3D.
        where: Voxels to show.
        style: Limits, colours and unit.
        every: Keep every so many voxels along each axis.
    """
    array = np.asarray(volume.array, np.float64)
    low, high = style.limits_for(array[where]) if where.any() else (0.0, 1.0)
    cut = (slice(None, None, every),) * 3
    kept, shown = array[cut], where[cut]
    step = (high - low) / (STEPS - 1)
    steps = np.rint((np.where(shown, kept, low).clip(low, high) - low) / step) + 1
    affine = volume.affine.copy()
    affine[:3, :3] *= every
    image = nib.nifti1.Nifti1Image(np.where(shown, steps, 0).astype(np.uint8), affine)
    image.header.set_slope_inter(step, low - step)
    image.header.set_xyzt_units("mm")
    return Layer(name, style.unit, gzip.compress(image.to_bytes(), 9, mtime=0), low, high, color_table(style.colormap))


def color_table(colormap: str) -> dict[str, list[int]]:
    """Return a colour map of matplotlib as NiiVue's table over 256 steps; the lowest is clear."""
    places = [0, 1, *range(15, 256, 15)]
    colors = matplotlib.colormaps[colormap](np.array([max(place - 1, 0) / (STEPS - 1) for place in places]))
    red, green, blue = np.rint(255 * colors[:, :3]).astype(int).T.tolist()
    return {"R": red, "G": green, "B": blue, "A": [0, *(255 for _ in places[1:])], "I": places}
