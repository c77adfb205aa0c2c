"""Weighted, undirected graphs: adjacency matrices, Laplacians, thresholds, and jraph graphs that carry operators."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float, Int
from jraph import GraphsTuple as GraphsTuple

LaplacianKind = Literal["combinatorial", "random_walk", "symmetric"]
LARGEST_DENSE = 400
"""Nodes; above, a matrix of a connectome is mostly zeros, and at 10,000 no longer fits."""
DEGREE_FLOOR = 1e-12
"""Added to node strengths before dividing, so that a node without edges has a row of zeros and not NaN."""


class Edges(NamedTuple):
    """The edges of an undirected graph, each once.

    Attributes:
        senders: One end; the smaller index.
        receivers: The other end.
        weights: Above 0.
    """

    senders: Int[np.ndarray, " edge"]
    receivers: Int[np.ndarray, " edge"]
    weights: Float[np.ndarray, " edge"]


# --- On the host: from files to a clean matrix ------------------------------------------------


def mirror_triangle(matrix: Float[np.ndarray, "node node"]) -> Float[np.ndarray, "node node"] | None:
    """Return the symmetric matrix of which one triangle alone is filled, the other zero or NaN; None for any other.

    The diagonal is not looked at, and comes out as zero.
    """
    upper, lower = np.triu(matrix, 1), np.tril(matrix, -1)
    below = np.tri(len(matrix), k=-1, dtype=bool)
    for filled, empty, place in ((upper, lower, below), (lower, upper, below.T)):
        nothing = (empty[place] == 0).all() or (len(matrix) > 2 and np.isnan(empty[place]).all())
        if nothing and np.isfinite(filled).all() and (filled != 0).any():
            return filled + filled.T
    return None


def keep_strongest(adjacency: Float[np.ndarray, "node node"], fraction: float) -> Float[np.ndarray, "node node"]:
    """Keep the strongest share of all possible edges; ties at the threshold stay.

    Args:
        adjacency: Symmetric, not negative.
        fraction: Share of n (n - 1) / 2 edges, above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected a number above 0 and at most 1, got {fraction}")
    upper = adjacency[np.triu_indices(len(adjacency), 1)]
    keep = max(1, round(fraction * len(upper)))
    threshold = np.sort(upper)[-keep]
    return np.where(adjacency >= max(threshold, np.finfo(adjacency.dtype).tiny), adjacency, 0.0)


def components(adjacency: Float[np.ndarray, "node node"]) -> Int[np.ndarray, " node"]:
    """Number the connected components; a node's value is the smallest index in its component."""
    _, labels = scipy.sparse.csgraph.connected_components(scipy.sparse.csr_array(adjacency > 0), directed=False)
    first = {label: node for node, label in reversed(list(enumerate(labels)))}
    return np.array([first[label] for label in labels])


def edges_of(adjacency: Float[np.ndarray, "node node"]) -> Edges:
    """List the edges of a symmetric matrix."""
    senders, receivers = np.nonzero(np.triu(adjacency, 1))
    return Edges(senders.astype(np.int32), receivers.astype(np.int32), adjacency[senders, receivers])


# --- On the device ----------------------------------------------------------------------------


def laplacian(adjacency: Float[Array, "node node"], kind: LaplacianKind) -> Float[Array, "node node"]:
    """Return the Laplacian of a symmetric adjacency matrix.

    Args:
        adjacency: Symmetric, not negative, zero diagonal.
        kind: "combinatorial" D - A keeps the sum of what diffuses; "random_walk" D^-1 (D - A) keeps its sum weighted
            by node strength; "symmetric" D^-1/2 (D - A) D^-1/2.
    """
    strength = jnp.sum(adjacency, axis=-1)
    plain = jnp.diag(strength) - adjacency
    match kind:
        case "combinatorial":
            return plain
        case "random_walk":
            return plain / (strength + DEGREE_FLOOR)[:, None]
        case "symmetric":
            root = 1 / jnp.sqrt(strength + DEGREE_FLOOR)
            return root[:, None] * plain * root
    raise ValueError(f"kind: expected combinatorial, random_walk or symmetric, got {kind!r}")


class EdgeMatrix(NamedTuple):
    """A square matrix kept as its diagonal and its entries between neighbours, for graphs too large for a matrix.

    Attributes:
        rows: Row of every entry.
        columns: Column of every entry.
        values: Value of every entry; 0 on padding, which may name any node.
        diagonal: Entry of every node with itself.
    """

    rows: Int[Array, " entry"]
    columns: Int[Array, " entry"]
    values: Float[Array, " entry"]
    diagonal: Float[Array, " node"]

    def __matmul__(self, values: Array) -> Array:
        """Multiply a vector, or a matrix with a row per node."""
        shape = (-1,) + (1,) * (values.ndim - 1)
        flow = self.values.reshape(shape) * values[self.columns]
        total = jax.ops.segment_sum(flow, self.rows, len(self.diagonal))
        return total + self.diagonal.reshape(shape) * values


Matrix = Float[Array, "node node"] | EdgeMatrix
Operator = Literal["adjacency", "laplacian", "propagation"]


def make_graph(
    adjacency: Float[np.ndarray, "node node"],
    kind: LaplacianKind = "random_walk",
    num_edges: int | None = None,
    regional: Float[np.ndarray, " node"] | None = None,
    is_sparse: bool | None = None,
) -> GraphsTuple:
    """Turn a symmetric matrix into a jraph graph with the operators of networks and equations.

    Args:
        adjacency: Not negative, zero diagonal.
        kind: See `laplacian`.
        num_edges: Undirected edges to pad to; None for those there are.
        regional: See `graph_from_edges`.
        is_sparse: Whether products run over edges; None for graphs of more than `LARGEST_DENSE` nodes.
    """
    is_sparse = len(adjacency) > LARGEST_DENSE if is_sparse is None else is_sparse
    return graph_from_edges(edges_of(adjacency), len(adjacency), kind, num_edges, regional, is_sparse)


def graph_from_edges(
    edges: Edges,
    num_nodes: int,
    kind: LaplacianKind = "random_walk",
    num_edges: int | None = None,
    regional: Float[np.ndarray, " node"] | None = None,
    is_sparse: bool = True,
) -> GraphsTuple:
    """Build one graph; arrays only, so that graphs of one size are stacked and vmapped.

    Args:
        edges: Each once; weights above 0.
        num_nodes: Number of nodes.
        kind: Kind of the Laplacian; see `laplacian`.
        num_edges: Undirected edges to pad to; None for those there are.
        regional: A map of regions on [0, 1] that may modulate growth, such as amyloid or the expression of a gene;
            ones where None.
        is_sparse: Whether products run over edges; otherwise `globals` keeps the matrices, derived here once.

    Returns:
        Every edge once, then every edge back, each list padded by edges of weight 0 from node 0 to itself. `edges`
        and `nodes` hold the entries and the diagonals of "adjacency", "laplacian" and "propagation", D^-1/2 (A + I)
        D^-1/2 with the strengths of A + I (Kipf and Welling, arXiv:1609.02907, equation 2); `nodes` "regional" too.
        `operator` multiplies by them.
    """
    padding = (num_edges or len(edges.weights)) - len(edges.weights)
    if padding < 0:
        raise ValueError(f"num_edges: expected at least {len(edges.weights)}, got {num_edges}")
    once = [np.pad(column, (0, padding)) for column in edges]
    senders, receivers = np.concatenate(once[:2]), np.concatenate(once[1::-1])
    weights = np.concatenate([once[2], once[2]]).astype(np.float64)
    strength = np.bincount(receivers, weights, num_nodes)
    inverse, root = 1 / (strength + DEGREE_FLOOR), 1 / np.sqrt(strength + DEGREE_FLOOR)
    looped = 1 / np.sqrt(strength + 1)
    match kind:
        case "combinatorial":
            spread = -weights, strength
        case "random_walk":
            spread = -weights * inverse[receivers], strength * inverse
        case "symmetric":
            spread = -weights * root[receivers] * root[senders], strength * root**2
        case _:
            raise ValueError(f"kind: expected combinatorial, random_walk or symmetric, got {kind!r}")
    propagation = weights * looped[receivers] * looped[senders], looped**2
    operators = {"adjacency": (weights, 0 * strength), "laplacian": spread, "propagation": propagation}
    dtype, matrices = jax.dtypes.canonicalize_dtype(edges.weights.dtype), None
    if not is_sparse:
        matrix = np.zeros((num_nodes, num_nodes))
        np.add.at(matrix, (receivers, senders), weights)
        adjacency = jnp.asarray(matrix, dtype)
        looped = adjacency + jnp.eye(num_nodes, dtype=dtype)
        root = jax.lax.rsqrt(jnp.sum(looped, axis=-1))
        matrices = {"adjacency": adjacency, "laplacian": laplacian(adjacency, kind)}
        matrices = {
            name: kept[None] for name, kept in (matrices | {"propagation": root[:, None] * looped * root}).items()
        }
    modulation = np.ones(num_nodes) if regional is None else regional
    return GraphsTuple(
        nodes={name: jnp.asarray(diagonal, dtype) for name, (_, diagonal) in operators.items()}
        | {"regional": jnp.asarray(modulation, dtype)},
        edges={name: jnp.asarray(entries, dtype) for name, (entries, _) in operators.items()},
        senders=jnp.asarray(senders, jnp.int32),
        receivers=jnp.asarray(receivers, jnp.int32),
        n_node=jnp.array([num_nodes], jnp.int32),
        n_edge=jnp.array([len(senders)], jnp.int32),
        globals=matrices,
    )


def operator(graph: GraphsTuple, name: Operator) -> Matrix:
    """Return an operator of a graph to multiply by: its matrix where it is kept, otherwise sums over edges."""
    nodes, edges, matrices = _fields(graph)
    if matrices is not None:
        return matrices[name][0]
    assert graph.senders is not None and graph.receivers is not None  # jraph's types allow a graph without edges
    return EdgeMatrix(graph.receivers, graph.senders, edges[name], nodes[name])


def regional_map(graph: GraphsTuple) -> Float[Array, " node"]:
    """Return the map of regions that may modulate growth."""
    return _fields(graph)[0]["regional"]


def edges_once(graph: GraphsTuple) -> tuple[Int[Array, " edge"], Int[Array, " edge"], Float[Array, " edge"]]:
    """Return senders, receivers and weights of a graph's edges, each once, padding included."""
    assert graph.senders is not None and graph.receivers is not None
    once = slice(len(graph.senders) // 2)
    return graph.senders[once], graph.receivers[once], _fields(graph)[1]["adjacency"][once]


def _fields(graph: Any) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array] | None]:
    """Return nodes, edges and globals with their types here; jraph's are any tree of arrays."""
    return graph.nodes, graph.edges, graph.globals


def stack_graphs(
    adjacencies: Sequence[Float[np.ndarray, "node node"]], kind: LaplacianKind = "random_walk"
) -> GraphsTuple:
    """Stack subject-specific graphs on the same nodes for `jax.vmap`, edges padded to the longest list."""
    longest = max(len(edges_of(adjacency).weights) for adjacency in adjacencies)
    graphs = [make_graph(adjacency, kind, longest) for adjacency in adjacencies]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *graphs)
