"""RED-diff: an image found by gradient descent, whose regulariser is what the prior says of it at falling noise levels.

At each step the image is noised anew, and the prior's error about that noise is the gradient of how unlikely the image
is. One image stands for the posterior: the result is a mode, not a sample, however the noise is drawn.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.diffusion.denoiser import Denoiser, epsilon
from jaxmed.diffusion.posterior.fidelity import Operator
from jaxmed.diffusion.posterior.guidance import linearise, make_info, norms
from jaxmed.diffusion.posterior.info import Info
from jaxmed.diffusion.samplers import draw_noise, sample_keys


@dataclasses.dataclass(frozen=True)
class Reddiff:
    """Settings of RED-diff.

    Attributes:
        strength: lambda of the regulariser's weight, lambda sigma / alpha; the variance of the measurement's noise is
            in it, since the data term is |y - A(image)|^2 / 2.
        rate: Of Adam, in units of the image; its moments decay by 0.9 and 0.99.
        num_steps: Steps, each one evaluation of the network.
        first_level: sigma / alpha of the first step. The weight grows with it, and so do Adam's moments, which a short
            run does not forget.
        times: Descending times to visit, in place of as many from that level on, evenly spaced.

    Source: RED-diff, arXiv:2305.04391, algorithm 1; lambda = 0.25.
    """

    strength: float = 0.25
    rate: float = 0.1
    num_steps: int = 100
    first_level: float = 10.0
    times: tuple[float, ...] | None = None

    def __post_init__(self):
        for name in ("rate", "first_level"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not self.strength >= 0:
            raise ValueError(f"strength: expected 0 or more, got {self.strength}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps: expected 1 or more, got {self.num_steps}")
        if self.times is not None and not self.times:
            raise ValueError("times: expected one or more, got none")


def reddiff(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Operator,
    initial: Float[Array, "batch ..."],
    config: Reddiff,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Find images that fit their measurements and that a prior finds likely.

    Args:
        key: Consumed.
        denoiser: The prior.
        measurement: y.
        operator: A, of one image; any differentiable function.
        initial: Where the descent begins: zeros, or estimates.
        config: Settings.
        indices: Numbers of the samples, which name their random numbers; 0 to batch - 1 when absent.

    Returns:
        The images, and the run's record: residuals before each step, step sizes the weights of the regulariser.
    """
    schedule, batch = denoiser.schedule, len(initial)
    keys = sample_keys(key, jnp.arange(batch) if indices is None else indices)
    if config.times is None:
        last = schedule.times(2)[1]
        first = max(float(schedule.time_at(np.array([config.first_level]))[0]), last)
        times = np.linspace(first, last, config.num_steps)
    else:
        times = np.asarray(config.times, np.float64)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    # Adam looks at each voxel alone, so that a batch is one image to it.
    adam = optax.adam(config.rate, b1=0.9, b2=0.99)

    def advance(carry, row) -> tuple[tuple[Array, optax.OptState], Array]:
        image, moments = carry
        time, alpha, sigma, weight, left = row
        noise = draw_noise(keys, left, image.shape[1:], image.dtype)
        noisy = (alpha * image + sigma * noise).astype(image.dtype)
        error = epsilon(denoiser, noisy, jnp.full(batch, time)) - noise
        at = linearise(operator, image, measurement)
        change, moments = adam.update((weight * error - at.pull(at.misfit)).astype(image.dtype), moments)
        return (image + jnp.asarray(change), moments), norms(at.misfit)

    real = jnp.promote_types(initial.dtype, jnp.float32)
    columns = [jnp.asarray(column, real) for column in (times, alpha, sigma, config.strength * sigma / alpha)]
    left = jnp.arange(len(times))[::-1]
    (image, _), residuals = jax.lax.scan(advance, (initial, adam.init(initial)), (*columns, left))
    return image, make_info(residuals, jnp.broadcast_to(columns[3][:, None], residuals.shape), len(times))
