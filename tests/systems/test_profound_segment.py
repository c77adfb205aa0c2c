"""`jaxmed profound segment`, and `predict` by its weights: zones of phantoms, label maps on the grids of cases."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxmed.arrays.trees import named_leaves
from jaxmed.cli import main
from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.tables import read_table, write_table
from jaxmed.metrics.imaging import dice
from jaxmed.models.mae import masked_model
from jaxmed.models.published.load import export_published, load_published
from jaxmed.models.upernet import UperNetConfig
from jaxmed.synthesis.phantoms.write_prostate import write_prostate_cohort
from jaxmed.systems.profound.cases import SMALL_INPUT, TINY_VIT
from jaxmed.systems.profound.stages import segment as stage
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import read_metrics
from jaxmed.volume import Volume

SEQUENCES = ("t2w", "hbv", "adc")
DISTANCES = ("hausdorff_95_mm", "average_surface_distance_mm")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The smoke run: the one program that is trained here, and the one that segments."""
    out = tmp_path_factory.mktemp("runs") / "segment"
    assert main(["profound", "segment", "--preset", "smoke", "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Cases that the model has not seen."""
    place = tmp_path_factory.mktemp("cases")
    return write_prostate_cohort(place, 11, 10, (32, 32, 16), fractions=(0.6, 0.2, 0.2), name="other")


def copy_cases(cohort, place):
    shutil.copytree(cohort.parent / "cases", place / "cases")
    return place / "cases"


def predict(trained, out, *words):
    return main(["profound", "predict", "--weights", str(trained), "--out", str(out), "--quiet", *map(str, words)])


def test_zones_of_cases_that_it_was_not_trained_on_are_found(trained):
    outputs = trained / "outputs"
    rows = read_table(outputs / "cases.csv").rows
    assert len(rows) == 12 * 2 and {row["split"] for row in rows} == {"validation", "test"}
    test = {
        label: [float(row["dice"]) for row in rows if (row["split"], row["label"]) == ("test", label)] for label in "12"
    }
    assert np.mean(test["1"]) > 0.5 and np.mean(test["2"]) > 0.5
    summary = json.loads((outputs / "summary.json").read_text())
    assert summary["labels"] == [0, 1, 2] and summary["counts"] == {"train": 18, "validation": 6, "test": 6}
    for score in summary["scores"]:
        if score["split"] == "test":
            assert score["dice"] == pytest.approx(np.mean(test[score["label"]]))
            assert score["dice_low"] <= score["dice"] <= score["dice_high"] and score["present"] == 6
    lines = read_metrics(trained)
    losses = [line["evaluation/loss"] for line in lines if "evaluation/loss" in line]
    assert min(losses) < 0.7 * losses[0] or min(losses) < 0.5
    # The cases' own figures stand beside those of the training, which stay.
    assert any("loss" in line for line in lines) and sum("cases/dice_1" in line for line in lines) == 12
    page = (trained / "report.html").read_text()
    assert "Dice (%)" in page and "The parameters of step" in page and "phantoms" in page


def test_label_maps_stand_on_the_grid_of_the_t2w_scan_and_follow_what_it_shows(trained, cohort, tmp_path):
    """One case has a T2w grid of its own, one is moved as a whole, one is noisy, and one lacks a sequence."""
    place = copy_cases(cohort, tmp_path)
    cut, moved, broken, noisy = (place / f"other_000{number}" for number in (0, 1, 2, 3))
    scan = nifti.read(cut / "t2w.nii.gz")
    affine = scan.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.array([2, 3, 0])
    nifti.write(cut / "t2w.nii.gz", Volume.make(scan.array[2:-2, 3:, ::1], affine))
    for name in (*SEQUENCES, "zones"):
        volume = nifti.read(moved / f"{name}.nii.gz")
        nifti.write(moved / f"{name}.nii.gz", Volume.make(np.roll(volume.array, (5, 3), (0, 1)), volume.affine))
    (broken / "adc.nii.gz").unlink()
    scan = nifti.read(noisy / "t2w.nii.gz")
    noise = np.random.default_rng(0).normal(0, 0.5 * scan.array.max(), scan.array.shape)
    nifti.write(noisy / "t2w.nii.gz", Volume.make(np.abs(scan.array + noise), scan.affine))
    assert predict(trained, tmp_path / "run", "--input", place) == 1
    outputs = tmp_path / "run" / "outputs"
    failed = read_table(outputs / "failed.csv").rows
    assert len(failed) == 1 and "expected a file named adc beside it" in failed[0]["reason"]
    found = nifti.read(outputs / "labels" / "other_0000_t2w.nii.gz")
    assert found.array.shape == (28, 29, 16) and np.allclose(found.affine, affine)
    assert set(np.unique(found.array)) == {0, 1, 2}
    sidecar = json.loads((outputs / "labels" / "other_0000_t2w.json").read_text())
    assert sidecar["constants"] == {"labels": [0, 1, 2]} and "largest probability" in sidecar["definition"]
    gland = nifti.read(outputs / "labels" / "other_0001_t2w.nii.gz").array > 0
    here, before = (
        nifti.read(root / "other_0001" / "zones.nii.gz").array > 0 for root in (place, cohort.parent / "cases")
    )
    assert dice(here, gland) > dice(before, gland) + 0.1
    rows = read_table(outputs / "cases.csv").rows
    assert len(rows) == 9 * 2 and {row["split"] for row in rows} == {"all"} and {row["dice"] for row in rows} == {""}
    voxel = 3.0**3 / 1000
    volume = next(float(row["volume_ml"]) for row in rows if (row["id"], row["label"]) == ("other_0000_t2w", "1"))
    assert volume == pytest.approx((found.array == 1).sum() * voxel, rel=1e-4)
    quality = {row["id"]: row for row in read_table(outputs / "quality.csv").rows}
    assert len(quality) == 9 and "the quality of t2w, " in quality["other_0003_t2w"]["warnings"]
    assert "lies below the" in quality["other_0003_t2w"]["warnings"]
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "ProFound label maps" in page and "Quality of the scans" in page


def test_predictions_are_scored_against_the_column_that_is_named(trained, tmp_path):
    """The cases of the training run: what it wrote of them is met."""
    manifest = trained / "inputs" / "cases" / "cases.csv"
    words = ("--data.manifest", manifest, "--data.split", "test", "--label.columns", "zones")
    assert predict(trained, tmp_path / "run", *words) == 0
    rows = read_table(tmp_path / "run" / "outputs" / "cases.csv").rows
    expected = [row for row in read_table(trained / "outputs" / "cases.csv").rows if row["split"] == "test"]
    for column in ("label", "subject", "split"):
        assert [row[column] for row in rows] == [row[column] for row in expected]
    for column in ("volume_ml", "true_volume_ml", "dice", *DISTANCES):
        np.testing.assert_allclose(
            [float(row[column]) for row in rows], [float(row[column]) for row in expected], rtol=1e-4
        )
    scores = json.loads((tmp_path / "run" / "outputs" / "summary.json").read_text())["scores"]
    assert [(score["split"], score["label"], score["cases"]) for score in scores] == [
        ("test", "1", 6),
        ("test", "2", 6),
    ]


def test_weights_are_written_and_read_under_the_names_of_the_released_code(trained, tmp_path):
    published = load_published(trained)
    export_published(published, tmp_path / "segmenter.safetensors")
    again = load_published(tmp_path / "segmenter.safetensors")
    assert (again.task, again.config, again.preprocess) == (published.task, published.config, published.preprocess)
    before, after = named_leaves(published.params), named_leaves(again.params)
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        np.testing.assert_array_equal(after[name], leaf, err_msg=name)
    with pytest.raises(InputError, match="outputs/model of a finished run, found a checkpoint of a segmenter"):
        load_published(trained / "checkpoints")


def test_training_goes_on_from_a_segmenter_or_from_an_encoder(trained):
    published = load_published(trained)
    assert isinstance(published.config, UperNetConfig) and published.task is not None
    assert published.task.names == ("0", "1", "2") and published.preprocess.spacing == (3.0, 3.0, 3.0)
    start = stage.find_start(dataclasses.replace(stage.smoke(), weights=trained))
    assert start.labels == (0, 1, 2) and set(start.params) == {"encoder", "hidden_norm", "decoder", "auxiliary"}
    same, other = start.with_labels((0, 1, 2)), start.with_labels((0, 1))
    assert same is start and set(other.params) == {"encoder"} and other.sizes.classes == 1
    assert "their head is left behind" in other.notes[-1]
    assert start.with_labels((0, 2, 5)).sizes.classes == 3
    scratch = stage.find_start(stage.smoke())
    assert scratch.params is None and scratch.preprocess.size == (16, 32, 32)
    assert scratch.with_labels((0, 1)).sizes.classes == 1


def test_the_recipe_is_that_of_the_released_code():
    config = stage.paper()
    assert (config.width, config.auxiliary_width, stage.AUXILIARY) == (512, 256, 0.4)
    optimizer, varied = config.train.optimizer, config.augmentation
    assert (optimizer.weight_decay, config.train.epochs, config.train.warmup_epochs) == (1e-5, 400, 40)
    assert (varied.rotation, varied.rotation_axes, varied.scale_axes, varied.flip_axes) == (30.0, (0,), (1, 2), (2,))
    assert (varied.intensity_probability, varied.bias_probability, varied.blur_probability) == (0.8, 0.2, 1.0)


def says(capsys, *words):
    """Run a command that is a mistake, and return its line."""
    capsys.readouterr()
    assert main([*map(str, words), "--quiet"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_label_maps_that_cannot_be_learnt_are_refused_before_anything_is_written(cohort, tmp_path, capsys):
    place, out, table = copy_cases(cohort, tmp_path), tmp_path / "run", tmp_path / "cases.csv"
    rows = [dict(row) for row in read_table(cohort).rows]
    number = next(n for n, row in enumerate(rows) if row["split"] == "validation")
    zones = nifti.read(place / rows[number]["subject"] / "zones.nii.gz")
    command = ("profound", "segment", "--preset", "smoke", "--out", out, "--data.manifest", table)

    def with_map(array, affine=zones.affine):
        """Let one validation case have another label map."""
        nifti.write(place / "odd.nii.gz", Volume.make(array, affine))
        changed = [row | ({"zones": "cases/odd.nii.gz"} if n == number else {}) for n, row in enumerate(rows)]
        write_table(table, tuple(rows[0]), changed)
        return says(capsys, *command, "--data.mask", "zones")

    assert "odd.nii.gz: expected the shape of" in with_map(zones.array[:20])
    tilted = zones.affine.copy()
    tilted[:3, 3] += 5.0
    assert "odd.nii.gz: expected the grid of" in with_map(zones.array, tilted)
    assert "odd.nii.gz: expected the labels 0, 1, 2, found the value 3" in with_map(
        3 * (zones.array > 0).astype(np.int16)
    )
    assert "odd.nii.gz: expected whole numbers" in with_map(zones.array.astype(np.float32) / 4)
    (place / "odd.nii.gz").write_bytes(b"not a map")
    assert "odd.nii.gz: expected" in says(capsys, *command, "--data.mask", "zones")
    (place / "odd.nii.gz").unlink()
    assert "existing files under 'zones', found 1 of 10 missing" in says(capsys, *command, "--data.mask", "zones")
    write_table(table, tuple(rows[0]), [row | ({"zones": ""} if n == number else {}) for n, row in enumerate(rows)])
    assert "expected a value under 'zones', found an empty cell" in says(capsys, *command, "--data.mask", "zones")
    write_table(table, tuple(rows[0]), rows)
    assert "did you mean 'zones'?" in says(capsys, *command, "--data.mask", "zone")
    assert "found the value 2" in says(capsys, *command, "--data.mask", "zones", "--data.labels", "1")
    for row in rows:
        path = place / row["subject"] / "zones.nii.gz"
        nifti.write(path, Volume.make(np.zeros_like(zones.array), zones.affine))
    assert "expected label maps with a label in the split train" in says(capsys, *command, "--data.mask", "zones")
    (place / rows[0]["subject"] / "hbv.nii.gz").unlink()
    assert "expected a file named hbv or dwi beside it" in says(capsys, *command)
    assert not out.exists()


def test_weights_of_a_transformer_are_refused(cohort, tmp_path, capsys):
    shapes = jax.eval_shape(masked_model(TINY_VIT).network.init, jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    record = {"config": to_record(TINY_VIT), "preprocess": to_record(SMALL_INPUT)}
    export_parameters(tmp_path / "vit", zeros, {"family": "profound", "kind": "mae", **record})
    command = ("profound", "segment", "--preset", "smoke", "--out", tmp_path / "run", "--data.manifest", cohort)
    line = says(capsys, *command, "--weights", tmp_path / "vit")
    assert "expected weights of a ConvNeXt, found a transformer" in line and not (tmp_path / "run").exists()


def test_a_column_of_true_maps_that_is_not_there_is_refused(trained, cohort, tmp_path, capsys):
    command = ("profound", "predict", "--weights", trained, "--out", tmp_path / "run")
    place = cohort.parent / "cases" / "other_0000"
    assert "label.columns: expected the one column of a manifest" in says(
        capsys, *command, "--input", place, "--label.columns", "zones"
    )
    words = ("--data.manifest", cohort, "--label.columns", "zone")
    assert "expected a column 'zone'" in says(capsys, *command, *words)
    assert not (tmp_path / "run").exists()
