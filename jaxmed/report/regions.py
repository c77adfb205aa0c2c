"""Values of brain regions: a glass brain from centroids, or a ring where there are none."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from jaxmed.errors import side_of
from jaxmed.report.drawing import FULL_WIDTH, both_themes, short_label
from jaxmed.report.page import Figure
from jaxmed.report.themes import Theme

# Axes of the three projections: names, horizontal and vertical coordinate.
VIEWS = (("from the right", 1, 2), ("from above", 0, 1), ("from behind", 0, 2))


def glass_brain(
    values: Mapping[str, Float[np.ndarray, " region"]],
    names: Sequence[str],
    centroids: Float64[np.ndarray, "region 3"] | None,
    *,
    caption: str,
    unit: str = "",
) -> Figure:
    """Draw regions as discs, sized and coloured by their values.

    Args:
        values: Maps by name, all finite, on one colour scale.
        names: Names of the regions.
        centroids: In mm, RAS+. Without them regions stand on a ring, left ones on the left where their names tell.
        caption: Text under the figure.
        unit: Unit of the values.
    """
    everything = np.concatenate([np.asarray(row, float) for row in values.values()])
    low, high = float(min(everything.min(), 0.0)), float(everything.max())
    high = high if high > low else low + 1.0
    views = VIEWS if centroids is not None else (("on a ring", 0, 1),)
    points = _ring(names) if centroids is None else centroids

    def draw(theme: Theme) -> Canvas:
        # Rings stand beside each other, projections of a map in a row.
        columns = len(views) if centroids is not None else min(len(values), 3)
        rows = -(-len(values) * len(views) // columns)
        height = 2.4 if centroids is not None else 0.6 + FULL_WIDTH / (columns + 0.3)
        canvas = Canvas(figsize=(FULL_WIDTH, 0.3 + height * rows), layout="constrained")
        grid = [canvas.add_subplot(rows, columns, 1 + place) for place in range(len(values) * len(views))]
        shown = None
        for place, ax in enumerate(grid):
            row, column = divmod(place, len(views))
            name = list(values)[row]
            view, horizontal, vertical = views[column]
            title = f"{name}, {view}" if len(views) > 1 else name
            ax.set_title(short_label(title), loc="left", size=9)
            share = (np.asarray(values[name], float) - low) / (high - low)
            shown = ax.scatter(
                points[:, horizontal], points[:, vertical], s=12 + 110 * share, c=values[name], vmin=low, vmax=high,
                cmap="viridis", edgecolors=theme.muted, linewidths=0.4,
            )  # fmt: skip
            if centroids is None:
                _write_names(ax, points, names, theme)
            ax.set_aspect("equal")
            ax.margins(0.12 if centroids is not None else 0.45)
            ax.set_axis_off()
        canvas.colorbar(shown, ax=grid, shrink=0.6, label=unit)  # pyright: ignore[reportArgumentType]
        return canvas

    said = []
    for name, row in values.items():
        largest = ", ".join(names[int(index)] for index in np.argsort(-np.asarray(row))[:3])
        said.append(f"{name}: highest in {largest}")
    return both_themes(draw, "svg", caption, f"Regions as discs. {'; '.join(said)}.")


def _ring(names: Sequence[str]) -> np.ndarray:
    """Left regions on the left half, right ones mirrored, others below."""
    sides = [side_of(name) or "" for name in names]
    angles = np.zeros(len(names))
    for side, first, last in (("left", 100.0, 235.0), ("right", 80.0, -55.0), ("", 245.0, 295.0)):
        index = [place for place, found in enumerate(sides) if found == side]
        if side == "" and len(index) == len(names):
            first, last = 90.0, 90.0 - 360.0 * (1 - 1 / max(len(names), 1))
        angles[index] = np.linspace(first, last, len(index))
    radians = np.deg2rad(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def _write_names(ax: Axes, points: np.ndarray, names: Sequence[str], theme: Theme) -> None:
    if len(names) > 100:
        return
    for (x, y), name in zip(points, names, strict=True):
        angle = np.rad2deg(np.arctan2(y, x))
        flip = abs(angle) > 90
        ax.text(
            1.08 * x, 1.08 * y, short_label(name, 22), size=5, color=theme.muted, rotation=angle - 180 * flip,
            rotation_mode="anchor", ha="right" if flip else "left", va="center",
        )  # fmt: skip
