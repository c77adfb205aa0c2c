"""Statistics against scipy, brute force and numbers worked out by hand."""

import itertools

import numpy as np
import pytest
import scipy.stats

from jaxmed.errors import InputError
from jaxmed.metrics import statistics as st

pytestmark = pytest.mark.core


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_mean_interval_equals_scipy(rng):
    values = rng.normal(size=9)
    low, high = scipy.stats.t.interval(0.95, 8, values.mean(), scipy.stats.sem(values))
    np.testing.assert_allclose(st.mean_interval(values)[:3], (values.mean(), low, high))
    assert st.mean_interval(np.full(4, 0.25))[:3] == (0.25, 0.25, 0.25)


def test_paired_t_equals_scipy(rng):
    first, second = rng.normal(size=(2, 12))
    expected = scipy.stats.ttest_rel(first, second)
    found = st.paired_t(first, second)
    np.testing.assert_allclose(found.statistic, expected.statistic, rtol=1e-9)
    np.testing.assert_allclose(found.p_value, expected.pvalue, rtol=1e-9)
    np.testing.assert_allclose(found[1:3], expected.confidence_interval(), rtol=1e-9)
    assert found.num_pairs == 12


def test_paired_t_without_spread_is_refused_and_without_difference_is_one():
    first = np.array([0.7, 0.8, 0.9])
    assert st.paired_t(first, first).p_value == 1.0
    # 0.7 - 0.6 and 0.8 - 0.7 differ in floating point only.
    with pytest.raises(InputError, match="some that vary"):
        st.paired_t(first, np.array([0.6, 0.7, 0.8]))
    with pytest.raises(InputError, match="2 or more"):
        st.paired_t(np.ones(1), np.zeros(1))
    with pytest.raises(InputError, match="position 1: expected a finite number"):
        st.paired_t(np.array([1.0, np.nan]), np.zeros(2))


@pytest.mark.parametrize("number", [5, 8, 20, 50])
def test_wilcoxon_without_ties_equals_scipys_exact_test(rng, number):
    first, second = rng.normal(0.3, 1, size=number), rng.normal(size=number)
    expected = scipy.stats.wilcoxon(first, second, method="exact")
    found = st.wilcoxon(first, second)
    np.testing.assert_allclose(found.p_value, expected.pvalue, rtol=1e-9)
    total = number * (number + 1) / 2
    assert min(found.statistic, total - found.statistic) == pytest.approx(expected.statistic)


def test_wilcoxon_of_many_equals_scipys_normal_approximation(rng):
    first = rng.normal(0.2, 1, size=80).round(1)
    second = np.zeros(80)
    expected = scipy.stats.wilcoxon(first, second, method="approx", correction=False)
    np.testing.assert_allclose(st.wilcoxon(first, second).p_value, expected.pvalue, rtol=1e-9)


def test_wilcoxon_with_ties_equals_enumeration():
    differences = np.array([1.0, 1.0, -1.0, 2.0, 3.0, 3.0, -0.5, 0.0])
    nonzero = differences[differences != 0]
    ranks = scipy.stats.rankdata(np.abs(nonzero))
    observed = ranks[nonzero > 0].sum()
    sums = np.array([ranks @ signs for signs in itertools.product((0, 1), repeat=len(ranks))])
    expected = min(1, 2 * min((sums <= observed).mean(), (sums >= observed).mean()))
    found = st.wilcoxon(differences, np.zeros(8))
    assert found.p_value == pytest.approx(expected)
    assert found.statistic == observed
    assert st.wilcoxon(np.ones(3), np.ones(3)).p_value == 1.0


def test_corrections_equal_hand_values():
    p_values = np.array([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(st.bonferroni(p_values), [0.04, 0.16, 0.12, 0.02])
    # Sorted 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1 (raised to 0.06).
    np.testing.assert_allclose(st.holm(p_values), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(st.holm(np.array([0.6, 0.9])), [1.0, 1.0])
    assert st.holm(np.zeros(0)).size == 0
    with pytest.raises(InputError, match="from 0 to 1"):
        st.holm(np.array([0.5, np.nan]))


def test_effect_sizes_equal_hand_values():
    # Differences 1, 2, 3: mean 2, standard deviation 1.
    assert st.cohen_dz(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(2.0)
    assert st.cohen_dz(np.ones(3), np.ones(3)) == 0.0


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_bootstrap_of_a_mean_equals_scipy(rng, method):
    values = rng.exponential(size=60)
    found = st.bootstrap(st.weighted_mean(values), np.arange(60), seed=0, num_resamples=20000, method=method)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method={"bca": "BCa"}.get(method, method), rng=rng, vectorized=True
    ).confidence_interval
    assert found.estimate == pytest.approx(values.mean())
    # Two Monte Carlo estimates of the same quantiles.
    np.testing.assert_allclose((found.low, found.high), expected, atol=0.01)


def test_bca_equals_the_formulas_of_efron_and_tibshirani(rng):
    values = rng.exponential(size=15)
    seen = []

    def statistic(weights):
        seen.append(weights)
        return (weights @ values) / weights.sum(axis=1)

    found = st.bootstrap(statistic, np.arange(15), seed=3, num_resamples=999, method="bca")
    draws = seen[1] @ values / 15
    left_out = np.array([np.delete(values, index).mean() for index in range(15)])
    np.testing.assert_allclose(seen[2] @ values / 14, left_out)
    bias = scipy.stats.norm.ppf((draws < values.mean()).mean())
    centred = left_out.mean() - left_out
    acceleration = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
    ends = []
    for z in scipy.stats.norm.ppf([0.025, 0.975]):
        share = scipy.stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        ends.append(np.quantile(draws, share))
    np.testing.assert_allclose(found[1:3], ends)


def test_rows_of_a_subject_are_drawn_together():
    subjects = np.array(["b", "a", "b", "c", "a"])
    seen = []

    def statistic(weights):
        seen.append(weights)
        return weights.sum(axis=1)

    st.bootstrap(statistic, subjects, seed=1, num_resamples=100, method="bca")
    everything, draws, left_out = seen
    assert (everything == 1).all()
    assert (draws[:, 0] == draws[:, 2]).all() and (draws[:, 1] == draws[:, 4]).all()
    assert (draws[:, [0, 1, 3]].sum(axis=1) == 3).all()
    np.testing.assert_array_equal(left_out, [[1, 0, 1, 1, 0], [0, 1, 0, 1, 1], [1, 1, 1, 0, 1]])


def test_seed_fixes_the_interval_and_blocks_do_not_change_it(rng, monkeypatch):
    statistic = st.weighted_mean(rng.normal(size=30))
    first = st.bootstrap(statistic, np.arange(30), seed=4, num_resamples=200, method="bca")
    assert first == st.bootstrap(statistic, np.arange(30), seed=4, num_resamples=200, method="bca")
    assert first != st.bootstrap(statistic, np.arange(30), seed=5, num_resamples=200, method="bca")
    monkeypatch.setattr(st, "BLOCK_SIZE", 30 * 7)
    blocked = st.bootstrap(statistic, np.arange(30), seed=4, num_resamples=200, method="bca")
    np.testing.assert_allclose(blocked, first, rtol=1e-12)


def test_constant_statistics_have_an_interval_of_no_width():
    for method in ("percentile", "bca"):
        found = st.bootstrap(st.weighted_mean(np.full(6, 0.5)), np.arange(6), seed=0, num_resamples=50, method=method)
        assert found == (0.5, 0.5, 0.5, 0)


def test_undefined_resamples_are_counted_or_refused():
    def rare(weights):
        return np.where(weights[:, 0] > 0, weights[:, 0], np.nan)

    found = st.bootstrap(rare, np.arange(10), seed=0, num_resamples=1000)
    assert 250 < found.num_undefined < 450  # (9 / 10)^10 = 0.35 of them
    with pytest.raises(InputError, match="percentile"):
        st.bootstrap(rare, np.arange(10), seed=0, num_resamples=1000, method="bca")
    with pytest.raises(InputError, match="most resamples"):
        st.bootstrap(
            lambda w: np.where((w[:, 0] > 0) & (w[:, 1] > 0), 1.0, np.nan), np.arange(10), seed=0, num_resamples=1000
        )
    with pytest.raises(InputError, match="defined on all rows"):
        st.bootstrap(lambda w: np.full(len(w), np.nan), np.arange(10), seed=0)
    with pytest.raises(InputError, match="two or more"):
        st.bootstrap(rare, np.zeros(10, int), seed=0)


def coverage(num_trials, num_subjects, method, seed):
    """Share of intervals that hold the true mean, for three correlated scans of each subject."""
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(num_trials):
        values = (rng.normal(size=(num_subjects, 1)) + rng.normal(0, 0.3, size=(num_subjects, 3))).ravel()
        subjects = np.repeat(np.arange(num_subjects), 3)
        found = st.bootstrap(st.weighted_mean(values), subjects, seed=rng, num_resamples=400, method=method)
        hits += found.low <= 0 <= found.high
    return hits / num_trials


def test_intervals_over_subjects_cover_the_truth():
    # Rows drawn one by one would cover about 0.75.
    assert 0.88 < coverage(250, 40, "percentile", seed=0) < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_over_subjects_cover_the_truth_at_length(method):
    assert 0.93 < coverage(4000, 60, method, seed=1) < 0.96
