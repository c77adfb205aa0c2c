"""Read one regional map, and what agents need beside it."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from jaxmed.arrays.graphs import mirror_triangle
from jaxmed.config import Length, checked
from jaxmed.errors import InputError, nearest
from jaxmed.io.connectomes import order_by_name, read_square
from jaxmed.io.tables import read_table
from jaxmed.physics.agents import STEP, AgentGraph, make_agent_graph
from jaxmed.systems.igndmoe.reading import Connectome


@dataclasses.dataclass(frozen=True)
@checked
class MapConfig:
    """One regional map, in place of a table of visits.

    Attributes:
        file: Table with a row per region.
        region: Column of region names; regions of the connectome that are not in the file are not scored.
        value: Column of the map.
        more_is: "worse" where large values mean more disease, "better" where they mean less, as in effect sizes of
            thickness.
        weight: Column, on [0, 1], that modulates growth in weighted FKPP; none leaves that model out.
        size: Column of region sizes in voxels, for agents.
        synthesis: Column of the expression of the gene that makes the protein, for agents; standardised over regions.
        clearance: Column of the expression of the gene that clears it, likewise.
        lengths: File of connection lengths in mm, in every form that a connectome may have; without names in its
            order. None leaves agents out.
        mixture_seeds: Seeds from which the mixture is fitted, the best of FKPP first; 0 for every region. The other
            models always try every seed.
    """

    file: Path | None = None
    region: str = "region"
    value: str = "value"
    more_is: Literal["worse", "better"] = "worse"
    weight: str | None = None
    size: str | None = None
    synthesis: str | None = None
    clearance: str | None = None
    lengths: Path | None = None
    mixture_seeds: Length = 5

    def __post_init__(self) -> None:
        if self.mixture_seeds < 0:
            raise ValueError(f"mixture_seeds: expected 0 or more, found {self.mixture_seeds}")


def read_map(config: MapConfig, connectome: Connectome, notes: list[str]) -> dict[str, np.ndarray]:
    """Read the columns of a map, in the order of the connectome: value (larger is worse, NaN unknown), weight, ...

    Raises:
        InputError: For whatever a user can have wrong in this table.
    """
    assert config.file is not None
    table = read_table(config.file, (config.region,))
    if table.note:
        notes.append(table.note)
    names = table.column(config.region)
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise InputError(config.file, "one row per region", f"'{doubles[0]}' twice")
    unknown = [name for name in names if name not in connectome.regions]
    if len(unknown) == len(names):
        found = f"'{unknown[0]}' and others"
        raise InputError(config.file, "regions of the connectome", found, nearest(unknown[0], connectome.regions))
    if unknown:
        notes.append(f"Rows that are no region of the connectome are not used: {', '.join(unknown)}.")
    place = {name: index for index, name in enumerate(names)}
    wanted = {"value": config.value, "weight": config.weight, "size": config.size}
    wanted |= {"synthesis": config.synthesis, "clearance": config.clearance}
    columns = {}
    for key, column in wanted.items():
        if column is None:
            continue
        values = np.array(table.floats(column, allow_missing=key == "value"))
        absent = np.nan if key == "value" else np.median(values)
        columns[key] = np.array([values[place[name]] if name in place else absent for name in connectome.regions])
    unscored = np.isnan(columns["value"])
    if unscored.any():
        missing = [name for name, is_missing in zip(connectome.regions, unscored, strict=True) if is_missing]
        notes.append(f"Regions without a value are not scored: {', '.join(missing)}.")
    if config.more_is == "better":
        columns["value"] = -columns["value"]
    if np.isfinite(columns["value"]).sum() < 5 or not np.nanstd(columns["value"]) > 0:
        raise InputError(config.file, "5 regions or more with different values", "fewer, or one value everywhere")
    if "weight" in columns and (columns["weight"].min() < 0 or columns["weight"].max() > 1):
        found = f"values from {columns['weight'].min():g} to {columns['weight'].max():g}"
        raise InputError(config.file, f"values on [0, 1] under '{config.weight}'", found, "scale the column")
    return columns


def read_agents(
    config: MapConfig, connectome: Connectome, columns: dict[str, np.ndarray], notes: list[str]
) -> AgentGraph | None:
    """Build the graph of agents; None where lengths or sizes were not given.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    if config.lengths is None or "size" not in columns:
        return None
    count = len(connectome.regions)
    square = read_square(config.lengths, notes)
    lengths = order_by_name(square, connectome.regions, config.lengths, "lengths")
    mirrored = mirror_triangle(lengths)
    lengths = lengths if mirrored is None else mirrored
    is_linked = connectome.adjacency > 0
    if not np.isfinite(lengths[is_linked]).all():
        raise InputError(config.lengths, "a length wherever regions are connected", "an empty cell")
    shortest = lengths[is_linked].min()
    if not shortest > STEP:
        raise InputError(config.lengths, f"lengths above {STEP:g} mm where regions are connected", f"{shortest:g}")
    if columns["size"].min() <= 0:
        raise InputError(config.file or "map", "positive sizes", f"{columns['size'].min():g}")
    synthesis, clearance = (_z_score(columns.get(name, np.zeros(count))) for name in ("synthesis", "clearance"))
    adjacency, lengths, sizes, synthesis, clearance = (
        jnp.asarray(array, jnp.float32)
        for array in (connectome.adjacency, lengths, columns["size"], synthesis, clearance)
    )
    return make_agent_graph(adjacency, lengths, sizes, synthesis, clearance)


def _z_score(values: np.ndarray) -> np.ndarray:
    """Standardise over regions (n - 1), as the released simulator does with what it is given."""
    deviation = values.std(ddof=1)
    return (values - values.mean()) / deviation if deviation > 0 else np.zeros_like(values)
