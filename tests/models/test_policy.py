"""Networks of self-play: sizes, starts, grids of any length, what each sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.policy import (
    GaussianMlp,
    GaussianMlpConfig,
    PatchMlp,
    PatchMlpConfig,
    TopkUnet,
    TopkUnetConfig,
)
from jaxmed.nn.model import make_model

pytestmark = pytest.mark.core


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_gaussian_policy_is_two_networks_of_orthogonal_layers(key):
    model = make_model(GaussianMlp(GaussianMlpConfig(), (4, 4)))
    observation = jax.random.normal(key, (5, 4, 4, 2))
    params = model.init(key, observation)
    # Two of 32-64-64, one to 16 means and 16 deviations, one to the value.
    assert count(params) == 2 * (32 * 64 + 64 + 64 * 64 + 64) + 64 * 16 + 16 + 16 + 65
    (mean, log_std), value = model.apply(params, observation)
    assert mean.shape == (5, 4, 4) and value.shape == (5,) and np.all(log_std == 0)
    for name, gain in (("policy_1", 2.0), ("value_1", 2.0), ("mean", 1e-4), ("value", 1.0)):
        kernel = np.asarray(params[name]["kernel"], np.float64)
        np.testing.assert_allclose(kernel.T @ kernel, gain * np.eye(kernel.shape[1]), atol=1e-5)
        assert np.all(params[name]["bias"] == 0)
    layers = {name: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[name]) for name in params}
    x = {"policy": observation.reshape(5, -1), "value": observation.reshape(5, -1)}
    for side in x:
        for number in range(2):
            layer = layers[f"{side}_{number}"]
            x[side] = np.tanh(x[side] @ layer["kernel"] + layer["bias"])
    np.testing.assert_allclose(mean.reshape(5, -1), x["policy"] @ layers["mean"]["kernel"], atol=1e-6)
    np.testing.assert_allclose(value, (x["value"] @ layers["value"]["kernel"])[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "grid"), [((7, 10), (7, 10)), ((12, 8), (3, 4)), ((3, 4, 2), (3, 4, 2))], ids=["odd", "blocks", "volume"]
)
def test_unet_gives_a_logit_for_each_super_pixel(shape, grid, key):
    model = make_model(TopkUnet(TopkUnetConfig((4, 6), 5), grid))
    observation = jax.random.normal(key, (3, *shape, 2))
    shapes = jax.eval_shape(model.init, key, observation)
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * noise.standard_normal(leaf.shape).astype("f"), shapes)
    # Features are not negative: no hidden unit of the value is dead.
    params["value_hidden"]["kernel"] = np.abs(params["value_hidden"]["kernel"])
    params["value_hidden"]["bias"] = np.abs(params["value_hidden"]["bias"])
    run = jax.jit(model.apply)
    logits, value = run(params, observation)
    assert logits.shape == (3, *grid) and value.shape == (3,)
    assert np.all(np.std(logits.reshape(3, -1), axis=1) > 0)
    changed = observation.at[0].add(1.0)
    other, other_value = run(params, changed)
    # One game does not see another.
    np.testing.assert_allclose(other[1:], logits[1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other_value[1:], value[1:], rtol=1e-4)
    assert np.any(other[0] != logits[0]) and other_value[0] != value[0]


def test_a_voxel_is_seen_by_its_own_super_pixel(key):
    """One level and no pooling: a logit sees its super-pixel and its neighbours, no further."""
    model = make_model(TopkUnet(TopkUnetConfig((4,), 5), (6, 3)))
    observation = jax.random.normal(key, (1, 12, 9, 2))
    params, run = jax.jit(model.init)(key, observation), jax.jit(model.apply)
    before, _ = run(params, observation)
    # It begins with nearly no preference.
    assert np.abs(before).max() < 0.5
    after, _ = run(params, observation.at[0, 1, 0, 1].add(3.0))
    # Two convolutions of 3: two super-pixels away at most.
    moved = np.asarray(before != after)[0]
    assert moved[0, 0] and not moved[3:].any()


def test_default_unet_has_its_published_widths(key):
    shapes = jax.eval_shape(make_model(TopkUnet(TopkUnetConfig(), (32, 32))).init, key, jnp.zeros((1, 32, 32, 2)))
    convolutions = 9 * (2 * 32 + 32 * 64 + 64 * 128 + 128 * 128 + 64 * 64 + 32 * 32) + 32 + 64 + 128 + 128 + 64 + 32
    dense = 256 * 64 + 64 + 64 + 1 + 128 * 64 + 64 + 64 * 32 + 32 + 32 + 1
    assert count(shapes) == convolutions + dense


def test_patch_policy_has_two_heads(key):
    model = make_model(PatchMlp(PatchMlpConfig((6, 5))))
    features = jax.random.normal(key, (4, 9, 3))
    params = model.init(key, features)
    patch, stop = model.apply(params, features)
    assert patch.shape == (4, 9) and stop.shape == (4, 2)
    assert count(params) == 27 * 6 + 6 + 6 * 5 + 5 + 5 * 9 + 9 + 5 * 2 + 2


def test_impossible_widths_are_refused():
    for config, field in ((GaussianMlpConfig, "hidden"), (TopkUnetConfig, "widths"), (PatchMlpConfig, "hidden")):
        with pytest.raises(ValueError, match=f"{field}.*: expected"):
            config((0,))
