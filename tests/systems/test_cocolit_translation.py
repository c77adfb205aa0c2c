"""Translation on arrays: the call, what steers it, and what is averaged; tiny random networks."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmed.diffusion.averaging import average_samples
from jaxmed.diffusion.denoiser import make_denoiser
from jaxmed.diffusion.samplers import Ddim
from jaxmed.models.unet_latent import latent_unet
from jaxmed.systems import cocolit
from jaxmed.systems.cocolit.networks import (
    TINY_SAMPLES,
    TINY_SAMPLING,
    TINY_SIZE,
    WeightsConfig,
    read_models,
    write_tiny_models,
)
from jaxmed.systems.cocolit.translation import CHAIN, CLIP, SamplingConfig, encode, make_decoder
from jaxmed.train.mesh import MeshConfig, make_mesh

# Sizes and samples are the smoke preset's, so that one program serves this file and the stages.
MRI = jax.random.normal(jax.random.key(5), TINY_SIZE)
CONFIG, SAMPLES = TINY_SAMPLING, TINY_SAMPLES
ODD = (18, 16, 16)
"""Of which the latent, 9 x 8 x 8, is padded to 10 x 8 x 8."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return jax.device_put(read_models(WeightsConfig(write_tiny_models(tmp_path_factory.mktemp("tiny"), 0))))


def translated(models, mri, key):
    return cocolit.translate(key, models, mri, SAMPLES, CONFIG)


def silenced(models):
    """Return networks whose ControlNet is as training begins: all residuals are 0."""
    params = {
        name: jax.tree.map(jnp.zeros_like, part) if name.startswith(("skip_", "after_middle")) else part
        for name, part in models.controlnet.params.items()
    }
    return models._replace(controlnet=dataclasses.replace(models.controlnet, params=params))


def test_the_call_of_the_docs(models):
    key, mri, m = jax.random.key(0), MRI, SAMPLES
    found = cocolit.translate(key, models, mri, m, CONFIG)
    assert found.suvr.shape == mri.shape and found.spread.shape == mri.shape
    assert bool(jnp.isfinite(found.suvr).all()) and float(found.spread.min()) >= 0
    assert found.latent.shape == (8, 8, 8, 4) and 0 < float(found.at_limit) < 1
    decode = jax.jit(lambda models, latent: make_decoder(models, MRI)(latent))
    np.testing.assert_allclose(found.suvr, decode(models, found.latent), rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(found.suvr - found.mean_map).max()) > 0  # the bias of averaging latents


def test_the_mri_counts_only_through_the_controlnet(models, key):
    other = MRI[::-1]
    steered = [translated(models, mri, key).latent for mri in (MRI, other)]
    assert float(jnp.abs(steered[0] - steered[1]).max()) > 1e-3
    quiet = [translated(silenced(models), mri, key).latent for mri in (MRI, other)]
    np.testing.assert_allclose(quiet[0], quiet[1], atol=1e-6)
    unet = latent_unet(models.unet.config)
    sampler = Ddim(times=CHAIN.leading_times(CONFIG.steps))

    @jax.jit
    def draw(params, key):
        alone = make_denoiser(lambda z, t: unet.apply(params, z, t), CHAIN)
        return average_samples(key, alone, (8, 8, 8, 4), sampler, SAMPLES, chunk=CONFIG.chunk, clip=CLIP)

    np.testing.assert_allclose(quiet[0], draw(models.unet.params, key).mean, atol=1e-5)


def test_the_latent_of_an_mri_is_the_mean_in_a_border_of_zeros(models):
    """Of 9 voxels, padded to what halves twice: one of 0 before, two after."""
    deeper = dataclasses.replace(models.unet.config, **{
        name: getattr(models.unet.config, name)[:1] * 3 for name in ("widths", "blocks", "attention_levels")
    })  # fmt: skip
    padded = models._replace(unet=dataclasses.replace(models.unet, config=deeper))
    latent = np.asarray(jax.jit(encode)(padded, jax.random.normal(jax.random.key(7), ODD)))
    assert latent.shape == (12, 8, 8, 4)
    inner = latent[1:-2]
    assert inner.all() and np.abs(latent).sum() == pytest.approx(np.abs(inner).sum(), rel=1e-5)


def along(step, models, key):
    """Return a number of the map of an MRI that is moved along a direction; clipping would give it kinks."""
    config = SamplingConfig(steps=2, chunk=2, clip=False, spread=False)
    mri, direction = (jax.random.normal(jax.random.key(number), ODD) for number in (5, 6))
    found = cocolit.translate(key, models, mri + step * direction, 2, config)
    return jnp.mean(jnp.tanh(found.latent))


def test_the_call_composes_with_jit_vmap_and_grad(models, key):
    slope = jax.jit(jax.vmap(jax.grad(along), (0, None, None)))
    assert jax.eval_shape(slope, jnp.zeros(3), models, key).shape == (3,)


@pytest.mark.slow
def test_the_slope_of_the_whole_chain_is_that_of_finite_differences(models, key):
    slope = jax.jit(jax.value_and_grad(along))
    low, middle, high = (slope(step, models, key) for step in (-0.05, 0.0, 0.05))
    np.testing.assert_allclose(middle[1], (high[0] - low[0]) / 0.1, rtol=0.03)


@pytest.mark.slow
def test_samples_spread_over_devices_give_the_same_map(models, key):
    """Two steps alone: rounding of one device's batch and another's grows with every step."""
    sharding = NamedSharding(make_mesh(MeshConfig(data=2)), PartitionSpec("data"))
    config = SamplingConfig(steps=2, chunk=2)
    one, two = (cocolit.translate(key, models, MRI, SAMPLES, config, place) for place in (None, sharding))
    for name in ("suvr", "spread", "mean_map", "latent"):
        np.testing.assert_allclose(getattr(two, name), getattr(one, name), atol=1e-3)


def test_networks_that_do_not_belong_together_are_refused(models, tmp_path):
    folder = Path(write_tiny_models(tmp_path, 1))
    with pytest.raises(Exception, match="expected the U-Net of latents .dif.pth., found a controlnet of cocolit"):
        read_models(WeightsConfig(folder, unet=folder / "cnt"))
    with pytest.raises(Exception, match="none named cnt"):
        (folder / "cnt").rename(folder / "other")
        read_models(WeightsConfig(folder))
