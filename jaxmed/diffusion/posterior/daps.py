"""DAPS: walk to an image, move it by Langevin steps until it fits the measurement, noise it a little less, and again.

Levels do not hang on each other but through the image between them, so that a run can mend early mistakes which a chain
carries on.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.fidelity import Operator
from jaxmed.diffusion.posterior.guidance import linearise, make_info, residual_norms
from jaxmed.diffusion.posterior.info import Info
from jaxmed.diffusion.samplers import draw_noise, sample_keys


@dataclasses.dataclass(frozen=True)
class Daps:
    """Settings of DAPS.

    Attributes:
        noise_std: Of the measurement's white noise, in its units.
        num_levels: Noise levels.
        ode_steps: Euler steps from each level to an image, each one evaluation of the network.
        langevin_steps: Steps that fit that image to the measurement; they do not touch the network.
        langevin_step: Their size, as a share of the inverse of the largest curvature, 1 / r^2 + (gain / noise_std)^2; 2
            diverges. What the operator does not see stays near the image where it is small against r^2.
        gain: Largest singular value of the operator; 1 for one that averages.
        spread: r / (sigma / alpha): r is the standard deviation of an image given its noisy version.
        first_level: sigma / alpha of the first level.
        last_level: Of the last.
        rho: Levels are evenly spaced in their 1 / rho-th power.

    Source: DAPS, arXiv:2407.01521, algorithm 1: 5 ODE steps, rho 7, r = sigma.
    Deviation: Langevin steps have the size that is stable at each level, not one that falls by a rule of its own.
    """

    noise_std: float = 0.01
    num_levels: int = 50
    ode_steps: int = 5
    langevin_steps: int = 50
    langevin_step: float = 0.5
    gain: float = 1.0
    spread: float = 1.0
    first_level: float = 10.0
    last_level: float = 0.02
    rho: float = 7.0

    def __post_init__(self):
        for name in ("noise_std", "gain", "spread", "last_level", "rho"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("num_levels", "ode_steps", "langevin_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if not 0 < self.langevin_step < 2:
            raise ValueError(f"langevin_step: expected a number in (0, 2), got {self.langevin_step}")
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
    """Draw images from a prior that fit their measurements.

    Args:
        key: Consumed.
        denoiser: The prior. Levels beyond its schedule's ends are its ends.
        measurement: y.
        operator: A, of one image; any differentiable function.
        initial: Gives the shape; zeros begin in pure noise. Anything else is noised to the first level.
        config: Settings.
        indices: Numbers of the samples, which name their random numbers; 0 to batch - 1 when absent.

    Returns:
        The images, and the run's record: residuals of each level's image, step sizes those of its Langevin steps.
    """
    batch = len(initial)
    keys = sample_keys(key, jnp.arange(batch) if indices is None else indices)
    levels = spaced(config.first_level, config.last_level, config.num_levels, config.rho)
    walks = np.stack([spaced(level, config.last_level, config.ode_steps, config.rho) for level in levels])
    times = denoiser.schedule.time_at(walks)
    alpha = denoiser.schedule.alpha(times)
    ratio = denoiser.schedule.sigma(times) / alpha
    # The noisy image of a level is x / alpha: its noise is the ratio, and the image itself comes after the last step.
    next_ratio = np.append(ratio[:, 1:], np.zeros((len(levels), 1)), axis=1)
    variance = (config.spread * ratio[:, 0]) ** 2
    size = config.langevin_step / (1 / variance + (config.gain / config.noise_std) ** 2)
    per_level = config.langevin_steps + 1
    left = np.arange(len(levels))[::-1] * per_level

    def walk(noisy: Float[Array, "batch ..."], row) -> tuple[Array, None]:
        time, alpha, ratio, next_ratio = row
        mean = denoiser.denoise((alpha * noisy).astype(noisy.dtype), jnp.full(batch, time))
        return (mean + next_ratio / ratio * (noisy - mean)).astype(noisy.dtype), None

    def advance(image: Float[Array, "batch ..."], row) -> tuple[Array, Array]:
        rows, variance, size, left = row
        fresh = draw_noise(keys, left + config.langevin_steps, image.shape[1:], image.dtype)
        noisy = (image + rows[2][0] * fresh).astype(image.dtype)
        centre, _ = jax.lax.scan(walk, noisy, rows)

        def move(image: Float[Array, "batch ..."], left: Int[Array, ""]) -> tuple[Array, None]:
            at = linearise(operator, image, measurement)
            uphill = at.pull(at.misfit) / config.noise_std**2 - (image - centre) / variance
            fresh = draw_noise(keys, left, image.shape[1:], image.dtype)
            return (image + size * uphill + jnp.sqrt(2 * size) * fresh).astype(image.dtype), None

        image, _ = jax.lax.scan(move, centre, left + jnp.arange(config.langevin_steps)[::-1])
        return image, residual_norms(operator, image, measurement)

    real = jnp.promote_types(initial.dtype, jnp.float32)
    table = tuple(jnp.asarray(column, real) for column in (times, alpha, ratio, next_ratio))
    rows = (table, jnp.asarray(variance, real), jnp.asarray(size, real), jnp.asarray(left))
    image, residuals = jax.lax.scan(advance, initial, rows)
    sizes = jnp.broadcast_to(rows[2][:, None], residuals.shape)
    return image, make_info(residuals, sizes, config.num_levels * config.ode_steps)


def spaced(first: float, last: float, count: int, rho: float) -> Float[np.ndarray, " level"]:
    """Return levels from first to last, evenly spaced in their 1 / rho-th power; a single one is the first."""
    return np.linspace(first ** (1 / rho), last ** (1 / rho), count) ** rho
