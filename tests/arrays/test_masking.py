"""Masks: how many tokens stay, which, and the way back to their own order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.masking import (
    choose_masking,
    draw_noise,
    hidden_mask,
    num_kept,
    random_masking,
    restore_order,
    take_tokens,
)

pytestmark = pytest.mark.core


def draw(images, tokens, ratio=0.75, seed=0):
    return random_masking(draw_noise(jax.random.split(jax.random.key(seed), images), tokens), ratio)


def test_1024_of_4096_tokens_stay():
    masking = draw(2, 4096)
    assert masking.kept.shape == (2, 1024) and masking.hidden.shape == (2, 3072)
    np.testing.assert_array_equal(hidden_mask(masking).mean(axis=1), 0.75)
    # A permutation: every token is either kept or hidden.
    np.testing.assert_array_equal(np.sort(masking.order, axis=1), np.tile(np.arange(4096), (2, 1)))


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"), [(4096, 0.75, 1024), (196, 0.75, 49), (64, 0.6, 25), (10, 0.0, 10)]
)
def test_number_of_kept_tokens_is_the_whole_part(tokens, ratio, kept):
    assert num_kept(tokens, ratio) == kept


def test_the_smallest_noise_is_kept_in_rising_order():
    noise = np.array([[0.7, 0.1, 0.9, 0.3], [0.2, 0.8, 0.4, 0.6]], np.float32)
    masking = random_masking(jnp.asarray(noise), 0.5)
    assert masking.kept.tolist() == [[1, 3], [0, 2]] and masking.hidden.tolist() == [[0, 2], [3, 1]]
    assert hidden_mask(masking).tolist() == [[True, False, True, False], [False, True, False, True]]


def test_images_are_masked_apart_and_a_key_alone_decides():
    masking = draw(3, 64)
    assert not np.array_equal(masking.kept[0], masking.kept[1])
    keys = jax.random.split(jax.random.key(0), 3)
    alone = random_masking(draw_noise(keys[1:2], 64), 0.75)
    np.testing.assert_array_equal(alone.kept[0], masking.kept[1])


def test_every_token_is_hidden_equally_often():
    hidden = np.asarray(hidden_mask(draw(4000, 16)))
    # Standard deviation of a share of 0.75 over 4000 draws is 0.0068; 16 tokens, 4.5 deviations.
    assert np.abs(hidden.mean(axis=0) - 0.75).max() < 0.031


def test_restore_order_inverts_the_masking():
    tokens = np.random.default_rng(0).standard_normal((2, 12, 3)).astype(np.float32)
    masking = draw(2, 12)
    shuffled = take_tokens(jnp.asarray(tokens), masking.order)
    np.testing.assert_array_equal(restore_order(shuffled, masking), tokens)
    np.testing.assert_array_equal(shuffled[1, 2], tokens[1, int(masking.kept[1, 2])])


def test_noise_goes_before_a_key_and_without_both_nothing_is_hidden():
    key, noise = jax.random.key(3), jnp.linspace(1.0, 0.0, 20).reshape(2, 10)
    by_noise = choose_masking(2, 10, 0.6, noise, key)
    np.testing.assert_array_equal(by_noise.kept, np.tile([9, 8, 7, 6], (2, 1)))
    by_key = choose_masking(2, 10, 0.6, key=key)
    expected = random_masking(draw_noise(jax.random.split(key, 2), 10), 0.6)
    np.testing.assert_array_equal(by_key.order, expected.order)
    nothing = choose_masking(2, 10, 0.6)
    np.testing.assert_array_equal(nothing.kept, np.tile(np.arange(10), (2, 1)))
    assert nothing.hidden.shape == (2, 0)
