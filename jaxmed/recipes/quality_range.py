"""Whether scans are as good as those that a model was tuned on.

An adaptation measures its training scans and keeps the scores beside the model, as quality.csv in its folder, so that
they travel with the weights. A prediction measures its own scans in the same way, and warns of those whose score lies
outside. How a scan is measured is the system's to say: scores of one kind of image may be compared with each other, so
that every sequence of a case has a score and a range of its own.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from jaxmed.errors import InputError
from jaxmed.io.scans import ScanFiles
from jaxmed.io.tables import Table as Rows
from jaxmed.io.tables import read_table, write_table
from jaxmed.report.figures import histograms
from jaxmed.report.page import Section, Table
from jaxmed.train.log import Log

FILE = "quality.csv"
PREFIX = "quality_"
COLUMNS = ("path", "subject", "kind", "score")
NOT_COMPARED = "The weights do not tell how good the scans were that they were tuned on: nothing is compared."
FEWEST_FOR_HISTOGRAM = 8
Scorer: TypeAlias = Callable[[ScanFiles], Mapping[str, float]]
"""From a scan to scores from 0 to 100 by kind of image, one for each sequence of a case, say; raises InputError."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Scores of one kind of image that a model was tuned on.

    Attributes:
        low: The lowest.
        high: The highest.
        scans: Their number.
    """

    low: float
    high: float
    scans: int


def measure_scans(scans: Sequence[ScanFiles], scorer: Scorer, log: Log) -> tuple[list[Mapping[str, float]], list[str]]:
    """Measure scans, beside a progress bar.

    Returns:
        Scores of each, none of those that cannot be measured; and in words how many those are.
    """
    found: list[Mapping[str, float]] = []
    reasons = []
    with log.progress("Measuring quality", len(scans), "scans") as update:
        for number, scan in enumerate(scans):
            try:
                found.append(scorer(scan))
            except InputError as error:
                found.append({})
                reasons.append(str(error))
            update(number + 1)
    notes = [f"The quality of {len(reasons):,} scans was not measured: {reasons[0]}"] if reasons else []
    return found, notes


def write_tuned(
    folder: Path, scans: Sequence[ScanFiles], subjects: Sequence[str], most: int, scorer: Scorer, log: Log
) -> list[str]:
    """Measure training scans and keep their scores beside a model.

    Args:
        folder: Of the model.
        scans: Those that it was tuned on.
        subjects: Whose they are.
        most: As many of them, evenly spread.
        scorer: See `Scorer`.
        log: Shows how far it is.

    Returns:
        In words what could not be measured.
    """
    rows = np.unique(np.linspace(0, len(scans) - 1, min(most, len(scans))).round().astype(int)).tolist()
    measured, notes = measure_scans([scans[row] for row in rows], scorer, log)
    table = [
        (str(scans[row].path), subjects[row], kind, _cell(score))
        for row, scores in zip(rows, measured, strict=True)
        for kind, score in scores.items()
    ]
    write_table(folder / FILE, COLUMNS, [dict(zip(COLUMNS, cells, strict=True)) for cells in table])
    return notes


def _cell(score: float) -> str:
    return f"{score:.6g}"


def read_tuned(weights: Path) -> dict[str, Tuned]:
    """Return the range of scores that a model was tuned on by kind of image; none where nothing was kept.

    Args:
        weights: A run, its outputs/model, or any other weights.
    """
    places = [place / FILE for place in (weights / "outputs" / "model", weights) if (place / FILE).exists()]
    if not places:
        return {}
    table = read_table(places[0], required=COLUMNS)
    kinds, scores = np.array(table.column("kind")), np.array(table.floats("score"), np.float64)
    own = {kind: scores[kinds == kind] for kind in dict.fromkeys(kinds.tolist())}
    return {kind: Tuned(float(few.min()), float(few.max()), len(few)) for kind, few in own.items()}


def outside(scores: Mapping[str, float], tuned: Mapping[str, Tuned]) -> tuple[str, ...]:
    """Return a line for every score of a scan that lies outside what the model was tuned on."""
    lines = []
    for kind, score in scores.items():
        given, score = tuned.get(kind), float(_cell(score))  # as those of the model were written
        if given is not None and not given.low <= score <= given.high:
            side = "below" if score < given.low else "above"
            lines.append(
                f"the quality of {kind}, {score:.1f}, lies {side} the {given.low:.1f} to {given.high:.1f} of the "
                f"{given.scans:,} scans that the model was tuned on"
            )
    return tuple(lines)


def warn_outside(
    names: Sequence[str], measured: Sequence[Mapping[str, float]], tuned: Mapping[str, Tuned], log: Log
) -> list[tuple[str, ...]]:
    """Say of which scans the quality lies outside what the model was tuned on; return the lines of each scan."""
    found = [outside(scores, tuned) for scores in measured]
    for name, lines in zip(names, found, strict=True):
        for line in lines:
            log.say(f"Warning: {name}: {line}")
    return found


def quality_columns(measured: Sequence[Mapping[str, float]]) -> list[dict[str, str]]:
    """Return the cells of a table: "quality", the mean of a scan's scores, and "quality_KIND" for each of them."""
    kinds = list(dict.fromkeys(kind for scores in measured for kind in scores))
    return [
        {"quality": _cell(float(np.mean(list(scores.values())))) if scores else ""}
        | {PREFIX + kind: _cell(scores[kind]) if kind in scores else "" for kind in kinds}
        for scores in measured
    ]


def quality_section(table: Rows, tuned: Mapping[str, Tuned]) -> Section:
    """Show scores of a table of predictions, and how many lie outside what the model was tuned on."""
    kinds = [name.removeprefix(PREFIX) for name in table.columns if name.startswith(PREFIX)]
    own = {}
    for kind in kinds:
        scores = np.array([float(cell or "nan") for cell in table.column(PREFIX + kind)], np.float64)
        own[kind] = scores[np.isfinite(scores)]
    rows: list[tuple[object, ...]] = []
    for kind, scores in own.items():
        given = tuned.get(kind)
        told: tuple[object, ...] = (None,) * 4
        if given is not None:
            beyond = int(((scores < given.low) | (scores > given.high)).sum())
            told = given.low, given.high, given.scans, beyond
        rows.append((kind, float(scores.min()), float(np.median(scores)), float(scores.max()), *told))
    columns = ("Image", "Lowest", "Median", "Highest", "Tuned on, from", "to", "scans", "Outside")
    caption = (
        "Scores from 0 to 100 without a reference, which know noise, blur and ghosts. Where scans lie outside what the "
        "model was tuned on, its scores on test scans say less about them."
    )
    shown = [histograms(own, caption="Scores of the scans.", bins=20)] if len(table) >= FEWEST_FOR_HISTOGRAM else []
    return Section("Quality of the scans", [*shown, Table(columns, rows, caption)])
