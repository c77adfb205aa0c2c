"""Label tables: pairs, classes, what is refused."""

import numpy as np
import pytest

from jaxmed.data.label_table import TABLES, LabelRow, LabelTable, find_table, read_label_table
from jaxmed.errors import InputError

pytestmark = pytest.mark.core
HEADER = "label,name,side,class,generation,surface\n"
GOOD = HEADER + "0,background,,,,\n2,left white,left,,,inner\n3,left cortex,left,,,cortex\n"
GOOD += "41,right white,right,,,inner\n42,right cortex,right,,,cortex\n85,chiasm,,0,40,\n"


def write(folder, text):
    path = folder / "table.csv"
    path.write_text(text)
    return path


def test_the_papers_table_has_its_classes_in_order():
    table = TABLES["brainfm"]()
    labels = [row.label for row in table.classes]
    assert labels[:20] == [0, 11, 12, 13, 16, *range(31, 45), 46]
    assert labels[20:38] == [*range(1, 11), 14, 15, 17, 47, 49, 51, 53, 55]
    assert labels[38:] == [*range(18, 31), 48, 50, 52, 54, 56]
    mirror = np.array(table.mirror)
    np.testing.assert_array_equal(mirror[mirror], np.arange(56))
    # The k-th left class goes to the k-th right one: label 1 to 18, 55 to 56.
    assert labels[mirror[labels.index(1)]] == 18 and labels[mirror[labels.index(55)]] == 56
    assert len(TABLES["brainfm-hemisphere"]().classes) == 18


def test_freesurfers_table_merges_right_into_left_for_drawing():
    table = TABLES["freesurfer"]()
    assert [row.label for row in table.classes[:7]] == [0, 14, 15, 16, 24, 77, 85] and len(table.classes) == 7 + 28
    labels = np.array([0, 2, 41, 43, 46, 53, 60, 57, 516, 62]).reshape(-1, 1, 1)
    drawn = table.generation(labels).reshape(-1)
    assert drawn[:8].tolist() == [0, 2, 2, 4, 7, 17, 28, 77]
    index = table.index(labels, "map").reshape(-1)
    classes = [table.classes[number].label for number in index]
    assert classes == [0, 2, 41, 43, 46, 53, 60, 77, 0, 41]
    # Every structure that is not of a pair is drawn with an intensity of its own.
    values = [row.generation for row in table.rows if row.side != "right" and row.generation not in (77,)]
    assert len(set(values)) == len(values) and not any(100 <= value <= 250 for value in values)


def test_a_table_of_ones_own(tmp_path):
    table = read_label_table(write(tmp_path, GOOD))
    assert [row.label for row in table.classes] == [0, 2, 3, 41, 42] and table.mirror == (0, 3, 4, 1, 2)
    labels = np.array([0, 41, 42, 85]).reshape(-1, 1, 1)
    assert table.generation(labels).reshape(-1).tolist() == [0, 2, 3, 40]
    assert table.index(labels, "map").reshape(-1).tolist() == [0, 3, 4, 0]
    assert table.has_surfaces and find_table(str(tmp_path / "table.csv")) == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("42,right cortex,right,,,cortex\n", ""), "as many left as right classes, found 2 left and 1 right"),
        (("41,right white", "41,right cortex"), "left and right classes in one order, found 'left white' and"),
        (("0,background,,,,\n", ""), "a row for label 0"),
        (("3,left cortex", "2,left cortex"), "each label once, found 2 twice"),
        ((",inner", ",inside"), "inner, cortex or nothing under 'surface', found 'inside'"),
        ((",left,", ",links,"), "left, right or nothing under 'side', found 'links'"),
        (("0,40,", "7,40,"), "classes that are labels, found 7 of label 85"),
        (("0,40,", "0,300,"), "generation labels from 0 to 255, found 300"),
        (("85,", "x,"), "a number under 'label', found 'x'"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        read_label_table(write(tmp_path, GOOD.replace(*change, 1)))


def test_unknown_labels_are_named_with_their_voxels():
    table = LabelTable("mine", (LabelRow(0, "background"), LabelRow(2, "white", "", 2, 2)))
    labels = np.array([0, 2, 9, 9, 11]).reshape(-1, 1, 1)
    with pytest.raises(
        InputError, match=r"scan: expected labels of the table mine, found 9 \(2 voxels\), 11 \(1 voxels"
    ):
        table.index(labels, "scan")
