"""The report of a NODDI fit, made from what the run left in its folder."""

from pathlib import Path

import numpy as np

from jaxmed.arrays.grid import reorient
from jaxmed.config import read_record
from jaxmed.io import nifti
from jaxmed.report.figures import MapStyle, agreement, histograms, map_comparison, slice_maps
from jaxmed.report.page import Note, Section, Table, Text, write_report
from jaxmed.volume import Volume

LABELS = {"ndi": "NDI", "odi": "ODI", "fwf": "FWF", "residual": "Residual"}
STYLES = {
    "NDI": MapStyle(colormap="viridis", limits=(0.0, 1.0)),
    "ODI": MapStyle(colormap="viridis", limits=(0.0, 1.0)),
    "FWF": MapStyle(colormap="viridis", limits=(0.0, 1.0)),
    "Residual": MapStyle(colormap="magma", unit="of S0"),
}


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record = read_record(folder / "config.json")
    summary = read_record(folder / "outputs" / "summary.json")
    maps = {label: _read(folder / "outputs" / f"{name}.nii.gz") for name, label in LABELS.items()}
    mask = _read(folder / "outputs" / "s0.nii.gz").array > 0
    defined = mask & (maps["FWF"].array < 0.9)
    sections = [_maps_section(maps, mask, defined, summary)]
    if summary["truth"]:
        sections.append(_truth_section(maps, mask, defined, folder / summary["truth"]))
    sections += [_data_section(summary), _reading_section()]
    write_report(
        folder / "report.html",
        title="NODDI maps",
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
    tiles: list[tuple[str, object, str]] = [
        ("Voxels", summary["voxels"], f"{summary['converged']:.1%} converged"),
        ("FWF", medians["fwf"], "median free water fraction"),
    ]
    if "ndi" in medians:
        tiles += [
            ("NDI", medians["ndi"], "median neurite density, where FWF < 0.9"),
            ("ODI", medians["odi"], "median orientation dispersion, where FWF < 0.9"),
        ]
    return [*tiles, ("Residual", medians["residual"], "median NRMSE, relative to S0")]


def _maps_section(maps: dict[str, Volume], mask: np.ndarray, defined: np.ndarray, summary: dict) -> Section:
    spacing = maps["NDI"].spacing
    notes = [Note(text, "warning" if _is_warning(text) else "info") for text in summary["notes"]]
    figure = slice_maps(
        {label: volume.array for label, volume in maps.items()},
        spacing,
        caption="Neurite density, orientation dispersion, free water fraction, and root mean squared residual "
        "relative to the unweighted signal.",
        styles=STYLES,
        mask=mask,
    )
    blocks = [*notes, figure]
    if defined.any():
        values = {label: maps[label].array[defined] for label in ("NDI", "ODI")}
        values |= {label: maps[label].array[mask] for label in ("FWF", "Residual")}
        blocks.append(
            histograms(
                values,
                caption="Distribution over fitted voxels; NDI and ODI where the free water fraction is below 0.9, "
                "because tissue that is not there has no neurites.",
            )
        )
    return Section("Maps", blocks)


def _is_warning(text: str) -> bool:
    return any(word in text for word in ("cannot", "more than diffusion allows", "negative"))


def _truth_section(maps: dict[str, Volume], mask: np.ndarray, defined: np.ndarray, folder: Path) -> Section:
    truth = {label: _read(folder / f"{name}.nii.gz").array for name, label in LABELS.items() if name != "residual"}
    estimate = {label: maps[label].array for label in truth}
    where = {"NDI": defined, "ODI": defined, "FWF": mask}
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
                maps["NDI"].spacing,
                caption="Truth, estimate and their difference in one slice.",
                styles=STYLES,
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


def _reading_section() -> Section:
    return Section(
        "How to read this",
        [
            Text(
                [
                    "NDI is the share of tissue water inside neurites, ODI how far their directions spread (0 "
                    "parallel, 1 isotropic), FWF the share of free water. All three rest on fixed diffusivities (see "
                    "the configuration): another choice changes all maps.",
                    "A high residual marks voxels that the model does not describe: motion, artefacts, crossing tissue "
                    "types, or pathology. Where FWF is near 1, NDI and ODI mean nothing.",
                    "Model: Zhang et al., NeuroImage 2012. For research only, not for diagnosis.",
                ]
            )
        ],
    )
