"""What staging and forecasting have in common."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxmed.arrays.graphs import make_graph
from jaxmed.errors import InputError
from jaxmed.models.graph_diffusion import ProgressionConfig
from jaxmed.systems.igndmoe.fitting import fit
from jaxmed.systems.igndmoe.job import DataConfig, write_embedded
from jaxmed.systems.igndmoe.options import FitConfig
from jaxmed.systems.igndmoe.reading import Cohort, ConnectomeConfig, find_regions, read_cohort, read_connectome
from jaxmed.systems.igndmoe.results import Course, read_course, write_course
from jaxmed.train.run_folder import RunFolder, start


class Inputs(NamedTuple):
    """A fitted course, the subjects to place on it, and what was noticed while reading."""

    course: Course
    cohort: Cohort
    notes: list[str]


def read_inputs(folder: RunFolder, weights: Path | None, table: Path | None, embedded: int | None, seed: int) -> Inputs:
    """Read and check a course and a table, or make both, and start the run.

    Raises:
        InputError: One cannot be read, or they do not fit together.
    """
    notes: list[str] = []
    if embedded is not None and weights is None and table is None:
        start(folder)
        weights, table = embedded_fit(folder, embedded, seed)
    course = read_course(weights)
    cohort = read_cohort(table, course.regions, "minmax", notes, course.scale)
    check_followed(cohort, course, table)
    start(folder)
    return Inputs(course, cohort, notes)


def check_followed(cohort: Cohort, course: Course, table: Path | None) -> None:
    """Refuse subjects followed for longer than the course.

    Raises:
        InputError: One was.
    """
    followed, last = np.asarray(cohort.visits.gaps).max(axis=1), float(course.trajectory.times[-1])
    if followed.max() >= last:
        name = cohort.subjects[int(followed.argmax())]
        found = f"subject '{name}' followed for {followed.max():g} years"
        raise InputError(table or "table", f"subjects followed for less than the course, {last:g} years", found)


def embedded_fit(folder: RunFolder, subjects: int, seed: int) -> tuple[Path, Path]:
    """Simulate two cohorts of one disease, fit the growth and diffusion of the first; return its run and the second."""
    notes: list[str] = []
    old = write_embedded(DataConfig(embedded=max(subjects, 40)), folder.path / "inputs" / "fitted", seed)
    connectome = read_connectome(old.connectome, ConnectomeConfig(), notes)
    cohort = read_cohort(old.table, connectome.regions, "none", notes)
    config = FitConfig(model=ProgressionConfig(equation="fkpp"), grid_steps=32, stages=64, steps=15, loops=2)
    fitted = fit(cohort.visits, make_graph(connectome.adjacency), config, find_regions(old.seeds, connectome))
    write_course(folder.path / "inputs" / "fitted", fitted, cohort, connectome.regions, config.stages)
    # The same connectome, so the same disease, with other patients.
    new = write_embedded(DataConfig(embedded=subjects), folder.path / "inputs" / "new", seed)
    jax.block_until_ready(fitted.onsets)
    assert new.table is not None
    return folder.path / "inputs" / "fitted", new.table
