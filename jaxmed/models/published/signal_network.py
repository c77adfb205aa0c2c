"""A network from the signals of one diffusion protocol to maps, as a folder of this package or as ONNX.

It is no `family.Family`: nobody has published such weights under names of their own, and what goes in is no image with
a `Preprocess` but the signals of a gradient table, which stands in the folder's record with the network's sizes.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxmed.arrays.types import Params
from jaxmed.config import from_record, to_record
from jaxmed.errors import InputError
from jaxmed.io import onnx
from jaxmed.io.gradient_match import Table
from jaxmed.io.maps import Quantity
from jaxmed.io.weights_files import load_exported
from jaxmed.models.mlp import Mlp, MlpConfig, layers
from jaxmed.nn.model import make_model, require_shapes
from jaxmed.physics.microstructure import ForwardConfig

FAMILY = "noddi"
KIND = "mlp"


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


def network_record(description: Description) -> dict[str, Any]:
    """Return what stands in record.json beside the parameters (`train.checkpoint.export_parameters`)."""
    record = {"family": FAMILY, "kind": KIND, "protocol": description.table.hash}
    return record | {"config": to_record(description)}


def load_network(path: Path) -> Network:
    """Read a network that a run of `jaxmed noddi train` exported.

    Args:
        path: Its folder, or the folder of the run that trained it.

    Raises:
        InputError: There is none, or it was changed.
    """
    expected = "a network of jaxmed noddi train"
    params, record, where = load_exported(path, "model", FAMILY, expected, "name its run folder")
    if record.get("kind") != KIND:
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
