"""What the labels of a manifest mean: the kind of the task, targets as a loss takes them, weights of classes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from jaxmed.arrays.task import Task, TaskKind
from jaxmed.errors import InputError
from jaxmed.io.tables import Table

MISSING = ("", "na", "nan")
"""Cells without a label; other words for nothing, such as "none", may be a class."""
MOST_CLASSES = 20


def is_unlabelled(cell: str) -> bool:
    """Tell whether a cell holds no label."""
    return cell.lower() in MISSING


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """What is learnt.

    Attributes:
        columns: Columns of the manifest that hold it: one, or several for labels that do not exclude each other.
        kind: "binary", "multiclass" (one column), "multilabel" (0 or 1 per column, empty where not known) or
            "regression". "ordinal" learns of numbers in order, such as grades, whether each threshold is reached;
            "fields" of several columns of classes each class by itself, as multi-label tasks (`data.indicators`).
            "auto" looks: several columns of 0 and 1 are "multilabel"; one column of 0 and 1, or of two
            words, is "binary"; of more words, or up to 20 whole numbers, "multiclass"; of other numbers "regression".
        positive: Of two words, the one that is predicted; the last in the alphabet where empty.
    """

    columns: tuple[str, ...] = ("label",)
    kind: Literal["auto", "binary", "multiclass", "multilabel", "regression", "ordinal", "fields"] = "auto"
    positive: str = ""

    def __post_init__(self) -> None:
        if not self.columns or len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns: expected one or more, each once, found {self.columns}")
        if self.kind in ("binary", "multiclass") and len(self.columns) > 1:
            raise ValueError(f"columns: expected one for a {self.kind} task, found {self.columns}")


class Meaning(NamedTuple):
    """What the cells of a label mean.

    Attributes:
        task: The task.
        words: Cell to target, of classes and labels; None for numbers.
    """

    task: Task
    words: dict[str, float] | None


def find_meaning(table: Table, config: LabelConfig, splits: Sequence[str]) -> Meaning:
    """Decide what the labels mean, from those of the training records.

    Raises:
        InputError: There are no two classes or values, or the labels are not of the kind that is set.
    """
    columns = config.columns
    training = [row for row, split in zip(table.rows, splits, strict=True) if split == "train"]
    cells = {name: [plain_word(row[name]) for row in training if not is_unlabelled(row[name])] for name in columns}
    for name, values in cells.items():
        if len(set(values)) < 2:
            found = f"only '{values[0]}'" if values else "none"
            raise InputError(table.path, f"two or more classes under '{name}' in the training records", found)
    if config.kind in ("ordinal", "fields"):
        raise ValueError(f"kind: expected labels made of {config.kind} classes by `with_indicators`, found the classes")
    kind = config.kind if config.kind != "auto" else _guess(cells)
    words = sorted(set(cells[columns[0]]), key=word_order)
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


def classes_of_folders(config: LabelConfig, table: Table) -> LabelConfig:
    """Return what is learnt from a folder of classes: one class of two or more, also where they are called 1, 2, 3.

    Raises:
        InputError: Something else is set.
    """
    if config.columns != ("label",):
        raise InputError("label.columns", "label, for a folder of classes", ", ".join(config.columns))
    if config.kind not in ("auto", "binary", "multiclass"):
        raise InputError("label.kind", "binary or multiclass, for a folder of classes", config.kind, "give a table")
    if config.kind != "auto":
        return config
    return dataclasses.replace(config, kind="binary" if len(set(table.column("label"))) == 2 else "multiclass")


def read_targets(table: Table, config: LabelConfig, meaning: Meaning) -> Float32[np.ndarray, "record column"]:
    """Return labels as the loss takes them, NaN where missing.

    Raises:
        InputError: A cell is no label of this task; its line is named.
    """

    def read(cell: str, line: int, column: str) -> float:
        if is_unlabelled(cell):
            return math.nan
        value = as_number(cell) if meaning.words is None else meaning.words.get(plain_word(cell))
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


def read_known_targets(
    rows: list[dict[str, str]], task: Task, columns: tuple[str, ...] = ()
) -> Float[np.ndarray, "row column"] | None:
    """Return what the manifest says of each row: 0 or 1 per label, a class number, or values; NaN where empty.

    Args:
        rows: Of the manifest.
        task: What the outputs mean. Of a binary task whose name is a word, one other word stands for 0.
        columns: Where the labels are: one for a multi-class task, else one per output. Where empty, those of the
            outputs' names; "label" for a multi-class task, and where a single output has no column of its name.

    Returns:
        None where there are no such columns and none were asked for.

    Raises:
        InputError: A column that was asked for is not there, or a cell is not a label of this task.
    """
    number = 1 if task.kind == "multiclass" else len(task.names)
    if columns and len(columns) != number:
        raise InputError("label.columns", f"{number}, for {', '.join(task.names)}", f"{', '.join(columns)}")
    present = rows[0] if rows else {}
    found = columns or (("label",) if task.kind == "multiclass" else task.names)
    if not columns and number == 1 and found[0] not in present:
        found = ("label",)
    missing = [name for name in found if name not in present]
    if missing and columns:
        raise InputError("label.columns", f"columns of the manifest, {', '.join(present)}", f"'{missing[0]}'")
    if missing:
        return None
    values = [_read_column([row[column] for row in rows], column, task, place) for place, column in enumerate(found)]
    return np.array(values, np.float64).T


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


def _read_column(cells: list[str], column: str, task: Task, place: int) -> list[float]:
    name = task.names[place]
    # A word that stands for the negative class: what is neither the positive one nor a number.
    others = {cell for cell in cells if not is_unlabelled(cell) and cell != name and as_number(cell) is None}
    negative = next(iter(others)) if task.kind == "binary" and len(others) == 1 else None
    values = []
    for cell in cells:
        number, plain = as_number(cell), plain_word(cell)
        if is_unlabelled(cell):
            values.append(math.nan)
        elif task.kind == "multiclass" and (cell in task.names or plain in task.names):
            values.append(float(task.names.index(cell if cell in task.names else plain)))
        elif task.kind == "regression" and number is not None:
            values.append(number)
        elif task.kind in ("binary", "multilabel") and (cell in (name, negative) or number in (0.0, 1.0)):
            values.append(float(cell == name) if number is None else number)
        else:
            kinds = {"multiclass": f"one of {', '.join(task.names)}", "regression": "a number"}
            expected = kinds.get(task.kind, f"0, 1 or '{name}'")
            raise InputError(f"column {column}", expected, f"'{cell}'", "or leave the cell empty")
    return values


def _guess(cells: dict[str, list[str]]) -> TaskKind:
    values = {value for column in cells.values() for value in column}
    if len(cells) > 1:
        return "multilabel" if values <= {"0", "1"} else "regression"
    if len(values) == 2:
        return "binary"
    numbers = [as_number(value) for value in values]
    if any(number is None for number in numbers):
        return "multiclass"
    is_whole = all(number == int(number) for number in numbers if number is not None)
    return "multiclass" if is_whole and len(numbers) <= MOST_CLASSES else "regression"


def as_number(cell: str) -> float | None:
    """Return a finite number, or None of a word."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def plain_word(cell: str) -> str:
    """Return 1.0 and 01 as 1, and words as they are."""
    value = as_number(cell)
    return str(int(value)) if value is not None and value == int(value) else cell


def word_order(word: str) -> tuple[int, float, str]:
    """Return what classes are sorted by: numbers by their size, then words by the alphabet."""
    value = as_number(word)
    return (1, 0.0, word) if value is None else (0, value, word)
