"""Stage `jaxmed igndmoe compare`: every model on the same folds, or models of spread against one regional map."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from jaxmed.arrays.graphs import make_graph
from jaxmed.arrays.visits import count_values
from jaxmed.config import Bounds, Size, checked
from jaxmed.data.connectomes import read_connectome
from jaxmed.errors import InputError
from jaxmed.io.tables import read_table, write_table
from jaxmed.metrics.statistics import information_criteria
from jaxmed.models.graph_diffusion import Equation, ProgressionConfig
from jaxmed.physics.agents import MOST_STEPS
from jaxmed.recipes import regional_map as maps
from jaxmed.recipes.regional import CohortSource, SourceFlags, synthetic
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.study import Cell, Outcome, Value, make_cells, read_study, run_study
from jaxmed.recipes.study_sections import failed_cells
from jaxmed.recipes.study_tables import Mean, write_tables
from jaxmed.report.figures import Bar, bars
from jaxmed.report.page import Note, Section, Table, Text, Tile
from jaxmed.report.regions import glass_brain
from jaxmed.report.scatter import scatter
from jaxmed.systems.igndmoe.cohort_fit import read_inputs
from jaxmed.systems.igndmoe.comparing import ORDER, hold_out, tabulate
from jaxmed.systems.igndmoe.dual import FitConfig
from jaxmed.systems.igndmoe.fitting import fit_map
from jaxmed.train.announce import announce
from jaxmed.train.run_folder import RunFolder

MOST_SEEDS = 10
Row = dict[str, str | int | float | None]


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
    map: maps.MapConfig = dataclasses.field(default_factory=maps.MapConfig)
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


# --- Visits -----------------------------------------------------------------------------------


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
    means, tests, chosen = tabulate(done.results, count, config.fit.seed)
    write_tables(folder.outputs, done.results, means, tests)
    return Summary(
        "visits",
        tuple(_describe(means, int(np.asarray(count_values(visits)).sum()), count)),
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


def _describe(means: Sequence[Mean], values: int, subjects: int) -> list[Row]:
    models: dict[Value, Row] = {}
    for row in means:
        record = models.setdefault(row.group[0][1], {"model": str(row.group[0][1])})
        record[row.measure] = row.mean
        record[f"{row.measure}_sd"] = None if row.error is None else row.error * math.sqrt(row.count)
    for record in models.values():
        mse, parameters = record.get("mse"), round(float(record["parameters"] or 0))
        # The stages of the subjects and the variance are fitted too.
        aicc, bic = (None, None) if mse is None else information_criteria(float(mse), values, parameters + subjects + 1)
        record |= {"parameters": parameters, "aicc": aicc, "bic": bic}
    return [*models.values()]


# --- One map ----------------------------------------------------------------------------------


def _on_map(config: Config, folder: RunFolder) -> Summary:
    notes: list[str] = []
    if config.source.table is not None:
        raise InputError("map.file", "a map or a table of visits", "both", "drop one of them")
    connectome = read_connectome(config.source.connectome, config.source.data.graph, notes)
    columns = maps.read_map(config.map, connectome, notes)
    target, known = columns["value"], np.isfinite(columns["value"])
    # Every seed's course by a matrix exponential.
    graph = make_graph(connectome.adjacency, config.fit.laplacian, is_sparse=False)
    agents = maps.read_agents(config.map, connectome, columns, notes)
    if config.map.weight is None:
        notes.append("Weighted FKPP is left out: no map of weights was given (--map.weight COLUMN).")
    if agents is None:
        notes.append("Agents are left out: they need --map.lengths FILE and --map.size COLUMN.")
    log = begin(folder, notes)
    num_seeds = min(config.map.mixture_seeds or len(target), len(target))
    total = 3 + (config.map.weight is not None) + (agents is not None)
    announce(log, f"Fitting a map of {len(target)} regions, from every seed", count=total, unit="models")
    scores: list[maps.MapScore] = []

    def keep(found: maps.MapScore) -> None:
        scores.append(found)
        # The map itself chose seed, time and parameters.
        log.say(f"{found.model}: r = {found.r:.3f} in sample, from {connectome.regions[found.seed]}")
        log.metrics(len(scores), {f"{found.model}/r": found.r})

    log.say(f"Network diffusion from {len(target)} seeds, then FKPP with {len(maps.SHARES)} shares of diffusion.")
    keep(maps.score_diffusion(graph, target, known))
    keep(maps.score_fkpp(graph, target, known, None, config.fit.solver, config.fit.ode))
    if config.map.weight is not None:
        log.say(f"Weighted FKPP with {len(maps.SHARES) * len(maps.STRENGTHS)} settings.")
        keep(maps.score_fkpp(graph, target, known, columns["weight"], config.fit.solver, config.fit.ode))
    if agents is not None:
        log.say(f"Agents: equilibrium, then {maps.AGENT_STEPS:,} steps from {len(target)} seeds.")
        found, steps = maps.score_agents(agents, target, known)
        settled = f"settled after {steps:,} steps" if steps < MOST_STEPS else f"had not settled after {steps:,} steps"
        notes.append(f"Normal agents {settled}.")
        log.say(f"Note: {notes[-1]}")
        keep(found)
    with log.progress("Fitting the mixture", num_seeds, "seeds") as update:
        keep(fit_map(config.fit, graph, target, known, scores[1].by_seed, num_seeds, update))
    for file, first, column in (("predictions.csv", "region", "predicted"), ("seeds.csv", "seed", "by_seed")):
        curves = {found.model: getattr(found, column) for found in scores}
        curves = {"map": target, **curves} if first == "region" else curves
        rows = [
            {first: name} | {key: float(v[i]) if np.isfinite(v[i]) else "" for key, v in curves.items()}
            for i, name in enumerate(connectome.regions)
        ]
        write_table(folder.outputs / file, tuple(rows[0]), rows)
    count = int(known.sum())
    models: list[Row] = []
    for found in scores:
        aicc, bic = information_criteria(1 - found.r**2, count, found.parameters)
        row: Row = {"model": found.model, "r": found.r, "seed": connectome.regions[found.seed]}
        models.append(row | {"setting": found.setting, "parameters": found.parameters, "aicc": aicc, "bic": bic})
    return Summary("map", tuple(models), tuple(notes), scored=count)


# --- The page -----------------------------------------------------------------------------------


def page(run: Finished[Config, Summary]) -> Page:
    """Show every model, and which is chosen."""
    summary = run.summary
    is_map = summary.kind == "map"
    tiles, sections, reading = _map(run.outputs, summary) if is_map else _visits(run)
    sections.append(Section("How to read it", [*(Note(note) for note in summary.notes), Text(reading)]))
    subtitle = "Against one regional map" if is_map else "On the same folds of a cohort"
    return Page("Models of spread, compared", subtitle, tiles, sections)


def _visits(run: Finished[Config, Summary]) -> tuple[list[Tile], list[Section], list[str]]:
    summary, models = run.summary, [dict[str, Any](model) for model in run.summary.models]
    columns = {
        "model": "Model", "parameters": "Parameters", "sse": "SSE", "sse_sd": "sd", "r": "R", "r_sd": "sd",
        "mse": "MSE", "r2": "R2", "aicc": "AICc", "bic": "BIC",
    }  # fmt: skip
    shown = [
        Bar(m["model"], m["sse"], m["sse"] - (m["sse_sd"] or np.nan), m["sse"] + (m["sse_sd"] or np.nan))
        for m in models if "sse" in m
    ]  # fmt: skip
    blocks = [
        Table([*columns.values()], [[m.get(name) for name in columns] for m in models],
              "Held-out subjects, staged with all their visits; mean and spread over folds and starts, values on "
              "[0, 1]."),
        bars(shown, xlabel="SSE of held-out subjects per fold", caption="Squared error, with the spread of runs."),
        Table(("Model", "Against the best", "Difference in MSE", "p, Holm"), [[*t.values()] for t in summary.tests],
              "Wilcoxon's signed-rank test over subjects, corrected for the number of models."),
    ]  # fmt: skip
    tiles: list[Tile] = [
        ("Chosen", summary.chosen, "the simplest within one standard error of the best"),
        ("Models", len(models), "on the same folds"),
        ("Subjects", summary.subjects, f"{summary.visits} visits"),
    ]
    reading = (
        "outputs/cells.csv has a row per model, fold and start. A subject held out is staged with all of its visits "
        "before it is scored, as in the paper: this measures the shape of a course, not a forecast."
    )
    return tiles, [Section("Held-out errors", blocks), *failed_cells(read_study(run.path).failures)], [reading]


def _map(outputs: Path, summary: Summary) -> tuple[list[Tile], list[Section], list[str]]:
    models: list[Any] = list(summary.models)
    columns = ("Model", "r", "Seed", "At", "Fitted numbers", "AICc", "BIC")
    rows = [(m["model"], m["r"], m["seed"], m["setting"], m["parameters"], m["aicc"], m["bic"]) for m in models]
    caption = (
        f"Pearson's r over {summary.scored} regions, the best of all seeds, times and settings: in sample. Criteria "
        "count all of these as fitted, and are not defined where regions are no more than fitted numbers + 1."
    )
    table = read_table(outputs / "predictions.csv")
    known = np.array([cell != "" for cell in table.column("map")])
    measured = np.array(table.floats("map", allow_missing=True))[known]
    points = {}
    scaled = {"map": _unit(measured)}
    for model in models:
        predicted = np.array(table.floats(model["model"]))[known]
        points[f"{model['model']}, r = {model['r']:.2f}"] = np.stack([_unit(predicted), _unit(measured)], axis=1)
        scaled[model["model"]] = _unit(predicted)
    names = [name for name, keep in zip(table.column("region"), known, strict=True) if keep]
    best = max(models[:-1], key=lambda m: m["r"])
    figure = scatter(
        points, xlabel="predicted, scaled to [0, 1]", ylabel="map, scaled to [0, 1]",
        caption="Every region, each model at its best seed and time.",
    )  # fmt: skip
    brain = glass_brain(
        {name: scaled[name] for name in ("map", best["model"])}, names, None,
        caption="The map and the best model that tries every seed, scaled to [0, 1]; regions on a ring.",
    )  # fmt: skip
    seeds = read_table(outputs / "seeds.csv")
    values = np.array(seeds.floats(best["model"]))
    ranked = np.argsort(-values)[:MOST_SEEDS]
    seed_bars = bars(
        [Bar(seeds.column("seed")[i], float(values[i])) for i in ranked],
        xlabel="Pearson's r",
        caption=f"The best seeds of {best['model']}.",
    )
    # With more numbers than regions any map is fitted: not a figure to stand beside the others without saying so.
    said = [f"from {m['seed']}" if m["aicc"] is not None else f"in sample, {m['parameters']} numbers" for m in models]
    tiles: list[Tile] = [(m["model"], m["r"], f"r, {text}") for m, text in zip(models, said, strict=True)]
    reading = [
        "outputs/predictions.csv has every model's map, seeds.csv the best correlation from every seed.",
        "One map cannot tell mechanisms apart: the mixture has more numbers than regions and fits in sample what it is "
        "given. What is comparable is the models that try every seed with a handful of numbers.",
    ]
    sections = [Section("Models", [Table(columns, rows, caption), figure]), Section("Regions", [brain, seed_bars])]
    return tiles, sections, reading


def _unit(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (np.ptp(values) or 1.0)
