"""RED-diff: an image found by gradient descent, whose regulariser is what the prior says of it at falling noise levels.

At each step the image is noised anew, and the prior's error about that noise is the gradient of how unlikely the image
is. One image stands for the posterior: the result is a mode, not a sample, however the noise is drawn.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.config import NonNegative, Positive, Size, checked
from jaxmed.diffusion.denoiser import Denoiser, epsilon
from jaxmed.diffusion.posterior.fidelity import Operator
from jaxmed.diffusion.posterior.frame import Info, linearise, norms, root_keys, walk
from jaxmed.diffusion.samplers import draw_noise


@dataclasses.dataclass(frozen=True)
@checked
class Reddiff:
    """Settings of RED-diff.

    Attributes:
        strength: lambda of the regulariser's weight, lambda sigma / alpha; the variance of the measurement's noise is
            in it, since the data term is |y - A(image)|^2 / 2.
        rate: Adam's, in units of the image; its moments decay by 0.9 and 0.99.
        num_steps: Steps, each one evaluation of the network.
        first_level: sigma / alpha of the first step. The weight grows with it, and so do Adam's moments, which a short
            run does not forget.
        times: Descending times to visit, in place of as many from that level on, evenly spaced.

    Source: RED-diff, arXiv:2305.04391, algorithm 1; lambda = 0.25.
    """

    strength: NonNegative = 0.25
    rate: Positive = 0.1
    num_steps: Size = 100
    first_level: Positive = 10.0
    times: tuple[float, ...] | None = None

    def __post_init__(self):
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
    """Find images that fit their measurements and that a prior finds likely; see `jaxmed.diffusion.posterior`.

    The descent begins at `initial`, zeros or estimates. The record holds residuals before each step, and as step sizes
    the weights of the regulariser.
    """
    schedule, batch, keys = denoiser.schedule, len(initial), root_keys(key, initial, indices)
    if config.times is None:
        last = schedule.times(2)[1]
        first = max(float(schedule.time_at(np.array([config.first_level]))[0]), last)
        times = np.linspace(first, last, config.num_steps)
    else:
        times = np.asarray(config.times, np.float64)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    weight = config.strength * sigma / alpha
    # Adam looks at each voxel alone, so that a batch is one image to it.
    adam = optax.adam(config.rate, b1=0.9, b2=0.99)

    def advance(carry, row) -> tuple[tuple[Array, optax.OptState], Array]:
        image, moments = carry
        time, alpha, sigma, weight, left = row
        noise = draw_noise(keys, left, image.shape[1:], image.dtype)
        noisy = (alpha * image + sigma * noise).astype(image.dtype)
        error = epsilon(denoiser, noisy, jnp.full(batch, time)) - noise
        at = linearise(operator, image, measurement)
        change, moments = adam.update((weight * error - at.vjp(at.residual)).astype(image.dtype), moments)
        return (image + jnp.asarray(change), moments), norms(at.residual)

    start = (initial, adam.init(initial))
    (image, _), info = walk(advance, start, (times, alpha, sigma, weight), initial.dtype, weight)
    return image, info
