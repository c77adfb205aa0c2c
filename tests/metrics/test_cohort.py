"""Scores of a labelled set: those of scikit-learn, of values in their unit, and what is said of too few records."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_tangerine import BINARY

from jaxmed.arrays.task import Task, predict_values, standardise
from jaxmed.metrics.cohort import score_set
from jaxmed.objectives.supervised import task_losses

pytestmark = pytest.mark.core

SIZE = Task("regression", ("size",), (0.0,), (1.0,))


def score_logits(task, targets, logits, subjects, seed):
    losses = task_losses(task.kind, jnp.asarray(logits), jnp.asarray(standardise(targets, task)))
    values = np.asarray(predict_values(jnp.asarray(logits), task))
    return score_set(task, targets, values, subjects, seed=seed, losses=np.asarray(losses))


def test_scores_of_several_classes_are_those_of_scikit_learn():
    from sklearn.metrics import average_precision_score, f1_score, log_loss, roc_auc_score

    generator = np.random.default_rng(0)
    classes = np.arange(60) % 3
    logits = (np.eye(3)[classes] + generator.normal(size=(60, 3))).astype(np.float32)
    task = Task("multiclass", ("a", "b", "c"))
    scores, notes = score_logits(task, classes[:, None].astype(np.float32), logits, np.arange(60) // 2, seed=0)
    found = {(s.label, s.measure): s.interval for s in scores}
    odds = np.exp(logits.astype(np.float64))
    odds /= odds.sum(1, keepdims=True)
    assert not notes and {s.subjects for s in scores} == {30}
    assert found["all", "loss"].estimate == pytest.approx(log_loss(classes, odds), rel=1e-5)
    assert found["all", "auroc_macro"].estimate == pytest.approx(
        roc_auc_score(classes, odds, multi_class="ovr"), rel=1e-6
    )
    for number, name in enumerate("abc"):
        truth = classes == number
        assert found[name, "auroc"].estimate == pytest.approx(roc_auc_score(truth, odds[:, number]))
        assert found[name, "aupr"].estimate == pytest.approx(average_precision_score(truth, odds[:, number]))
        assert found[name, "f1"].estimate == pytest.approx(f1_score(truth, odds.argmax(1) == number))
        assert found[name, "auroc"].low < found[name, "auroc"].estimate < found[name, "auroc"].high


def test_zones_are_scored_as_records_of_their_own_and_a_patient_by_the_largest():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(4)
    zones = (rng.random((50, 4)) < 0.2).astype(np.float32)
    logits = (2 * zones + rng.normal(size=zones.shape)).astype(np.float32)
    task = Task("multilabel", ("a", "b", "c", "d"))
    found = {(s.label, s.measure): s for s in score_logits(task, zones, logits, np.arange(50) // 2, seed=0)[0]}
    assert found["all", "auroc_micro"].interval.estimate == pytest.approx(roc_auc_score(zones.ravel(), logits.ravel()))
    expected = roc_auc_score(zones.max(1), logits.max(1))
    assert found["all", "auroc_any"].interval.estimate == pytest.approx(expected)
    assert found["all", "auroc_any"].interval.low < expected and found["all", "auroc_micro"].subjects == 25
    # Where every record has some label there is no such measure, and the others stay.
    zones[:, 0] = 1
    zones[0, 0] = np.nan
    names = {s.measure for s in score_logits(task, zones, logits, np.arange(50), seed=0)[0] if s.label == "b"}
    assert "auroc" in names


def test_scores_of_values_and_of_too_few():
    task = Task("regression", ("size",), (10.0,), (2.0,))
    targets = np.array([[8.0], [10.0], [12.0], [14.0], [np.nan]], np.float32)
    logits = np.array([[-1.0], [0.5], [1.0], [1.0], [3.0]], np.float32)  # 8, 11, 12, 12
    scores, _ = score_logits(task, targets, logits, np.arange(5), seed=0)
    found = {s.measure: s.interval.estimate for s in scores}
    assert (found["mse"], found["mae"], found["r2"]) == pytest.approx((1.25, 0.75, 1 - 1.25 / 5))
    assert next(s for s in scores if s.measure == "mse").records == 4
    # One subject has no interval, one class no AUROC: told, not hidden.
    labels = np.array([[0.0], [1.0], [1.0]], np.float32)
    scores, notes = score_logits(BINARY, labels, labels, np.zeros(3), seed=0)
    assert {s.measure: s.interval.estimate for s in scores}["auroc"] == 1.0 and "two" in " ".join(notes)
    assert all(np.isnan(s.interval.low) for s in scores)
    scores, notes = score_logits(BINARY, labels[1:], labels[1:], np.arange(2), seed=0)
    assert [s.measure for s in scores] == ["loss"] and "nodule" in notes[0]


def test_values_are_scored_with_bias_and_correlation():
    truth = np.array([[8.0], [10.0], [12.0], [14.0]], np.float32)
    values = np.array([[9.0], [10.0], [13.0], [17.0]])
    scores, notes = score_set(SIZE, truth, values, np.arange(4), seed=0)
    found = {s.measure: s.interval.estimate for s in scores}
    assert not notes and "loss" not in found
    assert found["bias"] == pytest.approx(1.25)
    assert found["correlation"] == pytest.approx(np.corrcoef(truth[:, 0], values[:, 0])[0, 1])
    _, notes = score_set(SIZE, truth, np.full((4, 1), 3.0), np.arange(4), seed=0)
    assert "correlation" in notes[0]
