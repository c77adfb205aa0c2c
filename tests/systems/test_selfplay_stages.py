"""`jaxmed selfplay`: the stages on files, and the mistakes that a user can make with them."""

import csv
import importlib
import json
import shutil

import numpy as np
import pytest

from jaxmed.cli import main
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.images import read_image, write_png
from jaxmed.recipes.segmentation_study import MEASURES, read_runs, tabulate
from jaxmed.systems.selfplay.inputs import load_system_one
from jaxmed.systems.selfplay.stages.compare import ARMS
from jaxmed.train.run_folder import start
from jaxmed.volume import Volume


def run(*arguments):
    return main(["selfplay", *map(str, arguments), "--quiet"])


@pytest.fixture(scope="module")
def thought(tmp_path_factory):
    """A smoke run of think, which meta-trains and adapts a tiny System I inside its folder."""
    out = tmp_path_factory.mktemp("selfplay") / "think"
    assert run("think", "--preset", "smoke", "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def weights(thought):
    return thought / "inputs" / "adapt"


@pytest.fixture(scope="module")
def manifest(thought):
    return thought / "inputs" / "puzzles" / "puzzles.csv"


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def familiar(thought):
    """System I before adaptation."""
    return thought / "inputs" / "meta-train"


def test_meta_training_hands_on_a_system_that_can_be_read(familiar):
    trained = load_system_one(familiar)
    assert trained.task == "" and trained.preprocess.size == (16, 16) and set(trained.system.params) == {
        "generator", "verifier",
    }  # fmt: skip
    lines = [json.loads(line) for line in (familiar / "metrics.jsonl").read_text().splitlines()]
    losses = [line["verifier"] for line in lines if "verifier" in line]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    assert (familiar / "report.html").exists()


def test_adaptation_says_whether_to_trust_the_verifier(weights):
    summary = json.loads((weights / "outputs" / "summary.json").read_text())
    assert summary["task"] == "star" and len(summary["shots"]) == 4 and -1 <= summary["rank"] <= 1
    assert len(summary["cases"]) == len(rows_of(weights / "outputs" / "cases.csv")) > 0
    assert load_system_one(weights).system.temperature == pytest.approx(summary["temperature"])


def test_thinking_writes_masks_on_the_grid_of_each_file(thought):
    rows = rows_of(thought / "outputs" / "scans.csv")
    assert len(rows) == 2
    for row in rows:
        assert float(row["score"]) >= float(row["first_score"]) and 0 <= float(row["dice"]) <= 1
        source = read_image(thought / "inputs" / "test" / f"{row['id']}.png")
        mask = read_image(thought / "outputs" / f"{row['id']}_mask.png")
        assert mask.shape == source.shape and set(np.unique(mask)) <= {0.0, 1.0}
        assert int(mask.sum()) == int(row["voxels"])
        sidecar = json.loads((thought / "outputs" / f"{row['id']}_agreement.json").read_text())
        assert sidecar["unit"] == "1" and sidecar["constants"]["steps"] == int(row["steps"])
    page = (thought / "report.html").read_text()
    assert "A debate of the trained policy" in page


def test_the_patch_game_is_played_by_its_command(thought, weights, tmp_path, capsys):
    inputs, out = thought / "inputs", tmp_path / "run"
    given = ("--preset", "smoke", "--game", "patch", "--input", inputs / "test", "--weights", weights)
    assert run("think", *given, "--mask", inputs / "test_masks", "--budget.steps", 512, "--out", out) == 0
    for row in rows_of(out / "outputs" / "scans.csv"):
        assert row["steps"] == "512" and 0 <= float(row["score"]) <= 1
        mask = read_image(out / "outputs" / f"{row['id']}_mask.png")
        assert mask.shape == (16, 16) and int(mask.sum()) == int(row["voxels"]) and 0 <= float(row["dice"]) <= 1
        with np.load(out / "outputs" / f"{row['id']}_thought.npz") as stored:
            debate = stored["debate_masks"]
            shown = stored["agreement"]
        # Masks are whole patches of 2 x 2, and grow by at most two in a turn; nobody begins with any.
        for masks in (debate, mask[None]):
            blocks = masks.reshape(-1, 8, 2, 8, 2) > 0
            np.testing.assert_array_equal(blocks.any((2, 4)), blocks.all((2, 4)))
        assert mask.any()
        growth = np.diff(debate.sum((1, 2)))
        assert debate[0].sum() == 0 and len(growth) and (growth >= 0).all() and (growth <= 8).all()
        assert 0 < shown.max() <= 1
    page = (out / "report.html").read_text()
    assert "The patch game (RLSP)" in page and "A patch game of the trained policy" in page
    assert json.loads((out / "outputs" / "summary.json").read_text())["game"] == "patch"
    assert "The pixel game" in (thought / "report.html").read_text()
    for wrong, said in (
        (("--think.mode", "grad"), "think.mode: expected learn for the patch game, found grad"),
        (("--policy-weights", weights), "policy_weights: expected none for the patch game"),
        (
            ("--think.patch.game.patches", 5),
            "think.patch.game.patches: expected a number that divides (16, 16), found 5",
        ),
    ):
        assert run("think", *given, *wrong, "--input", inputs / "test", "--out", tmp_path / "wrong") == 2
        assert said in capsys.readouterr().err


def test_a_finished_run_is_told_and_a_stopped_one_keeps_its_files(thought, capsys):
    before = {path: path.stat().st_mtime_ns for path in (thought / "outputs").glob("*_mask.png")}
    (thought / "report.html").unlink()
    assert run("think", "--preset", "smoke", "--out", thought) == 0
    assert (thought / "report.html").exists()
    assert before == {path: path.stat().st_mtime_ns for path in (thought / "outputs").glob("*_mask.png")}


def test_slices_of_a_volume_come_back_on_its_grid(thought, weights, tmp_path):
    rng = np.random.default_rng(0)
    source = sorted((thought / "inputs" / "test").iterdir())[0]
    image = np.flip(read_image(source), 0).T
    affine = np.array([[-2.0, 0, 0, 5], [0, 2, 0, 1], [0, 0, 4, 0], [0, 0, 0, 1]])
    array = np.stack([image[::-1], np.clip(image[::-1] + rng.normal(0, 0.05, image.shape), 0, 1)], 2)
    nifti.write(tmp_path / "scan.nii.gz", Volume.make(array.astype(np.float32), affine))
    out = tmp_path / "run"
    assert (
        run("think", "--input", tmp_path / "scan.nii.gz", "--weights", weights, "--budget.steps", 0, "--out", out) == 0
    )
    mask = nifti.read(out / "outputs" / "scan_mask.nii.gz")
    np.testing.assert_allclose(mask.affine, affine)
    assert mask.array.shape == array.shape
    assert rows_of(out / "outputs" / "scans.csv")[0]["stop"] == "budget"


def test_one_broken_file_does_not_stop_the_others(thought, weights, tmp_path):
    place = tmp_path / "in"
    shutil.copytree(thought / "inputs" / "test", place)
    (place / "broken.png").write_bytes(b"no picture")
    write_png(place / "flat.png", np.full((16, 16), 0.5, np.float32))
    out = tmp_path / "run"
    assert run("think", "--input", place, "--weights", weights, "--budget.steps", 0, "--out", out) == 1
    failed = rows_of(out / "outputs" / "failed.csv")
    assert {row["id"] for row in failed} == {"broken", "flat"} and all(row["reason"] for row in failed)
    assert len(rows_of(out / "outputs" / "scans.csv")) == 2


@pytest.fixture(scope="module")
def taught(familiar, manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("selfplay") / "policy"
    code = run(
        "train-policy", "--preset", "smoke", "--data.synthetic", 0, "--data.manifest", manifest, "--data.min-voxels", 1,
        "--weights", familiar, "--out", out,
    )  # fmt: skip
    assert code == 0
    return out


def test_a_policy_is_taught_on_familiar_tasks_and_looked_at_on_another(taught, thought, weights, tmp_path):
    summary = json.loads((taught / "outputs" / "summary.json").read_text())
    assert summary["looked_at"] and summary["looked_at"] not in summary["tasks"]
    lines = [json.loads(line) for line in (taught / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "score_gain" in line] == [1, 2, 3, 4]
    assert all(line["score_gain"] >= 0 for line in lines if "score_gain" in line)
    assert any("evaluation/overlap_gain" in line for line in lines) and (taught / "report.html").exists()
    match = summary["match"]
    assert match["visits"] == [0, 4] and len(match["elo"]) == 2 and sum(match["elo"]) == pytest.approx(0, abs=0.01)
    assert match["scores"][0][1] + match["scores"][1][0] == pytest.approx(1, abs=0.35)  # other random numbers
    assert min(match["exploitability"]) >= 0
    # A file that is thought about begins with it, whatever network the settings name.
    (tmp_path / "in").mkdir()
    shutil.copy(sorted((thought / "inputs" / "test").iterdir())[0], tmp_path / "in")
    begun = ("think", "--input", tmp_path / "in", "--weights", weights, "--budget.steps", 512,
             "--think.play.games", 16, "--think.play.steps", 16)  # fmt: skip
    assert run(*begun, "--policy-weights", taught, "--out", tmp_path / "run") == 0
    assert rows_of(tmp_path / "run" / "outputs" / "scans.csv")[0]["steps"] == "512"


@pytest.fixture(scope="module")
def compared(familiar, manifest, taught, tmp_path_factory):
    out = tmp_path_factory.mktemp("selfplay") / "compare"
    code = run(
        "compare", "--preset", "smoke", "--data.synthetic", 0, "--data.manifest", manifest, "--data.min-voxels", 1,
        "--weights", familiar, "--think.levels", 0.3, 0.7, "--policy-weights", taught,
        "--patch-game", "--out", out,
    )  # fmt: skip
    assert code == 0
    return out


def test_every_arm_answers_for_every_case(compared):
    rows = rows_of(compared / "outputs" / "subjects.csv")
    arms = {row["arm"] for row in rows}
    assert arms == {
        "System I", "System I, mean of flips", "supervised, few labels", "supervised, all labels", "MAML", "self-play",
        "random proposals", "verifier's gradient", "verifier's level",
        "System I above 0.3", "System I above 0.7",
        "self-play, policy taught", "patch game",
    }  # fmt: skip
    assert len(rows) == 4 * (8 + 5 * 2)
    means = rows_of(compared / "outputs" / "means.csv")
    assert {row["arm"] for row in means} == arms | {ARMS.elsewhere} and {row["measure"] for row in means} == {*MEASURES}
    for mean in means:
        own = [
            float(row[mean["measure"]]) for row in rows if (row["arm"], row["budget"]) == (mean["arm"], mean["budget"])
        ]
        if own:
            assert float(mean["mean"]) == pytest.approx(np.mean(own), abs=1e-5)
            assert float(mean["low"]) <= float(mean["mean"]) <= float(mean["high"])
    summary = json.loads((compared / "outputs" / "summary.json").read_text())
    assert summary["unit"] == "pixels" and all(0 <= float(row["region_f1"]) <= 1 for row in rows)
    base = np.mean([float(row["dice"]) for row in rows if row["arm"] == "System I"])
    last = [row for row in means if row["arm"] == "self-play" and row["measure"] == "dice"][-1]
    gains = [
        row for row in rows_of(compared / "outputs" / "differences.csv")
        if (row["arm"], row["baseline"], row["budget"]) == ("self-play", "System I", last["budget"])
    ]  # fmt: skip
    assert len(gains) == 1
    assert float(gains[0]["difference"]) == pytest.approx(float(last["mean"]) - base, abs=1e-5)


def dices(found):
    return {row.group: row.mean for row in found.means if row.measure == "dice"}


def change_rows(run, change):
    """Put other rows into the cells of a run."""
    for path in (run / "outputs" / "cells").iterdir():
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"subjects": change(record["subjects"])}))


def test_tables_of_several_comparisons_are_read_as_one(compared, tmp_path):
    # Leave one subject out: a comparison for each, one bootstrap over all.
    once, cases = tabulate(read_runs([compared]), 0, ARMS), rows_of(compared / "outputs" / "subjects.csv")
    stored = [row for row in rows_of(compared / "outputs" / "means.csv") if row["measure"] == "dice"]
    assert [*dices(once).values()] == pytest.approx([float(row["mean"]) for row in stored], abs=1e-6)
    (twice,) = read_runs([compared, compared])
    assert len(twice.subjects) == 2 * len(cases)
    assert dices(tabulate([twice], 0, ARMS)) == pytest.approx(dices(once))
    assert {row.count for row in tabulate([twice], 0, ARMS).means} == {2 * 4}
    other = shutil.copytree(compared, tmp_path / "other")
    change_rows(other, lambda rows: [row for row in rows if row["arm"] != "self-play"])
    with pytest.raises(InputError, match="other: expected the arms, seeds and budgets of .*compare, found others"):
        read_runs([compared, other])


def test_one_subject_has_no_interval(compared, tmp_path):
    # What is left out, one patient at a time, is one subject.
    run = shutil.copytree(compared, tmp_path / "run")
    change_rows(run, lambda rows: [{**row, "subject": "patient"} for row in rows])
    results = read_runs([run])
    alone = tabulate(results, 0, ARMS)
    base = alone.course(ARMS.base)[0]
    assert base.mean == pytest.approx(np.mean([row["dice"] for row in results[0].subjects if row["arm"] == ARMS.base]))
    last = alone.course(ARMS.thinking)[-1].group[1][1]
    gain = alone.gain(ARMS.thinking, int(last), ARMS.control)
    assert gain is not None and base.low is base.high is base.error is gain.low is None
    assert main(["report", str(run)]) == 0
    assert "one subject" in (run / "report.html").read_text()


def test_thinking_only_ever_raises_the_score(compared):
    scores = {}
    for row in rows_of(compared / "outputs" / "means.csv"):
        if row["measure"] == "score":
            scores.setdefault(row["arm"], []).append(float(row["mean"]))
    for arm in ("self-play", "random proposals", "verifier's gradient"):
        first, last = scores[arm]
        assert scores["System I"][0] - 1e-6 <= first <= last + 1e-6
    # The patch game begins with nothing, not with System I's masks.
    first, last = scores["patch game"]
    assert first <= last + 1e-6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("think", "--input", "nowhere.png"), "weights: expected images and System I, found nothing"),
        (("think", "--input", "nowhere.png", "--weights", "WEIGHTS"), "nowhere.png: expected an image or a folder"),
        (("think", "--input", "WEIGHTS", "--weights", "nowhere"), "nowhere: expected a run of meta-train or adapt"),
        (("think", "--input", "TEST", "--weights", "WEIGHTS", "--mask", "TEST/puzzle"), "expected a file"),
        (("adapt", "--data.manifest", "MANIFEST", "--weights", "WEIGHTS"), "task: expected one of"),
        (("adapt", "--data.manifest", "MANIFEST", "--weights", "WEIGHTS", "--task", "moon"), "found 'moon'"),
        (
            ("adapt", "--data.manifest", "MANIFEST", "--weights", "WEIGHTS", "--task", "star", "--shots", "99"),
            "shots: expected at most the",
        ),
        (
            ("think", "--input", "TEST", "--weights", "WEIGHTS", "--policy-weights", "WEIGHTS"),
            "expected a run of train-policy, found no record.json there",
        ),
        (("train-policy", "--data.manifest", "MANIFEST"), "weights: expected a run of meta-train, found nothing"),
        (("train-policy", "--think.mode", "grad"), "expected 'learn' in 1 round, found 'grad'"),
        (("meta-train", "--preprocess.size", "30", "30"), "preprocess.size: expected multiples of 4"),
        (("meta-train", "--data.manifest", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_mistakes_end_in_one_line(arguments, said, thought, weights, manifest, tmp_path, capsys):
    places = {"WEIGHTS": weights, "MANIFEST": manifest, "TEST": thought / "inputs" / "test"}
    filled = []
    for word in arguments:
        for name, place in places.items():
            word = word.replace(name, str(place))
        filled.append(word)
    assert run(*filled, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxmed: ") and error.count("\n") == 1 and said in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["meta-train", "train-policy", "adapt", "think", "compare"])
def test_files_over_a_synthetic_run_start_from_nothing(
    stage, thought, weights, familiar, manifest, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    for name in ("inputs/puzzles", "checkpoints/state/40", "outputs/system1"):
        (out / name).mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({"system": "selfplay", "stage": stage, "config": {}}))

    class Begun(Exception):
        """The stage is past its checks."""

    def begin(folder, *_, **__):
        start(folder)
        path = folder.path
        assert not (path / "checkpoints").exists() and not (path / "inputs").exists()
        assert [place.name for place in path.iterdir() if place.name == "outputs"] and not any(
            (path / "outputs").iterdir()
        )
        raise Begun

    module = importlib.import_module(f"jaxmed.systems.selfplay.stages.{stage.replace('-', '_')}")
    monkeypatch.setattr(module, "begin", begin)
    given = ["--input", thought / "inputs" / "test"] if stage == "think" else ["--data.manifest", manifest]
    given += {"meta-train": ["--preset", "smoke", "--data.synthetic", 0], "think": ["--weights", weights]}.get(
        stage,
        ["--weights", familiar, *(["--task", "star"] if stage != "train-policy" else [])],
    )
    with pytest.raises(Begun):
        run(stage, *given, "--overwrite", "--out", out)
