"""What a trained network computes; `models.published.signal_network` keeps it on disk."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64

from jaxmed.arrays.types import Params
from jaxmed.io.maps import Quantity
from jaxmed.models.mlp import Mlp, to_unit
from jaxmed.models.published.signal_network import Description, Network
from jaxmed.nn.model import make_model
from jaxmed.physics.microstructure import MicrostructureModel, Parameter

CHUNK = 16384
"""Voxels of one compiled call: activations of 256 numbers stay in 16 MB."""


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
