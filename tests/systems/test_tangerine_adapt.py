"""`jaxmed tangerine adapt` from tables to a model that predicts, on synthetic chests and small cubes, and mistakes."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from tiny_tangerine import BINARY, classifier, export, masked_autoencoder

from jaxmed.arrays.task import Task
from jaxmed.cli import main
from jaxmed.data.cohort import parse_externals
from jaxmed.io import nifti
from jaxmed.io.tables import read_table
from jaxmed.metrics.classification import auroc
from jaxmed.models.published.load import load_published
from jaxmed.recipes import adapt_stage
from jaxmed.recipes.adapt_stage import LabelledConfig, LabelledData
from jaxmed.systems.tangerine.adaptation import AUGMENTATION, with_synthetic
from jaxmed.systems.tangerine.adaptation import AdaptationConfig as Config
from jaxmed.train.run_folder import RunOptions, open_run
from jaxmed.volume import Volume

AXIAL = np.diag([-2.0, -2.0, 3.0, 1.0])
COLUMNS = "path,subject,label,split,other,size,grade"


def write_set(folder, number, seed=0, splits=("train", "train", "validation", "test")):
    """Write scans of 16^3, bright in a corner where the label is 1, and a table of every kind of label."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [COLUMNS]
    for index in range(number):
        label, other = index // len(splits) % 2, index // len(splits) // 2 % 2
        array = generator.normal(-800, 60, (16, 16, 16))
        array[:8, :8, :8] += 700 * label
        array[8:] -= 150 * other
        nifti.write(folder / f"{index}.nii.gz", Volume.make(array.astype(np.int16), AXIAL))
        known = "" if index % 5 == 0 else other
        grade = ("none", "one", "two", "two")[label + 2 * other]
        rows.append(
            f"{index}.nii.gz,s{seed}_{index},{label},{splits[index % len(splits)]},{known},{20 + 3 * label},{grade}"
        )
    (folder / "scans.csv").write_text("\n".join(rows) + "\n")
    return folder / "scans.csv"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_set(folder / "here", 48)
    write_set(folder / "there", 16, 1, ("test",))
    export(masked_autoencoder(), folder / "mae")
    return folder


SHORT = ["--optimizer.peak-lr", "3e-3", "--loader.batch-size", "8", "--accumulation", "1", "--evaluate-epochs", "5"]
SHORT += ["--warmup-epochs", "1", "--quiet"]


def run(data, out, *options, manifest="here"):
    words = ["--data.manifest", str(data / manifest / "scans.csv"), "--weights", str(data / "mae")]
    return main(["tangerine", "adapt", *words, *SHORT, "--out", str(out), *options])


def metrics(out):
    return {
        (row["set"], row["label"], row["measure"]): float(row["estimate"])
        for row in read_table(out / "outputs" / "metrics.csv").rows
    }


@pytest.fixture(scope="module")
def full(data, tmp_path_factory):
    """One fine-tuning, with an external set of which one file is broken and one missing."""
    shutil.copytree(data / "there", data / "broken")
    (data / "broken" / "3.nii.gz").write_bytes(b"no image")
    (data / "broken" / "5.nii.gz").unlink()
    out = tmp_path_factory.mktemp("runs") / "full"
    sets = [f"there={data / 'there' / 'scans.csv'}", f"broken:unseen={data / 'broken' / 'scans.csv'}"]
    options = ["--hidden", "8", "--epochs", "15", "--token-keep", "0.75", "--data.external", *sets]
    assert run(data, out, *options, "--data.group", "seen") == 1
    return out


def test_fine_tuning_beats_chance_here_and_elsewhere(full):
    found = metrics(full)
    for name in ("test", "there", "broken"):
        assert found[name, "label", "auroc"] > 0.9
        assert {"accuracy", "f1", "aupr", "ece_equal_width", "brier"} <= {m for s, _, m in found if s == name}
    groups = {row["set"]: row["group"] for row in read_table(full / "outputs" / "metrics.csv").rows}
    assert groups == {"validation": "seen", "test": "seen", "there": "other", "broken": "unseen"}
    table = read_table(full / "outputs" / "predictions.csv")
    chosen = [row for row in table.rows if row["set"] == "there"]
    labels, probabilities = (np.array([float(row[name]) for row in chosen]) for name in ("label", "probability_label"))
    assert auroc(labels.astype(int), probabilities) == pytest.approx(found["there", "label", "auroc"])


def test_broken_files_are_left_out_and_told(full):
    failed = {row["path"].rsplit("/", 1)[1]: row for row in read_table(full / "outputs" / "failed.csv").rows}
    assert failed.keys() == {"3.nii.gz", "5.nii.gz"} and {row["set"] for row in failed.values()} == {"broken"}
    assert "no such file" in failed["5.nii.gz"]["reason"]
    assert len([row for row in read_table(full / "outputs" / "predictions.csv").rows if row["set"] == "broken"]) == 14
    page = (full / "report.html").read_text()
    assert "other centre, seen in neither stage" in page and "ROC" in page and "could not be read" in page


def test_the_exported_model_predicts_what_the_run_did(full, data, tmp_path):
    published = load_published(full / "outputs" / "model")
    assert published.task == Task("binary", ("label",)) and published.config.head.hidden == 8
    words = ["--data.manifest", str(data / "there" / "scans.csv"), "--weights", str(full / "outputs" / "model")]
    assert main(["tangerine", "predict", *words, "--maps", "none", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    ours = {r["path"]: float(r["probability_label"]) for r in read_table(full / "outputs" / "predictions.csv").rows}
    for row in read_table(tmp_path / "run" / "outputs" / "predictions.csv").rows:
        assert float(row["probability_label"]) == pytest.approx(ours[row["path"]], abs=1e-6)


def test_a_killed_run_continues_to_the_same_predictions(full, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    options = json.loads((full / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(options))
    arguments = ["tangerine", "adapt", "--config", str(tmp_path / "config.json"), "--out", str(out), "--quiet"]

    def die(*arguments, **options):
        raise KeyboardInterrupt

    real = adapt_stage.score_cohort
    monkeypatch.setattr(adapt_stage, "score_cohort", die)
    assert main(arguments) == 130
    monkeypatch.setattr(adapt_stage, "score_cohort", real)
    assert main(arguments) == 1
    assert "Continuing after step" in (out / "log.txt").read_text()
    for name in ("predictions.csv", "metrics.csv"):
        assert (out / "outputs" / name).read_text() == (full / "outputs" / name).read_text()


def test_synthetic_chests_are_the_same_after_every_start(data, tmp_path):
    config = Config(LabelledConfig(LabelledData(synthetic=6), weights=data / "mae"))
    inputs = []
    for _ in range(2):
        made, _ = with_synthetic(config, open_run("tangerine", "adapt", config, RunOptions(tmp_path / "run")))
        inputs.append({p: p.read_bytes() for p in (tmp_path / "run" / "inputs").rglob("*") if p.is_file()})
    assert inputs[0] == inputs[1]
    (elsewhere,) = parse_externals(made.labelled.data.external)
    assert read_table(elsewhere.path).column("subject")[0] == "elsewhere_chest_0000"


TASKS = {
    "multiclass": (["--label.columns", "grade"], ("none", "one", "two")),
    "multilabel": (["--label.columns", "label", "other"], ("label", "other")),
    "regression": (["--label.columns", "size", "--label.kind", "regression"], ("size",)),
}


@pytest.mark.parametrize("kind", TASKS)
def test_a_probe_of_every_kind_of_label(kind, data, tmp_path):
    words, names = TASKS[kind]
    out = tmp_path / "run"
    assert run(data, out, "--mode", "logistic", *words, "--balance" if kind != "regression" else "--no-balance") == 0
    assert load_published(out / "outputs" / "model").task.names == names
    found = metrics(out)
    if kind == "regression":
        assert found["test", "size", "r2"] > 0.5 and found["test", "size", "mae"] < 1.5
    else:
        assert found["test", "all", "auroc_macro"] > 0.8 and {m for _, label, m in found if label == names[1]}
    assert "Strength of the probe" in (out / "report.html").read_text()
    assert read_table(out / "outputs" / "probe.csv").column("chosen").count("1") == (2 if kind == "multilabel" else 1)


@pytest.mark.slow
def test_smoke_run_beats_chance(tmp_path):
    out = tmp_path / "smoke"
    assert main(["tangerine", "adapt", "--preset", "smoke", "--out", str(out), "--quiet"]) == 0
    found = metrics(out)
    assert found["test", "label", "auroc"] > 0.8 and ("elsewhere", "label", "auroc") in found


def test_positions_are_resized_and_it_is_said(data, tmp_path):
    out = tmp_path / "run"
    assert run(data, out, "--mode", "logistic", "--image-size", "24", "16", "16") == 0
    assert "positions were interpolated to 24 x 16 x 16" in (out / "log.txt").read_text()
    assert load_published(out / "outputs" / "model").config.encoder.image_size == (24, 16, 16)


# Augmentation ---------------------------------------------------------------------------------------------------------


@pytest.mark.core
def test_augmentation_happens_as_often_and_as_much_as_the_paper_says(key):
    image = jax.random.uniform(key, (4, 4, 4, 1)) * 0.5 + 0.2
    keys = jax.random.split(key, 4000)
    off = dict.fromkeys(("noise_probability", "blur_probability", "gamma_probability"), 0.0)
    for name, share in (("noise_probability", 0.1), ("blur_probability", 0.2), ("gamma_probability", 0.15)):
        only = dataclasses.replace(AUGMENTATION, **(off | {name: share}))
        found = np.asarray(jax.jit(jax.vmap(only, (0, None)))(keys, image))
        is_changed = np.abs(found - image).max(axis=(1, 2, 3, 4)) > 0
        assert abs(is_changed.mean() - share) < 0.02  # three standard errors of 4000 draws
        changed = found[is_changed]
        if name == "noise_probability":
            spread = np.asarray((changed - image).std(axis=(1, 2, 3, 4)))
            assert abs(spread.mean() - 0.05) < 0.005 and spread.max() < 0.14  # even in [0, 0.1], of 64 voxels
        if name == "gamma_probability":
            np.testing.assert_allclose(changed.min(axis=(1, 2, 3, 4)), image.min(), atol=1e-6)
            np.testing.assert_allclose(changed.max(axis=(1, 2, 3, 4)), image.max(), atol=1e-6)
    np.testing.assert_array_equal(dataclasses.replace(AUGMENTATION, **off)(key, image), image)


# Mistakes ------------------------------------------------------------------------------------------------------------


def edit(change):
    def apply(folder):
        lines = (folder / "here" / "scans.csv").read_text().splitlines()
        (folder / "here" / "scans.csv").write_text("\n".join(change(lines)) + "\n")

    return apply


def cell(line, column, value):
    def change(lines):
        cells = lines[line].split(",")
        cells[COLUMNS.split(",").index(column)] = value
        return [*lines[:line], ",".join(cells), *lines[line + 1 :]]

    return edit(change)


def column_of(column, value):
    def change(lines):
        place = COLUMNS.split(",").index(column)
        rows = [line.split(",") for line in lines]
        return [",".join([*row[:place], value if n else row[place], *row[place + 1 :]]) for n, row in enumerate(rows)]

    return edit(change)


MISTAKES = {
    "empty manifest": (edit(lambda lines: lines[:1]), [], "at least one record"),
    "unknown column": (None, ["--label.columns", "lable"], "did you mean 'label'?"),
    "unknown covariate": (None, ["--data.covariates", "bmi"], "expected a column 'bmi'"),
    "subjects of a table": (None, ["--data.subject-pattern", "^s"], "expected a folder of classes, found the table"),
    "missing label": (cell(3, "label", ""), [], "line 4: expected a label under 'label', found none"),
    "one class": (column_of("label", "1"), [], "two or more classes under 'label' in the training records"),
    "a class of another word": (cell(4, "label", "7"), [], "line 5: expected one of 0, 1 under 'label'"),
    "unknown split": (cell(3, "split", "trian"), [], "one of train, validation, test under 'split', found 'trian'"),
    "subject in two splits": (cell(1, "subject", "s0_2"), [], "every subject in one split, found 's0_2' in"),
    "file in two splits": (cell(1, "path", "2.nii.gz"), [], "every file in one split, found '2.nii.gz' (line 2) in"),
    "file in two splits by another path": (
        cell(1, "path", "../here/2.nii.gz"), [], "every file in one split, found '../here/2.nii.gz' (line 2) in"
    ),
    "nothing to select on": (column_of("split", "train"), [], "records with split 'validation'"),
    "missing file": (lambda folder: (folder / "here" / "0.nii.gz").unlink(), [], "1 of 48 missing"),
    "broken training file": (
        lambda folder: (folder / "here" / "0.nii.gz").write_bytes(b"no image"), [], "0.nii.gz: expected"
    ),
    "weights of another model": (
        lambda folder: shutil.copy(folder / "here" / "0.nii.gz", folder / "mae" / "parameters.safetensors"), [], "mae"
    ),
    "half a weight": (
        lambda folder: (folder / "mae" / "record.json").unlink(), [], "mae"
    ),
    "no manifest": (None, ["--data.manifest", "nowhere.csv"], "nowhere.csv: expected a table as text"),
    "external without name": (None, ["--data.external", "there.csv"], "NAME=CSV or NAME:GROUP=CSV"),
    "external of another group": (None, ["--data.external", "a:new=there.csv"], "a group of seen, unseen, other"),
    "external named test": (None, ["--data.external", "test=there.csv"], "'test' again"),
    "external table missing": (None, ["--data.external", "a=nowhere.csv"], "nowhere.csv"),
    "external trained on": (
        None, ["--data.external", "a=HERE"], "scans for a that are not trained or selected on, found 36 of"
    ),
    "batch in parts": (None, ["--accumulation", "3"], "loader.batch_size: expected a multiple of 3 parts"),
    "wrong size": (None, ["--image-size", "17", "16", "16"], "image size"),
    "weights for classes": (None, ["--class-weights", "1", "2"], "expected one per output, 1 (label), found 2"),
    "auroc of a regression": (
        None, ["--label.columns", "size", "--label.kind", "regression", "--select", "auroc"], "select: expected loss"
    ),
    "words for numbers": (None, ["--label.columns", "grade", "--label.kind", "regression"], "a number under 'grade'"),
    "three classes for two": (None, ["--label.columns", "grade", "--label.kind", "binary"], "--label.kind multiclass"),
    "refused share": (None, ["--token-keep", "0"], "token_keep"),
    "class head without norm": (None, ["--weights", "CLASSIFIER", "--pool", "class"], "norm"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_nothing_is_written(mistake, data, tmp_path, capsys):
    break_it, options, expected = MISTAKES[mistake]
    folder = data
    if break_it is not None:
        folder = tmp_path / "data"
        shutil.copytree(data / "here", folder / "here")
        shutil.copytree(data / "mae", folder / "mae")
        break_it(folder)
    if "CLASSIFIER" in options:
        export(classifier(BINARY), tmp_path / "classifier")
        options = [str(tmp_path / "classifier") if word == "CLASSIFIER" else word for word in options]
    options = [word.replace("HERE", str(folder / "here" / "scans.csv")) for word in options]
    assert run(folder, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("jaxmed: ") and "Traceback" not in error, error
    assert ": expected " in error and ", found " in error and expected in error, error
    assert not (tmp_path / "run").exists()
