"""Thinking: budgets, the best that was seen, controls, constant verifiers, rounds, debates."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxmed.errors import InputError
from jaxmed.models.mask_generator import GeneratorConfig
from jaxmed.models.mask_verifier import VerifierConfig
from jaxmed.models.policy import GaussianMlpConfig, TopkUnetConfig
from jaxmed.rl.pixel_game import PixelGame
from jaxmed.rl.search import SearchConfig
from jaxmed.rl.selfplay import SelfPlayConfig
from jaxmed.systems import selfplay
from jaxmed.systems.selfplay import system_one
from jaxmed.systems.selfplay.stages import think as stages_think
from jaxmed.systems.selfplay.stages import train_policy as stages_train_policy
from jaxmed.systems.selfplay.system_one import AdaptConfig, SystemOne, SystemOneConfig, generate
from jaxmed.systems.selfplay.thinking import PAPER, Budget, ThinkConfig, debate, think
from jaxmed.systems.selfplay.verifier import judge_masks, make_judge

SYSTEM = SystemOneConfig(GeneratorConfig("plain", widths=(4,)), VerifierConfig("plain", widths=(4,), dense=(8,)))
PLAY = SelfPlayConfig(game=PixelGame(rule="elitist", at_most_k=True, flips=2), games=4, steps=4)
CONFIG = ThinkConfig(play=PLAY, policy=TopkUnetConfig(widths=(4,), value_width=4), adapt=AdaptConfig(steps=1))
SIZE = PLAY.games * PLAY.steps


@pytest.fixture(scope="module")
def system():
    params = system_one.init_params(jax.random.key(0), SYSTEM, (8, 8))
    params = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    return SystemOne(SYSTEM, params)


@pytest.fixture(scope="module")
def images():
    return np.asarray(jax.random.uniform(jax.random.key(4), (2, 8, 8)), np.float32)


@pytest.fixture(scope="module")
def thought(system, images):
    return think(jax.random.key(1), system, images, Budget(4 * SIZE, patience=0), CONFIG)


def test_the_python_call_is_this(system, images):
    assert selfplay.think is think


def test_the_answer_is_the_best_that_was_seen(system, images, thought):
    values = thought.trace.values
    assert (np.diff(values, axis=0) >= 0).all() and (values[-1] > values[0]).all()
    assert thought.trace.steps.tolist() == [0, SIZE, 2 * SIZE, 3 * SIZE, 4 * SIZE] and thought.stop == "budget"
    np.testing.assert_array_equal(thought.masks, thought.trace.masks[-1])
    again = np.asarray(judge_masks(system, jnp.asarray(images), jnp.asarray(thought.masks, jnp.float32)), float)
    # System I's evidence against what was changed, per voxel of its own mask, beside the verifier's logit.
    first, size = thought.first, np.maximum(thought.first.sum((1, 2)), 1)
    evidence = ((1.0 * thought.masks - first) * scipy.special.logit(thought.probability.astype(float))).sum((1, 2))
    expected = scipy.special.expit(scipy.special.logit(again) + CONFIG.prior_weight * evidence / size)
    np.testing.assert_allclose(thought.values, expected, atol=1e-5)
    assert (evidence < 0).all() and CONFIG.prior_weight > 0
    assert thought.agreement.min() >= 0 and thought.agreement.max() <= 1


def test_where_system_one_finds_nothing_its_doubt_is_measured_by_what_it_expects(system, images):
    # Divided by one voxel, evidence against a lesion that System I misses would silence every verifier.
    blind = system._replace(config=dataclasses.replace(system.config, threshold=0.999))
    probability = np.asarray(generate(blind.config, blind.params, jnp.asarray(images)), float)
    expected = probability.sum((1, 2))
    assert (probability < 0.999).all() and (expected > 2).all()
    judge = make_judge(blind, jnp.asarray(images), 2.0)
    evidence = scipy.special.logit(np.clip(probability, 1e-6, None)) - scipy.special.logit(0.999)
    np.testing.assert_allclose(judge.evidence, 2 * evidence / expected[:, None, None], rtol=1e-3)
    np.testing.assert_array_equal(judge.first, 0.0)


def test_thinking_begins_at_the_level_that_the_verifier_likes_best(system, images):
    levels = (0.3, 0.4, 0.6, 0.7)
    config = dataclasses.replace(CONFIG, levels=levels)
    found = think(jax.random.key(1), system, images, Budget(2 * SIZE, patience=0), config)
    probability = np.asarray(generate(system.config, system.params, jnp.asarray(images)))
    thresholds = np.array([system.config.threshold, *levels])
    candidates = probability > thresholds[:, None, None, None]
    scores = np.stack([judge_masks(system, jnp.asarray(images), jnp.asarray(masks * 1.0)) for masks in candidates])
    best = scores.argmax(0)
    assert (best > 0).any()
    np.testing.assert_array_equal(found.start, candidates[best, np.arange(len(images))])
    np.testing.assert_allclose(found.level, thresholds[best], rtol=1e-6)
    np.testing.assert_array_equal(found.first, candidates[0])
    # System I, the choice (an evaluation of each candidate), the game; evidence is against the chosen mask.
    used = len(levels) * len(images)
    assert found.trace.steps.tolist() == [0, used, used + SIZE, used + 2 * SIZE]
    np.testing.assert_allclose(found.trace.values[1], scores.max(0), atol=1e-6)
    assert (np.diff(found.trace.values, axis=0) >= 0).all()
    alone = think(jax.random.key(1), system, images, Budget(used, patience=0), config)
    np.testing.assert_array_equal(alone.masks, found.start)
    assert alone.trace.steps.tolist() == [0, used] and alone.stop == "budget"
    unmoved = think(jax.random.key(1), system, images, 0, config)
    np.testing.assert_array_equal(unmoved.masks, found.first)


@pytest.mark.parametrize("levels", [(0.0, 0.5), (0.5, 1.0)])
def test_levels_are_probabilities(levels):
    with pytest.raises(ValueError, match="levels: expected probabilities between 0 and 1"):
        ThinkConfig(levels=levels)


def test_without_a_prior_the_verifier_alone_is_followed(system, images):
    found = think(jax.random.key(1), system, images, Budget(SIZE), dataclasses.replace(CONFIG, prior_weight=0.0))
    again = judge_masks(system, jnp.asarray(images), jnp.asarray(found.masks, jnp.float32))
    np.testing.assert_allclose(found.values, again, atol=1e-5)


def test_the_same_key_thinks_the_same(system, images, thought):
    again = think(jax.random.key(1), system, images, Budget(4 * SIZE, patience=0), CONFIG)
    np.testing.assert_array_equal(again.trace.masks, thought.trace.masks)
    other = think(jax.random.key(2), system, images, Budget(4 * SIZE, patience=0), CONFIG)
    assert (other.trace.values != thought.trace.values).any()


def test_without_a_budget_system_one_answers(system, images):
    found = think(jax.random.key(1), system, images[0], 0, CONFIG)
    expected = np.asarray(system_one.generate(SYSTEM, system.params, jnp.asarray(images[:1]))) > 0.5
    np.testing.assert_array_equal(found.masks, expected)
    assert found.stop == "budget" and len(found.trace.steps) == 1 and found.masks.shape == (1, 8, 8)


def test_thinking_stops_when_nothing_gets_better(system, images):
    budget = Budget(100 * SIZE, patience=2, tolerance=1.0)
    found = think(jax.random.key(1), system, images, budget, CONFIG)
    assert found.stop == "plateau" and found.trace.steps[-1] == 2 * SIZE


def test_thinking_stops_in_time(system, images):
    found = think(jax.random.key(1), system, images, Budget(100 * SIZE, seconds=1e-9), CONFIG)
    assert found.stop == "time" and found.trace.steps[-1] == SIZE


def test_a_constant_verifier_is_not_thought_with(system, images):
    known = system.params["verifier"]["head"]
    for head in (jax.tree.map(jnp.zeros_like, known), jax.tree.map(lambda leaf: 1e-9 * leaf, known)):
        params = system.params | {"verifier": system.params["verifier"] | {"head": head}}
        for levels in ((), (0.3, 0.7)):
            config = dataclasses.replace(CONFIG, levels=levels)
            found = think(jax.random.key(1), system._replace(params=params), images, 10 * SIZE, config)
            assert found.stop == "constant verifier" and found.trace.steps[-1] == 0
            np.testing.assert_array_equal(found.masks, found.first)


def test_random_proposals_learn_nothing_but_get_somewhere(system, images):
    config = dataclasses.replace(CONFIG, mode="propose")
    found = think(jax.random.key(1), system, images, Budget(4 * SIZE, patience=0), config)
    assert found.policy is None and (found.values >= found.trace.values[0]).all()
    assert (found.values > found.trace.values[0]).any()


def test_the_gradient_gets_somewhere(system, images):
    config = dataclasses.replace(CONFIG, mode="grad")
    found = think(jax.random.key(1), system, images, Budget(4 * 2 * PLAY.steps, patience=0), config)
    assert found.policy is None and (found.values > found.trace.values[0]).all()
    assert (np.diff(found.trace.values, axis=0) >= 0).all()


def test_rounds_adapt_system_one_and_go_on(system, images):
    support = (images[:1], np.asarray(images[:1] > 0.5))
    config = dataclasses.replace(CONFIG, rounds=2)
    found = think(jax.random.key(1), system, images, Budget(2 * SIZE, patience=0), config, support=support)
    assert found.trace.steps.tolist() == [0, SIZE, 2 * SIZE]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), found.system.params, system.params)
    assert any(jax.tree.leaves(changed))
    first = np.asarray(system_one.generate(SYSTEM, system.params, jnp.asarray(images))) > 0.5
    np.testing.assert_array_equal(found.first, first)


def test_a_debate_follows_the_rules(system, images, thought):
    game = debate(
        jax.random.key(0), system, CONFIG, thought.policy, jnp.asarray(images[0]), jnp.asarray(thought.first[0]), 6
    )
    assert len(game.masks) == 7
    for step, is_won in enumerate(game.is_won):
        flips = game.flips[step] if is_won else game.rival_flips[step]
        best = max(game.values[step], game.rival_values[step])
        assert is_won == (game.values[step] >= game.rival_values[step])
        after = game.masks[step] ^ flips if best >= game.scores[step] else game.masks[step]
        np.testing.assert_array_equal(game.masks[step + 1], after)
        assert flips.sum() <= 2


@pytest.mark.parametrize("name", ["steps", "seconds", "patience", "tolerance"])
def test_negative_budgets_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected a .*number from 0"):
        Budget(**{name: -1})


def test_the_paper_preset_is_the_released_players_and_learning():
    # stable-baselines3's defaults but for n_steps and ent_coef; 32 rounds of 8,192 steps, then the rival is renewed.
    config = stages_think.paper()
    play = config.think.play
    assert (play.games, play.steps, play.symmetric, play.scale_rewards) == (1, 4096, False, False)
    ppo = play.ppo
    assert (ppo.learning_rate, ppo.epochs, play.steps // ppo.minibatches, ppo.discount) == (3e-4, 10, 64, 0.99)
    assert (ppo.trace_decay, ppo.clip, ppo.value_weight, ppo.max_norm, ppo.entropy_weight) == (
        0.95,
        0.2,
        0.5,
        0.5,
        0.01,
    )
    assert ppo.value_loss == "plain" and ppo.decay_iterations == 0 and ppo.normalise
    assert config.think.policy == GaussianMlpConfig(hidden=(64, 64), log_std=0.0)
    assert play.opponents.num_live(play.games) == 0 and play.opponents.every * play.steps == 8192
    assert config.budget == Budget(steps=32 * 8192, patience=0)
    assert play.game.num_flips((32, 32)) == 11 and play.game.horizon == 1024 and not play.game.at_most_k
    assert config.think.prior_weight == 0 and config.think.levels == () and config.think.rounds == 1
    assert stages_train_policy.paper().think == config.think


@pytest.mark.parametrize("rule", ["fair", "repo"])
def test_the_released_players_think(system, images, rule):
    play = dataclasses.replace(PAPER.play, steps=64, game=PixelGame(rule=rule))
    config = dataclasses.replace(PAPER, play=play)
    found = think(jax.random.key(1), system, images, Budget(256, patience=0), config)
    assert found.trace.steps.tolist() == [0, 128, 256] and (np.diff(found.trace.values, axis=0) >= 0).all()
    assert found.policy is not None and "mean" in found.policy


def test_searching_a_tree_gets_somewhere_and_counts_its_simulations(system, images):
    config = dataclasses.replace(CONFIG, mode="mcts", search=SearchConfig(simulations=4))
    found = think(jax.random.key(1), system, images, Budget(2 * 4 * SIZE, patience=0), config)
    assert found.trace.steps.tolist() == [0, 4 * SIZE, 8 * SIZE]
    assert (np.diff(found.trace.values, axis=0) >= 0).all() and (found.values > found.trace.values[0]).all()
    assert found.policy is None and 0 <= found.agreement.min() <= found.agreement.max() <= 1


def test_without_mctx_the_search_is_refused_by_name(system, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "mctx", None)
    with pytest.raises(InputError, match="think.mode: expected the package mctx for tree search, found none installed"):
        think(jax.random.key(1), system, images, Budget(SIZE), dataclasses.replace(CONFIG, mode="mcts"))
