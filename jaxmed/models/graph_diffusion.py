"""How pathology changes on a connectome: mechanistic, graph-diffusion and local experts, mixed by a gate over time.

Every module here is the right-hand side of an equation for the regional state c: `(c, t, graph, initial) -> Rates`,
with c on [0, 1] for each node, t in years, and the graph, a jraph `GraphsTuple` of `arrays.graphs.make_graph`, an
argument, so that subject-specific graphs are vmapped.
Networks see t divided by the horizon; the released code gives them years, which saturates a new gate at once.

Source: arXiv:2508.07032, equations 1 to 9 ("paper"), and its partial release ("release").
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmed.arrays.graphs import EdgeMatrix, GraphsTuple, edges_once, operator, regional_map
from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.config import Positive, Size, checked
from jaxmed.nn.model import Model, make_model
from jaxmed.physics.progression import fkpp, network_diffusion, weighted_fkpp

Structure = Literal["gae", "incidence", "low_rank", "gcn", "transformer", "none"]
Local = Literal["dense", "per_region", "none"]
Gate = Literal["temporal", "state_aware", "constant"]
Equation = Literal[
    "igndmoe", "ndm", "fkpp", "weighted_fkpp", "grand", "ndcn", "neural_ode_local", "neural_ode_cross_node"
]
EXPERTS = ("mechanistic", "graph diffusion", "local reaction")
RATE_UNIT = 0.1
"""Per year: what an output of 1 of a network means. Diseases take decades, and a first step of an optimiser must not
empty a region."""
FIRST_DIFFUSIVITY = -3.0
"""Edge diffusivities of the incidence form start at softplus of this, 0.05 per year: they cannot be zero,
and far below their slopes vanish."""


@dataclasses.dataclass(frozen=True)
@checked
class ProgressionConfig:
    """The equation and the shape of its parts.

    Attributes:
        equation: "igndmoe" mixes three experts; "ndm" network diffusion; "fkpp" diffusion and growth; "weighted_fkpp"
            growth modulated by the graph's regional map; "grand" attention diffusion; "ndcn" a graph-convolutional
            derivative; "neural_ode_local" one network for every region alone; "neural_ode_cross_node" one for all.
        structure: Second expert. "gae" a graph auto-encoder with a refined graph; "incidence" -K G K^T c with learned
            edge diffusivities, which keeps the sum of c; "low_rank" a learned operator of low rank; "gcn" and
            "transformer" other backbones; "none" leaves it out.
        local: Third expert. "dense" a network of all regions, as released; "per_region" a network shared by regions
            that sees one at a time; "none" leaves it out.
        gate: Weights of the experts: of "temporal" time; "state_aware" of time and the mean state; "constant".
        reaction: Whether the first expert grows; without it is network diffusion, the release's "incomplete" variant.
        clock: Whether the second and third expert see the time. Without it only the gate does, and whatever changes
            with stage must show in the weights; the release's local reaction has none.
        bounded: Multiply the local reaction by c (v - c), so that it leaves [0, v] on its own nowhere.
        width: Hidden units of networks.
        latent: Features per node of graph encoders.
        rank: Rank of the low-rank operator.
        heads: Heads of attention.
        horizon: Years at which networks see time 1.
        match_release: Centre experts on each other and scale each by its spread over regions as the release does, in
            place of equation 3. Where their spreads are equal, equal weights then give a constant: the weights are
            contrasts and not contributions.
    """

    equation: Equation = "igndmoe"
    structure: Structure = "gae"
    local: Local = "dense"
    gate: Gate = "temporal"
    reaction: bool = True
    clock: bool = True
    bounded: bool = False
    width: Size = 64
    latent: Size = 16
    rank: Size = 8
    heads: Size = 4
    horizon: Positive = 30.0
    match_release: bool = False

    def __post_init__(self) -> None:
        if self.match_release and "none" in (self.structure, self.local):
            raise ValueError("match_release: expected all three experts, which it normalises over, found one left out")

    @property
    def grows(self) -> bool:
        """Whether the mechanistic curve grows in place; otherwise it is network diffusion."""
        return self.equation != "ndm" and (self.equation != "igndmoe" or self.reaction)


class Rates(NamedTuple):
    """A derivative and what it is made of.

    Attributes:
        total: dc / dt, per year.
        experts: Before their weights; one row for equations that are no mixture.
        weights: Weights of the experts, summing to 1.
    """

    total: Float[Array, " node"]
    experts: Float[Array, "expert node"]
    weights: Float[Array, " expert"]


def make_progression_model(config: ProgressionConfig) -> Model:
    """Return the equation as a model: `apply(params, c, t, graph, initial) -> Rates`."""
    if config.equation == "igndmoe":
        return make_model(Mixture(config))
    others = {
        "grand": AttentionDiffusion,
        "ndcn": NeuralDynamics,
        "neural_ode_local": PerRegionReaction,
        "neural_ode_cross_node": DenseReaction,
    }
    return make_model(Single(config, others.get(config.equation, Mechanism)))


class Single(nn.Module):
    """One expert, no gate."""

    config: ProgressionConfig
    expert: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self, c: Float[Array, " node"], t: Scalar, graph: GraphsTuple, initial: Float[Array, " node"]
    ) -> Rates:
        rate = self.expert(self.config, name="expert")(c, t, graph, initial)
        return Rates(rate, rate[None], jnp.ones(1, c.dtype))


class Mixture(nn.Module):
    """Three experts and their gate, equation 3."""

    config: ProgressionConfig

    @nn.compact
    def __call__(
        self, c: Float[Array, " node"], t: Scalar, graph: GraphsTuple, initial: Float[Array, " node"]
    ) -> Rates:
        config = self.config
        structures = {
            "gae": GraphAutoEncoder,
            "incidence": IncidenceDiffusion,
            "low_rank": LowRankDiffusion,
            "gcn": GraphConvolutions,
            "transformer": GraphTransformer,
        }
        reactions = {"dense": DenseReaction, "per_region": PerRegionReaction}
        present = jnp.array([True, config.structure != "none", config.local != "none"])
        # Named for what it is in every equation, so that a mechanistic fit starts a mixture.
        mechanism = Mechanism(config, name="mechanism")
        seen = t if config.clock else jnp.zeros_like(t)
        rates = [mechanism(c, t, graph, initial), jnp.zeros_like(c), jnp.zeros_like(c)]
        if config.structure != "none":
            rates[1] = structures[config.structure](config, name="structure")(c, seen, graph, initial)
        if config.local != "none":
            rates[2] = reactions[config.local](config, name="local")(c, seen, graph, initial)
            if config.bounded:
                rates[2] = rates[2] * c * (mechanism.ceiling() - c)
        experts = jnp.stack(rates)
        logits = StageGate(config, len(EXPERTS), name="gate")(c, t)
        weights = nn.softmax(jnp.where(present, logits, -jnp.inf))
        if config.match_release:
            return Rates(ReleasedNormalisation(name="normalisation")(experts, weights), experts, weights)
        return Rates(weights @ experts, experts, weights)


class ReleasedNormalisation(nn.Module):
    """Experts centred on their mean at every node, each divided by its spread over nodes, weighed, scaled and shifted.

    The spread is the sample standard deviation (n - 1) of an expert over the nodes, plus 1.

    Source: release. Deviation: none; see `ProgressionConfig.match_release` for what it means.
    """

    @nn.compact
    def __call__(self, experts: Float[Array, "expert node"], weights: Float[Array, " expert"]) -> Float[Array, " node"]:
        scale = self.param("scale", nn.initializers.constant(1.0), ())
        shift = self.param("shift", nn.initializers.constant(1e-3), ())
        centred = experts - experts.mean(axis=0)
        variance = jnp.var(experts, axis=1, ddof=1, keepdims=True)
        # The root has no slope at 0, where new networks are.
        spread = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
        return scale * (weights @ (centred / (spread + 1))) + shift


# --- Experts: (c, t, graph, initial) -> rate ---------------------------------------------------


class Mechanism(nn.Module):
    """Diffusion and logistic growth, equation 1; rates are positive through softplus.

    Source: paper; starting values of the release (0.05, 0.05, 1.5). Deviation: the release lets rates be negative; in
    the mixture negative states do not grow.
    """

    config: ProgressionConfig

    def setup(self) -> None:
        self.diffusion = self.param("diffusion", _positive(0.05))
        if self.config.equation == "weighted_fkpp":
            self.share = self.param("share", nn.initializers.zeros, ())
            self.strength = self.param("strength", nn.initializers.zeros, ())
        if self.config.grows:
            self.growth = self.param("growth", _positive(0.05))
            self.top = self.param("ceiling", _positive(1.5))

    def ceiling(self) -> Array:
        """Return v; 1 where nothing grows."""
        return nn.softplus(self.top) if self.config.grows else jnp.ones(())

    def __call__(self, c: Array, t: Array, graph: GraphsTuple, initial: Array) -> Array:
        diffusion = nn.softplus(self.diffusion)
        if not self.config.grows:
            return network_diffusion(c, operator(graph, "laplacian"), diffusion)
        growth, ceiling = nn.softplus(self.growth), self.ceiling()
        if self.config.equation == "fkpp":
            return fkpp(c, operator(graph, "laplacian"), diffusion, growth, ceiling)
        if self.config.equation == "igndmoe":
            # Below 0, where only the other experts can push a region, logistic growth would run to minus infinity in
            # finite time: there nothing grows.
            return network_diffusion(c, operator(graph, "laplacian"), diffusion) + growth * jnp.maximum(c, 0.0) * (
                ceiling - c
            )
        # The toolbox's form on c / v: growth and ceiling give its dimensionless equation a unit.
        share, strength = nn.sigmoid(self.share), nn.sigmoid(self.strength)
        rate = weighted_fkpp(c / ceiling, operator(graph, "laplacian"), share, diffusion, regional_map(graph), strength)
        return growth * ceiling * rate


class GraphAutoEncoder(nn.Module):
    """Encode nodes over the connectome, refine the graph from their codes, decode over the refined graph.

    Source: paper, equations 4 to 8. Deviation: the released file is missing; two convolutions with the symmetric
    normalised matrix, a row softmax as sigma, and a decoder whose last layer starts at 0 are ours.
    """

    config: ProgressionConfig

    @nn.compact
    def __call__(self, c: Array, t: Array, graph: GraphsTuple, initial: Array) -> Array:
        latent = self.config.latent
        x, propagation = node_inputs(c, t, self.config.horizon), operator(graph, "propagation")
        h = nn.swish(nn.Dense(latent, name="encode_1")(propagation @ x))
        h = nn.tanh(nn.Dense(latent, name="encode_2")(propagation @ h))
        return _decode(refine(h) if isinstance(propagation, EdgeMatrix) else nn.softmax(h @ h.T) @ h, latent)


class IncidenceDiffusion(nn.Module):
    """-K G K^T c: diffusion with a diffusivity for every edge, of the states at its ends, its weight and time.

    K holds +- the root of an edge's weight, so that equal diffusivities k give -k (D - A) c. Whatever the network, the
    sum of c is kept and the operator pulls neighbours together (positive semidefinite).

    Source: paper, equations 4 to 6.
    """

    config: ProgressionConfig

    @nn.compact
    def __call__(self, c: Array, t: Array, graph: GraphsTuple, initial: Array) -> Array:
        senders, receivers, weights = edges_once(graph)
        difference = c[senders] - c[receivers]
        time = jnp.full_like(difference, t / self.config.horizon)
        # The same from both ends.
        x = [c[senders] + c[receivers], difference**2, weights, time]
        hidden = nn.swish(nn.Dense(self.config.latent, name="edge")(jnp.stack(x, axis=-1)))
        start = nn.initializers.constant(FIRST_DIFFUSIVITY)
        g = nn.softplus(nn.Dense(1, kernel_init=nn.initializers.zeros, bias_init=start, name="out")(hidden))[:, 0]
        flux = weights * g * difference
        return jnp.zeros_like(c).at[senders].add(-flux).at[receivers].add(flux)


class LowRankDiffusion(nn.Module):
    """-M_decode M_encode^T c with both factors of the state and time.

    Source: paper, section on IGND: K G K^T replaced by a learned operator of low rank. Deviation: shape of the
    network; the decoding factor starts at 0.
    """

    config: ProgressionConfig

    @nn.compact
    def __call__(self, c: Array, t: Array, graph: GraphsTuple, initial: Array) -> Array:
        size = (len(c), self.config.rank)
        hidden = nn.swish(nn.Dense(self.config.width, name="hidden")(with_time(c, t, self.config.horizon)))
        encode = nn.Dense(size[0] * size[1], name="encode")(hidden).reshape(size)
        decode = nn.Dense(size[0] * size[1], kernel_init=nn.initializers.zeros, name="decode")(hidden).reshape(size)
        return -RATE_UNIT * decode @ (encode.T @ c)


class GraphConvolutions(nn.Module):
    """Two graph convolutions, the MoE-GCN backbone."""

    config: ProgressionConfig

    @nn.compact
    def __call__(self, c: Array, t: Array, graph: GraphsTuple, initial: Array) -> Array:
        x = node_inputs(c, t, self.config.horizon)
        propagation = operator(graph, "propagation")
        h = nn.swish(nn.Dense(self.config.latent, name="encode_1")(propagation @ x))
        return _decode(propagation @ h, self.config.latent)


class GraphTransformer(nn.Module):
    """One layer of attention over edges and a decoder, the MoE-GTrans backbone."""

    config: ProgressionConfig

    @nn.compact
    def __call__(self, c: Array, t: Array, graph: GraphsTuple, initial: Array) -> Array:
        latent = self.config.latent
        x = nn.Dense(latent, name="embed")(node_inputs(c, t, self.config.horizon))
        attention = _edge_attention(x, graph, self.config.heads, latent, nn.initializers.lecun_normal())
        return _decode(x + attention @ nn.Dense(latent, name="value")(x), latent)


class DenseReaction(nn.Module):
    """A network of all regions and time, equation 9.

    Source: paper. Deviation: swish for the release's ReLU, whose kinks make solvers fail; the release leaves out t.
    """

    config: ProgressionConfig

    @nn.compact
    def __call__(self, c: Array, t: Array, graph: GraphsTuple, initial: Array) -> Array:
        hidden = nn.swish(nn.Dense(self.config.width, name="hidden")(with_time(c, t, self.config.horizon)))
        return RATE_UNIT * nn.Dense(len(c), kernel_init=nn.initializers.zeros, name="out")(hidden)


class PerRegionReaction(nn.Module):
    """One small network for every region, of its own state and time: a reaction that is truly local."""

    config: ProgressionConfig

    @nn.compact
    def __call__(self, c: Array, t: Array, graph: GraphsTuple, initial: Array) -> Array:
        hidden = nn.swish(nn.Dense(self.config.width, name="hidden")(node_inputs(c, t, self.config.horizon)))
        return RATE_UNIT * nn.Dense(1, kernel_init=nn.initializers.zeros, name="out")(hidden)[:, 0]


class AttentionDiffusion(nn.Module):
    """GRAND: sigmoid(a) (A(c) - I) c + b c(0), with attention over edges.

    Source: arXiv:2106.10934 and its release: attention starts near uniform (weights 1e-5), sigmoid(a) at one half.
    """

    config: ProgressionConfig

    @nn.compact
    def __call__(self, c: Array, t: Array, graph: GraphsTuple, initial: Array) -> Array:
        start = nn.initializers.constant(1e-5)
        attention = _edge_attention(c[:, None], graph, self.config.heads, self.config.latent, start)
        pace = nn.sigmoid(self.param("pace", nn.initializers.zeros, ()))
        source = self.param("source", nn.initializers.zeros, ())
        return pace * (attention @ c - c) + source * initial


class NeuralDynamics(nn.Module):
    """NDCN: a graph convolution of embedded states.

    Source: arXiv:1908.06491. Deviation: states are embedded and read out inside the derivative, so that c stays in
    regions, where patients are staged; time is an input.
    """

    config: ProgressionConfig

    @nn.compact
    def __call__(self, c: Array, t: Array, graph: GraphsTuple, initial: Array) -> Array:
        embedded = nn.tanh(nn.Dense(self.config.latent, name="embed")(node_inputs(c, t, self.config.horizon)))
        hidden = nn.swish(nn.Dense(self.config.latent, name="convolve")(operator(graph, "propagation") @ embedded))
        return RATE_UNIT * nn.Dense(1, kernel_init=nn.initializers.zeros, name="out")(hidden)[:, 0]


# --- The gate, and what experts share ----------------------------------------------------------


class StageGate(nn.Module):
    """Logits of the experts.

    Source: release: 1 -> 4 -> 3 with a ReLU; the state-aware variant joins 4 units of time and 4 of the mean state,
    spread over the nodes, and ends in a ReLU before the softmax. Deviation: the last layer of the temporal gate starts
    at 0, so that weights start equal and training at the mechanistic curve.
    """

    config: ProgressionConfig
    experts: int

    @nn.compact
    def __call__(self, c: Array, t: Array) -> Array:
        if self.config.gate == "constant":
            return self.param("logits", nn.initializers.zeros, (self.experts,))
        # Biases above 0: every unit is alive at stage 0. With the usual ones many are dead from there to the horizon.
        first = nn.Dense(4, kernel_init=_uniform(-1.0, 1.0), bias_init=_uniform(0.0, 1.0), name="time")
        time = nn.relu(first(t[None] / self.config.horizon))
        if self.config.gate == "temporal":
            return nn.Dense(self.experts, kernel_init=nn.initializers.zeros, name="out")(time)
        mean = jnp.full_like(c, c.mean())
        state = nn.relu(nn.Dense(4, name="state")(mean))
        joined = jnp.concatenate([time, state])
        return nn.relu(nn.Dense(self.experts, bias_init=nn.initializers.constant(1.0), name="out")(joined))


def node_inputs(c: Float[Array, " node"], t: Scalar, horizon: float) -> Float[Array, "node 2"]:
    """Return state and time of every node."""
    return jnp.stack([c, jnp.full_like(c, t / horizon)], axis=-1)


def refine(h: Float[Array, "node latent"], block: int = 256) -> Float[Array, "node latent"]:
    """Return softmax(h h^T) h by blocks of rows: the same without a matrix of all nodes, forward or backward."""
    count = -(-len(h) // block)
    rows = jnp.pad(h, ((0, count * block - len(h)), (0, 0))).reshape(count, block, -1)
    found = jax.lax.map(jax.checkpoint(lambda some: nn.softmax(some @ h.T, axis=-1) @ h), rows)
    return found.reshape(count * block, -1)[: len(h)]


def with_time(c: Float[Array, " node"], t: Scalar, horizon: float) -> Float[Array, " node_1"]:
    """Return the states, then the time."""
    return jnp.concatenate([c, t[None].astype(c.dtype) / horizon])


def set_mechanism(params: Params, diffusion: Scalar, growth: Scalar | None, ceiling: Scalar | None) -> Params:
    """Return parameters with other mechanistic rates, per year.

    Args:
        params: Parameters of `Mixture`, or of `Single` around `Mechanism`.
        diffusion: k.
        growth: alpha; None where nothing grows.
        ceiling: v, likewise.
    """
    place = "mechanism" if "mechanism" in params else "expert"
    values = {"diffusion": diffusion, "growth": growth, "ceiling": ceiling}
    changed = {name: inverse_softplus(value) for name, value in values.items() if value is not None}
    return {**params, place: {**params[place], **changed}}


def inverse_softplus(value: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return x with softplus(x) = value."""
    return value + jnp.log(-jnp.expm1(-value))


def _decode(x: Array, latent: int) -> Array:
    hidden = nn.swish(nn.Dense(latent, name="decode")(x))
    return RATE_UNIT * nn.Dense(1, kernel_init=nn.initializers.zeros, name="out")(hidden)[:, 0]


def _edge_attention(x: Array, graph: GraphsTuple, heads: int, latent: int, start: Callable) -> Array | EdgeMatrix:
    """Return the mean over heads of softmax attention of every node over itself and its neighbours, as a matrix."""
    shape = (len(x), heads, -(-latent // heads))
    query, key = (
        nn.Dense(shape[1] * shape[2], kernel_init=start, name=name)(x).reshape(shape) for name in ("query", "key")
    )
    adjacency = operator(graph, "adjacency")
    if isinstance(adjacency, EdgeMatrix):
        return _sparse_attention(query, key, adjacency)
    scores = jnp.einsum("uhd,vhd->huv", query, key) / np.sqrt(shape[2])
    linked = (adjacency > 0) | jnp.eye(len(x), dtype=bool)
    return nn.softmax(jnp.where(linked, scores, -jnp.inf), axis=-1).mean(axis=0)


def _sparse_attention(query: Array, key: Array, adjacency: EdgeMatrix) -> EdgeMatrix:
    """Return the same from scores of edges alone."""
    count, root = len(query), np.sqrt(query.shape[-1])
    own = jnp.sum(query * key, axis=-1) / root
    scores = jnp.sum(query[adjacency.rows] * key[adjacency.columns], axis=-1) / root
    scores = jnp.where(adjacency.values[:, None] > 0, scores, -jnp.inf)
    highest = jnp.maximum(own, jax.ops.segment_max(scores, adjacency.rows, count))
    highest = jax.lax.stop_gradient(highest)
    powers = jnp.exp(scores - highest[adjacency.rows])
    own = jnp.exp(own - highest)
    total = own + jax.ops.segment_sum(powers, adjacency.rows, count)
    values = (powers / total[adjacency.rows]).mean(axis=-1)
    return EdgeMatrix(adjacency.rows, adjacency.columns, values, (own / total).mean(axis=-1))


def _positive(value: float) -> Callable[[KeyArray], Array]:
    return lambda key: inverse_softplus(jnp.asarray(value, jnp.float32))


def _uniform(low: float, high: float) -> Callable[..., Array]:
    def draw(key: KeyArray, shape: tuple[int, ...], dtype: type = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, low, high)

    return draw
