"""Models of spread compared on held-out subjects of a cohort, or on one regional map: numbers, the choice, the page."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from jaxmed.arrays.graphs import LaplacianKind, make_graph
from jaxmed.data.connectomes import read_connectome
from jaxmed.errors import InputError
from jaxmed.io.tables import read_table, write_table
from jaxmed.metrics.statistics import information_criteria
from jaxmed.physics.agents import MOST_STEPS
from jaxmed.recipes import regional_map as maps
from jaxmed.recipes.regional import CohortSource
from jaxmed.recipes.stage import begin
from jaxmed.recipes.study import Failure, Result, Value
from jaxmed.recipes.study_sections import failed_cells
from jaxmed.recipes.study_tables import Difference, Mean, collect, compare, summarise
from jaxmed.report.figures import Bar, bars
from jaxmed.report.page import Section, Table, Tile
from jaxmed.report.regions import glass_brain
from jaxmed.report.scatter import scatter
from jaxmed.solvers.ode import OdeConfig, Solver
from jaxmed.train.announce import announce
from jaxmed.train.run_folder import RunFolder

MEASURES = ("sse", "r", "mse", "r2")
"""Of a run; see `metrics.regional.score_regions`."""
MOST_SEEDS = 10
Row: TypeAlias = dict[str, str | int | float | None]
Shown: TypeAlias = tuple[list[Tile], list[Section], list[str]]
"""Tiles, sections, and how to read them."""


# --- Held-out subjects --------------------------------------------------------------------------


def tabulate(
    results: Sequence[Result], subjects: int, seed: int, order: Sequence[str]
) -> tuple[list[Mean], tuple[Difference, ...], str]:
    """Return means of the runs' measures, tests of every model against the best, and the model to choose.

    Args:
        results: By model, fold and start: metrics of `MEASURES`, "parameters" and "finite", and a row with the "error"
            of every held-out subject. Models that have a run that is not finite are not tested.
        subjects: How many there are.
        seed: Seed for resampling them.
        order: Models, from what is understood to what is only fitted.
    """
    measures = [name for name in ("parameters", *MEASURES) if any(name in result.metrics for result in results)]
    means = [row for name in measures for row in summarise(results, ("model",), name)]
    parameters = {str(row.group[0][1]): round(row.mean) for row in means if row.measure == "parameters"}
    errors = {}
    for model in parameters:
        own = [result for result in results if result.cell["model"] == model]
        if all(result.metrics["finite"] for result in own):
            (found,) = collect(own, (), "error", is_per_subject=True).values()
            errors |= {model: np.array([*found.values()])} if len(found) == subjects else {}
    best, chosen = choose(errors, parameters, order)
    finite = [result for result in results if result.cell["model"] in errors]
    return means, compare(finite, (), best, "error", arm="model", seed=seed, test="wilcoxon"), chosen


def choose(
    errors: Mapping[str, Float[np.ndarray, " subject"]], parameters: Mapping[str, int], order: Sequence[str]
) -> tuple[str, str]:
    """Return the model of the lowest held-out error, and the simplest within one standard error of it.

    The simplest has the fewest parameters; the standard error is that of the best model's mean over subjects.

    Args:
        errors: Mean squared error of every subject when held out, by model; one that is not finite is not chosen.
        parameters: Of each model.
        order: Which of two with as many parameters is the simpler.

    Source: the rule of Breiman et al. 1984, section 3.4.3.
    """
    means = {model: found.mean() for model, found in errors.items() if np.isfinite(found).all()}
    best = min(means, key=lambda model: means[model])
    limit = means[best] + errors[best].std(ddof=1) / np.sqrt(len(errors[best]))
    good = [model for model, mean in means.items() if mean <= limit]
    return best, min(good, key=lambda model: (parameters[model], [*order].index(model)))


def describe(means: Sequence[Mean], values: int, subjects: int) -> tuple[Row, ...]:
    """Return a row per model: its measures with their spread, and criteria for so many values of so many subjects."""
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
    return (*models.values(),)


def held_out_sections(
    rows: Sequence[Row], tests: Sequence[Row], chosen: str, subjects: int, visits: int, failures: Sequence[Failure]
) -> Shown:
    """Show what `describe` and `tabulate` found, and which cells failed."""
    models = [dict[str, Any](row) for row in rows]
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
        Table(("Model", "Against the best", "Difference in MSE", "p, Holm"), [[*t.values()] for t in tests],
              "Wilcoxon's signed-rank test over subjects, corrected for the number of models."),
    ]  # fmt: skip
    tiles: list[Tile] = [
        ("Chosen", chosen, "the simplest within one standard error of the best"),
        ("Models", len(models), "on the same folds"),
        ("Subjects", subjects, f"{visits} visits"),
    ]
    reading = (
        "outputs/cells.csv has a row per model, fold and start. A subject held out is staged with all of its visits "
        "before it is scored, as in the paper: this measures the shape of a course, not a forecast."
    )
    return tiles, [Section("Held-out errors", blocks), *failed_cells(failures)], [reading]


# --- One map ------------------------------------------------------------------------------------


def compare_on_map(
    source: CohortSource,
    config: maps.MapConfig,
    laplacian: LaplacianKind,
    solving: tuple[Solver, OdeConfig],
    mixture: Callable[..., maps.MapScore],
    folder: RunFolder,
    notes: list[str],
) -> tuple[tuple[Row, ...], int]:
    """Score every model of spread from every seed on one map, and write predictions.csv and seeds.csv.

    Args:
        source: Its connectome; there may be no table.
        config: The map.
        laplacian: Kind of the graph's Laplacian.
        solving: How equations are solved.
        mixture: (graph, map, where it is known, preference of every seed, seeds to try, progress) -> the score of the
            model that is fitted.
        folder: Folder of the run, which is begun when all is read.
        notes: What a reader must know is added.

    Returns:
        A row per model, and how many regions have a value.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    if source.table is not None:
        raise InputError("map.file", "a map or a table of visits", "both", "drop one of them")
    connectome = read_connectome(source.connectome, source.data.graph, notes)
    columns = maps.read_map(config, connectome, notes)
    target, known = columns["value"], np.isfinite(columns["value"])
    # Every seed's course by a matrix exponential.
    graph = make_graph(connectome.adjacency, laplacian, is_sparse=False)
    agents = maps.read_agents(config, connectome, columns, notes)
    if config.weight is None:
        notes.append("Weighted FKPP is left out: no map of weights was given (--map.weight COLUMN).")
    if agents is None:
        notes.append("Agents are left out: they need --map.lengths FILE and --map.size COLUMN.")
    log = begin(folder, notes)
    num_seeds = min(config.mixture_seeds or len(target), len(target))
    total = 3 + (config.weight is not None) + (agents is not None)
    announce(log, f"Fitting a map of {len(target)} regions, from every seed", count=total, unit="models")
    scores: list[maps.MapScore] = []

    def keep(found: maps.MapScore) -> None:
        scores.append(found)
        # The map itself chose seed, time and parameters.
        log.say(f"{found.model}: r = {found.r:.3f} in sample, from {connectome.regions[found.seed]}")
        log.metrics(len(scores), {f"{found.model}/r": found.r})

    log.say(f"Network diffusion from {len(target)} seeds, then FKPP with {len(maps.SHARES)} shares of diffusion.")
    keep(maps.score_diffusion(graph, target, known))
    keep(maps.score_fkpp(graph, target, known, None, *solving))
    if config.weight is not None:
        log.say(f"Weighted FKPP with {len(maps.SHARES) * len(maps.STRENGTHS)} settings.")
        keep(maps.score_fkpp(graph, target, known, columns["weight"], *solving))
    if agents is not None:
        log.say(f"Agents: equilibrium, then {maps.AGENT_STEPS:,} steps from {len(target)} seeds.")
        found, steps = maps.score_agents(agents, target, known)
        settled = f"settled after {steps:,} steps" if steps < MOST_STEPS else f"had not settled after {steps:,} steps"
        notes.append(f"Normal agents {settled}.")
        log.say(f"Note: {notes[-1]}")
        keep(found)
    with log.progress("Fitting the mixture", num_seeds, "seeds") as update:
        keep(mixture(graph, target, known, scores[1].by_seed, num_seeds, update))
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
    return tuple(models), count


def map_sections(outputs: Path, rows: Sequence[Row], scored: int) -> Shown:
    """Show what `compare_on_map` found; the last model is the one that was fitted."""
    models: list[Any] = list(rows)
    columns = ("Model", "r", "Seed", "At", "Fitted numbers", "AICc", "BIC")
    cells = [(m["model"], m["r"], m["seed"], m["setting"], m["parameters"], m["aicc"], m["bic"]) for m in models]
    caption = (
        f"Pearson's r over {scored} regions, the best of all seeds, times and settings: in sample. Criteria "
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
    sections = [Section("Models", [Table(columns, cells, caption), figure]), Section("Regions", [brain, seed_bars])]
    return tiles, sections, reading


def _unit(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (np.ptp(values) or 1.0)
