"""How probable an image is under a diffusion prior, by the probability flow from the image to noise.

EDM's flow du / dsigma = (u - D) / sigma of u = x / alpha is solved in l = ln(sigma / alpha) for w = u / c, with
c^2 = (sigma / alpha)^2 + data_std^2: dw / dl = (u - D) / c - w (sigma / alpha / c)^2. So the state has unit size from
one end to the other, and its divergence is about zero: tolerances mean the same everywhere. The flow moves the image to
noise whose density is known; the divergence along the way and the two c are what the volume changed.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.config import Count, Positive, checked
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.schedule import Schedule
from jaxmed.solvers.ode import OdeConfig, solve

EXACT_LIMIT = 64
"""Dimensions up to which the divergence is exact by default: it costs as many products as there are dimensions."""


@dataclasses.dataclass(frozen=True)
@checked
class LikelihoodConfig:
    """How a likelihood is computed.

    Attributes:
        divergence: "exact" takes the whole trace, "hutchinson" probes it at random; "auto" is exact up to 64
            dimensions.
        num_probes: Random probes, fixed along the way.
        ratio_min: sigma / alpha at which the image stands; the schedule's least when absent. Never 0: the density
            asked for is that of the image with so much noise.
        ratio_max: Where its density is taken as Gaussian; the schedule's largest when absent.
        data_std: About the standard deviation of the images; scales the solver's state, not the result.
        bin_width: Width of a grey level, where images were stored in levels; then bits per dimension are those of
            the levels.
        ode: How the flow is solved.

    Source: score SDE, arXiv:2011.13456, appendix D.2; EDM, arXiv:2206.00364, equation 1; FFJORD, arXiv:1810.01367,
        for the probes.
    """

    divergence: Literal["auto", "exact", "hutchinson"] = "auto"
    num_probes: Count = 1
    ratio_min: Positive | None = None
    ratio_max: Positive | None = None
    data_std: Positive = 0.5
    bin_width: Positive | None = None
    ode: OdeConfig = OdeConfig()


class Likelihood(NamedTuple):
    """Log densities of images.

    Attributes:
        log_density: Natural logarithm, at the least noise.
        bits_per_dim: -log2 density over the number of voxels; of grey levels where `bin_width` is given.
        latent: The image moved to the largest noise, over that noise: white if the prior is right.
        num_steps: Steps of the solver.
        succeeded: Whether it reached the end; where not, the densities mean nothing.
    """

    log_density: Float[Array, " batch"]
    bits_per_dim: Float[Array, " batch"]
    latent: Float[Array, "batch ..."]
    num_steps: Int[Array, " batch"]
    succeeded: Bool[Array, " batch"]


def log_likelihood(
    key: KeyArray, denoiser: Denoiser, x: Float[Array, "batch ..."], config: LikelihoodConfig = LikelihoodConfig()
) -> Likelihood:
    """Return the log density of images.

    Args:
        key: Consumed where the divergence is probed; every image has its own probes.
        denoiser: The prior.
        x: Images.
        config: Method.
    """
    dimensions = math.prod(x.shape[1:])
    exact = config.divergence == "exact" or (config.divergence == "auto" and dimensions <= EXACT_LIMIT)
    low, high = _range(denoiser.schedule, config)
    first, last = math.hypot(low, config.data_std), math.hypot(high, config.data_std)
    times = jnp.log(jnp.asarray([low, high], x.dtype))

    def one(key: KeyArray, image: Float[Array, "..."]):
        if exact:
            probes = jnp.eye(dimensions, dtype=image.dtype).reshape(dimensions, *image.shape)
        else:
            probes = jax.random.rademacher(key, (config.num_probes, *image.shape), image.dtype)
            probes = probes / math.sqrt(config.num_probes)

        def field(log_ratio, state, args):
            w, _ = state
            ratio = jnp.exp(log_ratio)
            size = jnp.sqrt(ratio**2 + config.data_std**2)

            def flow(w: Float[Array, "..."]) -> Float[Array, "..."]:
                u = size * w
                return (u - _denoise(denoiser, u, ratio)) / size - w * (ratio / size) ** 2

            # By the transpose, which networks with hand-written gradients have too; a trace does not mind.
            moved, pull = jax.vjp(flow, w)
            return moved, jnp.sum(jax.vmap(lambda probe: jnp.sum(probe * pull(probe)[0]))(probes))

        solution = solve(field, (image / first, jnp.zeros((), image.dtype)), times, config.ode)
        w, change = jax.tree.map(lambda leaf: leaf[-1], solution.states)
        latent = w * last / high
        prior = -0.5 * jnp.sum(jnp.square(latent)) - dimensions * math.log(high / last * math.sqrt(2 * math.pi))
        return prior + change - dimensions * math.log(first), latent, solution.num_steps, solution.succeeded

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(x)))
    log_density, latent, num_steps, succeeded = jax.vmap(one)(keys, x)
    offset = 0.0 if config.bin_width is None else -math.log2(config.bin_width)
    bits = -log_density / (dimensions * math.log(2)) + offset
    return Likelihood(log_density, bits, latent, num_steps, succeeded)


def _denoise(denoiser: Denoiser, u: Float[Array, "..."], ratio: Float[Array, ""]) -> Float[Array, "..."]:
    """Denoise one image, which stands at u = x / alpha."""
    t = denoiser.schedule.time_at(ratio)[None]
    return denoiser.denoise(denoiser.schedule.alpha(t)[0] * u[None], t)[0]


def _range(schedule: Schedule, config: LikelihoodConfig) -> tuple[float, float]:
    """Return the least and the largest sigma / alpha of the flow."""
    ends = schedule.times(2)
    largest, least = schedule.sigma(ends) / schedule.alpha(ends)
    low = float(least) if config.ratio_min is None else config.ratio_min
    high = float(largest) if config.ratio_max is None else config.ratio_max
    if not low < high:
        raise ValueError(f"ratio_min, ratio_max: expected min < max, got {low}, {high}")
    return low, high
