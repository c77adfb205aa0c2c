"""The reverse chain of a prior as a table indexed by steps left, so that every sample can be at its own step."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxmed.diffusion.samplers import Ancestral, Ddim, LinearSteps, draw_noise, plan
from jaxmed.diffusion.schedule import Schedule, spread


class Chain(NamedTuple):
    """Steps x' = keep x + pull E[x_0 | x] + noise z; entry n has n steps after it, and entry 0 ends at the image.

    On the whole chain of a discrete schedule n is its time t.

    Attributes:
        time: t.
        alpha: Of the schedule, there.
        sigma: Of the schedule, there.
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
        schedule: Of the prior.
        sampler: Which times to visit and how much noise to add.
        dtype: Of the images; times are float32 at least.
    """
    steps = plan(schedule, sampler)
    assert isinstance(steps, LinearSteps)
    columns = (steps.time, schedule.alpha(steps.time), schedule.sigma(steps.time), steps.keep, steps.pull, steps.noise)
    real = jnp.promote_types(dtype, jnp.float32)
    return Chain(*(jnp.asarray(column[::-1].copy(), real) for column in columns))


def enter(
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
    x = spread(chain.alpha[start], image) * image + spread(chain.sigma[start], image) * fresh
    return x.astype(image.dtype)


def reverse(
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
