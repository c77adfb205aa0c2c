"""`jaxmed tangerine efficiency`: fractions and seeds, pre-trained against scratch, and what is read off the curves."""

import csv
import json
import math

import numpy as np
import pytest

from jaxmed.cli import main
from jaxmed.io.tables import read_table
from jaxmed.metrics.convergence import Curve, first_reach, reach_table, read_curve, smallest_matching
from jaxmed.synthesis.phantoms.chest import ChestConfig
from jaxmed.synthesis.phantoms.write_chest import write_chest_cohort


def curve(*values):
    steps = np.arange(1.0, len(values) + 1)
    return Curve(steps, 10 * steps, np.array(values))


def test_a_level_is_reached_when_it_first_is():
    rising = curve(0.5, 0.8, 0.7, 0.9)
    assert first_reach(rising, 0.8) == (2.0, 20.0)
    assert first_reach(rising, 0.81) == (4.0, 40.0)
    assert first_reach(rising, 0.95) == (None, None)
    assert rising.best == 0.9


def test_levels_are_shares_of_the_baselines_best_with_the_same_labels_and_seed():
    curves = {
        ("pretrained", 0.1, 0): curve(0.85, 0.9), ("scratch", 0.1, 0): curve(0.5, 0.8),
        ("pretrained", 0.1, 1): curve(0.5, 0.6), ("scratch", 0.1, 1): curve(0.6, 0.7),
        ("pretrained", 1.0, 0): curve(1.0, 1.0),
    }  # fmt: skip
    rows = reach_table(curves, "scratch")
    assert [(row["arm"], row["fraction"], row["seed"]) for row in rows] == list(curves)[:4]
    assert rows[0]["epochs_to_95%"] == rows[0]["epochs_to_99%"] == 1 and rows[0]["seconds_to_99%"] == 10
    assert rows[1]["epochs_to_99%"] == 2 and rows[1]["best"] == 0.8
    assert rows[2]["epochs_to_95%"] is None and rows[2]["seconds_to_95%"] is None  # .6 < .95 * .7


def test_curves_are_read_from_the_lines_of_a_run():
    lines = [
        {"step": 2, "evaluation/auroc": 0.5}, {"step": 3, "loss": 1.0, "steps_per_second": 1.0},
        {"step": 4, "evaluation/auroc": 0.7, "evaluation/loss": 0.1}, {"step": 4, "loss": 1.0, "steps_per_second": 2.0},
    ]  # fmt: skip
    found = read_curve(lines, "auroc", steps_per_epoch=8)
    np.testing.assert_array_equal(found.epochs, [0.25, 0.5])
    np.testing.assert_array_equal(found.seconds, [1.0, 2.0])
    np.testing.assert_array_equal(found.values, [0.5, 0.7])


def test_the_smallest_fraction_that_is_as_good_as_scratch_with_all():
    means = {("a", 0.1): 0.7, ("a", 0.5): 0.9, ("a", 1.0): 0.95, ("b", 0.1): 0.5, ("b", 1.0): 0.9}
    assert smallest_matching(means, "a", "b") == 0.5
    assert smallest_matching({**means, ("b", 1.0): 0.99}, "a", "b") is None


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Run the smoke study once: files of an own pre-training, as a user has them."""
    out = tmp_path_factory.mktemp("efficiency") / "run"
    assert main(["tangerine", "efficiency", "--preset", "smoke", "--out", str(out), "--quiet"]) == 0
    return out


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_cell_is_scored_on_the_same_test_scans(study):
    cells = rows_of(study / "outputs" / "cells.csv")
    assert {(row["arm"], row["fraction"], row["seed"]) for row in cells} == {
        (arm, fraction, seed)
        for arm in ("pretrained", "scratch") for fraction in ("0.25", "1.0") for seed in ("5", "6")
    }  # fmt: skip
    # 60 chests, half to train on, half of these with the finding: a quarter of 15 is rounded to 4 of each class.
    assert {(row["fraction"], float(row["records"])) for row in cells} == {("0.25", 8.0), ("1.0", 30.0)}
    assert all(0 <= float(row["auroc"]) <= 1 and math.isfinite(float(row["loss"])) for row in cells)
    stored = [json.loads(path.read_text()) for path in sorted((study / "outputs" / "cells").glob("*.json"))]
    assert len(stored) == 8 and {len(cell["subjects"]) for cell in stored} == {18}
    assert len({tuple((row["subject"], row["label"]) for row in cell["subjects"]) for cell in stored}) == 1


def test_same_seed_gives_both_arms_the_same_labels_and_length(study):
    steps = {}
    for path in (study / "outputs" / "curves").glob("*.csv"):
        table = read_table(path)
        key = path.name.split("_", 1)[1].rsplit("-", 1)[0]
        steps.setdefault(key, []).append((len(table), max(table.floats("epoch"))))
    assert len(steps) == 4 and all(len(set(found)) == 1 and len(found) == 2 for found in steps.values())


def test_the_page_and_tables_are_there_and_checkpoints_are_gone(study):
    page = (study / "report.html").read_text()
    for words in ("Labels", "Convergence", "corrected by Bonferroni", "pretrained", "scratch"):
        assert words in page
    tests = rows_of(study / "outputs" / "differences.csv")
    assert len(tests) == 2 and {row["correction"] for row in tests} == {"bonferroni"}
    assert len(rows_of(study / "outputs" / "convergence.csv")) == 8
    assert not list((study / "checkpoints").glob("*"))


def test_an_interrupted_study_runs_only_what_is_missing(study, capsys):
    out = study
    record = json.loads((out / "config.json").read_text())
    command = ["tangerine", "efficiency", "--config", str(out / "config.json"), "--out", str(out)]
    (out / "report.html").unlink()
    lost = sorted((out / "outputs" / "cells").glob("*.json"))[0]
    before = json.loads(lost.read_text())
    times = {path: path.stat().st_mtime_ns for path in (out / "outputs" / "cells").glob("*.json")}
    lost.unlink()
    assert main(command) == 0
    assert json.loads((out / "config.json").read_text()) == record
    after = json.loads(lost.read_text())
    assert after["subjects"] == before["subjects"] and after["metrics"] == before["metrics"]
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path != lost)
    assert "mean of 2 seeds" in capsys.readouterr().err


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Write a few chests."""
    folder = tmp_path_factory.mktemp("scans")
    return write_chest_cohort(
        folder, 0, 12, (8, 8, 8), ChestConfig(num_vessels=1), finding="effusion", fractions=(0.5, 0.25, 0.25)
    )


MISTAKES = {
    "no weights": ([], "weights: expected pre-trained weights to compare with random ones, found none"),
    "too few labels": (["--fractions", "0.01", "--weights", "{weights}"], "fractions: expected 0.1667 or more"),
    "a share above all": (
        ["--fractions", "2.0", "--weights", "{weights}"],
        "fractions: expected a number above 0 and at most 1, found 2",
    ),
    "no seed": (["--seeds", "0", "--weights", "{weights}"], "seeds: expected a whole number from 1"),
    "a probe without steps": (["--mode", "logistic", "--weights", "{weights}"], "mode: expected full or frozen"),
    "part out of range": (["--process", "3", "--weights", "{weights}"], "process: expected 0 to 0, found 3"),
    "no table": (["--data.manifest", "nowhere.csv", "--weights", "{weights}"], "nowhere.csv: expected"),
    "no such weights": (["--weights", "nowhere"], "nowhere"),
    "covariates": (
        ["--data.covariates", "nodule", "effusion", "--average", "subject", "--weights", "{weights}"],
        "data.covariates: expected none in a study of labels, found nodule, effusion; adapt scores them",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_and_nothing_is_written(name, study, scans, tmp_path, capsys):
    words, expected = MISTAKES[name]
    weights = study / "inputs" / "pretrain" / "outputs" / "model"
    words = [word.format(weights=weights) for word in words]
    given = [] if "--data.manifest" in words else ["--data.manifest", str(scans)]
    out = tmp_path / "run"
    assert main(["tangerine", "efficiency", *given, *words, "--out", str(out)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("jaxmed: ") and printed.count("\n") == 1 and expected in printed
    assert not out.exists()


def test_a_table_without_test_scans_is_refused(study, scans, tmp_path, capsys):
    text = scans.read_text().replace(",test,", ",train,").replace("scans/", f"{scans.parent}/scans/")
    (tmp_path / "scans.csv").write_text(text)
    weights = study / "inputs" / "pretrain" / "outputs" / "model"
    command = ["tangerine", "efficiency", "--data.manifest", str(tmp_path / "scans.csv"), "--weights", str(weights)]
    assert main([*command, "--fractions", "1.0", "--out", str(tmp_path / "run")]) == 2
    assert "expected scans with split 'test'" in capsys.readouterr().err


@pytest.mark.slow
def test_pretraining_saves_labels_and_epochs_on_phantom_chests(tmp_path):
    """The ordering of the specification, (i) 7, over five seeds."""
    mae, out = tmp_path / "mae", tmp_path / "study"
    assert main(["tangerine", "pretrain", "--preset", "laptop", "--out", str(mae)]) == 0
    last = json.loads((mae / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["evaluation/explained"] > 0.95  # reconstruction error well below the variance of the targets
    command = [
        "tangerine",
        "efficiency",
        "--preset",
        "laptop",
        "--data.synthetic",
        "0",
        "--seeds",
        "5",
        "--epochs",
        "24",
    ]
    files = ["--data.manifest", str(mae / "inputs" / "scans.csv"), "--weights", str(mae / "outputs" / "model")]
    assert main([*command, *files, "--out", str(out)]) == 0
    means = {(row["arm"], float(row["fraction"])): float(row["mean"]) for row in rows_of(out / "outputs" / "means.csv")}
    gaps = {fraction: means["pretrained", fraction] - means["scratch", fraction] for fraction in (0.1, 1.0)}
    assert gaps[0.1] > 0.1 and gaps[1.0] < gaps[0.1]
    reached = rows_of(out / "outputs" / "convergence.csv")
    epochs = {
        arm: [float(row["epochs_to_95%"]) for row in reached if row["arm"] == arm and row["fraction"] == "1.0"]
        for arm in ("pretrained", "scratch")
    }
    assert len(epochs["pretrained"]) == 5 and np.mean(epochs["pretrained"]) < np.mean(epochs["scratch"])
