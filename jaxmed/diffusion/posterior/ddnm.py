"""DDNM: what the measurement sees comes from the measurement, the rest from the prior."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.guidance import begin, make_info, residual_norms
from jaxmed.diffusion.posterior.info import Info
from jaxmed.diffusion.samplers import Ancestral, Ddim, LinearSteps, draw_noise, plan, sample_keys
from jaxmed.physics.operators import LinearOperator


@dataclasses.dataclass(frozen=True)
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

    noise_std: float = 0.0
    sampler: Ancestral | Ddim = Ddim(100, eta=0.85)

    def __post_init__(self):
        if not self.noise_std >= 0:
            raise ValueError(f"noise_std: expected 0 or more, got {self.noise_std}")


def ddnm(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: LinearOperator,
    initial: Float[Array, "batch ..."],
    config: Ddnm,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Draw images from a prior that fit their measurements.

    Args:
        key: Consumed.
        denoiser: The prior.
        measurement: y.
        operator: A, of one image, with its pseudo-inverse.
        initial: Gives the shape; zeros begin in pure noise. Anything else is noised to the sampler's first time.
        config: Settings.
        indices: Numbers of the samples, which name their random numbers; 0 to batch - 1 when absent.

    Returns:
        The images, and the run's record: residuals before the correction, step sizes its factors.
    """
    if operator.pseudo_inverse is None:
        raise ValueError("operator: expected one with a pseudo-inverse, which DDNM is made of, found none")
    batch, schedule = len(initial), denoiser.schedule
    keys = sample_keys(key, jnp.arange(batch) if indices is None else indices)
    steps = plan(schedule, config.sampler)
    assert isinstance(steps, LinearSteps)
    # The correction brings noise of pull * factor * noise_std into the next image; the chain adds the rest of its own.
    brought = np.abs(steps.pull) * config.noise_std
    factor = np.where(brought > steps.noise, steps.noise / np.maximum(brought, 1e-300), 1.0)
    own = np.sqrt(np.maximum(steps.noise**2 - (factor * brought) ** 2, 0.0))
    pseudo_inverse = jax.vmap(operator.pseudo_inverse)
    x = begin(keys, schedule, config.sampler, initial)

    def advance(x: Float[Array, "batch ..."], rows) -> tuple[Array, Array]:
        row, factor, own = rows
        mean = denoiser.denoise(x, jnp.full(batch, row.time))
        misfit = measurement - jax.vmap(operator.apply)(mean)
        corrected = mean + factor * pseudo_inverse(misfit)
        fresh = draw_noise(keys, row.left, x.shape[1:], x.dtype)
        noise = row.noise * fresh
        if config.noise_std:
            noise = noise + (own - row.noise) * pseudo_inverse(jax.vmap(operator.apply)(fresh))
        moved = row.keep * x + row.pull * corrected + noise
        return moved.astype(x.dtype), residual_norms(operator, mean, measurement)

    real = jnp.promote_types(x.dtype, jnp.float32)
    rows = jax.tree.map(lambda column: jnp.asarray(column, real), (steps, factor, own))
    rows = (rows[0]._replace(left=jnp.asarray(steps.left)), *rows[1:])
    image, residuals = jax.lax.scan(advance, x, rows)
    step_sizes = jnp.broadcast_to(rows[1][:, None], residuals.shape)
    return image, make_info(residuals, step_sizes, len(steps.time))
