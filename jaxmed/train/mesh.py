"""Devices as one mesh with two axes: "data" carries the batch and split parameters, "model" tensor splits.

One process is the same code as many: every process runs the same program over the same mesh, and reads its own share
of each batch.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from jaxmed.arrays.trees import map_named, matches
from jaxmed.arrays.types import PartitionRules
from jaxmed.config import Count, Whole, checked
from jaxmed.errors import InputError
from jaxmed.train.processes import join

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
    asking = [mesh for mesh in _meshes(config) if mesh.distributed]
    if asking and not jax.distributed.is_initialized():
        join(asking[0].coordinator, asking[0].processes, asking[0].process)
    return bool(asking)


def make_mesh(config: MeshConfig = MeshConfig()) -> Mesh:
    """Start the other processes' connection where asked, and lay out the devices.

    Returns:
        A mesh with the axes "data" and "model". A single process may use fewer devices than there are.

    Raises:
        InputError: The devices do not suffice or do not divide.
    """
    if config.distributed and not jax.distributed.is_initialized():
        join(config.coordinator, config.processes, config.process)
    present = jax.device_count()
    data = config.data or present // config.model
    needed = data * config.model
    is_whole = needed == present or (jax.process_count() == 1 and 0 < needed < present)
    if not is_whole or (config.data == 0 and needed != present):
        advice = "change --mesh.data or --mesh.model"
        found = f"{config.data or 'all'} x {config.model} (data x model)"
        raise InputError("mesh", f"axes that fill {present} device(s)", found, advice)
    return jax.make_mesh(
        (data, config.model), ("data", "model"), (AxisType.Auto, AxisType.Auto), devices=jax.devices()[:needed]
    )


def param_shardings(shapes: Any, mesh: Mesh, rules: PartitionRules = (), smallest_split: int = SMALLEST_SPLIT) -> Any:
    """Decide where each leaf lives.

    A leaf follows the first rule found in its name. Names of optimizer states end in the parameter's name, so
    moments lie where their parameters lie. A leaf without a rule is split over "data" along its largest axis that
    divides, if it has `smallest_split` entries or more; everything else is copied to every device.

    Args:
        shapes: Arrays, or what `jax.eval_shape` returns.
        mesh: From `make_mesh`.
        rules: The model's.
        smallest_split: In entries.

    Returns:
        The same tree with a sharding in place of each leaf.

    Raises:
        ValueError: A rule splits an axis that its mesh axis does not divide.
    """

    def place(name: str, leaf: Any) -> NamedSharding:
        spec = next((spec for pattern, spec in rules if matches(name, (pattern,))), None)
        if spec is None:
            spec = _split_largest(leaf.shape, mesh.shape["data"], smallest_split)
        elif len(spec) > leaf.ndim:  # a scalar of the optimizer that carries a parameter's name
            spec = PartitionSpec()
        for size, axis in zip(leaf.shape, spec, strict=False):
            axes = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
            count = int(np.prod([mesh.shape[name] for name in axes]))
            if size % count:
                raise ValueError(f"{name}: expected a size that {axis} = {count} divides, got {size} in {leaf.shape}")
        return NamedSharding(mesh, spec)

    return map_named(place, shapes)


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


def _meshes(record: object) -> Iterator[MeshConfig]:
    if isinstance(record, MeshConfig):
        yield record
    elif dataclasses.is_dataclass(record) and not isinstance(record, type):
        for field in dataclasses.fields(record):
            yield from _meshes(getattr(record, field.name))


def _split_largest(shape: tuple[int, ...], count: int, smallest: int) -> PartitionSpec:
    divisible = [axis for axis, size in enumerate(shape) if size % count == 0]
    if count == 1 or not divisible or np.prod(shape) < smallest:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * largest, "data")
