"""Methods that restore images, compared: means of each, and differences from a baseline on the same subjects."""

import numpy as np
import pytest

from jaxmed.metrics.restoration import MEASURES
from jaxmed.recipes.restoration_study import NOISE, tabulate
from jaxmed.recipes.study import Cell, Result


def result(arm, initial, values):
    key = (("condition", "one"), ("initial", initial), ("arm", arm))
    rows = [
        {"subject": name, "evaluations": 3.0, **dict.fromkeys(MEASURES, 0.0), "psnr": value}
        for name, value in values.items()
    ]
    return Result(Cell(key), {"psnr": float(np.mean([*values.values()]))}, rows)


def test_differences_are_paired_by_subject_and_corrected_over_methods():
    baseline = {f"s{i}": 20.0 + i for i in range(8)}
    better = {name: value + 1 + 0.1 * i for i, (name, value) in enumerate(reversed(baseline.items()))}
    noise = {name: value + (0.5 if i % 2 else -0.5) for i, (name, value) in enumerate(baseline.items())}
    results = (
        result("conditional", "a", baseline), result("dynamicdps", "a", better), result("dps", NOISE, noise),
        result("dynamicdps", "b", {"s0": 0.0}),
    )  # fmt: skip
    averages, differences = tabulate(results, "conditional", 0)
    rows = {row.arm: row for row in differences if row.measure == "psnr"}
    assert set(rows) == {"dynamicdps", "dps"}  # model b has no conditional to compare with
    won = rows["dynamicdps"]
    assert won.difference == pytest.approx(1.35) and 1.0 < won.low < 1.35 < won.high < 1.7
    # Eight differences of one sign: 2 / 2^8; twice that after Holm, being the smaller of two.
    assert won.p_value == pytest.approx(2 / 256) and won.p_corrected == pytest.approx(4 / 256)
    assert rows["dps"].difference == pytest.approx(0.0) and rows["dps"].p_value > 0.5
    means = {(dict(row.group)["arm"], dict(row.group)["initial"]): row for row in averages if row.measure == "psnr"}
    assert means["conditional", "a"].mean == pytest.approx(23.5) and means["conditional", "a"].count == 8
    assert means["dynamicdps", "b"].low is None
