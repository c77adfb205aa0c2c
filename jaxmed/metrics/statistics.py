"""Intervals and tests for results: bootstrap over subjects, paired tests, corrections.

NumPy on the host. A statistic to be bootstrapped is a function of row weights: a resample that drew a subject twice
gives all rows of that subject the weight 2, one that left it out the weight 0. So thousands of resamples are one call,
scans of one subject stay together, and two models are compared on the same draws. Everything random takes a seed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float64, Real, Shaped

from jaxmed.errors import InputError

Seed = int | np.random.Generator
# From weights (resample, row) to one value per resample; NaN where it is not defined, such as an AUROC of one class.
Statistic = Callable[[Float64[np.ndarray, "resample row"]], Float64[np.ndarray, " resample"]]
Statistics = Callable[[Float64[np.ndarray, "resample row"]], Mapping[str, Float64[np.ndarray, " resample"]]]
IntervalMethod = Literal["percentile", "bca"]

# Weights held at once: 32 MB.
BLOCK_SIZE = 4_000_000
# Beyond this many pairs the signed-rank distribution is taken as normal.
EXACT_PAIRS = 50
# Differences closer than this, relative to the values, are rounding.
ROUNDING = 1e-12


class Interval(NamedTuple):
    """An estimate and its interval.

    Attributes:
        estimate: On all rows.
        low: Lower end.
        high: Upper end.
        num_undefined: Resamples left out because the statistic was not defined on them.
    """

    estimate: float
    low: float
    high: float
    num_undefined: int = 0


class PairedTest(NamedTuple):
    """A test of paired values, first minus second.

    Attributes:
        difference: Mean of the differences.
        low: Lower end of Student's t interval of that mean, whatever the test.
        high: Upper end.
        statistic: Student's t, or Wilcoxon's sum of the ranks of the positive differences.
        p_value: Two-sided.
        num_pairs: Pairs given.
    """

    difference: float
    low: float
    high: float
    statistic: float
    p_value: float
    num_pairs: int


class _Draws(NamedTuple):
    estimate: float
    resamples: Float64[np.ndarray, " resample"]
    jackknife: Float64[np.ndarray, " subject"] | None
    num_undefined: int


def bootstrap(
    statistic: Statistic,
    subjects: Shaped[np.ndarray, " row"],
    *,
    seed: Seed,
    num_resamples: int = 2000,
    level: float = 0.95,
    method: IntervalMethod = "percentile",
) -> Interval:
    """Bootstrap one statistic over subjects; `bootstrap_all` says how."""
    return bootstrap_all(
        lambda weights: {"statistic": statistic(weights)},
        subjects,
        seed=seed,
        num_resamples=num_resamples,
        level=level,
        method=method,
    )["statistic"]


def bootstrap_all(
    statistics: Statistics,
    subjects: Shaped[np.ndarray, " row"],
    *,
    seed: Seed,
    num_resamples: int = 2000,
    level: float = 0.95,
    method: IntervalMethod = "percentile",
) -> dict[str, Interval]:
    """Bootstrap several statistics over subjects, on the same resamples.

    Subjects are drawn with replacement and bring all their rows. Resamples on which a statistic is not defined are left
    out of its interval and counted.

    Args:
        statistics: Function of row weights.
        subjects: Subject of each row; `numpy.arange` where each row is its own.
        seed: Seed of the draws.
        num_resamples: Draws.
        level: Coverage wanted, in (0, 1).
        method: "percentile", or "bca": corrected for bias and for a spread that changes with the value. Its bias
            correction is finite because at least half a resample is taken to lie on either side of the estimate.

    Raises:
        InputError: There are fewer than two subjects, a statistic is not defined on all rows or on half of the
            resamples, or (for BCa) when one subject is left out.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, sections 13.3 and 14.3; resampling of whole
        clusters: Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8.
    """
    _check_level(level)
    drawn = _draw(statistics, subjects, seed, num_resamples, needs_jackknife=method == "bca")
    found = {}
    for name, draws in drawn.items():
        low, high = _ends(draws, level, method)
        found[name] = Interval(draws.estimate, low, high, draws.num_undefined)
    return found


def weighted_mean(values: Real[np.ndarray, " row"]) -> Statistic:
    """Return the mean of per-row values as a statistic."""
    return lambda weights: weights @ values.astype(np.float64) / weights.sum(axis=1)


def mean_interval(values: Real[np.ndarray, " value"], level: float = 0.95) -> Interval:
    """Return the mean with Student's t interval; equal values give an interval of no width.

    Raises:
        InputError: There are fewer than two values, or one is not finite.
    """
    _check_level(level)
    values = _finite(values, "values", least=2)
    mean = float(values.mean())
    error = float(scipy.stats.sem(values)) if np.ptp(values) > 0 else 0.0
    half = float(scipy.stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def paired_t(first: Real[np.ndarray, " pair"], second: Real[np.ndarray, " pair"], level: float = 0.95) -> PairedTest:
    """Test whether paired values differ in the mean, by Student's t.

    Pairs without any difference give t = 0 and p = 1.

    Raises:
        InputError: There are fewer than two pairs, a value is not finite, or all pairs differ by one same amount: the
            test has no spread to measure it against.
    """
    differences = _differences(first, second)
    mean, low, high, _ = mean_interval(differences, level)
    if not differences.any():
        return PairedTest(0.0, 0.0, 0.0, 0.0, 1.0, len(differences))
    if not np.ptp(differences):
        found = f"all {len(differences)} equal to {differences[0]:.6g}"
        raise InputError("differences between pairs", "some that vary", found, "use more pairs, or another test")
    statistic = mean / float(scipy.stats.sem(differences))
    p_value = float(2 * scipy.stats.t.sf(abs(statistic), len(differences) - 1))
    return PairedTest(mean, low, high, statistic, p_value, len(differences))


def wilcoxon(first: Real[np.ndarray, " pair"], second: Real[np.ndarray, " pair"], level: float = 0.95) -> PairedTest:
    """Test whether paired values differ in location, by Wilcoxon's signed ranks.

    Pairs without a difference are left out (Wilcoxon's own way) and tied ranks are averaged. The distribution is exact,
    also under ties, up to 50 pairs that differ; beyond, normal with the variance corrected for ties and without
    continuity correction. Pairs without any difference give p = 1.

    Raises:
        InputError: There are fewer than two pairs, or a value is not finite.

    Source: Wilcoxon, Biometrics Bulletin 1 (1945), 80.
    """
    differences = _differences(first, second)
    mean, low, high, _ = mean_interval(differences, level)
    nonzero = differences[differences != 0]
    if not nonzero.size:
        return PairedTest(mean, low, high, 0.0, 1.0, len(differences))
    ranks = scipy.stats.rankdata(np.abs(nonzero))
    positive = float(ranks[nonzero > 0].sum())
    if len(nonzero) <= EXACT_PAIRS:
        p_value = _exact_signed_rank(ranks, positive)
    else:
        # Each rank counts with chance one half: variance rank^2 / 4, whether tied or not.
        z = (positive - ranks.sum() / 2) / np.sqrt((ranks**2).sum() / 4)
        p_value = float(2 * scipy.stats.norm.sf(abs(z)))
    return PairedTest(mean, low, high, positive, p_value, len(differences))


def bonferroni(p_values: Real[np.ndarray, " test"]) -> Float64[np.ndarray, " test"]:
    """Correct p-values for their number: p times it, at most 1."""
    p_values = _checked_p_values(p_values)
    return np.minimum(p_values * len(p_values), 1.0)


def holm(p_values: Real[np.ndarray, " test"]) -> Float64[np.ndarray, " test"]:
    """Correct p-values step by step, the smallest by most.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979), 65.
    """
    p_values = _checked_p_values(p_values)
    order = np.argsort(p_values, kind="stable")
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def cohen_dz(first: Real[np.ndarray, " pair"], second: Real[np.ndarray, " pair"]) -> float:
    """Return the effect size of pairs: mean difference over the standard deviation (n - 1) of the differences.

    Pairs without any difference give 0.

    Raises:
        InputError: There are fewer than two pairs, or all differ by one same amount.
    """
    differences = _differences(first, second)
    if not differences.any():
        return 0.0
    if not np.ptp(differences):
        raise InputError("differences between pairs", "some that vary", f"all equal to {differences[0]:.6g}")
    return float(differences.mean() / differences.std(ddof=1))


def _draw(
    statistics: Statistics, subjects: np.ndarray, seed: Seed, num_resamples: int, needs_jackknife: bool
) -> dict[str, _Draws]:
    names, groups = np.unique(subjects, return_inverse=True)
    number = len(names)
    if number < 2:
        raise InputError("subjects to resample", "two or more", number)
    if num_resamples < 1:
        raise InputError("num_resamples", "1 or more", num_resamples)
    rng = np.random.default_rng(seed)
    chances = np.full(number, 1 / number)
    estimates = statistics(np.ones((1, len(subjects))))
    block = max(1, BLOCK_SIZE // len(subjects))

    def collect(total: int, make: Callable[[int, int], np.ndarray]) -> dict[str, np.ndarray]:
        parts = []
        for begin in range(0, total, block):
            parts.append(statistics(make(begin, min(begin + block, total))[:, groups].astype(np.float64)))
        return {name: np.concatenate([part[name] for part in parts]) for name in estimates}

    resamples = collect(num_resamples, lambda begin, end: rng.multinomial(number, chances, size=end - begin))
    jackknife = collect(number, lambda begin, end: 1 - np.eye(end - begin, number, begin)) if needs_jackknife else {}
    return {name: _defined(name, float(estimates[name][0]), resamples[name], jackknife.get(name)) for name in estimates}


def _defined(name: str, estimate: float, resamples: np.ndarray, jackknife: np.ndarray | None) -> _Draws:
    if not np.isfinite(estimate):
        raise InputError(name, "a statistic that is defined on all rows", estimate, "check the labels and subjects")
    defined = resamples[np.isfinite(resamples)]
    missing = len(resamples) - len(defined)
    if 2 * missing > len(resamples):
        found = f"none on {missing} of {len(resamples)}"
        raise InputError(name, "a value on most resamples of the subjects", found, "use more subjects of each class")
    if jackknife is not None and not np.isfinite(jackknife).all():
        found = "none without a certain one"
        raise InputError(name, "a value without any one subject", found, "use method='percentile', or more subjects")
    return _Draws(estimate, defined, jackknife, missing)


def _ends(draws: _Draws, level: float, method: IntervalMethod) -> tuple[float, float]:
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        assert draws.jackknife is not None
        below = (draws.resamples < draws.estimate).mean() + (draws.resamples == draws.estimate).mean() / 2
        half = 0.5 / len(draws.resamples)
        bias = scipy.stats.norm.ppf(np.clip(below, half, 1 - half))
        deviations = draws.jackknife.mean() - draws.jackknife
        spread = (deviations**2).sum()
        # Efron and Tibshirani, equation 14.15.
        acceleration = (deviations**3).sum() / (6 * spread**1.5) if spread > 0 else 0.0
        shifted = bias + scipy.stats.norm.ppf(tails)
        tails = scipy.stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))
    low, high = np.quantile(draws.resamples, tails)
    return float(low), float(high)


def _exact_signed_rank(ranks: Float64[np.ndarray, " pair"], positive: float) -> float:
    """Two-sided p of the sum of positive ranks, over all equally likely signs; ranks may be tied."""
    doubled = np.rint(2 * ranks).astype(int)  # averaged ranks are whole or half
    chances = np.zeros(doubled.sum() + 1)
    chances[0] = 1.0
    for rank in doubled:
        shifted = np.zeros_like(chances)
        shifted[rank:] = chances[: len(chances) - rank]
        chances = (chances + shifted) / 2
    sum_found = round(2 * positive)
    return float(min(1.0, 2 * min(chances[: sum_found + 1].sum(), chances[sum_found:].sum())))


def _differences(first: np.ndarray, second: np.ndarray) -> Float64[np.ndarray, " pair"]:
    first, second = _finite(first, "first of the pairs", least=2), _finite(second, "second of the pairs", least=2)
    if len(first) != len(second):
        raise InputError("pairs", "as many first as second values", f"{len(first)} and {len(second)}")
    scale = max(np.abs(first).max(), np.abs(second).max())
    if not scale:
        return np.zeros(len(first))
    # 0.7 - 0.6 and 0.8 - 0.7 are one difference: rounding must make neither ranks nor a spread.
    return np.rint((first - second) / (scale * ROUNDING)) * (scale * ROUNDING)


def _finite(values: np.ndarray | Sequence[float], what: str, least: int) -> Float64[np.ndarray, " _"]:
    values = np.asarray(values, np.float64)
    if len(values) < least:
        raise InputError(what, f"{least} or more values", len(values))
    if not np.isfinite(values).all():
        position = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InputError(f"{what}, position {position}", "a finite number", values[position])
    return values


def _checked_p_values(p_values: np.ndarray) -> Float64[np.ndarray, " test"]:
    p_values = np.asarray(p_values, np.float64)
    if not ((p_values >= 0) & (p_values <= 1)).all():
        raise InputError("p-values", "numbers from 0 to 1", p_values.tolist())
    return p_values


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError("level", "a number between 0 and 1, such as 0.95", level)


def spearman(first: Real[np.ndarray, " pair"], second: Real[np.ndarray, " pair"]) -> float | None:
    """Return Spearman's rank correlation; None where one of the two does not vary."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(scipy.stats.spearmanr(first, second)[0])  # pyright: ignore[reportArgumentType]


def weighted_spearman(
    first: Real[np.ndarray, " pair"], second: Real[np.ndarray, " pair"], weights: Real[np.ndarray, "resample pair"]
) -> Float64[np.ndarray, " resample"]:
    """Return Spearman's rank correlation of pairs that count so many times, as a bootstrap draws them.

    Args:
        first: One value of each pair.
        second: The other.
        weights: Whole numbers, a row for each resample.

    Returns:
        One for each resample; NaN where one of the two does not vary in it.
    """
    repeated = (np.repeat(np.arange(len(first)), row.astype(int)) for row in weights)
    values = (spearman(first[pairs], second[pairs]) for pairs in repeated)
    return np.array([np.nan if value is None else value for value in values])


def information_criteria(variance: float, count: int, parameters: int) -> tuple[float | None, float | None]:
    """Return the corrected Akaike and the Bayesian criterion of Gaussian errors; the lower, the better.

    Args:
        variance: Mean squared error, or its share of what is explained (1 - r^2 of a line).
        count: Measurements.
        parameters: Fitted numbers.

    Returns:
        None for both where there are not more measurements than parameters + 1: there they are not defined.

    Source: Hurvich and Tsai 1989; Schwarz 1978.
    """
    if count <= parameters + 1 or not variance > 0:
        return None, None
    fit = count * np.log(variance)
    correction = 2 * parameters * (parameters + 1) / (count - parameters - 1)
    return float(fit + 2 * parameters + correction), float(fit + parameters * np.log(count))
