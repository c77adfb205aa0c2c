"""`jaxmed retfound`: pre-training by both methods, adaptation, features, predictions, the comparison, and mistakes."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_weights import draw
from scan_files import only_line
from tiny_dino import TINY_DINO, write_dino

from jaxmed.arrays.task import Task
from jaxmed.cli import main
from jaxmed.errors import InputError
from jaxmed.io import safetensors
from jaxmed.io.images import read_image
from jaxmed.models.published import dino
from jaxmed.models.published.dino import picture_preprocess
from jaxmed.models.published.load import export_published, load_published
from jaxmed.models.vit import Vit
from jaxmed.nn.model import make_model
from jaxmed.recipes import study as recipe
from jaxmed.recipes.pretrain_stage import model_record
from jaxmed.synthesis.phantoms.retina import OTHER_CAMERA
from jaxmed.synthesis.phantoms.write_retina import write_retina_cohort
from jaxmed.systems import retfound
from jaxmed.systems.retfound.adaptation import PAPER, AdaptationConfig, PictureInput, WeightsInput, find_start
from jaxmed.systems.retfound.stages import pretrain
from jaxmed.train.checkpoint import export_parameters

EDGE = 64


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def run(stage, out, *words):
    return main(["retfound", stage, "--preset", "smoke", "--out", str(out), "--quiet", *map(str, words)])


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    return write_retina_cohort(tmp_path_factory.mktemp("eyes"), 0, 60, EDGE, fractions=(0.5, 0.2, 0.3))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    return write_retina_cohort(folder, 1, 15, EDGE, OTHER_CAMERA, fractions=(0.0, 0.0, 1.0), name="other")


@pytest.fixture(scope="module")
def mae(eyes, tmp_path_factory):
    out = tmp_path_factory.mktemp("mae") / "run"
    assert run("pretrain", out, "--data.manifest", eyes) == 0
    return out


@pytest.fixture(scope="module")
def student(eyes, tmp_path_factory):
    """A student that keeps to an anchor of drawn weights."""
    # Without a mask token, as an encoder that nothing was hidden from.
    place = tmp_path_factory.mktemp("dino")
    encoder = dataclasses.replace(pretrain.smoke().dino.encoder, mask_token=False)
    params = make_model(Vit(encoder)).init(jax.random.key(7), jnp.zeros((1, EDGE, EDGE, 3)))
    preprocess = picture_preprocess((EDGE, EDGE))
    record = model_record("dinov2", "encoder", encoder, {"encoder": params}, preprocess, None)
    export_parameters(place / "anchor", {"encoder": params}, record)
    words = ["--method", "dinov2", "--anchor", place / "anchor", "--dino.gram-weight", 2]
    assert run("pretrain", place / "run", *words, "--data.manifest", eyes, "--epochs", "3") == 0
    return place / "run"


@pytest.fixture(scope="module")
def grader(eyes, elsewhere, mae, tmp_path_factory):
    out = tmp_path_factory.mktemp("grader") / "run"
    words = [
        "--data.manifest",
        eyes,
        "--data.external",
        f"elsewhere={elsewhere}",
        "--weights",
        mae / "outputs" / "model",
    ]
    assert run("adapt", out, *words) == 0
    return out


def test_a_masked_autoencoder_explains_eyes_that_it_was_not_trained_on(mae):
    lines = [json.loads(line) for line in (mae / "metrics.jsonl").read_text().splitlines()]
    explained = [line["evaluation/explained"] for line in lines if "evaluation/explained" in line]
    assert explained[-1] > 0.05
    assert read_image(mae / "outputs" / "held_out_0_completed.png").shape == (EDGE, EDGE, 3)
    page = (mae / "report.html").read_text()
    assert "What the model completes" in page and "masked autoencoder" in page
    published = load_published(mae / "outputs" / "model")
    assert (published.report.family, published.report.kind) == ("retfound", "mae")


def test_a_student_of_dinov2_hands_on_its_teacher(student, tmp_path):
    lines = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    spread = [line["evaluation/spread"] for line in lines if "evaluation/spread" in line]
    assert spread and all(0.01 < value <= 1 for value in spread)
    steps = [line for line in lines if "loss" in line]
    for line in steps:
        parts = line["dino_local"] + line["dino_global"] + 0.02 * line["koleo"] + line["ibot"] + 2 * line["gram"]
        assert line["gram"] > 0 and line["loss"] == pytest.approx(parts, rel=1e-5)
    assert steps
    published = load_published(student / "outputs" / "model")
    assert (published.report.family, published.report.kind) == ("dinov2", "encoder")
    export_published(published, tmp_path / "teacher.safetensors")
    assert {"cls_token", "mask_token", "blocks.0.ls1.gamma"} <= set(safetensors.read(tmp_path / "teacher.safetensors"))
    assert "Self-distillation" in (student / "report.html").read_text()


@pytest.mark.slow
def test_a_short_run_of_dinov2_does_not_collapse(tmp_path):
    words = ["--method", "dinov2", "--data.synthetic", "300", "--epochs", "40", "--warmup-epochs", "4"]
    assert main(["retfound", "pretrain", "--preset", "laptop", "--out", str(tmp_path / "run"), "--quiet", *words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    entropy = np.array([line["teacher_entropy"] for line in lines if "teacher_entropy" in line])
    means = np.convolve(entropy, np.full(5, 0.2), "valid")
    assert means[-1] < 0.95 * np.log(512) and means[-1] < means.max() - 0.05  # 0.997 where it collapses, and rising
    matched = [line["evaluation/matched"] for line in lines if "evaluation/matched" in line]
    assert matched[-1] > 4 / 119  # four times chance, with two crops each of 60 eyes
    assert "The teacher's entropy ended at" not in (tmp_path / "run" / "report.html").read_text()


def test_an_adapted_model_is_scored_here_and_elsewhere(grader):
    scores = rows_of(grader / "outputs" / "metrics.csv")
    areas = {row["set"]: float(row["estimate"]) for row in scores if row["measure"] == "auroc_macro"}
    assert set(areas) == {"validation", "test", "elsewhere"} and all(0 <= area <= 1 for area in areas.values())
    measures = {row["measure"] for row in scores if row["set"] == "test"}
    assert {"accuracy", "f1_macro", "aupr_macro", "kappa_unweighted", "ece_equal_width"} <= measures
    published = load_published(grader / "outputs" / "model")
    assert published.task is not None and published.task.kind == "multiclass" and len(published.task.names) == 5


def test_predictions_come_with_maps(grader, eyes, tmp_path):
    words = ["--weights", grader / "outputs" / "model", "--data.manifest", eyes, "--data.split", "test"]
    assert run("predict", tmp_path / "run", *words) == 0
    rows = rows_of(tmp_path / "run" / "outputs" / "predictions.csv")
    assert len(rows) == 36
    probabilities = np.array([[float(row[f"probability_{grade}"]) for grade in range(5)] for row in rows])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert "Against the labels" in (tmp_path / "run" / "report.html").read_text()
    # The same from Python.
    published = load_published(grader / "outputs" / "model")
    again = retfound.predict(published, rows[0]["path"])
    np.testing.assert_allclose(again.values, probabilities[0], atol=1e-5)


def test_features_are_those_of_the_python_call(student, eyes, tmp_path):
    words = ["--weights", student / "outputs" / "model", "--data.manifest", eyes, "--data.split", "test"]
    assert run("embed", tmp_path / "run", *words) == 0
    with np.load(tmp_path / "run" / "outputs" / "embeddings.npz") as file:
        found, path = file["pre_logits"][0], str(file["path"][0])
    published = load_published(student / "outputs" / "model")
    np.testing.assert_allclose(retfound.embed(published, path), found, atol=1e-5)
    pixels = np.rint(255 * read_image(path)).astype(np.uint8)
    np.testing.assert_allclose(retfound.embed(published, pixels), found, atol=1e-5)
    # Prepared images, as they come normalised, one or a batch; and others are refused in words that fit pictures.
    prepared = published.preprocess(path)
    assert prepared.min() < -1
    np.testing.assert_allclose(retfound.embed(published, prepared), found, atol=1e-5)
    assert retfound.embed(published, np.stack([prepared] * 2)).shape == (2, len(found))
    with pytest.raises(InputError, match=r"image: expected prepared images \[batch, 64, 64, 3\]"):
        retfound.embed(published, prepared[:32])
    with pytest.raises(InputError, match="image: expected prepared images in .* give an image of 8 or 16 bits"):
        retfound.embed(published, 255 * prepared)


@pytest.fixture(scope="module")
def compared(eyes, elsewhere, mae, student):
    encoders = [f"mae={mae / 'outputs' / 'model'}", f"dino={student / 'outputs' / 'model'}", "random=random"]
    words = ["--data.manifest", eyes, "--data.external", f"elsewhere={elsewhere}", "--encoders", *encoders]
    return [*words, "--modes", "logistic", "--average", "subject", "--balance"]


@pytest.fixture(scope="module")
def study(compared, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "run"
    assert run("compare", out, *compared) == 0
    return out


def test_every_encoder_is_scored_on_the_same_images(study):
    cells = rows_of(study / "outputs" / "cells.csv")
    assert {(row["arm"], row["mode"], row["fraction"], row["seed"]) for row in cells} == {
        (arm, "logistic", fraction, seed)
        for arm in ("mae", "dino", "random") for fraction in ("0.5", "1.0") for seed in ("0", "1")
    }  # fmt: skip
    assert all(0 <= float(row["auroc_macro"]) <= 1 and 0 <= float(row["elsewhere auroc_macro"]) <= 1 for row in cells)
    # Both eyes of a subject are one answer.
    stored = [json.loads(path.read_text()) for path in (study / "outputs" / "cells").glob("*.json")]
    assert {len(cell["subjects"]) for cell in stored} == {18}
    tests = rows_of(study / "outputs" / "differences.csv")
    assert {row["arm"] for row in tests} == {"dino", "random"} and {row["baseline"] for row in tests} == {"mae"}
    page = (study / "report.html").read_text()
    for words in ("Labels", "Which is better", "Elsewhere", "What adapting costs"):
        assert words in page


def test_a_comparison_killed_in_the_middle_ends_with_the_same_table(study, compared, tmp_path, monkeypatch):
    store, stored, out = recipe._store, [], tmp_path / "run"

    def store_and_die(folder, cell, digest, outcome):
        store(folder, cell, digest, outcome)
        stored.append(cell.slug)
        if len(stored) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "_store", store_and_die)
    assert run("compare", out, *compared) == 130
    assert not (out / "report.html").exists() and len(list((out / "outputs" / "cells").glob("*.json"))) == 5
    assert main(["retfound", "compare", "--config", str(out / "config.json"), "--out", str(out), "--quiet"]) == 0
    assert len(stored) == len(set(stored)) == 12

    def without_time(path):
        return [{name: cell for name, cell in row.items() if not name.startswith("seconds")} for row in rows_of(path)]

    for table in ("cells.csv", "subjects.csv", "means.csv", "differences.csv"):
        assert without_time(out / "outputs" / table) == without_time(study / "outputs" / table)


@pytest.mark.parametrize(
    "stage,words,message",
    [
        ("compare", ["--encoders", "one=random"], "encoders: expected two or more to compare"),
        ("compare", ["--encoders", "random"], "expected NAME=PLACE or NAME=random, found 'random'"),
        ("compare", ["--weights", "{dino}"], "weights: expected none, for --encoders NAME=PLACE names them"),
        ("compare", ["--mode", "frozen"], "mode: expected none, for --modes names them"),
        ("compare", ["--data.weight", "w", "--modes", "knn"], "data.weight: expected none, for nearest neighbours"),
        ("compare", ["--data.covariates", "age"], "data.covariates: expected none in a study of labels, found age"),
        ("adapt", ["--weights", "{unet}"], "expected weights of a known family"),
        (
            "adapt",
            ["--weights", "{headless}", "--pool", "class", "--image-size", "28", "28"],
            "an encoder with its final",
        ),
        ("adapt", ["--weights", "{dino}", "--image-size", "30", "28"], "image size: expected a size that"),
        ("embed", ["--weights", "{missing}"], "expected"),
    ],
)
def test_mistakes_are_one_line(stage, words, message, eyes, tmp_path, capsys):
    places = {
        "unet": tmp_path / "unet.safetensors", "headless": tmp_path / "headless.safetensors",
        "dino": tmp_path / "dino.safetensors", "missing": tmp_path / "none.pth",
    }  # fmt: skip
    safetensors.write(places["unet"], {"down.0.weight": np.ones((4, 1, 3, 3), np.float32)})
    write_dino(places["dino"])
    tuned = dino.entries("dinov2", dataclasses.replace(TINY_DINO, final_norm=False))
    tensors = {entry.name: draw(entry.name, entry.shape) for entry in tuned}
    tensors["fc_norm.weight"], tensors["fc_norm.bias"] = np.ones(384, np.float32), np.zeros(384, np.float32)
    tensors["head.weight"], tensors["head.bias"] = np.ones((5, 384), np.float32), np.zeros(5, np.float32)
    safetensors.write(places["headless"], tensors)
    capsys.readouterr()
    given = [word.format(**places) for word in words]
    assert run(stage, tmp_path / "run", "--data.manifest", eyes, *given) == 2
    assert message in only_line(capsys)
    assert not (tmp_path / "run").exists()


def test_weights_are_adapted_as_their_authors_do(mae, student):
    task = Task("multiclass", tuple("01234"))

    def found(weights, mode="full"):
        labelled = dataclasses.replace(
            PAPER, weights=weights / "outputs" / "model", adapt=dataclasses.replace(PAPER.adapt, mode=mode)
        )
        return find_start(AdaptationConfig(labelled, WeightsInput()), task)

    # The class token of a masked autoencoder is trained by nothing; that of DINOv2 is its feature of an image.
    assert found(mae).head.pool == "mean" and found(student).head.pool == "class"
    assert found(mae).encoder.config.positions == "learned" and not found(mae).encoder.frozen
    # The official linear probe trains nothing but what is called head.
    assert found(mae, "frozen").encoder.frozen == (r"^head/norm/",)
    assert PAPER.adapt.train.optimizer.peak_lr == pytest.approx(4.6875e-4)


def test_weights_keep_the_crop_that_they_were_trained_with():
    plain = picture_preprocess((64, 64))
    cropped = PictureInput(crop="disc").apply(plain)
    assert (plain.crop, cropped.crop) == ("none", "disc")
    assert PictureInput().apply(cropped) == cropped and PictureInput(crop="none").apply(cropped) == plain
