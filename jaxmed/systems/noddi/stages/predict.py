"""Stage `jaxmed noddi predict`: maps of a scan by a trained network, in seconds."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np

from jaxmed.config import Length, checked
from jaxmed.data.diffusion import DiffusionScan
from jaxmed.errors import InputError
from jaxmed.files import require_given
from jaxmed.io import onnx
from jaxmed.io.gradient_match import Table
from jaxmed.io.maps import Quantity, write_map
from jaxmed.io.parametric_map import DicomForm, read_source, write_dicom_map
from jaxmed.models.published.signal_network import Description, export_onnx, load_network
from jaxmed.recipes.diffusion_scan import ScanConfig, make_maps, read_signals, read_table, write_maps
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, nested_run
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.report.page import Note, Section, Text
from jaxmed.report.parameter_maps import estimate_sections, median_tiles, read_map
from jaxmed.systems.noddi.network import predict
from jaxmed.systems.noddi.training import TINY
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder
from jaxmed.volume import Volume

Ready: TypeAlias = tuple[Description | onnx.Session, Callable[[np.ndarray], np.ndarray]]
"""What a network says of itself, and the network: signals [voxel, image] to parameters [voxel, output]."""


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Apply a trained network to a scan.

    Attributes:
        weights: Run folder of `jaxmed noddi train`, its outputs/model, or an .onnx file of `jaxmed noddi export`.
        scan: The scan, of the protocol that the network was trained for: b-values to 3 % or 20 s/mm^2, directions to 2
            degrees, images in any order. Of a synthetic one without weights, a small network is trained first.
        runtime: What computes: jax, or ONNX Runtime, as on a scanner (needs an .onnx file).
        threads: Threads of ONNX Runtime; 0 takes one per core.
        dicom_source: Folder of the DICOM series that the scan was converted from: maps are written as DICOM too, in
            its study, on its geometry.
        series: SeriesInstanceUID or SeriesDescription to read from that folder where it holds several; without a
            source, from that of the scan.
        dicom: Which DICOM: "parametric-map" (floating point), "mr-image" (16 bit, thousandths, for every viewer).
    """

    weights: Path | None = None
    scan: Annotated[ScanConfig, NO_PREFIX] = ScanConfig()
    runtime: Literal["jax", "onnx"] = "jax"
    threads: Length = 0
    dicom_source: Path | None = None
    series: str | None = None
    dicom: DicomForm = "both"


def paper() -> Config:
    """Your network on your scan."""
    return Config()


def smoke() -> Config:
    """In seconds: your scan or a simulated slab, your network or a tiny one trained for it."""
    return Config(scan=ScanConfig(synthetic_shape=(32, 38, 2)))


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
    outputs: tuple[Quantity, ...]
    medians: dict[str, float]
    protocol: str
    labels: str
    runtime: str
    dicom: bool
    notes: tuple[str, ...]
    truth: str | None


def run(config: Config, folder: RunFolder) -> None:
    """Read network and scan, estimate, write maps and the report."""
    given, network = config, None
    is_trial = config.scan.synthetic_shape is not None and config.weights is None
    if not is_trial or (config.scan.dwi is not None and config.scan.bvals is None):
        network = read_weights(config)
    files, truth = config.scan.simulate(folder)
    if network is None:
        if truth is None:  # a mistake there costs no training
            bvals, bvecs, _ = read_table(files.bvals, files.bvecs, TINY.b0_threshold)
            read_scan(config, files, Table.make(bvals, bvecs, TINY.b0_threshold))
        network = train_tiny(config, files, folder, begin(folder))
    clock, (about, estimate) = Clock(), network
    scan, signals = read_scan(config, files, about.table)
    stack = None
    if config.dicom_source is not None:
        stack = read_source(config.dicom_source, Volume.make(scan.mask, scan.dwi.affine), config.series)
    log = begin(folder, scan.notes)
    clock.lap("read and check")
    values = estimate(signals)
    clock.lap("estimate, compilation included")
    maps = make_maps(values, scan, about.outputs)
    said = {one.name: (maps[one.name].array, one.definition, one.unit) for one in about.outputs}
    write_maps(folder.outputs, said, scan, about.constants)
    inside = Volume.make(scan.mask, scan.dwi.affine)
    where = "1 where a network's estimate was made"
    write_map(folder.outputs, "mask", inside, where, "1", {}, reference=scan.reference)
    if stack is not None:
        place = folder.outputs / "dicom"
        written = [write_dicom_map(place, maps[one.name], stack, one, config.dicom) for one in about.outputs]
        log.say(f"{sum(map(len, written))} DICOM files in {place}")
    clock.lap("write")
    seconds = clock.seconds["estimate, compilation included"], sum(clock.seconds.values())
    log.say(f"{len(values):,} voxels in {seconds[0]:.2f} s, with reading and writing {seconds[1]:.2f} s")
    medians = {output.name: float(np.median(column)) for output, column in zip(about.outputs, values.T, strict=True)}
    log.metrics(len(values), medians)
    summary = Summary(
        voxels=len(values),
        images=len(about.table.bvals),
        outputs=about.outputs,
        medians=medians,
        protocol=about.table.hash,
        labels=about.constants.get("labels", "unknown"),
        runtime="ONNX Runtime" if config.runtime == "onnx" else "jax",
        dicom=stack is not None,
        notes=tuple(scan.notes),
        truth=truth,
    )
    finish(folder, given, summary, clock, page)


def read_scan(config: Config, files: ScanConfig, table: Table) -> tuple[DiffusionScan, np.ndarray]:
    """Read the scan, which must have a network's protocol."""
    series = config.series if config.dicom_source is None else None
    return read_signals(files.dwi, files.bvals, files.bvecs, files.mask, table, series)


def read_weights(config: Config) -> Ready:
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
    return open_network(path, config.threads)


def open_network(path: Path, threads: int) -> Ready:
    """Return what a network says of itself, and the network as a function of signals."""
    if path.suffix == ".onnx":
        session = onnx.load(path, threads)
        return session, session.run
    network = load_network(path)
    return network.description, partial(predict, network)


def train_tiny(config: Config, files: ScanConfig, folder: RunFolder, log: Log) -> Ready:
    """Train the network of train's preset smoke for the scan's protocol, in the form that the runtime runs."""
    said = "No weights were given: a tiny network is trained for this protocol, which is good for a trial alone."
    changes = {"bvals": files.bvals, "bvecs": files.bvecs, "seed": files.seed}
    path = nested_run(folder, "noddi train", changes, log, said).path
    if config.runtime == "onnx":
        network, path = load_network(path), folder.outputs / "network.onnx"
        export_onnx(path, network)
    return open_network(path, config.threads)


def page(run: Finished[Config, Summary]) -> Page:
    """Show the maps, and their errors where the truth is known."""
    summary, outputs, dwi = run.summary, run.summary.outputs, run.config.scan.dwi
    notes = [Note(text, "warning" if "negative" in text else "info") for text in summary.notes]
    if summary.dicom:
        notes.append(Note("The maps were written as DICOM too: outputs/dicom."))
    sections = estimate_sections(
        run.outputs, {output.name: output.unit for output in outputs},
        read_map(run.outputs / "mask.nii.gz").array > 0, notes,
        caption="Maps as the network estimates them.",
        truth=None if summary.truth is None else run.path / summary.truth,
    )  # fmt: skip
    reading = Text(
        [
            f"These maps come from a network that was trained on simulated signals with labels '{summary.labels}'; it "
            "gives an answer for any signal and does not say when the model does not hold: artefacts, motion "
            "or pathology look like tissue. jaxmed noddi fit gives residuals and standard errors.",
            "Where the free water fraction is near 1 the other maps mean nothing. For research only, not for "
            "diagnosis.",
        ]
    )
    data = "a synthetic brain slab with known truth" if dwi is None else dwi.name
    tiles: list[tuple[str, object, str]] = [
        ("Voxels", summary.voxels, f"in {sum(run.seconds.values()):.1f} s, reading and writing included")
    ]
    units = {output.name: output.unit for output in outputs}
    return Page(
        "Maps by a network",
        f"{summary.images} diffusion images of {data}, estimated in {summary.voxels:,} voxels by {summary.runtime}",
        [*tiles, *median_tiles(units, summary.medians)],
        [*sections, Section("How to read this", [reading])],
    )
