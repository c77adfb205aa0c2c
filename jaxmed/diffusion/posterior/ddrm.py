"""DDRM: DDIM in the basis of the operator's singular vectors, each direction by how well it was measured."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.arrays.filters import along
from jaxmed.arrays.types import KeyArray
from jaxmed.config import NonNegative, Share, Size, checked
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.frame import Info, norms, root_keys, walk
from jaxmed.diffusion.samplers import Ddim, draw_noise, grid


class Spectrum(NamedTuple):
    """A linear operator by its singular vectors, A = U S V^T, on one image.

    Coefficients have the image's shape: one for every direction of the image, measured or not.

    Attributes:
        to_coefficients: V^T: image to coefficients.
        to_image: V: its inverse.
        to_measured: U^T: measurement to coefficients, 0 where nothing was measured.
        singular: S, not negative; 0 where nothing was measured.
    """

    to_coefficients: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    to_image: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    to_measured: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    singular: Float[Array, "..."]


def separable_spectrum(
    matrices: Sequence[Float[np.ndarray, "_ _"] | None], shape: tuple[int, ...], relative_cutoff: float = 1e-6
) -> Spectrum:
    """Decompose an operator that multiplies each axis of an image by its own matrix.

    Args:
        matrices: One per axis of space; None leaves that axis as it is.
        shape: Shape of the image, (*space, ...).
        relative_cutoff: Singular values below this fraction of the largest count as 0.
    """
    lefts: list[np.ndarray | None] = []
    rights: list[np.ndarray | None] = []
    singular = np.ones(shape)
    for axis, matrix in enumerate(matrices):
        if matrix is None:
            lefts.append(None)
            rights.append(None)
            continue
        size = shape[axis]
        left, values, right = np.linalg.svd(np.asarray(matrix, np.float64))
        # Directions of an image that a measurement with fewer voxels cannot have get rows of zeros.
        padded = np.zeros((size, len(left)))
        padded[: min(size, len(left))] = left.T[:size]
        lefts.append(padded)
        rights.append(right)
        line = np.append(values, np.zeros(size - len(values)))
        singular = singular * line.reshape(-1, *(1,) * (len(shape) - axis - 1))
    singular[singular < relative_cutoff * singular.max()] = 0.0

    def multiply(factors: Sequence[np.ndarray | None], image: Float[Array, "..."]) -> Float[Array, "..."]:
        for axis, factor in enumerate(factors):
            if factor is not None:
                image = along(jnp.asarray(factor, image.dtype), image, axis)
        return image

    return Spectrum(
        to_coefficients=lambda image: multiply(rights, image),
        to_image=lambda coefficients: multiply([None if r is None else r.T for r in rights], coefficients),
        to_measured=lambda measurement: multiply(lefts, measurement),
        singular=jnp.asarray(singular),
    )


@dataclasses.dataclass(frozen=True)
@checked
class Ddrm:
    """Settings of DDRM.

    Attributes:
        noise_std: Deviation of the measurement's white noise, in its units; 0 for none.
        eta: Share of fresh noise along directions measured worse than the step's noise, or not at all.
        eta_b: Weight of the measurement along directions measured better.
        num_steps: Steps, each one evaluation of the network.
        times: Descending times to visit, in place of the schedule's own grid.

    Source: DDRM, arXiv:2201.11793, section 3; eta and eta_b of its section 5.
    """

    noise_std: NonNegative = 0.01
    eta: Share = 0.85
    eta_b: Share = 1.0
    num_steps: Size = 20
    times: tuple[float, ...] | None = None

    def __post_init__(self):
        Ddim(self.num_steps, times=self.times)  # checks the times


def ddrm(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Spectrum,
    initial: Float[Array, "batch ..."],
    config: Ddrm,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Draw images from a prior that fit their measurements; see `jaxmed.diffusion.posterior` for the arguments.

    The operator is given by its singular vectors, and `initial` is the mean of the first noise along directions that
    were not measured. Residuals are those along the directions that were.
    """
    batch, schedule = len(initial), denoiser.schedule
    keys = root_keys(key, initial, indices)
    times = grid(schedule, Ddim(config.num_steps, times=config.times))
    alpha = schedule.alpha(times)
    ratio = schedule.sigma(times) / alpha
    singular = operator.singular.astype(initial.dtype)
    seen = singular > 0
    divisor = jnp.where(seen, singular, 1.0)
    measured = jax.vmap(operator.to_measured)(measurement)
    target = jnp.where(seen, measured / divisor, 0.0)
    # Noise of the measurement along each direction, in units of the image.
    blur = jnp.where(seen, config.noise_std / divisor, jnp.inf)
    fresh = draw_noise(keys, len(times), initial.shape[1:], initial.dtype)
    start = jax.vmap(operator.to_coefficients)(initial)
    first = float(ratio[0])
    is_sharp = blur <= first
    width = jnp.sqrt(jnp.maximum(first**2 - jnp.where(is_sharp, blur, 0.0) ** 2, 0.0))
    start = jnp.where(is_sharp, target, start) + width * fresh

    def advance(coefficients: Float[Array, "batch ..."], row) -> tuple[Array, Array]:
        time, alpha, ratio, next_ratio, left = row
        x = alpha * jax.vmap(operator.to_image)(coefficients)
        mean = jax.vmap(operator.to_coefficients)(denoiser.denoise(x, jnp.full(batch, time)))
        fresh = draw_noise(keys, left, x.shape[1:], x.dtype)
        kept = jnp.sqrt(1 - config.eta**2) * next_ratio
        renewed = config.eta * next_ratio * fresh
        unseen = mean + kept * (coefficients - mean) / ratio + renewed
        blurred = mean + kept * (target - mean) / jnp.where(jnp.isfinite(blur) & (blur > 0), blur, 1.0) + renewed
        rest = jnp.maximum(next_ratio**2 - (config.eta_b * jnp.where(seen, blur, 0.0)) ** 2, 0.0)
        sharp = (1 - config.eta_b) * mean + config.eta_b * target + jnp.sqrt(rest) * fresh
        moved = jnp.where(seen, jnp.where(blur <= next_ratio, sharp, blurred), unseen)
        return moved.astype(x.dtype), norms(jnp.where(seen, measured - singular * mean, 0.0))

    columns = (times, alpha, ratio, np.append(ratio[1:], 0.0))
    coefficients, info = walk(advance, start, columns, initial.dtype)
    return jax.vmap(operator.to_image)(coefficients), info
