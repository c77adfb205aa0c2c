"""Tensors of a published file and our parameters: which is which, and how the layout changes between them.

A family is a list of entries. Every layout that occurs (transposed linear kernels, convolutions that become products
over patches, queries, keys and values in one matrix, axes of length 1) is a transposition between reshapes, so the way
back is exact.
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
        target: Shape of the parameter, or of the piece of it that the tensor is.
        piece: Of a tensor that is a piece: the axis of the parameter along which pieces follow one another, where this
            one begins, and the length of the whole. What no tensor fills is 0.
        view: The tensor's shape once its joined axes are parted, which is what `axes` counts; its own where empty.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    target: tuple[int, ...]
    piece: tuple[int, int, int] | None = None
    view: tuple[int, ...] = ()

    @property
    def part(self) -> str:
        """The part of the model that the parameter belongs to, such as "encoder"."""
        return self.path.partition("/")[0]

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        if self.piece is None:
            return self.target
        axis, _, length = self.piece
        return (*self.target[:axis], length, *self.target[axis + 1 :])

    @property
    def place(self) -> tuple[slice, ...]:
        """Where the tensor is in the parameter."""
        if self.piece is None:
            return ()
        axis, start, _ = self.piece
        return (*(slice(None),) * axis, slice(start, start + self.target[axis]))

    def own(self) -> "Entry":
        """Return the entry of our own files, where the name is the path and the layout stays."""
        return Entry(self.path, self.path, self.whole, tuple(range(len(self.whole))), self.whole)


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


class BlockNames(NamedTuple):
    """Names inside a transformer block, one for each tensor or one for each of its pieces.

    Attributes:
        qkv: One map, or those of queries, keys and values.
        out: The map of what heads have mixed.
        fc1: The first map of the MLP; of a gated one both in one, or the gate's and the other's.
        fc2: The last map of the MLP.
        scales: Factors on the branches.
        norms: Layer norms before the branches.
    """

    qkv: tuple[str, ...] = ("attn.qkv",)
    out: str = "attn.proj"
    fc1: tuple[str, ...] = ("mlp.fc1",)
    fc2: str = "mlp.fc2"
    scales: tuple[str, str] = ("ls1.gamma", "ls2.gamma")
    norms: tuple[str, str] = ("norm1", "norm2")


TIMM = BlockNames()


def blocks(name: str, path: str, depth: int, config: BlockConfig, names: BlockNames = TIMM) -> list[Entry]:
    """Return a column of transformer blocks, in timm's names or others.

    Rows of qkv are queries, keys and values, heads contiguous; rows of a gated fc1 are the gate's and the other's.
    """
    entries: list[Entry] = []
    width, split = config.width, (config.heads, config.width // config.heads)
    biased = {"all": (0, 1, 2), "all but keys": (0, 1, 2) if len(names.qkv) == 1 else (0, 2), "none": ()}
    for number in range(depth):
        theirs, ours = f"{name}.{number}", f"{path}/layer_{number}"
        entries += layer_norm(f"{theirs}.{names.norms[0]}", f"{ours}/norm1", width)
        qkv = [f"{theirs}.{part}" for part in names.qkv]
        entries += pieces(qkv, f"{ours}/attention/qkv", width, (3, *split), biased[config.qkv_bias])
        entries += linear(f"{theirs}.{names.out}", f"{ours}/attention/out", width, width)
        entries += layer_norm(f"{theirs}.{names.norms[1]}", f"{ours}/norm2", width)
        if config.mlp == "swiglu":
            fc1 = [f"{theirs}.{part}" for part in names.fc1]
            entries += pieces(fc1, f"{ours}/mlp/fc1", width, (2, config.hidden), (0, 1))
        else:
            entries += linear(f"{theirs}.{names.fc1[0]}", f"{ours}/mlp/fc1", width, config.hidden)
        entries += linear(f"{theirs}.{names.fc2}", f"{ours}/mlp/fc2", config.hidden, width)
        if config.layer_scale:
            for scale, ending in zip(("scale1", "scale2"), names.scales, strict=True):
                entries.append(reshaped(f"{theirs}.{ending}", f"{ours}/{scale}", (width,), (width,)))
    return entries


def pieces(
    names: Sequence[str], path: str, inputs: int, target: tuple[int, ...], biased: Collection[int]
) -> list[Entry]:
    """Return a linear layer whose outputs have several parts, in one tensor or in one for each part.

    Args:
        names: One, or one for each part.
        path: Of the parameters.
        inputs: Features.
        target: Parts, and the axes of each.
        biased: Parts with a constant; all or none where one tensor holds them.
    """
    whole, part = math.prod(target), math.prod(target[1:])
    if len(names) == 1:
        kernel, bias = linear(names[0], path, inputs, whole, target)
        return [kernel, bias] if biased else [kernel]
    found = []
    for number, name in enumerate(names):
        kernel, bias = linear(name, path, inputs, part, (1, *target[1:]))
        found.append(kernel._replace(piece=(1, number, target[0])))
        if number in biased:
            found.append(bias._replace(piece=(0, number, target[0])))
    return found


def to_parameter(entry: Entry, tensor: Shaped[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Change the layout of a tensor into the parameter's."""
    moved = np.transpose(tensor.reshape(entry.view or entry.shape), entry.axes).reshape(entry.target)
    return np.ascontiguousarray(moved, dtype=np.float32)


def to_tensor(entry: Entry, parameter: Any) -> Float32[np.ndarray, "..."]:
    """Change the layout of a parameter into the tensor's."""
    shape = entry.view or entry.shape
    moved = np.asarray(parameter, np.float32)[entry.place].reshape([shape[axis] for axis in entry.axes])
    return np.ascontiguousarray(np.transpose(moved, np.argsort(entry.axes)).reshape(entry.shape))


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
        if entry.piece is None:
            leaves[entry.path] = to_parameter(entry, tensor)
        else:
            leaves.setdefault(entry.path, np.zeros(entry.whole, np.float32))[entry.place] = to_parameter(entry, tensor)
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
