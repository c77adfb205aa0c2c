"""Losses of autoencoders of latent diffusion: closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.objectives.autoencoding import (
    discriminator_loss,
    least_squares,
    normal_divergence,
    time_weight,
    weighted_absolute_error,
)

pytestmark = pytest.mark.core


def test_divergence_is_that_of_normal_distributions_summed_over_a_latent():
    standard = normal_divergence(jnp.zeros((2, 3, 3, 4)), jnp.ones((2, 3, 3, 4)))
    np.testing.assert_array_equal(standard, np.zeros(2))
    generator = np.random.default_rng(0)
    mean, deviation = generator.normal(size=(2, 5, 3)), generator.uniform(0.2, 2, (2, 5, 3))
    found = normal_divergence(jnp.asarray(mean, jnp.float32), jnp.asarray(deviation, jnp.float32))
    # By quadrature: the integral of p log(p / q).
    x = np.linspace(-12, 12, 20_001)
    p = np.exp(-0.5 * ((x - mean[..., None]) / deviation[..., None]) ** 2) / (deviation[..., None] * np.sqrt(2 * np.pi))
    log_ratio = -0.5 * ((x - mean[..., None]) / deviation[..., None]) ** 2 - np.log(deviation[..., None]) + 0.5 * x**2
    np.testing.assert_allclose(found, np.trapezoid(p * log_ratio, x).sum((1, 2)), rtol=1e-4)


@pytest.mark.parametrize(("logit", "expected"), [(-2.0, 1.21), (1.0, 0.0), (0.0, 1.0), (3.0, 4.0)])
def test_the_autoencoder_wants_rectified_logits_of_1(logit, expected):
    assert float(least_squares(jnp.full((2, 3, 3, 1), logit), 1.0)) == pytest.approx(expected, rel=1e-6)


def test_the_discriminator_wants_1_of_real_images_and_0_of_others():
    logits = [jnp.full((2, 3, 1), value) for value in (1.0, 0.0, 0.5, -2.0)]
    assert float(discriminator_loss(logits[0], logits[1])) == 0
    assert float(discriminator_loss(logits[2], logits[2])) == pytest.approx(0.25)
    assert float(discriminator_loss(logits[1], logits[3])) == pytest.approx(0.5 * (1 + 0.01), rel=1e-6)


def test_images_count_by_what_is_left_of_the_chain():
    weight = time_weight(jnp.array([0.0, 500.0, 999.0]), 1000)
    np.testing.assert_allclose(weight, [1.0, 0.5, 0.001], rtol=1e-6)
    found, image = jnp.zeros((3, 2, 2, 1)), jnp.array([1.0, -2.0, 4.0])[:, None, None, None] * jnp.ones((3, 2, 2, 1))
    assert float(weighted_absolute_error(found, image, weight)) == pytest.approx((1 + 1 + 0.004) / 3, rel=1e-6)
    assert float(weighted_absolute_error(image, image, weight)) == 0
    plain = float(weighted_absolute_error(found, image, jnp.ones(3)))
    assert plain == pytest.approx(7 / 3, rel=1e-6)
    # Linear in the weights.
    assert float(weighted_absolute_error(found, image, jnp.full(3, 0.25))) == pytest.approx(plain / 4, rel=1e-6)
