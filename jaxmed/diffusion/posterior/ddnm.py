"""DDNM: what the measurement sees comes from the measurement, the rest from the prior."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.config import NonNegative, checked
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.frame import Info, begin, norms, root_keys, walk
from jaxmed.diffusion.samplers import Ancestral, Ddim, LinearSteps, draw_noise, plan
from jaxmed.physics.operators import LinearOperator


@dataclasses.dataclass(frozen=True)
@checked
class Ddnm:
    """Settings of DDNM.

    Attributes:
        noise_std: Standard deviation of the measurement's noise after the pseudo-inverse, in units of the image; 0 is
            DDNM, more DDNM+. Right for operators whose singular values are about 1; the least one gives a safe value.
        sampler: The chain.

    Source: DDNM, arXiv:2212.00490, sections 3.2 and, for noise, 3.3.
    Deviation: the noise that the measurement brings along is taken from the chain's own in the range of A alone; the
        paper without a singular value decomposition takes it everywhere.
    """

    noise_std: NonNegative = 0.0
    sampler: Ancestral | Ddim = Ddim(100, eta=0.85)


def ddnm(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: LinearOperator,
    initial: Float[Array, "batch ..."],
    config: Ddnm,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Draw images from a prior that fit their measurements; see `jaxmed.diffusion.posterior` for the arguments.

    The operator comes with its pseudo-inverse. The record holds residuals before the correction, and as step sizes its
    factors.
    """
    if operator.pseudo_inverse is None:
        raise ValueError("operator: expected one with a pseudo-inverse, which DDNM is made of, found none")
    batch, schedule, keys = len(initial), denoiser.schedule, root_keys(key, initial, indices)
    steps = plan(schedule, config.sampler)
    assert isinstance(steps, LinearSteps)
    # The correction brings noise of pull * factor * noise_std into the next image; the chain adds the rest of its own.
    brought = np.abs(steps.pull) * config.noise_std
    factor = np.where(brought > steps.noise, steps.noise / np.maximum(brought, 1e-300), 1.0)
    own = np.sqrt(np.maximum(steps.noise**2 - (factor * brought) ** 2, 0.0))
    pseudo_inverse = jax.vmap(operator.pseudo_inverse)
    measure = jax.vmap(operator.apply)

    def advance(x: Float[Array, "batch ..."], row) -> tuple[Array, Array]:
        time, keep, pull, noise, factor, own, left = row
        mean = denoiser.denoise(x, jnp.full(batch, time))
        residual = measurement - measure(mean)
        corrected = mean + factor * pseudo_inverse(residual)
        fresh = draw_noise(keys, left, x.shape[1:], x.dtype)
        added = noise * fresh
        if config.noise_std:
            added = added + (own - noise) * pseudo_inverse(measure(fresh))
        return (keep * x + pull * corrected + added).astype(x.dtype), norms(residual)

    columns = (steps.time, steps.keep, steps.pull, steps.noise, factor, own)
    return walk(advance, begin(keys, schedule, config.sampler, initial), columns, initial.dtype, factor)
