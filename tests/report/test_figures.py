"""Figures: oriented, drawn in two themes, and calm about maps with nothing to show."""

import io
import re
import xml.etree.ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas
from PIL import Image

from jaxmed.report.drawing import PNG_LIMIT, both_themes
from jaxmed.report.figures import (
    Band,
    Bar,
    MapStyle,
    agreement,
    bars,
    curves,
    histograms,
    map_comparison,
    slice_maps,
)
from jaxmed.report.page import Figure
from jaxmed.report.slices import (
    choose_axis,
    choose_slices,
    crop_box,
    display_range,
    slice_image,
    slice_spacing,
)
from jaxmed.report.themes import DARK, LIGHT

SPACING = (2.0, 2.0, 2.5)
HOSTILE = "$\\frac{<b>&\n\x00 \udc80 \U0001f9e0 " + "x" * 200


def pixels(image: bytes) -> np.ndarray:
    """Decode a PNG to RGB."""
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def check(figure: Figure, form: str = "png") -> None:
    """Assert that both pictures decode, hold more than the background, and differ."""
    assert figure.light != figure.dark and figure.alt and figure.caption
    for image, theme in ((figure.light, LIGHT), (figure.dark, DARK)):
        if form == "svg":
            root = xml.etree.ElementTree.fromstring(image)
            assert root.tag.endswith("svg") and theme.background.encode() in image
            assert b"<script" not in image and b'xlink:href="http' not in image
        else:
            shown = pixels(image)
            background = tuple(int(theme.background[i : i + 2], 16) for i in (1, 3, 5))
            assert np.abs(shown[0, 0].astype(int) - background).max() <= 2
            assert (shown != shown[0, 0]).any()
            assert len(image) < PNG_LIMIT


def ball(shape=(24, 28, 20)) -> np.ndarray:
    """Return a smooth blob, brightest in the middle, in [0, 1]."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    return np.exp(-2 * sum(axis**2 for axis in axes))


# The pixel of each voxel is worked out by hand; x grows to the patient's right, y to the front, z
# upwards, and the shape is (5, 6, 3).
@pytest.mark.parametrize(
    ("voxel", "axis", "pixel"),
    [
        ((4, 2, 1), 2, [3, 0]),  # patient right: left edge of an axial slice
        ((2, 5, 1), 2, [0, 2]),  # anterior: top of an axial slice
        ((4, 2, 1), 1, [1, 0]),  # patient right: left edge of a coronal slice
        ((2, 2, 2), 1, [0, 2]),  # superior: top of a coronal slice
        ((2, 5, 1), 0, [1, 0]),  # anterior: left edge of a sagittal slice
        ((2, 2, 2), 0, [0, 3]),  # superior: top of a sagittal slice
    ],
)
def test_slices_are_radiological(voxel, axis, pixel):
    volume = np.zeros((5, 6, 3))
    volume[voxel] = 1
    assert np.argwhere(slice_image(volume, axis, voxel[axis])).tolist() == [pixel]


def test_patient_right_is_drawn_at_the_left_of_the_picture():
    volume = np.zeros((16, 16, 1))
    volume[12:, :, :] = 1
    style = {"map": MapStyle(limits=(0, 1), colormap="gray")}
    shown = pixels(slice_maps({"map": volume}, SPACING, caption="c", styles=style).light)
    middle = shown[shown.shape[0] // 2 + 10].astype(int)
    black = np.flatnonzero((middle == 0).all(axis=1))
    white = np.flatnonzero((middle == 255).all(axis=1))
    assert white.size and black.size and white.min() < black.min()


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((128, 128, 60), 2),
        ((20, 20, 4), 2),
        ((4, 10, 10), 0),
        ((10, 4, 10), 1),
        ((256, 256, 1), 2),
        ((30, 256, 256), 0),
        ((1, 1, 1), 2),
    ],
)
def test_slices_are_axial_unless_those_are_strips(shape, axis):
    assert choose_axis(shape) == axis


def test_slices_cover_the_mask():
    mask = np.zeros((8, 9, 40), bool)
    mask[2:5, 3:8, 10:30] = True
    assert choose_slices(mask, 2, 4) == (12, 17, 22, 27)
    assert choose_slices(mask, 0, 10) == (2, 3, 4)
    assert choose_slices(~mask & mask, 2, 2) == (10, 30)
    # Rows run from anterior (y = 8) to posterior, columns from right (x = 7) to left.
    assert crop_box(mask, 2, margin=0) == (slice(1, 6), slice(3, 6))
    assert slice_image(mask, 2, 15)[crop_box(mask, 2, margin=0)].all()
    assert crop_box(~mask & mask, 2) == (slice(0, 9), slice(0, 8))
    assert slice_spacing((1.0, 2.0, 3.0), 2) == (2.0, 1.0)
    assert slice_spacing((1.0, 2.0, 3.0), 0) == (3.0, 2.0)


def test_display_range_ignores_outliers_and_opens_for_constants():
    values = np.append(np.linspace(0, 1, 1001), 1e9)
    low, high = display_range(values)
    assert low == pytest.approx(0.01, abs=1e-3) and high == pytest.approx(0.99, abs=2e-3)
    for value in (0.0, 5.0, -3.0, 1e-30):
        low, high = display_range(np.full(4, value))
        assert low < value < high
    assert display_range(np.zeros(0)) == (0, 1)


def test_maps_are_drawn_with_style_and_mask():
    volume = ball()
    styles = {"NDI": MapStyle("fraction", (0, 1)), "residual": MapStyle(colormap="magma")}
    maps = {"NDI": volume, "residual": (volume / 7).astype(np.float32)}
    figure = slice_maps(maps, SPACING, caption="c", styles=styles, mask=volume > 0.2)
    check(figure)
    assert "axial slices" in figure.alt.lower() and "NDI, residual" in figure.alt


def test_comparison_shows_differences():
    truth, estimate = {"NDI": ball()}, {"NDI": ball() + 0.1}
    check(map_comparison(truth, estimate, SPACING, caption="c", mask=ball() > 0.2))
    with pytest.raises(ValueError, match="names"):
        map_comparison(truth, {"ODI": ball()}, SPACING, caption="c")


AWKWARD = {
    "nan": np.full((6, 6, 6), np.nan),
    "infinite": np.full((6, 6, 6), np.inf),
    "constant": np.full((6, 6, 6), 3.0),
    "zero": np.zeros((6, 6, 6)),
    "one voxel": np.ones((1, 1, 1)),
    "integer": np.arange(216).reshape(6, 6, 6),
    "huge": np.full((6, 6, 6), 1e30) * np.arange(6),
    "strip": np.ones((1, 40, 1)),
    "sagittal": ball((4, 10, 10)),
    "flat": ball((20, 20, 4)),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_maps_are_drawn_without_a_warning(name):
    volume = AWKWARD[name]
    check(slice_maps({name: volume}, SPACING, caption="c"))
    check(map_comparison({name: volume}, {name: volume}, SPACING, caption="c"))
    check(slice_maps({name: volume}, SPACING, caption="c", mask=np.zeros(volume.shape, bool)))
    vector = volume.ravel()
    check(histograms({name: vector}, caption="c"), "svg")
    check(agreement({name: vector}, {name: vector[::-1].copy()}, caption="c"))


def test_no_map_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        slice_maps({}, SPACING, caption="c")


def test_noise_stays_within_the_size_limit():
    noise = np.random.default_rng(0).normal(size=(128, 128, 40))
    check(slice_maps(dict.fromkeys("abcd", noise), SPACING, caption="c"))


def test_histograms_state_medians():
    figure = histograms({f"map {i}": np.arange(101.0) for i in range(6)}, caption="c", bins=10)
    check(figure, "svg")
    assert "map 5 50" in figure.alt
    check(histograms({"none": np.zeros(0)}, caption="c"), "svg")


def test_agreement_states_bias_spread_and_correlation():
    x = np.linspace(0, 1, 2000)
    figure = agreement({"NDI": x}, {"NDI": x + 0.25}, caption="c", units={"NDI": "fraction"})
    check(figure)
    assert "bias 0.25" in figure.alt and "r 1" in figure.alt and "n 2000" in figure.alt
    constant = agreement({"NDI": np.ones(5)}, {"NDI": x[:5]}, caption="c")
    assert "r —" in constant.alt
    lost = agreement({"NDI": np.array([np.nan, 1.0])}, {"NDI": np.array([1.0, 2.0])}, caption="c")
    assert "n 1" in lost.alt and "sd —" in lost.alt


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "y",
    [
        np.exp(-np.linspace(0, 9, 5000)),
        np.zeros(3),
        np.full(4, np.nan),
        np.array([1.0]),
        np.zeros(0),
        np.array([1.0, np.nan, -2.0, np.inf, 0.5]),
        np.full(5, 0.02),
        np.array([1e-30, 1e30]),
    ],
)
def test_curves_survive_any_values(y, log):
    x = np.arange(len(y))
    series = {"train": (x, y), "valid": (x, y / 2)}
    figure = curves(series, xlabel="step", ylabel="loss", caption="c", log=log)
    check(figure, "svg")
    assert len(figure.light) < 150_000


def test_the_last_digits_of_a_constant_are_not_drawn_as_a_course():
    def height(y):
        figure = curves({"a": (np.arange(5), y)}, xlabel="x", ylabel="y", caption="c")
        paths = xml.etree.ElementTree.fromstring(figure.light).findall(".//{*}path")
        line = next(path.get("d") for path in paths if LIGHT.cycle[0] in path.get("style", ""))
        across = np.array([pair.split() for pair in re.findall(r"[ML] ([\d. ]+)", line)], float)
        return np.ptp(across[:, 1])

    up_and_down = np.array([0, 1, 2, 1, 0.0])
    assert height(1 / 3 + 1e-6 * up_and_down) < 0.1 < 100 < height(1 / 3 + 0.1 * up_and_down)


def test_curves_refuse_unequal_lengths():
    with pytest.raises(ValueError, match="as many y as x"):
        curves({"a": (np.arange(3), np.arange(4.0))}, xlabel="x", ylabel="y", caption="c")


def test_a_band_is_drawn_for_both_themes_and_told_in_words():
    x, middle = np.array([0.01, 0.1, 1.0]), np.array([0.6, 0.7, 0.8])
    bands = {"mae": Band(x, middle, middle - 0.1, middle + 0.1), "scratch": Band(x, middle / 2, middle / 2, middle / 2)}
    figure = curves(bands, xlabel="share of labels", ylabel="AUROC", caption="c", log_x=True)
    assert b"<svg" in figure.light and figure.light != figure.dark
    assert "mae 0.8 (0.7 to 0.9), scratch 0.4 (0.4 to 0.4)" in figure.alt
    again = curves(bands, xlabel="share of labels", ylabel="AUROC", caption="c", log_x=True)
    assert figure.light == again.light


def test_bars_state_intervals_and_gaps():
    rows = [Bar("MLP", 0.84, 0.8, 0.9, "NDI"), Bar("AMICO", float("nan"), group="NDI")]
    figure = bars([*rows, Bar("MLP", -0.2, group="ODI")], xlabel="r", caption="c")
    check(figure, "svg")
    assert "NDI, MLP: 0.840  [0.800, 0.900]" in figure.alt and "AMICO: not defined" in figure.alt
    check(bars([], xlabel="r", caption="c"), "svg")


def test_hostile_names_are_drawn_as_they_are():
    vector = np.arange(5.0)
    check(slice_maps({HOSTILE: ball()}, SPACING, caption=HOSTILE))
    check(agreement({HOSTILE: vector}, {HOSTILE: vector}, caption="c", units={HOSTILE: HOSTILE}))
    check(curves({HOSTILE: (vector, vector)}, xlabel=HOSTILE, ylabel="$x", caption="c"), "svg")
    check(bars([Bar(HOSTILE, 1.0, group="$\\a$")], xlabel="$\\b$", caption="c"), "svg")


def test_figures_repeat_exactly_and_leave_matplotlib_alone():
    before = dict(matplotlib.rcParams)
    make = [
        lambda: slice_maps({"a": ball()}, SPACING, caption="c"),
        lambda: curves({"a": (np.arange(9), np.arange(9.0))}, xlabel="x", ylabel="y", caption="c"),
    ]
    for draw in make:
        assert draw() == draw()
    assert dict(matplotlib.rcParams) == before


def test_style_refuses_an_empty_range():
    with pytest.raises(ValueError, match="low < high"):
        MapStyle(limits=(1, 1))


@pytest.mark.parametrize("form", ["png", "svg"])
def test_names_that_are_no_utf8_can_be_drawn(form):
    def draw(theme):
        canvas = Canvas()
        axes = canvas.subplots()
        axes.plot([1, 2], label="caf\udce9")
        axes.set_title("caf\udce9")
        axes.legend()
        return canvas

    assert both_themes(draw, form, "a", "b").light
