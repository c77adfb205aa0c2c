"""`jaxmed tangerine embed` from files to tables, broken files among good ones, and every mistake a user can make."""

import json
import shutil

import numpy as np
import pytest
from scan_files import MISTAKES, make_slices, only_line, rows_of, save_slices, write_dicom
from tiny_tangerine import axial, export, masked_autoencoder, scan, write_scans

from jaxmed.cli import main
from jaxmed.data.scans import find_records
from jaxmed.io import nifti
from jaxmed.recipes import map_files
from jaxmed.systems import tangerine
from jaxmed.volume import Volume


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return export(masked_autoencoder(), tmp_path_factory.mktemp("weights"))


@pytest.fixture
def scans(tmp_path):
    (tmp_path / "scans").mkdir()
    return write_scans(tmp_path / "scans").parent


def embed(weights, out, *words):
    return main(["tangerine", "embed", "--weights", str(weights), "--out", str(out), *map(str, words)])


def arrays_of(run):
    with np.load(run / "outputs" / "embeddings.npz") as stored:
        return {name: stored[name] for name in stored}


def test_smoke_run_makes_its_own_model_whose_features_tell_the_size_of_lungs(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["tangerine", "embed", "--preset", "smoke", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "Pre-training a tiny model" in said and "No loss trains the class token" in said
    arrays = arrays_of(out)
    assert arrays["concat"].shape == (12, 128) and arrays["class"].shape == (12, 64)
    np.testing.assert_allclose(arrays["pre_logits"].std(axis=1), 1, atol=1e-3)
    # The plane of largest spread explains most of how much air there is in a scan.
    volumes = [nifti.read(path).array for path in sorted((out / "inputs" / "scans").iterdir())]
    air = np.array([(volume < -500).mean() for volume in volumes])
    plane = np.array([[row["first"], row["second"]] for row in rows_of(out / "outputs" / "plane.csv")], np.float64)
    residual = air - air.mean() - plane @ np.linalg.lstsq(plane, air - air.mean(), rcond=None)[0]
    assert residual.var() < 0.5 * air.var()
    page = (out / "report.html").read_text()
    assert "Coloured by label" in page and "Nearest scans" in page


def test_tables_hold_what_the_python_call_returns(weights, scans, tmp_path):
    out = tmp_path / "run"
    words = ("--data.manifest", scans / "scans.csv", "--kinds", "pooled", "pre_logits", "--batch.size", 2, "--quiet")
    assert embed(weights, out, *words) == 0
    rows, arrays = rows_of(out / "outputs" / "embeddings.csv"), arrays_of(out)
    published = masked_autoencoder()
    assert [row["id"] for row in rows] == [f"scan_{n}" for n in range(5)] == arrays["id"].tolist()
    assert [row["label"] for row in rows] == arrays["label"].tolist()
    for number, row in enumerate(rows):
        for kind, length in (("pooled", 24), ("pre_logits", 48)):
            expected = np.asarray(tangerine.embed(published, row["path"], kind))
            np.testing.assert_allclose(arrays[kind][number], expected, atol=2e-6)
            told = np.array([row[f"{kind}_{place}"] for place in range(length)], np.float32)
            np.testing.assert_array_equal(told, arrays[kind][number])  # every bit of float32
    sidecar = json.loads((out / "outputs" / "embeddings.json").read_text())
    assert {"definition", "unit", "constants", "software", "licence"} <= sidecar.keys()
    assert not (out / "checkpoints").exists() and not (out / "outputs" / "failed.csv").exists()


def test_a_broken_file_does_not_stop_the_others(weights, scans, tmp_path, capsys):
    good = embed(weights, tmp_path / "good", "--input", scans, "--batch.size", 2, "--quiet")
    assert good == 0
    path = scans / "scan_1.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    (scans / "not_an_image.nii").write_bytes(b"hello world" * 99)
    assert embed(weights, tmp_path / "run", "--input", scans, "--batch.size", 2) == 1
    failed = rows_of(tmp_path / "run" / "outputs" / "failed.csv")
    assert [row["id"] for row in failed] == ["not_an_image", "scan_1"]
    assert all(": expected " in row["reason"] and row["path"] in row["reason"] for row in failed)
    whole, others = arrays_of(tmp_path / "good"), arrays_of(tmp_path / "run")
    assert others["id"].tolist() == ["scan_0", "scan_2", "scan_3", "scan_4"]
    np.testing.assert_allclose(others["concat"], np.delete(whole["concat"], 1, axis=0), atol=1e-6)
    assert "Failed: " in capsys.readouterr().err and "Failed" in (tmp_path / "run" / "report.html").read_text()


def test_a_repaired_file_is_tried_again_by_the_same_command(weights, scans, tmp_path, capsys):
    words = ("--input", scans, "--batch.size", 2, "--quiet")
    assert embed(weights, tmp_path / "whole", *words) == 0
    path, out = scans / "scan_1.nii.gz", tmp_path / "run"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    assert embed(weights, out, *words) == 1
    assert embed(weights, out, *words) == 1 and "Complete already" not in capsys.readouterr().out
    path.write_bytes(whole)
    assert embed(weights, out, *words) == 0
    assert not (out / "outputs" / "failed.csv").exists() and not (out / "checkpoints").exists()
    assert "Trying 1 scans again" in (out / "log.txt").read_text()
    for name, array in arrays_of(tmp_path / "whole").items():
        np.testing.assert_array_equal(arrays_of(out)[name], array)
    assert embed(weights, out, *words) == 0 and "Complete already" in capsys.readouterr().out


def test_an_interrupted_run_continues_to_the_same_bits(weights, scans, tmp_path, monkeypatch, capsys):
    words = ("--input", scans, "--batch.size", 2, "--quiet")
    assert embed(weights, tmp_path / "whole", *words) == 0
    store = map_files._store

    def store_and_die(path, outcomes):
        store(path, outcomes)
        raise KeyboardInterrupt

    monkeypatch.setattr(map_files, "_store", store_and_die)
    assert embed(weights, tmp_path / "run", *words) == 130
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(map_files, "_store", store)
    assert embed(weights, tmp_path / "run", *words) == 0
    assert "Continuing after 2 scans" in (tmp_path / "run" / "log.txt").read_text()
    for name, array in arrays_of(tmp_path / "whole").items():
        np.testing.assert_array_equal(arrays_of(tmp_path / "run")[name], array)


def test_a_run_is_not_continued_with_other_files(weights, scans, tmp_path, monkeypatch, capsys):
    def die(path, outcomes):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(map_files, "_store", die)
        assert embed(weights, tmp_path / "run", "--input", scans, "--quiet") == 130
    nifti.write(scans / "scan_0.nii.gz", scan(9))
    capsys.readouterr()
    assert embed(weights, tmp_path / "run", "--input", scans, "--quiet") == 2
    assert "scan_0.nii.gz changed; run it again with --overwrite" in only_line(capsys)
    assert embed(weights, tmp_path / "run", "--input", scans, "--quiet", "--no-resume") == 0


def test_orientation_is_checked_from_the_header_and_can_be_set(weights, tmp_path, capsys):
    volume = scan()
    nifti.write(tmp_path / "axial.nii.gz", volume)
    turned = Volume.make(np.ascontiguousarray(volume.array.transpose(2, 1, 0)), axial()[:, [2, 1, 0, 3]])
    nifti.write(tmp_path / "turned.nii.gz", turned)
    assert embed(weights, tmp_path / "a", "--input", tmp_path / "axial.nii.gz") == 0
    assert "Warning" not in capsys.readouterr().err
    assert embed(weights, tmp_path / "b", "--input", tmp_path / "turned.nii.gz") == 0
    said = capsys.readouterr().err
    assert "Warning: turned: axis D of the cube runs left-right" in said and "axes='xyz'" in said
    row = rows_of(tmp_path / "b" / "outputs" / "embeddings.csv")[0]
    assert "axis D of the cube" in row["warnings"] and "Unexpected" in (tmp_path / "b" / "report.html").read_text()
    words = ("--input", tmp_path / "turned.nii.gz", "--preprocess.axes", "xyz")
    assert embed(weights, tmp_path / "c", *words) == 0
    assert "Warning" not in capsys.readouterr().err
    one, other = (arrays_of(tmp_path / run)["concat"] for run in "ca")
    np.testing.assert_allclose(one, other, atol=5e-6)  # axes are resampled in another order
    assert np.abs(arrays_of(tmp_path / "b")["concat"] - arrays_of(tmp_path / "a")["concat"]).max() > 1e-3


def test_cubes_duplicates_and_dicom_folders_are_inputs(weights, tmp_path):
    folder = tmp_path / "in"
    (folder / "series").mkdir(parents=True)
    write_dicom(folder / "series", scan())
    nifti.write(folder / "same.nii.gz", scan())
    np.savez(folder / "cube.npz", volume=masked_autoencoder().preprocess(scan())[..., 0])
    nifti.write(folder / "other.nii.gz", scan(1))
    assert [record.name for record in find_records(None, folder)[0]] == ["cube", "other", "same", "series"]
    assert embed(weights, tmp_path / "run", "--input", folder, "--quiet") == 0
    arrays = arrays_of(tmp_path / "run")
    for place in (0, 3):
        np.testing.assert_allclose(arrays["concat"][place], arrays["concat"][2], atol=2e-5)
    near = {row["id"]: row for row in rows_of(tmp_path / "run" / "outputs" / "neighbours.csv")}
    assert [near[name]["near_duplicate"] for name in ("cube", "same", "series", "other")] == ["1", "1", "1", "0"]
    assert "the same scan twice?" in (tmp_path / "run" / "report.html").read_text()
    assert embed(weights, tmp_path / "one", "--input", folder / "series", "--quiet") == 0
    assert arrays_of(tmp_path / "one")["id"].tolist() == ["series"]


def test_two_series_of_a_folder_ask_for_one_of_them(weights, tmp_path, capsys):
    for seed in range(2):
        slices = make_slices(scan(seed), SeriesDescription=("Lung", "Soft")[seed])
        save_slices(slices, tmp_path / "in", f"{seed}_{{:03d}}.dcm")
    assert embed(weights, tmp_path / "run", "--input", tmp_path / "in") == 2
    line = only_line(capsys)
    assert "in: expected one series, found 2: " in line and "; name one of them with --series" in line
    count = scan().array.shape[2]
    assert f"(Lung, CT, {count} slices)" in line and f"(Soft, CT, {count} slices)" in line
    assert embed(weights, tmp_path / "run", "--input", tmp_path / "in", "--series", "lung", "--quiet") == 0
    save_slices(make_slices(scan(0)), tmp_path / "alone")
    assert embed(weights, tmp_path / "one", "--input", tmp_path / "alone", "--quiet") == 0
    np.testing.assert_array_equal(arrays_of(tmp_path / "run")["concat"], arrays_of(tmp_path / "one")["concat"])


def test_one_slice_is_no_scan(weights, tmp_path, capsys):
    paths = save_slices(make_slices(scan()), tmp_path / "in")
    assert embed(weights, tmp_path / "run", "--input", paths[3]) == 2
    assert f"give the folder of the whole series: {tmp_path / 'in'}" in only_line(capsys)


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_single_broken_file_ends_in_one_line_and_nothing_is_written(mistake, weights, scans, tmp_path, capsys):
    break_it, expected = MISTAKES[mistake]
    break_it(scans / "scan_0.nii.gz")
    assert embed(weights, tmp_path / "run", "--input", scans / "scan_0.nii.gz") == 2
    line = only_line(capsys)
    assert line.startswith("jaxmed: ") and ": expected " in line and ", found " in line
    assert expected in line and not (tmp_path / "run").exists()


def empty_folder(scans, weights):
    (scans / "none").mkdir()
    return ["--input", scans / "none"]


def manifest(text):
    def make(scans, weights):
        (scans / "other.csv").write_text(text)
        return ["--data.manifest", scans / "other.csv"]

    return make


def broken_weights(change):
    def make(scans, weights):
        copy = shutil.copytree(weights, scans / "weights")
        change(copy)
        return ["--input", scans, "--weights", copy]

    return make


def rename_family(folder):
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"family": "retfound"}))


OTHER_MISTAKES = {
    "empty folder": (empty_folder, "none in this folder"),
    "no such folder": (lambda s, w: ["--input", s / "nowhere"], "expected a volume or a folder of volumes"),
    "neither": (lambda s, w: [], "data.manifest, input: expected one of them, found neither"),
    "both": (lambda s, w: ["--input", s, "--data.manifest", s / "scans.csv"], "expected one of them, found both"),
    "empty manifest": (manifest("path,label\n"), "expected at least one record"),
    "no path": (manifest("file\nscan_0.nii.gz\n"), "expected a column 'path'"),
    "misspelt column": (manifest("path,lable\nscan_0.nii.gz,1\n"), "'lable'"),
    "all missing": (manifest("path\na.nii.gz\nb.nii.gz\n"), "2 of 2 missing"),
    "unknown split": (
        lambda s, w: ["--data.manifest", s / "scans.csv", "--data.split", "tset"],
        "expected rows with split 'tset', found only test",
    ),
    "no split": (
        lambda s, w: [*manifest("path\nscan_0.nii.gz\n")(s, w), "--data.split", "test"],
        "expected a column 'split'",
    ),
    "no weights": (lambda s, w: ["--input", s, "--weights", s / "nowhere"], "nowhere: expected"),
    "weights of another family": (broken_weights(rename_family), "retfound"),
    "weights cut off": (
        broken_weights(lambda f: (f / "parameters.safetensors").write_bytes(b"12345678")),
        "parameters.safetensors: expected",
    ),
    "a scan for weights": (lambda s, w: ["--input", s, "--weights", s / "scan_0.nii.gz"], "scan_0.nii.gz: expected"),
    "unknown kind": (lambda s, w: ["--input", s, "--kinds", "clas"], "kinds"),
    "no scans at a time": (lambda s, w: ["--input", s, "--batch.size", "0"], "batch"),
    "unknown axis order": (lambda s, w: ["--input", s, "--preprocess.axes", "zzz"], "preprocess.axes"),
}


@pytest.mark.parametrize("mistake", OTHER_MISTAKES)
def test_a_mistake_ends_in_one_line_and_nothing_is_written(mistake, weights, scans, tmp_path, capsys):
    make, expected = OTHER_MISTAKES[mistake]
    assert embed(weights, tmp_path / "run", *make(scans, weights)) == 2
    line = only_line(capsys)
    assert line.startswith("jaxmed: ") and expected in line
    assert not (tmp_path / "run").exists()


def test_a_missing_file_among_others_fails_alone(weights, scans, tmp_path):
    (scans / "some.csv").write_text("path\nscan_0.nii.gz\nnowhere.nii.gz\nscan_1.nii.gz\n")
    assert embed(weights, tmp_path / "run", "--data.manifest", scans / "some.csv", "--quiet") == 1
    assert [row["id"] for row in rows_of(tmp_path / "run" / "outputs" / "failed.csv")] == ["nowhere"]
    assert arrays_of(tmp_path / "run")["id"].tolist() == ["scan_0", "scan_1"]


def test_a_place_that_cannot_be_written_ends_in_one_line(weights, scans, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert embed(weights, tmp_path / "file" / "run", "--input", scans) == 2
    assert "expected a folder above it" in only_line(capsys)


def test_a_full_disk_stops_the_job_in_one_line(weights, scans, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    assert embed(weights, tmp_path / "run", "--input", scans, "--quiet") == 2
    assert "expected enough space to write, found no space left on device" in only_line(capsys)
