"""What fitting stages have in common: inputs, embedded or given, and a fit that continues where it was killed."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxmed.arrays.graphs import GraphsTuple, make_graph
from jaxmed.config import Regions, Share, checked
from jaxmed.data.splits import split_subjects
from jaxmed.errors import InputError
from jaxmed.synthesis.phantoms.connectome import CohortConfig, random_connectome, simulate_cohort
from jaxmed.synthesis.phantoms.write_connectome import region_names, write_cohort
from jaxmed.systems.igndmoe import dual
from jaxmed.systems.igndmoe.fitting import Fit, fit_runs, make_problem, programs
from jaxmed.systems.igndmoe.options import FitConfig
from jaxmed.systems.igndmoe.reading import (
    Cohort,
    Connectome,
    ConnectomeConfig,
    find_regions,
    read_cohort,
    read_connectome,
)
from jaxmed.train.announce import announce
from jaxmed.train.checkpoint import Checkpoints
from jaxmed.train.log import Log, at_work
from jaxmed.train.run_folder import RunFolder

Scaling = Literal["minmax", "none"]


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
        embedded: Patients of a simulated cohort to use where neither connectome nor table is given.
        embedded_regions: Of its connectome.
    """

    graph: ConnectomeConfig = dataclasses.field(default_factory=ConnectomeConfig)
    scaling: Scaling = "minmax"
    fractions: tuple[Share, Share, Share] = (0.676, 0.162, 0.162)
    embedded: int | None = None
    embedded_regions: Regions = 8

    def __post_init__(self) -> None:
        if min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions: expected three shares that sum to 1, found {self.fractions}")
        if self.embedded is not None and self.embedded < 10:
            raise ValueError(f"embedded: expected 10 or more patients, found {self.embedded}")


class Files(NamedTuple):
    """What a user gave, or was simulated.

    Attributes:
        connectome: CSV file.
        table: CSV file.
        seeds: Names of regions.
        scaling: Of the table.
        truth: Folder of the truth about a simulated cohort.
    """

    connectome: Path | None
    table: Path | None
    seeds: tuple[str, ...]
    scaling: Scaling
    truth: Path | None = None


class Inputs(NamedTuple):
    """A cohort ready to fit.

    Attributes:
        connectome: With names.
        graph: Its operators.
        cohort: Visits on [0, 1].
        seeds: Numbers of the regions where the disease starts.
        roles: "train", "validation" or "test" of each subject.
    """

    connectome: Connectome
    graph: GraphsTuple
    cohort: Cohort
    seeds: tuple[int, ...]
    roles: tuple[str, ...]


def write_embedded(data: DataConfig, folder: Path, seed: int) -> Files:
    """Write a simulated cohort as files, and return where they are."""
    assert data.embedded is not None
    connectome = random_connectome(seed, data.embedded_regions, 0.4)
    regions = region_names(data.embedded_regions)
    seeds = (0, (data.embedded_regions + 1) // 2)
    config = CohortConfig(subjects=data.embedded, reaction=0.2, edge_diffusivity=1.0)
    cohort = simulate_cohort(jax.random.key(seed), connectome.adjacency, seeds, config)
    files = write_cohort(folder, seed, cohort, connectome.adjacency, regions, seeds, dataclasses.asdict(config))
    return Files(files.connectome, files.table, tuple(regions[i] for i in seeds), "none", files.truth)


def read_inputs(files: Files, data: DataConfig, fit: FitConfig, notes: list[str]) -> Inputs:
    """Read and check everything a fit needs.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    connectome = read_connectome(files.connectome, data.graph, notes)
    seeds = find_regions(files.seeds, connectome)
    cohort = read_cohort(files.table, connectome.regions, files.scaling, notes)
    followed = float(cohort.visits.gaps.max())
    if followed >= fit.model.horizon:
        raise InputError(
            files.table or "table",
            f"subjects followed for less than the horizon, {fit.model.horizon:g} years",
            f"{followed:g} years",
            "raise --fit.model.horizon",
        )
    roles = cohort.splits
    if not any(roles):
        roles = tuple(split_subjects(cohort.subjects, data.fractions, fit.seed))
    elif not all(roles):
        raise InputError(files.table or "table", "a split for every subject", "some without", "fill in column 'split'")
    if roles.count("train") < 2:
        raise InputError(files.table or "table", "two training subjects or more", roles.count("train"))
    return Inputs(connectome, make_graph(connectome.adjacency, fit.laplacian), cohort, seeds, roles)


def role_weights(roles: Sequence[str], role: str, runs: int = 1) -> Float[np.ndarray, "run subject"]:
    """Return 1 for subjects of a role, 0 for others, for every run."""
    return np.tile(np.array([float(found == role) for found in roles], np.float32), (runs, 1))


def fit_in_folder(
    inputs: Inputs,
    config: FitConfig,
    train: Float[np.ndarray, "run subject"],
    validation: Float[np.ndarray, "run subject"],
    run_seeds: np.ndarray,
    folder: RunFolder,
    log: Log,
    name: str = "fit",
) -> Fit:
    """Fit runs, saving after every round to and continuing from RUN/checkpoints.

    Raises:
        InputError: A fit ended in numbers that are not finite.
    """
    problem = make_problem(inputs.cohort.visits, inputs.graph, inputs.seeds, train, validation)
    with (
        contextlib.ExitStack() as bars,
        Checkpoints(folder.checkpoints / name, {"run": folder.record, "part": name}) as checkpoints,
    ):
        with at_work("Fitting the mechanistic curve that the fit starts from"):
            state = jax.block_until_ready(programs(config)[0](jax.vmap(jax.random.key)(run_seeds), problem))
        found = checkpoints.restore(state)
        done = 0 if found is None else found.step
        log.rewind(done, name)
        if found is not None:
            log.say(f"Continuing after round {done} of an interrupted run.")
            state = found.state
        announce(
            log, f"Fitting {len(run_seeds)} of '{config.model.equation}' at once ({name})", params=state.params,
            held=state, batch=inputs.cohort.visits.values, count=config.loops - done, unit="rounds",
            smaller=folder.smaller,
        )  # fmt: skip
        update = bars.enter_context(log.progress(f"Fitting ({name})", config.loops, "rounds", done))
        loop = done

        def watch(state: dual.DualState, info: dual.Info) -> None:
            nonlocal loop
            loop += 1
            values = {f"{name}/train_mse": info.train, f"{name}/validation_mse": info.validation}
            values |= {f"{name}/stage_shift_years": info.shift, f"{name}/neural_size": info.norm}
            values |= {f"{name}/clipped": info.clipped, f"{name}/rejected_points": info.rejected}
            means = {key: float(np.nanmean(np.asarray(value, float))) for key, value in values.items()}
            log.metrics(loop, {key: value for key, value in means.items() if np.isfinite(value)})
            checkpoints.save(loop, state)
            # The first round is mostly compilation: the rate counts from its end.
            is_compiled = loop == done + 1 < config.loops
            update(done if is_compiled else loop, f"validation {means[f'{name}/validation_mse']:.5f}")

        fitted = fit_runs(
            inputs.cohort.visits, inputs.graph, config, inputs.seeds, train, validation, run_seeds,
            state=state, watch=watch,
        )  # fmt: skip
    failed = np.flatnonzero(~np.asarray(fitted.succeeded))
    if len(failed):
        states = np.asarray(fitted.course.states)[failed[0]]
        bad = np.flatnonzero(~np.isfinite(states).all(axis=1))
        when = f"stage {float(fitted.course.times[failed[0]][bad[0]]):.1f} years" if len(bad) else "an alignment"
        raise InputError(
            f"run {failed[0] + 1} of {len(fitted.succeeded)}",
            "an equation that can be solved",
            f"numbers that are not finite from {when} on",
            "raise --fit.norm-weight, or give --fit.model.bounded",
        )
    return fitted
