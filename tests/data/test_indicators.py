"""Ordered classes and several classes at once become labels of 0 and 1, whose names say how."""

import dataclasses

import numpy as np
import pytest

from jaxmed.data.cohort import read_labelled_sets
from jaxmed.data.indicators import find_indicators, indicate, known_rows, with_indicators
from jaxmed.data.labels import LabelConfig, find_meaning
from jaxmed.errors import InputError
from jaxmed.io.tables import read_table

pytestmark = pytest.mark.core
ORDINAL = LabelConfig(("grade",), "ordinal")
FIELDS = LabelConfig(("side", "zone"), "fields")
ROWS = ("3,left,inner", "2,right,outer", "4,none,outer", "3,left,", "2.0,right,inner", "4,none,inner")


@pytest.fixture
def manifest(tmp_path):
    splits = ["train"] * 5 + ["validation"]
    lines = [f"{n}.nii,{n},{row},{split}" for n, (row, split) in enumerate(zip(ROWS, splits, strict=True))]
    for n in range(len(ROWS)):
        (tmp_path / f"{n}.nii").touch()
    (tmp_path / "t.csv").write_text("\n".join(["path,subject,grade,side,zone,split", *lines]) + "\n")
    return tmp_path / "t.csv"


def sets_of(manifest, config, external=()):
    return read_labelled_sets(manifest, external, config, (0.7, 0.3, 0.0), 0)


def test_grades_become_thresholds(manifest):
    (manifest.parent / "x.nii").touch()
    (manifest.parent / "other.csv").write_text("path,subject,grade\nx.nii,x,5\n")
    found = sets_of(manifest, ORDINAL, (f"elsewhere={manifest.parent / 'other.csv'}",))
    assert found.meaning.task.kind == "multilabel" and found.meaning.task.names == ("grade >= 3", "grade >= 4")
    np.testing.assert_array_equal(
        found.cohort.targets, [[1, 0], [0, 0], [1, 1], [1, 0], [0, 0], [1, 1]]
    )  # fmt: skip
    np.testing.assert_array_equal(found.externals[0][2].targets, [[1, 1]])


def test_several_fields_become_one_label_for_each_word(manifest):
    task = sets_of(manifest, FIELDS).meaning.task
    assert task.names == ("side = left", "side = none", "side = right", "zone = outer")
    targets = sets_of(manifest, FIELDS).cohort.targets
    np.testing.assert_array_equal(targets[:4], [[1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, np.nan]])


def test_a_name_says_how_a_later_table_is_read():
    rows = [{"grade": "4.0", "side": "left"}, {"grade": "", "side": "right"}]
    found = known_rows(rows, ("grade >= 3", "side = right", "volume"))
    assert [row["grade >= 3"] for row in found] == ["1", ""] and [row["side = right"] for row in found] == ["0", "1"]
    assert "volume" not in found[0] and indicate("side", rows[0]) == "left"
    assert known_rows([{"grade >= 3": "0", "grade": "5"}], ("grade >= 3",))[0]["grade >= 3"] == "0"
    with pytest.raises(InputError, match="expected a grade as a number, found 'high' under 'grade'"):
        known_rows([{"grade": "high"}], ("grade >= 3",))


def test_classes_without_an_order_or_a_second_one_are_refused(manifest):
    table = read_table(manifest)
    with pytest.raises(InputError, match="numbers under 'side', which have an order"):
        find_indicators(table, dataclasses.replace(ORDINAL, columns=("side",)))
    with pytest.raises(InputError, match="unknown_column|no such column|columns"):
        with_indicators(table, ("unknown_column >= 3",))
    manifest.write_text(manifest.read_text().replace("2,right", "one,right"))
    with pytest.raises(InputError, match="line 3: expected a grade as a number"):
        with_indicators(read_table(manifest), ("grade >= 3",))
    with pytest.raises(ValueError, match="found the classes"):
        find_meaning(table, ORDINAL, table.column("split"))
