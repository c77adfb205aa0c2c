"""Test patients drawn again, and what is proposed for a deployment: against NumPy and scikit-learn, on tables alone."""

import numpy as np
import pytest
from sklearn.metrics import r2_score, roc_auc_score

from jaxmed.arrays.task import Task
from jaxmed.data.cohort import read_labelled_sets
from jaxmed.data.labels import LabelConfig
from jaxmed.errors import InputError
from jaxmed.io.tables import read_table
from jaxmed.metrics.cohort import headline_statistic
from jaxmed.recipes.quality_deployment import deployed_test_set, quality_weights, run_deployment, write_proposal
from jaxmed.recipes.quality_grid import GradedImages, GridConfig, places_in_test, plan_grid
from jaxmed.recipes.quality_patients import cell_intervals, draw_patients, resample_cells
from jaxmed.recipes.study import Result, make_cells

pytestmark = pytest.mark.core
CONFIG = GridConfig((0.0, 0.5, 1.0), (0.0, 1.0), (1.0,), 3, together=2)
SPLITS = ("train", "validation", "test", "train")


def write_table(path, extra="", cells=lambda number: ""):
    lines = [f"path,subject,split,label,quality{extra}"]
    for number in range(96):
        (path.parent / f"{number}.png").touch()
        subject, split = number // 2, SPLITS[number // 2 % 4]
        lines.append(f"{number}.png,s{subject},{split},{number // 2 % 3 % 2},{5 - number // 8 % 2 * 4}{cells(number)}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def data(tmp_path):
    sets = read_labelled_sets(write_table(tmp_path / "eyes.csv"), (), LabelConfig(), (0.5, 0.2, 0.3), 0)
    is_high = np.array([cell == "5" for cell in sets.table.column("quality")])
    return GradedImages(sets, is_high, np.zeros((96, 0), np.float32), np.zeros((0, 0), np.float32))


@pytest.fixture
def plan(data):
    return plan_grid(CONFIG, data, 0, selects=True)


def test_validation_records_follow_the_share_of_the_cell(data, plan):
    cohort = data.sets.cohort
    assert set(cohort.splits[plan.pool]) == {"train"} and plan.validation.keys() == {0.0, 0.5, 1.0}
    for share, rows in plan.validation.items():
        assert set(cohort.splits[rows]) == {"validation"} and data.is_high[rows].mean() == pytest.approx(share, abs=0.1)
    joined = plan_grid(CONFIG, data, 0)
    assert set(cohort.splits[joined.pool]) == {"train", "validation"} and joined.validation == {}
    few = data._replace(is_high=data.is_high | (cohort.splits == "validation"))
    with pytest.raises(InputError, match=r"validation records of high and of low quality.*or --fit\.evaluations 0"):
        plan_grid(CONFIG, few, 0, selects=True)


def test_resampled_patients_are_those_of_a_loop(data, plan):
    cohort, rng = data.sets.cohort, np.random.default_rng(1)
    test = cohort.rows("test")
    (cell,) = make_cells({"arm": ("scratch",), "labels": (1.0,), "tuned_high": (0.5,), "seed": (0,)})
    values = rng.random((len(test), 1)).astype(np.float32)
    draws = resample_cells([Result(cell, {"records": 4.0}, [])], lambda _: values, data, plan, 7, 40)
    names, place = np.unique(cohort.subjects[test], return_inverse=True)
    drawn = np.random.default_rng(7).multinomial(len(names), np.full(len(names), 1 / len(names)), 40)
    for share, rows in plan.tests.items():
        own = places_in_test(data, rows)
        (found,) = [one for key, one in draws.items() if key["tested_high"] == share]
        for counts, value in zip(drawn, found, strict=True):
            again = np.repeat(own, counts[place[own]])
            truth, scores = cohort.targets[test[again], 0], values[again, 0]
            if len(set(truth)) == 2:
                assert value == pytest.approx(roc_auc_score(truth, scores))
            else:
                assert np.isnan(value)
    assert resample_cells([Result(cell, {"records": 4.0}, [])], lambda _: None, data, plan, 7, 40) is None


def test_a_mean_over_patients_varies_as_its_closed_form_says():
    values = np.random.default_rng(3).random(60)
    means = draw_patients(np.arange(60), 0, 20_000) @ values / 60
    assert means.var() == pytest.approx(values.var() / 60, rel=0.03)
    # Two records a patient: the patients' means count.
    twice = draw_patients(np.arange(60) // 2, 0, 20_000) @ values / 60
    assert twice.var() == pytest.approx(values.reshape(30, 2).mean(1).var() / 30, rel=0.03)


def test_intervals_of_cells_tell_both_errors():
    cells = make_cells({"arm": ("scratch",), "seed": (0, 1), "tested_high": (0.5,)})
    results = [Result(cell, {"auroc": value}, []) for cell, value in zip(cells, (0.6, 0.8), strict=True)]
    draws = {cell: np.array([0.5, 0.6, 0.7]) + shift for cell, shift in zip(cells, (0.0, 0.2), strict=True)}
    (row,) = cell_intervals(results, "auroc", draws)
    assert (row["arm"], row["tested_high"], row["seeds"]) == ("scratch", 0.5, 2) and "seed" not in row
    assert row["mean"] == pytest.approx(0.7) and row["error_of_seeds"] == pytest.approx(0.1)
    assert row["error_of_patients"] == pytest.approx(0.1)


def test_headlines_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    values, ones = rng.dirichlet(np.ones(3), 40), np.ones((1, 40))
    classes = (np.arange(40) % 3)[:, None].astype(np.float32)
    task = Task("multiclass", ("a", "b", "c"))
    assert headline_statistic(task, classes, values)(ones)[0] == pytest.approx(
        roc_auc_score(classes[:, 0], values, multi_class="ovr")
    )
    many = (rng.random((40, 2)) < 0.5).astype(np.float32)
    assert headline_statistic(Task("multilabel", ("a", "b")), many, values[:, :2])(ones)[0] == pytest.approx(
        roc_auc_score(many, values[:, :2])
    )
    numbers = rng.normal(size=(40, 1)).astype(np.float32)
    found = headline_statistic(Task("regression", ("a",), (0.0,), (1.0,)), numbers, values[:, :1])(ones)[0]
    assert found == pytest.approx(r2_score(numbers[:, 0], values[:, 0]))


def test_a_proposal_is_tried_out(data, plan, tmp_path):
    """A fitter that is right on chosen or weighted records, and cannot tell classes apart on those as they are."""
    cohort, seen = data.sets.cohort, []
    rows = deployed_test_set(data, 0.25, 0)
    assert data.is_high[rows].mean() == pytest.approx(0.25, abs=0.05) and set(cohort.splits[rows]) == {"test"}
    truth = cohort.targets[cohort.rows("test"), 0]

    def fitter(sets):
        seen.extend(sets)
        is_right = [bool(data.is_high[one.rows].all()) or one.importance is not None for one in sets]
        return np.stack([truth[:, None] if right else np.full((len(truth), 1), 0.5) for right in is_right])

    gains = run_deployment(CONFIG, fitter, "pretrained", data, plan, 1.0, 0.25, 5, tmp_path / "tried", {"a": 1})
    assert gains["chosen"].mean == gains["weighted"].mean == gains["weighted"].low == 0.5
    assert [one.seed for one in seen] == [5, 6, 7] * 3 and all(one.is_pretrained for one in seen)
    usual, chosen, weighted = seen[0], seen[3], seen[6]
    assert data.is_high[chosen.rows].all() and data.is_high[usual.rows].mean() == 0.5
    np.testing.assert_array_equal(weighted.rows, usual.rows)
    weights, high = weighted.importance, data.is_high[weighted.rows]
    assert (weights * high).sum() / weights.sum() == pytest.approx(0.25) and usual.importance is None
    np.testing.assert_array_equal(usual.validation, plan.validation[0.5])


def test_a_proposal_is_a_manifest_whose_weights_an_adaptation_takes(data, plan, tmp_path):
    path = tmp_path / "proposal.csv"
    write_proposal(path, ("label",), data, plan, 1.0, 0.25, 0)
    table = read_table(path)
    assert [row["chosen"] == "" for row in table.rows] == [row["split"] == "test" for row in table.rows]
    settings = (path, (), LabelConfig(), (0.5, 0.2, 0.3), 0)
    subset = read_labelled_sets(*settings, weight="chosen")
    own = subset.cohort.splits == "train"
    assert own.sum() == plan.size and set(subset.table.column("quality")[n] for n in np.flatnonzero(own)) == {"high"}
    assert (subset.cohort.splits == "test").sum() == len(data.sets.cohort.rows("test"))
    assert (subset.cohort.importance == 1).all() and "are left out" in " ".join(subset.notes)
    every = read_labelled_sets(*settings, weight="weight").cohort
    taught, high = every.rows("train"), np.array(table.column("quality")) == "high"
    assert len(every.scans) == 96 and every.importance[taught].mean() == pytest.approx(1)
    shares = every.importance[taught] * high[taught]
    assert shares.sum() / every.importance[taught].sum() == pytest.approx(0.25)
    np.testing.assert_allclose(every.take(taught[:3]).importance, every.importance[taught[:3]])
    np.testing.assert_allclose(quality_weights(np.array([True, False]), 0.25), [0.5, 1.5])


def test_weights_below_0_are_refused(tmp_path):
    path = write_table(tmp_path / "eyes.csv", ",count", lambda number: f",{-1 if number == 3 else 2}")
    with pytest.raises(InputError, match=r"eyes\.csv line 5: expected a weight of 0 or more under 'count', found -1"):
        read_labelled_sets(path, (), LabelConfig(), (0.5, 0.2, 0.3), 0, weight="count")
    write_table(path, ",count", lambda number: ",0")
    with pytest.raises(InputError, match="expected weights above 0 under 'count', found none"):
        read_labelled_sets(path, (), LabelConfig(), (0.5, 0.2, 0.3), 0, weight="count")
