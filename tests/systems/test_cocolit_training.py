"""The training stages of CoCoLIT on phantoms, and what a user can have wrong in them."""

import csv
import json

import numpy as np
import pytest

from jaxmed.cli import main
from jaxmed.io import nifti
from jaxmed.models.published.load import load_published
from jaxmed.synthesis.phantoms.write_amyloid import write_amyloid_cohort
from jaxmed.systems.cocolit.stages import train_autoencoder


def run(*words):
    return main(["cocolit", *map(str, words), "--quiet"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("cocolit") / "run"
    assert run("train-autoencoder", "--preset", "smoke", "--out", place) == 0
    return place


def test_an_autoencoder_learns_to_reconstruct(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    errors = [line["reconstruction"] for line in lines if "reconstruction" in line]
    assert np.mean(errors[-3:]) < 0.7 * errors[0]
    published = load_published(trained / "outputs" / "model")
    assert published.report.kind == "autoencoder" and not published.report.missing
    assert published.preprocess.intensity.mean[0] < -40 and published.preprocess.spacing == (8.0,)
    summary = json.loads((trained / "outputs" / "summary.json").read_text())
    assert summary["images"] == {"train": 6, "held out": 2} and 0 < summary["latent"]["std"] < 10
    shown = {name: nifti.read(trained / "outputs" / f"{name}.nii.gz").array for name in ("image", "reconstruction")}
    assert np.abs(shown["image"] - shown["reconstruction"]).mean() == pytest.approx(summary["error"], rel=1e-3)
    page = (trained / "report.html").read_text()
    assert "adversarial" in page and "What becomes of an image" in page


def test_the_preset_paper_is_the_published_recipe():
    paper = train_autoencoder.paper()
    train, optimizer = paper.train, paper.train.optimizer
    assert (train.epochs, train.loader.batch_size, train.accumulation) == (200, 16, 16)
    assert (optimizer.peak_lr, optimizer.end_lr, optimizer.weight_decay, optimizer.decay) == (2e-4, 2e-5, 0.0, "cosine")
    loss = paper.loss
    assert (loss.divergence, loss.perceptual, loss.adversarial) == (1e-7, 1e-3, 0.025) and not loss.match_release


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_amyloid_cohort(tmp_path_factory.mktemp("pairs"), 0, 2, (12, 12, 12), 16.0)


def spoiled(pairs, **changes):
    """Write the table with other cells in its first row, or columns left out (None)."""
    with open(pairs) as file:
        rows = list(csv.DictReader(file))
    kept = [name for name in rows[0] if changes.get(name, "") is not None]
    rows[0] |= {name: value for name, value in changes.items() if value is not None}
    place = pairs.parent / "spoiled.csv"
    with open(place, "w", newline="") as file:
        writer = csv.DictWriter(file, kept, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return place


@pytest.mark.core
@pytest.mark.parametrize(
    ("stage", "changes", "words", "said"),
    [
        ("train-autoencoder", {"scan_path": None}, [], "a column 'scan_path'"),
        ("train-autoencoder", {"scan_path": "none.nii.gz"}, [], "none.nii.gz"),
        ("train-autoencoder", {"split": "training"}, [], "one of train, validation, test under 'split'"),
        ("train-autoencoder", {"split": "valid"}, [], "records of split train"),
        ("train-autoencoder", {}, ["--size", "20", "24", "25"], "three multiples of 2"),
        ("train-autoencoder", {}, ["--weights", "nothing"], "nothing"),
    ],
)
def test_mistakes_are_told_in_one_line(stage, changes, words, said, pairs, tmp_path, capsys):
    place = spoiled(pairs, **changes)
    out = tmp_path / "run"
    assert run(stage, "--preset", "smoke", "--data.manifest", place, *words, "--out", out) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxmed: ") and error.count("\n") == 1 and said in error, error
    assert not (out / "metrics.jsonl").exists()
