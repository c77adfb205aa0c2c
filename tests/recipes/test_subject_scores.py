"""Images of a subject averaged, and covariates as a baseline: against NumPy and scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import scipy.special
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from jaxmed.arrays.task import Task
from jaxmed.data.cohort import Cohort
from jaxmed.errors import InputError
from jaxmed.io.scans import ScanFiles
from jaxmed.recipes.subject_scores import PENALTY, Predicted, average_images, by_subject, merge_images, score_covariates

pytestmark = pytest.mark.core
SUBJECTS = ["b", "a", "b", "c", "a", "b"]


def cohort(subjects, targets, covariates=None, split="test"):
    targets = np.asarray(targets, np.float32).reshape(len(subjects), -1)
    covariates = np.zeros((len(subjects), 0)) if covariates is None else np.asarray(covariates)
    scans = tuple(ScanFiles(Path(f"{n}.png")) for n in range(len(subjects)))
    cells = tuple(tuple(f"{value:g}" for value in row) for row in targets)
    return Cohort(scans, np.array(subjects), np.array([split] * len(subjects)), targets, cells,
                  covariates.astype(np.float32))  # fmt: skip


@pytest.mark.parametrize("kind", ["binary", "multilabel", "multiclass", "regression"])
def test_probabilities_are_averaged_and_values_of_a_regression(kind):
    logits = np.random.default_rng(0).normal(0, 4, (6, 1 if kind == "binary" else 3))
    logits[0] = 60  # whose probability is 1 in double precision
    turn = {"multiclass": lambda x: scipy.special.softmax(x, axis=1), "regression": lambda x: x}
    values = turn.get(kind, scipy.special.expit)
    found = average_images(kind, logits, cohort(SUBJECTS, np.zeros(6)))
    rows = {"a": [1, 4], "b": [0, 2, 5], "c": [3]}
    expected = np.stack([values(logits)[rows[name]].mean(axis=0) for name in "abc"])
    np.testing.assert_allclose(values(found), expected, rtol=1e-12)
    assert np.isfinite(found).all()
    if kind != "multiclass":
        np.testing.assert_allclose(found[2], logits[3], rtol=1e-12)


def test_a_subject_has_one_label_and_the_mean_of_its_covariates():
    nan = np.nan
    covariates = [[50, nan], [60, 1], [54, 0], [nan, nan], [60, 1], [nan, 0]]
    merged = merge_images(cohort(SUBJECTS, [[1, nan], [0, 1], [1, 0], [1, 1], [0, 1], [nan, 0]], covariates), "m.csv")
    assert merged.subjects.tolist() == ["a", "b", "c"] and [s.path.name for s in merged.scans] == [
        "1.png",
        "0.png",
        "3.png",
    ]
    np.testing.assert_array_equal(merged.targets, [[0, 1], [1, 0], [1, 1]])
    np.testing.assert_array_equal(merged.covariates, [[60, 1], [52, 0], [nan, nan]])
    with pytest.raises(InputError, match="m.csv: expected one label for all images of subject 'b', found 1 and 0"):
        merge_images(cohort(SUBJECTS, [1, 0, 1, 1, 0, 0]), "m.csv")


def sets_of(kind, classes=1, number=120, seed=0):
    """Two sets in which age tells a part of the label, and the model another; the second covariate tells nothing."""
    generator, found = np.random.default_rng(seed), []
    for name, count in (("validation", number), ("test", 2 * number)):
        truth = generator.integers(0, max(2, classes), count)
        age = 60 + 8 * truth + generator.normal(0, 10, count)
        logits = generator.normal(0, 1, (count, classes))
        if kind == "multiclass":
            logits[np.arange(count), truth] += 1
        else:
            logits[:, 0] += 1.2 * truth
        covariates = np.stack([age, generator.integers(0, 2, count)], axis=1)
        covariates[::17, 0] = np.nan
        subjects = [f"{name}{n // 2}" for n in range(count)]
        found.append(Predicted(name, cohort(subjects, truth, covariates, name), logits))
    return found


def test_covariates_alone_and_beside_the_model_are_scored_as_scikit_learn_does():
    task, sets = Task("binary", ("hypertension",)), sets_of("binary")
    scores, notes = score_covariates(task, sets, 0)
    assert scores["validation"] == [] and [s.label for s in scores["test"]] == ["covariates", "covariates + model"]
    assert len(notes) == 1 and "fitted on the validation set" in notes[0]
    columns = [np.concatenate([one.logits, one.cohort.covariates], axis=1) for one in sets]
    known = [np.isfinite(one).all(axis=1) for one in columns]
    columns = [one[rows] for one, rows in zip(columns, known, strict=True)]
    truth = [one.cohort.targets[rows, 0] for one, rows in zip(sets, known, strict=True)]
    mean, spread = columns[0].mean(axis=0), columns[0].std(axis=0)
    inside, outside = ((one - mean) / spread for one in columns)
    for found, chosen in zip(scores["test"], (slice(1, None), slice(None)), strict=True):
        model = LogisticRegression(C=PENALTY).fit(inside[:, chosen], truth[0])
        expected = roc_auc_score(truth[1], model.decision_function(outside[:, chosen]))
        assert found.measure == "auroc" and found.interval.estimate == pytest.approx(expected, abs=2e-3)
        assert found.interval.low < found.interval.estimate < found.interval.high
        assert found.records == known[1].sum() and found.subjects == 120
    assert scores["test"][1].interval.estimate > scores["test"][0].interval.estimate + 0.05


def test_several_classes_are_each_scored_against_the_rest():
    task = Task("multiclass", ("none", "mild", "severe"))
    scores, _ = score_covariates(task, sets_of("multiclass", 3), 0)
    labels = [one.label for one in scores["test"]]
    assert labels == [f"covariates{more}, {name}" for name in task.names for more in ("", " + model")]


def test_what_cannot_be_scored_is_said():
    task, (fitted, other) = Task("binary", ("x",)), sets_of("binary", number=20)
    assert score_covariates(task, [other], 0)[1] == [
        "Covariates were not scored: there is no validation set to fit them on."
    ]
    one_class = fitted._replace(cohort=fitted.cohort._replace(targets=np.ones((20, 1), np.float32)))
    scores, notes = score_covariates(task, [one_class, other], 0)
    assert scores["test"] == [] and "one class only in the validation set" in notes[1]
    unknown = other._replace(cohort=other.cohort._replace(covariates=np.full((40, 2), np.nan, np.float32)))
    scores, notes = score_covariates(task, [fitted, unknown], 0)
    assert scores["test"] == [] and "one class only among the records whose covariates are known" in notes[1]


def test_a_set_by_subject_has_a_row_for_each():
    sets = sets_of("binary")
    even = sets[1].cohort.targets[::2].repeat(2, axis=0)
    one = sets[1]._replace(cohort=sets[1].cohort._replace(targets=even))
    merged = by_subject(Task("binary", ("x",)), one)
    assert merged.logits.shape == (120, 1) and len(merged.cohort.scans) == 120
