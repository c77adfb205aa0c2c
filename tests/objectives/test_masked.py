"""The loss of a masked autoencoder: hidden patches alone count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.masking import draw_noise, random_masking
from jaxmed.arrays.patches import patchify
from jaxmed.models.mae import MaeConfig, MaeOutput, masked_model
from jaxmed.models.vit import VitConfig
from jaxmed.nn.model import Network
from jaxmed.objectives.masked import masked_loss, masked_targets

pytestmark = pytest.mark.core
ENCODER = VitConfig((8, 8, 8), (4, 4, 4), width=8, depth=1, heads=2, hidden=8)
CONFIG = MaeConfig(ENCODER, decoder_width=8, decoder_heads=2)
IMAGE = jax.random.uniform(jax.random.key(0), (3, 8, 8, 8, 1))
KEYS = jax.random.split(jax.random.key(1), 3)


def constant(value):
    """A model that predicts one value for every hidden voxel."""

    def apply(params, image, noise):
        masking = random_masking(noise, CONFIG.mask_ratio)
        return MaeOutput(jnp.zeros((3, 3, 8)), jnp.full((3, 6, 64), value), masking)

    return masked_model(CONFIG)._replace(network=Network(lambda key: {}, apply))


def hidden_patches():
    hidden = random_masking(draw_noise(KEYS, 8), 0.75).hidden
    patches = np.asarray(patchify(IMAGE, (4, 4, 4)))
    return np.stack([patch[index] for patch, index in zip(patches, hidden, strict=True)]), hidden


def test_loss_is_the_mean_over_hidden_patches_of_their_mean():
    loss, metrics = masked_loss(constant(0.3), {}, KEYS, {"image": IMAGE})
    patches, _ = hidden_patches()
    np.testing.assert_allclose(loss, ((patches - 0.3) ** 2).mean(axis=-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["target_variance"], patches.var(), rtol=1e-5)
    # The best constant has the variance as its loss.
    best, _ = masked_loss(constant(float(patches.mean())), {}, KEYS, {"image": IMAGE})
    np.testing.assert_allclose(best, metrics["target_variance"], rtol=1e-5)


def test_loss_ignores_visible_patches():
    _, hidden = hidden_patches()
    seen = sorted(set(range(8)) - set(hidden[0].tolist()))[0]
    d, h, w = np.unravel_index(seen, (2, 2, 2))
    changed = IMAGE.at[0, 4 * d : 4 * d + 4, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4].set(5.0)
    first, _ = masked_loss(constant(0.3), {}, KEYS, {"image": IMAGE})
    assert masked_loss(constant(0.3), {}, KEYS, {"image": changed})[0] == first
    assert masked_loss(constant(0.3), {}, KEYS, {"image": IMAGE + 1.0})[0] != first


def test_normalised_targets_have_mean_0_and_variance_1_with_ddof_1():
    config = MaeConfig(ENCODER, decoder_width=8, decoder_heads=2, norm_target=True, sigmoid=False)
    masking = random_masking(draw_noise(KEYS, 8), 0.75)
    found = masked_targets(masked_model(config), IMAGE, masking)
    patches, _ = hidden_patches()
    mean, variance = patches.mean(-1, keepdims=True), patches.var(-1, ddof=1, keepdims=True)
    np.testing.assert_allclose(found, (patches - mean) / np.sqrt(variance + 1e-6), atol=2e-5)


def test_masks_follow_the_keys_of_the_images():
    whole, _ = masked_loss(constant(0.3), {}, KEYS, {"image": IMAGE})
    turned, _ = masked_loss(constant(0.3), {}, KEYS[::-1], {"image": IMAGE[::-1]})
    np.testing.assert_allclose(turned, whole, rtol=1e-6)
    other, _ = masked_loss(constant(0.3), {}, jax.random.split(jax.random.key(2), 3), {"image": IMAGE})
    assert other != whole
