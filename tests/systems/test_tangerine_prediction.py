"""Predictions and Grad-CAM: against a reference in NumPy, finite differences, a planted signal, and the scan's grid."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.special
from tiny_tangerine import BINARY, CLASSES, LABELS, SIZE, VALUES, classifier, cubes, masked_autoencoder, scan

from jaxmed.errors import InputError
from jaxmed.models.vit import Vit
from jaxmed.nn.model import make_model
from jaxmed.recipes.encoder_calls import view
from jaxmed.recipes.predict_stage import explain
from jaxmed.recipes.token_maps import spread
from jaxmed.systems import tangerine
from jaxmed.volume import Volume

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture(scope="module")
def published():
    return classifier()


def run(published, images, maps):
    found = explain(*view(published)[:2], published.task, maps, published.params, images)
    return jax.tree.map(np.asarray, found)


# The last block and the head, written out in NumPy, float64 -----------------------------------------------------------


def layer_norm(x, norm):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]


def linear(x, layer):
    kernel = layer["kernel"]
    return x @ kernel.reshape(x.shape[-1], -1) + layer["bias"].reshape(-1)


def from_last(params, stream, normed, heads=2):
    block = params["encoder"]["blocks"]["layer_1"]
    tokens, width = normed.shape
    q, k, v = linear(normed, block["attention"]["qkv"]).reshape(tokens, 3, heads, -1).transpose(1, 2, 0, 3)
    weights = scipy.special.softmax(q @ k.transpose(0, 2, 1) / np.sqrt(width // heads), axis=-1)
    x = stream + linear((weights @ v).transpose(1, 0, 2).reshape(tokens, width), block["attention"]["out"])
    hidden = linear(layer_norm(x, block["norm2"]), block["mlp"]["fc1"])
    hidden = hidden * scipy.special.ndtr(hidden)
    x = x + linear(hidden, block["mlp"]["fc2"])
    pooled = layer_norm(np.concatenate([x[0], x[1:].mean(0)]), params["head"]["norm"])
    return linear(pooled, params["head"]["linear"])


def reference_maps(published, image):
    """Grad-CAM of every output by central differences: the mean gradient of a channel is a step of all its patches."""
    first = dataclasses.replace(published.config.encoder, depth=1)
    encoder = published.params["encoder"]
    stream = np.asarray(jax.jit(make_model(Vit(first)).apply)(encoder, image[None]), np.float64)[0]
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), published.params)
    normed = layer_norm(stream, params["encoder"]["blocks"]["layer_1"]["norm1"])
    step, patches = 1e-5, len(normed) - 1
    gradient = []
    for channel in range(normed.shape[1]):
        change = np.zeros_like(normed)
        change[1:, channel] = step
        ahead, behind = (from_last(params, stream, normed + sign * change) for sign in (1, -1))
        gradient.append((ahead - behind) / (2 * step * patches))
    maps = np.maximum(normed[1:] @ np.array(gradient), 0).T
    return from_last(params, stream, normed), maps.reshape(-1, *published.config.encoder.grid)


def test_maps_are_those_of_finite_differences(published):
    found = run(published, cubes(2), "all")
    for number, image in enumerate(cubes(2)):
        logits, maps = reference_maps(published, image)
        np.testing.assert_allclose(found.values[number], scipy.special.softmax(logits), atol=2e-6)
        assert maps.max() > 1e-3 and (maps == 0).any()
        np.testing.assert_allclose(found.maps[number], maps, atol=2e-5 * maps.max(), rtol=0)
    np.testing.assert_array_equal(found.mapped, [[0, 1, 2]] * 2)


def test_the_top_map_is_that_of_the_highest_output(published):
    every, top, none = (run(published, cubes(), maps) for maps in ("all", "top", "none"))
    for other in (top, none):
        np.testing.assert_allclose(other.values, every.values, **CLOSE)
    np.testing.assert_array_equal(top.mapped[:, 0], every.values.argmax(1))
    for number, output in enumerate(top.mapped[:, 0]):
        np.testing.assert_allclose(top.maps[number, 0], every.maps[number, output], **CLOSE)
    assert none.maps.shape == (3, 0, 4, 4, 4) and none.mapped.shape == (3, 0)


def test_a_batch_of_one_is_the_element_of_a_batch(published):
    whole = tangerine.predict(published, cubes(), "all")
    one = tangerine.predict(published, cubes()[1], "all")
    for single, many in zip(one, whole, strict=True):
        np.testing.assert_allclose(single, many[1], **CLOSE)


@pytest.mark.parametrize("task", [BINARY, LABELS, VALUES])
def test_values_are_probabilities_or_in_the_unit_of_the_labels(task):
    published = classifier(task)
    logits = np.asarray(jax.jit(published.model.apply)(published.params, cubes())[0], np.float64)
    expected = logits * 10 + 60 if task is VALUES else scipy.special.expit(logits)
    np.testing.assert_allclose(tangerine.predict(published, cubes(), "none").values, expected, rtol=1e-5)


def planted():
    """A classifier by hand: channel 0 of a token is its patch's brightness, and the logit grows with it."""
    published = classifier(BINARY)
    params = jax.tree.map(np.zeros_like, published.params)
    encoder, head = params["encoder"], params["head"]
    encoder["patch_embed"]["kernel"][:, 0] = 1 / 64  # the mean of a patch
    encoder["class_token"] = np.linspace(-1, 1, 24).astype(np.float32)  # tokens that are not all one number
    encoder["position"][:, 1:] = np.linspace(-1, 1, 23)
    for block in encoder["blocks"].values():
        block["norm1"]["scale"] += 1
        block["norm2"]["scale"] += 1
    last = encoder["blocks"]["layer_1"]["attention"]
    last["qkv"]["kernel"][:, 2] = np.eye(24).reshape(24, 2, 12)  # values pass, attention is even
    last["out"]["kernel"] += np.eye(24)
    head["norm"]["scale"] += 1
    head["linear"]["kernel"][24] = 1.0  # the pooled channel 0
    return dataclasses.replace(published, params=params)


def test_the_map_peaks_where_the_signal_is_planted():
    published = planted()
    shape, affine = (24, 40, 10), np.diag([-1.0, -0.6, 4.0, 1.0])
    array = np.full(shape, -900.0)
    array += np.random.default_rng(0).normal(0, 20, shape)
    where = (slice(14, 17), slice(12, 18), slice(6, 8))  # x, y, z: within one patch, and not in the centre
    array[where] = 300.0
    (found,) = tangerine.predict(published, Volume.make(array, affine)).maps
    assert found.array.shape == shape and found.array.min() >= 0
    # One patch is a quarter of the field of view along each axis.
    peak = np.unravel_index(found.array.argmax(), shape)
    for place, span, size in zip(peak, where, shape, strict=True):
        assert abs(place - (span.start + span.stop - 1) / 2) <= size / 8
    inside = found.array[where].mean()
    assert inside > 3 * found.array.mean()


ROTATION = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0.0], [0.48, 0.64, 0.6]])
AFFINES = {
    "flipped": np.diag([2.0, -2.0, -3.0, 1.0]),
    "anisotropic": np.diag([-0.7, -0.7, 10.0, 1.0]),
    "permuted": np.diag([-2.0, -2.0, 3.0, 1.0])[:, [2, 0, 1, 3]],
    "oblique": np.vstack([np.hstack([ROTATION * [1.5, 0.9, 4.0], [[5.0], [-7.0], [11.0]]]), [0, 0, 0, 1]]),
}


@pytest.mark.filterwarnings("ignore:axis . of the cube")
@pytest.mark.parametrize("name", AFFINES)
def test_maps_stand_on_the_grid_of_the_scan(published, name):
    volume = scan(shape=(11, 24, 7), affine=AFFINES[name])
    for found in tangerine.predict(published, volume, "all").maps:
        assert found.array.shape == (11, 24, 7) and found.array.dtype == np.float32
        np.testing.assert_array_equal(found.affine, volume.affine)
    # Along the axes as stored: the map of the model's cube, where each voxel was sampled from.
    cube = tangerine.predict(published, published.preprocess(volume), "all").maps
    again = tangerine.predict(published, volume, "all").maps[0].array
    np.testing.assert_allclose(again[0, 0, 0], cube[0, 0, 0, 0], **CLOSE)
    np.testing.assert_allclose(again.max(), cube[0].max(), rtol=0.2)


def test_patches_spread_as_jax_resizes_them():
    patches = np.random.default_rng(0).random((4, 4, 4)).astype(np.float32)
    expected = jax.image.resize(patches, SIZE, "linear", antialias=False)
    np.testing.assert_allclose(spread(patches, SIZE), expected, atol=1e-6)


def test_weights_without_a_head_or_a_meaning_are_refused():
    with pytest.raises(InputError, match="weights of a classifier or regressor, found a masked autoencoder"):
        tangerine.predict(masked_autoencoder(), cubes())
    with pytest.raises(InputError, match="found 3 without a meaning; give --task.kind"):
        tangerine.predict(dataclasses.replace(classifier(CLASSES), task=None), cubes())
