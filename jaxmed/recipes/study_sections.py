"""What a page shows of a study: means as bars, curves and tables, differences, examples, and the cells that failed."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Shaped

from jaxmed.arrays.batches import evenly
from jaxmed.errors import InputError
from jaxmed.files import atomic_path, make_folder
from jaxmed.recipes.study import Failure
from jaxmed.recipes.study_tables import Difference, Mean, as_record
from jaxmed.report.figures import Band, Bar, MapStyle, bars, curves, slice_maps
from jaxmed.report.masks import Panel, mask_panels
from jaxmed.report.page import Figure, Section, Table

Label: TypeAlias = Callable[[Any], str]
HEADINGS = {
    "low": "95 % from", "high": "to", "effect_size": "d_z", "p_value": "p",
    "p_corrected": "p corrected",
}  # fmt: skip
SAID_ONCE = ("measure", "baseline", "count", "pairs", "unpaired", "test", "correction")
"""Columns that the caption tells where all rows have the same: a table is read sooner for each that it lacks."""
MOST_EXAMPLES = 4
"""Images that are kept of each cell."""


def mean_table(means: Sequence[Mean], caption: str = "") -> Table:
    """List means, one below the other, with their intervals."""
    records = [as_record(row) for row in means]
    return _table([{name: value for name, value in row.items() if name != "error"} for row in records], caption)


def difference_table(differences: Sequence[Difference], caption: str = "") -> Table:
    """List comparisons, one below the other, with all that is known of each; why some lack a p-value stands above."""
    records = [as_record(row) for row in differences]
    notes = dict.fromkeys(row.note for row in differences if row.note)
    words = " ".join([caption, *(f"{note[0].upper()}{note[1:]}." for note in notes)]).strip()
    return _table([{name: value for name, value in row.items() if name != "note"} for row in records], words)


def side_by_side(
    rows: Sequence[Mean] | Sequence[Difference], label: Label, headings: Mapping[str, str], caption: str
) -> Table:
    """Show several measures of each arm in one line: means, or differences with interval and p.

    Args:
        rows: Means, or comparisons.
        label: Names the line to which a row belongs.
        headings: Heading of each measure, in the order of the columns.
        caption: Text under the table.
    """
    lines: dict[str, dict[str, Mean | Difference]] = {}
    for row in rows:
        lines.setdefault(label(row), {})[row.measure] = row
    cells = [[name, *(_cell(line.get(measure)) for measure in headings)] for name, line in lines.items()]
    return Table(("method", *headings.values()), cells, caption)


def mean_bars(
    means: Sequence[Mean], label: Label, *, xlabel: str, caption: str, group: str = "", scale: float = 1.0
) -> Figure:
    """Draw the means of one measure as bars with their intervals.

    Args:
        means: From top to bottom.
        label: Names a bar.
        xlabel: Name and unit of the measure.
        caption: Text under the figure.
        group: Axis whose values are headings above the bars.
        scale: Factor from the measure to what is drawn, such as 100 for per cent.
    """
    rows = []
    for row in means:
        low, high = (math.nan if end is None else scale * end for end in (row.low, row.high))
        rows.append(Bar(label(row), scale * row.mean, low, high, str(dict(row.group)[group]) if group else ""))
    return bars(rows, xlabel=xlabel, caption=caption)


def mean_curves(
    means: Sequence[Mean],
    *,
    x: str,
    caption: str,
    arm: str = "arm",
    xlabel: str = "",
    ylabel: str = "",
    log_x: bool = False,
    band: Literal["interval", "error"] = "interval",
    scale: float = 1.0,
) -> Figure:
    """Draw the mean of a measure against a numeric axis, a line with a band for each arm.

    Args:
        means: Means of one measure, by `arm` and `x` only.
        x: Axis along the figure, such as "fraction".
        caption: Text under the figure.
        arm: Axis of the lines.
        xlabel: Name and unit of x; empty for the axis's name.
        ylabel: Name and unit of the measure; empty for its name.
        log_x: Whether x has a logarithmic axis.
        band: The 95 % interval, or one standard error to either side.
        scale: Factor from the measure to what is drawn, such as 100 for per cent.

    Raises:
        InputError: There is nothing to draw, x is no number, or there are other measures or axes.
    """
    measures = {row.measure for row in means}
    if len(measures) != 1 or any({axis for axis, _ in row.group} != {arm, x} for row in means):
        raise InputError("curves of a study", f"means of one measure by {arm} and {x}", "others")
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in means:
        group = dict(row.group)
        position, error = group[x], row.error or 0.0
        if isinstance(position, str):
            raise InputError(f"axis '{x}' of the study", "numbers to draw along", f"'{position}'")
        ends = (row.mean - error, row.mean + error) if band == "error" else (row.low, row.high)
        low, high = (row.mean if end is None else end for end in ends)
        point = float(position), scale * row.mean, scale * low, scale * high
        lines.setdefault(str(group[arm]), []).append(point)
    bands = {name: Band(*np.array(sorted(points), np.float64).T) for name, points in lines.items()}
    return curves(bands, xlabel=xlabel or x, ylabel=ylabel or measures.pop(), caption=caption, log_x=log_x)


def failed_cells(failures: Sequence[Failure]) -> list[Section]:
    """Show which cells failed and why; no section where none did."""
    rows = [(str(failure.cell), failure.reason) for failure in failures]
    table = Table(("Cell", "Reason"), rows, "Cells that failed; others were finished.")
    return [Section("Failed", [table])] if rows else []


def keep_examples(outputs: Path, name: str, images: Shaped[np.ndarray, "image ..."]) -> None:
    """Keep some images of a cell for the page: slices, evenly over all of them, or the first volume."""
    shown = images[:1] if images.ndim == 4 else images[evenly(MOST_EXAMPLES, len(images))]
    with atomic_path(make_folder(outputs / "examples") / f"{name}.npy") as temporary:
        np.save(temporary, shown)


def show_examples(outputs: Path, names: Mapping[str, str], style: MapStyle, caption: str) -> Figure:
    """Show images that were kept, a row for each cell.

    Args:
        outputs: As for `keep_examples`.
        names: Name under which each was kept, by the label to show; those that are not there are left out.
        style: Range and colours of all.
        caption: Text under the figure.
    """
    shown = {}
    for label, name in names.items():
        path = outputs / "examples" / f"{name}.npy"
        if path.exists():
            image = np.load(path, allow_pickle=False)
            shown[label] = image[0] if image.ndim == 4 else np.moveaxis(image, 0, -1)
    styles = dict.fromkeys(shown, style)
    return slice_maps(shown, (1.0, 1.0, 1.0), caption=caption, styles=styles, num_slices=MOST_EXAMPLES)


def show_pictures(outputs: Path, names: Mapping[str, str], limits: tuple[float, float], caption: str) -> Figure:
    """Show images that were kept with their first row on top, in the order given, each below its label.

    Args:
        outputs: As for `keep_examples`.
        names: Name under which each was kept, by the label to show; those that are not there are left out.
        limits: Values that are black and white.
        caption: Text under the figure.
    """
    panels = []
    for label, name in names.items():
        path = outputs / "examples" / f"{name}.npy"
        kept = np.load(path, allow_pickle=False) if path.exists() else ()
        panels += [Panel(image, label) for image in kept]
    return mask_panels(panels, columns=MOST_EXAMPLES, caption=caption, alt=f"{len(panels)} images.", limits=limits)


def _cell(row: Mean | Difference | None) -> object:
    if not isinstance(row, Difference):
        return row and row.mean
    if row.difference is None:
        return None
    interval = "" if row.low is None or row.high is None else f" [{row.low:+.3g}, {row.high:+.3g}]"
    return f"{row.difference:+.3g}{interval}" + ("" if row.p_corrected is None else f", p {row.p_corrected:.2g}")


def _table(records: Sequence[Mapping[str, object]], caption: str) -> Table:
    columns = list(dict.fromkeys(name for record in records for name in record))
    same = {name: records[0].get(name) for name in columns if name in SAID_ONCE and len(records) > 1
            and len({str(record.get(name)) for record in records}) == 1}  # fmt: skip
    said = ", ".join(f"{HEADINGS.get(name, name)} {value}" for name, value in same.items() if value not in (0, None))
    columns = [name for name in columns if name not in same]
    rows = [[record.get(name) for name in columns] for record in records]
    told = f"{caption} All rows: {said}." if said else caption
    return Table([HEADINGS.get(name, name) for name in columns], rows, told.strip())
