"""Pools of past selves: the ring, the schedules' frequencies, ratings with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmed.rl.opponents import (
    OpponentConfig,
    draw,
    draw_prioritised,
    elo,
    exploitability,
    make_pool,
    pick,
    take_snapshot,
)

pytestmark = pytest.mark.core


def filled(count, size=4):
    """A pool after `count` snapshots that hold their number."""
    pool = make_pool(size, {"w": jnp.zeros(2)})
    snap = jax.jit(take_snapshot)
    for number in range(1, count):
        pool = snap(pool, {"w": jnp.full(2, float(number))}, True)
    return pool


def test_the_ring_keeps_the_newest_and_waits_until_it_is_time():
    pool = filled(6)
    assert sorted(pool.params["w"][:, 0].tolist()) == [2, 3, 4, 5]
    kept = take_snapshot(pool, {"w": jnp.full(2, 9.0)}, jnp.array(False))
    np.testing.assert_array_equal(kept.params["w"], pool.params["w"])
    assert kept.count == pool.count == 6


@pytest.mark.parametrize(
    ("count", "schedule", "known"), [(2, "uniform", {0, 1}), (6, "uniform", {2, 3, 4, 5}), (6, "latest", {5})]
)
def test_only_snapshots_that_were_taken_are_drawn(count, schedule, known, key):
    pool = filled(count)
    slots = draw(key, schedule, pool, 200)
    assert set(np.asarray(jax.vmap(lambda slot: pick(pool, slot)["w"][0])(slots)).tolist()) == known


@pytest.mark.parametrize("stored", [1, 2, 16])
def test_prioritised_numbers_follow_the_clipped_normal(stored, key):
    count = 20_000
    numbers = np.asarray(draw_prioritised(key, jnp.int32(stored), count))
    law = scipy.stats.norm(stored / 2, stored / 4)
    edges = np.concatenate([[-np.inf], np.arange(1, stored), [np.inf]])
    # Everything beyond H - 1 is held at it, so the last number has what lies above H - 1.
    expected = np.diff(law.cdf(edges))
    found = np.bincount(numbers, minlength=stored)
    assert len(found) == stored
    if stored > 1:
        assert scipy.stats.chisquare(found, count * expected / expected.sum()).pvalue > 0.01
    pool = filled(20, 16)
    if stored == 16:
        ages = jax.vmap(lambda slot: pick(pool, slot)["w"][0])(draw(key, "prioritised", pool, count)) - 4
        np.testing.assert_array_equal(ages, numbers)


def test_ratings_are_those_that_the_scores_were_made_from():
    truth = np.array([-250.0, 0.0, 30.0, 220.0])
    odds = 10 ** ((truth[:, None] - truth) / 400)
    found = np.asarray(elo(jnp.asarray(odds / (1 + odds)), rounds=500))
    np.testing.assert_allclose(found, truth - truth.mean(), rtol=0.1, atol=3)
    assert np.all(np.isfinite(elo(jnp.asarray(np.triu(np.ones((4, 4)), 1)))))


def test_exploitability_is_what_the_best_rival_gains():
    assert exploitability(jnp.array([0.5, -0.25, 0.0])) == 0.25
    assert exploitability(jnp.array([0.5, 0.25])) == 0


def test_games_are_split_among_groups_as_nearly_as_the_share_allows():
    assert OpponentConfig(live=0.25, groups=3).num_live(8) == 2
    assert OpponentConfig(live=0.5, groups=4).num_live(66) == 34
    assert OpponentConfig(live=0.0, groups=4).num_live(6) == 2
    assert OpponentConfig(live=0.0, groups=4).num_live(3) == 3
    assert OpponentConfig(live=1.0).num_live(8) == 8
    assert OpponentConfig(schedule="live").num_live(7) == 7


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="pool: expected a whole number from 1 to .* found 0"):
        OpponentConfig(pool=0)
    with pytest.raises(ValueError, match="live: expected a number from 0 to 1"):
        OpponentConfig(live=1.5)
