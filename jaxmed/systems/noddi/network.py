"""A trained network: what it computes, which protocol it belongs to, and its place on disk."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64

from jaxmed.arrays.types import Params
from jaxmed.config import from_record, to_record
from jaxmed.errors import InputError
from jaxmed.io import onnx
from jaxmed.io.gradient_match import Table
from jaxmed.io.maps import Quantity
from jaxmed.io.weights_files import load_exported
from jaxmed.models.mlp import Mlp, MlpConfig, layers, to_unit
from jaxmed.nn.model import make_model, require_shapes
from jaxmed.physics.microstructure import MicrostructureModel, Parameter, ball_and_stick_model, noddi_model
from jaxmed.physics.noddi import Tissue, order_for
from jaxmed.train.checkpoint import export_parameters

CHUNK = 16384
"""Voxels of one compiled call: activations of 256 numbers stay in 16 MB."""


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
    outputs: tuple[Quantity, ...]
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
    """Parameters of `jaxmed.models.mlp.Mlp`, and what they are."""

    params: Params
    description: Description


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


def outputs_of(model: MicrostructureModel) -> tuple[Quantity, ...]:
    """Return the maps of a network that estimates a model's parameters."""
    return tuple(Quantity(one.name, one.definition, one.unit, one.bounds) for one in model.parameters)


def ranges(
    outputs: Sequence[Quantity | Parameter],
) -> tuple[Float32[np.ndarray, " output"], Float32[np.ndarray, " output"]]:
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
    if not len(signals):
        return np.zeros((0, len(network.description.outputs)), np.float32)
    size = min(CHUNK, max(128, len(signals)))
    params, signals = jax.device_put(network.params), np.asarray(signals)
    parts = []
    for start in range(0, len(signals), size):
        block = np.asarray(signals[start : start + size], np.float32)
        # Padding every chunk to one size keeps one compiled program.
        block = np.pad(block, ((0, size - len(block)), (0, 0)))
        parts.append(_predict_chunk(params, network.description, block))
    return np.concatenate([np.asarray(part) for part in parts])[: len(signals)]


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
    expected = "a network of jaxmed noddi train"
    params, record, where = load_exported(path, "model", "noddi", expected, "name its run folder")
    if record.get("kind") != "mlp":
        raise InputError(where, expected, f"kind {record.get('kind')}")
    description = from_record(Description, record.get("config"), where)
    if description.table.hash != record.get("protocol"):
        raise InputError(where, "the table that its hash names", "another", "export the network again")
    row = jnp.zeros((1, int((~description.table.is_b0).sum())))
    require_shapes(params, make_model(Mlp(description.shape, len(description.outputs))), row, where=where)
    return Network(params, description)


def export_onnx(path: Path, network: Network) -> None:
    """Write a network as ONNX: normalisation by the mean unweighted signal inside, its protocol in the metadata."""
    about = network.description
    shape = layers(network.params), about.shape.activation, about.shape.head
    onnx.write(path, onnx.Graph(*shape, about.table, about.outputs, about.constants))
