"""Connectomes with the names of their regions, and tables of regions beside them; what is wrong is said in one line."""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxmed.arrays.graphs import components, keep_strongest, mirror_triangle
from jaxmed.config import checked
from jaxmed.errors import SIDES, InputError, nearest, side_of
from jaxmed.io.connectomes import Square, names_beside, order_by_name, read_names, read_square
from jaxmed.io.tables import read_table

ASYMMETRY = 1e-6
"""Largest difference between a weight and its mirror image, relative to the largest weight."""


class Connectome(NamedTuple):
    """A graph with names.

    Attributes:
        path: Its file.
        regions: Names.
        adjacency: Symmetric, not negative, zero diagonal, largest weight 1.
    """

    path: Path
    regions: tuple[str, ...]
    adjacency: Float[np.ndarray, "region region"]


@dataclasses.dataclass(frozen=True)
@checked
class ConnectomeConfig:
    """What is done to a connectome as read.

    Attributes:
        labels: CSV file of region names in the order of the matrix, where the matrix has no header.
        repair: Take the mean of asymmetric weights and 0 for negative ones, and say so, in place of refusing them.
        density: Share of possible edges to keep, the strongest; None keeps all.
    """

    labels: Path | None = None
    repair: bool = False
    density: float | None = None

    def __post_init__(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density: expected a share above 0 and at most 1, found {self.density:g}")


@dataclasses.dataclass(frozen=True)
class ConnectomeDataConfig:
    """How a connectome is read where there is no cohort beside it, under the names of a fit's `DataConfig`.

    Attributes:
        graph: What is done to the connectome as read.
    """

    graph: ConnectomeConfig = dataclasses.field(default_factory=ConnectomeConfig)


def read_connectome(path: Path | None, config: ConnectomeConfig, notes: list[str]) -> Connectome:
    """Read a square matrix or a list of edges.

    Args:
        path: A text file; see `jaxmed.io.connectomes.read_square` for its forms.
        config: Names and repairs.
        notes: What a reader must know is added.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    if path is None:
        raise InputError("connectome", "a file", "nothing", "give --connectome FILE, or try --preset smoke")
    square = read_square(path, notes)
    regions, matrix = _name(path, square, config.labels, notes)
    matrix = _checked(path, regions, matrix, config.repair, notes)
    if config.density is not None:
        matrix = keep_strongest(matrix, config.density)
    labels = components(matrix)
    for region, strength in zip(regions, matrix.sum(axis=1), strict=True):
        if strength == 0:
            notes.append(f"Region '{region}' has no connection: what spreads never reaches it.")
    apart = [region for region, label in zip(regions, labels, strict=True) if label != np.bincount(labels).argmax()]
    if apart:
        notes.append(f"The connectome is not connected; apart from its largest part: {', '.join(apart)}.")
    return Connectome(path, regions, (matrix / matrix.max()).astype(np.float32))


def _name(path: Path, square: Square, labels: Path | None, notes: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Give a matrix its names: its own, or those of a file; both only where they say the same."""
    count = len(square.matrix)
    if labels is None:
        if square.regions is not None:
            return square.regions, square.matrix
        beside = names_beside(path, count)
        advice = "add a header line, or name a file of them by --data.graph.labels"
        if beside:
            advice = f"give --data.graph.labels {beside[0]}, which lies beside it and holds {count} names"
        raise InputError(path, "names of regions", "none", advice)
    names = read_names(labels, count)
    if square.regions is None:
        return names, square.matrix
    if all(name.isdecimal() for name in square.regions):
        numbers = [int(name) for name in square.regions]
        if sorted(numbers) not in (list(range(count)), list(range(1, count + 1))):
            expected = f"regions numbered from 0 to {count - 1} or from 1 to {count}"
            raise InputError(path, expected, f"numbers from {min(numbers)} to {max(numbers)}")
        order = np.argsort(numbers)
        return names, square.matrix[np.ix_(order, order)]
    absent = [name for name in square.regions if name not in names]
    if absent:
        advice = "drop --data.graph.labels, or the names in the connectome"
        raise InputError(labels, f"the names that {path.name} has", f"none '{absent[0]}'", advice)
    if names != square.regions:
        notes.append(f"The regions of {path.name} were put into the order of {labels.name} by their names.")
    return names, order_by_name(square, names, path, "rows")


def _checked(path: Path, regions: tuple[str, ...], matrix: np.ndarray, repair: bool, notes: list[str]) -> np.ndarray:
    if len(regions) < 2:
        raise InputError(path, "two regions or more", f"{len(regions)}")
    diagonal = np.nan_to_num(np.diag(matrix))
    if diagonal.any():
        notes.append(f"Connections of {np.count_nonzero(diagonal)} regions with themselves are left out.")
    matrix = np.where(np.eye(len(matrix), dtype=bool), 0.0, matrix)
    mirrored = mirror_triangle(matrix)
    if mirrored is not None:
        notes.append("One triangle of the connectome is filled: it is mirrored to the other.")
        matrix = mirrored
    if np.isnan(matrix).any():
        u, v = np.argwhere(np.isnan(matrix))[0]
        where = f"a finite number in row {u + 1}, column {v + 1}"
        raise InputError(path, where, f"'nan' from '{regions[u]}' to '{regions[v]}'", "write 0 for no connection")
    largest = np.abs(matrix).max()
    if largest == 0:
        raise InputError(path, "a connection", "only zeros")
    difference = np.abs(matrix - matrix.T)
    advice = "--data.graph.repair takes the mean of both, and 0 for negative weights"
    if difference.max() > ASYMMETRY * largest:
        u, v = np.unravel_index(difference.argmax(), difference.shape)
        found = f"{matrix[u, v]:g} from '{regions[u]}' to '{regions[v]}' and {matrix[v, u]:g} back"
        if not repair:
            raise InputError(path, "a symmetric matrix", found, advice)
        notes.append(f"The connectome was asymmetric ({found}, at most): the mean of both is used.")
    matrix = (matrix + matrix.T) / 2
    if matrix.min() < 0:
        u, v = np.unravel_index(matrix.argmin(), matrix.shape)
        found = f"{matrix[u, v]:g} between '{regions[u]}' and '{regions[v]}'"
        if not repair:
            raise InputError(path, "weights of 0 or more", found, advice)
        notes.append(f"{np.count_nonzero(np.triu(matrix) < 0)} negative weights ({found}, lowest) count as 0.")
    if matrix.max() <= 0:
        raise InputError(path, "a weight above 0", f"{matrix.max():g} at most")
    return np.maximum(matrix, 0.0)


def find_regions(names: tuple[str, ...], connectome: Connectome, field: str = "seeds") -> tuple[int, ...]:
    """Return the numbers of regions by name.

    Raises:
        InputError: One is unknown, or none is given.
    """
    if not names:
        advice = "for tau: --seeds and the two entorhinal regions"
        raise InputError(field, "names of the regions where the disease starts", "nothing", advice)
    for name in names:
        if name in connectome.regions:
            continue
        words = _words(name)
        sides = (
            [] if side_of(name) else [r for r in connectome.regions if side_of(r) and _words(r)[-len(words) :] == words]
        )
        if sides:
            advice = f"it may be {' or '.join(sides)}: name one of them, or both"
            raise InputError(field, "regions of the connectome", f"'{name}'", advice)
        raise InputError(field, "regions of the connectome", f"'{name}'", nearest(name, connectome.regions))
    return tuple(connectome.regions.index(name) for name in names)


def _words(region: str) -> list[str]:
    """Return the words of a region's name in lower case, without the one for its side."""
    return [word for word in re.findall(r"[^\W_]+", region.lower()) if word not in SIDES]


def read_centroids(path: Path, regions: tuple[str, ...]) -> Float[np.ndarray, "region 3"]:
    """Read where regions lie: columns region, x, y, z, in mm, RAS+.

    Raises:
        InputError: A region has no row or two, or a coordinate is no number.
    """
    table = read_table(path, ("region", "x", "y", "z"))
    names = table.column("region")
    points = np.array([table.floats(axis) for axis in "xyz"]).T
    for region in regions:
        if names.count(region) != 1:
            advice = nearest(region, names)
            raise InputError(path, f"one row for region '{region}'", f"{names.count(region)}", advice)
    return points[[names.index(region) for region in regions]]
