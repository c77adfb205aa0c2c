"""Spreads and entropies of draws against NumPy and SciPy, risk over coverage by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmed.errors import InputError
from jaxmed.metrics.uncertainty import draw_covariance, draw_variance, entropies, risk_coverage


@pytest.fixture(scope="module")
def draws():
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.ones(3), (4, 6)).astype(np.float32), rng.random((4, 6)) < 0.7


def test_variances_of_valid_draws_are_numpys(draws):
    values, is_valid = draws
    is_valid = is_valid.copy()
    is_valid[0], is_valid[1], is_valid[2:, :3] = False, np.arange(6) == 2, True
    found = np.asarray(draw_variance(jnp.asarray(values), jnp.asarray(is_valid)))
    assert np.isnan(found[:2]).all()
    for case in (2, 3):
        np.testing.assert_allclose(found[case], values[case][is_valid[case]].var(axis=0, ddof=1), rtol=1e-5)
    other = values[:, ::-1]
    found = np.asarray(draw_covariance(*map(jnp.asarray, (values, other, is_valid))))
    for case in (2, 3):
        one, two = values[case][is_valid[case]], other[case][is_valid[case]]
        expected = [np.cov(one[:, k], two[:, k], ddof=1)[0, 1] for k in range(3)]
        np.testing.assert_allclose(found[case], expected, rtol=1e-4, atol=1e-7)


def test_one_hot_draws_have_the_variances_of_shares():
    """Identical answers 0; two answers in turn 0.25 R / (R - 1)."""
    valid, unit = jnp.ones(20, bool), jnp.eye(3)
    assert (np.asarray(draw_variance(unit[np.zeros(20, int)], valid)) == 0).all()
    found = np.asarray(draw_variance(unit[np.arange(20) % 2], valid))
    np.testing.assert_allclose(found, [0.25 * 20 / 19, 0.25 * 20 / 19, 0], rtol=1e-6)
    assert found[0] == pytest.approx(0.263158, abs=1e-6)


def test_entropies_are_scipys_and_information_is_disagreement(draws):
    values, is_valid = draws
    found = entropies(jnp.asarray(values), jnp.asarray(is_valid))
    for case in range(4):
        kept = values[case][is_valid[case]]
        assert float(found.predictive[case]) == pytest.approx(scipy.stats.entropy(kept.mean(axis=0)), abs=1e-5)
        assert float(found.conditional[case]) == pytest.approx(scipy.stats.entropy(kept, axis=1).mean(), abs=1e-5)
    sure = entropies(jnp.eye(2)[np.arange(4) % 2], jnp.ones(4, bool))
    assert float(sure.conditional) == 0 and float(sure.information) == pytest.approx(np.log(2))
    assert np.isnan(float(entropies(jnp.asarray(values[0]), jnp.zeros(6, bool)).predictive))


def test_risk_over_coverage_by_hand():
    found = risk_coverage(np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 1, 0, 1]))
    np.testing.assert_allclose(found.risk, [0, 1 / 2, 1 / 3, 1 / 2])
    np.testing.assert_allclose(found.coverage, [0.25, 0.5, 0.75, 1])
    assert found.area == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert found.best == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)
    # Equal uncertainties say nothing: the risk is the error rate whatever the order.
    np.testing.assert_allclose(risk_coverage(np.ones(4), np.array([1, 0, 0, 1])).risk, 0.5)
    with pytest.raises(InputError, match="finite"):
        risk_coverage(np.array([np.nan]), np.array([1]))
