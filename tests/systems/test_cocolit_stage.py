"""cocolit translate end to end at smoke size, the released tool's options, and what a user can have wrong."""

import csv
import json

import numpy as np
import pytest
from bad_files import BAD, write_bad_files

from jaxmed.cli import main
from jaxmed.io import nifti
from jaxmed.systems.cocolit.stages.translate import released_words
from jaxmed.volume import Volume


def run(*words):
    return main(["cocolit", "translate", *map(str, words), "--quiet"])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Translate at smoke size: makes networks, a template and two prepared brains by itself."""
    place = tmp_path_factory.mktemp("cocolit") / "run"
    assert run("--preset", "smoke", "--out", place) == 0
    return place


@pytest.fixture(scope="module")
def given(smoke):
    """What a user would give: networks and template, at the smoke run's size."""
    inputs = smoke / "inputs"
    return ["--weights.folder", inputs / "weights", "--template", inputs / "template.nii.gz", "--samples", 3,
            "--steps", 4, "--chunk", 2]  # fmt: skip


def scans_of(smoke):
    return sorted((smoke / "inputs" / "scans").iterdir())


def test_every_scan_has_its_map_its_spread_and_a_picture(smoke):
    outputs, first = smoke / "outputs", scans_of(smoke)[0]
    name, scan = first.name.removesuffix(".nii.gz"), nifti.read(first)
    record = json.loads((outputs / f"{name}.json").read_text())
    for what, unit in (("suvr", "SUVR"), ("spread", "SUVR"), ("mri", "1")):
        volume = nifti.read(outputs / f"{name}_{what}.nii.gz")
        assert volume.array.shape == scan.array.shape and np.isfinite(volume.array).all()
        np.testing.assert_allclose(volume.affine, scan.affine, atol=1e-4)
        sidecar = json.loads((outputs / f"{name}_{what}.json").read_text())
        assert sidecar["unit"] == unit and sidecar["constants"]["samples"] == 3
        assert sidecar["constants"]["positive_above"] == 1.326
    assert record["mean_spread"] > 0 and record["bias"] >= 0 and 0 < record["at_limit"] <= 1
    assert "--no-clip" in " ".join(record["notes"])
    page = (smoke / "report.html").read_text()
    assert "CoCoLIT on 2 scans" in page and "Synthesised" in page and "Spread" in page
    assert "1.326" in (smoke / "log.txt").read_text()
    with open(outputs / "scans.csv") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [one.name[:-7] for one in scans_of(smoke)]


def test_a_folder_with_broken_scans_is_done_but_for_them_and_one_more_from_a_raw_scan(smoke, given, tmp_path, capsys):
    """A raw scan lies elsewhere in the scanner; its brain comes from a mask, and its map is near the prepared one's."""
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    masks.mkdir()
    truth = smoke / "inputs" / "truth"
    name = scans_of(smoke)[0].name
    image, labels = nifti.read(truth / "scans" / name), nifti.read(truth / "labels" / name)
    write_bad_files(scans, image.array)
    shift = np.eye(4)
    shift[:3, 3] = (11.0, -7.0, 4.0)
    nifti.write(scans / "raw.nii.gz", Volume.make(100 * image.array + 5, shift @ image.affine))
    inside = (labels.array > 0).astype(np.uint8)
    for path in scans.iterdir():
        nifti.write(masks / path.name, Volume.make(inside, shift @ image.affine))
    words = ["--input", scans, "--mask", masks, "--preprocess", *given]
    assert run(*words, "--out", tmp_path / "out") == 1
    outputs = tmp_path / "out" / "outputs"
    with open(outputs / "failed.csv") as file:
        failed = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    assert failed.keys() == BAD.keys() and all(BAD[one] in reason for one, reason in failed.items()), failed
    record = json.loads((outputs / "raw.json").read_text())
    assert record["correlation"] > 0.8
    plain, raw = (nifti.read(place / f"{one}_mri.nii.gz") for place, one in (
        (smoke / "outputs", name.removesuffix(".nii.gz")), (outputs, "raw")
    ))  # fmt: skip
    assert np.corrcoef(plain.array.ravel(), raw.array.ravel())[0, 1] > 0.95
    moved = json.loads((outputs / "raw_affine.json").read_text())["template_to_scan_mm"]
    assert np.linalg.det(np.array(moved)[:3, :3]) == pytest.approx(1, abs=0.3)
    assert nifti.read(outputs / "raw_mask.nii.gz").array.any()


def test_the_released_options_are_understood():
    words = ["--i", "t1.nii.gz", "--o", "pet/suvr.nii.gz", "--m", "64", "--ddim_n=20", "--preprocess"]
    assert released_words(words) == [
        "--input", "t1.nii.gz", "--copy", "pet/suvr.nii.gz", "--samples", "64", "--steps=20", "--preprocess",
        "--out", "pet/suvr_run",
    ]  # fmt: skip
    assert released_words(["--o=suvr.nii", "--out", "run"]) == ["--copy=suvr.nii", "--out", "run"]


def test_the_released_command_leaves_its_file_and_a_run_beside_it(smoke, given, tmp_path):
    scan = scans_of(smoke)[0]
    *weights, _, _, _, _, _, _ = given
    words = ["--i", scan, "--o", tmp_path / "suvr.nii.gz", "--m", 3, "--ddim-n", 4, "--chunk", 2]
    assert run(*words, *weights) == 0
    name = scan.name.removesuffix(".nii.gz")
    copied, expected, alone = (
        nifti.read(path).array
        for path in (
            tmp_path / "suvr.nii.gz", smoke / "outputs" / f"{name}_suvr.nii.gz",
            tmp_path / "suvr_run" / "outputs" / f"{name}_suvr.nii.gz",
        )
    )  # fmt: skip
    np.testing.assert_array_equal(copied, alone)
    np.testing.assert_allclose(copied, expected, atol=1e-4)  # a scan's map does not depend on what else is in the run


def test_a_manifest_names_scans_and_a_missing_one_fails_alone(smoke, given, tmp_path):
    scan = scans_of(smoke)[1]
    (tmp_path / "scans.csv").write_text(f"path,subject\n{scan},a\nabsent.nii.gz,b\n")
    assert run("--data.manifest", tmp_path / "scans.csv", *given, "--out", tmp_path / "run") == 1
    name, outputs = scan.name.removesuffix(".nii.gz"), tmp_path / "run" / "outputs"
    with open(outputs / "failed.csv") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["absent"]
    assert json.loads((outputs / f"{name}.json").read_text())["mean_suvr"] == pytest.approx(
        json.loads((smoke / "outputs" / f"{name}.json").read_text())["mean_suvr"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (lambda a, m: (a[::-1], np.diag([-1.0, 1, 1, 1]) @ m), [], "expected the template's axes, RAS, found LAS"),
        (lambda a, m: (a, m @ np.diag([1.5, 1.5, 1.5, 1])), [], "expected the template's voxels of 6 x 6 x 6 mm"),
        (lambda a, m: (np.zeros_like(a), m), [], "expected an image with contrast"),
        (lambda a, m: (a + np.random.default_rng(0).random(a.shape), m), [], "expected a brain without its skull"),
        (lambda a, m: (np.maximum(a, -3) + 3, m), [], "expected intensities by WhiteStripe"),
        (lambda a, m: (a, m), ["--mask", "mask.nii.gz"], "mask: expected none without --preprocess"),
        (lambda a, m: (a, m), ["--copy", "map.png"], "copy: expected a file .nii"),
        (lambda a, m: (a, m), ["--weights.unet", "{cnt}"], "the U-Net of latents (dif.pth), found a controlnet"),
        (lambda a, m: (a, m), ["--weights.pet", "absent.pth"], "absent.pth"),
        (lambda a, m: (a, m), ["--mesh.data", "2", "--chunk", "3"], "chunk: expected a multiple of the 2"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line_and_leave_nothing(
    smoke, given, tmp_path, monkeypatch, capsys, change, words, message
):
    monkeypatch.chdir(tmp_path)
    scan = nifti.read(scans_of(smoke)[0])
    array, affine = change(scan.array, scan.affine)
    nifti.write(tmp_path / "scan.nii.gz", Volume.make(np.asarray(array, np.float32), affine))
    words = [word.format(cnt=smoke / "inputs" / "weights" / "cnt") for word in words]
    assert run("--input", "scan.nii.gz", *given, *words, "--out", "run") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "input: expected scans, found nothing"),
        (["--input", "absent.nii.gz"], "absent.nii.gz"),
        (
            ["--input", "scan.nii.gz", "--preprocess"],
            "template: expected the MNI152 brain to align with, found nothing",
        ),
        (["--input", "scan.nii.gz", "--preprocess", "--template", "scan.nii.gz"], "scan.nii.gz"),
        (["--data.manifest", "m.csv", "--mask", "m.nii.gz", "--preprocess", "--template", "t.nii.gz"], "a column mask"),
        (["--preset", "smoke", "--chunk", "0"], "chunk"),
    ],
)
def test_what_is_missing_is_named(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scan.nii.gz").write_bytes(b"no image")
    assert run(*words, "--out", "run") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
