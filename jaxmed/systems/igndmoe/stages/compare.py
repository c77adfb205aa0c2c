"""Stage `jaxmed igndmoe compare`: every model on the same folds, or models of spread against one regional map."""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmed.arrays.graphs import make_graph
from jaxmed.arrays.visits import count_values
from jaxmed.config import Size, checked
from jaxmed.errors import InputError
from jaxmed.io.tables import write_table
from jaxmed.metrics.statistics import holm, wilcoxon
from jaxmed.models.graph_diffusion import Equation, ProgressionConfig
from jaxmed.physics.agents import MOST_STEPS
from jaxmed.systems.igndmoe import maps
from jaxmed.systems.igndmoe.compare_page import write_page
from jaxmed.systems.igndmoe.comparing import ORDER, Held, choose, compare_models, criteria
from jaxmed.systems.igndmoe.job import DataConfig, Files, read_inputs, write_embedded
from jaxmed.systems.igndmoe.map_inputs import MapConfig, read_agents, read_map
from jaxmed.systems.igndmoe.options import FitConfig
from jaxmed.systems.igndmoe.reading import read_connectome
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start, write_summary


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Compare models.

    Attributes:
        connectome: CSV file: a square matrix with region names, or edges as source, target, weight.
        table: CSV file with a row per visit: subject, age in years, optionally split, a column for every region.
        seeds: Regions where the disease starts, by name; for tau the two entorhinal ones.
        data: How they are read, or embedded data.
        map: A regional map to explain, in place of visits.
        models: Of visits, by name.
        folds: Of cross-validation over subjects.
        starts: Runs per fold from different first weights.
        fit: Recipe that all models share.
    """

    connectome: Path | None = None
    table: Path | None = None
    seeds: tuple[str, ...] = ()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    map: MapConfig = dataclasses.field(default_factory=MapConfig)
    models: tuple[Equation, ...] = ORDER
    folds: Size = 10
    starts: Size = 3
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"folds: expected 2 or more, found {self.folds}")
        if self.starts < 1:
            raise ValueError(f"starts: expected 1 or more, found {self.starts}")
        if not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"models: expected different names, found {self.models}")

    @property
    def is_synthetic(self) -> bool:
        """Whether the data are generated: files given take their place, whatever the preset."""
        return self.data.embedded is not None and self.connectome is None and self.table is None


def paper() -> Config:
    """Ten folds, three starts, every model."""
    return Config()


def laptop() -> Config:
    """Five folds, every model, in minutes: of your cohort, or of a simulated one."""
    return Config(
        data=DataConfig(embedded=100, embedded_regions=20), folds=5, starts=1, fit=FitConfig(steps=40, loops=8)
    )


def smoke() -> Config:
    """Two folds and two models, in seconds: of your cohort, or of a small simulated one."""
    recipe = FitConfig(model=ProgressionConfig(width=8, latent=4), grid_steps=32, stages=64, steps=20, loops=2)
    return Config(data=DataConfig(embedded=40), models=("ndm", "fkpp"), folds=2, starts=1, fit=recipe)


def run(config: Config, folder: RunFolder) -> None:
    """Compare on a map or on visits."""
    if config.map.file is not None:
        _run_map(config, folder)
    else:
        _run_visits(config, folder)


report = write_page


def _finish(folder: RunFolder, log: Log, summary: dict[str, Any], began: float) -> None:
    for note in summary["notes"]:
        log.say(f"Note: {note}")
    summary |= {
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed igndmoe compare --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read, fit and score": time.monotonic() - began},
    }
    write_summary(folder, summary)
    write_page(folder.path)


# --- Visits -----------------------------------------------------------------------------------


def _run_visits(config: Config, folder: RunFolder) -> None:
    began, notes = time.monotonic(), []
    files = Files(config.connectome, config.table, config.seeds, config.data.scaling)
    if config.is_synthetic:
        start(folder)
        files = write_embedded(config.data, folder.path / "inputs", config.fit.seed)
    inputs = read_inputs(files, config.data, config.fit, notes)
    if len(inputs.cohort.subjects) < 2 * config.folds:
        found = f"{len(inputs.cohort.subjects)} for {config.folds} folds"
        raise InputError("folds", "two subjects or more in every fold", found, "lower --folds")
    start(folder)
    log = Log(folder.path, folder.options.quiet)
    visits = inputs.cohort.visits
    announce(
        log, f"Comparing on {config.folds} folds from {config.starts} starts each", batch=visits.values,
        count=len(config.models), unit="models", smaller=folder.smaller,
    )  # fmt: skip
    with log.progress("Comparing", len(config.models), "models", 0) as update:
        done = 0

        def on_model(held: Held) -> None:
            nonlocal done
            done += 1
            mse = float(np.nanmean([np.nan if row["mse"] is None else row["mse"] for row in held.rows]))
            log.metrics(done, {f"{held.model}/mse": mse})
            update(done, f"{held.model} {mse:.5f}")

        results = compare_models(
            visits, inputs.graph, inputs.seeds, config.fit, config.models, config.folds, config.starts, on_model
        )
    failed = [f"{held.model} {sum(1 - int(row['finite'] or 0) for row in held.rows)}" for held in results]
    failed = [text for text in failed if not text.endswith(" 0")]
    if failed:
        notes.append(f"Runs that ended in numbers that are not finite: {', '.join(failed)}.")
    rows = [{"model": held.model, **row} for held in results for row in held.rows]
    write_table(folder.outputs / "runs.csv", tuple(rows[0]), rows)
    values = int(np.asarray(count_values(visits)).sum())
    summary = {
        "kind": "visits",
        "subjects": len(inputs.cohort.subjects),
        "visits": int(np.asarray(visits.present).sum()),
        "models": [_describe(held, values, len(inputs.cohort.subjects)) for held in results],
        "tests": _tests(results),
        "chosen": choose(results),
        "notes": notes,
    }
    _finish(folder, log, summary, began)


def _describe(held: Held, values: int, subjects: int) -> dict[str, Any]:
    record: dict[str, Any] = {"model": held.model, "parameters": held.parameters}
    for name in ("sse", "r", "mse", "r2"):
        found = np.array([row[name] for row in held.rows if row[name] is not None], float)
        record[name] = float(found.mean()) if len(found) else None
        record[f"{name}_sd"] = float(found.std(ddof=1)) if len(found) > 1 else None
    record["aicc"], record["bic"] = criteria(held, values, subjects)
    return record


def _tests(results: list[Held]) -> list[dict[str, Any]]:
    """Compare each model with the best, subject by subject."""
    finite = [held for held in results if np.isfinite(held.subject_errors).all()]
    best = min(finite, key=lambda held: held.subject_errors.mean())
    others = [held for held in finite if held is not best]
    tests = [wilcoxon(held.subject_errors, best.subject_errors) for held in others]
    if not tests:
        return []
    adjusted = holm(np.array([test.p_value for test in tests]))
    return [
        {
            "model": held.model,
            "against": best.model,
            "difference": float(held.subject_errors.mean() - best.subject_errors.mean()),
            "p_holm": float(p),
        }
        for held, p in zip(others, adjusted, strict=True)
    ]


# --- One map ----------------------------------------------------------------------------------


def _run_map(config: Config, folder: RunFolder) -> None:
    began, notes = time.monotonic(), []
    if config.table is not None:
        raise InputError("map.file", "a map or a table of visits", "both", "drop one of them")
    connectome = read_connectome(config.connectome, config.data.graph, notes)
    columns = read_map(config.map, connectome, notes)
    target, known = columns["value"], np.isfinite(columns["value"])
    # Every seed's course by a matrix exponential.
    graph = make_graph(connectome.adjacency, config.fit.laplacian, is_sparse=False)
    agents = read_agents(config.map, connectome, columns, notes)
    start(folder)
    log = Log(folder.path, folder.options.quiet)
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
    keep(maps.score_fkpp(graph, target, known, None, config.fit))
    if config.map.weight is not None:
        log.say(f"Weighted FKPP with {len(maps.SHARES) * len(maps.STRENGTHS)} settings.")
        keep(maps.score_fkpp(graph, target, known, columns["weight"], config.fit))
    else:
        notes.append("Weighted FKPP is left out: no map of weights was given (--map.weight COLUMN).")
    if agents is not None:
        log.say(f"Agents: equilibrium, then {maps.AGENT_STEPS:,} steps from {len(target)} seeds.")
        found, steps = maps.score_agents(agents, target, known)
        settled = f"settled after {steps:,} steps" if steps < MOST_STEPS else f"had not settled after {steps:,} steps"
        notes.append(f"Normal agents {settled}.")
        keep(found)
    else:
        notes.append("Agents are left out: they need --map.lengths FILE and --map.size COLUMN.")
    with log.progress("Fitting the mixture", num_seeds, "seeds") as update:
        keep(maps.fit_mixture(config.fit, graph, target, known, scores[1].by_seed, num_seeds, update))
    rows = [
        {
            "region": name,
            "map": float(target[i]) if known[i] else "",
            **{f.model: float(f.predicted[i]) for f in scores},
        }
        for i, name in enumerate(connectome.regions)
    ]
    write_table(folder.outputs / "predictions.csv", tuple(rows[0]), rows)
    seeds = [
        {"seed": name, **{f.model: float(f.by_seed[i]) if np.isfinite(f.by_seed[i]) else "" for f in scores}}
        for i, name in enumerate(connectome.regions)
    ]
    write_table(folder.outputs / "seeds.csv", ("seed", *(found.model for found in scores)), seeds)
    count = int(known.sum())
    summary = {
        "kind": "map",
        "regions": list(connectome.regions),
        "scored": count,
        "models": [
            {
                "model": found.model,
                "r": found.r,
                "seed": connectome.regions[found.seed],
                "setting": found.setting,
                "parameters": found.parameters,
                "aicc": maps.aicc(found.r, count, found.parameters),
                "bic": maps.bic(found.r, count, found.parameters),
            }
            for found in scores
        ],
        "notes": notes,
    }
    _finish(folder, log, summary, began)
