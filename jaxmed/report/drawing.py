"""One drawing becomes two pictures: the matplotlib side of `themes.py`.

Everything draws on `matplotlib.figure.Figure`; pyplot and its global list of figures stay unused.
Equal drawings give equal bytes.
"""

import io
import warnings
from collections.abc import Callable
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.rcsetup import cycler
from matplotlib.text import Text
from PIL import Image

from jaxmed.report.page import PNG_DPI, Figure, printable
from jaxmed.report.themes import DARK, LIGHT, Theme

# Inches. A figure of full width fills the text column of the page.
FULL_WIDTH = 9.0
# Readers open pages over slow links; a picture of more bytes gets fewer colours.
PNG_LIMIT = 300_000


def both_themes(draw: Callable[[Theme], Canvas], form: Literal["png", "svg"], caption: str, alt: str) -> Figure:
    """Draw once per theme, under that theme's settings.

    Args:
        draw: Makes the drawing; called twice.
        form: PNG for images, SVG for lines and bars.
        caption: Text under the figure.
        alt: Description of the picture.
    """
    return Figure(_encode(draw, LIGHT, form), _encode(draw, DARK, form), caption, alt)


def _encode(draw: Callable[[Theme], Canvas], theme: Theme, form: Literal["png", "svg"]) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_settings(theme)), warnings.catch_warnings():
        # Names may come from files in any script; a box for an unknown letter is good enough.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        canvas = draw(theme)
        for text in canvas.findobj(Text):
            # Of a file name that is no UTF-8, matplotlib takes no letter.
            text.set_text(printable(text.get_text()))
        if form == "svg":
            canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            return buffer.getvalue()
        canvas.savefig(buffer, format="png", dpi=PNG_DPI)
    return _compress(buffer)


def _compress(buffer: io.BytesIO) -> bytes:
    image = Image.open(buffer).convert("RGB")
    data = _png(image)
    # Only noise needs the smaller palettes, and there their steps cannot be seen.
    for colors in (256, 64, 16):
        if len(data) > PNG_LIMIT:
            data = _png(image.quantize(colors, dither=Image.Dither.NONE))
    return data


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _settings(theme: Theme) -> dict[Any, Any]:
    return {
        "font.family": "DejaVu Sans",  # comes with matplotlib, so it is everywhere
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlepad": 8,
        "axes.labelsize": 9,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
        "text.color": theme.text,
        # Names with dollar signs are names, not formulas.
        "text.parse_math": False,
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.muted,
        "axes.linewidth": 0.7,
        "axes.labelcolor": theme.muted,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,  # numbers as they are, and not what is left after "1e-6+3.33e-1"
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.prop_cycle": cycler("color", theme.cycle),
        "grid.color": theme.line,
        "grid.linewidth": 0.7,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "xtick.major.width": 0.7,
        "lines.linewidth": 1.5,
        "svg.fonttype": "path",
        "svg.hashsalt": "jaxmed",
    }


def line_axes(theme: Theme, xlabel: str, ylabel: str, height: float = 3.4) -> tuple[Canvas, Axes]:
    """Return a figure of full width and its axes; what is measured along y stands above them."""
    canvas = Canvas(figsize=(FULL_WIDTH, height), layout="constrained")
    ax = canvas.add_subplot()
    ax.set_xlabel(short_label(xlabel))
    ax.set_title(short_label(ylabel), loc="left", color=theme.muted, size=9, pad=10)
    return canvas, ax


def write_legend(ax: Axes, number: int) -> None:
    """Write the names of lines above the axes, where there are several."""
    if number > 1:
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=min(number, 4), borderaxespad=0.3)


def short_label(text: str, longest: int = 60) -> str:
    """Make a name fit to draw: one line, of at most `longest` letters."""
    text = printable(text).replace("\n", " ")
    return text if len(text) <= longest else text[: longest - 1] + "…"
