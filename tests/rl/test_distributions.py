"""Ordered draws and normal desires: probabilities that sum to one, frequencies that match them, derivatives, passes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmed.rl.distributions import entropy, log_prob, make_gaussian, make_plackett_luce, sample

pytestmark = pytest.mark.core
LOGITS = jnp.array([0.3, -1.2, 2.0, 0.0, 0.7])
ORDERS = jnp.array(list(itertools.permutations(range(5), 2)))


def by_definition(logits, order):
    """Product of softmaxes over those that are left, in float64."""
    logits, left, total = np.asarray(logits, np.float64), list(range(len(logits))), 0.0
    for choice in order:
        total += logits[choice] - scipy.special.logsumexp(logits[left])
        left.remove(int(choice))
    return total


def test_probabilities_of_all_orders_sum_to_one():
    spread = jnp.broadcast_to(LOGITS, (20, 5))
    np.testing.assert_allclose(jnp.exp(log_prob(spread, ORDERS)).sum(), 1, atol=1e-6)
    everything = jnp.array(list(itertools.permutations(range(5))))
    whole = log_prob(jnp.broadcast_to(LOGITS, (120, 5)), everything)
    np.testing.assert_allclose(jnp.exp(whole).sum(), 1, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_log_probability_is_its_definition(scale):
    noise = np.random.default_rng(0)
    logits = jnp.asarray(scale * noise.normal(size=(6, 40)).astype("f"))
    order = jnp.asarray(np.stack([noise.permutation(40)[:11] for _ in range(6)]).astype("i4"))
    expected = [by_definition(*pair) for pair in zip(logits, order, strict=True)]
    np.testing.assert_allclose(log_prob(logits, order), expected, rtol=2e-6)


def test_nearly_certain_choices_keep_their_digits():
    logits = jnp.array([50.0, 30.0, 0.0, 0.0])
    np.testing.assert_allclose(log_prob(logits, jnp.array([0, 1, 3])), -np.log(2), rtol=1e-6)


@pytest.mark.parametrize("count", [3, 5])
def test_gradient_is_that_of_the_definition(count):
    with jax.enable_x64(True):
        logits, order = jnp.asarray(np.array(LOGITS), jnp.float64), jnp.array([2, 0, 1, 4, 3])[:count]
        gradient = jax.grad(log_prob)(logits, order)
        step = 1e-6 * np.eye(5)
        expected = [(by_definition(logits + h, order) - by_definition(logits - h, order)) / 2e-6 for h in step]
        np.testing.assert_allclose(gradient, expected, atol=1e-8)


def test_draws_have_the_orders_probabilities(key):
    count = 40_000
    drawn = sample(key, jnp.broadcast_to(LOGITS, (count, 5)), 2)
    numbers = np.asarray(drawn[:, 0] * 5 + drawn[:, 1])
    found = np.array([np.sum(numbers == a * 5 + b) for a, b in np.asarray(ORDERS)])
    expected = np.exp(np.asarray(log_prob(jnp.broadcast_to(LOGITS, (20, 5)), ORDERS), np.float64))
    assert found.sum() == count
    assert scipy.stats.chisquare(found, count * expected / expected.sum()).pvalue > 0.01


def test_entropy_is_that_of_the_first_draw():
    p = scipy.special.softmax(np.asarray(LOGITS, np.float64))
    np.testing.assert_allclose(entropy(LOGITS), scipy.stats.entropy(p), rtol=1e-6)


def test_passes_are_draws_of_their_own(key):
    family = make_plackett_luce(2, at_most=True)
    logits = jnp.broadcast_to(LOGITS, (20_000, 5))
    action = family.sample(key, logits)
    named = jnp.where(action < 0, ~action, action)
    assert np.all(named[:, 0] != named[:, 1])
    for pixel in range(5):
        share = np.mean(action[named == pixel] >= 0)
        np.testing.assert_allclose(share, scipy.special.expit(float(LOGITS[pixel])), atol=0.03)
    # All orders with all flips and passes.
    signs = np.array(list(itertools.product([False, True], repeat=2)))
    marked = np.where(signs[None], ~np.asarray(ORDERS)[:, None], np.asarray(ORDERS)[:, None]).reshape(-1, 2)
    total = jnp.exp(family.log_prob(jnp.broadcast_to(LOGITS, (80, 5)), jnp.asarray(marked))).sum()
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_likeliest_actions():
    assert list(make_plackett_luce(2).mode(LOGITS)) == [2, 4]
    many = make_plackett_luce(4, at_most=True).mode(LOGITS)
    assert list(many) == [2, 4, 0, ~3]


def test_density_entropy_and_moments_are_scipys(key):
    noise = np.random.default_rng(0)
    mean, log_std = noise.normal(size=(2, 3, 4)).astype("f"), noise.normal(size=(2, 3, 4)).astype("f") / 3
    action, family = noise.normal(size=(2, 3, 4)).astype("f"), make_gaussian()
    normal = (jnp.asarray(mean), jnp.asarray(log_std))
    law = scipy.stats.norm(mean, np.exp(log_std))
    np.testing.assert_allclose(
        family.log_prob(normal, jnp.asarray(action)), law.logpdf(action).sum(axis=(1, 2)), rtol=1e-5
    )
    np.testing.assert_allclose(family.entropy(normal), law.entropy().sum(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(family.mode(normal), mean)
    many = (jnp.full((20_000, 2), 0.5), jnp.full((20_000, 2), -1.0))
    drawn = family.sample(key, many)
    np.testing.assert_allclose(drawn.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose(drawn.std(axis=0), np.exp(-1), atol=0.01)
    assert jax.tree.structure(normal).num_leaves == 2
