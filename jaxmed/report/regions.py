"""Values of brain regions: a glass brain from centroids, or a ring where there are none."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from jaxmed.errors import side_of
from jaxmed.io.tables import read_table
from jaxmed.report.drawing import FULL_WIDTH, both_themes, short_label
from jaxmed.report.figures import Band, curves
from jaxmed.report.page import Figure
from jaxmed.report.themes import Theme

# Axes of the three projections: names, horizontal and vertical coordinate.
VIEWS = (("from the right", 1, 2), ("from above", 0, 1), ("from behind", 0, 2))
MOST_CURVES = 8


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


def course_figures(course: Path, *, ylabel: str, caption: str) -> list[Figure]:
    """Draw how regions change over stage: curves of early to late ones, and all of them at three stages.

    Args:
        course: Table of a stage, in years, and the value of every region; centroids.csv may lie beside it, with x, y
            and z of each region in the same order.
        ylabel: What the values are, and their unit.
        caption: What the course is, the start of both captions.
    """
    table, beside = read_table(course), course.parent / "centroids.csv"
    names, times = table.columns[1:], np.array(table.floats("stage"))
    values = np.array([table.floats(name) for name in names]).T
    places = read_table(beside) if beside.exists() else None
    centroids = None if places is None else np.array([places.floats(axis) for axis in "xyz"]).T
    # From those that change first to those that change last.
    order = np.argsort(-values[len(times) // 2])
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(MOST_CURVES, len(order))).astype(int))]
    lines = {names[index]: (times, values[:, index]) for index in chosen}
    maps = {f"stage {times[i]:.0f} years": values[i] for i in (len(times) // 3, 2 * len(times) // 3, len(times) - 1)}
    told = "" if centroids is not None else " Regions stand on a ring: nothing says where they lie."
    return [
        curves(lines, xlabel="stage (years)", ylabel=ylabel, caption=f"{caption}, in regions from early to late ones."),
        glass_brain(maps, names, centroids, caption=f"{caption}, at three stages.{told}"),
    ]


def stage_curves(path: Path, columns: Mapping[str, str] | None, ylabel: str, caption: str, *, every: int = 1) -> Figure:
    """Draw columns of a table over its stage, in years, with bands where NAME_median, NAME_low and NAME_high stand.

    Args:
        path: The table.
        columns: Name of each column by its label; None for all.
        ylabel: What the values are, and their unit.
        caption: Text under the figure.
        every: One point of so many is drawn.
    """
    table, lines = read_table(path), {}
    named = {name.replace("_", " "): name for name in table.columns if name != "stage"} if columns is None else columns
    for label, name in named.items():
        drawn = [f"{name}_{part}" for part in ("median", "low", "high")]
        has_band = drawn[0] in table.columns
        line = [np.array(table.floats(column))[::every] for column in ("stage", *(drawn if has_band else [name]))]
        lines[label] = Band(*line) if has_band else tuple(line)
    return curves(lines, xlabel="stage (years)", ylabel=ylabel, caption=caption)


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
