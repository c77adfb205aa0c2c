"""Whose each record of a manifest is, in which split, and with which labels: one rule for every system.

Records belong together where they have the same subject or show the same file, however its path is written: `a.nii` and
`./a.nii`, a link, a hard link, an absolute path, a folder and a file inside it. What belongs together is drawn into one
split, and refused where a manifest puts it into two. An empty cell under "subject" says nothing: that record is a
subject of its own, and not one with all the others whose cell is empty.
"""

import dataclasses
import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Shaped

from jaxmed.arrays.task import Task
from jaxmed.data.class_folders import Subjects, read_class_folders
from jaxmed.data.covariates import Levels, find_levels, read_covariates
from jaxmed.data.indicators import find_indicators, with_indicators
from jaxmed.data.labels import (
    MOST_CLASSES,
    LabelConfig,
    Meaning,
    classes_of_folders,
    find_meaning,
    is_unlabelled,
    read_targets,
)
from jaxmed.data.splits import SPLITS, split_subjects
from jaxmed.data.store import StoredSource, stored_scans
from jaxmed.errors import InputError
from jaxmed.io.scans import ScanFiles
from jaxmed.io.sheets import is_missing
from jaxmed.io.tables import (
    Table,
    read_table,
    require_columns,
    require_disjoint_subjects,
    resolve_path,
    resolve_paths,
)

GROUPS = ("seen", "unseen", "other")
"""Whether a set's distribution was seen, without labels, in pre-training; "other" centres are in neither stage."""


def subjects_of(table: Table, column: str = "path") -> list[str]:
    """Return whose each record is: its subject, or that of a record of the same file, or else the file.

    Args:
        table: With the column `column`, and optionally subject.
        column: Of the files.
    """
    groups = groups_of(table, column)
    return [name or group for name, group in zip(_stated_subjects(table), groups, strict=True)]


def groups_of(table: Table, column: str = "path") -> list[str]:
    """Return one name for all records that belong together; the order of the rows plays no part.

    Args:
        table: With the column `column`, and optionally subject.
        column: Of the files.
    """
    cells = table.column(column)
    subjects = _stated_subjects(table)
    roots = _join(
        list(range(len(cells))),
        file_keys(resolve_path(cell, table.path.parent) for cell in cells),
        [f"subject {name}" if name else f"row {row}" for row, name in enumerate(subjects)],
    )
    named, filed = _smallest(roots, subjects), _smallest(roots, cells)
    return [named.get(root) or filed[root] for root in roots]


def groups_of_files(paths: Sequence[Path]) -> list[str]:
    """Return one name for all paths that lead to the same file."""
    keys = file_keys(paths)
    names = _smallest(keys, [str(path) for path in paths])
    return [names[key] for key in keys]


def file_keys(paths: Iterable[Path]) -> list[str]:
    """Return a key for each path, equal where two lead to the same file, or one into the folder of another."""
    places = [os.path.realpath(path) for path in paths]
    known = set(places)
    # The outermost folder that is itself listed stands for what lies inside it.
    outer = [next((str(p) for p in reversed(Path(place).parents) if str(p) in known), place) for place in places]
    return [_identity(place) for place in outer]


def stated_splits(table: Table, names: Sequence[str] = SPLITS, column: str = "path") -> list[str] | None:
    """Return the table's own column "split", checked; None where it has none.

    Args:
        table: The manifest.
        names: Allowed words.
        column: Of the files.

    Raises:
        InputError: A split has another name, or the same subject or file stands in two splits.
    """
    if "split" not in table.columns:
        return None
    splits = table.column("split")
    for split, line in zip(splits, table.lines, strict=True):
        if split not in names:
            raise table.wrong(line, f"one of {', '.join(names)} under 'split'", f"'{split}'")
    if "subject" in table.columns:
        require_disjoint_subjects(table)
    cells = table.column(column)
    told = [f"'{cell}' (line {line})" for cell, line in zip(cells, table.lines, strict=True)]
    require_files_apart(table.path, [resolve_path(cell, table.path.parent) for cell in cells], splits, told)
    return splits


def require_files_apart(
    where: object, paths: Sequence[Path], splits: Sequence[str], told: Sequence[str] | None = None
) -> None:
    """Refuse records of one file in two splits.

    Args:
        where: The table, for messages.
        paths: File of each record.
        splits: Split of each record.
        told: What to call each record; its path where None.

    Raises:
        InputError: There are such.
    """
    told = [f"'{path}'" for path in paths] if told is None else told
    first: dict[str, int] = {}
    for row, key in enumerate(file_keys(paths)):
        other = first.setdefault(key, row)
        if splits[other] != splits[row]:
            found = " and ".join(f"{told[place]} in {splits[place]}" for place in (other, row))
            advice = "keep all records of a scan in one split"
            raise InputError(where, "every file in one split", f"{found}, the same scan", advice)


def split_unlabelled(table: Table, share: float, seed: int) -> list[str]:
    """Return "train", "validation" or "test" per row: the table's own column "split", or a draw of subjects.

    Args:
        table: With the column path, and optionally subject and split.
        share: Of the subjects to draw for validation; at least one where there are two or more, none at 0.
        seed: Of the draw.

    Raises:
        InputError: A split has another name, or the same subject or file stands in two splits.
    """
    return stated_splits(table) or hold_out(groups_of(table), share, seed)


def hold_out(subjects: Sequence[str], share: float, seed: int) -> list[str]:
    """Return "train" or "validation" per record: a draw of whole subjects, all "train" where there is but one."""
    if not share or len(set(subjects)) < 2:
        return ["train"] * len(subjects)
    return split_subjects(subjects, (1 - share, share, 0.0), seed)


def subject_notes(table: Table) -> list[str]:
    """Say what a table does not say about subjects: who stands in two splits then, nobody can see."""
    if "subject" not in table.columns:
        return ["Without a column 'subject' every scan counts as a subject of its own."]
    empty = _stated_subjects(table).count("")
    if not empty:
        return []
    return [f"{empty:,} of {len(table):,} records have no subject: each of these counts as a subject of its own."]


# Labelled sets -------------------------------------------------------------------------------------------------------


class Cohort(NamedTuple):
    """Labelled scans of one table.

    Attributes:
        scans: Their files or folders.
        subjects: Whose they are.
        splits: Of a manifest "train", "validation" or "test"; of an external set its name.
        targets: Labels as the loss takes them, regression values in their unit; NaN where missing.
        cells: The labels as written in the table.
        covariates: What is known of the subjects beside the scan, as numbers; NaN where missing.
        importance: How much each counts in training, 1 on average over the split train; None for all alike.
    """

    scans: tuple[ScanFiles, ...]
    subjects: Shaped[np.ndarray, " record"]
    splits: Shaped[np.ndarray, " record"]
    targets: Float32[np.ndarray, "record column"]
    cells: tuple[tuple[str, ...], ...]
    covariates: Float32[np.ndarray, "record covariate"]
    importance: Float32[np.ndarray, " record"] | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files or folders of the scans."""
        return tuple(scan.path for scan in self.scans)

    def rows(self, *splits: str) -> Shaped[np.ndarray, " row"]:
        """Return the numbers of the records of some splits."""
        return np.flatnonzero(np.isin(self.splits, splits))

    def take(self, rows: Shaped[np.ndarray, " row"]) -> "Cohort":
        """Return some of the scans."""
        scans, cells = (tuple(values[row] for row in rows) for values in (self.scans, self.cells))
        columns = (self.subjects[rows], self.splits[rows], self.targets[rows])
        importance = None if self.importance is None else self.importance[rows]
        return Cohort(scans, *columns, cells, self.covariates[rows], importance)


class LabelledSets(NamedTuple):
    """Everything labelled that a run knows, checked.

    Attributes:
        table: The manifest.
        cohort: Its scans.
        meaning: What the labels mean.
        externals: Name, group and scans of further sets.
        notes: What a user should know about them.
        store: Records of the manifest that were prepared before; None where files are read.
    """

    table: Table
    cohort: Cohort
    meaning: Meaning
    externals: list[tuple[str, str, Cohort]]
    notes: list[str]
    store: StoredSource | None = None


@dataclasses.dataclass(frozen=True)
class External:
    """A set that is scored and never trained on.

    Attributes:
        name: What to call it.
        group: One of GROUPS.
        path: Its manifest, or its folder of classes.
    """

    name: str
    group: str
    path: Path


def parse_externals(words: Sequence[str]) -> tuple[External, ...]:
    """Read NAME=CSV or NAME:GROUP=CSV; a folder of classes may stand for the table.

    Raises:
        InputError: A word is neither, a group is unknown, or a name stands twice or is that of a split.
    """
    found: list[External] = []
    for word in words:
        name, mark, path = word.partition("=")
        name, _, group = name.partition(":")
        if not mark or not name or not path:
            raise InputError("data.external", "NAME=CSV or NAME:GROUP=CSV", f"'{word}'")
        group = group or "other"
        if group not in GROUPS:
            raise InputError(f"data.external {name}", f"a group of {', '.join(GROUPS)}", f"'{group}'")
        if name in SPLITS or name in [other.name for other in found]:
            raise InputError("data.external", "names of their own", f"'{name}' again")
        found.append(External(name, group, Path(path)))
    return tuple(found)


def read_labelled_sets(
    manifest: Path,
    externals: Sequence[str],
    config: LabelConfig,
    fractions: tuple[float, float, float],
    seed: int,
    *,
    needs_auroc: bool = False,
    series: str = "",
    fill: float | None = None,
    naming: Subjects = Subjects(),
    covariates: Sequence[str] = (),
    weight: str = "",
    store: StoredSource | None = None,
) -> LabelledSets:
    """Read and check a manifest and its external sets.

    Args:
        manifest: CSV with the column path, the label columns, and optionally subject and split; or a folder of classes.
        externals: Further sets, as NAME=CSV or NAME:GROUP=CSV, likewise.
        config: What is learnt.
        fractions: Shares of subjects in train, validation and test, where there is no column split.
        seed: Seed of that draw.
        needs_auroc: Whether validation records select by AUROC, for which they need both classes.
        series: Which DICOM series is meant where a folder holds several.
        fill: Intensity of voxels that have none; None refuses them.
        naming: How the subjects of a folder of classes are told; of external folders by the pattern.
        covariates: Columns with what is known of the subjects beside the scan; external sets may lack them.
        weight: Column with how much each record counts in training; empty for none. Records of 0 are left out.
        store: Where the records of the manifest are; its files need not be on this machine then.

    Raises:
        InputError: For whatever a user can have wrong in them.
    """
    parsed = parse_externals(externals)
    is_folder = manifest.is_dir()
    if (naming.table is not None and not is_folder) or (
        naming.pattern and not is_folder and not any(one.path.is_dir() for one in parsed)
    ):
        name = "data.subjects" if naming.table is not None else "data.subject_pattern"
        raise InputError(name, "a folder of classes", f"the table {manifest}", "its column subject tells them")
    table, found_notes = _read_set(manifest, config, naming, is_whole=True)
    if weight:
        table, further = _without_weight(table, weight)
        found_notes = [*found_notes, *further]
    if is_folder:
        config = classes_of_folders(config, table)
    given, indicators = config, ()
    if config.kind in ("ordinal", "fields"):
        indicators = find_indicators(table, config)
        table = with_indicators(table, indicators)
        config = dataclasses.replace(config, kind="multilabel", columns=indicators)
    levels = find_levels(table, covariates)
    splits = find_splits(table, config, fractions, seed)
    meaning = find_meaning(table, config, splits)
    task = meaning.task
    paths = resolve_paths(table) if store is None else [scan.path for scan in stored_scans(table)]
    cohort = _read_cohort(table, config, meaning, splits, paths, series, fill, levels)
    check_classes(cohort, task, table.path, needs_auroc)
    if weight:
        counts = read_weights(table, weight)
        cohort = cohort._replace(importance=(counts / counts[cohort.rows("train")].mean()).astype(np.float32))
    notes = [f"The labels are {task.kind}: {', '.join(task.names)}."]
    if task.kind == "binary" and task.names != config.columns:
        notes[0] += " --label.positive chooses another positive class."
    notes += [*subject_notes(table), *found_notes]
    if "test" not in splits:
        notes.append("No scan of the manifest has the split 'test': only external sets tell of new scans.")
    others, learnt = [], [cohort.paths[row] for row in cohort.rows("train", "validation")]
    for external in parsed:
        other, more = _read_set(external.path, given, naming._replace(table=None), is_whole=False)
        other = with_indicators(other, indicators)
        notes += [f"{external.name}: {note}" for note in more]
        # Files may be missing here: they fail one by one when they are scored.
        paths = [resolve_path(cell, other.path.parent) for cell in other.column("path")]
        found = _read_cohort(other, config, meaning, [external.name] * len(other), paths, series, fill, levels)
        others.append((external.name, external.group, found))
        keys = file_keys([*learnt, *paths])
        if shared := set(keys[: len(learnt)]) & set(keys[len(learnt) :]):
            path = paths[keys.index(next(iter(shared)), len(learnt)) - len(learnt)]
            expected = f"scans for {external.name} that are not trained or selected on"
            raise InputError(external.path, expected, f"{len(shared)} of {table.path}: {path}", "take them out")
        if both := sorted(set(_stated_subjects(table)) & set(_stated_subjects(other)) - {""}):
            notes.append(
                f"{external.name} has subjects of the same name as the manifest ({', '.join(both[:3])}): if they are "
                "the same people, its scores are too good."
            )
    return LabelledSets(table, cohort, meaning, others, notes, store)


def read_weights(table: Table, column: str) -> Float64[np.ndarray, " record"]:
    """Return how much each record counts, 1 where the cell is empty.

    Raises:
        InputError: A cell is no number, or below 0.
    """
    found = np.nan_to_num(np.array(table.floats(column, allow_missing=True), np.float64), nan=1.0)
    if (found < 0).any():
        row = int(np.argmax(found < 0))
        raise table.wrong(table.lines[row], f"a weight of 0 or more under '{column}'", f"{found[row]:g}")
    return found


def _without_weight(table: Table, column: str) -> tuple[Table, list[str]]:
    """Leave out the records of weight 0, and say how many."""
    counts = read_weights(table, column)
    kept = [place for place, value in enumerate(counts) if value > 0]
    if not kept:
        raise InputError(table.path, f"weights above 0 under '{column}'", "none")
    rows, lines = (tuple(values[place] for place in kept) for values in (table.rows, table.lines))
    note = f"Records count in training by their '{column}', from {counts[kept].min():g} to {counts[kept].max():g}"
    left = (
        f"; {len(table) - len(kept):,} of {len(table):,} records, with 0, are left out"
        if len(kept) < len(table)
        else ""
    )
    return dataclasses.replace(table, rows=rows, lines=lines), [f"{note}{left}."]


def _read_set(path: Path, config: LabelConfig, naming: Subjects, *, is_whole: bool) -> tuple[Table, list[str]]:
    """Read a table, or a folder of classes, and what to know about it."""
    if not path.is_dir():
        return read_labelled(path, config), []
    table, notes = read_class_folders(path, naming, is_whole=is_whole)
    if not is_whole:
        require_columns(table, config.columns)
    return table, notes


def read_labelled(path: Path, config: LabelConfig) -> Table:
    """Read a table and check that every record has a label.

    Raises:
        InputError: A column is missing, or a record has no label.
    """
    table = read_table(path, required=("path",), optional=("subject", "split"))
    require_columns(table, config.columns)
    for row, line in zip(table.rows, table.lines, strict=True):
        if all(is_unlabelled(row[column]) for column in config.columns):
            where = f"a label under '{config.columns[0]}'"
            if len(config.columns) > 1:
                where = f"a label under one of {', '.join(config.columns)}"
            raise table.wrong(line, where, "none", "fill it in, or drop the row")
    return table


def find_splits(table: Table, config: LabelConfig, fractions: tuple[float, float, float], seed: int) -> list[str]:
    """Return the split of each record: the table's own column, or a draw of subjects with equal shares of labels.

    Raises:
        InputError: A split has another name, a subject stands in two, or there is nothing to train or select on.
    """
    splits = stated_splits(table)
    if splits is None:
        labels = ["/".join(row[name] for name in config.columns) for row in table.rows]
        is_many = len(set(labels)) > MOST_CLASSES  # values of a regression, say
        splits = split_subjects(groups_of(table), fractions, seed, None if is_many else labels)
    for split in ("train", "validation"):
        if split not in splits:
            raise InputError(table.path, f"records with split '{split}'", f"only {', '.join(sorted(set(splits)))}")
    return splits


def check_classes(cohort: Cohort, task: Task, where: Path, needs_auroc: bool) -> None:
    """Check that every class or label can be learnt, and selected by where it is to be.

    Raises:
        InputError: A class is missing among the training records, or among those of validation.
    """
    if task.kind == "regression":
        return
    for split in ("train", "validation") if needs_auroc else ("train",):
        chosen = cohort.targets[cohort.rows(split)]
        for number, name in enumerate(task.names):
            column = chosen[:, 0] == number if task.kind == "multiclass" else chosen[:, number]
            if len(set(column[np.isfinite(column)].tolist())) < 2:
                expected = f"records with and without '{name}' in the split {split}"
                advice = "or --select loss" if split == "validation" else ""
                raise InputError(where, expected, "one class only", advice)


def _read_cohort(
    table: Table,
    config: LabelConfig,
    meaning: Meaning,
    splits: Sequence[str],
    paths: Sequence[Path],
    series: str,
    fill: float | None,
    levels: Levels,
) -> Cohort:
    scans = tuple(ScanFiles(path, series, fill=fill) for path in paths)
    cells = tuple(tuple(row[name] for name in config.columns) for row in table.rows)
    targets = read_targets(table, config, meaning)
    columns = (np.array(subjects_of(table)), np.array(splits), targets)
    return Cohort(scans, *columns, cells, read_covariates(table, levels))


# Who belongs together ------------------------------------------------------------------------------------------------


def _stated_subjects(table: Table) -> list[str]:
    """Return the cells under "subject", empty where nothing is said."""
    if "subject" not in table.columns:
        return [""] * len(table)
    return ["" if is_missing(cell) else cell for cell in table.column("subject")]


def _identity(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:  # not there: the stage will say so
        return path
    return f"{status.st_dev}:{status.st_ino}"  # a hard link has another path


def _smallest(keys: Iterable[Hashable], words: Sequence[str]) -> dict[Hashable, str]:
    """Return the first word in the alphabet that stands beside each key; an empty one only where there is no other."""
    found: dict[Hashable, str] = {}
    for key, word in zip(keys, words, strict=True):
        found[key] = min(filter(None, (found.get(key), word)), default="")
    return found


def _join(roots: list[int], *columns: Sequence[str]) -> list[int]:
    """Return, per row, the first row that it is joined with by equal keys in any of some columns."""

    def root_of(row: int) -> int:
        while roots[row] != row:
            roots[row] = roots[roots[row]]
            row = roots[row]
        return row

    for column in columns:
        first: dict[str, int] = {}
        for row, key in enumerate(column):
            one, other = sorted((root_of(first.setdefault(key, row)), root_of(row)))
            roots[other] = one
    return [root_of(row) for row in range(len(roots))]
