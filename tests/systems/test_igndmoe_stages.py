"""`jaxmed igndmoe` from files to pages: a planted cohort is fitted, staged and forecast; maps; and mistakes."""

import csv
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from jaxmed import files
from jaxmed.arrays.graphs import laplacian
from jaxmed.cli import main
from jaxmed.data.connectomes import ConnectomeConfig, read_connectome

TINY = [
    *("--fit.model.equation", "fkpp", "--fit.grid-steps", "32", "--fit.stages", "64"),
    # A tolerance of 0 ends no fit early: whether a round settles one hangs on rounding.
    *("--fit.steps", "15", "--fit.loops", "2", "--fit.tolerance", "0", "--solver", "fixed", "--starts", "1"),
]


def run(*words):
    return main(["igndmoe", *map(str, words), "--quiet"])


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def only_line(capsys):
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err, captured.err
    return captured.err


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A simulated cohort, and a fit of it."""
    folder = tmp_path_factory.mktemp("igndmoe")
    cohort = ["--regions", 8, "--density", 0.4, "--cohort.subjects", 60, "--cohort.mechanism", "fkpp"]
    assert run("simulate", *cohort, "--out", folder / "sim") == 0
    assert run("fit", *inputs(folder), *TINY, "--out", folder / "fit") == 0
    return folder


def inputs(folder):
    outputs = folder / "sim" / "outputs"
    seeds = json.loads((outputs / "truth" / "truth.json").read_text())["seeds"]
    return ["--connectome", outputs / "connectome.csv", "--table", outputs / "visits.csv", "--seeds", *seeds]


def test_a_fit_finds_the_planted_stages_and_course(places):
    outputs = places / "fit" / "outputs"
    stages = rows_of(outputs / "stages.csv")
    truth = rows_of(places / "sim" / "outputs" / "truth" / "stages.csv")
    assert [row["subject"] for row in stages] == [row["subject"] for row in truth]
    pairs = [(float(a["stage"]), float(b["stage"])) for a, b in zip(stages, truth, strict=True)]
    assert scipy.stats.spearmanr(*np.array(pairs).T)[0] > 0.95
    summary = json.loads((outputs / "summary.json").read_text())
    assert summary["scores"]["test"]["r2"] > 0.8 and summary["rounds"] == 2
    # Noise of 0.03 on [0, 1] is nearly all that is left.
    assert summary["scores"]["test"]["mse"] < 1.5 * 0.03**2 / (summary["scale"][1] - summary["scale"][0]) ** 2
    page = (places / "fit" / "report.html").read_text()
    assert "L_region01" in page and "data:image/svg" in page
    assert (outputs / "model").is_dir() and (outputs / "course.csv").exists()


def test_a_complete_run_is_not_run_again(places, capsys):
    assert run("fit", *inputs(places), *TINY, "--out", places / "fit") == 0
    assert "Complete already" in capsys.readouterr().out


class Killed(BaseException):
    """The end of a process that could not say goodbye."""


def files_of(path, name):
    return {
        file.relative_to(path).as_posix(): file.read_bytes().replace(str(path).encode(), name)
        for file in [*(path / "outputs").rglob("*"), path / "metrics.jsonl"] if file.is_file()
    }  # fmt: skip


@pytest.mark.parametrize("name", ["metrics.jsonl", "stages.csv"])
def test_a_fit_killed_at_a_write_ends_with_the_same_bytes(places, tmp_path, monkeypatch, name):
    """Killed just before a file gets its name; the fast half of tests/train/test_kills.py."""
    out, real, is_dead = tmp_path / "run", files.os.replace, [False]

    def replace(source, target):
        if Path(target).name == name:
            is_dead[0] = True
            raise Killed
        real(source, target)

    unlink = Path.unlink
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        patch.setattr(Path, "unlink", lambda *a, **o: None if is_dead[0] else unlink(*a, **o))
        with pytest.raises(Killed):
            run("fit", *inputs(places), *TINY, "--out", out)
    assert [path for path in out.rglob(".*") if files.LEFTOVER.match(path.name)]
    assert run("fit", *inputs(places), *TINY, "--out", out) == 0
    assert files_of(out, b"RUN") == files_of(places / "fit", b"RUN")
    assert not [path for path in out.rglob(".*") if files.LEFTOVER.match(path.name)]


def test_staging_the_same_subjects_gives_the_same_stages(places, tmp_path):
    table = inputs(places)[3]
    assert run("stage", "--weights", places / "fit", "--table", table, "--out", tmp_path / "run") == 0
    again, first = (rows_of(path / "outputs" / "stages.csv") for path in (tmp_path / "run", places / "fit"))
    np.testing.assert_allclose(
        [float(row["stage"]) for row in again], [float(row["stage"]) for row in first], atol=1e-3
    )
    assert (tmp_path / "run" / "report.html").exists()


def test_forecasts_from_the_first_visit_beat_no_change(places, tmp_path):
    words = ["--weights", places / "fit", "--table", inputs(places)[3], "--horizons", 1, 3]
    assert run("forecast", *words, "--out", tmp_path / "run") == 0
    scores = json.loads((tmp_path / "run" / "outputs" / "summary.json").read_text())["scores"]
    assert scores["staged with the first visit"]["mse"] < 0.5 * scores["no change since the first visit"]["mse"]
    rows = rows_of(tmp_path / "run" / "outputs" / "forecasts.csv")
    assert len(rows) == 120 and {row["years_ahead"] for row in rows} == {"1.0", "3.0"}
    # The planted disease only grows.
    first, second = (np.array([float(row["L_region01"]) for row in rows[i::2]]) for i in (0, 1))
    assert (second >= first - 1e-6).all()


def test_a_cohort_with_missing_regions_is_fitted_staged_and_forecast(places, tmp_path):
    # A tenth of the values and all of one region were not measured; decimal commas, semicolons, in Latin-1.
    header, *lines = (line.split(",") for line in inputs(places)[3].read_text().strip().split("\n"))
    rng, first = np.random.default_rng(0), header.index("L_region01")
    for cells in lines:
        cells[first + 2] = ""
        for column in np.flatnonzero(rng.random(8) < 0.1):
            cells[first + column] = rng.choice(["", "NA", "nan"])
    text = "\n".join(";".join(cells).replace(".", ",") for cells in [header, *lines])
    (tmp_path / "holes.csv").write_bytes(text.encode("latin-1"))
    words = [*inputs(places)[:3], tmp_path / "holes.csv", *inputs(places)[4:]]
    assert run("fit", *words, *TINY, "--out", tmp_path / "fit") == 0
    summary = json.loads((tmp_path / "fit" / "outputs" / "summary.json").read_text())
    said = " ".join(summary["notes"])
    assert f"Never measured: {header[first + 2]}." in said and "semicolons, with decimal commas" in said
    assert summary["scores"]["test"]["mse"] < 1.5 * 0.03**2 / (summary["scale"][1] - summary["scale"][0]) ** 2
    complete, holed = (rows_of(path / "fit" / "outputs" / "stages.csv") for path in (places, tmp_path))
    pairs = [(float(a["stage"]), float(b["stage"])) for a, b in zip(complete, holed, strict=True)]
    assert scipy.stats.spearmanr(*np.array(pairs).T)[0] > 0.98
    assert (tmp_path / "fit" / "report.html").exists()
    words = ["--weights", tmp_path / "fit", "--table", tmp_path / "holes.csv"]
    assert run("stage", *words, "--out", tmp_path / "stage") == 0
    again = rows_of(tmp_path / "stage" / "outputs" / "stages.csv")
    np.testing.assert_allclose([float(r["stage"]) for r in again], [float(r["stage"]) for r in holed], atol=1e-3)
    assert run("forecast", *words, "--out", tmp_path / "forecast") == 0
    scores = json.loads((tmp_path / "forecast" / "outputs" / "summary.json").read_text())["scores"]
    assert scores["staged with the first visit"]["mse"] < 0.5 * scores["no change since the first visit"]["mse"]
    words = [*inputs(places)[:3], tmp_path / "holes.csv", *inputs(places)[4:], *TINY[2:-2]]
    assert run("compare", *words, "--models", "fkpp", "--folds", 2, "--starts", 1, "--out", tmp_path / "compare") == 0
    model = json.loads((tmp_path / "compare" / "outputs" / "summary.json").read_text())["models"][0]
    assert 0 < model["mse"] < 1.5 * 0.03**2 / (summary["scale"][1] - summary["scale"][0]) ** 2


def test_a_map_made_by_diffusion_is_explained_from_its_own_seed(places, tmp_path):
    connectome = read_connectome(inputs(places)[1], ConnectomeConfig(), [])
    matrix = np.asarray(laplacian(jnp.asarray(connectome.adjacency), "random_walk"), float)
    values = scipy.linalg.expm(-2.0 * matrix)[:, 3]
    # The last region was not measured.
    cells = [*(2 - 3 * values[:-1]), ""]
    text = "region,value\n" + "".join(f"{name},{v}\n" for name, v in zip(connectome.regions, cells, strict=True))
    (tmp_path / "map.csv").write_text(text)
    words = ["--connectome", inputs(places)[1], "--map.file", tmp_path / "map.csv", "--map.more-is", "better"]
    words += ["--fit.steps", 5, "--fit.loops", 1, "--fit.grid-steps", 16, "--fit.stages", 16, "--fit.model.width", 4]
    words += ["--map.mixture-seeds", 2, "--solver", "fixed"]
    assert run("compare", *words, "--out", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "outputs" / "summary.json").read_text())
    models = summary["models"]
    said = (tmp_path / "run" / "log.txt").read_text()
    assert said.count(" in sample, from ") == len(models) == 3 and "from 8 seeds" in said
    assert summary["scored"] == 7 and any(connectome.regions[-1] in note for note in summary["notes"])
    best = next(model for model in models if model["model"] == "ndm")
    assert best["seed"] == connectome.regions[3] and best["r"] > 0.9999 and best["setting"] == "rate x time 2"
    mixture = next(model for model in models if model["model"] == "igndmoe")
    assert mixture["aicc"] is None and "best of 2 seeds" in mixture["setting"]
    tried = [row["seed"] for row in rows_of(tmp_path / "run" / "outputs" / "seeds.csv") if row["igndmoe"]]
    assert len(tried) == 2 and mixture["seed"] in tried


def test_a_cohort_says_how_well_its_stages_could_be_recovered(tmp_path):
    # The last part of acceptance 2 in small: more visits, better stages. One visit leaves the clock free, so that its
    # years hang on rounding (2.0 to 3.8 by processor and XLA's options): orders are compared, and the years bounded.
    words = [
        "--regions",
        8,
        "--density",
        0.4,
        "--cohort.subjects",
        30,
        "--cohort.noise",
        0.2,
        "--recovery.visits",
        1,
        4,
    ]
    words += ["--cohort.mechanism", "fkpp", "--recovery.irregularities", 0, 0.9, "--recovery.cohorts", 1]
    words += ["--recovery.fit.steps", 40, "--recovery.fit.loops", 2, "--recovery.fit.stages", 64, "--solver", "fixed"]
    assert run("simulate", *words, "--out", tmp_path / "run") == 0
    rows = rows_of(tmp_path / "run" / "outputs" / "stage_recovery.csv")
    assert [(row["visits"], row["irregularity"]) for row in rows] == [("1", "0.0"), ("4", "0.0"), ("4", "0.9")]
    assert float(rows[1]["spearman"]) > float(rows[0]["spearman"]) + 0.03 and float(rows[1]["spearman"]) > 0.97
    assert 0 < float(rows[1]["years"]) < 5
    assert "How well stages are recovered" in (tmp_path / "run" / "report.html").read_text()


def test_mistakes_end_in_one_line(places, tmp_path, capsys):
    table = inputs(places)[3]
    words = inputs(places)
    assert run("fit", *words[:4], "--out", tmp_path / "a") == 2
    assert "seeds: expected names of the regions" in only_line(capsys)
    assert run("fit", *words[:4], "--seeds", "L_region1", "--out", tmp_path / "a") == 2
    assert "did you mean" in only_line(capsys)
    assert run("fit", *words[:4], "--seeds", "region01", "--out", tmp_path / "a") == 2
    assert "it may be L_region01 or R_region01: name one of them, or both" in only_line(capsys)
    assert run("simulate", "--regions", 8, "--seeds", "R_region09", "--out", tmp_path / "a") == 2
    assert "seeds: expected regions of the connectome, found 'R_region09'; did you mean 'R_" in only_line(capsys)
    bare = tmp_path / "matrix.txt"
    bare.write_text("0 1\n1 0\n")
    for stage in ("fit", "attribute", "compare", "simulate"):
        assert run(stage, "--connectome", bare, "--seeds", "a", "--data.graph.repair", "--out", tmp_path / "a") == 2
        assert "names of regions, found none" in only_line(capsys)
    assert run("stage", "--weights", tmp_path, "--table", table, "--out", tmp_path / "b") == 2
    assert "a run of jaxmed igndmoe fit" in only_line(capsys)
    broken = tmp_path / "broken"
    (broken / "outputs").mkdir(parents=True)
    for name in ("course.npz", "model.json"):
        data = (places / "fit" / "outputs" / name).read_bytes()
        (broken / "outputs" / name).write_bytes(data[: len(data) // 2] if name.endswith("npz") else data)
    assert run("stage", "--weights", broken, "--table", table, "--out", tmp_path / "b") == 2
    assert "damaged" in only_line(capsys)
    assert run("compare", *words, "--folds", 40, "--out", tmp_path / "c") == 2
    assert "two subjects or more in every fold" in only_line(capsys)
    assert run("fit", *words, *TINY, "--fit.model.horizon", 3, "--out", tmp_path / "d") == 2
    assert "raise --fit.model.horizon" in only_line(capsys)


def test_growth_and_diffusion_are_chosen_over_diffusion_alone_where_they_were_planted(tmp_path):
    assert run("compare", "--preset", "smoke", "--solver", "fixed", "--out", tmp_path / "run") == 0
    outputs = tmp_path / "run" / "outputs"
    summary = json.loads((outputs / "summary.json").read_text())
    by_name = {model["model"]: model for model in summary["models"]}
    assert summary["chosen"] == "fkpp" and by_name["fkpp"]["mse"] < 0.1 * by_name["ndm"]["mse"]
    assert by_name["fkpp"]["bic"] < by_name["ndm"]["bic"] and summary["tests"][0]["p_holm"] < 1e-4
    rows = rows_of(outputs / "cells.csv")
    assert len(rows) == 4 and all(float(row["finite"]) == 1 for row in rows)
    means = {(row["model"], row["measure"]): float(row["mean"]) for row in rows_of(outputs / "means.csv")}
    assert means["fkpp", "mse"] == by_name["fkpp"]["mse"]


@pytest.mark.slow  # compiles many runs of the mixture; its arithmetic is in test_igndmoe_comparing.py
def test_attribution_gives_bands_over_draws_of_subjects(tmp_path):
    assert run("attribute", "--preset", "smoke", "--out", tmp_path / "run") == 0
    outputs = tmp_path / "run" / "outputs"
    for name in ("weights", "contributions"):
        rows = rows_of(outputs / f"{name}.csv")
        columns = ("mechanistic", "graph_diffusion", "local_reaction")
        for row in rows:
            assert sum(float(row[column]) for column in columns) == pytest.approx(1, abs=1e-4)
            for column in columns:
                low, middle, high = (float(row[f"{column}_{part}"]) for part in ("low", "median", "high"))
                assert low <= middle <= high
    stages = rows_of(outputs / "stages.csv")
    widths = [float(row["high"]) - float(row["low"]) for row in stages]
    assert len(stages) == 40 and min(widths) >= 0 and max(widths) > 0
    # The mixture starts at its mechanistic expert, and fifty steps leave it in the lead.
    assert float(rows[0]["mechanistic"]) > 0.5
    assert "complete" in json.loads((outputs / "summary.json").read_text())["ablations"]
