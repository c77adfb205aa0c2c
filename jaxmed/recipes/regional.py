"""A cohort of visits on a connectome, with a role for each subject: read and checked, or simulated."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float

from jaxmed.arrays.graphs import GraphsTuple, LaplacianKind, make_graph
from jaxmed.config import Bounds, Regions, Share, checked
from jaxmed.data.connectomes import ConnectomeConfig, find_regions, read_connectome
from jaxmed.data.splits import split_subjects
from jaxmed.data.visits import Scaling, VisitTable, read_visits
from jaxmed.errors import InputError
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.synthesis.phantoms.connectome import CohortConfig, random_connectome, simulate_cohort
from jaxmed.synthesis.phantoms.write_connectome import region_names, write_cohort
from jaxmed.train.run_folder import RunFolder, start


@dataclasses.dataclass(frozen=True)
@checked
class DataConfig:
    """How a cohort and its connectome are read.

    Attributes:
        graph: What is done to the connectome as read.
        scaling: "minmax" brings the smallest value of all subjects and regions to 0, the largest to 1; "none" takes
            values as they are, on [0, 1].
        fractions: Shares of training, validation and test subjects where the table has no split. The paper keeps 35
            and 35 of 216.
        synthetic: Patients of a simulated cohort to use where neither connectome nor table is given.
        synthetic_regions: Regions of its connectome.
    """

    graph: ConnectomeConfig = dataclasses.field(default_factory=ConnectomeConfig)
    scaling: Scaling = "minmax"
    fractions: tuple[Share, Share, Share] = (0.676, 0.162, 0.162)
    synthetic: Annotated[int, Bounds(10, 1_000_000)] | None = None
    synthetic_regions: Regions = 8

    def __post_init__(self) -> None:
        if abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions: expected three shares that sum to 1, found {self.fractions}")


@dataclasses.dataclass(frozen=True)
@checked
class CohortSource:
    """Where a cohort on a connectome comes from; files given take the place of synthetic data, whatever the preset.

    Attributes:
        connectome: CSV file: a square matrix with region names, or edges as source, target, weight.
        table: CSV file with a row per visit: subject, age in years, optionally split, a column for every region.
        seeds: Regions where the disease starts, by name; for tau the two entorhinal ones.
        data: How they are read, or synthetic data.
    """

    connectome: Path | None = None
    table: Path | None = None
    seeds: tuple[str, ...] = ()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


SourceFlags: TypeAlias = Annotated[CohortSource, NO_PREFIX]


def synthetic(patients: int, regions: int = 8) -> CohortSource:
    """Return the source of a simulated cohort."""
    return CohortSource(data=DataConfig(synthetic=patients, synthetic_regions=regions))


class RegionalCohort(NamedTuple):
    """A cohort on its connectome, checked.

    Attributes:
        regions: Names.
        graph: The connectome.
        cohort: Visits on [0, 1].
        seeds: Numbers of the regions where the disease starts.
        roles: "train", "validation" or "test" of each subject.
        truth: Folder of the truth about a simulated cohort.
    """

    regions: tuple[str, ...]
    graph: GraphsTuple
    cohort: VisitTable
    seeds: tuple[int, ...]
    roles: tuple[str, ...]
    truth: Path | None


def write_synthetic(data: DataConfig, folder: Path, seed: int) -> tuple[CohortSource, Path]:
    """Write a simulated cohort as files; return where they are, and the folder of their truth."""
    assert data.synthetic is not None
    connectome = random_connectome(seed, data.synthetic_regions, 0.4)
    regions = region_names(data.synthetic_regions)
    seeds = (0, (data.synthetic_regions + 1) // 2)
    config = CohortConfig(subjects=data.synthetic, reaction=0.2, edge_diffusivity=1.0)
    cohort = simulate_cohort(jax.random.key(seed), connectome.adjacency, seeds, config)
    files = write_cohort(folder, seed, cohort, connectome.adjacency, regions, seeds, dataclasses.asdict(config))
    found = dataclasses.replace(data, scaling="none")
    return CohortSource(files.connectome, files.table, tuple(regions[i] for i in seeds), found), files.truth


def read_cohort(
    source: CohortSource, laplacian: LaplacianKind, seed: int, folder: RunFolder, notes: list[str]
) -> RegionalCohort:
    """Read a connectome, the regions where the disease starts and a table of visits; give every subject a role.

    Args:
        source: The files, or a cohort to simulate.
        laplacian: Kind of the graph's Laplacian.
        seed: Seed of the roles where the table has no split, and of a simulated cohort.
        folder: Folder of the run; it is begun where a cohort is simulated, in RUN/inputs.
        notes: What a reader must know is added.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    truth = None
    if source.data.synthetic is not None and source.connectome is None and source.table is None:
        start(folder)
        source, truth = write_synthetic(source.data, folder.path / "inputs", seed)
    connectome = read_connectome(source.connectome, source.data.graph, notes)
    seeds = find_regions(source.seeds, connectome)
    cohort = read_visits(source.table, connectome.regions, source.data.scaling, notes)
    roles, table = cohort.splits, source.table or "table"
    if not any(roles):
        roles = tuple(split_subjects(cohort.subjects, source.data.fractions, seed))
    elif not all(roles):
        raise InputError(table, "a split for every subject", "some without", "fill in column 'split'")
    if roles.count("train") < 2:
        raise InputError(table, "two training subjects or more", roles.count("train"))
    graph = make_graph(connectome.adjacency, laplacian)
    return RegionalCohort(connectome.regions, graph, cohort, seeds, roles, truth)


def in_role(roles: Sequence[str], role: str) -> Bool[np.ndarray, " subject"]:
    """Return who has a role."""
    return np.array([found == role for found in roles])


def role_weights(roles: Sequence[str], role: str, runs: int = 1) -> Float[np.ndarray, "run subject"]:
    """Return 1 for subjects of a role, 0 for others, for every run."""
    return np.tile(in_role(roles, role).astype(np.float32), (runs, 1))
