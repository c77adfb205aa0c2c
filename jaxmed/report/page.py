"""The page that every stage writes: one HTML file that opens without network or font.

No script runs but that of the viewer of volumes (`viewer.py`), on pages that have one.

Colours, narrow screens, dark mode and print are in `themes.py`. Figures are records of encoded
images, so that this file draws nothing; `figures.py` makes them.
"""

import base64
import dataclasses
import html
import itertools
import json
import math
import numbers
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from jaxmed.report.themes import style_sheet
from jaxmed.report.viewer import Viewer, viewer_library, viewer_markup, viewer_policy

# The reader's browser holds the page to its promise: nothing is fetched, and no script runs but the viewer's.
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PNG_DPI = 130
CSS_DPI = 96
NOT_DEFINED = "—"
PROSE = 48  # characters from which a cell is a sentence, which a narrow column would break into a tower

Tile = tuple[str, object, str]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One picture, drawn for both colour schemes.

    Attributes:
        light: PNG (at 130 dots per inch) or SVG file for a light page.
        dark: The same for a dark page.
        caption: What to see, with the units; plain text.
        alt: What the picture shows, for those who cannot see it; not empty.
    """

    light: bytes
    dark: bytes
    caption: str
    alt: str

    def __post_init__(self):
        if not self.alt.strip():
            raise ValueError("Figure.alt: expected a description of the picture, found none")
        for name, image in (("light", self.light), ("dark", self.dark)):
            if not _is_png(image) and b"<svg" not in image:
                raise ValueError(f"Figure.{name}: expected a PNG or SVG file, found other bytes")


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under named columns.

    Attributes:
        columns: Headings, each with its unit.
        rows: One cell per column. Floats are rounded to four digits; None and NaN become a dash.
        caption: What to see; plain text.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""

    def __post_init__(self):
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"Table.rows[{number}]: expected {len(self.columns)} cells, found {len(row)}")


@dataclasses.dataclass(frozen=True)
class Note:
    """A remark set apart from the text; a warning says what the reader must not overlook."""

    text: str
    kind: Literal["info", "warning"] = "info"


@dataclasses.dataclass(frozen=True)
class Text:
    """Paragraphs of plain text; addresses (https://...) and arXiv numbers become links."""

    paragraphs: Sequence[str]


Block = Figure | Table | Note | Text | Viewer


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what follows it; without blocks it says that there is nothing to show."""

    title: str
    blocks: Sequence[Block] = ()


def render(
    title: str,
    subtitle: str,
    summary: Sequence[Tile] = (),
    sections: Sequence[Section] = (),
    config: Mapping[str, object] | None = None,
    timing: Mapping[str, float] = MappingProxyType({}),
    software: Mapping[str, str] | None = None,
    command: str = "",
) -> str:
    """Lay out a page.

    The same arguments give the same text: the page holds no date and no path of its own.

    Args:
        title: System and stage.
        subtitle: What was done to which data, in one sentence.
        summary: The numbers to read first: label, value, and unit or explanation.
        sections: The body. More than three get a table of contents.
        config: Complete configuration of the run, nested.
        timing: Seconds of what was timed, by name.
        software: Version by package.
        command: Command line that repeats the run.

    Returns:
        A complete HTML document.
    """
    run = _run_section(config or {}, timing, software or {}, command)
    has_contents = len(sections) > 3
    contents = _contents([section.title for section in sections], bool(run)) if has_contents else ""
    figures, tables = itertools.count(1), itertools.count(1)
    body = "\n".join(
        f'<section id="section-{number}">\n<h2>{escape(section.title)}</h2>\n'
        + (_blocks(section.blocks, figures, tables) or '<p class="empty">Nothing to show.</p>')
        + "\n</section>"
        for number, section in enumerate(sections, 1)
    )
    tiles = "\n".join(_tile(*tile) for tile in summary)
    has_viewer = any(isinstance(block, Viewer) for section in sections for block in section.blocks)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}{viewer_policy() if has_viewer else ""}">
<title>{escape(title)}</title>
<style>
{style_sheet()}</style>
</head>
<body>
<div class="page{" has-contents" if has_contents else ""}">
<header>
<h1>{escape(title)}</h1>
{f'<p class="subtitle">{escape(subtitle)}</p>' if subtitle else ""}
{f'<dl class="summary">{tiles}</dl>' if tiles else ""}
</header>
{contents}
<main>
{body}
{run}
</main>
</div>
{viewer_library() if has_viewer else ""}
</body>
</html>
"""


def escape(text: object) -> str:
    """Make any text safe inside HTML elements and quoted attributes."""
    return html.escape(printable(str(text)))


def printable(text: str) -> str:
    """Replace control characters and lone surrogates (of odd file names) by U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def format_value(value: object, digits: int = 4) -> str:
    """Write a value for reading: floats rounded, with a true minus; None and NaN as a dash.

    Args:
        value: Anything; a scalar array counts as its number.
        digits: Significant digits of a float.
    """
    value = _scalar(value)
    if is_undefined(value):
        return NOT_DEFINED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return str(value).replace("-", "−")
    if isinstance(value, numbers.Real):
        return _format_float(float(value), digits)
    return str(value)


def is_undefined(value: object) -> bool:
    """Tell whether a value is None or NaN."""
    value = _scalar(value)
    return value is None or (isinstance(value, numbers.Real) and math.isnan(value))


def _scalar(value: object) -> object:
    # NumPy and JAX scalars, without importing either.
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", None) == 0 else value


def _format_float(value: float, digits: int) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if -4 <= int(exponent) < 6:
        text = f"{value:.{max(digits - 1 - int(exponent), 0)}f}"
        return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
    mantissa = mantissa.rstrip("0").rstrip(".").replace("-", "−")
    return f"{mantissa} × 10{superscript(int(exponent))}"


def format_column(column: Sequence[object], digits: int = 4) -> list[str]:
    """Write values under one another: floats share their decimals where that loses none of them.

    Args:
        column: Values of any kind; None and NaN become a dash.
        digits: Significant digits of the largest float.
    """
    column = [_scalar(value) for value in column]
    floats = [abs(value) for value in column if isinstance(value, float) and math.isfinite(value)]
    sizes = [size for size in floats if size > 0]
    if not sizes or not _is_numeric(column):
        return [format_value(value, digits) for value in column]
    decimals = max(digits - 1 - math.floor(math.log10(max(sizes))), 0)
    if not (max(sizes) < 1e6 and decimals <= 7 and min(sizes) >= 10.0 ** (1 - decimals)):
        return [format_value(value, digits) for value in column]
    return [
        f"{value:z.{decimals}f}".replace("-", "−")
        if isinstance(value, float) and math.isfinite(value)
        else format_value(value, digits)
        for value in column
    ]


def superscript(exponent: int) -> str:
    """Write an integer in raised digits."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def format_seconds(seconds: float) -> str:
    """Write a duration with the unit that suits it."""
    if not math.isfinite(seconds):
        return NOT_DEFINED
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _tile(label: str, value: object, explanation: str) -> str:
    text = "not defined" if is_undefined(value) else format_value(value)
    if re.fullmatch(r"−?\d{5,}", text):
        text = f"{int(text.replace('−', '-')):,}".replace("-", "−").replace(",", "\u202f")
    # Names and sentences would shout at the size of a number.
    kind = "value words" if len(text) > 12 or is_undefined(value) else "value"
    unit = f'<dd class="unit">{escape(explanation)}</dd>' if explanation else ""
    return f'<div><dt>{escape(label)}</dt><dd class="{kind}">{escape(text)}</dd>{unit}</div>'


def _contents(titles: Sequence[str], has_run: bool) -> str:
    entries = [(f"section-{number}", title) for number, title in enumerate(titles, 1)]
    entries += [("run", "This run")] if has_run else []
    items = "\n".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title in entries)
    return f'<nav aria-labelledby="contents"><h2 id="contents">Contents</h2>\n<ol>{items}</ol></nav>'


def _blocks(blocks: Sequence[Block], figures: Iterator[int], tables: Iterator[int]) -> str:
    parts = []
    for block in blocks:
        match block:
            case Figure():
                parts.append(_figure(block, next(figures)))
            case Viewer():
                parts.append(viewer_markup(block, next(figures), _with_links(block.caption)))
            case Table():
                parts.append(_table(block, f"Table {next(tables)}"))
            case Note(text, kind):
                word = "Warning" if kind == "warning" else "Note"
                parts.append(f'<div class="note {kind}" role="note"><strong>{word}</strong> {_with_links(text)}</div>')
            case Text(paragraphs):
                parts += [f"<p>{_with_links(paragraph)}</p>" for paragraph in paragraphs]
    return "\n".join(parts)


def _with_links(text: str) -> str:
    text = escape(text)
    # The text is escaped, so a link ends before the entity of a quote or bracket.
    text = re.sub(
        r"https?://(?:(?!&(?:lt|gt|quot|#x27);)[^\s()])+(?<![.,;:])",
        lambda found: f'<a href="{found[0]}" rel="noreferrer">{found[0]}</a>',
        text,
    )
    return re.sub(
        r"\barXiv:(\d{4}\.\d{4,5})\b",
        r'<a href="https://arxiv.org/abs/\1" rel="noreferrer">arXiv:\1</a>',
        text,
    )


def _figure(figure: Figure, number: int) -> str:
    width, height = _css_size(figure.light)
    wide = ' class="wide"' if width > 600 else ""
    return (
        f'<figure>\n<div class="scroll" role="region" aria-label="Figure {number}" tabindex="0">'
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data_uri(figure.dark)}">'
        f'<img src="{_data_uri(figure.light)}" alt="{escape(figure.alt)}"{wide}'
        f' width="{width}" height="{height}"></picture></div>\n'
        f'<figcaption><span class="number">Figure {number}</span> {_with_links(figure.caption)}'
        "</figcaption>\n</figure>"
    )


def _is_png(image: bytes) -> bool:
    return image.startswith(b"\x89PNG\r\n\x1a\n") and len(image) > 24


def _data_uri(image: bytes) -> str:
    kind = "png" if _is_png(image) else "svg+xml"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


def _css_size(image: bytes) -> tuple[int, int]:
    """Return width and height in CSS pixels, so that the page does not jump while it loads."""
    if _is_png(image):
        width, height = (n * CSS_DPI / PNG_DPI for n in struct.unpack(">II", image[16:24]))
    else:
        # Matplotlib states the size in points, 72 to the inch.
        opening = image[image.index(b"<svg") :].split(b">", 1)[0]
        sizes = [re.search(rb'\b%s="([\d.]+)pt"' % side, opening) for side in (b"width", b"height")]
        width, height = (float(size[1]) * CSS_DPI / 72 if size else 600 for size in sizes)
    return round(width), round(height)


def _table(table: Table, name: str) -> str:
    columns = [[_scalar(row[i]) for row in table.rows] for i in range(len(table.columns))]
    is_numeric = [_is_numeric(column) for column in columns]
    texts = [format_column(column) for column in columns]
    is_prose = [max(map(len, column), default=0) > PROSE for column in texts]
    kinds = [
        ' class="numeric"' if numeric else ' class="prose"' if prose else ""
        for numeric, prose in zip(is_numeric, is_prose, strict=True)
    ]
    head = "".join(
        f'<th scope="col"{kind}>{escape(column)}</th>' for column, kind in zip(table.columns, kinds, strict=True)
    )
    body = "\n".join(
        "<tr>"
        + "".join(
            _cell(texts[i][row], kinds[i], columns[i][row], i == 0 and not is_numeric[0]) for i in range(len(columns))
        )
        + "</tr>"
        for row in range(len(table.rows))
    )
    caption = f'<caption><span class="number">{name}</span> {_with_links(table.caption)}</caption>'
    if not table.rows:
        body = f'<tr><td colspan="{max(len(columns), 1)}" class="undefined">no rows</td></tr>'
    return (
        f'<div class="scroll tabular" role="region" aria-label="{name}" tabindex="0">'
        f"<table>{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _cell(text: str, kind: str, value: object, is_heading: bool) -> str:
    if is_undefined(value):
        text = f'<span class="undefined" title="not defined">{NOT_DEFINED}</span>'
    else:
        text = escape(text)
    return f'<th scope="row">{text}</th>' if is_heading else f"<td{kind}>{text}</td>"


def _is_numeric(column: Sequence[object]) -> bool:
    defined = [value for value in column if not is_undefined(value)]
    return bool(defined) and all(isinstance(value, numbers.Real) and not isinstance(value, bool) for value in defined)


def _run_section(
    config: Mapping[str, object],
    timing: Mapping[str, float],
    software: Mapping[str, str],
    command: str,
) -> str:
    parts = []
    if command:
        parts.append(
            f'<h3>Run again</h3>\n<pre tabindex="0" aria-label="Command line"><code>{escape(command)}</code></pre>'
        )
    if config:
        parts.append(
            "<h3>Configuration</h3>\n<details><summary>All settings"
            f'<span class="count">{_count_leaves(config)}</span></summary>\n'
            f"{_tree(config)}</details>"
        )
    if timing:
        parts.append(f"<h3>Timing</h3>\n{_timing_table(timing)}")
    if software:
        versions = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(version)}</dd></div>" for name, version in software.items()
        )
        parts.append(f'<h3>Software</h3>\n<dl class="versions">{versions}</dl>')
    if not parts:
        return ""
    return '<section id="run" class="run">\n<h2>This run</h2>\n' + "\n".join(parts) + "\n</section>"


def _timing_table(timing: Mapping[str, float]) -> str:
    longest = max((seconds for seconds in timing.values() if math.isfinite(seconds)), default=0)
    rows = []
    for step, seconds in timing.items():
        share = 100 * max(seconds, 0) / longest if longest > 0 and math.isfinite(seconds) else 0
        rows.append(
            f'<tr><th scope="row">{escape(step)}</th><td class="numeric">{format_seconds(seconds)}</td>'
            f'<td class="share" aria-hidden="true"><span style="width:{share:.1f}%"></span></td></tr>'
        )
    head = '<th scope="col">Step</th><th scope="col" class="numeric">Time</th><td></td>'
    return (
        '<div class="scroll tabular" role="region" aria-label="Timing" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _count_leaves(config: Mapping[str, object]) -> int:
    return sum(_count_leaves(v) if isinstance(v, Mapping) and v else 1 for v in config.values())


def _tree(config: Mapping[str, object]) -> str:
    items = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            inner = f"<details open><summary>{escape(key)}</summary>{_tree(value)}</details>"
        else:
            # Settings are shown as config.json has them: exact, and "1" is not 1.
            text = json.dumps(value, ensure_ascii=False, default=str)
            inner = f'<span class="key">{escape(key)}</span><code>{escape(text)}</code>'
        items.append(f"<li>{inner}</li>")
    return f'<ul class="tree">{"".join(items)}</ul>'
