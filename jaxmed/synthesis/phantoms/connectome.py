"""Connectomes on random points, and cohorts of patients whose disease spreads on a connectome by known mechanisms.

Source: specification of IGND-MoE, section d5, which says the sizes; the graph-diffusion expert of the truth, a
diffusivity that grows with the pathology at both ends of an edge, is ours.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmed.arrays.graphs import LaplacianKind, laplacian
from jaxmed.arrays.types import KeyArray
from jaxmed.arrays.visits import Visits
from jaxmed.config import Count, NonNegative, Positive, PositiveRange, Range, Size, checked
from jaxmed.physics.progression import fkpp, network_diffusion
from jaxmed.solvers.fixed_grid import interpolate
from jaxmed.solvers.ode import GRID, OdeConfig, Solver, solve_trajectory

Mechanism = Literal["moe", "fkpp", "ndm"]
SOLVER_STEPS = 600
VISIT_SHARES = (0.5, 0.25, 0.15, 0.1)
"""Shares of subjects with 1, 2, 3 and 4 visits."""


class Connectome(NamedTuple):
    """A graph in space.

    Attributes:
        adjacency: Symmetric, connected, zero diagonal, largest weight 1.
        points: Positions of the nodes, in mm.
    """

    adjacency: Float[np.ndarray, "node node"]
    points: Float[np.ndarray, "node 3"]


@dataclasses.dataclass(frozen=True)
@checked
class CohortConfig:
    """What drives the disease, and how patients are seen.

    Attributes:
        mechanism: "moe" three experts whose weights change with stage; "fkpp" the first of them alone; "ndm" diffusion
            alone, from full seeds.
        subjects: Count of patients.
        diffusion: k of the mechanistic expert, per year.
        growth: alpha, per year.
        ceiling: v.
        reaction: Height of the local reaction, a half sine over [0, v], per year.
        edge_diffusivity: Diffusivity of the graph-diffusion expert between two full nodes, per year.
        early: Logits of the experts at stage 0.
        late: Logits at the horizon; between them they are linear in time.
        seed_value: State of the seeds at stage 0.
        horizon: Length of the disease, in years.
        onset: First and last stage at baseline, in years.
        gap: Shortest and longest time between visits, in years.
        most_visits: Visits beyond this are not made.
        every_visit: Whether each patient makes all of them; otherwise most drop out before.
        noise: Standard deviation of measurements, which are then clipped to [0, 1].
    """

    mechanism: Mechanism = "moe"
    subjects: Count = 200
    diffusion: NonNegative = 0.3
    growth: NonNegative = 0.25
    ceiling: Positive = 1.0
    reaction: NonNegative = 0.05
    edge_diffusivity: NonNegative = 0.3
    early: tuple[float, float, float] = (1.5, 0.0, -1.0)
    late: tuple[float, float, float] = (-1.0, 0.0, 1.5)
    seed_value: NonNegative = 0.15
    horizon: Positive = 30.0
    onset: Range = (2.0, 25.0)
    gap: PositiveRange = (0.8, 2.5)
    most_visits: Size = 4
    every_visit: bool = False
    noise: NonNegative = 0.03

    def __post_init__(self) -> None:
        if self.onset[1] >= self.horizon:
            raise ValueError(f"onset: expected two ascending stages before the horizon, found {self.onset}")


class Cohort(NamedTuple):
    """Patients and the truth about them.

    Attributes:
        visits: Noisy measurements.
        onsets: Stage at the first visit, in years of the disease.
        times: Grid of the true course, in years.
        states: True course.
        weights: Weights of the three experts on the grid.
    """

    visits: Visits
    onsets: Float[np.ndarray, " subject"]
    times: Float[np.ndarray, " time"]
    states: Float[np.ndarray, "time region"]
    weights: Float[np.ndarray, "time expert"]


def random_connectome(seed: int, nodes: int = 20, density: float = 0.25, reach: float = 40.0) -> Connectome:
    """Draw a connectome: lognormal weights that fall with distance, the strongest share of edges, connected.

    Args:
        seed: Seed of points and weights.
        nodes: Number of regions.
        density: Share of possible edges to keep, at least the spanning tree of the strongest.
        reach: Distance over which weights fall by e, in mm.
    """
    rng = np.random.default_rng(seed)
    # Mirror images in two hemispheres.
    right = rng.uniform([10, -90, -30], [65, 60, 70], ((nodes + 1) // 2, 3))
    points = np.concatenate([right * [-1, 1, 1], right])[:nodes]
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    weights = rng.lognormal(0.0, 0.5, (nodes, nodes)) * np.exp(-distance / reach)
    weights = np.triu(weights + weights.T, 1)
    keep = np.zeros_like(weights, bool)
    order = np.dstack(np.unravel_index(np.argsort(-weights, axis=None), weights.shape))[0]
    order = [(u, v) for u, v in order if u < v]
    component = np.arange(nodes)
    for u, v in order:  # the spanning tree, so that every region can be reached
        if component[u] != component[v]:
            component[component == component[v]] = component[u]
            keep[u, v] = True
    for u, v in order[: round(density * len(order))]:
        keep[u, v] = True
    adjacency = np.where(keep, weights, 0.0)
    adjacency = adjacency + adjacency.T
    return Connectome((adjacency / adjacency.max()).astype(np.float32), points)


def expert_weights(config: CohortConfig, t: Float[Array, "*batch"]) -> Float[Array, "*batch expert"]:
    """Return the true weights at a stage: a softmax of logits that are linear in time."""
    share = (t / config.horizon)[..., None]
    return jax.nn.softmax((1 - share) * jnp.array(config.early) + share * jnp.array(config.late), axis=-1)


def true_rate(
    config: CohortConfig, adjacency: Float[Array, "node node"], matrix: Float[Array, "node node"], c: Array, t: Array
) -> Float[Array, " node"]:
    """Return dc / dt of the truth.

    Args:
        config: The mechanisms.
        adjacency: Adjacency of the connectome.
        matrix: Its Laplacian.
        c: State.
        t: Stage in years.
    """
    if config.mechanism == "ndm":
        return network_diffusion(c, matrix, jnp.asarray(config.diffusion))
    mechanistic = fkpp(c, matrix, *map(jnp.asarray, (config.diffusion, config.growth, config.ceiling)))
    if config.mechanism == "fkpp":
        return mechanistic
    # Symmetric diffusivities keep the sum of c.
    g = config.edge_diffusivity * adjacency * (c[:, None] + c[None]) / (2 * config.ceiling)
    structural = g @ c - g.sum(axis=1) * c
    local = config.reaction * jnp.sin(jnp.pi * jnp.clip(c / config.ceiling, 0, 1))
    return expert_weights(config, t) @ jnp.stack([mechanistic, structural, local])


def simulate_cohort(
    key: KeyArray,
    adjacency: Float[np.ndarray, "node node"],
    seeds: tuple[int, ...],
    config: CohortConfig = CohortConfig(),
    kind: LaplacianKind = "random_walk",
    solver: Solver = "fixed",
    ode: OdeConfig = GRID,
) -> Cohort:
    """Draw patients of one disease on a connectome.

    Args:
        key: Consumed.
        adjacency: Symmetric, not negative, zero diagonal.
        seeds: Regions where the disease starts.
        config: Mechanisms and measurements.
        kind: Kind of the Laplacian in the truth.
        solver: Solver of its equation; see `solvers.ode.solve_trajectory`.
        ode: Options of diffrax, likewise.
    """
    onset_key, count_key, gap_key, noise_key = jax.random.split(key, 4)
    matrix = laplacian(jnp.asarray(adjacency), kind)
    value = 1.0 if config.mechanism == "ndm" else config.seed_value
    start = jnp.zeros(len(adjacency)).at[jnp.array(seeds)].set(value)
    most = config.most_visits if config.every_visit else min(config.most_visits, len(VISIT_SHARES))
    longest = config.horizon + config.gap[1] * (most - 1)
    grid = jnp.linspace(0.0, longest, SOLVER_STEPS + 1)

    def rate(t: Array, c: Array, _: None) -> Array:
        return true_rate(config, jnp.asarray(adjacency), matrix, c, t)

    course = jax.jit(lambda: solve_trajectory(rate, start, grid, None, solver, ode))()

    shape = (config.subjects, most)
    onsets = jax.random.uniform(onset_key, shape[:1], minval=config.onset[0], maxval=config.onset[1])
    counts = jax.random.choice(count_key, 1 + jnp.arange(len(VISIT_SHARES)), shape[:1], p=jnp.array(VISIT_SHARES))
    if config.every_visit:
        counts = jnp.full_like(counts, most)
    steps = jax.random.uniform(gap_key, shape, minval=config.gap[0], maxval=config.gap[1]).at[:, 0].set(0)
    present = jnp.arange(shape[1]) < counts[:, None]
    gaps = jnp.where(present, jnp.cumsum(steps, axis=1), 0.0)
    clean = interpolate(course, onsets[:, None] + gaps)
    noisy = jnp.clip(clean + config.noise * jax.random.normal(noise_key, clean.shape), 0, 1)
    visits = Visits(np.asarray(jnp.where(present[..., None], noisy, 0.0)), np.asarray(gaps), np.asarray(present))
    inside = course.times <= config.horizon
    times, states = np.asarray(course.times[inside]), np.asarray(course.states[inside])
    return Cohort(visits, np.asarray(onsets), times, states, np.asarray(expert_weights(config, course.times[inside])))
