"""The verdicts of benchmarks/reproduce_mupm.py on figures whose verdicts are known."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def reproduce():
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    try:
        yield importlib.import_module("reproduce_mupm")
    finally:
        sys.path.pop(0)


def figures(reproduce, r2=0.8, low=0.7, five=0.75, rank=0.95, bmi="redundant", **transfers):
    fitted = {
        "held_out": {"r2": (r2, low, 0.9)}, "ablations": {"V_I, V_T": 0.7}, "rank_correlation": rank,
        "calls": {"measured": 63, "predicted": 41}, "coefficients": {"image": (1, 0.9, 1.1)}, "accuracy": 0.7,
    }  # fmt: skip
    few = [{"cases": "1", "r2": ""}, {"cases": "5", "r2": str(five), "r2_low": "0.5", "r2_high": "0.8"},
           {"cases": "20", "r2": "0.8", "r2_low": "0.7", "r2_high": "0.9"}]  # fmt: skip
    rows = [
        {"fitted_on": one, "scored_on": other, "r2_low": "0.5", "r2_high": "0.9", "r2_case": "0.7", "spearman": "0.9",
         "r2": str(transfers.get(f"{one}_{other}", 0.75 if one != other else 0.8))}
        for one in reproduce.SETS for other in reproduce.SETS
    ]  # fmt: skip
    left = {"factors": {name: {"verdict": bmi if name == "bmi" else "matters", "difference": (0.01, 0, 0.02)}
                        for name in reproduce.FACTORS}}  # fmt: skip
    return fitted, few, rows, left


def failing(reproduce, **change):
    claims = reproduce.judge(*figures(reproduce, **change))
    assert len(claims) == 9 and sum(row["verdict"].startswith("cannot be tested") for row in claims) == 2
    return [number for number, row in enumerate(claims) if row["verdict"] == "does not hold"]


def test_each_sentence_stands_on_its_own_figure(reproduce):
    assert failing(reproduce) == []
    assert failing(reproduce, low=0.4) == [0]
    assert failing(reproduce, five=0.7) == [1]
    assert failing(reproduce, weaker_condition=0.69) == [2]
    assert failing(reproduce, disease_wall=0.69) == [3]
    assert failing(reproduce, rank=0.9) == [5]
    assert failing(reproduce, bmi="undecided") == [6]


def test_the_page_has_a_row_per_sentence_and_pair(reproduce):
    fitted, few, rows, left = figures(reproduce)
    claims = reproduce.judge(fitted, few, rows, left)
    page = reproduce.render("cpu", reproduce.SIZES["cpu"], claims, rows, fitted)
    assert page.count("| holds |") == 7 and page.count("| cannot be tested here") == 2
    assert "| condition | wall | 0.75 [0.50, 0.90] | 0.70 | 0.90 |" in page and "41 calls a case in place of 63" in page
    few = few[:1]
    assert "too few cases" in reproduce.judge(fitted, few, rows, left)[1]["verdict"]


def test_the_heart_is_cut_out_of_its_largest_slice_largest_phase_first(reproduce):
    sets = sys.modules["real_mupm"]
    images, masks = np.zeros((5, 192, 192), np.uint8), np.zeros((5, 192, 192), np.uint8)
    numbers = np.array([20, 21, 33, 40, 41])  # the first and the last are alone in their slices
    for frame, edge in enumerate((30, 10, 25, 20, 5)):
        images[frame] = frame + 1
        masks[frame, 150 : 150 + edge, 90 : 90 + edge] = 1
    images[2, 161, 101] = 99  # the middle of the ventricle
    cine = sets.heart_cine(images, masks, numbers)
    assert cine.shape == (3, 128, 128) and cine[:, 0, 0].tolist() == [3, 4, 2]
    # Down to the border of the picture, where the heart cannot stay in the middle; across it does.
    assert np.argwhere(cine[0] == 99).tolist() == [[161 - 64, 101 - (102 - 64)]]
    assert sets.spread(list(range(10)), 3) == [0, 4, 9] and sets.spread([1, 2], 5) == [1, 2]


def test_real_sets_have_the_same_marks_and_no_verdict_on_what_is_redundant(reproduce):
    def rows(names, r2="0.8"):
        return [{"fitted_on": one, "scored_on": other, "r2": r2, "r2_low": "0.5", "r2_high": "0.9"}
                for one in names for other in names]  # fmt: skip

    fitted, few, _, left = figures(reproduce)
    judged = reproduce.judge_real(fitted, few, rows(reproduce.REAL), rows(("a", "b"), ""), {"records": left})
    assert [row["verdict"].split(" (")[0] for row in judged] == [
        "holds", "holds", "holds", "does not hold", "holds", "holds", "cannot be tested here",
    ]  # fmt: skip
    assert "records: bmi redundant (+1 % of V predicted)" in judged[-1]["ours"] and "a to b none" in judged[3]["ours"]
