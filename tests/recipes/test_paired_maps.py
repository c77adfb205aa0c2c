"""Scores of synthesised images: scaling, regions, positivity, intervals, and what averaging latents costs."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.metrics.imaging import ssim
from jaxmed.recipes.paired_maps import (
    MEASURED,
    Measured,
    compare_averages,
    one_range,
    read_region,
    region_means,
    score_pair,
    score_pairs,
    score_table,
)
from jaxmed.report.figures import MapStyle
from jaxmed.volume import Grid, Volume

pytestmark = pytest.mark.core

RNG = np.random.default_rng(0)
TRUTH = RNG.uniform(0, 3, (12, 13, 14)).astype(np.float32)
FOUND = (TRUTH + RNG.normal(0, 0.2, TRUTH.shape)).astype(np.float32)


def test_intensities_are_scaled_by_the_truth_or_by_limits_and_never_clipped():
    low, span = TRUTH.min(), np.ptp(TRUTH)
    found = score_pair(TRUTH, FOUND)
    error = np.mean(np.square((FOUND - TRUTH).astype(np.float64))) / span**2
    assert found["mse"] == pytest.approx(error, rel=1e-4)
    assert found["psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    assert found["ssim"] == pytest.approx(ssim((TRUTH - low) / span, (FOUND - low) / span, 1.0), abs=1e-5)
    fixed = score_pair(TRUTH, FOUND, (0.0, 6.0))
    assert fixed["mse"] == pytest.approx(error * span**2 / 36, rel=1e-4)
    with pytest.raises(InputError, match="intensities that vary"):
        score_pair(np.ones_like(TRUTH), FOUND)


def test_regions_are_read_where_they_lie_in_the_world(tmp_path):
    grid = Grid((12, 13, 14), np.diag([2.0, 2.0, 2.0, 1.0]))
    fine = np.zeros((24, 26, 28), np.uint8)
    fine[8:12, 8:12, 8:12] = 1
    nifti.write(tmp_path / "mask.nii.gz", Volume.make(fine, np.diag([1.0, 1.0, 1.0, 1.0])))
    regions = {"cortical": read_region(tmp_path / "mask.nii.gz")}
    found = region_means(regions, grid, {MEASURED: TRUTH, "ours": FOUND})
    inside = (slice(4, 6),) * 3
    assert found["cortical"][MEASURED] == pytest.approx(float(TRUTH[inside].mean()), rel=1e-5)
    assert found["cortical"]["ours"] == pytest.approx(float(FOUND[inside].mean()), rel=1e-5)
    far = Grid(grid.shape, np.array([[2.0, 0, 0, 500], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]))
    with pytest.raises(InputError, match="region cortical: expected voxels within the images"):
        region_means(regions, far, {"ours": FOUND})


def pairs(count, noise):
    rng = np.random.default_rng(1)
    truth = rng.uniform(1.0, 1.65, count)
    found = truth + noise * rng.normal(size=count)
    return truth, found, [
        Measured(
            f"{n:05d}", f"{n}.nii.gz", (), f"subject {n // 2}", {"ours": {"ssim": 0.5 + 0.001 * n}},
            {"cortical": {MEASURED: float(truth[n]), "ours": float(found[n])}}, {"bias, rms": 0.1},
        )
        for n in range(count)
    ]  # fmt: skip


def test_all_pairs_are_scored_as_scikit_learn_does():
    truth, found, rows = pairs(40, 0.2)
    lines, notes = score_pairs(rows, 1.326, 0)
    assert not notes
    by = {line.measure: line for line in lines}
    positive = truth > 1.326
    assert by["positivity auroc"].estimate == pytest.approx(roc_auc_score(positive, found))
    accuracy = balanced_accuracy_score(positive, found > 1.326)
    assert by["positivity balanced_accuracy"].estimate == pytest.approx(accuracy)
    assert by["cortical correlation"].estimate == pytest.approx(np.corrcoef(truth, found)[0, 1])
    assert by["cortical mae"].estimate == pytest.approx(np.abs(found - truth).mean())
    assert by["ssim"].estimate == pytest.approx(0.5195) and by["ssim"].low < 0.5195 < by["ssim"].high
    assert all(line.low <= line.estimate <= line.high for line in lines)
    table = score_table(lines, "")
    assert table.columns == ("measure", "ours") and any("AUROC" in row[0] for row in table.rows)


def test_a_cohort_of_one_class_has_no_positivity_and_says_so():
    truth, _, rows = pairs(8, 0.1)
    lines, notes = score_pairs(rows, 2.0, 0)
    assert not any("positivity" in line.measure for line in lines)
    assert any("labels" in note for note in notes)
    single, said = score_pairs(rows[:1], 1.326, 0)
    assert single[0].low is None and said


def test_maps_of_one_unit_have_one_range_and_differences_are_around_0():
    suvr, other = MapStyle("SUVR", colormap="inferno"), MapStyle("SUVR", colormap="RdBu_r")
    arrays = {"PET": TRUTH, "Synthesised": TRUTH + 1, "Difference": TRUTH - 2}
    found = one_range(arrays, {"PET": suvr, "Synthesised": suvr, "Difference": other, "Spread": suvr})
    assert found["PET"].limits == found["Synthesised"].limits and found["Spread"].limits is None
    low, high = found["PET"].limits
    assert low == pytest.approx(np.percentile(TRUTH, 0.5)) and high == pytest.approx(np.percentile(TRUTH, 99.5) + 1)
    low, high = found["Difference"].limits
    assert low == -high and high == pytest.approx(2 - np.percentile(TRUTH, 0.5))


def test_averages_are_compared_with_theory():
    bias = 0.01 * RNG.normal(size=TRUTH.shape).astype(np.float32)
    found = compare_averages(TRUTH + bias, TRUTH, 0.5 * bias)
    assert found["bias, rms"] == pytest.approx(float(np.sqrt(np.mean(bias**2))), rel=1e-2)
    assert found["bias in theory, rms"] == pytest.approx(0.5 * found["bias, rms"], rel=1e-2)
    assert found["bias, correlation with theory"] > 0.999 and found["averages, correlation"] > 0.999
    assert "bias in theory, rms" not in compare_averages(TRUTH + bias, TRUTH, None)
