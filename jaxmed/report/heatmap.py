"""Tables of numbers as colours: one panel per table, on one scale, every cell with its number."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure as Canvas

from jaxmed.report.drawing import FULL_WIDTH, both_themes
from jaxmed.report.page import Figure
from jaxmed.report.themes import Theme


def heat_maps(
    tables: Mapping[str, Float[np.ndarray, "row column"]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    ylabel: str,
    xlabel: str,
    caption: str,
    is_difference: bool = False,
) -> Figure:
    """Draw tables of equal size side by side.

    Args:
        tables: Numbers by the panel's title; NaN stays empty.
        rows: Names of the rows, from the top.
        columns: Names of the columns.
        ylabel: What the rows are.
        xlabel: What the columns are.
        caption: Text under the figure.
        is_difference: Whether colours run about zero.
    """
    finite = np.concatenate([table[np.isfinite(table)] for table in tables.values()] or [np.zeros(0)])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if is_difference:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    high = high if high > low else low + 1e-6
    largest = max(abs(low), abs(high))
    decimals = int(np.clip(2 - np.floor(np.log10(largest)), 0, 6))  # three digits of the largest

    def draw(theme: Theme) -> Canvas:
        canvas = Canvas(figsize=(FULL_WIDTH, 0.9 + 0.42 * len(rows)), layout="constrained")
        panels = canvas.subplots(1, len(tables), squeeze=False)[0]
        for number, (ax, (title, table)) in enumerate(zip(panels, tables.items(), strict=True)):
            image = ax.imshow(table, cmap="RdBu_r" if is_difference else "viridis", vmin=low, vmax=high, aspect="auto")
            ax.set_title(title, color=theme.text)
            ax.set_xticks(range(len(columns)), columns)
            ax.set_yticks(range(len(rows)), rows if number == 0 else [""] * len(rows))
            ax.set_xlabel(xlabel)
            ax.set_ylabel(ylabel if number == 0 else "")
            ax.grid(False)
            for (row, column), value in np.ndenumerate(table):
                red, green, blue, _ = image.cmap(image.norm(value)) if np.isfinite(value) else (1, 1, 1, 1)
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                text = f"{value:z.{decimals}f}".replace("-", "\N{MINUS SIGN}") if np.isfinite(value) else ""
                ax.text(column, row, text, ha="center", va="center", size=8, color="white" if dark else "black")
        return canvas

    names = ", ".join(tables)
    return both_themes(draw, "svg", caption, f"Tables of {len(rows)} rows and {len(columns)} columns: {names}.")
