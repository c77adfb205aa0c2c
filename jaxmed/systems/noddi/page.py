"""The report of a NODDI fit, made from what the run left in its folder."""

from pathlib import Path

import numpy as np

from jaxmed.arrays.grid import reorient
from jaxmed.config import read_record
from jaxmed.io import nifti
from jaxmed.report.figures import MapStyle, agreement, histograms, map_comparison, slice_maps
from jaxmed.report.page import Note, Section, Table, Text, write_report
from jaxmed.systems.noddi.estimates import FLAG_DEFINITIONS
from jaxmed.train.run_folder import read_summary
from jaxmed.volume import Volume

LABELS = {"ndi": "NDI", "odi": "ODI", "fwf": "FWF", "dot": "Dot"}
LABELS |= {"stick_fraction": "Stick fraction", "diffusivity": "Diffusivity"}
WHERE_TISSUE = ("NDI", "ODI")
"""Maps that mean something only where there is tissue."""


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    names = {name: LABELS[name] for name in summary["parameters"]}
    read = {name: _read(folder / "outputs" / f"{name}.nii.gz") for name in [*names, "residual"]}
    maps = {label: read[name] for name, label in (names | {"residual": "Residual"}).items()}
    errors = {label: _read(folder / "outputs" / f"{name}_error.nii.gz") for name, label in names.items()}
    errors["Direction"] = _read(folder / "outputs" / "direction_error.nii.gz")
    mask = _read(folder / "outputs" / "s0.nii.gz").array > 0
    defined = mask & (maps["FWF"].array < 0.9) if "FWF" in maps else mask
    where = {label: defined if label in WHERE_TISSUE else mask for label in [*maps, "Direction"]}
    units = {LABELS[name]: "" if unit == "1" else unit for name, unit in summary["parameters"].items()}
    styles = {
        label: MapStyle(unit=unit, limits=None if unit else (0.0, 1.0), colormap="viridis")
        for label, unit in units.items()
    }
    styles["Residual"] = MapStyle(colormap="magma", unit="of S0")
    sections = [_maps_section(maps, styles, mask, where, summary)]
    if summary["truth"]:
        sections.append(_truth_section(maps, styles, mask, where, folder / summary["truth"], names))
    sections += [
        _errors_section(errors, units, mask, where, summary),
        _data_section(summary),
        _reading_section(summary),
    ]
    write_report(
        folder / "report.html",
        title="NODDI maps" if summary["model"] == "noddi" else "Ball and stick maps",
        subtitle=_subtitle(record, summary),
        summary=_tiles(summary),
        sections=sections,
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _read(path: Path) -> Volume:
    return reorient(nifti.read(path), "RAS")


def _subtitle(record: dict, summary: dict) -> str:
    source = record["config"]["dwi"]
    data = Path(source).name if source else "an embedded brain slab with known truth"
    sigma = summary["sigma"]
    how = f"by {summary['likelihood']} likelihood, sigma {sigma:.3g}" if sigma else "by least squares"
    return f"{summary['images']} diffusion images of {data}, fitted in {summary['voxels']:,} voxels {how}"


def _tiles(summary: dict) -> list[tuple[str, object, str]]:
    medians = {name: round(value, 3) for name, value in summary["medians"].items()}
    tiles: list[tuple[str, object, str]] = [("Voxels", summary["voxels"], f"{summary['converged']:.1%} converged")]
    for name, unit in summary["parameters"].items():
        if name in medians:
            label = LABELS[name]
            said = "median" if unit == "1" else f"median, {unit}"
            said += ", where FWF < 0.9" if label in WHERE_TISSUE else ""
            tiles.append((label, medians[name], f"{said}; standard error {medians[name + '_error']:.3f}"))
    return [*tiles, ("Residual", medians["residual"], "median NRMSE, relative to S0")]


def _maps_section(maps, styles, mask: np.ndarray, where: dict[str, np.ndarray], summary: dict) -> Section:
    spacing = maps["Residual"].spacing
    notes = [Note(text, "warning" if _is_warning(text) else "info") for text in summary["notes"]]
    figure = slice_maps(
        {label: volume.array for label, volume in maps.items()},
        spacing,
        caption="Fitted parameters, and root mean squared residual relative to the unweighted signal.",
        styles=styles,
        mask=mask,
    )
    blocks = [*notes, figure]
    values = {label: volume.array[where[label]] for label, volume in maps.items()}
    if all(value.size for value in values.values()):
        caption = "Distribution over fitted voxels"
        if "FWF" in maps:
            caption += "; NDI and ODI where the free water fraction is below 0.9, because tissue that is not there has "
            caption += "no neurites"
        blocks.append(histograms(values, caption=f"{caption}.", units={name: s.unit for name, s in styles.items()}))
    return Section("Maps", blocks)


def _is_warning(text: str) -> bool:
    return any(word in text for word in ("cannot", "more than diffusion allows", "negative"))


def _truth_section(maps, styles, mask, where: dict[str, np.ndarray], folder: Path, names: dict[str, str]) -> Section:
    truth = {label: _read(folder / f"{name}.nii.gz").array for name, label in names.items()}
    estimate = {label: maps[label].array for label in truth}
    where = {label: where[label] for label in truth}
    rows = []
    for label, inside in where.items():
        error = estimate[label][inside] - truth[label][inside]
        rows.append(
            (label, float(error.mean()), float(error.std()), float(np.median(np.abs(error))), int(inside.sum()))
        )
    return Section(
        "Against the truth",
        [
            Text(["The scan was simulated, so the true value of every voxel is known."]),
            map_comparison(
                truth,
                estimate,
                maps["Residual"].spacing,
                caption="Truth, estimate and their difference in one slice.",
                styles=styles,
                mask=mask,
            ),
            agreement(
                {label: truth[label][inside] for label, inside in where.items()},
                {label: estimate[label][inside] for label, inside in where.items()},
                caption="Every voxel: estimate against truth.",
            ),
            Table(
                ("Map", "Bias", "Standard deviation", "Median absolute error", "Voxels"),
                rows,
                "Error of the estimate; NDI and ODI where the estimated FWF is below 0.9.",
            ),
        ],
    )


def _errors_section(errors, units, mask: np.ndarray, where: dict[str, np.ndarray], summary: dict) -> Section:
    spacing = errors["Direction"].spacing
    styles = {label: MapStyle(colormap="magma", unit=unit) for label, unit in units.items()}
    styles["Direction"] = MapStyle(colormap="magma", unit="degrees", limits=(0.0, 60.0))
    flagged = [(FLAG_DEFINITIONS[name], count) for name, count in summary["flags"].items() if count]
    known = "the given or estimated noise" if summary["sigma"] else "the residuals"
    blocks: list = [
        Text(
            [
                f"Standard errors from the curvature of the likelihood at its maximum and {known}: how far another "
                "scan of the same voxel would move each value. Where one is as wide as the range, the data say "
                "nothing about it.",
            ]
        ),
        slice_maps(
            {label: volume.array for label, volume in errors.items()},
            spacing,
            caption="Standard error of each parameter, and of the direction as the angle of its cone of uncertainty.",
            styles=styles,
            mask=mask,
        ),
    ]
    if flagged:
        blocks.append(Table(("Flag", "Voxels"), flagged, "Bits of map 'flags' that are set somewhere in the mask."))
    return Section("How sure the maps are", blocks)


def _data_section(summary: dict) -> Section:
    rows = [(round(shell["bval"]), shell["images"], shell["signal"]) for shell in summary["shells"]]
    return Section(
        "Data",
        [
            Table(
                ("b (s/mm^2)", "Images", "Mean signal / S0"),
                rows,
                "Shells found in the gradient table, within 50 s/mm^2; the fit uses every image's own b-value.",
            )
        ],
    )


def _reading_section(summary: dict) -> Section:
    if summary["model"] != "noddi":
        meaning = (
            "Stick fraction is the share of water that moves along one direction only, diffusivity its speed along it "
            "and that of the rest in every direction. Model: Behrens et al., Magn. Reson. Med. 2003."
        )
    else:
        meaning = (
            "NDI is the share of tissue water inside neurites, ODI how far their directions spread (0 parallel, 1 "
            "isotropic), FWF the share of free water. All three rest on fixed diffusivities (see the configuration): "
            "another choice changes all maps. Where FWF is near 1, NDI and ODI mean nothing; where NDI is near 0, ODI "
            "means nothing. Model: Zhang et al., NeuroImage 2012."
        )
    residual = (
        "A high residual marks voxels that the model does not describe: motion, artefacts, crossing tissue types, or "
        "pathology. For research only, not for diagnosis."
    )
    return Section("How to read this", [Text([meaning, residual])])
