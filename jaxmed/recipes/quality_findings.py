"""What a quality study found: mismatch penalty, need for good images, labels saved, break-even, and all of it in words.

Results are those of `recipes.quality_grid.by_test_set`: every cell of arm, share of labels, share of high quality in
fine-tuning ("tuned_high") and in the test set ("tested_high"), and seed. Intervals are Student's over seeds; where the
metric was computed again on resampled test patients (`recipes.quality_patients`), their variance is added.

Source: section "Quality study" of arXiv:2508.11864's public summary; the measures are our own reading of it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy.stats
from jaxtyping import Float

from jaxmed.errors import InputError
from jaxmed.metrics.mixed_model import MixedModel, fit_random_intercept
from jaxmed.recipes.quality_grid import ARMS
from jaxmed.recipes.study import Cell, Result

Draws: TypeAlias = Mapping[Cell, Float[np.ndarray, " resample"]]
"""By cell of `by_test_set`, the metric on resampled test patients."""
SIGNIFICANT = 0.05
ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class Measured:
    """A mean over seeds.

    Attributes:
        mean: The mean; infinite or undefined (None) where labels saved are.
        low: Lower end of its 95 % interval, over seeds and, where they were resampled, test patients; None without one.
        high: Upper end.
        p_value: Two-sided, of a mean of 0, by the variance of the interval; None where it cannot be tested.
    """

    mean: float | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None

    @property
    def is_positive(self) -> bool:
        """Whether the interval lies above 0."""
        return self.low is not None and self.low > 0

    @property
    def is_negative(self) -> bool:
        """Whether the interval lies below 0."""
        return self.high is not None and self.high < 0


class Grid(NamedTuple):
    """The metric of one arm and share of labels; NaN where a cell failed.

    Attributes:
        values: By seed, share of high quality in fine-tuning, and in the test set.
        shares: Of the second axis.
        tests: Of the third.
        draws: The same on resampled test patients; the same resamples in all grids.
    """

    values: Float[np.ndarray, "seed high test"]
    shares: tuple[float, ...]
    tests: tuple[float, ...]
    draws: Float[np.ndarray, "resample seed high test"] | None = None

    def measure(self, function: "Callable[[Grid], np.ndarray]") -> Measured:
        """Return the mean of something over seeds, from a grid to one number per seed."""
        draws = self.draws
        if draws is not None:
            draws = np.stack([function(self._replace(values=values, draws=None)) for values in draws])
        return over_seeds(function(self), draws)

    def minus(self, other: "Grid") -> "Grid":
        """Return the differences from another grid, seed by seed and resample by resample."""
        draws = None if self.draws is None or other.draws is None else self.draws - other.draws
        return self._replace(values=self.values - other.values, draws=draws)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is derived of a study, each at the largest number of labels unless it says otherwise.

    Attributes:
        mismatch: By arm: mean of M(t, t) - M(f, t) over shares f other than that of the test set.
        necessity: By arm: slope of the metric along the share of high quality in fine-tuning, at the test set richest
            in it.
        gains: By share of labels and share of high quality, the same in fine-tuning and test ("0.5 of 1" is a half at
            all labels): pre-trained minus from scratch.
        labels_saved: By share of high quality: labels that training from scratch needs for one of the pre-trained
            model's, at the metric that this reaches with all; None where it is not defined.
        never_reached: Shares of high quality at which training from scratch with all labels stays below the pre-trained
            model with the fewest: labels saved are infinite there as far as the study sees.
        break_even: Smallest share of high quality from which pre-training is better, its interval above 0; None where
            there is none.
    """

    mismatch: dict[str, Measured]
    necessity: dict[str, Measured]
    gains: dict[str, Measured]
    labels_saved: dict[str, float | None]
    never_reached: tuple[float, ...]
    break_even: float | None


def derive(results: Sequence[Result], metric: str, draws: Draws | None = None) -> Findings:
    """Compute every measure; those of the comparison are empty where there is one arm only.

    Args:
        results: Of `by_test_set`.
        metric: By name.
        draws: The metric of each of their cells on resampled test patients.
    """
    arms = list(dict.fromkeys(str(result.cell["arm"]) for result in results))
    labels = sorted({float(result.cell["labels"]) for result in results})
    grids = {(arm, share): grid_of(results, metric, arm, share, draws) for arm in arms for share in labels}
    most = labels[-1]
    mismatch = {arm: grids[arm, most].measure(mismatch_penalty) for arm in arms}
    necessity = {arm: grids[arm, most].measure(slope) for arm in arms}
    gains: dict[str, Measured] = {}
    saved: dict[str, float | None] = {}
    never: list[float] = []
    break_even = None
    if set(arms) == set(ARMS):
        shared = [share for share in grids[arms[0], most].shares if share in grids[arms[0], most].tests]
        for share in shared:
            for number in labels:
                gain = grids[ARMS[0], number].minus(grids[ARMS[1], number])
                gains[f"{share:g} of {number:g}"] = gain.measure(partial(_matched, share=share))
            curves = [np.array([np.nanmean(_matched(grids[arm, number], share)) for number in labels]) for arm in ARMS]
            factor = label_saving(np.array(labels), *curves)
            saved[f"{share:g}"] = factor if factor is not None and math.isfinite(factor) else None
            never += [share] if factor is not None and math.isinf(factor) else []
        better = [share for share in shared if gains[f"{share:g} of {most:g}"].is_positive]
        break_even = min(better) if better else None
    return Findings(mismatch, necessity, gains, saved, tuple(never), break_even)


def grid_of(results: Sequence[Result], metric: str, arm: str, labels: float, draws: Draws | None = None) -> Grid:
    """Bring the cells of one arm and share of labels into an array."""
    own = [r for r in results if r.cell["arm"] == arm and float(r.cell["labels"]) == labels and metric in r.metrics]
    if not own:
        raise InputError("measure", f"'{metric}' in the cells of {arm}", "none")
    seeds = sorted({int(r.cell["seed"]) for r in own})
    shares = tuple(sorted({float(r.cell["tuned_high"]) for r in own}))
    tests = tuple(sorted({float(r.cell["tested_high"]) for r in own}))
    values = np.full((len(seeds), len(shares), len(tests)), np.nan)
    again = None
    if draws is not None:
        again = np.full((len(draws[own[0].cell]), *values.shape), np.nan)
    for r in own:
        place = (
            seeds.index(int(r.cell["seed"])),
            shares.index(float(r.cell["tuned_high"])),
            tests.index(float(r.cell["tested_high"])),
        )
        values[place] = r.metrics[metric]
        if again is not None and draws is not None:
            again[(slice(None), *place)] = draws[r.cell]
    return Grid(values, shares, tests, again)


def mismatch_penalty(grid: Grid) -> Float[np.ndarray, " seed"]:
    """Return the mean of M(t, t) - M(f, t) over shares f other than the test set's."""
    found = []
    for column, share in enumerate(grid.tests):
        if share in grid.shares:
            row = grid.shares.index(share)
            others = np.delete(grid.values[:, :, column], row, axis=1)
            found.append(grid.values[:, row, column][:, None] - others)
    if not found or found[0].shape[1] == 0:
        return np.full(len(grid.values), np.nan)
    return np.concatenate(found, axis=1).mean(axis=1)


def slope(grid: Grid, test: float | None = None) -> Float[np.ndarray, " seed"]:
    """Return the slope of the metric along the share of high quality in fine-tuning, by least squares, for each seed.

    Args:
        grid: Of an arm.
        test: Share of high quality of the test set; the largest by default.
    """
    column = len(grid.tests) - 1 if test is None else grid.tests.index(test)
    if len(grid.shares) < 2:
        return np.full(len(grid.values), np.nan)
    centred = np.array(grid.shares) - np.mean(grid.shares)
    return grid.values[:, :, column] @ centred / (centred**2).sum()


def label_saving(
    labels: Float[np.ndarray, " share"], ours: Float[np.ndarray, " share"], theirs: Float[np.ndarray, " share"]
) -> float | None:
    """Return how many labels the other arm needs for one of ours, at the metric that ours reaches with all.

    The other arm's curve is interpolated linearly along the logarithm of the number of labels, its running maximum, so
    that it rises. Where ours needs fewer labels than the smallest share, the smallest counts.

    Args:
        labels: Ascending.
        ours: Metric of the arm that is to save labels.
        theirs: That of the other.

    Returns:
        The ratio; infinite where the other never gets as far as ours with the fewest labels; None where a curve is not
        whole, or with all labels ours is not as good as the other with the fewest.
    """
    if len(labels) < 2 or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return None
    ours, theirs = np.maximum.accumulate(ours), np.maximum.accumulate(theirs)
    goal = min(ours[-1], theirs[-1])
    if theirs[-1] < ours[0]:
        return math.inf
    if goal < theirs[0]:
        return None
    return float(np.exp(_reached(labels, theirs, goal) - _reached(labels, ours, goal)))


def _reached(labels: np.ndarray, curve: np.ndarray, goal: float) -> float:
    """Return the logarithm of the labels at which a rising curve gets to a goal that it does reach."""
    after = int(np.argmax(curve >= goal - 1e-12))
    logs = np.log(labels)
    if after == 0 or curve[after] == curve[after - 1]:
        return float(logs[after])
    part = (goal - curve[after - 1]) / (curve[after] - curve[after - 1])
    return float(logs[after - 1] + part * (logs[after] - logs[after - 1]))


def mixed_model(results: Sequence[Result], metric: str) -> MixedModel | None:
    """Fit metric ~ high + test + |high - test| + arm + labels (doublings), with a random intercept per seed.

    Columns that do not vary are left out; None where there are too few cells, or one seed.
    """
    rows = [result for result in results if metric in result.metrics]
    axes = ("tuned_high", "tested_high", "labels")
    high, test, labels = (np.array([float(r.cell[axis]) for r in rows]) for axis in axes)
    columns = {
        "high quality in fine-tuning": high,
        "high quality in testing": test,
        "mismatch": np.abs(high - test),
        "pre-trained": np.array([float(r.cell["arm"] == ARMS[0]) for r in rows]),
        "doubling of labels": np.log2(labels),
    }
    used = {name: column for name, column in columns.items() if np.ptp(column) > 0}
    try:
        return fit_random_intercept(
            np.array([r.metrics[metric] for r in rows]), used, np.array([int(r.cell["seed"]) for r in rows])
        )
    except InputError:
        return None


def over_seeds(values: Float[np.ndarray, " seed"], draws: Float[np.ndarray, "resample seed"] | None = None) -> Measured:
    """Return mean, interval and test over the seeds that have a value.

    The variance of the mean is that over seeds and, where there are draws, that of the mean over resamples of the test
    patients, whom all seeds share: interval and test join both, so that one excludes 0 where the other is below 5 %.
    With one seed they are of the patients alone, and normal.

    Args:
        values: NaN where there is none.
        draws: The same on resampled test patients; resamples on which a value is not defined are left out.
    """
    is_known = np.isfinite(values)
    known = values[is_known]
    if not len(known):
        return Measured(None)
    mean, patients = float(known.mean()), 0.0
    if draws is not None:
        means = draws[:, is_known].mean(axis=1)
        patients = float(np.var(means[np.isfinite(means)], ddof=1))
    if len(known) < 2 and draws is None:
        return Measured(mean)
    seeds = float(np.var(known, ddof=1)) / len(known) if np.ptp(known) > 0 else 0.0
    error = math.sqrt(seeds + patients)
    spread = scipy.stats.t(len(known) - 1) if len(known) > 1 else scipy.stats.norm
    half = error * float(spread.ppf(0.975))
    # Values that are equal but for rounding do not say how far they could differ, and cannot be tested.
    p_value = 2 * float(spread.sf(abs(mean) / error)) if error > ROUNDING else None
    return Measured(mean, mean - half, mean + half, p_value)


def conclude(found: Findings, name: str) -> list[str]:
    """Say in plain words what the tests say, and no more.

    Args:
        found: What was derived.
        name: Of the metric, for reading.
    """
    lines = []
    if found.gains:
        most = max(float(key.split(" of ")[1]) for key in found.gains)
        by_share = {float(k.split(" of ")[0]): v for k, v in found.gains.items() if float(k.split(" of ")[1]) == most}
        if found.break_even is None:
            worse = [share for share, gain in by_share.items() if gain.is_negative]
            costs = f"; it costs some at {_shares(worse)}" if worse else ""
            lines.append(
                f"No gain in {name} by pre-training can be told from chance on this task, at any share of high quality"
                f"{costs} (95 % intervals, all labels)."
            )
        elif found.break_even > min(by_share):
            lines.append(f"With fewer than {found.break_even:.0%} high-quality images in fine-tuning, pre-training "
                         f"does not help on this task ({name}, 95 % confidence).")  # fmt: skip
        else:
            lines.append(f"Pre-training helps on this task whatever the share of high quality is: {name} rises by "
                         f"{by_share[found.break_even].mean:.3f} even at {found.break_even:.0%}.")  # fmt: skip
        finite = {share: factor for share, factor in found.labels_saved.items() if factor is not None}
        if finite:
            told = ", ".join(f"{factor:.2g} at {float(share):.0%}" for share, factor in finite.items())
            lines.append(f"Labels that training from scratch needs for one of the pre-trained model's, by share of "
                         f"high quality: {told}.")  # fmt: skip
        if found.never_reached:
            lines.append(f"At {_shares(found.never_reached)} high quality, training from scratch with all labels stays "
                         "below the pre-trained model with the fewest.")  # fmt: skip
    for arm, gain in found.necessity.items():
        if gain.is_positive and gain.mean is not None:
            lines.append(f"{arm}: good images in fine-tuning matter: {name} rises by {gain.mean:.3f} from none to all "
                         "of high quality, on the test set that is richest in it.")  # fmt: skip
        elif gain.low is not None:
            lines.append(f"{arm}: no effect of good images in fine-tuning on {name} can be told from chance "
                         f"({_interval(gain)} from none to all).")  # fmt: skip
    for arm, penalty in found.mismatch.items():
        if penalty.low is None:
            continue
        said = "costs" if penalty.is_positive else "gains" if penalty.is_negative else "neither costs nor gains surely:"
        lines.append(
            f"{arm}: a mismatch of quality between fine-tuning and test {said} {_interval(penalty)} in {name}."
        )
    return lines


def deployment_choice(grid: Grid, deployed: float, own: float) -> tuple[float, Measured]:
    """Return the share of high quality to fine-tune with for a deployment, and its gain over the records' own share.

    The metric is interpolated linearly between the shares of the grid.

    Args:
        grid: Of the arm that is to be used, at the largest number of labels.
        deployed: Share of high quality where the model is to be used.
        own: That of the records at hand.
    """
    tests, shares = np.array(grid.tests), np.array(grid.shares)

    def at(grid: Grid) -> Float[np.ndarray, "seed high"]:
        return np.array([[np.interp(deployed, tests, row) for row in seed] for seed in grid.values])

    best = int(np.nanargmax(np.nanmean(at(grid), axis=0)))

    def gain(grid: Grid) -> Float[np.ndarray, " seed"]:
        found = at(grid)
        return found[:, best] - np.array([np.interp(own, shares, row) for row in found])

    return float(shares[best]), grid.measure(gain)


def _matched(grid: Grid, share: float) -> Float[np.ndarray, " seed"]:
    return grid.values[:, grid.shares.index(share), grid.tests.index(share)]


def _shares(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.0%}" for share in shares)


def _interval(found: Measured) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def as_rows(values: dict[str, Measured], name: str) -> list[tuple[Any, ...]]:
    """Return rows of a table: what it is of, mean, interval, p."""
    return [(name, key, v.mean, v.low, v.high, v.p_value) for key, v in values.items()]
