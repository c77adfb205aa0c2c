"""A fitted course of a disease: kept in a folder, followed by subjects of whom the stage is known, and scored."""

import dataclasses
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxmed.arrays.visits import Visits, count_values, later_visits, measured_values
from jaxmed.config import Number, Seed, checked
from jaxmed.data.visits import VisitTable, read_visits
from jaxmed.errors import InputError
from jaxmed.files import read_record, require_file, write_json
from jaxmed.io.numpy_files import restore_npz, write_npz
from jaxmed.io.tables import write_columns, write_table
from jaxmed.metrics.regional import NOTHING, Scores, score_regions
from jaxmed.recipes.regional import RegionalCohort, in_role
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.report.figures import agreement
from jaxmed.report.page import Section, Table
from jaxmed.solvers.fixed_grid import Trajectory, interpolate

ROLES = ("train", "validation", "test")


class FittedTrajectory(NamedTuple):
    """A fitted trajectory as stored.

    Attributes:
        trajectory: States and slopes over stage, on [0, 1] and in years.
        regions: Names.
        scale: Measurements at 0 and 1.
        stages: Stages tried in an alignment.
    """

    trajectory: Trajectory
    regions: tuple[str, ...]
    scale: tuple[float, float]
    stages: int


def write_trajectory(folder: Path, fitted: FittedTrajectory) -> None:
    """Write course.npz and model.json for later stages, course.csv for people."""
    times, states, _ = fitted.trajectory
    low, high = fitted.scale
    write_npz(folder / "course.npz", fitted.trajectory._asdict())
    record = {"regions": list(fitted.regions), "scale": [low, high], "stages": fitted.stages, "unit": "years of stage"}
    write_json(folder / "model.json", record)
    measured = low + (high - low) * np.asarray(states)
    write_columns(folder / "course.csv", {"stage": times, **dict(zip(fitted.regions, measured.T, strict=True))})


def read_trajectory(run: Path | None) -> FittedTrajectory:
    """Read what `write_trajectory` left in a run's outputs, or in the folder itself.

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
    stored = restore_npz(path)
    if stored is None or not set(Trajectory._fields) <= set(stored):
        raise InputError(path, "a stored course", "a damaged file", "run the fit again")
    trajectory = Trajectory(*(jnp.asarray(stored[name]) for name in Trajectory._fields))
    low, high = record["scale"]
    return FittedTrajectory(trajectory, tuple(record["regions"]), (float(low), float(high)), int(record["stages"]))


# --- Subjects on it ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
@checked
class SubjectSource:
    """A fit, and subjects to place on its course.

    Attributes:
        weights: Run folder of `jaxmed igndmoe fit`.
        table: CSV file with a row per visit: subject, age in years, a column for every region of the fit, in its unit.
        synthetic: Patients to simulate, with a course fitted to others, where neither is given.
        seed: Seed of the synthetic patients.
    """

    weights: Path | None = None
    table: Path | None = None
    synthetic: Number | None = None
    seed: Seed = 0


SubjectFlags: TypeAlias = Annotated[SubjectSource, NO_PREFIX]


class TrajectoryInputs(NamedTuple):
    """A fitted trajectory, the subjects to place on it, and what was noticed while reading."""

    fitted: FittedTrajectory
    cohort: VisitTable
    notes: list[str]


def read_subjects(weights: Path | None, table: Path | None) -> TrajectoryInputs:
    """Read and check a fitted trajectory and a table of visits, on its scale.

    Raises:
        InputError: One cannot be read, or they do not fit together.
    """
    notes: list[str] = []
    fitted = read_trajectory(weights)
    cohort = read_visits(table, fitted.regions, "minmax", notes, fitted.scale)
    followed, last = np.asarray(cohort.visits.gaps).max(axis=1), float(fitted.trajectory.times[-1])
    if followed.max() >= last:
        name = cohort.subjects[int(followed.argmax())]
        found = f"subject '{name}' followed for {followed.max():g} years"
        raise InputError(table or "table", f"subjects followed for less than the course, {last:g} years", found)
    return TrajectoryInputs(fitted, cohort, notes)


def write_stages(
    path: Path,
    cohort: VisitTable,
    onsets: Float[Array | np.ndarray, " subject"],
    errors: Float[Array | np.ndarray, " subject"],
    clipped: Bool[Array | np.ndarray, " subject"],
    roles: tuple[str, ...] | None = None,
) -> None:
    """Write one row per subject: stage, error in the unit of the table, and whether it is at an end of the course.

    Args:
        path: A .csv file.
        cohort: The subjects.
        onsets: Stage of each one's first visit, in years.
        errors: Sum of squared errors, on [0, 1].
        clipped: Whether the stage lies at an end of the course.
        roles: Role of each subject.
    """
    mean = np.asarray(errors) / np.asarray(count_values(cohort.visits))
    columns = {
        "subject": cohort.subjects,
        "age": cohort.ages,
        "visits": np.asarray(cohort.visits.present).sum(axis=1),
        "stage": onsets,
        "rms_error": np.sqrt(mean) * (cohort.high - cohort.low),
        "clipped": np.asarray(clipped).astype(int),
    }
    write_columns(path, columns | ({"role": roles} if roles else {}))


def predict(
    trajectory: Trajectory, onsets: Float[np.ndarray, " subject"], gaps: Float[np.ndarray, "subject visit"]
) -> Float[np.ndarray, "subject visit region"]:
    """Return values on [0, 1] at years after the first visit; past the trajectory's end, those at its end.

    Args:
        trajectory: The course.
        onsets: Stage of each subject's first visit, in years.
        gaps: Years since then.
    """
    at = np.minimum(np.asarray(onsets)[:, None] + gaps, float(trajectory.times[-1]))
    return np.asarray(interpolate(trajectory, jnp.asarray(at, jnp.float32)))


def write_forecasts(
    path: Path,
    fitted: FittedTrajectory,
    cohort: VisitTable,
    onsets: Float[np.ndarray, " subject"],
    gaps: Float[np.ndarray, "subject horizon"],
    horizons: Float[np.ndarray, " horizon"],
    beyond: Bool[np.ndarray, "subject horizon"],
) -> None:
    """Write a row per subject and horizon (years after the last visit): values in the unit of the table."""
    low, high = fitted.scale
    values = low + (high - low) * predict(fitted.trajectory, onsets, gaps)
    rows = [
        {"subject": name, "age": float(cohort.ages[i] + gaps[i, j]), "years_ahead": float(horizons[j])}
        | {"beyond_course": int(beyond[i, j])}
        | {region: float(value) for region, value in zip(fitted.regions, values[i, j], strict=True)}
        for i, name in enumerate(cohort.subjects)
        for j in range(len(horizons))
    ]
    write_table(path, ("subject", "age", "years_ahead", "beyond_course", *fitted.regions), rows)


def score(
    trajectory: Trajectory,
    visits: Visits,
    onsets: Float[np.ndarray, " subject"],
    chosen: Bool[np.ndarray, " subject"],
    later: bool = False,
) -> Scores:
    """Return the measures of `metrics.regional.score_regions` over visits of some subjects.

    Args:
        trajectory: The course.
        visits: On [0, 1].
        onsets: Stage of each subject's first visit, in years.
        chosen: Subjects that count.
        later: Leave out first visits, for forecasts.
    """
    present = later_visits(visits, chosen) if later else np.asarray(visits.present) & chosen[:, None]
    predicted = predict(trajectory, onsets, np.asarray(visits.gaps))
    return score_regions(measured_values(visits)[present], predicted[present])


def score_unchanged(visits: Visits, chosen: Bool[np.ndarray, " subject"]) -> Scores:
    """Score the forecast that nothing changes after the first visit, which any model must beat."""
    present, values = later_visits(visits, chosen), measured_values(visits)
    errors = np.square(values - values[:, :1])[present]
    known = np.isfinite(errors)  # regions measured at both visits
    if not known.any():
        return NOTHING
    sse = float(errors[known].sum())
    return {"sse": sse, "r": None, "mse": sse / int(known.sum()), "r2": None, "visits": int(present.sum())}


def write_fitted_visits(
    path: Path, trajectory: Trajectory, cohort: RegionalCohort, onsets: Float[np.ndarray, " subject"]
) -> dict[str, Scores]:
    """Score visits by role; write what was measured, NaN where nothing was, and predicted, (visit, region)."""
    visits = cohort.cohort.visits
    predicted, measured = predict(trajectory, onsets, np.asarray(visits.gaps)), measured_values(visits)
    arrays, scores = {}, {}
    for role in (role for role in ROLES if role in cohort.roles):
        chosen = np.asarray(visits.present) & in_role(cohort.roles, role)[:, None]
        arrays |= {f"{role}_measured": measured[chosen], f"{role}_predicted": predicted[chosen]}
        scores[role] = score_regions(measured[chosen], predicted[chosen])
    write_npz(path, dict(sorted(arrays.items())))
    return scores


def scores_section(path: Path, scores: dict[str, Scores]) -> Section:
    """Show what `write_fitted_visits` found."""
    rows = [(role, s["visits"], s["sse"], s["mse"], s["r"], s["r2"]) for role, s in scores.items()]
    table = Table(
        ("Subjects", "Visits", "SSE", "MSE", "R over regions", "R2, median region"),
        rows,
        "Values on [0, 1]; every subject staged with all of its visits, as the paper does, so this is fit after a "
        "shift in time and not a forecast.",
    )
    with np.load(path) as stored:
        roles = [role for role in scores if f"{role}_measured" in stored]
        known = {role: np.isfinite(stored[f"{role}_measured"]) for role in roles}
        figure = agreement(
            {role: stored[f"{role}_measured"][known[role]] for role in roles},
            {role: stored[f"{role}_predicted"][known[role]] for role in roles},
            caption="Regional values, observed (across) against predicted by the course at the subject's stage (up).",
        )
    return Section("Errors", [table, figure])
