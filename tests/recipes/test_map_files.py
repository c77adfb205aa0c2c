"""Working through files: records of earlier runs, broken files among others, a single broken one."""

from pathlib import Path
from typing import NamedTuple

import pytest

from jaxmed.errors import InputError
from jaxmed.files import read_record, write_json
from jaxmed.io.tables import read_table
from jaxmed.recipes.map_files import map_files, write_failed
from jaxmed.train.log import Log

pytestmark = pytest.mark.core


class Scan(NamedTuple):
    name: str
    path: Path


@pytest.fixture
def go(tmp_path):
    """Work on files of these names; those that start with an error's name raise it."""
    (tmp_path / "outputs").mkdir()
    calls = []

    def work(number, scan, tell):
        calls.append(scan.name)
        tell(f"{scan.name}: half way")
        if scan.name.startswith("broken"):
            raise InputError(scan.path, "a scan", "noise")
        if scan.name.startswith("large"):
            raise MemoryError("by 3 GiB")
        return {"name": scan.name, "value": number}

    def go(*names):
        scans = [Scan(name, Path(f"{name}.nii")) for name in names]
        log = Log(tmp_path, quiet=True)
        return map_files(
            scans, work, tmp_path / "outputs", log, "Working", "scans", lambda row: {"value": row["value"]}
        )

    return go, calls, tmp_path


def test_what_fails_does_not_stop_the_others(go):
    go, calls, place = go
    rows, failed, _ = go("a", "broken", "large", "b")
    assert calls == ["a", "broken", "large", "b"]
    assert rows == [{"name": "a", "value": 0, "path": "a.nii"}, {"name": "b", "value": 3, "path": "b.nii"}]
    assert rows == [read_record(place / "outputs" / f"{name}.json") for name in "ab"]
    assert [(row["id"], row["path"]) for row in failed] == [("broken", "broken.nii"), ("large", "large.nii")]
    assert failed[0]["reason"] == "broken.nii: expected a scan, found noise"
    assert failed[1]["reason"] == "large.nii: not enough memory by 3 GiB"
    write_failed(place / "outputs", failed)
    table = read_table(place / "outputs" / "failed.csv")
    assert table.columns == ("path", "id", "reason") and list(table.rows) == failed
    assert "Failed: broken.nii: expected a scan, found noise" in (place / "log.txt").read_text()
    assert [row["step"] for row in Log(place, quiet=True).read_metrics()] == [0, 3]


def test_what_is_done_is_not_done_again(go):
    go, calls, _ = go
    first = go("a", "broken")
    again = go("a", "broken", "b")
    assert calls == ["a", "broken", "broken", "b"]
    assert again.rows[:1] == first.rows and again.failed == first.failed


def test_a_repaired_file_is_tried_again_and_leaves_no_failure(go):
    go, calls, place = go
    write_failed(place / "outputs", go("a", "broken").failed)
    assert (place / "outputs" / "failed.csv").exists()
    # The broken file is repaired, so to say, when its name is another file's; and its numbers are told once.
    again = go("a", "b")
    write_failed(place / "outputs", again.failed)
    assert calls == ["a", "broken", "b"] and not (place / "outputs" / "failed.csv").exists()
    assert [row["step"] for row in Log(place, quiet=True).read_metrics()] == [0, 1]


def test_a_record_of_another_file_of_that_name_does_not_count(go):
    go, calls, place = go
    go("a", "b")
    write_json(place / "outputs" / "a.json", {"name": "a", "value": 7, "path": "elsewhere/a.nii"})
    assert [row["value"] for row in go("a", "b").rows] == [0, 1] and calls == ["a", "b", "a"]
    with pytest.raises(ValueError, match="a name of its own"):
        go("a", "a")


def test_a_single_broken_file_is_the_users_mistake(go):
    go, _, place = go
    with pytest.raises(InputError, match="expected a scan, found noise"):
        go("broken")
    assert go("large").failed[0]["id"] == "large"
    write_failed(place / "outputs", ())
    assert not (place / "outputs" / "failed.csv").exists()
