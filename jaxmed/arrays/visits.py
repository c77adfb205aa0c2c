"""Visits of subjects as padded arrays: what was measured, how long after the first visit, and what is padding."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float


class Visits(NamedTuple):
    """Regional measurements of subjects over time, padded to the most visits.

    Attributes:
        values: On [0, 1]; 0 on padding.
        gaps: Years since the subject's first visit, ascending; 0 on padding.
        present: False on padding.
    """

    values: Float[Array | np.ndarray, "*batch subject visit region"]
    gaps: Float[Array | np.ndarray, "*batch subject visit"]
    present: Bool[Array | np.ndarray, "*batch subject visit"]


def pad_visits(
    values: Sequence[Float[np.ndarray, "_visit region"]], years: Sequence[Float[np.ndarray, " _visit"]]
) -> Visits:
    """Stack visits of subjects.

    Args:
        values: Per subject, in the order of time.
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
    return Visits(stacked, gaps, present)


def take_subjects(visits: Visits, index: np.ndarray | slice) -> Visits:
    """Return the visits of some subjects."""
    return Visits(*(leaf[index] for leaf in visits))


def first_visits(visits: Visits, count: int = 1) -> Visits:
    """Return the first visits of every subject, the rest marked as padding."""
    early = np.arange(visits.present.shape[-1]) < count
    return visits._replace(present=visits.present & early)
