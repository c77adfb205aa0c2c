"""Tensors of a published file and our parameters: which is which, and how the layout changes between them.

A family is a list of entries. Every layout that occurs (transposed linear kernels, convolutions that become products
over patches, queries, keys and values in one matrix, axes of length 1) is a transposition followed by a reshape, so the
way back is exact.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Shaped

from jaxmed.arrays.types import Params
from jaxmed.errors import InputError, listed
from jaxmed.io.weights_files import nest
from jaxmed.models.vit import VitConfig
from jaxmed.nn.transformer import BlockConfig


class Entry(NamedTuple):
    """One tensor and its parameter.

    Attributes:
        name: The tensor's name in the original code.
        path: Path of the parameter, such as "encoder/patch_embed/kernel".
        shape: Shape of the tensor.
        axes: The tensor's axes in the order in which the parameter reads them.
        target: Shape of the parameter.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def part(self) -> str:
        """The part of the model that the parameter belongs to, such as "encoder"."""
        return self.path.partition("/")[0]

    def own(self) -> "Entry":
        """Return the entry of our own files, where the name is the path and the layout stays."""
        return Entry(self.path, self.path, self.target, tuple(range(len(self.target))), self.target)


class Collected(NamedTuple):
    """Parameters made of tensors.

    Attributes:
        params: A nested dict, float32.
        used: Names of the tensors in it.
        left_over: Names of the others.
        missing: Names that were looked for in vain, all of optional parts.
        notes: What else a reader should know, in sentences.
    """

    params: Params
    used: tuple[str, ...]
    left_over: tuple[str, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]


def reshaped(name: str, path: str, shape: tuple[int, ...], target: tuple[int, ...]) -> Entry:
    """Return the entry of a tensor that keeps its order."""
    return Entry(name, path, shape, tuple(range(len(shape))), target)


def linear(
    name: str, path: str, inputs: int, outputs: int, target: tuple[int, ...] | None = None
) -> tuple[Entry, Entry]:
    """Return weight [outputs, inputs] and bias of a linear layer; `target` splits the outputs in several axes."""
    target = target or (outputs,)
    return (
        Entry(f"{name}.weight", f"{path}/kernel", (outputs, inputs), (1, 0), (inputs, *target)),
        reshaped(f"{name}.bias", f"{path}/bias", (outputs,), target),
    )


def layer_norm(name: str, path: str, width: int) -> tuple[Entry, Entry]:
    """Return weight and bias of a layer norm."""
    return (
        reshaped(f"{name}.weight", f"{path}/scale", (width,), (width,)),
        reshaped(f"{name}.bias", f"{path}/bias", (width,), (width,)),
    )


def patch_embedding(name: str, path: str, config: VitConfig) -> tuple[Entry, Entry]:
    """Return a convolution whose stride is its kernel, which is a product over the voxels of a patch."""
    spatial = len(config.patch_size)
    voxels = math.prod(config.patch_size) * config.channels
    shape = (config.width, config.channels, *config.patch_size)
    axes = (*range(2, spatial + 2), 1, 0)
    return (
        Entry(f"{name}.weight", f"{path}/kernel", shape, axes, (voxels, config.width)),
        reshaped(f"{name}.bias", f"{path}/bias", (config.width,), (config.width,)),
    )


def blocks(name: str, path: str, depth: int, config: BlockConfig) -> list[Entry]:
    """Return a column of timm's transformer blocks (rows of qkv: queries, keys, values; heads contiguous)."""
    entries: list[Entry] = []
    width, split = config.width, (3, config.heads, config.width // config.heads)
    for number in range(depth):
        theirs, ours = f"{name}.{number}", f"{path}/layer_{number}"
        entries += layer_norm(f"{theirs}.norm1", f"{ours}/norm1", width)
        entries += linear(f"{theirs}.attn.qkv", f"{ours}/attention/qkv", width, 3 * width, split)
        entries += linear(f"{theirs}.attn.proj", f"{ours}/attention/out", width, width)
        entries += layer_norm(f"{theirs}.norm2", f"{ours}/norm2", width)
        entries += linear(f"{theirs}.mlp.fc1", f"{ours}/mlp/fc1", width, config.hidden)
        entries += linear(f"{theirs}.mlp.fc2", f"{ours}/mlp/fc2", config.hidden, width)
    return entries


def to_parameter(entry: Entry, tensor: Shaped[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Change the layout of a tensor into the parameter's."""
    moved = np.transpose(tensor, entry.axes).reshape(entry.target)
    return np.ascontiguousarray(moved, dtype=np.float32)


def to_tensor(entry: Entry, parameter: Any) -> Float32[np.ndarray, "..."]:
    """Change the layout of a parameter into the tensor's."""
    moved = np.asarray(parameter, np.float32).reshape([entry.shape[axis] for axis in entry.axes])
    return np.ascontiguousarray(np.transpose(moved, np.argsort(entry.axes)))


def collect(
    where: str, entries: Sequence[Entry], tensors: Mapping[str, Any], optional: Collection[str] = ()
) -> Collected:
    """Make parameters of the tensors of a file.

    Args:
        where: The file, for messages.
        entries: All that the model has.
        tensors: By name.
        optional: Parts of the model that are left out, and told, where they are not wholly there.

    Raises:
        InputError: A tensor that is needed is missing, has another shape, is not of real numbers or not finite.
    """
    missing = [entry for entry in entries if entry.name not in tensors]
    needed = [entry.name for entry in missing if entry.part not in optional]
    if needed:
        parts = sorted({entry.part for entry in missing if entry.part not in optional})
        total = sum(entry.part in parts for entry in entries)
        expected = f"all {total} tensors of the {' and the '.join(parts)}"
        raise InputError(where, expected, f"no {listed(needed)}", "give the whole file, as it was published")
    absent = {entry.part for entry in missing}
    leaves: dict[str, Any] = {}
    used, wide = [], []
    for entry in entries:
        if entry.part in absent:
            continue
        shape = tuple(tensors[entry.name].shape)
        if shape != entry.shape:
            raise InputError(where, f"'{entry.name}' of shape {entry.shape}", f"{shape}")
        tensor = np.asarray(tensors[entry.name])
        _check(where, entry, tensor)
        if tensor.dtype.itemsize > 4:
            wide.append(entry.name)
        leaves[entry.path] = to_parameter(entry, tensor)
        used.append(entry.name)
    known = set(used)
    notes = (f"{len(wide)} tensors of float64 were rounded to float32",) if wide else ()
    left_over = tuple(name for name in tensors if name not in known)
    return Collected(nest(leaves), tuple(used), left_over, tuple(entry.name for entry in missing), notes)


def edge_of(where: str, name: str, count: int, axes: int = 3) -> int:
    """Return the edge of a square or cube of patches, or of voxels in a patch.

    Raises:
        InputError: When there is none.
    """
    edge, shape = round(max(count, 0) ** (1 / axes)), "cube" if axes == 3 else "square"
    if edge < 1 or edge**axes != count:
        expected = f"a {shape} number in '{name}', {' x '.join('n' * axes)}"
        raise InputError(where, expected, count, f"only {shape}s were published")
    return edge


def shape_of(
    where: str, family: str, tensors: Mapping[str, Any], name: str, dimensions: int | None = None
) -> tuple[int, ...]:
    """Return the shape of a tensor that tells sizes.

    Raises:
        InputError: It is missing, empty, or of other dimensions.
    """
    if name not in tensors:
        raise InputError(where, f"weights of {family}", f"no '{name}'", "see jaxmed weights list")
    shape = tuple(tensors[name].shape)
    if dimensions is not None and len(shape) != dimensions:
        raise InputError(where, f"'{name}' of {dimensions} dimensions", f"shape {shape}")
    if 0 in shape:
        raise InputError(where, f"numbers in '{name}'", f"an empty tensor of shape {shape}")
    return shape


def count_parts(where: str, names: Iterable[str], stem: str) -> int:
    """Return the number of numbered parts, such as blocks: the last number and one; gaps show as missing tensors.

    Raises:
        InputError: The last number is far beyond what is there.
    """
    numbers = {int(match[1]) for name in names if (match := re.match(rf"{stem}\.(\d{{1,9}})\.", name))}
    last = max(numbers, default=0)
    if last > 2 * len(numbers) + 100:
        found = f"'{stem}.{last}' in a file that holds {len(numbers)} of them"
        raise InputError(where, f"'{stem}' numbered without gaps", found, "give the whole file, as it was published")
    return last + 1


def told(where: str, option: str, given: int | None, settings: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """Return a number that shapes do not tell: what the user gives, or what the file's arguments say.

    Raises:
        InputError: They disagree.
    """
    said = [settings[name] for name in names if type(settings.get(name)) is int and settings[name] > 0]
    if said and given not in (None, said[0]):
        raise InputError(option, f"{said[0]}, as the arguments in {where} say", given, f"leave --{option} out")
    return said[0] if said else given


def _check(where: str, entry: Entry, tensor: Shaped[np.ndarray, "..."]) -> None:
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise InputError(where, f"'{entry.name}' of floating-point numbers", f"{tensor.dtype}")
    if not np.isfinite(tensor.astype(np.float32, copy=False)).all():
        raise InputError(where, f"finite numbers in '{entry.name}'", "NaN or Inf", "copy the file again")
