"""The pixel game against its algebra, against NumPy step by step, and with verifiers whose answer is known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from games import dice, linear, linear_numpy, reference, square

from jaxmed.rl.pixel_game import (
    Best,
    PixelGame,
    State,
    begin_best,
    make_cases,
    mark_flips,
    observe,
    reset,
    step,
    update_best,
)

pytestmark = pytest.mark.core
GAMES, SHAPE = 10_000, (6, 7)
GAME = PixelGame(flips=5)


def draw_states(games=GAMES, shape=SHAPE, images=3):
    noise = np.random.default_rng(0)
    weights = noise.normal(size=(images, *shape)).astype("f")
    image = noise.integers(0, images, games).astype("i4")
    mask = noise.random((games, *shape)) < 0.4
    value = linear_numpy(weights)(image, mask)
    desires = noise.normal(size=(2, games, *shape)).astype("f")
    return weights, State(*map(jnp.asarray, (image, mask, value, np.zeros(games, "i4")))), jnp.asarray(desires)


@pytest.fixture(scope="module")
def played():
    """One step of ten thousand random states, and the same with the players exchanged."""
    weights, state, (action, rival) = draw_states()
    run = jax.jit(lambda weights, state, a, b: step(GAME, partial(linear, weights), state, a, b))
    return weights, state, run(weights, state, action, rival), run(weights, state, rival, action), run, action


def test_flips_are_exactly_k_and_undo_themselves(played):
    _, state, (_, _, _, info), _, _, _ = played
    for flips in (info.flips, info.rival_flips):
        assert np.all(flips.sum(axis=(1, 2)) == 5)
        np.testing.assert_array_equal(state.mask ^ flips ^ flips, state.mask)


def test_the_better_proposal_stays_and_ties_are_the_players(played):
    _, state, (after, reward, done, info), _, run, action = played
    own, theirs = state.mask ^ info.flips, state.mask ^ info.rival_flips
    np.testing.assert_array_equal(after.mask, np.where(info.is_won[:, None, None], own, theirs))
    np.testing.assert_array_equal(info.is_won, reward >= 0)
    np.testing.assert_array_equal(after.value, np.maximum(info.value, info.rival_value))
    assert not done.any() and np.all(after.steps == 1)
    _, same, _, tied = run(played[0], state, action, action)
    assert np.all(same == 0) and np.all(tied.is_won)


def test_exchanging_the_players_negates_the_reward_and_keeps_the_winner(played):
    _, _, (after, reward, _, _), (swapped, negative, _, _), _, _ = played
    assert np.all(reward != 0)
    np.testing.assert_array_equal(negative, -reward)
    np.testing.assert_array_equal(swapped.mask, after.mask)


@pytest.mark.parametrize(
    "game",
    [
        PixelGame(flips=5),
        PixelGame(fraction=0.1, rule="elitist"),
        PixelGame(flips=6, at_most_k=True),
        PixelGame(flips=2, super_pixel=(2, 3, 2)),
        PixelGame(fraction=0.1, rule="repo"),
    ],
    ids=["fair", "elitist", "at most k", "super-pixels of a volume", "repo"],
)
def test_runs_are_numpys_step_by_step(game):
    """A compiled scan of 20 steps, against the transcription of the rules."""
    shape = (4, 6, 4) if isinstance(game.super_pixel, tuple) else SHAPE
    weights, state, _ = draw_states(17, shape, 2)
    grid = game.grid(shape)
    actions = np.random.default_rng(1).normal(size=(20, 2, 17, *grid)).astype("f")
    verify = partial(linear, jnp.asarray(weights))

    def advance(state, pair):
        after, reward, _, info = step(game, verify, state, pair[0], pair[1])
        return after, (after.mask, after.value, reward, info.is_won)

    _, (masks, values, rewards, won) = jax.jit(lambda state: jax.lax.scan(advance, state, actions))(state)
    mask, value = np.asarray(state.mask), np.asarray(state.value)
    for number, (action, rival) in enumerate(actions):
        if game.rule == "repo":
            flips, answer = reference.mark_percentile(action, 0.1), np.clip(rival, 0, 1).astype(bool)
        else:
            count = game.flips or reference.count_flips(int(np.prod(grid)), 0.1)
            flips, answer = (reference.mark_top(each, count, game.at_most_k) for each in (action, rival))
        if isinstance(game.super_pixel, tuple):
            flips, answer = (reference.enlarge(each, game.super_pixel) for each in (flips, answer))
        judge = linear_numpy(weights)
        mask, value, reward, is_won = reference.pixel_step(
            judge, np.asarray(state.image), mask, value, flips, answer, game.rule == "elitist"
        )
        np.testing.assert_array_equal(masks[number], mask)
        np.testing.assert_allclose(values[number], value, atol=2e-5)
        np.testing.assert_allclose(rewards[number], reward, atol=2e-5)
        np.testing.assert_array_equal(won[number], is_won)
    if game.rule == "elitist":
        assert np.all(np.diff(values, axis=0) >= 0)


def test_a_game_of_many_is_the_game_alone():
    weights, state, (action, rival) = draw_states(4)
    verify = partial(linear, jnp.asarray(weights))
    run = jax.jit(partial(step, GAME, verify))
    together = run(state, action, rival)
    for number in range(4):
        part = jax.tree.map(lambda leaf, number=number: leaf[number : number + 1], (state, action, rival))
        alone = run(*part)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(a[0], b[number], atol=1e-6)


@pytest.mark.parametrize(("edge", "count"), [(16, 3), (32, 11), (64, 41), (256, 656)])
def test_top_k_is_the_percentile_where_nothing_ties(edge, count):
    game = PixelGame()
    assert game.num_flips((edge, edge)) == count
    desires = np.random.default_rng(edge).permutation(edge**2).reshape(1, edge, edge).astype("f")
    np.testing.assert_array_equal(
        mark_flips(game, (edge, edge), jnp.asarray(desires)), desires >= np.percentile(desires, 99)
    )


def test_the_repos_percentile_flips_all_ties_and_its_rival_everything_positive():
    noise = np.random.default_rng(0)
    desires = jnp.asarray(noise.normal(size=(2, 3, 32, 32)).astype("f"))
    state = State(jnp.zeros(3, jnp.int32), jnp.zeros((3, 32, 32), bool), jnp.zeros(3), jnp.zeros(3, jnp.int32))
    run = jax.jit(partial(step, PixelGame(rule="repo"), partial(linear, jnp.ones((1, 32, 32)))))
    _, _, _, info = run(state, *desires)
    # 16 % of a normal's draws are 1 or more, and all of them tie with the percentile once they are clipped.
    np.testing.assert_array_equal(info.flips, desires[0] >= 1)
    np.testing.assert_array_equal(info.rival_flips, desires[1] > 0)
    assert info.flips.sum() / 3 > 130
    _, _, _, calm = run(state, desires[0] / 10, desires[1])
    np.testing.assert_array_equal(calm.flips.sum(axis=(1, 2)), 11)


def test_numbers_and_their_complements_are_actions_too():
    numbers = jnp.array([[0, 41, ~3], [7, ~8, ~9]])
    marked = np.asarray(mark_flips(PixelGame(flips=3, at_most_k=True), SHAPE, numbers)).reshape(2, -1)
    assert [list(np.flatnonzero(row)) for row in marked] == [[0, 41], [7]]
    np.testing.assert_array_equal(marked, reference.mark_numbers(np.asarray(numbers), 42))


def test_games_are_cut_one_step_after_the_horizon():
    weights, state, (action, rival) = draw_states(2)
    run = jax.jit(partial(step, PixelGame(flips=1, horizon=3), partial(linear, jnp.asarray(weights))))
    ends = []
    for _ in range(4):
        state, _, done, _ = run(state, action, rival)
        ends.append(bool(done.all()))
    assert ends == [False, False, False, True]


def test_resets_and_observations(key):
    images = jax.random.normal(key, (3, *SHAPE))
    cases = make_cases(partial(linear, images), images, images > 0)
    np.testing.assert_allclose(cases.values, np.maximum(images, 0).sum(axis=(1, 2)), rtol=1e-5)
    state = reset(cases, jnp.array([2, 0]))
    np.testing.assert_array_equal(state.value, cases.values[jnp.array([2, 0])])
    seen = observe(images, state)
    np.testing.assert_array_equal(seen[..., 0], images[jnp.array([2, 0])])
    np.testing.assert_array_equal(seen[..., 1], images[jnp.array([2, 0])] > 0)


def test_the_best_of_each_image_survives():
    cases = make_cases(lambda _, mask: mask.sum(axis=(1, 2)), jnp.zeros((3, 1, 4)), jnp.zeros((3, 1, 4), bool))
    best = begin_best(cases)
    masks = jnp.array([[[1, 0, 0, 0]], [[1, 1, 1, 0]], [[1, 1, 0, 0]], [[0, 0, 0, 0]]], bool)
    state = State(jnp.array([0, 0, 1, 1]), masks, masks.sum(axis=(1, 2)).astype(float), jnp.zeros(4, jnp.int32))
    best = update_best(best, state)
    np.testing.assert_array_equal(best.value, [3, 2, 0])
    np.testing.assert_array_equal(best.mask, [masks[1], masks[2], masks[3]])
    worse = state._replace(mask=~masks, value=jnp.array([1.0, 2.0, 2.0, 2.5]))
    again = update_best(best, worse)
    assert isinstance(again, Best)
    np.testing.assert_array_equal(again.value, [3, 2.5, 0])
    np.testing.assert_array_equal(again.mask[1], ~masks[3])


TRUTH = square(8, 2, 6)


@jax.jit
def gains(mask):
    """Gain of Dice by flipping each pixel, less a little, so that a pixel without any is left alone."""
    truth, image = jnp.asarray(TRUTH), jnp.zeros(64, jnp.int32)
    flipped = mask.reshape(1, 64) ^ jnp.eye(64, dtype=bool)
    value = dice(truth, image, flipped.reshape(64, 8, 8).astype(float))
    return (value - dice(truth, image[:1], mask.astype(float))).reshape(1, 8, 8) - 1e-6


@pytest.mark.parametrize("at_most", [False, True])
def test_greedy_players_reach_the_truth_to_within_k_pixels(at_most, key):
    mask = np.array(TRUTH > 0).reshape(1, -1)
    mask[0, np.random.default_rng(3).permutation(64)[:13]] ^= True
    game = PixelGame(flips=3, at_most_k=at_most)
    run = jax.jit(partial(step, game, partial(dice, jnp.asarray(TRUTH))))
    rival = jax.random.normal(key, (1, 8, 8))
    state = State(jnp.zeros(1, jnp.int32), jnp.asarray(mask.reshape(1, 8, 8)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    left = []
    for _ in range(13 // 3 + 2):
        state, _, _, _ = run(state, gains(state.mask), rival)
        left.append(int((state.mask ^ (TRUTH > 0)).sum()))
    assert left[:4] == [10, 7, 4, 1]
    # Three at a time can never set a single pixel right.
    assert left[4:] == ([0, 0] if at_most else [2, 1])


@pytest.fixture(scope="module")
def oracles():
    """Final Dice of random proposals under sign * Dice + tau * noise: one program for every verifier.

    Squares stand anywhere; with a shift the verifier is given the square of another game.
    """
    places = np.random.default_rng(1).integers(0, 8, (512, 2))
    truth = jnp.asarray(np.stack([np.roll(TRUTH[0], place, (0, 1)) for place in places]))
    image = jnp.arange(512, dtype=jnp.int32)
    start = jnp.asarray(np.random.default_rng(0).random((512, 8, 8)) < 0.4)

    @jax.jit
    def run(sign, tau, shift):
        def advance(state, key):
            own, rival, noise = jax.random.split(key, 3)
            extra = tau * jax.random.normal(noise, (1024,))
            verify = lambda image, mask: sign * dice(jnp.roll(truth, shift, axis=0), image, mask) + extra  # noqa: E731
            pair = (jax.random.normal(key, start.shape) for key in (own, rival))
            return step(PixelGame(flips=2), verify, state, *pair)[0], None

        state = State(image, start, jnp.zeros(512), jnp.zeros(512, jnp.int32))
        return dice(truth, image, jax.lax.scan(advance, state, jax.random.split(jax.random.key(0), 40))[0].mask).mean()

    return run, float(dice(truth, image, start).mean())


def test_an_oracle_of_the_other_sign_leads_away_from_the_truth(oracles):
    run, before = oracles
    assert run(1.0, 0.0, 0) > before + 0.1
    assert run(-1.0, 0.0, 0) < before - 0.1


def test_a_noisier_oracle_leads_less_far(oracles):
    run, before = oracles
    ends = [float(run(1.0, tau, 0)) for tau in (0.0, 0.05, 0.2, 1.0)]
    assert np.all(np.diff(ends) < -0.01)
    assert ends[-1] > before - 0.03


def test_a_verifier_of_other_images_leads_nowhere(oracles):
    """No further than chance, which is what a verifier of noise alone leaves."""
    run, _ = oracles
    chance, other = float(run(1.0, 1e3, 0)), float(run(1.0, 0.0, 1))
    assert abs(other - chance) < 0.02
    assert run(1.0, 0.0, 0) > other + 0.1


def test_impossible_rules_are_refused():
    for field, value in (("fraction", 0.0), ("flips", 0), ("horizon", 0), ("super_pixel", 0)):
        with pytest.raises(ValueError, match=f"{field}: expected"):
            PixelGame(**{field: value})
    with pytest.raises(ValueError, match="rule: repo flips all"):
        PixelGame(rule="repo", at_most_k=True)
    with pytest.raises(ValueError, match="super_pixel: expected edges that divide"):
        PixelGame(super_pixel=4).grid((6, 8))
    with pytest.raises(ValueError, match="flips: expected at most the 42 pixels"):
        PixelGame(flips=43).num_flips(SHAPE)
    with pytest.raises(ValueError, match="action: expected a desire for each pixel"):
        mark_flips(PixelGame(super_pixel=2), (4, 4), jnp.zeros((1, 4, 4)))
