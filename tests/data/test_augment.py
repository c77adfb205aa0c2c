import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.special

from jaxmed.data.augment import (
    AugmentConfig,
    affine_places,
    augment,
    bias_field,
    blur,
    change_contrast,
    draw_affine,
    draw_bias_field,
    draw_flips,
    flip,
    gamma,
    noise,
    random_resized_crop,
    random_shift,
    scale_shift,
    smooth,
    warp,
)

pytestmark = pytest.mark.core

SHAPES = [(12, 12), (8, 8, 8)]
ALWAYS = AugmentConfig(
    flip_axes=(0, 1),
    shift=1,
    affine_probability=1,
    shear=0.1,
    stretch=1.0,
    stretch_spacing=4.0,
    blur_probability=1,
    bias_probability=1,
    gamma_probability=1,
    intensity_probability=1,
    noise_probability=1,
)
NEVER = AugmentConfig()
OFTEN = AugmentConfig(
    flip_axes=(0,), affine_probability=0.5, blur_probability=0.2, bias_probability=0.2, gamma_probability=0.2,
    intensity_probability=0.3, noise_probability=0.2,
)  # fmt: skip


def example(spatial, channels=1, seed=0):
    return jax.random.uniform(jax.random.key(seed), (*spatial, channels))


def rigid(linear, shift=None):
    shift = np.zeros(len(linear)) if shift is None else shift
    return jnp.concatenate([jnp.asarray(linear, jnp.float32), jnp.asarray(shift, jnp.float32)[:, None]], axis=1)


def show(image, matrix, **options):
    return warp(image, affine_places(matrix, image.shape[: len(matrix)]), **options)


@pytest.mark.parametrize("spatial", SHAPES)
def test_flips_are_involutive(spatial, key):
    image = example(spatial, 2)
    flips = draw_flips(key, len(spatial), (0, 1), 1.0)
    assert flips.tolist() == [True, True, *[False] * (len(spatial) - 2)]
    np.testing.assert_array_equal(flip(flip(image, flips), flips), image)
    np.testing.assert_array_equal(flip(image, flips), image[::-1, ::-1])


@pytest.mark.parametrize("spatial", [(12, 12), (7, 7), (6, 5, 4)])
@pytest.mark.parametrize("order", [0, 1])
def test_the_identity_copies(spatial, order):
    image = example(spatial, 2)
    np.testing.assert_array_equal(show(image, rigid(np.eye(len(spatial))), order=order), image)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("edge", [6, 7])
def test_quarter_turns_are_rot90(order, edge):
    turn = np.array([[0, 1], [-1, 0]])
    image = example((edge, edge))
    np.testing.assert_array_equal(show(image, rigid(turn), order=order), np.rot90(image, 1))
    volume = example((edge, edge, 4))
    solid = np.eye(3)
    solid[:2, :2] = turn
    np.testing.assert_array_equal(show(volume, rigid(solid), order=order), np.rot90(volume, 1))


def test_drawn_quarter_turn_is_rot90_to_rounding():
    config = AugmentConfig(rotation=90.0, scale=(1.0, 1.0), translation=0.0)
    turns = [draw_affine(jax.random.key(seed), (6, 6), config)[:, :2] for seed in range(5)]
    for turn in turns:
        np.testing.assert_allclose(turn @ turn.T, np.eye(2), atol=1e-6)
    angles = np.array([math.atan2(turn[1, 0], turn[0, 0]) for turn in turns])
    assert np.abs(angles).max() <= math.pi / 2 and np.ptp(angles) > 0.5


def test_volumes_turn_about_one_axis_and_grow_along_two(key):
    config = AugmentConfig(
        rotation=30.0, rotation_axes=(0,), scale=(0.8, 0.9), scale_axes=(1, 2), is_isotropic=False, translation=0.0
    )
    matrix = np.asarray(draw_affine(key, (4, 6, 6), config))[:, :3]
    np.testing.assert_allclose(matrix[0], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(matrix[:, 0], [1, 0, 0], atol=1e-6)
    lengths = np.linalg.norm(matrix[1:, 1:], axis=0)
    assert ((1 / 0.9 - 1e-6 < lengths) & (lengths < 1 / 0.8 + 1e-6)).all() and abs(matrix[1, 2]) > 1e-3
    turn = matrix[1:, 1:] / lengths
    np.testing.assert_allclose(turn @ turn.T, np.eye(2), atol=1e-6)


@pytest.mark.parametrize("spatial", [(9, 11), (7, 8, 9)])
@pytest.mark.parametrize("fill", [0.5, None])
def test_warp_agrees_with_scipy(spatial, fill, key):
    config = AugmentConfig(rotation=20.0, shear=0.1, is_isotropic=False)
    matrix = np.asarray(draw_affine(key, spatial, config), np.float64)
    image = np.asarray(example(spatial)[..., 0])
    center = (np.array(spatial) - 1) / 2
    ndim = len(spatial)
    offset = center + matrix[:, ndim] - matrix[:, :ndim] @ center
    mode = {"mode": "nearest"} if fill is None else {"mode": "grid-constant", "cval": fill}
    wanted = scipy.ndimage.affine_transform(image, matrix[:, :ndim], offset, order=1, **mode)
    found = show(jnp.asarray(image)[..., None], jnp.asarray(matrix, jnp.float32), fill=fill)
    np.testing.assert_allclose(found[..., 0], wanted, atol=1e-5)


def test_unequal_voxels_turn_rigidly(key):
    config = AugmentConfig(rotation=30.0, scale=(1.0, 1.0), translation=0.0, spacing=(1.0, 2.0, 4.0))
    linear = np.asarray(draw_affine(key, (8, 8, 8), config)[:, :3])
    spacing = np.diag(config.spacing)
    physical = spacing @ linear @ np.linalg.inv(spacing)
    np.testing.assert_allclose(physical @ physical.T, np.eye(3), atol=1e-5)


@pytest.mark.parametrize("spatial", [(24, 24), (16, 16, 16)])
def test_image_and_label_move_together(spatial):
    grid = np.stack(np.meshgrid(*[np.arange(n) - n / 2 for n in spatial], indexing="ij"))
    label = jnp.asarray((np.abs(grid).max(0) < spatial[0] / 4).astype(np.int32) * 3)
    image = (label[..., None] / 3).astype(jnp.float32)
    config = dataclasses.replace(NEVER, flip_axes=(0,), flip_probability=0.5, affine_probability=1.0)
    for seed in range(3):
        moved, moved_label = augment(jax.random.key(seed), image, config, label)
        assert set(np.unique(moved_label)) <= {0, 3} and moved_label.dtype == jnp.int32
        agree = np.asarray((moved[..., 0] > 0.5) == (moved_label == 3))
        assert agree.mean() > 0.99
        assert not np.array_equal(moved, image)


@pytest.mark.parametrize("spatial", SHAPES)
def test_blur_keeps_constants_and_agrees_with_scipy(spatial, key):
    np.testing.assert_allclose(blur(key, jnp.full((*spatial, 2), 3.0), (0.5, 2.0)), 3.0, rtol=1e-6)
    image = example(spatial)
    wanted = scipy.ndimage.gaussian_filter(np.asarray(image[..., 0]), 1.25, mode="nearest", radius=4)
    np.testing.assert_allclose(blur(key, image, (1.25, 1.25), 4)[..., 0], wanted, atol=1e-5)


def test_smoothing_has_the_integrated_gaussian_along_each_axis():
    from math import erf, sqrt

    image = jnp.zeros((17, 17, 17, 1)).at[8, 8, 8, 0].set(1.0)
    sigmas = (0.5, 0.75, 1.0)
    found = np.asarray(smooth(image, jnp.array(sigmas), is_integrated=True))[..., 0]
    lines = [
        [0.5 * (erf((k + 0.5) / (s * sqrt(2))) - erf((k - 0.5) / (s * sqrt(2)))) for k in range(-4, 5)] for s in sigmas
    ]
    np.testing.assert_allclose(found[4:13, 4:13, 4:13], np.einsum("i,j,k->ijk", *lines), atol=1e-7)
    np.testing.assert_allclose(
        smooth(jnp.full((9, 9, 9, 1), 0.3), jnp.array(sigmas), is_integrated=True), 0.3, atol=1e-5
    )


def test_contrast_is_a_power_within_the_own_range():
    np.testing.assert_allclose(
        change_contrast(jnp.array([0.1, 0.3, 0.5]).reshape(3, 1, 1, 1), jnp.float32(1.25)).ravel(),
        [0.1, 0.1 + 0.4 * 0.5**1.25, 0.5],
        atol=1e-6,
    )


@pytest.mark.peers
def test_smoothing_and_contrast_are_those_of_monai():
    import torch
    from monai.transforms import AdjustContrast, GaussianSmooth

    image = np.random.default_rng(0).random((1, 20, 20, 20)).astype(np.float32)
    ours = np.asarray(smooth(jnp.asarray(image[0, ..., None]), jnp.array([0.5, 0.8, 1.0]), is_integrated=True))[..., 0]
    theirs = GaussianSmooth(sigma=(0.5, 0.8, 1.0), approx="erf")(torch.tensor(image)).numpy()[0]
    inside = (slice(4, -4),) * 3  # the edges differ: see the deviation
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=2e-5)
    ours = np.asarray(change_contrast(jnp.asarray(image[0, ..., None]), jnp.float32(0.8)))[..., 0]
    np.testing.assert_allclose(ours, AdjustContrast(gamma=0.8)(torch.tensor(image)).numpy()[0], atol=1e-5)


@pytest.mark.parametrize("spatial", SHAPES)
def test_bias_fields_have_their_range_and_mean(spatial):
    logs = [np.log(draw_bias_field(jax.random.key(seed), spatial, 0.4)) for seed in range(8)]
    for log in logs:
        assert abs(log.mean()) < 1e-5 and np.abs(log).max() <= 0.4 + 1e-5
        steps = [np.abs(np.diff(log, axis=axis)).max() for axis in range(len(spatial))]
        assert max(steps) < 0.4
    assert max(np.abs(log).max() for log in logs) > 0.2
    image = example(spatial, 2)
    np.testing.assert_array_equal(bias_field(jax.random.key(0), image, 0.0), image)
    ratio = bias_field(jax.random.key(0), image, 0.4) / image
    np.testing.assert_allclose(ratio[..., 0], ratio[..., 1], rtol=1e-5)


def test_gamma_keeps_range_and_one_is_the_identity(key):
    image = 5 * example((8, 8, 8), 2) - 2
    np.testing.assert_allclose(gamma(key, image, (1.0, 1.0)), image, atol=1e-5)
    dark = gamma(key, image, (2.0, 2.0))
    np.testing.assert_allclose(dark.min((0, 1, 2)), image.min((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(dark.max((0, 1, 2)), image.max((0, 1, 2)), atol=1e-5)
    assert (dark <= image + 1e-5).all()
    np.testing.assert_array_equal(gamma(key, jnp.ones((4, 4, 1)), (0.5, 2.0)), jnp.ones((4, 4, 1)))


def test_scale_and_shift_are_per_channel(key):
    image = example((8, 8), 3)
    moved = np.asarray(scale_shift(key, image, (0.5, 2.0), (-1.0, 1.0)))
    for channel in range(3):
        factor, summand = np.polyfit(np.ravel(image[..., channel]), moved[..., channel].ravel(), 1)
        assert 0.5 <= factor <= 2 and -1 <= summand <= 1
    np.testing.assert_array_equal(scale_shift(key, image, (1.0, 1.0), (0.0, 0.0)), image)


def test_gaussian_noise_has_its_level(key):
    found = noise(key, jnp.zeros((64, 64, 16)), (0.3, 0.3))
    assert abs(found.mean()) < 0.005 and abs(found.std() - 0.3) < 0.005


@pytest.mark.parametrize("ratio", [0.0, 1.0, 3.0])
def test_rician_noise_has_the_mean_of_the_formula(ratio, key):
    sigma = 0.2
    found = noise(key, jnp.full((64, 64, 16), ratio * sigma), (sigma, sigma), True)
    half = -(ratio**2) / 2
    # E = sigma sqrt(pi/2) L_1/2(-ratio^2 / 2).
    laguerre = math.exp(half / 2) * (
        (1 - half) * scipy.special.iv(0, -half / 2) - half * scipy.special.iv(1, -half / 2)
    )
    assert abs(found.mean() / (sigma * math.sqrt(math.pi / 2) * laguerre) - 1) < 0.01


@pytest.mark.parametrize("spatial", SHAPES)
def test_resized_crops_show_a_part(spatial, key):
    image = example(spatial, 2)
    whole = random_resized_crop(key, image, spatial, (1.0, 1.0), 1.0)
    np.testing.assert_allclose(whole, image, atol=1e-5)
    ramp = jnp.broadcast_to(jnp.arange(spatial[0], dtype=jnp.float32).reshape(-1, *[1] * len(spatial)), (*spatial, 1))
    for seed in range(10):
        cut = np.asarray(random_resized_crop(jax.random.key(seed), ramp, (6,) * len(spatial), (0.25, 0.5)))
        assert cut.shape == (*(6,) * len(spatial), 1)
        profile = cut.reshape(6, -1)[:, 0]
        assert (np.diff(profile) > 0).all() and profile[0] >= 0 and profile[-1] <= spatial[0] - 1
        share = (profile[3] - profile[2]) * 6 / spatial[0]
        assert 0.3 < share < 1.0


@pytest.mark.parametrize("spatial", SHAPES)
def test_augment_is_the_same_under_vmap_and_jit(spatial):
    images = example((4, *spatial))
    labels = (images[..., 0] > 0.5).astype(jnp.int32)
    keys = jax.random.split(jax.random.key(5), 4)

    def run(key, image, label):
        return augment(key, image, ALWAYS, label)

    batched, batched_labels = jax.jit(jax.vmap(run))(keys, images, labels)
    compiled = jax.jit(run)
    for index in range(4):
        single, label = (run if index == 0 else compiled)(keys[index], images[index], labels[index])
        np.testing.assert_allclose(batched[index], single, atol=2e-5)
        assert (np.asarray(batched_labels[index]) == np.asarray(label)).mean() > 0.99
    again, _ = jax.jit(jax.vmap(run))(keys, images, labels)
    np.testing.assert_array_equal(again, batched)
    assert not np.allclose(batched[0], images[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_augment_keeps_type_and_shape(dtype, key):
    image = example((8, 6, 4), 2).astype(dtype)
    moved, label = jax.jit(functools.partial(augment, config=ALWAYS))(key, image)
    assert moved.dtype == dtype and moved.shape == image.shape and label is None


@pytest.mark.parametrize(
    "config",
    [
        NEVER,
        dataclasses.replace(
            ALWAYS,
            shift=0,
            **{field.name: 1e-9 for field in dataclasses.fields(AugmentConfig) if field.name.endswith("_probability")},
        ),
    ],
)
def test_what_chance_leaves_alone_is_a_copy(config, key):
    image, label = example((8, 6, 4), 2), jnp.ones((8, 6, 4), jnp.int32)
    same, same_label = jax.jit(functools.partial(augment, config=config))(key, image, label=label)
    np.testing.assert_array_equal(same, image)
    np.testing.assert_array_equal(same_label, label)


def test_chance_is_the_same_under_vmap():
    images, keys = example((6, 8, 8)), jax.random.split(jax.random.key(5), 6)
    run = functools.partial(augment, config=OFTEN)
    batched, _ = jax.jit(jax.vmap(run))(keys, images)
    compiled = jax.jit(run)
    for index in range(6):
        np.testing.assert_allclose(batched[index], compiled(keys[index], images[index])[0], atol=2e-5)


def test_probabilities_are_kept():
    config = dataclasses.replace(NEVER, noise_probability=0.25, noise_sigma=(0.1, 0.1))
    image = example((4, 4))
    images, _ = jax.vmap(lambda key: augment(key, image, config))(jax.random.split(jax.random.key(1), 2000))
    changed = np.asarray((images != image).any((1, 2, 3))).mean()
    assert abs(changed - 0.25) < 0.03


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="noise_probability"):
        AugmentConfig(noise_probability=2)
    with pytest.raises(ValueError, match="gamma"):
        AugmentConfig(gamma=(0.0, 1.0))
    with pytest.raises(ValueError, match="shift: expected a .*number from 0 .*found -1"):
        AugmentConfig(shift=-1)
    with pytest.raises(ValueError, match="noise_sigma: expected a .*number from 0 .*found -1"):
        AugmentConfig(noise_sigma=(-1.0, 1.0))


@pytest.mark.parametrize("spatial", SHAPES)
def test_shifts_keep_every_voxel_inside(spatial):
    image = jnp.zeros((*spatial, 1)).at[(spatial[0] // 2,) * len(spatial)].set(1.0)
    places = set()
    for seed in range(20):
        moved, label = random_shift(jax.random.key(seed), (image, image[..., 0]), 2, len(spatial))
        np.testing.assert_array_equal(moved[..., 0], label)
        (place,) = np.argwhere(np.asarray(label))
        assert np.abs(place - spatial[0] // 2).max() <= 2
        places.add(tuple(place))
    assert len(places) > 8


@pytest.mark.parametrize("spatial", [(24, 24), (12, 12, 12)])
def test_a_mask_is_where_its_image_is_above_half(spatial, key):
    mask = jnp.zeros(spatial).at[tuple(slice(4, 9) for _ in spatial)].set(1.0)
    config = AugmentConfig(affine_probability=1, rotation=30.0, shear=0.1, stretch=2.0, stretch_spacing=6.0, fill=None,
                           label_fill=None, flip_axes=(0,), shift=2)  # fmt: skip
    moved, shown = augment(key, 0.8 * mask[..., None], config, mask)
    np.testing.assert_array_equal(shown, moved[..., 0] > 0.4)
    assert shown.dtype == mask.dtype and not np.array_equal(shown, mask)


def test_a_recipe_of_pretraining_crops_flips_and_stays_within_its_limits(key):
    # The crops of MAE: boxes of a picture to the network's size, in Pillow's bicubic.
    config = AugmentConfig(crop_size=(16, 16), crop_scale=(0.2, 1.0), crop_method="cubic", flip_axes=(1,),
                           limits=(0.0, 1.0))  # fmt: skip
    images = jax.vmap(config)(jax.random.split(key, 8), jnp.broadcast_to(example((20, 30), 3), (8, 20, 30, 3)))
    assert images.shape == (8, 16, 16, 3) and 0 <= images.min() and images.max() <= 1
    assert config.active == ("crop", "flip")
    with pytest.raises(ValueError, match="crop_size: expected an image without a label"):
        augment(key, example((20, 30)), config, jnp.zeros((20, 30), jnp.int32))


def test_steps_happen_in_the_order_that_the_recipe_says(key):
    image = example((8, 8))
    steps = {"gamma_probability": 1.0, "intensity_probability": 1.0, "intensity_shift": (0.5, 0.5)}
    first, second = (
        AugmentConfig(order=order, **steps)(key, image) for order in (("gamma", "intensity"), ("intensity", "gamma"))
    )
    assert float(jnp.abs(first - second).max()) > 1e-3
    with pytest.raises(ValueError, match="order"):
        AugmentConfig(order=("noise", "noise"))
