"""Many fits in one program: each is what it would be alone, learns, and starts where it is told to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.heads import HeadConfig
from jaxmed.models.mae import MaeConfig, masked_model
from jaxmed.models.vit import VitConfig, vit_encoder
from jaxmed.recipes.vmapped_fits import FitConfig, HeldOut, fit_runs, pretrain_masked, start_runs, vary
from jaxmed.train.optimizer import OptimizerConfig

SIZES = VitConfig((8, 8), (4, 4), 1, width=16, depth=1, heads=2, hidden=32, final_norm=False)
ENCODER, HEAD = vit_encoder(SIZES), HeadConfig(1, "mean")
FIT = FitConfig(60, 16, OptimizerConfig(peak_lr=1e-2, warmup_steps=5, weight_decay=0.0), shift=1)


def bright(seed, count):
    """Images of two classes that differ in contrast, which neither a flip nor a shift changes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    return (rng.normal(size=(count, 8, 8, 1)) * (0.5 + labels)[:, None, None, None]).astype(np.float32), labels


@pytest.fixture(scope="module")
def fits():
    images, labels = bright(0, 40)
    test, truth = bright(1, 30)
    chances = np.ones((3, 40), np.float32)
    chances[1, 4:] = 0  # the second run sees four records alone
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    targets = labels[:, None].astype(np.float32)

    def go(which, config=FIT, held_out=None):
        params = start_runs(ENCODER, HEAD, keys[jnp.array(which)], None, np.zeros(3, bool))
        return fit_runs(config, ENCODER, HEAD, "binary", images, targets, chances[which], params,
                        keys[jnp.array(which)], test, held_out)  # fmt: skip

    return go, truth


def test_a_run_learns_and_does_not_depend_on_its_neighbours(fits):
    go, truth = fits
    logits = go([0, 1, 2])
    assert logits.shape == (3, 30, 1)
    right = ((logits[..., 0] > 0) == truth).mean(1)
    assert right[0] > 0.8 and right[2] > 0.8
    again = go([2, 0, 0])
    np.testing.assert_array_equal(again[0], logits[2])
    np.testing.assert_array_equal(again[1], again[2])
    np.testing.assert_array_equal(again[1], logits[0])


def test_the_parameters_of_the_lowest_validation_loss_are_kept(fits):
    go, truth = fits
    others, labels = bright(3, 20)
    shares = np.ones((3, 20), np.float32)
    last = go([0, 1, 2])
    once = dataclasses.replace(FIT, evaluations=1)
    held_out = HeldOut(others, labels[:, None].astype(np.float32), shares)
    np.testing.assert_allclose(go([0, 1, 2], once, held_out), last, rtol=1e-5, atol=1e-5)  # looked at in the end alone
    # Labels the wrong way round: the less a run has learnt the better. Every run selects by records of its own.
    often = dataclasses.replace(FIT, evaluations=7)
    both = HeldOut(np.concatenate([others, others]), np.concatenate([labels, 1 - labels])[:, None].astype(np.float32),
                   np.kron([[1, 0], [0, 1], [0, 1]], np.ones(20)).astype(np.float32))  # fmt: skip
    found = go([0, 0, 2], often, both)
    assert np.abs(found[1]).mean() < 0.5 * np.abs(last[0]).mean() and np.abs(found[2]).mean() < np.abs(last[2]).mean()
    assert ((found[0, :, 0] > 0) == truth).mean() > 0.8
    with pytest.raises(ValueError, match="evaluations: expected at most the 60 steps, found 61"):
        dataclasses.replace(FIT, evaluations=61)


def test_runs_start_from_given_parameters_or_random_ones():
    keys = jax.random.split(jax.random.key(0), 2)
    given = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7.0), ENCODER.init(jax.random.key(9)))
    params = start_runs(ENCODER, HEAD, keys, given, np.array([True, False]))
    drawn = start_runs(ENCODER, HEAD, keys, None, np.array([False, False]))
    for name, leaf in params["encoder"].items():
        first = jax.tree.leaves(leaf)[0]
        assert (first[0] == 7).all(), name
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(drawn), strict=True):
        np.testing.assert_array_equal(one[1], other[1])
    np.testing.assert_array_equal(params["head"]["linear"]["kernel"], drawn["head"]["linear"]["kernel"])


def test_pretraining_lowers_the_loss_and_gives_the_encoder_its_parameters():
    images, _ = bright(2, 32)
    images = np.cumsum(images, axis=2) / 3  # smooth along a row, so that a hidden patch can be told from its neighbour
    config = MaeConfig(SIZES, 16, 1, 2, 32, mask_ratio=0.5, sigmoid=False)
    params, losses = pretrain_masked(
        FitConfig(150, 16, OptimizerConfig(peak_lr=1e-2, warmup_steps=5)), masked_model(config), images,
        jax.random.key(0),
    )  # fmt: skip
    assert losses.shape == (150,) and losses[-20:].mean() < 0.8 * losses[:20].mean()
    assert jax.tree.map(jnp.shape, params["encoder"]) == jax.tree.map(jnp.shape, ENCODER.init(jax.random.key(0)))


@pytest.mark.core
def test_a_variant_is_flipped_or_not_and_shifted():
    image = jnp.arange(30.0).reshape(5, 6, 1)
    for seed in range(6):
        found = np.asarray(vary(1, jax.random.key(seed), image))
        moves = [np.roll(np.flip(image, 1) if flip else image, (a, b), (0, 1))
                 for flip in (0, 1) for a in (-1, 0, 1) for b in (-1, 0, 1)]  # fmt: skip
        assert sum(np.array_equal(found, one) for one in moves) == 1
