"""Plug and play with a deep prior: fit the measurement while staying near, denoise, and again at a lower noise level.

Half-quadratic splitting of the maximum of the posterior: the prior's share of each round is the denoiser itself, at the
level to which both halves may differ. No noise is drawn; DiffPIR is what becomes of this when it is.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.fidelity import Operator
from jaxmed.diffusion.posterior.guidance import make_info, proximal_fit
from jaxmed.diffusion.posterior.info import Info


@dataclasses.dataclass(frozen=True)
class PnpDpir:
    """Settings of PnP-DPIR.

    Attributes:
        noise_std: Of the measurement's white noise, in its units; the last level too.
        strength: lambda: how much the denoised image weighs; its weight is lambda noise_std^2 / level^2. With 1 a
            Gaussian prior counts as it is, with lambda its logarithm lambda times.
        first_level: sigma / alpha of the first round, in units of the image: 49 of 255 grey values, on [0, 2].
        num_steps: Rounds, each one evaluation of the network; levels are spaced evenly in their logarithm.
        levels: sigma / alpha of every round, in place of those.
        solver_steps: Steps of conjugate gradients for the fit; they do not touch the network.

    Source: DPIR, arXiv:2008.13751, section 4: 8 rounds for blur, 24 for super-resolution, lambda = 0.23.
    """

    noise_std: float = 0.01
    strength: float = 0.23
    first_level: float = 0.38
    num_steps: int = 24
    levels: tuple[float, ...] | None = None
    solver_steps: int = 20

    def __post_init__(self):
        for name in ("noise_std", "strength", "first_level"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("num_steps", "solver_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.levels is not None and not (self.levels and min(self.levels) > 0):
            raise ValueError(f"levels: expected one or more positive numbers, got {self.levels}")


def pnp_dpir(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Operator,
    initial: Float[Array, "batch ..."],
    config: PnpDpir,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Find the images that a prior and their measurements agree on.

    Args:
        key: Not used: nothing is drawn.
        denoiser: The prior. Levels beyond its schedule's ends are its ends.
        measurement: y.
        operator: A, of one image; one that is not linear is linearised at the denoised image.
        initial: Where the search begins: zeros, or estimates.
        config: Settings.
        indices: Not used.

    Returns:
        The images, and the run's record: residuals before the fit, step sizes the weights of the denoised image.
    """
    del key, indices
    schedule, batch = denoiser.schedule, len(initial)
    asked = config.levels or np.geomspace(
        config.first_level, min(config.noise_std, config.first_level), config.num_steps
    )
    times = schedule.time_at(np.asarray(asked, np.float64))
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    weight = config.strength * config.noise_std**2 * (alpha / sigma) ** 2

    def advance(image: Float[Array, "batch ..."], row) -> tuple[Array, Array]:
        time, alpha, weight = row
        fitted, residual = proximal_fit(operator, image, measurement, weight, config.solver_steps)
        mean = denoiser.denoise((alpha * fitted).astype(image.dtype), jnp.full(batch, time))
        return mean.astype(image.dtype), residual

    real = jnp.promote_types(initial.dtype, jnp.float32)
    columns = [jnp.asarray(column, real) for column in (times, alpha, weight)]
    image, residuals = jax.lax.scan(advance, initial, columns)
    return image, make_info(residuals, jnp.broadcast_to(columns[2][:, None], residuals.shape), len(times))
