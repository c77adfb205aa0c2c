"""Sections on maps of estimated parameters: the maps, their distribution, and their errors where the truth is known."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Real

from jaxmed.arrays.grid import reorient
from jaxmed.io import nifti
from jaxmed.report.figures import MapStyle, agreement, histograms, map_comparison, slice_maps
from jaxmed.report.page import Block, Section, Table, Text
from jaxmed.volume import Volume


def map_label(name: str) -> str:
    """Return a map's name as pages show it: NDI, Stick fraction."""
    return name.upper() if len(name) == 3 and name != "dot" else name.replace("_", " ").capitalize()


def read_map(path: Path) -> Volume:
    """Read a map in RAS+, as figures want it."""
    return reorient(nifti.read(path), "RAS")


def maps_section(
    maps: Mapping[str, Volume],
    styles: Mapping[str, MapStyle],
    mask: Bool[np.ndarray, "x y z"],
    where: Mapping[str, Bool[np.ndarray, "x y z"]],
    before: Sequence[Block],
    *,
    caption: str,
    distribution: str,
) -> Section:
    """Show maps in slices, and the distribution of each where it means something.

    Args:
        maps: By label, in RAS+, on one grid.
        styles: By label.
        mask: Voxels to show.
        where: Voxels to count, by label; `mask` for labels that are not named.
        before: Blocks to stand first.
        caption: Caption of the slices.
        distribution: Caption of the histograms, left out where a map has nothing to count.
    """
    arrays = {label: volume.array for label, volume in maps.items()}
    spacing = next(iter(maps.values())).spacing
    blocks = [*before, slice_maps(arrays, spacing, caption=caption, styles=styles, mask=mask)]
    values = {label: array[where.get(label, mask)] for label, array in arrays.items()}
    if all(value.size for value in values.values()):
        units = {label: style.unit for label, style in styles.items()}
        blocks.append(histograms(values, caption=distribution, units=units))
    return Section("Maps", blocks)


def truth_section(
    truth: Mapping[str, Volume],
    maps: Mapping[str, Volume],
    styles: Mapping[str, MapStyle],
    mask: Bool[np.ndarray, "x y z"],
    where: Mapping[str, Bool[np.ndarray, "x y z"]],
    caption: str,
) -> Section:
    """Compare maps with those that a simulated scan was made from.

    Args:
        truth: By label, in RAS+.
        maps: The same labels among others, on the same grid.
        styles: By label.
        mask: Voxels to show.
        where: Voxels to compare, by label; `mask` for labels that are not named.
        caption: Caption of the table of errors.
    """
    true, found = ({label: part[label].array for label in truth} for part in (truth, maps))
    spacing = next(iter(truth.values())).spacing
    shown = "Truth, estimate and their difference in one slice."
    true_values, values = ({name: one[where.get(name, mask)] for name, one in part.items()} for part in (true, found))
    return Section(
        "Against the truth",
        [
            Text(["The scan was simulated, so the true value of every voxel is known."]),
            map_comparison(true, found, spacing, caption=shown, styles=styles, mask=mask),
            agreement(true_values, values, caption="Every voxel: estimate against truth."),
            error_table(true_values, values, caption, first="Map"),
        ],
    )


def error_table(
    truth: Mapping[str, Real[np.ndarray, " value"]],
    estimate: Mapping[str, Real[np.ndarray, " value"]],
    caption: str,
    *,
    first: str,
    has_slope: bool = False,
) -> Table:
    """Return bias, spread and errors of estimates by name.

    Args:
        truth: By name.
        estimate: The same names.
        caption: Caption of the table.
        first: Heading of the names.
        has_slope: Add the slope of the estimate on the truth.
    """
    rows = []
    for name, values in truth.items():
        error = estimate[name] - values
        row = [name, error.mean(), error.std(), np.sqrt((error**2).mean()), np.median(np.abs(error))]
        rows.append([*row, *([np.polyfit(values, estimate[name], 1)[0]] if has_slope else []), len(error)])
    slope = ["Slope"] if has_slope else []
    columns = [first, "Bias", "Standard deviation", "RMSE", "Median absolute error", *slope, "Voxels"]
    return Table(columns, rows, caption)
