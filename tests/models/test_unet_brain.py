"""The multi-task U-Net of brains: sizes, enlargement, heads, layout over devices."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_weights import draw
from jax.sharding import NamedSharding, PartitionSpec

from jaxmed.arrays.trees import map_named
from jaxmed.errors import InputError
from jaxmed.models.unet_brain import (
    BRAINFM,
    HEMISPHERE,
    LABELS,
    LEFT,
    RIGHT,
    VOLUME_SHARDING,
    BrainUnet,
    BrainUnetConfig,
    brain_unet,
    enlarge,
    largest_of_cubes,
    process,
)
from jaxmed.nn import convolution
from jaxmed.nn.model import make_model
from jaxmed.train.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.core

CONFIG = BrainUnetConfig(width=8, levels=2, tasks=("T1", "segmentation", "distance"), labels=(0, 2, 3))
IMAGE = jax.random.uniform(jax.random.key(1), (1, 16, 6, 7, 1))


def shapes_of(config, size=None):
    size = size or (2 ** (config.levels - 1),) * 3
    return jax.eval_shape(brain_unet(config, size).init, jax.random.key(0))


def drawn(config, size=None):
    return map_named(lambda name, leaf: draw(name, leaf.shape), shapes_of(config, size))


@functools.lru_cache
def compiled(**changes):
    return jax.jit(make_model(BrainUnet(dataclasses.replace(CONFIG, **changes))).apply, static_argnames="feature")


@pytest.fixture(scope="module")
def params():
    return drawn(CONFIG)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_published_sizes():
    """From the shapes alone: no arrays are made."""
    shapes = shapes_of(BRAINFM)
    assert count(shapes["backbone"]) == 264_063_138 and len(jax.tree.leaves(shapes["backbone"])) == 66
    assert count(shapes["heads"]) == 4_420
    assert count(shapes_of(dataclasses.replace(BRAINFM, levels=5))["backbone"]) == 65_869_986
    left = shapes_of(HEMISPHERE)["heads"]
    assert "CT" not in left and left["segmentation"]["kernel"].shape == (64, 18)
    assert left["distance"]["kernel"].shape == (64, 2)


def test_labels_of_the_released_classes_pair_left_and_right():
    assert len(LABELS) == 56 and len(LEFT) == len(RIGHT) == 18
    assert sorted(LABELS) == [label for label in range(57) if label != 45]


def test_enlargement_takes_the_voxel_of_the_floor_rule():
    x = jax.random.normal(jax.random.key(0), (1, 4, 3, 5, 2))
    for space in ((8, 6, 10), (9, 7, 11), (8, 7, 10)):
        places = [[math.floor(i * m / n) for i in range(n)] for m, n in zip(x.shape[1:4], space, strict=True)]
        np.testing.assert_array_equal(enlarge(x, space), np.asarray(x)[0][np.ix_(*places)][None])
    with pytest.raises(ValueError, match="space: expected 6 or 7 voxels along axis 2, got 8"):
        enlarge(x, (8, 8, 10))


def test_pooling_drops_planes_that_fill_no_cube():
    x = np.random.default_rng(0).normal(size=(1, 5, 4, 7, 2)).astype(np.float32)
    expected = x[:, :4, :, :6].reshape(1, 2, 2, 2, 2, 3, 2, 2).max((2, 4, 6))
    np.testing.assert_array_equal(largest_of_cubes(jnp.asarray(x), 2), expected)


def test_heads_are_linear_maps_of_a_feature_of_length_one(params):
    found = compiled()(params, IMAGE, feature=True)
    feature = found.pop("feature")
    np.testing.assert_allclose(jnp.linalg.norm(feature, axis=-1), 1, atol=1e-5)
    for task, value in found.items():
        head = params["heads"][task]
        np.testing.assert_allclose(value, feature @ head["kernel"] + head["bias"], atol=1e-5)
        assert value.dtype == jnp.float32
    assert {task: value.shape[-1] for task, value in found.items()} == {"T1": 1, "segmentation": 3, "distance": 4}


def test_processing_bounds_what_has_bounds():
    maps = {
        name: 9.0 * jax.random.normal(jax.random.key(2), (1, 2, 2, 2, 4)) for name in ("distance", "pathology", "T1")
    }
    found = process(CONFIG, maps | {"segmentation": maps["T1"], "age": jnp.array([-3.0])})
    assert float(jnp.abs(found["distance"]).max()) == 3.0 and float(found["age"][0]) == 3.0
    np.testing.assert_allclose(found["segmentation"].sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(found["pathology"], 1 / (1 + np.exp(-maps["pathology"])), atol=1e-6)
    np.testing.assert_array_equal(found["T1"], maps["T1"])


def test_uncertainty_age_and_further_layers():
    changes = {
        "tasks": ("T1", "segmentation", "registration", "age"), "uncertainty": "laplace", "head_widths": (6,),
        "age_size": (16, 16, 16),
    }  # fmt: skip
    config = dataclasses.replace(CONFIG, **changes)
    shapes = shapes_of(config, (16, 16, 16))
    assert shapes["heads"]["T1"]["conv_0"]["kernel"].shape == (3, 3, 3, 8, 6)
    assert shapes["heads"]["registration"]["kernel"].shape == (6, 6)
    assert shapes["heads"]["age"]["linear_0"]["kernel"].shape == (4, 160)
    model = make_model(BrainUnet(config))
    found = jax.eval_shape(model.apply, shapes, jnp.zeros((2, 16, 16, 16, 1)))
    assert {name: value.shape[4:] for name, value in found.items()} == {
        "T1": (1,), "T1_log_scale": (1,), "segmentation": (3,), "registration": (3,), "registration_log_scale": (3,),
        "age": (),
    }  # fmt: skip
    with pytest.raises(InputError, match=r"model.age_size: expected \(8, 8, 8\)"):
        brain_unet(config, (8, 8, 8))


def test_recomputed_levels_agree_in_gradient(params):
    def gradient(**changes):
        model = make_model(BrainUnet(dataclasses.replace(CONFIG, **changes)))
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.apply(p, IMAGE)["T1"]))))(params)

    for one, two in zip(jax.tree.leaves(gradient(remat=True)), jax.tree.leaves(gradient()), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-4 * max(1.0, float(jnp.abs(two).max())))


def test_an_empty_volume_has_finite_maps_and_gradients(params):
    def total(p):
        return sum(jnp.sum(value) for value in compiled()(p, jnp.zeros_like(IMAGE)).values())

    for leaf in jax.tree.leaves(jax.grad(total)(params)):
        assert np.isfinite(leaf).all()


def test_bfloat16_is_close_and_the_result_float32(params):
    found, expected = compiled(dtype="bfloat16")(params, IMAGE)["T1"], compiled()(params, IMAGE)["T1"]
    assert found.dtype == jnp.float32
    assert float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected - expected.mean())) < 0.1


def test_a_volume_split_over_devices_has_the_maps_of_one(params):
    mesh = make_mesh(MeshConfig(data=1, model=2))
    split = jax.device_put(IMAGE, NamedSharding(mesh, VOLUME_SHARDING))
    assert split.addressable_shards[0].data.shape == (1, 8, 6, 7, 1)
    found, expected = compiled()(params, split), compiled()(params, IMAGE)
    for task, value in expected.items():
        np.testing.assert_allclose(found[task], value, atol=1e-5)


@pytest.mark.parametrize(("planes", "widest"), [(32, 32 // 4), (26, 26 // 2)])
def test_the_compiler_exchanges_the_borders_of_a_volume_split_over_devices(params, monkeypatch, planes, widest):
    """As on accelerators, by XLA's own convolution: neighbours send planes, and no device sees the whole volume.

    Of a volume that the devices do not divide the finest level is split, and each device computes all of the coarser.
    """
    monkeypatch.setattr(convolution, "_partitioned_call", lambda: None)
    image = jax.random.uniform(jax.random.key(4), (1, planes, 8, 9, 1))
    mesh = make_mesh(MeshConfig(data=1, model=4))
    split, whole = NamedSharding(mesh, VOLUME_SHARDING), NamedSharding(mesh, PartitionSpec())
    apply = make_model(BrainUnet(CONFIG)).apply
    expected = jax.jit(apply)(params, image)
    run = jax.jit(
        lambda params, x: apply(params, jax.lax.with_sharding_constraint(x, split)), in_shardings=whole,
        out_shardings=whole,
    )  # fmt: skip
    program = run.lower(params, image).compile()
    text = program.as_text()
    assert "collective-permute" in text
    found = [int(length) for length in re.findall(r"= f32\[1,(\d+),\d+,\d+,\d+\]\S* convolution\(", text)]
    assert found and max(found) <= widest
    for task, value in program(params, image).items():
        np.testing.assert_allclose(value, expected[task], atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ()}, "tasks: expected one or more, each once, found none"),
        ({"tasks": ("T1", "T1")}, "tasks: expected one or more, each once, found T1 T1"),
        ({"width": 20}, "groups: expected a divisor of all of"),
        ({"labels": (0, 0)}, "labels: expected two or more, each once"),
        ({"tasks": ("age",), "age_size": (8, 16, 16)}, "age_size: expected 16 voxels or more"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        BrainUnetConfig(**settings)


def test_sizes_are_checked(params):
    with pytest.raises(InputError, match="size: expected at least 32 voxels along each axis, which 6 levels need"):
        brain_unet(BRAINFM, (160, 31, 160))
    with pytest.raises(ValueError, match="x: expected at least 2 voxels along each axis"):
        make_model(BrainUnet(CONFIG)).apply(params, jnp.zeros((1, 4, 1, 4, 1)))
