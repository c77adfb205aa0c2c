"""Come closer, diffuse faster: noise a good estimate a little, then walk back and project onto the measurement."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.chain import enter, make_chain, reverse
from jaxmed.diffusion.posterior.guidance import make_info
from jaxmed.diffusion.posterior.info import Info
from jaxmed.diffusion.samplers import Ancestral, Ddim, draw_noise, sample_keys
from jaxmed.physics.operators import LinearOperator


@dataclasses.dataclass(frozen=True)
class Ccdf:
    """Settings of CCDF.

    Attributes:
        start: Steps that are walked after the first one: 49 of 1000 take 50 steps.
        sampler: The chain.

    Source: CCDF, arXiv:2112.05146, equations 10 and 11. Its projection is non-expansive, so that the error of the
        estimate shrinks geometrically.
    """

    start: int = 199
    sampler: Ancestral | Ddim = Ancestral()

    def __post_init__(self):
        """Refuse to start before the end."""
        if self.start < 0:
            raise ValueError(f"start: expected 0 or more, found {self.start}")


def ccdf(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: LinearOperator,
    initial: Float[Array, "batch ..."],
    config: Ccdf,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Improve estimates of images.

    Args:
        key: Consumed.
        denoiser: The prior.
        measurement: y.
        operator: A, of one image, with its pseudo-inverse.
        initial: The estimates.
        config: Settings.
        indices: Numbers of the samples, which name their random numbers; 0 to batch - 1 when absent.

    Returns:
        The images, for which A x = y where y is in A's range, and the run's record, first step first.
    """
    inverse = operator.pseudo_inverse
    if inverse is None:
        raise ValueError("operator: expected one with a pseudo-inverse, which the projection needs")
    batch = len(initial)
    keys = sample_keys(key, jnp.arange(batch) if indices is None else indices)
    # Noise of the measurement's own, told apart from the image's by one more fold.
    measurement_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 2**31 - 1)
    chain = make_chain(denoiser.schedule, config.sampler, initial.dtype)
    if config.start >= len(chain.time):
        raise ValueError(f"start: expected less than the chain's {len(chain.time)} steps, found {config.start}")
    # The levels at which steps end: entry n ends where n - 1 begins, and 0 at the image.
    alpha, sigma = jnp.append(1.0, chain.alpha[:-1]), jnp.append(0.0, chain.sigma[:-1])
    start = jnp.full(batch, config.start, jnp.int32)
    measure = jax.vmap(operator.apply)

    def advance(x: Float[Array, "batch ..."], left: Int[Array, ""]) -> tuple[Array, Array]:
        mean = denoiser.denoise(x, jnp.full(batch, chain.time[left]))
        moved = reverse(chain, keys, x, mean, left)
        noise = measure(draw_noise(measurement_keys, left, x.shape[1:], x.dtype))
        target = alpha[left] * measurement + sigma[left] * noise
        projected = moved + jax.vmap(inverse)(target - measure(moved))
        misfit = (measurement - measure(mean)).reshape(batch, -1)
        return projected.astype(x.dtype), jnp.linalg.norm(misfit, axis=1)

    lefts = jnp.arange(config.start + 1)[::-1]
    image, residuals = jax.lax.scan(advance, enter(chain, keys, initial, start), lefts)
    return image, make_info(residuals, jnp.ones_like(residuals), config.start + 1)
