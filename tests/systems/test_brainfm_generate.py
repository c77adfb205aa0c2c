"""Stage generate: a store and a gallery from phantom heads, from files, and what is refused."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from bad_files import BAD, write_bad_files

from jaxmed.cli import main
from jaxmed.data.subject_store import open_store
from jaxmed.io import nifti
from jaxmed.synthesis.brain import generate
from jaxmed.systems.brainfm.stages.generate import smoke
from jaxmed.volume import Volume

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A smoke run on phantom heads."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    assert main(["brainfm", "generate", "--preset", "smoke", "--out", str(folder), "--quiet"]) == 0
    return folder


def test_a_smoke_run_leaves_a_store_images_targets_and_a_page(run):
    store = open_store(run / "outputs" / "store")
    assert len(store) == 3 and store.channels == 1 and len(store.table.classes) == 35
    subject = store[0]
    assert {"labels", "segmentation", "distances", "coordinates", "images"} <= set(subject)
    summary = json.loads((run / "outputs" / "summary.json").read_text())
    assert summary["modalities"] == ["T1"] and len(summary["images"]) == 3
    assert all(overlap > 0.6 for overlap in summary["overlaps"].values())
    name = summary["images"][0]["name"]
    image = nifti.read(run / "outputs" / "images" / f"{name}_image.nii.gz").array
    assert image.shape == (40, 48, 40) and image.max() == 1
    assert nifti.read(run / "outputs" / "images" / f"{name}_distance.nii.gz").array.shape == (40, 48, 40, 4)
    assert json.loads((run / "outputs" / "images" / f"{name}_distance.json").read_text())["unit"] == "mm"
    page = (run / "report.html").read_text()
    assert all(word in page for word in ("Contrasts", "Severities", "Targets", "Subjects"))


def test_coordinates_are_in_millimetres_of_the_template(run):
    """The middle of a head is near the middle of the ellipsoids, and x grows to the right."""
    subject = open_store(run / "outputs" / "store")[0]
    size = subject["size"]
    place = subject["coordinates"] / 100
    brain = subject["segmentation"][: size[0], : size[1], : size[2]] > 0
    middle = place[: size[0], : size[1], : size[2]][brain].mean(0)
    assert np.abs(middle - [0, -16, 4]).max() < 25
    steps = np.diff(place[:, size[1] // 2, size[2] // 2, 0])[: size[0] - 1]
    assert (steps > 2).all()  # voxels of 1 mm of a head that is a quarter as large


def test_the_python_call_draws_what_the_stage_wrote(run):
    store = open_store(run)
    config = dataclasses.replace(smoke().generator, samples=2, mild_samples=1)
    draw = jax.jit(functools.partial(generate, config=config))
    image, targets = draw(jax.random.fold_in(jax.random.key(0), 0), store[0])
    place = run / "outputs" / "images"
    np.testing.assert_array_equal(image[1, ..., 0], nifti.read(place / f"{store.names[0]}_0_image.nii.gz").array)
    np.testing.assert_array_equal(
        targets["segmentation"], nifti.read(place / f"{store.names[0]}_0_segmentation.nii.gz", dtype=np.int32).array
    )


def test_a_store_is_an_input_and_bad_subjects_do_not_stop_the_others(tmp_path, run, capsys):
    heads = run / "inputs" / "heads" / "labels"
    folder = tmp_path / "maps"
    folder.mkdir()
    good = nifti.read(sorted(heads.iterdir())[0], dtype=np.int32)
    nifti.write(folder / "good.nii.gz", Volume.make(good.array.astype(np.int16), good.affine))
    nifti.write(
        folder / "odd.nii.gz", Volume.make((good.array + 2000 * (good.array > 0)).astype(np.int16), good.affine)
    )
    (folder / "cut.nii.gz").write_bytes((folder / "good.nii.gz").read_bytes()[:500])
    write_bad_files(folder, good.array)
    turn = np.deg2rad(15.0)
    oblique = np.eye(4)
    oblique[:2, :2], oblique[:3, 3] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]], (20.0, -8.0, 5.0)
    nifti.write(folder / "oblique.nii.gz", Volume.make(good.array.astype(np.int16), oblique @ good.affine))
    words = ["--preset", "smoke", "--input", str(folder), "--store", "--out", str(tmp_path / "store"), "--quiet"]
    assert main(["brainfm", "generate", *words]) == 1
    failed = (tmp_path / "store" / "outputs" / "failed.csv").read_text()
    for word in ("odd", "cut", *BAD):
        assert f"{word}.nii.gz" in failed, failed
    assert "labels of the table freesurfer" in failed and all(reason in failed for reason in BAD.values()), failed
    store = open_store(tmp_path / "store" / "outputs" / "store")
    assert store.names == ("good", "oblique")
    # One head, once turned in the scanner: the same voxels, and the same places in MNI space but for the alignment.
    upright, turned = store[0], store[1]
    np.testing.assert_array_equal(turned["segmentation"], upright["segmentation"])
    np.testing.assert_array_equal(turned["distances"], upright["distances"])
    np.testing.assert_allclose(store.affine(1), oblique @ store.affine(0), atol=1e-4)
    brain = upright["segmentation"] > 0
    error = np.linalg.norm((turned["coordinates"] - upright["coordinates"])[brain] / 100, axis=-1)
    assert np.median(error) < 10
    assert not (tmp_path / "store" / "outputs" / "images").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "{absent}"], "expected a label map, or a folder of them, found no such file"),
        (["--table", "{absent}"], "absent"),
        (["--generator.mild-samples", "3"], "mild_samples: expected at most samples, found 3 of 1"),
        (["--template", "{absent}"], "template: expected two files: grey and white matter, found 1"),
        (["--table", "{uneven}"], "uneven.csv: expected as many left as right classes, found 2 left and 1 right"),
        (["--input", "{odd}"], "odd.nii.gz: expected labels of the table freesurfer, found 2002"),
        (["--data.manifest", "{empty}"], "empty.csv"),
        (["--data.manifest", "{column}"], "column.csv"),
        (["--data.manifest", "{twice}"], "twice.csv"),
        ([], "data.manifest, input: expected one of them, found neither"),
    ],
)
def test_mistakes_are_told_before_any_work(tmp_path, capsys, words, message):
    labels = np.zeros((8, 9, 10), np.int16)
    labels[2:6, 2:6, 2:6] = 2002
    nifti.write(tmp_path / "odd.nii.gz", Volume.make(labels, np.eye(4)))
    (tmp_path / "uneven.csv").write_text("label,name,side\n0,none,\n1,left a,left\n2,left b,left\n3,right a,right\n")
    (tmp_path / "empty.csv").write_text("path,subject\n")
    (tmp_path / "column.csv").write_text("file\nodd.nii.gz\n")
    (tmp_path / "again.nii.gz").write_bytes((tmp_path / "odd.nii.gz").read_bytes())
    (tmp_path / "twice.csv").write_text("path,subject,split\nodd.nii.gz,one,train\nagain.nii.gz,one,test\n")
    files = {name: tmp_path / f"{name}.csv" for name in ("uneven", "empty", "column", "twice")}
    files |= {"absent": tmp_path / "absent", "odd": tmp_path / "odd.nii.gz"}
    options = [word.format(**files) for word in words]
    preset = ["--preset", "smoke"] if words else []
    assert main(["brainfm", "generate", *preset, *options, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
