import collections

import numpy as np
import pytest

from jaxmed.data.splits import (
    label_fractions,
    quality_flags,
    quality_mixture,
    shared_subjects,
    split_subjects,
    write_split_table,
)
from jaxmed.errors import InputError
from jaxmed.io.tables import read_table, write_table

pytestmark = pytest.mark.core

# 60 subjects with two scans each; one in three is positive.
SUBJECTS = [f"s{number:03d}" for number in range(60) for _ in range(2)]
LABELS = [int(number % 3 == 0) for number in range(60) for _ in range(2)]


def test_splits_keep_subjects_whole_and_shares():
    splits = split_subjects(SUBJECTS, (0.7, 0.1, 0.2), seed=3, labels=LABELS)
    homes = collections.defaultdict(set)
    for subject, split in zip(SUBJECTS, splits, strict=True):
        homes[subject].add(split)
    assert {len(parts) for parts in homes.values()} == {1}
    assert collections.Counter(splits) == {"train": 84, "validation": 12, "test": 24}
    positives = collections.Counter(split for split, label in zip(splits, LABELS, strict=True) if label)
    for split, share in (("train", 28), ("validation", 4), ("test", 8)):
        assert abs(positives[split] - share) <= 4


def test_splits_depend_on_seed_and_not_on_row_order():
    splits = split_subjects(SUBJECTS, seed=1)
    assert splits != split_subjects(SUBJECTS, seed=2)
    assert splits[::-1] == split_subjects(SUBJECTS[::-1], seed=1)


def test_small_sets_fill_every_split():
    assert set(split_subjects(["a", "b", "c"], (0.9, 0.05, 0.05))) == {"train", "validation", "test"}
    assert "validation" not in split_subjects(["a", "b", "c"], (0.5, 0.0, 0.5))
    with pytest.raises(InputError, match="at least 3"):
        split_subjects(["a", "b", "a"])
    with pytest.raises(InputError, match="sum to 1"):
        split_subjects(["a", "b", "c"], (0.5, 0.5, 0.5))


def test_label_fractions_are_nested_stratified_and_whole():
    chosen = label_fractions(SUBJECTS, LABELS, [0.1, 0.3, 1.0], seed=5)
    assert set(chosen[0.1]) < set(chosen[0.3]) < set(chosen[1.0]) == set(range(120))
    for fraction, rows in chosen.items():
        labels = [LABELS[row] for row in rows]
        assert (labels.count(1), labels.count(0)) == (round(40 * fraction), round(80 * fraction))
        subjects = collections.Counter(SUBJECTS[row] for row in rows)
        assert set(subjects.values()) == {2}


def test_label_fractions_tell_the_smallest_possible_one():
    with pytest.raises(InputError, match=r"0\.025 or more.*class of 20 subjects"):
        label_fractions(SUBJECTS, LABELS, [0.01])
    rows = label_fractions(SUBJECTS, LABELS, [0.025])[0.025]
    assert {LABELS[row] for row in rows} == {0, 1}


def test_quality_mixtures_have_their_share_and_are_nested():
    flags = np.arange(100) % 2 == 0
    labels = ["a" if row % 5 else "b" for row in range(100)]
    arms = {share: set(quality_mixture(flags, share, 30, seed=2, labels=labels)) for share in (0, 0.25, 0.5, 1)}
    for share, rows in arms.items():
        assert len(rows) == 30
        assert sum(flags[row] for row in rows) == np.floor(30 * share + 0.5)
        assert sum(labels[row] == "b" for row in rows) in (6, 7)
    for small, large in ((0, 0.25), (0.25, 0.5), (0.5, 1)):
        assert {row for row in arms[small] if flags[row]} <= {row for row in arms[large] if flags[row]}
        assert {row for row in arms[large] if not flags[row]} <= {row for row in arms[small] if not flags[row]}


def test_quality_mixture_says_why_it_is_impossible():
    flags = np.arange(100) < 10
    with pytest.raises(InputError, match="15 records of high quality for 0.5 of 30, found 10"):
        quality_mixture(flags, 0.5, 30)


def test_quality_mixture_takes_one_record_of_a_subject():
    subjects = [f"s{row // 2}" for row in range(40)]
    flags = [row // 2 % 2 == 0 for row in range(40)]
    flags[1] = False  # subject 0 has both kinds and is left out
    rows = quality_mixture(flags, 0.5, 18, subjects=subjects)
    names = [subjects[row] for row in rows]
    assert len(set(names)) == 18 and "s0" not in names
    with pytest.raises(InputError, match="10 records of high quality"):
        quality_mixture(flags, 0.5, 20, subjects=subjects)


def test_quality_flags_need_both_sides():
    assert quality_flags([3, 4, 5], 4).tolist() == [False, True, True]
    with pytest.raises(InputError, match="all 3 below it"):
        quality_flags([1, 2, 3], 4)
    with pytest.raises(InputError, match="1 without"):
        quality_flags([1, float("nan")], 1)


def test_split_tables_round_trip_and_refuse_torn_subjects(tmp_path):
    rows = [{"subject": subject, "label": str(label)} for subject, label in zip(SUBJECTS, LABELS, strict=True)]
    write_table(tmp_path / "all.csv", ("subject", "label"), rows)
    table = read_table(tmp_path / "all.csv")
    splits = split_subjects(table.column("subject"), seed=0)
    write_split_table(tmp_path / "split.csv", table, splits)
    assert read_table(tmp_path / "split.csv").column("split") == splits
    with pytest.raises(InputError, match="'s000' in test and train"):
        write_split_table(tmp_path / "torn.csv", table, ["train", "test"] * 60)


def test_a_split_table_in_another_folder_names_the_same_files(tmp_path):
    (tmp_path / "scans.csv").write_text("path,subject\na.nii.gz,s0\n/elsewhere/b.nii.gz,s1\n")
    table = read_table(tmp_path / "scans.csv", ("path", "subject"))
    write_split_table(tmp_path / "outputs" / "splits.csv", table, ["train", "test"])
    found = read_table(tmp_path / "outputs" / "splits.csv")
    assert found.column("path") == [str(tmp_path / "a.nii.gz"), "/elsewhere/b.nii.gz"]
    assert found.column("split") == ["train", "test"]


def test_subjects_in_two_sets_are_told():
    sets = {"north": ("a", "b", "b"), "south": ("c",), "elsewhere": ("b", "c", "d")}
    assert shared_subjects(sets) == [
        "1 subjects stand in both north and elsewhere: their scores are not of new people.",
        "1 subjects stand in both south and elsewhere: their scores are not of new people.",
    ]
