"""Dice and cross-entropy of label maps against sums by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.objectives.segmentation import dice_cross_entropy, predicted_dice, voxel_cross_entropy

pytestmark = pytest.mark.core


@pytest.mark.parametrize("channels", [1, 3])
def test_losses_are_their_formulas(channels):
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 3, (2, 4, 5)), rng.standard_normal((2, 4, 5, channels))
    given = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    losses, entropies = dice_cross_entropy(*given), voxel_cross_entropy(*given)
    for case in range(2):
        if channels == 1:
            share = 1 / (1 + np.exp(-logits[case, ..., 0]))
            entropy = -np.where(labels[case] > 0, np.log(share), np.log(1 - share)).mean()
            pairs = [(share, labels[case] > 0)]
        else:
            share = np.exp(logits[case]) / np.exp(logits[case]).sum(-1, keepdims=True)
            entropy = -np.log(np.take_along_axis(share, labels[case][..., None], -1)).mean()
            pairs = [(share[..., label], labels[case] == label) for label in (1, 2)]
        dices = [(2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5) for p, t in pairs]
        np.testing.assert_allclose(entropies[case], entropy, rtol=1e-5)
        np.testing.assert_allclose(losses[case], 1 - np.mean(dices) + entropy, rtol=1e-5)


def test_a_class_that_is_nowhere_and_found_nowhere_costs_nothing():
    labels = jnp.asarray([[0, 1, 1, 0]])
    sure = 40.0 * (labels[..., None] == jnp.arange(3)) - 20.0
    np.testing.assert_allclose(dice_cross_entropy(sure, labels), 0, atol=1e-4)


def test_dice_of_predicted_maps():
    labels = jnp.asarray([[0, 1, 1, 2], [0, 0, 0, 0]])
    perfect = 10.0 * (labels[..., None] == jnp.arange(3)) - 5.0
    np.testing.assert_allclose(predicted_dice(perfect, labels), [1, 1])
    shifted = jnp.roll(perfect, 1, axis=1)  # 2 0 1 1: one voxel of label 1 is met, none of 2
    np.testing.assert_allclose(predicted_dice(shifted, labels)[0], 0.25)
    mask = jnp.asarray([[-1.0, 1, 1, -1], [-1, -1, -1, 1]])[..., None]
    np.testing.assert_allclose(predicted_dice(mask, labels), [4 / 5, 0])
