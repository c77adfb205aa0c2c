"""What the methods share: the record of a run, tables of steps, operators around images, and guided denoisers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxmed.arrays.types import KeyArray
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.fidelity import Operator, norm
from jaxmed.diffusion.samplers import (
    Ancestral,
    Ddim,
    HeunSteps,
    LinearSteps,
    Sampler,
    SamplerState,
    draw_noise,
    grid,
    plan,
    sample_keys,
    step,
)
from jaxmed.diffusion.schedule import Schedule, expand_like
from jaxmed.solvers.conjugate_gradient import conjugate_gradient

# Records ------------------------------------------------------------------------------------------------------------


class Info(NamedTuple):
    """Diagnostics of a run, per sample.

    Attributes:
        residuals: |y - A(E[x_0 | x_t])| at each step, in units of the measurement.
        step_sizes: Factor of the data term at each step; what it multiplies is the method's to say.
        start_time: Where each sample entered the chain.
        evaluations: How often the network ran, forward alone or forward and backward; where more backward passes follow
            one forward pass, each of them counts.
        flags: Verdict of the line search at each step; 0 is fine.
    """

    residuals: Float[Array, "step batch"]
    step_sizes: Float[Array, "step batch"]
    start_time: Int[Array, " batch"]
    evaluations: Int[Array, " batch"]
    flags: Int[Array, "step batch"]


def make_info(residuals: Float[Array, "step batch"], step_sizes: Float[Array, "..."] | float, evaluations: int) -> Info:
    """Return the record of a run in which all samples take every step, and none searches."""
    num_steps, batch = residuals.shape
    sizes = jnp.asarray(step_sizes, residuals.dtype)
    return Info(
        residuals=residuals,
        step_sizes=jnp.broadcast_to(sizes[:, None] if sizes.ndim == 1 else sizes, residuals.shape),
        start_time=jnp.full(batch, num_steps - 1, jnp.int32),
        evaluations=jnp.full(batch, evaluations, jnp.int32),
        flags=jnp.zeros((num_steps, batch), jnp.int32),
    )


# Steps --------------------------------------------------------------------------------------------------------------


def root_keys(
    key: KeyArray, initial: Float[Array, "batch ..."], indices: Int[Array, " batch"] | None
) -> Key[Array, " batch"]:
    """Return the root keys of samples, by their numbers or else their places."""
    return sample_keys(key, jnp.arange(len(initial)) if indices is None else indices)


def walk(
    advance: Callable[[Any, tuple[Array, ...]], tuple[Any, Float[Array, " batch"]]],
    state: Any,
    columns: Sequence[Float[np.ndarray, "step ..."]],
    dtype: Any,
    step_sizes: Float[np.ndarray, " step"] | float = 1.0,
    cost: int = 1,
) -> tuple[Any, Info]:
    """Take every step of a table, and return the last state and the run's record.

    Args:
        advance: (state, row) -> (state, residual of each sample). A row holds an entry of every column and, last, the
            number of steps left, which names the random numbers.
        state: The first.
        columns: One entry per step, computed in double precision.
        dtype: Type of the images; the table has it too, or float32 where that is finer.
        step_sizes: For the record.
        cost: Evaluations of the network in a step.
    """
    real = jnp.promote_types(dtype, jnp.float32)
    num_steps = len(columns[0])
    table = (*(jnp.asarray(column, real) for column in columns), jnp.arange(num_steps)[::-1])
    state, residuals = jax.lax.scan(advance, state, table)
    return state, make_info(residuals, jnp.asarray(step_sizes, real), cost * num_steps)


def begin(
    keys: Key[Array, " batch"], schedule: Schedule, sampler: Sampler, initial: Float[Array, "batch ..."]
) -> Float[Array, "batch ..."]:
    """Noise estimates to a sampler's first time; zeros give pure noise."""
    times = grid(schedule, sampler)
    alpha, sigma = float(schedule.alpha(times[:1])[0]), float(schedule.sigma(times[:1])[0])
    return alpha * initial + sigma * draw_noise(keys, len(times), initial.shape[1:], initial.dtype)


class Chain(NamedTuple):
    """A reverse chain as a table indexed by steps left, so that every sample can be at its own step.

    Steps are x' = keep x + pull E[x_0 | x] + noise z; entry n has n steps after it, and entry 0 ends at the image. On
    the whole chain of a discrete schedule n is its time t.

    Attributes:
        time: t.
        alpha: The schedule's, there.
        sigma: The schedule's, there.
        keep: Factor of the noisy image.
        pull: Factor of the expected image.
        noise: Standard deviation of fresh noise.
    """

    time: Float[Array, " step"]
    alpha: Float[Array, " step"]
    sigma: Float[Array, " step"]
    keep: Float[Array, " step"]
    pull: Float[Array, " step"]
    noise: Float[Array, " step"]


def make_chain(schedule: Schedule, sampler: Ancestral | Ddim, dtype: jnp.dtype) -> Chain:
    """Tabulate a sampler's steps, computed in double precision.

    Args:
        schedule: The prior's schedule.
        sampler: Which times to visit and how much noise to add.
        dtype: Type of the images; times are float32 at least.
    """
    steps = plan(schedule, sampler)
    assert isinstance(steps, LinearSteps)
    columns = (steps.time, schedule.alpha(steps.time), schedule.sigma(steps.time), steps.keep, steps.pull, steps.noise)
    real = jnp.promote_types(dtype, jnp.float32)
    return Chain(*(jnp.asarray(column[::-1].copy(), real) for column in columns))


def add_noise(
    chain: Chain, keys: Key[Array, " batch"], image: Float[Array, "batch ..."], start: Int[Array, " batch"]
) -> Float[Array, "batch ..."]:
    """Noise images to the level of their start: alpha image + sigma z.

    Args:
        chain: The table.
        keys: Root keys of the samples.
        image: Estimates of the images; zeros begin in pure noise where the chain does.
        start: Steps left of each.
    """
    fresh = draw_noise(keys, len(chain.time), image.shape[1:], image.dtype)
    x = expand_like(chain.alpha[start], image) * image + expand_like(chain.sigma[start], image) * fresh
    return x.astype(image.dtype)


def reverse_step(
    chain: Chain,
    keys: Key[Array, " batch"],
    x: Float[Array, "batch ..."],
    mean: Float[Array, "batch ..."],
    left: Int[Array, ""],
) -> Float[Array, "batch ..."]:
    """Take one step of the prior.

    Args:
        chain: The table.
        keys: Root keys of the samples.
        x: Noisy images.
        mean: What they are expected to be without noise.
        left: Steps left; names the noise.
    """
    fresh = draw_noise(keys, left, x.shape[1:], x.dtype)
    return (chain.keep[left] * x + chain.pull[left] * mean + chain.noise[left] * fresh).astype(x.dtype)


# Measurements -------------------------------------------------------------------------------------------------------


class Linearised(NamedTuple):
    """An operator around a batch of images.

    Attributes:
        residual: y - A(image).
        jvp: A's Jacobian times a change of the images.
        vjp: Its transpose times a change of the measurements.
    """

    residual: Float[Array, "batch ..."]
    jvp: Callable[[Float[Array, "batch ..."]], Float[Array, "batch ..."]]
    vjp: Callable[[Float[Array, "batch ..."]], Float[Array, "batch ..."]]


def linearise(
    operator: Operator, images: Float[Array, "batch ..."], measurement: Float[Array, "batch ..."]
) -> Linearised:
    """Return the residual and both products with the operator's Jacobian; a linear operator's is the operator."""
    predicted, jvp = jax.linearize(jax.vmap(lambda image: operator(image)), images)
    transposed = jax.linear_transpose(jvp, images)
    return Linearised(measurement - predicted, jvp, lambda change: transposed(change)[0])


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
        return at.jvp(at.vjp(change)) + weight * change

    fitted = images + at.vjp(conjugate_gradient(seen, at.residual, num_steps))
    return fitted, norms(at.residual)


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
    """Sample with a prior that knows the measurement; the arguments but two are a method's.

    With a measurement the score gains the gradient of log p(y | x_t), and the denoiser by Tweedie a step
    D + C A^T (A C A^T + noise^2)^-1 (y - A D). Methods differ in the covariance C of the image given x_t.

    Args:
        key: Consumed.
        guided: Knows the measurement.
        measurement: For the record.
        operator: For the record, whose residuals are those of the guided means.
        initial: Noised to the sampler's first time.
        sampler: Any.
        cost: Evaluations of the network in one of the guided denoiser.
        indices: Numbers of the samples.
    """
    keys, schedule = root_keys(key, initial, indices), guided.schedule
    steps = plan(schedule, sampler)
    has_noise = bool(np.any(steps.noise))
    x = begin(keys, schedule, sampler, initial)

    def advance(state: SamplerState, row) -> tuple[SamplerState, Array]:
        state = step(keys, guided, state, row, has_noise)
        return state, residual_norms(operator, state.recalled, measurement)

    state, residuals = jax.lax.scan(advance, SamplerState(x, jnp.zeros_like(x)), jax.tree.map(jnp.asarray, steps))
    calls = len(steps.time) + (int(np.sum(steps.corrects)) if isinstance(steps, HeunSteps) else 0)
    return state.x, make_info(residuals, 1.0, cost * calls)
