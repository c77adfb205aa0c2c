"""Classification measures against scikit-learn and numbers worked out by hand."""

import numpy as np
import pytest
import sklearn.metrics as sk

from jaxmed.errors import InputError
from jaxmed.metrics import classification as cl
from jaxmed.metrics import weighted

pytestmark = pytest.mark.core


def binary_data(seed=0, number=120, digits=2):
    """Labels and probabilities with ties."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(number) < 0.35).astype(int)
    return labels, np.clip(0.3 * labels + rng.uniform(0, 0.7, number), 0, 1).round(digits)


def multiclass_data(seed=0, number=150, num_classes=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, number)
    logits = rng.normal(size=(number, num_classes)) + 1.2 * np.eye(num_classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return labels, probabilities


def slow_ece(confidence, is_right, num_bins):
    """Guo et al., equation 3, bin by bin."""
    total = 0.0
    for m in range(num_bins):
        inside = (confidence > m / num_bins) & (confidence <= (m + 1) / num_bins)
        inside |= (confidence == 0) & (m == 0)
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - is_right[inside].mean())
    return total


def test_binary_scores_equal_scikit_learn():
    labels, probabilities = binary_data()
    found = cl.score(labels, probabilities, "binary")
    predictions = (probabilities >= 0.5).astype(int)
    specificity, sensitivity = sk.recall_score(labels, predictions, average=None)
    false_alarms, recall, _ = sk.roc_curve(labels, probabilities, drop_intermediate=False)
    expected = {
        "auroc": sk.roc_auc_score(labels, probabilities),
        "aupr": sk.average_precision_score(labels, probabilities),
        "accuracy": sk.accuracy_score(labels, predictions),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predictions),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "f1": sk.f1_score(labels, predictions),
        "mcc": sk.matthews_corrcoef(labels, predictions),
        "kappa_unweighted": sk.cohen_kappa_score(labels, predictions),
        "sensitivity_at_90_specificity": recall[1 - false_alarms >= 0.9].max(),
        "specificity_at_90_sensitivity": (1 - false_alarms)[recall >= 0.9].max(),
        "brier": sk.brier_score_loss(labels, probabilities),
        "ece_equal_width": slow_ece(probabilities, labels, 15),
    }
    assert set(found) - set(expected) == {"ece_equal_mass"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_multiclass_scores_equal_scikit_learn():
    labels, probabilities = multiclass_data()
    found = cl.score(labels, probabilities, "multiclass")
    predictions = probabilities.argmax(axis=1)
    one_hot = np.eye(4)[labels]
    expected = {
        "auroc_macro": sk.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"),
        "aupr_macro": sk.average_precision_score(one_hot, probabilities, average="macro"),
        "accuracy": sk.accuracy_score(labels, predictions),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predictions),
        "f1_macro": sk.f1_score(labels, predictions, average="macro"),
        "precision_macro": sk.precision_score(labels, predictions, average="macro"),
        "jaccard_macro": sk.jaccard_score(labels, predictions, average="macro"),
        "hamming": sk.hamming_loss(one_hot, np.eye(4)[predictions]),
        "mcc": sk.matthews_corrcoef(labels, predictions),
        "kappa_unweighted": sk.cohen_kappa_score(labels, predictions),
        "kappa_linear": sk.cohen_kappa_score(labels, predictions, weights="linear"),
        "kappa_quadratic": sk.cohen_kappa_score(labels, predictions, weights="quadratic"),
        "brier": ((probabilities - one_hot) ** 2).sum(axis=1).mean(),
        "ece_equal_width": slow_ece(probabilities.max(axis=1), predictions == labels, 15),
    }
    assert set(found) - set(expected) == {"ece_equal_mass"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    matrix = cl.confusion_matrix(labels, predictions, 4)
    np.testing.assert_array_equal(matrix, sk.confusion_matrix(labels, predictions))


def test_a_class_that_is_never_predicted_counts_as_in_scikit_learn():
    labels, probabilities = multiclass_data(1)
    probabilities[:, 2] = 0
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    found, predictions = cl.score(labels, probabilities, "multiclass"), probabilities.argmax(axis=1)
    assert 2 not in predictions
    one_hot, told = np.eye(4)[labels], np.eye(4)[predictions]
    options = {"average": "macro", "zero_division": 0}
    expected = {
        "f1_macro": sk.f1_score(one_hot, told, **options),
        "precision_macro": sk.precision_score(one_hot, told, **options),
        "balanced_accuracy": sk.recall_score(one_hot, told, **options),
        "jaccard_macro": sk.jaccard_score(one_hot, told, **options),
        "hamming": sk.hamming_loss(one_hot, told),
        "kappa_unweighted": sk.cohen_kappa_score(labels, predictions),
        "aupr_macro": sk.average_precision_score(one_hot, probabilities, average="macro"),
        "auroc_macro": sk.roc_auc_score(one_hot, probabilities, average="macro"),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    with pytest.raises(InputError, match="none of class 2"):
        cl.score(labels[labels != 2], probabilities[labels != 2], "multiclass")


def test_multilabel_scores_are_those_of_each_label():
    columns = [binary_data(seed, 90) for seed in range(3)]
    labels, probabilities = (np.stack(side, axis=1) for side in zip(*columns, strict=True))
    found = cl.score(labels, probabilities, "multilabel", threshold=[0.3, 0.5, 0.6], names=["mass", "oedema", "cyst"])
    assert found["auroc_macro"] == pytest.approx(sk.roc_auc_score(labels, probabilities, average="macro"))
    assert found["aupr/cyst"] == pytest.approx(sk.average_precision_score(labels[:, 2], probabilities[:, 2]))
    assert found["f1/mass"] == pytest.approx(sk.f1_score(labels[:, 0], probabilities[:, 0] >= 0.3))
    alone = cl.score(labels[:, 1], probabilities[:, 1], "binary")
    for name in ("auroc", "aupr", "accuracy", "f1", "brier"):
        assert found[f"{name}/oedema"] == pytest.approx(alone[name])
        each = [found[f"{name}/{label}"] for label in ("mass", "oedema", "cyst")]
        assert found[f"{name}_macro"] == pytest.approx(np.mean(each))


def best_rate(labels, scores, share, rate):
    return weighted.best_rate(labels == 1, scores, np.ones((1, len(labels))), share, rate)[0]


def test_single_functions_agree_with_score():
    labels, probabilities = binary_data(3)
    found = cl.score(labels, probabilities, "binary")
    assert cl.auroc(labels, probabilities) == found["auroc"]
    assert best_rate(labels, probabilities, 0.9, "sensitivity") == found["sensitivity_at_90_specificity"]
    assert best_rate(labels, probabilities, 0.9, "specificity") == found["specificity_at_90_sensitivity"]
    # AUROC takes any scores, not probabilities only.
    assert cl.auroc(labels, 10 * probabilities - 3) == pytest.approx(found["auroc"])


def test_operating_points_equal_hand_values():
    labels = np.array([0, 0, 0, 0, 1, 1, 1])
    scores = np.array([0.1, 0.2, 0.5, 0.8, 0.3, 0.5, 0.9])
    curve = cl.operating_curve(labels, scores)
    np.testing.assert_array_equal(curve.thresholds, [np.inf, 0.9, 0.8, 0.5, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(curve.sensitivity, [0, 1 / 3, 1 / 3, 2 / 3, 1, 1, 1])
    np.testing.assert_allclose(curve.specificity, [1, 1, 3 / 4, 2 / 4, 2 / 4, 1 / 4, 0])
    assert best_rate(labels, scores, 0.75, "sensitivity") == pytest.approx(1 / 3)
    assert best_rate(labels, scores, 1.0, "sensitivity") == pytest.approx(1 / 3)
    assert best_rate(labels, scores, 0.6, "specificity") == pytest.approx(1 / 2)


def test_calibration_by_equal_width_equals_hand_values():
    probabilities = np.array([0.0, 0.1, 0.2, 0.3, 0.8, 1.0])
    labels = np.array([0, 0, 1, 0, 1, 1])
    curve = cl.reliability_curve(labels, probabilities, num_bins=5)
    # Bins end at 0.2, 0.4, 0.6, 0.8, 1; the third is empty.
    np.testing.assert_array_equal(curve.num_rows, [3, 1, 1, 1])
    np.testing.assert_allclose(curve.confidence, [0.1, 0.3, 0.8, 1.0])
    np.testing.assert_allclose(curve.frequency, [1 / 3, 0, 1, 1])
    expected = (3 * (1 / 3 - 0.1) + 0.3 + 0.2 + 0) / 6
    assert cl.expected_calibration_error(labels, probabilities, num_bins=5) == pytest.approx(expected)


def test_calibration_by_equal_mass_equals_hand_values():
    probabilities = np.array([0.9, 0.1, 0.2, 0.6, 0.7, 0.3])
    labels = np.array([1, 0, 0, 1, 0, 1])
    curve = cl.reliability_curve(labels, probabilities, num_bins=3, binning="equal_mass")
    np.testing.assert_array_equal(curve.num_rows, [2, 2, 2])
    np.testing.assert_allclose(curve.confidence, [0.15, 0.45, 0.8])
    np.testing.assert_allclose(curve.frequency, [0, 1, 0.5])
    expected = (0.15 + 0.55 + 0.3) / 3
    found = cl.expected_calibration_error(labels, probabilities, num_bins=3, binning="equal_mass")
    assert found == pytest.approx(expected)
    # Equal probabilities stay together, whatever the order of the rows.
    tied = cl.reliability_curve(labels, np.full(6, 0.4), num_bins=3, binning="equal_mass")
    assert tied.num_rows.tolist() == [6] and tied.frequency.tolist() == [0.5]


def test_multiclass_calibration_is_of_the_most_probable_class():
    probabilities = np.array([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.0, 0.2, 0.8]])
    labels = np.array([0, 1, 0, 2])
    assert cl.expected_calibration_error(labels, probabilities, num_bins=10) == pytest.approx((2 * 0.1 + 2 * 0.2) / 4)


def test_constant_predictions_have_decided_values():
    labels = np.array([0, 0, 0, 1])
    found = cl.score(labels, np.full(4, 0.2), "binary")
    decided = {"auroc": 0.5, "aupr": 0.25, "f1": 0.0, "mcc": 0.0, "kappa_unweighted": 0.0, "balanced_accuracy": 0.5}
    assert {name: found[name] for name in decided} == decided
    assert (found["sensitivity_at_90_specificity"], found["specificity_at_90_sensitivity"]) == (0.0, 0.0)
    multiclass = cl.score(np.array([0, 1, 2]), np.tile([0.5, 0.3, 0.2], (3, 1)), "multiclass")
    assert (multiclass["mcc"], multiclass["kappa_quadratic"], multiclass["auroc_macro"]) == (0.0, 0.0, 0.5)
    assert multiclass["f1_macro"] == pytest.approx(0.5 / 3)


@pytest.mark.parametrize(
    ("labels", "probabilities", "task", "message"),
    [
        ([0, 0, 0], [0.1, 0.2, 0.3], "binary", "none of class 1"),
        ([0, 1, 2], [0.1, 0.2, 0.3], "binary", "labels, row 2: expected a class from 0 to 1, found 2"),
        ([0, 1], [0.1, np.nan], "binary", "probabilities, row 1: expected numbers from 0 to 1"),
        ([0, 1], [-2.0, 3.0], "binary", "apply sigmoid"),
        ([0, 1], [[0.5, 0.5], [0.1, 0.9]], "binary", "one number per row"),
        ([0, 1, 1], [[0.5, 0.3, 0.2]] * 3, "multiclass", "none of class 2"),
        ([0, 1], [[0.5, 0.9], [0.1, 0.9]], "multiclass", "row 0: expected a sum of 1"),
        ([[0, 1], [1, 1]], [[0.5, 0.9], [0.1, 0.9]], "multilabel", "label 1, labels: expected rows of each"),
    ],
)
def test_unusable_data_are_refused(labels, probabilities, task, message):
    with pytest.raises(InputError, match=message):
        cl.score(np.array(labels), np.array(probabilities, float), task)


def test_intervals_hold_the_estimate_and_count_what_is_undefined():
    labels, probabilities = binary_data(number=80)
    subjects = np.arange(80) // 2
    found = cl.intervals(labels, probabilities, "binary", subjects, seed=0, num_resamples=300)
    point = cl.score(labels, probabilities, "binary")
    assert set(found) == set(point)
    for name, interval in found.items():
        assert interval.estimate == pytest.approx(point[name]), name
        assert interval.low <= interval.high
    assert found["auroc"].low < point["auroc"] < found["auroc"].high
    few = cl.intervals(labels[:12], probabilities[:12], "binary", np.arange(12), seed=0, num_resamples=300)
    assert few["auroc"].num_undefined > 0 and few["accuracy"].num_undefined == 0


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_weighted_measures_equal_scores_of_the_drawn_rows(task):
    if task == "binary":
        labels, probabilities = binary_data(7, 60)
    elif task == "multiclass":
        labels, probabilities = multiclass_data(7, 60, 3)
    else:
        labels, probabilities = (np.stack([side, side[::-1]], axis=1) for side in binary_data(7, 60))
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 60, size=(5, 60))
    weights = np.stack([np.bincount(rows, minlength=60) for rows in drawn]).astype(float)
    together = cl._statistics(labels, probabilities, task, 0.5, ())(weights)
    for index, rows in enumerate(drawn):
        for name, value in cl.score(labels[rows], probabilities[rows], task).items():
            assert together[name][index] == pytest.approx(value, abs=1e-12), name
