"""Who is trained on and who is tested on: patient-level splits, label fractions and quality mixtures.

Everything works on columns (one entry per record) and returns row numbers or one word per row; tables are read and
written at the end of the file. Whole subjects move together, always. Draws depend on the seed and the set of subjects
and not on the order of the rows: subjects are sorted by name before they are permuted.
"""

import collections
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Shaped

from jaxmed.errors import InputError
from jaxmed.io.tables import Table, require_disjoint_subjects, resolve_path, write_table

SPLITS = ("train", "validation", "test")


def split_subjects(
    subjects: Sequence[str],
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    labels: Sequence[Hashable] | None = None,
) -> list[str]:
    """Assign every record to train, validation or test, whole subjects at a time.

    Args:
        subjects: Subject of each record.
        fractions: Shares of subjects (not of records) in train, validation and test; they sum to 1.
        seed: Of the draw.
        labels: Class of each record; where given, each split gets its share of every class. A subject with several
            classes counts as a class of its own (the set of them).

    Returns:
        "train", "validation" or "test" per record. Numbers of subjects are the shares to within one, of all and
        about so of every class, and a split whose fraction is above 0 is never empty.

    Raises:
        InputError: When fractions are no shares, or there are fewer subjects than splits asked for.
    """
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise InputError("fractions", "three shares that sum to 1", fractions)
    groups = _by_class(subjects, labels, seed)
    total = sum(len(group) for group in groups)
    wanted = [name for name, share in zip(SPLITS, fractions, strict=True) if share > 0]
    if total < len(wanted):
        raise InputError("subjects", f"at least {len(wanted)}, one per split", total, "give some splits the fraction 0")
    home = {}
    # Subject number i of all classes in a row goes where the shares say; rounding is carried from class to class, so
    # that small classes do not all lose the same split.
    ordered = [subject for group in groups for subject in group]
    counts = [0, 0, 0]
    for position, subject in enumerate(ordered, start=1):
        lack = [share * position - count for share, count in zip(fractions, counts, strict=True)]
        chosen = int(np.argmax(lack))
        counts[chosen] += 1
        home[subject] = SPLITS[chosen]
    for split, share in enumerate(fractions):
        if share > 0 and counts[split] == 0:
            donor = int(np.argmax(counts))
            moved = next(subject for subject in reversed(ordered) if home[subject] == SPLITS[donor])
            home[moved] = SPLITS[split]
            counts[donor], counts[split] = counts[donor] - 1, 1
    return [home[subject] for subject in subjects]


def label_fractions(
    subjects: Sequence[str], labels: Sequence[Hashable], fractions: Sequence[float], seed: int = 0
) -> dict[float, Int[np.ndarray, " record"]]:
    """Draw nested training sets of several sizes: the 10 % set lies inside the 30 % set.

    Args:
        subjects: Subject of each record.
        labels: Class of each record; a subject with several classes counts as a class of its own.
        fractions: Shares of subjects, in (0, 1].
        seed: Of the draw.

    Returns:
        Per fraction the row numbers of its records, ascending. Each class of subjects gives round(fraction * its
        count) of them, so shares of classes stay and whole patients move.

    Raises:
        InputError: When a fraction leaves a class of subjects without any; the smallest possible one is told.
    """
    if not fractions or min(fractions) <= 0 or max(fractions) > 1:
        raise InputError("fractions", "numbers above 0 and up to 1", tuple(fractions))
    groups = _by_class(subjects, labels, seed)
    # A class of n subjects keeps one of them from fraction 1/(2n) on, where n * fraction rounds to 1.
    smallest = max(1 / (2 * len(group)) for group in groups)
    if min(fractions) < smallest:
        digits = math.ceil(smallest * 1e4) / 1e4
        count = min(len(group) for group in groups)
        found = f"{min(fractions):g}, which leaves a class of {count} subjects without any"
        raise InputError("fractions", f"{digits:g} or more", found, "use a larger fraction, or more subjects")
    chosen = {}
    for fraction in fractions:
        kept = {subject for group in groups for subject in group[: math.floor(fraction * len(group) + 0.5 + 1e-9)]}
        chosen[fraction] = np.array([row for row, subject in enumerate(subjects) if subject in kept], np.int64)
    return chosen


def draw_folds(count: int, folds: int, seed: int) -> Int[np.ndarray, " subject"]:
    """Assign subjects to folds of nearly equal size, by number."""
    order = np.random.default_rng(seed).permutation(count)
    found = np.empty(count, int)
    found[order] = np.arange(count) % folds
    return found


def draw_subsets(seed: int, num_cases: int, size: int, repeats: int) -> Bool[np.ndarray, "subset case"]:
    """Draw subsets of so many cases without replacement."""
    rng = np.random.default_rng([seed, size])
    return rng.permuted(np.tile(np.arange(num_cases) < size, (repeats, 1)), axis=1)


def assign_folds(subjects: Shaped[np.ndarray, " case"], num_folds: int, seed: int) -> Int[np.ndarray, " case"]:
    """Put whole subjects into folds of about equal numbers of subjects."""
    _, numbers = np.unique(subjects, return_inverse=True)
    return draw_folds(int(numbers.max()) + 1, num_folds, seed)[numbers]


def shared_subjects(sets: Mapping[str, Sequence[str]]) -> list[str]:
    """Say where a subject stands in two sets: a score of one by a fit on the other is not one of new people.

    Args:
        sets: Subjects of the records of each, by its name.
    """
    notes = []
    for one, other in itertools.combinations(sets, 2):
        if both := set(sets[one]) & set(sets[other]):
            notes.append(f"{len(both)} subjects stand in both {one} and {other}: their scores are not of new people.")
    return notes


def quality_mixture(
    is_high: Sequence[bool] | Bool[np.ndarray, " record"],
    high_fraction: float,
    count: int,
    seed: int = 0,
    *,
    subjects: Sequence[str] | None = None,
    labels: Sequence[Hashable] | None = None,
) -> Int[np.ndarray, " subset"]:
    """Draw a set of fixed size with a given share of high quality.

    For one seed the draws are nested: the high-quality records of a smaller share are among those of a larger one,
    and likewise the low-quality ones, so two arms differ in as few records as they can.

    Args:
        is_high: Whether each record is of high quality; see `quality_flags` for scores.
        high_fraction: Share of high quality in the result, in [0, 1]; their number is round(high_fraction * count).
        count: Records in the result.
        seed: Of the draw.
        subjects: Subject of each record; then at most one record of each is drawn within a stratum, and none from a
            subject whose records are of both kinds.
        labels: Class of each record; then both strata follow the classes' shares among all records, so that quality
            and class are not confounded.

    Returns:
        Row numbers, ascending.

    Raises:
        InputError: When a stratum (or its class) has too few records for the mixture.

    Source: the arms of arXiv:2508.11864 (image quality in fine-tuning), with sizes and class balance fixed over arms.
    """
    flags = np.asarray(is_high, bool)
    if not 0 <= high_fraction <= 1 or count < 1:
        raise InputError("high_fraction, count", "a share in [0, 1] and a positive size", (high_fraction, count))
    rows = _one_row_each(flags, subjects, seed)
    num_high = math.floor(high_fraction * count + 0.5 + 1e-9)
    classes = [0] * len(flags) if labels is None else list(labels)
    totals = collections.Counter(classes)
    picked: list[int] = []
    for name, wanted, flag in (("high", num_high, True), ("low", count - num_high, False)):
        shares = _proportional(wanted, totals)
        for label, need in shares.items():
            pool = [row for row in rows if flags[row] == flag and classes[row] == label]
            if len(pool) < need:
                what = f" of class '{label}'" if labels is not None else ""
                expected = f"{need} records of {name} quality{what} for {high_fraction:g} of {count}"
                raise InputError("quality", expected, len(pool), "draw a smaller set, or another share")
            picked += pool[:need]
    return np.array(sorted(picked), np.int64)


def quality_flags(scores: Sequence[float], threshold: float) -> Bool[np.ndarray, " record"]:
    """Tell high from low quality: a score at or above the threshold is high.

    Raises:
        InputError: When a score is missing, or all fall on one side.
    """
    values = np.asarray(scores, np.float64)
    if not np.isfinite(values).all():
        raise InputError("quality", "a score for every record", f"{int((~np.isfinite(values)).sum())} without")
    flags = values >= threshold
    if flags.all() or not flags.any():
        found = f"all {len(flags)} {'at or above' if flags.all() else 'below'} it"
        raise InputError("quality", f"scores on both sides of {threshold:g}", found, "choose another threshold")
    return flags


def write_split_table(
    path: str | Path,
    table: Table,
    splits: Sequence[str],
    subject: str = "subject",
    files: Sequence[str] = ("path",),
) -> None:
    """Write a manifest with a column "split", after checking that no subject is torn apart.

    Args:
        path: The new table.
        table: The manifest.
        splits: One word per record.
        subject: Column of subjects.
        files: Columns that name files, where the manifest has them; written as absolute paths, so that the table means
            the same in its new folder.

    Raises:
        InputError: When one subject stands in two splits, or the place cannot be written.
    """
    columns = tuple(name for name in table.columns if name != "split") + ("split",)
    folder = table.path.parent.absolute()
    named = [name for name in files if name in table.columns]

    def moved(row: dict[str, str]) -> dict[str, str]:
        return {**row, **{name: str(resolve_path(row[name], folder)) for name in named if row[name]}}

    rows = tuple({**moved(row), "split": split} for row, split in zip(table.rows, splits, strict=True))
    require_disjoint_subjects(dataclasses.replace(table, path=Path(path), columns=columns, rows=rows), subject)
    write_table(path, columns, rows)


def _by_class(subjects: Sequence[str], labels: Sequence[Hashable] | None, seed: int) -> list[list[str]]:
    """Return each class's subjects, permuted; without labels there is one class."""
    if not len(subjects):
        raise InputError("subjects", "at least one", "none")
    classes: dict[str, set[str]] = {subject: set() for subject in subjects}
    for subject, label in zip(subjects, [""] * len(subjects) if labels is None else labels, strict=True):
        classes[subject].add(str(label))
    groups: dict[tuple[str, ...], list[str]] = {}
    for subject in _permuted(sorted(classes), seed):
        groups.setdefault(tuple(sorted(classes[subject])), []).append(subject)
    return [groups[name] for name in sorted(groups)]


def _permuted(names: Sequence[str], seed: int) -> list[str]:
    # By a hash of (seed, name): a subject that joins or leaves changes nothing in the order of the others.
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode(errors="backslashreplace")).digest())


def _one_row_each(flags: Bool[np.ndarray, " record"], subjects: Sequence[str] | None, seed: int) -> list[int]:
    """Return permuted rows; with subjects one row of each, and none of a subject of both qualities."""
    names = [f"{row}" for row in range(len(flags))] if subjects is None else list(subjects)
    kinds: dict[str, set[bool]] = {}
    first: dict[str, int] = {}
    for row, (name, flag) in enumerate(zip(names, flags.tolist(), strict=True)):
        kinds.setdefault(name, set()).add(flag)
        first.setdefault(name, row)
    return [first[name] for name in _permuted(sorted(first), seed) if len(kinds[name]) == 1]


def _proportional(count: int, totals: Mapping[Hashable, int]) -> dict[Hashable, int]:
    """Share `count` out among classes; no class loses when the count grows, so that draws stay nested.

    Source: the method of Sainte-Lague (divisors 1, 3, 5, ...).
    """
    names = sorted(totals, key=str)
    parts = dict.fromkeys(names, 0)
    for _ in range(count):
        parts[max(names, key=lambda name: totals[name] / (2 * parts[name] + 1))] += 1
    return parts
