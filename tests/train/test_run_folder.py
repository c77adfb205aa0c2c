"""Run folders and logs."""

import json
import os

import pytest

from jaxmed.errors import InputError
from jaxmed.systems.noddi.stages.fit import Config
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunOptions, open_run, start

pytestmark = pytest.mark.core


def open_fit(path, config=None, **options):
    return open_run("noddi", "fit", config or Config(), RunOptions(path, **options))


def test_opening_writes_nothing(tmp_path):
    assert open_fit(tmp_path / "run").status == "new"
    assert not (tmp_path / "run").exists()


def test_the_life_of_a_run(tmp_path):
    path = tmp_path / "run"
    start(open_fit(path))
    assert json.loads((path / "config.json").read_text())["stage"] == "fit"
    assert open_fit(path).status == "unfinished"
    assert open_fit(path, resume=False).status == "new"
    (path / "report.html").write_text("page")
    assert open_fit(path).status == "complete"
    assert open_fit(path, overwrite=True).status == "new"


def test_a_batch_job_with_failures_is_not_complete(tmp_path):
    path = tmp_path / "run"
    start(open_fit(path))
    for name in ("report.html", "outputs/failed.csv"):
        (path / name).write_text("")

    def look(**options):
        return open_run("noddi", "fit", Config(), RunOptions(path, **options), tries_failed_again=True)

    assert open_fit(path).status == "complete" and look(overwrite=True).status == "new"
    assert look().status == "unfinished"
    start(look())
    assert not (path / "report.html").exists() and (path / "outputs" / "failed.csv").exists()


def test_a_run_of_another_configuration_is_kept_unless_overwritten(tmp_path):
    path = tmp_path / "run"
    start(open_fit(path))
    (path / "outputs" / "old.txt").write_text("old")
    with pytest.raises(InputError, match="a run of another configuration"):
        open_fit(path, Config(seed=1))
    start(open_fit(path, Config(seed=1), overwrite=True))
    assert not (path / "outputs" / "old.txt").exists()


def test_a_folder_with_other_files_is_never_taken(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="a folder holding thesis.tex"):
        open_fit(tmp_path, overwrite=True)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="found a file"):
        open_fit(tmp_path / "run")
    with pytest.raises(InputError, match="a folder above it"):
        open_fit(tmp_path / "run" / "inner")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_place_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="read-only"):
        open_fit(tmp_path / "run")


def test_metrics_are_json_lines_and_finite(tmp_path):
    log = Log(tmp_path, quiet=True)
    log.metrics(1, {"loss": 0.5})
    with pytest.raises(ValueError, match="step 2: loss is nan"):
        log.metrics(2, {"loss": float("nan")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}]


def test_progress_without_a_terminal_is_plain_lines(tmp_path, capsys):
    with Log(tmp_path).progress("Fitting", 10, "voxels") as update:
        update(5)
        update(10)
    printed = capsys.readouterr().err
    assert printed.startswith("Fitting: 10 of 10 voxels") and printed.count("\n") == 1
    assert "Fitting" in (tmp_path / "log.txt").read_text()


def test_quiet_prints_nothing_but_keeps_the_log(tmp_path, capsys):
    log = Log(tmp_path, quiet=True)
    log.say("hello")
    with log.progress("Fitting", 10, "voxels") as update:
        update(10)
    assert capsys.readouterr().err == ""
    assert "hello" in (tmp_path / "log.txt").read_text()
