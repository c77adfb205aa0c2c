"""Points in a plane, coloured by group."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64
from matplotlib.figure import Figure as Canvas

from jaxmed.report.drawing import both_themes, line_axes, short_label
from jaxmed.report.page import Figure
from jaxmed.report.themes import Theme

# Beyond this many points a picture of pixels is smaller than one of outlines.
MOST_OUTLINES = 2000
MARKERS = ("o", "s", "^", "D", "v", "P")


def scatter(
    groups: Mapping[str, Float64[np.ndarray, "point 2"]],
    *,
    xlabel: str,
    ylabel: str,
    caption: str,
    names: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Draw points, one colour per group; a second round of colours has another mark.

    Args:
        groups: Coordinates by group; all finite.
        xlabel: Name and unit of the first coordinate.
        ylabel: Name and unit of the second.
        caption: Text under the figure.
        names: Names of the points of each group, to write beside a few of them.
    """
    number = sum(len(points) for points in groups.values())
    size = 6.0 if number <= 300 else 3.0

    def draw(theme: Theme) -> Canvas:
        canvas, ax = line_axes(theme, xlabel, ylabel, 4.6)
        for place, (name, points) in enumerate(groups.items()):
            color = theme.cycle[place % len(theme.cycle)]
            marker = MARKERS[place // len(theme.cycle) % len(MARKERS)]
            label = f"{short_label(name, 30)} ({len(points)})"
            ax.plot(
                points[:, 0], points[:, 1], marker, markersize=size, color=color, alpha=0.75, markeredgewidth=0,
                label=label,
            )  # fmt: skip
            for text, (x, y) in zip((names or {}).get(name, ()), points, strict=False):
                style = {"textcoords": "offset points", "xytext": (5, 3), "color": theme.muted, "size": 7.5}
                ax.annotate(short_label(text, 24), (x, y), **style)
        ax.margins(0.06)
        ax.grid(True, axis="both")
        if len(groups) > 1:
            ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0.0)
        return canvas

    said = ", ".join(f"{len(points)} of {name}" for name, points in groups.items())
    alt = f"{ylabel} against {xlabel}: {said}."
    return both_themes(draw, "svg" if number <= MOST_OUTLINES else "png", caption, alt)
