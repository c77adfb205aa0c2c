"""Weighted, undirected graphs: adjacency matrices, Laplacians, thresholds, and jraph graphs for sparse work."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float, Int

LaplacianKind = Literal["combinatorial", "random_walk", "symmetric"]
Scaling = Literal["none", "max", "mean_strength", "spectral"]
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


def symmetrise(matrix: Float[np.ndarray, "node node"]) -> Float[np.ndarray, "node node"]:
    """Return the mean of a matrix and its transpose, without self-connections."""
    symmetric = (matrix + matrix.T) / 2
    np.fill_diagonal(symmetric, 0.0)
    return symmetric


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
        fraction: Of n (n - 1) / 2 edges, above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected a number above 0 and at most 1, got {fraction}")
    upper = adjacency[np.triu_indices(len(adjacency), 1)]
    keep = max(1, round(fraction * len(upper)))
    threshold = np.sort(upper)[-keep]
    return np.where(adjacency >= max(threshold, np.finfo(adjacency.dtype).tiny), adjacency, 0.0)


def rescale(adjacency: Float[np.ndarray, "node node"], scaling: Scaling) -> Float[np.ndarray, "node node"]:
    """Divide a matrix by one number.

    Args:
        adjacency: Symmetric, not negative, with an edge.
        scaling: By nothing, the largest weight, the mean strength of nodes, or the largest eigenvalue.
    """
    match scaling:
        case "none":
            return adjacency
        case "max":
            return adjacency / adjacency.max()
        case "mean_strength":
            return adjacency / adjacency.sum(axis=1).mean()
        case "spectral":
            return adjacency / np.linalg.eigvalsh(adjacency)[-1]
    raise ValueError(f"scaling: expected none, max, mean_strength or spectral, got {scaling!r}")


def components(adjacency: Float[np.ndarray, "node node"]) -> Int[np.ndarray, " node"]:
    """Number the connected components; a node's value is the smallest index in its component."""
    _, labels = scipy.sparse.csgraph.connected_components(scipy.sparse.csr_array(adjacency > 0), directed=False)
    first = {label: node for node, label in reversed(list(enumerate(labels)))}
    return np.array([first[label] for label in labels])


def edges_of(adjacency: Float[np.ndarray, "node node"]) -> Edges:
    """List the edges of a symmetric matrix."""
    senders, receivers = np.nonzero(np.triu(adjacency, 1))
    return Edges(senders.astype(np.int32), receivers.astype(np.int32), adjacency[senders, receivers])


def matrix_of(edges: Edges, num_nodes: int) -> Float[np.ndarray, "node node"]:
    """Return the symmetric matrix of an edge list; edges named twice add up."""
    adjacency = np.zeros((num_nodes, num_nodes))
    np.add.at(adjacency, (edges.senders, edges.receivers), edges.weights)
    return adjacency + adjacency.T


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


def symmetric_normalised(adjacency: Float[Array, "node node"]) -> Float[Array, "node node"]:
    """Return D^-1/2 (A + I) D^-1/2 with the strengths of A + I, the matrix of a graph convolution.

    Source: Kipf and Welling, arXiv:1609.02907, equation 2.
    """
    looped = adjacency + jnp.eye(adjacency.shape[-1], dtype=adjacency.dtype)
    root = jax.lax.rsqrt(jnp.sum(looped, axis=-1))
    return root[:, None] * looped * root


class EdgeMatrix(NamedTuple):
    """A symmetric pattern of entries, for graphs too large for a matrix; `matrix @ values` multiplies.

    Attributes:
        rows: Of entries off the diagonal, ascending, padded with 0.
        columns: Likewise.
        values: Likewise, 0 on padding.
        diagonal: Entries on it.
    """

    rows: Int[Array, "*batch entry"]
    columns: Int[Array, "*batch entry"]
    values: Float[Array, "*batch entry"]
    diagonal: Float[Array, "*batch node"]

    def __matmul__(self, values: Array) -> Array:
        """Multiply a vector, or a matrix with a row per node."""
        shape = (-1,) + (1,) * (values.ndim - 1)
        flow = self.values.reshape(shape) * values[self.columns]
        total = jax.ops.segment_sum(flow, self.rows, len(self.diagonal))
        return total + self.diagonal.reshape(shape) * values


Matrix = Float[Array, "*batch node node"] | EdgeMatrix


class GraphOperators(NamedTuple):
    """A graph as networks and equations use it; arrays only, so that graphs of one size are vmapped.

    Attributes:
        adjacency: Symmetric, not negative, zero diagonal.
        laplacian: Of the kind chosen.
        propagation: D^-1/2 (A + I) D^-1/2.
        senders: One end of every undirected edge, padded with 0.
        receivers: The other end; equal to the sender on padding.
        weights: Of edges, 0 on padding.
        regional: A map of regions on [0, 1] that may modulate growth, such as amyloid or the expression of a gene;
            ones where none is given.
    """

    adjacency: Matrix
    laplacian: Matrix
    propagation: Matrix
    senders: Int[Array, "*batch edge"]
    receivers: Int[Array, "*batch edge"]
    weights: Float[Array, "*batch edge"]
    regional: Float[Array, "*batch node"]


def graph_operators(
    adjacency: Float[np.ndarray, "node node"],
    kind: LaplacianKind = "random_walk",
    num_edges: int | None = None,
    regional: Float[np.ndarray, " node"] | None = None,
    is_sparse: bool | None = None,
) -> GraphOperators:
    """Build the operators of one graph.

    Args:
        adjacency: Symmetric, not negative, zero diagonal.
        kind: See `laplacian`.
        num_edges: Undirected edges to pad to; None for those there are.
        regional: See `GraphOperators`.
        is_sparse: Whether matrices are kept as edges; None for graphs of more than `LARGEST_DENSE` nodes.
    """
    if is_sparse or (is_sparse is None and len(adjacency) > LARGEST_DENSE):
        return edge_operators(edges_of(adjacency), len(adjacency), kind, num_edges, regional)
    edges = edges_of(adjacency)
    padding = (num_edges or len(edges.weights)) - len(edges.weights)
    if padding < 0:
        raise ValueError(f"num_edges: expected at least {len(edges.weights)}, got {num_edges}")
    matrix = jnp.asarray(adjacency)
    senders, receivers, weights = (jnp.asarray(np.pad(column, (0, padding))) for column in edges)
    modulation = jnp.ones(len(matrix), matrix.dtype) if regional is None else jnp.asarray(regional, matrix.dtype)
    return GraphOperators(
        matrix,
        laplacian(matrix, kind),
        symmetric_normalised(matrix),
        senders,
        receivers,
        weights.astype(matrix.dtype),
        modulation,
    )


def edge_operators(
    edges: Edges,
    num_nodes: int,
    kind: LaplacianKind = "random_walk",
    num_edges: int | None = None,
    regional: Float[np.ndarray, " node"] | None = None,
) -> GraphOperators:
    """Build the operators of one graph without a matrix of its nodes.

    Args:
        edges: Each once; weights above 0.
        num_nodes: Number of nodes.
        kind: See `laplacian`.
        num_edges: Undirected edges to pad to; None for those there are.
        regional: See `GraphOperators`.
    """
    padding = (num_edges or len(edges.weights)) - len(edges.weights)
    if padding < 0:
        raise ValueError(f"num_edges: expected at least {len(edges.weights)}, got {num_edges}")
    rows, columns = np.concatenate([edges.senders, edges.receivers]), np.concatenate([edges.receivers, edges.senders])
    weights = np.concatenate([edges.weights, edges.weights]).astype(np.float64)
    order = np.argsort(rows, kind="stable")
    rows, columns, weights = rows[order], columns[order], weights[order]
    strength = np.bincount(rows, weights, num_nodes)
    inverse, root = 1 / (strength + DEGREE_FLOOR), 1 / np.sqrt(strength + DEGREE_FLOOR)
    looped = 1 / np.sqrt(strength + 1)
    match kind:
        case "combinatorial":
            entries, diagonal = -weights, strength
        case "random_walk":
            entries, diagonal = -weights * inverse[rows], strength * inverse
        case "symmetric":
            entries, diagonal = -weights * root[rows] * root[columns], strength * root**2
        case _:
            raise ValueError(f"kind: expected combinatorial, random_walk or symmetric, got {kind!r}")
    dtype = jnp.result_type(edges.weights.dtype)

    def matrix(entries: np.ndarray, diagonal: np.ndarray) -> EdgeMatrix:
        # Padding comes first, so that rows stay in order.
        first, second, values = (np.pad(column, (2 * padding, 0)) for column in (rows, columns, entries))
        place = (jnp.asarray(first, jnp.int32), jnp.asarray(second, jnp.int32))
        return EdgeMatrix(*place, jnp.asarray(values, dtype), jnp.asarray(diagonal, dtype))

    senders, receivers, once = (jnp.asarray(np.pad(column, (0, padding))) for column in edges)
    modulation = np.ones(num_nodes) if regional is None else regional
    return GraphOperators(
        matrix(weights, np.zeros(num_nodes)),
        matrix(entries, diagonal),
        matrix(weights * looped[rows] * looped[columns], looped**2),
        senders,
        receivers,
        once.astype(dtype),
        jnp.asarray(modulation, dtype),
    )


def stack_graphs(
    adjacencies: Sequence[Float[np.ndarray, "node node"]], kind: LaplacianKind = "random_walk"
) -> GraphOperators:
    """Stack the operators of subject-specific graphs on the same nodes, edges padded to the longest list."""
    longest = max(len(edges_of(adjacency).weights) for adjacency in adjacencies)
    graphs = [graph_operators(adjacency, kind, longest) for adjacency in adjacencies]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *graphs)


def make_graph(adjacency: Float[np.ndarray, "node node"]) -> jraph.GraphsTuple:
    """Turn a symmetric matrix into a jraph graph with both directions of every edge.

    Returns:
        One graph: `edges` holds weights, (edge,), `nodes` is None. Receivers are in order, so that sums over a node's
        edges run over neighbouring memory.
    """
    receivers, senders = np.nonzero(adjacency)
    return jraph.GraphsTuple(
        nodes=None,
        edges=jnp.asarray(adjacency[receivers, senders], jnp.float32),
        senders=jnp.asarray(senders, jnp.int32),
        receivers=jnp.asarray(receivers, jnp.int32),
        n_node=jnp.array([len(adjacency)]),
        n_edge=jnp.array([len(senders)]),
        globals=None,
    )


def batch_graphs(adjacencies: Sequence[Float[np.ndarray, "_node _node"]]) -> jraph.GraphsTuple:
    """Put subject-specific graphs into one, padded to sizes that few batches share.

    Nodes and edges are rounded up to the next power of two, one more graph holds the padding.
    """
    graph = jraph.batch([make_graph(adjacency) for adjacency in adjacencies])
    num_nodes, num_edges = int(graph.n_node.sum()) + 1, int(graph.n_edge.sum())
    return jraph.pad_with_graphs(
        graph, _power_of_two(num_nodes), max(1, _power_of_two(num_edges)), len(adjacencies) + 1
    )


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def strengths(graph: jraph.GraphsTuple, num_nodes: int) -> Float[Array, " node"]:
    """Sum the weights at each node."""
    assert graph.receivers is not None  # jraph's types allow a graph without edges
    return jax.ops.segment_sum(jnp.asarray(graph.edges), graph.receivers, num_nodes)


def apply_laplacian(
    graph: jraph.GraphsTuple, values: Float[Array, " node"], kind: LaplacianKind = "random_walk"
) -> Float[Array, " node"]:
    """Multiply by the Laplacian edge by edge, for graphs too large for a matrix.

    Args:
        graph: From `make_graph` or `batch_graphs`.
        values: One per node, padding included.
        kind: See `laplacian`.
    """
    assert graph.senders is not None and graph.receivers is not None
    num_nodes = len(values)
    strength = strengths(graph, num_nodes)
    root = 1 / jnp.sqrt(strength + DEGREE_FLOOR)
    given = values * root if kind == "symmetric" else values
    flow = jnp.asarray(graph.edges) * (given[graph.receivers] - given[graph.senders])
    total = jax.ops.segment_sum(flow, graph.receivers, num_nodes)
    match kind:
        case "combinatorial":
            return total
        case "random_walk":
            return total / (strength + DEGREE_FLOOR)
        case "symmetric":
            return root * total
    raise ValueError(f"kind: expected combinatorial, random_walk or symmetric, got {kind!r}")
