"""Write simulated cohorts as the files that a user has: a connectome, a table of visits, and the truth beside them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxmed.files import write_json
from jaxmed.io.tables import write_columns, write_table
from jaxmed.synthesis.phantoms.connectome import Cohort

FIRST_AGES = (60.0, 80.0)
"""Ages at the first visit are uniform between these years; they carry no information about stage."""


class CohortFiles(NamedTuple):
    """Where the files of a cohort are.

    Attributes:
        connectome: Matrix with a header of region names.
        table: One row per visit: subject, age, regions.
        truth: Folder with stages.csv, course.csv, weights.csv and truth.json.
    """

    connectome: Path
    table: Path
    truth: Path


def region_names(count: int) -> tuple[str, ...]:
    """Name regions of an embedded connectome: the left half first, then the right one in the same order."""
    half = (count + 1) // 2
    return tuple(f"L_region{i + 1:02d}" for i in range(half)) + tuple(
        f"R_region{i + 1:02d}" for i in range(count - half)
    )


def write_cohort(
    folder: Path,
    seed: int,
    cohort: Cohort,
    adjacency: Float[np.ndarray, "region region"],
    regions: tuple[str, ...],
    seeds: tuple[int, ...],
    settings: dict[str, object],
) -> CohortFiles:
    """Write a cohort.

    Args:
        folder: Where to.
        seed: Seed of the ages.
        cohort: From `simulate_cohort`.
        adjacency: Its connectome.
        regions: Names.
        seeds: Where the disease starts.
        settings: What the truth rests on, for truth.json.
    """
    files = CohortFiles(folder / "connectome.csv", folder / "visits.csv", folder / "truth")
    write_columns(files.connectome, dict(zip(regions, adjacency.T, strict=True)))
    ages = np.random.default_rng(seed).uniform(*FIRST_AGES, len(cohort.onsets))
    names = [f"sub-{index + 1:03d}" for index in range(len(cohort.onsets))]
    visits = cohort.visits
    rows = [
        {"subject": names[i], "age": round(float(ages[i] + visits.gaps[i, j]), 4)}
        | {region: round(float(value), 6) for region, value in zip(regions, visits.values[i, j], strict=True)}
        for i, j in np.argwhere(visits.present)
    ]
    write_table(files.table, ("subject", "age", *regions), rows)
    write_columns(files.truth / "stages.csv", {"subject": names, "stage": cohort.onsets})
    stage, states, weights = cohort.times[::5], cohort.states[::5], cohort.weights[::5]
    write_columns(files.truth / "course.csv", {"stage": stage, **dict(zip(regions, states.T, strict=True))})
    experts = ("mechanistic", "graph_diffusion", "local_reaction")
    write_columns(files.truth / "weights.csv", {"stage": stage, **dict(zip(experts, weights.T, strict=True))})
    write_json(files.truth / "truth.json", settings | {"seeds": [regions[index] for index in seeds]})
    return files
