"""The reproduction of the RETFound study: pictures, contrasts and verdicts; a run of seconds, and its smoke size."""

import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from jaxmed.io.images import read_image
from jaxmed.recipes.study import Cell, Result
from jaxmed.recipes.study_tables import compare

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture(scope="module")
def reproduce():
    return importlib.import_module("reproduce_retfound")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write archives as they are published, smaller: eyes are redder with every grade."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def draw(count, *channels):
        return rng.integers(0, 150, (count, 28, 28, *channels), np.uint8)

    for name in ("retinamnist", "mnist_digits", "pneumoniamnist_subset"):
        (folder / name).mkdir()
    eyes = {}
    for split, count in (("train", 54), ("val", 20)):
        grades = (np.arange(count) % 5).astype(np.uint8)[:, None]
        eyes |= {f"{split}_images": draw(count, 3), f"{split}_labels": grades}
        eyes[f"{split}_images"][..., 0] += 20 * grades[:, :, None]
    np.savez(folder / "retinamnist" / "retinamnist_trainval.npz", **eyes)
    np.savez(folder / "mnist_digits" / "mnist_t10k_first6600.npz", images=draw(40))
    np.savez(folder / "pneumoniamnist_subset" / "pneumonia_trainval.npz", train_images=draw(30))
    return folder


@pytest.fixture(scope="module")
def pictures(reproduce, data, tmp_path_factory):
    return reproduce.write_pictures(data, tmp_path_factory.mktemp("pictures"), 0)


def test_pictures_are_written_by_split_and_grade(reproduce, data, pictures):
    assert pictures.counts == {"train": 49, "select": 5, "test": 20, "generic": 70}
    for split, count in (("train", 49), ("val", 5), ("test", 20)):
        assert len(list((pictures.labelled / split).rglob("*.png"))) == count
        assert {place.name for place in (pictures.labelled / split).iterdir()} == set("01234")
    with np.load(data / "retinamnist" / "retinamnist_trainval.npz") as eyes:
        found = read_image(pictures.labelled / "test" / "2" / "test7.png")
        np.testing.assert_array_equal(np.rint(255 * found), eyes["val_images"][7])
    # The other camera sees the same eyes in other colours.
    here, there = (
        np.mean([read_image(path).mean(axis=(0, 1)) for path in sorted(place.rglob("*.png"))], axis=0)
        for place in (pictures.labelled / "test", pictures.camera)
    )
    np.testing.assert_allclose(there / here, reproduce.OTHER_CAMERA.tint, rtol=0.03)


def make_results(reproduce, shift):
    """Return cells of two encoders whose scores tell grades as well as `shift` says."""
    rng, results = np.random.default_rng(0), []
    labels = np.repeat(np.arange(5), 8)
    for arm, gain in (("specialist-dinov2", shift), ("generalist-dinov2", 0.0)):
        for seed in range(5):
            scores = rng.random((40, 5)) + (0.3 + gain) * np.eye(5)[labels]
            area = np.mean([roc_auc_score(labels == grade, scores[:, grade]) for grade in range(5)])
            key = (("mode", "full"), ("arm", arm), ("fraction", 1.0), ("seed", seed))
            subjects = [
                {"subject": str(n), "label": str(label)} | {f"output {g}": float(row[g]) for g in range(5)}
                for n, (label, row) in enumerate(zip(labels, scores, strict=True))
            ]
            results.append(Result(Cell(key), {"auroc_macro": float(area)}, subjects))
    return results


@pytest.mark.parametrize("shift,verdict", [(0.5, "holds"), (0.0, "does not hold"), (-0.3, "does not hold")])
def test_a_sentence_holds_where_the_interval_over_seeds_lies_above_zero(reproduce, shift, verdict):
    rows = compare(make_results(reproduce, shift), ("mode", "fraction"), "generalist-dinov2", "auroc_macro")
    found, told = reproduce.judge(rows)
    assert found == verdict and "fine-tuned, 100%" in told
    assert reproduce.judge(rows, most=0.5)[0] == "cannot be tested here"


def test_intervals_over_pictures_are_of_the_mean_difference(reproduce):
    results = make_results(reproduce, 0.5)
    arms = "specialist-dinov2", "generalist-dinov2"
    (row,) = compare(results, ("mode", "fraction"), arms[1], "auroc_macro")
    found = reproduce.over_pictures(results, row)
    means = [np.mean([one.metrics["auroc_macro"] for one in results if one.cell["arm"] == arm]) for arm in arms]
    assert found.estimate == pytest.approx(means[0] - means[1], abs=1e-12)
    assert found.low < found.estimate < found.high < 0.5


def test_where_seeds_change_nothing_the_interval_over_pictures_decides(reproduce):
    results = make_results(reproduce, 0.5)
    same = [one._replace(cell=Cell((*one.cell.key[:3], ("seed", seed)))) for one in results[::5] for seed in range(3)]
    (row,) = compare(same, ("mode", "fraction"), "generalist-dinov2", "auroc_macro")
    assert row.p_value is None and reproduce.judge([row])[1].endswith("no interval")
    found = reproduce.with_interval(row, same)
    assert found.low < row.difference < found.high
    verdict, told = reproduce.judge([found])
    assert told.endswith("over pictures") and verdict == ("holds" if found.low > 0 else "does not hold")


def test_encoders_that_are_the_same_do_not_differ(reproduce, pictures, tmp_path):
    """All are drawn from the same seeds here: what stages, cells and tables do between them adds no difference."""
    size = dataclasses.replace(reproduce.SIZES["smoke"], fractions=(1.0,))
    encoders = dict.fromkeys(reproduce.ENCODERS, "random")
    results = reproduce.adapt_all(size, encoders, pictures, tmp_path / "run", modes=("logistic",))
    assert len(results) == 6 * 2
    contrasts = reproduce.compare_all(results)
    assert {row.difference for rows in contrasts.values() for row in rows} == {0.0}
    page = reproduce.render(contrasts, results, pictures.counts, "smoke", 60.0, 0.0)
    assert page.count("| does not hold |") == 7 and page.count("| cannot be tested here |") == 4
    assert "probed, 100%: +0.000 [+0.000, +0.000]" in page
    assert "| random | probed | 100% |" in page and "49 eyes to learn from" in page
    assert all(line.count("|") == page.splitlines()[n + 1].count("|") for n, line in enumerate(page.splitlines())
               if line.startswith(("| sentence", "| contrast", "| encoder")))  # fmt: skip


@pytest.mark.slow
def test_the_smoke_size_runs_and_goes_on_where_it_was(reproduce, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXMED_DATA", str(data))
    reproduce.main("smoke", tmp_path / "first", tmp_path / "work")
    page = (tmp_path / "first" / "reproduce_retfound.md").read_text()
    assert "specialist-mae - generalist-mae, fine-tuned, 50%" in page
    capsys.readouterr()
    reproduce.main("smoke", tmp_path / "second", tmp_path / "work")
    assert capsys.readouterr().out.count("Complete already") == 6
    again = (tmp_path / "second" / "reproduce_retfound.md").read_text()
    assert "With all labels fine-tuning ends at 0." in page
    assert again.splitlines()[4:] == page.splitlines()[4:]
