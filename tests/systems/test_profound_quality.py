"""`jaxmed profound quality` and `quality-study`: scores and their agreement, the grid, a kill, mistakes."""

import csv
import json

import jax
import numpy as np
import pytest
from scan_files import only_line

from jaxmed.cli import main
from jaxmed.config import to_record
from jaxmed.io import nifti
from jaxmed.io.images import write_png
from jaxmed.models.convnext import ConvNextConfig
from jaxmed.models.fcmae import FcmaeConfig, fcmae_model
from jaxmed.models.mae import MaeConfig
from jaxmed.models.vit import VitConfig
from jaxmed.recipes import study as recipe
from jaxmed.recipes.quality_grid import GridConfig
from jaxmed.recipes.quality_records import QualityConfig
from jaxmed.recipes.vmapped_fits import FitConfig
from jaxmed.synthesis.phantoms.write_retina import write_retina_cohort
from jaxmed.systems import profound
from jaxmed.systems.profound.cases import SMALL_INPUT, SMALL_SIZE
from jaxmed.systems.profound.scoring import agree, cut_like, find_reference
from jaxmed.systems.profound.stages import quality_study
from jaxmed.systems.profound.stages.quality_study import StudyData
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunOptions, open_run
from jaxmed.volume import Volume

MODEL_3D = MaeConfig(VitConfig(SMALL_SIZE, (8, 16, 16), 3, width=16, depth=1, heads=1, hidden=16), 8, 1, 1, 8)


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def run(stage, out, *words):
    return main(["profound", stage, "--preset", "smoke", "--out", str(out), "--quiet", *map(str, words)])


# Scores --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    out = tmp_path_factory.mktemp("quality") / "run"
    assert run("quality", out) == 0
    return out


def test_pictures_of_known_quality_are_ranked_as_they_were_made(scored):
    rows = rows_of(scored / "outputs" / "quality.csv")
    assert len(rows) == 20 and {row["label"] for row in rows} == {"1.0", "2.0", "3.0", "4.0", "5.0"}
    summary = json.loads((scored / "outputs" / "summary.json").read_text())
    estimate, low, high = summary["rank"]
    assert estimate > 0.5 and low < estimate <= high and summary["kappa"][0] > 0.3
    page = (scored / "report.html").read_text()
    for words in ("Agreement with given labels", "Best and worst", "Measures"):
        assert words in page


def test_the_python_call_gives_what_the_stage_wrote(scored):
    row = rows_of(scored / "outputs" / "quality.csv")[3]
    assert float(profound.quality(row["path"]).score) == pytest.approx(float(row["score"]), rel=1e-5)


def test_a_diffusion_scan_is_compared_with_the_t2w_scan_beside_it(tmp_path):
    rng = np.random.default_rng(0)
    coarse, fine = np.diag([2.0, 2.0, 3.0, 1.0]), np.diag([1.0, 1.0, 3.0, 1.0])
    fine[:3, 3] = -0.5, -0.5, 0.0  # fields of view meet
    anatomy = np.abs(rng.normal(size=(16, 16, 6))).astype(np.float32)
    nifti.write(tmp_path / "case_adc.nii.gz", Volume.make(anatomy, coarse))
    nifti.write(tmp_path / "case_t2w.nii.gz", Volume.make(anatomy.repeat(2, 0).repeat(2, 1), fine))
    nifti.write(tmp_path / "other_t2w.nii.gz", Volume.make(anatomy, coarse))
    assert find_reference(tmp_path / "case_adc.nii.gz") == tmp_path / "case_t2w.nii.gz"
    assert find_reference(tmp_path / "case_t2w.nii.gz") is None
    (tmp_path / "broken_t2w.nii.gz").write_bytes(b"nothing")
    assert run("quality", tmp_path / "run", "--input", tmp_path) == 1
    rows = {row["name"]: row for row in rows_of(tmp_path / "run" / "outputs" / "quality.csv")}
    assert float(rows["case_adc"]["alignment"]) > 0.8 and rows["case_t2w"]["alignment"] == ""
    assert [row["path"].endswith("broken_t2w.nii.gz") for row in rows_of(tmp_path / "run" / "outputs" / "failed.csv")]
    call = profound.quality(tmp_path / "case_adc.nii.gz", tmp_path / "case_t2w.nii.gz")
    assert float(call.alignment) == pytest.approx(float(rows["case_adc"]["alignment"]), rel=1e-4)


@pytest.mark.core
def test_agreement_is_that_of_ranks_and_classes():
    labels = np.array([1.0, 2, 2, 3, 3, 3, 5, 5])
    found = agree(np.arange(8.0), labels, np.arange(8))
    assert found.rank.estimate > 0.95 and found.kappa.estimate == 1 and found.records == 8
    assert cut_like(np.array([3.0, 1, 2]), np.array([1, 0, 1])).tolist() == [1, 0, 1]
    assert agree(-np.arange(8.0), labels, np.arange(8)).kappa.estimate < 0
    assert agree(np.arange(8.0), np.ones(8), np.arange(8)) is None and agree(labels[:3], labels[:3], labels[:3]) is None


# The study -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    return write_retina_cohort(tmp_path_factory.mktemp("eyes"), 0, 100, 32, fractions=(0.5, 0.1, 0.4))


@pytest.fixture(scope="module")
def graded(eyes, tmp_path_factory):
    """The same with PI-QUAL scores: one eye of each subject good, one bad; and where the model will be used."""
    rows = rows_of(eyes)
    for number, row in enumerate(rows):
        row["path"], row["quality"] = str(eyes.parent / row["path"]), 5 if number // 2 % 2 else 2
    folder = tmp_path_factory.mktemp("graded")
    for name, those in (("eyes", rows), ("deployment", rows[:3])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(those)
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The smoke run: its phantoms are those of `eyes`."""
    out = tmp_path_factory.mktemp("study") / "run"
    assert run("quality-study", out) == 0
    return out


def test_every_cell_is_scored_on_every_test_set(study):
    cells = rows_of(study / "outputs" / "cells.csv")
    assert {(row["arm"], row["labels"], row["tuned_high"], row["seed"], row["tested_high"]) for row in cells} == {
        (arm, labels, high, seed, test) for arm in ("pretrained", "scratch") for labels in ("0.5", "1.0")
        for high in ("0.0", "0.5", "1.0") for seed in ("0", "1") for test in ("0.0", "0.5", "1.0")
    }  # fmt: skip
    assert all(0 <= float(row["auroc_macro"]) <= 1 for row in cells)
    # Sizes are the same for every share.
    assert len({(row["labels"], row["records"]) for row in cells}) == 2
    intervals = rows_of(study / "outputs" / "intervals.csv")
    assert len(intervals) == 36 and all(float(row["error_of_patients"]) > 0 for row in intervals)
    measures = {row["measure"] for row in rows_of(study / "outputs" / "findings.csv")}
    assert {"mismatch penalty", "slope along high quality", "pretrained minus scratch", "labels saved"} <= measures
    assert {row["column"] for row in rows_of(study / "outputs" / "mixed_model.csv")} >= {"mismatch", "pre-trained"}
    page = (study / "report.html").read_text()
    for words in ("In words", "Quality in fine-tuning and in testing", "Labels", "What follows", "Cell by cell"):
        assert words in page
    counts = rows_of(study / "outputs" / "records.csv")
    assert {row["quality"] for row in counts} == {"high", "low"} and sum(int(row["records"]) for row in counts) == 200


def test_a_study_killed_in_the_middle_ends_with_the_same_table(study, eyes, tmp_path, monkeypatch):
    store, stored, out = recipe._store, [], tmp_path / "run"

    def store_and_die(folder, cell, digest, outcome):
        store(folder, cell, digest, outcome)
        stored.append(cell.slug)
        if len(stored) == 9:  # in the middle of a program of two runs
            raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "_store", store_and_die)
    assert run("quality-study", out, "--data.manifest", eyes) == 130
    assert not (out / "report.html").exists() and len(list((out / "outputs" / "cells").glob("*.json"))) == 9
    assert main(["profound", "quality-study", "--config", str(out / "config.json"), "--out", str(out), "--quiet"]) == 0
    assert len(stored) == len(set(stored)) == 24
    for table in (
        "intervals.csv",
        "cells.csv",
        "means.csv",
        "differences.csv",
        "findings.csv",
        "mixed_model.csv",
        "pretraining.csv",
    ):
        assert rows_of(out / "outputs" / table) == rows_of(study / "outputs" / table)


def test_given_quality_given_weights_and_a_deployment(study, graded, tmp_path):
    words = [
        "--data.manifest", graded / "eyes.csv", "--data.deployment", graded / "deployment.csv", "--weights",
        study / "outputs" / "pretrained", "--shares", "0", "1", "--test-shares", "0", "1", "--labels", "1",
    ]  # fmt: skip
    assert run("quality-study", tmp_path / "run", *words) == 0
    outputs = tmp_path / "run" / "outputs"
    summary = json.loads((outputs / "summary.json").read_text())
    assert summary["choice"]["deployed"] == pytest.approx(1 / 3) and summary["choice"]["own"] == 0.5
    proposal = rows_of(outputs / "proposal.csv")
    assert sum(row["chosen"] == "1" for row in proposal if row["split"] == "train") == summary["size"]
    assert {row["quality"] for row in proposal if row["chosen"] == "1"} == {
        "high" if summary["choice"]["chosen"] else "low"
    }
    assert summary["choice"]["effect"].keys() == {"chosen", "weighted"}
    assert len(list((outputs / "deployment" / "outputs" / "cells").glob("*.json"))) == 6
    assert "Tried out on test records like that" in summary["conclusion"][-1]
    assert not (outputs / "pretrained").exists() and "fine-tune with" in summary["conclusion"][-1]


def test_phantom_prostates_take_the_same_road_in_three_dimensions(tmp_path):
    """Three sequences as channels, scans made worse, and the encoder of a masked autoencoder of convolutions."""
    tiny = FcmaeConfig(ConvNextConfig(SMALL_SIZE, 3, (1, 1, 1, 1), (8, 8, 12, 12), stem=4, kernel_size=3), 8)
    export_parameters(tmp_path / "weights", fcmae_model(tiny).network.init(jax.random.key(0)), {
        "family": "profound", "kind": "fcmae", "config": to_record(tiny), "preprocess": to_record(SMALL_INPUT),
    })  # fmt: skip
    short = FitConfig(3, 4, OptimizerConfig(peak_lr=1e-3), 1)
    config = quality_study.Config(
        StudyData(fractions=(0.4, 0.1, 0.5), synthetic=40), quality=QualityConfig(simulate=0.5),
        weights=tmp_path / "weights", preprocess=SMALL_INPUT, transformer=MODEL_3D, fit=short,
        study=GridConfig((0.0, 1.0), (0.0, 1.0), (1.0,), 2, together=4),
    )  # fmt: skip
    folder = open_run("profound", "quality-study", config, RunOptions(tmp_path / "run", quiet=True))
    assert quality_study.run(config, folder) == 0
    cells = rows_of(tmp_path / "run" / "outputs" / "cells.csv")
    assert len(cells) == 2 * 2 * 2 * 2 and all(0 <= float(row["auroc"]) <= 1 for row in cells)
    assert "20 of 40 records were made worse on purpose" in (tmp_path / "run" / "report.html").read_text()


def torn(folder):
    rows = rows_of(folder / "eyes.csv")
    rows[0]["subject"] = next(row["subject"] for row in rows if row["split"] == "test")
    path = folder / "torn.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    "words,message",
    [
        (["--data.manifest", "{torn}"], "every subject in one split"),
        (
            ["--data.manifest", "{graded}", "--size", "400"],
            "with 400 records no share is possible, and with 0% at",
        ),
        (["--data.manifest", "{graded}", "--quality.threshold", "6"], "scores on both sides of 6"),
        (["--data.manifest", "{graded}", "--quality.column", "grade", "--quality.simulate", "0"], "column 'grade'"),
        (["--data.manifest", "{graded}", "--labels", "0.01"], "a record of every class"),
        (["--data.manifest", "{graded}", "--preprocess.size", "20", "20"], "preprocess.size: expected (28, 28)"),
        (["--data.manifest", "{graded}", "--data.deployment", "{none}"], "expected"),
        (["--process", "3"], "process: expected 0 to 0, found 3"),
    ],
)
def test_mistakes_are_one_line(words, message, graded, tmp_path, capsys):
    places = {"torn": torn(graded), "graded": graded / "eyes.csv", "none": tmp_path / "none.csv"}
    capsys.readouterr()
    assert run("quality-study", tmp_path / "run", *(word.format(**places) for word in words)) == 2
    assert message in only_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_picture_of_one_colour_is_refused(tmp_path, capsys):
    write_png(tmp_path / "flat.png", np.full((32, 32), 0.5))
    assert run("quality", tmp_path / "run", "--input", tmp_path / "flat.png") == 2
    assert "an image with contrast" in only_line(capsys)
