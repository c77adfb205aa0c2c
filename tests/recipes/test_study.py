"""Studies: run once, stored at once, resumed, compared; and killed at random ten times."""

import csv
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from jaxmed.errors import InputError, Interrupted
from jaxmed.metrics.statistics import bootstrap, weighted_mean
from jaxmed.recipes.study import Cell, Outcome, Result, make_cells, read_results, read_study, run_groups, run_study
from jaxmed.recipes.study_sections import (
    difference_table,
    keep_examples,
    mean_bars,
    mean_curves,
    mean_table,
    show_examples,
    show_pictures,
    side_by_side,
)
from jaxmed.recipes.study_tables import compare, summarise, write_tables
from jaxmed.report.figures import MapStyle
from jaxmed.report.page import Section, render
from jaxmed.train.log import Log

CHILD = Path(__file__).with_name("study_child.py")
AXES = {"arm": ("mae", "dino", "scratch"), "fraction": (0.1, 1.0), "seed": (0, 1, 2, 3)}
TABLES = ("cells.csv", "means.csv", "differences.csv")


def auroc(cell):
    rng = np.random.default_rng([len(cell["arm"]), int(10 * cell["fraction"]), cell["seed"]])
    return {"auroc": 0.6 + 0.02 * len(cell["arm"]) + 0.1 * cell["fraction"] + 0.01 * rng.normal()}


def read_rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.core
def test_cells_cross_the_axes_with_the_last_running_fastest():
    cells = make_cells({"arm": ("a", "b"), "seed": (0, 1)})
    assert [(cell["arm"], cell["seed"]) for cell in cells] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert str(cells[2]) == "arm=b, seed=0"
    for axes in ({}, {"arm": ()}, {"seed": (0, 0)}, {"fraction": (float("nan"),)}):
        with pytest.raises(InputError):
            make_cells(axes)
    with pytest.raises(InputError, match="arm, seed"):
        cells[0]["fraction"]


@pytest.mark.core
def test_slugs_are_readable_file_names_that_never_meet():
    keys = ["a b", "a-b", "a/b", "../a", "A", "a", "ä", "x" * 300, "x" * 299 + "y", "1", 1, 1.0, True]
    slugs = [Cell((("arm", key), ("seed", 0))).slug for key in keys]
    assert len({slug.lower() for slug in slugs}) == len(keys)
    assert all(len(slug) < 120 and "/" not in slug and not slug.startswith(".") for slug in slugs)
    assert slugs[1].startswith("arm=a-b_seed=0-")


@pytest.mark.core
def test_a_second_start_runs_nothing_and_gives_the_same(tmp_path):
    cells, calls = make_cells(AXES), []

    def run_cell(cell):
        calls.append(cell)
        return Outcome(auroc(cell), [{"subject": "s1", "score": np.float32(0.5)}])

    first = run_study(cells, run_cell, tmp_path, {"a": 1})
    second = run_study(cells, run_cell, tmp_path, {"a": 1})
    assert calls == list(cells)
    assert (first.num_run, first.num_skipped, second.num_run, second.num_skipped) == (24, 0, 0, 24)
    assert first.results == second.results
    assert first.results[3].metrics == auroc(cells[3])
    assert first.results[3].subjects == [{"subject": "s1", "score": 0.5}]
    assert first.exit_code == 0 and not (tmp_path / "outputs" / "failed.csv").exists()


@pytest.mark.core
def test_neighbours_run_together_and_fail_together(tmp_path):
    cells, calls = make_cells(AXES), []

    def run_group(group):
        calls.append(list(group))
        if any(cell["arm"] == "dino" and cell["fraction"] == 1.0 for cell in group):
            raise ValueError("no memory")
        return [auroc(cell) for cell in group]

    first = run_groups(cells, run_group, tmp_path, {"a": 1}, size=4)
    assert calls == [list(cells[start : start + 4]) for start in range(0, 24, 4)]
    assert (first.num_run, len(first.failures)) == (20, 4) and {f.cell["arm"] for f in first.failures} == {"dino"}
    # What is left is asked for again, and nothing else; the results are those of cells alone.
    second = run_groups(cells, lambda group: [auroc(cell) for cell in group], tmp_path, {"a": 1}, size=4)
    assert (second.num_run, second.num_skipped) == (4, 20)
    alone = run_study(cells, auroc, tmp_path / "alone", {"a": 1})
    assert [r.metrics for r in second.results] == [r.metrics for r in alone.results]


@pytest.mark.core
def test_groups_are_dealt_whole(tmp_path):
    cells, parts = make_cells(AXES), []
    for index in range(2):
        run_groups(
            cells, lambda group: parts.append((index, list(group))) or [auroc(cell) for cell in group],  # noqa: B023
            tmp_path, {"a": 1}, size=4, process_index=index, process_count=2,
        )  # fmt: skip
    assert [index for index, _ in parts] == [0, 0, 0, 1, 1, 1] and all(len(group) == 4 for _, group in parts)
    assert {cell for _, group in parts for cell in group} == set(cells)


@pytest.mark.core
def test_more_cells_can_be_asked_for_later(tmp_path):
    run_study(make_cells({"arm": ("a",), "seed": (0, 1)}), lambda cell: {"x": 1.0}, tmp_path, None)
    study = run_study(make_cells({"arm": ("a",), "seed": (0, 1, 2)}), lambda cell: {"x": 2.0}, tmp_path, None)
    assert [result.metrics["x"] for result in study.results] == [1.0, 1.0, 2.0]


@pytest.mark.core
def test_results_of_another_configuration_are_refused(tmp_path):
    cells = make_cells({"seed": (0, 1)})
    run_study(cells, lambda cell: {"x": 1.0}, tmp_path / "one", {"model": {"width": 8}})
    with pytest.raises(InputError, match=r"differs in model\.width \(8 there, 16 now\)"):
        run_study(cells, lambda cell: {"x": 1.0}, tmp_path / "one", {"model": {"width": 16}})
    run_study(cells[:1], lambda cell: {"x": 1.0}, tmp_path / "two", {"model": {"width": 16}})
    name = f"outputs/cells/{cells[1].slug}.json"
    (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    with pytest.raises(InputError, match="a result of this configuration"):
        run_study(cells, lambda cell: {"x": 1.0}, tmp_path / "two", {"model": {"width": 16}})


@pytest.mark.core
def test_equal_numbers_are_one_configuration(tmp_path):
    cells = make_cells({"arm": ("a",), "seed": (0,)})
    run_study(cells, auroc_of_a, tmp_path, {"epochs": 4, "rates": [0.5, 1]})
    assert run_study(cells, auroc_of_a, tmp_path, {"epochs": 4.0, "rates": [0.5, 1.0]}).num_skipped == 1


def auroc_of_a(cell):
    return {"auroc": 0.5}


@pytest.mark.core
def test_a_damaged_result_is_named(tmp_path):
    cells = make_cells({"seed": (0, 1)})
    run_study(cells, lambda cell: {"x": 1.0}, tmp_path, None)
    path = tmp_path / "outputs" / "cells" / f"{cells[0].slug}.json"
    for text in ("{", "", '{"study": 1}'):
        path.write_text(text)
        with pytest.raises(InputError, match="seed=0"):
            read_results(cells, tmp_path, None)


@pytest.mark.core
def test_a_failed_cell_is_recorded_the_others_go_on_and_it_is_tried_again(tmp_path):
    cells, is_broken = make_cells({"arm": ("a", "b"), "seed": (0, 1)}), True

    def run_cell(cell):
        if is_broken and cell["arm"] == "b":
            if cell["seed"]:
                raise InputError("scan.nii", "a volume", "none")
            raise ZeroDivisionError("by\nzero")
        return {"x": float("inf")} if is_broken and cell["seed"] else {"x": 1.0}

    study = run_study(cells, run_cell, tmp_path, None, log=Log(tmp_path, quiet=True))
    assert study.exit_code == 1 and study.num_run == 1
    reasons = {str(cell): reason for cell, reason in study.failures}
    assert reasons == {
        "arm=a, seed=1": "metrics of the cell: expected finite numbers, found x = inf",
        "arm=b, seed=0": "ZeroDivisionError: by zero",
        "arm=b, seed=1": "scan.nii: expected a volume, found none",
    }
    assert [row["reason"] for row in read_rows(tmp_path / "outputs" / "failed.csv")] == list(reasons.values())
    assert "failed: arm=b, seed=0: ZeroDivisionError" in (tmp_path / "log.txt").read_text()
    details = json.loads((tmp_path / "outputs" / "failures" / f"{cells[2].slug}.json").read_text())
    assert "run_cell" in "".join(details["traceback"])
    is_broken = False
    again = run_study(cells, run_cell, tmp_path, None)
    assert (again.exit_code, again.num_run, again.num_skipped, again.failures) == (0, 3, 1, ())
    assert not (tmp_path / "outputs" / "failed.csv").exists()


@pytest.mark.core
def test_a_result_counts_before_an_older_failure(tmp_path):
    cells = make_cells({"seed": (0,)})
    run_study(cells, lambda cell: {}, tmp_path, None)
    (stale,) = (tmp_path / "outputs" / "failures").iterdir()
    text = stale.read_text()
    run_study(cells, lambda cell: {"x": 1.0}, tmp_path, None)
    stale.write_text(text)  # as a kill before its deletion leaves it
    study = run_study(cells, lambda cell: {"x": 2.0}, tmp_path, None)
    assert (study.num_skipped, study.failures, study.exit_code) == (1, (), 0)


@pytest.mark.core
@pytest.mark.parametrize("outcome", [{}, Outcome({"x": 1.0}, [{"a": 1}, {"b": 1}]), Outcome({"x": 1.0}, [{"a": {1}}])])
def test_an_outcome_that_cannot_be_stored_is_a_failure(tmp_path, outcome):
    study = run_study(make_cells({"seed": (0,)}), lambda cell: outcome, tmp_path, None)
    assert len(study.failures) == 1 and not study.results


@pytest.mark.core
def test_being_stopped_is_no_failure(tmp_path):
    cells = make_cells({"seed": (0, 1, 2)})

    def run_cell(cell):
        if cell["seed"] == 1:
            raise Interrupted(15, "step 3")
        return {"x": 1.0}

    with pytest.raises(Interrupted):
        run_study(cells, run_cell, tmp_path, None)
    study = run_study(cells, lambda cell: {"x": 2.0}, tmp_path, None)
    assert (study.num_skipped, study.num_run) == (1, 2)


@pytest.mark.core
def test_processes_split_the_cells_between_them(tmp_path):
    cells, calls = make_cells(AXES), []

    def run_cell(cell):
        calls.append(cell)
        return auroc(cell)

    runs = [run_study(cells, run_cell, tmp_path, None, process_index=i, process_count=3) for i in range(3)]
    assert [run.num_run for run in runs] == [8, 8, 8]
    assert sorted(calls, key=cells.index) == list(cells)
    assert len(runs[-1].results) == 24
    with pytest.raises(InputError, match="0 to 2"):
        run_study(cells, run_cell, tmp_path, None, process_index=3, process_count=3)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_study(make_cells(AXES), auroc, tmp_path_factory.mktemp("study"), None).results


def values(results, arm, fraction):
    return np.array([r.metrics["auroc"] for r in results if (r.cell["arm"], r.cell["fraction"]) == (arm, fraction)])


@pytest.mark.core
def test_summaries_are_means_with_t_intervals(results):
    rows = summarise(results, ("arm", "fraction"), "auroc")
    assert [dict(row.group)["arm"] for row in rows] == ["mae", "mae", "dino", "dino", "scratch", "scratch"]
    for row in rows:
        own = values(results, *dict(row.group).values())
        expected = scipy.stats.t.interval(0.95, 3, own.mean(), scipy.stats.sem(own))
        np.testing.assert_allclose((row.mean, row.low, row.high), (own.mean(), *expected))
        assert row.count == 4
    alone = summarise(results, ("arm", "fraction", "seed"), "auroc")
    assert len(alone) == 24 and alone[0].low is None
    with pytest.raises(InputError, match="did you mean 'auroc'"):
        summarise(results, ("arm",), "auorc")
    with pytest.raises(InputError, match="arm, fraction, seed"):
        summarise(results, ("arms",), "auroc")


@pytest.mark.core
@pytest.mark.parametrize("test", ["paired_t", "wilcoxon"])
def test_comparisons_pair_by_seed_and_correct_for_all_rows(results, test):
    rows = compare(results, ("fraction",), "mae", "auroc", test=test, correction="bonferroni")
    assert [(row.arm, dict(row.group)["fraction"]) for row in rows] == [
        ("dino", 0.1), ("scratch", 0.1), ("dino", 1.0), ("scratch", 1.0),
    ]  # fmt: skip
    for row in rows:
        fraction = dict(row.group)["fraction"]
        ours, theirs = values(results, row.arm, fraction), values(results, "mae", fraction)
        expected = (scipy.stats.ttest_rel if test == "paired_t" else scipy.stats.wilcoxon)(ours, theirs)
        assert row.p_value == pytest.approx(expected.pvalue, rel=1e-6)
        assert row.p_corrected == pytest.approx(min(1, 4 * expected.pvalue), rel=1e-6)
        assert row.difference == pytest.approx((ours - theirs).mean())
        assert row.low < row.difference < row.high
        assert (row.pairs, row.unpaired, row.note) == (4, 0, "")
    with pytest.raises(InputError, match="did you mean 'mae'"):
        compare(results, ("fraction",), "mea", "auroc")


@pytest.mark.core
def test_comparisons_say_what_is_missing():
    def result(arm, seed, value):
        return Result(Cell((("arm", arm), ("seed", seed))), {"x": value}, [])

    rows = compare(
        [result("a", 0, 0.1), result("a", 1, 0.2), result("a", 2, 0.4)]
        + [result("b", 0, 0.2), result("b", 1, 0.3), result("b", 5, 0.3)]
        + [result("c", 2, 0.9)]
        + [result("d", 0, 0.3), result("d", 1, 0.2), result("d", 2, 0.1)],
        (),
        "a",
        "x",
    )
    b, c, d = rows
    assert (b.pairs, b.unpaired, b.p_value) == (2, 2, None) and b.note.startswith("no test: differences")
    assert (c.pairs, c.note, c.p_value, c.difference) == (1, "1 pairs: no test", None, pytest.approx(0.5))
    # Only rows with a test count for the correction.
    assert d.p_corrected == d.p_value is not None


def by_subject(arm, initial, scores, seed=0):
    """A cell with the scores of its cases, by (subject, case)."""
    rows = [{"subject": name, "case": str(case), "dice": score} for (name, case), score in scores.items()]
    return Result(Cell((("arm", arm), ("initial", initial), ("seed", seed))), {"cases": len(rows)}, rows)


@pytest.mark.core
def test_subjects_are_averaged_over_seeds_and_resampled_with_all_their_cases():
    rng = np.random.default_rng(0)
    cases = [(name, case) for name in ("s1", "s2", "s3") for case in range(int(name[1]))]
    scores = [dict(zip(cases, rng.uniform(size=6), strict=True)) for _ in range(2)]
    results = [by_subject("a", "x", values, seed) for seed, values in enumerate(scores)]
    (mean,) = summarise(results, ("arm",), "dice", seed=5)
    values = np.mean([[*one.values()] for one in scores], axis=0)
    expected = bootstrap(weighted_mean(values), np.array([name for name, _ in cases]), seed=5)
    assert (mean.mean, mean.low, mean.high, mean.count) == (*expected[:3], 6)
    own = [values[:1].mean(), values[1:3].mean(), values[3:].mean()]
    assert mean.error == pytest.approx(np.std(own, ddof=1) / np.sqrt(3))
    alone = [by_subject("a", "x", {("s1", 0): 0.5, ("s1", 1): None, ("s1", 2): 0.7})]
    (mean,) = summarise(alone, ("arm",), "dice", seed=5)
    assert (mean.mean, mean.low, mean.error, mean.count) == (pytest.approx(0.6), None, None, 2)


@pytest.mark.core
def test_an_arm_that_needs_no_initial_estimate_is_compared_with_the_baseline_of_every_one():
    base = {(f"s{n}", 0): 0.1 * n for n in range(8)}
    better = {case: value + 0.1 + 0.01 * n for n, (case, value) in enumerate(base.items())}
    results = [by_subject("base", initial, base) for initial in ("x", "y")]
    results += [by_subject("free", "noise", better), by_subject("bound", "y", base), by_subject("lone", "z", base)]
    how = {"seed": 0, "shared": {"initial": "noise"}, "test": "wilcoxon"}
    rows = compare(results, ("initial",), "base", "dice", family=("initial",), **how)
    assert [(row.arm, dict(row.group)["initial"]) for row in rows] == [("free", "x"), ("free", "y"), ("bound", "y")]
    free, other, bound = rows
    expected = bootstrap(weighted_mean(0.1 + 0.01 * np.arange(8)), np.arange(8), seed=0)
    np.testing.assert_allclose((free.difference, free.low, free.high), expected[:3])
    # Eight differences of one sign; one test with the initial estimate x, two with y.
    assert free.p_corrected == free.p_value == pytest.approx(2 / 2**8)
    assert other.p_corrected == pytest.approx(2 * other.p_value) and (bound.p_value, bound.effect_size) == (1, 0)
    together = compare(results, ("initial",), "base", "dice", **how)
    assert together[0].p_corrected == pytest.approx(3 * free.p_value)


@pytest.mark.core
def test_a_measure_that_a_cell_lacks_is_averaged_over_the_others():
    results = [Result(Cell((("arm", "a"), ("seed", n))), {"r": 0.5 + n} if n else {"x": 1.0}, []) for n in range(3)]
    (mean,) = summarise(results, ("arm",), "r")
    assert (mean.mean, mean.count) == (2.0, 2)
    with pytest.raises(InputError, match="finished cells, found none"):
        summarise([], ("arm",), "r")


@pytest.mark.core
def test_a_page_reads_the_cells_that_were_last_asked_for(tmp_path):
    def run_cell(cell):
        if cell["arm"] == "b":
            raise InputError("scan.nii", "a volume", "none")
        return {"x": 1.0}

    for arms in (("a", "b"), ("a", "b", "c")):
        done = run_study(make_cells({"arm": arms, "seed": (0, 1)}), run_cell, tmp_path, {"steps": 4})
        found = read_study(tmp_path)
        assert (found.results, found.failures) == (done.results, done.failures)
        assert (len(found.results), len(found.failures)) == (2 * len(arms) - 2, 2)


def test_measures_stand_side_by_side_and_examples_are_shown(tmp_path):
    scores = {(f"s{n}", 0): 0.1 * n for n in range(4)}
    results = [by_subject("base", "x", scores), by_subject("other", "x", {c: v + 0.1 * v for c, v in scores.items()})]
    means = summarise(results, ("arm",), "dice", seed=0)
    changes = compare(results, (), "base", "dice", seed=0)
    table = side_by_side(means, lambda row: row.group[0][1], {"dice": "Dice", "iou": "IoU"}, "Means.")
    assert table.columns == ("method", "Dice", "IoU") and table.rows[0] == ["base", pytest.approx(0.15), None]
    table = side_by_side(changes, lambda row: row.arm, {"dice": "Dice"}, "Differences.")
    assert table.rows[0][1].startswith("+0.015 [") and "], p 0." in table.rows[0][1]
    assert b"<svg" in mean_bars(means, lambda row: row.group[0][1], xlabel="Dice", caption="").light
    for name in ("truth", "a"):
        keep_examples(tmp_path, name, np.random.default_rng(0).uniform(size=(9, 8, 8)))
    assert np.load(tmp_path / "examples" / "a.npy").shape == (4, 8, 8)
    names = {"truth": "truth", "arm": "a", "not run": "b"}
    figure = show_examples(tmp_path, names, MapStyle(limits=(0.0, 1.0)), "Images.")
    assert "truth, arm" in figure.alt


@pytest.mark.core
def test_tables_have_the_same_bytes_and_full_numbers(results, tmp_path):
    summaries, comparisons = (
        summarise(results, ("arm", "fraction"), "auroc"),
        compare(results, ("fraction",), "mae", "auroc"),
    )
    for name in ("one", "two"):
        write_tables(tmp_path / name, results, summaries, comparisons)
    for table in TABLES:
        assert (tmp_path / "one" / table).read_bytes() == (tmp_path / "two" / table).read_bytes()
    cells = read_rows(tmp_path / "one" / "cells.csv")
    assert list(cells[0]) == ["arm", "fraction", "seed", "auroc"]
    assert [float(row["auroc"]) for row in cells] == [result.metrics["auroc"] for result in results]
    assert len(read_rows(tmp_path / "one" / "means.csv")) == 6
    assert float(read_rows(tmp_path / "one" / "differences.csv")[0]["p_value"]) == comparisons[0].p_value
    with pytest.raises(InputError, match="failed.csv"):
        write_tables(tmp_path, [])


def test_the_report_shows_tables_and_curves(results):
    summaries = summarise(results, ("arm", "fraction"), "auroc")
    figure = mean_curves(summaries, x="fraction", caption="AUROC against labels.", log_x=True)
    assert b"<svg" in figure.light and "mae 0.7" in figure.alt
    blocks = (figure, mean_table(summaries), difference_table(compare(results, ("fraction",), "mae", "auroc")))
    page = render("study", "", sections=[Section("Arms", blocks)])
    assert "p corrected" in page and "95 % from" in page
    # What all rows have is said once, in the caption.
    assert "All rows: measure auroc, count 4." in page and "All rows: baseline mae, measure auroc, pairs 4" in page
    assert ">measure</th>" not in page
    with pytest.raises(InputError, match="numbers to draw along"):
        mean_curves(summaries, x="arm", arm="fraction", caption="")
    with pytest.raises(InputError, match="one measure by arm and seed"):
        mean_curves(summaries, x="seed", caption="")


def start(folder, log, seconds, *part):
    environment = {**os.environ, "PYTHONPATH": str(CHILD.parents[2])}
    command = [sys.executable, str(CHILD), str(folder), str(log), str(seconds), *map(str, part)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process):
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()


def finished_cells(folder):
    return {path.stem for path in (folder / "outputs" / "cells").glob("[!.]*.json")}


def started_cells(log):
    return log.read_text().split() if log.exists() else []


@pytest.mark.multiprocess
def test_a_study_killed_ten_times_runs_no_finished_cell_twice_and_gives_the_same_tables(tmp_path):
    rng = random.Random(0)
    folder, log = tmp_path / "killed", tmp_path / "started.txt"
    for _ in range(10):
        done, before = finished_cells(folder), len(started_cells(log))
        process = start(folder, log, 0.04)
        while len(started_cells(log)) == before:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, "the study ended before it could be killed"
        process.kill()
        process.communicate()
        assert not done & set(started_cells(log)[before:])
    done, before = finished_cells(folder), len(started_cells(log))
    assert 0 < len(done) < 40
    finish(start(folder, log, 0.0))
    assert sorted(started_cells(log)[before:]) == sorted(finished_cells(folder) - done)
    assert len(finished_cells(folder)) == 40
    assert not list((folder / "outputs" / "cells").glob(".*"))
    finish(start(tmp_path / "whole", tmp_path / "other.txt", 0.0))
    for table in TABLES:
        assert (folder / "outputs" / table).read_bytes() == (tmp_path / "whole" / "outputs" / table).read_bytes()


@pytest.mark.multiprocess
def test_two_processes_at_once_share_a_study(tmp_path):
    folder, log = tmp_path / "shared", tmp_path / "started.txt"
    processes = [start(folder, log, 0.005, index, 2) for index in range(2)]
    for process in processes:
        finish(process)
    assert len(started_cells(log)) == len(set(started_cells(log))) == 40
    assert len(finished_cells(folder)) == 40
    assert (folder / "outputs" / "differences.csv").exists()


def test_pictures_are_shown_with_their_first_row_on_top(tmp_path):
    kept = np.zeros((1, 4, 6), np.float32)
    kept[0, 0] = 0.5
    keep_examples(tmp_path, "kept", kept)
    figure = show_pictures(tmp_path, {"a grey row": "kept", "not kept": "none"}, (0.0, 1.0), "Pictures.")
    assert figure.alt == "1 images."
    drawn = np.asarray(Image.open(io.BytesIO(figure.light)).convert("RGB")).astype(int)
    is_flat = np.ptp(drawn, axis=-1) <= 2
    grey, black = (np.argwhere(is_flat & (abs(drawn[..., 0] - level) <= 3)) for level in (128, 0))
    assert len(grey) > 100 and len(black) > 2 * len(grey) and grey[:, 0].mean() < black[:, 0].mean()
