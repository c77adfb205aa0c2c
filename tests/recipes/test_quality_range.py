"""Scores of the scans that a model was tuned on: kept with it, compared with those of others."""

from pathlib import Path

import pytest

from jaxmed.errors import InputError
from jaxmed.io.scans import ScanFiles
from jaxmed.io.tables import read_table, write_table
from jaxmed.recipes.quality_range import (
    Tuned,
    measure_scans,
    outside,
    quality_columns,
    quality_section,
    read_tuned,
    warn_outside,
    write_tuned,
)
from jaxmed.train.log import Log

pytestmark = pytest.mark.core


def scorer(scan):
    """The number in a scan's name; half of it for its second sequence."""
    number = float(scan.path.stem)
    if number == 7:
        raise InputError(scan.path, "an image", "none")
    return {"t2w": number, "adc": number / 2}


def training(count):
    """Three of four scans, and whose they are."""
    numbers = [number for number in range(count) if number % 4 < 3]
    return tuple(ScanFiles(Path(f"{number}.nii")) for number in numbers), [f"s{number}" for number in numbers]


def test_scores_of_training_scans_travel_with_the_model(tmp_path):
    log, model = Log(tmp_path, quiet=True), tmp_path / "outputs" / "model"
    model.mkdir(parents=True)
    assert write_tuned(model, *training(40), 200, scorer, log) == []
    assert read_tuned(tmp_path) == read_tuned(model) == {"t2w": Tuned(0, 38, 30), "adc": Tuned(0, 19, 30)}
    assert read_tuned(tmp_path / "elsewhere") == {}
    write_tuned(model, *training(40), 4, scorer, log)  # 0, 13th, 26th and the last
    assert [row["path"] for row in read_table(model / "quality.csv").rows[::2]] == [
        "0.nii",
        "13.nii",
        "25.nii",
        "38.nii",
    ]


def test_what_lies_outside_is_told_by_kind():
    tuned = {"t2w": Tuned(20.0, 40.0, 12), "adc": Tuned(5.0, 30.0, 12)}
    assert outside({"t2w": 20.0, "adc": 30.0, "dwi": 99.0}, tuned) == ()
    low, high = outside({"t2w": 19.9, "adc": 30.1}, tuned)
    assert low == ("the quality of t2w, 19.9, lies below the 20.0 to 40.0 of the 12 scans that the model was tuned on")
    assert "adc, 30.1, lies above the 5.0 to 30.0" in high
    assert outside({"t2w": 0.0}, {}) == ()
    # A scan that is the best or worst of those itself, whose score was rounded when it was written.
    assert outside({"t2w": 200 / 3}, {"t2w": Tuned(66.6667, 66.6667, 1)}) == ()
    assert outside({"t2w": 100 / 3}, {"t2w": Tuned(33.3333, 33.3333, 1)}) == ()


def test_warnings_name_the_scan_and_stand_in_the_log(tmp_path):
    tuned, log = {"t2w": Tuned(20.0, 40.0, 12)}, Log(tmp_path, quiet=True)
    found = warn_outside(("a", "b", "c"), ({"t2w": 30.0}, {"t2w": 10.0, "adc": 1.0}, {}), tuned, log)
    assert [len(lines) for lines in found] == [0, 1, 0] and "t2w, 10.0, lies below" in found[1][0]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 1 and "Warning: b: the quality of t2w" in lines[0]


def test_a_scan_that_cannot_be_measured_has_an_empty_cell(tmp_path):
    measured, notes = measure_scans([ScanFiles(Path(f"{n}.nii")) for n in (6, 7, 8)], scorer, Log(tmp_path, quiet=True))
    assert notes == ["The quality of 1 scans was not measured: 7.nii: expected an image, found none"]
    rows = quality_columns(measured)
    assert rows == [
        {"quality": "4.5", "quality_t2w": "6", "quality_adc": "3"},
        {"quality": "", "quality_t2w": "", "quality_adc": ""},
        {"quality": "6", "quality_t2w": "8", "quality_adc": "4"},
    ]
    write_table(tmp_path / "table.csv", list(rows[0]), rows)
    section = quality_section(read_table(tmp_path / "table.csv"), {"t2w": Tuned(7.0, 9.0, 5)})
    assert section.blocks[0].rows == [("t2w", 6, 7, 8, 7, 9, 5, 1), ("adc", 3, 3.5, 4, None, None, None, None)]
