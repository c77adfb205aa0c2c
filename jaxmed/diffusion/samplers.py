"""From noise to images: DDPM's ancestral chain, DDIM, DPM-Solver++(2M), and EDM's Heun and Euler steps.

Whatever a sampler does between two times is decided before it starts: `plan` computes a table of coefficients in
float64 on the host, one row per step, and one scan walks it. So a whole sampler is one traced program, and every
sampler runs on every schedule. All of them end at the image itself: the last row goes from the last time to no noise.

Sample i of a call draws its noise from `fold_in(fold_in(key, i), steps left)`: it is the same image in any batch,
chunk or layout over devices.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxmed.arrays.types import KeyArray
from jaxmed.config import NonNegative, Positive, Share, Size, Unbounded, checked
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.schedule import Schedule, VpContinuous, VpDiscrete

VP_LARGEST_RATIO = 80.0
"""sigma / alpha where EDM's grid begins on VP schedules: a cosine chain ends at 20,000, where no image is left."""


@dataclasses.dataclass(frozen=True)
@checked
class Ancestral:
    """The reverse chain of DDPM.

    Attributes:
        num_steps: Steps; absent means the whole of a discrete chain, other schedules need a number.
        variance: Variance of the noise added in a step: "fixed_large" is that of the forward step (beta_t), "posterior"
            that of q(x_s | x_t, x_0).
        times: Descending times to visit, in place of the schedule's own grid.

    Source: DDPM, arXiv:2006.11239, equation 7 and section 3.2.
    """

    num_steps: Size | None = None
    variance: Literal["fixed_large", "posterior"] = "fixed_large"
    times: tuple[float, ...] | None = None

    def __post_init__(self):
        _check_times(self.times)


@dataclasses.dataclass(frozen=True)
@checked
class Ddim:
    """DDIM: deterministic at eta = 0, DDPM with the posterior variance at eta = 1.

    Attributes:
        num_steps: Steps, each one evaluation of the network.
        eta: Share of the posterior's standard deviation that is drawn anew.
        times: Descending times to visit, in place of the schedule's own grid.

    Source: DDIM, arXiv:2010.02502, equations 12 and 16.
    """

    num_steps: Size = 50
    eta: Share = 0.0
    times: tuple[float, ...] | None = None

    def __post_init__(self):
        _check_times(self.times)


@dataclasses.dataclass(frozen=True)
@checked
class DpmSolver:
    """DPM-Solver++(2M): second order from one evaluation per step and the memory of the one before.

    The first step is of first order, and so is the last one: it goes to zero noise, where log(alpha / sigma) ends.

    Attributes:
        num_steps: Steps, each one evaluation of the network.
        rho: Exponent of the grid of sigma / alpha (EDM's equation 5); absent means the schedule's own grid, whose
            steps in lambda are too uneven for order two on VP schedules.
        times: Descending times to visit, in place of a grid.

    Source: DPM-Solver++, arXiv:2211.01095, algorithm 2.
    """

    num_steps: Size = 20
    rho: Positive | None = 7.0
    times: tuple[float, ...] | None = None

    def __post_init__(self):
        _check_times(self.times)


@dataclasses.dataclass(frozen=True)
@checked
class Heun:
    """EDM's sampler: Heun's steps in sigma / alpha, with optional fresh noise before each.

    Attributes:
        num_steps: Steps, each two evaluations of the network, the last one.
        order: 1 leaves the correction out: Euler's method, one evaluation per step.
        churn: S_churn: how much noise is added over the whole run; 0 is deterministic.
        churn_min: Least sigma / alpha at which noise is added.
        churn_max: Largest.
        churn_noise: S_noise: standard deviation of the added noise, relative.
        rho: Exponent of the grid of sigma / alpha (equation 5); absent means the schedule's own grid.
        times: Descending times to visit, in place of a grid.

    Source: EDM, arXiv:2206.00364, algorithm 2; table 1 for other schedules.
    """

    num_steps: Size = 18
    order: Literal[1, 2] = 2
    churn: NonNegative = 0.0
    churn_min: NonNegative = 0.0
    churn_max: Unbounded = float("inf")
    churn_noise: NonNegative = 1.0
    rho: Positive | None = 7.0
    times: tuple[float, ...] | None = None

    def __post_init__(self):
        _check_times(self.times)


Sampler: TypeAlias = Ancestral | Ddim | DpmSolver | Heun


class SamplerState(NamedTuple):
    """What the next step needs.

    Attributes:
        x: Noisy images.
        recalled: The images expected one step ago; DPM-Solver reads them.
    """

    x: Float[Array, "batch ..."]
    recalled: Float[Array, "batch ..."]


class LinearSteps(NamedTuple):
    """Steps of the form x' = keep x + pull D(x, t) + recall D_before + noise z, in order.

    Attributes:
        time: t.
        keep: Factor of the noisy image.
        pull: Factor of the expected image.
        recall: Factor of the image expected one step before.
        noise: Standard deviation of fresh noise.
        left: Steps that come after this one; names the random numbers.
        next_alpha: alpha where the step ends.
    """

    time: Any
    keep: Any
    pull: Any
    recall: Any
    noise: Any
    left: Any
    next_alpha: Any


class HeunSteps(NamedTuple):
    """Heun's steps on x / alpha, whose noise is the ratio sigma / alpha, in order.

    Attributes:
        start_alpha: alpha of the state, before fresh noise is added.
        noise: Standard deviation of the fresh noise, in x / alpha.
        time: t after it was added.
        alpha: There.
        ratio: There.
        next_time: t at the end of the step; a last step to the image itself repeats the last time.
        next_alpha: At the end.
        next_ratio: At the end.
        corrects: 1 where the slope at the end is averaged in, 0 for Euler's step.
        left: Steps that come after this one.
    """

    start_alpha: Any
    noise: Any
    time: Any
    alpha: Any
    ratio: Any
    next_time: Any
    next_alpha: Any
    next_ratio: Any
    corrects: Any
    left: Any


def sample(
    key: KeyArray,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    sampler: Sampler,
    *,
    chunk: int | None = None,
    indices: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch ..."]:
    """Draw images from a diffusion prior.

    Under `jit`, under `vmap` (over keys, or what the denoiser closes over), and differentiable through the denoiser
    forward and in reverse.

    Args:
        key: Consumed.
        denoiser: The prior.
        shape: Number of images, then the shape of one.
        sampler: Method and its settings.
        chunk: Images in memory at a time, one group after the other; all when absent.
        indices: Numbers of the images to draw, 0 to batch - 1 when absent. Place them over devices to shard the work;
            other numbers give further images of the same key.
    """
    if indices is None:
        indices = jnp.arange(shape[0])
    if len(indices) != shape[0]:
        raise ValueError(f"indices: expected {shape[0]}, one for each image of shape {shape}, got {len(indices)}")

    def draw(indices: Int[Array, " chunk"]) -> Float[Array, "chunk ..."]:
        keys = sample_keys(key, indices)
        return run(keys, denoiser, init(keys, denoiser.schedule, shape[1:], sampler), sampler)

    if chunk is None or chunk >= shape[0]:
        return draw(indices)
    if chunk < 1:
        raise ValueError(f"chunk: expected 1 or more, got {chunk}")
    padded = jnp.resize(indices, (-(-shape[0] // chunk), chunk))
    return jax.lax.map(draw, padded).reshape(-1, *shape[1:])[: shape[0]]


def sample_keys(key: KeyArray, indices: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """Return the root keys of samples by their numbers."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, indices)


def draw_noise(
    keys: Key[Array, " batch"], left: int | Int[Array, ""], shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Float[Array, "batch ..."]:
    """Draw standard normal noise of each sample at the step with so many steps left; on a whole chain this is t."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, left), shape, dtype))(keys)


def init(keys: Key[Array, " batch"], schedule: Schedule, shape: tuple[int, ...], sampler: Sampler) -> SamplerState:
    """Draw noise at the sampler's first time."""
    times = grid(schedule, sampler)
    x = float(schedule.sigma(times[:1])[0]) * draw_noise(keys, len(times), shape)
    return SamplerState(x, jnp.zeros_like(x))


def run(
    keys: Key[Array, " batch"],
    denoiser: Denoiser,
    state: SamplerState,
    sampler: Sampler,
    clip: tuple[float, float] | None = None,
) -> Float[Array, "batch ..."]:
    """Take every step of a sampler.

    Args:
        keys: Root keys of the samples.
        denoiser: The prior.
        state: Where the samples are at the sampler's first time.
        sampler: Method and its settings.
        clip: As of `step`; of `Ddim` alone.
    """
    if clip is not None and not isinstance(sampler, Ddim):
        raise ValueError(f"clip: expected none for {type(sampler).__name__}, got {clip}; clip the denoiser")
    steps = plan(denoiser.schedule, sampler)
    has_noise = bool(np.any(steps.noise))

    def advance(state: SamplerState, row: Any) -> tuple[SamplerState, None]:
        return step(keys, denoiser, state, row, has_noise, clip), None

    rows = jax.tree.map(jnp.asarray, steps)
    return jax.lax.scan(advance, state, rows)[0].x


def step(
    keys: Key[Array, " batch"],
    denoiser: Denoiser,
    state: SamplerState,
    row: LinearSteps | HeunSteps,
    has_noise: bool = True,
    clip: tuple[float, float] | None = None,
) -> SamplerState:
    """Take one step.

    Args:
        keys: Root keys of the samples.
        denoiser: The prior.
        state: Where the samples are.
        row: One row of `plan`.
        has_noise: Whether any row draws noise; drawing costs time even where its factor is 0.
        clip: Range in which DDIM holds the expected image, while the expected noise stays what it was before: the
            `clip_sample` of MONAI's and diffusers' schedulers. A denoiser that clips changes both.
    """
    x = state.x
    fresh = draw_noise(keys, row.left, x.shape[1:], x.dtype) if has_noise else jnp.zeros_like(x)
    # Coefficients in the precision of the images, times never below float32.
    real = jnp.promote_types(x.dtype, jnp.float32)
    row = type(row)(*(jnp.asarray(value).astype(real) for value in row))
    if isinstance(row, HeunSteps):
        return _heun_step(denoiser, x, row, fresh)
    mean = denoiser.denoise(x, jnp.full(len(x), row.time))
    moved = row.keep * x + row.pull * mean + row.recall * state.recalled + row.noise * fresh
    if clip is not None:
        moved = moved + row.next_alpha * (jnp.clip(mean, *clip) - mean)
    return SamplerState(moved.astype(x.dtype), mean.astype(x.dtype))


def grid(schedule: Schedule, sampler: Sampler) -> Float[np.ndarray, " step"]:
    """Return the times at which a sampler meets the network, descending."""
    if sampler.times is not None:
        return np.asarray(sampler.times, np.float64)
    if sampler.num_steps is None:
        if not isinstance(schedule, VpDiscrete):
            raise ValueError(
                f"num_steps: expected a number for {type(schedule).__name__}, which has no chain, got None"
            )
        return schedule.times()
    if isinstance(sampler, DpmSolver | Heun) and sampler.rho is not None and sampler.num_steps > 1:
        return _edm_grid(schedule, sampler.num_steps, sampler.rho)
    return schedule.times(sampler.num_steps)


def plan(schedule: Schedule, sampler: Sampler, to_image: bool = True) -> LinearSteps | HeunSteps:
    """Tabulate a sampler's steps in float64.

    Args:
        schedule: The prior's schedule.
        sampler: Method and its settings.
        to_image: Whether the last step goes from the last time to the image; without it the plan ends at that time.
    """
    times = grid(schedule, sampler)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    ends = _Ends(times, alpha, sigma, np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0), np.arange(len(times))[::-1])
    match sampler:
        case Heun():
            steps = _plan_heun(schedule, sampler, ends)
        case DpmSolver():
            steps = _plan_multistep(ends)
        case _:
            steps = _plan_chain(sampler, ends)
    return steps if to_image else type(steps)(*(column[:-1] for column in steps))


class _Ends(NamedTuple):
    """Where steps begin and end."""

    times: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    next_alpha: np.ndarray
    next_sigma: np.ndarray
    left: np.ndarray


def _plan_chain(sampler: Ancestral | Ddim, ends: _Ends) -> LinearSteps:
    """Tabulate DDPM and DDIM from q(x_s | x_t, x_0), which holds for any alpha and sigma."""
    times, alpha, sigma, next_alpha, next_sigma, left = ends
    forward = sigma**2 - (alpha / next_alpha) ** 2 * next_sigma**2  # variance that the step from s to t adds
    posterior = forward * next_sigma**2 / sigma**2
    if isinstance(sampler, Ancestral):
        keep = alpha / next_alpha * next_sigma**2 / sigma**2
        pull = next_alpha * forward / sigma**2
        variance = forward if sampler.variance == "fixed_large" else posterior
        noise = np.sqrt(np.where(next_sigma > 0, variance, 0.0))
    else:
        noise = sampler.eta * np.sqrt(posterior)
        keep = np.sqrt(next_sigma**2 - noise**2) / sigma
        pull = next_alpha - keep * alpha
    return LinearSteps(times, keep, pull, np.zeros_like(keep), noise, left, next_alpha)


def _plan_multistep(ends: _Ends) -> LinearSteps:
    """Tabulate DPM-Solver++(2M) from steps h in lambda = log(alpha / sigma)."""
    times, alpha, sigma, next_alpha, next_sigma, left = ends
    with np.errstate(divide="ignore"):
        step = np.log(next_alpha / next_sigma) - np.log(alpha / sigma)  # infinite at the last step
    before = np.append(step[:1], step[:-1])
    share = np.where(np.isfinite(step), 0.5 * step / before, 0.0)  # 1 / (2 r)
    share[0] = 0.0
    pull = -next_alpha * np.expm1(-step)
    keep, noise = next_sigma / sigma, np.zeros_like(pull)
    return LinearSteps(times, keep, pull * (1 + share), -pull * share, noise, left, next_alpha)


def _plan_heun(schedule: Schedule, sampler: Heun, ends: _Ends) -> HeunSteps:
    """Tabulate EDM's algorithm 2; a raised noise level never leaves the schedule."""
    times, start_alpha, sigma, next_alpha, next_sigma, left = ends
    start_ratio, next_ratio = sigma / start_alpha, next_sigma / next_alpha
    is_churned = (start_ratio >= sampler.churn_min) & (start_ratio <= sampler.churn_max) & (sampler.churn > 0)
    raised = start_ratio * (1 + min(sampler.churn / len(times), np.sqrt(2) - 1))
    time = np.where(is_churned, schedule.time_at(raised), times)
    alpha = np.where(is_churned, schedule.alpha(time), start_alpha)
    ratio = np.where(is_churned, schedule.sigma(time) / alpha, start_ratio)
    noise = sampler.churn_noise * np.sqrt(np.maximum(ratio**2 - start_ratio**2, 0.0))
    next_time = np.append(times[1:], times[-1])
    corrects = np.where(next_ratio > 0, float(sampler.order == 2), 0.0)
    return HeunSteps(start_alpha, noise, time, alpha, ratio, next_time, next_alpha, next_ratio, corrects, left)


def _heun_step(
    denoiser: Denoiser, x: Float[Array, "batch ..."], row: HeunSteps, fresh: Float[Array, "batch ..."]
) -> SamplerState:
    """Take EDM's step in u = x / alpha, where du / d ratio = (u - D) / ratio."""

    def slope(u: Array, time: Array, alpha: Array, ratio: Array) -> tuple[Array, Array]:
        mean = denoiser.denoise((alpha * u).astype(x.dtype), jnp.full(len(x), time))
        return (u - mean) / ratio, mean

    u = x / row.start_alpha + row.noise * fresh
    length = row.next_ratio - row.ratio
    first, mean = slope(u, row.time, row.alpha, row.ratio)

    def correct(first: Array) -> Array:
        second, _ = slope(u + length * first, row.next_time, row.next_alpha, row.next_ratio)
        return 0.5 * (first + second)

    # A condition, so that the last step does not pay for an evaluation that it cannot use.
    average = jax.lax.cond(row.corrects > 0, correct, lambda first: first, first)
    return SamplerState((row.next_alpha * (u + length * average)).astype(x.dtype), mean.astype(x.dtype))


def _edm_grid(schedule: Schedule, num_steps: int, rho: float) -> np.ndarray:
    """Return times evenly spaced in (sigma / alpha)^(1 / rho); on a discrete chain they fall between its steps."""
    ends = schedule.times(2)
    first, last = schedule.sigma(ends) / schedule.alpha(ends)
    if isinstance(schedule, VpDiscrete | VpContinuous):
        first = min(first, VP_LARGEST_RATIO)
    inner = np.linspace(first ** (1 / rho), last ** (1 / rho), num_steps) ** rho
    return np.append(schedule.time_at(inner[:-1]), ends[1])


def _check_times(times: tuple[float, ...] | None) -> None:
    if times is not None and (not times or any(low >= high for high, low in zip(times, times[1:], strict=False))):
        raise ValueError(f"times: expected one or more, descending, got {times}")
