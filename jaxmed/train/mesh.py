"""Devices as one mesh with two axes: "data" carries the batch and split parameters, "model" tensor splits.

One process is the same code as many: every process runs the same program over the same mesh, and reads its own share
of each batch.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from jaxmed.arrays.layers import Holding
from jaxmed.arrays.trees import map_named, matches, named_leaves
from jaxmed.arrays.types import PartitionRules
from jaxmed.config import Count, Whole, checked, walk
from jaxmed.errors import InputError
from jaxmed.train.processes import join

# Parameters of a column of layers, which `arrays.layers` holds; the group names a leaf within its layer.
LAYER = r"(?:^|/)blocks/layer_\d+/(.*)"
SMALLEST_SPLIT = 2**18  # entries; splitting less costs more in messages than it saves in memory


@dataclasses.dataclass(frozen=True)
@checked
class MeshConfig:
    """How the devices are used.

    Attributes:
        data: Devices along the batch; 0 takes all that `model` leaves.
        model: Devices along tensor splits.
        distributed: Join other processes of the same command before anything else. On SLURM, Open MPI and TPU pods the
            three fields below are found by jax itself and stay empty.
        coordinator: Address and port of process 0, such as "10.0.0.1:8476".
        processes: Number of processes.
        process: Number of this process, from 0.
    """

    data: Whole = 0
    model: Count = 1
    distributed: bool = False
    coordinator: str | None = None
    processes: Count | None = None
    process: Whole | None = None


def join_where_asked(config: object) -> bool:
    """Connect the processes of a stage, before anything in it uses jax, where its configuration asks for it.

    Args:
        config: Of the stage; a `MeshConfig` may stand anywhere in it.

    Returns:
        Whether there are other processes.
    """
    asking = [mesh for mesh in walk(config) if isinstance(mesh, MeshConfig) and mesh.distributed]
    if asking and not jax.distributed.is_initialized():
        join(asking[0].coordinator, asking[0].processes, asking[0].process)
    return bool(asking)


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """Start the other processes' connection where asked, and lay out the devices.

    Args:
        config: How they are used.
        devices: Those of a topology that a program is compiled ahead of time for; by default all that there are.

    Returns:
        A mesh with the axes "data" and "model". A single process may use fewer devices than there are.

    Raises:
        InputError: The devices do not suffice or do not divide.
    """
    if config.distributed and not jax.distributed.is_initialized():
        join(config.coordinator, config.processes, config.process)
    found = jax.devices() if devices is None else list(devices)
    present = len(found)
    data = config.data or present // config.model
    needed = data * config.model
    is_whole = needed == present or (jax.process_count() == 1 and 0 < needed < present)
    if not is_whole or (config.data == 0 and needed != present):
        advice = "change --mesh.data or --mesh.model"
        axes = f"{config.data or 'all'} x {config.model} (data x model)"
        raise InputError("mesh", f"axes that fill {present} device(s)", axes, advice)
    # An axis of a TPU's torus may be shared by both of ours: jax.make_mesh refuses that on all but v5e.
    places = mesh_utils.create_device_mesh((data, config.model), found[:needed], allow_split_physical_axes=True)
    return Mesh(places, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def param_shardings(
    shapes: Any, mesh: Mesh | AbstractMesh, rules: PartitionRules = (), smallest_split: int = SMALLEST_SPLIT
) -> Any:
    """Decide where each leaf lives.

    A leaf follows the first rule found in its name. Names of optimizer states end in the parameter's name, so
    moments lie where their parameters lie. A leaf of `smallest_split` entries or more, whether or not a rule splits it
    over "model", is split over "data" besides, along the largest axis that is free and divides: a large model's state
    would not fit a device otherwise. A rule of an empty partition keeps a leaf whole, and so does a small size.

    Args:
        shapes: Arrays, or what `jax.eval_shape` returns.
        mesh: From `make_mesh`; an abstract one tells the same without devices.
        rules: The model's.
        smallest_split: In entries.

    Returns:
        The same tree with a sharding in place of each leaf.

    Raises:
        ValueError: A rule splits an axis that its mesh axis does not divide.
    """

    def place(name: str, leaf: Any) -> NamedSharding:
        spec = next((spec for pattern, spec in rules if matches(name, (pattern,))), None)
        if spec is not None and len(spec) > leaf.ndim:  # a scalar of the optimizer that carries a parameter's name
            spec = PartitionSpec()
        elif spec is None or any(spec):
            spec = _split_largest(leaf.shape, spec or PartitionSpec(), mesh.shape["data"], smallest_split)
        for size, axis in zip(leaf.shape, spec, strict=False):
            axes = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
            count = int(np.prod([mesh.shape[name] for name in axes]))
            if size % count:
                raise ValueError(f"{name}: expected a size that {axis} = {count} divides, got {size} in {leaf.shape}")
        return NamedSharding(mesh, spec)

    return map_named(place, shapes)


def hold_whole(params: Any, shardings: Any) -> Any:
    """Inside of a step: take parameters that are split over "data" together before they are used.

    Left to itself the compiler follows the parameters: it splits every activation along the axis that they are split
    along, and gives each device the whole batch. Held whole, parameters are gathered, and the batch stays where it is.
    Layers of a column are left to `hold_layers`.

    Args:
        params: Traced parameters.
        shardings: Where each lies, as `param_shardings` decides; of others than meshes nothing is changed.
    """

    def hold(name: str, leaf: Any, place: Any) -> Any:
        spec = without_data(place)
        if spec is None or re.search(LAYER, name):
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(place.mesh, spec))

    return map_named(hold, params, shardings)


def hold_layers(shardings: Any) -> Holding:
    """Return how the layers of a column, "blocks/layer_N" in names of parameters, are split and gathered one by one.

    Args:
        shardings: Of all parameters. Layers of one kind are split alike; of columns of several widths, such as an
            encoder's and a decoder's, each leaf follows its own name, and a leaf that one of them keeps whole is
            gathered all the same.
    """
    known: dict[str, NamedSharding] = {}
    for name, place in named_leaves(shardings).items():
        layer = re.search(LAYER, name)
        if layer and without_data(place) is not None:
            known.setdefault(layer[1], place)

    def split(name: str, leaf: Any) -> Any:
        place = known.get(name)
        fits = place is not None and len(place.spec) <= leaf.ndim and _divides(leaf.shape, place)
        return jax.lax.with_sharding_constraint(leaf, place) if fits else leaf

    def whole(name: str, leaf: Any) -> Any:
        place = known.get(name)
        if place is None:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(place.mesh, without_data(place) or PartitionSpec()))

    has_tensor_splits = any(
        isinstance(place, NamedSharding) and place.mesh.shape.get("model", 1) > 1 and "model" in _axes(place.spec)
        for place in jax.tree.leaves(shardings)
    )
    if not known:
        return Holding(has_tensor_splits=has_tensor_splits)
    return Holding(lambda params: map_named(split, params), lambda params: map_named(whole, params), has_tensor_splits)


def _axes(spec: PartitionSpec) -> set[str]:
    return {name for part in spec if part is not None for name in (part if isinstance(part, tuple) else (part,))}


def _divides(shape: tuple[int, ...], place: NamedSharding) -> bool:
    parts = [part if isinstance(part, tuple) else () if part is None else (part,) for part in place.spec]
    counts = [int(np.prod([place.mesh.shape[name] for name in part])) for part in parts]
    return all(size % count == 0 for size, count in zip(shape, counts, strict=False))


def hold_split(gradient: Any, shardings: Any) -> Any:
    """Inside of a step: split the gradient as its parameters are, before it is added up or updates anything."""

    def hold(leaf: Any, place: Any) -> Any:
        return leaf if without_data(place) is None else jax.lax.with_sharding_constraint(leaf, place)

    return jax.tree.map(hold, gradient, shardings)


def gathered(params: Any) -> Any:
    """Outside of a step: return parameters of which every device along "data" has the whole, to run a network by."""

    def place(leaf: Any) -> Any:
        own: Any = getattr(leaf, "sharding", None)
        spec = without_data(own)
        return own if spec is None else NamedSharding(own.mesh, spec)

    if all(without_data(getattr(leaf, "sharding", None)) is None for leaf in jax.tree.leaves(params)):
        return params
    return jax.jit(_same, out_shardings=jax.tree.map(place, params))(params)


def _same(tree: Any) -> Any:  # one function, so that jit knows the program again at the next evaluation
    return tree


def without_data(place: Any) -> PartitionSpec | None:
    """Return a sharding's partition without the axis "data"; None where it does not split over it."""
    if not isinstance(place, NamedSharding) or place.mesh.shape.get("data", 1) == 1:
        return None
    if "data" not in _axes(place.spec):
        return None
    parts = [part if isinstance(part, tuple) else () if part is None else (part,) for part in place.spec]
    left = [tuple(name for name in part if name != "data") for part in parts]
    return PartitionSpec(*(part if len(part) > 1 else part[0] if part else None for part in left))


def process_slice(mesh: Mesh) -> tuple[int, int]:
    """Tell which part of every batch this process reads.

    Returns:
        (index, count): the process reads part `index` of `count` equal parts. Processes that differ in the "model"
        axis alone read the same part.
    """
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    rows = mesh.shape["data"]
    places = sharding.addressable_devices_indices_map((rows,)).values()
    mine = sorted({place[0].indices(rows)[0] for place in places if place is not None})
    if mine != list(range(mine[0], mine[0] + len(mine))) or mine[0] % len(mine):
        raise ValueError(f"expected a process to hold adjacent parts of the data axis, got {mine} of {rows}")
    return mine[0] // len(mine), rows // len(mine)


def shard_batch(batch: Mapping[str, Shaped[np.ndarray, "..."]], mesh: Mesh) -> dict[str, jax.Array]:
    """Put this process's share of a batch on its devices, as part of the global arrays.

    Raises:
        InputError: The batch does not divide over the "data" axis.
    """
    sharding, devices = NamedSharding(mesh, PartitionSpec("data")), mesh.shape["data"]
    _, count = process_slice(mesh)
    for size in (array.shape[0] * count for array in batch.values()):
        if size % devices:
            expected = f"a multiple of the {devices} devices along data"
            raise InputError("batch_size", expected, size, "change the batch size, or --mesh.data")
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def abstract(shapes: Any, shardings: Any) -> Any:
    """Return shapes with their shardings: what a step is traced, lowered and compiled by in place of arrays."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )


def abstract_batch(record: Mapping[str, Any], size: int, mesh: Mesh | AbstractMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a global batch as the loader reads and `shard_batch` places it.

    Args:
        record: Shape and type of each array of one record; the loader adds their numbers.
        size: Records of the batch.
        mesh: The devices.
    """
    place = NamedSharding(mesh, PartitionSpec("data"))
    fields = {**record, "record": jax.ShapeDtypeStruct((), np.int32)}
    return {
        name: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype, sharding=place) for name, leaf in fields.items()
    }


def _split_largest(shape: tuple[int, ...], taken: PartitionSpec, count: int, smallest: int) -> PartitionSpec:
    """Return a partition with "data" added along the largest axis that is not taken and divides."""
    axes = [*taken, *(None,) * (len(shape) - len(taken))]
    free = [axis for axis, size in enumerate(shape) if axes[axis] is None and size % count == 0]
    if count == 1 or not free or "data" in _axes(taken) or np.prod(shape) < smallest:
        return taken
    axes[max(free, key=lambda axis: shape[axis])] = "data"
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)
