"""The reproduction of CoCoLIT: verdicts on scores of a formula, and patients on one grid."""

import csv
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxmed.config import to_record
from jaxmed.io import nifti
from jaxmed.recipes.paired_maps import MEASURED, Measured, score_pairs
from jaxmed.volume import Volume

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture(scope="module")
def reproduce():
    return importlib.import_module("reproduce_cocolit")


def summary(reproduce, level, steering, ahead, follows):
    """Make a run's summary: images as good as `level`, better than with another's MRI and than pix2pix by so much."""
    rng, rows = np.random.default_rng(0), []
    truth = np.tile([1.0, 1.6], 10) + 0.01 * rng.normal(size=20)
    found = truth if follows else truth[rng.permutation(20)]
    for number in range(20):
        levels = {reproduce.OURS: level, reproduce.OTHER: level - steering, reproduce.BASELINE: level - ahead}
        noise = 0.01 * rng.normal()
        images = {
            method: {"ssim": value + noise, "psnr": 10 * (value + noise), "mse": 0.1}
            for method, value in levels.items()
        }
        means = {MEASURED: float(truth[number]), reproduce.OURS: float(found[number]) + 0.01 * number % 3}
        means |= {reproduce.OTHER: 1.2 + 0.01 * number, reproduce.BASELINE: 1.2 + 0.02 * number}
        further = {"averages, correlation": 0.999, "bias, rms": 0.01}
        rows.append(Measured(f"{number:05d}", "", (), f"s{number}", images, {"cortical": means}, further))
    lines, _ = score_pairs(rows, 1.326, 0)
    return {"pairs": [to_record(row) for row in rows], "scores": [to_record(one) for one in lines]}


def test_verdicts_are_those_of_the_formula(reproduce):
    levels = {"base": 0.5, "+ISL": 0.6, "+WISL": 0.65, "+LAS+ISL": 0.7, "+LAS+WISL": 0.75}
    arms = {name: summary(reproduce, level, 0.1, 0.1, follows=True) for name, level in levels.items()}
    control = summary(reproduce, 0.6, 0.0, 0.1, follows=False)
    rows = reproduce.judge(arms, control)
    assert [row[1] for row in rows] == ["holds", "holds", "see figure", "holds", "holds", "holds", "holds"]
    page = reproduce.render(rows, arms, control, [], "cpu", 1.0, 60.0)
    assert "| +LAS+WISL | 0.75" in page and "0.896, 24.14, 62.3 %" in page and "were not looked at" in page
    flat = dict.fromkeys(levels, summary(reproduce, 0.6, 0.0, 0.0, follows=True))
    rows = reproduce.judge(flat, flat["base"])
    assert {row[1] for row in (rows[0], rows[1], rows[3], rows[4], rows[5])} == {"does not hold"}
    text = reproduce.patients_text(arms["base"]["pairs"][:5])
    assert text.startswith("5 patients") and "SSIM 0.5" in text


def test_patients_stand_on_one_grid_about_their_tumour(reproduce, tmp_path):
    for number, name in enumerate(("STS_1", "STS_2", "STS_3")):
        for kind, spacing in (("mr_t1", 2.0), ("pet", 5.0)):
            shape = (40, 40, 40) if kind == "mr_t1" else (20, 20, 20)
            array = np.full(shape, number + 1.0, np.float32)
            array[shape[0] // 2] += 1  # images vary
            nifti.write(tmp_path / name / f"{kind}_image.nii.gz", Volume.make(array, np.diag([spacing] * 3 + [1.0])))
            mask = np.zeros(shape, np.uint8)
            mask[shape[0] // 2 - 1 : shape[0] // 2 + 2, 10:13, 10:13] = 1
            nifti.write(tmp_path / name / f"{kind}_mask.nii.gz", Volume.make(mask, np.diag([spacing] * 3 + [1.0])))
    names = ["STS_1", "STS_2", "STS_3"]
    manifest, moments = reproduce.write_patients(tmp_path, names, "STS_2", tmp_path / "pairs")
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train", "test", "train"]
    pair = [nifti.read(manifest.parent / rows[0][column]) for column in ("scan_path", "suvr_path")]
    assert pair[0].array.shape == pair[1].array.shape == (24, 24, 24)
    np.testing.assert_allclose(pair[0].affine, pair[1].affine)
    middle = pair[0].affine @ [11.5, 11.5, 11.5, 1]
    np.testing.assert_allclose(middle[:3], [40, 22, 22], atol=1e-4)
    assert set(moments) == {"mri", "suvr"} and moments["mri"][1] > 0


@pytest.mark.slow
def test_trained_networks_listen_to_the_mri_and_average_well(reproduce, tmp_path):
    """Section (i) 10 of the specification, on few phantoms: the MRI steers, averages are closer, positivity is told.

    The negative control is at chance: nothing in its MRI tells of the PET.
    """
    size = reproduce.Size(60, reproduce.Steps(500, 1000, 800, 300), reproduce.Steps(1, 1, 1, 1), 8, 20)
    arms = reproduce.on_phantoms(size, tmp_path / "linked", linked=True)
    last, single = arms["+LAS+WISL"], arms["+WISL"]
    assert reproduce.gain(last, last, "psnr", other=reproduce.OTHER).low > 0
    assert reproduce.gain(last, single, "psnr").low > 0 and reproduce.gain(last, single, "ssim").low > 0
    assert reproduce.line(last, "positivity balanced_accuracy")["estimate"] > 0.7
    assert reproduce.line(last, "cortical correlation")["estimate"] > 0.5
    shuffled = reproduce.line(last, "cortical correlation", reproduce.OTHER)
    assert shuffled is None or abs(shuffled["estimate"]) < 0.5
    control = reproduce.on_phantoms(size, tmp_path / "control", linked=False)["+LAS+WISL"]
    chance = reproduce.line(control, "cortical correlation")
    assert chance is None or chance["low"] is None or chance["low"] <= 0 <= chance["high"]
