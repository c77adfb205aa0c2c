"""Diffusion posterior sampling: after each step of the prior, a step down the gradient of the residual."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.chain import enter, make_chain, reverse
from jaxmed.diffusion.posterior.fidelity import PLAIN, Fidelity, Operator, evaluate
from jaxmed.diffusion.posterior.guidance import make_info
from jaxmed.diffusion.posterior.info import Info
from jaxmed.diffusion.samplers import Ancestral, Ddim, sample_keys


@dataclasses.dataclass(frozen=True)
class Dps:
    """Settings of DPS.

    Attributes:
        scale: Factor of the gradient of |y - A(E[x_0 | x_t])|: the paper's code has 0.3 for blur and super-resolution,
            0.5 for inpainting, 1 for phase. Other samplers and shorter chains need another.
        sampler: The chain; its first time is where pure noise enters.
        fidelity: The data term; the paper's is the residual alone.

    Source: DPS, arXiv:2209.14687, algorithm 1. Its step zeta / |r| times the gradient of |r|^2 is 2 zeta times the
        gradient of |r|; the code, and we, leave out the 2.
    """

    scale: float = 0.3
    sampler: Ancestral | Ddim = Ancestral()
    fidelity: Fidelity = PLAIN

    def __post_init__(self):
        """Refuse to climb."""
        if not self.scale >= 0:
            raise ValueError(f"scale: expected 0 or more, found {self.scale}")


def dps(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Operator,
    initial: Float[Array, "batch ..."],
    config: Dps,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Draw images from a prior that fit their measurements.

    Args:
        key: Consumed.
        denoiser: The prior.
        measurement: y.
        operator: A, of one image.
        initial: Gives the shape; zeros begin in pure noise. Anything else is noised to the chain's first time.
        config: Settings.
        indices: Numbers of the samples, which name their random numbers; 0 to batch - 1 when absent.

    Returns:
        The images, clipped by the denoiser alone, and the run's record, first step first.
    """
    batch = len(initial)
    keys = sample_keys(key, jnp.arange(batch) if indices is None else indices)
    chain = make_chain(denoiser.schedule, config.sampler, initial.dtype)
    num_steps = len(chain.time)
    start = jnp.full(batch, num_steps - 1, jnp.int32)

    def advance(x: Float[Array, "batch ..."], left: Int[Array, ""]) -> tuple[Array, Array]:
        time = jnp.full(batch, chain.time[left])
        at = evaluate(denoiser, measurement, operator, config.fidelity, x, time)
        moved = reverse(chain, keys, x, at.mean, left) - config.scale * at.gradient
        return moved.astype(x.dtype), at.residual

    image, residuals = jax.lax.scan(advance, enter(chain, keys, initial, start), jnp.arange(num_steps)[::-1])
    return image, make_info(residuals, jnp.full_like(residuals, config.scale), num_steps)
