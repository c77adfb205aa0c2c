"""Quality of records: given in a column, or made by degrading a known share; and sets of a known share of good ones.

A column holds PI-QUAL scores (1 to 5, or 1 to 3 in version 2), or truth values. Sets have fixed sizes, the same balance
of labels whatever their quality, whole subjects, and are nested: see `data.splits.quality_mixture`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int

from jaxmed.config import NonNegative, Share, checked
from jaxmed.data.splits import quality_flags, quality_mixture, split_subjects
from jaxmed.errors import InputError
from jaxmed.io.tables import Table
from jaxmed.synthesis.degradation import Kind

WORDS = {"true": 1.0, "yes": 1.0, "high": 1.0, "false": 0.0, "no": 0.0, "low": 0.0}


@dataclasses.dataclass(frozen=True)
@checked
class QualityConfig:
    """What counts as high quality.

    Attributes:
        column: Column of the manifest: PI-QUAL scores (1 to 5, or 1 to 3), or true and false.
        threshold: Score from which a record is of high quality; 4 suits PI-QUAL version 1, 3 version 2.
        simulate: Share of the records that are made worse on purpose, where the manifest has no such column.
        kind: How: see `synthesis.degradation.degrade`.
        strength: How much, from 0 to 1.
    """

    column: str = "quality"
    threshold: NonNegative = 4.0
    simulate: Share = 0.0
    kind: Kind = "low-quality"
    strength: Share = 1.0


def read_scores(table: Table, column: str) -> Float64[np.ndarray, " record"]:
    """Return the quality of every record, truth values as 1 and 0; NaN where the cell is empty.

    Raises:
        InputError: There is no such column, or a cell is neither a number nor a truth value.
    """
    found = []
    for number, cell in enumerate(table.column(column)):
        word = cell.strip().lower()
        try:
            found.append(WORDS[word] if word in WORDS else float(word or "nan"))
        except ValueError:
            where = f"{table.path}, row {number + 1}, {column}"
            raise InputError(where, "a number, or true or false", f"'{cell}'") from None
    return np.array(found, np.float64)


def read_flags(
    table: Table, config: QualityConfig, subjects: Sequence[str], labels: Sequence[str], seed: int
) -> tuple[Bool[np.ndarray, " record"], bool]:
    """Tell high from low quality.

    Args:
        table: The manifest.
        config: What counts.
        subjects: Subject of each record, who is of one quality where it is made.
        labels: Class of each record, of which the same share is made worse.
        seed: Seed of that draw.

    Returns:
        Whether each record is of high quality, and whether the others are still to be made worse.

    Raises:
        InputError: There is neither a column nor a share to make worse; a score is missing, or all are alike.
    """
    if config.column in table.columns:
        scores = read_scores(table, config.column)
        is_truth = all(cell.strip().lower() in WORDS for cell in table.column(config.column))
        return quality_flags(scores.tolist(), 0.5 if is_truth else config.threshold), False
    if not 0 < config.simulate < 1:
        expected = f"a column '{config.column}'"
        raise InputError(table.path, expected, ", ".join(table.columns), "or --quality.simulate 0.5 to make some worse")
    drawn = split_subjects(subjects, (1 - config.simulate, config.simulate, 0.0), seed, labels)
    return np.array(drawn) == "train", True


def draw_mixture(
    where: object,
    is_high: Bool[np.ndarray, " record"],
    share: float,
    count: int,
    seed: int,
    subjects: Sequence[str],
    labels: Sequence[str],
) -> Int[np.ndarray, " subset"]:
    """Draw a set of a given size and share of high quality, balanced by label; see `quality_mixture`.

    Raises:
        InputError: There are too few records; the message gives the largest possible share and size.
    """
    try:
        return quality_mixture(is_high, share, count, seed, subjects=subjects, labels=labels)
    except InputError as error:
        size = largest_size(is_high, (share,), seed, subjects, labels)
        shares = [k / 100 for k in range(101) if _is_possible(is_high, k / 100, count, seed, subjects, labels)]
        found = f"{error.expected}: only {error.found}"
        possible = f"shares from {min(shares):.0%} to {max(shares):.0%} are" if shares else "no share is"
        advice = f"with {count} records {possible} possible, and with {share:.0%} at most {size} records"
        raise InputError(where, f"{count} records, {share:.0%} of high quality", found, advice) from error


def largest_size(
    is_high: Bool[np.ndarray, " record"],
    shares: Sequence[float],
    seed: int,
    subjects: Sequence[str],
    labels: Sequence[str],
) -> int:
    """Return the largest size for which every share of high quality can be drawn; 0 where there is none."""
    low, high = 0, len(is_high)
    while low < high:
        middle = (low + high + 1) // 2
        if all(_is_possible(is_high, share, middle, seed, subjects, labels) for share in shares):
            low = middle
        else:
            high = middle - 1
    return low


def _is_possible(
    is_high: np.ndarray, share: float, count: int, seed: int, subjects: Sequence[str], labels: Sequence[str]
) -> bool:
    try:
        quality_mixture(is_high, share, count, seed, subjects=subjects, labels=labels)
    except InputError:
        return False
    return True
