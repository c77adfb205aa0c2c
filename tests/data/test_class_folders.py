"""Folders of classes: splits, classes and subjects as a table, and what is refused."""

import os

import numpy as np
import pytest

from jaxmed.data.class_folders import ALONE, Subjects, read_class_folders
from jaxmed.data.cohort import read_labelled_sets
from jaxmed.data.labels import LabelConfig
from jaxmed.errors import InputError
from jaxmed.io.images import write_png
from jaxmed.io.tables import resolve_paths, write_table

pytestmark = pytest.mark.core
FRACTIONS = (0.6, 0.2, 0.2)


def write(root, *places, seed=0):
    """Write pictures that all differ."""
    generator = np.random.default_rng([seed, len(places)])
    for place in places:
        write_png(root / place, generator.integers(0, 256, (5, 6), np.uint8))
    return root


def tree(root, val="val", classes=("mild", "none", "severe"), number=2, seed=0):
    """Write a folder of classes whose pictures have unlike names."""
    return write(
        root,
        *(
            f"{split}/{name}/{split}_{name}_{count}.png"
            for split in ("train", val, "test") for name in classes for count in range(number)
        ),
        seed=seed,
    )  # fmt: skip


def sets_of(root, *externals, config=LabelConfig(), **options):
    return read_labelled_sets(root, externals, config, FRACTIONS, 0, **options)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_folders_are_a_table_of_paths_labels_splits_and_subjects(tmp_path, val):
    root = write(tree(tmp_path / "data", val), "train/none/deeper/more.jpg.png", ".hidden/x/1.png", "train/.x/1.png")
    table, notes = read_class_folders(root)
    assert table.columns == ("path", "label", "subject", "split") and notes == [ALONE]
    assert [row["split"] for row in table.rows] == ["train"] * 7 + ["validation"] * 6 + ["test"] * 6
    assert [row["label"] for row in table.rows[:7]] == ["mild"] * 2 + ["none"] * 3 + ["severe"] * 2
    assert all(path.is_file() for path in resolve_paths(table))
    assert {row["subject"] for row in table.rows} >= {"train_none_0", f"{val}_mild_1", "more.jpg"}
    sets = sets_of(root)
    assert sets.meaning.task.kind == "multiclass" and sets.meaning.task.names == ("mild", "none", "severe")
    assert sets.cohort.targets[:3, 0].tolist() == [0, 0, 1]
    assert sets.cohort.rows("validation").tolist() == list(range(7, 13))


def test_names_that_say_nothing_are_no_subjects_and_may_stand_in_two_splits(tmp_path):
    root = write(tmp_path / "data", *(f"{s}/{c}/{n}.png" for s in ("train", "val") for c in "ab" for n in (1, 2)))
    table, _ = read_class_folders(root)
    assert table.column("subject")[:2] == ["train/a/1", "train/a/2"] and len(set(table.column("subject"))) == 8
    sets = sets_of(root)
    assert set(sets.cohort.splits) == {"train", "validation"} and sets.meaning.task.kind == "binary"
    assert sets.meaning.task.names == ("b",)
    assert any("only external sets" in note for note in sets.notes)


def test_classes_called_by_numbers_are_classes(tmp_path):
    names = [str(grade) for grade in range(23)]
    sets = sets_of(tree(tmp_path / "data", classes=names, number=1))
    assert sets.meaning.task.kind == "multiclass" and sets.meaning.task.names == tuple(names)
    for kind in ("regression", "multilabel"):
        with pytest.raises(InputError, match=f"label.kind: expected binary or multiclass, .* found {kind}"):
            sets_of(tmp_path / "data", config=LabelConfig(kind=kind))
    with pytest.raises(InputError, match=r"label.columns: expected label, for a folder of classes, found grade"):
        sets_of(tmp_path / "data", config=LabelConfig(("grade",)))


def test_a_pattern_tells_subjects_with_several_pictures(tmp_path):
    pictures = [f"{s}/{c}/{s}{c}{n}_{eye}.png" for s in ("train", "val") for c in "ab" for n in "12" for eye in "lr"]
    root = write(tmp_path / "data", *pictures)
    naming = Subjects("^(.*)_(l|r)$")
    table, notes = read_class_folders(root, naming)
    assert table.column("subject")[:4] == ["traina1", "traina1", "traina2", "traina2"] and notes == []
    assert len(set(sets_of(root, naming=naming).cohort.subjects)) == 8
    with pytest.raises(InputError, match=r"traina1_l\.png: expected a name that holds the pattern '\[0-9\]\{2\}'"):
        read_class_folders(root, Subjects("[0-9]{2}"))
    with pytest.raises(InputError, match=r"data.subject_pattern: expected a regular expression, found '\('"):
        read_class_folders(root, Subjects("("))
    with pytest.raises(InputError, match="expected every subject in one split, found 'a' in train and validation"):
        sets_of(root, naming=Subjects("(a|b)[12]"))


def test_a_table_tells_subjects_and_what_is_known_of_them(tmp_path):
    root = tree(tmp_path / "data", number=2)
    rows = [
        {"path": row["path"].removeprefix("data/") if n % 2 else row["path"].split("/")[-1], "subject": f"s{n // 2}",
         "age": 40 + n, "sex": "fm"[n % 2]}
        for n, row in enumerate(read_class_folders(root)[0].rows)
    ]  # fmt: skip
    write_table(tmp_path / "who.csv", list(rows[0]), rows)
    sets = sets_of(root, naming=Subjects(table=tmp_path / "who.csv"), covariates=("age", "sex"))
    assert sets.cohort.subjects.tolist() == [f"s{n // 2}" for n in range(18)]
    np.testing.assert_array_equal(sets.cohort.covariates, [[40 + n, n % 2] for n in range(18)])
    np.testing.assert_array_equal(sets.cohort.take(np.array([3])).covariates, [[43, 1]])
    write_table(tmp_path / "who.csv", list(rows[0]), rows[:-2])
    with pytest.raises(InputError, match="a row for each of the 18 pictures, found none for 2, such as 'test/severe/"):
        sets_of(root, naming=Subjects(table=tmp_path / "who.csv"))
    write_table(tmp_path / "who.csv", ["path", "label"], [{"path": "x", "label": 1}])
    with pytest.raises(InputError, match=r"who\.csv: expected a table of subjects, found a column 'label'"):
        read_class_folders(root, Subjects(table=tmp_path / "who.csv"))
    write(root, "train/mild/1.png", "train/none/1.png")
    write_table(tmp_path / "who.csv", ["path"], [{"path": "1.png"}])
    with pytest.raises(InputError, match=r"who\.csv line 2: expected one picture of this name, found 2 '1.png'"):
        read_class_folders(root, Subjects(table=tmp_path / "who.csv"))


def test_external_folders_are_scored_whole_whatever_their_splits(tmp_path):
    root = tree(tmp_path / "data")
    tree(tmp_path / "other", classes=("mild", "none"), seed=1)
    write(tmp_path / "flat", "none/f1.png", "severe/f2.png", seed=2)
    sets = sets_of(root, f"other={tmp_path / 'other'}", f"flat:seen={tmp_path / 'flat'}")
    assert [(name, group, len(cohort.scans)) for name, group, cohort in sets.externals] == [
        ("other", "other", 12), ("flat", "seen", 2),
    ]  # fmt: skip
    assert sets.externals[1][2].targets[:, 0].tolist() == [1, 2]
    write(tmp_path / "wrong", "moderate/w.png")
    with pytest.raises(InputError, match=r"wrong line 1: expected one of mild, none, severe under 'label'"):
        sets_of(root, f"wrong={tmp_path / 'wrong'}")
    write_table(tmp_path / "m.csv", ["path", "label", "split"], [
        {"path": path, "label": label, "split": split}
        for path, label, split in zip(resolve_paths(sets.table), sets.table.column("label"), sets.table.column("split"),
                                      strict=True)
    ])  # fmt: skip
    mixed = sets_of(tmp_path / "m.csv", f"flat={tmp_path / 'flat'}", naming=Subjects("^(.)"))
    assert mixed.externals[0][2].subjects.tolist() == ["f", "f"]
    with pytest.raises(InputError, match=r"data.subject_pattern: expected a folder of classes, found the table"):
        sets_of(tmp_path / "m.csv", naming=Subjects("x"))


def test_without_split_folders_subjects_are_drawn(tmp_path):
    root = write(tmp_path / "data", *(f"{c}/{c}{n}.png" for c in "ab" for n in range(10)))
    table, notes = read_class_folders(root)
    assert "split" not in table.columns and any("subjects are drawn into splits" in note for note in notes)
    cohort = sets_of(root).cohort
    assert [len(cohort.rows(split)) for split in ("train", "validation", "test")] == [12, 4, 4]


def test_copies_in_two_splits_are_told_and_links_are_refused(tmp_path):
    root = tree(tmp_path / "data")
    content = (root / "train/mild/train_mild_0.png").read_bytes()
    (root / "test/none/copy.png").write_bytes(content)
    _, notes = read_class_folders(root)
    assert notes[0] == (
        "1 picture is byte for byte in two splits, such as train/mild/train_mild_0.png and test/none/copy.png: "
        "scores on these are too good."
    )
    (root / "test/none/copy.png").unlink()
    os.symlink(root / "train/mild/train_mild_0.png", root / "test/none/link.png")
    with pytest.raises(InputError, match="every file in one split"):
        sets_of(root)


def emptied(root):
    for path in (root / "val/none").iterdir():
        path.unlink()


def renamed(old, new):
    return lambda root: (root / old).rename(root / new)


MISTAKES = {
    "no validation": (renamed("val", "moved"), "a folder|folders train, val and test alone, found 'moved' beside them"),
    "no validation at all": (
        lambda root: renamed("val", "../val")(root),
        r"data: expected a folder val, found only test",
    ),
    "no train": (renamed("train", "../train"), r"data: expected a folder train, found only test, val"),
    "class missing in a split": (
        renamed("val/none", "../none"),
        "val/none: expected pictures of .*, found no such fold",
    ),
    "class empty in a split": (emptied, "val/none: expected pictures of the class 'none', found an empty folder"),
    "class missing in train": (renamed("train/mild", "../mild"), "train/mild: expected .*, found no such folder"),
    "no picture": (lambda root: (root / "train/mild/notes.txt").write_text("x"), "pictures alone .*found 'notes.txt'"),
    "picture beside classes": (
        lambda root: write(root, "train/a.png"),
        "a folder per class, found the picture 'a.png'",
    ),
    "two validations": (
        lambda root: write(root, "valid/none/v.png"),
        "one folder for validation, found 'val' and 'val",
    ),
    "nothing": (
        lambda root: [path.unlink() for path in root.rglob("*.png")],
        "folders of pictures .*, found no picture",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, tmp_path):
    change, message = MISTAKES[mistake]
    change(tree(tmp_path / "data"))
    with pytest.raises(InputError, match=message) as caught:
        sets_of(tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_one_class_is_refused(tmp_path):
    with pytest.raises(InputError, match="two or more class folders, found only 'mild'"):
        sets_of(tree(tmp_path / "data", classes=("mild",)))


# Covariates of a table -----------------------------------------------------------------------------------------------


def table_with(tmp_path, column, cells, name="t.csv"):
    rows = [{"path": f"{n}.png", "label": n % 2, "split": "train" if n < 4 else "validation", column: cell}
            for n, cell in enumerate(cells)]  # fmt: skip
    write_table(tmp_path / name, list(rows[0]), rows)
    write(tmp_path, *(row["path"] for row in rows))
    return tmp_path / name


def test_covariates_are_numbers_or_two_words(tmp_path):
    for cells, expected in ((["1", "2.5", "", "NA", "4", "5"], [1, 2.5, np.nan, np.nan, 4, 5]),
                            (["m", "f", "f", "", "m", "m"], [1, 0, 0, np.nan, 1, 1])):  # fmt: skip
        found = sets_of(table_with(tmp_path, "x", cells), covariates=("x",)).cohort.covariates
        np.testing.assert_array_equal(found[:, 0], expected)
    for cells, message in ((["a", "b", "c"] * 2, "numbers, or two words, under 'x', found 3: a, b, c"),
                           ([""] * 6, "found empty cells"), (["1", "2", "old"] * 2, "found 3: 1, 2, old")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            sets_of(table_with(tmp_path, "x", cells), covariates=("x",))
    with pytest.raises(InputError, match="a column 'age'"):
        sets_of(table_with(tmp_path, "x", ["1"] * 6), covariates=("age",))


def test_external_sets_may_lack_covariates_and_not_call_them_otherwise(tmp_path):
    here = table_with(tmp_path, "sex", ["m", "f"] * 3)
    (tmp_path / "there").mkdir()
    there = table_with(tmp_path / "there", "other", ["1"] * 6)
    sets = sets_of(here, f"there={there}", covariates=("sex",))
    assert np.isnan(sets.externals[0][2].covariates).all()
    there = table_with(tmp_path / "there", "sex", ["male"] * 6)
    with pytest.raises(InputError, match=r"t\.csv line 2: expected f or m under 'sex', found 'male'"):
        sets_of(here, f"there={there}", covariates=("sex",))
