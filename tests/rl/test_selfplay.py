"""System II: runs that repeat, resume and are cut; what it learns where the answer is known."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from games import dice, linear

from jaxmed.models.policy import GaussianMlpConfig, TopkUnetConfig
from jaxmed.rl import pixel_game, ppo, selfplay, tournament
from jaxmed.rl.opponents import OpponentConfig, exploitability
from jaxmed.rl.pixel_game import PixelGame
from jaxmed.rl.policies import make_policy
from jaxmed.rl.ppo import PpoConfig
from jaxmed.rl.selfplay import SelfPlayConfig, init, iterate, make_problem

pytestmark = pytest.mark.core
SMALL = SelfPlayConfig(
    game=PixelGame(flips=2, horizon=4),
    ppo=PpoConfig(epochs=1, minibatches=2),
    opponents=OpponentConfig(pool=3, every=2, groups=2),
    games=8,
    steps=6,
)
MLP = GaussianMlpConfig(hidden=(8,))


def digits(edge=4, images=2):
    noise = np.random.default_rng(0)
    truth = np.zeros((images, edge, edge), np.float32)
    for number in range(images):
        truth[number, number : number + edge // 2, 1 : 1 + edge // 2] = 1
    mask = jnp.asarray(noise.random((images, edge, edge)) < 0.5)
    picture = jnp.asarray(truth + 0.1 * noise.normal(size=truth.shape).astype("f"))
    return make_problem(dice, jnp.asarray(truth), picture, mask)


@pytest.fixture(scope="module")
def small():
    """A tiny run of the Gaussian policy on two images: (problem, start, compiled iteration, three states, metrics)."""
    problem, policy = digits(), make_policy(MLP, SMALL.game, (4, 4))
    start = init(jax.random.key(0), SMALL, policy, problem)
    advance = jax.jit(partial(iterate, SMALL, policy, dice))
    states, metrics = [start], []
    for _ in range(3):
        state, found = advance(problem, states[-1])
        states.append(state)
        metrics.append(found)
    return problem, policy, advance, states, metrics


def equal(a, b):
    plain = [tree._replace(key=jax.random.key_data(tree.key)) for tree in (a, b)]
    for x, y in zip(*map(jax.tree.leaves, plain), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_same_key_gives_the_same_run_and_one_can_go_on_from_anywhere(small):
    problem, policy, advance, states, _ = small
    again = init(jax.random.key(0), SMALL, policy, problem)
    equal(again, states[0])
    for expected in states[1:]:
        again, _ = advance(problem, again)
        equal(again, expected)
    other, _ = advance(problem, init(jax.random.key(1), SMALL, policy, problem))
    assert np.any(other.game.mask != states[1].game.mask)


def test_all_is_finite_and_the_best_never_falls(small):
    problem, _, _, states, metrics = small
    for found in metrics:
        assert all(np.isfinite(value) for value in found.values())
        assert all(value.dtype == jnp.float32 and value.shape == () for value in found.values())
    values = np.stack([state.best.value for state in states])
    assert np.all(np.diff(values, axis=0) >= 0) and np.all(values[-1] > problem.cases.values)
    np.testing.assert_allclose(
        dice(problem.verifier, jnp.arange(2), states[-1].best.mask.astype(float)), values[-1], atol=1e-6
    )


def test_games_are_cut_drawn_anew_and_snapshots_taken(small):
    _, _, _, states, _ = small
    # Eighteen steps of games of five: three in the fourth.
    assert np.all(states[-1].game.steps == 3)
    assert [int(state.pool.count) for state in states] == [1, 1, 2, 2]
    for leaf, stack in zip(jax.tree.leaves(states[2].params), jax.tree.leaves(states[2].pool.params), strict=True):
        np.testing.assert_array_equal(stack[1], leaf)
    assert not np.array_equal(states[-1].game.image, states[0].game.image)


def test_other_images_need_no_other_program(small):
    problem, _, advance, states, _ = small
    other = problem._replace(
        verifier=jnp.flip(problem.verifier), cases=problem.cases._replace(masks=~problem.cases.masks)
    )
    before = advance._cache_size()
    advance(other, states[0])
    assert advance._cache_size() == before


@pytest.fixture(scope="module")
def rollout(small):
    """Six steps from the first iteration's end, what the network says to each, and to what each led."""
    problem, policy, _, states, _ = small

    @jax.jit
    def run(state):
        game, best, records = selfplay._rollout(SMALL, policy, dice, problem, state, jax.random.key(5))
        seen = jax.vmap(lambda seen: pixel_game.observe(problem.cases.images, seen))(records.state)
        parameters, value = jax.vmap(lambda seen: policy.apply(state.params, seen))(seen)
        log_prob = jax.vmap(policy.distribution.log_prob)(parameters, records.action)
        live = jax.tree.map(lambda leaf: leaf[:, :4], records)
        mark = jax.vmap(partial(pixel_game.mark_flips, SMALL.game, (4, 4)))
        own, theirs = (live.state.mask ^ mark(action) for action in (live.action, live.rival_action))
        kept = jnp.where(live.is_won[..., None, None], own, theirs)
        last = jax.vmap(lambda seen: policy.apply(state.params, pixel_game.observe(problem.cases.images, seen))[1])(
            live.state._replace(mask=kept)
        )
        reward = [
            jax.vmap(partial(dice, problem.verifier))(live.state.image, mask.astype(float)) for mask in (own, theirs)
        ]
        return game, best, records, value, log_prob, reward[0] - reward[1], kept, last

    return run(states[1])


def test_a_rollout_is_the_games_own_rules(small, rollout):
    """Rewards, masks, log-probabilities and values of every recorded step, worked out again from masks and actions."""
    game, best, records, value, log_prob, reward, kept, last = rollout
    np.testing.assert_allclose(records.value, value, atol=1e-5)
    np.testing.assert_allclose(records.log_prob, log_prob, rtol=1e-4)
    # Games 0 to 3 are against itself.
    assert records.rival_log_prob.shape == (6, 4)
    np.testing.assert_allclose(records.reward[:, :4], reward, atol=1e-6)
    np.testing.assert_array_equal(records.is_done, records.state.steps == 4)
    done = np.asarray(records.is_done[:, :4])
    after = np.concatenate([records.state.mask[1:, :4], game.mask[None, :4]])
    steps = np.concatenate([records.state.steps[1:, :4], game.steps[None, :4]])
    np.testing.assert_array_equal(after[~done], np.asarray(kept)[~done])
    # A game that is cut is valued by where it was, and begins anew.
    assert done.sum() == 4 and np.all(steps[done] == 0)
    np.testing.assert_allclose(records.final[:, :4][done], last[done], atol=1e-5)
    assert np.all(last[done] != 0)
    assert np.all(best.value >= small[3][1].best.value)


def test_the_rivals_samples_are_the_players_mirrored(rollout):
    records = rollout[2]._replace(is_done=jnp.zeros((6, 8), bool))
    last, scale = jnp.zeros(8), jnp.ones(())
    batch = selfplay._make_batch(SMALL, records, last, scale)
    mirrored = selfplay._make_batch(SMALL, records._replace(reward=-records.reward), last, scale)
    own, rival = slice(0, 48), slice(48, 72)
    live = np.arange(48).reshape(6, 8)[:, :4].reshape(-1)
    assert len(batch.log_prob) == 6 * 8 + 6 * 4
    np.testing.assert_allclose(batch.advantage[rival], mirrored.advantage[own][live], atol=1e-6)
    np.testing.assert_array_equal(batch.log_prob[rival], records.rival_log_prob.reshape(-1))
    np.testing.assert_array_equal(batch.observation.mask[rival], batch.observation.mask[own][live])
    alone = selfplay._make_batch(dataclasses.replace(SMALL, symmetric=False), records, last, scale)
    assert len(alone.log_prob) == 48


def test_all_games_can_be_against_itself(key):
    config = dataclasses.replace(SMALL, opponents=OpponentConfig(schedule="live"))
    problem, policy = digits(), make_policy(MLP, config.game, (4, 4))
    start = init(key, config, policy, problem)
    run = lambda state: selfplay._rollout(config, policy, dice, problem, state, key)[2]  # noqa: E731
    records = jax.eval_shape(run, start)
    assert records.rival_log_prob.shape == (6, 8) and records.rival_action.shape == (6, 8, 4, 4)


def test_unets_play_in_volumes_on_super_pixels(key):
    config = dataclasses.replace(
        SMALL,
        game=PixelGame(flips=2, at_most_k=True, super_pixel=2),
        opponents=OpponentConfig(live=0.0, groups=1, schedule="latest"),
    )
    policy = make_policy(TopkUnetConfig((2,), 2), config.game, (4, 4, 2))
    truth = jnp.zeros((1, 4, 4, 2)).at[:, :2].set(1)
    problem = make_problem(dice, truth, truth, truth < 0)
    start = init(key, config, policy, problem)
    run = jax.jit(partial(selfplay._rollout, config, policy, dice))
    _, best, records = run(problem, start, key)
    assert records.rival_log_prob.shape == (6, 0) and np.all(np.isfinite(records.log_prob))
    assert best.value[0] > 0.5
    blocks = np.asarray(best.mask).reshape(2, 2, 2, 2, 1, 2).transpose(0, 2, 4, 1, 3, 5).reshape(4, 8)
    assert np.all(blocks.any(axis=1) == blocks.all(axis=1))


def bandit(iterations, seed, games=64):
    """One pixel of 4 x 4 flips, and each is worth a known number: pixel 5 the most, by a fifth."""
    weights = np.random.default_rng(1).permutation(16).reshape(1, 4, 4) / 16
    weights[weights == 15 / 16] = 1.1
    config = SelfPlayConfig(
        game=PixelGame(flips=1, horizon=1), ppo=PpoConfig(learning_rate=1e-2, entropy_weight=0.0, discount=0.0),
        opponents=OpponentConfig(schedule="live"), games=games, steps=8,
    )  # fmt: skip
    policy = make_policy(TopkUnetConfig((16,), 8), config.game, (4, 4))
    problem = make_problem(
        linear, jnp.asarray(weights, jnp.float32), jnp.asarray(weights, jnp.float32), jnp.zeros((1, 4, 4), bool)
    )
    state = init(jax.random.key(seed), config, policy, problem)
    advance = jax.jit(partial(iterate, config, policy, linear))
    for _ in range(iterations):
        state, _ = advance(problem, state)
    start = pixel_game.reset(problem.cases, jnp.zeros(1, jnp.int32))
    logits, _ = policy.apply(state.params, pixel_game.observe(problem.cases.images, start))
    mass = np.asarray(jax.nn.softmax(logits[0]), np.float64)
    # Against mixed pixels the best response flips the best pixel; equals earn equally, so the game's value is 0.
    gain = weights.max() - mass @ weights.reshape(-1)
    return mass[weights.argmax()], gain


def test_the_bandits_best_pixel_gains_mass_in_seconds():
    mass, gain = bandit(25, 0)
    assert mass > 0.3 and gain < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_bandit_is_solved(seed, capsys):
    mass, gain = bandit(200, seed)
    with capsys.disabled():
        print(f"\nbandit, seed {seed}: mass on the best pixel {mass:.4f}, exploitability {gain:.4f}")
    assert mass > 0.95 and gain < 0.02


def think(mode, seed, iterations, edge, widths, rate, opponents):
    """Best Dice of four images after each iteration, on squares of a bit less than half the edge."""
    truth = np.zeros((4, edge, edge), np.float32)
    noise = np.random.default_rng(seed)
    for number in range(4):
        x, y = noise.integers(1, edge // 2 + 1, 2)
        truth[number, x : x + 3 * edge // 8, y : y + 3 * edge // 8] = 1
    pictures = jnp.asarray(truth + 0.3 * noise.normal(size=truth.shape).astype("f"))
    config = SelfPlayConfig(
        game=PixelGame(at_most_k=True), ppo=PpoConfig(learning_rate=rate), games=32, steps=32, mode=mode,
        opponents=opponents,
    )  # fmt: skip
    policy = make_policy(TopkUnetConfig(widths, 16), config.game, (edge, edge))
    problem = make_problem(dice, jnp.asarray(truth), pictures, jnp.asarray(noise.random(truth.shape) < 0.3))
    state = init(jax.random.key(seed), config, policy, problem)
    advance, curve = jax.jit(partial(iterate, config, policy, dice)), [problem.cases.values]
    for _ in range(iterations):
        state, _ = advance(problem, state)
        curve.append(state.best.value)
    return np.stack(curve)


def test_learning_beats_random_proposals_in_seconds():
    live = OpponentConfig(schedule="live")
    learnt, random = (think(mode, 0, 8, 8, (8,), 5e-3, live) for mode in ("learn", "propose"))
    assert np.all(np.diff(learnt, axis=0) >= 0) and np.all(np.diff(random, axis=0) >= 0)
    assert learnt[-1].mean() > random[-1].mean() + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_learning_beats_random_proposals(seed, capsys):
    pool = OpponentConfig(groups=2, every=4)
    learnt, random = (think(mode, seed, 30, 16, (8, 16), 1e-3, pool) for mode in ("learn", "propose"))
    with capsys.disabled():
        for name, curve in (("PPO", learnt), ("random proposals", random)):
            points = ", ".join(f"{1024 * number}: {curve[number].mean():.3f}" for number in (0, 1, 4, 16, 30))
            print(f"\n16 x 16, oracle Dice, seed {seed}, {name}, mean best Dice by steps: {points}", end="")
    assert np.all(np.diff(learnt, axis=0) >= 0)
    assert np.all(learnt[-1] > random[-1])


def test_tournaments_tell_who_is_better(key):
    """A policy that wants the truth, one that wants nothing, one that wants the contrary."""
    problem, game = digits(images=1), PixelGame(flips=2)
    policy = make_policy(MLP, game, (4, 4))
    params = jax.tree.map(jnp.zeros_like, policy.init(key)) | {"log_std": jnp.full((4, 4), -3.0)}
    want = (problem.verifier[0] > 0) ^ problem.cases.masks[0]
    players = []
    for sign in (1.0, 0.0, -1.0):
        bias = jnp.where(want, sign, -sign).reshape(-1)
        players.append(params | {"mean": params["mean"] | {"bias": bias}})
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *players)
    table = jax.jit(
        lambda stack: tournament.compare(key, game, policy, dice, problem, stack, stack, games=512, steps=1)
    )(stack)
    np.testing.assert_allclose(table.scores + table.scores.T, 1, atol=0.12)
    assert table.scores[0, 1] > 0.5 and table.scores[1, 2] > 0.5 and table.scores[0, 2] == 1
    assert exploitability(table.rewards[2]) > exploitability(table.rewards[1]) > 0
    trace = tournament.play(key, game, policy, dice, problem, players[0], players[2], 3, 2, explore=False)
    assert trace.mask.shape == (2, 3, 4, 4) and np.all(trace.info.is_won)
    np.testing.assert_array_equal(trace.mask[0], trace.info.flips[0] ^ problem.cases.masks)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="games: expected a whole number from 1"):
        SelfPlayConfig(games=0)
    with pytest.raises(ValueError, match="ppo.minibatches: expected a divisor of the 36 samples"):
        dataclasses.replace(SMALL, steps=3, ppo=PpoConfig(minibatches=5))
    with pytest.raises(ValueError, match="rule: the repo's percentile ranks desires"):
        make_policy(TopkUnetConfig(), PixelGame(rule="repo"), (4, 4))
    assert SMALL.steps_per_iteration == 48 and ppo.SB3.epochs == 10
