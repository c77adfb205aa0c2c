"""Stage `jaxmed igndmoe simulate`: a cohort with planted mechanisms on a connectome, as CSV files with the truth."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from jaxmed.config import NonNegative, Number, Regions, Seed, Size, checked, to_record
from jaxmed.data.connectomes import Connectome, ConnectomeDataConfig, find_regions, read_connectome
from jaxmed.io.tables import read_table, write_table
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import curves, histograms
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.report.regions import glass_brain
from jaxmed.synthesis.phantoms.connectome import CohortConfig, random_connectome, simulate_cohort
from jaxmed.synthesis.phantoms.write_connectome import region_names, write_cohort
from jaxmed.systems.igndmoe.comparing import ATTRIBUTION, Planted, plant_on, stage_curve
from jaxmed.systems.igndmoe.dual import FitConfig
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder

MOST_CURVES = 10


@dataclasses.dataclass(frozen=True)
@checked
class RecoveryConfig:
    """How well could stages be recovered from such patients? Cohorts are simulated and fitted to find out.

    Attributes:
        visits: Numbers of visits per patient to try; none leaves the question out. Each takes fits: minutes.
        irregularities: Of the times between visits, from 0 (all equal) to below 1 (uniform from nearly nothing to
            twice the mean).
        cohorts: Per setting, with different patients.
        fit: Recipe and equation of the fits. FKPP by default, whatever the mechanism: the fastest that grows.
    """

    visits: tuple[Size, ...] = ()
    irregularities: tuple[NonNegative, ...] = (0.0, 0.5, 0.9)
    cohorts: Number = 4
    fit: FitConfig = dataclasses.field(
        default_factory=lambda: dataclasses.replace(
            ATTRIBUTION, model=dataclasses.replace(ATTRIBUTION.model, equation="fkpp"), steps=30, loops=8, patience=4
        )
    )

    def __post_init__(self) -> None:
        if any(count < 1 for count in self.visits):
            raise ValueError(f"visits: expected numbers of 1 or more, found {self.visits}")
        if not self.irregularities or not all(0 <= value < 1 for value in self.irregularities):
            raise ValueError(f"irregularities: expected values in [0, 1), found {self.irregularities}")
        if self.cohorts < 1:
            raise ValueError(f"cohorts: expected 1 or more, found {self.cohorts}")


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Simulate patients of one disease.

    Attributes:
        connectome: CSV file of a connectome; without it one is drawn on random points in two hemispheres.
        data: How the connectome is read.
        seeds: Regions where the disease starts; the first of each hemisphere on an embedded connectome.
        regions: Of the embedded connectome.
        density: Share of possible edges of the embedded connectome.
        cohort: Mechanisms and measurements.
        recovery: A study of how well stages are recovered, by visits per patient.
        seed: Of connectome, patients and noise.
    """

    connectome: Path | None = None
    data: ConnectomeDataConfig = dataclasses.field(default_factory=ConnectomeDataConfig)
    seeds: tuple[str, ...] = ()
    regions: Regions = 68
    density: float = 0.25
    cohort: CohortConfig = dataclasses.field(default_factory=CohortConfig)
    recovery: RecoveryConfig = dataclasses.field(default_factory=RecoveryConfig)
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.regions < 4:
            raise ValueError(f"regions: expected 4 or more, found {self.regions}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density: expected a share above 0 and at most 1, found {self.density:g}")


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
        visits: Of all patients.
        regions: Their names.
        seeds: Regions where the disease starts.
        edges: Of the connectome.
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
    clock = Clock()
    notes: list[str] = []
    if config.connectome is None:
        regions = region_names(config.regions)
        adjacency = random_connectome(config.seed, config.regions, config.density).adjacency
        drawn = Connectome(Path("connectome.csv"), regions, adjacency)
        seeds = find_regions(config.seeds, drawn) if config.seeds else (0, (config.regions + 1) // 2)
    else:
        connectome = read_connectome(config.connectome, config.data.graph, notes)
        regions, adjacency = connectome.regions, connectome.adjacency
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
    summary = Summary(config.cohort.subjects, visits, tuple(regions), starts, edges, tuple(notes))
    finish(folder, config, summary, clock, page)


def _recover(config: Config, adjacency: np.ndarray, seeds: tuple[int, ...], log: Log) -> list[dict[str, float]]:
    study, count = config.recovery, len(config.recovery.visits)
    numbers = range(config.seed, config.seed + study.cohorts)

    def planted_as(cohort: CohortConfig) -> Planted:
        return plant_on([adjacency] * study.cohorts, seeds, numbers, cohort)

    rows = []
    with log.progress("Recovering stages", count, "numbers of visits", 0) as update:
        for done, visits in enumerate(study.visits, 1):
            rows += stage_curve(planted_as, config.cohort, study.fit, (visits,), study.irregularities)
            update(done, f"{visits} visits: Spearman {rows[-1]['spearman']:.3f}")
    return rows


def page(run: Finished[Config, Summary]) -> Page:
    """Show the planted course, its mechanisms and the patients."""
    summary, truth = run.summary, run.outputs / "truth"
    regions = summary.regions
    course, weights = read_table(truth / "course.csv"), read_table(truth / "weights.csv")
    times = np.array(course.floats("stage"))
    states = np.array([course.floats(region) for region in regions])
    chosen = np.unique(np.linspace(0, len(regions) - 1, min(MOST_CURVES, len(regions))).astype(int))
    order = np.argsort(-states[:, len(times) // 2])
    figures = [
        curves(
            {regions[order[i]]: (times, states[order[i]]) for i in chosen},
            xlabel="stage (years)",
            ylabel="true regional amount, 0 to 1",
            caption="The planted course, in regions from early to late ones.",
        ),
        glass_brain(
            {f"stage {times[i]:.0f} years": states[:, i] for i in (len(times) // 3, len(times) - 1)},
            regions,
            None,
            caption="Amounts early and late; regions on a ring, since nothing says where they lie.",
        ),
    ]
    planted = {
        name.replace("_", " "): (np.array(weights.floats("stage")), np.array(weights.floats(name)))
        for name in weights.columns[1:]
    }
    stages = np.array(read_table(truth / "stages.csv").floats("stage"))
    people = [
        histograms({"stage": stages}, units={"stage": "years"}, caption="True stages at the first visit."),
    ]
    gates = curves(planted, xlabel="stage (years)", ylabel="weight", caption="Planted weights of the mechanisms.")
    sections = [Section("Course", figures)]
    if run.config.cohort.mechanism == "moe":
        sections.append(Section("Mechanisms", [gates]))
    sections.append(Section("Patients", people))
    if (run.outputs / "stage_recovery.csv").exists():
        sections.append(_recovery_section(run.outputs / "stage_recovery.csv", run.config.recovery))
    sections.append(_reading(summary))
    return Page(
        "A simulated cohort",
        f"{summary.subjects} patients of a disease that starts in {' and '.join(summary.seeds)}",
        [
            ("Patients", summary.subjects, "one to four visits each"),
            ("Visits", summary.visits, "with noise"),
            ("Regions", len(regions), f"{summary.edges} connections"),
        ],
        sections,
    )


def _recovery_section(file: Path, study: RecoveryConfig) -> Section:
    table = read_table(file)
    visits, irregularity = np.array(table.floats("visits")), np.array(table.floats("irregularity"))
    spearman, years = np.array(table.floats("spearman")), np.array(table.floats("years"))
    lowest = table.floats("lowest")
    kinds = np.unique(irregularity)
    # One visit has no gaps, and begins every line.
    rows = {kind: (irregularity == kind) | (visits == 1) for kind in kinds}
    by_kind = {f"irregularity {kind:g}": row for kind, row in rows.items()}
    caption = (
        f"Spearman's correlation of estimated with planted stages, mean of {study.cohorts} cohorts of this size, "
        f"fitted by {study.fit.model.equation}; gaps between visits are uniform on their mean times 1 plus or "
        "minus the irregularity."
    )
    figures = [
        curves({name: (visits[row], spearman[row]) for name, row in by_kind.items()}, xlabel="visits per patient",
               ylabel="Spearman's correlation", caption=caption),
        curves({name: (visits[row], years[row]) for name, row in by_kind.items()}, xlabel="visits per patient",
               ylabel="error of a stage, years", caption="Mean absolute error of the stage at the first visit."),
    ]  # fmt: skip
    cells = list(
        zip(visits.astype(int).tolist(), irregularity.tolist(), spearman.tolist(), lowest, years.tolist(), strict=True)
    )
    columns = ("Visits", "Irregularity", "Spearman", "Lowest cohort", "Error, years")
    return Section("How well stages are recovered", [*figures, Table(columns, cells, "The same in numbers.")])


def _reading(summary: Summary) -> Section:
    text = Text(
        [
            "RUN/outputs holds connectome.csv and visits.csv as jaxmed igndmoe fit takes them, and truth/ with stages, "
            "course and weights.",
            "The disease is an equation, not a patient: it tells whether a fit finds what was planted, not whether "
            "tau spreads this way.",
        ]
    )
    return Section("How to use it", [*(Note(note) for note in summary.notes), text])
