"""Mixup and CutMix: weights are the shares that are seen, pairs mirror each other, boxes are boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.data.mixing import MixConfig, draw_box, mix, partners

BATCH = 6


def mixed(config, shape=(5, 6, 7), batch=BATCH, seed=0):
    """Mix a batch whose image n is n everywhere, so that every voxel tells whose it is."""
    image = jnp.broadcast_to(jnp.arange(1.0, batch + 1).reshape(-1, *(1,) * (len(shape) + 1)), (batch, *shape, 1))
    return image, mix(config, jax.random.split(jax.random.key(seed), batch), image)


@pytest.mark.parametrize("shape", [(6, 7), (5, 6, 7)])
@pytest.mark.parametrize("config", [MixConfig(mixup=0.8), MixConfig(cutmix=1.0), MixConfig(0.8, 1.0)])
def test_the_weight_is_the_share_of_the_own_image_and_pairs_mirror_each_other(config, shape):
    image, (found, weight) = mixed(config, shape)
    assert ((weight >= 0) & (weight <= 1)).all() and len(set(np.asarray(weight).tolist())) > 1
    np.testing.assert_allclose(weight, weight[::-1])
    means = found.mean(axis=tuple(range(1, found.ndim)))
    own = np.arange(1.0, BATCH + 1)
    np.testing.assert_allclose(means, weight * own + (1 - weight) * own[::-1], rtol=1e-5)
    np.testing.assert_allclose(found + partners(found), image + partners(image), rtol=1e-6)


def test_blends_are_even_and_boxes_are_the_partners_own_voxels():
    image, (blend, weight) = mixed(MixConfig(mixup=0.4))
    assert float(jnp.ptp(blend, axis=(1, 2, 3, 4)).max()) < 1e-6
    _, (pasted, _) = mixed(MixConfig(cutmix=1.0))
    for place, picture in enumerate(np.asarray(pasted)):
        assert set(np.unique(picture)) <= {place + 1.0, float(BATCH - place)}


def test_weights_of_a_blend_are_beta_distributed():
    _, (_, weight) = mixed(MixConfig(mixup=0.5), (2, 2), batch=4000)
    drawn = np.asarray(weight[: len(weight) // 2])
    # Mean and variance of Beta(.5, .5).
    assert abs(drawn.mean() - 0.5) < 4 * (0.125 / len(drawn)) ** 0.5
    assert abs(drawn.var() - 0.125) < 0.01


def test_a_box_has_the_proportions_of_the_image_and_one_piece():
    box = np.asarray(draw_box(jax.random.key(3), 1e6, (40, 80)))
    rows, columns = (np.flatnonzero(box.any(axis)) for axis in (1, 0))
    assert box.sum() == len(rows) * len(columns) and np.ptp(rows) == len(rows) - 1
    # Half of the image, unless a side sticks out: edges of 28 and 56.
    assert len(rows) <= 28 and len(columns) <= 56
    inside = [np.asarray(draw_box(jax.random.key(seed), 1e6, (40, 80))).sum() for seed in range(40)]
    assert max(inside) == 28 * 56


def test_without_chance_nothing_changes_and_the_middle_of_an_odd_batch_stays():
    image, (found, weight) = mixed(MixConfig(0.8, 1.0, probability=0.0))
    np.testing.assert_array_equal(found, image)
    np.testing.assert_array_equal(weight, 1.0)
    image, (found, weight) = mixed(MixConfig(mixup=0.8), batch=5)
    np.testing.assert_array_equal(found[2], image[2])
    assert weight[2] == 1 and (weight[:2] < 1).all()


def test_both_kinds_occur_as_often_as_switch_says():
    _, (found, _) = mixed(MixConfig(1.0, 1.0, probability=0.8, switch=0.25), (9, 9), batch=2000)
    spread = np.asarray(jnp.ptp(found, axis=(1, 2, 3)))[:1000]
    left = np.asarray(found[:1000, 0, 0, 0]) == np.arange(1.0, 1001)
    pasted = float((spread > 0).mean())
    assert abs(pasted - 0.2) < 0.05 and float(((spread == 0) & left).mean()) > 0.15


@pytest.mark.parametrize("wrong", [{"mixup": -1.0}, {"cutmix": float("nan")}, {"probability": 1.5}, {"switch": -0.1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected a number"):
        MixConfig(**wrong)
