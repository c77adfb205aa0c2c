"""From a high-field brain image to a low-field one: contrast, resolution and noise.

Two generations of the authors of DynamicDPS (`LOWFIELD2025`, `LOWFIELD2026`), whose power of contrast and width of blur
can be fitted to a pair of scans. Images lie in [0, 2] with background 0; the grid of the low-field image is that of the
high-field one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxmed.arrays.filters import Mode, Width, along, blur_matrix
from jaxmed.arrays.types import KeyArray, Scalar
from jaxmed.config import Count, NonNegative, Positive, PositiveRange, Probability, Size, Spread, checked
from jaxmed.physics.operators import LinearOperator, per_axis, resize_matrix, separable


@dataclasses.dataclass(frozen=True)
@checked
class LowField:
    """Contrast by a power, then a resize there and back, then a blur, then noise.

    Attributes:
        gamma: Power of the intensities.
        scale: Ratio of low-field to high-field voxel size, for all axes or one per axis; 1 leaves an axis alone.
        antialias: Average over the larger voxel when shrinking. The authors' code leaves it to its library's version.
        sigma: Standard deviation of the blur in voxels, for all axes or one per axis.
        radius: Last tap of the blur to either side.
        padding: What the blur sees outside the image.
        noise: Standard deviation of the Gaussian noise added to a simulated measurement.
        floor: Intensity below which the power is replaced; see `contrast`.

    Source: github.com/edshkim98/DynamicDPS, the operators of July 2025 and of 2026-04-29.
    """

    gamma: Positive = 0.4
    scale: Positive | tuple[Positive, ...] = 4.0
    antialias: bool = True
    sigma: Spread | tuple[Spread, ...] = 1.0
    radius: Size = 5
    padding: Mode = "reflect"
    noise: NonNegative = 1e-3
    floor: Probability = 1e-3

    def __post_init__(self):
        """Refuse what no scanner does."""
        if not np.all(np.asarray(self.scale) >= 1):
            raise ValueError(f"scale: expected 1 or more on every axis, found {self.scale}")


def make_operator(shape: tuple[int, ...], config: LowField) -> Callable[[Float[Array, "..."]], Float[Array, "..."]]:
    """Return the differentiable function from a high-field image to its noise-free low-field one.

    Args:
        shape: Axes of space, 2 or 3; an image may have channels after them.
        config: The acquisition.
    """
    linear = linear_part(shape, config)

    def operator(image: Float[Array, "..."]) -> Float[Array, "..."]:
        return linear(contrast(image, config.gamma, config.floor))

    return operator


def linear_part(shape: tuple[int, ...], config: LowField, relative_cutoff: float = 1e-2) -> LinearOperator:
    """Return what follows the contrast: resize there and back, blur.

    Args:
        shape: Axes of space.
        config: The acquisition.
        relative_cutoff: Cutoff of the pseudo-inverse, see `operators.separable`.
    """
    sigmas = per_axis(config.sigma, len(shape), "sigma")
    # Nothing of it depends on data: inside a traced function too it is computed at once, for the pseudo-inverse.
    with jax.ensure_compile_time_eval():
        return separable(_matrices(shape, sigmas, config), relative_cutoff)


def axis_matrices(shape: tuple[int, ...], config: LowField) -> list[Float[np.ndarray, "_ _"] | None]:
    """Return the matrix of each axis that `linear_part` multiplies by, such as for `posterior.ddrm`; None for none."""
    with jax.ensure_compile_time_eval():
        found = _matrices(shape, per_axis(config.sigma, len(shape), "sigma"), config)
        return [None if matrix is None else np.asarray(matrix, np.float64) for matrix in found]


def simulate(
    key: KeyArray, image: Float[Array, "..."], shape: tuple[int, ...], config: LowField
) -> Float[Array, "..."]:
    """Measure an image with noise."""
    measurement = make_operator(shape, config)(image)
    return measurement + config.noise * jax.random.normal(key, measurement.shape, measurement.dtype)


def contrast(image: Float[Array, "..."], gamma: Width, floor: float = 1e-3) -> Float[Array, "..."]:
    """Raise intensities to a power, with a gradient that stays finite in the background.

    Below `floor` a power under 1 is replaced by the parabola through 0 that meets it in value and slope: where gamma is
    0.4 the slope at 0 is 101 instead of infinite. Negative intensities count as 0.

    Args:
        image: Intensities, background 0.
        gamma: The power.
        floor: Where the parabola ends.

    Deviation: the authors take (x + 1e-7)^gamma, whose slope of 6e3 at 0 lets background voxels rule the gradient.
    """
    x = jnp.maximum(image, 0.0)
    u = x / floor
    parabola = floor**gamma * u * ((2 - gamma) - (1 - gamma) * u)
    is_replaced = (x < floor) & (gamma <= 1)
    # The branch not taken must have a finite slope too.
    power = jnp.maximum(x, jnp.where(is_replaced, floor, 1e-12)) ** gamma
    return jnp.where(is_replaced, parabola, power)


class Fit(NamedTuple):
    """A fitted acquisition.

    Attributes:
        gamma: Power of contrast.
        sigma: Standard deviation of the blur, in voxels, the same on every axis that is blurred.
        loss: Mean squared error of the best step, of which gamma and sigma are.
        steps: Steps taken.
    """

    gamma: Scalar
    sigma: Scalar
    loss: Scalar
    steps: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
@checked
class FitConfig:
    """How gamma and sigma are fitted.

    Attributes:
        learning_rate: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        max_steps: At most so many.
        patience: Stop after so many steps without a better loss.
        gamma_range: Held inside.
        sigma_range: Held inside, in voxels.

    Source: github.com/edshkim98/DynamicDPS, fit_A of 2026-04-29.
    """

    learning_rate: Positive = 5e-3
    weight_decay: NonNegative = 1e-3
    max_steps: Count = 1000
    patience: Count = 100
    gamma_range: PositiveRange = (0.3, 3.0)
    sigma_range: PositiveRange = (0.1, 5.0)


class _FitState(NamedTuple):
    point: Float[Array, "2"]
    optimizer: optax.OptState
    best: Fit
    stale: Int[Array, ""]


def fit(
    high: Float[Array, "batch ..."],
    low: Float[Array, "batch ..."],
    shape: tuple[int, ...],
    config: LowField,
    options: FitConfig = FitConfig(),
) -> Fit:
    """Fit the power of contrast and the width of the blur to pairs of images.

    Args:
        high: High-field images, or estimates of them.
        low: Their low-field images, on the same grid.
        shape: Axes of space.
        config: Everything but gamma and sigma; its sigma is 0 on axes that stay unblurred.
        options: Settings of the optimiser.

    Returns:
        The best point met, from a start at (1, 1).
    """
    is_blurred = [sigma > 0 for sigma in per_axis(config.sigma, len(shape), "sigma")]
    optimizer = optax.adamw(options.learning_rate, weight_decay=options.weight_decay)

    def loss(point: Float[Array, "2"]) -> Scalar:
        gamma, sigma = point
        sigmas = [sigma if blurred else 0.0 for blurred in is_blurred]
        predicted = contrast(high, gamma, config.floor)
        for axis, matrix in enumerate(_matrices(shape, sigmas, config)):
            predicted = predicted if matrix is None else along(jnp.asarray(matrix, high.dtype), predicted, axis + 1)
        return jnp.mean((predicted - low) ** 2)

    def body(state: _FitState) -> _FitState:
        value, gradient = jax.value_and_grad(loss)(state.point)
        steps = state.best.steps + 1
        is_better = value < state.best.loss
        here = Fit(state.point[0], state.point[1], value, steps)
        best = jax.tree.map(lambda new, old: jnp.where(is_better, new, old), here, state.best)
        updates, moments = optimizer.update(gradient, state.optimizer, state.point)
        point = jnp.clip(jnp.asarray(optax.apply_updates(state.point, updates)), *bounds)
        return _FitState(point, moments, best._replace(steps=steps), jnp.where(is_better, 0, state.stale + 1))

    bounds = jnp.asarray([options.gamma_range, options.sigma_range], high.dtype).T
    one, point = jnp.ones((), high.dtype), jnp.ones(2, high.dtype)
    zero = jnp.zeros((), jnp.int32)
    start = _FitState(point, optimizer.init(point), Fit(one, one, one * jnp.inf, zero), zero)
    end = jax.lax.while_loop(
        lambda state: (state.best.steps < options.max_steps) & (state.stale < options.patience), body, start
    )
    return end.best


def _matrices(
    shape: tuple[int, ...], sigmas: Sequence[Width], config: LowField
) -> list[Float[Array, "_ _"] | Float[np.ndarray, "_ _"] | None]:
    """Return the resize and the blur of each axis as one matrix."""
    matrices = []
    for size, scale, sigma in zip(shape, per_axis(config.scale, len(shape), "scale"), sigmas, strict=True):
        matrix = None
        if scale != 1:
            small = int(size // scale)
            matrix = resize_matrix(small, size, config.antialias) @ resize_matrix(size, small, config.antialias)
        if not isinstance(sigma, float) or sigma > 0:
            blur = blur_matrix(size, sigma, min(config.radius, size - 1), config.padding)
            matrix = blur if matrix is None else jnp.matmul(blur, matrix, precision=jax.lax.Precision.HIGHEST)
        matrices.append(matrix)
    return matrices


LOWFIELD2025 = LowField()
LOWFIELD2026 = LowField(gamma=1.0, scale=1.43, sigma=2.0, radius=10, padding="zero", noise=0.0)
