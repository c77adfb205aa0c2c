"""The report of maps by a network, made from what the run left in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.arrays.grid import reorient
from jaxmed.config import read_record
from jaxmed.io import nifti
from jaxmed.report.figures import MapStyle, agreement, histograms, map_comparison, slice_maps
from jaxmed.report.page import Note, Section, Table, Text, write_report
from jaxmed.train.run_folder import read_summary
from jaxmed.volume import Volume

WATER = 0.9
"""Free water fraction above which tissue parameters mean nothing."""


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    maps = {map_label(output["name"]): read_map(folder, output["name"]) for output in summary["outputs"]}
    mask = read_map(folder, "mask").array > 0
    tissue = mask & (maps["FWF"].array < WATER) if "FWF" in maps else mask
    styles = {
        map_label(output["name"]): MapStyle(
            unit="" if output["unit"] == "1" else output["unit"], limits=tuple(output["bounds"])
        )
        for output in summary["outputs"]
    }
    sections = [_maps_section(maps, mask, tissue, styles, summary)]
    if summary["truth"]:
        sections.append(_truth_section(folder / summary["truth"], maps, mask, tissue, styles))
    sections.append(_reading_section(summary))
    config = record["config"]
    data = Path(config["dwi"]).name if config["dwi"] else "an embedded brain slab with known truth"
    write_report(
        folder / "report.html",
        title="Maps by a network",
        subtitle=f"{summary['images']} diffusion images of {data}, estimated in {summary['voxels']:,} voxels by "
        f"{summary['runtime']}",
        summary=_tiles(summary),
        sections=sections,
        config=config,
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def map_label(name: str) -> str:
    """Return a map's name as pages show it."""
    return name.upper() if len(name) == 3 else name.replace("_", " ").capitalize()


def read_map(folder: Path, name: str) -> Volume:
    """Read a map of the run in RAS+."""
    return reorient(nifti.read(folder / "outputs" / f"{name}.nii.gz"), "RAS")


def _tiles(summary: dict[str, Any]) -> list[tuple[str, object, str]]:
    seconds = sum(summary["seconds"].values())
    tiles: list[tuple[str, object, str]] = [
        ("Voxels", summary["voxels"], f"in {seconds:.1f} s, reading and writing included")
    ]
    for output in summary["outputs"]:
        unit = "median" if output["unit"] == "1" else f"median, {output['unit']}"
        tiles.append((map_label(output["name"]), round(summary["medians"][output["name"]], 3), unit))
    return tiles


def _maps_section(
    maps: dict[str, Volume], mask: np.ndarray, tissue: np.ndarray, styles: dict[str, MapStyle], summary: dict[str, Any]
) -> Section:
    spacing = next(iter(maps.values())).spacing
    notes = [Note(text, "warning" if "negative" in text else "info") for text in summary["notes"]]
    arrays = {label: volume.array for label, volume in maps.items()}
    figure = slice_maps(arrays, spacing, caption="Maps as the network estimates them.", styles=styles, mask=mask)
    blocks: list[Any] = [*notes, figure]
    if tissue.any():
        values = {label: array[mask if label == "FWF" else tissue] for label, array in arrays.items()}
        units = {label: style.unit for label, style in styles.items()}
        caption = (
            f"Distribution over estimated voxels; tissue parameters where the free water fraction is below {WATER:g}."
        )
        caption = caption if "FWF" in maps else "Distribution over estimated voxels."
        blocks.append(histograms(values, units=units, caption=caption))
    if summary["dicom"]:
        blocks.append(Note("The maps were written as DICOM too: outputs/dicom."))
    return Section("Maps", blocks)


def _truth_section(
    folder: Path, maps: dict[str, Volume], mask: np.ndarray, tissue: np.ndarray, styles: dict[str, MapStyle]
) -> Section:
    truth = {
        label: reorient(nifti.read(folder / f"{label.lower()}.nii.gz"), "RAS").array
        for label in maps
        if (folder / f"{label.lower()}.nii.gz").exists()
    }
    estimate = {label: maps[label].array for label in truth}
    where = {label: mask if label == "FWF" else tissue for label in truth}
    rows = []
    for label, inside in where.items():
        error = estimate[label][inside] - truth[label][inside]
        rows.append(
            (label, float(error.mean()), float(error.std()), float(np.sqrt((error**2).mean())), int(inside.sum()))
        )
    return Section(
        "Against the truth",
        [
            Text(["The scan was simulated, so the true value of every voxel is known."]),
            map_comparison(truth, estimate, maps["FWF"].spacing if "FWF" in maps else (1.0, 1.0, 1.0), styles=styles,
                           mask=mask, caption="Truth, estimate and their difference in one slice."),
            agreement({label: truth[label][inside] for label, inside in where.items()},
                      {label: estimate[label][inside] for label, inside in where.items()},
                      caption="Every voxel: estimate against truth."),
            Table(("Map", "Bias", "Standard deviation", "RMSE", "Voxels"), rows,
                  f"Error of the estimate; tissue parameters where the estimated FWF is below {WATER:g}."),
        ],
    )  # fmt: skip


def _reading_section(summary: dict[str, Any]) -> Section:
    labels = summary["constants"].get("labels", "unknown")
    return Section(
        "How to read this",
        [
            Text(
                [
                    f"These maps come from a network that was trained on simulated signals with labels '{labels}'; it "
                    "gives an answer for any signal and does not say when the model does not hold: artefacts, motion "
                    "or pathology look like tissue. jaxmed noddi fit gives residuals and standard errors.",
                    "Where the free water fraction is near 1 the other maps mean nothing. For research only, not for "
                    "diagnosis.",
                ]
            )
        ],
    )
