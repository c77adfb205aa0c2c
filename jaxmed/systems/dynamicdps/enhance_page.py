"""The report of an enhancement, made from what the run left in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.arrays.grid import reorient
from jaxmed.config import read_record
from jaxmed.io import nifti
from jaxmed.metrics.tissue import TISSUES
from jaxmed.report.figures import MapStyle, curves, slice_maps
from jaxmed.report.page import Figure, Note, Section, Table, Text, write_report
from jaxmed.train.run_folder import read_summary
from jaxmed.volume import Volume

MOST_PICTURES = 8
TITLES = {"input": "Input", "initial": "Estimate", "enhanced": "Enhanced", "difference": "Difference"}
TITLES |= {"uncertainty": "Uncertainty"}


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    scans = summary["scans"]
    sections = [Section("Notes", [Note(text) for text in summary["notes"]])]
    sections += [_scan_section(folder / "outputs", scan) for scan in scans[:MOST_PICTURES]]
    if scans:
        sections += [_residual_section(scans, summary), _search_section(scans)]
        if any("volumes_ml" in scan for scan in scans):
            sections.append(_volume_section(scans))
    if summary["failed"]:
        text = f"{summary['failed']} scans failed: see outputs/failed.csv for the reasons."
        sections.insert(0, Section("Failed scans", [Note(text, "warning")]))
    write_report(
        folder / "report.html",
        title="Enhanced scans",
        subtitle=f"DynamicDPS on {len(scans)} scans",
        summary=_tiles(scans, summary),
        sections=[*sections, _reading_section()],
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _tiles(scans: list[dict[str, Any]], summary: dict[str, Any]) -> list[tuple[str, object, str]]:
    tiles: list[tuple[str, object, str]] = [("Scans", len(scans), f"{summary['failed']} failed")]
    if not scans:
        return tiles
    before, after = (np.median([scan["residual"][name] for scan in scans]) for name in ("initial", "enhanced"))
    tiles.append(("Residual", round(float(after), 3), f"median |y - A(x)|; {before:.3g} before"))
    start = int(np.median([scan["start"]["median"] for scan in scans]))
    tiles.append(("Steps", start + 1, f"median, of {summary['chain']}"))
    evaluations = float(np.mean([scan["evaluations"] for scan in scans]))
    tiles.append(("Evaluations", round(evaluations, 1), "forward and backward passes per sample"))
    return tiles


def _scan_section(outputs: Path, scan: dict[str, Any]) -> Section:
    try:
        maps, spacing = _read_maps(outputs, scan)
    except OSError:
        return Section(scan["name"], [Note("The maps are no longer in this folder.", "warning")])
    images = {name: maps[name] for name in ("input", "initial", "enhanced")}
    mask = np.abs(images["input"]) > 0
    top = float(np.percentile(images["enhanced"][mask], 99.5)) if mask.any() else 1.0
    grey = MapStyle(limits=(0.0, max(top, 1e-6)), colormap="gray", unit="scan intensity")
    size = float(np.percentile(np.abs(maps["difference"]), 99.5)) or 1e-6
    styles = {TITLES[name]: grey for name in images}
    styles[TITLES["difference"]] = MapStyle(limits=(-size, size), colormap="RdBu_r", unit="scan intensity")
    shown = {TITLES[name]: maps[name] for name in ("input", "initial", "enhanced", "difference")}
    if scan["samples"] > 1:
        highest = float(np.percentile(maps["uncertainty"], 99.5)) or 1e-6
        styles[TITLES["uncertainty"]] = MapStyle(limits=(0.0, highest), colormap="magma", unit="scan intensity")
        shown[TITLES["uncertainty"]] = maps["uncertainty"]
    caption = f"{scan['name']}: input, estimate, result, and result minus input"
    caption += f"; standard deviation over {scan['samples']} samples." if scan["samples"] > 1 else "."
    figure = slice_maps(shown, spacing, caption=caption, styles=styles, num_slices=4)
    residual, lowest, highest = scan["residual"], scan["start"]["lowest"], scan["start"]["highest"]
    samples = "1 sample" if scan["samples"] == 1 else f"{scan['samples']} samples"
    text = (
        f"{scan['images']} images, {samples} each. Median residual {residual['initial']:.3g} before and "
        f"{residual['enhanced']:.3g} after; lower in {scan['improved']:.0%} of the images. Started with "
        f"{lowest if lowest == highest else f'{lowest} to {highest}'} steps left."
    )
    return Section(scan["name"], [Text([text]), figure])


def _read_maps(outputs: Path, scan: dict[str, Any]) -> tuple[dict[str, np.ndarray], tuple[float, float, float]]:
    """Read the maps of a scan; the input is what the difference leaves of the result."""
    read: dict[str, Volume] = {}
    for name in ("initial", "enhanced", "difference", "uncertainty"):
        path = outputs / f"{scan['name']}_{name}.nii.gz"
        if not path.exists():
            raise FileNotFoundError(path)
        read[name] = reorient(nifti.read(path))
    maps = {name: volume.array for name, volume in read.items()}
    return maps | {"input": maps["enhanced"] - maps["difference"]}, read["enhanced"].spacing


def _residual_section(scans: list[dict[str, Any]], summary: dict[str, Any]) -> Section:
    series = {scan["name"]: (np.array(scan["steps"], float), np.array(scan["curve"])) for scan in scans[:MOST_PICTURES]}
    rows = [
        (scan["name"], scan["images"], scan["residual"]["initial"], scan["residual"]["enhanced"],
         f"{scan['improved']:.0%}", scan["start"]["median"], scan["evaluations"])
        for scan in scans
    ]  # fmt: skip
    columns = ("scan", "images", "residual before", "residual after", "lower in", "start", "evaluations")
    figure: Figure = curves(
        series,
        xlabel="steps left",
        ylabel="residual |y - A(x)|",
        caption="Residual of the denoised image on the way down to 0 steps left, mean over images and samples.",
    )
    text = f"The chain has {summary['chain']} steps; a start with n steps left takes n + 1 of them."
    return Section("Residuals", [figure, Table(columns, rows, text)])


def _search_section(scans: list[dict[str, Any]]) -> Section:
    names = list(scans[0]["flags"])
    total = {name: sum(scan["flags"][name] for scan in scans) for name in names}
    series = {
        scan["name"]: (np.array(scan["steps"], float), np.array(scan["step_sizes"])) for scan in scans[:MOST_PICTURES]
    }
    figure = curves(
        series,
        xlabel="steps left",
        ylabel="step size",
        caption="Step sizes that the line searches found, mean over images and samples.",
    )
    rows = [(name, count, count / max(sum(total.values()), 1)) for name, count in total.items()]
    return Section(
        "Line searches",
        [figure, Table(("verdict", "steps", "share"), rows, "Steps without a search count as converged.")],
    )


def _volume_section(scans: list[dict[str, Any]]) -> Section:
    rows = [
        (scan["name"], TITLES[image], *(values[name] for name in TISSUES))
        for scan in scans
        for image, values in scan.get("volumes_ml", {}).items()
    ]
    columns = ("scan", "image", *(f"{name} (ml)" for name in TISSUES))
    caption = (
        "Tissue volumes by a Gaussian mixture with partial volume and gain, the same for every image. It expects the "
        "order of a T1-weighted brain, fluid darkest and white matter brightest: of other contrasts, and of heads "
        "without a mask, these numbers mean nothing."
    )
    blocks: list[Any] = [Table(columns, rows, caption)]
    labels = [(scan["name"], name, value) for scan in scans for name, value in scan.get("labels_ml", {}).items()]
    if labels:
        blocks.append(Table(("scan", "label", "volume (ml)"), labels, "Volumes counted in the label map."))
    return Section("Tissue volumes", blocks)


def _reading_section() -> Section:
    return Section(
        "How to read this",
        [
            Text(
                [
                    "A lower residual says that the image explains the measurement better, not that it is true: what "
                    "the scanner cannot see comes from the prior. The uncertainty map shows where samples disagree; "
                    "what all samples invent alike it does not show.",
                    "Intensities are in the unit of the scan by its own scale; contrast is that of the prior.",
                    "Method: DynamicDPS, arXiv:2503.01075. For research only, not for diagnosis.",
                ]
            )
        ],
    )
