"""The latent U-Net and its ControlNet: sizes, start, what is embedded once; MONAI's numbers come with its weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.unet_latent import (
    COCOLIT_CONTROL_NET,
    COCOLIT_UNET,
    ControlNetConfig,
    LatentUnetConfig,
    control_net,
    latent_unet,
)

pytestmark = pytest.mark.core

CONFIG = LatentUnetConfig(
    dimensions=2, channels=2, outputs=2, widths=(4, 8), blocks=(1, 1), attention_levels=(False, True), head_channels=4,
    groups=2,
)  # fmt: skip
CONTROL = ControlNetConfig(CONFIG, 1, (4,))
UNET, NET = latent_unet(CONFIG), control_net(CONTROL)
Z = jax.random.normal(jax.random.key(1), (3, 4, 6, 2))
CONDITION = jax.random.normal(jax.random.key(2), (3, 4, 6, 1))
TIME = jnp.array([0.0, 17.0, 980.0])


def randomised(params):
    """Return parameters of which none is at its start value."""
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + np.float32(0.3) * generator.standard_normal(leaf.shape, np.float32), params)


@pytest.fixture(scope="module")
def fresh():
    init = jax.jit(lambda key: (UNET.init(key, Z, TIME), NET.init(key, Z, TIME, CONDITION)))
    return init(jax.random.key(0))


@pytest.fixture(scope="module")
def params(fresh):
    return randomised(fresh)


@pytest.fixture(scope="module")
def run():
    """Return the prediction, with what the ControlNet adds and without."""

    @jax.jit
    def run(params, z, t, condition):
        residuals = NET.apply(params[1], z, t, condition)
        return UNET.apply(params[0], z, t), UNET.apply(params[0], z, t, residuals), residuals

    return run


def test_published_sizes():
    """From the shapes alone; the released files hold 11 and 5 linear maps of 65,792 numbers that nothing applies."""
    z, t = jax.ShapeDtypeStruct((2, 32, 40, 32, 4), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    unet, net = latent_unet(COCOLIT_UNET), control_net(COCOLIT_CONTROL_NET)
    shapes = jax.eval_shape(unet.init, jax.random.key(0), z, t)
    control = jax.eval_shape(net.init, jax.random.key(0), z, t, z)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 101_241_604 - 11 * 65_792
    assert sum(leaf.size for leaf in jax.tree.leaves(control)) == 43_143_424 - 5 * 65_792
    residuals = jax.eval_shape(net.apply, control, z, t, z)
    assert len(residuals[0]) == 9 and residuals[1].shape == (2, 8, 10, 8, 256)
    assert jax.eval_shape(unet.apply, shapes, z, t, residuals).shape == z.shape


def test_the_control_net_starts_from_the_unet(fresh):
    unet, control = fresh
    assert jax.tree.map(jnp.shape, unet["encoder"]) == jax.tree.map(jnp.shape, control["encoder"])


def test_fresh_networks_predict_nothing_and_add_nothing(fresh, run):
    plain, controlled, residuals = run(fresh, Z, TIME, CONDITION)
    assert all(not bool(leaf.any()) for leaf in jax.tree.leaves((plain, controlled, residuals)))


def test_fresh_control_changes_no_trained_unet(fresh, params, run):
    """Whatever the condition is."""
    plain, controlled, _ = run((params[0], fresh[1]), Z, TIME, CONDITION)
    assert float(jnp.abs(plain).max()) > 0.1
    np.testing.assert_array_equal(controlled, plain)
    np.testing.assert_array_equal(run((params[0], fresh[1]), Z, TIME, 5 * CONDITION)[1], plain)


def test_condition_and_time_matter_and_samples_do_not_see_one_another(params, run):
    plain, controlled, _ = run(params, Z, TIME, CONDITION)
    assert float(jnp.abs(plain - controlled).max()) > 0.1
    for inputs in ((Z, TIME, CONDITION.at[1].add(1.0)), (Z, TIME.at[1].set(500.0), CONDITION)):
        other = run(params, *inputs)[1]
        assert float(jnp.abs(other - controlled)[1].max()) > 1e-2
        np.testing.assert_allclose(other[::2], controlled[::2], atol=1e-4)


def test_time_and_one_condition_are_embedded_once(params, run):
    unet, control = params
    one = jnp.broadcast_to(CONDITION[:1], CONDITION.shape)
    _, expected, _ = run(params, Z, jnp.full(3, 17.0), one)

    @jax.jit
    def hoisted(z):
        embedded = NET.embed_condition(control, CONDITION[:1])
        residuals = NET.control(control, z, NET.embed(control, TIME[1:2]), embedded)
        return UNET.denoise(unet, z, UNET.embed(unet, TIME[1:2]), residuals)

    np.testing.assert_allclose(hoisted(Z), expected, atol=1e-4)


def test_recomputed_levels_give_the_same_gradient(params):
    def gradient(remat):
        unet = latent_unet(
            dataclasses.replace(CONFIG, widths=(4,), blocks=(1,), attention_levels=(False,), remat=remat)
        )
        shapes = jax.eval_shape(unet.init, jax.random.key(0), Z, TIME)
        filled = randomised(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes))
        return jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(unet.apply(p, Z, TIME)))))(filled)

    plain, again = gradient(False), gradient(True)
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4 * max(1.0, float(jnp.abs(two).max())))


def test_attention_in_blocks_gives_the_same(params, run):
    blocks = latent_unet(dataclasses.replace(CONFIG, attention="blocks"))
    expected = run(params, Z, TIME, CONDITION)[0]
    np.testing.assert_allclose(jax.jit(blocks.apply)(params[0], Z, TIME), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": ()}, "blocks: expected one for each of 0 widths"),
        ({"attention_levels": (True,)}, r"attention_levels: expected one for each of 3 widths, found \(True,\)"),
        ({"groups": 7}, "groups: expected a divisor of all of"),
        ({"head_channels": 96}, r"head_channels: expected a divisor of \[256\], found 96"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        LatentUnetConfig(**settings)


def test_inputs_are_checked(params):
    for z, message in ((jnp.zeros((1, 4, 5, 2)), "multiples of 2"), (jnp.zeros((1, 4, 4, 3)), "and 2 channels")):
        with pytest.raises(ValueError, match=message):
            UNET.apply(params[0], z, TIME[:1])
    with pytest.raises(ValueError, match="condition: expected 2 axes of space and 1 channels"):
        NET.embed_condition(params[1], Z)
    with pytest.raises(ValueError, match="condition_widths"):
        ControlNetConfig(condition_widths=())


def test_bfloat16_is_close_and_the_result_float32(params, run):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    unet, net = latent_unet(config), control_net(dataclasses.replace(CONTROL, unet=config))

    @jax.jit
    def half(unet_params, control):
        return unet.apply(unet_params, Z, TIME, net.apply(control, Z, TIME, CONDITION))

    found, expected = half(*params), run(params, Z, TIME, CONDITION)[1]
    assert found.dtype == jnp.float32
    assert float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)) < 0.05
