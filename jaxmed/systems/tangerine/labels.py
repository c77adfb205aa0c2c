"""Labelled scans: manifests and external sets, what their labels mean, and who is trained on."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32

from jaxmed.data.cohort import groups_of, stated_splits, subjects_of
from jaxmed.data.records import Source
from jaxmed.data.splits import SPLITS, split_subjects, write_split_table
from jaxmed.errors import InputError
from jaxmed.io.tables import Table, read_table, require_columns, resolve_path, resolve_paths
from jaxmed.models.heads import Task
from jaxmed.objectives.supervised import TaskKind
from jaxmed.systems.tangerine.scores import MISSING

# Whether a set's distribution was seen, without labels, in pre-training; "other" centres are in neither stage.
GROUPS = ("seen", "unseen", "other")
MOST_CLASSES = 20


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """What is learnt.

    Attributes:
        columns: Columns of the manifest that hold it: one, or several for labels that do not exclude each other.
        kind: "binary", "multiclass" (one column), "multilabel" (0 or 1 per column, empty where not known) or
            "regression". "auto" looks: several columns of 0 and 1 are "multilabel"; one column of 0 and 1, or of two
            words, is "binary"; of more words, or up to 20 whole numbers, "multiclass"; of other numbers "regression".
        positive: Of two words, the one that is predicted; the last in the alphabet where empty.
    """

    columns: tuple[str, ...] = ("label",)
    kind: Literal["auto", "binary", "multiclass", "multilabel", "regression"] = "auto"
    positive: str = ""

    def __post_init__(self) -> None:
        if not self.columns or len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns: expected one or more, each once, found {self.columns}")
        if self.kind in ("binary", "multiclass") and len(self.columns) > 1:
            raise ValueError(f"columns: expected one for a {self.kind} task, found {self.columns}")


@dataclasses.dataclass(frozen=True)
class External:
    """A set that is scored and never trained on.

    Attributes:
        name: What to call it.
        group: One of GROUPS.
        path: Its manifest.
    """

    name: str
    group: str
    path: Path


class Meaning(NamedTuple):
    """What the cells of a label mean.

    Attributes:
        task: The task.
        words: Cell to target, of classes and labels; None for numbers.
    """

    task: Task
    words: dict[str, float] | None


class Cohort(NamedTuple):
    """Labelled scans of one table.

    Attributes:
        paths: Files.
        subjects: Whose they are.
        splits: Of a manifest "train", "validation" or "test"; of an external set its name.
        targets: Labels as the loss takes them, regression values in their unit; NaN where missing.
        cells: The labels as written in the table.
        series: Which DICOM series is meant where a folder holds several.
        fill: Intensity of voxels that have none; None refuses them.
    """

    paths: tuple[Path, ...]
    subjects: np.ndarray
    splits: np.ndarray
    targets: Float32[np.ndarray, "record column"]
    cells: tuple[tuple[str, ...], ...]
    series: str = ""
    fill: float | None = None


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class LabelledSource:
    """Records of images with their targets.

    Attributes:
        images: Records with the field "image".
        targets: One row per record.
    """

    images: Source
    targets: Float32[np.ndarray, "record column"]

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a record."""
        return {**self.images[index], "target": self.targets[index]}

    def name(self, index: int) -> str:
        """Return the record's file."""
        return self.images.name(index)

    def __repr__(self) -> str:
        """Return the images' own."""
        return f"LabelledSource({self.images!r})"


class ForgivingSource:
    """Records of which some may be broken: these become blank images, and `reasons` says why."""

    def __init__(self, source: Source, shape: tuple[int, ...]) -> None:
        """Wrap a source.

        Args:
            source: Records with the field "image".
            shape: Of a blank image.
        """
        self.source, self.shape = source, shape
        self.reasons: dict[int, str] = {}

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a record, or put a blank one in its place."""
        try:
            return self.source[index]
        except InputError as error:
            self.reasons[index] = str(error)
        except (OSError, MemoryError) as error:
            self.reasons[index] = f"{self.name(index)}: {type(error).__name__}: {error}"
        return {"image": np.zeros(self.shape, np.float32)}

    def name(self, index: int) -> str:
        """Return the record's file."""
        return self.source.name(index)


def parse_externals(words: Sequence[str]) -> tuple[External, ...]:
    """Read NAME=CSV or NAME:GROUP=CSV.

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


def read_labelled(path: Path, config: LabelConfig) -> Table:
    """Read a table and check that every record has a label.

    Raises:
        InputError: A column is missing, or a record has no label.
    """
    table = read_table(path, required=("path",), optional=("subject", "split"))
    require_columns(table, config.columns)
    for row, line in zip(table.rows, table.lines, strict=True):
        if all(row[column].lower() in MISSING for column in config.columns):
            where = f"a label under '{config.columns[0]}'"
            if len(config.columns) > 1:
                where = f"a label under one of {', '.join(config.columns)}"
            raise table.wrong(line, where, "none", "fill it in, or drop the row")
    return table


def find_meaning(table: Table, config: LabelConfig, splits: Sequence[str]) -> Meaning:
    """Decide what the labels mean, from those of the training records.

    Raises:
        InputError: There are no two classes or values, or the labels are not of the kind that is set.
    """
    columns = config.columns
    training = [row for row, split in zip(table.rows, splits, strict=True) if split == "train"]
    cells = {name: [_plain(row[name]) for row in training if row[name].lower() not in MISSING] for name in columns}
    for name, values in cells.items():
        if len(set(values)) < 2:
            found = f"only '{values[0]}'" if values else "none"
            raise InputError(table.path, f"two or more classes under '{name}' in the training records", found)
    kind = config.kind if config.kind != "auto" else _guess(cells)
    words = sorted(set(cells[columns[0]]), key=_natural)
    zero_one = {"0": 0.0, "1": 1.0}
    match kind:
        case "regression":
            meaning = Meaning(Task(kind, columns, (0.0,) * len(columns), (1.0,) * len(columns)), None)
            known = read_targets(table, config, meaning)[np.array(splits) == "train"].astype(np.float64)
            moments = (tuple(float(value) for value in moment(known, axis=0)) for moment in (np.nanmean, np.nanstd))
            return Meaning(Task(kind, columns, *moments), None)
        case "multilabel":
            return Meaning(Task(kind, columns), zero_one)
        case "multiclass":
            return Meaning(Task(kind, tuple(words)), {word: float(number) for number, word in enumerate(words)})
    if set(words) == set(zero_one):
        return Meaning(Task(kind, columns), zero_one)
    if len(words) != 2:
        expected = f"two classes under '{columns[0]}' for a binary task"
        raise InputError(table.path, expected, f"{len(words)}: {', '.join(words[:5])}", "or --label.kind multiclass")
    positive = config.positive or words[-1]
    if positive not in words:
        raise InputError("label.positive", f"one of {', '.join(words)}", f"'{positive}'")
    return Meaning(Task(kind, (positive,)), {word: float(word == positive) for word in words})


def read_targets(table: Table, config: LabelConfig, meaning: Meaning) -> Float32[np.ndarray, "record column"]:
    """Return labels as the loss takes them, NaN where missing.

    Raises:
        InputError: A cell is no label of this task; its line is named.
    """

    def read(cell: str, line: int, column: str) -> float:
        if cell.lower() in MISSING:
            return math.nan
        value = _number(cell) if meaning.words is None else meaning.words.get(_plain(cell))
        if value is None or not math.isfinite(value):
            words = "a number" if meaning.words is None else f"one of {', '.join(meaning.words)}"
            raise table.wrong(line, f"{words} under '{column}', as in the training records", f"'{cell}'")
        return value

    return np.array(
        [
            [read(row[column], line, column) for column in config.columns]
            for row, line in zip(table.rows, table.lines, strict=True)
        ],
        np.float32,
    )


def read_cohort(
    table: Table,
    config: LabelConfig,
    meaning: Meaning,
    splits: Sequence[str],
    *,
    may_miss: bool = False,
    series: str = "",
    fill: float | None = None,
) -> Cohort:
    """Return the scans of a table.

    Args:
        table: From `read_labelled`.
        config: Its label columns.
        meaning: What they mean.
        splits: One word per record.
        may_miss: Whether files may be missing, to fail one by one later.
        series: Which DICOM series is meant where a folder holds several.
        fill: Intensity of voxels that have none; None refuses them.

    Raises:
        InputError: A label or a file is wrong.
    """
    folder = table.path.parent
    paths = [resolve_path(c, folder) for c in table.column("path")] if may_miss else resolve_paths(table)
    cells = tuple(tuple(row[name] for name in config.columns) for row in table.rows)
    targets = read_targets(table, config, meaning)
    return Cohort(tuple(paths), np.array(subjects_of(table)), np.array(splits), targets, cells, series, fill)


def take(cohort: Cohort, rows: np.ndarray) -> Cohort:
    """Return some scans of a cohort."""
    return Cohort(
        tuple(cohort.paths[row] for row in rows),
        cohort.subjects[rows],
        cohort.splits[rows],
        cohort.targets[rows],
        tuple(cohort.cells[row] for row in rows),
        cohort.series,
        cohort.fill,
    )


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


def write_splits(path: Path, table: Table, splits: Sequence[str]) -> None:
    """Write the manifest as it was used."""
    if "subject" in table.columns:
        write_split_table(path, table, splits)


def check_classes(cohort: Cohort, task: Task, where: Path, needs_auroc: bool) -> None:
    """Check that every class or label can be learnt, and selected by where it is to be.

    Raises:
        InputError: A class is missing among the training records, or among those of validation.
    """
    if task.kind == "regression":
        return
    for split in ("train", "validation") if needs_auroc else ("train",):
        chosen = cohort.targets[cohort.splits == split]
        for number, name in enumerate(task.names):
            column = chosen[:, 0] == number if task.kind == "multiclass" else chosen[:, number]
            known = column[np.isfinite(column)]
            if len(set(known.tolist())) < 2:
                expected = f"records with and without '{name}' in the split {split}"
                advice = "or --select loss" if split == "validation" else ""
                raise InputError(where, expected, "one class only", advice)


def balanced_weights(targets: Float32[np.ndarray, "record column"], task: Task) -> tuple[float, ...]:
    """Return weights that make classes count alike.

    Of a label, negatives / positives; of classes, records / (classes * records of the class), whose mean over the
    records is 1.
    """
    if task.kind == "multiclass":
        counts = np.bincount(targets[:, 0].astype(int), minlength=len(task.names))
        return tuple(float(len(targets) / (len(task.names) * count)) for count in counts)
    if task.kind == "regression":
        return ()
    return tuple(float((column == 0).sum() / (column == 1).sum()) for column in targets.T)


def _guess(cells: dict[str, list[str]]) -> TaskKind:
    values = {value for column in cells.values() for value in column}
    if len(cells) > 1:
        return "multilabel" if values <= {"0", "1"} else "regression"
    if len(values) == 2:
        return "binary"
    numbers = [_number(value) for value in values]
    if any(number is None for number in numbers):
        return "multiclass"
    is_whole = all(number == int(number) for number in numbers if number is not None)
    return "multiclass" if is_whole and len(numbers) <= MOST_CLASSES else "regression"


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _plain(cell: str) -> str:
    """Return 1.0 and 01 as 1, and words as they are."""
    value = _number(cell)
    return str(int(value)) if value is not None and value == int(value) else cell


def _natural(word: str) -> tuple[int, float, str]:
    value = _number(word)
    return (1, 0.0, word) if value is None else (0, value, word)
