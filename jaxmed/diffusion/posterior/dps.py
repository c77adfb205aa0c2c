"""Diffusion posterior sampling: after each step of the prior, a step down the gradient of the residual."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.config import NonNegative, checked
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.fidelity import PLAIN, Fidelity, Operator, evaluate
from jaxmed.diffusion.posterior.frame import Info, begin, root_keys, walk
from jaxmed.diffusion.samplers import Ancestral, Ddim, LinearSteps, draw_noise, plan


@dataclasses.dataclass(frozen=True)
@checked
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

    scale: NonNegative = 0.3
    sampler: Ancestral | Ddim = Ancestral()
    fidelity: Fidelity = PLAIN


def dps(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Operator,
    initial: Float[Array, "batch ..."],
    config: Dps,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Draw images from a prior that fit their measurements; see `jaxmed.diffusion.posterior` for the arguments.

    Images are clipped by the denoiser alone.
    """
    batch, schedule, keys = len(initial), denoiser.schedule, root_keys(key, initial, indices)
    steps = plan(schedule, config.sampler)
    assert isinstance(steps, LinearSteps)

    def advance(x: Float[Array, "batch ..."], row) -> tuple[Array, Array]:
        time, keep, pull, noise, left = row
        at = evaluate(denoiser, measurement, operator, config.fidelity, x, jnp.full(batch, time))
        fresh = draw_noise(keys, left, x.shape[1:], x.dtype)
        moved = (keep * x + pull * at.mean + noise * fresh).astype(x.dtype) - config.scale * at.gradient
        return moved.astype(x.dtype), at.residual

    columns = (steps.time, steps.keep, steps.pull, steps.noise)
    return walk(advance, begin(keys, schedule, config.sampler, initial), columns, initial.dtype, config.scale)
