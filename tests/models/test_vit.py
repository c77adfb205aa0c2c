"""The vision transformer: tokens, ways to run it that must agree, and its layout over devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.position import sincos
from jaxmed.models.vit import SHARDING_RULES, VIT_L16_3D, Vit, VitConfig
from jaxmed.nn.model import make_model
from jaxmed.train.mesh import MeshConfig, make_mesh, param_shardings, shard_batch

CONFIG = VitConfig((8, 8, 8), (4, 4, 4), width=16, depth=2, heads=2, hidden=24)
IMAGE = jax.random.normal(jax.random.key(1), (2, 8, 8, 8, 1))


@pytest.fixture(scope="module")
def params():
    """Parameters of every way to run the model: they share one layout."""
    fresh = jax.jit(make_model(Vit(CONFIG)).init)(jax.random.key(0), IMAGE)
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.05 * noise.standard_normal(leaf.shape).astype(np.float32), fresh)


@functools.lru_cache
def compiled(**changes):
    return jax.jit(make_model(Vit(dataclasses.replace(CONFIG, **changes))).apply)


def run(params, image=IMAGE, kept=None, key=None, **changes):
    return compiled(**changes)(params, image, kept, key=key)


def test_tokens_are_class_token_then_patches(params):
    tokens = run(params)
    assert tokens.shape == (2, 9, 16) and tokens.dtype == jnp.float32
    # The final norm's output has the norm's own mean and variance.
    plain = (tokens - params["norm"]["bias"]) / params["norm"]["scale"]
    np.testing.assert_allclose(plain.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(plain.var(-1), 1, atol=1e-2)


def test_positions_start_as_the_sine_cosine_table():
    init = make_model(Vit(CONFIG)).init
    position = jax.jit(lambda key: init(key, IMAGE)["position"])(jax.random.key(0))
    np.testing.assert_array_equal(position, sincos(16, (2, 2, 2)))


def test_embedding_visible_patches_equals_embedding_all_and_choosing(params):
    model = make_model(Vit(CONFIG))
    kept = jnp.array([[5, 0, 3], [7, 1, 2]])
    embed = jax.jit(lambda kept: model.apply(params, IMAGE, kept, method="embed"))
    whole, some = embed(None), embed(kept)
    assert some.shape == (2, 4, 16)
    np.testing.assert_array_equal(some[:, 0], whole[:, 0])
    for image in range(2):
        np.testing.assert_allclose(some[image, 1:], whole[image, 1:][kept[image]], atol=1e-6)


def test_embedding_is_a_convolution_with_stride_of_the_patch(params):
    model = make_model(Vit(CONFIG))
    kernel = params["patch_embed"]["kernel"].reshape(4, 4, 4, 1, 16)
    peer = jax.lax.conv_general_dilated(
        IMAGE, kernel, (4, 4, 4), "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    expected = peer.reshape(2, 8, 16) + params["patch_embed"]["bias"] + params["position"][1:]
    found = model.apply(params, IMAGE, method="embed")[:, 1:]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_hidden_patches_cannot_be_seen(params):
    kept = jnp.array([[5, 0, 3], [5, 0, 3]])
    changed = IMAGE.at[:, :4, :4, 4:].set(9.0)  # patch (0, 0, 1), number 1
    np.testing.assert_array_equal(run(params, kept=kept), run(params, changed, kept))
    assert float(jnp.abs(run(params) - run(params, changed)).max()) > 0.1


def test_ways_to_run_agree_in_value_and_gradient(params):
    def value_and_gradient(**changes):
        model = make_model(Vit(dataclasses.replace(CONFIG, **changes)))
        loss = lambda params: jnp.sum(jnp.square(model.apply(params, IMAGE)[:, 1:4] - 1))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    value, gradient = value_and_gradient()
    for changes in ({"scan": True}, {"remat": True}, {"scan": True, "remat": True}):
        other, found = value_and_gradient(**changes)
        np.testing.assert_allclose(other, value, rtol=1e-6)
        for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(one, two, rtol=0, atol=2e-5 * max(1.0, float(jnp.abs(two).max())))


def test_scanned_parameters_are_those_of_the_unrolled_model(params):
    model = make_model(Vit(dataclasses.replace(CONFIG, scan=True, remat=True)))
    scanned = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
    assert jax.tree.map(jnp.shape, scanned) == jax.tree.map(jnp.shape, params)


def test_stochastic_depth_needs_a_rate_and_a_key(params):
    def program(key, **changes):
        model = make_model(Vit(dataclasses.replace(CONFIG, **changes)))
        return str(jax.make_jaxpr(lambda params: model.apply(params, IMAGE, key=key))(params))

    plain, key = program(None), jax.random.key(2)
    assert program(None, drop_path_rate=0.5) == plain and program(key) == plain
    dropped = run(params, drop_path_rate=0.5, key=key)
    assert float(jnp.abs(dropped - run(params)).max()) > 0.01
    scanned = run(params, drop_path_rate=0.5, key=key, scan=True)
    np.testing.assert_allclose(scanned, dropped, atol=5e-6)


def test_stochastic_depth_may_be_as_likely_in_every_block(params):
    """At a rate of nearly 1 both blocks are skipped, and tokens stay as they were embedded."""
    rate, key = 1 - 1e-6, jax.random.key(2)
    settings = {"drop_path_rate": rate, "final_norm": False}
    embedded = make_model(Vit(CONFIG)).apply(params, IMAGE, method="embed")
    np.testing.assert_array_equal(run(params, key=key, drop_path_uniform=True, **settings), embedded)
    assert float(jnp.abs(run(params, key=key, **settings) - embedded).max()) > 0.01


def test_last_block_in_two_parts_is_the_last_block(params):
    model = make_model(Vit(CONFIG))

    @jax.jit
    def in_parts(params):
        return model.apply(params, *model.apply(params, IMAGE, method="before_last"), method="last")

    np.testing.assert_allclose(in_parts(params), run(params), atol=5e-6)


def test_a_batch_of_one_equals_the_element_of_a_batch(params):
    np.testing.assert_allclose(run(params, IMAGE[1:])[0], run(params)[1], atol=3e-6)


def test_bfloat16_is_finite_and_close(params):
    found, expected = run(params, dtype="bfloat16"), run(params)
    assert found.dtype == jnp.float32 and bool(jnp.isfinite(found).all())
    np.testing.assert_allclose(found, expected, atol=0.1)


def test_tensor_splits_give_the_numbers_of_one_device(params):
    mesh = make_mesh(MeshConfig(data=2, model=2))
    places = param_shardings(params, mesh, SHARDING_RULES, smallest_split=2**30)
    split = jax.device_put(params, places)
    kernel = split["blocks"]["layer_0"]["attention"]["qkv"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16, 3, 1, 8)
    image = shard_batch({"image": np.asarray(IMAGE)}, mesh)["image"]
    np.testing.assert_allclose(run(split, image), run(params), atol=5e-6)


def test_two_dimensions():
    config = VitConfig((8, 12), (4, 4), channels=3, width=16, depth=1, heads=2, hidden=24)
    image = jax.random.normal(jax.random.key(0), (1, 8, 12, 3))
    model = make_model(Vit(config))
    fresh = jax.eval_shape(model.init, jax.random.key(0), image)
    assert fresh["position"].shape == (7, 16) and fresh["patch_embed"]["kernel"].shape == (48, 16)
    assert jax.eval_shape(model.apply, fresh, image).shape == (1, 7, 16)
    with pytest.raises(ValueError, match=r"image: expected \(8, 12, 3\), got \(12, 8, 3\)"):
        jax.eval_shape(model.apply, fresh, image.swapaxes(1, 2))


def test_tangerine_has_its_published_size():
    image = jax.ShapeDtypeStruct((1, 256, 256, 256, 1), jnp.float32)
    shapes = jax.eval_shape(make_model(Vit(VIT_L16_3D)).init, jax.random.key(0), image)
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in shapes.items()}
    assert sizes.pop("position") == 4_195_328
    assert sum(sizes.values()) == 306_507_776


@pytest.mark.core
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": (8,), "patch_size": (4,)}, "image_size"),
        ({"image_size": (256, 256, 250)}, "patch_size"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"depth": 0}, "depth"),
        ({"heads": 5}, "heads"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        VitConfig(**settings)
