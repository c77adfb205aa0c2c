"""Files of a fitted course: written by `fit`, read by `stage` and `forecast`."""

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmed.arrays.visits import count_values
from jaxmed.errors import InputError
from jaxmed.files import read_record, require_file, write_json
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.tables import write_table
from jaxmed.models.graph_diffusion import EXPERTS
from jaxmed.solvers.fixed_grid import Trajectory, interpolate
from jaxmed.systems.igndmoe.alignment import Alignment
from jaxmed.systems.igndmoe.fitting import Fit
from jaxmed.systems.igndmoe.reading import Cohort


class Course(NamedTuple):
    """A fitted course as stored.

    Attributes:
        trajectory: States and slopes over stage.
        regions: Names.
        scale: Measurements at 0 and 1.
        stages: Stages tried in an alignment.
    """

    trajectory: Trajectory
    regions: tuple[str, ...]
    scale: tuple[float, float]
    stages: int


def write_course(folder: Path, fit: Fit, cohort: Cohort, regions: tuple[str, ...], stages: int) -> None:
    """Write course.npz and model.json for later stages, course.csv and weights.csv for people."""
    course = fit.course
    write_npz(folder / "course.npz", dict(zip(("times", "states", "slopes"), course, strict=True)))
    write_json(
        folder / "model.json",
        {"regions": list(regions), "scale": [cohort.low, cohort.high], "stages": stages, "unit": "years of stage"},
    )
    span = cohort.high - cohort.low
    rows = [
        {"stage": float(t)} | {name: float(cohort.low + span * v) for name, v in zip(regions, row, strict=True)}
        for t, row in zip(np.asarray(course.times), np.asarray(course.states), strict=True)
    ]
    write_table(folder / "course.csv", ("stage", *regions), rows)
    if fit.weights.shape[-1] == len(EXPERTS):
        write_weights(folder / "weights.csv", fit)


def write_weights(path: Path, fit: Fit) -> None:
    """Write weights of the experts over stage, and the root mean square rate of each as it counts."""
    columns = [name.replace(" ", "_") for name in EXPERTS]
    counted = np.sqrt(np.mean((np.asarray(fit.weights)[..., None] * np.asarray(fit.experts)) ** 2, axis=-1))
    rows = [
        {"stage": float(t)}
        | dict(zip(columns, map(float, weights), strict=True))
        | {f"{name}_rate": float(rate) for name, rate in zip(columns, rates, strict=True)}
        for t, weights, rates in zip(np.asarray(fit.course.times), np.asarray(fit.weights), counted, strict=True)
    ]
    write_table(path, ("stage", *columns, *(f"{name}_rate" for name in columns)), rows)


def write_stages(path: Path, cohort: Cohort, staged: Alignment, roles: tuple[str, ...] | None = None) -> None:
    """Write one row per subject: stage, error, and whether the stage lies at an end of the course."""
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


def write_centroids(path: Path, regions: tuple[str, ...], points: Float[np.ndarray, "region 3"]) -> None:
    """Keep where regions lie, for the report."""
    rows = [
        {"region": name, "x": float(x), "y": float(y), "z": float(z)}
        for name, (x, y, z) in zip(regions, points, strict=True)
    ]
    write_table(path, ("region", "x", "y", "z"), rows)


def read_course(run: Path | None) -> Course:
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
    return Course(trajectory, tuple(record["regions"]), (float(low), float(high)), int(record["stages"]))


def predict(
    course: Course, onsets: Float[np.ndarray, " subject"], gaps: Float[np.ndarray, "subject visit"]
) -> Float[np.ndarray, "subject visit region"]:
    """Return regional measurements at years after the first visit; past the course's end, those at its end."""
    at = np.minimum(np.asarray(onsets)[:, None] + gaps, float(course.trajectory.times[-1]))
    low, high = course.scale
    return low + (high - low) * np.asarray(interpolate(course.trajectory, jnp.asarray(at, jnp.float32)))
