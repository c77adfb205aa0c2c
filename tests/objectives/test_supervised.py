"""Losses on labels against hand numbers and scikit-learn, and means over examples that do not depend on the batch."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import log_loss

from jaxmed.objectives.supervised import binary_cross_entropy, cross_entropy, squared_error, task_losses

pytestmark = pytest.mark.core
GENERATOR = np.random.default_rng(0)
LOGITS = jnp.asarray(GENERATOR.normal(size=(12, 3)), jnp.float32)
LABELS = jnp.asarray(GENERATOR.integers(0, 2, (12, 3)), jnp.float32)
CLASSES = jnp.asarray(GENERATOR.permutation(12) % 3, jnp.float32)[:, None]
NAN = float("nan")


def test_binary_cross_entropy_by_hand():
    # log(1 + e^-2) = 0.126928; log(1 + e^2) = 2.126928; log 2 = 0.693147
    found = binary_cross_entropy(jnp.array([[2.0], [2.0], [0.0]]), jnp.array([[1.0], [0.0], [1.0]]))
    np.testing.assert_allclose(found, [0.126928, 2.126928, 0.693147], atol=1e-6)
    # A positive weight of 3 triples the loss of positives alone.
    found = binary_cross_entropy(jnp.array([[2.0], [2.0], [0.0]]), jnp.array([[1.0], [0.0], [1.0]]), 3.0)
    np.testing.assert_allclose(found, [0.380784, 2.126928, 2.079442], atol=1e-6)


def test_binary_cross_entropy_is_that_of_scikit_learn():
    found = binary_cross_entropy(LOGITS, LABELS)
    probabilities = 1 / (1 + np.exp(-np.asarray(LOGITS, np.float64)))
    expected = [log_loss(np.asarray(LABELS)[:, k], probabilities[:, k]) for k in range(3)]
    np.testing.assert_allclose(found.mean(), np.mean(expected), rtol=1e-6)


def test_cross_entropy_is_that_of_scikit_learn_and_smooths_towards_all_classes():
    shifted = np.exp(np.asarray(LOGITS, np.float64))
    probabilities = shifted / shifted.sum(1, keepdims=True)
    expected = log_loss(np.asarray(CLASSES)[:, 0], probabilities, labels=[0, 1, 2])
    np.testing.assert_allclose(cross_entropy(LOGITS, CLASSES).mean(), expected, rtol=1e-6)
    # Smoothing 0.1: nine tenths of the loss, and a tenth of the mean over the classes.
    smooth = 0.9 * expected - 0.1 * np.log(probabilities).mean()
    np.testing.assert_allclose(cross_entropy(LOGITS, CLASSES, smoothing=0.1).mean(), smooth, rtol=1e-6)


def test_cross_entropy_weighs_classes_by_hand():
    # Even logits: every class costs log 3 = 1.098612; weights 1, 2, 6 multiply it.
    found = cross_entropy(jnp.zeros((3, 3)), jnp.array([[0.0], [1.0], [2.0]]), jnp.array([1.0, 2.0, 6.0]))
    np.testing.assert_allclose(found, 1.098612 * np.array([1, 2, 6]), rtol=1e-6)
    # With smoothing 0.3 the share of each class is weighed by that class: log 3 * (0.8 * 1 + 0.1 * 2 + 0.1 * 6).
    found = cross_entropy(jnp.zeros((1, 3)), jnp.array([[0.0]]), jnp.array([1.0, 2.0, 6.0]), smoothing=0.3)
    np.testing.assert_allclose(found, [1.098612 * 1.6], rtol=1e-6)


def test_squared_error_by_hand():
    found = squared_error(jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[3.0, 2.0], [1.0, NAN]]))
    np.testing.assert_allclose(found, [2.0, 0.5])


def test_missing_labels_cost_nothing_and_leave_gradients_finite():
    import jax

    missing = LABELS.at[2, 1].set(NAN).at[5].set(NAN)
    found = binary_cross_entropy(LOGITS, missing)
    assert found[5] == 0
    np.testing.assert_allclose(found[0], binary_cross_entropy(LOGITS, LABELS)[0])
    one = binary_cross_entropy(LOGITS[2:3, [0, 2]], LABELS[2:3, [0, 2]])
    np.testing.assert_allclose(found[2], one[0] * 2 / 3, rtol=1e-6)
    gradient = jax.grad(lambda logits: binary_cross_entropy(logits, missing).sum())(LOGITS)
    assert np.isfinite(gradient).all() and not gradient[5].any() and gradient[2, 1] == 0


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel", "regression"])
def test_the_mean_of_parts_is_the_mean_of_the_batch(kind):
    targets = {"binary": LABELS[:, :1], "multiclass": CLASSES, "multilabel": LABELS.at[1:5, 0].set(NAN)}.get(
        kind, LABELS
    )
    logits = LOGITS[:, :1] if kind == "binary" else LOGITS
    weights = jnp.array([0.5, 2.0, 7.0])[: logits.shape[1]]
    whole = task_losses(kind, logits, targets, weights, 0.1).mean()
    parts = [task_losses(kind, logits[i::4], targets[i::4], weights, 0.1).mean() for i in range(4)]
    np.testing.assert_allclose(np.mean(parts), whole, rtol=1e-6)
    # Weights that come with every example are the same weights.
    rows = jnp.repeat(weights[None], len(logits), axis=0)
    np.testing.assert_allclose(task_losses(kind, logits, targets, rows, 0.1).mean(), whole, rtol=1e-6)


@pytest.mark.peers
def test_losses_are_those_of_pytorch():
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits
    from torch.nn.functional import cross_entropy as torch_cross_entropy

    logits, labels = (torch.tensor(np.asarray(a)) for a in (LOGITS, LABELS))
    weights = torch.tensor([0.5, 2.0, 7.0])
    expected = binary_cross_entropy_with_logits(logits, labels, pos_weight=weights)
    ours = jnp.asarray(weights.numpy())
    np.testing.assert_allclose(binary_cross_entropy(LOGITS, LABELS, ours).mean(), expected, rtol=1e-6)
    classes = torch.tensor(np.asarray(CLASSES)[:, 0].astype(int))
    expected = torch_cross_entropy(logits, classes, weight=weights, label_smoothing=0.1, reduction="none")
    np.testing.assert_allclose(cross_entropy(LOGITS, CLASSES, ours, 0.1), expected, rtol=1e-5)
