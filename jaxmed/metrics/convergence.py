"""When a run reaches a level: how soon, in epochs and seconds, and with how few labels."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

LEVELS = (0.95, 0.99)


class Curve(NamedTuple):
    """How a run did on validation records while it trained.

    Attributes:
        epochs: Passes over the training records of this run, at each evaluation.
        seconds: Of training until then, without compilation, evaluation and saving of the first step.
        values: AUROC of each evaluation.
    """

    epochs: Float64[np.ndarray, " evaluation"]
    seconds: Float64[np.ndarray, " evaluation"]
    values: Float64[np.ndarray, " evaluation"]

    @property
    def best(self) -> float:
        """The highest value."""
        return float(self.values.max())


class Reached(NamedTuple):
    """When a curve first was at a level; None where it never was."""

    epochs: float | None
    seconds: float | None


def read_curve(history: Sequence[Mapping[str, float]], metric: str, steps_per_epoch: float) -> Curve:
    """Return the curve of a run.

    Args:
        history: Lines of metrics.jsonl.
        metric: Of the evaluation, such as "auroc".
        steps_per_epoch: Training records over batch size.
    """
    name = f"evaluation/{metric}"
    found = [(line["step"], line[name]) for line in history if name in line]
    rates = [line["steps_per_second"] for line in history if "steps_per_second" in line]
    steps, values = (np.array(column, np.float64) for column in zip(*found, strict=True))
    # The last rate is that of the whole run so far.
    return Curve(steps / steps_per_epoch, steps / rates[-1], values)


def first_reach(curve: Curve, level: float) -> Reached:
    """Return when a curve first was at a level or above."""
    where = np.flatnonzero(curve.values >= level)
    if not len(where):
        return Reached(None, None)
    return Reached(float(curve.epochs[where[0]]), float(curve.seconds[where[0]]))


def reach_table(curves: Mapping[tuple[str, float, int], Curve], baseline: str) -> list[dict[str, Any]]:
    """Tell how soon every run reaches shares of the baseline's best, with the same labels and seed.

    Args:
        curves: By arm, fraction of labels and seed.
        baseline: Arm whose best sets the level.

    Returns:
        One row per run: arm, fraction, seed, best, and epochs and seconds to each level, None where not reached.

    Source: TANGERINE, arXiv:2507.01881, figure on convergence; the levels are ours.
    """
    rows = []
    for (arm, fraction, seed), curve in curves.items():
        other = curves.get((baseline, fraction, seed))
        if other is None:
            continue
        row: dict[str, Any] = {"arm": arm, "fraction": fraction, "seed": seed, "best": curve.best}
        for level in LEVELS:
            reached = first_reach(curve, level * other.best)
            row |= {f"epochs_to_{level:.0%}": reached.epochs, f"seconds_to_{level:.0%}": reached.seconds}
        rows.append(row)
    return rows


def smallest_matching(means: Mapping[tuple[str, float], float], arm: str, baseline: str) -> float | None:
    """Return the smallest fraction at which an arm is as good as the baseline with all its labels.

    Args:
        means: Mean score by arm and fraction.
        arm: Which.
        baseline: Compared with, at its largest fraction.
    """
    wanted = means[baseline, max(fraction for name, fraction in means if name == baseline)]
    enough = [fraction for (name, fraction), mean in means.items() if name == arm and mean >= wanted]
    return min(enough) if enough else None
