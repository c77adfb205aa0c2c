"""Tables of labels: names, pairs of left and right, and what of them a network tells apart; on the host.

A table is a CSV with the columns

- `label`: value in the file; a value that no row has is refused;
- `name`;
- `side`: left, right, or nothing. The k-th left class and the k-th right one are a pair;
- `class`: label whose class the row belongs to; itself by default, 0 for the background;
- `generation`: value from which an image is drawn, 0 to 255, as in `synthesis.contrast`: both sides have one. By
  default the label itself, or that of its partner on the left;
- `surface`: `inner` within the white surface of its hemisphere, `cortex` between it and the pial one, or nothing.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Integer, UInt8

from jaxmed.errors import InputError, listed
from jaxmed.io.tables import Table, read_table

Side = Literal["", "left", "right"]
Surface = Literal["", "inner", "cortex"]
SIDES: tuple[Side, ...] = ("", "left", "right")
SURFACES: tuple[Surface, ...] = ("", "inner", "cortex")
LARGEST = 4095
"""Labels are looked up in an array of so many."""


class LabelRow(NamedTuple):
    """One value of a label map.

    Attributes:
        label: In the file.
        name: In words.
        side: Hemisphere, or "".
        group: Label whose class it belongs to; 0 the background.
        generation: Value that images are drawn from.
        surface: Part of the hemisphere that bounds a surface.
    """

    label: int
    name: str
    side: Side = ""
    group: int = 0
    generation: int = 0
    surface: Surface = ""


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """Labels of a kind of label map.

    Attributes:
        name: Of the table, for messages.
        rows: Every label that a file may hold; 0 is the background.

    Raises:
        InputError: Labels stand twice, classes are not labels, or left and right do not match.
    """

    name: str
    rows: tuple[LabelRow, ...]

    def __post_init__(self) -> None:
        labels = [row.label for row in self.rows]
        if len(set(labels)) < len(labels):
            double = sorted({label for label in labels if labels.count(label) > 1})
            raise InputError(self.name, "each label once", f"{double[0]} twice")
        if 0 not in labels:
            raise InputError(self.name, "a row for label 0, the background", "none")
        for row in self.rows:
            if not 0 <= row.label <= LARGEST:
                raise InputError(self.name, f"labels from 0 to {LARGEST}", row.label)
            if not 0 <= row.generation <= 255:
                raise InputError(self.name, "generation labels from 0 to 255", f"{row.generation} of label {row.label}")
            if row.group not in labels:
                raise InputError(self.name, "classes that are labels", f"{row.group} of label {row.label}")
        left, right = self._classes("left"), self._classes("right")
        if len(left) != len(right):
            found = f"{len(left)} left and {len(right)} right"
            raise InputError(
                self.name,
                "as many left as right classes",
                found,
                "the k-th of both make a pair; a class without a partner has no side",
            )
        for one, two in zip(left, right, strict=True):
            if _without_side(one.name) != _without_side(two.name):
                found = f"'{one.name}' and '{two.name}'"
                raise InputError(self.name, "left and right classes in one order", found, "sort them alike")

    def _classes(self, side: Side) -> list[LabelRow]:
        return [row for row in self.rows if row.side == side and row.group == row.label]

    @property
    def classes(self) -> tuple[LabelRow, ...]:
        """What a network tells apart, in the order of its output: the midline with the background, left, right."""
        neutral = sorted(self._classes(""), key=lambda row: row.label != 0)
        return (*neutral, *self._classes("left"), *self._classes("right"))

    @property
    def mirror(self) -> tuple[int, ...]:
        """The class that each becomes when left and right are exchanged."""
        neutral, sided = len(self._classes("")), len(self._classes("left"))
        left = range(neutral, neutral + sided)
        return (*range(neutral), *(index + sided for index in left), *left)

    def index(self, labels: Integer[np.ndarray, "x y z"], where: object) -> UInt8[np.ndarray, "x y z"]:
        """Return the class index of every voxel.

        Raises:
            InputError: The map holds a label that the table does not know.
        """
        self.require_known(labels, where)
        order = {row.label: index for index, row in enumerate(self.classes)}
        return self._look_up([(row.label, order[row.group]) for row in self.rows])[labels]

    def generation(self, labels: Integer[np.ndarray, "x y z"]) -> UInt8[np.ndarray, "x y z"]:
        """Return what images are drawn from."""
        return self._look_up([(row.label, row.generation) for row in self.rows])[labels]

    def part(
        self, labels: Integer[np.ndarray, "x y z"], side: Side, surfaces: Sequence[Surface]
    ) -> Bool[np.ndarray, "x y z"]:
        """Return the voxels of a hemisphere that lie within a surface."""
        chosen = [(row.label, int(row.side == side and row.surface in surfaces)) for row in self.rows]
        return self._look_up(chosen)[labels] > 0

    @property
    def has_surfaces(self) -> bool:
        """Whether distances to the cortex follow from it."""
        return {(row.side, row.surface) for row in self.rows} >= {
            (side, surface) for side in ("left", "right") for surface in ("inner", "cortex")
        }

    def require_known(self, labels: Integer[np.ndarray, "x y z"], where: object) -> None:
        """Refuse labels that the table does not know.

        Raises:
            InputError: There are some; the message names them, and how many voxels have them.
        """
        known = {row.label for row in self.rows}
        values, counts = np.unique(labels, return_counts=True)
        unknown = [
            f"{value} ({count} voxels)" for value, count in zip(values, counts, strict=True) if value not in known
        ]
        if unknown:
            advice = "add rows to a table, and name it with --table"
            raise InputError(where, f"labels of the table {self.name}", listed(unknown, 5), advice)

    def _look_up(self, pairs: list[tuple[int, int]]) -> UInt8[np.ndarray, " label"]:
        table = np.zeros(LARGEST + 1, np.uint8)
        for label, value in pairs:
            table[label] = value
        return table


def read_label_table(path: Path) -> LabelTable:
    """Read a table of the form that this file describes.

    Raises:
        InputError: It is none.
    """
    columns = ("name", "side", "class", "generation", "surface")
    table = read_table(path, required=("label",), optional=columns)
    labels = table.integers("label")
    sides = [cast(Side, cell.lower()) for cell in _words(table, "side", SIDES)]
    surfaces = [cast(Surface, cell.lower()) for cell in _words(table, "surface", SURFACES)]
    names = table.column("name") if "name" in table.columns else [f"label {label}" for label in labels]
    groups = _numbers(table, "class", labels)
    partner = _partners(labels, sides, groups)
    drawn = _numbers(table, "generation", [partner.get(label, label) for label in labels])
    return LabelTable(str(path), tuple(map(LabelRow, labels, names, sides, groups, drawn, surfaces)))


def _partners(labels: Sequence[int], sides: Sequence[str], groups: Sequence[int]) -> dict[int, int]:
    """Return the left label of every right class."""
    own = [
        [label for label, one, group in zip(labels, sides, groups, strict=True) if one == side and group == label]
        for side in ("right", "left")
    ]
    return dict(zip(*own, strict=False))


def _words(table: Table, column: str, known: Sequence[str]) -> list[str]:
    if column not in table.columns:
        return [""] * len(table)
    for cell, line in zip(table.column(column), table.lines, strict=True):
        if cell.lower() not in known:
            raise table.wrong(line, f"{', '.join(known[1:])} or nothing under '{column}'", f"'{cell}'")
    return table.column(column)


def _numbers(table: Table, column: str, default: Sequence[int]) -> list[int]:
    if column not in table.columns:
        return list(default)
    found = []
    for cell, line, instead in zip(table.column(column), table.lines, default, strict=True):
        if cell and not cell.lstrip("-").isdigit():
            raise table.wrong(line, f"a whole number or nothing under '{column}'", f"'{cell}'")
        found.append(int(cell) if cell else instead)
    return found


def _without_side(name: str) -> str:
    return " ".join(word for word in name.casefold().split() if word not in ("left", "right"))


# FreeSurfer's numbering --------------------------------------------------------------------------------------------

_PAIRS = (
    (2, 41, "cerebral white matter", "inner"),
    (3, 42, "cerebral cortex", "cortex"),
    (4, 43, "lateral ventricle", "inner"),
    (5, 44, "inferior lateral ventricle", "inner"),
    (7, 46, "cerebellar white matter", ""),
    (8, 47, "cerebellar cortex", ""),
    (10, 49, "thalamus", "inner"),
    (11, 50, "caudate", "inner"),
    (12, 51, "putamen", "inner"),
    (13, 52, "pallidum", "inner"),
    (17, 53, "hippocampus", "inner"),
    (18, 54, "amygdala", "inner"),
    (26, 58, "accumbens", "inner"),
    (28, 60, "ventral diencephalon", "inner"),
)
_MIDLINE = (
    (0, "background"),
    (14, "third ventricle"),
    (15, "fourth ventricle"),
    (16, "brainstem"),
    (24, "cerebrospinal fluid"),
    (77, "white matter lesion"),
    (85, "optic chiasm"),
)
# Values that occur in SynthSeg's training maps beside its classes, with the class that they are counted to.
_MERGED: tuple[tuple[int, int, str, int, int, Surface], ...] = (
    (25, 57, "lesion", 77, 77, "inner"),
    (30, 62, "vessel", 2, 41, "inner"),
)
_DRAWN_ONLY = (72, 502, 506, 507, 508, 509, 511, 512, 514, 515, 516, 530)
_FIRST_FREE = 32  # of the numbers that no generation label has once both sides have one


def _freesurfer() -> LabelTable:
    rows = [LabelRow(label, name, "", label, label) for label, name in _MIDLINE]
    for left, _, name, surface in _PAIRS:
        rows.append(LabelRow(left, f"left {name}", "left", left, left, cast(Surface, surface)))
    for left, right, name, surface in _PAIRS:
        rows.append(LabelRow(right, f"right {name}", "right", right, left, cast(Surface, surface)))
    for left, right, name, left_class, right_class, surface in _MERGED:
        drawn = 77 if left_class == 77 else left
        rows.append(LabelRow(left, f"left {name}", "left", left_class, drawn, surface))
        rows.append(LabelRow(right, f"right {name}", "right", right_class, drawn, surface))
    others = iter(range(_FIRST_FREE, 77))
    rows.append(LabelRow(72, "fifth ventricle", "", 0, 72))
    for label in _DRAWN_ONLY[1:]:
        rows.append(LabelRow(label, f"outside the brain {label}", "", 0, next(others)))
    for left, right in ((136, 137), (163, 164)):
        drawn = next(others)
        rows += [LabelRow(left, f"left {left}", "left", 0, drawn), LabelRow(right, f"right {left}", "right", 0, drawn)]
    return LabelTable("freesurfer", tuple(rows))


# The paper's 56 labels -----------------------------------------------------------------------------------------------

_PAPER_NEUTRAL = (0, 11, 12, 13, 16, *range(31, 45), 46)
_PAPER_LEFT = (*range(1, 11), 14, 15, 17, 47, 49, 51, 53, 55)
_PAPER_RIGHT = (*range(18, 31), 48, 50, 52, 54, 56)
_PAPER_HEMISPHERE = (0, 1, 2, 3, 4, 7, 8, 9, 10, 14, 15, 17, 31, 34, 36, 38, 40, 42)
_PAPER_NAMES = {
    **{1: "cerebral white matter", 2: "cerebral cortex", 3: "lateral ventricle", 4: "inferior lateral ventricle"},
    **{5: "cerebellar white matter", 6: "cerebellar cortex", 7: "thalamus", 8: "caudate", 9: "putamen"},
    **{10: "pallidum", 11: "third ventricle", 12: "fourth ventricle", 13: "brainstem", 14: "hippocampus"},
    **{15: "amygdala", 16: "cerebrospinal fluid", 17: "accumbens"},
}
_PAPER_INNER = (1, 3, 4, 7, 8, 9, 10, 14, 15, 17)
_FREESURFER_OF = {
    **{0: 0, 1: 2, 2: 3, 3: 4, 4: 5, 5: 7, 6: 8, 7: 10, 8: 11, 9: 12, 10: 13, 11: 14, 12: 15, 13: 16, 14: 17, 15: 18},
    **{16: 24, 17: 26},
}


def _paper() -> LabelTable:
    rows = []
    drawn = dict(_FREESURFER_OF)
    others = iter(range(_FIRST_FREE, 72))
    for label in (*_PAPER_NEUTRAL, *_PAPER_LEFT):
        if label not in drawn:
            drawn[label] = next(others)
    for label in _PAPER_NEUTRAL:
        name = "background" if label == 0 else _PAPER_NAMES.get(label, f"structure {label}")
        rows.append(LabelRow(label, name, "", label, drawn[label]))
    for side, labels in (("left", _PAPER_LEFT), ("right", _PAPER_RIGHT)):
        for label, left in zip(labels, _PAPER_LEFT, strict=True):
            surface = "cortex" if left == 2 else "inner" if left in _PAPER_INNER else ""
            name = f"{side} {_PAPER_NAMES.get(left, f'structure {left}')}"
            rows.append(LabelRow(label, name, cast(Side, side), label, drawn[left], cast(Surface, surface)))
    return LabelTable("brainfm", tuple(rows))


def _paper_hemisphere() -> LabelTable:
    rows = {row.label: row for row in _paper().rows}
    kept = [rows[label]._replace(side="") for label in _PAPER_HEMISPHERE]
    return LabelTable("brainfm-hemisphere", tuple(kept))


TABLES = {"freesurfer": _freesurfer, "brainfm": _paper, "brainfm-hemisphere": _paper_hemisphere}
"""FreeSurfer's numbers as SynthSeg has them, the paper's 56 labels (whose names are assumed), and its left 18."""


def find_table(name: str) -> LabelTable:
    """Return a table by name or file.

    Raises:
        InputError: It is neither.
    """
    return TABLES[name]() if name in TABLES else read_label_table(Path(name))
