"""Equations of progression: what each part conserves, how it starts, gradients, and parity with torchdiffeq."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.graphs import edges_once, make_graph, operator, stack_graphs
from jaxmed.models.graph_diffusion import (
    ProgressionConfig,
    Rates,
    inverse_softplus,
    make_progression_model,
    refine,
    set_mechanism,
)
from jaxmed.physics.progression import fkpp
from jaxmed.solvers.fixed_grid import solve_fixed
from jaxmed.solvers.ode import OdeConfig, solve

pytestmark = pytest.mark.core

PATH = np.array([[0.0, 1, 0, 0], [1, 0, 2, 0], [0, 2, 0, 1], [0, 0, 1, 0]])
SMALL = {"width": 5, "latent": 4, "rank": 2, "heads": 2}
EQUATIONS = ("ndm", "fkpp", "weighted_fkpp", "grand", "ndcn", "neural_ode_local", "neural_ode_cross_node")
STATE = np.array([0.4, 0.1, 0.05, 0.0])


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@functools.cache
def compiled(config):
    """Model and start of a configuration, compiled once for all tests: op by op, every operation is a program."""
    model = make_progression_model(config)
    inputs = (jnp.asarray(STATE), jnp.array(3.0), make_graph(PATH, "combinatorial"), jnp.asarray(STATE))
    return model._replace(apply=jax.jit(model.apply), init=jax.jit(model.init)), inputs


def built(key, scramble=False, **fields):
    """A small model on the path, in double precision; `scramble` moves every parameter away from its start."""
    model, inputs = compiled(ProgressionConfig(**SMALL, **fields))
    params = jax.tree.map(lambda leaf: leaf.astype(float), model.init(key, *inputs))
    if scramble:
        leaves, tree = jax.tree.flatten(params)
        draws = [np.random.default_rng(n).normal(size=leaf.shape) for n, leaf in enumerate(leaves)]
        params = jax.tree.unflatten(tree, [leaf + 0.5 * draw for leaf, draw in zip(leaves, draws, strict=True)])
    return model, params, inputs


def trajectory(model, params, graph, start, times):
    def field(t, c, p):
        return model.apply(p, c, t, graph, start).total

    return jax.jit(lambda p: solve_fixed(field, start, times, p))(params)


def test_equal_edge_diffusivities_are_the_ordinary_laplacian(key):
    # Specification, (i) 4: the printed values of (i) 1 through the incidence form.
    model, params, inputs = built(key, equation="igndmoe", structure="incidence", local="none", reaction=False)
    out = params["structure"]["out"]
    k = inverse_softplus(jnp.array([0.05]))
    params["structure"]["out"] = {"kernel": out["kernel"] * 0, "bias": k}
    params["gate"]["out"]["bias"] = jnp.array([-800.0, 0, 0])  # the second expert alone
    found = trajectory(model, params, inputs[2], jnp.eye(4)[0], jnp.linspace(0.0, 10.0, 101))
    np.testing.assert_allclose(found.states[-1], [0.66714043, 0.22618237, 0.08987791, 0.0167993], atol=1e-8)


def test_any_edge_diffusivities_keep_the_sum_and_pull_neighbours_together(key):
    rng = np.random.default_rng(0)
    for seed in range(5):
        model, params, (_, t, graph, start) = built(jax.random.key(seed), True, structure="incidence", local="none")
        state = jnp.asarray(rng.random(4))
        rate = model.apply(params, state, t, graph, start).experts[1]
        np.testing.assert_allclose(rate.sum(), 0, atol=1e-14)
        assert float(state @ rate) <= 0
        # The operator at this state, column by column: K G K^T with G held.
        matrix = edge_operator(params, state, t, graph)
        np.testing.assert_allclose(matrix @ state, rate, atol=1e-12)
        values = np.linalg.eigvalsh(matrix)
        assert values.max() < 1e-12 and np.allclose(matrix, matrix.T)


def edge_operator(params, state, t, graph):
    """-K G K^T written out with an incidence matrix, from the parameters of the edge network."""
    p = params["structure"]
    p, state = jax.tree.map(np.asarray, (p, state))
    matrix = np.zeros((4, 4))
    for u, v, weight in zip(*map(np.asarray, edges_once(graph)), strict=True):
        x = np.array([state[u] + state[v], (state[u] - state[v]) ** 2, weight, t / 30])
        h = x @ p["edge"]["kernel"] + p["edge"]["bias"]
        g = np.log1p(np.exp((h / (1 + np.exp(-h))) @ p["out"]["kernel"] + p["out"]["bias"]))[0]
        column = np.zeros(4)
        column[int(u)], column[int(v)] = np.sqrt(weight), -np.sqrt(weight)
        matrix -= g * np.outer(column, column)
    return matrix


@pytest.mark.parametrize("gate", ["temporal", "state_aware", "constant"])
def test_weights_of_experts_sum_to_one_at_every_stage(key, gate):
    model, params, (state, _, graph, start) = built(key, True, gate=gate)
    for t in (0.0, 4.0, 30.0):
        rates = model.apply(params, state, jnp.array(t), graph, start)
        np.testing.assert_allclose(rates.weights.sum(), 1, atol=1e-14)
        assert (rates.weights > 0).all()
        np.testing.assert_allclose(rates.total, rates.weights @ rates.experts, atol=1e-14)
    same = [model.apply(params, state, jnp.array(t), graph, start).weights for t in (0.0, 30.0)]
    assert np.allclose(*same) == (gate == "constant")


@pytest.mark.parametrize("structure", ["gae", "low_rank", "gcn", "transformer"])
def test_a_new_mixture_with_its_first_expert_alone_is_fkpp(key, structure):
    # Specification, (i) 5: neural experts start at nothing; the gate is forced to (1, 0, 0).
    model, params, (_, _, graph, _) = built(key, structure=structure)
    params = set_mechanism(params, *map(jnp.array, (0.1, 0.3, 1.0)))
    start, times = jnp.array([0.1, 0, 0, 0]), jnp.linspace(0.0, 20.0, 161)
    rates = model.apply(params, start, jnp.array(1.0), graph, start)
    np.testing.assert_array_equal(rates.experts[1:], 0)
    np.testing.assert_allclose(rates.weights, 1 / 3)
    params["gate"]["out"]["bias"] = jnp.array([800.0, 0, 0])
    found = trajectory(model, params, graph, start, times)
    rates, matrix = jnp.array([0.1, 0.3, 1.0]), operator(graph, "laplacian")
    mechanistic = jax.jit(lambda r: solve_fixed(lambda t, c, r: fkpp(c, matrix, *r), start, times, r))(rates)
    np.testing.assert_allclose(found.states, mechanistic.states, atol=1e-12)
    np.testing.assert_allclose(found.states[-1], [0.91671082, 0.88517759, 0.86064258, 0.81088155], atol=1e-7)


def test_the_released_normalisation_centres_over_experts_and_scales_over_regions(key):
    # Specification, (b) 6: the mean over experts at each region, the deviation (n - 1) of each expert over regions.
    model, params, inputs = built(key, True, match_release=True)
    params["gate"]["out"]["bias"] = jnp.array([0.3, -0.2, 0.1])
    rates = model.apply(params, *inputs)
    experts = np.asarray(rates.experts)
    found = 0.0
    for expert, weight in zip(experts, rates.weights, strict=True):
        deviation = np.sqrt(sum((value - expert.mean()) ** 2 for value in expert) / (len(expert) - 1))
        found = found + weight * (expert - experts.mean(axis=0)) / (deviation + 1)
    scale, shift = params["normalisation"]["scale"], params["normalisation"]["shift"]
    np.testing.assert_allclose(rates.total, scale * found + shift, rtol=0, atol=5e-11)
    # New networks give 0 in every region, where the root of their variance has no slope.
    model, params, inputs = built(key, match_release=True)
    gradient = jax.grad(lambda p: model.apply(p, *inputs).total.sum())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.peers
def test_the_released_normalisation_is_that_of_torch(key):
    import torch

    model, params, inputs = built(key, True, match_release=True)
    rates = model.apply(params, *inputs)
    stacked = torch.tensor(np.asarray(rates.experts).T[None])  # batch, region, expert, as in the release
    centred = stacked - stacked.mean(dim=-1, keepdim=True)
    normalised = centred / (stacked.std(dim=1, keepdim=True) + 1)
    mixed = torch.bmm(normalised, torch.tensor(np.asarray(rates.weights))[None, :, None])[0, :, 0].numpy()
    scale, shift = params["normalisation"]["scale"], params["normalisation"]["shift"]
    np.testing.assert_allclose(rates.total, scale * mixed + shift, rtol=0, atol=5e-11)


@pytest.mark.parametrize("structure", ["gae", "incidence", "gcn", "transformer"])  # a low rank is of named regions
def test_structures_relabel_with_their_nodes(key, structure):
    model, params, (state, t, graph, _) = built(key, True, structure=structure, local="per_region")
    order = np.array([2, 0, 3, 1])
    shuffled = make_graph(PATH[np.ix_(order, order)], "combinatorial")
    one = model.apply(params, state, t, graph, state).total
    other = model.apply(params, state[order], t, shuffled, state[order]).total
    np.testing.assert_allclose(other, one[order], atol=1e-12)


SPARSE = [
    *({"structure": structure, "local": "per_region"} for structure in ("gae", "incidence", "gcn", "transformer")),
    *({"equation": equation} for equation in ("fkpp", "grand", "ndcn")),
]


@pytest.mark.parametrize("fields", SPARSE, ids=lambda fields: " ".join(fields.values()))
def test_a_graph_kept_as_edges_gives_the_fields_and_gradients_of_its_matrix(key, fields):
    model, params, (state, t, graph, _) = built(key, True, **fields)
    edges = make_graph(PATH, "combinatorial", num_edges=5, is_sparse=True)  # two of them padding

    def total(params, c, graph):
        return jnp.sum(jnp.sin(model.apply(params, c, t, graph, state).total * jnp.arange(1.0, 5)))

    evaluate = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    for one, other in zip(*(jax.tree.leaves(evaluate(params, state, kept)) for kept in (graph, edges)), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-9, atol=1e-12)


def test_blocks_of_a_refined_graph_are_the_whole(key):
    h = jax.random.normal(key, (11, 3))
    whole = jax.nn.softmax(h @ h.T, axis=-1) @ h
    np.testing.assert_allclose(refine(h, 4), whole, atol=1e-12)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_baselines_have_one_expert_and_gradients_for_every_parameter(key, equation):
    model, params, inputs = built(key, True, equation=equation)
    rates = jax.jit(model.apply)(params, *inputs)
    assert isinstance(rates, Rates) and rates.experts.shape == (1, 4)
    np.testing.assert_array_equal(rates.experts[0], rates.total)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, *inputs).total ** 2)))(params)
    # A key's bias moves all scores of a row alike, and the weighted equation's growth scales with a map of ones.
    still = {"grand": ("key", "bias"), "weighted_fkpp": ("strength",)}.get(equation, ())
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        names = [entry.key for entry in path]
        if not (still and all(name in names for name in still)):
            assert float(jnp.abs(leaf).max()) > 0, names


def test_local_equations_do_not_look_at_neighbours(key):
    model, params, (state, t, graph, start) = built(key, True, equation="neural_ode_local")
    jacobian = jax.jacobian(lambda c: model.apply(params, c, t, graph, start).total)(state)
    np.testing.assert_array_equal(jacobian - np.diag(np.diag(jacobian)), 0)
    model, params, _ = built(key, True, equation="neural_ode_cross_node")
    jacobian = jax.jacobian(lambda c: model.apply(params, c, t, graph, start).total)(state)
    assert np.abs(jacobian - np.diag(np.diag(jacobian))).min(where=~np.eye(4, dtype=bool), initial=1) > 0


def test_a_bounded_reaction_ends_at_the_ceiling(key):
    model, params, (_, t, graph, start) = built(key, True, bounded=True)
    v = jax.nn.softplus(params["mechanism"]["ceiling"])
    for state in (jnp.zeros(4), jnp.full(4, v)):
        np.testing.assert_allclose(model.apply(params, state, t, graph, start).experts[2], 0, atol=1e-14)


def test_subject_specific_graphs_are_vmapped(key):
    other = PATH + np.array([[0, 0, 0, 0.5], [0, 0, 0, 0], [0, 0, 0, 0], [0.5, 0, 0, 0]])
    graphs = stack_graphs([PATH, other], "combinatorial")
    model, params, (state, t, graph, start) = built(key, True, structure="incidence")
    both = jax.vmap(lambda g: model.apply(params, state, t, g, start).total)(graphs)
    np.testing.assert_allclose(both[0], model.apply(params, state, t, graph, start).total, atol=1e-14)
    alone = make_graph(other, "combinatorial")
    np.testing.assert_allclose(both[1], model.apply(params, state, t, alone, start).total, atol=1e-14)


def test_subjects_with_their_own_graphs_are_solved_at_once_with_their_own_steps(key):
    stiff = 50 * PATH  # diffuses fifty times as fast
    graphs = stack_graphs([PATH, stiff], "combinatorial")
    model, params, (state, _, graph, start) = built(key, equation="fkpp")
    times, config = jnp.array([0.0, 2.0]), OdeConfig(rtol=1e-8, atol=1e-8)

    def one(g):
        return solve(lambda t, c, p: model.apply(p, c, t, g, start).total, state, times, config, params)

    both = jax.jit(jax.vmap(one))(graphs)
    assert bool(both.succeeded.all()) and int(both.num_steps[1]) > 2 * int(both.num_steps[0])
    rates = [jax.nn.softplus(params["expert"][name]) for name in ("diffusion", "growth", "ceiling")]
    matrix = operator(graph, "laplacian")
    exact = solve(lambda t, c, r: fkpp(c, matrix, *r), state, times, config, rates)
    np.testing.assert_allclose(both.states[0], exact.states, atol=1e-7)


def test_gradients_through_the_adaptive_solver_are_finite_differences(key):
    # Specification, (i) 8, second half; the fixed grid too.
    model, params, (state, _, graph, start) = built(
        key, True, structure="incidence", local="per_region", gate="constant"
    )
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    direction = jax.random.normal(jax.random.key(1), flat.shape)
    times = jnp.array([0.0, 2.0])

    def ends(solver):
        def end(distance):
            moved = unravel(flat + distance * direction)

            def field(t, c, p):
                return model.apply(p, c, t, graph, start).total

            if solver == "adaptive":
                # Kept tight: what the tolerance leaves over is divided by the small distance below.
                states = solve(
                    field, state, times, OdeConfig("dopri5", 1e-11, 1e-11, max_steps=128, adjoint="direct"), moved
                ).states
            else:
                states = solve_fixed(field, state, jnp.linspace(0.0, 2.0, 9), moved).states
            return jnp.sum(states[-1] ** 2)

        return jax.jit(end), jax.jit(jax.grad(end))

    for solver in ("adaptive", "fixed"):
        end, slope = ends(solver)
        difference = (end(1e-4) - end(-1e-4)) / 2e-4
        np.testing.assert_allclose(slope(0.0), difference, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"), [("width", 0), ("latent", 0), ("horizon", -1.0), ("rank", 0), ("heads", 0)]
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        ProgressionConfig(**{field: value})
    with pytest.raises(ValueError, match="match_release"):
        ProgressionConfig(match_release=True, local="none")


@pytest.mark.peers
def test_the_same_field_and_weights_give_torchdiffeqs_trajectory(key):
    # Specification, (i) 8.
    torch = pytest.importorskip("torch")
    torchdiffeq = pytest.importorskip("torchdiffeq")
    model, params, (state, _, graph, start) = built(key, True)
    weights = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), params)
    propagation, matrix = (
        torch.tensor(np.asarray(m)) for m in (operator(graph, "propagation"), operator(graph, "laplacian"))
    )

    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    def field(t, c):
        silu, softplus = torch.nn.functional.silu, torch.nn.functional.softplus
        mechanism, structure, local, gate = (weights[n] for n in ("mechanism", "structure", "local", "gate"))
        k, alpha, v = (softplus(mechanism[name]) for name in ("diffusion", "growth", "ceiling"))
        x = torch.stack([c, torch.ones_like(c) * t / 30], dim=-1)
        h = silu(dense(structure["encode_1"], propagation @ x))
        h = torch.tanh(dense(structure["encode_2"], propagation @ h))
        refined = torch.softmax(h @ h.T, dim=-1)
        f_s = 0.1 * dense(structure["out"], silu(dense(structure["decode"], refined @ h)))[:, 0]
        f_l = 0.1 * dense(local["out"], silu(dense(local["hidden"], torch.cat([c, t[None] / 30]))))
        beta = torch.softmax(dense(gate["out"], torch.relu(dense(gate["time"], t[None] / 30))), dim=-1)
        growth = alpha * torch.clamp(c, min=0.0) * (v - c)  # nothing grows below 0
        return beta[0] * (growth - k * matrix @ c) + beta[1] * f_s + beta[2] * f_l

    times = np.linspace(0.0, 12.0, 7)
    theirs = torchdiffeq.odeint(field, torch.tensor(STATE), torch.tensor(times), rtol=1e-8, atol=1e-8, method="dopri5")
    ours = solve(
        lambda t, c, p: model.apply(p, c, t, graph, start).total,
        state,
        jnp.asarray(times),
        OdeConfig("dopri5", 1e-8, 1e-8),
        params,
    )
    np.testing.assert_allclose(ours.states, theirs.numpy(), atol=1e-6)
    assert np.abs(np.diff(theirs.numpy(), axis=0)).max() > 0.05
