"""A trained network: what it computes, which protocol it belongs to, its place on disk, and its form as ONNX."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64

from jaxmed.arrays.types import Params
from jaxmed.config import from_record, to_record
from jaxmed.errors import InputError
from jaxmed.files import require_given
from jaxmed.io import onnx
from jaxmed.io.diffusion import count_images, read_magnitudes
from jaxmed.io.gradient_match import Table, match_table
from jaxmed.io.gradients import read_gradients
from jaxmed.io.maps import write_map
from jaxmed.io.masks import fill_mask
from jaxmed.io.parametric_map import Quantity
from jaxmed.io.weights_files import load_parameters
from jaxmed.models.mlp import Mlp, MlpConfig, layers, to_unit
from jaxmed.nn.model import make_model
from jaxmed.physics.acquisition import check_voxels
from jaxmed.physics.microstructure import MicrostructureModel, Parameter, ball_and_stick_model, noddi_model
from jaxmed.physics.noddi import Tissue, order_for
from jaxmed.systems.noddi.protocol import read_mask
from jaxmed.train.checkpoint import export_parameters
from jaxmed.versions import software_name
from jaxmed.volume import Volume

CHUNK = 16384
"""Voxels of one call, compiled or of ONNX Runtime: activations of 256 numbers stay in 16 MB."""


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Which forward model makes the signals.

    Attributes:
        kind: NODDI, or one stick in a ball (stick fraction and diffusivity).
        tissue: Diffusivities that NODDI fixes.
        extra_cellular: NODDI's space outside neurites, see `jaxmed.physics.noddi.signal`.
        dot: Add NODDI's compartment of water that does not move, for fixed tissue.
    """

    kind: Literal["noddi", "ball-and-stick"] = "noddi"
    tissue: Tissue = dataclasses.field(default_factory=Tissue)
    extra_cellular: Literal["averaged_tensor", "convolved"] = "averaged_tensor"
    dot: bool = False

    def build(self, bvals: np.ndarray) -> MicrostructureModel:
        """Return the model, exact enough for these b-values."""
        if self.kind == "ball-and-stick":
            return ball_and_stick_model()
        return noddi_model(self.tissue, order_for(bvals), self.extra_cellular, self.dot)


@dataclasses.dataclass(frozen=True)
class Output:
    """One map of a network.

    Attributes:
        name: Name of the map and its file.
        definition: In one line.
        unit: "1" for a fraction.
        bounds: Values at the two ends of the head's range.
    """

    name: str
    definition: str
    unit: str
    bounds: tuple[float, float]

    @classmethod
    def make(cls, parameter: Parameter) -> "Output":
        """Describe a model's parameter."""
        return cls(parameter.name, parameter.definition, parameter.unit, parameter.bounds)

    @property
    def quantity(self) -> Quantity:
        """What DICOM headers say of it."""
        label = self.name.upper() if len(self.name) == 3 else self.name
        return Quantity(label, self.definition, self.unit, self.bounds)


@dataclasses.dataclass(frozen=True)
class Description:
    """All of a network but its parameters; stands in record.json beside them.

    Attributes:
        shape: Depth, width and head.
        outputs: Its maps, in order.
        table: The protocol that it belongs to.
        forward: The model that made its training signals.
        labels: What it was trained on, such as "mle".
        snr: Range of signal-to-noise ratios in training.
    """

    shape: MlpConfig
    outputs: tuple[Output, ...]
    table: Table
    forward: ForwardConfig
    labels: str
    snr: tuple[float, float]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the maps."""
        return tuple(output.name for output in self.outputs)

    @property
    def constants(self) -> dict[str, Any]:
        """What the maps rest on, for sidecars."""
        forward = self.forward
        found: dict[str, Any] = {"model": forward.kind, "labels": self.labels, "training_snr": self.snr}
        if forward.kind == "noddi":
            found |= forward.tissue.constants() | {"extra_cellular": forward.extra_cellular}
        return found | {"protocol": self.table.hash}


class Network(NamedTuple):
    """A network and what it is.

    Attributes:
        params: Parameters of `jaxmed.models.mlp.Mlp`.
        description: Shape, outputs and protocol.
    """

    params: Params
    description: Description

    @property
    def table(self) -> Table:
        """Protocol that it belongs to."""
        return self.description.table

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Its maps."""
        return self.description.outputs

    @property
    def constants(self) -> dict[str, Any]:
        """What the maps rest on."""
        return self.description.constants


def normalise(
    signals: Float[Array, "*batch image"], is_b0: Bool[np.ndarray, " image"]
) -> tuple[Float[Array, "*batch weighted"], Bool[Array, "*batch"]]:
    """Divide weighted signals by the mean of the unweighted ones, noise and all: the same in training and on a scan.

    Returns:
        What enters a network, and whether there was unweighted signal to divide by.
    """
    mean = jnp.mean(signals[..., np.flatnonzero(is_b0)], axis=-1)
    has_signal = mean > 0
    divided = signals[..., np.flatnonzero(~is_b0)] / jnp.where(has_signal, mean, 1.0)[..., None]
    return divided, has_signal


def ranges(outputs: Sequence[Output]) -> tuple[Float32[np.ndarray, " output"], Float32[np.ndarray, " output"]]:
    """Return the lower end and the width of each output's range."""
    low, high = np.array([output.bounds for output in outputs], np.float32).T
    return low, high - low


@functools.partial(jax.jit, static_argnums=1)  # jitted here so that repeated calls of `predict` compile once
def _predict_chunk(params: Params, description: Description, signals: jax.Array) -> jax.Array:
    inputs, has_signal = normalise(signals, description.table.is_b0)
    low, span = ranges(description.outputs)
    # Accelerators would otherwise multiply with 10 bits.
    with jax.default_matmul_precision("highest"):
        raw = make_model(Mlp(description.shape, len(description.outputs))).apply(params, inputs)
    return jnp.where(has_signal[:, None], low + span * to_unit(description.shape, raw), 0.0)


def predict(network: Network, signals: Float[np.ndarray | Array, "voxel image"]) -> Float32[np.ndarray, "voxel output"]:
    """Estimate the parameters of many voxels.

    Args:
        network: A network of the signals' protocol, in its order: see `jaxmed.io.gradient_match.match_table`.
        signals: Magnitudes, not normalised.

    Returns:
        One column per output; 0 where there is no unweighted signal.
    """
    count = len(signals)
    size = min(CHUNK, max(128, count))
    params = jax.device_put(network.params)
    parts = []
    for start in range(0, count, size):
        block = np.asarray(signals[start : start + size], np.float32)
        # Padding every chunk to one size keeps one compiled program.
        block = np.pad(block, ((0, size - len(block)), (0, 0)))
        parts.append(_predict_chunk(params, network.description, block))
    found = [np.asarray(part) for part in parts]
    return np.concatenate(found)[:count] if found else np.zeros((0, len(network.description.outputs)), np.float32)


def predict_exactly(
    network: Network, signals: Float[np.ndarray | Array, "voxel image"]
) -> Float64[np.ndarray, "voxel output"]:
    """Estimate in double precision, one block after the other: what other runtimes are checked against."""
    parts = []
    with jax.enable_x64(True):
        for start in range(0, len(signals), CHUNK):
            block = np.asarray(signals[start : start + CHUNK], np.float64)
            parts.append(np.asarray(_predict_chunk(network.params, network.description, block), np.float64))
    return np.concatenate(parts)


def save(folder: Path, network: Network) -> None:
    """Write a network: parameters.safetensors and record.json."""
    record = {"family": "noddi", "kind": "mlp", "protocol": network.description.table.hash}
    export_parameters(folder, network.params, record | {"config": to_record(network.description)})


def load(path: Path) -> Network:
    """Read a network that `save` wrote.

    Args:
        path: Its folder, or the folder of the run that trained it.

    Raises:
        InputError: There is none, or it was changed.
    """
    run = path / "outputs" / "model"
    folder = run if run.is_dir() else path
    if not (folder / "record.json").exists():
        raise InputError(path, "a network of jaxmed noddi train", "no record.json there", "name its run folder")
    params, record = load_parameters(folder)
    if (record.get("family"), record.get("kind")) != ("noddi", "mlp"):
        found = f"family {record.get('family')}, kind {record.get('kind')}"
        raise InputError(folder, "a network of jaxmed noddi train", found)
    description = from_record(Description, record.get("config"), str(folder / "record.json"))
    if description.table.hash != record.get("protocol"):
        raise InputError(folder / "record.json", "the table that its hash names", "another", "export the network again")
    _check_shapes(folder, params, description)
    return Network(params, description)


def _check_shapes(folder: Path, params: Params, description: Description) -> None:
    expected = jax.eval_shape(
        make_model(Mlp(description.shape, len(description.outputs))).init,
        jax.random.key(0),
        jnp.zeros((1, int((~description.table.is_b0).sum()))),
    )
    found = jax.tree.map(np.shape, params)
    wanted = jax.tree.map(np.shape, expected)
    if found != wanted:
        raise InputError(folder, f"parameters of shapes {wanted}", f"{found}", "the files belong to two networks")


def make_maps(
    values: Float32[np.ndarray, "voxel output"], scan: "Signals", outputs: tuple[Output, ...]
) -> dict[str, Volume]:
    """Put the voxels of a scan back into volumes by name, 0 outside the mask."""
    return {
        output.name: Volume.make(fill_mask(values[:, column], scan.mask), scan.dwi.affine)
        for column, output in enumerate(outputs)
    }


def write_maps(folder: Path, maps: Mapping[str, Volume], network: "Network | Deployed", reference: Path) -> None:
    """Write maps as NIfTI on the grid of the scan, each with a sidecar."""
    for output in network.outputs:
        said = output.definition, output.unit, network.constants
        write_map(folder, output.name, maps[output.name], *said, reference=reference)


class Deployed(NamedTuple):
    """A network that only ONNX Runtime knows how to run; it says as much about itself as a `Network`.

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


def export_onnx(path: Path, network: Network) -> None:
    """Write a network as ONNX: normalisation by the mean unweighted signal inside, its protocol in the metadata."""
    description = network.description
    low, span = ranges(description.outputs)
    is_b0 = description.table.is_b0
    graph = onnx.Graph(
        layers(network.params),
        description.shape.activation,
        description.shape.head,
        np.flatnonzero(is_b0).tolist(),
        np.flatnonzero(~is_b0).tolist(),
        low.tolist(),
        span.tolist(),
    )
    onnx.write(path, graph, _graph_metadata(description))


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
    starts = range(0, len(signals), CHUNK)
    parts = [deployed.session.run(signals[start : start + CHUNK]) for start in starts]
    return np.concatenate(parts) if parts else np.zeros((0, len(deployed.outputs)), np.float32)


def _graph_metadata(description: Description) -> dict[str, str]:
    """Return what an exported network says about itself: strings, lists and tables as JSON."""
    table = description.table
    return {
        "format": "jaxmed-noddi-1",
        "protocol_hash": table.hash,
        "bvals": json.dumps(table.bvals),
        "bvecs": json.dumps(table.bvecs),
        "b0_threshold": json.dumps(table.b0_threshold),
        "parameters": json.dumps(description.names),
        "definitions": json.dumps([output.definition for output in description.outputs]),
        "units": json.dumps([output.unit for output in description.outputs]),
        "bounds": json.dumps([output.bounds for output in description.outputs]),
        "constants": json.dumps(description.constants),
        "software": software_name(),
    }


class Signals(NamedTuple):
    """A checked scan of a network's protocol.

    Attributes:
        path: File of the scan.
        dwi: The 4D scan.
        mask: Voxels inside whose values are all finite.
        signals: Magnitudes of those voxels, images in the network's order.
        notes: What a reader of the maps should know, one sentence each.
    """

    path: Path
    dwi: Volume
    mask: Bool[np.ndarray, "x y z"]
    signals: Float32[np.ndarray, "voxel image"]
    notes: list[str]


def read_signals(dwi: Path | None, bvals: Path | None, bvecs: Path | None, mask: Path | None, table: Table) -> Signals:
    """Read a scan of a network's protocol.

    Args:
        dwi: 4D NIfTI file of magnitudes.
        bvals: Its b-values.
        bvecs: Its directions.
        mask: NIfTI file on its grid; None for the bright unweighted voxels.
        table: The protocol that it must have, in whatever order.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    dwi, bvals, bvecs = require_given(dwi, "dwi"), require_given(bvals, "bvals"), require_given(bvecs, "bvecs")
    gradients = read_gradients(bvals, bvecs, b0_threshold=table.b0_threshold, num_images=count_images(dwi))
    match = match_table(table, gradients.bvals, gradients.bvecs, bvals)
    volume = read_magnitudes(dwi)
    notes = [*gradients.notes, *match.notes]
    b0 = volume.array[..., match.order[table.is_b0]].mean(axis=-1)
    inside = read_mask(mask, volume, dwi, b0, notes)
    signals = volume.array[inside][:, match.order]
    finite = check_voxels(signals, table.is_b0, dwi, notes, left_out="their maps are 0, and map 'mask' leaves them out")
    inside[inside] = finite
    return Signals(dwi, volume, inside, signals[finite], notes)
