"""How fast an image becomes noise: x_t = alpha(t) x_0 + sigma(t) eps.

Every schedule answers the same questions, elementwise: alpha and sigma at a time, the time at which sigma / alpha has a
given value, the time that a network is told, a grid of times for a sampler, times for training. NumPy arrays get
float64 answers on the host, where samplers make their tables; jax arrays get answers in their own precision.
"""

import dataclasses
import functools
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Num

from jaxmed.config import Bounds, Positive, Probability, checked

# Numbers of any shape; what goes in on one side, host or device, comes out there.
Times = TypeVar("Times", Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
@checked
class VpDiscrete:
    """The variance-preserving chain of DDPM; t counts from 0 to num_steps - 1.

    Between two steps log alpha is linear in t, so that methods in continuous time run on the same prior.

    Attributes:
        num_steps: Length of the chain.
        betas: "cosine": beta from a squared cosine of the cumulative product, at most 0.999; "linear": from 1e-4 to
            0.02 for 1000 steps, scaled for others; "scaled-linear": the square root of beta is linear between those of
            `ends`, as in latent diffusion.
        ends: First and last beta of "scaled-linear".

    Source: DDPM, arXiv:2006.11239, section 2; improved DDPM, arXiv:2102.09672, equation 17; latent diffusion,
        arXiv:2112.10752, official code, for "scaled-linear"; CoCoLIT, arXiv:2508.01292, official code, for its ends.
    """

    num_steps: Annotated[int, Bounds(2, 65_536)] = 1000
    betas: Literal["cosine", "linear", "scaled-linear"] = "cosine"
    ends: tuple[Probability, Probability] = (0.0015, 0.0205)

    @property
    def beta_table(self) -> Float[np.ndarray, " time"]:
        """Variance added in each step, float64."""
        if self.betas == "scaled-linear":
            first, last = (end**0.5 for end in self.ends)
            return np.linspace(first, last, self.num_steps) ** 2
        if self.betas == "linear":
            scale = 1000 / self.num_steps
            return np.minimum(np.linspace(scale * 1e-4, scale * 0.02, self.num_steps), 0.999)
        edges = np.arange(self.num_steps + 1) / self.num_steps
        product = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - product[1:] / product[:-1], 0.999)

    @property
    def alpha_bar_table(self) -> Float[np.ndarray, " time"]:
        """Square of alpha at each step, float64."""
        return np.exp(2 * _log_alpha_table(self))

    def alpha(self, t: Times) -> Times:
        """Return what is left of the image."""
        return _numpy_of(t).exp(self._log_alpha(t))

    def sigma(self, t: Times) -> Times:
        """Return the standard deviation of the noise."""
        xp = _numpy_of(t)
        return xp.sqrt(-xp.expm1(2 * self._log_alpha(t)))

    def time_at(self, ratio: Times) -> Times:
        """Return t with sigma / alpha = ratio; the ends of the chain beyond them."""
        xp = _numpy_of(ratio)
        table = xp.asarray(_log_alpha_table(self)[::-1], ratio.dtype)
        steps = xp.arange(self.num_steps, dtype=ratio.dtype)[::-1]
        return xp.interp(-0.5 * xp.log1p(ratio**2), table, steps)

    def network_time(self, t: Times) -> Times:
        """Return what the network is told: t itself."""
        return t

    def times(self, num_steps: int | None = None) -> Float[np.ndarray, " step"]:
        """Return steps of the chain from last to first, both included and evenly spaced; all of them by default."""
        num_steps = self.num_steps if num_steps is None else num_steps
        _check_num_steps(num_steps)
        if num_steps > self.num_steps:
            raise ValueError(f"num_steps: expected at most the chain's {self.num_steps}, got {num_steps}")
        return np.round(np.linspace(self.num_steps - 1, 0, num_steps))

    def leading_times(self, num_steps: int) -> tuple[float, ...]:
        """Return the descending multiples of a whole stride that end at 0, for `times` of a sampler.

        50 steps of 1000 are 980, 960, ..., 20, 0: the last stride of the chain is never met.

        Source: "leading" spacing of MONAI's and diffusers' schedulers.
        """
        if not 1 <= num_steps <= self.num_steps:
            raise ValueError(f"num_steps: expected 1 to the chain's {self.num_steps}, got {num_steps}")
        stride = self.num_steps // num_steps
        return tuple(float(stride * step) for step in range(num_steps - 1, -1, -1))

    def draw_times(self, keys: Key[Array, " batch"]) -> Float[Array, " batch"]:
        """Draw times for training, uniform over the chain."""
        draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, self.num_steps))
        return draw(keys).astype(jnp.float32)

    def _log_alpha(self, t: Times) -> Times:
        xp = _numpy_of(t)
        # Whole numbers may come as integers; time itself is real.
        t = t if xp.issubdtype(t.dtype, xp.floating) else t.astype(xp.float32 if xp is jnp else xp.float64)
        return xp.interp(t, xp.arange(self.num_steps, dtype=t.dtype), xp.asarray(_log_alpha_table(self), t.dtype))


@dataclasses.dataclass(frozen=True)
@checked
class VpContinuous:
    """The variance-preserving diffusion of score SDEs; t from 0 to 1, and beta(t) is linear.

    Attributes:
        beta_min: beta(0).
        beta_max: beta(1).
        time_min: Where grids of samplers end.
        train_time_min: Least time drawn for training.
        network_steps: M: the network is told (M - 1) t.

    Source: score SDE, arXiv:2011.13456, appendix C; EDM, arXiv:2206.00364, table 1 for M and the least times.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    time_min: Probability = 1e-3
    train_time_min: Probability = 1e-5
    network_steps: int = 1000

    def __post_init__(self):
        if not 0 < self.beta_min < self.beta_max:
            raise ValueError(f"beta_min, beta_max: expected 0 < min < max, got {self.beta_min}, {self.beta_max}")

    def alpha(self, t: Times) -> Times:
        """Return what is left of the image."""
        return _numpy_of(t).exp(-0.5 * self._integral(t))

    def sigma(self, t: Times) -> Times:
        """Return the standard deviation of the noise."""
        xp = _numpy_of(t)
        return xp.sqrt(-xp.expm1(-self._integral(t)))

    def time_at(self, ratio: Times) -> Times:
        """Return t with sigma / alpha = ratio."""
        xp = _numpy_of(ratio)
        integral = xp.log1p(ratio**2)
        # The root of a quadratic, in the form that keeps its digits near t = 0.
        slope = self.beta_max - self.beta_min
        return 2 * integral / (xp.sqrt(self.beta_min**2 + 2 * slope * integral) + self.beta_min)

    def network_time(self, t: Times) -> Times:
        """Return what the network is told: (M - 1) t."""
        return (self.network_steps - 1) * t

    def times(self, num_steps: int) -> Float[np.ndarray, " step"]:
        """Return evenly spaced times from 1 down to `time_min`."""
        _check_num_steps(num_steps)
        return np.linspace(1.0, self.time_min, num_steps)

    def draw_times(self, keys: Key[Array, " batch"]) -> Float[Array, " batch"]:
        """Draw times for training, uniform."""
        return _uniform(keys, self.train_time_min, 1.0)

    def _integral(self, t: Times) -> Times:
        return 0.5 * t**2 * (self.beta_max - self.beta_min) + self.beta_min * t


@dataclasses.dataclass(frozen=True)
@checked
class Ve:
    """The variance-exploding diffusion: alpha is 1, and t is sigma.

    Attributes:
        sigma_min: Least noise, in units of the image.
        sigma_max: Most noise.

    Source: score SDE, arXiv:2011.13456, appendix C; EDM, arXiv:2206.00364, table 1.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __post_init__(self):
        _check_range(self.sigma_min, self.sigma_max)

    def alpha(self, t: Times) -> Times:
        """Return 1: the image stays."""
        return _numpy_of(t).ones_like(t)

    def sigma(self, t: Times) -> Times:
        """Return t."""
        return t

    def time_at(self, ratio: Times) -> Times:
        """Return t with sigma / alpha = ratio."""
        return ratio

    def network_time(self, t: Times) -> Times:
        """Return what the network is told: ln(sigma / 2)."""
        return _numpy_of(t).log(0.5 * t)

    def times(self, num_steps: int) -> Float[np.ndarray, " step"]:
        """Return a geometric grid from `sigma_max` down to `sigma_min`."""
        _check_num_steps(num_steps)
        return np.geomspace(self.sigma_max, self.sigma_min, num_steps)

    def draw_times(self, keys: Key[Array, " batch"]) -> Float[Array, " batch"]:
        """Draw noise levels for training, uniform in their logarithm."""
        return jnp.exp(_uniform(keys, np.log(self.sigma_min), np.log(self.sigma_max)))


@dataclasses.dataclass(frozen=True)
@checked
class Edm:
    """The design of EDM: alpha is 1, t is sigma, and network inputs and outputs have unit variance.

    Attributes:
        sigma_min: Least noise, in units of the image.
        sigma_max: Most noise.
        sigma_data: Standard deviation of the images; measure it, 0.5 is right for natural images in [-1, 1].
        rho: Exponent of the grid: more crowds steps towards low noise.
        log_mean: Mean of ln sigma in training.
        log_std: Standard deviation of ln sigma in training.

    Source: EDM, arXiv:2206.00364, table 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: Positive = 0.5
    rho: Positive = 7.0
    log_mean: float = -1.2
    log_std: Positive = 1.2

    def __post_init__(self):
        _check_range(self.sigma_min, self.sigma_max)

    def alpha(self, t: Times) -> Times:
        """Return 1: the image stays."""
        return _numpy_of(t).ones_like(t)

    def sigma(self, t: Times) -> Times:
        """Return t."""
        return t

    def time_at(self, ratio: Times) -> Times:
        """Return t with sigma / alpha = ratio."""
        return ratio

    def network_time(self, t: Times) -> Times:
        """Return what the network is told: ln(sigma) / 4."""
        return 0.25 * _numpy_of(t).log(t)

    def times(self, num_steps: int) -> Float[np.ndarray, " step"]:
        """Return the grid of EDM's equation 5, from `sigma_max` down to `sigma_min`."""
        _check_num_steps(num_steps)
        root = 1 / self.rho
        return np.linspace(self.sigma_max**root, self.sigma_min**root, num_steps) ** self.rho

    def draw_times(self, keys: Key[Array, " batch"]) -> Float[Array, " batch"]:
        """Draw noise levels for training, log-normal."""
        return jnp.exp(self.log_mean + self.log_std * jax.vmap(jax.random.normal)(keys))


Schedule: TypeAlias = VpDiscrete | VpContinuous | Ve | Edm


def expand_like(values: Num[Array, " batch"], x: Num[Array, "batch ..."]) -> Num[Array, "batch ..."]:
    """Give one value per sample the axes of the samples."""
    return values.reshape(values.shape + (1,) * (x.ndim - 1)).astype(x.dtype)


@functools.lru_cache(maxsize=32)
def _log_alpha_table(schedule: VpDiscrete) -> Float[np.ndarray, " time"]:
    """Half the log of the cumulative product of 1 - beta, float64: keeps its digits where alpha is almost 1."""
    return 0.5 * np.cumsum(np.log1p(-schedule.beta_table))


def _numpy_of(t: Times) -> Any:
    return np if isinstance(t, np.ndarray | np.generic) else jnp


def _uniform(keys: Key[Array, " batch"], low: float, high: float) -> Float[Array, " batch"]:
    return jax.vmap(lambda key: jax.random.uniform(key, (), minval=low, maxval=high))(keys)


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps: expected 1 or more, got {num_steps}")


def _check_range(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min, sigma_max: expected 0 < min < max, got {sigma_min}, {sigma_max}")
