"""PPO: advantages against a loop, losses against PyTorch, updates that do nothing where nothing is to be learnt."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from games import cartpole_observe, cartpole_reset, cartpole_step

from jaxmed.models.mlp import Mlp, MlpConfig
from jaxmed.nn.model import make_model
from jaxmed.rl import ppo
from jaxmed.rl.distributions import make_gaussian, make_plackett_luce
from jaxmed.rl.ppo import SB3, Batch, PpoConfig

pytestmark = pytest.mark.core
REFERENCE = Path(__file__).parents[1] / "references" / "ppo_losses.json"
SETTINGS = {"sb3": SB3, "default": PpoConfig(), "raw": PpoConfig(normalise=False, value_loss="plain", clip=0.1)}


def test_advantages_are_the_papers_sum():
    with jax.enable_x64(True):
        noise = np.random.default_rng(0)
        steps, games, gamma, decay = 12, 3, 0.97, 0.9
        rewards, values, final = noise.normal(size=(3, steps, games))
        done, last = noise.random((steps, games)) < 0.2, noise.normal(size=games)
        following = ppo.next_values(*map(jnp.asarray, (values, last, final, done)))
        found = ppo.advantages(jnp.asarray(rewards), jnp.asarray(values), following, jnp.asarray(done), gamma, decay)
        for game in range(games):
            for start in range(steps):
                # The sum over what follows, up to the end of the game.
                total, weight = 0.0, 1.0
                for t in range(start, steps):
                    after = final[t, game] if done[t, game] else last[game] if t == steps - 1 else values[t + 1, game]
                    total += weight * (rewards[t, game] + gamma * after - values[t, game])
                    weight *= gamma * decay
                    if done[t, game]:
                        break
                np.testing.assert_allclose(found[start, game], total, atol=1e-12)


def draw_batch():
    """A batch on which ratios, values and advantages lie on both sides of their clips."""
    noise = np.random.default_rng(7)
    outputs = {
        "mean": noise.normal(size=(16, 3)),
        "log_std": 0.2 * noise.normal(size=(1, 3)),
        "value_new": noise.normal(size=16),
    }
    action = outputs["mean"] + noise.normal(size=(16, 3))
    log_prob = -0.5 * (action - outputs["mean"]) ** 2 - 0.5 * np.log(2 * np.pi)
    rest = {
        "action": action,
        "log_prob": log_prob.sum(axis=1) + 0.2 * noise.normal(size=16),
        "value": outputs["value_new"] + 0.3 * noise.normal(size=16),
        "advantage": noise.normal(size=16) + 0.5,
        "target": noise.normal(size=16),
    }
    return outputs, rest


def our_losses(config):
    outputs, rest = draw_batch()

    def apply(params, observation):
        del observation
        return (params["mean"], jnp.broadcast_to(params["log_std"], (16, 3))), params["value_new"]

    params = jax.tree.map(jnp.asarray, outputs)
    batch = Batch(jnp.zeros((16, 1)), **{name: jnp.asarray(leaf) for name, leaf in rest.items()})
    function = jax.jit(jax.value_and_grad(partial(ppo.loss, apply, make_gaussian(), config), has_aux=True))
    (total, parts), gradients = function(params, batch)
    return {"loss": total, **{name: parts[name] for name in ("policy_loss", "value_loss", "entropy")}}, gradients


def torch_losses(config):
    import torch
    from torch_ppo import torch_losses

    outputs, rest = draw_batch()
    leaves = {name: torch.tensor(leaf, requires_grad=True) for name, leaf in outputs.items()}
    batch = leaves | {name: torch.tensor(leaf) for name, leaf in rest.items()}
    is_plain = config.value_loss == "plain"
    total, parts = torch_losses(
        batch, config.clip, config.value_weight, config.entropy_weight, is_plain, config.normalise
    )
    total.backward()
    values = {"loss": total, **parts}
    return (
        {name: float(value.detach()) for name, value in values.items()},
        {name: leaf.grad.numpy().tolist() for name, leaf in leaves.items()},
    )


def check_losses(config, values, gradients):
    with jax.enable_x64(True):
        found, own = our_losses(config)
        for name, value in values.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-10, err_msg=name)
        for name, value in gradients.items():
            np.testing.assert_allclose(own[name], value, rtol=1e-8, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_the_stored_ones_of_pytorch(name):
    """Made by tests/references/make_ppo_losses.py."""
    check_losses(SETTINGS[name], *json.loads(REFERENCE.read_text())[name])


@pytest.mark.peers
@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_pytorchs(name):
    check_losses(SETTINGS[name], *torch_losses(SETTINGS[name]))


def learner():
    network = make_model(Mlp(MlpConfig(depth=1, width=8), 4))

    def apply(params, observation):
        out = network.apply(params, observation)
        return out[:, :3], out[:, 3]

    return network, apply, make_plackett_luce(1)


def test_policy_stays_where_nothing_is_gained(key):
    """Advantages of zero and no weight on entropy: probabilities are what they were, the value learns."""
    network, apply, family = learner()
    observation = jax.random.normal(key, (24, 5))
    params = network.init(key, observation)
    config = PpoConfig(entropy_weight=0.0, value_weight=0.0, epochs=2, minibatches=3)
    logits, value = apply(params, observation)
    action = family.sample(key, logits)
    batch = Batch(observation, action, family.log_prob(logits, action), value, jnp.zeros(24), value + 1.0)
    run = jax.jit(partial(ppo.update, apply, family, config))
    after, _, metrics = run(key, params, ppo.make_optimizer(config).init(params), batch)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert metrics["gradient_norm"] == 0 and metrics["clipped"] == 0 and abs(metrics["kl"]) < 1e-6


def test_an_update_is_its_minibatches_one_after_another(key):
    """Against a Python loop with the same orders; and the rate falls to nothing."""
    network, apply, family = learner()
    observation = jax.random.normal(key, (12, 5))
    params = network.init(key, observation)
    config = PpoConfig(epochs=2, minibatches=2, decay_iterations=1, learning_rate=0.01)
    logits, value = apply(params, observation)
    action = family.sample(key, logits)
    advantage = jax.random.normal(jax.random.key(3), (12,))
    batch = Batch(observation, action, family.log_prob(logits, action), value, advantage, value + advantage)
    optimizer = ppo.make_optimizer(config)
    after, opt_state, _ = jax.jit(partial(ppo.update, apply, family, config))(
        key, params, optimizer.init(params), batch
    )
    expected, state = params, optimizer.init(params)
    step = jax.jit(jax.grad(lambda params, batch: ppo.loss(apply, family, config, params, batch)[0]))
    for epoch_key in jax.random.split(key, 2):
        order = np.asarray(jax.random.permutation(epoch_key, 12))
        for chosen in order.reshape(2, 6):
            gradients = step(expected, jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], batch))
            updates, state = optimizer.update(gradients, state, expected)
            expected = jax.tree.map(jnp.add, expected, updates)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    updates, _ = optimizer.update(params, opt_state, params)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(updates))


def train_cartpole(key, iterations, games=16, steps=128):
    """PPO on pieces of CartPole; mean steps of finished episodes by iteration, and a function that plays."""
    policy = make_model(Mlp(MlpConfig(depth=2, width=64), 2))
    critic = make_model(Mlp(MlpConfig(depth=2, width=64), 1))
    family = make_plackett_luce(1)
    # Returns are up to a hundred: a value that may move by .2 an iteration would never get there.
    config = PpoConfig(learning_rate=1e-3, decay_iterations=iterations, entropy_weight=0.0, value_loss="plain")

    def apply(params, observation):
        return policy.apply(params["policy"], observation), critic.apply(params["value"], observation)[:, 0]

    init_key, reset_key, run_key = jax.random.split(key, 3)
    blank = jnp.zeros((1, 4))
    params = {"policy": policy.init(init_key, blank), "value": critic.init(jax.random.fold_in(init_key, 1), blank)}

    def advance(carry, key):
        params, state = carry
        act_key, new_key = jax.random.split(key)
        observation = cartpole_observe(state)
        logits, value = apply(params, observation)
        action = family.sample(act_key, logits)
        after, fell, cut = cartpole_step(state, action[:, 0])
        done = fell | cut
        final = jnp.where(fell, 0.0, apply(params, cartpole_observe(after))[1])
        fresh = cartpole_reset(new_key, games)
        new = jax.tree.map(lambda a, b: jnp.where(done, a, b), fresh, after)
        record = (observation, action, family.log_prob(logits, action), value, final, done, after.steps)
        return (params, new), record

    @jax.jit
    def iterate(params, opt_state, state, key):
        play_key, learn_key = jax.random.split(key)
        (_, state), records = jax.lax.scan(advance, (params, state), jax.random.split(play_key, steps))
        observation, action, log_prob, value, final, done, lived = records
        following = ppo.next_values(value, apply(params, cartpole_observe(state))[1], final, done)
        advantage = ppo.advantages(jnp.ones_like(value), value, following, done, config.discount, config.trace_decay)
        batch = Batch(observation, action, log_prob, value, advantage, advantage + value)
        batch = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
        params, opt_state, _ = ppo.update(apply, family, config, learn_key, params, opt_state, batch)
        return params, opt_state, state, (lived * done).sum() / jnp.maximum(done.sum(), 1)

    opt_state, state, curve = ppo.make_optimizer(config).init(params), cartpole_reset(reset_key, games), []
    for number in range(iterations):
        params, opt_state, state, length = iterate(params, opt_state, state, jax.random.fold_in(run_key, number))
        curve.append(float(length))
    return curve, partial(play_cartpole, apply, params)


def play_cartpole(apply, params, key, games=100):
    """Steps that the likeliest actions stay upright, from fresh starts, at most 500."""

    def advance(carry, _):
        state, is_up = carry
        after, fell, _ = cartpole_step(state, jnp.argmax(apply(params, cartpole_observe(state))[0], axis=1))
        return (after, is_up & ~fell), is_up

    start = (cartpole_reset(key, games), jnp.ones(games, bool))
    return jax.jit(lambda start: jax.lax.scan(advance, start, None, length=500)[1].sum(axis=0))(start)


def test_cartpole_gets_better_in_seconds():
    """A random policy stays upright for about 22 steps."""
    curve, play = train_cartpole(jax.random.key(0), 12)
    assert curve[0] < 35
    assert np.mean(play(jax.random.key(1))) > 200


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_cartpole_is_solved(seed, capsys):
    curve, play = train_cartpole(jax.random.key(seed), 100)
    lengths = np.asarray(play(jax.random.key(100 + seed)))
    with capsys.disabled():
        print(
            f"\nCartPole, seed {seed}: {len(curve) * 2048} steps of training, mean of 100 episodes {lengths.mean():.1f}"
        )
    assert lengths.mean() >= 475


def test_impossible_settings_are_refused():
    for field, value in (("learning_rate", 0.0), ("discount", 1.5), ("epochs", 0), ("entropy_weight", -1.0)):
        with pytest.raises(ValueError, match=f"{field}: expected"):
            PpoConfig(**{field: value})
    batch = Batch(jnp.zeros((5, 1)), jnp.zeros((5, 1), jnp.int32), *(jnp.zeros(5),) * 4)
    with pytest.raises(ValueError, match="minibatches: expected a divisor of 5 samples"):
        ppo.update(lambda *_: None, make_plackett_luce(1), PpoConfig(), jax.random.key(0), {}, (), batch)
