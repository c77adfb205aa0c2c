"""Dual optimisation on simulated cohorts: the mixture beats its first expert, stages come back, runs batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmed.arrays.graphs import make_graph
from jaxmed.arrays.visits import take_subjects
from jaxmed.errors import InputError
from jaxmed.metrics.bands import bootstrap_weights
from jaxmed.models.graph_diffusion import ProgressionConfig
from jaxmed.solvers.ode import GRID
from jaxmed.synthesis.phantoms.connectome import CohortConfig, random_connectome, simulate_cohort
from jaxmed.systems import igndmoe
from jaxmed.systems.igndmoe.dual import FitConfig
from jaxmed.systems.igndmoe.fitting import fit_runs, make_problem, programs

SEEDS = (0, 4)
SMALL = ProgressionConfig(width=8, latent=4)
CONNECTOME = random_connectome(0, 8, 0.4)
PLANTED = CohortConfig(subjects=60, reaction=0.2, edge_diffusivity=1.0)
MIXTURE = FitConfig(model=SMALL, grid_steps=32, stages=64, steps=25, loops=4, solver="fixed")  # compiles fastest
FKPP = dataclasses.replace(MIXTURE, model=dataclasses.replace(SMALL, equation="fkpp"))


@pytest.fixture(scope="module")
def cohort():
    return simulate_cohort(jax.random.key(0), CONNECTOME.adjacency, SEEDS, PLANTED)


@pytest.fixture(scope="module")
def graph():
    return make_graph(CONNECTOME.adjacency)


def roles(count, runs=1):
    """The first fifth validates, the second is held out."""
    fifth = count // 5
    validation, train = np.zeros((runs, count), np.float32), np.ones((runs, count), np.float32)
    validation[:, :fifth] = 1
    train[:, : 2 * fifth] = 0
    return train, validation, slice(fifth, 2 * fifth)


def run(cohort, graph, config, seeds=(0,)):
    train, validation, held_out = roles(len(cohort.onsets), len(seeds))
    return fit_runs(cohort.visits, graph, config, SEEDS, train, validation, np.array(seeds)), held_out


def by_rounds(cohort, graph, config, state=None):
    """What every round left and told, and the fit, from the start or from a state that was kept."""
    train, validation, _ = roles(len(cohort.onsets))
    problem = make_problem(cohort.visits, graph, SEEDS, train, validation)
    start, advance, finish = programs(config)
    state, found = start(jax.random.key(0)[None], problem) if state is None else state, []
    while not state.finished.all():
        state, info = advance(state, problem)
        found.append((state, info))
    return found, finish(state, problem)


def test_the_mixture_beats_fkpp_on_held_out_subjects_and_finds_their_stages(cohort, graph):
    # Specification, (i) 7, in small; `test_the_full_loop_...` is its full size.
    mixture, held_out = run(cohort, graph, MIXTURE)
    states, _ = by_rounds(cohort, graph, MIXTURE)
    fkpp, _ = run(cohort, graph, FKPP)
    assert bool(mixture.succeeded[0]) and bool(fkpp.succeeded[0])
    assert float(mixture.errors[0, held_out].sum()) < 0.9 * float(fkpp.errors[0, held_out].sum())
    for found in (mixture, fkpp):
        assert scipy.stats.spearmanr(found.onsets[0], cohort.onsets).statistic > 0.95
    np.testing.assert_allclose(mixture.weights.sum(axis=-1), 1, atol=1e-5)
    assert [int(state.loop[0]) for state, _ in states] == list(range(1, len(states) + 1))
    errors = [float(info.train[0]) for _, info in states]
    assert errors[-1] < errors[0] and all(int(info.rejected[0]) < MIXTURE.steps / 2 for _, info in states)
    # An interrupted run goes on from what it kept, to the same numbers.
    _, resumed = by_rounds(cohort, graph, MIXTURE, states[0][0])
    np.testing.assert_allclose(resumed.onsets, mixture.onsets, atol=1e-5)
    np.testing.assert_allclose(resumed.trajectory.states, mixture.trajectory.states, atol=1e-6)


def test_many_runs_in_one_program_are_those_alone(cohort, graph):
    # One short round from the same state: over many steps rounding grows along the line of fits that differ by a later
    # start for all.
    short = dataclasses.replace(FKPP, steps=4, loops=1)
    train, validation, _ = roles(len(cohort.onsets), 2)
    train[1] = 1 - train[1]
    start, advance, finish = programs(short)
    pair = make_problem(cohort.visits, graph, SEEDS, train, validation)
    state = start(jax.vmap(jax.random.key)(np.array([0, 1])), pair)
    both, _ = advance(state, pair)
    for place in (0, 1):
        alone = make_problem(cohort.visits, graph, SEEDS, train[[place]], validation[[place]])
        single, _ = advance(jax.tree.map(lambda leaf, row=place: leaf[row : row + 1], state), alone)
        # Where the course is flat a stage is loose, and its error is not.
        found, expected = finish(single, alone).errors[0], finish(both, pair).errors[place]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)  # differences of squares near 8
        np.testing.assert_allclose(single.onsets[0], both.onsets[place], atol=0.1)
        others = (jax.tree.leaves(found._replace(onsets=0.0)) for found in (single, both))
        for one, other in zip(*others, strict=True):
            if np.ndim(one):
                np.testing.assert_allclose(one[0], other[place], rtol=1e-4, atol=1e-4)
    assert float(jax.tree.leaves(both.params)[0][0].ravel()[0]) != float(jax.tree.leaves(both.params)[0][1].ravel()[0])


@pytest.mark.parametrize("adjoint", ["checkpoint", pytest.param("forward", marks=pytest.mark.slow)])
def test_a_round_of_many_runs_is_the_same_by_both_solvers(cohort, graph, adjoint):
    fixed = dataclasses.replace(FKPP, steps=3, loops=1, grid_steps=16)
    by_diffrax = dataclasses.replace(fixed, solver="diffrax", ode=dataclasses.replace(GRID, adjoint=adjoint))
    train, validation, _ = roles(len(cohort.onsets), 2)
    problem = make_problem(cohort.visits, graph, SEEDS, train, validation)
    state = programs(fixed)[0](jax.vmap(jax.random.key)(np.array([0, 1])), problem)
    # Away from the mechanistic optimum, where the round begins.
    state = state._replace(params=jax.tree.map(lambda leaf: leaf + 0.3, state.params))
    (one, _), (other, info) = (programs(config)[1](state, problem) for config in (fixed, by_diffrax))
    np.testing.assert_allclose(one.error, other.error, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert np.isfinite(info.train).all() and int(info.rejected.max()) < 3


def test_the_five_line_example():
    adjacency = random_connectome(0, 8, 0.4).adjacency
    cohort = simulate_cohort(jax.random.key(0), adjacency, seeds=(0, 4), config=CohortConfig(subjects=60))
    found = igndmoe.fit(cohort.visits, make_graph(adjacency), FKPP, seeds=(0, 4))
    assert found.onsets.shape == (60,) and found.trajectory.states.shape == (33, 8) and bool(found.succeeded)


def test_a_traced_fit_is_the_hosts_and_what_cannot_be_traced_says_so(cohort, graph):
    # Contracts, section 9: under jit and vmap; grad is refused, as the docstring announces.
    short = dataclasses.replace(FKPP, steps=4, loops=1)
    visits = jax.tree.map(jnp.asarray, take_subjects(cohort.visits, slice(0, 20)))
    pair = jnp.stack([visits.values, 0.9 * visits.values])
    traced = jax.jit(jax.vmap(lambda values: igndmoe.fit_on_device(visits._replace(values=values), graph, short)))(pair)
    alone = igndmoe.fit(visits, graph, short)
    np.testing.assert_allclose(traced.trajectory.states[0], alone.trajectory.states, atol=1e-4)
    np.testing.assert_allclose(traced.errors[0], alone.errors, rtol=1e-3, atol=2e-5)
    assert int(traced.rounds[0]) == int(alone.rounds) == 1
    assert not np.allclose(traced.errors[1], alone.errors, rtol=0.05)
    # Without seeds it starts where values are highest.
    known = np.asarray(visits.present)[..., None]
    highest = np.argmax((np.asarray(visits.values) * known).sum(axis=(0, 1)))
    assert np.flatnonzero(alone.trajectory.states[0]).tolist() == [highest]
    with pytest.raises(ValueError, match=r"igndmoe.fit_on_device: expected no derivative .* alignment.align"):
        jax.grad(lambda v: igndmoe.fit_on_device(visits._replace(values=v), graph, short).errors.sum())(pair[0])
    for transform in (jax.jit, jax.vmap, jax.grad):
        with pytest.raises(InputError, match=r"visits: .* one that jax traces; .*, and igndmoe.fit_on_device inside"):
            transform(lambda v: igndmoe.fit(visits._replace(values=v), graph, short).errors.sum())(visits.values)


def test_bootstrap_draws_have_as_many_subjects_as_the_cohort(key):
    weights = bootstrap_weights(key, 30, 200)
    np.testing.assert_array_equal(weights.sum(axis=1), 30)
    assert abs((weights == 0).mean() - np.exp(-1)) < 0.03


def test_what_does_not_fit_together_is_told(cohort, graph):
    train, validation, _ = roles(60)
    arguments = (cohort.visits, graph, FKPP)
    for seeds in ((), (8,), (-1,)):
        with pytest.raises(ValueError, match="seeds"):
            fit_runs(*arguments, seeds, train, validation, np.array([0]))
    with pytest.raises(ValueError, match="regions"):
        fit_runs(cohort.visits, make_graph(random_connectome(0, 9).adjacency), FKPP, SEEDS, train, validation,
                 np.array([0]))  # fmt: skip
    for field, value in (("steps", 0), ("validation", 1.0), ("seed_value", 0.0), ("stages", 2), ("norm_weight", -1.0)):
        with pytest.raises(ValueError, match=field):
            FitConfig(**{field: value})
    with pytest.raises(ValueError, match="ode: expected nothing beside solver 'fixed'"):
        FitConfig(solver="fixed", ode=dataclasses.replace(GRID, stop_at=0.5))


@pytest.mark.slow
def test_the_full_loop_on_twenty_regions_beats_fkpp_and_recovers_stages():
    # Specification, (i) 7, with noise of 0.03; the small version above is its default.
    connectome = random_connectome(0, 20)
    graph = make_graph(connectome.adjacency)
    planted = dataclasses.replace(PLANTED, subjects=120)
    people = simulate_cohort(jax.random.key(0), connectome.adjacency, (0, 10), planted)
    model = ProgressionConfig(width=32, latent=8)
    recipe = FitConfig(model=model)
    train, validation, held_out = roles(120)
    errors = {}
    for equation in ("igndmoe", "fkpp"):
        config = dataclasses.replace(recipe, model=dataclasses.replace(model, equation=equation))
        found = fit_runs(people.visits, graph, config, (0, 10), train, validation, np.array([0]))
        errors[equation] = float(found.errors[0, held_out].sum())
        assert scipy.stats.spearmanr(found.onsets[0], people.onsets).statistic > 0.99
    assert errors["igndmoe"] < 0.75 * errors["fkpp"]
