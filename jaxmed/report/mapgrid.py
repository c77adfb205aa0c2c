"""Slices of maps on a grid: where they stand, how they are coloured, what their colour bar says."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Bool, Float64, Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from jaxmed.report.drawing import FULL_WIDTH, short_label
from jaxmed.report.page import format_value
from jaxmed.report.slices import EDGES, slice_image, slice_spacing
from jaxmed.report.themes import Theme

# Inches.
LABEL_WIDTH = 1.1
BAR_WIDTH = 0.78
GAP = 0.07


class MapGrid(NamedTuple):
    """Where the slices of a figure stand, in inches from its top left corner.

    Attributes:
        rows: Number of maps.
        blocks: Number of columns in front of each colour bar.
        cell: Width and height of one slice.
    """

    rows: int
    blocks: list[int]
    cell: tuple[float, float]

    @classmethod
    def make(cls, rows: int, blocks: list[int], size: tuple[float, float]) -> "MapGrid":
        """Fit slices of `size` (width and height in mm) into the full width."""
        columns = sum(blocks)
        room = FULL_WIDTH - LABEL_WIDTH - len(blocks) * BAR_WIDTH - columns * GAP
        width = min(room / columns, 2.3)
        height = width * size[1] / size[0]
        if height > 2.3:
            width, height = width * 2.3 / height, 2.3
        return cls(rows, blocks, (max(width, 0.75), max(height, 0.6)))

    @property
    def width(self) -> float:
        """Width of the figure."""
        columns = sum(self.blocks)
        return LABEL_WIDTH + columns * (self.cell[0] + GAP) + len(self.blocks) * BAR_WIDTH

    @property
    def height(self) -> float:
        """Height of the figure."""
        return 0.3 + max(self.rows, 1) * (self.cell[1] + GAP)

    def left(self, column: int) -> float:
        """Return the left edge of a column; colour bars stand between the blocks."""
        ends = np.cumsum(self.blocks)
        bars_before = int(np.searchsorted(ends, column, side="right"))
        return LABEL_WIDTH + column * (self.cell[0] + GAP) + bars_before * BAR_WIDTH

    def top(self, row: int) -> float:
        """Return the upper edge of a row."""
        return 0.3 + row * (self.cell[1] + GAP)

    def box(self, left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
        """Turn inches from the top left into the fractions from the bottom left of matplotlib."""
        return left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height

    def axes(self, canvas: Canvas, row: int, column: int) -> Axes:
        """Add the place of one slice."""
        ax = canvas.add_axes(self.box(self.left(column), self.top(row), *self.cell))
        ax.set_axis_off()
        return ax

    def bar_axes(self, canvas: Canvas, row: int, block: int) -> Axes:
        """Add the place of the colour bar behind a block of slices."""
        last = sum(self.blocks[: block + 1]) - 1
        left = self.left(last) + self.cell[0] + 0.1
        height = min(self.cell[1] * 0.8, 1.4)
        return canvas.add_axes(self.box(left, self.top(row) + (self.cell[1] - height) / 2, 0.075, height))

    def canvas(self, theme: Theme, headings: Sequence[str], axis: int) -> Canvas:
        """Return the figure: what each column shows, and which sides of the patient are at the edges of the first.

        Args:
            theme: Its colours.
            headings: One per column.
            axis: That slices are cut across.
        """
        canvas, y = Canvas(figsize=(self.width, self.height)), 1 - 0.22 / self.height
        for column, heading in enumerate(headings):
            left = self.left(column) / self.width
            right = left + self.cell[0] / self.width
            edges = EDGES[axis] if column == 0 else ("", "")
            canvas.text((left + right) / 2, y, heading, ha="center", color=theme.muted, size=8)
            canvas.text(left, y, edges[0], ha="left", color=theme.text, size=8)
            canvas.text(right, y, edges[1], ha="right", color=theme.text, size=8)
        return canvas

    def write_label(self, canvas: Canvas, theme: Theme, row: int, name: str, lines: Sequence[str]) -> None:
        """Write the name of a map and, below it, small lines about it; empty ones are left out."""
        lines = [line for line in lines if line]
        y = self.top(row) + self.cell[1] / 2 - 0.085 * len(lines)
        canvas.text(0, 1 - y / self.height, short_label(name, 14), va="center", size=10)
        for number, line in enumerate(lines, 1):
            place = 1 - (y + 0.02 + 0.165 * number) / self.height
            canvas.text(0, place, short_label(line, 18), va="center", color=theme.muted, size=8)


def image_size(spacing: tuple[float, float, float], axis: int, box: tuple[slice, slice]) -> tuple[float, float]:
    """Return width and height of the cropped slice, in mm."""
    row, column = slice_spacing(spacing, axis)
    rows, columns = box
    return (columns.stop - columns.start) * column, (rows.stop - rows.start) * row


def masked_slice(
    volume: Real[np.ndarray, "x y z"],
    mask: Bool[np.ndarray, "x y z"],
    axis: int,
    index: int,
    box: tuple[slice, slice],
) -> Float64[np.ndarray, "row column"]:
    """Cut and crop one slice; voxels outside the mask, and those not finite, become NaN."""
    image = nan_unless_finite(slice_image(volume, axis, index).astype(np.float64))
    return np.where(slice_image(mask, axis, index), image, np.nan)[box]


def show_slice(
    ax: Axes,
    image: Float64[np.ndarray, "row column"],
    colormap: str,
    limits: tuple[float, float],
    spacing: tuple[float, float, float],
    axis: int,
) -> None:
    """Draw a slice with its physical proportions; NaN takes the background colour."""
    row, column = slice_spacing(spacing, axis)
    colors = matplotlib.colormaps[colormap].with_extremes(bad=(0, 0, 0, 0))
    # Voxels stay voxels: smoothing would invent detail.
    (low, high), shown = limits, np.ma.masked_invalid(image)
    ax.imshow(shown, colors, vmin=low, vmax=high, aspect=row / column, interpolation="nearest")


def draw_color_bar(ax: Axes, colormap: str, limits: tuple[float, float], values: Float64[np.ndarray, " voxel"]) -> None:
    """Draw a colour bar whose end labels say when values lie beyond them."""
    ax.imshow(np.linspace(0, 1, 256)[:, None], colormap, origin="lower", aspect="auto")
    low, high = limits
    labels = [_tick_label(value, high - low) for value in (low, (low + high) / 2, high)]
    if values.size and values.min() < low:
        labels[0] = f"≤ {labels[0]}"
    if values.size and values.max() > high:
        labels[2] = f"≥ {labels[2]}"
    if not values.size:
        labels = ["", "no value", ""]
    ax.set_yticks([0, 127.5, 255], labels, size=8)
    ax.yaxis.tick_right()
    ax.tick_params("y", length=0, pad=4)
    ax.xaxis.set_visible(False)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _tick_label(value: float, span: float) -> str:
    decimals = 1 - math.floor(math.log10(span))
    if abs(value) >= 1e5 or decimals > 4:
        return format_value(value, 3)
    return f"{value:z.{max(decimals, 0)}f}".replace("-", "−")


def nan_unless_finite(array: np.ndarray) -> np.ndarray:
    """Replace infinities by NaN."""
    return np.where(np.isfinite(array), array, np.nan)
