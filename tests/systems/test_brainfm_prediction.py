"""A scan to maps: grids and units, windows against the whole, modalities, registration from coordinates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_weights import draw

from jaxmed.arrays.trees import map_named
from jaxmed.data.subject_files import modality_of
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.tables import read_table
from jaxmed.models.published.brainfm import NAME, PREPROCESS, make_unet
from jaxmed.models.published.load import ImportReport, Published
from jaxmed.models.unet_brain import BrainUnetConfig, brain_unet
from jaxmed.recipes.coordinate_maps import (
    affine_to_atlas,
    bring,
    find_in,
    pair_error,
    register_pair,
    to_world,
    warped_label_scores,
)
from jaxmed.recipes.worse_scans import CONDITIONS, to_unit_range
from jaxmed.systems import brainfm
from jaxmed.systems.brainfm.evaluation import compare, robustness
from jaxmed.systems.brainfm.pages import robustness_sections
from jaxmed.systems.brainfm.prediction import MAPS, Prediction, cortex_image, on_input_grid, predict_input
from jaxmed.systems.brainfm.stages.predict import Scan, write_tables
from jaxmed.systems.brainfm.truth import read_truth, score_maps
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


def test_the_core_is_jitted_mapped_and_differentiated_by_weights_and_images(published, found):
    """Gradients against finite differences, by the weights as a pytree and by the image."""
    image = jnp.asarray(found.scan.volume.array)[None, ..., None]
    rng, step = np.random.default_rng(0), 3e-4  # short: features of length 1 bend fast where they were short
    along = rng.normal(size=3).astype(np.float32)

    @jax.jit
    def loss(published, images):
        return (brainfm.predict_maps(published, images)["registration"] @ along).mean()

    by_weights, by_image = jax.jit(jax.grad(loss, argnums=(0, 1)))(published, image)
    ways = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / leaf.size**0.5, published)
    push = by_image / jnp.linalg.norm(by_image)

    def difference(at):
        return float(at(step) - at(-step)) / (2 * step)

    slope = difference(lambda h: loss(jax.tree.map(lambda leaf, way: leaf + h * way, published, ways), image))
    products = jax.tree.map(lambda gradient, way: float(jnp.vdot(gradient, way)), by_weights, ways)
    assert sum(jax.tree.leaves(products)) == pytest.approx(slope, rel=2e-2, abs=1e-4)
    assert float(jnp.vdot(by_image, push)) == pytest.approx(
        difference(lambda h: loss(published, image + 10 * h * push)) / 10, rel=2e-2
    )
    mapped = jax.jit(jax.vmap(lambda one: brainfm.predict_maps(published, one[None])["T1"][0]))(
        jnp.stack([image[0]] * 2)
    )
    # Where a feature was short, its unit length magnifies rounding, in single voxels: the map as a whole is compared.
    one, other = np.asarray(mapped)[1, ..., 0][found.inside], found.maps["T1"][found.inside]
    assert np.linalg.norm(one - other) < 1e-5 * np.linalg.norm(other) and np.abs(one - other).max() < 1e-3


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


def test_four_axes_are_averaged_and_empty_borders_cut_where_asked(published, scan, found, tmp_path):
    colours = np.stack([scan.array, scan.array, 4 * scan.array], -1)
    nifti.write(tmp_path / "four.nii.gz", Volume.make(colours, scan.affine))
    with pytest.raises(InputError, match="four.nii.gz: expected 3D data"):
        brainfm.predict(published, tmp_path / "four.nii.gz")
    again = brainfm.predict(published, tmp_path / "four.nii.gz", average=True)
    np.testing.assert_allclose(again.scan.volume.array, found.scan.volume.array, atol=1e-6)
    cropped = brainfm.predict(published, scan, crop=True)
    assert cropped.scan.volume.array.shape == (SPACE[0], SPACE[1] - 3, SPACE[2])
    back, whole = (on_input_grid(one, {"input": one.scan.volume.array})["input"] for one in (cropped, found))
    np.testing.assert_allclose(back.array, whole.array, atol=1e-6)


def test_ct_is_cut_to_its_window(published):
    array = np.random.default_rng(2).uniform(-1000, 1500, SPACE).astype(np.float32)
    volume = Volume.make(array, np.eye(4))
    for modality, image in (("auto", np.clip(array, 0, 80) / 80), ("CT", np.clip(array, 0, 80) / 80),
                            ("other", (array - array.min()) / np.ptp(array))):  # fmt: skip
        found = brainfm.predict(published, volume, modality=modality)
        np.testing.assert_allclose(found.scan.volume.array, image, atol=1e-5)


def brain_in(unit):
    """Return a head without air of its own: soft tissue of 20 to 45 HU in bone, through a function of HU."""
    rng = np.random.default_rng(3)
    hu = np.full(SPACE, 900.0)
    hu[2:-2, 2:-2, 2:-2] = rng.uniform(20, 45, tuple(n - 4 for n in SPACE))
    hu[0] = np.nan
    return Volume.make(np.nan_to_num(unit(hu)).astype(np.float32), np.eye(4))


def test_ct_in_another_unit_is_told_by_its_values(published):
    """Cut to 0 to 80 HU, a template in Cormack's unit is white all over; CT above its HU has no contrast left."""
    cormack = brain_in(lambda hu: hu + 1024 + 10 * np.clip(hu + 124, 0, 200))
    shifted = brain_in(lambda hu: hu + 1024)
    with pytest.raises(
        InputError, match="expected HU, so soft tissue of -100 to 150 in the middle, found no air below -500"
    ):
        brainfm.predict(published, cormack, modality="CT")
    np.testing.assert_allclose(
        brainfm.predict(published, cormack).scan.volume.array, to_unit_range(np.asarray(cormack.array)), atol=1e-6
    )
    for modality in ("auto", "CT"):
        with pytest.raises(InputError, match="1,05"):
            brainfm.predict(published, shifted, modality=modality)
    assert brainfm.predict(published, shifted, modality="other").scan.intensity.kind == "minmax"
    stripped = brain_in(lambda hu: hu)
    found = brainfm.predict(published, stripped, modality="CT").scan
    np.testing.assert_allclose(found.volume.array, np.clip(np.asarray(stripped.array), 0, 80) / 80, atol=1e-6)


def test_scales_of_distributions_are_maps_of_their_own(published, scan):
    config = BrainUnetConfig(
        width=8, levels=1, tasks=("T1", "CT", "bias_field_log", "registration"), uncertainty="laplace"
    )
    params = map_named(
        lambda name, leaf: draw(name, leaf.shape), jax.eval_shape(brain_unet(config, SPACE).init, jax.random.key(0))
    )
    told = dataclasses.replace(published, config=config, params=params, model=make_unet(config, params))
    found = brainfm.predict(told, scan)
    raw = jax.jit(told.model.apply)(params, found.scan.volume.array[None, ..., None])
    names = {
        "T1": ("T1", 1),
        "CT": ("CT", 1000),
        "bias_field": ("bias_field_log", 1),
        "coordinates": ("registration", 100),
    }
    assert set(found.maps) == {*names, *(f"{name}_scale" for name in names)} <= set(MAPS)
    for name, (task, unit) in names.items():
        expected = unit * np.exp(np.asarray(raw[f"{task}_log_scale"])[0])
        scale = found.maps[f"{name}_scale"]
        expected = expected[..., 0] if scale.ndim == 3 else expected
        np.testing.assert_allclose(scale[found.inside], expected[found.inside], rtol=1e-4)


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
    fit = affine_to_atlas(with_coordinates(found, TO_MNI).located)
    np.testing.assert_allclose(fit.matrix, TO_MNI, atol=1e-4)
    assert fit.residual < 1e-4
    with pytest.raises(InputError, match="a network with the task registration"):
        affine_to_atlas(found._replace(maps={}).located)


def test_an_atlas_comes_onto_the_scan(found):
    """Of an atlas that is a ramp, every voxel of the brain shows where it is."""
    places = np.argwhere(np.ones((40, 40, 40)))
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = -20
    atlas = Volume.make(to_world(affine, places)[:, 0].reshape(40, 40, 40).astype(np.float32), affine)
    prediction = with_coordinates(found, np.diag([0.5, 0.5, 0.5, 1.0]))
    inside = prediction.brain
    warped = bring(prediction.brain, prediction.located.of_brain, atlas)
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
    pair = register_pair(here.located, there.located)
    np.testing.assert_allclose(pair, world + shift[:3, 3], atol=0.01)
    np.testing.assert_allclose(bring(here.brain, pair, there.scan.volume), image, atol=0.02)


def test_the_error_of_a_pair_is_that_of_its_coordinates(found):
    """Coordinates that are 3 mm off to the front find every voxel 3 mm off; and a scan finds itself where it is."""
    image = np.ones(SPACE, np.float32)
    here = with_coordinates(found, np.eye(4), image)
    ahead = np.eye(4)
    ahead[1, 3] = 3.0
    # Two voxels are within the other scan's field of view all the same.
    inner = np.zeros(SPACE, np.float32)
    inner[4:10, 4:8, 4:10] = 1
    off = with_coordinates(found, ahead, inner)

    def truth(places):
        return to_world(here.scan.volume.affine, places)

    find = find_in(here.located)
    assert pair_error(here.located, find, truth) < 0.01
    assert pair_error(off.located, find, truth) == pytest.approx(3.0, abs=0.01)


def test_labels_that_are_brought_are_compared_by_dice_and_centres(found):
    """Two boxes, and the same boxes a voxel to the right in the other map: overlap and centres by hand."""
    here = with_coordinates(found, np.eye(4), np.ones(SPACE, np.float32))
    truth = np.zeros(SPACE, np.int32)
    truth[2:6, 2:6, 2:6], truth[8:12, 2:6, 2:6] = 2, 41
    labels = Volume.make(np.roll(truth, 1, 0), here.scan.volume.affine)
    scores = warped_label_scores(here.brain, truth, here.located.of_brain, labels)
    assert scores["dice"] == pytest.approx(3 / 4) and scores["center_mm"] == pytest.approx(1.0)
    same = warped_label_scores(here.brain, truth, here.located.of_brain, Volume.make(truth, here.scan.volume.affine))
    assert same == {"dice": 1.0, "center_mm": pytest.approx(0, abs=1e-6)}
    assert warped_label_scores(here.brain, np.where(truth, 7, 0), here.located.of_brain, labels) == {}


def test_a_file_is_read_as_its_volume(published, scan, found, tmp_path):
    nifti.write(tmp_path / "scan.nii.gz", scan)
    again = brainfm.predict(published, tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(again.maps["segmentation"], found.maps["segmentation"])


# Worse versions -------------------------------------------------------------------------------------------------------


def test_worse_versions_change_the_maps_and_the_scan_itself_does_not(published, found):
    rows = robustness(found, None, lambda image: predict_input(published, found.scan, image), jax.random.key(0))
    assert list(rows) == ["as it is", *CONDITIONS]
    same = rows.pop("as it is")
    assert same["dice"] == same["dice_with_background"] == 1
    assert same["coordinate_mm"] == same["distance_mm"] == same["T1_error"] == same["corrected_error"] == 0
    assert same["T1_ssim"] == pytest.approx(1) and same["CT_ms_ssim"] == pytest.approx(1)
    assert same["bias_error"] == pytest.approx(0, abs=1e-6) and same["pair_mm"] < min(
        r["pair_mm"] for r in rows.values()
    )
    for name, row in rows.items():
        assert row["dice"] < 1 and row["T1_error"] > 0 and np.isfinite([*row.values()]).all(), name


def test_registering_a_deformed_scan_is_scored_by_where_its_voxels_were(published, found):
    """Of coordinates that move along with the deformation the pair is exact to a part of a voxel."""
    still = with_coordinates(found, np.eye(4), np.ones(SPACE, np.float32))
    seen = []

    def again(image):
        seen.append(image)
        places = CONDITIONS["deformation"](jax.random.fold_in(jax.random.key(0), 4), still.scan.volume).places
        moved = to_world(still.scan.volume.affine, np.asarray(places).reshape(-1, 3)).reshape(*SPACE, 3)
        return still._replace(maps={"coordinates": moved.astype(np.float32)})

    rows = robustness(still, None, again, jax.random.key(0))
    assert rows["deformation"]["pair_mm"] < 0.25 < 0.3 < rows["bias"]["pair_mm"] and len(seen) == len(CONDITIONS)


def test_worse_versions_are_told_by_modality(tmp_path):
    dice = (("T1", 0.8, 0.6), ("T1", 0.9, 0.7), ("T2", 0.4, 0.3), ("", 0.5, 0.1))
    scans = [(name, {"as it is": {"dice": one}, "bias": {"dice": two}}) for name, one, two in dice]
    (section,) = robustness_sections(scans)
    by_condition, by_modality = section.blocks
    assert [row[0] for row in by_condition.rows] == ["as it is", "bias"]
    assert by_modality.columns == ("modality", "scans", "as it is", "bias")
    expected = [("not told", 1, 0.5, 0.1), ("T1", 2, 0.85, 0.65), ("T2", 1, 0.4, 0.3)]
    for row, wanted in zip(by_modality.rows, expected, strict=True):
        assert row[:2] == wanted[:2] and row[2:] == pytest.approx(wanted[2:])
    assert robustness_sections([]) == []
    names = ("sub-1_T1w.nii.gz", "HCP.7.FLAIR.nii", "t2.nii", "ct_head.nii.gz", "T1_in_T2.nii", "actor_T10.nii")
    assert [modality_of(name) for name in names] == ["T1", "FLAIR", "T2", "CT", "T2", ""]
    scan = Scan("a", "a_T1w.nii", (), (8, 8, 8), (1.0,) * 3, False, "T1", (), {}, {}, robustness=scans[0][1])
    write_tables(tmp_path, (scan,), {})
    rows = read_table(tmp_path / "robustness.csv").rows
    assert [(row["modality"], row["condition"]) for row in rows] == [("T1", "as it is"), ("T1", "bias")]


def test_truth_decides_dice_where_there_is_one(found):
    truth = np.where(np.arange(SPACE[0])[:, None, None] < 7, 2, 41) * np.ones(SPACE, int)
    after = found.maps | {"segmentation": np.where(truth == 2, 2, 0)}
    scores = compare(found.maps, after, truth, found)
    assert scores["dice"] == pytest.approx(0.5)
    truth[:, :3] = 0
    after["segmentation"] = truth
    assert compare(found.maps, after, truth, found)["dice_with_background"] == 1


def test_true_maps_are_read_onto_the_grid_and_scored_by_hand(found, tmp_path):
    rng, affine, brain = np.random.default_rng(4), found.scan.volume.affine, found.brain
    true = {
        "T1": 300 * found.maps["T1"] + 40,
        "CT": found.maps["CT"] - 25,
        "distance": found.maps["distance"] + 0.5,
        "coordinates": found.maps["coordinates"] + np.array([2.0, 0.0, 0.0], np.float32),
        "bias_field": 3 * np.exp(0.2 * rng.normal(size=SPACE)),
    }
    files = {}
    for name, values in true.items():
        files[name] = tmp_path / f"{name}.nii.gz"
        nifti.write(files[name], Volume.make(values.astype(np.float32), affine))
    read = read_truth(found, files)
    np.testing.assert_allclose(read["T1"], to_unit_range(found.maps["T1"]), atol=1e-5)
    scores = score_maps(found, None, read)
    assert scores["CT_error"] == pytest.approx(25, rel=1e-5) and scores["distance_mm"] == pytest.approx(0.5, rel=1e-5)
    assert scores["coordinate_mm"] == pytest.approx(2, rel=1e-5) and "dice" not in scores
    peak, error = true["CT"].max(), 25.0
    assert scores["CT_psnr"] == pytest.approx(20 * np.log10(max(peak, 1e-6) / error), rel=1e-4)
    assert scores["T1_ssim"] == pytest.approx(1, abs=1e-4) and scores["T1_ms_ssim"] == pytest.approx(1, abs=1e-4)
    ours, theirs = found.maps["bias_field"][brain], true["bias_field"][brain]
    factor = ours @ theirs / (ours @ ours)
    assert scores["bias_error"] == pytest.approx(
        np.linalg.norm(factor * ours - theirs) / np.linalg.norm(theirs), rel=1e-4
    )
    image = found.scan.volume.array[brain]
    one, two = image / theirs, image / ours
    assert scores["corrected_error"] == pytest.approx(np.abs(one / one.mean() - two / two.mean()).mean(), rel=1e-4)


def test_true_maps_that_do_not_fit_are_refused(found, tmp_path):
    nifti.write(
        tmp_path / "a.nii.gz", Volume.make(np.random.default_rng(0).random((*SPACE, 3)).astype(np.float32), np.eye(4))
    )
    with pytest.raises(InputError, match="4 channels, as of distance"):
        read_truth(found, {"distance": tmp_path / "a.nii.gz"})


@pytest.mark.parametrize("name", CONDITIONS)
def test_worse_versions_are_inputs_of_the_network(name):
    whole = np.random.default_rng(5).random((56, 52, 60)).astype(np.float32)
    worse = CONDITIONS[name](jax.random.key(1), Volume.make(whole, np.eye(4)))
    image = worse.image
    assert image.shape == whole.shape and image.dtype == np.float32 and 0 <= image.min() and image.max() <= 1 + 1e-6
    assert np.abs(image - whole).max() > 0.05
    assert (worse.places is not None) == (name == "deformation")
