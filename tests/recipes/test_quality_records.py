"""Quality read from a table or made, and sets of a known share: exact, balanced, nested, and possible."""

import collections

import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io.tables import read_table
from jaxmed.recipes.quality_records import QualityConfig, draw_mixture, largest_size, read_flags, read_scores

pytestmark = pytest.mark.core
SUBJECTS = [f"s{number}" for number in range(60)]
LABELS = ["01"[number % 3 == 0] for number in range(60)]
HIGH = np.arange(60) % 2 == 0


def table(tmp_path, column, cells):
    path = tmp_path / "cases.csv"
    path.write_text(f"path,{column}\n" + "".join(f"{number}.nii,{cell}\n" for number, cell in enumerate(cells)))
    return read_table(path)


def test_scores_are_numbers_or_truth_values(tmp_path):
    found = read_scores(table(tmp_path, "quality", ["5", "3.5", "true", "No", ""]), "quality")
    np.testing.assert_array_equal(found, [5, 3.5, 1, 0, np.nan])
    with pytest.raises(InputError, match="row 2, quality: expected a number, or true or false, found 'good'"):
        read_scores(table(tmp_path, "quality", ["5", "good"]), "quality")


def test_high_quality_is_read_by_threshold_or_word(tmp_path):
    scores = table(tmp_path, "quality", ["5", "4", "3", "1"])
    people, labels = ["a", "b", "c", "d"], ["x"] * 4
    flags, is_made = read_flags(scores, QualityConfig(), people, labels, 0)
    assert flags.tolist() == [True, True, False, False] and not is_made
    words = table(tmp_path, "quality", ["true", "false", "true", "false"])
    assert read_flags(words, QualityConfig(), people, labels, 0)[0].tolist() == [True, False, True, False]
    with pytest.raises(InputError, match=r"expected a column 'quality', found path, other; or --quality\.simulate"):
        read_flags(table(tmp_path, "other", ["1"] * 4), QualityConfig(), people, labels, 0)


def test_what_is_made_worse_is_a_share_of_every_class_and_whole_subjects(tmp_path):
    plain = table(tmp_path, "other", ["1"] * 60)
    subjects = [f"s{number // 2}" for number in range(60)]
    labels = ["01"[number // 2 % 3 == 0] for number in range(60)]
    flags, is_made = read_flags(plain, QualityConfig(simulate=0.5), subjects, labels, 0)
    assert is_made and flags.sum() == 30
    assert all(len(set(flags[np.array(subjects) == name].tolist())) == 1 for name in set(subjects))
    assert abs(flags[np.array(labels) == "1"].mean() - 0.5) < 0.11


def test_sets_have_their_share_balance_and_order():
    sizes = {}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        for count in (10, 20):
            rows = draw_mixture("cases.csv", HIGH, share, count, 3, SUBJECTS, LABELS)
            sizes[share, count] = set(rows.tolist())
            assert len(rows) == count and HIGH[rows].sum() == int(share * count + 0.5)
            for flag in (True, False):
                own = [LABELS[row] for row in rows if HIGH[row] == flag]
                assert abs(collections.Counter(own)["1"] - len(own) / 3) <= 1
        assert sizes[share, 10] <= sizes[share, 20]
    high = set(np.flatnonzero(HIGH).tolist())
    assert sizes[0.25, 20] & high < sizes[0.75, 20] & high and sizes[0.75, 20] - high < sizes[0.25, 20] - high
    again = draw_mixture("cases.csv", HIGH, 0.5, 20, 3, SUBJECTS, LABELS)
    assert set(again.tolist()) == sizes[0.5, 20]


def test_what_is_impossible_tells_the_largest_possible():
    assert largest_size(HIGH, (0.0, 1.0), 0, SUBJECTS, LABELS) == 30
    few = np.arange(60) < 12
    assert largest_size(few, (1.0,), 0, SUBJECTS, LABELS) == 12
    message = r"cases\.csv: expected 20 records, 100% of high quality, .* with 20 records shares from 0% to 6\d% are "
    with pytest.raises(InputError, match=message + r"possible, and with 100% at most 12 records"):
        draw_mixture("cases.csv", few, 1.0, 20, 0, SUBJECTS, LABELS)
