"""Recipes of augmentation: their boxes, how often each thing happens, normalisation, and DINO's crops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmed.data import picture_operations as operations
from jaxmed.data.augment_pictures import (
    MAE_CROP,
    CropAugment,
    DinoAugment,
    FineTuneAugment,
    draw_box,
    draw_erased,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}
PICTURE = jnp.asarray(np.random.default_rng(0).uniform(size=(10, 10, 3)).round(2), jnp.float32)
MANY = 2000
KEYS = jax.random.split(jax.random.key(0), MANY)


def run(recipe, picture=PICTURE, keys=KEYS):
    return jax.jit(jax.vmap(recipe, (0, None)))(keys, picture)


def frequency_is(share, expected, count=MANY):
    """Tell whether a frequency is that of a probability: within five standard deviations."""
    return abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / count) + 1e-12


def boxes_by_hand(seed, count, shape, scale, ratio):
    """torchvision's rule, draw by draw."""
    generator, found = np.random.default_rng(seed), []
    for _ in range(count):
        for _ in range(10):
            area = shape[0] * shape[1] * generator.uniform(*scale)
            quotient = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
            wide, high = round(math.sqrt(area * quotient)), round(math.sqrt(area / quotient))
            if 0 < wide <= shape[1] and 0 < high <= shape[0]:
                top, left = generator.integers(0, shape[0] - high + 1), generator.integers(0, shape[1] - wide + 1)
                found.append((top, left, high, wide))
                break
    return np.array(found)


def test_boxes_are_drawn_as_in_torchvision():
    shape, scale, ratio = (30, 50), (0.2, 1.0), (3 / 4, 4 / 3)
    box = jax.jit(jax.vmap(lambda key: draw_box(key, shape, scale, ratio)))(KEYS)
    found = np.concatenate([box.start, box.extent], axis=1)
    assert (found == np.round(found)).all() and (found >= 0).all()
    assert (found[:, :2] + found[:, 2:] <= shape).all() and (found[:, 2:] >= 1).all()
    expected = boxes_by_hand(1, MANY, shape, scale, ratio)
    for column in range(4):
        # Of two samples of 2000 from one law the distance exceeds 0.065 once in 10,000.
        assert scipy.stats.ks_2samp(found[:, column], expected[:, column]).statistic < 0.065


@pytest.mark.parametrize(
    ("shape", "box"),
    [((10, 40), (0, 13, 10, 13)), ((40, 10), (13, 0, 13, 10))],
)
def test_without_a_fit_the_largest_middle_box_counts(shape, box):
    # Nine tenths of the area never fit with proportions of 3:4 to 4:3.
    found = draw_box(jax.random.key(0), shape, (0.9, 1.0), (3 / 4, 4 / 3))
    np.testing.assert_array_equal(np.concatenate(found), box)


def test_a_crop_alone_flips_half_and_keeps_the_normalisation():
    recipe = CropAugment(MEAN, STD, (10, 10), **WHOLE)
    network = recipe.redo(PICTURE)
    np.testing.assert_allclose(run(recipe, network)[0], network, atol=1e-5)
    views = run(dataclasses.replace(recipe, flip=0.5), network)
    is_flipped = np.abs(views - network[:, ::-1]).max(axis=(1, 2, 3)) < 1e-5
    is_same = np.abs(views - network).max(axis=(1, 2, 3)) < 1e-5
    assert (is_flipped ^ is_same).all() and frequency_is(is_flipped.mean(), 0.5)


def test_fine_tuning_does_nothing_where_nothing_is_asked_for():
    recipe = FineTuneAugment(MEAN, STD, (10, 10), **WHOLE, num_operations=0, erase=0.0)
    network = recipe.redo(PICTURE)
    np.testing.assert_allclose(run(recipe, network, KEYS[:3]), jnp.stack([network] * 3), atol=1e-5)


def test_operations_happen_as_often_as_they_should():
    recipe = FineTuneAugment(MEAN, STD, (10, 10), **WHOLE, num_operations=1, magnitude_std=0.0, erase=0.0)
    kinds, signs = (part.reshape(-1) for part in jnp.meshgrid(jnp.arange(15), jnp.array([1.0, -1.0])))
    nine, fill = jnp.asarray(9.0), jnp.array(MEAN)
    every = jax.jit(jax.vmap(lambda kind, sign: operations.operate(PICTURE, kind, nine, sign, fill)))(kinds, signs)
    changes = (jnp.abs(every - PICTURE).max(axis=(1, 2, 3)) > 1e-4).mean()
    views = run(recipe, recipe.redo(PICTURE))
    share = (np.abs(views - recipe.redo(PICTURE)).max(axis=(1, 2, 3)) > 1e-3).mean()
    assert frequency_is(share, 0.5 * float(changes))


def test_erasing():
    recipe = FineTuneAugment(MEAN, STD, (20, 20), **WHOLE, num_operations=0)
    flat = recipe.redo(jnp.full((20, 20, 3), 0.5))
    views = np.asarray(run(recipe, flat))
    is_erased = (np.abs(views - np.asarray(flat)) > 1e-4).all(axis=-1)
    assert frequency_is(is_erased.any(axis=(1, 2)).mean(), 0.25)
    areas = is_erased.mean(axis=(1, 2))[is_erased.any(axis=(1, 2))]
    assert 0.01 < areas.min() and areas.max() < 0.37
    noise = views[is_erased]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    fits, box = jax.vmap(lambda key: draw_erased(key, (20, 20), (0.02, 1 / 3), (0.3, 10 / 3)))(KEYS)
    assert fits.all() and (box.extent < 20).all() and (box.start + box.extent <= 20).all()
    log_ratio = np.log(np.asarray(box.extent[:, 0] / box.extent[:, 1]))
    assert abs(log_ratio.mean()) < 0.1 and abs(log_ratio.std() - math.log(10 / 3) / math.sqrt(3)) < 0.1


def test_a_batch_is_its_pictures_one_by_one():
    recipe = FineTuneAugment(MEAN, STD, (8, 8))
    assert hash(recipe) == hash(FineTuneAugment(MEAN, STD, (8, 8))) and MAE_CROP.scale == (0.2, 1.0)
    views = run(recipe, keys=KEYS[:8])
    alone = jax.jit(recipe)
    for key, view in zip(KEYS[:8], views, strict=True):
        np.testing.assert_allclose(alone(key, PICTURE), view, atol=1e-4)
    assert len({float(view.sum()) for view in views}) == 8


# DINO ----------------------------------------------------------------------------------------------------------------


STILL = DinoAugment(
    global_size=(10, 10), local_size=(8, 8), num_locals=1, global_scale=(1.0, 1.0), local_scale=(0.64, 0.64),
    ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0, global_blur=(0.0, 0.0), local_blur=0.0, blur_sigma=(1.0, 2.0),
    solarise=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def still():
    """The crops without chance."""
    return run(STILL)


def test_crops_are_as_large_as_they_should_be():
    recipe = DinoAugment(MEAN, STD, (10, 12), (6, 8), 3, blur_radius=3)
    crops = run(recipe, recipe.redo(PICTURE), KEYS[:2])
    assert crops.globals_.shape == (2, 2, 10, 12, 3) and crops.locals_.shape == (2, 3, 6, 8, 3)
    assert all(bool(jnp.isfinite(part).all()) for part in crops)
    alone = jax.eval_shape(dataclasses.replace(recipe, num_locals=0), KEYS[0], PICTURE)
    assert alone.globals_.shape == (2, 10, 12, 3) and alone.locals_.shape == (0, 6, 8, 3)
    inside = recipe.undo(crops.globals_[0, 0])
    np.testing.assert_allclose(recipe.redo(inside), crops.globals_[0, 0], atol=1e-5)


def test_blurs_are_as_frequent_as_meant_or_as_released(still):
    meant = dataclasses.replace(STILL, global_blur=(1.0, 0.1), local_blur=0.5, solarise=0.0)
    assert meant.blur_probabilities == DinoAugment().blur_probabilities == (1.0, 0.1, 0.5)
    crops = run(dataclasses.replace(meant, match_release=True))
    pairs = (
        (crops.globals_[:, 0], still.globals_[:, 0], 0.0),
        (crops.globals_[:, 1], still.globals_[:, 1], 0.9),
        (crops.locals_[:, 0], still.locals_[:, 0], 0.5),
    )
    for blurred, plain, expected in pairs:
        assert frequency_is((np.abs(blurred - plain).max(axis=(1, 2, 3)) > 1e-4).mean(), expected)


@pytest.mark.parametrize(("settings", "expected"), [({"jitter": 0.8}, 0.8), ({"grey": 0.2}, 0.2)])
def test_colours_change_as_often_as_they_should(settings, expected):
    recipe = dataclasses.replace(STILL, **settings)
    change = jax.jit(jax.vmap(recipe.change, (0, None, None, None)))
    views = change(KEYS, PICTURE, jnp.asarray(0.0), jnp.asarray(0.0))
    assert frequency_is((np.abs(views - PICTURE).max(axis=(1, 2, 3)) > 1e-4).mean(), expected)
    both = change(KEYS, PICTURE, jnp.asarray(0.0), jnp.asarray(0.3))
    assert frequency_is((np.abs(both - views).max(axis=(1, 2, 3)) > 1e-4).mean(), 0.3)


def test_colours_are_changed_one_after_the_other_in_random_order():
    recipe = DinoAugment()
    jitter = jax.jit(recipe._jitter)
    orders = set()
    for key in KEYS[:12]:
        order_key, factor_key = jax.random.split(key)
        draws = np.asarray(jax.random.uniform(factor_key, (4,), minval=-1.0, maxval=1.0))
        expected = PICTURE
        order = tuple(jax.random.permutation(order_key, 4).tolist())
        for which in order:
            grey = np.asarray(expected) @ [0.299, 0.587, 0.114]
            ground = [0.0, np.floor(np.round(255 * grey).mean() + 0.5) / 255, grey[..., None], None][which]
            if ground is None:
                expected = operations.turn_hue(expected, float(0.1 * draws[3]))
            else:
                factor = 1 + (0.4, 0.4, 0.2)[which] * draws[which]
                expected = jnp.asarray(np.clip(ground + factor * (np.asarray(expected) - ground), 0, 1), jnp.float32)
        np.testing.assert_allclose(jitter(key, PICTURE), expected, atol=2e-5)
        orders.add(order)
    assert len(orders) > 6


def test_settings_are_checked():
    with pytest.raises(ValueError, match="mean, std"):
        CropAugment((0.5,), ())
    with pytest.raises(ValueError, match="blur_radius"):
        DinoAugment(local_size=(4, 4))
