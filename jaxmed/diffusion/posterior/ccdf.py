"""Come closer, diffuse faster: noise a good estimate a little, then walk back and project onto the measurement."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.config import Whole, checked
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.frame import Info, add_noise, make_chain, make_info, norms, reverse_step, root_keys
from jaxmed.diffusion.samplers import Ancestral, Ddim, draw_noise
from jaxmed.physics.operators import LinearOperator


@dataclasses.dataclass(frozen=True)
@checked
class Ccdf:
    """Settings of CCDF.

    Attributes:
        start: Steps that are walked after the first one: 49 of 1000 take 50 steps.
        sampler: The chain.

    Source: CCDF, arXiv:2112.05146, equations 10 and 11. Its projection is non-expansive, so that the error of the
        estimate shrinks geometrically.
    """

    start: Whole = 199
    sampler: Ancestral | Ddim = Ancestral()


def ccdf(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: LinearOperator,
    initial: Float[Array, "batch ..."],
    config: Ccdf,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Improve estimates of images; see `jaxmed.diffusion.posterior` for the arguments.

    The operator comes with its pseudo-inverse, and A x = y for the images x, where y is in A's range.
    """
    inverse = operator.pseudo_inverse
    if inverse is None:
        raise ValueError("operator: expected one with a pseudo-inverse, which the projection needs")
    batch, keys = len(initial), root_keys(key, initial, indices)
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
        moved = reverse_step(chain, keys, x, mean, left)
        noise = measure(draw_noise(measurement_keys, left, x.shape[1:], x.dtype))
        target = alpha[left] * measurement + sigma[left] * noise
        projected = moved + jax.vmap(inverse)(target - measure(moved))
        return projected.astype(x.dtype), norms(measurement - measure(mean))

    lefts = jnp.arange(config.start + 1)[::-1]
    image, residuals = jax.lax.scan(advance, add_noise(chain, keys, initial, start), lefts)
    return image, make_info(residuals, 1.0, config.start + 1)
