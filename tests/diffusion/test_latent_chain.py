"""The chain of latent diffusion (CoCoLIT): its printed values, DDIM's times, and what clipping does to a step."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.diffusion.denoiser import Denoiser, make_denoiser
from jaxmed.diffusion.samplers import Ancestral, Ddim, SamplerState, plan, run
from jaxmed.diffusion.schedule import VpDiscrete

pytestmark = pytest.mark.core
CHAIN = VpDiscrete(betas="scaled-linear")
# t: abar, as the specification prints it.
PRINTED = {0: 0.9985, 20: 0.967289, 100: 0.821773, 500: 0.107677, 980: 1.42899e-4, 999: 9.69109e-5}
CLIP = (-1.0, 1.0)
KEYS = jax.random.split(jax.random.key(0), 3)
STORED = np.load(Path(__file__).parents[1] / "references" / "monai_ddim.npz")  # made by make_monai_ddim.py
START = jnp.asarray(STORED["start"])


def sampled(denoiser, steps=50, clip=None):
    sampler = Ddim(times=CHAIN.leading_times(steps))
    return jax.jit(lambda x: run(KEYS, denoiser, SamplerState(x, jnp.zeros_like(x)), sampler, clip))(START)


def network(x, t):
    """Noise of some image, in NumPy, PyTorch or JAX alike."""
    return 0.9 * x * (0.2 + 0.0008 * t) + 0.05


def test_the_chain_has_the_printed_values():
    found = CHAIN.alpha_bar_table
    for t, value in PRINTED.items():
        np.testing.assert_allclose(found[t], value, rtol=5e-6)  # as many digits are printed
    # The reference adds up float32.
    betas = np.linspace(np.sqrt(0.0015), np.sqrt(0.0205), 1000, dtype=np.float32) ** 2
    np.testing.assert_allclose(found, np.cumprod(1 - betas, dtype=np.float32), rtol=2e-4)
    with pytest.raises(ValueError, match="ends"):
        VpDiscrete(betas="scaled-linear", ends=(0.0, 0.02))


@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_times_are_multiples_of_a_stride_down_to_zero(steps):
    stride = 1000 // steps
    assert CHAIN.leading_times(steps) == tuple(range(1000 - stride, -1, -stride))
    rows = plan(CHAIN, Ddim(times=CHAIN.leading_times(steps)))
    np.testing.assert_allclose(rows.next_alpha[:-1] ** 2, CHAIN.alpha_bar_table[rows.time[1:].astype(int)], rtol=1e-9)
    assert rows.next_alpha[-1] == 1 and not rows.noise.any()
    with pytest.raises(ValueError, match="num_steps"):
        CHAIN.leading_times(1001)


@pytest.mark.parametrize("steps", [2, 50])
def test_the_true_noise_of_an_image_leads_to_it(steps):
    image = jnp.linspace(-0.9, 0.9, 8).reshape(2, 4)
    denoiser = Denoiser(lambda x, t: jnp.broadcast_to(image, x.shape), CHAIN)
    for clip in (None, CLIP):
        np.testing.assert_allclose(sampled(denoiser, steps, clip), jnp.broadcast_to(image, (3, 2, 4)), atol=1e-5)


def test_added_noise_is_taken_off_again():
    image, noise = 0.3 * START, START[::-1]
    for t in (0, 20, 500, 980):
        alpha, sigma = (float(level(np.array([t]))[0]) for level in (CHAIN.alpha, CHAIN.sigma))
        exact = make_denoiser(lambda x, t: noise, CHAIN)
        found = exact.denoise(alpha * image + sigma * noise, jnp.full(3, float(t)))
        np.testing.assert_allclose(found, image, atol=1e-5 / alpha)


def test_without_noise_the_start_grows_and_clipping_holds_it():
    silent = make_denoiser(lambda x, t: jnp.zeros_like(x), CHAIN)
    grown = START / np.sqrt(PRINTED[980])
    np.testing.assert_allclose(1 / np.sqrt(PRINTED[980]), 83.65, atol=0.005)
    np.testing.assert_allclose(sampled(silent), grown, rtol=1e-5)
    np.testing.assert_allclose(sampled(silent, clip=CLIP), jnp.clip(grown, -1, 1), atol=5e-5)


def ddim(x, clip):
    """The textbook's steps in NumPy: the image is clipped, the noise is the network's."""
    product = np.cumprod(1 - CHAIN.beta_table)
    for t in range(980, -1, -20):
        eps = network(x, t)
        image = (x - np.sqrt(1 - product[t]) * eps) / np.sqrt(product[t])
        image = np.clip(image, *clip) if clip else image
        before = product[t - 20] if t else 1.0
        x = np.sqrt(before) * image + np.sqrt(1 - before) * eps
    return x


@pytest.mark.parametrize("clip", [None, CLIP], ids=["free", "clipped"])
def test_samples_are_the_textbooks_and_the_stored_ones(clip):
    denoiser = make_denoiser(lambda x, t: network(x, t[:, None, None]), CHAIN)
    found = sampled(denoiser, clip=clip)
    np.testing.assert_allclose(found, ddim(np.asarray(START, np.float64), clip), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, STORED["clipped" if clip else "free"][-1], rtol=1e-4, atol=1e-4)


def test_clipping_in_the_denoiser_is_another_thing():
    """It changes the expected noise too, and other samplers take no other."""
    denoiser = make_denoiser(lambda x, t: network(x, t[:, None, None]), CHAIN, clip=CLIP)
    free = denoiser._replace(denoise=make_denoiser(lambda x, t: network(x, t[:, None, None]), CHAIN).denoise)
    assert float(jnp.abs(sampled(denoiser) - sampled(free, clip=CLIP)).max()) > 0.01
    with pytest.raises(ValueError, match="clip: expected none for Ancestral"):
        run(KEYS, denoiser, SamplerState(START, START), Ancestral(), CLIP)
