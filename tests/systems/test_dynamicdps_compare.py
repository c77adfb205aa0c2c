"""`jaxmed dynamicdps compare`: cells, arms, scores, and a run on files with untrained networks."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from priors import oracle

from jaxmed.cli import main
from jaxmed.data.images import PREPROCESS
from jaxmed.data.subject_images import SubjectImages
from jaxmed.diffusion.posterior.dynamicdps import STRICT
from jaxmed.diffusion.posterior.start_time import StartTime
from jaxmed.diffusion.samplers import Ancestral
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.errors import InputError
from jaxmed.metrics.restoration import MEASURES
from jaxmed.models.unet_guided import GuidedUnet, GuidedUnetConfig
from jaxmed.nn.model import make_model
from jaxmed.physics.lowfield import LowField, make_operator
from jaxmed.recipes.image_network import write_network
from jaxmed.recipes.posterior_samples import draw_samples, make_program
from jaxmed.recipes.restoration_study import NOISE, score_subjects
from jaxmed.synthesis.phantoms.brain import BrainConfig
from jaxmed.synthesis.phantoms.mixture import make_isotropic
from jaxmed.synthesis.phantoms.write_brain import write_brain_cohort
from jaxmed.systems.dynamicdps.calibration import residuals_of
from jaxmed.systems.dynamicdps.methods import ARMS, ArmConfig, expected_passes, length_of, make_solver
from jaxmed.systems.dynamicdps.stages.compare import Config, make_scorer, plan_cells


def sized(size, **changes):
    return dataclasses.replace(PREPROCESS, size=size, **changes)


SIZE = (16, 16)
PLAIN_SCAN = LowField(gamma=1.0, scale=2.0, sigma=0.7, radius=3, noise=0.01)


# --- Cells ------------------------------------------------------------------------------------


def test_methods_from_noise_run_once_and_others_for_every_model():
    cells = plan_cells(("conditional", "dps", "dynamicdps"), ("a", "b"), ("one", "two"))
    places = [(str(cell["condition"]), str(cell["initial"]), str(cell["arm"])) for cell in cells]
    assert len(set(places)) == len(places) == 2 * (2 + 1 + 2)
    assert {start for _, start, arm in places if arm == "dps"} == {NOISE}
    assert {start for _, start, arm in places if arm != "dps"} == {"a", "b"}
    with pytest.raises(InputError, match="initial: expected one or more, each once, found a, a"):
        plan_cells(("dps",), ("a", "a"), ("one",))
    with pytest.raises(InputError, match="found 'dip'"):
        plan_cells(("dip",), ("a",), ("one",))


# --- Arms -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem():
    """Four flat images with an edge, an exact prior of both kinds of edge, and an estimate of the wrong kind."""
    left = np.ones(SIZE, np.float32)
    left[:, 8:] = 0.4
    modes = np.stack([left, left.T])
    mixture = make_isotropic(jnp.ones(2), jnp.asarray(modes.reshape(2, -1)), jnp.full(2, 0.05))
    truth = np.repeat(modes[:1], 2, 0)[..., None]
    operator = make_operator(SIZE, PLAIN_SCAN)
    measurement = np.asarray(jax.vmap(operator)(jnp.asarray(truth)))
    return mixture, truth, measurement, np.repeat(modes[1:], 2, 0)[..., None]


@pytest.mark.parametrize("name", ARMS)
def test_every_method_moves_towards_the_truth(problem, name):
    mixture, truth, measurement, wrong = problem
    chain = Ancestral(num_steps=60)
    # The whole chain: a shorter one keeps the wrong kind of edge, which is another test's matter.
    start = StartTime(rule="fixed", fixed=59)
    method = dataclasses.replace(STRICT, sampler=chain, start=start, noise_std=0.01)
    solve = make_solver(name, SIZE, PLAIN_SCAN, method, ArmConfig(evaluations=60, scale=0.5))
    program = make_program(lambda params: oracle(mixture, VpDiscrete()), make_operator(SIZE, PLAIN_SCAN), solve, 2)
    found = draw_samples(program, {}, jax.random.key(0), measurement, wrong)
    errors = [float(np.sqrt(np.mean((image - truth) ** 2))) for image in (wrong, found.mean)]
    assert found.mean.min() >= 0 and found.mean.max() <= 2
    if name == "conditional":
        assert errors[1] == errors[0] and (found.evaluations == 0).all() and not found.curve.size
        return
    assert errors[1] < 0.6 * errors[0]
    if name == "dynamicdps":
        assert (found.evaluations > 1).all() and (found.start_time == 59).all()
    else:
        assert (found.evaluations == 60).all()


def test_lengths_are_those_of_the_authors_unless_a_budget_is_given():
    assert length_of("dps", 1000, ArmConfig()) == 1000 and length_of("ddrm", 1000, ArmConfig()) == 20
    assert length_of("dps", 100, ArmConfig()) == 100
    fixed_length = {name for name, arm in ARMS.items() if arm.evaluations}
    assert {length_of(name, 1000, ArmConfig(evaluations=70)) for name in fixed_length} == {70}
    fixed = dataclasses.replace(STRICT, start=StartTime(rule="fixed", fixed=49))
    # Fifty steps, and searches of six trials at 10, 15, ... 45 left.
    assert expected_passes("dynamicdps", fixed, ArmConfig()) == 50 + 8 * 6
    assert expected_passes("conditional", fixed, ArmConfig()) == 0 and expected_passes("ddrm", fixed, ArmConfig()) == 20
    assert {"reddiff", "daps", "pnp-dpir"} < fixed_length == set(ARMS) - {"conditional", "dynamicdps"}
    with pytest.raises(InputError, match="arm: expected one of .*, found 'dsp'"):
        make_solver("dsp", SIZE, PLAIN_SCAN, STRICT)
    with pytest.raises(ValueError, match="evaluations: expected 2 or more, or 0, found 1"):
        ArmConfig(evaluations=1)


# --- A run on files ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Untrained networks with the smallest layout, and a cohort of three brains."""
    place = tmp_path_factory.mktemp("compare")
    frame, rng = sized((32, 32)), np.random.default_rng(9)
    for name, with_time in (("prior", True), ("one", False), ("two", False)):
        config = GuidedUnetConfig(
            width=8, multipliers=(1,), blocks=1, attention_factors=(), heads=1, groups=4, with_time=with_time
        )
        inputs = (jnp.zeros((1, 32, 32, 1)), *((jnp.zeros(1),) if with_time else ()))
        shapes = jax.eval_shape(make_model(GuidedUnet(config)).init, jax.random.key(0), *inputs)
        params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)
        write_network(place / name / "outputs" / "model", params, config, frame)
    manifest = write_brain_cohort(
        place / "brains", 1, 3, (32, 32), BrainConfig(lesion_probability=0.5), fractions=(0.0, 0.0, 1.0)
    )
    return place, manifest


def command(files, out, *further):
    place, manifest = files
    return [
        "dynamicdps", "compare", "--out", str(out), "--quiet", "--manifest", str(manifest),
        "--weights", str(place / "prior"), "--initial", str(place / "one"), str(place / "two"),
        "--arms", "conditional", "ddnm", "--acquisition.gamma", "1.0", "--acquisition.scale", "2.0",
        "--method.start", "fixed", "--method.fixed-start", "4", "--method.steps", "10", "--batch-size", "4",
        "--other-gamma", "0", *further,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(command(files, out)) == 0
    return out


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_run_writes_tables_of_every_cell_and_a_page(run):
    subjects = rows_of(run / "outputs" / "subjects.csv")
    assert len(subjects) == 3 * (2 + 1)
    assert {row["condition"] for row in subjects} == {"in-distribution"}
    for row in subjects:
        assert all(np.isfinite(float(row[name])) for name in MEASURES), row
    means = rows_of(run / "outputs" / "means.csv")
    assert {row["measure"] for row in means} == {*MEASURES, "evaluations"}
    passes = {row["arm"]: float(row["mean"]) for row in means if row["measure"] == "evaluations"}
    assert passes == {"conditional": 0.0, "ddnm": 10.0}  # the chain has no more
    differences = rows_of(run / "outputs" / "differences.csv")
    assert {(row["condition"], row["initial"], row["arm"]) for row in differences} == {
        ("in-distribution", initial, "ddnm") for initial in ("one", "two")
    }
    page = (run / "report.html").read_text()
    assert "Against the conditional model" in page and "in-distribution: gamma 1" in page
    # The measurement is fitted better where data decide than where an untrained network does.
    found = {(row["arm"], row["initial"]): float(row["mean"]) for row in means if row["measure"] == "residual"}
    assert found["ddnm", "noise"] < found["conditional", "one"]


def test_an_interrupted_run_goes_on_with_the_cells_that_are_missing(run, files):
    cells = sorted((run / "outputs" / "cells").iterdir())
    before = {path: path.read_text() for path in cells}
    cells[0].unlink()
    (run / "report.html").unlink()
    assert main(command(files, run)) == 0
    for path, text in before.items():
        again, first = json.loads(path.read_text()), json.loads(text)
        for record in (again, first):
            record["metrics"].pop("seconds")
        assert again == first
    assert (run / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--manifest", "missing.csv"), "missing.csv: expected a table"),
        (("--weights", "ONE"), "expected a diffusion prior"),
        (("--initial", "PRIOR"), "expected a conditional network"),
        (("--arms", "dip"), "arms"),
        (("--method.start", "bank"), "calibration: expected the bank that chooses starts"),
        (("--input", "ONE"), "manifest, input: expected one of them, found both"),
        (("--batch-size", "0"), "batch_size"),
        (("--budget.evaluations", "1"), "evaluations"),
    ],
)
def test_mistakes_end_in_one_line(files, tmp_path, capsys, change, message):
    place, _ = files
    name, value = change
    value = {"ONE": str(place / "one"), "PRIOR": str(place / "prior")}.get(value, value)
    words = command(files, tmp_path / "run")
    if name in words:
        first = words.index(name)
        last = next((i for i in range(first + 1, len(words)) if words[i].startswith("--")), len(words))
        words[first:last] = [name, value]
    else:
        words += [name, value]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxmed: ") and message in error and "Traceback" not in error


def test_images_without_a_head_and_models_of_another_size_are_refused(files, tmp_path, capsys):
    place, manifest = files
    other = GuidedUnetConfig(
        width=8, multipliers=(1,), blocks=1, attention_factors=(), heads=1, groups=4, with_time=False
    )
    image = jax.ShapeDtypeStruct((1, 16, 16, 1), jnp.float32)
    shapes = jax.eval_shape(make_model(GuidedUnet(other)).init, jax.random.key(0), image)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    write_network(tmp_path / "small" / "outputs" / "model", params, other, sized((16, 16)))
    words = command(files, tmp_path / "run")
    words[words.index(str(place / "two"))] = str(tmp_path / "small")
    assert main(words) == 2
    assert "expected a network of the prior's preprocessing, (32, 32)" in capsys.readouterr().err
    table = tmp_path / "train.csv"
    first = manifest.parent / "scans" / "brain_0000.nii.gz"
    table.write_text(f"path,split\n{first},train\n")
    words = command(files, tmp_path / "run")
    words[words.index(str(manifest))] = str(table)
    assert main(words) == 2
    assert "expected rows with split 'test', found none" in capsys.readouterr().err


# --- Scores -----------------------------------------------------------------------------------


def test_the_truth_has_perfect_scores_and_an_invented_lesion_is_counted():
    image = np.zeros((2, 32, 32), np.float32)
    image[:, 4:28, 4:28] = 1.0
    image[:, 4:28, 4:10], image[:, 4:28, 10:18] = 0.3, 0.7
    subject = SubjectImages("s", image, None)
    assert subject.brain.sum() == 2 * 24 * 24 and not subject.lesions.any()
    scorer = make_scorer((32, 32), PLAIN_SCAN)
    measurement = np.asarray(jax.vmap(make_operator((32, 32), PLAIN_SCAN))(jnp.asarray(image[..., None])))

    def known(images, evaluations):
        residual = residuals_of(measurement, images[..., None], PLAIN_SCAN)
        return {"residual": residual, "evaluations": np.full(2, evaluations)}

    slightly = image + 1e-4
    (perfect,) = score_subjects(scorer, [subject], slightly, known(slightly, 0.0))
    assert perfect["psnr"] > 80 and perfect["ssim"] > 0.999 and perfect["residual"] < 0.01
    assert perfect["volume_error"] < 0.01 and perfect["false_lesions"] == 0 and perfect["contradicted"] < 1e-3
    invented = image.copy()
    invented[0, 20:26, 20:26] = 0.3
    (found,) = score_subjects(scorer, [subject], invented, known(invented, 5.0))
    assert found["false_lesions"] == 0.5 and found["evaluations"] == 5
    # White matter that looks like fluid: the estimator sees it.
    assert found["volume_error_csf"] > 0.05 and found["volume_error_white"] > 0.02
    assert found["contradicted"] > 0.05 and found["perceptual"] > 10 * perfect["perceptual"]


def test_settings_that_compare_nothing_are_refused():
    with pytest.raises(ValueError, match="arms: expected some of"):
        Config(arms=("dps", "dps"))
    with pytest.raises(ValueError, match="other_gamma"):
        Config(other_gamma=-1.0)


@pytest.mark.slow
def test_the_smoke_preset_trains_its_own_networks(tmp_path):
    out = tmp_path / "run"
    assert main(["dynamicdps", "compare", "--preset", "smoke", "--out", str(out), "--quiet"]) == 0
    found = {
        (row["condition"], row["initial"], row["arm"]): float(row["mean"])
        for row in rows_of(out / "outputs" / "means.csv") if row["measure"] == "residual"
    }  # fmt: skip
    # An unknown contrast: the conditional model contradicts its measurement, and the refined image does not.
    where = "other contrast", "train-initial"
    assert found[*where, "dynamicdps"] < 0.5 * found[*where, "conditional"]
