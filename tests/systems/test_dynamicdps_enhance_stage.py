"""`jaxmed dynamicdps calibrate` and `enhance` on files, and every mistake that a user can make with them."""

import csv
import dataclasses
import json
import shutil
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.cli import main
from jaxmed.config import from_record, to_record
from jaxmed.data.images import PREPROCESS
from jaxmed.diffusion.posterior.dynamicdps import REPO2026
from jaxmed.diffusion.posterior.start_time import StartTime
from jaxmed.errors import InputError
from jaxmed.files import write_json
from jaxmed.io import nifti
from jaxmed.models.unet_guided import GuidedUnet, GuidedUnetConfig
from jaxmed.nn.model import make_model
from jaxmed.physics.lowfield import LowField
from jaxmed.recipes.image_network import write_network
from jaxmed.recipes.refinement import Refinement
from jaxmed.systems.dynamicdps.calibration import Calibrated, digest_of, read_calibration
from jaxmed.systems.dynamicdps.methods import ARMS, MethodConfig
from jaxmed.systems.dynamicdps.stages import compare as compare_stage
from jaxmed.systems.dynamicdps.stages import enhance as stage
from jaxmed.train import log
from jaxmed.volume import Volume


def sized(size, **changes):
    return dataclasses.replace(PREPROCESS, size=size, **changes)


TINY = GuidedUnetConfig(width=8, multipliers=(1,), blocks=1, attention_factors=(), heads=2, groups=4)
FRAME = sized((16, 16))
ACQUISITION = LowField(gamma=0.8, scale=2.0, sigma=0.8, radius=2, noise=0.01)
START = StartTime(means=(2.0, 3.0, 4.0, 6.0), tau=0.5, steps_per_bin=5)


def make_params(config, seed=0):
    inputs = (jnp.zeros((1, 16, 16, 1)), *((jnp.zeros(1),) if config.with_time else ()))
    params = make_model(GuidedUnet(config)).init(jax.random.key(seed), *inputs)
    # The last convolutions start at 0: such a network says nothing.
    return jax.tree.map(lambda leaf: np.asarray(leaf) + 0.01, params)


def head(shape, seed):
    """A cylinder with darker and brighter ones in it, along the shortest axis: three slices are enough for a volume."""
    kept = np.sort(np.argsort(shape, kind="stable")[1:])
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape], indexing="ij"))
    image = 900.0 * ((grid[kept] ** 2).sum(0) < 0.75)
    rng = np.random.default_rng(seed)
    for _ in range(4):
        centre = rng.uniform(-0.5, 0.5, 2)[:, None, None, None]
        image[((grid[kept] - centre) ** 2).sum(0) < 0.05] = rng.uniform(200, 1200)
    return image + rng.normal(0, 5, shape) * (image > 0)


AFFINE = np.array([[-2.0, 0, 0, 10], [0, 0, 3, -9], [0, 2, 0, 4], [0, 0, 0, 1.0]])
# The same field of view on twice as many voxels, as another tool might write it.
FINE = np.array([[-1.0, 0, 0, 10.5], [0, 1.5, 0, -9.75], [0, 0, 1, 3.5], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Networks, a calibration and scans, one of them broken, with masks, labels and another tool's images."""
    folder = tmp_path_factory.mktemp("dynamicdps")
    prior = make_params(TINY)
    write_network(folder / "prior" / "outputs" / "model", prior, TINY, FRAME)
    enhancer = dataclasses.replace(TINY, with_time=False)
    write_network(folder / "initial" / "outputs" / "model", make_params(enhancer), enhancer, FRAME)
    calibrated = Calibrated(START, ACQUISITION, 20, digest_of(prior))
    write_json(folder / "calibration" / "outputs" / "calibration.json", to_record(calibrated))
    for number in range(3):
        name, image = f"s{number}.nii.gz", head((16, 3, 15), number)
        nifti.write(folder / "scans" / name, Volume.make(image, AFFINE))
        brain = Volume.make((image > 100).astype(np.uint8), AFFINE)
        nifti.write(folder / "masks" / name, brain)
        fine = np.repeat(np.repeat(np.repeat(image, 2, 0), 2, 1), 2, 2).transpose(0, 2, 1) * 3
        nifti.write(folder / "tool" / name, Volume.make(fine, FINE))
    broken = folder / "scans" / "s2.nii.gz"
    broken.write_bytes((folder / "scans" / "s0.nii.gz").read_bytes()[:200])
    return folder


def run(*arguments):
    return main(["dynamicdps", *map(str, arguments)])


def enhance(place, out):
    """Refine another tool's images of a folder of three scans, one broken, by two samples each."""
    return run(
        "enhance", "--input", place / "scans", "--initial", place / "tool", "--mask", place / "masks", "--labels",
        place / "masks", "--weights", place / "prior", "--calibration", place / "calibration", "--samples", "2",
        "--axis", "coronal", "--method.preset", "fixed", "--method.step", "0.02", "--method.plain", "--batch-size", "3",
        "--out", out, "--quiet",
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(place):
    assert enhance(place, place / "run") == 1
    return place / "run"


def test_one_broken_file_does_not_stop_the_others(done):
    with (done / "outputs" / "failed.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["id"] == "s2" and "s2.nii.gz" in row["reason"]
    with (done / "outputs" / "scans.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["s0", "s1"]
    assert "scans failed" in (done / "report.html").read_text()


def test_maps_lie_on_the_grid_of_the_scan_with_their_sidecars(place, done):
    stored = nifti.read(place / "scans" / "s0.nii.gz")
    maps = {}
    for name in ("enhanced", "uncertainty", "initial", "difference"):
        volume = nifti.read(done / "outputs" / f"s0_{name}.nii.gz")
        np.testing.assert_array_equal(volume.affine, stored.affine)
        maps[name] = volume.array
        sidecar = json.loads((done / "outputs" / f"s0_{name}.json").read_text())
        assert {"definition", "unit", "constants", "software"} <= sidecar.keys()
        assert sidecar["constants"]["acquisition"]["gamma"] == 0.8
    # The other tool's image, thrice as bright and twice as fine, comes onto the grid of the scan, scaled by itself.
    inside = (stored.array > 0) & (stored.array < 1000)
    likeness = [
        np.corrcoef(image[inside], stored.array[inside])[0, 1] for image in (maps["initial"], maps["initial"][::-1])
    ]
    assert likeness[0] > 0.9 and likeness[1] < 0.7
    assert 0.5 < np.median(maps["initial"][inside] / stored.array[inside]) < 2
    # What is above [0, 2] is cut, so the difference is to the scan where that was not needed.
    np.testing.assert_allclose((maps["enhanced"] - maps["difference"])[inside], stored.array[inside], atol=0.5)
    assert maps["uncertainty"].max() > 1 and np.abs(maps["difference"]).max() > 10


def test_a_scan_says_what_happened_to_it(done):
    row = json.loads((done / "outputs" / "s0.json").read_text())
    # 15 coronal planes of 16 x 3, those that show a head.
    assert 4 < row["images"] <= 15 and row["samples"] == 2
    assert row["start"]["highest"] <= 19 and row["evaluations"] >= 5
    assert len(row["steps"]) == len(row["curve"]) == row["start"]["highest"] + 1
    assert set(row["volumes_ml"]) == {"input", "initial", "enhanced"}
    totals = [sum(volumes.values()) for volumes in row["volumes_ml"].values()]
    np.testing.assert_allclose(totals, row["labels_ml"]["1"], rtol=1e-3)


def test_a_run_goes_on_where_it_was_stopped(place, done, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(done, copy)
    (copy / "report.html").unlink()
    (copy / "outputs" / "s1.json").rename(copy / "s1.json")
    asked = []

    def process(plan, one, key, folder, tell):
        asked.append((one.name, int(jax.random.key_data(key)[-1])))
        if one.name == "s2":
            raise InputError("s2.nii.gz", "a scan", "a broken one")
        return from_record(Refinement, json.loads((copy / "s1.json").read_text()), "s1.json")

    monkeypatch.setattr(stage, "process", process)
    assert enhance(place, copy) == 1
    # The random numbers of a scan follow from its place in the list, whatever was done before.
    keys = [int(jax.random.key_data(jax.random.fold_in(jax.random.key(0), number))[-1]) for number in (1, 2)]
    assert asked == [("s1", keys[0]), ("s2", keys[1])]
    for name in ("scans.csv", "failed.csv", "volumes.csv"):
        assert (copy / "outputs" / name).exists()


def test_a_repaired_scan_is_tried_again_by_the_same_command(place, done, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(done, copy)
    asked = []

    def process(plan, one, key, folder, tell):
        asked.append(one.name)
        record = json.loads((copy / "outputs" / "s1.json").read_text())
        return from_record(Refinement, record | {"name": one.name, "path": str(one.path)}, "s1.json")

    monkeypatch.setattr(stage, "process", process)
    assert enhance(place, copy) == 0
    assert asked == ["s2"]  # as if it had been repaired
    assert not (copy / "outputs" / "failed.csv").exists()
    with (copy / "outputs" / "scans.csv").open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["s0", "s1", "s2"]
    assert enhance(place, copy) == 0 and asked == ["s2"]


def test_results_of_a_job_never_share_a_name(tmp_path):
    scans = tmp_path / "scans"
    for name in ("a_b.nii.gz", "a/b.nii.gz", "x.nii.gz", "x_enhanced.nii.gz", "X.png", "summary.nii"):
        (scans / name).parent.mkdir(parents=True, exist_ok=True)
        (scans / name).touch()
    inputs, _ = stage.list_scans(stage.Config(input=scans))
    written = [f"{one.name}{end}".lower() for one in inputs for end in ("", *(f"_{name}" for name in stage.MAPS))]
    assert len(inputs) == 6 and len(set(written)) == len(written) and "summary" not in written


def test_calibration_and_strict_searches_by_the_command_line(place, tmp_path):
    affine = np.diag([2.0, 2, 2, 1])
    for number in range(2):
        image, name = head((16, 16, 3), 10 + number), f"r{number}.nii.gz"
        nifti.write(tmp_path / "references" / name, Volume.make(image, affine))
        nifti.write(tmp_path / "low" / name, Volume.make(image**0.9, affine))
    out, enhanced = tmp_path / "calibration", tmp_path / "enhanced"
    shared = ["--weights", place / "prior", "--initial", place / "initial", "--quiet"]
    code = run(
        "calibrate", "--input", tmp_path / "references", "--low", tmp_path / "low", "--out", out, *shared,
        "--runs", "3", "--batch-size", "3", "--steps", "20", "--bins", "4", "--scale", "0.05",
        "--acquisition.scale", "1.0", "--acquisition.radius", "2", "--fit.max-steps", "400",
    )  # fmt: skip
    assert code == 0
    found = read_calibration(out)
    assert len(found.start.means) == 4 and found.steps == 20 and found.start.steps_per_bin == 5
    # The low-field scans are the high-field ones to the power of 0.9, unblurred, but each is scaled by itself.
    assert 0.8 < found.acquisition.gamma < 1.2 and found.acquisition.sigma < 0.5
    assert found.acquisition.noise < 0.05
    with (out / "outputs" / "bank.csv").open() as file:
        bank = list(csv.DictReader(file))
    assert len(bank) == 20 and all(float(row["lowest"]) <= float(row["highest"]) for row in bank)
    assert "Acquisition" in (out / "report.html").read_text()
    code = run(
        "enhance", "--input", tmp_path / "low" / "r0.nii.gz", "--calibration", out, "--out", enhanced, *shared,
        "--method.plain", "--method.max-trials", "3", "--batch-size", "3", "--no-tissue",
    )  # fmt: skip
    assert code == 0
    row = json.loads((enhanced / "outputs" / "r0.json").read_text())
    assert row["images"] == 3 and row["residual"]["enhanced"] < row["residual"]["initial"]
    # The estimate is the untrained network's, not the scan.
    initial, scan = nifti.read(enhanced / "outputs" / "r0_initial.nii.gz"), nifti.read(tmp_path / "low" / "r0.nii.gz")
    assert np.abs(initial.array - scan.array).max() > 50


def test_another_method_of_the_comparison_is_chosen_by_name(place, tmp_path, monkeypatch, capsys):
    """Without a calibration, since only DynamicDPS asks a bank where to start; one scan says how far it is."""
    monkeypatch.setattr(log, "SECONDS_BETWEEN_LINES", 0.0)
    scan = place / "scans" / "s0.nii.gz"
    code = run(
        "enhance", "--input", scan, "--weights", place / "prior", "--solver", "pnp-dpir", "--budget.evaluations", "3",
        "--batch-size", "3", "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0
    row = json.loads((tmp_path / "run" / "outputs" / "s0.json").read_text())
    said = capsys.readouterr().err
    assert "Refining 1 scans; for every batch: 3 passes of 3 x 16 x 16 x 1" in said
    assert all(f"Refining: 0 of 1 scans, s0: {done} of {row['images']} images" in said for done in (3, row["images"]))
    with (tmp_path / "run" / "outputs" / "volumes.csv").open() as file:
        tissue = list(csv.DictReader(file))
    assert list(tissue[0]) == ["id", "image", "csf_ml", "grey_ml", "white_ml"]
    assert float(tissue[0]["csf_ml"]) == pytest.approx(row["volumes_ml"]["input"]["csf"], rel=1e-5)
    assert row["evaluations"] == 3 and len(row["curve"]) == 3
    summary = json.loads((tmp_path / "run" / "outputs" / "summary.json").read_text())
    assert "Method: PnP-DPIR from an empty image." in summary["notes"]
    sidecar = json.loads((tmp_path / "run" / "outputs" / "s0_enhanced.json").read_text())
    assert sidecar["constants"]["method"] == {"solver": "pnp-dpir", "evaluations": 3, "scale": 0.3}
    assert nifti.read(tmp_path / "run" / "outputs" / "s0_enhanced.nii.gz").array.std() > 0
    assert {*get_args(stage.Solver)} == {*ARMS} - {"conditional"}


def test_a_prior_of_volumes_refines_a_scan_in_blended_tiles(tmp_path):
    """12 x 12 x 10 voxels in tiles of 8 x 8 x 8, half of each shared; a corner of the scan is empty."""
    config = dataclasses.replace(TINY, dimensions=3)
    inputs = jnp.zeros((1, 8, 8, 8, 1)), jnp.zeros(1)
    shapes = jax.eval_shape(make_model(GuidedUnet(config)).init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    write_network(tmp_path / "prior" / "outputs" / "model", params, config, sized((8, 8, 8)))
    image = np.zeros((12, 12, 10))
    image[4:, 4:, 2:] = head((8, 8, 8), 0) + 100
    affine = np.array([[0, 0, 2.0, 1], [-3, 0, 0, 5], [0, 2, 0, 0], [0, 0, 0, 1]])
    nifti.write(tmp_path / "scan.nii.gz", Volume.make(image, affine))
    code = run(
        "enhance", "--input", tmp_path / "scan.nii.gz", "--weights", tmp_path / "prior", "--samples", "2",
        "--method.start", "fixed", "--method.fixed-start", "3", "--method.preset", "fixed", "--method.step", "0.02",
        "--method.plain", "--acquisition.gamma", "0.9", "--acquisition.scale", "1.0", "1.0", "2.0",
        "--acquisition.radius", "2", "--no-tissue", "--out", tmp_path / "run", "--quiet",
    )  # fmt: skip
    assert code == 0
    maps = {
        name: nifti.read(tmp_path / "run" / "outputs" / f"scan_{name}.nii.gz")
        for name in ("enhanced", "uncertainty", "difference")
    }
    row = json.loads((tmp_path / "run" / "outputs" / "scan.json").read_text())
    # Two tiles fit along each axis, and all hold some of the head; four steps, an evaluation each.
    assert row["images"] == 8 and row["samples"] == 2 and row["evaluations"] == 4
    for volume in maps.values():
        assert volume.array.shape == image.shape
        np.testing.assert_array_equal(volume.affine, affine)
    array = maps["enhanced"].array
    assert maps["uncertainty"].array[5:, 5:, 3:].min() > 0 and np.abs(array - image)[image > 0].mean() > 1
    assert "scan" in (tmp_path / "run" / "report.html").read_text()


def nan_scan(place, folder):
    array = head((16, 16, 3), 0)
    array[3, 3, 1] = np.nan
    nifti.write(folder / "nan.nii.gz", Volume.make(array, np.eye(4)), allow_nonfinite=True)
    return ["--input", folder / "nan.nii.gz"]


def write(folder, array, affine=None):
    path = folder / "scan.nii.gz"
    nifti.write(path, Volume.make(np.asarray(array, np.float32), np.eye(4) if affine is None else affine))
    return ["--input", path]


MISTAKES = {
    "no input": (lambda p, f: ["--input", f / "nothing"], "a scan or a folder of scans"),
    "empty folder": (lambda p, f: ["--input", (f / "empty").mkdir() or f / "empty"], "none in this folder"),
    "truncated": (lambda p, f: ["--input", p / "scans" / "s2.nii.gz"], "s2.nii.gz"),
    "no image": (lambda p, f: ["--input", f / "a.txt"] if (f / "a.txt").write_text("hello") else [], ".nii, .nii.gz"),
    "four dimensions": (lambda p, f: write(f, np.random.default_rng(0).random((8, 8, 8, 2))), "3D data"),
    "not finite": (nan_scan, "finite voxels"),
    "all zero": (lambda p, f: write(f, np.zeros((8, 8, 8))), "an image with contrast"),
    "no bank": (lambda p, f: ["--calibration", "None"], "give a run of calibrate"),
    "no calibration there": (lambda p, f: ["--calibration", f], "a run of calibrate, with outputs/calibration.json"),
    "another chain": (lambda p, f: ["--method.steps", "50"], "a bank of 50 steps"),
    "start beyond the chain": (
        lambda p, f: ["--method.start", "fixed", "--method.fixed-start", "20"],
        "less than the 20 steps",
    ),
    "prior is none": (lambda p, f: ["--weights", p / "initial"], "a diffusion prior"),
    "no weights": (lambda p, f: ["--weights", f / "nothing"], "weights"),
    "network is none": (lambda p, f: ["--initial", p / "prior"], "a conditional network"),
    "initial of elsewhere": (
        lambda p, f: ["--initial", write(f, head((16, 16, 3), 0), np.diag([1.0, 1, 1, 1]) + np.eye(4, k=3) * 500)[1]],
        "register it first",
    ),
    "mask on another grid": (lambda p, f: ["--mask", write(f, head((9, 9, 3), 0) > 0)[1]], "the shape of"),
    "initial missing": (lambda p, f: ["--initial", (f / "none").mkdir() or f / "none"], "a file for every input"),
    "three numbers for two axes": (
        lambda p, f: ["--calibration", "None", "--method.start", "fixed", "--acquisition.scale", "1.0", "2.0", "3.0"],
        "acquisition",
    ),
    "samples": (lambda p, f: ["--samples", "0"], "samples"),
    "bad gamma": (lambda p, f: ["--acquisition.gamma", "-1"], "gamma"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(name, place, tmp_path, capsys):
    make, words = MISTAKES[name]
    out = tmp_path / "run"
    arguments = {
        "--input": place / "scans" / "s0.nii.gz",
        "--weights": place / "prior",
        "--calibration": place / "calibration",
    }
    more = list(make(place, tmp_path))
    for option in arguments.copy():
        if option in more:
            arguments.pop(option)
    words_given = [word for pair in arguments.items() for word in pair]
    assert run("enhance", *words_given, *more, "--out", out) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("jaxmed: ") and words in said[-1], said
    assert not any("Traceback" in line for line in said)
    assert not (out / "outputs").exists() or not any((out / "outputs").iterdir())


def test_a_bank_belongs_to_one_prior(place, tmp_path, capsys):
    write_network(tmp_path / "other" / "outputs" / "model", make_params(TINY, seed=1), TINY, FRAME)
    scan = place / "scans" / "s0.nii.gz"
    code = run(
        "enhance", "--input", scan, "--weights", tmp_path / "other", "--calibration", place / "calibration",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 2 and "one of this prior, found one of another" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, words",
    [
        ([], "input: expected reference scans, found nothing"),
        (["--low", "nowhere"], "a file for every input"),
        (["--bins", "7"], "a divisor"),
        (["--runs", "0"], "runs"),
    ],
)
def test_mistakes_in_a_calibration(more, words, place, tmp_path, capsys):
    scans = ["--input", place / "scans" / "s0.nii.gz"] if more else []
    assert run("calibrate", *scans, "--weights", place / "prior", *more, "--out", tmp_path / "run") == 2
    assert words in capsys.readouterr().err


def test_presets_of_the_method_become_its_settings():
    calibrated = Calibrated(START, ACQUISITION, 20, "")
    strict, repo = (MethodConfig(preset).build(calibrated) for preset in ("strict", "repo2026"))
    assert strict.start.rule == "monotone" and repo.start.rule == "repo" and repo.line == "mixed"
    assert (strict.search.max_evaluations, repo.search.max_evaluations) == (6, 10)
    assert MethodConfig(max_trials=4).build(calibrated).search.max_evaluations == 4
    assert strict.sampler.num_steps == 20 and strict.noise_std is None
    # As often for the noise walked through: of 1000 steps every fifth above the fifth, of 200 every one.
    rhythm = {steps: MethodConfig(start="fixed", fixed_start=9, steps=steps).build(None) for steps in (0, 400, 200, 20)}
    found = {steps: (method.search_every, method.search_above) for steps, method in rhythm.items()}
    assert found == {0: (5, 5), 400: (2, 2), 200: (1, 1), 20: (1, 0)}
    fixed = MethodConfig("fixed", start="fixed", step=3.0, noise=0.1, plain=True).build(None)
    assert fixed.search is None and fixed.first_step == 3.0 and fixed.noise_std == 0.1
    assert fixed.sampler.num_steps is None and fixed.start.fixed == 49 and fixed.fidelity.edge_weight == 0
    assert MethodConfig(step=3.0).build(calibrated).search.max_step == 3.0


def test_the_paper_preset_is_the_released_rules_and_search():
    bank = dataclasses.replace(START, steps_per_bin=250)
    config = stage.paper()
    found = config.method.build(Calibrated(bank, ACQUISITION, 0, ""))
    # The bank is that of the prior; what is done with it, and all else, is the authors'.
    start = StartTime(rule="repo", means=bank.means, tau=0.4, scale=1.0, steps_per_bin=250)
    assert found == dataclasses.replace(REPO2026, start=start)
    assert config.samples == 1 and "the authors' code of April 2026" in config.method.describe()
    assert compare_stage.paper().method == config.method
    assert "ours" in MethodConfig.__doc__ and "our line search" in MethodConfig().describe()


@pytest.mark.slow
def test_smoke_presets_run_and_lower_the_residual(tmp_path):
    assert run("enhance", "--preset", "smoke", "--out", tmp_path / "run", "--quiet") == 0
    for scan in json.loads((tmp_path / "run" / "outputs" / "summary.json").read_text())["scans"]:
        assert scan["residual"]["enhanced"] < scan["residual"]["initial"]
    assert run("enhance", "--preset", "smoke", "--out", tmp_path / "run", "--quiet") == 0
