"""`jaxmed dynamicdps train-prior` and `train-initial` from files to networks, and every mistake a user can make."""

import dataclasses
import gzip
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.cli import main
from jaxmed.config import to_record
from jaxmed.data.images import PREPROCESS, ImageData
from jaxmed.data.loader import LoaderConfig
from jaxmed.io import nifti, safetensors
from jaxmed.io.tables import write_table
from jaxmed.models.published.load import export_published, load_published
from jaxmed.models.unet_guided import DYNAMICDPS_PRIOR, GuidedUnet, GuidedUnetConfig
from jaxmed.nn.model import make_model
from jaxmed.physics.lowfield import LowField, make_operator
from jaxmed.recipes.image_network import ImageNetworkConfig, load_initial_weights, write_network
from jaxmed.recipes.training import TrainConfig
from jaxmed.synthesis.label_images import ImageMaker
from jaxmed.systems.dynamicdps.networks import load_initial, load_prior
from jaxmed.systems.dynamicdps.stages import train_initial, train_prior
from jaxmed.train.log import read_metrics
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.volume import Volume


def sized(size, **changes):
    return dataclasses.replace(PREPROCESS, size=size, **changes)


MODEL = GuidedUnetConfig(width=8, multipliers=(1,), blocks=1, attention_factors=(), heads=2, groups=4)
IMAGES = ImageNetworkConfig(preprocess=sized((8, 8)), model=MODEL)
PRIOR = train_prior.Config(
    IMAGES,
    TrainConfig(
        OptimizerConfig(peak_lr=1e-3, decay="constant", weight_decay=0.0),
        LoopConfig(steps=3, log_every=1, save_every=0),
        LoaderConfig(batch_size=4),
        MeshConfig(data=1),
        ema_decay=0.9999,
    ),
    samples=2,
    sample_steps=2,
)


def prior(**changes):
    return dataclasses.replace(PRIOR, network=dataclasses.replace(IMAGES, **changes))


def head(seed, shape=(14, 12, 6)):
    places = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = np.sqrt(sum(place**2 for place in places)) < 0.8
    return (inside * np.random.default_rng(seed).uniform(300, 500, shape)).astype(np.float32)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scans"
    for number in range(4):
        nifti.write(folder / f"scan_{number}.nii.gz", Volume.make(head(number), np.eye(4)))
    return folder


def run(out, stage, config, *words):
    """Run a configuration through the command line."""
    stored = out.parent / f"{out.name}.json"
    stored.write_text(json.dumps({"system": "dynamicdps", "stage": stage, "config": to_record(config)}))
    return main(["dynamicdps", stage, "--config", str(stored), "--out", str(out), "--quiet", *words])


def only_line(capsys):
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


# Runs ----------------------------------------------------------------------------------------------------------------


SHORTER = ("--preset", "smoke", "--loop.steps", "80")


def test_smoke_prior_tells_noise_from_heads_that_it_was_not_trained_on(tmp_path):
    out = tmp_path / "smoke"
    assert main(["dynamicdps", "train-prior", *SHORTER, "--out", str(out), "--quiet"]) == 0
    # 1 is the error of a network that predicts no noise.
    assert read_metrics(out)[-1]["evaluation/loss"] < 0.1
    summary = json.loads((out / "outputs" / "summary.json").read_text())
    assert summary["counts"]["train"]["images"] == 32 and summary["counts"]["validation"]["scans"] == 8
    assert summary["bits_per_voxel"] is None
    found = load_prior(out)
    assert found.preprocess == sized((32, 32)) and found.config == train_prior.smoke().network.model
    drawn = nifti.read(out / "outputs" / "samples.nii.gz").array
    assert drawn.shape == (32, 32, 4) and drawn.min() >= 0 and drawn.max() <= 2
    page = (out / "report.html").read_text()
    assert "What the prior has learnt" in page
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0 and (out / "report.html").read_text() == page


def test_smoke_enhancer_is_nearer_to_the_truth_than_its_input(tmp_path):
    out = tmp_path / "smoke"
    assert main(["dynamicdps", "train-initial", *SHORTER, "--out", str(out), "--quiet"]) == 0
    last = read_metrics(out)[-1]
    assert last["evaluation/loss"] < 0.7 * last["evaluation/measurement_error"]
    summary = json.loads((out / "outputs" / "summary.json").read_text())
    assert summary["psnr"]["enhanced"] > summary["psnr"]["measurement"] + 2
    initial = load_initial(out)
    measurement, enhanced = (
        nifti.read(out / "outputs" / f"{name}.nii.gz").array for name in ("measurement", "enhanced")
    )
    again = initial.model.apply(initial.params, jnp.asarray(np.moveaxis(measurement, 2, 0)[..., None]))
    np.testing.assert_allclose(np.clip(again[..., 0], 0, 2), np.moveaxis(enhanced, 2, 0), atol=1e-4)
    record = json.loads((out / "outputs" / "model" / "record.json").read_text())
    assert record["gamma"] == [0.8, 1.0] and record["acquisition"]["scale"] == 2.0
    assert "What the network makes of low-field images" in (out / "report.html").read_text()


@pytest.mark.slow
def test_a_prior_of_volumes_is_trained_on_patches_and_refines_a_volume(scans, tmp_path):
    config = prior(
        input=scans, preprocess=sized((4, 4, 4)), model=dataclasses.replace(MODEL, dimensions=3),
        data=ImageData(validation=0.25, patches=4),
    )  # fmt: skip
    out = tmp_path / "run"
    assert run(out, "train-prior", dataclasses.replace(config, likelihoods=2)) == 0
    summary = json.loads((out / "outputs" / "summary.json").read_text())
    assert np.isfinite(summary["bits_per_voxel"]) and "Bits per voxel" in (out / "report.html").read_text()
    assert summary["counts"]["train"]["images"] == 12 and summary["counts"]["validation"]["images"] == 4
    found = load_prior(out)
    assert found.config.dimensions == 3 and found.preprocess.size == (4, 4, 4)
    assert nifti.read(out / "outputs" / "samples_1.nii.gz").array.shape == (4, 4, 4)
    assert "What the prior has learnt" in (out / "report.html").read_text()
    published = load_published(out / "checkpoints" / "state")
    assert published.report.kind == "denoiser" and published.config == found.config
    words = ["--weights", str(out), "--input", str(scans / "scan_0.nii.gz"), "--out", str(tmp_path / "enhanced")]
    words += ["--method.start", "fixed", "--method.fixed-start", "2", "--method.plain", "--acquisition.radius", "1"]
    words += ["--acquisition.scale", "1.0", "--acquisition.sigma", "0.5", "--no-tissue", "--quiet"]
    assert main(["dynamicdps", "enhance", *words]) == 0
    enhanced = nifti.read(tmp_path / "enhanced" / "outputs" / "scan_0_enhanced.nii.gz").array
    assert enhanced.shape == (14, 12, 6) and np.abs(enhanced - head(0)).max() > 1


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A prior with random parameters, as a run leaves it."""
    out = tmp_path_factory.mktemp("runs") / "stored"
    image, time = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    shapes = jax.eval_shape(make_model(GuidedUnet(MODEL)).init, jax.random.key(0), image, time)
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape).astype(np.float32), shapes)
    write_network(out / "outputs" / "model", params, MODEL, IMAGES.preprocess, licence="for tests only")
    return out, params


@pytest.mark.core
def test_training_may_start_from_a_run_and_hands_its_licence_on(stored):
    params, licence = load_initial_weights(
        stored[0], dataclasses.replace(MODEL, dtype="bfloat16", remat=True, dropout=0.1)
    )
    assert licence == {"licence": "for tests only"}
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(stored[1]), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.core
def test_tensors_without_a_place_are_handed_to_the_log_and_the_record(stored, tmp_path):
    file = tmp_path / "a.safetensors"
    export_published(load_published(stored[0]), file)
    stray = {"classifier.weight": np.zeros(2, np.float32)}
    safetensors.write(file, safetensors.read(file) | stray, safetensors.read_metadata(file))
    expected = "1 tensors of the file have no place in the model: classifier.weight"
    assert load_initial_weights(file, MODEL)[1] == {"licence": "for tests only", "notes": [expected]}
    assert load_prior(file).report.remarks == (expected,)


@pytest.mark.core
def test_pairs_are_made_by_the_scanner():
    config = dataclasses.replace(train_initial.smoke(), gamma=(0.5, 0.5), acquisition=LowField(noise=0.1))
    pair = jax.jit(train_initial.make_pair(config, ImageMaker(None, axis=None)))
    image = jax.random.uniform(jax.random.key(0), (32, 32))
    made = pair(jax.random.key(1), {"voxels": image, "is_labels": jnp.bool_(False)})
    np.testing.assert_array_equal(made["image"][..., 0], image)
    noise = made["measurement"][..., 0] - make_operator((32, 32), LowField(gamma=0.5))(image)
    # Of 1024 normal numbers: four standard errors.
    assert abs(float(noise.mean())) < 4 * 0.1 / 32 and abs(float(noise.std()) - 0.1) < 4 * 0.1 / 45


@pytest.mark.core
def test_the_paper_presets_are_the_published_ones():
    network, train = train_prior.paper().network, train_prior.paper().train
    assert dataclasses.replace(network.model, remat=False) == DYNAMICDPS_PRIOR
    assert (train.optimizer.peak_lr, train.optimizer.weight_decay, train.optimizer.decay) == (1e-4, 0.0, "constant")
    assert (train.ema_decay, train.loader.batch_size, train.loop.steps) == (0.9999, 8, 360_000)
    assert network.preprocess.size == (256, 256) and train_prior.SCHEDULE.betas == "cosine"
    initial = train_initial.paper()
    train = initial.train
    assert (train.optimizer.peak_lr, train.loader.batch_size, train.loop.steps) == (2e-4, 16, 100_000)
    assert initial.gamma == (0.8, 1.0) and initial.acquisition.scale == 4 and initial.network.model.width == 64


# Mistakes ------------------------------------------------------------------------------------------------------------


def rewrite(path, change):
    volume = nifti.read(path)
    nifti.write(path, Volume.make(change(volume.array.copy()), volume.affine), allow_nonfinite=True)


def raw_affine(path, row, column, value):
    """Change one number of the sform in the file itself: our writer refuses what this makes."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    place = 280 + 16 * row + 4 * column
    data[place : place + 4] = np.float32(value).tobytes()
    path.write_bytes(gzip.compress(bytes(data)))


SCAN = "scan_1.nii.gz"
FILES = {
    "truncated": (lambda s: (s / SCAN).write_bytes((s / SCAN).read_bytes()[:400]), f"{SCAN}: expected"),
    "not an image": (lambda s: (s / SCAN).write_bytes(b"hello world" * 99), f"{SCAN}: expected"),
    "4D": (lambda s: rewrite(s / SCAN, lambda a: np.stack([a, a], -1)), "3D data"),
    "NaN": (lambda s: rewrite(s / SCAN, lambda a: np.where(a == a.max(), np.nan, a)), "NaN"),
    "all zero": (lambda s: rewrite(s / SCAN, np.zeros_like), "all zero"),
    "singular affine": (lambda s: raw_affine(s / SCAN, 0, 0, 0.0), "singular"),
    "sheared affine": (lambda s: raw_affine(s / SCAN, 0, 1, 9.0), "shear"),
    "two broken": (lambda s: [(s / f"scan_{n}.nii.gz").write_bytes(b"") for n in (1, 2)], "2 of 4 broken"),
    "no scans": (lambda s: [path.unlink() for path in s.iterdir()], "none in this folder"),
}


@pytest.mark.core
@pytest.mark.parametrize("mistake", FILES)
def test_a_broken_scan_ends_in_one_line_and_nothing_is_written(mistake, scans, tmp_path, capsys):
    break_it, message = FILES[mistake]
    copy = tmp_path / "scans"
    shutil.copytree(scans, copy)
    break_it(copy)
    config = prior(input=copy, data=ImageData(validation=0.0))
    assert run(tmp_path / "run", "train-prior", config) == 2
    line = only_line(capsys)
    assert line.startswith("jaxmed: ") and ": expected " in line and ", found " in line and message in line, line
    assert not (tmp_path / "run").exists()


TABLES = {
    "missing file": (("path",), [("scan_0.nii.gz",), ("scan_9.nii.gz",)], "1 of 2 missing"),
    "empty": (("path",), [], "a header and nothing below it"),
    "no column": (("file",), [("scan_0.nii.gz",)], "a column 'path'"),
    "misspelt column": (("path", "splt"), [("scan_0.nii.gz", "train")], "a column 'split' or none, found 'splt'"),
    "unknown kind": (("path", "kind"), [("scan_0.nii.gz", "mask")], "one of image, labels under 'kind'"),
    "no training": (("path", "split"), [("scan_0.nii.gz", "test")], "rows with split 'train', found only test"),
    "an image as labels": (("path", "kind"), [("scan_0.nii.gz", "labels")], "whole numbers"),
    "subject in two splits": (
        ("path", "subject", "split"),
        [("scan_0.nii.gz", "a", "train"), ("scan_1.nii.gz", "a", "validation")],
        "every subject in one split",
    ),
}


@pytest.mark.core
@pytest.mark.parametrize("mistake", TABLES)
def test_a_wrong_table_ends_in_one_line_and_nothing_is_written(mistake, scans, tmp_path, capsys):
    columns, rows, message = TABLES[mistake]
    shutil.copytree(scans, tmp_path / "scans")
    manifest = tmp_path / "scans" / "table.csv"
    write_table(manifest, columns, [dict(zip(columns, row, strict=True)) for row in rows])
    config = prior(data=ImageData(manifest=manifest))
    assert run(tmp_path / "run", "train-prior", config) == 2
    line = only_line(capsys)
    assert line.startswith("jaxmed: ") and message in line, line
    assert not (tmp_path / "run").exists()


OPTIONS = {
    "nothing to read": ([], "at least one of them, found none"),
    "two places": (["--input", "{scans}", "--data.manifest", "{scans}/scan_1.nii.gz"], "one of them, found both"),
    "missing folder": (["--input", "nowhere"], "nowhere: expected"),
    "missing weights": (["--input", "{scans}", "--weights", "nowhere.pt"], "nowhere.pt"),
    "weights that are none": (["--input", "{scans}", "--weights", "{scans}/scan_1.nii.gz"], "weights"),
    "size": (["--input", "{scans}", "--model.multipliers", "1", "2", "--preprocess.size", "9", "8"], "multiples of 2"),
    "axes": (["--input", "{scans}", "--preprocess.size", "8", "8", "8"], "size: expected 2 numbers"),
    "batch": (["--input", "{scans}", "--accumulation", "3"], "loader.batch_size: expected a multiple of 3 parts"),
    "heads": (["--input", "{scans}", "--model.heads", "3"], "heads: expected a divisor of 8 channels"),
    "supersample": (
        ["--data.labels", "{scans}", "--data.supersample", "2"],
        "data.supersample: expected 1 where",
    ),
    "type": (["--input", "{scans}", "--dtype", "float16"], "--dtype"),
    "slices": (["--input", "{scans}", "--data.slices", "0.9", "0.1"], "slices: expected two shares in order"),
}


@pytest.mark.core
@pytest.mark.parametrize("mistake", OPTIONS)
def test_a_wrong_option_ends_in_one_line_and_nothing_is_written(mistake, scans, tmp_path, capsys):
    words, message = OPTIONS[mistake]
    assert run(tmp_path / "run", "train-prior", PRIOR, *[word.format(scans=scans) for word in words]) == 2
    line = only_line(capsys)
    assert line.startswith("jaxmed: ") and message in line, line
    assert not (tmp_path / "run").exists()


@pytest.mark.core
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gamma", "1.0", "0.5"], "gamma: expected two positive numbers in order"),
        (["--acquisition.scale", "0.5"], "scale: expected 1 or more"),
        (["--model.with-time"], "model.with_time"),
        (["--acquisition.sigma", "1.0", "1.0", "1.0"], "acquisition.sigma: expected one number or one per axis"),
    ],
)
def test_a_wrong_scanner_is_told(words, message, scans, tmp_path, capsys):
    smoke = train_initial.smoke()
    network = dataclasses.replace(smoke.network, input=scans, data=ImageData())
    config = dataclasses.replace(smoke, network=network)
    assert run(tmp_path / "run", "train-initial", config, *words) == 2
    assert message in only_line(capsys) and not (tmp_path / "run").exists()


@pytest.mark.core
def test_weights_of_another_size_are_told(stored, scans, tmp_path, capsys):
    config = prior(input=scans, model=dataclasses.replace(MODEL, blocks=2))
    assert run(tmp_path / "run", "train-prior", config, "--weights", str(stored[0])) == 2
    assert "a network with blocks 2, found 1; set --model.blocks" in only_line(capsys)
