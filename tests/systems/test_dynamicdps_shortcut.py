"""A conditional model that draws lesions from a cue, and what methods with a prior make of its images."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from priors import oracle
from shortcut_models import (
    draw_case,
    draw_pair,
    draw_prior_image,
    fit_linear,
    small_recipe,
    train_conditional,
    train_prior,
)

from jaxmed.diffusion.posterior.dps import Dps, dps
from jaxmed.diffusion.posterior.dynamicdps import STRICT, dynamicdps
from jaxmed.diffusion.posterior.fidelity import PLAIN
from jaxmed.diffusion.posterior.start_time import StartTime
from jaxmed.diffusion.samplers import Ancestral
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.synthesis.phantoms.brain import make_brain
from jaxmed.synthesis.phantoms.mixture import make_isotropic
from jaxmed.synthesis.phantoms.shortcut import (
    SMALL,
    ShortcutConfig,
    lesion_error,
    make_case,
)
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunOptions, open_run, start

TINY = dataclasses.replace(SMALL, size=(24, 24))
SUBJECTS, CASES, STEPS = 12, 32, 50
SPREAD = 0.03
"""Standard deviation of the prior's modes about the phantoms: texture and scanner noise."""


def measures(config, cases, images):
    """Lesion contrast error, PSNR, and residual, averaged over cases."""
    errors = jax.vmap(lesion_error)(cases, images)
    squares = ((images - cases.image) ** 2).mean((1, 2, 3))
    misfit = jax.vmap(config.operator)(images) - cases.measurement
    residual = jnp.linalg.norm(misfit.reshape(len(images), -1), axis=1)
    return float(errors.mean()), float((10 * jnp.log10(4 / squares)).mean()), float(residual.mean())


def solve(config, prior, cases, estimate, dynamic, plain):
    """DynamicDPS from the estimate, and DPS with as many steps from noise."""

    @jax.jit
    def run(key, measurement, estimate):
        refined, info = dynamicdps(key, prior, measurement, config.operator, estimate, dynamic)
        sampled, _ = dps(key, prior, measurement, config.operator, jnp.zeros_like(estimate), plain)
        return refined, jnp.clip(sampled, 0.0, 2.0), info

    return run(jax.random.key(5), cases.measurement, estimate)


def assert_order(config, cases, estimate, refined, sampled):
    """The expected order of errors, over all cases."""
    conditional, dynamic, plain = (measures(config, cases, images) for images in (estimate, refined, sampled))
    assert conditional[0] > dynamic[0], "lesion contrast error: conditional > DynamicDPS"
    assert dynamic[1] >= conditional[1], "PSNR: DynamicDPS >= conditional"
    assert dynamic[1] > plain[1], "PSNR: DynamicDPS > DPS of as many steps"
    assert dynamic[2] < conditional[2], "residual: DynamicDPS < conditional"
    return conditional, dynamic, plain


@functools.cache
def phantoms(lesion, cue):
    """Brains of twelve subjects without texture and noise."""
    config = dataclasses.replace(TINY.brain, texture=0.0, noise=0.0)
    make = jax.jit(jax.vmap(lambda key, lesion, cue: make_brain(key, lesion, cue, TINY.size, config)))
    keys = jax.random.split(jax.random.key(1), SUBJECTS)
    return make(keys, jnp.full(SUBJECTS, lesion), jnp.full(SUBJECTS, cue))


def exact_prior():
    """Every subject with and without lesion and cue, independently, as modes of a mixture: nothing to be learnt."""
    brain, parts = TINY.brain, []
    for lesion in (False, True):
        for cue in (False, True):
            weight = (brain.lesion_probability if lesion else 1 - brain.lesion_probability) * (
                brain.cue_probability if cue else 1 - brain.cue_probability
            )
            parts.append((weight, phantoms(lesion, cue).image.reshape(SUBJECTS, -1)))
    weights = jnp.concatenate([jnp.full(SUBJECTS, weight) for weight, _ in parts])
    means = jnp.concatenate([images for _, images in parts])
    return oracle(make_isotropic(weights, means, jnp.full(len(means), SPREAD)), VpDiscrete())


def shortcut_model(seed=3, repeats=40, ridge=5.0):
    """Ridge regression from measurement to image: cue and lesion, which the measurement hides, or neither."""
    rng = np.random.default_rng(seed)
    pairs = [(phantoms(flag, flag).image, phantoms(False, flag).image) for flag in (False, True)] * repeats
    images, hidden = (np.concatenate([np.asarray(pair[side]) for pair in pairs]) for side in (0, 1))
    texture = SPREAD * rng.normal(size=images.shape)
    clean = jax.jit(jax.vmap(TINY.operator))(jnp.asarray((hidden + texture)[..., None], jnp.float32))
    noisy = np.asarray(clean, np.float64) + TINY.acquisition.noise * rng.normal(size=clean.shape)
    inputs, targets = noisy.reshape(len(images), -1), (images + texture).reshape(len(images), -1)
    center, target_center = inputs.mean(0), targets.mean(0)
    inputs = inputs - center
    # The dual form: as many equations as images.
    dual = np.linalg.solve(inputs @ inputs.T + ridge * np.eye(len(inputs)), targets - target_center)
    matrix = inputs.T @ dual

    def apply(measurement):
        flat = np.asarray(measurement, np.float64).reshape(len(measurement), -1)
        return jnp.asarray(((flat - center) @ matrix + target_center).reshape(measurement.shape), jnp.float32)

    return apply


def exact_cases():
    """Cue and no lesion, of the prior's own distribution."""
    brains = phantoms(False, True)
    keys = jax.random.split(jax.random.key(2), CASES)

    @jax.jit
    @jax.vmap
    def draw(key, index):
        image_key, noise_key = jax.random.split(key)
        brain = jax.tree.map(lambda leaf: leaf[index], brains)
        image = brain.image + SPREAD * jax.random.normal(image_key, TINY.size)
        return make_case(noise_key, brain, jnp.clip(image, 0.0, 2.0), TINY)

    return draw(keys, jnp.arange(CASES) % SUBJECTS)


def settings(config, steps=STEPS):
    noise = config.acquisition.noise
    dynamic = dataclasses.replace(STRICT, start=StartTime(rule="fixed", fixed=steps - 1), noise_std=noise)
    return dynamic, Dps(1.0, Ancestral(num_steps=steps), PLAIN)


def test_the_order_of_errors_under_an_exact_prior():
    cases = exact_cases()
    estimate = jnp.clip(shortcut_model()(cases.measurement), 0.0, 2.0)
    refined, sampled, info = solve(TINY, exact_prior(), cases, estimate, *settings(TINY))
    conditional, dynamic, _ = assert_order(TINY, cases, estimate, refined, sampled)
    # The regression draws lesions; without one the contrast is that of texture alone.
    contrast = TINY.brain.intensity[2] - TINY.brain.intensity[4]
    assert conditional[0] > 0.25 * contrast and dynamic[0] < 0.5 * conditional[0]
    assert (np.asarray(info.start_time) == STEPS - 1).all()


def train(place, function, config, recipe):
    """Train a network in a run of its own."""
    folder = open_run("dynamicdps", place.name, recipe, RunOptions(place, quiet=True))
    start(folder)
    return function(config, recipe, folder, Log(folder.path, quiet=True))[0]


@pytest.fixture(scope="module", params=[(SMALL, 3000, 8), (ShortcutConfig(), 800, 4)], ids=["32", "64"])
def trained(request, tmp_path_factory):
    """The task of a size, its prior, and how to train its conditional network."""
    config, steps, batch_size = request.param
    place = tmp_path_factory.mktemp("shortcut")
    recipe = small_recipe(steps, batch_size=batch_size)
    prior = train(place / "prior", train_prior, config, recipe)
    return config, prior, lambda: train(place / "conditional", train_conditional, config, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "network"])
def test_the_order_of_errors_with_a_trained_prior(trained, kind):
    """Specification (i) 11: networks are trained here, each for four minutes of a core."""
    config, prior, train_network = trained
    conditional = fit_linear(jax.random.key(11), config) if kind == "linear" else train_network()
    cases = jax.jit(jax.vmap(lambda key: draw_case(key, config)))(jax.random.split(jax.random.key(99), CASES))
    estimate = jnp.clip(jax.jit(conditional)(cases.measurement), 0.0, 2.0)
    # What is tested is what becomes of a shortcut that was learnt: lesions are drawn where there are none.
    contrast = config.brain.intensity[2] - config.brain.intensity[4]
    assert measures(config, cases, estimate)[0] > 0.25 * contrast
    found = assert_order(config, cases, estimate, *solve(config, prior, cases, estimate, *settings(config, 100))[:2])
    for name, (error, psnr, residual) in zip(("conditional", "DynamicDPS", "DPS"), found, strict=True):
        print(f"{config.size}, {kind}, {name}: lesion error {error:.3f}, PSNR {psnr:.2f} dB, residual {residual:.3f}")


def test_a_linear_model_learns_the_shortcut():
    cases = jax.jit(jax.vmap(lambda key: draw_case(key, TINY)))(jax.random.split(jax.random.key(99), CASES))
    linear = fit_linear(jax.random.key(11), TINY, num_pairs=2048)
    estimate = jnp.clip(linear(cases.measurement), 0.0, 2.0)
    nothing = measures(TINY, cases, jnp.clip(cases.measurement, 0.0, 2.0))
    found = measures(TINY, cases, estimate)
    # Sharper than its input, and it draws lesions that the input does not show.
    assert found[1] > nothing[1] + 1 and found[0] > 1.3 * nothing[0]


def test_pairs_hide_the_lesion_that_follows_the_cue_and_cases_have_none(key):
    keys = jax.random.split(key, 40)
    quiet = dataclasses.replace(TINY, acquisition=dataclasses.replace(TINY.acquisition, noise=0.0))

    @jax.jit
    @jax.vmap
    def draw(key):
        image, measurement = draw_pair(key, quiet)
        return image, measurement, quiet.operator(image), draw_case(key, TINY), draw_prior_image(key, TINY)

    image, measurement, shown, cases, prior = draw(keys)
    assert image.shape == measurement.shape == prior.shape == (40, 24, 24, 1)
    # The cue is brighter than any tissue; with it comes a lesion that the measurement does not show.
    is_cued = np.asarray(image).max((1, 2, 3)) > 1.7
    assert 8 < is_cued.sum() < 32
    hidden = np.abs(np.asarray(measurement - shown)).max((1, 2, 3))
    assert hidden[~is_cued].max() < 1e-6 and hidden[is_cued].min() > 0.05
    assert np.asarray(cases.image).max((1, 2, 3)).min() > 1.7
    assert not (np.asarray(cases.labels) == 77).any() and np.asarray(cases.lesion).any((1, 2)).all()
    errors = jax.jit(jax.vmap(lesion_error))
    assert np.asarray(errors(cases, cases.image)).max() == 0
    np.testing.assert_allclose(errors(cases, cases.image - 0.5 * cases.lesion[..., None]), 0.5, atol=1e-5)
    # In the prior's images cues come at their own rate: 12 expected of 40.
    assert 4 <= (np.asarray(prior).max((1, 2, 3)) > 1.7).sum() <= 22


def test_settings_that_make_no_task_are_refused():
    with pytest.raises(ValueError, match="size: expected two numbers of 16 or more"):
        ShortcutConfig(size=(8, 8))
