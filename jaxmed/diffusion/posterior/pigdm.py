"""PiGDM: guidance with a covariance of the image given x_t that is a multiple of 1 and grows with the noise."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxmed.arrays.types import KeyArray
from jaxmed.config import NonNegative, Positive, Size, checked
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.fidelity import Operator
from jaxmed.diffusion.posterior.frame import Info, linearise, run_guided
from jaxmed.diffusion.samplers import Ddim, Sampler
from jaxmed.diffusion.schedule import expand_like
from jaxmed.solvers.conjugate_gradient import conjugate_gradient


@dataclasses.dataclass(frozen=True)
@checked
class Pigdm:
    """Settings of PiGDM.

    Attributes:
        noise_std: Deviation of the measurement's white noise, in its units; 0 for none.
        data_std: Standard deviation of the images; with 1 the covariance is the paper's s^2 / (1 + s^2), where s is
            sigma / alpha, and exact for white images. Of images that are not white the largest along any direction:
            guidance along a direction whose covariance is underrated overshoots.
        solver_steps: Steps of conjugate gradients for (A A^T + ...)^-1; they do not touch the network.
        sampler: Any; the paper's is DDIM with eta = 1.

    Source: Song, Vahdat, Mardani and Kautz, Pseudoinverse-guided diffusion models, ICLR 2023.
    Deviation: their step scales the guidance by s^2 / (1 + s^2) once more; ours is the score's own.
    """

    noise_std: NonNegative = 0.01
    data_std: Positive = 1.0
    solver_steps: Size = 20
    sampler: Sampler = Ddim(100, eta=1.0)


def pigdm(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Operator,
    initial: Float[Array, "batch ..."],
    config: Pigdm,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Draw images from a prior that fit their measurements; see `jaxmed.diffusion.posterior` for the arguments.

    An operator that is not linear is linearised at the denoised image.
    """
    guided = Denoiser(lambda x, t: guided_mean(denoiser, measurement, operator, config, x, t), denoiser.schedule)
    return run_guided(key, guided, measurement, operator, initial, config.sampler, 1, indices)


def guided_mean(
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Operator,
    config: Pigdm,
    x: Float[Array, "batch ..."],
    t: Num[Array, " batch"],
) -> Float[Array, "batch ..."]:
    """Return E[x_0 | x_t, y] for an image whose covariance given x_t is a multiple of 1."""
    mean, transposed = jax.vjp(lambda x: denoiser.denoise(x, t), x)
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    at = linearise(operator, mean, measurement)
    ratio = jnp.square(sigma / alpha)
    variance = expand_like(ratio * config.data_std**2 / (ratio + config.data_std**2), at.residual)

    def seen(change: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        return variance * at.jvp(at.vjp(change)) + config.noise_std**2 * change

    solved = conjugate_gradient(seen, at.residual, config.solver_steps)
    return mean + expand_like(sigma**2 / alpha, x) * transposed(at.vjp(solved))[0]
