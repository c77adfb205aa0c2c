"""Measures of invented structure: exact splits, counted lesions, a score that finds what PSNR does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.metrics.hallucination import (
    LesionConfig,
    ShafeConfig,
    derivative_features,
    false_lesions,
    lesion_contrast,
    low_pass,
    relative_volume_errors,
    shafe_score,
    split_error,
)
from jaxmed.metrics.imaging import psnr

pytestmark = pytest.mark.core
RNG = np.random.default_rng(3)
score = jax.jit(lambda truth, estimate: shafe_score(truth, estimate, None, ShafeConfig(radius=14.0)))


def test_the_split_is_that_of_a_matrix():
    matrix = RNG.normal(size=(6, 16)).astype(np.float32)
    inverse = np.linalg.pinv(matrix).astype(np.float32)
    error = RNG.normal(size=(4, 4)).astype(np.float32)
    parts = split_error(
        jnp.asarray(error), lambda e: matrix @ e.ravel(), lambda y: jnp.asarray(inverse @ y).reshape(4, 4)
    )
    np.testing.assert_allclose(parts.measured + parts.null, error, atol=1e-6)
    np.testing.assert_allclose(matrix @ np.asarray(parts.null).ravel(), 0, atol=1e-5)
    np.testing.assert_allclose(matrix @ np.asarray(parts.measured).ravel(), matrix @ error.ravel(), atol=1e-4)
    # Orthogonal parts: Pythagoras.
    assert parts.measured_norm**2 + parts.null_norm**2 == pytest.approx((error**2).sum(), rel=1e-5)


def test_a_mask_sees_what_it_keeps():
    keep = np.zeros((5, 5), np.float32)
    keep[:2] = 1
    parts = split_error(jnp.ones((5, 5)), lambda e: keep * e, lambda y: keep * y)
    assert parts.measured_norm == pytest.approx(np.sqrt(10)) and parts.null_norm == pytest.approx(np.sqrt(15))


def blob(center, radius, shape=(48, 48)):
    grid = np.indices(shape) - np.reshape(center, (2, 1, 1))
    return (grid**2).sum(0) <= radius**2


TRUTH = (0.5 + 0.5 * blob((24, 24), 18)).astype(np.float32)
MASK, NONE = blob((24, 24), 20), np.zeros((48, 48), bool)


def test_invented_lesions_are_counted_and_true_ones_are_not():
    first, second = blob((18, 18), 3), blob((32, 28), 4)
    estimate = TRUTH + 0.5 * first - 0.5 * second
    found = false_lesions(TRUTH, estimate, MASK, NONE)
    assert found.count == 2 and found.volume >= 20 and found.peak > 0.25
    known = false_lesions(TRUTH, estimate, MASK, second)
    assert known.count == 1 and known.volume < found.volume
    assert false_lesions(TRUTH, TRUTH, MASK, NONE) == (0, 0, 0.0)
    outside = false_lesions(TRUTH, TRUTH + blob((3, 3), 3), MASK, NONE)
    assert outside.count == 0


def test_noise_is_no_lesion_and_specks_are_too_small():
    noisy = TRUTH + RNG.normal(scale=0.15, size=TRUTH.shape).astype(np.float32)
    assert false_lesions(TRUTH, noisy, MASK, NONE).count == 0
    # The same noise without the low-pass would be taken for lesions.
    assert false_lesions(TRUTH, noisy, MASK, NONE, LesionConfig(sigma=0.0, least_volume=1)).count > 10
    speck = TRUTH.copy()
    speck[24, 24] += 0.5
    assert false_lesions(TRUTH, speck, MASK, NONE, LesionConfig(sigma=0.0)).count == 0


def test_contrast_of_a_lesion_is_the_difference_of_means():
    lesion, around = blob((24, 24), 3), blob((24, 24), 7) & ~blob((24, 24), 5)
    image = jnp.asarray(TRUTH - 0.4 * lesion, jnp.float32)
    assert lesion_contrast(image, jnp.asarray(lesion), jnp.asarray(around)) == pytest.approx(-0.4, abs=1e-6)
    assert lesion_contrast(image, jnp.asarray(NONE), jnp.asarray(NONE)) == 0


def test_the_score_sees_a_lesion_where_the_mean_error_does_not():
    """Equal PSNR by construction: a blob of one sign against faint noise everywhere."""
    lesion = TRUTH + 0.4 * blob((20, 28), 3).astype(np.float32)
    noise = RNG.normal(size=TRUTH.shape)
    noise = (TRUTH + noise * np.sqrt(((lesion - TRUTH) ** 2).sum() / (noise**2).sum())).astype(np.float32)
    assert psnr(TRUTH, lesion, 2.0) == pytest.approx(psnr(TRUTH, noise, 2.0), abs=1e-4)
    assert score(TRUTH, TRUTH) == pytest.approx(0.0, abs=1e-5)
    smooth = {
        name: float(score(low_pass_of(TRUTH), low_pass_of(image)))
        for name, image in (("lesion", lesion), ("dimmed", np.float32(0.95) * TRUTH))
    }
    assert smooth["lesion"] > 3 * smooth["dimmed"]
    strong, weak = (float(score(TRUTH, TRUTH + np.float32(size) * blob((20, 28), 3))) for size in (0.4, 0.1))
    assert 0 < weak < strong <= 2


def low_pass_of(image):
    return np.asarray(low_pass(jnp.asarray(image), 14.0))


def test_low_pass_keeps_slow_waves_and_drops_fast_ones():
    x = np.arange(48) / 48
    slow, fast = (np.cos(2 * np.pi * periods * x)[:, None] + np.zeros(48) for periods in (5, 20))
    np.testing.assert_allclose(low_pass(jnp.asarray(slow + fast + 2, jnp.float32), 10.0), slow + 2, atol=1e-5)


def test_features_of_a_ramp_are_its_level_and_slope():
    ramp = jnp.asarray(0.1 * np.indices((40, 40))[0], jnp.float32)
    features = np.asarray(jax.jit(derivative_features)(ramp))
    assert features.shape == (40, 40, 21)
    np.testing.assert_allclose(features[20, 20, 0], 2.0, atol=1e-5)
    np.testing.assert_allclose(features[20, 20, [1, 8, 15]], [0.1, 0.2, 0.4], atol=1e-5)
    np.testing.assert_allclose(features[20, 20, [2, 3, 4]], 0, atol=1e-5)


def test_the_score_takes_other_features_and_weighs_the_worst_place():
    truth = jnp.ones((4, 4))
    estimate = truth.at[1, 2].set(-1.0)
    config = ShafeConfig(radius=9.0, temperature=0.01)
    sharp = shafe_score(truth, estimate, lambda image: image[..., None], config)
    assert sharp == pytest.approx(2.0, abs=1e-3)
    mild = shafe_score(truth, estimate, lambda image: image[..., None], ShafeConfig(radius=9.0, temperature=1e4))
    assert mild == pytest.approx(2 / 16, abs=1e-3)


def test_relative_volume_errors_are_by_tissue():
    found = relative_volume_errors({"white": 500.0, "grey": 600.0}, {"grey": 660.0, "white": 450.0})
    assert found == pytest.approx({"white": 0.1, "grey": 0.1})
    with pytest.raises(InputError, match="tissue volumes: expected of white, found of grey"):
        relative_volume_errors({"white": 1.0}, {"grey": 1.0})
    with pytest.raises(InputError, match="true volume of white: expected a positive number"):
        relative_volume_errors({"white": 0.0}, {"white": 1.0})


def test_unfit_arguments_are_refused():
    with pytest.raises(InputError, match="one shape"):
        false_lesions(TRUTH, TRUTH[:4], MASK, NONE)
    with pytest.raises(ValueError, match="threshold: expected a number above 0"):
        LesionConfig(threshold=0.0)
    with pytest.raises(ValueError, match="temperature: expected a number above 0"):
        ShafeConfig(temperature=0.0)
