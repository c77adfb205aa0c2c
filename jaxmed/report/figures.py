"""Figures of a report: arrays in, a record with a light and a dark picture out.

Maps and densities are PNG at 130 dots per inch. Curves, histograms and bars are SVG, their text
drawn as outlines, so that they look the same on every machine, whatever fonts it has. Colour maps
are perceptually uniform (viridis, magma, gray), RdBu_r about zero for differences.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from jaxmed.report.drawing import FULL_WIDTH, both_themes, line_axes, short_label, write_legend
from jaxmed.report.mapgrid import (
    MapGrid,
    draw_color_bar,
    image_size,
    masked_slice,
    nan_unless_finite,
    show_slice,
)
from jaxmed.report.page import Figure, format_column, format_value, superscript
from jaxmed.report.slices import (
    PLANES,
    choose_axis,
    choose_slices,
    crop_box,
    display_range,
    finite_values,
)
from jaxmed.report.themes import LIGHT, Theme

# Beyond this a curve has more points than the screen has columns.
CURVE_POINTS = 1000
# Beyond this single points hide each other.
SCATTER_POINTS = 500
LINE_STYLES = ("-", "--", ":", "-.")


@dataclasses.dataclass(frozen=True)
class MapStyle:
    """How to show one map.

    Attributes:
        unit: Unit of the voxels; empty for a fraction.
        limits: Values at the two ends of the colour bar; None for the first and last percentile.
        colormap: A perceptually uniform matplotlib colour map.
    """

    unit: str = ""
    limits: tuple[float | int, float | int] | None = None
    colormap: str = "viridis"

    def __post_init__(self):
        if self.limits is not None and not self.limits[0] < self.limits[1]:
            raise ValueError(f"MapStyle.limits: expected low < high, found {self.limits}")

    def limits_for(self, values: Float64[np.ndarray, " value"]) -> tuple[float, float]:
        """Return the ends of the colour bar, found from the values where none are set."""
        if self.limits is None:
            return display_range(values)
        return float(self.limits[0]), float(self.limits[1])


class Bar(NamedTuple):
    """One bar of `bars`.

    Attributes:
        label: What was measured.
        value: Length of the bar; NaN when not defined.
        low: Lower end of its interval; NaN for none.
        high: Upper end.
        group: Heading that it stands under; empty for none.
    """

    label: str
    value: float | int
    low: float | int = math.nan
    high: float | int = math.nan
    group: str = ""


def slice_maps(
    maps: Mapping[str, Real[np.ndarray, "x y z"]],
    spacing: tuple[float, float, float],
    *,
    caption: str,
    styles: Mapping[str, MapStyle] | None = None,
    mask: Bool[np.ndarray, "x y z"] | None = None,
    num_slices: int = 6,
) -> Figure:
    """Draw maps of one grid: a row per map, a column per slice.

    Slices are axial and run from inferior to superior, unless those are strips (`choose_axis`).

    Args:
        maps: Volumes in RAS+ by name, on one grid.
        spacing: Voxel size along x, y and z, in mm.
        caption: Text under the figure.
        styles: Unit, range and colours by name; the defaults for names left out.
        mask: Voxels to show, the rest takes the background colour; None for all finite ones.
        num_slices: Most columns.
    """
    mask = _shown_mask(maps, mask)
    axis = choose_axis(mask.shape)
    indices = choose_slices(mask, axis, num_slices)
    box = crop_box(mask, axis)
    styles = {name: (styles or {}).get(name, MapStyle()) for name in maps}
    values = {name: finite_values(volume, mask) for name, volume in maps.items()}
    ranges = {name: styles[name].limits_for(values[name]) for name in maps}

    def draw(theme: Theme) -> Canvas:
        grid = MapGrid.make(len(maps), [len(indices)], image_size(spacing, axis, box))
        canvas = grid.canvas(theme, [f"{PLANES[axis]} {index}" for index in indices], axis)
        for row, (name, volume) in enumerate(maps.items()):
            grid.write_label(canvas, theme, row, name, [styles[name].unit])
            for column, index in enumerate(indices):
                image, ax = masked_slice(volume, mask, axis, index, box), grid.axes(canvas, row, column)
                show_slice(ax, image, styles[name].colormap, ranges[name], spacing, axis)
            bar = grid.bar_axes(canvas, row, 0)
            draw_color_bar(bar, styles[name].colormap, ranges[name], values[name])
        return canvas

    names = ", ".join(maps)
    positions = ", ".join(str(index) for index in indices)
    alt = f"{PLANES[axis].capitalize()} slices {positions} of the maps {names}."
    return both_themes(draw, "png", caption, alt)


def map_comparison(
    truth: Mapping[str, Real[np.ndarray, "x y z"]],
    estimate: Mapping[str, Real[np.ndarray, "x y z"]],
    spacing: tuple[float, float, float],
    *,
    caption: str,
    styles: Mapping[str, MapStyle] | None = None,
    mask: Bool[np.ndarray, "x y z"] | None = None,
) -> Figure:
    """Draw truth, estimate and difference (estimate minus truth) of each map in the slice amid the mask.

    Args:
        truth: Volumes in RAS+ by name, on one grid.
        estimate: The same names on the same grid.
        spacing: Voxel size along x, y and z, in mm.
        caption: Text under the figure.
        styles: Unit, range and colours by name; the difference has its own range, about zero.
        mask: Voxels to show and to compare; None for all finite ones.
    """
    _check_names(truth, estimate)
    mask = _shown_mask(truth, mask)
    axis = choose_axis(mask.shape)
    (index,) = choose_slices(mask, axis, 1)
    box = crop_box(mask, axis)
    styles = {name: (styles or {}).get(name, MapStyle()) for name in truth}
    difference = {
        name: nan_unless_finite(estimate[name]) - nan_unless_finite(truth[name].astype(np.float64)) for name in truth
    }

    def draw(theme: Theme) -> Canvas:
        grid = MapGrid.make(len(truth), [2, 1], image_size(spacing, axis, box))
        canvas = grid.canvas(theme, ("truth", "estimate", "difference"), axis)
        for row, name in enumerate(truth):
            style = styles[name]
            errors = finite_values(difference[name], mask)
            both = np.concatenate([finite_values(m[name], mask) for m in (truth, estimate)])
            limits = style.limits_for(both)
            largest = float(np.percentile(np.abs(errors), 99)) if errors.size else 0.0
            largest = largest or (limits[1] - limits[0]) / 10
            panels = (
                (truth[name], style.colormap, limits),
                (estimate[name], style.colormap, limits),
                (difference[name], "RdBu_r", (-largest, largest)),
            )
            for column, (volume, colormap, ends) in enumerate(panels):
                image = masked_slice(volume, mask, axis, index, box)
                show_slice(grid.axes(canvas, row, column), image, colormap, ends, spacing, axis)
            draw_color_bar(grid.bar_axes(canvas, row, 0), style.colormap, limits, both)
            draw_color_bar(grid.bar_axes(canvas, row, 1), "RdBu_r", (-largest, largest), errors)
            lines = [style.unit, f"bias {format_value(_mean(errors), 2)}"]
            lines.append(f"MAE {format_value(_mean(np.abs(errors)), 2)}")
            grid.write_label(canvas, theme, row, name, lines)
        return canvas

    names = ", ".join(truth)
    alt = f"Truth, estimate and difference of {names} in {PLANES[axis]} slice {index}."
    return both_themes(draw, "png", caption, alt)


def histograms(
    values: Mapping[str, Real[np.ndarray, " _"]],
    *,
    caption: str,
    units: Mapping[str, str] | None = None,
    bins: int = 50,
) -> Figure:
    """Draw a panel per name with the distribution of its finite values and their median.

    Args:
        values: Values by name; lengths may differ.
        caption: Text under the figure.
        units: Unit by name.
        bins: Bins from the first to the last percentile, widened by a tenth; the rest is left out.
    """
    finite = {name: _finite_vector(vector) for name, vector in values.items()}

    def draw(theme: Theme) -> Canvas:
        canvas, panels = _panels(len(finite), columns=4, height=1.85)
        for ax, (name, vector) in zip(panels, finite.items(), strict=True):
            low, high = display_range(vector)
            pad = (high - low) / 10
            counts, edges = np.histogram(vector, bins, (low - pad, high + pad))
            ax.stairs(counts, edges, fill=True, color=theme.cycle[0], alpha=0.22)
            ax.stairs(counts, edges, color=theme.cycle[0], linewidth=1.1)
            _title(ax, name, (units or {}).get(name, ""), theme, pad=19.0)
            ax.yaxis.set_visible(False)
            ax.spines["left"].set_visible(False)
            ax.set_xlim(edges[0], edges[-1])
            ax.set_ylim(0, max(float(counts.max()), 1) * 1.05)
            ax.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
            ax.grid(False)
            if vector.size:
                median = float(np.median(vector))
                ax.axvline(median, color=theme.text, linewidth=1, linestyle=(0, (2, 2)))
            note = f"median {format_value(median, 3)}" if vector.size else "no finite value"
            ax.text(0, 1.04, note, transform=ax.transAxes, color=theme.muted, size=8)
        return canvas

    medians = ", ".join(f"{name} {format_value(np.median(v) if v.size else None, 3)}" for name, v in finite.items())
    return both_themes(draw, "svg", caption, f"Histograms. Medians: {medians}.")


def agreement(
    truth: Mapping[str, Real[np.ndarray, " _"]],
    estimate: Mapping[str, Real[np.ndarray, " _"]],
    *,
    caption: str,
    units: Mapping[str, str] | None = None,
    words: tuple[str, str] = ("truth", "estimate"),
) -> Figure:
    """Draw estimate against truth, a panel per name, with the identity line.

    Each panel states the bias (mean of estimate minus truth), the standard deviation of the
    difference (divisor n - 1), Pearson's r and the number of finite pairs. More than 500 pairs are
    drawn as a density on a logarithmic scale. Axes span percentiles 0.1 to 99.9; numbers use all.

    Args:
        truth: Values by name.
        estimate: The same names and lengths.
        caption: Text under the figure.
        units: Unit by name.
        words: What the two are, where "truth" says too much, such as ("measured", "predicted").
    """
    _check_names(truth, estimate)
    pairs = {name: _finite_pairs(truth[name], estimate[name]) for name in truth}
    numbers = {name: _agreement_text(*pair) for name, pair in pairs.items()}

    def draw(theme: Theme) -> Canvas:
        canvas, panels = _panels(len(pairs), columns=3, height=3.1)
        for ax, (name, (x, y)) in zip(panels, pairs.items(), strict=True):
            both = np.concatenate([x, y])
            low, high = np.percentile(both, [0.1, 99.9]) if both.size else (0.0, 1.0)
            low, high = (low, high) if low < high else display_range(both)
            if x.size > SCATTER_POINTS:
                counts, _, _ = np.histogram2d(x, y, 64, [(low, high)] * 2)
                shown = np.log10(np.where(counts > 0, counts, np.nan))
                # Rare is close to the background, in both themes.
                colormap = "viridis_r" if theme is LIGHT else "viridis"
                span = (low, high, low, high)
                ax.imshow(shown.T, colormap, origin="lower", extent=span, interpolation="nearest")
            else:
                ax.plot(x, y, "o", markersize=3.5, alpha=0.6, markeredgewidth=0, color=theme.cycle[0])
            ax.plot([low, high], [low, high], color=theme.text, linewidth=0.9, linestyle=(0, (4, 3)))
            ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
            ax.set(xlabel=words[0], ylabel=words[1])
            for side in (ax.xaxis, ax.yaxis):
                side.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            ax.grid(False)
            _title(ax, name, (units or {}).get(name, ""), theme)
            patch = {"facecolor": theme.background, "edgecolor": "none", "alpha": 0.75, "pad": 2}
            ax.text(0.03, 0.97, numbers[name], transform=ax.transAxes, va="top", size=8, bbox=patch)
        return canvas

    said = "; ".join(f"{name}: {text.replace(chr(10), ', ')}" for name, text in numbers.items())
    return both_themes(draw, "png", caption, f"{words[1].capitalize()} against {words[0]}. {said}.")


class Band(NamedTuple):
    """One line of `curves` and its interval; all values finite.

    Attributes:
        x: Positions, ascending.
        middle: Values.
        low: Lower ends; equal to the values where there is no interval.
        high: Upper ends.
    """

    x: Float64[np.ndarray, " point"]
    middle: Float64[np.ndarray, " point"]
    low: Float64[np.ndarray, " point"]
    high: Float64[np.ndarray, " point"]


def curves(
    series: Mapping[str, tuple[Real[np.ndarray, " _"], Real[np.ndarray, " _"]] | Band],
    *,
    xlabel: str,
    ylabel: str,
    caption: str,
    log: bool = False,
    log_x: bool = False,
) -> Figure:
    """Draw lines over one x axis, such as losses over steps; intervals are shaded, and their lines have marks.

    Args:
        series: x and y by name, of equal lengths, or bands. Gaps stay where y is not finite (or, on a
            logarithmic axis, not positive). More than 1000 points are thinned evenly.
        xlabel: Name and unit of x.
        ylabel: Name and unit of y.
        caption: Text under the figure.
        log: Whether y has a logarithmic axis.
        log_x: Whether x has one; positions are then positive.
    """
    lines = {name: _thinned(line, log) for name, line in series.items()}
    positions = np.unique(np.concatenate([line[0] for line in lines.values() if len(line) > 2] or [np.zeros(0)]))

    def draw(theme: Theme) -> Canvas:
        canvas, ax = line_axes(theme, xlabel, ylabel)
        has_points = False
        for number, (name, (x, y, *ends)) in enumerate(lines.items()):
            color = theme.cycle[number % len(theme.cycle)]
            if ends:
                ax.fill_between(x, ends[0], ends[1], color=color, alpha=0.18, linewidth=0)
            # A single point has no line; a style per round of colours keeps many series apart.
            style = LINE_STYLES[number // len(theme.cycle) % len(LINE_STYLES)]
            marker = "o" if ends or np.isfinite(y).sum() < 2 else None
            ax.plot(x, y, style, color=color, marker=marker, markersize=4, label=short_label(name))
            has_points = has_points or bool(np.isfinite(y).any())
        if log and has_points:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(numticks=6))
            ax.yaxis.set_major_formatter(FuncFormatter(_power_label))
            ax.yaxis.set_minor_locator(NullLocator())
            _span_a_decade(ax)
        elif has_points:
            _span_a_percent(ax)
        if log_x:
            ax.set_xscale("log")
            ax.xaxis.set_minor_locator(NullLocator())
        if 0 < len(positions) <= 10:
            ax.set_xticks(positions)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value, 3)))
        ax.margins(x=0.05 if len(positions) else 0.01)
        write_legend(ax, len(lines))
        if not has_points:
            _write_empty(ax, theme)
        return canvas

    last = {name: [format_value(_last(column)) for column in columns] for name, (_, *columns) in lines.items()}
    told = [f"{name} {y}" + (f" ({' to '.join(ends)})" if ends else "") for name, (y, *ends) in last.items()]
    intervals = ", with intervals" if len(positions) else ""
    alt = f"{ylabel} over {xlabel}{intervals}. Last values: {', '.join(told)}."
    return both_themes(draw, "svg", caption, alt)


def bars(rows: Sequence[Bar], *, xlabel: str, caption: str) -> Figure:
    """Draw horizontal bars from zero, with intervals, numbers and group headings.

    Args:
        rows: Bars from top to bottom; equal labels have equal colours when there are groups.
        xlabel: What the length means, and its unit.
        caption: Text under the figure.
    """
    labels = list(dict.fromkeys(row.label for row in rows))
    has_groups = any(row.group for row in rows)

    def draw(theme: Theme) -> Canvas:
        canvas = Canvas(layout="constrained")
        ax = canvas.add_subplot()
        position, group, ticks = 0.0, "", []
        beside = ax.get_yaxis_transform()
        for row in rows:
            if row.group != group:
                position += 0.4 if ticks else 0.0
                ticks.append((position, row.group, "bold"))
                position, group = position + 0.95, row.group
            color = theme.cycle[labels.index(row.label) % len(theme.cycle) if has_groups else 0]
            _draw_interval_bar(ax, theme, position, row, color)
            text = _bar_text(row)
            ax.text(1.02, position, text, transform=beside, va="center", color=theme.text)
            ticks.append((position, row.label, "normal"))
            position += 1
        ax.set_yticks([tick[0] for tick in ticks], [short_label(tick[1]) for tick in ticks])
        for tick, label in zip(ticks, ax.get_yticklabels(), strict=True):
            label.set_fontweight(tick[2])
        ax.set_ylim(max(position, 1) - 0.4, -0.6)
        ax.tick_params("y", length=0, labelcolor=theme.text)
        ax.spines["left"].set_visible(False)
        ax.spines["bottom"].set_visible(False)
        ax.tick_params("x", length=0)
        ax.grid(False, axis="y")
        ax.grid(True, axis="x")
        if any(math.isfinite(row.value) for row in rows):
            ax.axvline(0, color=theme.muted, linewidth=0.9)
        ax.set_xlabel(short_label(xlabel))
        canvas.set_size_inches(FULL_WIDTH, 0.8 + 0.27 * max(position, 1))
        return canvas

    said = "; ".join(f"{f'{row.group}, ' if row.group else ''}{row.label}: {_bar_text(row)}" for row in rows)
    return both_themes(draw, "svg", caption, f"{xlabel}. {said}.")


def _shown_mask(
    maps: Mapping[str, Real[np.ndarray, "x y z"]], mask: Bool[np.ndarray, "x y z"] | None
) -> Bool[np.ndarray, "x y z"]:
    if not maps:
        raise ValueError("maps: expected at least one, found none")
    shapes = {name: volume.shape for name, volume in maps.items()}
    if mask is not None:
        shapes["mask"] = mask.shape
    if len(set(shapes.values())) > 1 or len(next(iter(shapes.values()))) != 3:
        raise ValueError(f"maps: expected volumes of one shape, found {shapes}")
    if mask is not None:
        return mask
    return np.any([np.isfinite(volume) for volume in maps.values()], axis=0)


def _panels(number: int, columns: int, height: float) -> tuple[Canvas, list[Axes]]:
    """Return a figure with `number` axes in rows of at most `columns`; heights in inches."""
    if not number:
        raise ValueError("expected at least one panel, found none")
    rows = math.ceil(number / columns)
    width = FULL_WIDTH * min(number, columns) / columns
    canvas = Canvas(figsize=(width, rows * height), layout="constrained")
    canvas.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # pyright: ignore
    return canvas, [canvas.add_subplot(rows, min(number, columns), i + 1) for i in range(number)]


def _title(ax: Axes, name: str, unit: str, theme: Theme, pad: float = 8.0) -> None:
    text = short_label(f"{name} ({unit})" if unit else name, 32)
    ax.set_title(text, loc="left", color=theme.text, pad=pad)


def _write_empty(ax: Axes, theme: Theme) -> None:
    ax.text(0.5, 0.5, "no finite value", transform=ax.transAxes, ha="center", color=theme.muted)


def _draw_interval_bar(ax: Axes, theme: Theme, position: float, row: Bar, color: str) -> None:
    if math.isfinite(row.value):
        ax.barh(position, row.value, height=0.56, color=color, alpha=0.8)
    if math.isfinite(row.low) and math.isfinite(row.high):
        ax.plot([row.low, row.high], [position] * 2, color=theme.text, linewidth=1.4)


def _bar_text(row: Bar) -> str:
    if not math.isfinite(row.value):
        return "not defined"
    if not (math.isfinite(row.low) and math.isfinite(row.high)):
        return format_value(row.value, 3)
    value, low, high = format_column([row.value, row.low, row.high], digits=3)
    return f"{value}  [{low}, {high}]"


def _power_label(value: float, _: object) -> str:
    exponent = round(math.log10(value)) if value > 0 else 0
    is_short = -3 < exponent < 4 or not math.isclose(value, 10.0**exponent)
    return format_value(value) if is_short else f"10{superscript(exponent)}"


def _span_a_decade(ax: Axes) -> None:
    # Curves that stay within a decade would have an axis without a single label.
    low, high = ax.get_ylim()
    ax.set_ylim(
        min(low, 10.0 ** math.floor(math.log10(low) + 0.999)) if high / low < 10 else low,
        max(high, 10.0 ** math.ceil(math.log10(high) - 0.001)) if high / low < 10 else high,
    )


def _span_a_percent(ax: Axes) -> None:
    # The last digits of what stays as it is would look like a course.
    low, high = ax.get_ylim()
    middle = (low + high) / 2
    reach = max(high - low, 0.02 * abs(middle)) / 2
    ax.set_ylim(middle - reach, middle + reach)


def _thinned(line: Sequence[Real[np.ndarray, " _"]], log: bool) -> list[Float64[np.ndarray, " _"]]:
    """Return x, y and the ends of its interval, where it has one."""
    x, y = line[:2]
    if len(x) != len(y):
        raise ValueError(f"series: expected as many y as x, found {len(y)} and {len(x)}")
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), CURVE_POINTS)).round().astype(int))
    x, *columns = (nan_unless_finite(column[keep].astype(np.float64)) for column in line)
    return [x, *(np.where(column > 0, column, np.nan) if log else column for column in columns)]


def _last(y: Float64[np.ndarray, " _"]) -> float:
    y = y[np.isfinite(y)]
    return float(y[-1]) if y.size else math.nan


def _finite_vector(vector: Real[np.ndarray, " _"]) -> Float64[np.ndarray, " _"]:
    vector = vector.astype(np.float64)
    return vector[np.isfinite(vector)]


def _finite_pairs(
    truth: Real[np.ndarray, " _"], estimate: Real[np.ndarray, " _"]
) -> tuple[Float64[np.ndarray, " _"], Float64[np.ndarray, " _"]]:
    if truth.shape != estimate.shape:
        raise ValueError(f"estimate: expected the shape of truth {truth.shape}, found {estimate.shape}")
    is_finite = np.isfinite(truth) & np.isfinite(estimate)
    return truth[is_finite].astype(np.float64), estimate[is_finite].astype(np.float64)


def _agreement_text(x: Float64[np.ndarray, " pair"], y: Float64[np.ndarray, " pair"]) -> str:
    error = y - x
    sd = float(error.std(ddof=1)) if error.size > 1 else math.nan
    spread = float(x.std() * y.std()) if x.size > 1 else 0.0
    r = float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread > 0 else math.nan
    return f"bias {format_value(_mean(error), 3)}\nsd {format_value(sd, 3)}\nr {format_value(r, 3)}\nn {x.size}"


def _mean(values: Float64[np.ndarray, " _"]) -> float:
    return float(values.mean()) if values.size else math.nan


def _check_names(truth: Mapping[str, object], estimate: Mapping[str, object]) -> None:
    if set(truth) != set(estimate):
        raise ValueError(f"estimate: expected the names {list(truth)}, found {list(estimate)}")
