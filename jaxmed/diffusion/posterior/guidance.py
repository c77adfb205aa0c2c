"""A prior that knows the measurement: guided denoisers, and the run that any sampler makes of one.

With a measurement the score gains the gradient of log p(y | x_t), and the denoiser by Tweedie a step
D + C A^T (A C A^T + noise^2)^-1 (y - A D). Methods differ in the covariance C of the image given x_t.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxmed.arrays.types import KeyArray
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.fidelity import Operator, norm
from jaxmed.diffusion.posterior.info import Info
from jaxmed.diffusion.samplers import HeunSteps, Sampler, SamplerState, draw_noise, grid, plan, sample_keys, step
from jaxmed.diffusion.schedule import Schedule
from jaxmed.solvers.conjugate_gradient import conjugate_gradient


class Linearised(NamedTuple):
    """An operator around a batch of images.

    Attributes:
        misfit: y - A(image).
        push: A's Jacobian times a change of the images.
        pull: Its transpose times a change of the measurements.
    """

    misfit: Float[Array, "batch ..."]
    push: Callable[[Float[Array, "batch ..."]], Float[Array, "batch ..."]]
    pull: Callable[[Float[Array, "batch ..."]], Float[Array, "batch ..."]]


def linearise(
    operator: Operator, images: Float[Array, "batch ..."], measurement: Float[Array, "batch ..."]
) -> Linearised:
    """Return the misfit and both products with the operator's Jacobian; a linear operator's is the operator itself."""
    predicted, push = jax.linearize(jax.vmap(lambda image: operator(image)), images)
    transposed = jax.linear_transpose(push, images)
    return Linearised(measurement - predicted, push, lambda change: transposed(change)[0])


def proximal_fit(
    operator: Operator,
    images: Float[Array, "batch ..."],
    measurement: Float[Array, "batch ..."],
    weight: Float[Array, ""],
    num_steps: int,
) -> tuple[Float[Array, "batch ..."], Float[Array, " batch"]]:
    """Return argmin_u |y - A u|^2 + weight |u - image|^2, A linearised at the image, and |y - A(image)|.

    It is solved in the space of the measurement by so many steps of conjugate gradients.
    """
    at = linearise(operator, images, measurement)

    def seen(change: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        return at.push(at.pull(change)) + weight * change

    fitted = images + at.pull(conjugate_gradient(seen, at.misfit, num_steps))
    return fitted, norms(at.misfit)


def norms(values: Float[Array, "batch ..."]) -> Float[Array, " batch"]:
    """Return the Euclidean norm of each sample, with gradient 0 at 0."""
    return jax.vmap(norm)(values)


def residual_norms(
    operator: Operator, images: Float[Array, "batch ..."], measurement: Float[Array, "batch ..."]
) -> Float[Array, " batch"]:
    """Return |y - A(image)| of each sample."""
    return jax.vmap(lambda image, y: norm(y - operator(image)))(images, measurement)


def run_guided(
    key: KeyArray,
    guided: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Operator,
    initial: Float[Array, "batch ..."],
    sampler: Sampler,
    cost: int,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Sample with a guided denoiser.

    Args:
        key: Consumed.
        guided: Knows the measurement.
        measurement: y, for the record.
        operator: A, for the record.
        initial: Gives the shape; it is noised to the sampler's first time, so zeros begin in pure noise.
        sampler: Any.
        cost: Evaluations of the network in one of the guided denoiser.
        indices: Numbers of the samples, which name their random numbers; 0 to batch - 1 when absent.

    Returns:
        The images, and the run's record; its residuals are those of the guided means.
    """
    batch, schedule = len(initial), guided.schedule
    keys = sample_keys(key, jnp.arange(batch) if indices is None else indices)
    steps = plan(schedule, sampler)
    has_noise = bool(np.any(steps.noise))
    x = begin(keys, schedule, sampler, initial)

    def advance(state: SamplerState, row) -> tuple[SamplerState, Array]:
        state = step(keys, guided, state, row, has_noise)
        return state, residual_norms(operator, state.recalled, measurement)

    state, residuals = jax.lax.scan(advance, SamplerState(x, jnp.zeros_like(x)), jax.tree.map(jnp.asarray, steps))
    calls = len(steps.time) + (int(np.sum(steps.corrects)) if isinstance(steps, HeunSteps) else 0)
    return state.x, make_info(residuals, jnp.ones_like(residuals), cost * calls)


def begin(
    keys: Key[Array, " batch"], schedule: Schedule, sampler: Sampler, initial: Float[Array, "batch ..."]
) -> Float[Array, "batch ..."]:
    """Noise estimates to a sampler's first time; zeros give pure noise."""
    times = grid(schedule, sampler)
    alpha, sigma = float(schedule.alpha(times[:1])[0]), float(schedule.sigma(times[:1])[0])
    return alpha * initial + sigma * draw_noise(keys, len(times), initial.shape[1:], initial.dtype)


def make_info(residuals: Float[Array, "step batch"], step_sizes: Float[Array, "step batch"], evaluations: int) -> Info:
    """Return the record of a run in which all samples take every step, and none searches."""
    num_steps, batch = residuals.shape
    return Info(
        residuals=residuals,
        step_sizes=step_sizes,
        start_time=jnp.full(batch, num_steps - 1, jnp.int32),
        evaluations=jnp.full(batch, evaluations, jnp.int32),
        flags=jnp.zeros((num_steps, batch), jnp.int32),
    )
