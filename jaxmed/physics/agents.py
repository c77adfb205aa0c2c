"""Agents that spread on a connectome: normal proteins are born, move and are cleared; misfolded ones turn them.

The numbers are expectations, so a run is deterministic and differentiable. Time has the unit of the rates; lengths are
in mm.

Source: Zheng et al., PLoS Biology 2019, and its released simulator, whose numbers on its own 42 regions are a test.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

STEP = 0.01
EQUILIBRIUM = 1e-7
"""Largest relative change of normal agents in a step, in any region, at which their equilibrium counts as reached."""
MOST_STEPS = 2_000_000
"""Until equilibrium; the released 42 regions need 200,025."""


class AgentGraph(NamedTuple):
    """Where agents live and how they move.

    Attributes:
        mobility: Row-stochastic: where an agent of a region goes per unit of time, itself included.
        lengths: Lengths of connections, in mm; where there is none, 1.
        sizes: Sizes of regions, in voxels.
        synthesis: Normal agents born per voxel and unit of time.
        clearance: Rate of an agent's removal per unit of time.
    """

    mobility: Float[Array, "node node"]
    lengths: Float[Array, "node node"]
    sizes: Float[Array, " node"]
    synthesis: Float[Array, " node"]
    clearance: Float[Array, " node"]


class Agents(NamedTuple):
    """Numbers of agents; on edges (i, j) they travel from i to j.

    Attributes:
        normal: In regions.
        normal_on_edges: Travelling.
        misfolded: In regions.
        misfolded_on_edges: Travelling.
    """

    normal: Float[Array, " node"]
    normal_on_edges: Float[Array, "node node"]
    misfolded: Float[Array, " node"]
    misfolded_on_edges: Float[Array, "node node"]


class Spread(NamedTuple):
    """Agents in regions over time.

    Attributes:
        normal: Normal agents.
        misfolded: Misfolded agents.
    """

    normal: Float[Array, "time node"]
    misfolded: Float[Array, "time node"]


def make_agent_graph(
    adjacency: Float[Array, "node node"],
    lengths: Float[Array, "node node"],
    sizes: Float[Array, " node"],
    synthesis_score: Float[Array, " node"],
    clearance_score: Float[Array, " node"],
    stay: float = 0.5,
) -> AgentGraph:
    """Build the graph of agents from a connectome and two gene expressions.

    Args:
        adjacency: Symmetric weights, every node with an edge.
        lengths: Lengths of connections, in mm; above speed x step where there is an edge, so that no more agents arrive
            than travel.
        sizes: Sizes of regions, in voxels.
        synthesis_score: z-score of the gene of synthesis; its normal distribution function is the rate.
        clearance_score: z-score of the gene of clearance, likewise.
        stay: Share of the weight on staying: W = (1 - p) A + p diag(A 1).
    """
    weights = (1 - stay) * adjacency + stay * jnp.diag(adjacency.sum(axis=1))
    mobility = weights / weights.sum(axis=1, keepdims=True)
    cdf = jax.scipy.stats.norm.cdf
    return AgentGraph(
        mobility, jnp.where(adjacency > 0, lengths, 1.0), sizes, cdf(synthesis_score), cdf(clearance_score)
    )


def advance(
    graph: AgentGraph, agents: Agents, *, step: float = STEP, speed: float = 1.0, transmission: float = 1.0
) -> Agents:
    """Take one step: travel, then clearance, misfolding and synthesis.

    Of the normal agents that meet misfolded ones the share exp(-clearance) turns, whatever the step: that is the
    release's rule, in which a clearance is a probability per unit of time and not per step.

    Args:
        graph: From `make_agent_graph`.
        agents: Now.
        step: Length of the step.
        speed: On connections, mm per unit of time.
        transmission: Misfolding rate.
    """
    diagonal = jnp.eye(len(graph.sizes), dtype=bool)
    leaving = jnp.where(diagonal, 0.0, graph.mobility) * step
    arriving = speed / graph.lengths * step

    def travel(inside: Array, on_edges: Array) -> tuple[Array, Array]:
        out, back = inside[:, None] * leaving, on_edges * arriving
        return inside - out.sum(axis=1) + back.sum(axis=0), on_edges + out - back

    normal, normal_on_edges = travel(agents.normal, agents.normal_on_edges)
    misfolded, misfolded_on_edges = travel(agents.misfolded, agents.misfolded_on_edges)
    kept = jnp.exp(-graph.clearance * step)
    turned = normal * jnp.exp(-graph.clearance) * -jnp.expm1(-misfolded * transmission * step / graph.sizes)
    return Agents(
        normal * kept - turned + graph.synthesis * graph.sizes * step,
        normal_on_edges,
        misfolded * kept + turned,
        misfolded_on_edges,
    )


def equilibrium(
    graph: AgentGraph, *, step: float = STEP, speed: float = 1.0, most_steps: int = MOST_STEPS
) -> tuple[Agents, Int[Array, ""]]:
    """Let normal agents settle from none, until no region changes by more than `EQUILIBRIUM` in a step.

    In single precision the sums of a step are exact to about 1e-7 and regions may stop changing a little early.

    Returns:
        Normal agents, no misfolded ones, and the number of steps; `most_steps` where they did not settle.
    """
    nodes = len(graph.sizes)
    none, empty = jnp.zeros_like(graph.sizes), jnp.zeros((nodes, nodes), graph.sizes.dtype)

    def unsettled(carry: tuple[Agents, Array, Array]) -> Array:
        return (carry[1] > EQUILIBRIUM) & (carry[2] < most_steps)

    def settle(carry: tuple[Agents, Array, Array]) -> tuple[Agents, Array, Array]:
        before, _, count = carry
        after = advance(graph, before, step=step, speed=speed)
        change = jnp.max(jnp.abs(after.normal - before.normal) / jnp.maximum(before.normal, 1e-30))
        return after, change, count + 1

    start = (Agents(none, empty, none, empty), jnp.asarray(jnp.inf, none.dtype), jnp.array(0))
    agents, _, count = jax.lax.while_loop(unsettled, settle, start)
    return agents, count


def spread_agents(
    graph: AgentGraph,
    agents: Agents,
    seed: Int[Array, ""] | int,
    num_steps: int,
    *,
    step: float = STEP,
    speed: float = 1.0,
    transmission: float = 1.0,
    seeded: float = 1.0,
    every: int = 1,
) -> Spread:
    """Let misfolded agents spread from a region.

    Args:
        graph: From `make_agent_graph`.
        agents: From `equilibrium`.
        seed: Region where misfolded agents start.
        num_steps: Steps after seeding.
        step: Length of a step.
        speed: On connections, mm per unit of time.
        transmission: Misfolding rate.
        seeded: Misfolded agents at the seed.
        every: Steps between stored states.

    Returns:
        States after every, 2 every, ... steps, num_steps / every of them.
    """

    def move(agents: Agents, _: None) -> tuple[Agents, None]:
        return advance(graph, agents, step=step, speed=speed, transmission=transmission), None

    def stored(agents: Agents, _: None) -> tuple[Agents, Spread]:
        agents, _ = jax.lax.scan(move, agents, length=every)
        return agents, Spread(agents.normal, agents.misfolded)

    start = agents._replace(misfolded=agents.misfolded.at[seed].add(seeded))
    return jax.lax.scan(stored, start, length=num_steps // every)[1]


def atrophy(
    spread: Spread, mobility: Float[Array, "node node"], interval: float, own: float = 0.5
) -> Float[Array, "time node"]:
    """Accumulate atrophy: in place with the share of misfolded agents, and by input lost one state earlier.

    Args:
        spread: From `spread_agents`. Fewer than one misfolded agent in a region does no harm, as in the release.
        mobility: Row-stochastic matrix; its off-diagonal part, normalised, weighs lost input.
        interval: Time between states.
        own: k1, weight of atrophy in place; lost input has k2 = 1 - k1.
    """
    ratio = spread.misfolded / jnp.maximum(spread.misfolded + spread.normal, 1e-12)
    ratio = jnp.where(spread.misfolded < 1, 0.0, ratio)
    increment = -jnp.expm1(-ratio * interval)
    off = jnp.where(jnp.eye(mobility.shape[0], dtype=bool), 0.0, mobility)
    off = off / jnp.maximum(off.sum(axis=1, keepdims=True), 1e-12)
    earlier = jnp.concatenate([jnp.zeros_like(increment[:1]), increment[:-1]])
    return jnp.cumsum(own * increment + (1 - own) * earlier @ off.T, axis=0)
