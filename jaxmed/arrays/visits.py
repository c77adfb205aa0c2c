"""Visits of subjects as padded arrays: what was measured, how long after the first visit, and what is padding.

Cohorts have regions that were not measured at some visits. `mark_missing` sets them apart; losses, stages and scores
leave them out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Visits(NamedTuple):
    """Regional measurements of subjects over time, padded to the most visits.

    Attributes:
        values: On [0, 1]; 0 on padding and where nothing was measured.
        gaps: Years since the subject's first visit, ascending; 0 on padding.
        present: False on padding.
        measured: False on padding and where a region was not measured at a visit; None where all were at every visit.
    """

    values: Float[Array | np.ndarray, "*batch subject visit region"]
    gaps: Float[Array | np.ndarray, "*batch subject visit"]
    present: Bool[Array | np.ndarray, "*batch subject visit"]
    measured: Bool[Array | np.ndarray, "*batch subject visit region"] | None = None


def pad_visits(
    values: Sequence[Float[np.ndarray, "_visit region"]], years: Sequence[Float[np.ndarray, " _visit"]]
) -> Visits:
    """Stack visits of subjects.

    Args:
        values: Per subject, in the order of time; NaN where a region was not measured.
        years: Ages or dates of the same visits, in years; only their differences are kept.
    """
    most = max(len(times) for times in years)
    shape = (len(values), most)
    stacked = np.zeros((*shape, values[0].shape[1]), np.float32)
    gaps, present = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for index, (measured, times) in enumerate(zip(values, years, strict=True)):
        if (np.diff(times) < 0).any():
            raise ValueError(f"years: expected ascending times, got {times} for subject {index}")
        stacked[index, : len(times)] = measured
        gaps[index, : len(times)] = times - times[0]
        present[index, : len(times)] = True
    return mark_missing(Visits(stacked, gaps, present))


def mark_missing(visits: Visits) -> Visits:
    """Take NaN among the values for what was not measured; a visit at which nothing was counts as padding.

    On the host: whether there is any decides on the shape of the result.
    """
    values = np.asarray(visits.values)
    missing = np.isnan(values)
    if not missing.any():
        return visits
    measured = ~missing & np.asarray(is_measured(visits._replace(values=np.zeros_like(values))))
    present = np.asarray(visits.present) & measured.any(axis=-1)
    return visits._replace(values=np.where(missing, 0, values), present=present, measured=measured)


def is_measured(visits: Visits) -> Bool[Array | np.ndarray, "*batch subject visit region"]:
    """Return where there is a value: not on padding, and not where a region was not measured."""
    present = visits.present[..., None]
    # For its shape: where all were measured, values are numbers.
    return present & (visits.values == visits.values if visits.measured is None else visits.measured)


def count_values(visits: Visits) -> Int[Array | np.ndarray, "*batch subject"]:
    """Return the number of values of every subject."""
    return is_measured(visits).sum(axis=(-2, -1))


def take_subjects(visits: Visits, index: np.ndarray | slice) -> Visits:
    """Return the visits of some subjects."""
    return jax.tree.map(lambda leaf: leaf[index], visits)


def first_visits(visits: Visits, count: int = 1) -> Visits:
    """Return the first visits of every subject, the rest marked as padding."""
    early = np.arange(visits.present.shape[-1]) < count
    return visits._replace(present=visits.present & early)


def measured_values(visits: Visits) -> Float[np.ndarray, "subject visit region"]:
    """Return the values of visits, NaN on padding and where a region was not measured."""
    return np.where(np.asarray(is_measured(visits)), np.asarray(visits.values), np.nan)


def later_visits(visits: Visits, chosen: Bool[np.ndarray, " subject"]) -> Bool[np.ndarray, "subject visit"]:
    """Return where some subjects were seen again."""
    present = np.asarray(visits.present) & chosen[:, None]
    return present & (np.arange(present.shape[1]) > 0)
