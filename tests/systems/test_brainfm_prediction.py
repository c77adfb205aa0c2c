"""A scan to maps: grids and units, windows against the whole, modalities, registration from coordinates."""

import dataclasses

import jax
import numpy as np
import pytest
from drawn_weights import draw

from jaxmed.arrays.trees import map_named
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.models.published.brainfm import NAME, PREPROCESS, make_unet
from jaxmed.models.published.load import ImportReport, Published
from jaxmed.models.unet_brain import BrainUnetConfig, brain_unet
from jaxmed.systems import brainfm
from jaxmed.systems.brainfm.evaluation import CONDITIONS, compare, robustness
from jaxmed.systems.brainfm.prediction import (
    Prediction,
    affine_to_atlas,
    cortex_image,
    on_input_grid,
    register_pair,
    to_world,
    warp_atlas,
    warp_other,
)
from jaxmed.volume import Volume

CONFIG = BrainUnetConfig(width=8, levels=2, labels=(0, 2, 41))
SPACE = (14, 12, 16)


@pytest.fixture(scope="module")
def published():
    shapes = jax.eval_shape(brain_unet(CONFIG, SPACE).init, jax.random.key(0))
    params = map_named(lambda name, leaf: draw(name, leaf.shape), shapes)
    report = ImportReport(NAME, "maps", (), (), (), "none")
    return Published(make_unet(CONFIG, params), params, PREPROCESS, CONFIG, report)


@pytest.fixture(scope="module")
def scan():
    """Return a scan of 1 mm stored front to back, left side first, with some background."""
    array = np.random.default_rng(0).uniform(20, 100, (SPACE[1], SPACE[2], SPACE[0])).astype(np.float32)
    array[:3] = 0
    affine = np.array([[0, 0, -1, 9], [-1, 0, 0, 5], [0, 1, 0, -3], [0, 0, 0, 1]], float)
    return Volume.make(array, affine)


@pytest.fixture(scope="module")
def found(published, scan):
    return brainfm.predict(published, scan, feature=True)


def test_maps_have_their_units_and_lie_on_the_turned_grid(published, scan, found):
    assert found.scan.volume.array.shape == SPACE and found.scan.volume.affine[0, 0] == 1
    image = found.scan.volume.array
    assert image.min() == 0 and image.max() == 1
    raw = jax.jit(published.model.apply)(published.params, image[None, ..., None])
    inside = image != 0
    np.testing.assert_allclose(found.maps["CT"][inside], 1000 * raw["CT"][0, ..., 0][inside], rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(
        found.maps["bias_field"][inside], np.exp(raw["bias_field_log"])[0, ..., 0][inside], rtol=1e-4
    )
    np.testing.assert_allclose(found.maps["coordinates"][inside], 100 * raw["registration"][0][inside], atol=1e-2)
    labels = np.array(CONFIG.labels)[np.asarray(raw["segmentation"])[0].argmax(-1)]
    np.testing.assert_array_equal(found.maps["segmentation"], np.where(inside, labels, 0))
    for name, value in found.maps.items():
        assert not value[~inside].any() and value.shape[:3] == SPACE, name
    assert sum(found.voxels.values()) == pytest.approx(inside.sum(), rel=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found.feature, axis=-1), 1, atol=1e-4)


def test_results_come_back_onto_the_voxels_of_the_file(scan, found):
    back = on_input_grid(found, {"input": found.scan.volume.array, "labels": found.maps["segmentation"]})
    np.testing.assert_array_equal(back["input"].affine, scan.affine)
    np.testing.assert_allclose(back["input"].array, (scan.array - scan.array.min()) / np.ptp(scan.array), atol=1e-6)
    assert back["labels"].array.dtype == np.int32 and set(np.unique(back["labels"].array)) <= {0, 2, 41}


def test_one_window_is_the_whole_and_several_average_probabilities(published, scan, found):
    one = brainfm.predict(published, scan, window=SPACE)
    for name, value in found.maps.items():
        np.testing.assert_allclose(one.maps[name], value, rtol=1e-4, atol=1e-3)
    several = brainfm.predict(published, scan, window=(8, 12, 16), overlap=0.5)
    assert several.maps["T1"].shape == SPACE and set(several.maps) == set(found.maps)
    assert sum(several.voxels.values()) == pytest.approx(sum(found.voxels.values()), rel=1e-4)
    assert np.abs(several.maps["T1"] - found.maps["T1"]).max() > 0


def test_small_volumes_and_other_voxel_sizes(published):
    deep = dataclasses.replace(published, config=CONFIG)
    thin = Volume.make(np.random.default_rng(1).random((9, 7, 1)).astype(np.float32), np.diag([1.0, 2.0, 1.0, 1]))
    found = brainfm.predict(deep, thin)
    assert found.maps["T1"].shape == (9, 14, 1) and found.scan.volume.spacing == pytest.approx((1, 1, 1))
    oblique = np.eye(4)
    oblique[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    turned = Volume.make(np.random.default_rng(1).random((9, 7, 5)).astype(np.float32), oblique)
    back = on_input_grid(brainfm.predict(published, turned), {"T1": np.ones((9, 7, 5), np.float32)})
    np.testing.assert_allclose(back["T1"].affine, oblique)


def test_ct_is_cut_to_its_window(published):
    array = np.random.default_rng(2).uniform(-1000, 1500, SPACE).astype(np.float32)
    volume = Volume.make(array, np.eye(4))
    for modality, image in (("auto", np.clip(array, 0, 80) / 80), ("CT", np.clip(array, 0, 80) / 80),
                            ("other", (array - array.min()) / np.ptp(array))):  # fmt: skip
        found = brainfm.predict(published, volume, modality=modality)
        np.testing.assert_allclose(found.scan.volume.array, image, atol=1e-5)


def test_other_weights_and_several_channels_are_refused(published):
    four = Volume.make(np.random.default_rng(0).random((6, 6, 6, 2)).astype(np.float32), np.eye(4))
    with pytest.raises(InputError):
        brainfm.predict(published, four)
    with pytest.raises(InputError, match="weights: expected a multi-task network of brains, found a maps"):
        brainfm.predict(dataclasses.replace(published, config=3), np.ones((4, 4, 4)))


def test_the_image_of_the_cortex_is_the_formula():
    left, right = np.array([-1.0, -2.0]), np.array([0.3, 0.1])  # pial and white
    expected = sum(
        70 * (1 - (np.tanh(2 * (white + 0.3)) + 1) / 2) + 40 * (1 - (np.tanh(2 * pial) + 1) / 2)
        for pial, white in (left, right)
    )
    distance = np.concatenate([left, right]).reshape(1, 1, 1, 4)
    np.testing.assert_allclose(cortex_image(distance), expected, rtol=1e-6)
    inside, outside = (cortex_image(np.full((1, 1, 1, 2), value)).item() for value in (-9.0, 9.0))
    assert inside == pytest.approx(110) and outside == pytest.approx(0, abs=1e-5)


# Registration: coordinates that are known -----------------------------------------------------------------------------

TO_MNI = np.array([[1.1, 0.1, 0, 3.0], [-0.1, 0.9, 0.05, -2.0], [0, 0.1, 1.05, 5.0], [0, 0, 0, 1]])


def with_coordinates(found, matrix, image=None, affine=None):
    """Return a prediction whose coordinates are an affine map of its world."""
    volume = found.scan.volume
    volume = Volume.make(volume.array if image is None else image, volume.affine if affine is None else affine)
    places = np.argwhere(np.ones(volume.array.shape))
    mm = to_world(matrix, to_world(volume.affine, places)).reshape(*volume.array.shape, 3).astype(np.float32)
    scan = found.scan._replace(volumes=(volume,))
    return Prediction(scan, {"coordinates": mm}, {})


def test_the_affine_of_the_coordinates_is_found(found):
    fit = affine_to_atlas(with_coordinates(found, TO_MNI))
    np.testing.assert_allclose(fit.matrix, TO_MNI, atol=1e-4)
    assert fit.residual < 1e-4
    with pytest.raises(InputError, match="a network with the task registration"):
        affine_to_atlas(found._replace(maps={}))


def test_an_atlas_comes_onto_the_scan(found):
    """Of an atlas that is a ramp, every voxel of the brain shows where it is."""
    places = np.argwhere(np.ones((40, 40, 40)))
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = -20
    atlas = Volume.make(to_world(affine, places)[:, 0].reshape(40, 40, 40).astype(np.float32), affine)
    prediction = with_coordinates(found, np.diag([0.5, 0.5, 0.5, 1.0]))
    inside = prediction.brain
    warped = warp_atlas(prediction, atlas)
    np.testing.assert_allclose(warped[inside], prediction.maps["coordinates"][inside][:, 0], atol=1e-4)
    assert not warped[~inside].any()


def test_two_scans_of_one_head_find_one_another(found):
    """The second scan is the first one, moved: by the coordinates of both every voxel finds its place in it."""
    shift = np.eye(4)
    shift[:3, 3] = (2.0, -1.0, 3.0)
    image = np.random.default_rng(3).uniform(0.5, 1, SPACE).astype(np.float32)
    here = with_coordinates(found, TO_MNI, image)
    moved = shift @ here.scan.volume.affine
    there = with_coordinates(found, TO_MNI @ np.linalg.inv(shift), image, moved)
    world = to_world(here.scan.volume.affine, np.argwhere(here.brain))
    np.testing.assert_allclose(register_pair(here, there), world + shift[:3, 3], atol=0.01)
    np.testing.assert_allclose(warp_other(here, there), image, atol=0.02)


def test_a_file_is_read_as_its_volume(published, scan, found, tmp_path):
    nifti.write(tmp_path / "scan.nii.gz", scan)
    again = brainfm.predict(published, tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(again.maps["segmentation"], found.maps["segmentation"])


# Worse versions -------------------------------------------------------------------------------------------------------


def test_worse_versions_change_the_maps_and_the_scan_itself_does_not(published, found):
    rows = robustness(published, found, None, jax.random.key(0))
    assert list(rows) == ["as it is", *CONDITIONS]
    same = rows.pop("as it is")
    assert same["dice"] == 1 and same["coordinate_mm"] == same["distance_mm"] == same["T1_error"] == 0
    assert same["T1_ssim"] == pytest.approx(1) and same["bias_error"] == pytest.approx(0, abs=1e-6)
    for name, row in rows.items():
        assert row["dice"] < 1 and row["T1_error"] > 0 and np.isfinite([*row.values()]).all(), name


def test_truth_decides_dice_where_there_is_one(found):
    truth = np.where(np.arange(SPACE[0])[:, None, None] < 7, 2, 41) * np.ones(SPACE, int)
    after = found.maps | {"segmentation": np.where(truth == 2, 2, 0)}
    assert compare(found.maps, after, truth, found)["dice"] == pytest.approx(0.5)


@pytest.mark.parametrize("name", CONDITIONS)
def test_worse_versions_are_inputs_of_the_network(name):
    whole = np.random.default_rng(5).random((56, 52, 60)).astype(np.float32)
    worse = CONDITIONS[name](jax.random.key(1), Volume.make(whole, np.eye(4)))
    image = worse.image
    assert image.shape == whole.shape and image.dtype == np.float32 and 0 <= image.min() and image.max() <= 1 + 1e-6
    assert np.abs(image - whole).max() > 0.05
    assert (worse.places is not None) == (name == "deformation")
