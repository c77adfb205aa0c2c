"""`jaxmed noddi simulate, train, predict, export, evaluate` from files to maps, the script, and mistakes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxmed.cli import main
from jaxmed.io import amico, nifti
from jaxmed.io.dicom import read_series, read_stack
from jaxmed.io.parametric_map import on_stack
from jaxmed.io.tables import read_table
from jaxmed.recipes.stage import Page
from jaxmed.systems.noddi.stages import predict as predict_stage
from jaxmed.systems.noddi.stages import simulate as simulate_stage
from jaxmed.systems.noddi.stages import train as train_stage
from jaxmed.volume import Volume

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "noddi_onnx.py"
MAPS = ("ndi", "odi", "fwf")
# Small enough for seconds: what is tested here is the road, not the network.
TINY = [
    *("--train.signals", "2048", "--train.held-out", "256", "--train.epochs", "4", "--train.batch-size", "64"),
    *("--train.restarts", "1", "--train.network.width", "24", "--train.labels", "gt"),
]


def run(*words):
    return main(["noddi", *map(str, words), "--quiet"])


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A simulated scan with a DICOM source, a network for its protocol, and its ONNX file."""
    pytest.importorskip("pydicom")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("noddi")
    assert run("simulate", "--shape", 12, 14, 3, "--dicom", "--out", folder / "sim") == 0
    scan = folder / "sim" / "outputs"
    tables = ["--bvals", scan / "dwi.bval", "--bvecs", scan / "dwi.bvec"]
    assert run("train", *tables, *TINY, "--out", folder / "net") == 0
    assert run("export", "--weights", folder / "net", "--rows", 3000, "--out", folder / "onnx") == 0
    return folder


@pytest.fixture
def no_figures(monkeypatch):
    """Leave pages empty, for tests that look at files and notes alone."""
    for stage in (simulate_stage, train_stage, predict_stage):
        monkeypatch.setattr(stage, "page", lambda run: Page("A run", "without figures", (), ()))


def scan_words(folder):
    names = {"dwi": "dwi.nii.gz", "bvals": "dwi.bval", "bvecs": "dwi.bvec", "mask": "mask.nii.gz"}
    return [word for name, file in names.items() for word in (f"--{name}", folder / file)]


@pytest.fixture(scope="module")
def predicted(places):
    """Maps by jax, as NIfTI and DICOM."""
    scan = places / "sim" / "outputs"
    words = ["--weights", places / "net", *scan_words(scan), "--dicom-source", scan / "dicom"]
    assert run("predict", *words, "--out", places / "maps") == 0
    return places / "maps"


def read_map(folder, name):
    return nifti.read(folder / f"{name}.nii.gz").array


# Simulate ------------------------------------------------------------------------------------------------------------


def test_a_simulated_scan_is_what_its_truth_and_protocol_say(places):
    outputs = places / "sim" / "outputs"
    assert {path.name for path in outputs.iterdir()} >= {"dwi.nii.gz", "dwi.bval", "dwi.bvec", "mask.nii.gz", "truth"}
    dwi, mask = nifti.read(outputs / "dwi.nii.gz").array, read_map(outputs, "mask") > 0
    assert dwi.shape == (12, 14, 3, 99)
    water = mask & (read_map(outputs / "truth", "fwf") > 0.9)
    fall = dwi[water][:, 9:39].mean(axis=1) / dwi[water][:, :9].mean(axis=1)
    assert np.median(fall) == pytest.approx(np.exp(-711 * 3e-3), abs=0.03)
    assert json.loads((outputs / "dwi.json").read_text())["sigma"] == pytest.approx(850 / 30)
    assert on_stack(nifti.read(outputs / "mask.nii.gz"), read_stack(outputs / "dicom")).shape == (3, 14, 12)


@pytest.mark.usefixtures("no_figures")
def test_a_scan_is_simulated_for_a_protocol_of_files(places, tmp_path):
    (tmp_path / "b.bval").write_text("0 700 700 700 700 700 700 2000\n")
    rows = np.random.default_rng(0).normal(size=(3, 8))
    np.savetxt(tmp_path / "b.bvec", rows / np.linalg.norm(rows, axis=0))
    words = ["--bvals", tmp_path / "b.bval", "--bvecs", tmp_path / "b.bvec", "--shape", 4, 4, 1]
    assert run("simulate", *words, "--out", tmp_path / "run") == 0
    assert nifti.describe(tmp_path / "run" / "outputs" / "dwi.nii.gz")["shape"] == (4, 4, 1, 8)


# Train ---------------------------------------------------------------------------------------------------------------


def test_a_trained_network_is_a_complete_run(places):
    net = places / "net"
    assert {path.name for path in net.iterdir()} == {
        "checkpoints", "config.json", "inputs.json", "log.txt", "metrics.jsonl", "outputs", "report.html",
        "timing.json",
    }  # fmt: skip
    record = json.loads((net / "outputs" / "model" / "record.json").read_text())
    assert (record["family"], record["kind"]) == ("noddi", "mlp") and len(record["protocol"]) == 64
    lines = [json.loads(line) for line in (net / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["held_out_loss"] < lines[0]["held_out_loss"]
    page = (net / "report.html").read_text()
    assert "Against the truth" in page and "Slope" in page


@pytest.mark.usefixtures("no_figures")
def test_a_killed_training_continues_to_the_same_network(places, tmp_path, monkeypatch):
    scan = places / "sim" / "outputs"
    words = ["train", "--bvals", scan / "dwi.bval", "--bvecs", scan / "dwi.bvec", *TINY, "--out", tmp_path / "net"]
    metrics = train_stage.Log.metrics

    def die_at_the_third(self, step, values):
        if step == 3:
            raise KeyboardInterrupt
        metrics(self, step, values)

    monkeypatch.setattr(train_stage.Log, "metrics", die_at_the_third)
    assert run(*words) == 130
    assert not (tmp_path / "net" / "report.html").exists()
    monkeypatch.setattr(train_stage.Log, "metrics", metrics)
    assert run(*words) == 0
    assert "Continuing after epoch 2" in (tmp_path / "net" / "log.txt").read_text()
    same = "outputs/model/parameters.safetensors"
    assert (tmp_path / "net" / same).read_bytes() == (places / "net" / same).read_bytes()
    assert (tmp_path / "net" / "metrics.jsonl").read_text() == (places / "net" / "metrics.jsonl").read_text()


def test_the_reports_can_be_written_again(places, predicted, tmp_path):
    for run_folder in (places / "sim", places / "net", places / "onnx", predicted):
        copy = shutil.copytree(run_folder, tmp_path / run_folder.name)
        (copy / "report.html").unlink()
        assert main(["report", str(copy)]) == 0
        assert (copy / "report.html").stat().st_size > 10_000


# Predict -------------------------------------------------------------------------------------------------------------


def test_maps_lie_on_the_grid_of_the_scan_and_say_what_they_are(places, predicted):
    scan, outputs = places / "sim" / "outputs", predicted / "outputs"
    mask = read_map(scan, "mask") > 0
    for name in MAPS:
        volume, dwi = nifti.read(outputs / f"{name}.nii.gz"), nifti.read(scan / "dwi.nii.gz")
        np.testing.assert_array_equal(volume.affine, dwi.affine)
        assert volume.array.shape == dwi.array.shape[:3]
        assert not volume.array[~mask].any() and volume.array[mask].all()
        sidecar = json.loads((outputs / f"{name}.json").read_text())
        assert sidecar["constants"]["protocol"] and sidecar["constants"]["parallel_diffusivity_um2_per_ms"] == 1.7
        assert sidecar["unit"] == "1" and sidecar["software"].startswith("jaxmed")


@pytest.mark.usefixtures("no_figures")
def test_voxels_of_nan_are_left_out_and_said(places, predicted, tmp_path):
    scan = shutil.copytree(places / "sim" / "outputs", tmp_path / "scan")

    def poke(array):
        array[6, 7, 1, 20] = np.nan
        array[0, 0, 0] = np.inf  # outside the mask
        return array

    rewrite(scan / "dwi.nii.gz", poke)
    assert run("predict", "--weights", places / "net", *scan_words(scan), "--out", tmp_path / "maps") == 0
    outputs = tmp_path / "maps" / "outputs"
    expected = read_map(predicted / "outputs", "fwf")
    expected[6, 7, 1] = 0
    np.testing.assert_array_equal(read_map(outputs, "fwf"), expected)
    assert read_map(outputs, "mask")[6, 7, 1] == 0
    notes = json.loads((outputs / "summary.json").read_text())["notes"]
    assert notes == ["1 voxels hold NaN or Inf; their maps are 0, and map 'mask' leaves them out."]


@pytest.mark.usefixtures("no_figures")
def test_a_background_of_nan_changes_no_voxel_inside(places, predicted, tmp_path):
    scan = shutil.copytree(places / "sim" / "outputs", tmp_path / "scan")
    mask = read_map(scan, "mask") > 0

    def change(array):
        array[~mask] = np.nan
        return array

    rewrite(scan / "dwi.nii.gz", change)
    for name, words in {"given": scan_words(scan), "found": scan_words(scan)[:-2]}.items():
        assert run("predict", "--weights", places / "net", *words, "--out", tmp_path / name) == 0
        np.testing.assert_array_equal(read_map(tmp_path / name / "outputs", "mask") > 0, mask)
        expected = read_map(predicted / "outputs", "fwf")
        np.testing.assert_array_equal(read_map(tmp_path / name / "outputs", "fwf"), expected)


@pytest.mark.usefixtures("no_figures")
def test_images_in_another_order_give_the_same_maps_by_every_road(places, predicted, tmp_path):
    scan = shutil.copytree(places / "sim" / "outputs", tmp_path / "scan")
    order = np.random.default_rng(0).permutation(99)
    rewrite(scan / "dwi.nii.gz", lambda array: array[..., order])
    bvals = np.loadtxt(scan / "dwi.bval")[order]
    (scan / "dwi.bval").write_text(" ".join(f"{bval * 1.015:g}" for bval in bvals))
    np.savetxt(scan / "dwi.bvec", np.loadtxt(scan / "dwi.bvec")[:, order])
    assert run("predict", "--weights", places / "net", *scan_words(scan), "--out", tmp_path / "maps") == 0
    notes = json.loads((tmp_path / "maps" / "outputs" / "summary.json").read_text())["notes"]
    assert "another order" in notes[0] and "b-values differ by up to 43 s/mm^2" in notes[1]
    files = [scan / "dwi.nii.gz", scan / "dwi.bval", scan / "dwi.bvec", tmp_path / "scanner"]
    command = [sys.executable, SCRIPT, places / "onnx" / "outputs" / "network.onnx", *files]
    command += ["--mask", scan / "mask.nii.gz"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in MAPS:
        expected = read_map(predicted / "outputs", name)
        np.testing.assert_allclose(read_map(tmp_path / "maps" / "outputs", name), expected, atol=1e-6)
        np.testing.assert_allclose(read_map(tmp_path / "scanner", name), expected, atol=1e-6)


def test_dicom_maps_agree_with_nifti_in_the_world(places, predicted):
    stack = read_stack(places / "sim" / "outputs" / "dicom")
    for name in MAPS:
        expected = on_stack(nifti.read(predicted / "outputs" / f"{name}.nii.gz"), stack)
        for place, tolerance in ((f"{name}.dcm", 0.0), (name, 0.000501)):
            volume = read_series(predicted / "outputs" / "dicom" / place)
            np.testing.assert_allclose(volume.affine, stack.affine, atol=1e-4)
            np.testing.assert_allclose(volume.array.transpose(2, 1, 0), expected, atol=tolerance, rtol=0)


@pytest.mark.usefixtures("no_figures")
def test_both_runtimes_and_the_script_give_the_same_maps(places, predicted):
    scan = places / "sim" / "outputs"
    network = places / "onnx" / "outputs" / "network.onnx"
    words = ["--weights", network, "--runtime", "onnx", "--threads", 1, *scan_words(scan)]
    assert run("predict", *words, "--out", places / "by_onnx") == 0
    # A scanner has none of our packages: importing one of them fails.
    code = (
        "import sys, runpy\n"
        "for name in ('jax', 'jaxlib', 'jaxmed', 'flax', 'scipy', 'onnx'): sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    files = [network, scan / "dwi.nii.gz", scan / "dwi.bval", scan / "dwi.bvec", places / "scanner"]
    command = [sys.executable, "-c", code, SCRIPT, *files, "--mask", scan / "mask.nii.gz"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "voxels: read" in done.stdout
    for name in MAPS:
        expected = read_map(predicted / "outputs", name)
        np.testing.assert_allclose(read_map(places / "by_onnx" / "outputs", name), expected, atol=1e-6)
        np.testing.assert_allclose(read_map(places / "scanner", name), expected, atol=1e-6)


def test_an_export_tells_how_near_the_runtimes_are(places):
    summary = json.loads((places / "onnx" / "outputs" / "summary.json").read_text())
    assert 0 < summary["largest_difference"] < 1e-6 and summary["rows"] == 3000


@pytest.mark.slow
def test_runtimes_agree_on_a_hundred_thousand_rows(places, tmp_path):
    assert run("export", "--weights", places / "net", "--out", tmp_path / "onnx") == 0
    summary = json.loads((tmp_path / "onnx" / "outputs" / "summary.json").read_text())
    assert 0 < summary["largest_difference"] < 1e-6 and summary["rows"] == 100_000


# Evaluate ------------------------------------------------------------------------------------------------------------


def test_an_evaluation_scores_networks_on_the_same_noise(places, tmp_path, monkeypatch):
    monkeypatch.setattr(amico, "is_installed", lambda: False)
    words = ["--weights", places / "net", places / "net", "--no-fit", "--points", 3, "--repeats", 4, "--snr", 20]
    assert run("evaluate", *words, "--out", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "outputs" / "summary.json").read_text())
    assert summary["estimators"] == ["NN_GT 1", "NN_GT 2"]
    rows = read_table(tmp_path / "run" / "outputs" / "scores.csv").rows
    assert (tmp_path / "run" / "log.txt").read_text().count(
        "AMICO is not installed"
    ) == 1 and "amico" not in sys.modules
    first, second = (
        [{k: v for k, v in row.items() if k != "estimator"} for row in rows if row["estimator"] == name]
        for name in summary["estimators"]
    )
    assert first == second and len(first) == 3
    assert "Cramer-Rao bound" in (tmp_path / "run" / "outputs" / "scores.csv").read_text()
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "predict", "export", "evaluate", "simulate"])
def test_every_smoke_preset_runs(stage, tmp_path):
    assert run(stage, "--preset", "smoke", "--out", tmp_path / "run") == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_a_ball_and_stick_goes_the_same_road(places, tmp_path):
    scan = places / "sim" / "outputs"
    tables = ["--bvals", scan / "dwi.bval", "--bvecs", scan / "dwi.bvec"]
    kind = ["--train.forward.kind", "ball-and-stick"]
    assert run("train", *tables, *TINY, *kind, "--out", tmp_path / "net") == 0
    assert run("export", "--weights", tmp_path / "net", "--rows", 1000, "--out", tmp_path / "onnx") == 0
    assert run("predict", "--weights", tmp_path / "net", *scan_words(scan), "--out", tmp_path / "maps") == 0
    diffusivity = json.loads((tmp_path / "maps" / "outputs" / "diffusivity.json").read_text())
    assert diffusivity["unit"] == "um^2/ms" and diffusivity["constants"]["model"] == "ball-and-stick"
    words = ["--weights", tmp_path / "net", "--no-fit", "--points", 3, "--repeats", 4, "--snr", 20]
    assert run("evaluate", *words, "--out", tmp_path / "run") == 0
    assert "stick_fraction" in (tmp_path / "run" / "outputs" / "scores.csv").read_text()


# Mistakes ------------------------------------------------------------------------------------------------------------


def only_line(capsys):
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


def rewrite(path, change):
    volume = nifti.read(path)
    nifti.write(path, Volume.make(change(volume.array.copy()), volume.affine), allow_nonfinite=True)


def fill_with_nan(array):
    array[3:] = np.nan
    return array


def swap_words(path, first, second):
    words = path.read_text().split()
    words[first], words[second] = words[second], words[first]
    path.write_text(" ".join(words) + "\n")


PREDICT_MISTAKES = {
    "no scan": (lambda p: (p / "dwi.nii.gz").unlink(), "no such file"),
    "half a scan": (
        lambda p: (p / "dwi.nii.gz").write_bytes((p / "dwi.nii.gz").read_bytes()[:999]),
        "dwi.nii.gz: expected",
    ),
    "three dimensions": (lambda p: shutil.copy(p / "mask.nii.gz", p / "dwi.nii.gz"), "4D data"),
    "not a number": (lambda p: rewrite(p / "dwi.nii.gz", fill_with_nan), "NaN"),
    "all zero": (lambda p: rewrite(p / "dwi.nii.gz", np.zeros_like), "constant"),
    "mask of another shape": (lambda p: rewrite(p / "mask.nii.gz", lambda a: a[:-1]), "mask.nii.gz: expected"),
    "empty mask": (lambda p: rewrite(p / "mask.nii.gz", np.zeros_like), "zeros only"),
    "too few b-values": (lambda p: (p / "dwi.bval").write_text("0 700 2000\n"), "99 b-values"),
    "another order": (lambda p: swap_words(p / "dwi.bval", 20, 60), "angles between directions differ by"),
    "another shell": (
        lambda p: (p / "dwi.bval").write_text((p / "dwi.bval").read_text().replace("2855", "2600")),
        "with b = 2855 s/mm^2 in place 40 to 3 % or 20 s/mm^2, found b = 2600",
    ),
    "no unweighted image": (
        lambda p: (p / "dwi.bval").write_text(" ".join(["700"] * 39 + ["2000"] * 60)),
        "dwi.bv",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", PREDICT_MISTAKES)
def test_a_scan_that_does_not_fit_is_refused(places, mistake, tmp_path, capsys):
    scan = shutil.copytree(places / "sim" / "outputs", tmp_path / "scan")
    break_it, expected = PREDICT_MISTAKES[mistake]
    break_it(scan)
    assert run("predict", "--weights", places / "net", *scan_words(scan), "--out", tmp_path / "run") == 2
    line = only_line(capsys)
    assert line.startswith("jaxmed: ") and ": expected " in line and ", found " in line and expected in line, line
    assert not (tmp_path / "run").exists()


def words_of(stage, places, tmp_path):
    """Words that lead to one mistake each."""
    scan, net = places / "sim" / "outputs", places / "net"
    network = places / "onnx" / "outputs" / "network.onnx"
    tables = ["--bvals", scan / "dwi.bval", "--bvecs", scan / "dwi.bvec"]
    one_shell = tmp_path / "one.bval"
    one_shell.write_text(" ".join(["0"] * 9 + ["1000"] * 90))
    flat = tmp_path / "flat.bvec"
    flat.write_text("\n".join([" ".join(["1"] * 99), " ".join(["0"] * 99), " ".join(["0"] * 99)]))
    stick = tmp_path / "stick"
    (tmp_path / "text.onnx").write_text("no network")
    (tmp_path / "empty").mkdir()
    return {
        "predict without weights": (["predict", *scan_words(scan)], "weights: expected a file, found nothing"),
        "weights that are nowhere": (["predict", "--weights", stick, *scan_words(scan)], "no such path"),
        "weights that are no network": (
            ["predict", "--weights", tmp_path / "empty", *scan_words(scan)], "no record.json"),
        "onnx for jax": (["predict", "--weights", network, *scan_words(scan)], "give --runtime onnx"),
        "a folder for onnx": (
            ["predict", "--weights", net, "--runtime", "onnx", *scan_words(scan)], "give --runtime jax"),
        "text for onnx": (
            ["predict", "--weights", tmp_path / "text.onnx", "--runtime", "onnx", *scan_words(scan)],
            "ONNX Runtime refuses"),
        "no dicom there": (
            ["predict", "--weights", net, *scan_words(scan), "--dicom-source", tmp_path / "empty"], "no DICOM image"),
        "export without weights": (["export"], "weights: expected a file, found nothing"),
        "train without a table": (["train"], "bvals: expected a file, found nothing"),
        "train for one shell": (
            ["train", "--bvals", one_shell, "--bvecs", scan / "dwi.bvec"], "one at b = 1000 s/mm^2"),
        "directions on a line": (["train", "--bvals", scan / "dwi.bval", "--bvecs", flat], "on 1 different axes"),
        "labels of no kind": (["train", *tables, "--train.labels", "guess"], "--train.labels"),
        "a batch larger than all": (
            ["train", *tables, "--train.signals", "10", "--train.batch-size", "20"], "batch_size: expected at most 10"),
        "nothing to score": (["evaluate", "--no-fit", *tables], "give --weights RUN"),
        "one repetition": (["evaluate", *tables, "--repeats", "1"], "repeats: expected 2 or more"),
        "evaluate without a table": (["evaluate"], "bvals: expected a file, found nothing"),
        "half a table": (["simulate", "--bvals", scan / "dwi.bval"], "expected both files or neither"),
        "no shape": (["simulate", "--shape", "0", "4", "4"], "shape: expected a whole number from 1 to"),
    }[stage]  # fmt: skip


@pytest.mark.parametrize(
    "mistake",
    [
        "predict without weights", "weights that are nowhere", "weights that are no network", "onnx for jax",
        "a folder for onnx", "text for onnx", "no dicom there",
        "export without weights", "train without a table", "train for one shell", "directions on a line",
        "labels of no kind", "a batch larger than all", "nothing to score", "one repetition",
        "evaluate without a table", "half a table", "no shape",
    ],
)  # fmt: skip
def test_a_wrong_word_ends_in_one_line(places, mistake, tmp_path, capsys):
    words, expected = words_of(mistake, places, tmp_path)
    assert run(*words, "--out", tmp_path / "run") == 2
    line = only_line(capsys)
    assert line.startswith("jaxmed: ") and expected in line, line
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_figures")
def test_networks_of_two_protocols_are_not_compared(places, tmp_path, capsys):
    scan = shutil.copytree(places / "sim" / "outputs", tmp_path / "scan")
    (scan / "dwi.bval").write_text((scan / "dwi.bval").read_text().replace("2855", "2000"))
    tables = ["--bvals", scan / "dwi.bval", "--bvecs", scan / "dwi.bvec"]
    assert run("train", *tables, *TINY, "--out", tmp_path / "net") == 0
    capsys.readouterr()
    assert run("evaluate", "--weights", places / "net", tmp_path / "net", "--out", tmp_path / "run") == 2
    assert "expected the protocol of the network" in only_line(capsys)


@pytest.mark.usefixtures("no_figures")
def test_a_source_of_another_scan_is_refused(places, tmp_path, capsys):
    scan = places / "sim" / "outputs"
    assert run("simulate", "--shape", 12, 14, 4, "--dicom", "--out", tmp_path / "other") == 0
    capsys.readouterr()
    source = tmp_path / "other" / "outputs" / "dicom"
    words = ["--weights", places / "net", *scan_words(scan), "--dicom-source", source]
    assert run("predict", *words, "--out", tmp_path / "run") == 2
    assert "expected the voxels of the scan" in only_line(capsys)
    assert not (tmp_path / "run").exists()


def test_the_script_refuses_in_one_line(places, tmp_path):
    scan = shutil.copytree(places / "sim" / "outputs", tmp_path / "scan")
    network = places / "onnx" / "outputs" / "network.onnx"
    files = [scan / "dwi.nii.gz", scan / "dwi.bval", scan / "dwi.bvec", tmp_path / "out"]
    for break_it, expected in (
        (lambda: swap_words(scan / "dwi.bval", 20, 60), "angles between directions that differ by"),
        (lambda: (scan / "dwi.bval").write_text("0 1\n"), "with 99 images, found 2"),
        (lambda: (scan / "dwi.bval").unlink(), "a text file of numbers"),
    ):
        break_it()
        command = [str(word) for word in (sys.executable, SCRIPT, network, *files)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and expected in done.stderr, done.stderr
        assert not (tmp_path / "out").exists()


# Real protocols and data ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures")
def test_the_hcp_protocol_is_trained_for(shared_data, tmp_path):
    folder = shared_data / "dwi_protocols"
    tables = ["--bvals", folder / "hcp_wuminn_bvals.txt", "--bvecs", folder / "hcp_wuminn_bvecs.txt"]
    assert run("train", *tables, *TINY, "--out", tmp_path / "net") == 0
    record = json.loads((tmp_path / "net" / "outputs" / "model" / "record.json").read_text())
    assert len(record["config"]["table"]["bvals"]) == 288


@pytest.mark.usefixtures("no_figures")
def test_a_network_estimates_a_real_scan(shared_data, tmp_path):
    folder = shared_data / "dwi_human_dsi101"
    tables = ["--bvals", folder / "dwi.bval", "--bvecs", folder / "dwi.bvec"]
    small = [*TINY, "--train.epochs", "20"]
    assert run("train", *tables, *small, "--out", tmp_path / "net") == 0
    assert run("predict", "--weights", tmp_path / "net", *scan_words(folder), "--out", tmp_path / "maps") == 0
    mask = read_map(folder, "mask") > 0
    fwf = read_map(tmp_path / "maps" / "outputs", "fwf")[mask]
    assert 0 < np.median(fwf) < 0.5


@pytest.mark.usefixtures("no_figures")
def test_a_real_single_shell_is_refused_unless_allowed(shared_data, tmp_path, capsys):
    folder = shared_data / "dwi_human_64dir"
    tables = ["--bvals", folder / "dwi.bval", "--bvecs", folder / "dwi.bvec"]
    assert run("train", *tables, *TINY, "--out", tmp_path / "net") == 2
    assert "one at b = 994 s/mm^2" in only_line(capsys)
    assert run("train", *tables, *TINY, "--allow-single-shell", "--out", tmp_path / "net") == 0
