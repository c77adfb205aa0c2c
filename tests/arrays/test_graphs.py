"""Graphs: Laplacians and what they conserve, thresholds, components, edge lists, and edge by edge as by matrix."""

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest

from jaxmed.arrays import graphs

pytestmark = pytest.mark.core

PATH = np.array([[0, 1, 0, 0], [1, 0, 2, 0], [0, 2, 0, 1], [0, 0, 1, 0]], np.float32)
KINDS = ("combinatorial", "random_walk", "symmetric")


def random_adjacency(seed, nodes=12, density=0.4):
    rng = np.random.default_rng(seed)
    weights = np.triu(rng.lognormal(size=(nodes, nodes)) * (rng.random((nodes, nodes)) < density), 1)
    return (weights + weights.T).astype(np.float32)


def test_laplacians_of_a_path_are_those_written_by_hand():
    np.testing.assert_array_equal(
        graphs.laplacian(jnp.asarray(PATH), "combinatorial"),
        [[1, -1, 0, 0], [-1, 3, -2, 0], [0, -2, 3, -1], [0, 0, -1, 1]],
    )
    np.testing.assert_allclose(
        graphs.laplacian(jnp.asarray(PATH), "random_walk"),
        [[1, -1, 0, 0], [-1 / 3, 1, -2 / 3, 0], [0, -2 / 3, 1, -1 / 3], [0, 0, -1, 1]],
        atol=1e-7,
    )


def test_laplacians_conserve_what_they_say():
    adjacency = jnp.asarray(random_adjacency(0))
    strength = adjacency.sum(axis=1)
    np.testing.assert_allclose(graphs.laplacian(adjacency, "combinatorial").sum(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(strength @ graphs.laplacian(adjacency, "random_walk"), 0, atol=1e-5)
    np.testing.assert_allclose(graphs.laplacian(adjacency, "symmetric") @ jnp.sqrt(strength), 0, atol=1e-5)
    values = np.linalg.eigvalsh(graphs.laplacian(adjacency, "symmetric"))
    assert values.min() > -1e-5 and values.max() < 2 + 1e-5


def test_a_node_without_edges_has_a_row_of_zeros():
    adjacency = PATH.copy()
    adjacency[3] = adjacency[:, 3] = 0
    for kind in KINDS:
        assert (np.asarray(graphs.laplacian(jnp.asarray(adjacency), kind))[3] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_jraph_multiplies_edge_by_edge_as_the_matrices_do(kind):
    adjacencies = [random_adjacency(seed) for seed in (1, 2)]
    values = np.random.default_rng(3).normal(size=(2, 12)).astype(np.float32)
    kept = [graphs.make_graph(adjacency, kind, num_edges=40, is_sparse=True) for adjacency in adjacencies]
    found = graphs.operator(jraph.batch(kept), "laplacian") @ jnp.asarray(values.ravel())
    for index, adjacency in enumerate(adjacencies):
        expected = graphs.laplacian(jnp.asarray(adjacency), kind) @ values[index]
        np.testing.assert_allclose(found[12 * index : 12 * index + 12], expected, atol=2e-5)


def test_the_matrix_of_a_convolution_has_largest_eigenvalue_one():
    values = np.linalg.eigvalsh(graphs.operator(graphs.make_graph(random_adjacency(4)), "propagation"))
    np.testing.assert_allclose(values.max(), 1, atol=1e-6)


def test_edges_and_matrix_are_each_others_inverse():
    edges = graphs.edges_of(PATH)
    assert (edges.senders < edges.receivers).all() and len(edges.weights) == 3
    graph = graphs.graph_from_edges(edges, 4, is_sparse=False)
    np.testing.assert_array_equal(graphs.operator(graph, "adjacency"), PATH)
    # Every edge once, then back; edges named twice add up.
    assert graph.n_edge.tolist() == [6] and (graph.senders[3:] == graph.receivers[:3]).all()
    doubled = graphs.Edges(*(np.concatenate([column, column]) for column in edges))
    doubled = graphs.graph_from_edges(doubled, 4, is_sparse=False)
    np.testing.assert_array_equal(graphs.operator(doubled, "adjacency"), 2 * PATH)


def test_thresholds_keep_the_strongest_share_and_ties():
    adjacency = random_adjacency(5, density=1.0)
    kept = graphs.keep_strongest(adjacency, 0.25)
    assert np.count_nonzero(np.triu(kept)) == round(0.25 * 66)
    assert kept[kept > 0].min() >= adjacency[(kept == 0) & ~np.eye(12, dtype=bool)].max()
    np.testing.assert_array_equal(kept, kept.T)
    assert np.count_nonzero(graphs.keep_strongest(PATH, 1 / 3)) == 6  # the two ties of weight 1 beside the strongest
    with pytest.raises(ValueError, match="fraction"):
        graphs.keep_strongest(PATH, 0.0)


@pytest.mark.parametrize("nothing", [0.0, np.nan])
def test_one_triangle_is_mirrored_and_a_full_matrix_is_not(nothing):
    full = random_adjacency(7, density=1.0).astype(float)
    below = np.tri(12, k=-1, dtype=bool)
    for place in (below, below.T):
        np.testing.assert_array_equal(graphs.mirror_triangle(np.where(place, full, nothing)), full)
    assert graphs.mirror_triangle(full) is None and graphs.mirror_triangle(np.zeros((3, 3))) is None
    holed = np.where(below, full, 0.0)
    holed[0, 5] = 1.0
    assert graphs.mirror_triangle(holed) is None


def test_components_are_named_by_their_first_node():
    adjacency = np.zeros((5, 5))
    adjacency[0, 3] = adjacency[3, 0] = adjacency[1, 4] = adjacency[4, 1] = 1
    np.testing.assert_array_equal(graphs.components(adjacency), [0, 1, 2, 0, 1])


def test_stacked_graphs_pad_their_edges_with_nothing():
    stacked = graphs.stack_graphs([PATH, random_adjacency(6, 4, 1.0)])
    assert stacked.edges["adjacency"].shape == (2, 12)
    for padding in (slice(3, 6), slice(9, 12)):
        np.testing.assert_array_equal(stacked.edges["adjacency"][0, padding], 0)
        np.testing.assert_array_equal(stacked.senders[0, padding], stacked.receivers[0, padding])
    matrix = jax.vmap(lambda graph: graphs.operator(graph, "laplacian"))(stacked)[0]
    np.testing.assert_array_equal(matrix, graphs.operator(graphs.make_graph(PATH), "laplacian"))
    with pytest.raises(ValueError, match="num_edges"):
        graphs.make_graph(PATH, num_edges=2)


@pytest.mark.parametrize("kind", KINDS)
def test_edges_multiply_as_their_matrices(kind):
    rng = np.random.default_rng(0)
    upper = np.triu(rng.random((9, 9)) * (rng.random((9, 9)) < 0.4), 1)
    adjacency = (upper + upper.T).astype(np.float32)
    adjacency[8] = adjacency[:, 8] = 0  # a node without edges
    dense = graphs.make_graph(adjacency, kind)
    sparse = graphs.make_graph(adjacency, kind, num_edges=40, is_sparse=True)
    for values in (rng.random(9).astype(np.float32), rng.random((9, 3)).astype(np.float32)):
        for name in ("adjacency", "laplacian", "propagation"):
            found = graphs.operator(sparse, name) @ jnp.asarray(values)
            np.testing.assert_allclose(found, graphs.operator(dense, name) @ values, atol=1e-6)


def test_large_graphs_are_kept_as_edges_of_themselves():
    count = graphs.LARGEST_DENSE + 1
    ring = np.roll(np.eye(count, dtype=np.float32), 1, axis=0)
    ring = np.maximum(ring, ring.T)
    assert isinstance(graphs.operator(graphs.make_graph(ring), "laplacian"), graphs.EdgeMatrix)
    assert not isinstance(graphs.operator(graphs.make_graph(ring[:-1, :-1]), "laplacian"), graphs.EdgeMatrix)


def test_ten_thousand_nodes_need_no_matrix():
    count = 10_000
    nodes = np.arange(count, dtype=np.int32)
    edges = graphs.Edges(nodes[:-1], nodes[1:], np.ones(count - 1, np.float32))
    graph = graphs.graph_from_edges(edges, count, "combinatorial")
    values = (nodes % 7).astype(np.float32) ** 2
    np.testing.assert_array_equal(
        (graphs.operator(graph, "laplacian") @ jnp.asarray(values))[1:-1], -np.diff(values, 2)
    )
