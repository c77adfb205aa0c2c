"""The report of a simulated scan, made from what the run left in its folder."""

from pathlib import Path

import numpy as np

from jaxmed.arrays.grid import reorient
from jaxmed.config import read_record
from jaxmed.io import nifti
from jaxmed.report.figures import MapStyle, slice_maps
from jaxmed.report.page import Section, Table, Text, write_report
from jaxmed.train.run_folder import read_summary
from jaxmed.volume import Volume


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    config, outputs = record["config"], folder / "outputs"
    mask = reorient(nifti.read(outputs / "mask.nii.gz"), "RAS").array > 0
    write_report(
        folder / "report.html",
        title="A simulated diffusion scan",
        subtitle=f"{summary['images']} images of a brain slab with known NODDI parameters, Rician noise at a "
        f"signal-to-noise ratio of {config['snr']:g}",
        summary=[
            ("Voxels", summary["voxels"], "inside the head"),
            ("Images", summary["images"], f"{len(summary['shells'])} shells, b = 0 included"),
            ("SNR", config["snr"], "of white matter at b = 0"),
        ],
        sections=[_truth_section(outputs, mask), _scan_section(outputs, mask, summary), _reading_section()],
        config=config,
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _truth_section(outputs: Path, mask: np.ndarray) -> Section:
    maps = {
        name.upper(): reorient(nifti.read(outputs / "truth" / f"{name}.nii.gz"), "RAS")
        for name in ("ndi", "odi", "fwf")
    }
    style = MapStyle(limits=(0.0, 1.0))
    figure = slice_maps(
        {label: volume.array for label, volume in maps.items()},
        maps["NDI"].spacing,
        caption="Truth: neurite density, orientation dispersion and free water fraction.",
        styles=dict.fromkeys(maps, style),
        mask=mask,
    )
    return Section("Truth", [figure])


def _scan_section(outputs: Path, mask: np.ndarray, summary: dict) -> Section:
    scan = nifti.read(outputs / "dwi.nii.gz")
    images, rows = {}, []
    for shell in summary["shells"]:
        label = f"b = {shell['bval']:.0f}"
        image = reorient(Volume.make(scan.array[..., shell["rows"][0]], scan.affine), "RAS").array
        images[label] = image
        rows.append((round(shell["bval"]), len(shell["rows"]), float(image[mask].mean())))
    figure = slice_maps(
        images,
        scan.spacing,
        caption="The first image of each shell, arbitrary unit.",
        styles=dict.fromkeys(images, MapStyle(colormap="gray")),
        num_slices=4,
    )
    table = Table(("b (s/mm^2)", "Images", "Mean of the first"), rows, "Shells of the protocol; means inside the head.")
    return Section("Scan", [figure, table])


def _reading_section() -> Section:
    return Section(
        "How to use it",
        [
            Text(
                [
                    "RUN/outputs holds dwi.nii.gz, dwi.bval, dwi.bvec and mask.nii.gz as jaxmed noddi fit and predict "
                    "take them, and truth/ the maps that made the signals.",
                    "The anatomy is a drawing, with soft borders and slow variation, not a brain: it tells whether an "
                    "estimate recovers what is there, not whether the model describes tissue.",
                ]
            )
        ],
    )
