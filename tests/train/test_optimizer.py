"""Optimizers against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmed.arrays.trees import named_leaves
from jaxmed.train.optimizer import (
    LayerRules,
    OptimizerConfig,
    decay_mask,
    layer_scales,
    learning_rate,
    make_optimizer,
)

pytestmark = pytest.mark.core
LAYERS = LayerRules(2, embedding=("^patch_embed", "^class_token$"), block=r"^block_(\d+)/")
PARAMS = {
    "patch_embed": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "class_token": jnp.ones((1, 1, 2)),
    "block_0": {"kernel": jnp.ones((2, 2)), "norm": {"scale": jnp.ones(2)}},
    "block_1": {"kernel": jnp.ones((2, 2))},
    "norm": {"scale": jnp.ones(2)},
    "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
}


def update(config, params, gradients, steps=10, layers=None):
    """Return the parameters after one update for each gradient."""
    optimizer = make_optimizer(config, steps, layers)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_warm_up_then_half_a_cosine():
    rate = learning_rate(OptimizerConfig(peak_lr=1.0, end_lr=0.1, warmup_steps=4), 12)
    values = [float(rate(step)) for step in (0, 1, 2, 4, 6, 8, 12, 20)]
    quarter = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi / 4))
    np.testing.assert_allclose(values, [0, 0.25, 0.5, 1.0, quarter, 0.55, 0.1, 0.1], rtol=1e-6)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 1.0, 4, 12, 0.1)
    np.testing.assert_allclose([float(rate(s)) for s in range(13)], [float(theirs(s)) for s in range(13)], atol=1e-6)


def test_constant_rate_after_warm_up():
    rate = learning_rate(OptimizerConfig(peak_lr=0.5, warmup_steps=2, decay="constant"), 10)
    np.testing.assert_allclose([float(rate(step)) for step in (0, 1, 2, 9)], [0, 0.25, 0.5, 0.5])


def test_a_step_falls_at_its_share_of_the_run_after_warm_up():
    config = OptimizerConfig(peak_lr=0.5, end_lr=0.05, warmup_steps=2, decay="step", drop_at=0.4)
    values = [float(learning_rate(config, 10)(step)) for step in (0, 1, 2, 5, 6, 9)]
    np.testing.assert_allclose(values, [0, 0.25, 0.5, 0.5, 0.05, 0.05], rtol=1e-6)


def test_layer_decay_table():
    found = {name: float(scale) for name, scale in named_leaves(layer_scales(PARAMS, 0.5, LAYERS)).items()}
    assert found == {
        "patch_embed/kernel": 0.125,
        "patch_embed/bias": 0.125,
        "class_token": 0.125,
        "block_0/kernel": 0.25,
        "block_0/norm/scale": 0.25,
        "block_1/kernel": 0.5,
        "norm/scale": 1.0,
        "head/kernel": 1.0,
        "head/bias": 1.0,
    }


def test_stacked_blocks_have_one_factor_each():
    rules = LayerRules(3, ("^embed",), r"^block_(\d+)", stacked=("^blocks/",))
    found = layer_scales({"embed": jnp.ones(2), "blocks": {"kernel": jnp.ones((3, 2, 2))}}, 0.5, rules)
    np.testing.assert_allclose(found["blocks"]["kernel"].ravel(), [0.125, 0.25, 0.5])
    assert found["blocks"]["kernel"].shape == (3, 1, 1)
    assert found["embed"] == 0.5**4


def test_layer_decay_scales_the_whole_update():
    config = OptimizerConfig(kind="sgd", b1=0.0, peak_lr=1.0, decay="constant", weight_decay=0.1, layer_decay=0.5)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    found = update(config, PARAMS, [ones], layers=LAYERS)
    np.testing.assert_allclose(found["head"]["kernel"], 1 - 1.1, rtol=1e-6)
    np.testing.assert_allclose(found["head"]["bias"], 1 - 1.0)
    np.testing.assert_allclose(found["block_0"]["kernel"], 1 - 0.25 * 1.1, rtol=1e-6)
    np.testing.assert_allclose(found["patch_embed"]["kernel"], 1 - 0.125 * 1.1, rtol=1e-6)
    with pytest.raises(ValueError, match="layer_decay: expected a model with layer rules"):
        make_optimizer(config, 10)


def test_weight_decay_mask():
    mask = named_leaves(decay_mask(PARAMS, (r"^class_token$",)))
    assert {name for name, is_decayed in mask.items() if is_decayed} == {
        "patch_embed/kernel",
        "block_0/kernel",
        "block_1/kernel",
        "head/kernel",
    }
    stacked = {"blocks": {"kernel": jnp.ones((3, 2, 2)), "gain": jnp.ones((3, 2))}}
    assert decay_mask(stacked, (), ("^blocks/",)) == {"blocks": {"kernel": True, "gain": False}}


def test_adamw_by_hand():
    """Two steps of Loshchilov and Hutter's algorithm 2 with decoupled decay, in NumPy."""
    config = OptimizerConfig(peak_lr=0.1, decay="constant", weight_decay=0.2, b1=0.8, b2=0.9, eps=1e-3)
    weight, first, second = np.array([[1.0, -2.0]]), 0.0, 0.0
    gradients = [np.array([[0.5, 1.0]]), np.array([[-1.0, 0.25]])]
    for count, gradient in enumerate(gradients, 1):
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        direction = (first / (1 - 0.8**count)) / (np.sqrt(second / (1 - 0.9**count)) + 1e-3)
        weight = weight - 0.1 * (direction + 0.2 * weight)
    found = update(config, {"w": jnp.array([[1.0, -2.0]])}, [{"w": jnp.asarray(g, jnp.float32)} for g in gradients])
    np.testing.assert_allclose(found["w"], weight, rtol=1e-6)


def test_sgd_with_momentum_by_hand():
    config = OptimizerConfig(kind="sgd", peak_lr=0.1, decay="constant", weight_decay=0.0, b1=0.5)
    found = update(config, {"w": jnp.array([1.0])}, [{"w": jnp.array([1.0])}] * 2)
    np.testing.assert_allclose(found["w"], 1 - 0.1 * 1 - 0.1 * 1.5, rtol=1e-6)


def test_lars_by_hand():
    """You et al., with the rate outside the momentum as in MAE's linear probe; biases are not rescaled."""
    config = OptimizerConfig(kind="lars", peak_lr=2.0, decay="constant", weight_decay=0.5, b1=0.9)
    params = {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([1.0])}
    gradient = {"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.array([0.5])}
    weight, momentum = np.array([3.0, 4.0]), 0.0
    for _ in range(2):
        direction = np.array([1.0, 0.0]) + 0.5 * weight
        direction = direction * 0.001 * np.linalg.norm(weight) / np.linalg.norm(direction)
        momentum = 0.9 * momentum + direction
        weight = weight - 2.0 * momentum
    found = update(config, params, [gradient] * 2)
    np.testing.assert_allclose(found["kernel"][0], weight, rtol=1e-6)
    np.testing.assert_allclose(found["bias"], 1 - 2 * 0.5 - 2 * (0.9 * 0.5 + 0.5), rtol=1e-6)


def test_clipping_to_a_global_norm():
    config = OptimizerConfig(kind="sgd", b1=0.0, peak_lr=1.0, decay="constant", weight_decay=0.0, clip_norm=1.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    found = update(config, params, [{"a": jnp.array([3.0]), "b": jnp.array([4.0])}])
    np.testing.assert_allclose([found["a"][0], found["b"][0]], [-0.6, -0.8], rtol=1e-6)
    found = update(config, params, [{"a": jnp.array([0.3]), "b": jnp.array([0.4])}])
    np.testing.assert_allclose([found["a"][0], found["b"][0]], [-0.3, -0.4], rtol=1e-6)


def test_frozen_parameters_stay_and_do_not_count_in_the_norm():
    config = OptimizerConfig(kind="sgd", b1=0.0, peak_lr=1.0, decay="constant", weight_decay=0.0, clip_norm=1.0,
                             frozen=("^a$",))  # fmt: skip
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    found = update(config, params, [{"a": jnp.array([300.0]), "b": jnp.array([0.5])}])
    np.testing.assert_allclose([found["a"][0], found["b"][0]], [0.0, -0.5])
    adam = make_optimizer(OptimizerConfig(frozen=("^a$",)), 10).init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(adam) if leaf.ndim) == 2  # two moments of b alone


@pytest.mark.parametrize(
    "settings", [{"peak_lr": -1.0}, {"layer_decay": 0.0}, {"layer_decay": 1.5}, {"frozen": ("(",)}, {"clip_norm": -1.0}]
)
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        OptimizerConfig(**settings)
