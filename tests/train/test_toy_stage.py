"""A whole stage on real files: tables, splits, loader, augmentation, training, metrics, report, study."""

import dataclasses

import numpy as np
import pytest
from toy_stage import Config, run

from jaxmed.io.tables import read_table
from jaxmed.io.weights_files import load_parameters
from jaxmed.recipes.study import Outcome, make_cells, run_study
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.run_folder import RunOptions, open_run


def run_toy(path, config=Config()):
    return run(config, open_run("toy", "train", config, RunOptions(path, quiet=True)))


def changed(**settings):
    return Config(train=dataclasses.replace(Config().train, **settings))


def test_a_stage_learns_and_leaves_everything_in_its_folder(tmp_path):
    metrics = run_toy(tmp_path / "run")
    assert metrics["last"] < 0.5 * metrics["first"]
    assert metrics["auroc"] == 1.0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "outputs", "report.html"} <= names
    table = read_table(tmp_path / "run" / "outputs" / "splits.csv", ("subject", "split"))
    homes = dict(zip(table.column("subject"), table.column("split"), strict=True))
    assert all(homes[s] == split for s, split in zip(table.column("subject"), table.column("split"), strict=True))
    assert load_parameters(tmp_path / "run" / "outputs" / "encoder")[0]["kernel"].shape == (64, 16)
    # The same run on eight devices ends at the same numbers.
    many = run_toy(tmp_path / "many", changed(mesh=MeshConfig(data=4)))
    assert many["last"] == pytest.approx(metrics["last"], abs=1e-6)


def test_a_study_of_label_fractions(tmp_path):
    cells = make_cells({"fraction": (0.5, 1.0), "seed": (0, 1)})

    def run_cell(cell):
        values = dict(cell.key)
        loop = dataclasses.replace(Config().train.loop, steps=10, evaluate_every=0)
        config = dataclasses.replace(changed(seed=values["seed"], loop=loop), fraction=values["fraction"])
        name = f"{values['fraction']}-{values['seed']}"
        found = run_toy(tmp_path / "runs" / name, config)
        return Outcome({"auroc": found["auroc"], "error": found["error"]})

    study = run_study(cells, run_cell, tmp_path / "study", {"toy": 1})
    assert study.exit_code == 0 and len(study.results) == 4
    assert all(np.isfinite(result.metrics["error"]) for result in study.results)
    assert run_study(cells, run_cell, tmp_path / "study", {"toy": 1}).num_run == 0
