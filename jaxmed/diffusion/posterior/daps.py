"""DAPS: walk to an image, move it by Langevin steps until it fits the measurement, noise it a little less, and again.

Levels do not hang on each other but through the image between them, so that a run can mend early mistakes which a chain
carries on.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.config import Bounds, Positive, Size, checked
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.fidelity import Operator
from jaxmed.diffusion.posterior.frame import Info, linearise, residual_norms, root_keys, walk
from jaxmed.diffusion.samplers import draw_noise


@dataclasses.dataclass(frozen=True)
@checked
class Daps:
    """Settings of DAPS.

    Attributes:
        noise_std: Deviation of the measurement's white noise, in its units.
        num_levels: Noise levels.
        ode_steps: Euler steps from each level to an image, each one evaluation of the network.
        langevin_steps: Steps that fit that image to the measurement; they do not touch the network.
        langevin_step: Their size, as a share of the inverse of the largest curvature, 1 / r^2 + (gain / noise_std)^2; 2
            diverges. What the operator does not see stays near the image where it is small against r^2.
        gain: Largest singular value of the operator; 1 for one that averages.
        spread: r / (sigma / alpha): r is the standard deviation of an image given its noisy version.
        first_level: sigma / alpha of the first level.
        last_level: The last.
        rho: Levels are evenly spaced in their 1 / rho-th power.

    Source: DAPS, arXiv:2407.01521, algorithm 1: 5 ODE steps, rho 7, r = sigma.
    Deviation: Langevin steps have the size that is stable at each level, not one that falls by a rule of its own.
    """

    noise_std: Positive = 0.01
    num_levels: Size = 50
    ode_steps: Size = 5
    langevin_steps: Size = 50
    langevin_step: Annotated[float, Bounds(0, 2, above=True, below=True)] = 0.5
    gain: Positive = 1.0
    spread: Positive = 1.0
    first_level: float = 10.0
    last_level: Positive = 0.02
    rho: Positive = 7.0

    def __post_init__(self):
        if not self.first_level >= self.last_level:
            raise ValueError(f"first_level: expected last_level or more, got {self.first_level}")


def daps(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Operator,
    initial: Float[Array, "batch ..."],
    config: Daps,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Draw images from a prior that fit their measurements; see `jaxmed.diffusion.posterior` for the arguments.

    Levels beyond the ends of the prior's schedule are its ends; an `initial` other than zeros is noised to the first
    level. The record holds the residuals of each level's image, and as step sizes those of its Langevin steps.
    """
    batch, keys = len(initial), root_keys(key, initial, indices)
    levels = spaced(config.first_level, config.last_level, config.num_levels, config.rho)
    times = denoiser.schedule.time_at(
        np.stack([spaced(level, config.last_level, config.ode_steps, config.rho) for level in levels])
    )
    alpha = denoiser.schedule.alpha(times)
    ratio = denoiser.schedule.sigma(times) / alpha
    # The noisy image of a level is x / alpha: its noise is the ratio, and the image itself comes after the last step.
    next_ratio = np.append(ratio[:, 1:], np.zeros((len(levels), 1)), axis=1)
    variance = (config.spread * ratio[:, 0]) ** 2
    size = config.langevin_step / (1 / variance + (config.gain / config.noise_std) ** 2)

    def fall(noisy: Float[Array, "batch ..."], row) -> tuple[Array, None]:
        time, alpha, ratio, next_ratio = row
        mean = denoiser.denoise((alpha * noisy).astype(noisy.dtype), jnp.full(batch, time))
        return (mean + next_ratio / ratio * (noisy - mean)).astype(noisy.dtype), None

    def advance(image: Float[Array, "batch ..."], row) -> tuple[Array, Array]:
        *ode, variance, size, level = row
        left = level * (config.langevin_steps + 1)
        fresh = draw_noise(keys, left + config.langevin_steps, image.shape[1:], image.dtype)
        noisy = (image + ode[2][0] * fresh).astype(image.dtype)
        centre, _ = jax.lax.scan(fall, noisy, tuple(ode))

        def move(image: Float[Array, "batch ..."], left: Int[Array, ""]) -> tuple[Array, None]:
            at = linearise(operator, image, measurement)
            uphill = at.vjp(at.residual) / config.noise_std**2 - (image - centre) / variance
            fresh = draw_noise(keys, left, image.shape[1:], image.dtype)
            return (image + size * uphill + jnp.sqrt(2 * size) * fresh).astype(image.dtype), None

        image, _ = jax.lax.scan(move, centre, left + jnp.arange(config.langevin_steps)[::-1])
        return image, residual_norms(operator, image, measurement)

    columns = (times, alpha, ratio, next_ratio, variance, size)
    return walk(advance, initial, columns, initial.dtype, size, cost=config.ode_steps)


def spaced(first: float, last: float, count: int, rho: float) -> Float[np.ndarray, " level"]:
    """Return levels from first to last, evenly spaced in their 1 / rho-th power; a single one is the first."""
    return np.linspace(first ** (1 / rho), last ** (1 / rho), count) ** rho
