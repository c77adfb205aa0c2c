"""`jaxmed profound pretrain`, `adapt` and `predict` on phantoms and real cases, and what a user can do wrong."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxmed.arrays.position import sincos_3d_oblong
from jaxmed.arrays.task import Task
from jaxmed.arrays.trees import named_leaves
from jaxmed.cli import main
from jaxmed.io import nifti
from jaxmed.io.tables import read_table, write_table
from jaxmed.models.convnext import ConvNextClassifierConfig
from jaxmed.models.heads import ClassifierConfig
from jaxmed.models.published.load import load_published
from jaxmed.synthesis.phantoms.write_prostate import write_prostate_cohort
from jaxmed.systems.profound.adaptation import AdaptationConfig, find_start, with_probe
from jaxmed.systems.profound.stages import pretrain
from jaxmed.train.log import read_metrics
from jaxmed.volume import Volume

DATA = Path(os.environ.get("JAXMED_DATA", "")) / "prostate_mri"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A smoke run of adapt, which pre-trains by a smoke run of its own."""
    out = tmp_path_factory.mktemp("runs") / "adapt"
    assert main(["profound", "adapt", "--preset", "smoke", "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_prostate_cohort(tmp_path_factory.mktemp("cases"), 7, 5, fractions=(0.6, 0.4, 0.0), name="other")


def test_pretraining_explains_hidden_voxels_of_cases_that_it_was_not_trained_on(adapted):
    run = adapted / "inputs" / "pretrain"
    assert read_metrics(run)[-1]["evaluation/explained"] > 0.05
    page = (run / "report.html").read_text()
    assert "What the model completes" in page and "Held-out case 1, adc" in page
    published = load_published(run)
    assert published.report.family == "profound" and published.preprocess.spacing == (3.0, 3.0, 3.0)
    image = nifti.read(run / "outputs" / "held_out_0_t2w_image.nii.gz")
    assert image.array.shape == (16, 32, 32) and abs(float(image.array.mean())) < 0.3


def test_adaptation_finds_lesions_of_cases_that_it_was_not_trained_on(adapted):
    rows = read_table(adapted / "outputs" / "metrics.csv").rows
    (auroc,) = [float(row["estimate"]) for row in rows if row["set"] == "test" and row["measure"] == "auroc"]
    assert auroc > 0.75
    published = load_published(adapted)
    assert isinstance(published.config, ConvNextClassifierConfig) and published.config.head.hidden_layer == "relu"
    assert published.task is not None and published.task.names == ("label",)


def test_predictions_stand_on_the_grid_of_each_case_and_one_that_lacks_a_sequence_fails_alone(
    adapted, cohort, tmp_path
):
    place = tmp_path / "cases"
    shutil.copytree(cohort.parent / "cases", place)
    (place / "other_0001" / "adc.nii.gz").unlink()
    scan = nifti.read(place / "other_0002" / "t2w.nii.gz")
    noise = np.random.default_rng(0).normal(0, 0.5 * scan.array.max(), scan.array.shape)
    nifti.write(place / "other_0002" / "t2w.nii.gz", Volume.make(np.abs(scan.array + noise), scan.affine))
    command = ["profound", "predict", "--weights", str(adapted), "--quiet", "--batch.size", "4"]
    assert main([*command, "--input", str(place), "--out", str(tmp_path / "one")]) == 1
    table = read_table(tmp_path / "one" / "outputs" / "predictions.csv")
    assert len(table) == 4 and {row["id"] for row in table.rows} == {f"other_000{n}_t2w" for n in (0, 2, 3, 4)}
    failed = read_table(tmp_path / "one" / "outputs" / "failed.csv")
    assert len(failed) == 1 and "expected a file named adc beside it" in failed.rows[0]["reason"]
    found = nifti.read(tmp_path / "one" / "outputs" / "maps" / "other_0000_t2w__label.nii.gz")
    first = nifti.read(place / "other_0000" / "t2w.nii.gz")
    assert found.grid.shape == first.grid.shape and np.allclose(found.affine, first.affine)
    assert "lesion.nii.gz is not named after a sequence" in (tmp_path / "one" / "log.txt").read_text()
    # The noisy one is worse than all that the model was tuned on: table, log and page say so.
    kept = read_table(adapted / "outputs" / "model" / "quality.csv")
    assert len(kept) == 3 * 30 and set(kept.column("kind")) == {"t2w", "hbv", "adc"}
    noisy, line = next(row for row in table.rows if row["id"] == "other_0002_t2w"), "the quality of t2w, "
    assert line in noisy["warnings"] and "lies below the" in noisy["warnings"]
    own = [float(noisy[f"quality_{kind}"]) for kind in ("t2w", "hbv", "adc")]
    assert float(noisy["quality"]) == pytest.approx(np.mean(own), rel=1e-4)
    assert own[0] < min(float(row["quality_t2w"]) for row in table.rows if row is not noisy)
    assert f"Warning: other_0002_t2w: {line}" in (tmp_path / "one" / "log.txt").read_text()
    page = (tmp_path / "one" / "report.html").read_text()
    assert "Quality of the scans" in page and line in page
    # The manifest's labels score them; the missing sequence may be zeros.
    shutil.copy(cohort, tmp_path / "cases.csv")
    words = ["--data.manifest", str(tmp_path / "cases.csv"), "--preprocess.missing", "zero"]
    assert main([*command, *words, "--out", str(tmp_path / "two")]) == 0
    again = read_table(tmp_path / "two" / "outputs" / "predictions.csv")
    assert len(again) == 5 and again.rows[0]["probability_label"] == table.rows[0]["probability_label"]


@pytest.mark.skipif(not DATA.is_dir(), reason="JAXMED_DATA has no prostate_mri")
def test_real_cases_are_predicted_on_their_own_grid(adapted, tmp_path):
    command = ["profound", "predict", "--input", str(DATA), "--weights", str(adapted), "--out", str(tmp_path / "run")]
    assert main([*command, "--quiet"]) == 0
    outputs = tmp_path / "run" / "outputs"
    rows = read_table(outputs / "predictions.csv").rows
    assert [row["id"] for row in rows] == ["ProstateX-0000_t2w", "ProstateX-0001_t2w"]
    assert all("interpolated to" in row["warnings"] for row in rows)
    found = nifti.read(outputs / "maps" / "ProstateX-0001_t2w__label.nii.gz")
    assert found.grid.shape == (288, 288, 19) and np.isfinite(found.array).all()


def test_a_transformer_is_pretrained_and_a_probe_on_it_learns_ordered_grades(cohort, tmp_path):
    words = ("--preset", "smoke", "--quiet", "--data.manifest", str(cohort), "--data.check", "1")
    mae, probe = tmp_path / "mae", tmp_path / "probe"
    further = ("--encoder", "transformer", "--match-release", "--epochs", "1", "--loader.batch-size", "2")
    assert main(["profound", "pretrain", *words, *further, "--out", str(mae)]) == 0
    start = load_published(mae)
    assert start.report.kind == "mae"
    np.testing.assert_array_equal(start.params["encoder"]["position"], sincos_3d_oblong(48, (4, 4, 4), "upstream"))
    label = ("--label.columns", "grade", "--label.kind", "ordinal", "--mode", "logistic", "--hidden", "0")
    assert main(["profound", "adapt", *words, *label, "--weights", str(mae), "--out", str(probe)]) == 0
    published = load_published(probe)
    assert published.report.kind == "transformer-classifier" and isinstance(published.config, ClassifierConfig)
    assert published.task is not None and published.task.names == ("grade >= 1", "grade >= 2")


STILL = (
    "--augmentation.affine-probability", "0", "--augmentation.intensity-probability", "0",
    "--augmentation.bias-probability", "0", "--augmentation.flip-axes",
)  # fmt: skip


@pytest.fixture(scope="module")
def labelled(adapted, tmp_path_factory):
    """The cases of the smoke run with more labels: where a lesion lies as zones of 0 and 1, some of them not known."""
    manifest = adapted / "inputs" / "cases" / "cases.csv"
    rows = []
    for number, row in enumerate(read_table(manifest).rows):
        zones = {f"zone_{side}": int(row["side"] == side) for side in ("left", "right")}
        zones["zone_left"] = "" if number % 7 == 3 else zones["zone_left"]
        rows.append(row | zones | {"path": str(manifest.parent / row["path"])})
    place = tmp_path_factory.mktemp("labels") / "cases.csv"
    write_table(place, tuple(rows[0]), rows)
    return place


def head_on_frozen(adapted, labelled, out, *words):
    """Train a head alone on the pre-trained encoder; without augmentation its features are computed once."""
    command = ("--preset", "smoke", "--quiet", "--mode", "frozen", "--hidden", "0", "--quality-scans", "0",
               "--data.check", "1", "--epochs", "40", "--data.manifest", labelled,
               "--data.cache", adapted / "inputs" / "prepared",
               "--weights", adapted / "inputs" / "pretrain", "--out", out)  # fmt: skip
    return main(["profound", "adapt", *map(str, command), *words])


FIELDS = (*(f"grade = {grade}" for grade in range(5)), *(f"side = {side}" for side in ("left", "none", "right")))


@pytest.mark.parametrize(
    ("words", "kind", "names", "measure"),
    [
        (("--label.columns", "gland_ml"), "regression", ("gland_ml",), ("gland_ml", "mae")),
        (("--label.columns", "grade", "--select", "auroc"), "multiclass", tuple("01234"), ("all", "auroc_macro")),
        (("--label.columns", "grade", "side", "--label.kind", "fields"), "multilabel", FIELDS, ("all", "auroc_macro")),
        (("--label.columns", "zone_left", "zone_right"), "multilabel", ("zone_left", "zone_right"),
         ("all", "auroc_any")),
    ],
    ids=["volume", "grades", "fields", "zones"],
)  # fmt: skip
def test_a_head_on_a_frozen_encoder_learns_labels_of_every_kind(
    words, kind, names, measure, adapted, labelled, tmp_path
):
    out = tmp_path / "run"
    assert head_on_frozen(adapted, labelled, out, *words, *STILL) == 0
    published = load_published(out)
    assert published.task is not None and (published.task.kind, published.task.names) == (kind, names)
    before = named_leaves(load_published(adapted / "inputs" / "pretrain").params["encoder"])
    for name, leaf in named_leaves(published.params["encoder"]).items():
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)
    assert not (out / "outputs" / "model" / "quality.csv").exists()
    losses = [line["loss"] for line in read_metrics(out) if "loss" in line]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    rows = [row for row in read_table(out / "outputs" / "metrics.csv").rows if row["set"] == "test"]
    found = {(row["label"], row["measure"]): float(row["estimate"]) for row in rows}
    assert np.isfinite(found[measure])
    if kind == "regression":
        # Better than the mean of the training cases, whose mean absolute error is that of the labels' spread.
        table = read_table(labelled)
        volumes = {
            split: [float(r["gland_ml"]) for r in table.rows if r["split"] == split] for split in ("train", "test")
        }
        assert found[measure] < np.abs(np.array(volumes["test"]) - np.mean(volumes["train"])).mean()
    if names == ("zone_left", "zone_right"):
        known = sum(bool(r["zone_left"]) for r in read_table(labelled).rows if r["split"] == "test")
        counts = {row["label"]: int(row["records"]) for row in rows if row["measure"] == "auroc"}
        assert counts == {"zone_left": known, "zone_right": 18} and known < 18


def test_a_head_on_a_frozen_encoder_is_trained_with_augmentation_too(adapted, labelled, tmp_path):
    out = tmp_path / "run"
    assert head_on_frozen(adapted, labelled, out, "--epochs", "1") == 0
    before = named_leaves(load_published(adapted / "inputs" / "pretrain").params["encoder"])
    for name, leaf in named_leaves(load_published(out).params["encoder"]).items():
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)


def test_positions_are_laid_out_as_asked():
    config = pretrain.smoke()
    for layout, changes in (("clean", {}), ("upstream", {"match_release": True})):
        made = pretrain.Config(encoder="transformer", transformer=config.transformer, preprocess=config.preprocess,
                               model=config.model, **changes)  # fmt: skip
        start = pretrain.first_parameters(made)
        assert start is not None
        for name, width in (("encoder", 48), ("decoder", 24)):
            np.testing.assert_array_equal(start[name]["position"], sincos_3d_oblong(width, (4, 4, 4), layout))
        assert made.model.encoder.response_scope == ("batch" if changes else "sample")
    assert pretrain.Config(size="atto").model.encoder.widths == (40, 80, 160, 320)
    assert pretrain.first_parameters(config) is None


def says(capsys, *words):
    """Run a command that is a mistake, and return its line."""
    assert main([*words, "--quiet"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_mistakes_end_in_one_line_and_nothing_is_written(cohort, tmp_path, capsys):
    out = tmp_path / "run"
    command = ("profound", "pretrain", "--preset", "smoke", "--out", str(out))
    place = tmp_path / "cases"
    shutil.copytree(cohort.parent / "cases", place)
    case = place / "other_0002"
    adc = nifti.read(case / "adc.nii.gz")
    (case / "adc.nii.gz").unlink()
    assert "expected a file named adc beside it, found none" in says(capsys, *command, "--input", str(place))
    moved = adc.affine.copy()
    moved[2, 3] += 200.0
    nifti.write(case / "adc.nii.gz", Volume.make(adc.array, moved))
    line = says(capsys, *command, "--input", str(place))
    assert "adc.nii.gz: expected a scan of the region of" in line and "0% of it" in line
    (case / "adc.nii.gz").write_bytes(b"not an image")
    assert "adc.nii.gz: expected" in says(capsys, *command, "--input", str(place))
    assert "sequences: expected 3 words" in says(capsys, *command, "--preprocess.sequences", "t2w", "adc")
    assert "patch_size" in says(capsys, *command, "--model.encoder.image-size", "16", "32", "36")
    words = ("profound", "adapt", "--preset", "smoke", "--out", str(out), "--data.manifest", str(cohort))
    assert "pool: expected mean" in says(capsys, *words, "--pool", "class")
    assert "grade" in says(capsys, *words, "--label.columns", "side", "--label.kind", "ordinal")
    assert not out.exists()


def test_a_run_says_what_its_head_and_its_blur_mean():
    config = AdaptationConfig(image_size=(16, 32, 32))
    notes = find_start(config, Task("multiclass", ("2", "3", "4", "5"))).notes
    assert any("BatchNorm of the head sees 2 cases" in note for note in notes)
    assert any("blurred with probability 1" in note for note in notes)
    labelled = dataclasses.replace(config.labelled, adapt=dataclasses.replace(config.labelled.adapt, mode="frozen"))
    rate = with_probe(labelled).adapt.train.optimizer
    assert (rate.kind, rate.peak_lr, rate.weight_decay, rate.b1, rate.trust_coefficient) == ("lars", 0.1, 0, 0.9, 1e-3)
    assert with_probe(config.labelled) == config.labelled
