"""The patch game: rewards by hand, NumPy turn by turn, the best play by enumeration, learning to segment."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from games import dice, reference

from jaxmed.models.policy import PatchMlpConfig
from jaxmed.rl import patch_game, patch_play, pixel_game
from jaxmed.rl.patch_game import Move, PatchGame, State
from jaxmed.rl.patch_play import PatchPlayConfig, PatchProblem, normalised_returns

pytestmark = pytest.mark.core
GAME = PatchGame(min_turns=2, max_turns=10)
SCORES = jnp.array([[0.9, 0.2, 0.6, 0.2]])

# turn, erased, (patch, stop) of both, rewards, whether it is over
TABLE = {
    "the higher score wins": (3, [], (0, 0), (1, 0), (1, -1), False),
    "the lower loses": (3, [], (1, 0), (2, 0), (-1, 1), False),
    "equal scores win nothing": (3, [], (1, 0), (3, 0), (0, 0), False),
    "an empty patch costs one": (3, [2], (2, 0), (1, 0), (-2, 1), False),
    "so does the patch that the other has just taken": (3, [], (1, 0), (1, 0), (1, -2), False),
    "both empty": (3, [0, 2], (0, 0), (2, 0), (-1, -1), False),
    "a stop multiplies": (3, [], (0, 1), (1, 0), (100, -100), True),
    "whoever calls it": (3, [], (1, 0), (0, 1), (-100, 100), True),
    "but not the cost of an empty patch": (3, [1], (0, 1), (1, 0), (100, -101), True),
    "too early": (1, [], (0, 1), (1, 0), (99, -101), True),
    "not too early": (2, [], (0, 1), (1, 0), (100, -100), True),
    "not too late": (10, [], (0, 1), (1, 0), (100, -100), True),
    "too late": (11, [], (0, 1), (1, 1), (99, -101), True),
    "cut": (12, [], (0, 0), (1, 0), (0, -2), True),
}


def turn(game, scores, at, erased, move, rival):
    gone = jnp.zeros((1, scores.shape[1]), bool).at[0, jnp.array(erased, int)].set(True)
    state = State(jnp.zeros(1, jnp.int32), gone, jnp.full(1, at))
    moves = (Move(jnp.array([patch]), jnp.array([bool(stop)])) for patch, stop in (move, rival))
    return patch_game.step(game, scores, state, *moves)


@pytest.mark.parametrize("case", TABLE)
def test_rewards_by_hand(case):
    at, erased, move, rival, rewards, over = TABLE[case]
    after, found, is_over, _ = turn(GAME, SCORES, at, erased, move, rival)
    np.testing.assert_array_equal(found[0], rewards)
    assert bool(is_over[0]) == over and after.turns[0] == at + 1
    assert set(np.flatnonzero(after.is_erased[0])) == {*erased, move[0], rival[0]}


@pytest.mark.parametrize(
    ("scores", "at", "move", "rival", "rewards"),
    [
        # The largest of (.1, .9, .8, .2) is not the player's absence: it loses, although it shows more.
        ([0.9, 0.2], 3, (0, 0), (1, 0), (-1, 1)),
        # That of (.9, .1, .8, .2) is.
        ([0.1, 0.2], 3, (0, 0), (1, 0), (1, -1)),
        # Both patches are scored as they were, and a tie goes to the first.
        ([0.1, 0.2], 3, (0, 0), (0, 0), (1, -1)),
        # Both penalties are the player's.
        ([0.1, 0.2], 1, (0, 1), (1, 0), (98, -100)),
    ],
)
def test_the_sources_slips_can_be_had(scores, at, move, rival, rewards):
    game = dataclasses.replace(GAME, match_release=True)
    np.testing.assert_array_equal(turn(game, jnp.array([scores]), at, [], move, rival)[1][0], rewards)


def test_runs_are_numpys_turn_by_turn():
    noise = np.random.default_rng(0)
    games, patches, turns = 50, 9, 15
    scores = noise.random((games, patches)).astype("f")
    patch = noise.integers(0, patches, (turns, 2, games)).astype("i4")
    stop = noise.random((turns, 2, games)) < 0.05

    def advance(state, moves):
        move, rival = (Move(moves[0][side], moves[1][side]) for side in (0, 1))
        state, reward, over, _ = patch_game.step(GAME, jnp.asarray(scores), state, move, rival)
        return state, (state.is_erased, reward, over)

    start = State(jnp.arange(games), jnp.zeros((games, patches), bool), jnp.zeros(games, jnp.int32))
    end, found = jax.jit(lambda *moves: jax.lax.scan(advance, start, moves))(patch, stop)
    erased = np.zeros((games, patches), bool)
    for number in range(turns):
        (a, b), (c, d) = patch[number], stop[number]
        erased, rewards, over = reference.patch_step(scores, erased, np.full(games, number), a, c, b, d, 2, 10)
        for one, other in zip((leaf[number] for leaf in found), (erased, rewards, over), strict=True):
            np.testing.assert_array_equal(one, other)
    # Erased patches stay erased.
    assert np.all(np.diff(found[0].astype(int), axis=0) >= 0) and np.all(end.turns == turns)


@pytest.mark.peers
def test_the_environment_of_one_game_plays_by_the_same_rules():
    scores = np.array([0.9, 0.2, 0.6, 0.2])
    for at, erased, move, rival, rewards, over in TABLE.values():
        environment = reference.make_patch_environment(scores, 2, 10)
        environment.reset()
        environment.erased[erased], environment.turn = True, at
        _, reward, is_over, _, info = environment.step((*move, *rival))
        assert (reward, info["rival_reward"], is_over) == (*rewards, over)


def test_best_play_takes_the_whole_object_and_then_stops():
    """Every state of 3 x 3 patches, against a rival that finds background alone and never stops.

    The detector is the exact overlap: 1 in the object's four patches, 0 elsewhere. Dynamic programming over the 512
    sets of erased patches, whose rewards are the game's own; time counts little but something. Against a rival that
    may find the object, waiting until one patch is left can be worth more than taking the last but one.
    """
    target = np.array([0, 1, 0, 0, 1, 1, 0, 1, 0], np.float32)
    game = PatchGame(min_turns=0, max_turns=10**6)
    codes = np.arange(512)
    erased = (codes[:, None] >> np.arange(9)) & 1 == 1
    cases = np.array(list(itertools.product(codes, range(9), (0, 1), np.flatnonzero(target == 0))))
    code, patch, stop, rival = cases.T
    state = State(jnp.zeros(len(cases), jnp.int32), jnp.asarray(erased[code]), jnp.zeros(len(cases), jnp.int32))
    none = jnp.zeros(len(cases), bool)
    after, rewards, over, _ = jax.jit(partial(patch_game.step, game, jnp.asarray(target)[None]))(
        state, Move(jnp.asarray(patch), jnp.asarray(stop == 1)), Move(jnp.asarray(rival), none)
    )
    np.testing.assert_array_equal(over, stop == 1)
    following = (np.asarray(after.is_erased) * 2 ** np.arange(9)).sum(axis=1)
    value = np.zeros(512)
    for _ in range(2000):
        gained = np.asarray(rewards)[:, 0] + 0.995 * np.where(stop == 1, 0.0, value[following])
        worth = gained.reshape(512, 9, 2, 5).mean(axis=3)
        new = worth.reshape(512, -1).max(axis=1)
        if np.abs(new - value).max() < 1e-9:
            break
        value = new
    left = (target > 0) & ~erased
    for number in codes[left.any(axis=1)]:
        choice, stops = np.unravel_index(worth[number].argmax(), (9, 2))
        assert left[number, choice], "an object patch while there is one"
        assert stops == (left[number].sum() == 1), "and the stop with the last of them"


def test_returns_have_mean_zero_and_deviation_one_over_the_turns_that_were_played():
    reward = np.array([[1.0, 2.0], [3.0, 9.0], [-1.0, 9.0], [5.0, 9.0]])
    played = np.array([[1, 1], [1, 0], [1, 0], [0, 0]], bool)
    found = normalised_returns(jnp.asarray(reward, jnp.float32), jnp.asarray(played), 0.5)
    totals = np.array([1 + 0.5 * 3 - 0.25, 3 - 0.5, -1])
    expected = (totals - totals.mean()) / (totals.std() + 1e-8)
    np.testing.assert_allclose(found[:3, 0], expected, atol=1e-6)
    # An episode of one turn has no deviation.
    np.testing.assert_allclose(found[:, 1], 0, atol=1e-6)
    assert found[3, 0] == 0


def problem(images=2):
    noise = np.random.default_rng(2)
    truth = noise.random((images, 9)) < 0.4
    truth[:, 0] = True
    scores = np.where(truth, 0.9, 0.1).astype("f") + 0.05 * noise.random((images, 9)).astype("f")
    features = np.stack([truth + 0.1 * noise.normal(size=truth.shape), np.ones_like(scores)], axis=-1).astype("f")
    known = jnp.asarray(truth.reshape(images, 3, 3), jnp.float32)
    cases = pixel_game.make_cases(partial(dice, known), known, known < 0)
    return PatchProblem(jnp.asarray(features), jnp.asarray(scores), jnp.zeros((images, 9), bool), cases, known), truth


SMALL = PatchPlayConfig(
    game=PatchGame(patches=3, max_turns=9),
    network=PatchMlpConfig((32,)),
    games=32,
    turns=9,
    learning_rate=1e-2,
    minibatches=1,
)


def train(config, iterations):
    task, truth = problem()
    model = patch_play.make_patch_policy(config)
    state = patch_play.init(jax.random.key(0), config, model, task)
    advance, curve = jax.jit(partial(patch_play.iterate, config, model, dice)), []
    for _ in range(iterations):
        state, metrics = advance(task, state)
        curve.append(metrics)
    chosen = np.asarray(jax.jit(partial(patch_play.segment, config, model))(state.params, task))
    overlap = 2 * (chosen & truth).sum() / (chosen.sum() + truth.sum())
    return state, curve, overlap, (config, model, task, truth)


def test_reinforce_learns_to_name_the_object_in_seconds():
    state, curve, _, (config, model, task, truth) = train(dataclasses.replace(SMALL, games=64), 60)
    assert all(np.isfinite(value) for value in curve[-1].values())
    # The verifier says when it is enough: the best masks are the object, though nobody learnt when to stop.
    values = [float(metrics["best"]) for metrics in curve]
    assert values == sorted(values) and values[-1] == pytest.approx(1)
    np.testing.assert_array_equal(state.best.mask.reshape(2, 9), truth)
    assert int(state.pool.count) == 61
    features = patch_game.observe(task.features, patch_game.reset(task.is_empty, jnp.arange(2)))
    mass = jax.nn.softmax(model.apply(state.params, features)[0])
    assert np.all((np.asarray(mass) * truth).sum(axis=1) > 0.8)


def test_gradient_of_the_loss_is_reinforces(key):
    """Against the sum over moves of return times the gradient of each log-probability."""
    task, _ = problem()
    model = patch_play.make_patch_policy(SMALL)
    params = model.init(key, task.features[:1])
    noise = np.random.default_rng(0)
    seen = State(jnp.array([0, 1, 1]), jnp.asarray(noise.random((3, 9)) < 0.3), jnp.zeros(3, jnp.int32))
    patch, stop, weight = jnp.array([3, 0, 8]), np.array([True, False, False]), jnp.array([1.5, -2.0, 0.0])
    value, gradient = jax.jit(jax.value_and_grad(partial(patch_play.loss, model, task)))(
        params, seen, patch, jnp.asarray(stop), weight
    )

    def log_prob(params, number):
        logits, stops = model.apply(params, jnp.where(seen.is_erased[..., None], 0.0, task.features[seen.image]))
        return jax.nn.log_softmax(logits)[number, patch[number]] + jax.nn.log_softmax(stops)[number, int(stop[number])]

    parts = [jax.jit(jax.value_and_grad(log_prob), static_argnums=1)(params, number) for number in range(3)]
    np.testing.assert_allclose(value, -sum(w * part[0] for w, part in zip(weight, parts, strict=True)) / 3, rtol=1e-5)
    for leaf, *own in zip(*map(jax.tree.leaves, (gradient, *(part[1] for part in parts))), strict=True):
        np.testing.assert_allclose(leaf, -sum(w * g for w, g in zip(weight, own, strict=True)) / 3, atol=1e-6)


def test_masks_are_what_games_have_named_after_each_move_and_the_best_is_kept():
    task, _ = problem()
    task = task._replace(is_empty=jnp.zeros((2, 9), bool).at[0, 1].set(True))
    config = dataclasses.replace(SMALL, games=4, turns=3)
    named = [[[0, 1], [2, 3], [4, 5]], [[8, 0], [7, 1], [6, 2]], [[4, 4], [0, 8], [0, 0]], [[3, 2], [1, 0], [5, 4]]]
    patch, image = jnp.asarray(named, jnp.int32).transpose(1, 2, 0), jnp.array([0, 1, 1, 0])
    erased, views, played = np.asarray(task.is_empty)[image], [], np.ones((3, 2, 4), bool)
    played[1:, :, 3] = False  # the last game was stopped in its first turn
    values, masks = np.full(4, -1.0), np.zeros((4, 9), bool)
    for number, moves in enumerate(np.asarray(patch)):
        for side, move in enumerate(moves):
            views.append(erased.copy())
            erased[np.arange(4), move] = True
            mask = erased & ~np.asarray(task.is_empty)[image]
            value = np.asarray(dice(task.verifier, image, mask.reshape(4, 3, 3).astype("f")))
            better = (value > values) & played[number, side]
            values, masks = np.where(better, value, values), np.where(better[:, None], mask, masks)
    seen = State(jnp.broadcast_to(image, (3, 2, 4)), jnp.asarray(views).reshape(3, 2, 4, 9), jnp.zeros((3, 2, 4)))
    turns = patch_play.Turns(seen, patch, patch < 0, patch * 0.0, jnp.asarray(played), None)
    start = pixel_game.begin_best(task.cases)
    game, best = jax.jit(partial(patch_play.judge_turns, config, dice))(task, turns, start)
    np.testing.assert_allclose(game.value, values, atol=1e-6)
    np.testing.assert_array_equal(game.mask.reshape(4, 9), masks)
    for number in range(2):
        assert float(best.value[number]) == pytest.approx(max(values[np.asarray(image) == number]), abs=1e-6)


def test_images_are_cut_into_patches():
    noise = np.random.default_rng(0)
    images, chance = (jnp.asarray(noise.random((2, 6, 4)), jnp.float32) for _ in range(2))
    images = images.at[0, :3, 2:].set(0)
    game = PatchGame(patches=2)
    found = patch_play.make_patch_problem(game, dice, chance, images, chance)
    np.testing.assert_array_equal(found.features[1, 2].reshape(3, 2), images[1, 3:, :2])
    np.testing.assert_allclose(found.scores[0, 1], chance[0, :3, 2:].mean(), rtol=1e-6)
    assert np.argwhere(found.is_empty).tolist() == [[0, 1]]
    marked = patch_game.mark_patches(game, (6, 4), found.is_empty)
    np.testing.assert_array_equal(marked, images == 0)
    with pytest.raises(ValueError, match=r"patches: expected a number that divides \(6, 4\), found 5"):
        PatchGame(patches=5).edges((6, 4))


def test_a_policy_alone_stops_when_it_says_so():
    task, truth = problem()
    model = patch_play.make_patch_policy(SMALL)
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), task.features[:1]))
    # Without hidden units' help: the bias prefers patches in order, and stops at once or never.
    ordered = params | {"patch": params["patch"] | {"bias": -jnp.arange(9.0)}}
    for stops, expected in ((1.0, 1), (-1.0, 9)):
        ready = ordered | {"stop": params["stop"] | {"bias": jnp.array([0.0, stops])}}
        chosen = patch_play.segment(SMALL, model, ready, task)
        np.testing.assert_array_equal(chosen.sum(axis=1), expected)
        assert chosen[0, 0] and truth.shape == chosen.shape
    # Patches that were empty from the start are not the object's.
    empty = task._replace(is_empty=jnp.zeros((2, 9), bool).at[:, 0].set(True))
    assert not patch_play.segment(SMALL, model, ordered, empty)[:, 0].any()


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="min_turns, max_turns: expected"):
        PatchGame(min_turns=3, max_turns=2)
    with pytest.raises(ValueError, match="empty_score: expected a number from 0 to 1"):
        PatchGame(empty_score=2.0)
    with pytest.raises(ValueError, match="explore: expected a number from 0 to 1"):
        PatchPlayConfig(explore=-0.1)
    with pytest.raises(ValueError, match="minibatches: expected a divisor"):
        PatchPlayConfig(minibatches=7)
