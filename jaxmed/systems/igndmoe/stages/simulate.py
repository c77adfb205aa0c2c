"""Stage `jaxmed igndmoe simulate`: a cohort with planted mechanisms on a connectome, as CSV files with the truth."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import numpy as np

from jaxmed.config import Bounds, Decay, Seed, Size, checked, to_record
from jaxmed.data.connectomes import Connectome, ConnectomeDataConfig, find_regions, read_connectome
from jaxmed.io.tables import read_table, write_table
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import histograms
from jaxmed.report.page import Note, Section, Text
from jaxmed.report.recovery import stage_recovery_section
from jaxmed.report.regions import course_figures, stage_curves
from jaxmed.synthesis.phantoms.connectome import CohortConfig, random_connectome, simulate_cohort
from jaxmed.synthesis.phantoms.write_connectome import region_names, write_cohort
from jaxmed.systems.igndmoe.comparing import ATTRIBUTION, plant_on, stage_curve
from jaxmed.systems.igndmoe.dual import FitConfig
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
@checked
class RecoveryConfig:
    """How well could stages be recovered from such patients? Cohorts are simulated and fitted to find out.

    Attributes:
        visits: Numbers of visits per patient to try; none leaves the question out. Each takes fits: minutes.
        irregularities: How unequal the times between visits are, from 0 (all equal) to below 1 (uniform from nearly
            nothing to twice the mean).
        cohorts: Cohorts of each setting, with different patients.
        fit: Recipe and equation of the fits. FKPP by default, whatever the mechanism: the fastest that grows.
    """

    visits: tuple[Size, ...] = ()
    irregularities: tuple[Decay, ...] = (0.0, 0.5, 0.9)
    cohorts: Size = 4
    fit: FitConfig = dataclasses.field(
        default_factory=lambda: dataclasses.replace(
            ATTRIBUTION, model=dataclasses.replace(ATTRIBUTION.model, equation="fkpp"), steps=30, loops=8, patience=4
        )
    )

    def __post_init__(self) -> None:
        if not self.irregularities:
            raise ValueError("irregularities: expected one or more, found none")


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Simulate patients of one disease.

    Attributes:
        connectome: CSV file of a connectome; without it one is drawn on random points in two hemispheres.
        data: How the connectome is read.
        seeds: Regions where the disease starts; the first of each hemisphere on a drawn connectome.
        regions: Regions of a drawn connectome.
        density: Share of possible edges of a drawn connectome.
        cohort: Mechanisms and measurements.
        recovery: A study of how well stages are recovered, by visits per patient.
        seed: Seed of connectome, patients and noise.
    """

    connectome: Path | None = None
    data: ConnectomeDataConfig = dataclasses.field(default_factory=ConnectomeDataConfig)
    seeds: tuple[str, ...] = ()
    regions: Annotated[int, Bounds(4, 2_000)] = 68
    density: Annotated[float, Bounds(0, 1, above=True)] = 0.25
    cohort: CohortConfig = dataclasses.field(default_factory=CohortConfig)
    recovery: RecoveryConfig = dataclasses.field(default_factory=RecoveryConfig)
    seed: Seed = 0


def paper() -> Config:
    """As many regions and patients as the paper's cohort."""
    return Config(cohort=CohortConfig(subjects=216))


def smoke() -> Config:
    """Twenty patients and eight regions."""
    return Config(regions=8, density=0.4, cohort=CohortConfig(subjects=20))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a simulated cohort holds.

    Attributes:
        subjects: Patients.
        visits: Visits of all patients.
        regions: Their names.
        seeds: Regions where the disease starts.
        edges: Edges of the connectome.
        notes: What a user should know about it.
    """

    subjects: int
    visits: int
    regions: tuple[str, ...]
    seeds: tuple[str, ...]
    edges: int
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Simulate and write; the files lie in RUN/outputs as `jaxmed igndmoe fit` takes them."""
    clock, notes = Clock(), []
    if config.connectome is None:
        drawn = random_connectome(config.seed, config.regions, config.density).adjacency
        connectome = Connectome(Path("connectome.csv"), region_names(config.regions), drawn)
    else:
        connectome = read_connectome(config.connectome, config.data.graph, notes)
    regions, adjacency = connectome.regions, connectome.adjacency
    seeds = (0, (config.regions + 1) // 2)
    if config.seeds or config.connectome is not None:
        seeds = find_regions(config.seeds, connectome)
    log = begin(folder, notes)
    solver, ode = config.recovery.fit.solver, config.recovery.fit.ode
    cohort = simulate_cohort(jax.random.key(config.seed), adjacency, seeds, config.cohort, solver=solver, ode=ode)
    write_cohort(folder.outputs, config.seed, cohort, adjacency, regions, seeds, to_record(config.cohort))
    visits = int(cohort.visits.present.sum())
    log.say(f"{config.cohort.subjects} patients, {visits} visits, {len(regions)} regions, in {folder.outputs}")
    if config.recovery.visits:
        rows = _recover(config, adjacency, seeds, log)
        write_table(folder.outputs / "stage_recovery.csv", tuple(rows[0]), rows)
    log.metrics(0, {"subjects": config.cohort.subjects, "visits": visits})
    edges, starts = int(np.count_nonzero(np.triu(adjacency))), tuple(regions[index] for index in seeds)
    clock.lap("simulate, write and study")
    summary = Summary(config.cohort.subjects, visits, regions, starts, edges, tuple(notes))
    finish(folder, config, summary, clock, page)


def _recover(config: Config, adjacency: np.ndarray, seeds: tuple[int, ...], log: Log) -> list[dict[str, float]]:
    study, rows = config.recovery, []
    numbers = range(config.seed, config.seed + study.cohorts)
    planted_as = partial(plant_on, [adjacency] * study.cohorts, seeds, numbers)
    with log.progress("Recovering stages", len(study.visits), "numbers of visits", 0) as update:
        for done, visits in enumerate(study.visits, 1):
            rows += stage_curve(planted_as, config.cohort, study.fit, (visits,), study.irregularities)
            update(done, f"{visits} visits: Spearman {rows[-1]['spearman']:.3f}")
    return rows


def page(run: Finished[Config, Summary]) -> Page:
    """Show the planted course, its mechanisms and the patients."""
    summary, truth = run.summary, run.outputs / "truth"
    words = {"ylabel": "true regional amount, 0 to 1", "caption": "The planted course"}
    sections = [Section("Course", course_figures(truth / "course.csv", **words))]
    if run.config.cohort.mechanism == "moe":
        figure = stage_curves(truth / "weights.csv", None, "weight", "Planted weights of the mechanisms.")
        sections.append(Section("Mechanisms", [figure]))
    stages = {"stage": np.array(read_table(truth / "stages.csv").floats("stage"))}
    people = histograms(stages, units={"stage": "years"}, caption="True stages at the first visit.")
    sections.append(Section("Patients", [people]))
    if (run.outputs / "stage_recovery.csv").exists():
        study = run.config.recovery
        file, equation = run.outputs / "stage_recovery.csv", study.fit.model.equation
        sections.append(stage_recovery_section(file, study.cohorts, equation))
    text = Text([
        "RUN/outputs holds connectome.csv and visits.csv as jaxmed igndmoe fit takes them, and truth/ with stages, "
        "course and weights.",
        "The disease is an equation, not a patient: it tells whether a fit finds what was planted, not whether tau "
        "spreads this way.",
    ])  # fmt: skip
    sections.append(Section("How to use it", [*(Note(note) for note in summary.notes), text]))
    return Page(
        "A simulated cohort",
        f"{summary.subjects} patients of a disease that starts in {' and '.join(summary.seeds)}",
        [
            ("Patients", summary.subjects, "one to four visits each"),
            ("Visits", summary.visits, "with noise"),
            ("Regions", len(summary.regions), f"{summary.edges} connections"),
        ],
        sections,
    )
