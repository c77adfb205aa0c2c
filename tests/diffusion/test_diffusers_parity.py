"""Live parity of chains and samplers with diffusers' schedulers: the same network, the same noise, every step."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.diffusion.denoiser import make_denoiser
from jaxmed.diffusion.samplers import (
    Ancestral,
    Ddim,
    DpmSolver,
    Heun,
    SamplerState,
    draw_noise,
    grid,
    plan,
    sample_keys,
    step,
)
from jaxmed.diffusion.schedule import Edm, VpDiscrete

# Old ways of making arrays are theirs to mend.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")]
CHAIN = VpDiscrete()


@pytest.fixture(scope="module")
def diffusers():
    pytest.importorskip("diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler

        assert all((DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler))
    return diffusers


def network(x, t):
    """Noise of some image, in NumPy, PyTorch or JAX alike."""
    return 0.9 * x * (0.2 + 0.0008 * t) + 0.05


def walk(sampler, schedule=CHAIN):
    """Our states after every step, from the same start, and the noise of every step."""
    denoiser = make_denoiser(lambda x, t: network(x, t[:, None]), schedule, "epsilon")
    keys = sample_keys(jax.random.key(0), jnp.arange(3))
    steps = plan(schedule, sampler)
    x = 0.8 * draw_noise(keys, 5000, (4,))
    states, noises = [np.asarray(x)], []
    state = SamplerState(x, jnp.zeros_like(x))
    move = jax.jit(lambda state, row: step(keys, denoiser, state, row))
    for values in zip(*steps, strict=True):
        row = type(steps)(*values)
        state = move(state, row)
        states.append(np.asarray(state.x))
        noises.append(np.asarray(draw_noise(keys, int(row.left), (4,))))
    return grid(schedule, sampler), states, noises


def compare(states, theirs, tolerance=2e-5):
    assert len(states) == len(theirs)
    for ours, other in zip(states, theirs, strict=True):
        np.testing.assert_allclose(ours, other, rtol=tolerance, atol=tolerance)


def test_cosine_and_linear_tables(diffusers):
    for ours, name in (("cosine", "squaredcos_cap_v2"), ("linear", "linear")):
        scheduler = diffusers.DDPMScheduler(1000, beta_schedule=name)
        np.testing.assert_allclose(VpDiscrete(betas=ours).beta_table, scheduler.betas.numpy(), rtol=2e-5)
        found = VpDiscrete(betas=ours).alpha_bar_table
        np.testing.assert_allclose(found, scheduler.alphas_cumprod.numpy(), rtol=2e-3, atol=1e-7)


def test_ddpm_with_large_variance(diffusers, monkeypatch):
    import torch
    from diffusers.schedulers import scheduling_ddpm

    times = tuple(float(t) for t in range(960, -1, -40))
    _, states, noises = walk(Ancestral(times=times))
    scheduler = diffusers.DDPMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", variance_type="fixed_large", clip_sample=False
    )
    scheduler.set_timesteps(timesteps=[int(t) for t in times])
    x = torch.tensor(states[0])
    theirs = [x.numpy()]
    for time, noise in zip(times, noises, strict=True):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, noise=noise, **kwargs: torch.tensor(noise))
        x = scheduler.step(network(x, time), int(time), x).prev_sample
        theirs.append(x.numpy())
    compare(states, theirs)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim(diffusers, eta):
    import torch

    scheduler = diffusers.DDIMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading"
    )
    scheduler.set_timesteps(50)
    times = tuple(float(t) for t in scheduler.timesteps)
    _, states, noises = walk(Ddim(eta=eta, times=times))
    x = torch.tensor(states[0])
    theirs = [x.numpy()]
    for time, noise in zip(times, noises, strict=True):
        extra = {"variance_noise": torch.tensor(noise)} if eta else {}
        x = scheduler.step(network(x, time), int(time), x, eta=eta, **extra).prev_sample
        theirs.append(x.numpy())
    compare(states, theirs)


@pytest.mark.parametrize("count", [8, 20])
def test_dpm_solver_multistep(diffusers, count):
    import torch

    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000, beta_schedule="squaredcos_cap_v2", algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(count)
    times = tuple(float(t) for t in scheduler.timesteps)
    _, states, _ = walk(DpmSolver(times=times))
    x = torch.tensor(states[0])
    theirs = [x.numpy()]
    for time in scheduler.timesteps:
        x = scheduler.step(network(x, float(time)), time, x).prev_sample
        theirs.append(x.numpy())
    compare(states, theirs, 5e-4)


def test_edm_grid_and_euler(diffusers):
    import torch

    schedule = Edm()
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(18)
    np.testing.assert_allclose(schedule.times(18), scheduler.sigmas[:-1].numpy(), rtol=1e-4)
    denoiser = make_denoiser(lambda x, t: 0.3 * x + 0.1 * t[:, None], schedule, "edm")
    keys = sample_keys(jax.random.key(0), jnp.arange(3))
    x = 80.0 * draw_noise(keys, 5000, (4,))
    state, other = SamplerState(x, jnp.zeros_like(x)), torch.tensor(np.asarray(x))
    steps = plan(schedule, Heun(18, order=1))
    for index, time in enumerate(scheduler.timesteps):
        state = step(keys, denoiser, state, type(steps)(*(column[index] for column in steps)), has_noise=False)
        scaled = scheduler.scale_model_input(other, time)
        other = scheduler.step(0.3 * scaled + 0.1 * time, time, other).prev_sample
        np.testing.assert_allclose(state.x, other.numpy(), rtol=1e-4, atol=1e-4)
