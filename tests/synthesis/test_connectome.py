"""Cohorts on a connectome: connected graphs, the planted course, and how patients are seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.graphs import components, laplacian
from jaxmed.synthesis.phantoms.connectome import (
    CohortConfig,
    expert_weights,
    random_connectome,
    simulate_cohort,
    true_rate,
)

pytestmark = pytest.mark.core

CONNECTOME = random_connectome(3, 12)


@pytest.fixture(scope="module")
def cohort():
    return simulate_cohort(jax.random.key(1), CONNECTOME.adjacency, (0, 6), CohortConfig(subjects=400, noise=0.0))


def test_connectomes_are_symmetric_connected_and_of_the_density_asked_for():
    for nodes, density in ((12, 0.25), (20, 0.05)):
        adjacency = random_connectome(3, nodes, density).adjacency
        np.testing.assert_array_equal(adjacency, adjacency.T)
        assert (np.diag(adjacency) == 0).all() and adjacency.max() == 1
        assert (components(adjacency) == 0).all()
        edges = np.count_nonzero(np.triu(adjacency))
        possible = nodes * (nodes - 1) // 2
        assert round(density * possible) <= edges <= round(density * possible) + nodes - 1


def test_the_course_solves_the_planted_equation(cohort):
    matrix = laplacian(jnp.asarray(CONNECTOME.adjacency), "random_walk")
    config = CohortConfig(subjects=400, noise=0.0)
    middle = len(cohort.times) // 2
    step = cohort.times[1] - cohort.times[0]
    slope = (cohort.states[middle + 1] - cohort.states[middle - 1]) / (2 * step)
    rate = true_rate(
        config,
        jnp.asarray(CONNECTOME.adjacency),
        matrix,
        jnp.asarray(cohort.states[middle]),
        jnp.asarray(cohort.times[middle]),
    )
    np.testing.assert_allclose(slope, rate, atol=2e-4)
    assert cohort.times[-1] == pytest.approx(30.0, abs=0.1)
    np.testing.assert_allclose(cohort.states[0], np.where(np.isin(np.arange(12), (0, 6)), 0.15, 0), atol=1e-7)


def test_weights_are_a_softmax_of_linear_logits(cohort):
    np.testing.assert_allclose(cohort.weights.sum(axis=1), 1, atol=1e-6)
    ratio = np.log(cohort.weights[:, 0] / cohort.weights[:, 2])
    np.testing.assert_allclose(ratio, 2.5 - 5 * cohort.times / 30, atol=1e-4)
    assert expert_weights(CohortConfig(), jnp.zeros((2, 3))).shape == (2, 3, 3)


def test_patients_lie_on_the_course_with_the_visits_promised(cohort):
    counts = cohort.visits.present.sum(axis=1)
    shares = np.bincount(counts, minlength=5)[1:] / len(counts)
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.15, 0.1], atol=0.08)
    gaps = np.diff(cohort.visits.gaps, axis=1)[cohort.visits.present[:, 1:]]
    assert gaps.min() >= 0.8 - 1e-5 and gaps.max() <= 2.5 + 1e-5
    assert cohort.onsets.min() >= 2 and cohort.onsets.max() <= 25
    for region in (0, 5):
        expected = np.interp(cohort.onsets, cohort.times, cohort.states[:, region])
        np.testing.assert_allclose(cohort.visits.values[:, 0, region], expected, atol=1e-3)


def test_network_diffusion_keeps_its_weighted_sum():
    cohort = simulate_cohort(jax.random.key(1), CONNECTOME.adjacency, (0, 6), CohortConfig(mechanism="ndm", subjects=2))
    total = cohort.states @ CONNECTOME.adjacency.sum(axis=1)
    np.testing.assert_allclose(total, total[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [("subjects", 0), ("most_visits", 0), ("onset", (5.0, 2.0)), ("gap", (0.0, 1.0)), ("noise", -1.0)],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        CohortConfig(**{field: value})
