"""Whose each record is, and in which split: the same file is the same record, however it is named."""

import os

import numpy as np
import pytest

from jaxmed.data.cohort import (
    file_keys,
    find_splits,
    groups_of,
    groups_of_files,
    hold_out,
    parse_externals,
    read_labelled,
    require_files_apart,
    split_unlabelled,
    stated_splits,
    subject_notes,
    subjects_of,
)
from jaxmed.data.images import ImageData, list_files
from jaxmed.data.labels import LabelConfig
from jaxmed.data.tasks import TaskData
from jaxmed.data.tasks import read_manifest as read_tasks
from jaxmed.errors import InputError
from jaxmed.io.tables import read_table, resolve_path, resolve_paths, write_table

pytestmark = pytest.mark.core


@pytest.fixture
def folder(tmp_path):
    for name in ("a.nii", "b.nii", "c.nii", "inner/d.nii", "series/1.dcm", "series/2.dcm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    os.symlink(tmp_path / "a.nii", tmp_path / "link.nii")
    os.symlink(tmp_path / "inner", tmp_path / "elsewhere")
    os.link(tmp_path / "a.nii", tmp_path / "hard.nii")
    return tmp_path


# Two cells that lead to one scan.
SAME = {
    "dot": ("a.nii", "./a.nii"),
    "up and down": ("a.nii", "inner/../a.nii"),
    "double slash": ("inner/d.nii", "inner//d.nii"),
    "absolute": ("a.nii", "{folder}/a.nii"),
    "link": ("a.nii", "link.nii"),
    "hard link": ("a.nii", "hard.nii"),
    "hard link to link": ("link.nii", "./hard.nii"),
    "linked folder": ("inner/d.nii", "elsewhere/d.nii"),
    "folder and slash": ("series", "series/"),
    "folder and its file": ("series", "series/2.dcm"),
    "missing file": ("none.nii", "./none.nii"),
    "equal": ("a.nii", "a.nii"),
}
same = pytest.mark.parametrize("cells", SAME.values(), ids=SAME)


def table_of(folder, rows, columns=("path", "split")):
    cells = [[str(cell).format(folder=folder) for cell in row] for row in rows]
    write_table(folder / "m.csv", columns, [dict(zip(columns, row, strict=True)) for row in cells])
    return read_table(folder / "m.csv")


@same
@pytest.mark.parametrize("has_subject", [False, True])
def test_one_file_in_two_splits_is_refused(folder, cells, has_subject):
    rows = [(cells[0], "train"), ("b.nii", "validation"), (cells[1], "test")]
    columns = ("path", "split")
    if has_subject:
        rows = [(*row, subject) for row, subject in zip(rows, ("p", "q", ""), strict=True)]
        columns = ("path", "split", "subject")
    with pytest.raises(
        InputError, match=r"one split, found '.*' \(line 2\) in train and '.*' \(line 4\) in test, the s"
    ):
        stated_splits(table_of(folder, rows, columns))
    fine = [(row[0], "train", *row[2:]) for row in rows]
    assert stated_splits(table_of(folder, fine, columns)) == ["train"] * 3


@same
def test_one_file_is_drawn_into_one_split(folder, cells):
    rows = [(cells[0], "p", 0), (cells[1], "", 0), ("b.nii", "q", 1), ("c.nii", "", 1), ("none_b.nii", "p", 0)]
    table = table_of(folder, rows, ("path", "subject", "label"))
    groups = groups_of(table)
    assert groups[0] == groups[1] == groups[4] == "p" and len({*groups[1:4]}) == 3
    for seed in range(4):
        splits = split_unlabelled(table, 0.34, seed)
        assert splits[0] == splits[1] == splits[4] and {"train", "validation"} == set(splits)


@same
def test_every_system_refuses_one_file_in_two_splits(folder, cells):
    rows = [(cells[0], "train", "p", 0, "b.nii", "t"), (cells[1], "validation", "q", 1, "c.nii", "t")]
    table_of(folder, rows, ("path", "split", "subject", "label", "mask", "task"))
    if "none.nii" not in cells:
        with pytest.raises(InputError, match="every file in one split"):
            list_files(ImageData(manifest=folder / "m.csv"), None, 0)
    with pytest.raises(InputError, match="every file in one split"):
        find_splits(read_labelled(folder / "m.csv", LabelConfig()), LabelConfig(), (0.5, 0.25, 0.25), 0)
    with pytest.raises(InputError, match="every file in one split"):
        read_tasks(TaskData(manifest=folder / "m.csv"), 0)


def test_records_joined_by_a_chain_stay_together(folder):
    rows = [("a.nii", "p"), ("link.nii", "q"), ("b.nii", "q"), ("c.nii", "r"), ("./b.nii", "")]
    table = table_of(folder, rows, ("path", "subject"))
    assert groups_of(table) == ["p", "p", "p", "r", "p"]
    assert subjects_of(table) == ["p", "q", "q", "r", "p"]
    table = table_of(folder, rows[::-1], ("path", "subject"))
    assert groups_of(table) == ["p", "p", "p", "r", "p"][::-1]


def test_an_empty_subject_is_one_of_its_own(folder):
    rows = [(f"x{number}.nii", "" if number % 2 else f"p{number}", number % 4 // 2) for number in range(16)]
    table = table_of(folder, rows, ("path", "subject", "label"))
    assert subjects_of(table) == [row[1] or row[0] for row in rows]
    splits = find_splits(table, LabelConfig(), (0.5, 0.25, 0.25), 0)
    assert len({split for split, row in zip(splits, rows, strict=True) if not row[1]}) > 1
    assert subject_notes(table) == ["8 of 16 records have no subject: each of these counts as a subject of its own."]
    stated = table_of(folder, [(row[0], row[1], s) for row, s in zip(rows, splits, strict=True)],
                      ("path", "subject", "split"))  # fmt: skip
    assert stated_splits(stated) == splits
    assert subject_notes(table_of(folder, [("a.nii", "p")], ("path", "subject"))) == []
    missing = table_of(folder, [("a.nii", "NA", "train"), ("b.nii", "nan", "test"), ("c.nii", "na", "test")],
                       ("path", "subject", "split"))  # fmt: skip
    assert stated_splits(missing) == ["train", "test", "test"] and subjects_of(missing) == ["a.nii", "b.nii", "c.nii"]
    assert "Without a column 'subject'" in subject_notes(table_of(folder, [("a.nii", "train")]))[0]


def test_splits_are_those_of_the_table_or_drawn_by_subject(tmp_path):
    rows = [(f"{number}.nii.gz", f"s{number // 2}") for number in range(20)]
    drawn = split_unlabelled(table_of(tmp_path, rows, ("path", "subject")), 0.2, 0)
    assert drawn.count("validation") == 4 and drawn[::2] == drawn[1::2]
    told = [(path, subject, "test" if subject == "s3" else "train") for path, subject in rows]
    assert split_unlabelled(table_of(tmp_path, told, ("path", "subject", "split")), 0.2, 0) == [row[2] for row in told]
    assert split_unlabelled(table_of(tmp_path, [("a.nii.gz",)], ("path",)), 0.2, 0) == ["train"]
    assert hold_out(["a", "b", "a"], 0.0, 0) == ["train"] * 3
    with pytest.raises(InputError, match="line 2: expected one of train, test under 'split', found 'validation'"):
        stated_splits(table_of(tmp_path, [("a", "validation")]), ("train", "test"))


def test_files_found_in_folders_are_compared_too(folder):
    paths = [folder / name for name in ("a.nii", "b.nii", "hard.nii", "link.nii")]
    assert groups_of_files(paths) == [str(folder / name) for name in ("a.nii", "b.nii", "a.nii", "a.nii")]
    keys = file_keys(paths)
    assert keys[0] == keys[2] == keys[3] != keys[1]
    with pytest.raises(InputError, match=r"scans: expected every file in one split, found '.*a.nii' in train and"):
        require_files_apart("scans", paths, ["train", "train", "validation", "train"])


@pytest.mark.parametrize(
    ("cell", "advice"),
    [
        ("~$a.nii", "paths start at the table's folder"),
        ("~nosuchuser/a.nii", "paths start at the table's folder"),
        ("inner\\d.nii", "write / between folders"),
        ("file:///data/a.nii", "write the path of the file itself"),
        ("$HOME/a.nii", "variables in a cell are taken as they are"),
        ("%USERPROFILE%/a.nii", "variables in a cell are taken as they are"),
    ],
)
def test_odd_paths_are_one_line(folder, cell, advice):
    table = table_of(folder, [("a.nii", "train"), (cell, "train")])
    assert stated_splits(table) == ["train", "train"]
    with pytest.raises(InputError, match=r"1 of 2 missing: .* \(line 3\)") as caught:
        resolve_paths(table)
    assert advice in str(caught.value)


def test_a_tilde_is_a_home_where_there_is_one(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert resolve_path("~/a.nii", folder / "inner") == folder / "a.nii"
    (folder / "~$a.nii").write_text("a name that begins with a tilde")
    assert resolve_paths(table_of(folder, [("~$a.nii", "train"), (" a.nii ", "train")])) == [
        folder / "~$a.nii", folder / "a.nii",
    ]  # fmt: skip


def test_externals_have_a_name_and_a_group(tmp_path):
    found = parse_externals((f"a={tmp_path}/x=1.csv", "b:seen=b.csv"))
    assert [(e.name, e.group, e.path.name) for e in found] == [("a", "other", "x=1.csv"), ("b", "seen", "b.csv")]


def test_splits_are_drawn_by_subject_where_there_are_none(tmp_path):
    rows = [f"{i}.nii,s{i // 2},{i // 2 % 2}" for i in range(80)]
    (tmp_path / "t.csv").write_text("\n".join(["path,subject,label", *rows]) + "\n")
    table = read_labelled(tmp_path / "t.csv", LabelConfig())
    splits = np.array(find_splits(table, LabelConfig(), (0.7, 0.15, 0.15), 0))
    assert [(splits == name).sum() for name in ("train", "validation", "test")] == [56, 12, 12]
    assert (splits[::2] == splits[1::2]).all()
