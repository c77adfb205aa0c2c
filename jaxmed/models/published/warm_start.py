"""Start from a file of a neighbouring model: whatever has the same name and shape is taken, the rest is drawn.

Source: TANGERINE, official code, which may start its 3D masked autoencoder from a 2D one: blocks, norms and class token
    fit, patch embedding, positions and prediction do not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxmed.arrays.types import Params
from jaxmed.errors import InputError, listed
from jaxmed.io.weights_files import read_source
from jaxmed.models.published.names import Entry, collect


class WarmStart(NamedTuple):
    """What a file gives to a model.

    Attributes:
        params: The parameters that it fits, as a nested dict with gaps.
        note: A sentence on what was taken and what is drawn.
    """

    params: Params
    note: str


def read_warm_start(path: Path, entries: Sequence[Entry]) -> WarmStart:
    """Take the tensors of a published file that fit a model by name and shape.

    Args:
        path: A transformer in timm's names (MAE, DeiT, DINO), of two or three dimensions.
        entries: The model's tensors, as its family lists them.

    Raises:
        InputError: It does not have every block of the encoder in the model's sizes: then it is no start worth having.
    """
    blocks = [entry.name for entry in entries if entry.name.startswith("blocks.")]
    source = read_source(path, lambda tensors: any(name in tensors for name in blocks))
    if source.is_own:
        raise InputError(path, "a published file in timm's names", "weights of jaxmed", "use --weights")
    fitting = [
        entry for entry in entries if entry.name in source.tensors and source.tensors[entry.name].shape == entry.shape
    ]
    names = {entry.name for entry in fitting}
    lacking = [entry for entry in entries if entry.name.startswith("blocks.") and entry.name not in names]
    if lacking:
        first = lacking[0]
        shape = source.tensors[first.name].shape if first.name in source.tensors else None
        expected = f"every block of the encoder, such as '{first.name}' of shape {first.shape}"
        found = "no such tensor" if shape is None else f"shape {shape}"
        raise InputError(path, expected, found, "--warm-start takes a transformer of the same width and depth")
    drawn = [entry.name for entry in entries if entry.name not in names]
    params = collect(str(path), fitting, source.tensors).params
    note = f"Warm start from {path.name}: {len(fitting)} tensors taken, {len(drawn)} drawn ({listed(drawn)})."
    return WarmStart(params, note)
