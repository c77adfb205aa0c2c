"""How pathology spreads on a connectome: diffusion along connections, growth in place, agents.

States are regional amounts on [0, v]; times are in years; rates are per year. A Laplacian comes from
`jaxmed.arrays.graphs.laplacian`: the combinatorial one keeps the total, the random-walk one the total weighted by
node strength.

Sources: Raj, Kuceyeski and Weiner, Neuron 2012 (network diffusion); arXiv:2508.07032, equation 1 (FKPP); the group's
toolbox (FKPP with a share of diffusion and regional weights); Zheng et al., PLoS Biology 2019 (agents that are
susceptible, infected and removed).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.types import Scalar


def network_diffusion(
    state: Float[Array, " node"], laplacian: Float[Array, "node node"], rate: Scalar
) -> Float[Array, " node"]:
    """Return d state / dt = -rate L state."""
    return -rate * (laplacian @ state)


def fkpp(
    state: Float[Array, " node"],
    laplacian: Float[Array, "node node"],
    diffusion: Scalar,
    growth: Scalar,
    ceiling: Scalar,
) -> Float[Array, " node"]:
    """Return d state / dt = -k L c + alpha c (v - c): diffusion, and logistic growth in place.

    Args:
        state: c, on [0, ceiling].
        laplacian: L.
        diffusion: k.
        growth: alpha, per year and unit of state.
        ceiling: v.

    Source: arXiv:2508.07032, equation 1.
    """
    return -diffusion * (laplacian @ state) + growth * state * (ceiling - state)


def weighted_fkpp(
    state: Float[Array, " node"],
    laplacian: Float[Array, "node node"],
    share: Scalar,
    rate: Scalar,
    weights: Float[Array, " node"],
    strength: Scalar,
) -> Float[Array, " node"]:
    """Return a (-rate L x) + (1 - a) ((1 - g) + g w) x (1 - x): FKPP whose growth a regional map modulates.

    Args:
        state: x, on [0, 1].
        laplacian: L.
        share: a, of diffusion, in [0, 1].
        rate: Of diffusion.
        weights: w, for example amyloid or the expression of a gene, on [0, 1].
        strength: g, in [0, 1]: 0 is plain FKPP, 1 growth in proportion to the map.
    """
    growth = (1 - strength) + strength * weights
    return share * -rate * (laplacian @ state) + (1 - share) * growth * state * (1 - state)


class Spectrum(NamedTuple):
    """Eigenvectors of a Laplacian that is similar to a symmetric matrix.

    Attributes:
        values: Eigenvalues, ascending, not negative.
        right: Columns: right eigenvectors.
        left: Rows: left eigenvectors, left @ right = 1.
    """

    values: Float[Array, " node"]
    right: Float[Array, "node node"]
    left: Float[Array, "node node"]


def diffusion_spectrum(adjacency: Float[Array, "node node"], kind: str) -> Spectrum:
    """Diagonalise the Laplacian of an adjacency matrix once, for every time and seed.

    Args:
        adjacency: Symmetric, not negative, every node with an edge.
        kind: "combinatorial", "random_walk" (through the symmetric one, to which it is similar) or "symmetric".
    """
    strength = jnp.sum(adjacency, axis=-1)
    plain = jnp.diag(strength) - adjacency
    if kind == "combinatorial":
        values, vectors = jnp.linalg.eigh(plain)
        return Spectrum(values, vectors, vectors.T)
    root = jnp.sqrt(strength)
    values, vectors = jnp.linalg.eigh(plain / root[:, None] / root)
    if kind == "symmetric":
        return Spectrum(values, vectors, vectors.T)
    if kind != "random_walk":
        raise ValueError(f"kind: expected combinatorial, random_walk or symmetric, got {kind!r}")
    return Spectrum(values, vectors / root[:, None], vectors.T * root)


def diffuse(
    spectrum: Spectrum, initial: Float[Array, "*batch node"], rate: Scalar, times: Float[Array, " time"]
) -> Float[Array, "*batch time node"]:
    """Return exp(-rate L t) initial, in closed form.

    Args:
        spectrum: Of L.
        initial: States at time 0.
        rate: Per year.
        times: In years.
    """
    modes = jnp.einsum("kn,...n->...k", spectrum.left, initial)
    decay = jnp.exp(-rate * times[:, None] * spectrum.values)
    return jnp.einsum("nk,tk,...k->...tn", spectrum.right, decay, modes)


def logistic(initial: Float[Array, "*batch"], rate: Scalar, ceiling: Scalar, time: Array) -> Float[Array, "*batch"]:
    """Return logistic growth v / (1 + (v / c0 - 1) exp(-alpha v t)): FKPP without diffusion, in closed form."""
    return ceiling / (1 + (ceiling / initial - 1) * jnp.exp(-rate * ceiling * time))


# --- Agents -----------------------------------------------------------------------------------


class AgentGraph(NamedTuple):
    """Where agents live and how they move.

    Attributes:
        mobility: Row-stochastic: where an agent of a region goes in a step, itself included.
        lengths: Of connections, in steps at speed 1; where there is none, 1.
        sizes: Of regions, in voxels.
        synthesis: Normal agents born per voxel and unit of time.
        clearance: Probability of an agent's removal per unit of time.
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
        adjacency: Symmetric weights.
        lengths: Of connections, in mm; at least 1 where there is an edge.
        sizes: Of regions, in voxels.
        synthesis_score: z-score of the gene of synthesis; its normal distribution function is the rate.
        clearance_score: z-score of the gene of clearance, likewise.
        stay: Share of the weight on staying: W = (1 - p) A + p diag(A 1).
    """
    weights = (1 - stay) * adjacency + stay * jnp.diag(adjacency.sum(axis=1))
    mobility = weights / weights.sum(axis=1, keepdims=True)
    safe = jnp.where(adjacency > 0, jnp.maximum(lengths, 1.0), 1.0)
    cdf = jax.scipy.stats.norm.cdf
    return AgentGraph(mobility, safe, sizes, cdf(synthesis_score), cdf(clearance_score))


def spread_agents(
    graph: AgentGraph,
    seed: int | Array,
    num_steps: int,
    *,
    step: float = 0.01,
    speed: float = 1.0,
    transmission: float = 1.0,
    warm_up: int = 2000,
    seeded: float = 1.0,
    every: int = 1,
) -> Agents:
    """Let misfolded agents spread from a region; deterministic expectations of the agent model.

    Args:
        graph: From `make_agent_graph`.
        seed: Region where misfolded agents start.
        num_steps: Steps after seeding.
        step: Length of a step.
        speed: On connections, mm per unit of time.
        transmission: Misfolding rate.
        warm_up: Steps that normal agents take before seeding, to their equilibrium.
        seeded: Misfolded agents at the seed.
        every: Steps between stored states.

    Returns:
        States over time, num_steps / every of them.

    Source: Zheng et al., PLoS Biology 2019, and its released simulator.
    """
    num_nodes = len(graph.sizes)
    diagonal = jnp.eye(num_nodes, dtype=bool)
    leaving = jnp.where(diagonal, 0.0, graph.mobility)
    arrival = speed / graph.lengths
    removal = 1 - jnp.exp(-graph.clearance * step)
    zeros = jnp.zeros(num_nodes)
    empty = jnp.zeros((num_nodes, num_nodes))

    def travel(inside: Array, on_edges: Array) -> tuple[Array, Array]:
        out = inside[:, None] * leaving * step
        back = on_edges * arrival * step
        return inside - out.sum(axis=1) + back.sum(axis=0), on_edges + out - back

    def advance(agents: Agents, _: None) -> tuple[Agents, None]:
        normal, normal_edges = travel(agents.normal, agents.normal_on_edges)
        misfolded, misfolded_edges = travel(agents.misfolded, agents.misfolded_on_edges)
        infection = 1 - jnp.exp(-misfolded * transmission * step / graph.sizes)
        surviving = normal * (1 - removal)
        turned = surviving * infection
        return Agents(
            surviving - turned + graph.synthesis * graph.sizes * step,
            normal_edges,
            misfolded * (1 - removal) + turned,
            misfolded_edges,
        ), None

    state, _ = jax.lax.scan(advance, Agents(zeros, empty, zeros, empty), length=warm_up)
    state = state._replace(misfolded=zeros.at[seed].set(seeded))

    def stored(agents: Agents, _: None) -> tuple[Agents, Agents]:
        agents, _ = jax.lax.scan(advance, agents, length=every)
        return agents, agents

    return jax.lax.scan(stored, state, length=num_steps // every)[1]


def atrophy(
    agents: Agents, mobility: Float[Array, "node node"], interval: float, own: float = 0.5
) -> Float[Array, "time node"]:
    """Accumulate atrophy: in place with the share of misfolded agents, and by lost input one step later.

    Args:
        agents: States over time.
        mobility: Row-stochastic matrix; its off-diagonal part, normalised, weighs lost input.
        interval: Time between states.
        own: Weight of atrophy in place; lost input has the rest.

    Source: Zheng et al. 2019; k1 = k2 = 0.5.
    """
    ratio = agents.misfolded / jnp.maximum(agents.misfolded + agents.normal, 1e-12)
    increment = 1 - jnp.exp(-ratio * interval)
    off = jnp.where(jnp.eye(mobility.shape[0], dtype=bool), 0.0, mobility)
    off = off / jnp.maximum(off.sum(axis=1, keepdims=True), 1e-12)
    earlier = jnp.concatenate([jnp.zeros_like(increment[:1]), increment[:-1]])
    return jnp.cumsum(own * increment + (1 - own) * earlier @ off.T, axis=0)
