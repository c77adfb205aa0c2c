"""The guided-diffusion U-Net: sizes, start, ways to run it that must agree, layout over devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.unet_guided import (
    ADM_256,
    CI_PRIOR,
    DYNAMICDPS_PRIOR,
    ENHANCER,
    SHARDING_RULES,
    GuidedUnet,
    GuidedUnetConfig,
)
from jaxmed.nn import convolution
from jaxmed.nn.model import make_model
from jaxmed.nn.unet_blocks import AttentionBlock, ResidualBlock
from jaxmed.train.mesh import MeshConfig, make_mesh, param_shardings, shard_batch

pytestmark = pytest.mark.core

CONFIG = GuidedUnetConfig(width=8, multipliers=(1, 2), blocks=1, attention_factors=(2,), heads=2, groups=4)
IMAGE = jax.random.normal(jax.random.key(1), (3, 8, 4, 1))
TIME = jnp.array([0.0, 17.0, 900.0])


@functools.lru_cache
def compiled(**changes):
    return jax.jit(make_model(GuidedUnet(dataclasses.replace(CONFIG, **changes))).apply)


def shapes_of(config, edge=None):
    x = jax.ShapeDtypeStruct((1, *(edge or config.divisor,) * config.dimensions, config.channels), jnp.float32)
    inputs = (x, jax.ShapeDtypeStruct((1,), jnp.float32)) if config.with_time else (x,)
    return jax.eval_shape(make_model(GuidedUnet(config)).init, jax.random.key(0), *inputs)


def draw(config):
    """Return parameters of which none is at its start value."""
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.4 * generator.standard_normal(leaf.shape)).astype(np.float32), shapes_of(config)
    )


@pytest.fixture(scope="module")
def params():
    return draw(CONFIG)


@pytest.mark.parametrize(
    ("config", "edge", "count"),
    [(DYNAMICDPS_PRIOR, 256, 124_048_641), (ADM_256, 256, 552_814_086), (CI_PRIOR, 64, 1_191_233)],
)
def test_published_sizes(config, edge, count):
    """From the shapes alone: no arrays are made."""
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes_of(config, edge))) == count


def test_an_enhancer_has_no_time():
    assert "time" not in shapes_of(ENHANCER) and "embed" not in shapes_of(ENHANCER)["down_0"]["block_0"]
    config = dataclasses.replace(CONFIG, with_time=False)
    model, params = make_model(GuidedUnet(config)), draw(config)
    assert jax.eval_shape(model.apply, params, IMAGE).shape == IMAGE.shape
    with pytest.raises(ValueError, match="t: expected none, as with_time says"):
        model.apply(params, IMAGE, TIME)


def test_fresh_branches_add_nothing():
    h, time, block = jnp.tile(IMAGE, 8), jnp.ones((3, 32)), CONFIG.level(0, False).block
    for module, inputs in ((ResidualBlock(block, 8), (h, time)), (AttentionBlock(block, 2), (h,))):
        model = make_model(module)
        fresh = jax.jit(model.init)(jax.random.key(0), *inputs)
        np.testing.assert_array_equal(model.apply(fresh, *inputs), h)
        for part in ("conv1", "embed", "qkv"):
            assert part not in fresh or bool(fresh[part]["kernel"].any()), part


def test_volumes_of_one_repeated_plane_see_only_the_edges_differ():
    """3D against 2D with the same taps in the middle plane of every kernel: planes do not mix, so both agree."""
    flat = dataclasses.replace(CONFIG, multipliers=(1,), attention_factors=(), groups=1)
    deep = dataclasses.replace(flat, dimensions=3)
    params = draw(flat)
    params["middle"]["attention_0"] = jax.tree.map(np.zeros_like, params["middle"]["attention_0"])

    def thicken(leaf, wanted):
        if leaf.ndim == wanted.ndim:
            return leaf
        if wanted.shape[2] == 1:
            return leaf[:, :, None]
        return np.stack([np.zeros_like(leaf), leaf, np.zeros_like(leaf)], axis=2)

    thick = jax.tree.map(thicken, params, shapes_of(deep))
    volume = jnp.repeat(IMAGE[:, :, :, None], 3, axis=3)
    found = jax.jit(make_model(GuidedUnet(deep)).apply)(thick, volume, TIME)
    expected = jax.jit(make_model(GuidedUnet(flat)).apply)(params, IMAGE, TIME)
    for plane in range(3):
        np.testing.assert_allclose(found[:, :, :, plane], expected, rtol=1e-4, atol=1e-4)


def test_time_matters_and_samples_do_not_see_one_another(params):
    whole = compiled()(params, IMAGE, TIME)
    assert whole.dtype == jnp.float32 and whole.shape == IMAGE.shape
    later = compiled()(params, IMAGE, TIME.at[1].set(500.0))
    assert float(jnp.abs(later - whole)[1].max()) > 1e-2
    np.testing.assert_allclose(later[::2], whole[::2], atol=1e-5)
    one = compiled()(params, IMAGE[1:2], TIME[1:2])
    np.testing.assert_allclose(one[0], whole[1], rtol=1e-4, atol=1e-4)


def test_recomputed_levels_agree_in_value_and_gradient():
    config = dataclasses.replace(CONFIG, multipliers=(1,), attention_factors=())

    def value_and_gradient(**changes):
        model = make_model(GuidedUnet(dataclasses.replace(config, **changes)))
        loss = lambda params, x: jnp.mean(jnp.square(model.apply(params, x, TIME)))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(draw(config), IMAGE)

    (value, gradient), (other, found) = value_and_gradient(), value_and_gradient(remat=True)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-4 * max(1.0, float(jnp.abs(two).max())))


def test_gradients_are_those_of_plain_convolutions(params, monkeypatch):
    """On a CPU convolutions have roads of their own; elsewhere they are XLA's, with its gradients."""
    elsewhere = {gives: functools.partial(convolution._xla, gives=gives) for gives in convolution.ON_CPU}

    def gradient():
        apply = make_model(GuidedUnet(CONFIG)).apply
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(apply(params, x, TIME)))))(IMAGE)

    own = gradient()
    monkeypatch.setattr(convolution, "ON_CPU", elsewhere)
    plain = gradient()
    assert float(jnp.abs(plain).max()) > 0.1
    np.testing.assert_allclose(own, plain, rtol=0, atol=1e-4 * float(jnp.abs(plain).max()))


def test_dropout_needs_a_rate_and_a_key(params):
    plain, key = compiled()(params, IMAGE, TIME), jax.random.key(3)
    np.testing.assert_allclose(compiled()(params, IMAGE, TIME, key=key), plain, atol=1e-6)
    np.testing.assert_allclose(compiled(dropout=0.5)(params, IMAGE, TIME), plain, atol=1e-6)
    assert float(jnp.abs(compiled(dropout=0.5)(params, IMAGE, TIME, key=key) - plain).max()) > 0.05


def test_bfloat16_is_close_and_the_result_float32(params):
    small = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    found, expected = compiled(dtype="bfloat16")(small, IMAGE, TIME), compiled()(small, IMAGE, TIME)
    assert found.dtype == jnp.float32 and float(jnp.std(expected)) > 0.1
    assert float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)) < 0.05


def test_split_heads_and_channels_give_the_numbers_of_one_device(params):
    mesh = make_mesh(MeshConfig(data=1, model=2))
    split = jax.device_put(params, param_shardings(params, mesh, SHARDING_RULES, smallest_split=2**30))
    kernel = split["middle"]["attention_0"]["qkv"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16, 1, 3, 8)
    batch = shard_batch({"x": np.asarray(IMAGE), "t": np.asarray(TIME)}, mesh)
    expected = compiled()(params, IMAGE, TIME)
    np.testing.assert_allclose(compiled()(split, batch["x"], batch["t"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"multipliers": ()}, "multipliers"),
        ({"attention_factors": (3,)}, r"attention_factors: expected some of \(1, 2, 4, 8, 16, 32\), found \(3,\)"),
        ({"width": 100}, "groups: expected a divisor of 100 channels, found 32"),
        ({"heads": 5}, "heads: expected a divisor of 512 channels, found 5"),
        ({"head_channels": 48}, "head_channels: expected a divisor of 512"),
        ({"dropout": 1.0}, "dropout"),
        ({"blocks": 0}, "blocks: expected a whole number from 1 to 65,536, found 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        GuidedUnetConfig(**settings)


def test_inputs_are_checked(params):
    apply = make_model(GuidedUnet(CONFIG)).apply
    for x, t, message in [
        (IMAGE[:, :7], TIME, "multiples of 2 along each axis"),
        (IMAGE[..., 0], TIME, "2 axes of space and 1 channels"),
        (IMAGE, None, "t: expected a time"),
    ]:
        with pytest.raises(ValueError, match=message):
            apply(params, x, t)
