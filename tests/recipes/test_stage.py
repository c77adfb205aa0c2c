"""A run's frame: the page is made of typed records that come back as they were written."""

import dataclasses
import json

import pytest

from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, nested_run, write_page
from jaxmed.report.page import Section, Text
from jaxmed.train.run_folder import RunOptions, open_run

pytestmark = pytest.mark.core


@dataclasses.dataclass(frozen=True)
class Config:
    size: int = 3


@dataclasses.dataclass(frozen=True)
class Summary:
    scores: dict[str, float | None]
    notes: tuple[str, ...]


def page(run: Finished[Config, Summary]) -> Page:
    words = [f"{name} {value}" for name, value in run.summary.scores.items()]
    return Page("A toy", f"of size {run.config.size}", [("Scores", len(words), "")], [Section("Scores", [Text(words)])])


@pytest.fixture
def folder(tmp_path):
    return open_run("toy", "add", Config(), RunOptions(tmp_path / "it's here", quiet=True))


def test_a_summary_comes_back_as_it_was_and_its_page_is_written_again_alike(folder):
    log = begin(folder, ["mind the gap"])
    clock = Clock()
    clock.lap("add")
    finish(folder, Config(), Summary({"one": 1.5, "none": None}, ("mind the gap",)), clock, page)
    written = folder.report.read_text()
    assert "one 1.5" in written and "of size 3" in written and "--config" in written
    assert json.loads((folder.outputs / "summary.json").read_text())["scores"] == {"one": 1.5, "none": None}
    assert list(json.loads((folder.path / "timing.json").read_text())["seconds"]) == ["add"]
    assert "mind the gap" in (folder.path / "log.txt").read_text()
    write_page(folder.path, Config, Summary, page)
    assert folder.report.read_text() == written
    log.say("done")


def test_a_summary_of_another_stage_is_refused_by_name(folder):
    begin(folder)
    finish(folder, Config(), Summary({}, ()), Clock(), page)
    path = folder.outputs / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stranger": 1}))
    with pytest.raises(InputError, match="summary.json, stranger: expected a known field"):
        write_page(folder.path, Config, Summary, page)


def test_another_stage_is_run_once_with_its_changes(folder):
    log = begin(folder)
    changes = {"regions": 6, "cohort.subjects": 10}
    nested = nested_run(folder, "igndmoe simulate", changes, log, "Simulating first.")
    record = json.loads((nested.path / "config.json").read_text())["config"]
    assert record["regions"] == 6 and record["cohort"]["subjects"] == 10
    before = nested.report.stat().st_mtime_ns
    again = nested_run(folder, "igndmoe simulate", changes, log, "Simulating first.")
    assert again.status == "complete" and again.report.stat().st_mtime_ns == before
    assert (folder.path / "log.txt").read_text().count("Simulating first.") == 1
    assert to_record(Config()) == {"size": 3}
