"""Sections on maps of estimated parameters: the maps, their distribution, and their errors where the truth is known."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Bool, Real

from jaxmed.arrays.grid import reorient
from jaxmed.io import nifti
from jaxmed.physics.noddi import WET, WHERE_TISSUE
from jaxmed.report.figures import MapStyle, agreement, histograms, map_comparison, slice_maps
from jaxmed.report.page import Block, Note, Section, Table, Text, Tile
from jaxmed.report.volumes import view_volumes
from jaxmed.volume import Volume


def map_label(name: str) -> str:
    """Return a map's name as pages show it: NDI, Stick fraction."""
    return name.upper() if len(name) == 3 and name != "dot" else name.replace("_", " ").capitalize()


def read_map(path: Path) -> Volume:
    """Read a map in RAS+, as figures want it."""
    return reorient(nifti.read(path), "RAS")


def estimate_sections(
    folder: Path,
    units: Mapping[str, str],
    mask: Bool[np.ndarray, "x y z"],
    notes: Sequence[Note],
    *,
    caption: str,
    truth: Path | None = None,
    further: Mapping[str, MapStyle] = MappingProxyType({}),
) -> list[Section]:
    """Show maps in slices and in a viewer, the distribution of each, and how they differ from a simulated scan's truth.

    What describes tissue counts where there is some, `physics.noddi.WHERE_TISSUE`.

    Args:
        folder: Holds NAME.nii.gz of every map.
        units: Unit of each parameter by name, "1" for a fraction.
        mask: Voxels to show, in RAS+.
        notes: To stand first.
        caption: Caption of the slices.
        truth: Folder of the true maps, as far as there are any.
        further: Maps to show besides, by name.
    """
    names = {map_label(name): name for name in [*units, *further]}
    maps = {label: read_map(folder / f"{name}.nii.gz") for label, name in names.items()}
    arrays, spacing = {label: volume.array for label, volume in maps.items()}, next(iter(maps.values())).spacing
    own = {name: MapStyle(limits=(0.0, 1.0)) if unit == "1" else MapStyle(unit=unit) for name, unit in units.items()}
    styles = {label: {**own, **further}[name] for label, name in names.items()}
    tissue = mask & (arrays["FWF"] < WET) if "FWF" in arrays else mask
    where = {label: tissue if name in WHERE_TISSUE else mask for label, name in names.items()}
    said = f"NDI and ODI where the estimated FWF is below {WET:g}, because tissue that is not there has no neurites"
    blocks: list[Block] = [*notes, slice_maps(arrays, spacing, caption=caption, styles=styles, mask=mask)]
    blocks += view_volumes(maps, caption=caption, styles=styles, mask=mask)
    values = {label: array[where[label]] for label, array in arrays.items()}
    if all(value.size for value in values.values()):
        distribution = "Distribution over the voxels of the mask" + (f"; {said}." if "FWF" in arrays else ".")
        blocks.append(histograms(values, caption=distribution, units={k: style.unit for k, style in styles.items()}))
    sections = [Section("Maps", blocks)]
    files = {} if truth is None else {map_label(name): truth / f"{name}.nii.gz" for name in units}
    true = {label: read_map(file).array for label, file in files.items() if file.exists()}
    if true:
        found = {label: arrays[label] for label in true}
        pair = {label: array[where[label]] for label, array in true.items()}, {label: values[label] for label in true}
        shown = "Truth, estimate and their difference in one slice."
        blocks = [
            Text(["The scan was simulated, so the true value of every voxel is known."]),
            map_comparison(true, found, spacing, caption=shown, styles=styles, mask=mask),
            agreement(*pair, caption="Every voxel: estimate against truth."),
            error_table(*pair, f"Error of the estimate; {said}.", first="Map"),
        ]
        sections.append(Section("Against the truth", blocks))
    return sections


def median_tiles(units: Mapping[str, str], medians: Mapping[str, float]) -> list[Tile]:
    """Return the median of each parameter that has one, and of its standard error where NAME_error has one."""
    tiles: list[Tile] = []
    for name in (name for name in units if name in medians):
        said = "median" if units[name] == "1" else f"median, {units[name]}"
        if f"{name}_error" in medians:
            said += f", where FWF < {WET:g}" if name in WHERE_TISSUE else ""
            said += f"; standard error {medians[f'{name}_error']:.3f}"
        tiles.append((map_label(name), round(medians[name], 3), said))
    return tiles


def errors_section(
    folder: Path,
    units: Mapping[str, str],
    mask: Bool[np.ndarray, "x y z"],
    known: str,
    flagged: Sequence[tuple[str, int]],
) -> Section:
    """Show standard errors of a fit of parameters and a direction.

    Args:
        folder: Holds NAME_error.nii.gz of each, and of the direction.
        units: Unit of each parameter by name, "1" for a fraction.
        mask: Voxels to show, in RAS+.
        known: What the noise is known from, in words.
        flagged: Definition of each flag, and in how many voxels it is set.
    """
    errors = {map_label(name): read_map(folder / f"{name}_error.nii.gz") for name in [*units, "direction"]}
    styles = {map_label(n): MapStyle(unit="" if unit == "1" else unit, colormap="magma") for n, unit in units.items()}
    styles["Direction"] = MapStyle(colormap="magma", unit="degrees", limits=(0.0, 60.0))
    text = (
        f"Standard errors from the curvature of the likelihood at its maximum and {known}: how far another "
        "scan of the same voxel would move each value. Where one is as wide as the range, the data say "
        "nothing about it."
    )
    figure = slice_maps(
        {label: volume.array for label, volume in errors.items()},
        errors["Direction"].spacing,
        caption="Standard error of each parameter, and of the direction as the angle of its cone of uncertainty.",
        styles=styles,
        mask=mask,
    )
    table = Table(("Flag", "Voxels"), flagged, "Bits of map 'flags' that are set somewhere in the mask.")
    return Section("How sure the maps are", [Text([text]), figure, *([table] if flagged else [])])


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
