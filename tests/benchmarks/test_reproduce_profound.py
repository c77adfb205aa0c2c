"""The reproduction of the quality study: photographs and their splits, and verdicts on cells of a formula."""

import csv
import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxmed.io.images import read_image
from jaxmed.recipes.quality_findings import derive, mixed_model
from jaxmed.recipes.quality_grid import by_test_set
from jaxmed.recipes.study import Result, make_cells

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
SHARES, LABELS = (0.0, 0.5, 1.0), (0.25, 1.0)


@pytest.fixture(scope="module")
def reproduce():
    return importlib.import_module("reproduce_profound")


def test_photographs_are_split_within_every_grade(reproduce, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "retinamnist").mkdir()
    grades = {split: (np.arange(count) % 5).astype(np.uint8)[:, None] for split, count in (("train", 45), ("val", 15))}
    np.savez(tmp_path / "retinamnist" / "retinamnist_trainval.npz", **{
        **{f"{split}_labels": labels for split, labels in grades.items()},
        **{f"{split}_images": rng.integers(0, 255, (len(labels), 28, 28, 3), np.uint8)
           for split, labels in grades.items()},
    })  # fmt: skip
    manifest = reproduce.write_eyes(tmp_path, tmp_path / "eyes", 0)
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60 and len(list((tmp_path / "eyes").glob("*.png"))) == 60
    assert sum(row["any"] == "1" for row in rows) == 48 and sum(row["referable"] == "1" for row in rows) == 36
    tests = [row for row in rows if row["split"] == "test"]
    assert len(tests) == 20 and sum(row["any"] == "0" for row in tests) == 4
    assert {row["split"] for row in rows} == {"train", "validation", "test"}


def test_chests_are_as_many_as_eyes_and_classes_keep_their_shares(reproduce, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pneumoniamnist_subset").mkdir()
    labels = {split: (np.arange(count) % 2).astype(np.uint8)[:, None] for split, count in (("train", 90), ("val", 30))}
    images = {split: rng.integers(0, 255, (len(found), 28, 28), np.uint8) for split, found in labels.items()}
    np.savez(tmp_path / "pneumoniamnist_subset" / "pneumonia_trainval.npz", **{
        **{f"{split}_labels": found for split, found in labels.items()},
        **{f"{split}_images": found for split, found in images.items()},
    })  # fmt: skip
    manifest = reproduce.write_chests(tmp_path, tmp_path / "chests", 60)
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60 and sum(row["pneumonia"] == "1" for row in rows) == 30
    assert sum(row["split"] == "test" for row in rows) == 20
    assert sum(row["split"] == "test" and row["pneumonia"] == "1" for row in rows) == 10
    pictures, classes = reproduce.read_medmnist(tmp_path / "pneumoniamnist_subset" / "pneumonia_trainval.npz")
    kept, their = reproduce.thinned(pictures, classes, 60)
    first = read_image(tmp_path / "chests" / "chest0000.png")
    assert first.shape == (28, 28, 3) and int(rows[0]["pneumonia"]) == their[0]
    np.testing.assert_allclose(first[..., 0], kept[0] / 255, atol=1e-6)
    everything, _ = reproduce.thinned(pictures, classes, 500)
    assert len(everything) == 120


def test_both_tasks_are_studied_in_the_same_shape(reproduce):
    for size in reproduce.SIZES.values():
        assert size.tasks == ("any", "pneumonia") and set(size.tasks) <= set(reproduce.TASKS) == set(reproduce.PICTURES)


def task(reproduce, metric):
    cells = make_cells({"arm": ("pretrained", "scratch"), "labels": LABELS, "tuned_high": SHARES, "seed": (0, 1, 2)})
    results = by_test_set([
        Result(cell, {"records": 8.0, **{f"auroc at {t:g}": metric(*(value for _, value in cell.key), t)
                                         for t in SHARES}}, [])
        for cell in cells
    ])  # fmt: skip
    return reproduce.Task(results, derive(results, "auroc"), mixed_model(results, "auroc"), 8, 1.0)


def test_verdicts_are_those_of_the_formula(reproduce):
    def as_published(penalty, more):
        def metric(arm, labels, high, seed, test):
            rest = 0.6 + 0.04 * math.log2(labels) + 0.1 * high + 0.001 * seed
            gain = 0.2 * high + 0.001 * seed * (-1) ** seed if arm == "pretrained" else 0.0
            return rest + gain - (penalty + more * seed) * abs(high - test)

        return task(reproduce, metric)

    tasks = {"any": as_published(0.05, 0.001), "pneumonia": as_published(0.01, 0.002)}
    rows = reproduce.judge(tasks)
    assert [verdict for _, verdict, _ in rows] == ["holds"] * 5
    page = reproduce.render(rows, tasks, "cpu", 1.0)
    assert "| (5) without enough" in page and "| good in fine-tuning | test 0% | test 50% | test 100% |" in page
    alone = reproduce.judge({"any": tasks["any"]})
    assert alone[2][1] == "cannot be tested here"
    nothing = task(reproduce, lambda arm, labels, high, seed, test: 0.7 + 0.001 * seed)
    assert {verdict for _, verdict, _ in reproduce.judge({"any": nothing, "pneumonia": nothing})} == {"does not hold"}
