"""DiffPIR: denoise, fit the measurement in closed form while staying near, and add part of the noise back."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.fidelity import Operator
from jaxmed.diffusion.posterior.guidance import begin, make_info, proximal_fit
from jaxmed.diffusion.posterior.info import Info
from jaxmed.diffusion.samplers import Ddim, draw_noise, grid, sample_keys


@dataclasses.dataclass(frozen=True)
class Diffpir:
    """Settings of DiffPIR.

    Attributes:
        noise_std: Of the measurement's white noise, in its units.
        strength: lambda: how much the prior's image weighs; its weight is lambda noise_std^2 alpha^2 / sigma^2.
        renewal: zeta: share of the noise's variance that is drawn anew in a step.
        solver_steps: Steps of conjugate gradients for the fit; they do not touch the network.
        num_steps: Steps, each one evaluation of the network.
        times: Descending times to visit, in place of the schedule's own grid.

    Source: DiffPIR, arXiv:2305.08995, algorithm 1; lambda and zeta as in deepinv.
    """

    noise_std: float = 0.01
    strength: float = 7.0
    renewal: float = 0.1
    solver_steps: int = 20
    num_steps: int = 100
    times: tuple[float, ...] | None = None

    def __post_init__(self):
        for name in ("noise_std", "strength"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.renewal <= 1:
            raise ValueError(f"renewal: expected a number in [0, 1], got {self.renewal}")
        if self.solver_steps < 1:
            raise ValueError(f"solver_steps: expected 1 or more, got {self.solver_steps}")
        Ddim(self.num_steps, times=self.times)  # checks both


def diffpir(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Operator,
    initial: Float[Array, "batch ..."],
    config: Diffpir,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Draw images from a prior that fit their measurements.

    Args:
        key: Consumed.
        denoiser: The prior.
        measurement: y.
        operator: A, of one image; one that is not linear is linearised at the denoised image.
        initial: Gives the shape; zeros begin in pure noise. Anything else is noised to the first time.
        config: Settings.
        indices: Numbers of the samples, which name their random numbers; 0 to batch - 1 when absent.

    Returns:
        The images, and the run's record: residuals before the fit, step sizes the weights of the prior's image.
    """
    batch, schedule = len(initial), denoiser.schedule
    keys = sample_keys(key, jnp.arange(batch) if indices is None else indices)
    sampler = Ddim(config.num_steps, times=config.times)
    times = grid(schedule, sampler)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)

    def advance(x: Float[Array, "batch ..."], row) -> tuple[Array, Array]:
        time, alpha, sigma, weight, next_alpha, next_sigma, left = row
        mean = denoiser.denoise(x, jnp.full(batch, time))
        fitted, residual = proximal_fit(operator, mean, measurement, weight, config.solver_steps)
        noise = (x - alpha * fitted) / sigma
        fresh = draw_noise(keys, left, x.shape[1:], x.dtype)
        blend = jnp.sqrt(1 - config.renewal) * noise + jnp.sqrt(config.renewal) * fresh
        return (next_alpha * fitted + next_sigma * blend).astype(x.dtype), residual

    real = jnp.promote_types(initial.dtype, jnp.float32)
    weight = config.strength * config.noise_std**2 * (alpha / sigma) ** 2
    next_alpha, next_sigma = jnp.append(alpha[1:], 1.0), jnp.append(sigma[1:], 0.0)
    columns = [jnp.asarray(column, real) for column in (times, alpha, sigma, weight, next_alpha, next_sigma)]
    left = jnp.arange(len(times))[::-1]
    image, residuals = jax.lax.scan(advance, begin(keys, schedule, sampler, initial), (*columns, left))
    return image, make_info(residuals, jnp.broadcast_to(columns[3][:, None], residuals.shape), len(times))
