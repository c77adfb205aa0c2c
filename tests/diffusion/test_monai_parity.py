"""Live parity of the latent chain and DDIM with MONAI's schedulers: the same network, every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.diffusion.denoiser import make_denoiser
from jaxmed.diffusion.samplers import Ddim, SamplerState, plan, step
from jaxmed.diffusion.schedule import VpDiscrete

pytestmark = pytest.mark.peers
CHAIN = VpDiscrete(betas="scaled-linear")


def network(x, t):
    """Noise of some image, in NumPy, PyTorch or JAX alike."""
    return 0.9 * x * (0.2 + 0.0008 * t) + 0.05


@pytest.mark.parametrize("clip", [False, True], ids=["free", "clipped"])
@pytest.mark.parametrize("count", [10, 50])
def test_every_step_of_ddim(count, clip):
    torch = pytest.importorskip("torch")
    schedulers = pytest.importorskip("monai.networks.schedulers")
    scheduler = schedulers.DDIMScheduler(
        1000, "scaled_linear_beta", clip_sample=clip, beta_start=0.0015, beta_end=0.0205
    )
    scheduler.set_timesteps(count)
    times = CHAIN.leading_times(count)
    # The times are those that CoCoLIT meets; this release begins at 999, with strides that its steps do not have.
    assert times[0] == 1000 - 1000 // count and len(times) == len(scheduler.timesteps)
    np.testing.assert_allclose(CHAIN.alpha_bar_table, scheduler.alphas_cumprod.numpy(), rtol=2e-4)
    start = jax.random.normal(jax.random.key(1), (3, 4))
    denoiser = make_denoiser(lambda x, t: network(x, t[:, None]), CHAIN)
    keys, steps = jax.random.split(jax.random.key(0), 3), plan(CHAIN, Ddim(times=times))
    move = jax.jit(lambda state, row: step(keys, denoiser, state, row, False, (-1.0, 1.0) if clip else None))
    state, theirs = SamplerState(start, jnp.zeros_like(start)), torch.tensor(np.asarray(start))
    for row, time in zip(zip(*steps, strict=True), times, strict=True):
        state = move(state, type(steps)(*row))
        theirs = scheduler.step(network(theirs, int(time)), int(time), theirs)[0]
        np.testing.assert_allclose(state.x, theirs.numpy(), rtol=2e-4, atol=2e-5)
