"""Tree search in the pixel game: greedy where greedy is best, better where it is not, and of the right sign."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from games import axes, linear

from jaxmed.rl import pixel_game
from jaxmed.rl.pixel_game import PixelGame
from jaxmed.rl.search import SearchConfig, Turn, init, iterate, play, search
from jaxmed.rl.selfplay import make_problem

GAMES, SHAPE = 12, (3, 4)
GAME = PixelGame(flips=1)
CONFIG = SearchConfig(simulations=32, considered=12, noise=0.0)


def draw_turn(seed=0):
    """Return weights of a linear verifier, and a turn at random masks."""
    noise = np.random.default_rng(seed)
    weights = jnp.asarray(noise.normal(size=(GAMES, *SHAPE)), jnp.float32)
    mask = jnp.asarray(noise.random((GAMES, *SHAPE)) < 0.4)
    value = linear(weights, jnp.arange(GAMES), mask)
    return weights, Turn(jnp.arange(GAMES), mask, value, mask, value, jnp.zeros(GAMES, bool))


@pytest.fixture(scope="module")
def searched():
    """A search of the first turn, and of the rival's after it."""
    weights, turn = draw_turn()
    run = jax.jit(lambda turn: search(CONFIG, GAME, partial(linear, weights), jax.random.key(0), turn))
    first = run(turn)
    return weights, turn, first, run(first.turn)


def gains(weights, mask):
    return np.asarray(weights * (1 - 2.0 * mask)).reshape(GAMES, -1)


def test_with_an_exact_verifier_the_search_is_the_greedy_flip(searched):
    weights, turn, first, second = searched
    best = gains(weights, turn.mask)
    np.testing.assert_array_equal(first.action, best.argmax(1))
    # The rival sees the same mask, and has no better answer than the same pixel.
    np.testing.assert_array_equal(second.action, best.argmax(1))
    after = second.turn
    np.testing.assert_allclose(after.value, turn.value + best.max(1), rtol=1e-5)
    assert not after.is_second.any() and first.turn.is_second.all()


def test_values_are_those_of_the_player_to_move(searched):
    weights, turn, first, second = searched
    best = gains(weights, turn.mask)
    # Exchanged players have the negative value: the rival gains what the first leaves on the table.
    regret = best.max(1, keepdims=True) - best
    correlation = np.corrcoef(np.asarray(first.action_values).ravel(), -regret.ravel())[0, 1]
    assert correlation > 0.8
    pending = play(GAME, partial(linear, weights), turn, jnp.asarray(best.argmin(1)))[0]
    rival = search(CONFIG, GAME, partial(linear, weights), jax.random.key(1), pending)
    assert (np.asarray(rival.action_values).max(1) > 0.5 * regret.max(1)).all()


def test_a_round_is_a_step_of_the_game():
    weights, turn = draw_turn(3)
    noise = np.random.default_rng(1)
    actions = jnp.asarray(noise.integers(0, 12, (2, GAMES)))
    for rule in ("fair", "elitist"):
        game, verify = PixelGame(flips=1, rule=rule), partial(linear, weights)
        state = pixel_game.State(turn.image, turn.mask, turn.value, jnp.zeros(GAMES, jnp.int32))
        after, reward, _, _ = pixel_game.step(game, verify, state, actions[0][:, None], actions[1][:, None])
        middle, nothing = play(game, verify, turn, actions[0])
        end, rivals = play(game, verify, middle, actions[1])
        np.testing.assert_array_equal(end.mask, after.mask)
        np.testing.assert_allclose(end.value, after.value, rtol=1e-6)
        np.testing.assert_allclose(rivals, -reward, atol=1e-6)
        np.testing.assert_array_equal(nothing, 0.0)


def bent(weights, image, mask):
    """A verifier that is linear in flips while its slope has the opposite sign everywhere."""
    return linear(weights, image, mask * (2 * mask - 1) ** 2 - 2 * mask * (1 - mask))


def test_flips_are_judged_by_what_they_do_and_not_by_the_slope():
    weights, turn = draw_turn(5)
    verify = partial(bent, weights)
    slope = jax.grad(lambda mask: verify(turn.image, mask).sum())(turn.mask * 1.0)
    best = gains(weights, turn.mask)
    empty = ~np.asarray(turn.mask)
    assert (np.sign(slope)[empty] == -np.sign(weights)[empty]).all()
    np.testing.assert_allclose(verify(turn.image, turn.mask * 1.0), turn.value, rtol=1e-5)
    found = search(SearchConfig(32, 12, sharpness=0.0, noise=0.0), GAME, verify, jax.random.key(0), turn)
    np.testing.assert_array_equal(found.action, best.argmax(1))


def test_what_was_seen_is_worth_what_the_verifier_says(searched):
    weights, _, first, _ = searched
    seen = np.isfinite(first.seen.value)
    assert seen.sum() > GAMES * 20
    values = linear(weights, first.seen.image, first.seen.mask)
    np.testing.assert_allclose(first.seen.value[seen], values[seen], rtol=1e-4, atol=1e-5)


def test_games_go_on_from_where_they_were_and_the_best_never_falls():
    images = jnp.zeros((2, 4, 4))
    truth = jnp.zeros((2, 4, 4)).at[0, :2, :2].set(1).at[1, 2:, 2:].set(1)

    def overlap(truth, image, mask):
        chosen = truth[image]
        return 2 * (chosen * mask).sum(axes(mask)) / (chosen.sum(axes(mask)) + mask.sum(axes(mask)) + 1e-6)

    problem = make_problem(overlap, truth, images, jnp.zeros((2, 4, 4), bool))
    game = PixelGame(rule="elitist", super_pixel=2)
    state, values = init(jax.random.key(0), 4, problem), []
    run = jax.jit(partial(iterate, SearchConfig(simulations=8), game, overlap, 2, problem))
    for _ in range(2):
        state = run(state)
        values.append(np.asarray(state.best.value))
    # One super-pixel is the object: the first round finds it, and nothing is better.
    np.testing.assert_allclose(values, 1.0, atol=1e-5)
    np.testing.assert_array_equal(state.best.mask, truth > 0)
    assert state.game.steps.tolist() == [4] * 4


@pytest.mark.parametrize("wrong", [{"simulations": 0}, {"considered": 0}, {"noise": -1.0}, {"sharpness": float("inf")}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        SearchConfig(**wrong)
