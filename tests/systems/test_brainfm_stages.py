"""The stages of BrainFM end to end at smoke size, and what a user can have wrong in them."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from bad_files import BAD, write_bad_files

from jaxmed.cli import main
from jaxmed.io import nifti
from jaxmed.models.published.load import load_published
from jaxmed.systems.brainfm.prediction import MAPS
from jaxmed.train import announce
from jaxmed.volume import Volume


def run(*words):
    return main(["brainfm", *map(str, words), "--quiet"])


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """Predict at smoke size: makes heads, a store of them, a network and phantom scans by itself."""
    place = tmp_path_factory.mktemp("brainfm") / "run"
    assert run("predict", "--preset", "smoke", "--out", place) == 0
    return place


@pytest.fixture(scope="module")
def trained(predicted):
    return predicted / "inputs" / "train"


def test_training_leaves_a_network_that_learnt(trained):
    published = load_published(trained)
    summary = json.loads((trained / "outputs" / "summary.json").read_text())
    assert published.report.family == "brainfm" and published.config.tasks == tuple(summary["tasks"])
    assert {"segmentation", "distance", "registration", "bias_field_log", "T1"} == set(summary["tasks"])
    assert published.preprocess.spacing == (2.0,)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert summary["subjects"] == {"train": 2, "held out": 1} and summary["scores"]["coordinate_mm"] > 0
    with open(trained / "outputs" / "structures.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["label"]) for row in rows] == list(published.config.labels)
    page = (trained / "report.html").read_text()
    assert "An image, its targets and its maps" in page and "Cerebral" in page.replace("cerebral", "Cerebral")


def test_every_map_of_every_scan_is_written_on_both_grids(predicted, trained):
    outputs, config = predicted / "outputs", load_published(trained).config
    scans = sorted((predicted / "inputs" / "heads" / "scans").iterdir())
    record = json.loads((outputs / "head_0000.json").read_text())
    assert set(record["maps"]) == {"T1", "segmentation", "distance", "cortex", "bias_field", "coordinates"}
    for name in record["maps"]:
        fine = nifti.read(outputs / f"head_0000_{name}.nii.gz")
        native = nifti.read(outputs / f"head_0000_{name}_native.nii.gz")
        assert list(fine.array.shape[:3]) == record["shape"] and np.isfinite(native.array).all()
        scan = nifti.read(scans[0])
        assert native.array.shape[:3] == scan.array.shape
        np.testing.assert_allclose(native.affine, scan.affine, atol=1e-4)
        sidecar = json.loads((outputs / f"head_0000_{name}.json").read_text())
        assert sidecar["definition"] == MAPS[name][0] and sidecar["unit"] == MAPS[name][1]
    assert set(np.unique(nifti.read(outputs / "head_0000_segmentation_native.nii.gz").array)) <= set(config.labels)
    with open(outputs / "volumes.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (len(config.labels) - 1) and rows[0]["name"]
    total = sum(float(row["volume_ml"]) for row in rows if row["id"] == "head_0000")
    assert total == pytest.approx(sum(record["volumes_ml"].values()), rel=1e-3)
    assert "BrainFM on 2 scans" in (predicted / "report.html").read_text()


TURN = np.deg2rad(20.0)
OBLIQUE = np.array(
    [[np.cos(TURN), -np.sin(TURN), 0, 30], [np.sin(TURN), np.cos(TURN), 0, -12], [0, 0, 1, 7], [0, 0, 0, 1]]
)


def turned(volume):
    """Return the same voxels in a head that lies turned and elsewhere in the scanner."""
    return dataclasses.replace(volume, affine=OBLIQUE @ volume.affine)


def test_a_folder_with_broken_scans_is_done_but_for_them(predicted, trained, tmp_path):
    """And an atlas, a reference, label maps and true images find their places, of a head that lies turned too."""
    outputs, scans = predicted / "outputs", tmp_path / "scans"
    source = nifti.read(predicted / "inputs" / "heads" / "scans" / "head_0000.nii.gz")
    labels = nifti.read(outputs / "head_0000_segmentation.nii.gz", dtype=np.int32)
    labels = dataclasses.replace(labels, array=labels.array.astype(np.int16))
    image = nifti.read(outputs / "head_0000_T1.nii.gz")
    for folder, volume in (("scans", source), ("labels", labels), ("T1", image)):
        (tmp_path / folder).mkdir()
        nifti.write(tmp_path / folder / "good.nii.gz", volume)
        nifti.write(tmp_path / folder / "oblique.nii.gz", turned(volume))
    write_bad_files(scans, source.array)
    for folder in ("labels", "T1"):
        for name in BAD:
            nifti.write(tmp_path / folder / f"{name}.nii.gz", labels)
    nifti.write(tmp_path / "atlas.nii.gz", Volume.make(np.ones((30, 30, 30), np.float32), np.diag([8.0, 8, 8, 1])))
    code = run(
        "predict", "--input", scans, "--weights", trained, "--labels", tmp_path / "labels",
        "--truth.T1", tmp_path / "T1", "--atlas", tmp_path / "atlas.nii.gz", "--reference", scans / "good.nii.gz",
        "--reference-labels", tmp_path / "labels" / "good.nii.gz", "--no-native", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 1
    outputs = tmp_path / "out" / "outputs"
    with open(outputs / "failed.csv") as file:
        failed = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    assert failed.keys() == BAD.keys() and all(BAD[name] in reason for name, reason in failed.items()), failed
    for name in ("good", "oblique"):
        record = json.loads((outputs / f"{name}.json").read_text())
        assert {"atlas", "reference"} <= set(record["maps"]) and set(record["dice"].values()) == {1.0}
        assert record["scores"]["dice"] == 1 and record["scores"]["T1_ssim"] > 0.999
        # Both are one head: every voxel of one is found in the other, near its like.
        pair = record["registration"]["reference"]
        assert pair["dice"] > 0.9 and pair["center_mm"] < 2
    one, two = (nifti.read(outputs / f"{name}_coordinates.nii.gz") for name in ("good", "oblique"))
    np.testing.assert_allclose(two.array, one.array, atol=1e-3)
    np.testing.assert_allclose(two.affine, OBLIQUE @ one.affine, atol=1e-4)
    to_mni = [
        json.loads((outputs / f"{name}_affine.json").read_text())["scan_to_mni_mm"] for name in ("good", "oblique")
    ]
    np.testing.assert_allclose(np.array(to_mni[1]) @ OBLIQUE, to_mni[0], atol=0.05)
    assert not list(outputs.glob("*native*"))
    with open(outputs / "scans.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["good", "oblique"] and float(rows[0]["reference_dice"]) > 0.9
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Against the truth" in page and "Registration" in page


def test_a_scan_split_over_devices_has_the_maps_of_one(predicted, trained, tmp_path):
    """Five devices for 24 voxels: what is left over is the compiler's business."""
    scan = predicted / "inputs" / "heads" / "scans" / "head_0000.nii.gz"
    words = ["--input", scan, "--weights", trained, "--no-native", "--mesh.model", 5]
    assert run("predict", *words, "--out", tmp_path / "out") == 0
    record = json.loads((predicted / "outputs" / "head_0000.json").read_text())
    assert record["shape"][0] % 5
    for name in record["maps"]:
        found, expected = (
            np.asarray(nifti.read(place / "outputs" / f"head_0000_{name}.nii.gz").array)
            for place in (tmp_path / "out", predicted)
        )
        if name == "segmentation":
            assert np.mean(found != expected) < 1e-4
        else:
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_volume_that_does_not_fit_into_memory_is_refused_before_it_is_run(
    predicted, trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(announce, "machine_memory", lambda: 1e6)
    scans = predicted / "inputs" / "heads" / "scans"
    assert run("predict", "--input", scans, "--weights", trained, "--out", tmp_path / "run") == 2
    assert "set --tiling windows, or a smaller --window" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--truth.CT", "{scans}"], "--truth.CT: expected a network with the task CT, found one with"),
        (["--truth.T1", "nowhere"], "nowhere"),
        (["--atlas-labels", "{scan}"], "atlas-labels: expected --labels beside it, to compare with, found none"),
        (["--mesh.model", "9"], "mesh: expected axes that fill 8 device(s)"),
    ],
)
def test_what_does_not_fit_together_is_told_before_any_work(predicted, trained, tmp_path, capsys, words, message):
    heads = predicted / "inputs" / "heads"
    files = {"scans": heads / "scans", "scan": heads / "scans" / "head_0000.nii.gz"}
    words = [word.format(**files) for word in words]
    assert run("predict", "--input", files["scan"], "--weights", trained, *words, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "input: expected label maps, or a store of subjects, found nothing"),
        (["train", "--input", "nowhere"], "nowhere"),
        (["train", "--data.store", "."], "a store of subjects (with store.json)"),
        (["train", "--preset", "smoke", "--generator.shape", "1", "16", "16"], "size: expected at least 2 voxels"),
        (["train", "--loss.contrastive", "1"], "generator.samples: expected 2 or more for --loss.contrastive"),
        (["train", "--grid.step", "2"], "generator.resolution.voxel: expected 2, as --grid.step, found 1"),
        (["train", "--variant", "heart"], "--variant"),
        (["predict"], "input: expected scans, or a folder of them, found nothing"),
        (["predict", "--input", "x.nii.gz", "--weights", "nothing.pth"], "nothing.pth"),
        (["train", "--input", "{odd}"], "labels of the table freesurfer, found 2002"),
        (
            ["train", "--input", "{odd}", "--data.table", "{uneven}"],
            "as many left as right classes, found 2 left and 1",
        ),
    ],
)
def test_mistakes_end_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    labels = np.zeros((8, 9, 10), np.int16)
    labels[2:6, 2:6, 2:6] = 2002
    nifti.write(tmp_path / "odd.nii.gz", Volume.make(labels, np.eye(4)))
    (tmp_path / "uneven.csv").write_text("label,name,side\n0,none,\n1,left a,left\n2,left b,left\n3,right a,right\n")
    words = [word.format(odd="odd.nii.gz", uneven="uneven.csv") for word in words]
    assert run(*words, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
