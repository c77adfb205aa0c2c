"""`jaxmed tangerine predict`: probabilities, maps on each scan's grid, scores where there are labels, and mistakes."""

import dataclasses
import json

import numpy as np
import pytest
from scan_files import MISTAKES, only_line, rows_of, write_dicom
from tiny_tangerine import (
    BINARY,
    CLASSES,
    LABELS,
    VALUES,
    axial,
    classifier,
    export,
    masked_autoencoder,
    scan,
    write_scans,
)

from jaxmed.cli import main
from jaxmed.io import nifti
from jaxmed.models.published.load import load_published
from jaxmed.recipes import map_files
from jaxmed.systems import tangerine
from jaxmed.volume import Volume


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return export(classifier(CLASSES), tmp_path_factory.mktemp("weights"))


@pytest.fixture
def scans(tmp_path):
    (tmp_path / "scans").mkdir()
    return write_scans(tmp_path / "scans").parent


def predict(weights, out, *words):
    # The report's pictures take most of the time; the smoke run looks at them.
    fixed = ["--weights", str(weights), "--out", str(out), "--shown", "0"]
    return main(["tangerine", "predict", *fixed, *map(str, words)])


def test_smoke_run_beats_chance_and_its_maps_look_into_the_body(tmp_path):
    out = tmp_path / "run"
    assert main(["tangerine", "predict", "--preset", "smoke", "--out", str(out), "--quiet"]) == 0
    summary = json.loads((out / "outputs" / "summary.json").read_text())
    area = next(row for row in summary["scores"] if row["measure"] == "auroc")
    assert area["estimate"] > 0.7 and area["rows"] == "split test" and area["low"] < area["estimate"] < area["high"]
    page = (out / "report.html").read_text()
    assert "What moved them" in page and "Against the labels" in page and "logistic probe" in page
    assert len(list((out / "outputs" / "maps").glob("*.nii.gz"))) == summary["scans"] == 18
    again = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0 and (out / "report.html").read_bytes() == again


def test_tables_and_maps_hold_what_the_python_call_returns(weights, scans, tmp_path):
    out, published = tmp_path / "run", classifier(CLASSES)
    words = ("--data.manifest", scans / "scans.csv", "--maps", "all", "--batch.size", 2, "--quiet")
    assert predict(weights, out, *words) == 0
    rows = rows_of(out / "outputs" / "predictions.csv")
    for row in rows:
        found = tangerine.predict(published, row["path"], "all")
        told = np.array([row[f"probability_{name}"] for name in CLASSES.names], np.float64)
        np.testing.assert_allclose(told, found.values, atol=1e-6)
        assert row["predicted"] == CLASSES.names[int(found.values.argmax())] and row["label"] in CLASSES.names
        for name, expected in zip(CLASSES.names, found.maps, strict=True):
            stem = out / "outputs" / "maps" / f"{row['id']}__{name}"
            stored = nifti.read(f"{stem}.nii.gz")
            np.testing.assert_allclose(stored.array, expected.array, atol=1e-5 * expected.array.max() + 1e-9)
            np.testing.assert_array_equal(stored.affine, nifti.read(row["path"]).affine)
            sidecar = json.loads((out / "outputs" / "maps" / f"{row['id']}__{name}.json").read_text())
            assert {"definition", "unit", "constants", "software"} <= sidecar.keys() and sidecar["output"] == name
            assert sidecar["value"] == pytest.approx(float(row[f"probability_{name}"]), abs=1e-6)
    assert len(rows) == 5 and not (out / "checkpoints").exists()


ROTATION = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0.0], [0.48, 0.64, 0.6]])


def test_maps_keep_the_affine_of_oblique_flipped_and_anisotropic_scans(weights, tmp_path):
    folder = tmp_path / "in"
    affines = {
        "flipped": np.diag([2.0, -2.0, -3.0, 1.0]),
        "anisotropic": np.diag([-0.7, -0.7, 10.0, 1.0]),
        "permuted": np.diag([-2.0, -2.0, 3.0, 1.0])[:, [2, 0, 1, 3]],
        "oblique": np.vstack([np.hstack([ROTATION * [1.5, 0.9, 4.0], [[5.0], [-7.0], [11.0]]]), [0, 0, 0, 1]]),
    }
    for name, affine in affines.items():
        nifti.write(folder / f"{name}.nii.gz", scan(shape=(11, 24, 7), affine=affine))
    assert predict(weights, tmp_path / "run", "--input", folder, "--quiet") == 0
    for row in rows_of(tmp_path / "run" / "outputs" / "predictions.csv"):
        (path,) = (tmp_path / "run" / "outputs" / "maps").glob(f"{row['id']}__*.nii.gz")
        found, expected = nifti.describe(path), nifti.describe(folder / f"{row['id']}.nii.gz")
        for name in ("shape", "spacing", "orientation", "form", "sform_code", "qform_code"):
            assert found[name] == expected[name]
        one, other = nifti.read(path), nifti.read(folder / f"{row['id']}.nii.gz")
        np.testing.assert_array_equal(one.affine, other.affine)  # every bit
        assert ("axis D" in row["warnings"]) == (row["id"] in ("permuted", "oblique"))


def test_cubes_and_dicom_get_maps_too(weights, tmp_path):
    folder = tmp_path / "in"
    (folder / "series").mkdir(parents=True)
    write_dicom(folder / "series", scan())
    np.savez(folder / "cube.npz", volume=classifier().preprocess(scan()))
    assert predict(weights, tmp_path / "run", "--input", folder, "--quiet") == 0
    cube, series = rows_of(tmp_path / "run" / "outputs" / "predictions.csv")
    assert cube["predicted"] == series["predicted"]
    maps = {path.name.split("__")[0]: path for path in (tmp_path / "run" / "outputs" / "maps").glob("*.nii.gz")}
    stored = nifti.read(maps["series"])
    assert stored.array.shape == (20, 18, 9)
    np.testing.assert_allclose(stored.affine, axial(), atol=1e-5)
    assert nifti.read(maps["cube"]).array.shape == (16, 16, 16)
    sidecar = json.loads(maps["cube"].with_name(maps["cube"].name.replace(".nii.gz", ".json")).read_text())
    assert sidecar["frame"] == "the model's own axes (slice, row, column)"


@pytest.mark.parametrize(
    ("task", "label", "measure"),
    [(BINARY, "01010", "auroc nodule"), (LABELS, None, "auroc emphysema"), (VALUES, "56789", "correlation age")],
)
def test_every_task_is_scored_and_written(task, label, measure, scans, tmp_path):
    lines = ["path,subject,label,nodule,emphysema"]
    lines += [f"scan_{n}.nii.gz,s{n},{(label or '00000')[n]},{n % 2},{'' if n == 4 else n // 2}" for n in range(5)]
    if task is not LABELS:
        lines = [line.rsplit(",", 2)[0] for line in lines]
    (scans / "task.csv").write_text("\n".join(lines).replace(",2\n", ",1\n") + "\n")
    own = export(classifier(task), tmp_path / "weights")
    words = ("--data.manifest", scans / "task.csv", "--maps", "none", "--quiet")
    assert predict(own, tmp_path / "run", *words) == 0
    summary = json.loads((tmp_path / "run" / "outputs" / "summary.json").read_text())
    scores = {f"{row['measure']} {row['label']}": row for row in summary["scores"]}
    assert measure in scores, summary["notes"]
    rows = rows_of(tmp_path / "run" / "outputs" / "predictions.csv")
    if task is VALUES:
        told = np.array([row["value_age"] for row in rows], np.float64)
        expected = np.corrcoef(told, [5, 6, 7, 8, 9])[0, 1]
        assert [float(row["predicted"]) for row in rows] == pytest.approx(told, rel=1e-5)
    else:
        name = task.names[-1]
        told = np.array([row[f"probability_{name}"] for row in rows], np.float64)
        truth = np.array([int(x) for x in (label or "0011")])
        pairs = told[: len(truth)][truth == 1][:, None] - told[: len(truth)][truth == 0]
        expected = (pairs > 0).mean()
    assert scores[measure]["estimate"] == pytest.approx(expected, abs=1e-6)
    assert not (tmp_path / "run" / "outputs" / "maps").exists()


def test_one_class_only_is_said_and_does_not_stop_the_predictions(weights, scans, tmp_path):
    text = (scans / "scans.csv").read_text().replace("nodule", "healthy").replace("emphysema", "healthy")
    (scans / "one.csv").write_text(text)
    assert predict(weights, tmp_path / "run", "--data.manifest", scans / "one.csv", "--quiet", "--maps", "none") == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "were not scored: labels: expected rows of each of the 3 classes, found none of class 1" in log


def test_a_broken_file_does_not_stop_the_others(weights, scans, tmp_path):
    MISTAKES["truncated"][0](scans / "scan_1.nii.gz")
    words = ("--data.manifest", scans / "scans.csv", "--batch.size", 2, "--quiet")
    assert predict(weights, tmp_path / "run", *words) == 1
    assert [row["id"] for row in rows_of(tmp_path / "run" / "outputs" / "failed.csv")] == ["scan_1"]
    rows = rows_of(tmp_path / "run" / "outputs" / "predictions.csv")
    assert [row["id"] for row in rows] == ["scan_0", "scan_2", "scan_3", "scan_4"]
    assert len(list((tmp_path / "run" / "outputs" / "maps").glob("*.nii.gz"))) == 4


def test_weights_that_give_no_numbers_fail_every_scan(scans, tmp_path):
    published = classifier(CLASSES)
    published.params["head"]["linear"]["kernel"][:] = 3e38  # finite, and its products are not
    own = export(published, tmp_path / "weights")
    assert predict(own, tmp_path / "run", "--input", scans, "--quiet") == 1
    failed = rows_of(tmp_path / "run" / "outputs" / "failed.csv")
    assert len(failed) == 5 and "expected finite maps from the model" in failed[0]["reason"]
    assert (tmp_path / "run" / "report.html").exists()


def test_an_interrupted_run_continues_to_the_same_tables(weights, scans, tmp_path, monkeypatch):
    words = ("--data.manifest", scans / "scans.csv", "--batch.size", 2, "--quiet")
    assert predict(weights, tmp_path / "whole", *words) == 0
    store, calls = map_files._store, []

    def store_twice_then_die(path, outcomes):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        store(path, outcomes)

    with monkeypatch.context() as patch:
        patch.setattr(map_files, "_store", store_twice_then_die)
        assert predict(weights, tmp_path / "run", *words) == 130
    assert predict(weights, tmp_path / "run", *words) == 0
    one, other = ((tmp_path / run / "outputs" / "predictions.csv").read_text() for run in ("whole", "run"))
    assert one == other
    for path in (tmp_path / "whole" / "outputs" / "maps").iterdir():
        assert path.read_bytes() == (tmp_path / "run" / "outputs" / "maps" / path.name).read_bytes()


def test_half_precision_is_close(weights, scans, tmp_path):
    words = ("--input", scans, "--maps", "none", "--quiet")
    assert predict(weights, tmp_path / "full", *words) == 0
    assert predict(weights, tmp_path / "half", *words, "--dtype", "bfloat16", "--mesh.data", 2) == 0
    one, other = (
        [float(row["probability_nodule"]) for row in rows_of(tmp_path / run / "outputs" / "predictions.csv")]
        for run in ("full", "half")
    )
    assert one != other and np.abs(np.subtract(one, other)).max() < 0.02


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mistake", ["missing", "four dimensions", "not a number", "constant", "singular affine"])
def test_a_single_broken_file_ends_in_one_line_and_nothing_is_written(mistake, weights, scans, tmp_path, capsys):
    break_it, expected = MISTAKES[mistake]
    break_it(scans / "scan_0.nii.gz")
    assert predict(weights, tmp_path / "run", "--input", scans / "scan_0.nii.gz") == 2
    assert expected in only_line(capsys) and not (tmp_path / "run").exists()


def unknown_label(scans, weights):
    (scans / "scans.csv").write_text((scans / "scans.csv").read_text().replace("emphysema", "fibrosis"))
    return weights, ["--data.manifest", scans / "scans.csv"]


def autoencoder(scans, weights):
    return export(masked_autoencoder(), scans / "mae"), ["--input", scans]


def without_meaning(scans, weights):
    return export(dataclasses.replace(classifier(CLASSES), task=None), scans / "bare"), ["--input", scans]


OTHER_MISTAKES = {
    "a label of another task": (unknown_label, "expected one of healthy, nodule, emphysema, found 'fibrosis'"),
    "a masked autoencoder": (autoencoder, "adapt it on labels first: jaxmed tangerine adapt"),
    "a head without a meaning": (without_meaning, "give --task.kind and --task.names"),
    "names without a kind": (lambda s, w: (w, ["--input", s, "--task.names", "a"]), "names"),
    "another number of names": (
        lambda s, w: (w, ["--input", s, "--task.kind", "multiclass", "--task.names", "a", "b"]),
        "3 names",
    ),
    "a threshold that is none": (lambda s, w: (w, ["--input", s, "--threshold", "50"]), "threshold"),
    "no weights": (lambda s, w: (s / "nowhere", ["--input", s]), "nowhere: expected"),
    "a batch that does not divide": (
        lambda s, w: (w, ["--input", s, "--mesh.data", "3"]),
        "batch.size: expected a multiple of the 3 devices along data",
    ),
    "more devices than there are": (lambda s, w: (w, ["--input", s, "--mesh.data", "99"]), "mesh"),
}


@pytest.mark.parametrize("mistake", OTHER_MISTAKES)
def test_a_mistake_ends_in_one_line_and_nothing_is_written(mistake, weights, scans, tmp_path, capsys):
    make, expected = OTHER_MISTAKES[mistake]
    own, words = make(scans, weights)
    assert predict(own, tmp_path / "run", *words) == 2
    assert expected in only_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_head_gets_its_meaning_from_the_command_line(scans, tmp_path):
    bare = export(dataclasses.replace(classifier(CLASSES), task=None), tmp_path / "bare")
    assert load_published(bare).task is None
    words = ("--input", scans, "--task.kind", "multilabel", "--task.names", "a", "b", "c", "--quiet", "--maps", "none")
    assert predict(bare, tmp_path / "run", *words) == 0
    row = rows_of(tmp_path / "run" / "outputs" / "predictions.csv")[0]
    above = [name for name in "abc" if float(row[f"probability_{name}"]) >= 0.5]
    assert row["predicted"] == "; ".join(above)


def test_real_scans_get_maps_on_their_grids(shared_data, weights, tmp_path):
    places = [shared_data / "chest_ct_heart" / "ct_thorax_crop.nii.gz", shared_data / "abdomen_ct"]
    for number, place in enumerate(places):
        assert predict(weights, tmp_path / str(number), "--input", place, "--quiet") == 0
        (row,) = rows_of(tmp_path / str(number) / "outputs" / "predictions.csv")
        (path,) = (tmp_path / str(number) / "outputs" / "maps").glob("*.nii.gz")
        one, other = nifti.read(path), nifti.read(row["path"])
        assert isinstance(one, Volume) and one.array.shape == other.array.shape
        np.testing.assert_array_equal(one.affine, other.affine)
