"""The reproduction of BrainFM: contrasts, scores, pairs and verdicts; its smoke size."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxmed.data.brain_labels import PAIRS
from jaxmed.data.label_table import find_table
from jaxmed.metrics.imaging import dice
from jaxmed.volume import Volume

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture(scope="module")
def reproduce():
    return importlib.import_module("reproduce_brainfm")


def test_a_contrast_states_the_mean_of_every_label_that_images_are_drawn_from(reproduce):
    drawn = {row.generation for row in find_table("freesurfer").rows}
    for name, kind in reproduce.CONTRASTS.items():
        means = dict(kind.means)
        assert not means or drawn <= set(means), name
        assert all(0 <= mean <= 230 for mean in means.values())
    t1, t2 = (dict(reproduce.CONTRASTS[name].means) for name in ("like T1w", "like T2w"))
    assert t1[2] > t1[3] > t1[4] and t2[4] > t2[3] > t2[2]


def test_dice_counts_both_sides_as_one_and_each_for_itself(reproduce):
    rng = np.random.default_rng(0)
    labels = [0, *sorted({label for both in reproduce.STRUCTURES.values() for label in both})]
    truth, found = rng.choice(labels, (2, 16, 16, 16))
    values = reproduce.scores_of(found, truth)
    assert values["dice thalamus"] == dice(np.isin(truth, (10, 49)), np.isin(found, (10, 49)))
    assert values["dice"] == pytest.approx(np.mean([values[f"dice {name}"] for name in reproduce.STRUCTURES]))
    sides = [(2,), (41,), (3,), (42,), (4, 5), (43, 44), (10,), (49,), (11,), (50,), (12,), (51,), (7, 8), (46, 47)]
    sides.append((16,))
    expected = np.mean([dice(np.isin(truth, one), np.isin(found, one)) for one in sides])
    assert values["dice of sides"] == pytest.approx(expected)
    # A mirrored answer is right for the whole structure and wrong for its sides.
    turned = np.array([{**PAIRS, **{left: right for right, left in PAIRS.items()}}.get(one, one) for one in range(64)])
    values = reproduce.scores_of(turned[truth], truth)
    assert values["dice"] == 1.0 and values["dice of sides"] == pytest.approx(1 / 15)
    assert np.isnan(reproduce.scores_of(found, np.zeros_like(truth))["dice"])


def test_tissues_are_the_largest_share_and_fluid_the_rest(reproduce):
    grid = np.eye(4)
    scan = Volume.make(np.array([[[0, 9, 9, 9]]], np.float32), grid)
    grey = Volume.make(np.array([[[255, 200, 20, 10]]], np.float32), grid)
    white = Volume.make(np.array([[[0, 50, 200, 10]]], np.float32), grid)
    assert reproduce.tissues(scan, grey, white).tolist() == [[[0, 3, 2, 24]]]


def rows_of(reproduce, gain, seeds=3):
    """Return rows of both studies whose better arm is better by `gain`, with noise over images that pairs share."""
    rng, rows = np.random.default_rng(0), []

    def both(study, arms, kind, seed, number, scale=1.0):
        base = 0.5 + 0.1 * rng.normal()
        for arm, more in zip(arms, (0.0, scale * gain), strict=True):
            value = base + more + 0.005 * rng.normal()
            values = {"dice": value, "dice of sides": value - 0.1, "distance_mm": 1 - value, "bias_error": np.nan}
            values |= {"distance_of_constant": 1.0} | {f"dice {name}": value for name in reproduce.STRUCTURES}
            rows.append(reproduce.Row(study, arm, seed, "one", kind, number, values))

    for number in range(8):
        for kind in ("never drawn", "like T2w", "like FLAIR", "like T1w"):
            both("laptop", ("one contrast", "random"), kind, 0, number, -1.0 if kind == "like T1w" else 1.0)
    for study, arms in reproduce.ARMS.items():
        for seed in range(seeds):
            for number in range(4):
                for kind in ("severe", "mild") if study == "mild to severe" else ("synthetic", "real T1w"):
                    both(study, tuple(arms), kind, seed, number)
    return rows


@pytest.mark.parametrize("gain,verdict", [(0.2, "holds"), (-0.2, "does not hold")])
def test_a_sentence_holds_where_the_interval_lies_above_zero(reproduce, gain, verdict):
    rows = rows_of(reproduce, gain)
    judged = [word for _, word, _ in reproduce.claims(rows)]
    assert judged[2:5] == [verdict] * 3 and judged[5] == "holds" and judged.count("cannot be tested here") == 3
    effect = reproduce.paired(rows, "mix-up", "mix-up", "no mix-up", "real T1w", "dice")
    assert effect.count == 3 and effect.low < gain < effect.high + 0.02 and abs(effect.estimate - gain) < 0.02
    assert reproduce.paired(rows, "laptop", "random", "one contrast", "never drawn", "dice").count == 8


def test_the_page_has_every_table_and_says_what_was_not_run(reproduce):
    rows = rows_of(reproduce, 0.2)
    page = reproduce.render(rows, reproduce.SIZES["cpu"], "cpu", 60.0, 0.0)
    lines = page.splitlines()
    for number, line in enumerate(lines):
        if line.startswith(("| sentence", "| trained on", "| task", "| ablation")):
            assert line.count("|") == lines[number + 1].count("|") == lines[number + 2].count("|")
    assert "| mix-up | real T1w | dice |" in page and "| random contrasts | 0." in page
    alone = reproduce.render([row for row in rows if row.study == "laptop"], reproduce.SIZES["cpu"], "cpu", 60.0, 0.0)
    assert alone.count("| cannot be tested here |") == 5 and "| ablation |" not in alone
    assert "bias_error" not in str(reproduce.recorded(rows[0])["values"])


def test_a_run_of_one_part_keeps_the_figures_of_the_other(reproduce, tmp_path):
    rows, size = rows_of(reproduce, 0.2), reproduce.SIZES["cpu"]
    path = tmp_path / "reproduce_brainfm.json"
    assert reproduce.earlier(path, size, "ablations") == ([], 0.0)
    record = {"settings": dataclasses.asdict(size), "seconds": 5.0, "rows": [reproduce.recorded(row) for row in rows]}
    path.write_text(json.dumps(record))
    kept, seconds = reproduce.earlier(path, size, "ablations")
    assert seconds == 5.0 and {row.study for row in kept} == {"laptop"}
    assert len(kept) == sum(row.study == "laptop" for row in rows)
    assert {row.study for row in reproduce.earlier(path, size, "laptop")[0]} == set(reproduce.ARMS)
    assert reproduce.earlier(path, reproduce.SIZES["smoke"], "ablations") == ([], 0.0)


@pytest.mark.slow
def test_the_smoke_size_runs_and_goes_on_where_it_was(reproduce, tmp_path, capsys):
    reproduce.main("smoke", tmp_path / "first", tmp_path / "work")
    page = (tmp_path / "first" / "reproduce_brainfm.md").read_text()
    assert "| mild to severe | severe | dice |" in page and "| mix-up | real T1w | dice |" in page
    capsys.readouterr()
    reproduce.main("smoke", tmp_path / "second", tmp_path / "work")
    assert capsys.readouterr().out.count("Complete already") >= 10
    again = (tmp_path / "second" / "reproduce_brainfm.md").read_text()
    assert again.splitlines()[4:] == page.splitlines()[4:]
