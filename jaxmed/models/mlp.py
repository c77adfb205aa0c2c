"""A small fully connected network from normalised measurements to parameters on the unit interval.

Source: arXiv:2507.12632 (two fully connected networks for inline NODDI); the sister study on training labels for its
other widths and head (three hidden layers as wide as the input, ELU, absolute value).
"""

import dataclasses
from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmed.arrays.types import Params
from jaxmed.config import Size, checked

Activation = Literal["elu", "relu"]
Head = Literal["sigmoid", "abs"]


@dataclasses.dataclass(frozen=True)
@checked
class MlpConfig:
    """Shape of the network.

    Attributes:
        depth: Hidden layers.
        width: Width of each hidden layer; "M" takes the number of inputs, as the sister study does.
        activation: After every hidden layer.
        head: Bound of the output, on the unit interval of each parameter's range: "sigmoid" cannot leave it, "abs" is
            the sister study's and can exceed 1.
    """

    depth: Size = 3
    width: Size | Literal["M"] = 256
    activation: Activation = "elu"
    head: Head = "sigmoid"


class Mlp(nn.Module):
    """Measurements to `outputs` free numbers, before the head's bound; layers are layer_0, layer_1, ... and head."""

    config: MlpConfig
    outputs: int

    @nn.compact
    def __call__(self, x: Float[Array, "*batch measurement"]) -> Float[Array, "*batch output"]:
        config = self.config
        width = x.shape[-1] if config.width == "M" else config.width
        activate = {"elu": nn.elu, "relu": nn.relu}[config.activation]
        for number in range(config.depth):
            # He's scale: rectifiers and ELU halve the variance that Lecun's would keep.
            x = activate(nn.Dense(width, kernel_init=nn.initializers.he_normal(), name=f"layer_{number}")(x))
        return nn.Dense(self.outputs, name="head")(x)


def to_unit(config: MlpConfig, raw: Float[Array, "*batch parameter"]) -> Float[Array, "*batch parameter"]:
    """Apply the head: outputs of `Mlp` to positions in each parameter's range."""
    return nn.sigmoid(raw) if config.head == "sigmoid" else jnp.abs(raw)


def layers(params: Params) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return kernel (input x output) and bias of every layer on the host, in order, the head last."""
    names = [f"layer_{number}" for number in range(len(params) - 1)] + ["head"]
    return [(np.asarray(params[name]["kernel"]), np.asarray(params[name]["bias"])) for name in names]


class Spread(NamedTuple):
    """Mean and standard deviation of each input over the training records."""

    centre: Float[Array, " measurement"]
    scale: Float[Array, " measurement"]


def measure_spread(inputs: Float[Array, "record measurement"]) -> Spread:
    """Measure what centres and scales the inputs while a network learns.

    Signals of one protocol share their mean and most of their variation; on centred inputs a network is better after
    ten epochs than after forty on raw ones.
    """
    return Spread(jnp.mean(inputs, axis=0), jnp.maximum(jnp.std(inputs, axis=0), 1e-3))


def on_raw_inputs(params: Params, spread: Spread) -> Params:
    """Fold centre and scale into the first layer: the network takes inputs as they are."""
    first = params["layer_0"]
    kernel = np.asarray(first["kernel"], np.float64) / np.asarray(spread.scale)[:, None]
    bias = np.asarray(first["bias"], np.float64) - np.asarray(spread.centre) @ kernel
    return {**params, "layer_0": {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}}
