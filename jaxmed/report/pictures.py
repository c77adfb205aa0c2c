"""A row of pictures that lie as they are stored."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure as Canvas

from jaxmed.report.drawing import FULL_WIDTH, both_themes
from jaxmed.report.page import Figure
from jaxmed.report.themes import Theme


def picture_row(pictures: Mapping[str, Float[np.ndarray, "row column"]], *, caption: str) -> Figure:
    """Draw grey pictures side by side, each under its name; 0 is black and 1 is white in all of them.

    Args:
        pictures: By name; of equal size.
        caption: Text under the figure.
    """
    rows, columns = next(iter(pictures.values())).shape
    width = min(FULL_WIDTH / len(pictures), 2.0)

    def draw(theme: Theme) -> Canvas:
        height = width * rows / columns + 0.3
        canvas = Canvas(figsize=(width * len(pictures), height), layout="constrained")
        panels = canvas.subplots(1, len(pictures), squeeze=False)[0]
        for ax, (name, picture) in zip(panels, pictures.items(), strict=True):
            ax.imshow(picture, "gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_title(name, color=theme.muted, size=8)
            ax.set_axis_off()
        return canvas

    return both_themes(draw, "png", caption, f"Pictures: {', '.join(pictures)}.")
