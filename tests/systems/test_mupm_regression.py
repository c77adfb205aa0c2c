"""The propagation model on arrays: closed forms, planted coefficients, NumPy, SciPy and scikit-learn."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score

from jaxmed.data.splits import assign_folds, draw_subsets
from jaxmed.systems import mupm
from jaxmed.systems.mupm.branches import (
    branch_variances,
    count_calls,
    index_layout,
    redraw_predictions,
)
from jaxmed.systems.mupm.regression import (
    FitConfig,
    case_products,
    coefficient_intervals,
    few_cases,
    held_out,
    make_design,
    predict,
    refit,
)

OLS = FitConfig()
fit = jax.jit(mupm.fit, static_argnames="config")  # operation by operation it would be compiled sixty times
variances = jax.jit(branch_variances, static_argnames="kind")


def planted(seed=0, cases=10, classes=11, beta=(0.8, 1.3, 0.4), noise=0.01):
    rng = np.random.default_rng(seed)
    image, text = rng.uniform(0.01, 0.25, (2, cases, classes))
    covariance = np.sqrt(image * text)
    v = image * beta[0] + text * beta[1] + covariance * beta[2]
    return image, text, covariance, v * (1 + noise * rng.standard_normal(v.shape))


def linear_gaussian(seed, correlation, cases=50, draws=2000):
    """f = a x_I + b x_T: variances of draws of each branch, and of both with correlated perturbations."""
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(0.2, 1, (2, cases, 1))
    x_image, x_text, one, two = rng.standard_normal((4, cases, draws))
    other = correlation * one + np.sqrt(1 - correlation**2) * two
    answers = np.stack([a * x_image, b * x_text, a * one + b * other], axis=1)[..., None].astype(np.float32)
    return variances(jnp.asarray(answers), jnp.ones(answers.shape[:3], bool))


def test_the_python_call_of_the_documentation():
    rng = np.random.default_rng(0)
    v_image, v_text = rng.uniform(0.01, 0.25, (2, 20, 5))  # case x class
    covariance = np.sqrt(v_image * v_text)
    v = 0.9 * v_image + 1.1 * v_text + 0.5 * covariance
    found = mupm.fit(v_image, v_text, covariance, v)
    np.testing.assert_allclose(found.coefficients, [0.9, 1.1, 0.5], atol=1e-3)
    assert float(found.scores.r2) > 0.9999 and (np.asarray(found.vif) > 1).all()


@pytest.mark.parametrize(("correlation", "third"), [(0.0, 0.0), (0.5, 1.0)])
def test_independent_and_correlated_perturbations_give_the_closed_form(correlation, third):
    """Coefficients 1, 1 and 2 rho; bounds are four standard deviations of the 20 runs in the specification."""
    found = linear_gaussian(3, correlation)
    coefficients = np.asarray(fit(found.image, found.text, found.covariance, found.joint).coefficients)
    spread = np.array([0.019, 0.021, 0.049]) if correlation == 0 else np.array([0.008, 0.009, 0.018])
    assert (np.abs(coefficients - [1, 1, third]) < 4 * spread + 0.01).all(), coefficients


def test_planted_coefficients_come_back_whatever_order_and_scale():
    parts = planted()
    coefficients = np.asarray(fit(*parts).coefficients)
    assert np.abs(coefficients - [0.8, 1.3, 0.4]).max() < 0.05
    rng = np.random.default_rng(1)
    cases, classes = rng.permutation(10), rng.permutation(11)
    mixed = [part[cases][:, classes] for part in parts]
    np.testing.assert_allclose(fit(*mixed).coefficients, coefficients, atol=2e-4)
    np.testing.assert_allclose(fit(*(1e4 * part for part in parts)).coefficients, coefficients, atol=2e-4)


def test_least_squares_and_scores_are_numpys_and_scikit_learns():
    parts = planted(2)
    rows = np.stack([part.ravel() for part in parts[:3]], 1)
    with jax.enable_x64(True):
        found = fit(*parts)
        ridge = fit(*parts, config=FitConfig(method="ridge", ridge=0.1))
        weighted = fit(*parts, config=FitConfig(weighting="inverse", floor=0.01))
        found, ridge, weighted = jax.tree.map(np.asarray, (found, ridge, weighted))
    y = parts[3].ravel()
    np.testing.assert_allclose(found.coefficients, np.linalg.lstsq(rows, y)[0], atol=1e-10)
    model = LinearRegression(fit_intercept=False).fit(rows, y)
    np.testing.assert_allclose(found.coefficients, model.coef_, atol=1e-10)
    assert found.scores.r2 == pytest.approx(model.score(rows, y), abs=1e-10)
    sums = (rows @ model.coef_).reshape(10, 11).sum(1)
    assert found.scores.r2_case == pytest.approx(r2_score(parts[3].sum(1), sums), abs=1e-10)
    assert found.scores.mae == pytest.approx(np.abs(rows @ model.coef_ - y).mean(), abs=1e-12)
    penalty = 0.1 * np.diag(rows.T @ rows).mean()
    np.testing.assert_allclose(ridge.coefficients, Ridge(penalty, fit_intercept=False).fit(rows, y).coef_, atol=1e-10)
    roots = 1 / np.sqrt(y + 0.01)
    expected = np.linalg.lstsq(rows * roots[:, None], y * roots)[0]
    np.testing.assert_allclose(weighted.coefficients, expected, atol=1e-10)
    for column in range(3):
        others = np.delete(rows, column, 1)
        rest = rows[:, column] - others @ np.linalg.lstsq(others, rows[:, column])[0]
        assert found.vif[column] == pytest.approx((rows[:, column] ** 2).sum() / (rest**2).sum(), rel=1e-8)
    scaled = rows / np.linalg.norm(rows, axis=0)
    assert found.condition == pytest.approx(np.linalg.cond(scaled), rel=1e-8)


@pytest.mark.parametrize("beta", [(0.8, 1.3, 0.4), (-0.5, 1.0, 0.3), (0.4, 0.6, -0.8), (-1.0, -1.0, -0.2)])
def test_coefficients_that_may_not_be_negative_are_scipys(beta):
    parts = planted(4, beta=beta, noise=0.2)
    rows = np.stack([part.ravel() for part in parts[:3]], 1)
    with jax.enable_x64(True):
        found = np.asarray(fit(*parts, config=FitConfig(method="nonnegative")).coefficients)
    np.testing.assert_allclose(found, scipy.optimize.nnls(rows, parts[3].ravel())[0], atol=1e-9)


def test_rows_of_zeros_raise_r2_and_are_told_apart():
    image, text, covariance, v = planted(5, noise=0.3)
    zeros = [np.concatenate([part, np.zeros_like(part)], 1) for part in (image, text, covariance, v)]
    few, many = fit(image, text, covariance, v).scores, fit(*zeros).scores
    assert float(many.r2) > float(few.r2) + 0.02
    assert float(many.r2_nonzero) == pytest.approx(float(few.r2), abs=1e-4)
    assert float(many.r2_case) == pytest.approx(float(few.r2_case), abs=1e-4)


def test_predictors_in_proportion_decide_nothing():
    image = planted()[0]
    found = fit(image, 2 * image, np.sqrt(2) * image, 3 * image)
    assert not np.isfinite(np.asarray(found.coefficients)).any()
    assert np.isfinite(np.asarray(fit(image, 2 * image, np.sqrt(2) * image, 3 * image,
                                      config=FitConfig(method="ridge", ridge=1e-3)).coefficients)).all()  # fmt: skip


def test_the_call_composes_with_jit_vmap_and_grad():
    parts = [np.stack([one, two]) for one, two in zip(planted(0), planted(1), strict=True)]
    many = jax.jit(jax.vmap(mupm.fit))(*parts).coefficients
    np.testing.assert_allclose(many[1], fit(*planted(1)).coefficients, atol=2e-4)
    with jax.enable_x64(True):
        image, text, covariance, v = map(jnp.asarray, planted(0))

        def first(shift):
            found = fit(image + shift * text**2, text, covariance, v)
            return found.coefficients[1] + found.vif[0]

        def target(shift):
            return fit(image, text, covariance, v + shift * image**2).coefficients[0]

        for function, at in ((jax.jit(first), 0.3), (jax.jit(target), 0.2)):
            numerical = (function(at + 1e-4) - function(at - 1e-4)) / 2e-4
            assert float(jax.jit(jax.grad(function))(at)) == pytest.approx(float(numerical), rel=1e-5, abs=1e-9)


def test_a_refit_counts_a_case_as_often_as_its_weight():
    parts = planted(6)
    design, v = make_design(*parts[:3]), jnp.asarray(parts[3])
    weights = np.array([[2, 0, 1, 1, 0, 3, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]], np.float32)
    program = jax.jit(partial(refit, config=OLS))
    found = np.asarray(program(case_products(design, v, OLS), jnp.asarray(weights)))
    for row, chosen in zip(found, weights, strict=True):
        places = np.repeat(np.arange(10), chosen.astype(int))
        np.testing.assert_allclose(row, fit(*(part[places] for part in parts)).coefficients, atol=2e-3)
    assert np.isnan(program(case_products(design, v, OLS), jnp.zeros((2, 10)))).all()


def test_intervals_cover_what_was_planted_and_ten_thousand_refits_take_less_than_a_second():
    parts = planted(7, cases=50, noise=0.1)
    design, v = make_design(*parts[:3]), jnp.asarray(parts[3])
    subjects = tuple(f"s{case // 2}" for case in range(50))
    took = []
    for _ in range(2):  # the first compiles
        begin = time.process_time()
        found = coefficient_intervals(design, v, subjects, OLS, seed=0, resamples=10_000)
        took.append(time.process_time() - begin)
    assert took[1] < 1.0
    for interval, truth in zip(found.values(), (0.8, 1.3, 0.4), strict=True):
        assert interval.low < truth < interval.high and interval.high - interval.low < 0.4


def test_held_out_cases_are_predicted_by_the_others():
    parts = planted(8, cases=12, noise=0.2)
    design, v = make_design(*parts[:3]), jnp.asarray(parts[3])
    subjects = np.array([f"s{case // 2}" for case in range(12)])
    folds = assign_folds(subjects, 3, seed=0)
    assert all(len(set(folds[subjects == one])) == 1 for one in subjects) and set(folds) == {0, 1, 2}
    found = np.asarray(jax.jit(held_out, static_argnums=(3, 4))(design, v, jnp.asarray(folds), 3, OLS))
    for fold in range(3):
        coefficients = fit(*(part[folds != fold] for part in parts)).coefficients
        np.testing.assert_allclose(found[folds == fold], predict(coefficients, design)[folds == fold], atol=1e-4)


def test_few_cases_are_scored_on_the_rest_and_more_cases_scatter_less():
    parts = planted(9, cases=40, noise=0.2)
    design, v = make_design(*parts[:3]), jnp.asarray(parts[3])
    program, spreads = jax.jit(partial(few_cases, config=OLS)), []
    for size in (2, 20):
        subsets = draw_subsets(0, 40, size, 100)
        assert (subsets.sum(axis=1) == size).all()
        coefficients, r2 = map(np.asarray, program(design, v, jnp.asarray(subsets)))
        spreads.append(coefficients.std(axis=0))
    assert (spreads[0] > 2 * spreads[1]).all()
    rest = ~subsets[0]
    expected = r2_score(parts[3][rest].ravel(), np.asarray(predict(jnp.asarray(coefficients[0]), design))[rest].ravel())
    assert r2[0] == pytest.approx(expected, abs=1e-4)


def test_branches_stand_in_the_released_order():
    layout = index_layout(20)
    assert len(layout) == 63
    assert layout[0] == ("image", 0) and layout[20] == ("image", 20)
    assert layout[21] == ("text", 0) and layout[41] == ("text", 20)
    assert layout[42] == ("joint", 0) and layout[62] == ("joint", 20)
    assert count_calls(20) == {"measured": 63, "predicted": 41}


def test_empirical_covariance_needs_paired_draws_and_noise_is_taken_off():
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((3, 4000, 1))
    image, text = 0.5 * shared, 0.8 * shared
    answers = jnp.asarray(np.stack([image, text, image + text], 1), jnp.float32)
    valid = jnp.ones(answers.shape[:3], bool)
    paired = variances(answers, valid, "empirical")
    np.testing.assert_allclose(paired.covariance, 0.4, rtol=0.1)
    alone = answers.at[:, 1].set(0.8 * rng.standard_normal((3, 4000, 1)))
    assert np.abs(variances(alone, valid, "empirical").covariance).max() < 0.03
    noise = jnp.full((3, 1), 0.1)
    less, whole = variances(answers, valid, "geometric", noise), variances(answers, valid)
    np.testing.assert_allclose(less.image, whole.image - 0.1, atol=1e-6)
    np.testing.assert_allclose(less.joint, whole.joint - 0.1, atol=1e-6)
    np.testing.assert_allclose(less.covariance, np.sqrt(np.asarray(less.image) * np.asarray(less.text)), rtol=1e-5)


def test_the_spread_of_predictions_falls_with_the_root_of_the_draws():
    """Closed form: the variance of a sample variance of a Gaussian is 2 s^4 / (R - 1)."""
    rng, spreads = np.random.default_rng(0), {}
    for draws in (25, 100):
        answers = jnp.asarray(rng.standard_normal((60, 3, draws, 1)), jnp.float32)
        valid = jnp.ones(answers.shape[:3], bool)
        found = redraw_predictions(jax.random.key(0), answers, valid, jnp.array([1.0, 1.0, 0.0]), "geometric", 200)
        plain = variances(answers, valid)
        np.testing.assert_allclose(found.mean(0), (plain.image + plain.text)[:, 0], rtol=0.1)
        spreads[draws] = float(np.asarray(found).std(0).mean())
        assert spreads[draws] == pytest.approx(np.sqrt(2 * 2 / (draws - 1)), rel=0.12)
    assert spreads[25] / spreads[100] == pytest.approx(2, rel=0.15)
