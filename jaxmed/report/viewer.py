"""A viewer of volumes inside a page: all three planes, scrolled and clicked through, without network.

The library is NiiVue (BSD 2-Clause), vendored in `niivue/` by scripts/vendor_viewer. A page holds it once, compressed;
it is unpacked when a reader opens the first viewer, so that pages open as quickly as without one. Where no script runs,
and in print, a viewer is not there: it stands beside static slices, never in place of them.

`volumes.py` makes the records of arrays.
"""

import base64
import dataclasses
import functools
import gzip
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Layer:
    """A volume of a viewer.

    Attributes:
        name: What it shows.
        unit: Unit of its voxels; empty for a fraction.
        file: A compressed NIfTI file whose voxels have 256 steps, the lowest for what is not shown.
        low: Value of the second lowest step.
        high: Value of the highest.
        colors: Colour table of the steps, as NiiVue takes it: "R", "G", "B", "A" at the steps "I".
    """

    name: str
    unit: str
    file: bytes
    low: float
    high: float
    colors: Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Viewer:
    """Volumes to look through, the first beneath one of the others.

    Attributes:
        layers: At least one; those after the first are chosen by name.
        caption: What to see, with the units; plain text.
        chosen: Number of the layer that is chosen at first.
    """

    layers: Sequence[Layer]
    caption: str
    chosen: int = 0

    def __post_init__(self):
        if not self.layers:
            raise ValueError("Viewer.layers: expected at least one volume, found none")


def viewer_markup(viewer: Viewer, number: int, caption: str) -> str:
    """Return a viewer as HTML, hidden until its script runs.

    Args:
        viewer: The volumes.
        number: Of the figure.
        caption: The viewer's, as HTML.
    """
    options = "".join(
        f'<option value="{index}"{" selected" if index == viewer.chosen else ""}>{_escape(layer.name)}</option>'
        for index, layer in enumerate(viewer.layers)
    )
    size = sum(len(layer.file) for layer in viewer.layers) / 1e6
    return (
        f'<figure class="viewer" id="viewer-{number}" hidden>\n'
        f'<button type="button">Look through the volumes ({size:.1f} MB)</button>\n'
        f'<div class="panel" hidden><div class="view"><canvas tabindex="0" role="img" aria-label="Figure {number}: '
        f'{_escape(viewer.caption)}"></canvas></div>\n<div class="controls">'
        f"<label>Show <select>{options}</select></label>"
        '<label>strength <input type="range" min="0" max="1" step="0.05" value="1"></label></div>\n'
        "<output></output></div>\n"
        '<p class="failed"></p>\n'
        + "\n".join(_layer(layer) for layer in viewer.layers)
        + f'\n<figcaption><span class="number">Figure {number}</span> {caption} '
        "Click for a place, scroll or press arrow and page keys to move, drag with the right button to change "
        "brightness.</figcaption>\n</figure>"
    )


def viewer_library() -> str:
    """Return what a page with viewers ends with: the library, and the script that opens them."""
    code = base64.b64encode(_library()).decode("ascii")
    return f'<script type="application/gzip" id="viewer-library">{code}</script>\n<script>{_script()}</script>'


def viewer_policy() -> str:
    """Return what a page with viewers allows itself beside pictures: this script, and the library that it unpacks."""
    digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode("ascii")
    return f"; script-src 'sha256-{digest}' blob:"


def _layer(layer: Layer) -> str:
    step = (layer.high - layer.low) / 254
    told = {"name": layer.name, "unit": layer.unit, "low": layer.low, "high": layer.high, "step": step}
    record = json.dumps(told | {"colors": {key: list(values) for key, values in layer.colors.items()}})
    code = base64.b64encode(layer.file).decode("ascii")
    return f'<script type="application/gzip" data-layer="{_escape(record)}">{code}</script>'


def _escape(text: str) -> str:
    return html.escape(text)


@functools.cache
def _script() -> str:
    return (FOLDER / "viewer.js").read_text(encoding="utf-8")


@functools.cache
def _library() -> bytes:
    # Without a date: the same page every time.
    return gzip.compress((FOLDER / "niivue" / "niivue.umd.js").read_bytes(), 9, mtime=0)
