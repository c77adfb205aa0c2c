"""Take a network to where it is used: ONNX files, and maps written as NIfTI and DICOM."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32

from jaxmed.config import from_record
from jaxmed.errors import InputError
from jaxmed.files import write_json
from jaxmed.io import nifti, onnx
from jaxmed.io.dicom import Stack
from jaxmed.io.parametric_map import Quantity, write_mr_images, write_parametric_map
from jaxmed.systems.noddi import network as networks
from jaxmed.systems.noddi.network import Network, Output
from jaxmed.systems.noddi.table import Table
from jaxmed.versions import package_version
from jaxmed.volume import Volume

DicomForm = Literal["parametric-map", "mr-image", "both"]
ONNX_CHUNK = 16384


class Deployed(NamedTuple):
    """A network that only ONNX Runtime knows how to run.

    Attributes:
        session: The runtime's.
        table: Protocol that it belongs to.
        outputs: Its maps.
        constants: What they rest on.
    """

    session: onnx.Session
    table: Table
    outputs: tuple[Output, ...]
    constants: dict


def software() -> str:
    """Return name and version, as sidecars and headers carry them."""
    return f"jaxmed {package_version('jaxmed') or 'unknown'}"


def export_onnx(path: Path, network: Network) -> None:
    """Write a network as ONNX: normalisation by the mean unweighted signal inside, its protocol in the metadata."""
    description = network.description
    low, span = networks.ranges(description.outputs)
    is_b0 = description.table.is_b0
    graph = onnx.Graph(
        networks.network_layers(network),
        description.shape.activation,
        description.shape.head,
        np.flatnonzero(is_b0).tolist(),
        np.flatnonzero(~is_b0).tolist(),
        low.tolist(),
        span.tolist(),
    )
    onnx.write(path, graph, networks.graph_metadata(description, software()))


def load_onnx(path: Path, threads: int = 0) -> Deployed:
    """Open an exported network.

    Raises:
        InputError: It is none, or says too little about itself.
    """
    session = onnx.load(path, threads)
    found = session.metadata
    try:
        record = {name: json.loads(found[name]) for name in ("bvals", "bvecs", "b0_threshold")}
        columns = [json.loads(found[name]) for name in ("parameters", "definitions", "units", "bounds")]
        constants = json.loads(found["constants"])
        names = ("name", "definition", "unit", "bounds")
        outputs = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    except (KeyError, ValueError) as error:
        advice = "export it with jaxmed noddi export"
        raise InputError(path, "a network that names its protocol", f"metadata without it ({error})", advice) from error
    table = from_record(Table, record, str(path))
    if table.hash != found.get("protocol_hash"):
        raise InputError(path, "the table that its hash names", "another", "export the network again")
    if len(table.bvals) != session.images:
        raise InputError(path, f"{session.images} rows in its table", len(table.bvals), "export the network again")
    return Deployed(session, table, tuple(from_record(Output, output, str(path)) for output in outputs), constants)


def run_onnx(deployed: Deployed, signals: Float[np.ndarray, "voxel image"]) -> Float32[np.ndarray, "voxel output"]:
    """Estimate the parameters of many voxels; blocks keep the activations in the processor's cache."""
    starts = range(0, len(signals), ONNX_CHUNK)
    parts = [deployed.session.run(signals[start : start + ONNX_CHUNK]) for start in starts]
    return np.concatenate(parts) if parts else np.zeros((0, len(deployed.outputs)), np.float32)


def make_maps(
    values: Float32[np.ndarray, "voxel output"], mask: Bool[np.ndarray, "x y z"], outputs: tuple[Output, ...]
) -> dict[str, Float32[np.ndarray, "x y z"]]:
    """Put the voxels of a mask back into volumes, 0 outside."""
    maps = {}
    for column, output in enumerate(outputs):
        volume = np.zeros(mask.shape, np.float32)
        volume[mask] = values[:, column]
        maps[output.name] = volume
    return maps


def write_maps(
    folder: Path,
    maps: Mapping[str, np.ndarray],
    outputs: tuple[Output, ...],
    constants: Mapping[str, object],
    affine: np.ndarray,
    reference: Path,
) -> None:
    """Write maps as NIfTI on the grid of the scan, each with a JSON sidecar."""
    for output in outputs:
        volume = Volume.make(maps[output.name], affine)
        nifti.write(folder / f"{output.name}.nii.gz", volume, reference=reference)
        sidecar = {
            "definition": output.definition,
            "unit": output.unit,
            "constants": dict(constants),
            "software": software(),
        }
        write_json(folder / f"{output.name}.json", sidecar)


def write_dicom(
    folder: Path,
    maps: Mapping[str, np.ndarray],
    outputs: tuple[Output, ...],
    affine: np.ndarray,
    stack: Stack,
    form: DicomForm,
) -> list[Path]:
    """Write maps as DICOM beside their source: NAME.dcm, and NAME/0001.dcm, ... for every viewer.

    Returns:
        The files.
    """
    paths = []
    for output in outputs:
        label = output.name.upper() if len(output.name) == 3 else output.name
        quantity = Quantity(label, output.definition, output.unit, output.bounds)
        volume = Volume.make(maps[output.name], affine)
        if form in ("parametric-map", "both"):
            write_parametric_map(folder / f"{output.name}.dcm", volume, stack, quantity)
            paths.append(folder / f"{output.name}.dcm")
        if form in ("mr-image", "both"):
            paths += write_mr_images(folder / output.name, volume, stack, quantity)
    return paths
