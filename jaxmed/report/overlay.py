"""Slices of a scan with a map on top, such as what moved a classifier."""

from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, Float32
from matplotlib.figure import Figure as Canvas

from jaxmed.arrays.grid import reorient
from jaxmed.report.drawing import both_themes
from jaxmed.report.mapgrid import MapGrid, draw_color_bar, show_slice
from jaxmed.report.page import Figure
from jaxmed.report.slices import PLANES, choose_axis, choose_slices, slice_image, slice_spacing
from jaxmed.report.themes import Theme
from jaxmed.volume import Volume

# A picture in the page has fewer pixels than this along a side.
LARGEST = 256
HEAT = "inferno"
PICTURE = -1


class Slices(NamedTuple):
    """A few slices of a scan and of a map on its grid, turned as a radiologist holds them.

    Attributes:
        image: The scan; of a picture in [0, 1], with its colours.
        overlay: The map.
        index: Slice numbers along the axis that is cut across, in RAS+ order.
        spacing: Height of a row and width of a column, in mm.
        axis: 0 sagittal, 1 coronal, 2 axial; -1 for a picture, which lies as it is stored.
        largest: The map's largest value in the whole volume.
    """

    image: Float32[np.ndarray, "slice row column *channel"]
    overlay: Float32[np.ndarray, "slice row column"]
    index: tuple[int, ...]
    spacing: tuple[float, float]
    axis: int
    largest: float


def cut_slices(scan: Volume, overlay: Volume, num_slices: int = 5) -> Slices:
    """Choose evenly spread slices of a scan, the one with the map's largest value among them.

    Args:
        scan: Any orientation.
        overlay: A map on the same grid.
        num_slices: Most slices.
    """
    scan, overlay = reorient(scan, "RAS"), reorient(overlay, "RAS")
    x, y, z = scan.array.shape[:3]
    axis = choose_axis((x, y, z))
    spread = choose_slices(np.ones(scan.array.shape, bool), axis, num_slices)
    peak = int(np.unravel_index(overlay.array.argmax(), overlay.array.shape)[axis])
    nearest = min(spread, key=lambda index: abs(index - peak))
    index = tuple(sorted({peak if i == nearest else i for i in spread})) if overlay.array.any() else spread
    step = -(-max(n for i, n in enumerate(scan.array.shape[:3]) if i != axis) // LARGEST)
    images = [
        np.stack([slice_image(volume.array, axis, i)[::step, ::step] for i in index]).astype(np.float32)
        for volume in (scan, overlay)
    ]
    row, column = slice_spacing(scan.spacing, axis)
    largest = float(overlay.array.max())
    return Slices(images[0], images[1], index, (row * step, column * step), axis, largest)


def picture_slice(
    picture: Float32[np.ndarray, "row column *channel"],
    overlay: Float32[np.ndarray, "row column"],
    largest: int | None = LARGEST,
) -> Slices:
    """Return a picture in its colours, and a map of its pixels; values beyond [0, 1] are brought into it.

    Args:
        picture: Of any size.
        overlay: A map of as many pixels.
        largest: Most pixels along a side of the result, of which some are left out; None keeps all.
    """
    step = 1 if largest is None else -(-max(overlay.shape) // largest)
    low, high = min(float(picture.min()), 0.0), max(float(picture.max()), 1.0)
    image = (picture - low) / (high - low)
    shown, small = (array[None, ::step, ::step].astype(np.float32) for array in (overlay, image))
    return Slices(small, shown, (0,), (float(step), float(step)), PICTURE, float(overlay.max()))


def heat_of(slices: Slices) -> Float32[np.ndarray, "slice row column"]:
    """Return the map in shares of its largest value, 0 where it is 0 everywhere."""
    return slices.overlay / np.float32(slices.largest or 1.0)


def heat_colors(heat: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row column 4"]:
    """Return the colours of a map that lies on an image: clear where it is 0, three quarters opaque at 1."""
    heat = np.clip(heat, 0, 1)
    colors = np.array(matplotlib.colormaps[HEAT](heat))
    colors[..., 3] = 0.75 * heat**0.75
    return colors


def blend(
    picture: Float[np.ndarray, "row column *channel"], heat: Float[np.ndarray, "row column"]
) -> Float[np.ndarray, "row column 3"]:
    """Return a picture in [0, 1] under a map, 0 to 1, of its pixels."""
    colors = heat_colors(heat)
    below = picture if picture.ndim == 3 else picture[..., None]
    return below * (1 - colors[..., 3:]) + colors[..., :3] * colors[..., 3:]


def overlay_slices(
    slices: Slices, *, caption: str, limits: tuple[float, float], names: tuple[str, str], unit: str
) -> Figure:
    """Draw a row of slices, and below it the same slices under the map: clear where it is 0, opaque at its largest.

    Args:
        slices: From `cut_slices`; pictures are drawn by `masks.mask_panels`.
        caption: Text under the figure.
        limits: Grey values of the scan that are black and white.
        names: Names of the two rows.
        unit: Unit of the scan's values.
    """
    count, rows, columns = slices.image.shape
    size, axis, heat = (columns * slices.spacing[1], rows * slices.spacing[0]), slices.axis, heat_of(slices)
    aspect = slices.spacing[0] / slices.spacing[1]
    # show_slice takes the spacing of a volume and the axis it is cut across.
    spacing = tuple(np.insert([slices.spacing[1], slices.spacing[0]], axis, 1.0).tolist())

    def draw(theme: Theme) -> Canvas:
        grid = MapGrid.make(2, [count], size)
        canvas = grid.canvas(theme, [f"{PLANES[axis]} {index}" for index in slices.index], axis)
        for place in range(count):
            for row in (0, 1):
                ax = grid.axes(canvas, row, place)
                show_slice(ax, slices.image[place].astype(np.float64), "gray", limits, spacing, axis)
                if row:
                    ax.imshow(heat_colors(heat[place]), aspect=aspect, interpolation="bilinear")
        grid.write_label(canvas, theme, 0, names[0], [unit])
        grid.write_label(canvas, theme, 1, names[1], ["relative to its", "largest value"])
        draw_color_bar(grid.bar_axes(canvas, 0, 0), "gray", limits, slices.image.reshape(-1).astype(np.float64))
        draw_color_bar(grid.bar_axes(canvas, 1, 0), HEAT, (0.0, 1.0), np.zeros(1))
        return canvas

    positions = ", ".join(str(index) for index in slices.index)
    alt = f"{PLANES[axis].capitalize()} slices {positions} of {names[0]}, and with {names[1]} on top."
    return both_themes(draw, "png", caption, alt)
