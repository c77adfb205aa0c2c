"""System I: Reptile's identities, losses, adaptation, corrupted masks, calibration."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.metrics.imaging import dice
from jaxmed.models.mask_generator import GeneratorConfig
from jaxmed.models.mask_verifier import VerifierConfig
from jaxmed.recipes.few_shot import reptile
from jaxmed.synthesis.corruption import KINDS, corrupt
from jaxmed.systems.selfplay import system_one
from jaxmed.systems.selfplay.system_one import AdaptConfig, MetaConfig, SystemOne, SystemOneConfig
from jaxmed.systems.selfplay.verifier import calibrate

CONFIG = SystemOneConfig(GeneratorConfig("plain", widths=(4,)), VerifierConfig("plain", widths=(4,), dense=(8,)))
RATE = 1e-3


@pytest.fixture(scope="module")
def start():
    params = system_one.init_params(jax.random.key(0), CONFIG, (8, 8))
    images = jax.random.uniform(jax.random.key(1), (4, 8, 8))
    return params, images, images > 0.6


def largest(first, second):
    return max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


def take(start, epsilon, inner_steps):
    params, images, masks = start
    meta = MetaConfig(inner_steps, epsilon, RATE)
    state = system_one.init_meta(jax.random.key(3), CONFIG, meta, params)
    batch = {"image": jnp.stack([images] * inner_steps, 1), "mask": jnp.stack([masks * 1.0] * inner_steps, 1)}
    return system_one.meta_step(CONFIG, meta, state, batch)


def test_without_a_step_nothing_moves_and_a_whole_step_is_plain_training(start):
    still, _ = take(start, 0.0, 2)
    assert largest(still.params, start[0]) == 0 and int(still.step) == 1
    whole, _ = take(start, 1.0, 2)
    # The same path as adaptation with the same keys: two steps of Adam from the same start.
    params, images, masks = start
    key = jax.random.fold_in(jax.random.key(3), 0)
    system, _ = system_one.adapt(key, SystemOne(CONFIG, params), images, masks, AdaptConfig(2, RATE))
    assert largest(whole.params, system.params) < 1e-7
    assert largest(whole.params["verifier"], whole.inner) < 1e-7


def test_the_reference_hands_on_the_verifier_of_its_last_task(start):
    state, _ = take(start, 0.25, 2)
    ours = system_one.handed_on(MetaConfig(), state)
    theirs = system_one.handed_on(system_one.repo()[1], state)
    assert largest(ours, state.params) == 0 and largest(theirs["generator"], state.params["generator"]) == 0
    assert largest(theirs["verifier"], state.inner) == 0 and largest(ours["verifier"], state.inner) > 0


def test_one_inner_step_is_a_share_of_one_step_of_adam(start):
    part, _ = take(start, 0.25, 1)
    whole, _ = take(start, 1.0, 1)
    expected = jax.tree.map(lambda old, new: old + 0.25 * (new - old), start[0], whole.params)
    assert largest(part.params, expected) < 1e-7
    # Adam's first step has the length of its rate, whatever the gradient: so does the move, times epsilon.
    moved = jnp.abs(part.params["verifier"]["head"]["kernel"] - start[0]["verifier"]["head"]["kernel"])
    assert np.max(moved) == pytest.approx(0.25 * RATE, rel=1e-2)


def test_on_quadratic_tasks_reptile_ends_at_the_mean_of_their_optima():
    optima = jnp.array([-3.0, 1.0, 5.0])

    def step(place, number):
        inner = place
        for _ in range(4):
            inner = inner - 0.1 * (inner - optima[number % 3])
        return reptile(0.02, {"place": place}, {"place": inner})["place"], place

    _, path = jax.lax.scan(step, jnp.float32(10.0), jnp.arange(3000))
    assert np.mean(path[-300:]) == pytest.approx(1.0, abs=0.02)


def test_overlap_is_dice_for_masks_and_one_for_two_empty_ones():
    rng = np.random.default_rng(0)
    truth, estimate = rng.uniform(size=(2, 5, 6, 7)) < 0.4
    truth[0] = estimate[0] = False
    found = system_one.overlap(jnp.asarray(truth, jnp.float32), jnp.asarray(estimate, jnp.float32))
    np.testing.assert_allclose(found, [dice(t, e) for t, e in zip(truth, estimate, strict=True)], atol=1e-6)


def test_the_references_losses_are_its_own(start):
    """Binary cross-entropy of true (1 to 1.05) and generated (0 to .05) masks; the generator is told by D alone."""
    params, images, masks = start
    config, *_ = system_one.repo()
    config = SystemOneConfig(
        CONFIG.generator, CONFIG.verifier, config.target, config.pixel_weight, config.verifier_weight
    )
    true, weights, key = masks.astype(jnp.float32), jnp.ones(4), jax.random.key(5)
    found = system_one._verifier_loss(config, key, params["generator"], images, true, weights, params["verifier"])
    soft = system_one.generate(config, params, images)
    d_true, d_soft = (np.asarray(system_one.verify(config, params, images, m), np.float64) for m in (true, soft))
    true_key, false_key = jax.random.split(key)
    one, none = 1 + 0.05 * jax.random.uniform(true_key, (4,)), 0.05 * jax.random.uniform(false_key, (4,))
    expected = [
        -(y * np.log(d) + (1 - y) * np.log(1 - d)) for y, d in ((np.asarray(one), d_true), (np.asarray(none), d_soft))
    ]
    assert float(found) == pytest.approx(np.mean(expected), abs=1e-5)
    total, _ = system_one._generator_loss(config, params["verifier"], images, true, weights, params["generator"])
    assert float(total) == pytest.approx(-np.log(d_soft).mean(), abs=1e-5)


def test_a_guess_of_no_weight_does_not_count(start):
    params, images, masks = start
    system, config = SystemOne(CONFIG, params), AdaptConfig(2, RATE)
    wrong = jnp.concatenate([masks[:2], ~masks[2:]])
    weights = jnp.array([1.0, 1.0, 0.0, 0.0])
    first, _ = system_one.adapt(jax.random.key(0), system, images, masks, config, weights)
    second, _ = system_one.adapt(jax.random.key(0), system, images, wrong, config, weights)
    # The verifier's corrupted masks are drawn by image: those of no weight are drawn and not counted.
    assert largest(first.params, second.params) < 1e-6


def test_a_rate_that_decays_halves_the_second_of_two_steps(start):
    params, images, masks = start
    system = SystemOne(CONFIG, params)
    evenly, decayed = (
        system_one.adapt(jax.random.key(0), system, images, masks, AdaptConfig(2, RATE, decay))[0].params
        for decay in (False, True)
    )
    assert largest(evenly, decayed) > 0.1 * RATE
    # So twice the one less the other is where the first step led, and Adam's first has the length of its rate.
    after_one = jax.tree.map(lambda decayed, evenly: 2 * decayed - evenly, decayed, evenly)
    moved = jax.tree.map(lambda new, old: jnp.abs(new - old), after_one, params)["verifier"]["head"]["kernel"]
    np.testing.assert_allclose(moved[moved > 0.5 * RATE], RATE, rtol=1e-2)
    assert (moved > 0.5 * RATE).any()


def test_no_steps_leave_everything(start):
    params, images, masks = start
    system, losses = system_one.adapt(jax.random.key(0), SystemOne(CONFIG, params), images, masks, AdaptConfig(steps=0))
    assert losses == {} and largest(system.params, params) == 0


@pytest.fixture(scope="module")
def corrupted():
    mask = jnp.zeros((16, 16), bool).at[4:12, 5:11].set(True)
    keys = jax.random.split(jax.random.key(2), 300)
    return mask, np.asarray(jax.jit(jax.vmap(partial(corrupt, mask=mask)))(keys)), keys


def test_masks_are_corrupted_in_every_way(corrupted):
    mask, masks, keys = corrupted
    mask = np.asarray(mask)
    kinds = np.array([int(jax.random.randint(jax.random.split(key)[0], (), 0, len(KINDS))) for key in keys])
    by_kind = {name: masks[kinds == number] for number, name in enumerate(KINDS)}
    assert all(len(found) > 20 for found in by_kind.values())
    assert (by_kind["shifted"].sum((1, 2)) == mask.sum()).all()
    assert all((found & mask == mask).all() and found.sum() > mask.sum() for found in by_kind["dilated"])
    assert all((found & ~mask).sum() == 0 and found.sum() < mask.sum() for found in by_kind["eroded"])
    assert all((found & ~mask).sum() == 0 and found.sum() < mask.sum() for found in by_kind["hole"])
    assert all((found & mask == mask).all() and found.sum() > mask.sum() for found in by_kind["blob"])
    changed = (by_kind["flipped"] ^ mask).mean((1, 2))
    assert 0.03 < changed.mean() < 0.07 and changed.max() < 0.2


def test_nothing_is_corrupted_without_strength():
    mask = jnp.zeros((8, 8), bool).at[2:6, 2:6].set(True)
    keys = jax.random.split(jax.random.key(0), 50)
    found = jax.jit(jax.vmap(partial(corrupt, mask=mask, strength=0.0)))(keys)
    # A ball without a radius is its middle.
    assert (found ^ mask).sum((1, 2)).max() <= 1


def test_a_verifier_that_knows_the_overlap_is_trusted_and_a_constant_one_is_not(start, monkeypatch):
    params, images, masks = start
    system = SystemOne(CONFIG, params)

    def oracle(system, images, shown):
        return jax.nn.sigmoid(2.0 * jax.scipy.special.logit(0.01 + 0.98 * system_one.overlap(masks * 1.0, shown)))

    monkeypatch.setattr("jaxmed.systems.selfplay.verifier.judge_masks", oracle)
    found = calibrate(jax.random.key(0), system, images, masks)
    assert found.rank == pytest.approx(1.0, abs=1e-6) and found.temperature == pytest.approx(2.0, rel=0.1)
    monkeypatch.setattr(
        "jaxmed.systems.selfplay.verifier.judge_masks", lambda system, images, shown: jnp.full(len(images), 0.3)
    )
    found = calibrate(jax.random.key(0), system, images, masks)
    assert found.is_constant and np.isnan(found.rank) and found.temperature == 1.0


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="dimensions: expected the same number"):
        SystemOneConfig(GeneratorConfig(dimensions=3))
    with pytest.raises(ValueError, match="threshold: expected"):
        SystemOneConfig(threshold=1.0)
    with pytest.raises(ValueError, match="pixel_weight"):
        SystemOneConfig(pixel_weight=0.0, verifier_weight=0.0)
    with pytest.raises(ValueError, match="inner_steps"):
        MetaConfig(inner_steps=0)
