"""One view of every diffusion network: the mean of the image given its noisy version.

Networks predict the noise, the image, the velocity, the score, or EDM's normalised mixture. `make_denoiser` turns each
into D(x, t) = E[x_0 | x_t = x], and everything else reads D: samplers, likelihoods, posterior methods.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from jaxmed.arrays.types import Params, Scalar
from jaxmed.diffusion.schedule import Edm, Schedule, Ve, expand_like

Prediction: TypeAlias = Literal["epsilon", "x0", "v", "score", "edm"]


class Denoiser(NamedTuple):
    """A diffusion prior.

    Attributes:
        denoise: (x [batch *shape], t [batch]) -> E[x_0 | x_t = x], of the shape of x; samples do not see each other.
        schedule: How x_t came from x_0.
    """

    denoise: Callable[[Float[Array, "batch ..."], Float[Array, " batch"]], Float[Array, "batch ..."]]
    schedule: Schedule


class Preconditioning(NamedTuple):
    """How a network's output F becomes D, and what F is trained towards.

    D = skip x + out F(scale x, time); F's target is clean x_0 + noise eps; the loss is weight |F - target|^2.

    Attributes:
        skip: Share of the noisy image in D.
        out: Factor of the network's output in D.
        scale: Factor of the network's input.
        time: What the network is told about t.
        clean: Share of the image in the target.
        noise: Share of the noise in the target.
        weight: Weight of the squared error of the network's output.
    """

    skip: Float[Array, "..."]
    out: Float[Array, "..."]
    scale: Float[Array, "..."]
    time: Float[Array, "..."]
    clean: Float[Array, "..."]
    noise: Float[Array, "..."]
    weight: Float[Array, "..."]


def precondition(schedule: Schedule, prediction: Prediction, t: Num[Array, "..."]) -> Preconditioning:
    """Return the coefficients of one kind of network at times t.

    Args:
        schedule: The prior's schedule.
        prediction: What the network predicts; "edm" takes the row of EDM's table 1 that belongs to the schedule: on a
            VP schedule the noise, on VE minus the noise, on EDM a mixture of unit variance.
        t: Times.

    Source: EDM, arXiv:2206.00364, table 1, whose weights are all 1 on F; progressive distillation, arXiv:2202.00512,
        section 4 (v); score SDE, arXiv:2011.13456, equation 7 (the score's loss weighted by sigma^2).
    """
    alpha, sigma, time = schedule.alpha(t), schedule.sigma(t), schedule.network_time(t)
    zero, one = jnp.zeros_like(sigma), jnp.ones_like(sigma)
    match prediction:
        case "epsilon":
            return Preconditioning(1 / alpha, -sigma / alpha, one, time, zero, one, one)
        case "x0":
            return Preconditioning(zero, one, one, time, one, zero, one)
        case "v":
            total = alpha**2 + sigma**2
            return Preconditioning(alpha / total, -sigma / total, one, time, -sigma, alpha, one)
        case "score":
            return Preconditioning(1 / alpha, sigma**2 / alpha, one, time, zero, -1 / sigma, sigma**2)
        case "edm" if isinstance(schedule, Edm):
            data = schedule.sigma_data
            total = sigma**2 + data**2
            root = jnp.sqrt(total)
            skip, out = data**2 / total, sigma * data / root
            return Preconditioning(skip, out, 1 / root, time, sigma / (data * root), -data / root, one)
        case "edm" if isinstance(schedule, Ve):
            return Preconditioning(one, sigma, one, time, zero, -one, one)
        case "edm":
            return precondition(schedule, "epsilon", t)
    raise ValueError(f"prediction: expected epsilon, x0, v, score or edm, got {prediction!r}")


def make_denoiser(
    predict: Callable[..., Any],
    schedule: Schedule,
    prediction: Prediction = "epsilon",
    clip: tuple[float, float] | None = None,
) -> Denoiser:
    """Turn a network into a denoiser.

    Args:
        predict: (x [batch *shape], time [batch]) -> output of the shape of x; the bare network with its parameters
            closed over. The time is the schedule's `network_time`.
        schedule: It was trained for.
        prediction: What it predicts.
        clip: Range of the images; D is held inside, as the chains of DDPM do at every step.
    """
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"clip: expected low < high, got {clip}")

    def denoise(x: Float[Array, "batch ..."], t: Num[Array, " batch"]) -> Float[Array, "batch ..."]:
        at = precondition(schedule, prediction, t)
        output = predict(expand_like(at.scale, x) * x, at.time)
        mean = expand_like(at.skip, x) * x + expand_like(at.out, x) * output.astype(x.dtype)
        return mean if clip is None else jnp.clip(mean, *clip)

    return Denoiser(denoise, schedule)


def epsilon(denoiser: Denoiser, x: Float[Array, "batch ..."], t: Num[Array, " batch"]) -> Float[Array, "batch ..."]:
    """Return the expected noise, (x - alpha D) / sigma."""
    alpha, sigma = _levels(denoiser, x, t)
    return (x - alpha * denoiser.denoise(x, t)) / sigma


def score(denoiser: Denoiser, x: Float[Array, "batch ..."], t: Num[Array, " batch"]) -> Float[Array, "batch ..."]:
    """Return the gradient of the log density of x_t, (alpha D - x) / sigma^2 (Tweedie)."""
    alpha, sigma = _levels(denoiser, x, t)
    return (alpha * denoiser.denoise(x, t) - x) / sigma**2


def velocity(denoiser: Denoiser, x: Float[Array, "batch ..."], t: Num[Array, " batch"]) -> Float[Array, "batch ..."]:
    """Return v = alpha eps - sigma x_0, both expected."""
    alpha, sigma = _levels(denoiser, x, t)
    mean = denoiser.denoise(x, t)
    return alpha * (x - alpha * mean) / sigma - sigma * mean


def denoising_loss(
    apply: Callable[..., Any],
    schedule: Schedule,
    params: Params,
    keys: Key[Array, " batch"],
    batch: Mapping[str, Array],
    prediction: Prediction = "epsilon",
) -> tuple[Scalar, dict[str, Scalar]]:
    """Return the weighted squared error of a network on noisy images.

    Args:
        apply: (params, x, time) -> the network's output.
        schedule: Draws the times too.
        params: The network's parameters.
        keys: One per image, for its time and its noise.
        batch: "image" [batch, *shape, channel].
        prediction: What the network predicts.

    Returns:
        The loss, and as metrics the mean squared error of the denoised image, which compares across predictions.

    Source: DDPM, arXiv:2006.11239, equation 14; EDM, arXiv:2206.00364, equation 8 and table 1.
    """
    image = batch["image"].astype(jnp.float32)
    time_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    t = schedule.draw_times(time_keys)
    noise = jax.vmap(lambda key, one: jax.random.normal(key, one.shape))(noise_keys, image)
    x = expand_like(schedule.alpha(t), image) * image + expand_like(schedule.sigma(t), image) * noise
    at = precondition(schedule, prediction, t)
    output = apply(params, expand_like(at.scale, x) * x, at.time).astype(jnp.float32)
    error = output - (expand_like(at.clean, x) * image + expand_like(at.noise, x) * noise)
    per_image = jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
    return jnp.mean(at.weight * per_image), {"image_error": jnp.mean(jnp.square(at.out) * per_image)}


def _levels(denoiser: Denoiser, x: Array, t: Array) -> tuple[Array, Array]:
    return expand_like(denoiser.schedule.alpha(t), x), expand_like(denoiser.schedule.sigma(t), x)
