"""The loss of a network of labels, and the scores of the cases that it segmented."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.task import Task
from jaxmed.data.augment import AugmentConfig
from jaxmed.nn.model import Network
from jaxmed.objectives.segmentation import dice_cross_entropy, predicted_dice
from jaxmed.recipes.dense_labels import label_loss, label_scores, label_shares
from jaxmed.recipes.segment_cases import CaseRow, label_task, score_rows, task_labels

PARAMS = {"main": jnp.asarray([[0.5, -1.0, 2.0]]), "further": jnp.asarray([[1.0, 0.0, -1.0]])}


def apply(params, images, key=None, training=False):
    """Look at every voxel by itself, so that flips of image and label change nothing."""
    return images @ params["main"], images @ params["further"] if training else None


NETWORK = Network(lambda key: PARAMS, apply)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.normal(size=(2, 4, 5, 1)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 3, (2, 4, 5)), jnp.int32),
    }


@pytest.mark.parametrize("varied", [None, AugmentConfig(flip_axes=(0, 1))])
def test_the_loss_adds_the_auxiliary_head_and_moves_labels_with_images(batch, varied):
    keys = jax.random.split(jax.random.key(1), 2)
    logits, further = apply(PARAMS, batch["image"], training=True)
    main, other = (float(dice_cross_entropy(one, batch["label"]).mean()) for one in (logits, further))
    loss, metrics = label_loss(NETWORK, varied, 0.4, PARAMS, keys, batch)
    assert float(loss) == pytest.approx(main + 0.4 * other, rel=1e-5)
    assert float(metrics["main_loss"]) == pytest.approx(main, rel=1e-5)
    scores = label_scores(NETWORK, PARAMS, keys, batch)
    assert float(scores["loss"].mean()) == pytest.approx(main, rel=1e-5)
    np.testing.assert_allclose(scores["dice"], predicted_dice(logits, batch["label"]))
    assert float(metrics["dice"]) == pytest.approx(float(scores["dice"].mean()), rel=1e-5)


def test_shares_sum_to_one_for_masks_and_for_classes(batch):
    shares = np.asarray(label_shares(apply, PARAMS, batch["image"]))
    assert shares.shape == (2, 4, 5, 3)
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-6)
    one = np.asarray(label_shares(apply, {"main": jnp.asarray([[2.0]])}, batch["image"]))
    np.testing.assert_allclose(one[..., 1], 1 / (1 + np.exp(-2 * np.asarray(batch["image"])[..., 0])), rtol=1e-5)
    np.testing.assert_allclose(one.sum(-1), 1, rtol=1e-6)


def test_a_task_tells_the_values_of_label_maps():
    assert label_task((0, 3)) == Task("binary", ("3",)) and task_labels(label_task((0, 3)), 1) == (0, 3)
    assert task_labels(label_task((0, 2, 5)), 3) == (0, 2, 5)
    assert task_labels(None, 1) == (0, 1) and task_labels(None, 4) == (0, 1, 2, 3)
    assert task_labels(Task("multiclass", ("out", "in")), 2) == (0, 1)


def test_scores_are_means_of_a_split_with_intervals_over_subjects():
    def row(name, subject, split, dice, far, true):
        return CaseRow(name, name, (), subject, split, {"1": 1.0}, {"1": true}, {"1": dice}, {"1": far},
                       {"1": far / 2})  # fmt: skip

    rows = [
        row("a", "anna", "test", 0.9, 1.0, 2.0), row("b", "anna", "test", 0.7, 3.0, 2.0),
        row("c", "ben", "test", 1.0, 0.0, 0.0), row("d", "cleo", "validation", 0.5, 8.0, 1.0),
        CaseRow("e", "e", (), "dora", "test", {"1": 1.0}, {}, {}, {}, {}),
    ]  # fmt: skip
    test, validation = score_rows(rows, (0, 1), 0)
    assert (test.split, test.label, test.cases, test.subjects, test.present) == ("test", "1", 3, 2, 2)
    assert test.dice == pytest.approx(2.6 / 3) and test.hausdorff_95 == pytest.approx(4 / 3)
    # Two subjects can be drawn as two of one: the interval spans the means of either.
    assert (test.dice_low, test.dice_high) == pytest.approx((0.8, 1.0))
    assert (validation.cases, validation.dice_low, validation.dice_high) == (1, None, None)
