"""Models of spread against one regional map: every seed tried, the best moment of each course, what the fit costs.

A map (atrophy, an effect size) has no unit of the model, so a course is scored by Pearson's correlation with the map at
its best time, over all seeds and a grid of the model's own parameters. All of these are counted as fitted.

Sources: Raj et al. 2012 (network diffusion); the UCL toolbox (a share of diffusion and regional weights; seeds at 1);
Zheng et al. 2019 (agents).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxmed.arrays.graphs import GraphsTuple, mirror_triangle, operator
from jaxmed.config import Length, checked
from jaxmed.data.connectomes import Connectome
from jaxmed.errors import InputError, nearest
from jaxmed.io.connectomes import order_by_name, read_square
from jaxmed.io.tables import read_table
from jaxmed.physics.agents import STEP, AgentGraph, atrophy, equilibrium, make_agent_graph, spread_agents
from jaxmed.physics.progression import weighted_fkpp
from jaxmed.solvers.ode import OdeConfig, Solver, solve_trajectory

LONGEST = 15.0
"""Rate x time up to which network diffusion is followed, as in the toolbox."""
GRID = 120
SHARES = tuple(round(0.1 * i, 1) for i in range(1, 10))
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
AGENT_STEPS, AGENT_STORED = 20_000, 100
LINE = 3
"""Slope, intercept and variance of the line from course to map."""


class MapScore(NamedTuple):
    """The best course of a model.

    Attributes:
        model: Its name.
        r: Pearson's correlation with the map.
        by_seed: Best correlation from every seed; NaN from one that was not tried.
        seed: Region of the best.
        setting: Its time and parameters, in words.
        predicted: The course at that time, in every region.
        parameters: Fitted numbers, seed and time and the line included.
    """

    model: str
    r: float
    by_seed: Float[np.ndarray, " region"]
    seed: int
    setting: str
    predicted: Float[np.ndarray, " region"]
    parameters: int


def score_diffusion(
    graph: GraphsTuple, target: Float[np.ndarray, " region"], known: Bool[np.ndarray, " region"]
) -> MapScore:
    """Score network diffusion from every seed."""
    times = jnp.linspace(0.0, LONGEST, GRID + 1)[1:]

    def courses() -> Array:
        step = jax.scipy.linalg.expm(-(times[1] - times[0]) * operator(graph, "laplacian"))

        def advance(states: Array, _: None) -> tuple[Array, Array]:
            states = step @ states
            return states, states

        first = jnp.eye(len(target))
        return jax.lax.scan(advance, first, length=GRID)[1].transpose(2, 0, 1)  # seed, time, region

    found = np.asarray(jax.jit(courses)())[None]
    return _best("ndm", found, target, known, lambda _, t: f"rate x time {times[t]:.3g}", LINE + 2)


def score_fkpp(
    graph: GraphsTuple,
    target: Float[np.ndarray, " region"],
    known: Bool[np.ndarray, " region"],
    weights: Float[np.ndarray, " region"] | None,
    solver: Solver,
    ode: OdeConfig,
) -> MapScore:
    """Score FKPP with a share of diffusion, its growth weighted where a map of weights is given; solved as a fit is."""
    grid = jnp.linspace(0.0, 30.0, GRID + 1)
    strengths = (0.0,) if weights is None else STRENGTHS
    modulation = jnp.ones(len(target)) if weights is None else jnp.asarray(weights, jnp.float32)
    settings = jnp.array([(share, strength) for share in SHARES for strength in strengths])

    def course(setting: Array, seed: Array) -> Array:
        def field(t: Array, x: Array, _: None) -> Array:
            return weighted_fkpp(x, operator(graph, "laplacian"), setting[0], jnp.ones(()), modulation, setting[1])

        start = jnp.zeros(len(target)).at[seed].set(1.0)
        return solve_trajectory(field, start, grid, None, solver, ode).states[1:]

    seeds = jnp.arange(len(target))
    every = jax.jit(lambda: jax.lax.map(lambda s: jax.vmap(lambda seed: course(s, seed))(seeds), settings))()

    def describe(setting: int, time: int) -> str:
        share, strength = np.asarray(settings[setting])
        text = f"share of diffusion {share:.1f}, time {float(grid[1 + time]):.3g}"
        return text if weights is None else f"{text}, strength of the weights {strength:.2f}"

    name, extra = ("fkpp", 3) if weights is None else ("weighted_fkpp", 4)
    return _best(name, np.asarray(every), target, known, describe, LINE + extra)


def score_agents(
    graph: AgentGraph, target: Float[np.ndarray, " region"], known: Bool[np.ndarray, " region"]
) -> tuple[MapScore, int]:
    """Score agents from every seed; the published settings, so that only seed and time are fitted.

    Returns:
        The best course, and the steps that normal agents took to settle; `agents.MOST_STEPS` where they did not.
    """
    every = AGENT_STEPS // AGENT_STORED

    def courses() -> tuple[Array, Array]:
        agents, steps = equilibrium(graph)

        def course(seed: Array) -> Array:
            spread = spread_agents(graph, agents, seed, AGENT_STEPS, every=every)
            return atrophy(spread, graph.mobility, every * STEP)

        return jax.lax.map(course, jnp.arange(len(target))), steps

    found, steps = jax.jit(courses)()
    found = np.asarray(found)[None]
    best = _best("sir", found, target, known, lambda _, t: f"time {(t + 1) * every * STEP:.3g}", LINE + 2)
    return best, int(steps)


def _best(
    model: str,
    courses: Float[np.ndarray, "setting seed time region"],
    target: Float[np.ndarray, " region"],
    known: Bool[np.ndarray, " region"],
    describe: Callable[[int, int], str],
    parameters: int,
) -> MapScore:
    seen = courses[..., known].astype(float)
    wanted = target[known] - target[known].mean()
    centred = seen - seen.mean(axis=-1, keepdims=True)
    scale = np.sqrt((centred**2).sum(axis=-1) * (wanted**2).sum())
    # A course that has become the same everywhere correlates with nothing.
    flat = scale <= 1e-6 * np.sqrt((wanted**2).sum())
    r = np.where(flat | ~np.isfinite(scale), -1.0, (centred @ wanted) / np.where(flat, 1.0, scale))
    setting, seed, time = np.unravel_index(int(r.argmax()), r.shape)
    return MapScore(
        model,
        float(r.max()),
        r.max(axis=(0, 2)),
        int(seed),
        describe(int(setting), int(time)),
        courses[setting, seed, time],
        parameters,
    )


# --- Reading a map ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
@checked
class MapConfig:
    """One regional map, in place of a table of visits.

    Attributes:
        file: Table with a row per region.
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
    mixture_seeds: Length = 5


def read_map(config: MapConfig, connectome: Connectome, notes: list[str]) -> dict[str, np.ndarray]:
    """Read the columns of a map, in the order of the connectome: value (larger is worse, NaN unknown), weight, ...

    Raises:
        InputError: For whatever a user can have wrong in this table.
    """
    assert config.file is not None
    table = read_table(config.file, (config.region,))
    if table.note:
        notes.append(table.note)
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


def read_agents(
    config: MapConfig, connectome: Connectome, columns: dict[str, np.ndarray], notes: list[str]
) -> AgentGraph | None:
    """Build the graph of agents; None where lengths or sizes were not given.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
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
