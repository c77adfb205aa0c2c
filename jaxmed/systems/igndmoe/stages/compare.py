"""Stage `jaxmed igndmoe compare`: every model on the same folds, or models of spread against one regional map."""

import dataclasses
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np

from jaxmed.arrays.visits import count_values
from jaxmed.config import Bounds, Size, checked
from jaxmed.errors import InputError
from jaxmed.models.graph_diffusion import Equation, ProgressionConfig
from jaxmed.recipes.regional import CohortSource, SourceFlags, synthetic
from jaxmed.recipes.regional_map import MapConfig
from jaxmed.recipes.regional_study import Row, compare_on_map, describe, held_out_sections, map_sections, tabulate
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.study import Cell, Outcome, make_cells, read_study, run_study
from jaxmed.recipes.study_tables import write_tables
from jaxmed.report.page import Note, Section, Text
from jaxmed.systems.igndmoe.cohort_fit import read_inputs
from jaxmed.systems.igndmoe.comparing import ORDER, hold_out
from jaxmed.systems.igndmoe.dual import FitConfig
from jaxmed.systems.igndmoe.fitting import fit_map
from jaxmed.train.announce import announce
from jaxmed.train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Compare models.

    Attributes:
        source: The cohort, or its connectome beside a map.
        map: A regional map to explain, in place of visits.
        models: Of visits, by name.
        folds: Of cross-validation over subjects.
        starts: Runs per fold from different first weights.
        fit: Recipe that all models share.
    """

    source: SourceFlags = dataclasses.field(default_factory=CohortSource)
    map: MapConfig = dataclasses.field(default_factory=MapConfig)
    models: tuple[Equation, ...] = ORDER
    folds: Annotated[int, Bounds(2, 65_536)] = 10
    starts: Size = 3
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        if not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"models: expected different names, found {self.models}")


def paper() -> Config:
    """Ten folds, three starts, every model."""
    return Config()


def laptop() -> Config:
    """Five folds, every model, in minutes: of your cohort, or of a simulated one."""
    return Config(synthetic(100, 20), folds=5, starts=1, fit=FitConfig(steps=40, loops=8))


def smoke() -> Config:
    """Two folds and two models, in seconds: of your cohort, or of a small simulated one."""
    recipe = FitConfig(model=ProgressionConfig(width=8, latent=4), grid_steps=32, stages=64, steps=20, loops=2)
    return Config(synthetic(40), models=("ndm", "fkpp"), folds=2, starts=1, fit=recipe)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a comparison found.

    Attributes:
        kind: What models were compared on.
        models: A row per model.
        notes: What a reader should know.
        subjects: Of a table of visits.
        visits: Of all of them.
        tests: Of each model against the best.
        chosen: The simplest that is good enough.
        scored: Regions of a map that have a value.
        failed: Runs that broke off.
    """

    kind: Literal["visits", "map"]
    models: tuple[Row, ...]
    notes: tuple[str, ...]
    subjects: int = 0
    visits: int = 0
    tests: tuple[Row, ...] = ()
    chosen: str = ""
    scored: int = 0
    failed: int = 0


def run(config: Config, folder: RunFolder) -> int:
    """Compare on a map or on visits. Returns 1 when runs of a model failed."""
    clock, work = Clock(), _on_visits if config.map.file is None else _on_map
    summary = work(config, folder)
    clock.lap("read, fit and score")
    finish(folder, config, summary, clock, page)
    return int(bool(summary.failed))


def _on_map(config: Config, folder: RunFolder) -> Summary:
    notes: list[str] = []
    fit, mixture = config.fit, partial(fit_map, config.fit)
    solving = fit.solver, fit.ode
    models, scored = compare_on_map(config.source, config.map, fit.laplacian, solving, mixture, folder, notes)
    return Summary("map", models, tuple(notes), scored=scored)


def _on_visits(config: Config, folder: RunFolder) -> Summary:
    notes: list[str] = []
    inputs = read_inputs(config.source, config.fit, folder, notes)
    visits, count = inputs.cohort.visits, len(inputs.cohort.subjects)
    if count < 2 * config.folds:
        found = f"{count} for {config.folds} folds"
        raise InputError("folds", "two subjects or more in every fold", found, "lower --folds")
    log = begin(folder, notes)
    announce(
        log, f"Comparing on {config.folds} folds from {config.starts} starts each", batch=visits.values,
        count=len(config.models), unit="models", smaller=folder.smaller,
    )  # fmt: skip
    fitted: dict[str, dict[tuple[int, int], Outcome]] = {}

    def run_cell(cell: Cell) -> Outcome:
        model: Any = cell["model"]
        if model not in fitted:
            fitted[model] = found = hold_out(
                visits, inputs.cohort.subjects, inputs.graph, inputs.seeds, config.fit, model, config.folds,
                config.starts,
            )  # fmt: skip
            defined = [one.metrics["mse"] for one in found.values() if "mse" in one.metrics]
            log.metrics(len(fitted), {f"{model}/mse": float(np.mean(defined))})
        return fitted[model][int(cell["fold"]), int(cell["start"])]

    axes = {"model": config.models, "fold": tuple(range(config.folds)), "start": tuple(range(config.starts))}
    done = run_study(make_cells(axes), run_cell, folder.path, config, log=log)
    ended = [str(result.cell["model"]) for result in done.results if not result.metrics["finite"]]
    if ended:
        told = ", ".join(f"{model} {ended.count(model)}" for model in dict.fromkeys(ended))
        notes.append(f"Runs that ended in numbers that are not finite: {told}.")
        log.say(f"Note: {notes[-1]}")
    means, tests, chosen = tabulate(done.results, count, config.fit.seed, ORDER)
    write_tables(folder.outputs, done.results, means, tests)
    return Summary(
        "visits",
        describe(means, int(np.asarray(count_values(visits)).sum()), count),
        tuple(notes),
        subjects=count,
        visits=int(np.asarray(visits.present).sum()),
        tests=tuple(
            {"model": row.arm, "against": row.baseline, "difference": row.difference, "p_holm": row.p_corrected}
            for row in tests
        ),
        chosen=chosen,
        failed=len(done.failures),
    )


def page(run: Finished[Config, Summary]) -> Page:
    """Show every model, and which is chosen."""
    summary = run.summary
    is_map = summary.kind == "map"
    if is_map:
        tiles, sections, reading = map_sections(run.outputs, summary.models, summary.scored)
    else:
        told, counts = (summary.models, summary.tests, summary.chosen), (summary.subjects, summary.visits)
        tiles, sections, reading = held_out_sections(*told, *counts, read_study(run.path).failures)
    sections.append(Section("How to read it", [*(Note(note) for note in summary.notes), Text(reading)]))
    subtitle = "Against one regional map" if is_map else "On the same folds of a cohort"
    return Page("Models of spread, compared", subtitle, tiles, sections)
