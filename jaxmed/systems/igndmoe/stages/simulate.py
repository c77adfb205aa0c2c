"""Stage `jaxmed igndmoe simulate`: a cohort with planted mechanisms on a connectome, as CSV files with the truth."""

import dataclasses
import shlex
import time
from pathlib import Path

import jax
import numpy as np

from jaxmed.config import NonNegative, Number, Regions, Seed, Size, checked, to_record
from jaxmed.io.tables import write_table
from jaxmed.synthesis.phantoms.connectome import CohortConfig, random_connectome, simulate_cohort
from jaxmed.synthesis.phantoms.write_connectome import region_names, write_cohort
from jaxmed.systems.igndmoe.options import ATTRIBUTION, FitConfig
from jaxmed.systems.igndmoe.reading import Connectome, ConnectomeDataConfig, find_regions, read_connectome
from jaxmed.systems.igndmoe.recovery import Planted, plant_on, stage_curve
from jaxmed.systems.igndmoe.simulate_page import write_page
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start, write_summary


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


def run(config: Config, folder: RunFolder) -> None:
    """Simulate and write; the files lie in RUN/outputs as `jaxmed igndmoe fit` takes them."""
    began = time.monotonic()
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
    start(folder)
    log = Log(folder.path, folder.options.quiet)
    for note in notes:
        log.say(f"Note: {note}")
    cohort = simulate_cohort(jax.random.key(config.seed), adjacency, seeds, config.cohort)
    write_cohort(folder.outputs, config.seed, cohort, adjacency, regions, seeds, to_record(config.cohort))
    visits = int(cohort.visits.present.sum())
    log.say(f"{config.cohort.subjects} patients, {visits} visits, {len(regions)} regions, in {folder.outputs}")
    if config.recovery.visits:
        rows = _recover(config, adjacency, seeds, log)
        write_table(folder.outputs / "stage_recovery.csv", tuple(rows[0]), rows)
    summary = {
        "subjects": config.cohort.subjects,
        "visits": visits,
        "regions": list(regions),
        "seeds": [regions[index] for index in seeds],
        "edges": int(np.count_nonzero(np.triu(adjacency))),
        "notes": notes,
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed igndmoe simulate --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"simulate, write and study": time.monotonic() - began},
    }
    write_summary(folder, summary)
    log.metrics(0, {"subjects": config.cohort.subjects, "visits": visits})
    write_page(folder.path)


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


report = write_page
