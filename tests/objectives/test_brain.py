"""Losses of the multi-task network: against NumPy with one-hot targets, at the ends, and where something is missing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.unet_brain import BrainUnetConfig
from jaxmed.objectives.brain import (
    BrainLossConfig,
    brain_loss,
    contrastive_loss,
    gradient_error,
    label_losses,
    lesion_loss,
)
from jaxmed.synthesis.brain_draws import MODALITIES

pytestmark = pytest.mark.core

SPACE, CLASSES = (5, 4, 3), 4
TASKS = (
    *MODALITIES, "segmentation", "distance", "bias_field_log", "registration", "high_res_residual", "pathology",
)  # fmt: skip
CONFIG = BrainUnetConfig(width=8, levels=1, tasks=TASKS, labels=tuple(range(CLASSES)))


@pytest.fixture(scope="module")
def example():
    """Return maps and targets that differ everywhere."""
    rng = np.random.default_rng(0)
    maps = {task: rng.normal(size=(*SPACE, CONFIG.channels(task))).astype(np.float32) for task in TASKS}
    targets = {task: rng.normal(size=maps[task].shape).astype(np.float32) for task in TASKS}
    targets["segmentation"] = rng.integers(0, CLASSES, SPACE).astype(np.int32)
    targets["distance"] = np.clip(3 * targets["distance"], -3, 3)
    maps["distance"] = 3 * maps["distance"]
    targets["pathology"] = (targets["pathology"] > 1).astype(np.float32)
    targets["present"] = np.ones(4, np.float32)
    targets["weights"] = (rng.random(SPACE) > 0.3).astype(np.float32)
    targets["background"] = (targets["segmentation"] == 0).astype(np.float32)
    return {name: jnp.asarray(value) for name, value in maps.items()}, jax.tree.map(jnp.asarray, targets)


@pytest.fixture(scope="module")
def losses():
    return jax.jit(lambda maps, targets: brain_loss(CONFIG, BrainLossConfig(), maps, targets))


def numpy_gradient(error, weight):
    total = 0.0
    for axis in range(3):
        step = np.zeros_like(error)
        inner = [slice(None)] * 4
        inner[axis] = slice(0, -1)
        step[tuple(inner)] = np.diff(error, axis=axis)
        total += np.mean(weight * np.abs(step))
    return total


def test_losses_are_those_of_the_released_code_in_numpy(example, losses):
    maps, targets = example
    total, found = losses(maps, targets)
    weight, inside = targets["weights"][..., None], 1 - targets["background"][..., None]
    for task in (*MODALITIES, "registration", "high_res_residual"):
        error, factor = maps[task] - targets[task], weight if task in MODALITIES else np.ones_like(weight)
        expected = np.mean(factor * np.abs(error)) + numpy_gradient(error, factor)
        np.testing.assert_allclose(found[task], expected, rtol=1e-5)
    logits, hot = maps["segmentation"], np.eye(CLASSES)[targets["segmentation"]]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    cross = np.mean(-(hot * np.log(np.maximum(p, 1e-5)) / CLASSES).sum(-1))
    shared, both = (p * hot).sum((0, 1, 2)), (p + hot).sum((0, 1, 2))
    np.testing.assert_allclose(found["cross_entropy"], cross, rtol=1e-5)
    np.testing.assert_allclose(found["dice"], np.mean(1 - 2 * shared / both), rtol=1e-5)
    np.testing.assert_allclose(found["segmentation"], found["cross_entropy"] + found["dice"], rtol=1e-6)
    clipped = np.clip(maps["distance"], -3, 3)
    np.testing.assert_allclose(found["distance"], np.mean(np.abs(clipped - targets["distance"])), rtol=1e-5)
    squared = np.mean((inside * (maps["bias_field_log"] - targets["bias_field_log"])) ** 2)
    np.testing.assert_allclose(found["bias_field_log"], squared, rtol=1e-5)
    np.testing.assert_allclose(total, sum(float(found[task]) for task in TASKS), rtol=1e-5)


def test_the_cross_entropy_has_a_factor_beside_dice(example):
    config = dataclasses.replace(CONFIG, tasks=("segmentation",))
    settings = BrainLossConfig(segmentation=3.0, cross_entropy=float(CLASSES))
    total, found = brain_loss(config, settings, *example)
    labels, logits = example[1]["segmentation"], example[0]["segmentation"]
    usual = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()
    np.testing.assert_allclose(found["segmentation"], usual + found["dice"], rtol=1e-5)
    np.testing.assert_allclose(total, 3.0 * found["segmentation"], rtol=1e-6)


def test_a_perfect_prediction_costs_nothing(example, losses):
    _, targets = example
    maps = {task: targets[task] for task in TASKS}
    maps["segmentation"] = 200.0 * np.eye(CLASSES, dtype=np.float32)[targets["segmentation"]]
    maps["pathology"] = 200.0 * (2 * targets["pathology"] - 1)
    total, found = losses(maps, targets)
    assert abs(float(total)) < 1e-6 and all(abs(float(value)) < 1e-6 for value in found.values())


def test_a_missing_modality_costs_nothing_and_teaches_nothing(example):
    maps, targets = example
    targets = targets | {"present": jnp.array([1.0, 0, 1, 1]), "T2": jnp.full_like(targets["T2"], jnp.nan)}

    def total(maps):
        return brain_loss(CONFIG, BrainLossConfig(), maps, targets)

    (value, found), gradient = jax.value_and_grad(total, has_aux=True)(maps)
    assert float(found["T2"]) == 0.0 and np.isfinite(value) and float(found["T1"]) > 0
    assert not np.any(gradient["T2"]) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_an_all_background_volume_is_finite(example, losses):
    maps, targets = example
    nothing = {name: np.zeros_like(value) for name, value in targets.items()}
    total, found = losses(maps, nothing | {"background": np.ones(SPACE, np.float32)})
    assert np.isfinite(total) and float(found["bias_field_log"]) == 0.0 and float(found["T1"]) == 0.0


def test_beyond_the_clamp_there_is_no_gradient_and_without_it_there_is(example):
    maps, targets = example

    def gradient(clamp):
        settings = BrainLossConfig(clamp_distance=clamp)
        loss = lambda distance: brain_loss(CONFIG, settings, maps | {"distance": distance}, targets)[0]  # noqa: E731
        return np.asarray(jax.grad(loss)(maps["distance"]))

    outside = np.abs(np.asarray(maps["distance"])) > 3
    assert outside.any() and not gradient(True)[outside].any()
    assert gradient(False)[outside].all()


def test_class_losses_of_a_constant_guess_are_those_of_chance():
    labels = np.arange(60).reshape(SPACE) % CLASSES
    cross, overlap = label_losses(jnp.zeros((*SPACE, CLASSES)), jnp.asarray(labels, jnp.int32))
    np.testing.assert_allclose(cross, np.log(CLASSES) / CLASSES, rtol=1e-6)
    np.testing.assert_allclose(overlap, 1 - 1 / CLASSES, rtol=1e-6)


def test_differences_do_not_see_a_constant_and_a_ramp_costs_its_slope():
    ramp = np.broadcast_to(np.arange(5.0, dtype=np.float32)[:, None, None, None], (*SPACE, 1))
    np.testing.assert_allclose(gradient_error(jnp.asarray(2 * ramp + 7), jnp.asarray(ramp)), 4 / 5, rtol=1e-6)


def test_lesions_cost_nothing_where_there_are_none_and_none_are_seen():
    nothing = jnp.zeros((*SPACE, 1))
    assert float(lesion_loss(nothing - 50.0, nothing)) < 1e-6
    np.testing.assert_allclose(lesion_loss(nothing, nothing), np.log(2), rtol=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_the_best_scale_is_the_error_of_the_residuals(kind, example):
    """The mean of the likelihood is least where the scale is the root mean square, or mean, of the errors."""
    maps, targets = example
    config = dataclasses.replace(CONFIG, uncertainty=kind, tasks=("registration",))
    error = maps["registration"] - targets["registration"]
    best = np.sqrt(np.mean(error**2)) if kind == "gaussian" else np.mean(np.abs(error))

    def loss(log_scale):
        scales = {"registration_log_scale": jnp.full_like(maps["registration"], log_scale)}
        settings = BrainLossConfig(registration_gradient=False)
        return brain_loss(config, settings, maps | scales, targets)[0]

    np.testing.assert_allclose(jax.grad(loss)(float(np.log(best))), 0, atol=1e-5)
    assert float(loss(float(np.log(best)))) < float(loss(float(np.log(best)) + 0.3))


def test_an_age_that_is_not_known_costs_nothing():
    config = dataclasses.replace(CONFIG, tasks=("age",), age_size=(16, 16, 16))
    for age, expected in ((50.0, 10.0), (np.nan, 0.0)):
        total, _ = brain_loss(config, BrainLossConfig(), {"age": jnp.array(-60.0)}, {"age": jnp.array(age)})
        np.testing.assert_allclose(total, expected)


def test_the_contrastive_loss_is_the_formula_and_prefers_agreement():
    rng = np.random.default_rng(1)
    first, second = (value / np.linalg.norm(value, axis=-1, keepdims=True) for value in rng.normal(size=(2, 6, 4)))
    a, b, c = 0.5, 0.7, 0.9
    upper = np.exp(first * second / a).sum(-1)
    lower = np.exp(first**2 / b).sum(-1) + np.exp((first * first.sum(-1, keepdims=True) - first**2) / c).sum(-1)
    first, second = (jnp.asarray(value, jnp.float32) for value in (first, second))
    np.testing.assert_allclose(contrastive_loss(first, second, (a, b, c)), -np.log(upper / lower).mean(), rtol=1e-5)
    assert float(contrastive_loss(first, first)) < float(contrastive_loss(first, -first))
