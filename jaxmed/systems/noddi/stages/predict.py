"""Stage `jaxmed noddi predict`: maps of a scan by a trained network, in seconds."""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np

from jaxmed.config import Length, Positive, Seed, Size, checked
from jaxmed.errors import InputError
from jaxmed.files import require_given
from jaxmed.io.dicom import Stack, read_stack
from jaxmed.io.gradient_match import Table
from jaxmed.io.maps import write_map
from jaxmed.io.parametric_map import DicomForm, on_stack, write_dicom_map
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, nested_run
from jaxmed.report.figures import MapStyle
from jaxmed.report.page import Note, Section, Text
from jaxmed.report.parameter_maps import map_label, maps_section, read_map, truth_section
from jaxmed.synthesis.phantoms.write import check_shape, write_diffusion_slab
from jaxmed.systems.noddi.network import (
    Deployed,
    Network,
    Output,
    Signals,
    export_onnx,
    load,
    load_onnx,
    make_maps,
    predict,
    read_signals,
    run_onnx,
    write_maps,
)
from jaxmed.systems.noddi.protocol import read_table
from jaxmed.systems.noddi.training import TINY
from jaxmed.systems.noddi.voxel_fit import WET
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start
from jaxmed.volume import Volume


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Apply a trained network to a scan.

    Attributes:
        weights: Run folder of `jaxmed noddi train`, its outputs/model, or an .onnx file of `jaxmed noddi export`.
        dwi: Diffusion scan, a 4D NIfTI file of magnitudes, of the protocol that the network was trained for:
            b-values to 3 % or 20 s/mm^2, directions to 2 degrees, images in any order.
        bvals: FSL text file of b-values in s/mm^2.
        bvecs: FSL text file of unit gradient directions.
        mask: NIfTI file on the grid of the scan, estimated where it is not 0. Without it: the largest connected region
            of bright unweighted signal.
        runtime: What computes: jax, or ONNX Runtime, as on a scanner (needs an .onnx file).
        threads: Threads of ONNX Runtime; 0 takes one per core.
        dicom_source: Folder of the DICOM series that the scan was converted from: maps are written as DICOM too, in
            its study, on its geometry.
        series: SeriesInstanceUID or SeriesDescription to read from that folder where it holds several.
        dicom: Which DICOM: "parametric-map" (floating point), "mr-image" (16 bit, thousandths, for every viewer).
        synthetic_shape: Voxels (x, y, z) of the brain slab to take where no --dwi is given; without weights a small
            network is trained first.
        synthetic_snr: Signal-to-noise ratio of the synthetic slab, white matter, unweighted.
        seed: Seed of the synthetic slab and of the network trained for it.
    """

    weights: Path | None = None
    dwi: Path | None = None
    bvals: Path | None = None
    bvecs: Path | None = None
    mask: Path | None = None
    runtime: Literal["jax", "onnx"] = "jax"
    threads: Length = 0
    dicom_source: Path | None = None
    series: str | None = None
    dicom: DicomForm = "both"
    synthetic_shape: tuple[Size, Size, Size] | None = None
    synthetic_snr: Positive = 30.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.synthetic_shape is not None:
            check_shape("synthetic_shape", self.synthetic_shape)


def paper() -> Config:
    """Your network on your scan."""
    return Config()


def smoke() -> Config:
    """In seconds: your scan or a simulated slab, your network or a tiny one trained for it."""
    return Config(synthetic_shape=(32, 38, 2))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a prediction found.

    Attributes:
        medians: Medians of the maps by name.
        protocol: Hash of the table.
        labels: What the network was trained on.
        dicom: Whether the maps were written as DICOM too.
        truth: Folder of the true maps in the run, of a simulated scan.
    """

    voxels: int
    images: int
    outputs: tuple[Output, ...]
    medians: dict[str, float]
    protocol: str
    labels: str
    runtime: str
    dicom: bool
    notes: tuple[str, ...]
    truth: str | None


def run(config: Config, folder: RunFolder) -> None:
    """Read network and scan, estimate, write maps and the report."""
    given, truth = config, None
    is_trial = config.synthetic_shape is not None and config.weights is None
    network = None if is_trial and (config.dwi is None or config.bvals is not None) else read_weights(config)
    if config.synthetic_shape is not None and config.dwi is None:
        start(folder)
        files = write_diffusion_slab(folder.path / "inputs", config.seed, config.synthetic_shape, config.synthetic_snr)
        truth = str(files.truth.relative_to(folder.path))
        config = dataclasses.replace(config, dwi=files.dwi, bvals=files.bvals, bvecs=files.bvecs, mask=files.mask)
    elif network is None:
        table = read_table(config.bvals, config.bvecs, TINY.b0_threshold)
        read_scan(config, Table.make(*table[:2], TINY.b0_threshold))  # a mistake there costs no training
    if network is None:
        network = train_tiny(config, folder, begin(folder))
    clock = Clock()
    scan, outputs = read_scan(config, network.table), network.outputs
    stack = read_source(config, scan)
    log = begin(folder, scan.notes)
    clock.lap("read and check")
    is_onnx = isinstance(network, Deployed)
    values = run_onnx(network, scan.signals) if is_onnx else predict(network, scan.signals)
    clock.lap("estimate, compilation included")
    maps = make_maps(values, scan, outputs)
    write_maps(folder.outputs, maps, network, scan.path)
    inside = Volume.make(scan.mask, scan.dwi.affine)
    write_map(folder.outputs, "mask", inside, "1 where a network's estimate was made", "1", {}, reference=scan.path)
    if stack is not None:
        place = folder.outputs / "dicom"
        files = [write_dicom_map(place, o.name, maps[o.name], stack, o.quantity, config.dicom) for o in outputs]
        log.say(f"{sum(map(len, files))} DICOM files in {place}")
    clock.lap("write")
    seconds = clock.seconds["estimate, compilation included"], sum(clock.seconds.values())
    log.say(f"{len(values):,} voxels in {seconds[0]:.2f} s, with reading and writing {seconds[1]:.2f} s")
    medians = {output.name: float(np.median(values[:, column])) for column, output in enumerate(outputs)}
    log.metrics(len(values), medians)
    summary = Summary(
        voxels=len(values),
        images=len(network.table.bvals),
        outputs=outputs,
        medians=medians,
        protocol=network.table.hash,
        labels=network.constants.get("labels", "unknown"),
        runtime="ONNX Runtime" if is_onnx else "jax",
        dicom=stack is not None,
        notes=tuple(scan.notes),
        truth=truth,
    )
    finish(folder, given, summary, clock, page)


def read_scan(config: Config, table: Table) -> Signals:
    """Read the scan, which must have a network's protocol."""
    return read_signals(config.dwi, config.bvals, config.bvecs, config.mask, table)


def read_weights(config: Config) -> Network | Deployed:
    """Read the network in the form that the runtime runs.

    Raises:
        InputError: It is missing or damaged, or of another form.
    """
    path = require_given(config.weights, "weights")
    if not path.exists():
        raise InputError(path, "a network of jaxmed noddi train or export", "no such path", "check the path")
    is_onnx = path.suffix == ".onnx"
    if is_onnx != (config.runtime == "onnx"):
        wanted = "an .onnx file of jaxmed noddi export" if config.runtime == "onnx" else "a run of jaxmed noddi train"
        found = f"{'an' if is_onnx else 'no'} .onnx file for --runtime {config.runtime}"
        raise InputError(path, wanted, found, f"give --runtime {'onnx' if is_onnx else 'jax'}")
    return load_onnx(path, config.threads) if is_onnx else load(path)


def train_tiny(config: Config, folder: RunFolder, log: Log) -> Network | Deployed:
    """Train the network of train's preset smoke for the scan's protocol, in the form that the runtime runs."""
    said = "No weights were given: a tiny network is trained for this protocol, which is good for a trial alone."
    changes = {"bvals": config.bvals, "bvecs": config.bvecs, "seed": config.seed}
    network = load(nested_run(folder, "noddi train", changes, log, said).path)
    if config.runtime == "jax":
        return network
    export_onnx(folder.outputs / "network.onnx", network)
    return load_onnx(folder.outputs / "network.onnx", config.threads)


def read_source(config: Config, scan: Signals) -> Stack | None:
    """Read the DICOM series to file maps beside, and check that it has the voxels of the scan.

    Raises:
        InputError: It is no regular series, or another one.
    """
    if config.dicom_source is None:
        return None
    stack = read_stack(config.dicom_source, series=config.series)
    on_stack(Volume.make(scan.mask, scan.dwi.affine), stack)
    return stack


def page(run: Finished[Config, Summary]) -> Page:
    """Show the maps, and their errors where the truth is known."""
    summary, outputs = run.summary, run.summary.outputs
    maps = {map_label(output.name): read_map(run.outputs / f"{output.name}.nii.gz") for output in outputs}
    mask = read_map(run.outputs / "mask.nii.gz").array > 0
    tissue = mask & (maps["FWF"].array < WET) if "FWF" in maps else mask
    where = {label: mask if label == "FWF" else tissue for label in maps}
    styles = {
        map_label(output.name): MapStyle(unit="" if output.unit == "1" else output.unit, limits=output.bounds)
        for output in outputs
    }
    notes = [Note(text, "warning" if "negative" in text else "info") for text in summary.notes]
    if summary.dicom:
        notes.append(Note("The maps were written as DICOM too: outputs/dicom."))
    distribution = "Distribution over estimated voxels"
    if "FWF" in maps:
        distribution += f"; tissue parameters where the free water fraction is below {WET:g}"
    caption = "Maps as the network estimates them."
    sections = [maps_section(maps, styles, mask, where, notes, caption=caption, distribution=f"{distribution}.")]
    if summary.truth is not None:
        files = {map_label(output.name): run.path / summary.truth / f"{output.name}.nii.gz" for output in outputs}
        truth = {label: read_map(file) for label, file in files.items() if file.exists()}
        caption = f"Error of the estimate; tissue parameters where the estimated FWF is below {WET:g}."
        sections.append(truth_section(truth, maps, styles, mask, where, caption))
    reading = Text(
        [
            f"These maps come from a network that was trained on simulated signals with labels '{summary.labels}'; it "
            "gives an answer for any signal and does not say when the model does not hold: artefacts, motion "
            "or pathology look like tissue. jaxmed noddi fit gives residuals and standard errors.",
            "Where the free water fraction is near 1 the other maps mean nothing. For research only, not for "
            "diagnosis.",
        ]
    )
    data = "a synthetic brain slab with known truth" if run.config.dwi is None else run.config.dwi.name
    tiles: list[tuple[str, object, str]] = [
        ("Voxels", summary.voxels, f"in {sum(run.seconds.values()):.1f} s, reading and writing included")
    ]
    for output in outputs:
        said = "median" if output.unit == "1" else f"median, {output.unit}"
        tiles.append((map_label(output.name), round(summary.medians[output.name], 3), said))
    return Page(
        "Maps by a network",
        f"{summary.images} diffusion images of {data}, estimated in {summary.voxels:,} voxels by {summary.runtime}",
        tiles,
        [*sections, Section("How to read this", [reading])],
    )
