"""Rules that choose a start from a residual, and their calibration."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.diffusion.posterior.start_time import SHIPPED_MEANS, StartTime, bin_means, calibrate, choose_start

pytestmark = pytest.mark.core

MEANS = np.array(SHIPPED_MEANS)


def bins_of(q, **settings):
    """Bins chosen for compressed residuals q."""
    config = StartTime(**settings)
    starts = choose_start(jnp.asarray(np.asarray(q, float) ** (1 / config.tau), jnp.float32), config)
    assert np.all((np.asarray(starts) + 1) % 50 == 0)
    return (np.asarray(starts) + 1) // 50 - 1


def test_the_authors_rule_gives_their_bins():
    middle = (MEANS[5] + MEANS[6]) / 2
    q = [1e-6, MEANS[5] - 0.01, MEANS[5] + 0.01, middle + 0.01, 1e6]
    np.testing.assert_array_equal(bins_of(q, rule="repo"), [0, 5, 4, 6, 18])
    # Among the first two bins nothing is taken off.
    np.testing.assert_array_equal(bins_of([MEANS[0] + 0.01, MEANS[1] + 0.01], rule="repo"), [0, 1])


def test_the_default_rule_never_starts_later_for_a_larger_residual():
    q = np.linspace(0.01, 60, 4000)
    bins = bins_of(q)
    assert np.all(np.diff(bins) >= 0) and bins[0] == 0 and bins[-1] == 19
    np.testing.assert_array_equal(bins, np.minimum((MEANS[:, None] < q).sum(0), 19))
    assert np.any(np.diff(bins_of(q, rule="repo")) < 0)


def test_a_dent_in_the_bank_keeps_the_default_rule_monotone():
    means = (1.0, 3.0, 2.0, 4.0)
    starts = choose_start(jnp.linspace(0.5, 5, 100), StartTime(means=means, tau=1.0, steps_per_bin=5))
    assert np.all(np.diff(starts) >= 0)
    np.testing.assert_array_equal(np.unique(starts), [4, 9, 19])


def test_raw_residuals_map_where_the_shipped_bank_says():
    """The residuals that reach the first means, derived from the table and tau = 0.4."""
    raw = jnp.array([1.53, 3.73, 7.67, 13.2, 20.5, 29.9])
    np.testing.assert_array_equal(choose_start(raw * 0.97, StartTime()) // 50, np.arange(6))
    np.testing.assert_array_equal(choose_start(raw * 1.03, StartTime()) // 50, np.arange(1, 7))


def test_a_fixed_start_is_the_same_for_all():
    np.testing.assert_array_equal(choose_start(jnp.array([0.1, 99.0]), StartTime(rule="fixed", fixed=299)), [299, 299])


def test_banks_are_averaged_over_runs_and_bins():
    bank = np.arange(12.0).reshape(2, 6)
    np.testing.assert_allclose(bin_means(bank, num_bins=3), [3.5, 5.5, 7.5])
    with pytest.raises(ValueError, match="divisor of the bank's 6 steps"):
        bin_means(bank, num_bins=4)
    with pytest.raises(ValueError, match="finite"):
        bin_means(np.full((1, 20), np.nan))


@pytest.mark.parametrize(
    "unit, offset, is_power", [(1.0, 4.0, True), (0.05, 4.0, False), (7.0, 0.0, True), (1.0, 0.0, False)]
)
def test_calibration_puts_familiar_estimates_into_the_first_bin(unit, offset, is_power):
    residuals = np.random.default_rng(0).uniform(6.0, 13.0, 200) * unit
    means = (MEANS + offset) * unit
    found = calibrate(residuals, means, share=0.9)
    config = StartTime(means=tuple(means), tau=found.tau, scale=found.scale)
    starts = np.asarray(choose_start(jnp.asarray(residuals * 1.0, jnp.float32), config))
    np.testing.assert_allclose((starts == 49).mean(), 0.9, atol=0.006)
    # A power alone where the means are well above 1; residuals ten times as large still tell themselves apart.
    assert (found.scale == 1.0) == is_power
    far = np.asarray(choose_start(jnp.asarray([residuals.max() * 10], jnp.float32), config))
    assert far[0] >= 149


def test_estimates_that_fit_already_are_not_compressed():
    assert calibrate(np.array([0.2, 0.3]), MEANS) == (1.0, 1.0)
    with pytest.raises(ValueError, match="positive"):
        calibrate(np.array([0.0, 1.0]), MEANS)
    with pytest.raises(ValueError, match="share"):
        calibrate(np.array([1.0]), MEANS, share=0.0)


@pytest.mark.parametrize("wrong", [{"means": ()}, {"means": (1.0, -1.0)}, {"tau": 0.0}, {"scale": 0.0}, {"fixed": -1}])
def test_impossible_rules_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        StartTime(**wrong)
