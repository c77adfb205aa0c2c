"""Stage `jaxmed noddi predict`: maps of a scan by a trained network, in seconds."""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxmed.config import Length, Positive, Seed, Size, checked
from jaxmed.errors import InputError
from jaxmed.files import write_json
from jaxmed.io.dicom import Stack, read_stack
from jaxmed.io.parametric_map import on_stack
from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.synthesis.phantoms.write import write_diffusion_slab
from jaxmed.systems.noddi.deployment import (
    Deployed,
    DicomForm,
    load_onnx,
    make_maps,
    run_onnx,
    write_dicom,
    write_maps,
)
from jaxmed.systems.noddi.network import Network, constants, load, predict
from jaxmed.systems.noddi.options import check_shape
from jaxmed.systems.noddi.predict_page import write_page
from jaxmed.systems.noddi.reading import Signals, read_signals, read_table, require_path
from jaxmed.systems.noddi.stages import train as training
from jaxmed.systems.noddi.table import Table
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start, write_summary
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
        threads: Of ONNX Runtime; 0 takes one per core.
        dicom_source: Folder of the DICOM series that the scan was converted from: maps are written as DICOM too, in
            its study, on its geometry.
        series: SeriesInstanceUID or SeriesDescription to read from that folder where it holds several.
        dicom: Which DICOM: "parametric-map" (floating point), "mr-image" (16 bit, thousandths, for every viewer).
        embedded_shape: Voxels (x, y, z) of the brain slab to take where no --dwi is given; without weights a small
            network is trained first.
        embedded_snr: Signal-to-noise ratio of the embedded slab, white matter, unweighted.
        seed: Of the embedded slab and the network trained for it.
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
    embedded_shape: tuple[Size, Size, Size] | None = None
    embedded_snr: Positive = 30.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(f"threads: expected 0 or more, found {self.threads}")
        if self.embedded_shape is not None:
            check_shape("embedded_shape", self.embedded_shape)
        if not self.embedded_snr > 0:
            raise ValueError(f"embedded_snr: expected a positive number, found {self.embedded_snr:g}")


def paper() -> Config:
    """Your network on your scan."""
    return Config()


def smoke() -> Config:
    """In seconds: your scan or a simulated slab, your network or a tiny one trained for it."""
    return Config(embedded_shape=(32, 38, 2))


def run(config: Config, folder: RunFolder) -> None:
    """Read network and scan, estimate, write maps and the report."""
    began = time.monotonic()
    log = None
    truth = None
    if config.embedded_shape is not None and config.dwi is None:
        found = None if config.weights is None else read_weights(config)
        start(folder)
        log = Log(folder.path, folder.options.quiet)
        files = write_diffusion_slab(folder.path / "inputs", config.seed, config.embedded_shape, config.embedded_snr)
        truth = files.truth
        if found is None:
            found = train_tiny(*two_shell_protocol(), config, folder, log)
        config = dataclasses.replace(config, dwi=files.dwi, bvals=files.bvals, bvecs=files.bvecs, mask=files.mask)
        began = time.monotonic()
        scan = read_signals(config.dwi, config.bvals, config.bvecs, config.mask, table_of(found))
        stack = read_source(config, scan)
    else:
        if config.embedded_shape is not None and config.weights is None and config.bvals is not None:
            threshold = training.smoke().train.b0_threshold
            table = read_table(config.bvals, config.bvecs, threshold)
            own = Table.make(table.bvals, table.bvecs, threshold)
            read_signals(config.dwi, config.bvals, config.bvecs, config.mask, own)  # a mistake there costs no training
            start(folder)
            log = Log(folder.path, folder.options.quiet)
            found = train_tiny(table.bvals, table.bvecs, config, folder, log)
        else:
            found = read_weights(config)
        scan = read_signals(config.dwi, config.bvals, config.bvecs, config.mask, table_of(found))
        stack = read_source(config, scan)
        start(folder)
    log = log or Log(folder.path, folder.options.quiet)
    for note in scan.notes:
        log.say(f"Note: {note}")
    read = time.monotonic()
    values = run_onnx(found, scan.signals) if isinstance(found, Deployed) else predict(found, scan.signals)
    estimated = time.monotonic()
    outputs = found.outputs if isinstance(found, Deployed) else found.description.outputs
    rest_on = found.constants if isinstance(found, Deployed) else constants(found.description)
    maps = make_maps(values, scan.mask, outputs)
    assert config.dwi is not None  # read_signals has refused None
    write_maps(folder.outputs, maps, outputs, rest_on, scan.dwi.affine, config.dwi)
    write_maps_mask(folder, scan, config.dwi)
    if stack is not None:
        files = write_dicom(folder.outputs / "dicom", maps, outputs, scan.dwi.affine, stack, config.dicom)
        log.say(f"{len(files)} DICOM files in {folder.outputs / 'dicom'}")
    written = time.monotonic()
    log.say(f"{len(values):,} voxels in {estimated - read:.2f} s, with reading and writing {written - began:.2f} s")
    medians = {output.name: float(np.median(values[:, column])) for column, output in enumerate(outputs)}
    summary = {
        "voxels": len(values),
        "images": len(table_of(found).bvals),
        "outputs": [dataclasses.asdict(output) for output in outputs],
        "medians": medians,
        "protocol": table_of(found).hash,
        "constants": rest_on,
        "runtime": "ONNX Runtime" if isinstance(found, Deployed) else "jax",
        "dicom": stack is not None,
        "notes": scan.notes,
        "truth": None if truth is None else str(truth.relative_to(folder.path)),
        "device": "cpu" if isinstance(found, Deployed) else jax.devices()[0].device_kind,
        "command": f"jaxmed noddi predict --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {
            "read and check": read - began,
            "estimate, compilation included": estimated - read,
            "write": written - estimated,
        },
    }
    write_summary(folder, summary)
    log.metrics(len(values), medians)
    write_page(folder.path)


report = write_page


def read_weights(config: Config) -> Network | Deployed:
    """Read the network in the form that the runtime runs.

    Raises:
        InputError: It is missing or damaged, or of another form.
    """
    path = require_path(config.weights, "weights")
    if not path.exists():
        raise InputError(path, "a network of jaxmed noddi train or export", "no such path", "check the path")
    is_onnx = path.suffix == ".onnx"
    if is_onnx != (config.runtime == "onnx"):
        wanted = "an .onnx file of jaxmed noddi export" if config.runtime == "onnx" else "a run of jaxmed noddi train"
        found = f"{'an' if is_onnx else 'no'} .onnx file for --runtime {config.runtime}"
        raise InputError(path, wanted, found, f"give --runtime {'onnx' if is_onnx else 'jax'}")
    return load_onnx(path, config.threads) if is_onnx else load(path)


def train_tiny(bvals: np.ndarray, bvecs: np.ndarray, config: Config, folder: RunFolder, log: Log) -> Network | Deployed:
    """Train the network of train's preset smoke for a protocol, in the form that the runtime runs."""
    log.say("No weights were given: a tiny network is trained for this protocol, which is good for a trial alone.")
    settings = training.smoke().train
    trained = training.train_in_folder(jax.random.key(config.seed), bvals, bvecs, settings, folder, log)
    return deploy(trained.network, folder, config)


def deploy(network: Network, folder: RunFolder, config: Config) -> Network | Deployed:
    """Bring a network that was just trained into the form that the runtime runs."""
    from jaxmed.systems.noddi.deployment import export_onnx

    if config.runtime == "jax":
        return network
    export_onnx(folder.outputs / "network.onnx", network)
    return load_onnx(folder.outputs / "network.onnx", config.threads)


def table_of(found: Network | Deployed) -> Any:
    """Return the protocol of a network in either form."""
    return found.table if isinstance(found, Deployed) else found.description.table


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


def write_maps_mask(folder: RunFolder, scan: Signals, reference: Path) -> None:
    """Write which voxels were estimated."""
    from jaxmed.io import nifti

    nifti.write(folder.outputs / "mask.nii.gz", Volume.make(scan.mask, scan.dwi.affine), reference=reference)
    sidecar = {"definition": "1 where a network's estimate was made", "unit": "1", "constants": {}}
    write_json(folder.outputs / "mask.json", sidecar)
