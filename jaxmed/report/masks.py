"""Images with masks on them: outlines to compare, fills to mark what changes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxmed.report.drawing import FULL_WIDTH, both_themes, short_label
from jaxmed.report.overlay import heat_colors
from jaxmed.report.page import Figure
from jaxmed.report.themes import Theme

COLORS = ("#f59e0b", "#38bdf8", "#ef4444", "#34d399")


class Panel(NamedTuple):
    """An image of the figure.

    Attributes:
        image: Shown with its first row on top; grey, or red, green and blue in [0, 1].
        title: Above it.
        outlines: Masks by name, drawn as lines.
        fills: Masks by name, drawn as translucent areas.
        heat: A map on the image, 0 to 1: clear where it is 0.
    """

    image: Float[np.ndarray, "row column *colour"]
    title: str
    outlines: Mapping[str, Bool[np.ndarray, "row column"]] = {}
    fills: Mapping[str, Bool[np.ndarray, "row column"]] = {}
    heat: Float[np.ndarray, "row column"] | None = None


def mask_panels(
    panels: Sequence[Panel], *, columns: int, caption: str, alt: str, limits: tuple[float, float] = (0.0, 1.0)
) -> Figure:
    """Draw images in rows, with a legend of the masks.

    Args:
        panels: From left to right, row by row.
        columns: Images in a row.
        caption: Text under the figure.
        alt: Description of the picture.
        limits: Values that are black and white.
    """
    names = list(dict.fromkeys(name for panel in panels for name in (*panel.outlines, *panel.fills)))
    filled = {name for panel in panels for name in panel.fills}
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}
    rows = -(-len(panels) // columns)

    def draw(theme: Theme) -> Canvas:
        width = FULL_WIDTH / columns
        canvas = Canvas(figsize=(FULL_WIDTH, rows * (width + 0.28) + 0.35), layout="constrained")
        for number, panel in enumerate(panels):
            ax = canvas.add_subplot(rows, columns, number + 1)
            ax.imshow(panel.image, cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="nearest")
            if panel.heat is not None:
                ax.imshow(heat_colors(panel.heat), interpolation="bilinear")
            for name, mask in panel.fills.items():
                color = np.array([int(colors[name][place : place + 2], 16) / 255 for place in (1, 3, 5)])
                layer = np.zeros((*mask.shape, 4))
                layer[mask] = (*color, 0.65)
                ax.imshow(layer, interpolation="nearest")
            for name, mask in panel.outlines.items():
                for xs, ys in _edges(mask):
                    ax.plot(xs, ys, color=colors[name], linewidth=1.2, solid_capstyle="round")
            ax.set_xlim(-0.5, panel.image.shape[1] - 0.5)
            ax.set_ylim(panel.image.shape[0] - 0.5, -0.5)
            ax.set_title(short_label(panel.title, 30), loc="left", size=8, color=theme.text, pad=3)
            ax.set_axis_off()
        if names:
            marks = [
                Patch(color=colors[name], alpha=0.65, label=short_label(name))
                if name in filled
                else Line2D([], [], color=colors[name], label=short_label(name))
                for name in names
            ]
            canvas.legend(handles=marks, loc="outside lower center", ncols=len(names))
        return canvas

    return both_themes(draw, "png", caption, alt)


def proposal_panels(
    image: Float[np.ndarray, "*space"],
    masks: Bool[np.ndarray, "step_1 *space"],
    proposals: Mapping[str, Bool[np.ndarray, "step *space"]],
    titles: Sequence[str],
    caption: str,
) -> Figure:
    """Draw how a mask was changed: in every step the mask, and the voxels that each of several proposed to flip.

    Args:
        image: What the mask is of.
        masks: Before each step, and after the last.
        proposals: By who made them.
        titles: Of the steps.
        caption: Text under the figure.
    """
    guide = masks[-1] if masks[-1].any() else np.ones_like(masks[-1])
    panels = []
    for step, title in enumerate(titles):
        fills = {name: plane(flips[step], guide) for name, flips in proposals.items()}
        panels.append(Panel(plane(image, guide), title, {"mask": plane(masks[step], guide)}, fills))
    alt = f"{len(panels)} steps of a game: the mask and the voxels that both players would flip."
    return mask_panels(panels, columns=6, limits=(0.0, 1.0), caption=caption, alt=alt)


def plane(array: Shaped[np.ndarray, "..."], mask: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "row column"]:
    """Return an image as it is looked at, x to the right and y up; of a volume the slice with most of a mask."""
    if array.ndim == 3:
        sizes = mask.sum(axis=(0, 1))
        array = array[..., int(sizes.argmax()) if sizes.any() else len(sizes) // 2]
    return np.flip(array.T, 0)


def _edges(mask: Bool[np.ndarray, "row column"]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the sides of pixels between a mask and what is not in it, as lines broken by NaN."""
    wide = np.pad(mask, 1)
    down, right = np.nonzero(wide[1:] != wide[:-1]), np.nonzero(wide[:, 1:] != wide[:, :-1])
    lines = []
    for (row, column), step in ((down, (1.0, 0.0)), (right, (0.0, 1.0))):
        # In `wide`, pixel (r, c) of the mask is (r + 1, c + 1).
        x = column - (1.5 if step[0] else 0.5)
        y = row - (0.5 if step[0] else 1.5)
        gap = np.full(len(x), np.nan)
        lines.append((np.stack([x, x + step[0], gap], 1).ravel(), np.stack([y, y + step[1], gap], 1).ravel()))
    return lines
