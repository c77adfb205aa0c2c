"""ConvNeXt V2 with patches that it does not see, and the masked autoencoder around it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_weights import draw

from jaxmed.arrays.masking import random_masking
from jaxmed.arrays.patches import patchify
from jaxmed.arrays.trees import map_named, named_leaves
from jaxmed.models.convnext import PROFOUND, ConvNext, ConvNextConfig, ResponseNorm, convnext_encoder
from jaxmed.models.fcmae import FcmaeConfig, fcmae_model
from jaxmed.nn.model import make_model
from jaxmed.objectives.masked import masked_loss
from jaxmed.train.optimizer import layer_scales

pytestmark = pytest.mark.core

CONFIG = ConvNextConfig((16, 24), 2, (1, 2, 1), (4, 8, 8), stem=2, strides=(2, 1), kernel_size=3)
GRID = (4, 6)
IMAGE = jax.random.normal(jax.random.key(1), (2, 16, 24, 2))
KEPT = jnp.array([[0, 7, 8, 13, 23, 2], [5, 3, 11, 12, 22, 18]])


@functools.lru_cache
def params_of(config):
    shapes = jax.eval_shape(convnext_encoder(config).init, jax.random.key(0))
    return map_named(lambda name, leaf: jnp.asarray(draw(name, leaf.shape)), shapes)


@functools.lru_cache
def run(config=CONFIG):
    return jax.jit(convnext_encoder(config).apply)


def test_the_published_network_has_its_parameters():
    shapes = jax.eval_shape(convnext_encoder(PROFOUND).init, jax.random.key(0))
    norm = 2 * 768  # of the mean over space, which is the head's here
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) + norm == 29_311_680
    assert PROFOUND.grid == (4, 14, 14) and PROFOUND.patch_size == (16, 16, 16)


def test_what_is_hidden_changes_nothing_that_is_seen():
    params = params_of(CONFIG)
    tokens = run()(params, IMAGE, KEPT)
    assert tokens.shape == (2, 6, 8) and np.std(tokens) > 0.1
    # Patches that are not kept become noise.
    patches = np.array(patchify(IMAGE, (4, 4)))
    is_hidden = np.ones((2, 24), bool)
    np.put_along_axis(is_hidden, np.asarray(KEPT), False, axis=1)
    changed = np.array(IMAGE).reshape(2, 4, 4, 6, 4, 2)
    mask = is_hidden.reshape(2, 4, 1, 6, 1, 1)
    changed = np.where(mask, 100.0, changed).reshape(IMAGE.shape).astype(np.float32)
    assert (np.abs(np.array(patchify(jnp.asarray(changed), (4, 4))) - patches).max(-1) > 1).sum() == is_hidden.sum()
    np.testing.assert_array_equal(run()(params, changed, KEPT), tokens)
    maps = make_model(ConvNext(CONFIG))
    seen = jnp.asarray(~is_hidden).reshape(2, *GRID)
    for factor, found in zip((2, 1, 1), maps.apply(params, IMAGE, seen, method="maps"), strict=True):
        hidden = np.repeat(np.repeat(~np.asarray(seen), factor, 1), factor, 2)
        assert not np.asarray(found)[hidden].any()


def test_with_nothing_hidden_both_ways_agree():
    params = params_of(CONFIG)
    everything = jnp.broadcast_to(jnp.arange(24), (2, 24))
    np.testing.assert_allclose(run()(params, IMAGE, everything), run()(params, IMAGE), rtol=0, atol=2e-6)


def test_the_response_norm_is_its_formula_over_what_is_seen():
    rng = np.random.default_rng(0)
    x, scale, bias = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal(5), rng.standard_normal(5)
    seen = rng.random((2, 3, 4, 1)) < 0.6
    params = {"scale": jnp.asarray(scale, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    for scope, axes in (("sample", (1, 2)), ("batch", (0, 1, 2))):
        length = np.sqrt((x**2 * seen).sum(axes, keepdims=True))
        expected = scale * x * length / (length.mean(-1, keepdims=True) + 1e-6) + bias + x
        norm = make_model(ResponseNorm(over=scope))
        found = norm.apply(params, jnp.asarray(x, jnp.float32), jnp.asarray(seen, jnp.float32))
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    norm = make_model(ResponseNorm())
    started = norm.init(jax.random.key(0), jnp.ones((1, 2, 2, 5)))
    np.testing.assert_array_equal(norm.apply(started, jnp.asarray(x, jnp.float32)), x.astype(np.float32))
    # Shares do not depend on the scale of the image, and an image of zeros has a finite gradient.
    whole = functools.partial(norm.apply, params | {"bias": jnp.zeros(5)})
    np.testing.assert_allclose(whole(jnp.asarray(64 * x)), 64 * whole(jnp.asarray(x)), rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda x: whole(x).sum())(jnp.zeros((1, 2, 2, 5)))
    assert np.isfinite(gradient).all()


def test_a_depthwise_kernel_looks_at_seen_neighbours_alone():
    """Submanifold convolution: outputs where there are inputs, missing neighbours add nothing."""
    config = ConvNextConfig((4, 5), 1, (1,), (3,), stem=1, strides=(), kernel_size=3)
    rng = np.random.default_rng(0)
    image, kernel = rng.standard_normal((1, 4, 5, 1)).astype(np.float32), rng.standard_normal((3, 3, 3))
    kept = np.array([[0, 1, 6, 7, 12, 19]])
    params = jax.tree.map(jnp.zeros_like, params_of(config))
    params["downsample_0"]["kernel"] = jnp.ones((1, 1, 1, 3))
    params["downsample_norm_0"] = {"scale": jnp.zeros(3), "bias": jnp.arange(1.0, 4.0)}  # what is seen is 1, 2, 3
    block = params["block_0"]
    block["depthwise"]["kernel"] = jnp.asarray(kernel[:, :, None], jnp.float32)
    block["norm"]["scale"] = jnp.ones(3)
    block["fc1"]["kernel"] = jnp.eye(3, 12)
    block["fc2"]["kernel"] = jnp.eye(12, 3)
    found = convnext_encoder(config).apply(params, jnp.asarray(image), jnp.asarray(kept))
    places = [(place // 5, place % 5) for place in kept[0]]
    for token, (row, column) in zip(found[0], places, strict=True):
        total = np.zeros(3)
        for i, j in places:
            if abs(i - row) < 2 and abs(j - column) < 2:
                total += kernel[i - row + 1, j - column + 1] * np.arange(1, 4)
        normed = (total - total.mean()) / np.sqrt(total.var() + 1e-6)
        gelu = 0.5 * normed * (1 + np.vectorize(math.erf)(normed / np.sqrt(2)))
        np.testing.assert_allclose(token, np.arange(1, 4) + gelu, rtol=0, atol=1e-5)


def test_learning_rates_fall_as_in_the_published_recipe():
    encoder = convnext_encoder(dataclasses.replace(PROFOUND, image_size=(16, 16, 16)))
    shapes = {"encoder": jax.eval_shape(encoder.init, jax.random.key(0)), "head": {"kernel": jnp.zeros(3)}}
    scales = dict(named_leaves(layer_scales(shapes, 0.5, encoder.layers)))
    number = {name: round(19 + np.log2(scale)) for name, scale in scales.items()}
    expected = {"downsample_0": 1, "block_0": 1, "block_1": 2, "block_2": 3, "downsample_3": 4, "block_3": 4,
                "downsample_norm_6": 7, "block_14": 15, "downsample_15": 16, "block_17": 18}  # fmt: skip
    for name, layer in expected.items():
        assert {number[path] for path in number if f"/{name}/" in path} == {layer}
    assert number["head/kernel"] == 19


def test_skipped_branches_keep_their_mean():
    config = dataclasses.replace(CONFIG, drop_path_rate=0.5)
    params = params_of(config)
    image = jnp.broadcast_to(IMAGE[:1], (2, *IMAGE.shape[1:]))
    several = np.concatenate([run(config)(params, image, key=jax.random.key(seed)) for seed in range(40)])
    assert len(np.unique(several[:, 0, 0].round(4))) > 3
    np.testing.assert_array_equal(run(config)(params, image), run(CONFIG)(params, image))


def test_the_autoencoder_predicts_hidden_patches_and_is_judged_by_them_alone():
    config = FcmaeConfig(CONFIG, decoder_width=8, mask_ratio=0.6)
    model = fcmae_model(config)
    assert model.grid == GRID and model.patch_size == (4, 4)
    shapes = jax.eval_shape(model.network.init, jax.random.key(0))
    params = map_named(lambda name, leaf: jnp.asarray(draw(name, leaf.shape)), shapes)
    noise = jax.random.uniform(jax.random.key(2), (2, 24))
    apply = jax.jit(model.network.apply, static_argnames="all_patches")
    output = apply(params, IMAGE, noise)
    masking = random_masking(noise, 0.6)
    assert masking.kept.shape[1] == 9 and output.prediction.shape == (2, 15, 32)
    np.testing.assert_array_equal(output.masking.hidden, masking.hidden)
    every = apply(params, IMAGE, noise, all_patches=True).prediction
    np.testing.assert_allclose(every[:, 9:], output.prediction, rtol=0, atol=1e-6)
    loss = jax.jit(lambda keys: masked_loss(model, params, keys, {"image": IMAGE})[0])
    assert np.isfinite(loss(jax.random.split(jax.random.key(3), 2)))
    # Hidden voxels reach the loss as targets, never the prediction.
    rows = np.arange(2)[:, None]
    patches = np.array(patchify(IMAGE, (4, 4)))
    patches[rows, masking.hidden] = 7.0
    blank = patches.reshape(2, 4, 6, 4, 4, 2).transpose(0, 1, 3, 2, 4, 5).reshape(IMAGE.shape)
    np.testing.assert_array_equal(apply(params, blank, noise).prediction, output.prediction)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (4, 8)}, "widths: expected as many as depths"),
        ({"kernel_size": 4}, "kernel_size: expected an odd number"),
        ({"image_size": (16, 22)}, "patch_size"),
        ({"image_size": (16,)}, "image_size: expected 2 or 3 axes"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match="mask_ratio: expected some of 24 patches"):
        FcmaeConfig(CONFIG, mask_ratio=0.99)
