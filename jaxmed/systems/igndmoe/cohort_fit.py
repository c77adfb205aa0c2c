"""From files to a fit and back: cohorts, fits that continue where they were killed, and fitted trajectories.

A fit leaves outputs/course.npz and model.json, which staging and forecasting read.
"""

import dataclasses
import io
import itertools
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxmed.arrays.graphs import GraphsTuple, make_graph
from jaxmed.arrays.visits import Visits, count_values, is_measured
from jaxmed.config import Bounds, Regions, Share, checked
from jaxmed.data.connectomes import Connectome, ConnectomeConfig, find_regions, read_connectome
from jaxmed.data.splits import split_subjects
from jaxmed.data.visits import Scaling, VisitTable, read_visits
from jaxmed.errors import InputError
from jaxmed.files import read_record, require_file, write_json
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.tables import write_table
from jaxmed.metrics.regional import Scores, score_regions
from jaxmed.models.graph_diffusion import EXPERTS, ProgressionConfig
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.solvers.fixed_grid import Trajectory, interpolate
from jaxmed.synthesis.phantoms.connectome import CohortConfig, random_connectome, simulate_cohort
from jaxmed.synthesis.phantoms.write_connectome import region_names, write_cohort
from jaxmed.systems.igndmoe import dual
from jaxmed.systems.igndmoe.alignment import Alignment
from jaxmed.systems.igndmoe.dual import FitConfig
from jaxmed.systems.igndmoe.fitting import Fit, fit, make_problem, programs
from jaxmed.train.log import Log, at_work
from jaxmed.train.loop import LoopConfig
from jaxmed.train.loop import fit as train_loop
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
"""Of a stage: its flags stand without a prefix."""


def synthetic(patients: int, regions: int = 8) -> CohortSource:
    """Return the source of a simulated cohort."""
    return CohortSource(data=DataConfig(synthetic=patients, synthetic_regions=regions))


class Inputs(NamedTuple):
    """A cohort ready to fit.

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
    source = CohortSource(
        files.connectome, files.table, tuple(regions[i] for i in seeds), dataclasses.replace(data, scaling="none")
    )
    return source, files.truth


def read_inputs(source: CohortSource, fit: FitConfig, folder: RunFolder, notes: list[str]) -> Inputs:
    """Read and check everything a fit needs, or make it.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    truth = None
    if source.data.synthetic is not None and source.connectome is None and source.table is None:
        start(folder)
        source, truth = write_synthetic(source.data, folder.path / "inputs", fit.seed)
    connectome: Connectome = read_connectome(source.connectome, source.data.graph, notes)
    seeds = find_regions(source.seeds, connectome)
    cohort = read_visits(source.table, connectome.regions, source.data.scaling, notes)
    table, followed = source.table or "table", float(cohort.visits.gaps.max())
    if followed >= fit.model.horizon:
        expected = f"subjects followed for less than the horizon, {fit.model.horizon:g} years"
        raise InputError(table, expected, f"{followed:g} years", "raise --fit.model.horizon")
    roles = cohort.splits
    if not any(roles):
        roles = tuple(split_subjects(cohort.subjects, source.data.fractions, fit.seed))
    elif not all(roles):
        raise InputError(table, "a split for every subject", "some without", "fill in column 'split'")
    if roles.count("train") < 2:
        raise InputError(table, "two training subjects or more", roles.count("train"))
    graph = make_graph(connectome.adjacency, fit.laplacian)
    return Inputs(connectome.regions, graph, cohort, seeds, roles, truth)


def in_role(roles: Sequence[str], role: str) -> Bool[np.ndarray, " subject"]:
    """Return who has a role."""
    return np.array([found == role for found in roles])


def role_weights(roles: Sequence[str], role: str, runs: int = 1) -> Float[np.ndarray, "run subject"]:
    """Return 1 for subjects of a role, 0 for others, for every run."""
    return np.tile(in_role(roles, role).astype(np.float32), (runs, 1))


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
    start, advance, finish = programs(config)
    with at_work("Fitting the mechanistic curve that the fit starts from"):
        state = jax.block_until_ready(start(jax.vmap(jax.random.key)(run_seeds), problem))

    def one_round(state: dual.DualState, problem: dual.Problem) -> tuple[dual.DualState, dict[str, float]]:
        state, info = advance(state, problem)
        values = {"train_mse": info.train, "validation_mse": info.validation, "stage_shift_years": info.shift}
        values |= {"neural_size": info.norm, "clipped": info.clipped, "rejected_points": info.rejected}
        means = {name: float(np.nanmean(np.asarray(value, float))) for name, value in values.items()}
        return state, {name: mean for name, mean in means.items() if np.isfinite(mean)}

    log.say(f"Fitting {len(run_seeds)} of '{config.model.equation}' at once ({name}).")
    rounds = LoopConfig(steps=config.loops, log_every=1, save_every=1)
    state = train_loop(
        rounds, state, one_round, lambda _: itertools.repeat(problem), mesh=None, folder=folder, log=log, part=name,
        unit="round", is_finished=lambda state: bool(jnp.all(state.finished)),
    )  # fmt: skip
    fitted = finish(state, problem)
    failed = np.flatnonzero(~np.asarray(fitted.succeeded))
    if len(failed):
        states = np.asarray(fitted.trajectory.states)[failed[0]]
        bad = np.flatnonzero(~np.isfinite(states).all(axis=1))
        when = f"stage {float(fitted.trajectory.times[failed[0]][bad[0]]):.1f} years" if len(bad) else "an alignment"
        raise InputError(
            f"run {failed[0] + 1} of {len(fitted.succeeded)}",
            "an equation that can be solved",
            f"numbers that are not finite from {when} on",
            "raise --fit.norm-weight, or give --fit.model.bounded",
        )
    return fitted


# --- Fitted trajectories ------------------------------------------------------------------------


class FittedTrajectory(NamedTuple):
    """A fitted trajectory as stored.

    Attributes:
        trajectory: States and slopes over stage.
        regions: Names.
        scale: Measurements at 0 and 1.
        stages: Stages tried in an alignment.
    """

    trajectory: Trajectory
    regions: tuple[str, ...] = ()
    scale: tuple[float, float] = (0.0, 1.0)
    stages: int = 512


def write_trajectory(folder: Path, fit: Fit, cohort: VisitTable, regions: tuple[str, ...], stages: int) -> None:
    """Write course.npz and model.json for later stages, course.csv and weights.csv for people."""
    found = fit.trajectory
    write_npz(folder / "course.npz", dict(zip(("times", "states", "slopes"), found, strict=True)))
    scale = [cohort.low, cohort.high]
    record = {"regions": list(regions), "scale": scale, "stages": stages, "unit": "years of stage"}
    write_json(folder / "model.json", record)
    times, measured = np.asarray(found.times), cohort.low + (cohort.high - cohort.low) * np.asarray(found.states)
    write_curves(folder / "course.csv", times, dict(zip(regions, measured.T, strict=True)))
    if fit.weights.shape[-1] == len(EXPERTS):
        # The root mean square rate of each expert as it counts.
        rates = np.sqrt(np.mean((np.asarray(fit.weights)[..., None] * np.asarray(fit.experts)) ** 2, axis=-1))
        names = [name.replace(" ", "_") for name in EXPERTS]
        curves = dict(zip(names, np.asarray(fit.weights).T, strict=True))
        curves |= {f"{name}_rate": rate for name, rate in zip(names, rates.T, strict=True)}
        write_curves(folder / "weights.csv", times, curves)


def write_curves(path: Path, times: Float[np.ndarray, " time"], curves: dict[str, np.ndarray]) -> None:
    """Write one row per stage and one column per curve."""
    rows = [{"stage": float(t)} | {name: float(curve[i]) for name, curve in curves.items()} for i, t in
            enumerate(times)]  # fmt: skip
    write_table(path, ("stage", *curves), rows)


def write_stages(path: Path, cohort: VisitTable, staged: Alignment, roles: tuple[str, ...] | None = None) -> None:
    """Write one row per subject: stage, error, and whether the stage lies at an end of the trajectory."""
    counts = np.asarray(cohort.visits.present).sum(axis=1)
    values = np.asarray(count_values(cohort.visits))
    errors = np.sqrt(np.asarray(staged.errors) / values) * (cohort.high - cohort.low)
    rows = [
        {
            "subject": name,
            "age": float(cohort.ages[i]),
            "visits": int(counts[i]),
            "stage": float(staged.onsets[i]),
            "rms_error": float(errors[i]),
            "clipped": int(staged.clipped[i]),
        }
        | ({"role": roles[i]} if roles else {})
        for i, name in enumerate(cohort.subjects)
    ]
    write_table(path, tuple(rows[0]), rows)


def read_trajectory(run: Path | None) -> FittedTrajectory:
    """Read what `jaxmed igndmoe fit` left.

    Raises:
        InputError: The folder is none of a fit.
    """
    if run is None:
        raise InputError("weights", "the folder of a fit", "nothing", "give --weights RUN, or try --preset smoke")
    folder = run / "outputs" if (run / "outputs").is_dir() else run
    if not (folder / "course.npz").exists():
        raise InputError(run, "a run of jaxmed igndmoe fit", "no outputs/course.npz", "fit a cohort first")
    record = read_record(folder / "model.json")
    path = require_file(folder / "course.npz", "an npz file")
    try:
        # From memory, so that a damaged file is not left open.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            trajectory = Trajectory(*(jnp.asarray(stored[name]) for name in Trajectory._fields))
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(path, "a stored course", "a damaged file", "run the fit again") from error
    low, high = record["scale"]
    return FittedTrajectory(trajectory, tuple(record["regions"]), (float(low), float(high)), int(record["stages"]))


def predict(
    fitted: FittedTrajectory, onsets: Float[np.ndarray, " subject"], gaps: Float[np.ndarray, "subject visit"]
) -> Float[np.ndarray, "subject visit region"]:
    """Return values on [0, 1] at years after the first visit; past the trajectory's end, those at its end."""
    at = np.minimum(np.asarray(onsets)[:, None] + gaps, float(fitted.trajectory.times[-1]))
    return np.asarray(interpolate(fitted.trajectory, jnp.asarray(at, jnp.float32)))


def measured_values(visits: Visits) -> Float[np.ndarray, "subject visit region"]:
    """Return the values of visits, NaN on padding and where a region was not measured."""
    return np.where(np.asarray(is_measured(visits)), np.asarray(visits.values), np.nan)


def later_visits(visits: Visits, chosen: Bool[np.ndarray, " subject"]) -> Bool[np.ndarray, "subject visit"]:
    """Return where some subjects were seen again."""
    present = np.asarray(visits.present) & chosen[:, None]
    return present & (np.arange(present.shape[1]) > 0)


def score(
    fitted: FittedTrajectory,
    visits: Visits,
    onsets: Float[np.ndarray, " subject"],
    chosen: Bool[np.ndarray, " subject"],
    later: bool = False,
) -> Scores:
    """Return the paper's measures over visits of some subjects; see `metrics.regional.score_regions`.

    Args:
        fitted: The trajectory.
        visits: On [0, 1].
        onsets: Stages.
        chosen: Subjects that count.
        later: Leave out first visits, for forecasts.
    """
    present = later_visits(visits, chosen) if later else np.asarray(visits.present) & chosen[:, None]
    return score_regions(measured_values(visits)[present], predict(fitted, onsets, np.asarray(visits.gaps))[present])


# --- Subjects to place on a fitted trajectory ----------------------------------------------------


class TrajectoryInputs(NamedTuple):
    """A fitted trajectory, the subjects to place on it, and what was noticed while reading."""

    fitted: FittedTrajectory
    cohort: VisitTable
    notes: list[str]


def trajectory_inputs(
    folder: RunFolder, weights: Path | None, table: Path | None, patients: int | None, seed: int
) -> TrajectoryInputs:
    """Read and check a fitted trajectory and a table, or make both.

    Raises:
        InputError: One cannot be read, or they do not fit together.
    """
    notes: list[str] = []
    if patients is not None and weights is None and table is None:
        start(folder)
        weights, table = synthetic_fit(folder, patients, seed)
    fitted = read_trajectory(weights)
    cohort = read_visits(table, fitted.regions, "minmax", notes, fitted.scale)
    followed, last = np.asarray(cohort.visits.gaps).max(axis=1), float(fitted.trajectory.times[-1])
    if followed.max() >= last:
        name = cohort.subjects[int(followed.argmax())]
        found = f"subject '{name}' followed for {followed.max():g} years"
        raise InputError(table or "table", f"subjects followed for less than the course, {last:g} years", found)
    return TrajectoryInputs(fitted, cohort, notes)


def synthetic_fit(folder: RunFolder, patients: int, seed: int) -> tuple[Path, Path]:
    """Simulate two cohorts of one disease, fit the growth and diffusion of the first; return its run and the second."""
    notes: list[str] = []
    place = folder.path / "inputs"
    source, _ = write_synthetic(DataConfig(synthetic=max(patients, 40)), place / "fitted", seed)
    config = FitConfig(
        model=ProgressionConfig(equation="fkpp"), grid_steps=32, stages=64, steps=15, loops=2, solver="fixed"
    )
    inputs = read_inputs(source, config, folder, notes)
    fitted = fit(inputs.cohort.visits, inputs.graph, config, inputs.seeds)
    write_trajectory(place / "fitted", fitted, inputs.cohort, inputs.regions, config.stages)
    # The same connectome, so the same disease, with other patients.
    new, _ = write_synthetic(DataConfig(synthetic=patients), place / "new", seed)
    assert new.table is not None
    return place / "fitted", new.table
