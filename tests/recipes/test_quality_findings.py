"""What is derived of a study, on cells whose metric is a formula: each measure is its closed form."""

import math

import numpy as np
import pytest
import scipy.stats

from jaxmed.recipes.quality_findings import (
    conclude,
    deployment_choice,
    derive,
    grid_of,
    label_saving,
    mismatch_penalty,
    mixed_model,
    over_seeds,
    slope,
)
from jaxmed.recipes.quality_grid import by_test_set, even_chances
from jaxmed.recipes.study import Result, make_cells

pytestmark = pytest.mark.core
SHARES, LABELS = (0.0, 0.5, 1.0), (0.25, 0.5, 1.0)


def study(metric, arms=("pretrained", "scratch"), seeds=(0, 1, 2)):
    """Cells of a formula of arm, labels, both shares and seed."""
    cells = make_cells({"arm": arms, "labels": LABELS, "tuned_high": SHARES, "seed": seeds})
    results = []
    for cell in cells:
        key = cell["arm"], cell["labels"], cell["tuned_high"], cell["seed"]
        metrics = {f"auroc at {test:g}": float(metric(*key, test)) for test in SHARES}
        results.append(Result(cell, {"records": 10.0, **metrics}, []))
    return by_test_set(results)


def formula(arm, labels, high, seed, test):
    """Ours: 0.1 per doubling of labels less than theirs; a slope of 0.2; a mismatch costs 0.1; seeds differ."""
    base = 0.6 + 0.05 * math.log2(labels) + 0.2 * high - 0.1 * abs(high - test) + 0.01 * seed
    gain = 0.1 * (high - 0.25) + 0.001 * seed * (-1) ** seed
    return base + (gain if arm == "pretrained" else 0.0)


def test_a_test_set_is_an_axis_of_its_own():
    results = study(formula)
    assert len(results) == 2 * 3 * 3 * 3 * 3
    cell = results[4].cell
    axes = ["arm", "labels", "tuned_high", "seed", "tested_high"]
    assert [axis for axis, _ in cell.key] == axes
    assert results[4].metrics == {"auroc": formula(*(cell[axis] for axis in axes)),
                                  "records": 10.0}  # fmt: skip


def test_mismatch_and_slope_are_those_of_the_formula():
    grid = grid_of(study(formula), "auroc", "scratch", 1.0)
    assert grid.values.shape == (3, 3, 3) and grid.shares == grid.tests == SHARES
    # Over all six pairs the slope cancels; |f - t| is 0.5, 1, 0.5, 0.5, 1, 0.5.
    np.testing.assert_allclose(mismatch_penalty(grid), 0.1 * 4 / 6)
    np.testing.assert_allclose(slope(grid), 0.2 + 0.1)  # at t = 1 coming nearer helps too
    np.testing.assert_allclose(slope(grid, 0.0), 0.2 - 0.1)


def test_gains_and_break_even():
    found = derive(study(formula), "auroc")
    assert found.break_even == 0.5
    assert found.gains["0 of 1"].is_negative and found.gains["1 of 0.25"].is_positive
    assert found.gains["1 of 1"].mean == pytest.approx(0.075 + 0.001 * (0 - 1 + 2) / 3)
    lines = conclude(found, "AUROC")
    assert lines[0].startswith("With fewer than 50% high-quality images in fine-tuning, pre-training does not help")
    assert any("pretrained: good images in fine-tuning matter" in line for line in lines)
    assert any("scratch: a mismatch of quality between fine-tuning and test costs +0.067" in line for line in lines)
    never = derive(study(lambda *key: formula("scratch", *key[1:])), "auroc")
    assert never.break_even is None and "can be told from chance on this task" in conclude(never, "AUROC")[0]
    always = derive(study(lambda arm, *key: formula("scratch", *key) + 0.1 * (arm == "pretrained") + 1e-4 * key[2] *
                          (arm == "scratch")), "auroc")  # fmt: skip
    assert always.break_even == 0 and "whatever the share" in conclude(always, "AUROC")[0]
    alone = derive(study(formula, arms=("scratch",)), "auroc")
    assert alone.gains == {} and set(alone.mismatch) == {"scratch"}


def test_labels_saved_are_read_off_the_curves():
    labels = np.array([0.1, 0.2, 0.4, 0.8])
    curve = np.log2(labels)
    assert label_saving(labels, curve + 1, curve) == pytest.approx(2)  # a doubling ahead
    assert label_saving(labels, curve, curve + 1) == pytest.approx(0.5)
    assert label_saving(labels, curve, curve) == pytest.approx(1)
    assert label_saving(labels, curve + 10, curve) == math.inf
    assert label_saving(labels, curve, curve + 10) is None
    assert label_saving(labels, np.array([1.0, np.nan, 2, 3]), curve) is None
    # From scratch reaches 1.5 half-way, along the logarithm, between the last two.
    ours, theirs = np.array([0.0, 1.0, 1.5, 1.5]), np.array([0.0, 0.5, 1.0, 2.0])
    assert label_saving(labels, ours, theirs) == pytest.approx(0.4 * math.sqrt(2) / 0.4)


def test_the_mixed_model_finds_the_terms_of_the_formula():
    model = mixed_model(study(lambda arm, *key: formula("scratch", *key) + 0.03 * (arm == "pretrained")), "auroc")
    found = {effect.name: effect.estimate for effect in model.effects}
    expected = {"high quality in fine-tuning": 0.2, "mismatch": -0.1, "pre-trained": 0.03, "doubling of labels": 0.05}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["high quality in testing"] == pytest.approx(0, abs=1e-9) and model.groups == 3
    assert mixed_model(study(formula, seeds=(0,)), "auroc") is None


def test_what_suits_a_deployment():
    peak = study(lambda arm, labels, high, seed, test: 0.8 - abs(high - test) + 0.001 * seed * high, seeds=(0, 1))
    chosen, gain = deployment_choice(grid_of(peak, "auroc", "scratch", 1.0), 0.45, 0.75)
    assert chosen == 0.5 and gain.mean is not None and gain.mean > 0
    assert over_seeds(np.array([0.1, np.nan])).low is None and over_seeds(np.array([np.nan])).mean is None


def test_an_interval_joins_the_variance_of_seeds_and_of_patients():
    values, draws = np.array([0.7, 0.8, 0.75]), np.array([[0.1, 0.2, 0.3], [0.3, 0.4, 0.2], [0.5, 0.0, 0.1]])
    patients = np.var([0.2, 0.3, 0.2], ddof=1)  # of the mean over seeds, whose patients are the same
    half = scipy.stats.t.ppf(0.975, 2) * math.sqrt(np.var(values, ddof=1) / 3 + patients)
    found, alone = over_seeds(values, draws), over_seeds(values)
    assert (found.mean, found.low, found.high) == pytest.approx((0.75, 0.75 - half, 0.75 + half))
    assert found.p_value == pytest.approx(2 * scipy.stats.t.sf(0.75 * scipy.stats.t.ppf(0.975, 2) / half, 2))
    plain = scipy.stats.ttest_1samp(values, 0)
    assert alone.p_value == pytest.approx(plain.pvalue) and alone.p_value < found.p_value
    assert (alone.low, alone.high) == pytest.approx(tuple(plain.confidence_interval())) and found.high > alone.high
    one = over_seeds(values[:1], draws[:, :1])
    error = np.std([0.1, 0.3, 0.5], ddof=1)
    assert one.high == pytest.approx(0.7 + 1.959964 * error)
    assert one.p_value == pytest.approx(2 * scipy.stats.norm.sf(0.7 / error))
    same = over_seeds(np.array([0.2, 0.2]))
    assert (same.low, same.high, same.p_value) == (0.2, 0.2, None)


@pytest.mark.parametrize("spread", [0.01, 0.5])
def test_an_interval_excludes_zero_where_the_test_is_below_five_percent(spread):
    generator = np.random.default_rng(3)
    for _ in range(40):
        found = over_seeds(generator.normal(0.1, 0.1, 4), generator.normal(0, spread, (60, 4)))
        assert (found.p_value < 0.05) == (found.is_positive or found.is_negative)


def test_an_undefined_resample_is_left_out():
    values, draws = np.array([0.7, 0.8, 0.75]), np.array([[0.1, 0.2, 0.3], [0.3, 0.4, 0.2], [0.5, 0.0, 0.1]])
    found = over_seeds(values, draws)
    undefined = over_seeds(values, np.concatenate([draws, [[np.nan, 0.1, 0.2]]]))
    assert undefined == found


def test_every_measure_is_computed_again_on_the_same_patients():
    """A shift of all cells by the same patients leaves every difference as it is."""
    results = study(formula)
    shifts = np.random.default_rng(0).normal(size=50)
    draws = {r.cell: r.metrics["auroc"] + shifts for r in results}
    plain, found = derive(results, "auroc"), derive(results, "auroc", draws)
    for name in ("mismatch", "necessity", "gains"):
        for key, one in getattr(found, name).items():
            assert one.high == pytest.approx(getattr(plain, name)[key].high, abs=1e-9), (name, key)
    grid = grid_of(results, "auroc", "scratch", 1.0, draws)
    assert grid.draws.shape == (50, 3, 3, 3)
    wide = grid.measure(lambda one: one.values[:, 0, 0])
    expected = math.sqrt(np.var(grid.values[:, 0, 0], ddof=1) / 3 + np.var(shifts, ddof=1))
    assert wide.high - wide.mean == pytest.approx(scipy.stats.t.ppf(0.975, 2) * expected)
    gain, plain = (deployment_choice(one, 0.5, 0.5)[1] for one in (grid, grid._replace(draws=None)))
    assert (gain.low, gain.high) == pytest.approx((plain.low, plain.high))


def test_classes_are_drawn_evenly():
    targets = np.array([[0.0], [0.0], [0.0], [1.0]], np.float32)
    np.testing.assert_allclose(even_chances(targets, "binary"), [1 / 3, 1 / 3, 1 / 3, 1])
    np.testing.assert_allclose(even_chances(targets, "regression"), 1)
