"""Lines with intervals over one x axis, such as accuracy against the share of labels."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, NullLocator

from jaxmed.report.drawing import both_themes, line_axes, short_label, write_legend
from jaxmed.report.page import Figure, format_value
from jaxmed.report.themes import Theme


class Band(NamedTuple):
    """One line and its interval.

    Attributes:
        x: Positions, ascending.
        middle: Values.
        low: Lower ends; equal to the values where there is no interval.
        high: Upper ends.
    """

    x: Float64[np.ndarray, " point"]
    middle: Float64[np.ndarray, " point"]
    low: Float64[np.ndarray, " point"]
    high: Float64[np.ndarray, " point"]


def banded_curves(
    bands: Mapping[str, Band], *, xlabel: str, ylabel: str, caption: str, log_x: bool = False, alt: str = ""
) -> Figure:
    """Draw lines with shaded intervals and a mark at every point.

    Args:
        bands: Lines by name; all values finite.
        xlabel: Name and unit of x.
        ylabel: Name and unit of y.
        caption: Text under the figure.
        log_x: Whether x has a logarithmic axis; positions are then positive.
        alt: Description of the picture; empty for one made from the last values.
    """
    ticks = np.unique(np.concatenate([band.x for band in bands.values()]))

    def draw(theme: Theme) -> Canvas:
        canvas, ax = line_axes(theme, xlabel, ylabel)
        for number, (name, band) in enumerate(bands.items()):
            color = theme.cycle[number % len(theme.cycle)]
            ax.fill_between(band.x, band.low, band.high, color=color, alpha=0.18, linewidth=0)
            ax.plot(band.x, band.middle, marker="o", markersize=4, color=color, label=short_label(name))
        if log_x:
            ax.set_xscale("log")
            ax.xaxis.set_minor_locator(NullLocator())
        if len(ticks) <= 10:
            ax.set_xticks(ticks)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value, 3)))
        write_legend(ax, len(bands))
        return canvas

    last = ", ".join(
        f"{name} {format_value(float(band.middle[-1]))} "
        f"({format_value(float(band.low[-1]))} to {format_value(float(band.high[-1]))})"
        for name, band in bands.items()
    )
    alt = alt or f"{ylabel} over {xlabel}, with intervals. Last values: {last}."
    return both_themes(draw, "svg", caption, alt)
