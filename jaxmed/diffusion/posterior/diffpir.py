"""DiffPIR: denoise, fit the measurement in closed form while staying near, and add part of the noise back."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.config import Positive, Share, Size, checked
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.fidelity import Operator
from jaxmed.diffusion.posterior.frame import Info, begin, proximal_fit, root_keys, walk
from jaxmed.diffusion.samplers import Ddim, draw_noise, grid


@dataclasses.dataclass(frozen=True)
@checked
class Diffpir:
    """Settings of DiffPIR.

    Attributes:
        noise_std: Deviation of the measurement's white noise, in its units.
        strength: lambda: how much the prior's image weighs; its weight is lambda noise_std^2 alpha^2 / sigma^2.
        renewal: zeta: share of the noise's variance that is drawn anew in a step.
        solver_steps: Steps of conjugate gradients for the fit; they do not touch the network.
        num_steps: Steps, each one evaluation of the network.
        times: Descending times to visit, in place of the schedule's own grid.

    Source: DiffPIR, arXiv:2305.08995, algorithm 1; lambda and zeta as in deepinv.
    """

    noise_std: Positive = 0.01
    strength: Positive = 7.0
    renewal: Share = 0.1
    solver_steps: Size = 20
    num_steps: Size = 100
    times: tuple[float, ...] | None = None

    def __post_init__(self):
        Ddim(self.num_steps, times=self.times)  # checks the times


def diffpir(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Operator,
    initial: Float[Array, "batch ..."],
    config: Diffpir,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Draw images from a prior that fit their measurements; see `jaxmed.diffusion.posterior` for the arguments.

    An operator that is not linear is linearised at the denoised image. The record holds residuals before the fit, and
    as step sizes the weights of the prior's image.
    """
    batch, schedule = len(initial), denoiser.schedule
    keys, sampler = root_keys(key, initial, indices), Ddim(config.num_steps, times=config.times)
    times = grid(schedule, sampler)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    weight = config.strength * config.noise_std**2 * (alpha / sigma) ** 2

    def advance(x: Float[Array, "batch ..."], row) -> tuple[Array, Array]:
        time, alpha, sigma, weight, next_alpha, next_sigma, left = row
        mean = denoiser.denoise(x, jnp.full(batch, time))
        fitted, residual = proximal_fit(operator, mean, measurement, weight, config.solver_steps)
        noise = (x - alpha * fitted) / sigma
        fresh = draw_noise(keys, left, x.shape[1:], x.dtype)
        blend = jnp.sqrt(1 - config.renewal) * noise + jnp.sqrt(config.renewal) * fresh
        return (next_alpha * fitted + next_sigma * blend).astype(x.dtype), residual

    columns = (times, alpha, sigma, weight, np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0))
    return walk(advance, begin(keys, schedule, sampler, initial), columns, initial.dtype, weight)
