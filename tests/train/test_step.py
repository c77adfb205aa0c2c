"""One step: accumulation, averages, precision, frozen parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jaxmed.train.mesh import MeshConfig, make_mesh, shard_batch
from jaxmed.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from jaxmed.train.state import MANY, create_state, draw_options
from jaxmed.train.step import make_train_step

pytestmark = pytest.mark.core
CONFIG = OptimizerConfig(peak_lr=1e-2, warmup_steps=2)


def train(steps=3, mesh=MeshConfig(data=1), loss=toy.loss, config=CONFIG, ema=False, **options):
    mesh = make_mesh(mesh)
    optimizer = make_optimizer(config, 10)
    state = create_state(jax.random.key(0), toy.init, optimizer, mesh, rules=toy.RULES, ema=ema)
    step = make_train_step(loss, optimizer, state=state, frozen=config.frozen, **options)
    history = [state]
    metrics = {}
    for _, batch in zip(range(steps), toy.batches()(0), strict=False):
        state, metrics = step(state, shard_batch(batch, mesh))
        history.append(state)
    return history, metrics


def assert_same(found, expected, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), found, expected)


def test_a_program_that_draws_few_parameters_is_not_optimised():
    mesh = make_mesh(MeshConfig(data=1))
    few, many = ({"w": jax.ShapeDtypeStruct((count,), jnp.float32)} for count in (MANY - 1, MANY))
    assert draw_options(many, mesh) is None
    assert draw_options(few, mesh) == {"xla_backend_optimization_level": 0}
    # And the option is one that the compiler knows.
    drawn = jax.jit(jax.random.normal, compiler_options=draw_options(few, mesh))(jax.random.key(0))
    assert float(drawn) == pytest.approx(float(jax.random.normal(jax.random.key(0))), abs=1e-6)


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_accumulation_equals_one_big_batch_noise_included(parts):
    whole, expected = train()
    cut, found = train(accumulation=parts)
    assert_same(cut[-1].params, whole[-1].params, 1e-6)
    for name in expected:
        if name != "root":  # a root of a mean is no mean: that metric is averaged over the parts
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)


def test_accumulation_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="accumulation: expected a batch that 3 divides, got 16"):
        train(1, accumulation=3)


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=4, model=2), MeshConfig(data=2, model=4)])
@pytest.mark.parametrize("parts", [1, 2])
def test_one_device_equals_many(mesh, parts):
    one, expected = train(accumulation=parts)
    many, found = train(mesh=mesh, accumulation=parts)
    assert_same(jax.device_get(many[-1].params), jax.device_get(one[-1].params), 1e-6)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
    # The state stays where it was born: kernels split, step copied.
    kernel = many[-1].params["encoder"]["kernel"]
    assert kernel.sharding == many[0].params["encoder"]["kernel"].sharding
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    moments = [leaf for leaf in jax.tree.leaves(many[-1].opt_state) if leaf.shape == kernel.shape]
    assert moments and all(leaf.sharding.spec == kernel.sharding.spec for leaf in moments)


def test_moving_average_by_hand():
    history, _ = train(ema=True, ema_decay=0.9)
    expected = np.asarray(history[0].params["encoder"]["kernel"], np.float64)
    for state in history[1:]:
        expected = 0.9 * expected + 0.1 * np.asarray(state.params["encoder"]["kernel"], np.float64)
    np.testing.assert_allclose(history[-1].ema_params["encoder"]["kernel"], expected, atol=1e-7)


def test_moving_average_with_a_schedule_and_its_checks():
    history, _ = train(2, ema=True, ema_decay=lambda step: jnp.where(step < 1, 0.0, 1.0))
    assert_same(history[2].ema_params, history[1].params, 0)
    with pytest.raises(ValueError, match="ema_decay"):
        train(1, ema=True)
    with pytest.raises(ValueError, match="ema_decay"):
        train(1, ema_decay=0.9)


def test_compute_in_bfloat16_over_float32_parameters():
    history, metrics = train(loss=partial(toy.loss, dtype=jnp.bfloat16))
    exact, _ = train()
    assert {leaf.dtype for leaf in jax.tree.leaves(history[-1].params)} == {jnp.dtype(jnp.float32)}
    assert metrics["loss"].dtype == jnp.float32
    assert_same(history[-1].params, exact[-1].params, 2e-2)
    difference = history[-1].params["encoder"]["kernel"] - exact[-1].params["encoder"]["kernel"]
    assert float(jnp.abs(difference).max()) > 1e-6  # it really computed in another precision


def test_rematerialised_loss_gives_the_same_step():
    plain, _ = train()
    remat, _ = train(loss=jax.checkpoint(toy.loss))
    assert_same(remat[-1].params, plain[-1].params, 1e-6)


def test_frozen_parts_stay_and_are_left_out_of_the_gradient_norm():
    config = OptimizerConfig(peak_lr=1e-2, frozen=("^encoder/",))
    history, metrics = train(config=config)
    assert_same(history[-1].params["encoder"], history[0].params["encoder"], 0)
    assert float(jnp.abs(history[-1].params["decoder"]["kernel"] - history[0].params["decoder"]["kernel"]).max()) > 0
    _, everything = train()
    assert 0 < float(metrics["grad_norm"]) < float(everything["grad_norm"])


def test_reported_learning_rate_is_the_one_used():
    _, metrics = train(2, schedule=learning_rate(CONFIG, 10))
    assert float(metrics["learning_rate"]) == pytest.approx(0.5e-2)


def test_each_step_and_each_example_has_its_own_key():
    seen = []

    def loss(params, keys, batch):
        jax.debug.callback(lambda data: seen.append(np.asarray(data)), jax.random.key_data(keys))
        return toy.loss(params, keys, batch)

    train(2, loss=loss)
    jax.effects_barrier()
    keys = np.concatenate(seen)
    assert len(np.unique(keys, axis=0)) == 2 * toy.BATCH


def test_a_loss_that_is_pulled_down():
    _, first = train(1)
    _, last = train(40)
    assert float(last["loss"]) < 0.7 * float(first["loss"])
