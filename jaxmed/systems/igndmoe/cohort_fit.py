"""From files to a fit and back: fits that continue where they were killed, and fitted trajectories.

A fit leaves outputs/course.npz and model.json, which staging and forecasting read.
"""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmed.errors import InputError
from jaxmed.models.graph_diffusion import ProgressionConfig
from jaxmed.recipes.fitted_course import (
    FittedTrajectory,
    SubjectSource,
    TrajectoryInputs,
    read_subjects,
    write_trajectory,
)
from jaxmed.recipes.regional import CohortSource, DataConfig, RegionalCohort, read_cohort, write_synthetic
from jaxmed.systems.igndmoe import dual
from jaxmed.systems.igndmoe.dual import FitConfig
from jaxmed.systems.igndmoe.fitting import Fit, fit, make_problem, programs
from jaxmed.train.log import Log, at_work
from jaxmed.train.loop import LoopConfig
from jaxmed.train.loop import fit as train_loop
from jaxmed.train.run_folder import RunFolder, start


def read_inputs(source: CohortSource, fit: FitConfig, folder: RunFolder, notes: list[str]) -> RegionalCohort:
    """Read and check everything a fit needs, or make it.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    inputs = read_cohort(source, fit.laplacian, fit.seed, folder, notes)
    followed = float(inputs.cohort.visits.gaps.max())
    if followed >= fit.model.horizon:
        expected = f"subjects followed for less than the horizon, {fit.model.horizon:g} years"
        raise InputError(source.table or "table", expected, f"{followed:g} years", "raise --fit.model.horizon")
    return inputs


def fit_in_folder(
    inputs: RegionalCohort,
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


def trajectory_inputs(source: SubjectSource, folder: RunFolder) -> TrajectoryInputs:
    """Read and check a fitted trajectory and a table, or make both.

    Raises:
        InputError: One cannot be read, or they do not fit together.
    """
    if source.synthetic is not None and source.weights is None and source.table is None:
        start(folder)
        return read_subjects(*synthetic_fit(folder, source.synthetic, source.seed))
    return read_subjects(source.weights, source.table)


def synthetic_fit(folder: RunFolder, patients: int, seed: int) -> tuple[Path, Path]:
    """Simulate two cohorts of one disease, fit the growth and diffusion of the first; return its run and the second."""
    place = folder.path / "inputs"
    source, _ = write_synthetic(DataConfig(synthetic=max(patients, 40)), place / "fitted", seed)
    config = FitConfig(
        model=ProgressionConfig(equation="fkpp"), grid_steps=32, stages=64, steps=15, loops=2, solver="fixed"
    )
    inputs = read_cohort(source, config.laplacian, seed, folder, [])
    fitted = fit(inputs.cohort.visits, inputs.graph, config, inputs.seeds)
    scale = (inputs.cohort.low, inputs.cohort.high)
    write_trajectory(place / "fitted", FittedTrajectory(fitted.trajectory, inputs.regions, scale, config.stages))
    # The same connectome, so the same disease, with other patients.
    new, _ = write_synthetic(DataConfig(synthetic=patients), place / "new", seed)
    assert new.table is not None
    return place / "fitted", new.table
