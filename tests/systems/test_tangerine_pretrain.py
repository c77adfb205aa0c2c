"""`jaxmed tangerine pretrain` from files to a model, and every mistake a user can make."""

import dataclasses
import gzip
import json
import shutil

import jax
import numpy as np
import pytest
from scan_files import make_slices, save_slices

from jaxmed.arrays.position import resize_table
from jaxmed.cli import main
from jaxmed.config import to_record
from jaxmed.data.inputs import PreparedField, check_scans, input_source
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.scans import VOLUMES, find_scans
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.tables import read_table, write_table
from jaxmed.models.mae import MaeConfig, masked_model
from jaxmed.models.published.load import load_published
from jaxmed.models.published.tangerine import PREPROCESS
from jaxmed.models.vit import VitConfig
from jaxmed.recipes.pretrain_stage import UnlabelledData, find_unlabelled, load_initial_weights
from jaxmed.recipes.training import TrainConfig
from jaxmed.systems.tangerine.stages import pretrain as stage
from jaxmed.train.log import Log, read_metrics
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.volume import Volume

CUBE16 = dataclasses.replace(PREPROCESS, size=(16, 16, 16))
MODEL = MaeConfig(
    VitConfig((16, 16, 16), (8, 8, 8), width=16, depth=1, heads=2, hidden=32),
    decoder_width=16, decoder_depth=1, decoder_heads=2, decoder_hidden=32,
)  # fmt: skip
# The optimizer's eps: see tests/recipes/test_pretrain_mae.py.
TINY = stage.Config(
    data=UnlabelledData(validation=0.2),
    model=MODEL,
    train=TrainConfig(
        OptimizerConfig(peak_lr=3e-3, b2=0.95, eps=1e-5), LoopConfig(log_every=1, save_every=3, evaluate_every=0),
        LoaderConfig(batch_size=4), MeshConfig(data=1), epochs=4, warmup_epochs=1,
    ),
)  # fmt: skip


def write_scans(folder, count=10):
    """Write noisy balls of air in tissue, stored as axial scans; the last one lies as a coronal scan."""
    generator = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (18, 16, 12)], indexing="ij"), -1)
    folder.mkdir(parents=True)
    for number in range(count):
        centre = generator.uniform(-0.3, 0.3, 3)
        array = np.where(np.linalg.norm(grid - centre, axis=-1) < 0.7, -900.0, 50.0)
        array = (array + 20 * generator.standard_normal(array.shape)).round().astype(np.int16)
        affine = np.diag([20.0, 20.0, 25.0, 1.0])
        nifti.write(folder / f"scan_{number}.nii.gz", Volume.make(array, affine if number else affine[:, [0, 2, 1, 3]]))
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("data") / "scans")


def run(out, config, *words):
    """Run a configuration through the command line."""
    stored = out.parent / f"{out.name}.json"
    stored.write_text(json.dumps({"system": "tangerine", "stage": "pretrain", "config": to_record(config)}))
    return main(["tangerine", "pretrain", "--config", str(stored), "--out", str(out), "--quiet", *words])


@pytest.fixture(scope="module")
def tiny(scans, tmp_path_factory):
    """One run on files, with what may differ in other runs compared with it."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert run(out, dataclasses.replace(TINY, input=scans)) == 0
    return out


def numbers(folder):
    return [{k: v for k, v in line.items() if k != "steps_per_second"} for line in read_metrics(folder)]


def assert_same_numbers(one, other, **tolerance):
    first, second = numbers(one), numbers(other)
    assert len(first) == len(second) > 8
    for left, right in zip(first, second, strict=True):
        assert left.keys() == right.keys()
        np.testing.assert_allclose(list(left.values()), list(right.values()), **tolerance)


# Runs ----------------------------------------------------------------------------------------------------------------


def test_smoke_explains_hidden_voxels_of_chests_that_it_was_not_trained_on(tmp_path):
    out = tmp_path / "smoke"
    assert main(["tangerine", "pretrain", "--preset", "smoke", "--out", str(out), "--quiet"]) == 0
    last = read_metrics(out)[-1]
    # 0 is the best constant of each chest. They lie alike, so that their mean would explain 0.88: see the slow test.
    assert last["evaluation/explained"] > 0.4
    summary = json.loads((out / "outputs" / "summary.json").read_text())
    assert summary["volumes"] == {"train": 10, "validation": 3} and summary["notes"] == []
    assert all(found["error"] < 0.6 * found["variance"] for found in summary["errors"])
    assert {path.name for path in out.iterdir()} == {
        "checkpoints", "config.json", "inputs", "inputs.json", "log.txt", "metrics.jsonl", "outputs", "report.html",
        "timing.json",
    }  # fmt: skip
    page = (out / "report.html").read_text()
    assert "What the model completes" in page and "of the variance of hidden patches" in page
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == page


def test_the_model_can_be_loaded_and_is_that_of_the_checkpoint(tiny):
    published = load_published(tiny / "outputs" / "model")
    assert published.report.kind == "mae" and published.report.missing == ()
    assert published.config == MODEL and published.preprocess == CUBE16
    saved = load_published(tiny / "checkpoints" / "state")
    for one, other in zip(jax.tree.leaves(published.params), jax.tree.leaves(saved.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_pictures_lie_in_the_world_of_their_scans(tiny, scans):
    sidecar = json.loads((tiny / "outputs" / "held_out_0_image.json").read_text())
    scan = nifti.read(sidecar["source"])
    picture = nifti.read(tiny / "outputs" / "held_out_0_image.nii.gz")
    # Voxel (d, h, w) of the cube is stored voxel (w 18/16, h 16/16, d 12/16) of the scan: here (9, 8, 6).
    np.testing.assert_allclose(picture.affine @ [8, 8, 8, 1], scan.affine @ [9, 8, 6, 1], atol=1e-3)
    assert picture.array[8, 8, 8] == pytest.approx((scan.array[9, 8, 6] + 1200) / 2000, abs=1e-4)
    assert "HU that is 1" in sidecar["constants"] and sidecar["software"].startswith("jaxmed ")


def test_a_file_of_another_orientation_is_told(tiny, capsys):
    summary = json.loads((tiny / "outputs" / "summary.json").read_text())
    assert len(summary["notes"]) == 2
    assert summary["notes"][0].startswith("scan_0.nii.gz: axis D of the cube runs anterior-posterior")
    assert "axes='yzx'" in summary["notes"][0]
    assert "Note: scan_0.nii.gz: axis D" in (tiny / "log.txt").read_text()
    assert "axis D of the cube runs" in (tiny / "report.html").read_text()


def test_a_killed_run_continues_to_the_same_numbers(tiny, scans, tmp_path, monkeypatch):
    config, out = dataclasses.replace(TINY, input=scans), tmp_path / "killed"
    write = Log.metrics

    def die_at_step_5(log, step, values):
        write(log, step, values)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Log, "metrics", die_at_step_5)
    assert run(out, config) == 130
    assert not (out / "report.html").exists()
    monkeypatch.setattr(Log, "metrics", write)
    assert run(out, config) == 0
    assert "Continuing after step 3" in (out / "log.txt").read_text()
    assert_same_numbers(out, tiny, rtol=0)
    names = "outputs/model/parameters.safetensors", "outputs/held_out_0_completed.nii.gz"
    for name in names:
        assert (out / name).read_bytes() == (tiny / name).read_bytes()


def test_a_folder_of_slices_is_prepared_in_a_cache(tmp_path):
    chest = Volume.make(np.round(np.random.default_rng(0).normal(0, 300, (10, 9, 8))).astype(np.float32), np.eye(4))
    slices = make_slices(chest)
    save_slices(slices, tmp_path / "in" / "s")
    preprocess = dataclasses.replace(PREPROCESS, size=(8, 8, 8))
    scans = find_scans(tmp_path / "in", VOLUMES).scans
    plain = np.asarray(input_source(scans, preprocess)[0]["image"])
    packed = np.asarray(input_source(scans, preprocess, tmp_path / "cache")[0]["image"])
    np.testing.assert_allclose(packed, plain, rtol=0, atol=2**-12)
    slices[3].PixelData = slices[4].PixelData
    save_slices(slices, tmp_path / "in" / "s")
    again = np.asarray(input_source(scans, preprocess, tmp_path / "cache")[0]["image"])
    assert np.abs(again - packed).max() > 0.01  # a slice was replaced: it is prepared anew


def test_prepared_volumes_in_a_cache_are_those_of_the_files(scans, tmp_path):
    paths, preprocess = find_scans(scans, VOLUMES).paths, CUBE16
    plain = input_source(paths, preprocess)
    packed = input_source(paths, preprocess, tmp_path / "cache")
    assert len(packed) == len(plain) == 10
    transform = PreparedField(preprocess)
    for number in range(10):
        one, other = transform(packed[number])["image"], transform(plain[number])["image"]
        assert one.dtype == other.dtype == np.float32 and one.shape == (16, 16, 16, 1)
        np.testing.assert_allclose(one, other, rtol=0, atol=2**-12)  # half a step of float16 below 1: 0.5 HU
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.image.npy"))]
    input_source(paths, preprocess, tmp_path / "cache")
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.image.npy"))] == times


def test_eight_devices_on_a_cache_give_the_run_of_one_on_files(tiny, scans, tmp_path):
    out = tmp_path / "eight"
    config = dataclasses.replace(TINY, input=scans)
    words = ["--mesh.data", "4", "--mesh.model", "2", "--data.cache", str(tmp_path / "cache")]
    assert run(out, config, *words) == 0
    assert len(list((tmp_path / "cache").rglob("*.image.npy"))) == 10
    # What float16 rounds; tests/recipes/test_pretrain_mae.py compares meshes to 1e-6.
    assert_same_numbers(out, tiny, rtol=2e-3, atol=1e-4)


def test_a_store_gives_the_run_of_the_files_and_refuses_another_window(tiny, scans, tmp_path, capsys):
    out, store = tmp_path / "stored", tmp_path / "store"
    words = ["data", "pack", "--stage", "tangerine pretrain", "--input", str(scans), "--out", str(store), "--quiet"]
    assert main([*words, "--preprocess.size", "16", "16", "16", "--dtype", "float32"]) == 0
    config = dataclasses.replace(TINY, data=UnlabelledData(validation=0.2, store=store))
    assert run(out, config, "--preprocess.intensity.window", "-1000", "800") == 2
    told = capsys.readouterr().err
    assert "expected records of window (-1000.0, 800.0), found a store of window" in told and told.count("\n") == 1
    assert not out.exists()
    assert run(out, config) == 0
    assert_same_numbers(out, tiny, rtol=1e-6)
    assert "Reading 10 prepared records" in (out / "log.txt").read_text()


def test_training_goes_on_from_weights_without_held_out_volumes(tiny, scans, tmp_path):
    out = tmp_path / "further"
    config = dataclasses.replace(TINY, input=scans, data=UnlabelledData(), weights=tiny / "outputs" / "model")
    words = ["--data.validation", "0", "--epochs", "0", "--loop.steps", "1", "--optimizer.peak-lr", "0"]
    assert run(out, config, *words, "--preprocess.intensity.window", "-1000", "800") == 0
    one, other = (load_published(folder).params for folder in (out, tiny))
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)
    notes = json.loads((out / "outputs" / "summary.json").read_text())["notes"]
    assert any(note.startswith("Starting from weights of tangerine. Licence: ") for note in notes)
    assert any("trained with other input: window (-1200.0, 800.0), here (-1000.0, 800.0)" in note for note in notes)
    assert "What the model completes" not in (out / "report.html").read_text()


@pytest.mark.slow
def test_a_longer_run_beats_the_mean_of_the_training_chests(tmp_path):
    """Phantoms lie alike, so their mean is a strong guess; a model has to use what it sees of a chest to beat it."""
    out = tmp_path / "long"
    assert main(["tangerine", "pretrain", "--preset", "laptop", "--out", str(out), "--quiet"]) == 0
    preprocess = dataclasses.replace(PREPROCESS, size=(32, 32, 32))
    table = read_table(out / "inputs" / "scans.csv", ("path", "split"))
    cubes = {"train": [], "validation": []}
    for row in table.rows:
        if row["split"] in cubes:
            cubes[row["split"]].append(preprocess(out / "inputs" / row["path"]))
    mean = np.mean(cubes["train"], axis=0)
    by_mean = np.mean([np.mean((cube - mean) ** 2) for cube in cubes["validation"]])
    error = read_metrics(out)[-1]["evaluation/error"]
    print(f"error of the mean chest {by_mean:.5f}, of the model {error:.5f}")
    assert error < 0.6 * by_mean


# Parts ---------------------------------------------------------------------------------------------------------------


def test_weights_of_another_grid_are_resized(tiny):
    larger = dataclasses.replace(MODEL, encoder=dataclasses.replace(MODEL.encoder, image_size=(24, 24, 24)))
    params = load_initial_weights(tiny, "tangerine", larger, masked_model(larger)).params
    old = load_published(tiny).params
    for part in ("encoder", "decoder"):
        expected = resize_table(jax.numpy.asarray(old[part]["position"]), (2, 2, 2), (3, 3, 3))
        np.testing.assert_array_equal(params[part]["position"], expected)


def test_weights_of_another_model_are_refused(tiny, tmp_path):
    for changes, message in (
        ({"decoder_depth": 2}, "expected a checkpoint of this model, found no decoder/blocks/layer_1"),
        ({"sigmoid": False}, "expected weights trained with sigmoid False, found sigmoid True"),
    ):
        changed = dataclasses.replace(MODEL, **changes)
        with pytest.raises(InputError, match=message):
            load_initial_weights(tiny, "tangerine", changed, masked_model(changed))


def table(folder, columns, *rows):
    write_table(folder / "scans.csv", columns, [dict(zip(columns, row, strict=True)) for row in rows])
    return folder / "scans.csv"


def test_test_rows_are_left_alone(scans, tmp_path):
    rows = [(scans / f"scan_{n}.nii.gz", s) for n, s in ((1, "test"), (2, "validation"), (3, "train"), (4, "train"))]
    data = UnlabelledData(manifest=table(tmp_path, ("path", "split"), *rows))
    volumes = find_unlabelled(data, None, CUBE16, TINY.train)
    assert [scan.path.name for scan in volumes.scans] == ["scan_3.nii.gz", "scan_4.nii.gz", "scan_2.nii.gz"]
    assert volumes.num_training == 2 and volumes.notes == []


def test_many_volumes_are_checked_by_their_headers(scans, tmp_path):
    paths = [shutil.copy(path, tmp_path / path.name) for path in sorted(scans.iterdir())]
    paths = [tmp_path / path.name for path in paths]
    preprocess = CUBE16
    rewrite(paths[4], np.zeros_like)  # broken inside, with a good header
    assert len(check_scans(paths, preprocess, 2, 2)) == 2
    with pytest.raises(InputError, match="scan_4.nii.gz: expected an image with contrast"):
        check_scans(paths, preprocess, 10, 2)
    paths[7].write_bytes(b"")
    with pytest.raises(InputError, match=r"scan_7.nii.gz: expected a NIfTI file, found an empty file"):
        check_scans(paths, preprocess, 2, 2)
    with pytest.raises(InputError, match=r"volumes: expected files that can be trained on, found 2 of 10 broken: .*_4"):
        check_scans(paths, preprocess, 10, 2)


def test_published_configuration():
    config = stage.paper()
    settings, model, preprocess = config.train, config.model, config.preprocess
    assert preprocess == PREPROCESS and preprocess.size == (256, 256, 256)
    assert settings.loader.batch_size == 224 and settings.accumulation == 4
    assert (settings.epochs, settings.warmup_epochs) == (400, 20)
    optimizer = settings.optimizer
    assert (optimizer.peak_lr, optimizer.end_lr, optimizer.weight_decay) == (1e-4, 0.0, 0.05)
    assert (optimizer.b1, optimizer.b2) == (0.9, 0.95)
    assert settings.dtype == "bfloat16" and model.mask_ratio == 0.75
    assert config.flip_probability == 0.2


# Mistakes ------------------------------------------------------------------------------------------------------------


def rewrite(path, change):
    volume = nifti.read(path)
    nifti.write(path, Volume.make(change(volume.array.copy()), volume.affine), allow_nonfinite=True)


def poke(value):
    def change(array):
        array[3, 4, 5] = value
        return array

    return change


def raw_affine(path, row, column, value):
    """Change one number of the sform in the file itself: our writer refuses what this makes."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    place = 280 + 16 * row + 4 * column
    data[place : place + 4] = np.float32(value).tobytes()
    path.write_bytes(gzip.compress(bytes(data)))


def whole_table(folder, columns=("path",), *rows):
    return table(folder, columns, *(rows or [(f"scan_{n}.nii.gz",) for n in range(4)]))


SCAN = "scan_1.nii.gz"
FILES = {
    "truncated": (lambda s: (s / SCAN).write_bytes((s / SCAN).read_bytes()[:400]), f"{SCAN}: expected"),
    "not an image": (lambda s: (s / SCAN).write_bytes(b"hello world" * 99), f"{SCAN}: expected"),
    "empty": (lambda s: (s / SCAN).write_bytes(b""), "an empty file"),
    "4D": (lambda s: rewrite(s / SCAN, lambda a: np.stack([a, a], -1)), "3D data"),
    "NaN": (lambda s: rewrite(s / SCAN, poke(np.nan)), "NaN"),
    "Inf": (lambda s: rewrite(s / SCAN, poke(np.inf)), "Inf"),
    "all zero": (lambda s: rewrite(s / SCAN, np.zeros_like), "all zero"),
    "constant": (lambda s: rewrite(s / SCAN, lambda a: np.full_like(a, -7)), "-7 everywhere"),
    "singular affine": (lambda s: raw_affine(s / SCAN, 0, 0, 0.0), "singular"),
    "sheared affine": (lambda s: raw_affine(s / SCAN, 0, 1, 9.0), "shear"),
    "two broken": (lambda s: [(s / f"scan_{n}.nii.gz").write_bytes(b"") for n in (1, 2)], "2 of 4 broken"),
    "no volumes": (lambda s: [path.unlink() for path in s.iterdir()], "none in this folder"),
}


def only_line(capsys):
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


@pytest.fixture
def copy(scans, tmp_path):
    """Four good scans, to break."""
    (tmp_path / "scans").mkdir()
    for number in range(4):
        shutil.copy(scans / f"scan_{number}.nii.gz", tmp_path / "scans")
    return tmp_path / "scans"


@pytest.mark.parametrize("mistake", FILES)
def test_a_broken_volume_ends_in_one_line_and_nothing_is_written(mistake, copy, tmp_path, capsys):
    break_it, message = FILES[mistake]
    break_it(copy)
    assert run(tmp_path / "run", dataclasses.replace(TINY, input=copy)) == 2
    line = only_line(capsys)
    assert line.startswith("jaxmed: ") and ": expected " in line and ", found " in line and message in line, line
    assert not (tmp_path / "run").exists()


TABLES = {
    "missing file": (("path",), [("scan_0.nii.gz",), ("scan_9.nii.gz",)], "1 of 2 missing"),
    "empty": (("path",), [], "a header and nothing below it"),
    "no column": (("file",), [("scan_0.nii.gz",)], "a column 'path'"),
    "empty cell": (("path", "split"), [("", "train")], "a value under 'path'"),
    "misspelt column": (("path", "splt"), [("scan_0.nii.gz", "train")], "a column 'split' or none, found 'splt'"),
    "unknown split": (("path", "split"), [("scan_0.nii.gz", "trian")], "one of train, validation, test"),
    "no training": (("path", "split"), [("scan_0.nii.gz", "test")], "rows with split 'train', found only test"),
    "subject in two splits": (
        ("path", "subject", "split"),
        [("scan_0.nii.gz", "a", "train"), ("scan_1.nii.gz", "a", "validation")],
        "every subject in one split",
    ),
    "file in two splits": (
        ("path", "split"),
        [("scan_0.nii.gz", "train"), ("scan_0.nii.gz", "validation")],
        "every file in one split",
    ),
}


@pytest.mark.parametrize("mistake", TABLES)
def test_a_wrong_table_ends_in_one_line_and_nothing_is_written(mistake, copy, tmp_path, capsys):
    columns, rows, message = TABLES[mistake]
    data = dataclasses.replace(TINY.data, manifest=table(copy, columns, *rows))
    assert run(tmp_path / "run", dataclasses.replace(TINY, data=data)) == 2
    line = only_line(capsys)
    assert line.startswith("jaxmed: ") and message in line, line
    assert not (tmp_path / "run").exists()


OPTIONS = {
    "neither": ([], "data.manifest, input: expected one of them, found neither"),
    "both": (["--input", "{scans}", "--data.manifest", "{scans}/scan_1.nii.gz"], "expected one of them, found both"),
    "missing folder": (["--input", "nowhere"], "nowhere: expected"),
    "missing table": (["--data.manifest", "nowhere.csv"], "nowhere.csv: expected"),
    "missing weights": (["--input", "{scans}", "--weights", "nowhere.pth"], "nowhere.pth"),
    "two starts": (
        ["--input", "{scans}", "--weights", "a.pth", "--warm-start", "b.pth"],
        "warm_start: expected nothing",
    ),
    "missing start": (["--input", "{scans}", "--warm-start", "nowhere.pth"], "nowhere.pth"),
    "weights that are none": (["--input", "{scans}", "--weights", "{scans}/scan_1.nii.gz"], "weights"),
    "batch": (["--input", "{scans}", "--accumulation", "3"], "loader.batch_size: expected a multiple of 3 parts"),
    "devices": (["--input", "{scans}", "--mesh.data", "9"], "mesh: expected axes that fill 8 device(s)"),
    "heads": (["--input", "{scans}", "--mesh.model", "8"], "mesh.model: expected a number of devices that divides"),
    "patch": (["--input", "{scans}", "--model.encoder.patch-size", "5", "5", "5"], "patch_size"),
    "masks": (["--input", "{scans}", "--model.mask-ratio", "0.99"], "mask_ratio"),
    "type": (["--input", "{scans}", "--dtype", "float16"], "--dtype"),
    "two types": (["--input", "{scans}", "--model.encoder.dtype", "bfloat16"], "dtype: expected to be left to --dtype"),
    "epochs": (["--input", "{scans}", "--epochs", "-1"], "epochs"),
    "share": (["--input", "{scans}", "--data.validation", "1.5"], "validation: expected a share"),
}


@pytest.mark.parametrize("mistake", OPTIONS)
def test_a_wrong_option_ends_in_one_line_and_nothing_is_written(mistake, scans, tmp_path, capsys):
    words, message = OPTIONS[mistake]
    assert run(tmp_path / "run", TINY, *[word.format(scans=scans) for word in words]) == 2
    line = only_line(capsys)
    assert line.startswith("jaxmed: ") and message in line, line
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_told(scans, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert run(tmp_path / "x", dataclasses.replace(TINY, input=scans), "--out", str(tmp_path / "file" / "run")) == 2
    assert "a folder above it, found the file" in only_line(capsys)
