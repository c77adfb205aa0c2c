"""Stage `jaxmed igndmoe compare`: every model on the same folds, or models of spread against one regional map."""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.arrays.graphs import GraphOperators, graph_operators, mirror_triangle
from jaxmed.arrays.visits import count_values, pad_visits
from jaxmed.errors import InputError, nearest
from jaxmed.io.connectomes import order_by_name, read_square
from jaxmed.io.tables import read_table, write_table
from jaxmed.metrics.statistics import holm, wilcoxon
from jaxmed.models.graph_diffusion import Equation, ProgressionConfig
from jaxmed.physics.agents import STEP, AgentGraph, make_agent_graph
from jaxmed.systems.igndmoe import maps
from jaxmed.systems.igndmoe.compare_page import write_page
from jaxmed.systems.igndmoe.comparing import ORDER, Held, choose, compare_models, criteria
from jaxmed.systems.igndmoe.fitting import fit
from jaxmed.systems.igndmoe.job import DataConfig, Files, read_inputs, write_embedded
from jaxmed.systems.igndmoe.measures import row_correlations
from jaxmed.systems.igndmoe.options import FitConfig
from jaxmed.systems.igndmoe.reading import Connectome, read_connectome
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start, write_summary


@dataclasses.dataclass(frozen=True)
class MapConfig:
    """One regional map, in place of a table of visits.

    Attributes:
        file: CSV file with a row per region.
        region: Column of region names; regions of the connectome that are not in the file are not scored.
        value: Column of the map.
        more_is: "worse" where large values mean more disease, "better" where they mean less, as in effect sizes of
            thickness.
        weight: Column, on [0, 1], that modulates growth in weighted FKPP; none leaves that model out.
        size: Column of region sizes in voxels, for agents.
        synthesis: Column of the expression of the gene that makes the protein, for agents; standardised over regions.
        clearance: Column of the expression of the gene that clears it, likewise.
        lengths: File of connection lengths in mm, in every form that a connectome may have; without names in its
            order. None leaves agents out.
        mixture_seeds: Seeds from which the mixture is fitted, the best of FKPP first; 0 for every region. The other
            models always try every seed.
    """

    file: Path | None = None
    region: str = "region"
    value: str = "value"
    more_is: Literal["worse", "better"] = "worse"
    weight: str | None = None
    size: str | None = None
    synthesis: str | None = None
    clearance: str | None = None
    lengths: Path | None = None
    mixture_seeds: int = 5

    def __post_init__(self) -> None:
        if self.mixture_seeds < 0:
            raise ValueError(f"mixture_seeds: expected 0 or more, found {self.mixture_seeds}")


@dataclasses.dataclass(frozen=True)
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
    folds: int = 10
    starts: int = 3
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
    columns = _read_map(config.map, connectome, notes)
    target, known = columns["value"], np.isfinite(columns["value"])
    # Every seed's course by a matrix exponential.
    graph = graph_operators(connectome.adjacency, config.fit.laplacian, is_sparse=False)
    agents = _agents(config.map, connectome, columns, notes)
    start(folder)
    log = Log(folder.path, folder.options.quiet)
    count = config.map.mixture_seeds or len(target)
    announce(log, f"Fitting one map of {len(target)} regions; the mixture", count=count, unit="seeds")
    scores = [maps.score_diffusion(graph, target, known), maps.score_fkpp(graph, target, known)]
    if config.map.weight is not None:
        scores.append(maps.score_fkpp(graph, target, known, columns["weight"]))
    else:
        notes.append("Weighted FKPP is left out: no map of weights was given (--map.weight COLUMN).")
    if agents is not None:
        scores.append(maps.score_agents(agents, target, known))
    else:
        notes.append("Agents are left out: they need --map.lengths FILE and --map.size COLUMN.")
    scores.append(_fit_mixture(config.fit, graph, target, known, scores[1], config.map.mixture_seeds))
    for done, found in enumerate(scores, 1):
        log.say(f"{found.model}: r = {found.r:.3f} from {connectome.regions[found.seed]}")
        log.metrics(done, {f"{found.model}/r": found.r})
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


def _read_map(config: MapConfig, connectome: Connectome, notes: list[str]) -> dict[str, np.ndarray]:
    assert config.file is not None
    table = read_table(config.file, (config.region,))
    names = table.column(config.region)
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise InputError(config.file, "one row per region", f"'{doubles[0]}' twice")
    unknown = [name for name in names if name not in connectome.regions]
    if len(unknown) == len(names):
        found = f"'{unknown[0]}' and others"
        raise InputError(config.file, "regions of the connectome", found, nearest(unknown[0], connectome.regions))
    if unknown:
        notes.append(f"Rows that are no region of the connectome are not used: {', '.join(unknown)}.")
    place = {name: index for index, name in enumerate(names)}
    wanted = {"value": config.value, "weight": config.weight, "size": config.size}
    wanted |= {"synthesis": config.synthesis, "clearance": config.clearance}
    columns = {}
    for key, column in wanted.items():
        if column is None:
            continue
        values = np.array(table.floats(column, allow_missing=key == "value"))
        absent = np.nan if key == "value" else np.median(values)
        columns[key] = np.array([values[place[name]] if name in place else absent for name in connectome.regions])
    unscored = np.isnan(columns["value"])
    if unscored.any():
        missing = [name for name, is_missing in zip(connectome.regions, unscored, strict=True) if is_missing]
        notes.append(f"Regions without a value are not scored: {', '.join(missing)}.")
    if config.more_is == "better":
        columns["value"] = -columns["value"]
    if np.isfinite(columns["value"]).sum() < 5 or not np.nanstd(columns["value"]) > 0:
        raise InputError(config.file, "5 regions or more with different values", "fewer, or one value everywhere")
    if "weight" in columns and (columns["weight"].min() < 0 or columns["weight"].max() > 1):
        found = f"values from {columns['weight'].min():g} to {columns['weight'].max():g}"
        raise InputError(config.file, f"values on [0, 1] under '{config.weight}'", found, "scale the column")
    return columns


def _agents(
    config: MapConfig, connectome: Connectome, columns: dict[str, np.ndarray], notes: list[str]
) -> AgentGraph | None:
    if config.lengths is None or "size" not in columns:
        return None
    count = len(connectome.regions)
    square = read_square(config.lengths, notes)
    lengths = order_by_name(square, connectome.regions, config.lengths, "lengths")
    mirrored = mirror_triangle(lengths)
    lengths = lengths if mirrored is None else mirrored
    is_linked = connectome.adjacency > 0
    if not np.isfinite(lengths[is_linked]).all():
        raise InputError(config.lengths, "a length wherever regions are connected", "an empty cell")
    shortest = lengths[is_linked].min()
    if not shortest > STEP:
        raise InputError(config.lengths, f"lengths above {STEP:g} mm where regions are connected", f"{shortest:g}")
    if columns["size"].min() <= 0:
        raise InputError(config.file or "map", "positive sizes", f"{columns['size'].min():g}")
    synthesis, clearance = (_z_score(columns.get(name, np.zeros(count))) for name in ("synthesis", "clearance"))
    adjacency, lengths, sizes, synthesis, clearance = (
        jnp.asarray(array, jnp.float32)
        for array in (connectome.adjacency, lengths, columns["size"], synthesis, clearance)
    )
    return make_agent_graph(adjacency, lengths, sizes, synthesis, clearance)


def _z_score(values: np.ndarray) -> np.ndarray:
    """Standardise over regions (n - 1), as the released simulator does with what it is given."""
    deviation = values.std(ddof=1)
    return (values - values.mean()) / deviation if deviation > 0 else np.zeros_like(values)


def _fit_mixture(
    config: FitConfig, graph: GraphOperators, target: np.ndarray, known: np.ndarray, fkpp: maps.MapScore, most: int
) -> maps.MapScore:
    """Fit the mixture to the map as one subject seen once, from the seeds that FKPP prefers."""
    low, high = np.nanmin(target), np.nanmax(target)
    visits = pad_visits([((target - low) / (high - low))[None].astype(np.float32)], [np.zeros(1)])
    recipe = dataclasses.replace(config, validation=0.0, model=dataclasses.replace(config.model, equation="igndmoe"))
    by_seed, predictions, stages = np.full(len(target), np.nan), {}, {}
    parameters = 0
    for seed in np.argsort(-fkpp.by_seed)[: most or len(target)].tolist():
        found = fit(visits, graph, recipe, (seed,))
        index = int(np.argmin(np.abs(np.asarray(found.course.times) - float(found.onsets[0]))))
        predictions[seed] = np.asarray(found.course.states[index], float)
        r = float(row_correlations(predictions[seed][None, known], target[None, known])[0])
        by_seed[seed] = r if np.isfinite(r) else 0.0
        stages[seed] = float(found.onsets[0])
        parameters = sum(leaf.size for leaf in jax.tree.leaves(found.params)) + 2
    best = max(predictions, key=lambda seed: by_seed[seed])
    setting = f"stage {stages[best]:.3g} years, in sample, best of {len(predictions)} seeds"
    return maps.MapScore("igndmoe", float(by_seed[best]), by_seed, best, setting, predictions[best], parameters)
