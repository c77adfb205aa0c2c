"""How far back to noise an estimate: its residual, looked up among those of full runs on reference images.

A bank holds the residual |y - A(E[x_0 | x_t])| that full DPS runs had at every step. Its mean over runs, averaged in
bins of neighbouring steps, grows with t; an estimate whose residual is that of step t has to be noised to about t to be
put right.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Real

from jaxmed.config import Positive, Size, Whole, checked

# Means of the bins of the bank shipped by the authors: 135 runs at 256 x 256 in [0, 2].
SHIPPED_MEANS = (
    *(1.18, 1.69, 2.26, 2.81, 3.34, 3.89, 4.44, 4.96, 5.50, 6.04),
    *(6.58, 7.10, 7.70, 8.29, 8.96, 9.64, 10.6, 12.0, 15.5, 49.8),
)

LEAST_TAU = 0.3
"""A smaller power takes all residuals for about the same."""


@dataclasses.dataclass(frozen=True)
@checked
class StartTime:
    """The rule that chooses where a sample enters the chain, in steps left.

    The residual is compressed first, q = scale (residual / scale)^tau: estimates far from what the bank has seen would
    otherwise begin in pure noise.

    Attributes:
        rule: monotone: the number of bins whose mean is below q, so that a larger residual never starts later. repo:
            the bin with the nearest mean, one less if that mean is below q and it is not among the first two. fixed:
            the same start for every sample.
        means: Mean residual of each bin of the bank, first bin (least noise) first.
        tau: Compression.
        scale: In units of the residual; the authors' is 1.
        steps_per_bin: Steps of the chain in one bin; a sample starts at its bin's last.
        fixed: The start of the rule fixed.

    Source: github.com/edshkim98/DynamicDPS of 2026-04-29 (repo, tau, the means); monotone is ours: the authors' rule
        falls by one bin where q crosses a mean upwards.
    """

    rule: Literal["monotone", "repo", "fixed"] = "monotone"
    means: tuple[Positive, ...] = SHIPPED_MEANS
    tau: Positive = 0.4
    scale: Positive = 1.0
    steps_per_bin: Size = 50
    fixed: Whole = 49

    def __post_init__(self):
        """Refuse a bank that cannot be read."""
        if not self.means:
            raise ValueError("means: expected one or more positive numbers, found none")


def choose_start(residual: Float[Array, " batch"], config: StartTime) -> Int[Array, " batch"]:
    """Return where each sample enters the chain, in steps left.

    Args:
        residual: |y - A(initial)| of each sample.
        config: The rule.
    """
    if config.rule == "fixed":
        return jnp.full(residual.shape, config.fixed, jnp.int32)
    means = jnp.asarray(config.means, residual.dtype)
    q = (config.scale * (residual / config.scale) ** config.tau)[:, None]
    if config.rule == "monotone":
        # A running maximum: an empirical bank may have a dent.
        below = jnp.sum(jnp.asarray(np.maximum.accumulate(config.means), q.dtype) < q, axis=1)
        chosen = jnp.minimum(below, len(config.means) - 1)
    else:
        nearest = jnp.argmin(jnp.abs(means - q), axis=1)
        chosen = nearest - ((means[nearest] < q[:, 0]) & (nearest > 1))
    return (config.steps_per_bin * chosen + config.steps_per_bin - 1).astype(jnp.int32)


def bin_means(bank: Real[np.ndarray, "run step"], num_bins: int = 20) -> Float64[np.ndarray, " bin"]:
    """Average a bank over its runs, then over bins of neighbouring steps.

    Args:
        bank: Residual of each run at each number of steps left, 0 first.
        num_bins: Must divide the number of steps.
    """
    num_steps = bank.shape[1]
    if num_steps % num_bins:
        raise ValueError(f"num_bins: expected a divisor of the bank's {num_steps} steps, found {num_bins}")
    if not np.isfinite(bank).all():
        raise ValueError("bank: expected finite residuals of whole runs, found some that are not")
    return bank.astype(np.float64).mean(axis=0).reshape(num_bins, -1).mean(axis=1)


class Calibration(NamedTuple):
    """A compression of residuals.

    Attributes:
        tau: Power.
        scale: Unit of the residual in which the power is taken.
    """

    tau: float
    scale: float


def calibrate(
    residuals: Real[np.ndarray, " image"],
    means: Real[np.ndarray, " bin"],
    share: float = 0.95,
    tau: float = 0.4,
) -> Calibration:
    """Choose the compression for which estimates like these start in the first bin.

    Where a power alone can do it without pressing everything together, the scale stays 1 as the authors have it: tau is
    the largest that does, if it is not below `LEAST_TAU`. Otherwise the given tau is taken in the unit that can.

    Args:
        residuals: |y - A(initial)| of estimates of the kind that the bank was made for.
        means: Means of the bank's bins.
        share: Fraction of them that must start in the first bin.
        tau: The power where the scale is chosen.
    """
    if not residuals.size or not np.isfinite(residuals).all() or not (residuals > 0).all():
        raise ValueError("residuals: expected one or more positive numbers, found others")
    if not 0 < share <= 1 or not 0 < tau < 1:
        raise ValueError(f"share, tau: expected numbers in (0, 1] and (0, 1), found {share}, {tau}")
    # A hair above, so that rounding in single precision leaves the quantile inside.
    residual, first = float(np.quantile(residuals, share, method="higher")) * (1 + 1e-5), float(means[0])
    if residual <= first:
        return Calibration(1.0, 1.0)
    if first > 1 and math.log(first) >= LEAST_TAU * math.log(residual):
        return Calibration(math.log(first) / math.log(residual), 1.0)
    # scale^(1 - tau) residual^tau = first.
    return Calibration(tau, (first / residual**tau) ** (1 / (1 - tau)))
