"""The report page: well formed, self-contained, safe with hostile text, the same every time."""

import html.parser
import re

import numpy as np
import pytest

from jaxmed.files import write_text
from jaxmed.report.page import (
    Figure,
    Note,
    Section,
    Table,
    Text,
    format_column,
    format_seconds,
    format_value,
    render,
)
from jaxmed.report.themes import DARK, LIGHT

HOSTILE = "</style><script>alert('x')</script>\"'&<img src=x onerror=alert(1)>\x00\udc80"
VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


def svg(color: str) -> bytes:
    """Return a small picture."""
    namespace = "http://www.w3.org/2000/svg"
    return f'<svg xmlns="{namespace}" width="72pt" height="36pt" fill="{color}"/>'.encode()


class Reader(html.parser.HTMLParser):
    """Collects elements, and fails on a tag that closes what is not open."""

    def __init__(self, page: str):
        """Read a whole page."""
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        """Note an element."""
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        """Close the innermost element, which has to be this one."""
        assert self.open.pop() == tag

    def handle_data(self, data):
        """Keep text outside of the style sheet."""
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        """Return the attributes of the elements of some kinds, in order."""
        return [attributes for tag, attributes in self.elements if tag in tags]


def full_page(text: str = "A page") -> str:
    """Return a page with every kind of part, `text` wherever text may stand."""
    figure = Figure(svg("black"), svg("white"), text, text)
    table = Table([text, "value"], [[text, 1.5], ["b", float("nan")]], text)
    blocks = [Text([text, text]), figure, table, Note(text), Note(text, "warning")]
    return render(
        title=text,
        subtitle=text,
        summary=[(text, text, text), ("n", 12345, ""), ("r", float("nan"), "")],
        sections=[Section(text, blocks), *(Section(f"{text} {i}") for i in range(3))],
        config={text: {text: [1, text], "empty": {}}, "rate": 3e-4},
        timing={text: 1.5, "nothing": 0.0, "lost": float("nan")},
        software={text: text},
        command=text,
    )


def test_page_is_well_formed_and_ordered():
    reader = Reader(full_page())
    assert reader.open == []
    levels = [int(tag[1]) for tag, _ in reader.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert reader.all("html")[0]["lang"] == "en"
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_page_needs_nothing_from_elsewhere():
    page = full_page("See https://doi.org/10.1000/1 and arXiv:2507.12632.")
    reader = Reader(page)
    assert not reader.all("script", "link", "iframe", "object", "base")
    for tag, attributes in reader.elements:
        for name in ("src", "srcset", "href"):
            target = attributes.get(name) or ""
            if tag == "a" and name in attributes:
                assert target.startswith(("https://doi.org/", "https://arxiv.org/abs/", "#"))
            elif name in attributes:
                assert target.startswith("data:image/")
        assert not any(name.startswith("on") for name in attributes)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in style


def test_hostile_text_stays_text():
    plain, hostile = Reader(full_page("a b")), Reader(full_page(HOSTILE))
    assert [tag for tag, _ in plain.elements] == [tag for tag, _ in hostile.elements]
    assert "alert('x')" in hostile.text
    full_page(HOSTILE).encode("utf-8")


def test_link_ends_before_quotes_brackets_and_full_stops():
    text = 'Read (https://a.org/x?a=1&b=2). "https://b.org/"onclick="x" <https://c.org>'
    reader = Reader(render("t", "", sections=[Section("s", [Text([text])])]))
    targets = [attributes["href"] for attributes in reader.all("a")]
    assert targets == ["https://a.org/x?a=1&b=2", "https://b.org/", "https://c.org"]
    assert text in reader.text


def test_figures_have_both_themes_an_alternative_and_a_size():
    reader = Reader(full_page())
    (source,), (image,) = reader.all("source"), reader.all("img")
    assert source["media"] == "(prefers-color-scheme: dark)"
    assert source["srcset"] != image["src"]
    assert image["alt"] == "A page"
    assert (image["width"], image["height"]) == ("96", "48")
    assert len(reader.all("figure")) == len(reader.all("figcaption")) == 1
    assert LIGHT.background in full_page() and DARK.background in full_page()


def test_figure_refuses_what_a_browser_cannot_show():
    with pytest.raises(ValueError, match="dark"):
        Figure(svg("black"), b"nonsense", "caption", "alt")
    with pytest.raises(ValueError, match="alt"):
        Figure(svg("black"), svg("white"), "caption", " ")


def test_empty_parts_make_a_page():
    reader = Reader(render("Title", ""))
    assert reader.open == [] and not reader.all("nav", "section")
    reader = Reader(render("Title", "", sections=[Section("Empty"), Section("T", [Table([], [])])]))
    assert "Nothing to show." in reader.text and "no rows" in reader.text


@pytest.mark.parametrize(("num", "has_contents"), [(3, False), (4, True)])
def test_contents_appear_beyond_three_sections(num, has_contents):
    reader = Reader(render("Title", "", sections=[Section(str(i)) for i in range(num)]))
    assert bool(reader.all("nav")) == has_contents
    assert len(reader.all("a")) == (num if has_contents else 0)


def test_undefined_values_are_said_not_printed():
    page = full_page()
    text = Reader(page).text
    assert "nan" not in text.lower() and "not defined" in text
    assert '<span class="undefined" title="not defined">—</span>' in page


def test_columns_of_sentences_are_not_narrow():
    note = "no test: differences between pairs: expected some that vary, found all equal"
    page = render("T", "", sections=[Section("S", [Table(("arm", "p", "note"), [("a", None, note), ("b", 0.1, "")])])])
    assert page.count('<td class="prose">') == 2 and page.count('<th scope="col" class="prose">') == 1
    assert ".prose{min-width" in page


def test_table_refuses_ragged_rows():
    with pytest.raises(ValueError, match=r"rows\[1\]: expected 2 cells, found 1"):
        Table(["a", "b"], [[1, 2], [3]])


def test_config_is_exact_and_complete():
    text = Reader(render("t", "", config={"a": {"rate": 3e-4, "name": "1"}, "n": [1, 2]})).text
    for part in ("0.0003", '"1"', "[1, 2]", "rate"):
        assert part in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (float("nan"), "—"),
        (np.float32("nan"), "—"),
        (True, "yes"),
        (np.bool_(False), "no"),
        (2026, "2026"),
        (np.int64(-3), "−3"),
        (0.0, "0"),
        (0.5, "0.5"),
        (-1234.56, "−1235"),
        (1.25e-7, "1.25 × 10⁻⁷"),
        (float("-inf"), "−∞"),
        (np.array(2.5), "2.5"),
        ("word", "word"),
    ],
)
def test_values_read_well(value, text):
    assert format_value(value) == text


def test_columns_align_unless_small_values_would_vanish():
    assert format_column([0.5, 0.1234, None, -1.0]) == ["0.500", "0.123", "—", "−1.000"]
    assert format_column([1000.0, 0.001]) == ["1000", "0.001"]
    assert format_column([-0.0, 2.5]) == ["0.000", "2.500"]
    assert format_column([float("inf"), 1.0, 7]) == ["∞", "1.000", "7"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 ms"), (0.21, "210 ms"), (99.0, "99 s"), (125.0, "2 min 5 s"), (9000.0, "2 h 30 min")],
)
def test_durations_take_the_unit_that_suits(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("name", ["text", "muted", "accent", "warning"])
def test_text_has_contrast_of_level_aa(theme, name):
    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    for ground in (theme.background, theme.surface):
        low, high = sorted([luminance(getattr(theme, name)), luminance(ground)])
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_same_arguments_write_the_same_page(tmp_path):
    path = tmp_path / "run" / "report.html"
    write_text(path, render("Title", "Subtitle", software={"jax": "0.10.2"}))
    assert path.read_text("utf-8") == render("Title", "Subtitle", software={"jax": "0.10.2"})
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
