"""The brain generator's images and targets (BrainFM specification, checks 2 to 8)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from jaxmed.arrays.warping import identity_grid, sample, sample_stacks
from jaxmed.data.label_table import TABLES
from jaxmed.data.surface_distances import encode
from jaxmed.synthesis.brain import draw_of, folded_share, generate, mix_with_scans
from jaxmed.synthesis.brain_draws import GeneratorConfig, draw_shared
from jaxmed.synthesis.brain_targets import Places, find_places, likeliest, make_targets, paper_mirror
from jaxmed.synthesis.contrast import ContrastConfig
from jaxmed.synthesis.deformation import Affine, DeformationConfig, draw_displacement, sampling_coordinates
from jaxmed.synthesis.pathology import PathologyConfig
from jaxmed.synthesis.resolution import ResolutionConfig

pytestmark = pytest.mark.core
GRID, SIZE, SHAPE = (28, 32, 26), (25, 30, 24), (22, 24, 20)
CENTER = (np.array(SIZE) - 1) / 2
RNG = np.random.default_rng(6)
CONFIG = GeneratorConfig(SHAPE, flip=0.5, deformation=DeformationConfig(control_scale=(0.1, 0.2), amplitude=1.0))
STILL = DeformationConfig(rotation=0, shear=0, scaling=0, amplitude=0)


def ball(radius):
    return np.float32(np.linalg.norm(np.asarray(identity_grid(GRID)) - CENTER, axis=-1) - radius)


@functools.cache
def subject():
    """A ball with two sides in a volume that is padded, with every field."""
    x = np.asarray(identity_grid(GRID))[..., 0] - CENTER[0]
    inside = ball(9.0) < 0
    segmentation = np.where(inside, np.where(x < 0, 20, 38), 0).astype(np.uint8)
    labels = np.where(inside, np.where(ball(5.0) < 0, 2, 3), 0).astype(np.uint8)
    surfaces = [ball(9.0), ball(5.0), ball(9.0) + 1, ball(5.0) + 1]
    images = np.where(inside[..., None], RNG.integers(200, 1000, (*GRID, 2)), 0).astype(np.int16)
    return {
        "labels": jnp.asarray(labels),
        "segmentation": jnp.asarray(segmentation),
        "distances": jnp.stack([jnp.asarray(encode(one)) for one in surfaces], -1),
        "coordinates": jnp.asarray(np.rint(100 * np.asarray(identity_grid(GRID)))).astype(jnp.int16),
        "images": jnp.asarray(images),
        "present": jnp.array([True, False]),
        "image_scale": jnp.array([0.5, 1.0]),
        "defaced": jnp.asarray((np.asarray(identity_grid(GRID))[..., 1] > 25).astype(np.uint8)),
        "size": jnp.array(SIZE, jnp.int32),
    }


@functools.cache
def placed(config=CONFIG):
    """Return places and targets for a key, flipped or not."""

    @jax.jit
    def place(key, is_flipped, subject):
        shared_key, place_key = jax.random.split(key)
        present = jnp.array([True, False, False, False])
        drawn = draw_shared(shared_key, present, subject["size"], -jnp.ones(4), config)
        drawn = drawn._replace(is_flipped=is_flipped)
        places = find_places(place_key, subject["size"], drawn, config)
        return places, *make_targets(subject, places, drawn, config), drawn

    return lambda key, is_flipped=False: place(key, jnp.array(is_flipped), subject())


def test_a_coordinate_map_gives_the_sampling_coordinates(key):
    places, targets, _, _ = placed()(key)
    np.testing.assert_allclose(100 * targets["registration"], places.coordinates, atol=2e-3)
    # Places are within the subject, not in the padding behind it.
    assert (np.asarray(places.coordinates) <= np.array(SIZE) - 1).all()
    assert 0 < np.asarray(places.is_outside).mean() < 0.5


def test_a_flip_reverses_every_target_exchanges_sides_and_negates_x(key):
    _, straight, mixable, _ = placed()(key)
    _, flipped, mixable_flipped, _ = placed()(key, True)
    back = {name: np.asarray(value)[::-1] for name, value in flipped.items() if name != "present"}
    np.testing.assert_allclose(back["registration"] * [-1, 1, 1], straight["registration"], atol=1e-6)
    np.testing.assert_allclose(back["distance"][..., [2, 3, 0, 1]], straight["distance"], atol=1e-5)
    np.testing.assert_array_equal(np.asarray(paper_mirror())[back["segmentation"]], straight["segmentation"])
    for name in ("T1", "T2", "FLAIR", "CT", "background", "weights"):
        np.testing.assert_allclose(back[name], straight[name], atol=1e-6)
    np.testing.assert_allclose(np.asarray(mixable_flipped)[::-1], mixable, atol=1e-6)


def test_exchanging_sides_twice_is_nothing_and_fixes_the_midline():
    mirror = np.asarray(paper_mirror())
    np.testing.assert_array_equal(mirror[mirror], np.arange(56))
    np.testing.assert_array_equal(mirror[:20], np.arange(20))
    assert (mirror[20:] != np.arange(20, 56)).all()
    assert TABLES["brainfm"]().mirror == tuple(mirror.tolist())


def test_distances_are_those_of_the_scaled_ball():
    """A map of s times as many voxels makes the ball smaller, and distances are divided by s."""
    scale, shape = 1.2, SHAPE
    drawn = placed()(jax.random.key(0))[3]
    affine = Affine(scale * jnp.eye(3), jnp.float32(scale), jnp.zeros(3))
    drawn = drawn._replace(affine=affine, is_flipped=jnp.array(False))
    wanted = sampling_coordinates(jnp.array(SIZE), affine, jnp.zeros((*shape, 3)))
    places = Places(wanted, jnp.zeros(shape, bool))
    targets, _ = jax.jit(make_targets, static_argnums=3)(subject(), places, drawn, CONFIG)
    expected = np.linalg.norm(np.asarray(identity_grid(shape)) - (np.array(shape) - 1) / 2, axis=-1) - 5.0 / scale
    found = np.asarray(targets["distance"])[..., 1]
    near = np.abs(expected) < 2.9
    assert np.abs(found - expected)[near].max() < 0.1
    slope = np.linalg.norm(np.stack(np.gradient(found)), axis=0)
    middle = (np.abs(expected) < 1.5) & (expected > -1.5)
    assert np.abs(slope[middle] - 1).mean() < 0.05
    assert found.max() == 3 and found.min() >= -3


def test_distances_beyond_the_volume_are_the_largest_and_images_are_dark(key):
    places, targets, _, _ = placed()(key)
    outside = np.asarray(places.is_outside)
    assert (np.asarray(targets["distance"])[outside] == 3).all()
    assert (np.asarray(targets["segmentation"])[outside] == 0).all()
    assert (np.asarray(targets["T1"])[outside] == 0).all()
    assert (np.asarray(targets["weights"])[outside] == 1).all()


def test_images_span_the_unit_interval_and_missing_ones_are_marked(key):
    _, targets, mixable, _ = placed()(key)
    assert np.asarray(targets["T1"]).min() == 0 and np.asarray(targets["T1"]).max() == 1
    np.testing.assert_array_equal(targets["present"], [True, False, False, False])
    for name in ("T2", "FLAIR", "CT"):
        assert (np.asarray(targets[name]) == 0).all() and targets[name].shape == (*SHAPE, 1)
    np.testing.assert_array_equal(mixable[..., 0], targets["T1"][..., 0])
    assert {int(value) for value in np.unique(targets["segmentation"])} == {0, 20, 38}
    np.testing.assert_array_equal(targets["background"], np.asarray(targets["segmentation"]) == 0)
    assert set(np.unique(targets["weights"])) == {0.0, 1.0}


def test_smooth_labels_are_those_of_interpolated_one_hots(key):
    """Against SciPy, class by class; and such classes are targets where they are asked for."""
    labels = RNG.integers(0, 4, (6, 5, 7))
    places = RNG.uniform(0, np.array(labels.shape) - 1, (300, 3)).astype(np.float32)
    shares = np.stack([map_coordinates((labels == one).astype(float), places.T, order=1) for one in range(4)])
    found = np.asarray(jax.jit(likeliest)(jnp.asarray(labels, jnp.uint8), jnp.asarray(places)))
    top = np.sort(shares, 0)
    clear = top[-1] - top[-2] > 1e-5
    np.testing.assert_array_equal(found[clear], shares.argmax(0)[clear])
    smooth, nearest = placed(dataclasses.replace(CONFIG, smooth_labels=True))(key)[1], placed()(key)[1]
    differs = np.asarray(smooth["segmentation"]) != nearest["segmentation"]
    assert 0 < differs.mean() < 0.1 and set(np.unique(smooth["segmentation"])) == {0, 20, 38}


def test_the_release_loses_first_planes_and_keeps_masks_unflipped(key):
    released = dataclasses.replace(CONFIG, match_release=True, deformation=STILL, shape=SIZE)
    places, straight, _, _ = placed(released)(key)
    at_zero = (np.asarray(places.coordinates) == 0).any(-1)
    np.testing.assert_array_equal(places.is_outside, at_zero)
    assert (np.asarray(straight["registration"])[0] == 0).all() and at_zero.sum() > 0
    _, flipped, _, _ = placed(released)(key, True)
    np.testing.assert_array_equal(flipped["weights"][1:-1], straight["weights"][1:-1])


def test_stacks_of_several_types_are_sampled_as_one_float_image(key):
    image = RNG.integers(0, 255, (9, 8, 7, 3))
    places = jax.random.uniform(key, (50, 3), maxval=9.0)
    bytes_, words = image[..., :1].astype(np.uint8), image[..., 1:].astype(np.int16)
    one, two = jax.jit(lambda places: sample_stacks([jnp.asarray(bytes_), jnp.asarray(words)], places))(places)
    expected = jax.jit(sample)(jnp.asarray(image, jnp.float32), places)
    np.testing.assert_allclose(jnp.concatenate([one, two], -1), expected, rtol=1e-6)


@functools.cache
def drawn(config):
    make = jax.jit(lambda key, fields: generate(key, fields, config))
    return lambda key, read: make(key, subject() | {"read": read})


NEVER, ALWAYS = jnp.zeros(4), jnp.ones(4)
"""How often scans are taken as they are."""
INNER = tuple(slice(size) for size in SIZE)


def test_a_batch_of_keys_has_images_with_a_maximum_of_one_that_depend_on_their_keys_alone():
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), subject() | {"read": -jnp.ones(4)})
    draw = jax.jit(jax.vmap(lambda key, fields: generate(key, fields, CONFIG)))
    for seed in range(2):
        keys = jax.random.split(jax.random.key(seed), 2)
        image, targets = draw(keys, batch)
        assert image.shape == (2, *SHAPE, 1) and image.dtype == jnp.float32
        assert float(image.min()) >= 0.0 and (np.asarray(image).max((1, 2, 3, 4)) == 1).all()
        assert (np.asarray(image).std((1, 2, 3, 4)) > 0.02).all()
        assert targets["bias_field_log"].shape == targets["high_res_residual"].shape == (2, *SHAPE, 1)
        assert all(np.isfinite(np.asarray(value)).all() for value in targets.values())
        assert float(jnp.abs(targets["pathology"]).max()) == 0
    swapped, others = draw(keys[::-1], batch)
    np.testing.assert_array_equal(swapped[::-1], image)
    np.testing.assert_array_equal(others["segmentation"][::-1], targets["segmentation"])


def plain(**changes):
    """No deformation, bias, noise or photographs; every label one intensity, and every image a mixture."""
    still = dataclasses.replace(CONFIG.severe.bias, std=(0.0, 0.0))
    config = dataclasses.replace(
        CONFIG,
        shape=SIZE,
        flip=0.0,
        mix=1.0,
        deformation=STILL,
        severe=dataclasses.replace(CONFIG.severe, gamma=0.0, noise=(0.0, 0.0), bias=still),
        real_noise=(0.0, 0.0),
        resolution=ResolutionConfig(photo_probability=0.0),
        contrast=ContrastConfig(std=(0.0, 0.0), background_probability=1.0),
    )
    return dataclasses.replace(config, **changes)


@functools.cache
def fine_key():
    """A key whose image is taken at 1 mm, which the configuration has no say in."""
    draw = jax.jit(lambda key: draw_of(key, subject(), plain()).acquisition.resolution)
    return next(one for one in jax.random.split(jax.random.key(1), 100) if (np.asarray(draw(one)) == 1).all())


def lines(image, scan):
    """Check that the image is a line in the scan for every label, all of one slope, with different levels."""
    labels = np.asarray(subject()["labels"])[INNER]
    x, y, is_two, is_three = (part[labels > 0] for part in (scan, image, labels == 2, labels == 3))
    columns = np.stack([x, is_two, is_three], -1).astype(float)
    (slope, two, three), *_ = np.linalg.lstsq(columns, y, rcond=None)
    np.testing.assert_allclose(columns @ [slope, two, three], y, atol=1e-5)
    assert slope > 0.05 and abs(two - three) > 0.01


def test_a_label_map_becomes_its_table_mixed_with_scans_on_one_scale():
    image, targets = drawn(plain())(fine_key(), NEVER)
    image, scan = np.asarray(image)[..., 0], np.asarray(targets["T1"])[..., 0]
    assert float(jnp.abs(targets["high_res_residual"]).max()) < 1e-5
    np.testing.assert_array_equal(targets["segmentation"], np.asarray(subject()["segmentation"])[INNER])
    assert (image[np.asarray(subject()["labels"])[INNER] == 0] < 1e-6).all()
    lines(image, scan)


def test_mixtures_are_on_one_scale_and_in_one_direction_unless_the_release_is_matched():
    image, scans = jnp.asarray(RNG.uniform(0, 255, (6, 5, 4))), jnp.asarray(RNG.uniform(size=(6, 5, 4, 3)))
    shares = jnp.array([0.4, 0.3, 0.0, 0.3])
    for is_flipped in (False, True):
        flip = jnp.array(is_flipped)
        ours = 0.4 * image + 255 * (0.3 * scans[..., 0] + 0.3 * scans[..., 2])
        np.testing.assert_allclose(mix_with_scans(image, scans, shares, flip), ours, rtol=1e-5)
        turned = scans[::-1] if is_flipped else scans
        theirs = 0.4 * image + 0.3 * turned[..., 0] + 0.3 * turned[..., 2]
        np.testing.assert_allclose(mix_with_scans(image, scans, shares, flip, True), theirs, rtol=1e-5)
    alone = mix_with_scans(image, scans, jnp.eye(1, 4)[0], jnp.array(True))
    np.testing.assert_array_equal(alone, image)


def test_a_scan_that_is_read_as_it_is_stays_itself():
    image, _ = drawn(plain())(fine_key(), ALWAYS)
    scan = np.asarray(subject()["images"])[..., 0][INNER]
    np.testing.assert_allclose(np.asarray(image)[..., 0], scan / scan.max(), atol=1e-5)


def test_several_images_share_targets_and_lesions_change_images_alone():
    lesions = PathologyConfig(1.0, percentile=(85.0, 90.0), spread=0.0)
    config = plain(mix=0.0, pathology=lesions, samples=2, mild_samples=1)
    image, targets = drawn(config)(fine_key(), NEVER)
    assert image.shape == (2, *SIZE, 1) and targets["segmentation"].shape == SIZE
    np.testing.assert_allclose(image.max((1, 2, 3, 4)), 1.0)
    mild, none = np.asarray(targets["bias_field_log"])
    assert 0 < np.abs(mild).max() < 0.1 and none.std() == 0
    mask = np.asarray(targets["pathology"])[..., 0] > 0
    assert 0 < mask.mean() < 0.3
    labels, levels = np.asarray(subject()["labels"])[INNER], np.asarray(image)[1, ..., 0]
    assert (labels[mask] > 0).all()
    for label in np.unique(labels[mask]):
        rest = levels[(labels == label) & ~mask]
        assert abs(levels[(labels == label) & mask].mean() - np.median(rest)) > 0.05 * np.median(rest)
    np.testing.assert_array_equal(targets["segmentation"], np.asarray(subject()["segmentation"])[INNER])


def test_without_images_or_distances_there_are_fewer_targets(key):
    fields = {name: subject()[name] for name in ("labels", "segmentation")}
    image, targets = jax.eval_shape(functools.partial(generate, config=CONFIG), key, fields)
    assert image.shape == (*SHAPE, 1) and "distance" not in targets and "registration" not in targets
    assert targets["T1"].shape == (*SHAPE, 1) and targets["present"].shape == (4,)


def test_the_share_of_folds_is_that_of_the_field_and_none_of_an_integrated_one(key):
    wild = dataclasses.replace(CONFIG, deformation=DeformationConfig(control_scale=(0.2, 0.3), amplitude=9.0))
    raw, flow = (
        float(jax.jit(functools.partial(folded_share, config=one))(key, subject()))
        for one in (
            wild,
            dataclasses.replace(wild, deformation=dataclasses.replace(wild.deformation, integrate_svf=True)),
        )
    )
    drawn = draw_of(key, subject(), wild)
    field = np.asarray(draw_displacement(jax.random.split(key, 4)[1], SHAPE, wild.deformation, drawn.photo))
    slopes = np.stack([np.stack(np.gradient(field[..., axis]), -1) for axis in range(3)], -2) + np.eye(3)
    assert raw == pytest.approx((np.linalg.det(slopes) <= 0).mean(), abs=0.002) and raw > 0.005
    assert flow < raw / 5


def test_hemispheres_have_two_distances(key):
    config = dataclasses.replace(CONFIG, hemisphere=True)
    _, targets = jax.eval_shape(functools.partial(generate, config=config), key, subject())
    assert targets["distance"].shape == (*SHAPE, 2)
