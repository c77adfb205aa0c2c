"""The mixed model against dense matrices, closed forms of balanced designs, and least squares."""

import numpy as np
import pytest
import scipy.optimize

from jaxmed.errors import InputError
from jaxmed.metrics.mixed_model import fit_random_intercept

pytestmark = pytest.mark.core


def draw(seed, sizes, between, within):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    x = rng.normal(size=(2, len(groups)))
    shifts = rng.normal(size=len(sizes)) * np.sqrt(between)
    y = 1.0 + 0.5 * x[0] - 0.2 * x[1] + shifts[groups] + rng.normal(size=len(groups)) * np.sqrt(within)
    return y, {"one": x[0], "two": x[1]}, groups


def dense(y, columns, groups):
    """Restricted likelihood with the whole covariance matrix, over both variances."""
    x = np.stack([np.ones(len(y)), *columns.values()], 1)
    same = (groups[:, None] == groups).astype(float)

    def negative(logs):
        v = np.exp(logs[0]) * same + np.exp(logs[1]) * np.eye(len(y))
        inverse = np.linalg.inv(v)
        information = x.T @ inverse @ x
        left = y - x @ np.linalg.solve(information, x.T @ inverse @ y)
        return 0.5 * (np.linalg.slogdet(v)[1] + np.linalg.slogdet(information)[1] + left @ inverse @ left)

    best = scipy.optimize.minimize(
        negative, [-1.0, -1.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10}
    )
    v = np.exp(best.x[0]) * same + np.exp(best.x[1]) * np.eye(len(y))
    information = x.T @ np.linalg.inv(v) @ x
    return np.exp(best.x), np.linalg.solve(information, x.T @ np.linalg.inv(v) @ y), np.linalg.inv(information)


def test_unbalanced_groups_agree_with_dense_matrices():
    y, columns, groups = draw(0, [3, 9, 5, 7, 4, 6], 0.8, 0.3)
    model = fit_random_intercept(y, columns, groups)
    (between, within), beta, covariance = dense(y, columns, groups)
    assert model.between == pytest.approx(between, rel=1e-3) and model.within == pytest.approx(within, rel=1e-3)
    np.testing.assert_allclose([effect.estimate for effect in model.effects], beta, rtol=1e-4)
    halves = np.array([effect.high - effect.low for effect in model.effects]) / 2
    quantile = scipy.stats.t.ppf(0.975, len(y) - 3 - 6 + 1)
    np.testing.assert_allclose(halves, quantile * np.sqrt(np.diag(covariance)), rtol=1e-3)


def test_a_balanced_design_has_the_variances_of_the_analysis_of_variance():
    y, _, groups = draw(1, [8] * 10, 0.5, 0.4)
    model = fit_random_intercept(y, {}, groups)
    means = y.reshape(10, 8).mean(1)
    within = ((y.reshape(10, 8) - means[:, None]) ** 2).sum() / 70
    between = (8 * means.var(ddof=1) - within) / 8
    assert model.within == pytest.approx(within, rel=1e-5) and model.between == pytest.approx(between, rel=1e-4)
    assert model.effects[0].estimate == pytest.approx(y.mean())


def test_groups_that_are_alike_leave_least_squares():
    rng = np.random.default_rng(2)
    x = rng.normal(size=40)
    groups, noise = np.tile(np.arange(4), 10), rng.normal(size=40)
    # Less between groups than chance would leave.
    y = 2 * x + noise - np.array([noise[groups == group].mean() for group in range(4)])[groups]
    model = fit_random_intercept(y, {"x": x}, groups)
    design = np.stack([np.ones(40), x], 1)
    assert model.between == 0
    np.testing.assert_allclose(
        [e.estimate for e in model.effects], np.linalg.lstsq(design, y, rcond=None)[0], atol=1e-10
    )


def test_what_cannot_be_told_is_refused():
    y, columns, groups = draw(3, [4, 4], 0.1, 0.1)
    with pytest.raises(InputError, match="columns that do not follow from each other"):
        fit_random_intercept(y, {**columns, "sum": columns["one"] + columns["two"]}, groups)
    with pytest.raises(InputError, match="two or more groups"):
        fit_random_intercept(y, columns, np.zeros(8, int))
    with pytest.raises(InputError, match="finite"):
        fit_random_intercept(np.where(groups == 0, np.nan, y), columns, groups)
