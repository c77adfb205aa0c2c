"""Comparing models and attributing a course: folds, criteria, the simplest good model, bands, what is left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.visits import Visits, mark_missing
from jaxmed.data.splits import draw_folds
from jaxmed.metrics.bands import bands, draw_weights
from jaxmed.metrics.regional import row_correlations
from jaxmed.metrics.statistics import information_criteria
from jaxmed.models.graph_diffusion import ProgressionConfig
from jaxmed.recipes.fitted_course import score
from jaxmed.recipes.regional_study import choose
from jaxmed.solvers.fixed_grid import Trajectory
from jaxmed.systems.igndmoe.comparing import ORDER, ablations, contributions
from jaxmed.systems.igndmoe.fitting import Fit

pytestmark = pytest.mark.core


def test_folds_share_subjects_evenly():
    folds = draw_folds(23, 5, 0)
    assert sorted(np.bincount(folds)) == [4, 4, 5, 5, 5]
    assert (folds != draw_folds(23, 5, 1)).any()


def test_the_simplest_model_within_one_standard_error_is_chosen():
    rng = np.random.default_rng(0)
    best = rng.uniform(1, 2, 50)
    error = best.std(ddof=1) / np.sqrt(50)
    models = {"igndmoe": (100, 0.0), "grand": (20, 0.9), "fkpp": (4, 1.1), "ndm": (2, 3.0)}

    def chosen(**changed):
        rows = models | changed
        errors = {name: best + distance * error for name, (_, distance) in rows.items()}
        return choose(errors, {name: parameters for name, (parameters, _) in rows.items()}, ORDER)[1]

    assert chosen() == "grand"
    assert chosen(fkpp=(4, 0.99)) == "fkpp" and chosen(grand=(20, 1.01)) == "igndmoe"
    assert chosen(grand=(200, 0.9)) == "igndmoe" and chosen(ndm=(2, np.nan)) == "grand"


def test_criteria_are_those_of_gaussian_errors_and_undefined_for_few_values():
    k = 3 + 10 + 1
    aicc, bic = information_criteria(0.01, 500, k)
    assert aicc == pytest.approx(500 * np.log(0.01) + 2 * k + 2 * k * (k + 1) / (500 - k - 1))
    assert bic == pytest.approx(500 * np.log(0.01) + k * np.log(500))
    assert information_criteria(0.01, k + 1, k) == (None, None)
    assert information_criteria(0.75, 7, 6) == (None, None) == information_criteria(0.0, 41, 6)
    assert information_criteria(0.75, 41, 6)[1] == pytest.approx(41 * np.log(0.75) + 6 * np.log(41))


def test_correlations_of_rows_are_pearsons():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 4, 9))
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(row_correlations(first, second), expected)
    assert np.isnan(row_correlations(np.ones((1, 4)), rng.normal(size=(1, 4)))[0])


def test_correlations_and_scores_leave_out_what_was_not_measured():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 4, 9))
    first[0, 3], first[2, :5], first[3, 1:] = np.nan, np.nan, np.nan
    for row in (0, 1, 2):
        known = np.isfinite(first[row])
        expected = np.corrcoef(first[row][known], second[row][known])[0, 1]
        assert row_correlations(first, second)[row] == pytest.approx(expected)
    assert np.isnan(row_correlations(first, second)[3])
    times = np.linspace(0, 10, 5, dtype=np.float32)
    line = Trajectory(*map(jnp.asarray, (times, np.tile(times[:, None] / 10, 3), np.full((5, 3), 0.1, np.float32))))
    values = np.array([[[0.1, 0.2, np.nan], [0.4, np.nan, 0.6]], [[0.7, 0.8, np.nan], [0, 0, 0]]], np.float32)
    visits = mark_missing(Visits(values, np.array([[0, 2], [0, 0]], np.float32), np.array([[1, 1], [1, 0]], bool)))
    found = score(line, visits, np.array([1.0, 7.0], np.float32), np.ones(2, bool))
    errors = [0, 0.1, 0.1, 0.3, 0, 0.1]
    assert found["sse"] == pytest.approx(np.square(errors).sum(), abs=1e-6) and found["visits"] == 3
    assert found["mse"] == pytest.approx(np.square(errors).mean(), abs=1e-6)
    # Of the third region one value is known: it has no spread. Of the first two, residuals against spreads.
    shares = [1 - 0.01 / np.square([0.1 - 0.4, 0, 0.7 - 0.4]).sum(), 1 - 0.02 / np.square([0.3, 0.3]).sum()]
    assert found["r2"] == pytest.approx(np.median(shares), abs=1e-5)


def test_draws_resample_training_subjects_only():
    train = np.array([1, 1, 0, 1, 1, 0, 1], np.float32)
    weights = draw_weights(jax.random.key(0), train, 40)
    np.testing.assert_array_equal(weights[0], train)
    np.testing.assert_array_equal(weights.sum(axis=1), 5)
    np.testing.assert_array_equal(weights[:, train == 0], 0)


def test_contributions_are_weight_times_size_and_bands_are_percentiles():
    experts = np.stack([np.full((1, 2, 4), size) for size in (1.0, 2.0, 0.0)], axis=2)
    weights = np.array([[[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]]])
    fit = Fit({}, None, experts, weights, *[None] * 5)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(contributions(fit), [[[0.5, 0.5, 0], [0.2, 0.8, 0]]])
    middle, low, high = bands(np.arange(101.0)[:, None, None] * np.ones((1, 2, 3)))
    assert low[0, 0] == 5 and middle[0, 0] == 50 and high[0, 0] == 95


def test_every_ablation_leaves_out_one_part():
    complete = ProgressionConfig()
    found = ablations(complete)
    assert found["complete"] == complete and len(set(found.values())) == len(found) == 6
    assert found["without graph diffusion"].structure == "none"
    assert len(ablations(ProgressionConfig(match_release=True))) == 4  # its normalisation needs all three
