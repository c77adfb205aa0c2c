"""Mean and spread of many samples of a prior, in memory that does not grow with their number.

One scan walks over chunks of samples and keeps running moments of whatever is read of each sample: its latent, its
decoded image, or both. Sample i draws its noise from its own number, so that chunks and layouts over devices change the
result by rounding alone. Averaging latents and decoding their mean once is CoCoLIT's latent average stabilisation.

Source: CoCoLIT, arXiv:2508.01292, official code; Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise
algorithm for computing sample variances", for the running moments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Key

from jaxmed.arrays.types import KeyArray
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.samplers import Sampler, SamplerState, draw_noise, grid, run, sample_keys
from jaxmed.diffusion.schedule import expand_like


class Moments(NamedTuple):
    """Running moments of samples.

    Attributes:
        count: Samples so far.
        mean: Of whatever is read of a sample; a tree of arrays without a batch axis, float32.
        squares: Sums of squared distances from the mean, likewise.
    """

    count: Float[Array, ""]
    mean: Any
    squares: Any

    @property
    def std(self) -> Any:
        """Standard deviation of the samples, from the unbiased variance; 0 for one sample."""
        return jax.tree.map(lambda squares: jnp.sqrt(squares / jnp.maximum(self.count - 1, 1)), self.squares)


def average_samples(
    key: KeyArray,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    sampler: Sampler,
    num_samples: int,
    *,
    chunk: int | None = None,
    clip: tuple[float, float] | None = None,
    read: Callable[[Float[Array, "chunk ..."]], Any] = lambda samples: samples,
    sharding: NamedSharding | None = None,
) -> Moments:
    """Draw samples from noise of unit variance and return the moments of what is read of them.

    Args:
        key: Consumed.
        denoiser: The prior, on a schedule that keeps the variance.
        shape: Of one sample.
        sampler: Method and its settings.
        num_samples: How many.
        chunk: Samples in memory at a time; all when absent.
        clip: As of `samplers.run`.
        read: From samples to a tree of arrays with the sample first; the samples themselves by default.
        sharding: Of the samples of a chunk over devices; None leaves them where they are.
    """
    first = len(grid(denoiser.schedule, sampler))

    def draw(keys: Key[Array, " chunk"]) -> Any:
        x = draw_noise(keys, first, shape)
        return read(run(keys, denoiser, SamplerState(x, jnp.zeros_like(x)), sampler, clip))

    return scan_moments(key, draw, num_samples, chunk=chunk, sharding=sharding)


def scan_moments(
    key: KeyArray,
    draw: Callable[[Key[Array, " chunk"]], Any],
    num_samples: int,
    *,
    chunk: int | None = None,
    sharding: NamedSharding | None = None,
) -> Moments:
    """Return the moments of anything that is drawn from the keys of samples, chunk by chunk; see `average_samples`."""
    if num_samples < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"num_samples, chunk: expected 1 or more, got {num_samples} and {chunk}")
    size = min(chunk or num_samples, num_samples)
    numbers = jnp.arange(-(-num_samples // size) * size).reshape(-1, size)

    def advance(moments: Moments, numbers: Array) -> tuple[Moments, None]:
        if sharding is not None:
            numbers = jax.lax.with_sharding_constraint(numbers, sharding)
        # What fills the last chunk is the last sample again, and is left out of the moments.
        values = draw(sample_keys(key, jnp.minimum(numbers, num_samples - 1)))
        return merge(moments, values, numbers < num_samples), None

    shapes = jax.eval_shape(lambda: draw(sample_keys(key, numbers[0])))
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], jnp.float32), shapes)
    return jax.lax.scan(advance, Moments(jnp.zeros(()), empty, empty), numbers)[0]


def merge(moments: Moments, values: Any, is_real: Bool[Array, " chunk"]) -> Moments:
    """Add a chunk of samples, those that are real, to running moments."""
    count, new = moments.count, is_real.sum(dtype=jnp.float32)
    total = count + new

    def add(mean: Array, squares: Array, found: Array) -> tuple[Array, Array]:
        found = found.astype(jnp.float32)
        weight = expand_like(is_real.astype(jnp.float32), found)
        own = (weight * found).sum(0) / new
        around = (weight * (found - own) ** 2).sum(0)
        shift = own - mean
        return mean + shift * (new / total), squares + around + shift**2 * (count * new / total)

    leaves, structure = jax.tree.flatten(values)
    merged = [
        add(*leaf) for leaf in zip(jax.tree.leaves(moments.mean), jax.tree.leaves(moments.squares), leaves, strict=True)
    ]
    return Moments(total, structure.unflatten(m for m, _ in merged), structure.unflatten(s for _, s in merged))


def curvature_trace(
    decode: Callable[[Float[Array, "*latent"]], Array],
    latent: Float[Array, "*latent"],
    std: Float[Array, "*latent"],
    keys: Key[Array, " direction"],
) -> Array:
    """Estimate Tr(H S) of every entry of a decoded latent: H its Hessian, S the diagonal matrix of squared deviations.

    Half of it is by how much the mean of decoded samples lies above the decoded mean, to second order; decoding the
    mean of m samples differs from the mean of their images by (1/m - 1) / 2 of it. Covariances between entries of the
    latent are left out.

    Args:
        decode: From a latent to an image.
        latent: Where.
        std: Standard deviation of the samples.
        keys: One for each direction of signs, over which the second derivative is averaged.

    Source: CoCoLIT, arXiv:2508.01292, its analysis of latent average stabilisation; Hutchinson 1990 for the trace.
    """

    def second(key: KeyArray) -> Array:
        direction = std * jax.random.rademacher(key, latent.shape, jnp.float32)
        slope = lambda place: jax.jvp(decode, (place,), (direction,))[1]  # noqa: E731
        return jax.jvp(slope, (latent,), (direction,))[1]

    return jax.lax.map(second, keys).mean(0)
