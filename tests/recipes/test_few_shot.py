"""Baselines by labels alone: variants, MAML's gradient in closed form on quadratics, and what its start is worth."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.data.augment import AS_THEY_ARE
from jaxmed.data.tasks import Cases
from jaxmed.models.mask_generator import GeneratorConfig, make_generator
from jaxmed.recipes.few_shot import (
    MamlConfig,
    adapt_maml,
    fit_maml,
    fit_supervised,
    maml_loss,
    mask_loss,
    take_inner_steps,
)
from jaxmed.synthesis.phantoms.puzzles import NOVEL_FAMILIES, TRAIN_FAMILIES, make_puzzle

NETWORK = GeneratorConfig("plain", widths=(8, 8))
CONFIG = MamlConfig(steps=60, inner_steps=2, inner_rate=0.5, rate=1e-2, queries=6)


def quadratic(params, optimum):
    return 0.5 * ((params["x"] - optimum) ** 2).sum()


@pytest.mark.core
@pytest.mark.parametrize("steps", [1, 3])
def test_the_gradient_is_that_of_quadratics(steps):
    noise, rate = np.random.default_rng(0), 0.3
    start, support, queries = noise.normal(size=(3, 5)).astype(np.float32)
    left = (1 - rate) ** steps
    params = {"x": jnp.asarray(start)}
    inner = take_inner_steps(quadratic, params, support, rate, steps)
    np.testing.assert_allclose(inner["x"], support + left * (start - support), rtol=1e-5)
    slope = jax.grad(maml_loss, argnums=1)(quadratic, params, support, queries, rate, steps)
    # The derivative of the inner steps, `left`, stands before the slope at their end: second derivatives are taken.
    np.testing.assert_allclose(slope["x"], left * (support + left * (start - support) - queries), rtol=1e-4, atol=1e-6)


def puzzles(seed, families):
    found = jax.vmap(partial(make_puzzle, shape=(16, 16)), (0, 0))(
        jax.random.split(jax.random.key(seed), len(families)), jnp.asarray(families)
    )
    return np.asarray(found.image, np.float32), np.asarray(found.mask, bool)


def test_a_learnt_start_adapts_to_a_new_family_better_than_a_random_one():
    families = np.repeat(np.arange(len(TRAIN_FAMILIES)), 20).astype(np.int32)
    images, masks = puzzles(0, np.array(TRAIN_FAMILIES)[families])
    names = tuple(str(number) for number in range(len(images)))
    cases = Cases(images, masks, families, tuple(map(str, TRAIN_FAMILIES)), names, names)
    learnt = fit_maml(0, NETWORK, CONFIG, cases, shots=4)
    drawn = make_generator(NETWORK).init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
    new, truth = puzzles(1, [NOVEL_FAMILIES[0]] * 24)
    test = jnp.asarray(new[4:]), jnp.asarray(truth[4:], jnp.float32)
    after = [
        mask_loss(NETWORK, adapt_maml(NETWORK, CONFIG, start, new[:4], truth[:4]), test) for start in (learnt, drawn)
    ]
    assert float(after[0]) < 0.8 * float(after[1])
    again = fit_maml(0, NETWORK, CONFIG, cases, shots=4)
    for one, other in zip(jax.tree.leaves(learnt), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.core
@pytest.mark.parametrize("wrong", [{"steps": -1}, {"inner_steps": 0}, {"rate": 0.0}, {"inner_rate": float("nan")}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*: expected"):
        MamlConfig(**wrong)


def test_a_supervised_network_sees_the_last_images_in_variants_of_their_own():
    masks = np.zeros((6, 16, 16), bool)
    masks[:, 4:12, 6:9] = True
    images = (0.8 * masks).astype(np.float32)
    loud = dataclasses.replace(AS_THEY_ARE, noise_probability=1.0, noise_sigma=(0.5, 0.5))
    settings = {"steps": 3, "batch_size": 4}
    small = GeneratorConfig("plain", widths=(4, 4, 4))

    def trained(**more):
        return jax.tree.leaves(fit_supervised(0, small, images, masks, **settings, **more))

    def same(first, second):
        return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))

    plain, varied = trained(), trained(variants=loud)
    assert not same(plain, varied)
    assert same(plain, trained(variants=loud, few=len(images)))
    assert same(varied, trained(few=len(images), variants_of_few=loud))
    half = trained(few=len(images) // 2, variants_of_few=loud)
    assert not same(half, plain) and not same(half, varied)
