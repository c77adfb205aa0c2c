"""Published sizes of DINOv2 and DINOv3, and the head of their pre-training."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jaxmed.config import from_record, to_record
from jaxmed.models.dino import DinoHead, DinoHeadConfig, dinov2, dinov3, unit
from jaxmed.models.vit import Vit, VitConfig, gated_rules
from jaxmed.nn.model import make_model
from jaxmed.train.mesh import MeshConfig, make_mesh, param_shardings

pytestmark = pytest.mark.core
HEAD = make_model(DinoHead(DinoHeadConfig(prototypes=7, hidden=12, bottleneck=5)))
TOKENS = jax.random.normal(jax.random.key(1), (3, 2, 6))


@functools.lru_cache
def shapes(config):
    image = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    return jax.eval_shape(make_model(Vit(config)).init, jax.random.key(0), image)


def count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(config)))


def by_hand(width, depth, hidden, gated, patch, rows, registers, biases=3):
    """Count block by block; rows are those of the table, biases those of queries, keys and values."""
    maps = 2 if gated else 1
    block = 4 * width**2 + (biases + 1) * width + 4 * width + 2 * width
    block += (maps + 1) * width * hidden + maps * hidden + width
    tokens = (3 * patch**2 + 1) * width + (2 + registers + rows) * width
    return depth * block + tokens + 2 * width


@pytest.mark.parametrize(
    ("size", "registers", "expected"),
    [
        ("S", 0, by_hand(384, 12, 1536, False, 14, 1370, 0)),
        ("B", 4, by_hand(768, 12, 3072, False, 14, 1370, 4)),
        ("L", 0, 304_368_640),  # the published file, mask token included
        ("g", 4, by_hand(1536, 40, 4096, True, 14, 1370, 4)),
    ],
)
def test_dinov2_has_its_published_sizes(size, registers, expected):
    assert count(dinov2(size, registers=registers)) == expected


@pytest.mark.parametrize(
    ("size", "published", "expected"),
    [
        ("S", 21e6, by_hand(384, 12, 1536, False, 16, 0, 4)),
        ("S+", 29e6, by_hand(384, 12, 1536, True, 16, 0, 4)),
        ("B", 86e6, by_hand(768, 12, 3072, False, 16, 0, 4)),
        ("L", 300e6, by_hand(1024, 24, 4096, False, 16, 0, 4)),
        ("H+", 840e6, by_hand(1280, 32, 5120, True, 16, 0, 4)),
        ("7B", 6.7e9, by_hand(4096, 40, 8192, True, 16, 0, 4, biases=0)),
    ],
)
def test_dinov3_has_its_published_sizes(size, published, expected):
    assert count(dinov3(size)) == expected
    assert expected == pytest.approx(published, rel=0.03)


def test_the_largest_encoder_splits_over_eight_devices():
    config = dinov3("7B")
    params = shapes(config)
    places = param_shardings(params, make_mesh(MeshConfig(data=1, model=8)), gated_rules(config.mlp))
    sizes = jax.tree.map(lambda leaf, place: math.prod(place.shard_shape(leaf.shape)), params, places)
    assert sum(jax.tree.leaves(sizes)) < 1.01 * count(config) / 8
    model = make_model(Vit(dataclasses.replace(config, dtype="bfloat16", scan=True)))
    tokens = jax.eval_shape(model.apply, params, jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32))
    assert (tokens.shape, tokens.dtype) == ((2, 5 + 14**2, 4096), jnp.float32)


def test_settings_take_the_place_of_published_ones():
    config = dinov2("S", image_size=(28, 42), depth=2, mlp="swiglu", drop_path_rate=0.3)
    assert (config.grid, config.depth, config.mlp, config.layer_scale) == ((2, 3), 2, "swiglu", 1e-5)
    assert from_record(VitConfig, to_record(config), "config.json") == config


def test_a_head_is_gelu_layers_and_the_cosine_with_each_prototype():
    params = jax.jit(HEAD.init)(jax.random.key(0), TOKENS)
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * noise.standard_normal(leaf.shape).astype(np.float32), params)
    x = np.asarray(TOKENS, np.float64)
    for name in ("fc1", "fc2", "fc3"):
        x = x @ np.asarray(params[name]["kernel"], np.float64) + np.asarray(params[name]["bias"])
        x = x if name == "fc3" else x * 0.5 * (1 + erf(x / np.sqrt(2)))
    prototypes = np.asarray(params["prototypes"], np.float64)
    cosine = (x / np.linalg.norm(x, axis=-1, keepdims=True)) @ (prototypes / np.linalg.norm(prototypes, axis=0))
    found = jax.jit(HEAD.apply)(params, TOKENS)
    np.testing.assert_allclose(found, cosine * params["gain"], atol=2e-6)


def test_gains_begin_at_1_and_lengths_of_prototypes_do_not_matter():
    params = jax.jit(HEAD.init)(jax.random.key(0), TOKENS)
    np.testing.assert_array_equal(params["gain"], 1)
    longer = {**params, "prototypes": 3 * params["prototypes"]}
    np.testing.assert_allclose(HEAD.apply(longer, TOKENS), HEAD.apply(params, TOKENS), atol=1e-6)


def test_half_precision_is_close_and_scores_stay_whole():
    params = jax.jit(HEAD.init)(jax.random.key(0), TOKENS)
    half = make_model(DinoHead(DinoHeadConfig(prototypes=7, hidden=12, bottleneck=5), "bfloat16")).apply(params, TOKENS)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, HEAD.apply(params, TOKENS), atol=0.02)


def test_no_vector_is_divided_by_less_than_epsilon():
    vectors = jnp.array([[3.0, 4.0], [0.0, 0.0], [3e-9, 4e-9]])
    np.testing.assert_allclose(unit(vectors, 1e-8), [[0.6, 0.8], [0, 0], [0.3, 0.4]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: unit(x, 1e-8).sum())(vectors)).all()


@pytest.mark.peers
def test_a_head_is_that_of_pytorch_with_weight_norm():
    import torch
    from torch import nn

    params = HEAD.init(jax.random.key(0), TOKENS)
    layers = [nn.Linear(*sizes) for sizes in ((6, 12), (12, 12), (12, 5))]
    for name, layer in zip(("fc1", "fc2", "fc3"), layers, strict=True):
        params[name]["kernel"] = jnp.asarray(layer.weight.detach().numpy().T)
        params[name]["bias"] = jnp.asarray(layer.bias.detach().numpy())
    last = nn.utils.parametrizations.weight_norm(nn.Linear(5, 7, bias=False))
    gain, direction = last.parametrizations.weight.original0, last.parametrizations.weight.original1
    params["gain"] = jnp.asarray(gain.detach().numpy()[:, 0])
    params["prototypes"] = jnp.asarray(direction.detach().numpy().T)
    body = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
    expected = last(nn.functional.normalize(body(torch.from_numpy(np.array(TOKENS))), dim=-1, eps=1e-12))
    np.testing.assert_allclose(HEAD.apply(params, TOKENS), expected.detach().numpy(), atol=1e-6)
