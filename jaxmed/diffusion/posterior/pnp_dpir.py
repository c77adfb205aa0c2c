"""Plug and play with a deep prior: fit the measurement while staying near, denoise, and again at a lower noise level.

Half-quadratic splitting of the maximum of the posterior: the prior's share of each round is the denoiser itself, at the
level to which both halves may differ. No noise is drawn; DiffPIR is what becomes of this when it is.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.config import Positive, Size, checked
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.fidelity import Operator
from jaxmed.diffusion.posterior.frame import Info, proximal_fit, walk


@dataclasses.dataclass(frozen=True)
@checked
class PnpDpir:
    """Settings of PnP-DPIR.

    Attributes:
        noise_std: Deviation of the measurement's white noise, in its units; the last level too.
        strength: lambda: how much the denoised image weighs; its weight is lambda noise_std^2 / level^2. With 1 a
            Gaussian prior counts as it is, with lambda its logarithm lambda times.
        first_level: sigma / alpha of the first round, in units of the image: 49 of 255 grey values, on [0, 2].
        num_steps: Rounds, each one evaluation of the network; levels are spaced evenly in their logarithm.
        levels: sigma / alpha of every round, in place of those.
        solver_steps: Steps of conjugate gradients for the fit; they do not touch the network.

    Source: DPIR, arXiv:2008.13751, section 4: 8 rounds for blur, 24 for super-resolution, lambda = 0.23.
    """

    noise_std: Positive = 0.01
    strength: Positive = 0.23
    first_level: Positive = 0.38
    num_steps: Size = 24
    levels: tuple[Positive, ...] | None = None
    solver_steps: Size = 20

    def __post_init__(self):
        if self.levels is not None and not self.levels:
            raise ValueError("levels: expected one or more, got none")


def pnp_dpir(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Operator,
    initial: Float[Array, "batch ..."],
    config: PnpDpir,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Find the images that a prior and their measurements agree on; `jaxmed.diffusion.posterior` tells the arguments.

    The search begins at `initial`, zeros or estimates; nothing is drawn. Levels beyond the ends of the prior's schedule
    are its ends, and an operator that is not linear is linearised at the denoised image. The record holds residuals
    before the fit, and as step sizes the weights of the denoised image.
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
        time, alpha, weight, _ = row
        fitted, residual = proximal_fit(operator, image, measurement, weight, config.solver_steps)
        mean = denoiser.denoise((alpha * fitted).astype(image.dtype), jnp.full(batch, time))
        return mean.astype(image.dtype), residual

    return walk(advance, initial, (times, alpha, weight), initial.dtype, weight)
