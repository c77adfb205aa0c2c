"""An eleventh system takes a page: everything but its network and its words is the recipes'."""

import csv
from pathlib import Path

import pytest
import toy_system

from jaxmed.recipes.stage import write_page
from jaxmed.train.run_folder import RunOptions, open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = toy_system.smoke()
    folder = open_run("toy", "adapt", config, RunOptions(tmp_path_factory.mktemp("toy") / "run", quiet=True))
    assert toy_system.run(config, folder) == 0
    return folder


def test_it_takes_under_120_lines():
    assert len(Path(toy_system.__file__).read_text().splitlines()) < 120


def test_a_convolutional_network_learns_from_a_table_of_pictures(run):
    with (run.outputs / "metrics.csv").open() as file:
        rows = {(row["set"], row["measure"]): row for row in csv.DictReader(file)}
    area = rows["test", "auroc"]
    assert float(area["estimate"]) > 0.9 and int(area["records"]) == 29
    assert 0.5 < float(area["low"]) < float(area["estimate"]) <= float(area["high"]) <= 1


def test_its_report_is_written_again_and_its_model_is_there(run):
    written = run.report.read_text()
    write_page(run.path, toy_system.Config, toy_system.Summary, toy_system.page)
    assert run.report.read_text() == written and "A toy adapted" in written and "ROC" in written
    assert (run.outputs / "model").is_dir() and (run.outputs / "splits.csv").exists()
