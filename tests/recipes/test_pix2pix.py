"""pix2pix: whose gradient is whose, and a map that can be learnt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.patch_discriminator import PatchDiscriminatorConfig, patch_discriminator
from jaxmed.models.unet_guided import GuidedUnetConfig
from jaxmed.recipes.pix2pix import Pix2PixConfig, fit_pix2pix, pix2pix_loss, translate_image

pytestmark = pytest.mark.core

CONFIG = Pix2PixConfig(
    steps=150, peak_lr=3e-3,
    model=GuidedUnetConfig(dimensions=2, width=8, multipliers=(1, 2), blocks=1, attention_factors=(), groups=4,
                           with_time=False),
    discriminator=PatchDiscriminatorConfig(dimensions=2, channels=2, width=4, layers=1),
)  # fmt: skip


def test_no_gradient_meets_the_wrong_network():
    source, target = jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 1))
    critic = patch_discriminator(CONFIG.discriminator)
    both = jnp.concatenate([source, target], -1)
    params = {"generator": {"gain": jnp.float32(0.5)}, "discriminator": jax.jit(critic.init)(jax.random.key(1), both)}

    def generate(own, image):
        return own["gain"] * image

    gradient, error = jax.jit(
        lambda params: jax.grad(pix2pix_loss, 3, has_aux=True)(generate, critic.apply, 7.0, params, source, target)
    )(params)
    assert float(error) == pytest.approx(float(jnp.abs(0.5 * source - target).mean()), rel=1e-5)

    def alone(gain):
        made = gain * source
        logits = critic.apply(params["discriminator"], jnp.concatenate([source, made], -1))
        real = jax.nn.leaky_relu(logits, 0.05) - 1
        return 7.0 * jnp.abs(made - target).mean() + jnp.square(real).mean()

    expected = jax.jit(jax.grad(alone))(jnp.float32(0.5))
    assert float(gradient["generator"]["gain"]) == pytest.approx(float(expected), rel=1e-3)

    def judged(opponent):
        fake, real = (
            jax.nn.leaky_relu(critic.apply(opponent, jnp.concatenate([source, image], -1)), 0.05)
            for image in (0.5 * source, target)
        )
        return 0.5 * (jnp.square(fake).mean() + jnp.square(real - 1).mean())

    expected = jax.jit(jax.grad(judged))(params["discriminator"])
    for one, other in zip(jax.tree.leaves(gradient["discriminator"]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 + 1e-3 * float(jnp.abs(other).max()))


def test_a_pointwise_map_is_learnt():
    source = jax.random.normal(jax.random.key(2), (8, 8, 8, 1))
    target = -0.7 * source + 0.3
    params, errors = fit_pix2pix(jax.random.key(3), source, target, CONFIG)
    assert float(errors[-20:].mean()) < 0.35 * float(errors[:5].mean())
    made = jax.jit(lambda params, image: translate_image(CONFIG, params, image))(params, source)
    assert np.corrcoef(np.ravel(made), np.ravel(target))[0, 1] > 0.9


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="two channels"):
        dataclasses.replace(CONFIG, discriminator=PatchDiscriminatorConfig(dimensions=2))
    with pytest.raises(ValueError, match="no time"):
        dataclasses.replace(CONFIG, model=GuidedUnetConfig())
