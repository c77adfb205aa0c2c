"""`jaxmed noddi fit` from files to maps, on synthetic and on real data, and every mistake a user can make."""

import gzip
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxmed.cli import main
from jaxmed.io import nifti
from jaxmed.io.gradients import read_gradients, to_world
from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.recipes import kept_rows
from jaxmed.recipes.diffusion_scan import ScanConfig
from jaxmed.recipes.stage import Page
from jaxmed.solvers import ascents
from jaxmed.synthesis.phantoms.write import write_diffusion_slab
from jaxmed.systems.noddi import fitting
from jaxmed.systems.noddi.protocol import FitConfig
from jaxmed.systems.noddi.stages import fit as stage
from jaxmed.systems.noddi.voxel_fit import FLAGS
from jaxmed.volume import Volume

MAPS = ("ndi", "odi", "fwf", "ndi_error", "odi_error", "fwf_error", "direction_error", "flags", "residual")
MAPS += ("direction", "s0", "converged")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One smoke run, through the command line."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    assert main(["noddi", "fit", "--preset", "smoke", "--out", str(out), "--quiet"]) == 0
    return out


def read_map(run, name):
    return nifti.read(run / "outputs" / f"{name}.nii.gz").array


@pytest.fixture
def no_figures(monkeypatch):
    """Leave the page empty, for tests that look at maps and notes alone: figures take longer than small fits."""
    monkeypatch.setattr(stage, "page", lambda run: Page("A fit", "without figures", (), ()))


def test_smoke_run_beats_the_mean_of_the_truth(smoke):
    mask = nifti.read(smoke / "inputs" / "mask.nii.gz").array > 0
    tissue = mask & (read_map(smoke, "fwf") < 0.9)
    for name in ("ndi", "odi", "fwf"):
        truth = nifti.read(smoke / "inputs" / "truth" / f"{name}.nii.gz").array[tissue]
        error = read_map(smoke, name)[tissue] - truth
        assert np.median(np.abs(error)) < 0.3 * np.median(np.abs(truth - truth.mean())), name


def test_a_run_folder_is_complete(smoke):
    assert {path.name for path in smoke.iterdir()} == {
        "config.json",
        "inputs",
        "inputs.json",
        "log.txt",
        "metrics.jsonl",
        "outputs",
        "report.html",
        "timing.json",
    }
    for name in MAPS:
        sidecar = json.loads((smoke / "outputs" / f"{name}.json").read_text())
        assert {"definition", "unit", "constants", "software"} <= sidecar.keys()
    dwi, ndi = (nifti.describe(smoke / place) for place in ("inputs/dwi.nii.gz", "outputs/ndi.nii.gz"))
    assert dwi["spacing"] == ndi["spacing"] and dwi["orientation"] == ndi["orientation"]
    page = (smoke / "report.html").read_text()
    assert "Against the truth" in page and "Rician" in page


def test_the_same_command_finds_the_run_complete(smoke, capsys):
    before = (smoke / "report.html").stat().st_mtime_ns
    assert main(["noddi", "fit", "--preset", "smoke", "--out", str(smoke), "--quiet"]) == 0
    assert "Complete already" in capsys.readouterr().out
    assert (smoke / "report.html").stat().st_mtime_ns == before


def test_a_stored_configuration_repeats_the_run(smoke, tmp_path):
    assert (
        main(["noddi", "fit", "--config", str(smoke / "config.json"), "--out", str(tmp_path / "again"), "--quiet"]) == 0
    )
    np.testing.assert_array_equal(read_map(tmp_path / "again", "ndi"), read_map(smoke, "ndi"))


def test_the_report_can_be_written_again(smoke, tmp_path):
    copy = shutil.copytree(smoke, tmp_path / "copy")
    (copy / "report.html").unlink()
    assert main(["report", str(copy)]) == 0
    assert (copy / "report.html").exists()


def test_a_killed_run_continues_to_the_same_maps(tmp_path, monkeypatch, no_figures):
    out = tmp_path / "killed"
    monkeypatch.setattr(kept_rows, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(ascents, "BLOCK_CHUNKS", 1)
    arguments = ["noddi", "fit", "--preset", "smoke", "--fit.chunk-size", "256", "--quiet"]
    save = kept_rows.save_rows

    def save_twice_then_die(path, digest, rows):
        save(path, digest, rows)
        if len(rows.values) >= 512:
            raise KeyboardInterrupt

    monkeypatch.setattr(kept_rows, "save_rows", save_twice_then_die)
    assert main([*arguments, "--out", str(out)]) == 130
    assert not (out / "report.html").exists()
    monkeypatch.setattr(kept_rows, "save_rows", save)
    assert main([*arguments, "--out", str(out)]) == 0
    assert "Continuing after 512 voxels" in (out / "log.txt").read_text()
    inputs = out / "inputs"
    files = {"dwi": inputs / "dwi.nii.gz", "bvals": inputs / "dwi.bval", "bvecs": inputs / "dwi.bvec"}
    files = ScanConfig(**files, mask=inputs / "mask.nii.gz")
    config = stage.Config(files, fit=FitConfig(chunk_size=256))
    scan = stage.read_scan(config)
    whole = fitting.estimate(scan.dwi.array, scan.gradients, scan.mask, sigma=scan.sigma, config=config.fit)
    np.testing.assert_array_equal(read_map(out, "ndi"), whole.values[..., 0])


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scan")
    write_diffusion_slab(folder, seed=0, shape=(8, 9, 2), snr=30.0)
    return folder


@pytest.fixture
def scan(good, tmp_path):
    """A copy of a good scan, to break."""
    return shutil.copytree(good, tmp_path / "scan")


def arguments(scan, out):
    files = {"dwi": "dwi.nii.gz", "bvals": "dwi.bval", "bvecs": "dwi.bvec", "mask": "mask.nii.gz"}
    words = [word for name, file in files.items() for word in (f"--{name}", str(scan / file))]
    return ["noddi", "fit", *words, "--out", str(out)]


def rewrite(path, change_array=None, affine=None):
    volume = nifti.read(path)
    array = volume.array.copy()
    if change_array is not None:
        array = change_array(array)
    nifti.write(path, Volume.make(array, volume.affine if affine is None else affine), allow_nonfinite=True)


def poke(value):
    def change(array):
        array[1, 1, 1, ...] = value
        return array

    return change


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def raw_affine(path, row, column, value):
    """Change one number of the sform in the file itself: our writer refuses what this makes."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    place = 280 + 16 * row + 4 * column
    data[place : place + 4] = np.float32(value).tobytes()
    path.write_bytes(gzip.compress(bytes(data)))


MISTAKES = {
    "missing file": (lambda s: (s / "dwi.nii.gz").unlink(), "no such file"),
    "truncated file": (lambda s: truncate(s / "dwi.nii.gz"), "dwi.nii.gz: expected"),
    "not an image": (lambda s: (s / "dwi.nii.gz").write_bytes(b"hello world" * 99), "dwi.nii.gz: expected"),
    "empty file": (lambda s: (s / "dwi.nii.gz").write_bytes(b""), "an empty file"),
    "three dimensions": (lambda s: shutil.copy(s / "mask.nii.gz", s / "dwi.nii.gz"), "4"),
    "not a number": (lambda s: rewrite(s / "dwi.nii.gz", lambda a: a * np.nan), "NaN"),
    "infinity": (lambda s: rewrite(s / "dwi.nii.gz", lambda a: a * np.float32(np.inf)), "Inf"),
    "all zero": (lambda s: rewrite(s / "dwi.nii.gz", np.zeros_like), "constant"),
    "constant": (lambda s: rewrite(s / "dwi.nii.gz", np.ones_like), "constant"),
    "singular affine": (lambda s: raw_affine(s / "dwi.nii.gz", 0, 0, 0.0), "singular"),
    "sheared affine": (lambda s: raw_affine(s / "dwi.nii.gz", 0, 1, 0.8), "shear"),
    "mask of another grid": (
        lambda s: rewrite(s / "mask.nii.gz", affine=np.diag([3.0, 3.0, 3.0, 1.0])),
        "mask.nii.gz: expected",
    ),
    "mask of another shape": (lambda s: rewrite(s / "mask.nii.gz", lambda a: a[:-1]), "mask.nii.gz: expected"),
    "negative mask": (lambda s: rewrite(s / "mask.nii.gz", lambda a: -a), "found the values -1, 0; 0 is outside"),
    "empty mask": (lambda s: rewrite(s / "mask.nii.gz", np.zeros_like), "zeros only"),
    "mask of four dimensions": (lambda s: shutil.copy(s / "dwi.nii.gz", s / "mask.nii.gz"), "mask.nii.gz: expected"),
    "too few b-values": (lambda s: (s / "dwi.bval").write_text("0 700 2000\n"), "99 b-values"),
    "b-values in another unit": (
        lambda s: (s / "dwi.bval").write_text(" ".join(["0"] * 9 + ["0.7"] * 30 + ["2"] * 60)),
        "s/mm^2, not ms/um^2",
    ),
    "no unweighted image": (
        lambda s: (s / "dwi.bval").write_text(" ".join(["700"] * 39 + ["2000"] * 60)),
        "dwi.bv",
    ),
    "unweighted as at 7T": (
        lambda s: (s / "dwi.bval").write_text(" ".join(["60"] * 9 + ["700"] * 30 + ["2000"] * 60)),
        "dwi.bv",
    ),
    "negative b-value": (
        lambda s: (s / "dwi.bval").write_text(" ".join(["-5"] * 9 + ["700"] * 30 + ["2000"] * 60)),
        "b-values of 0 or more",
    ),
    "one shell": (
        lambda s: (s / "dwi.bval").write_text(" ".join(["0"] * 9 + ["1000"] * 90)),
        "--allow-single-shell",
    ),
    "directions too long": (
        lambda s: (s / "dwi.bvec").write_text((s / "dwi.bvec").read_text().replace("0.", "3.")),
        "unit length",
    ),
    "b-values in s/m^2": (
        lambda s: (s / "dwi.bval").write_text(" ".join(["0"] * 9 + ["711e6"] * 30 + ["2855e6"] * 60)),
        "s/mm^2, not s/m^2",
    ),
    "a stray image": (
        lambda s: (s / "dwi.bval").write_text(" ".join(["0"] * 9 + ["1000"] * 89 + ["500"])),
        "axes: 1 at b = 500, ",
    ),
    "every tenth b-value rounded": (
        lambda s: (s / "dwi.bval").write_text(" ".join(["0"] * 9 + (["1000"] * 9 + ["1060"]) * 9)),
        "--allow-single-shell",
    ),
    "three axes": (
        lambda s: np.savetxt(s / "dwi.bvec", np.eye(3)[np.arange(99) % 3].T),
        "90 images on 3 different axes",
    ),
    "directions times 0.7": (
        lambda s: np.savetxt(s / "dwi.bvec", 0.7 * np.loadtxt(s / "dwi.bvec")),
        "unit length",
    ),
    "intensities that no scanner gives": (
        lambda s: rewrite(s / "dwi.nii.gz", lambda a: (1e30 * a.astype(np.float64)).astype(np.float32)),
        "intensities of at most",
    ),
    "tables exchanged": (lambda s: shutil.copy(s / "dwi.bvec", s / "dwi.bval"), "dwi.bval"),
}


def only_line(capsys):
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_nothing_is_written(mistake, scan, tmp_path, capsys):
    break_it, expected = MISTAKES[mistake]
    break_it(scan)
    assert main(arguments(scan, tmp_path / "run")) == 2
    line = only_line(capsys)
    assert line.startswith("jaxmed: ") and ": expected " in line and ", found " in line
    assert expected in line
    assert not (tmp_path / "run").exists()


OPTION_MISTAKES = {
    "unknown option": (["--dwo", "x"], "--dwo"),
    "word for a number": (["--sigma", "loud"], "--sigma"),
    "refused number": (["--sigma", "-3"], "sigma: expected a number above 0"),
    "nested refused number": (["--fit.tissue.parallel-diffusivity", "1700"], "0.05 to 10 um^2/ms, found 1700"),
    "unknown choice": (["--noise", "loud"], "--noise"),
    "unknown preset": (["--preset", "smok"], "did you mean 'smoke'?"),
    "missing configuration": (["--config", "nowhere.json"], "nowhere.json"),
    "no scan": ([], "dwi: expected a file, found nothing"),
    "rician without noise": (["--preset", "smoke", "--noise", "rician", "--dwi", "x.nii"], "x.nii: expected"),
}


@pytest.mark.parametrize("mistake", OPTION_MISTAKES)
def test_a_wrong_option_ends_in_one_line(mistake, tmp_path, capsys):
    words, expected = OPTION_MISTAKES[mistake]
    assert main(["noddi", "fit", "--out", str(tmp_path / "run"), *words]) == 2
    line = only_line(capsys)
    assert line.startswith("jaxmed: ") and expected in line, line
    assert not (tmp_path / "run").exists()


def test_a_configuration_of_another_stage_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"system": "noddi", "stage": "train", "config": {}}))
    assert main(["noddi", "fit", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]) == 2
    assert "expected a configuration of jaxmed noddi fit, found one of jaxmed noddi train" in only_line(capsys)


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["noddi", "fit", "--out", str(tmp_path / "run"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_no_space_left_ends_in_one_line(scan):
    """A real full device: /dev/full refuses every byte."""
    code = (
        "import sys, pathlib; from jaxmed.files import atomic_path\n"
        "from jaxmed.cli import main; import jaxmed.train.log as log\n"
        "real = pathlib.Path.open\n"
        "def full(self, *a, **k):\n"
        "    return real(pathlib.Path('/dev/full') if self.name == 'log.txt' else self, *a, **k)\n"
        "pathlib.Path.open = full\n"
        f"sys.exit(main({arguments(scan, scan.parent / 'run')!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "enough space to write, found no space left on device" in done.stderr.splitlines()[-1]


# What a scan may have and still be fitted ----------------------------------------------------------------------------


def fit_scan(scan, out, *options):
    """Fit a scan and return its notes."""
    assert main([*arguments(scan, out), "--quiet", *options]) == 0
    return json.loads((out / "outputs" / "summary.json").read_text())["notes"]


@pytest.fixture(scope="module")
def plain(good, tmp_path_factory):
    """The fit of the good scan, by a preset that would simulate a larger one."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    fit_scan(good, out, "--preset", "laptop")
    return out


@pytest.mark.usefixtures("no_figures")
def test_voxels_of_nan_are_flagged_and_never_reach_a_map(scan, tmp_path):
    rewrite(scan / "dwi.nii.gz", poke(np.nan))
    rewrite(scan / "mask.nii.gz", poke(1))
    notes = fit_scan(scan, tmp_path / "run", "--modulated")
    assert any(note.startswith("1 voxels hold NaN or Inf") for note in notes)
    flags = read_map(tmp_path / "run", "flags")
    assert flags[1, 1, 1] == FLAGS["not_finite"] and (flags == FLAGS["not_finite"]).sum() == 1
    for path in (tmp_path / "run" / "outputs").glob("*.nii.gz"):
        array = nifti.read(path).array  # refuses NaN
        assert not np.any(array[1, 1, 1]) or path.name == "flags.nii.gz", path.name
    bits = json.loads((tmp_path / "run" / "outputs" / "flags.json").read_text())["bits"]
    assert bits["64"].startswith("not_finite") and len(bits) == len(FLAGS)
    ndi, fwf = read_map(tmp_path / "run", "ndi"), read_map(tmp_path / "run", "fwf")
    np.testing.assert_allclose(read_map(tmp_path / "run", "ndi_modulated"), ndi * (1 - fwf), atol=1e-6)


def test_a_preset_is_a_size_and_files_replace_its_synthetic_data(plain):
    assert not (plain / "inputs").exists()
    assert read_map(plain, "ndi").shape == (8, 9, 2)


@pytest.mark.usefixtures("no_figures")
def test_an_oil_is_noted_and_flagged(scan, tmp_path):
    """What hardly diffuses ends at ndi = 1, whatever it is."""
    rng, bvals = np.random.default_rng(0), np.loadtxt(scan / "dwi.bval")
    oil = 800 * np.exp(-bvals * 5e-5) + rng.normal(size=(8, 9, 2, 99)) * 25
    rewrite(scan / "dwi.nii.gz", lambda a: oil.astype(np.float32))
    notes = fit_scan(scan, tmp_path / "run")
    assert any("the model does not make this signal (a residual above three times the noise)" in note for note in notes)
    flags, mask = read_map(tmp_path / "run", "flags").astype(int), nifti.read(scan / "mask.nii.gz").array > 0
    assert (flags[mask] & FLAGS["misfit"] > 0).all()


@pytest.mark.usefixtures("no_figures")
def test_a_voxel_beyond_any_intensity_is_left_out(scan, tmp_path):
    def change(array):
        array[4, 4, 0, 50] = 1e25
        return array

    rewrite(scan / "dwi.nii.gz", change)
    rewrite(scan / "mask.nii.gz", lambda array: np.where(np.indices(array.shape).sum(0) == 8, 1, array))
    fit_scan(scan, tmp_path / "run")
    flags = read_map(tmp_path / "run", "flags")
    assert flags[4, 4, 0] == FLAGS["not_finite"] and read_map(tmp_path / "run", "ndi")[4, 4, 0] == 0


@pytest.mark.usefixtures("no_figures")
def test_lengths_that_tell_b_are_used_and_said(scan, plain, tmp_path):
    """One nominal b-value of 2855, and directions shorter by the root of b over it."""
    bvals = np.loadtxt(scan / "dwi.bval")
    np.savetxt(scan / "dwi.bvec", np.loadtxt(scan / "dwi.bvec") * np.sqrt(bvals / 2855))
    (scan / "dwi.bval").write_text(" ".join("2855" if bval else "0" for bval in bvals))
    notes = fit_scan(scan, tmp_path / "run")
    assert any("they tell b, which was scaled by their squares (b = 711 to 2855 s/mm^2)" in note for note in notes)
    np.testing.assert_allclose(read_map(tmp_path / "run", "ndi"), read_map(plain, "ndi"), atol=1e-3)


@pytest.mark.usefixtures("no_figures")
def test_voxels_without_unweighted_signal_are_flagged(scan, tmp_path):
    rewrite(scan / "mask.nii.gz", poke(1))
    rewrite(scan / "dwi.nii.gz", lambda a: poke(np.where(np.arange(99) < 9, 0.0, 1.0))(a))
    notes = fit_scan(scan, tmp_path / "run")
    assert any("have no unweighted signal" in note for note in notes)
    assert read_map(tmp_path / "run", "flags")[1, 1, 1] == FLAGS["no_signal"]


@pytest.mark.usefixtures("no_figures")
def test_b_values_that_vary_within_a_shell_are_said_and_fitted_each(scan, tmp_path):
    bvals = np.loadtxt(scan / "dwi.bval")
    (scan / "dwi.bval").write_text(" ".join(f"{b + (i % 3 - 1) * 5 * (b > 0):g}" for i, b in enumerate(bvals)))
    notes = fit_scan(scan, tmp_path / "run")
    assert any("6 different b-values make 2 shell(s) (706 to 716, 2850 to 2860 s/mm^2)" in note for note in notes)
    truth = nifti.read(scan / "truth" / "ndi.nii.gz").array
    tissue = (read_map(tmp_path / "run", "fwf") < 0.5) & (read_map(tmp_path / "run", "s0") > 0)
    assert np.median(np.abs(read_map(tmp_path / "run", "ndi") - truth)[tissue]) < 0.05


@pytest.mark.usefixtures("no_figures")
def test_series_scaled_apart_are_found_and_can_be_brought_together(scan, tmp_path):
    """The last 60 images get a b = 0 image of their own and half the brightness, as a second series would have."""
    bvals = np.loadtxt(scan / "dwi.bval")
    order = [*range(8), *range(9, 39), 8, *range(39, 99)]
    scale = np.where(np.arange(99) >= 38, 0.5, 1.0)
    rewrite(scan / "dwi.nii.gz", lambda a: (a[..., order] * scale).astype(np.float32))
    (scan / "dwi.bval").write_text(" ".join(f"{b:g}" for b in bvals[order]))
    np.savetxt(scan / "dwi.bvec", np.loadtxt(scan / "dwi.bvec")[:, order])
    notes = fit_scan(scan, tmp_path / "apart")
    assert any("those of image 39 on have 0.5" in note and "--scale-series" in note for note in notes)
    together = fit_scan(scan, tmp_path / "together", "--scale-series")
    assert any("every series was divided by its own" in note for note in together)
    truth = nifti.read(scan / "truth" / "ndi.nii.gz").array
    tissue = (read_map(tmp_path / "together", "fwf") < 0.5) & (read_map(tmp_path / "together", "s0") > 0)
    errors = {
        name: np.median(np.abs(read_map(tmp_path / name, "ndi") - truth)[tissue]) for name in ("apart", "together")
    }
    assert errors["together"] < 0.05 and errors["apart"] > 2 * errors["together"]


def write_deviations(scan, array):
    nifti.write(scan / "grad_dev.nii.gz", Volume.make(array.astype(np.float32), nifti.read(scan / "dwi.nii.gz").affine))


@pytest.mark.usefixtures("no_figures")
def test_gradient_nonlinearity_changes_b_and_directions_voxel_by_voxel(scan, plain, tmp_path):
    """A gradient 10 % too strong makes b 21 % too large; told so, the fit finds what it finds without."""
    deviations = np.zeros((8, 9, 2, 9))
    deviations[..., [0, 4, 8]] = 0.1
    write_deviations(scan, deviations)
    bvals = np.loadtxt(scan / "dwi.bval")
    (scan / "dwi.bval").write_text(" ".join(f"{b / 1.21:.6f}" for b in bvals))
    notes = fit_scan(scan, tmp_path / "told", "--grad-dev", str(scan / "grad_dev.nii.gz"))
    assert any("lengths from 1.100 to 1.100" in note for note in notes)
    sure = (read_map(plain, "fwf") < 0.5) & (read_map(plain, "s0") > 0)
    for name in ("ndi", "odi", "fwf"):
        first, second = (read_map(run, name)[sure] for run in (plain, tmp_path / "told"))
        assert np.median(np.abs(first - second)) < 2e-3, name


@pytest.mark.parametrize(
    ("array", "expected"),
    [(np.zeros((8, 9, 2, 3)), "nine images"), (np.ones((8, 9, 2, 9)), "deviations below 0.5")],
)
def test_wrong_deviations_are_refused(scan, tmp_path, capsys, array, expected):
    write_deviations(scan, array)
    assert main([*arguments(scan, tmp_path / "run"), "--grad-dev", str(scan / "grad_dev.nii.gz")]) == 2
    assert expected in only_line(capsys)


def test_another_model_goes_the_same_way(scan, tmp_path):
    fit_scan(scan, tmp_path / "run", "--fit.model", "ball-and-stick")
    fraction, diffusivity = (read_map(tmp_path / "run", name) for name in ("stick_fraction", "diffusivity"))
    inside = read_map(tmp_path / "run", "s0") > 0
    assert 0.1 < np.median(fraction[inside]) < 0.9 and 0.5 < np.median(diffusivity[inside]) < 3.0
    assert not (tmp_path / "run" / "outputs" / "ndi.nii.gz").exists()
    assert "Ball and stick maps" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.usefixtures("no_figures")
def test_a_dicom_folder_gives_the_maps_of_its_nifti_twin(tmp_path):
    pytest.importorskip("pydicom")
    protocol = two_shell_protocol(3, ((8, 711.0), (8, 2855.0)))
    write_diffusion_slab(tmp_path / "scan", seed=0, shape=(8, 9, 2), snr=30.0, protocol=protocol)
    write_dicom(tmp_path / "scan", tmp_path / "dicom")
    folder = tmp_path / "scan"
    tables = ["--bvals", str(folder / "dwi.bval"), "--bvecs", str(folder / "dwi.bvec")]
    for name, words in {"nifti": [str(folder / "dwi.nii.gz"), *tables], "dicom": [str(tmp_path / "dicom")]}.items():
        assert main(["noddi", "fit", "--dwi", *words, "--out", str(tmp_path / "runs" / name), "--quiet"]) == 0
    # DICOM's slices are stacked along the normal of rows and columns, which points down here.
    first, second = (
        {
            name: read_map(tmp_path / "runs" / run, name)[:, :, ::step]
            for name in ("s0", "fwf", "ndi", "odi", "direction")
        }
        for run, step in (("nifti", 1), ("dicom", -1))
    )
    sure = (first["fwf"] < 0.5) & (first["s0"] > 0)
    np.testing.assert_array_equal(first["s0"] > 0, second["s0"] > 0)
    for name in ("ndi", "odi", "fwf"):  # apart by rounding to whole numbers in the DICOM files
        assert np.median(np.abs(first[name] - second[name])[sure]) < 2e-3, name
    assert np.median(np.abs(np.sum(first["direction"] * second["direction"], axis=-1))[sure]) > 0.9999


def write_dicom(scan, folder):
    """Write a scan as one file per slice, with directions in the patient's frame."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    folder.mkdir()
    volume = nifti.read(scan / "dwi.nii.gz")
    table = read_gradients(scan / "dwi.bval", scan / "dwi.bvec")
    patient = to_world(table.bvecs, volume.affine) * [-1, -1, 1]
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    axes, series = lps[:3, :3] / np.linalg.norm(lps[:3, :3], axis=0), generate_uid()
    for image in range(volume.array.shape[3]):
        for z in range(volume.array.shape[2]):
            pixels = np.round(volume.array[:, :, z, image].T).astype(np.uint16)
            data = Dataset()
            data.file_meta = FileMetaDataset()
            data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
            data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
            data.SeriesInstanceUID, data.Modality, data.InstanceNumber = series, "MR", image * 2 + z + 1
            data.Rows, data.Columns = pixels.shape
            data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
            data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
            data.PixelData = pixels.tobytes()
            data.ImagePositionPatient = (lps @ [0, 0, z, 1])[:3].tolist()
            data.ImageOrientationPatient = [*axes[:, 0].tolist(), *axes[:, 1].tolist()]
            data.PixelSpacing, data.SliceThickness = [2.0, 2.0], 2.0
            data.DiffusionBValue = float(table.bvals[image])
            if table.bvals[image]:
                data.DiffusionGradientOrientation = patient[image].tolist()
            data.save_as(folder / f"{image:03d}_{z}.dcm", enforce_file_format=True)


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_posterior_maps_stand_beside_the_fit(scan, tmp_path):
    pytest.importorskip("blackjax")
    fit_scan(scan, tmp_path / "run", "--posterior-samples", "100", "--fit.model", "ball-and-stick")
    inside = read_map(tmp_path / "run", "s0") > 0
    mean, value = (read_map(tmp_path / "run", name)[inside] for name in ("diffusivity_mean", "diffusivity"))
    error, spread = (read_map(tmp_path / "run", name)[inside] for name in ("diffusivity_error", "diffusivity_sd"))
    assert np.median(np.abs(mean - value) / spread) < 1.0 and 0.6 < np.median(spread / error) < 1.6


def test_a_posterior_needs_a_noise_level(scan, tmp_path, capsys):
    pytest.importorskip("blackjax")
    assert main([*arguments(scan, tmp_path / "run"), "--posterior-samples", "9", "--noise", "gaussian"]) == 2
    assert "posterior_samples: expected a Rician noise level" in only_line(capsys)


# Real data -----------------------------------------------------------------------------------------------------------


def fit_real(folder, out, *options):
    names = {"dwi": "dwi.nii.gz", "bvals": "dwi.bval", "bvecs": "dwi.bvec", "mask": "mask.nii.gz"}
    words = [word for name, file in names.items() for word in (f"--{name}", str(folder / file))]
    return main(["noddi", "fit", *words, "--out", str(out), "--quiet", *options])


@pytest.mark.usefixtures("no_figures")
def test_real_human_grid_scan_gives_plausible_tissue(shared_data, tmp_path):
    assert fit_real(shared_data / "dwi_human_dsi101", tmp_path / "run") == 0
    fwf, ndi = read_map(tmp_path / "run", "fwf"), read_map(tmp_path / "run", "ndi")
    assert np.median(fwf) < 0.4 and 0.3 < np.median(ndi[fwf < 0.9]) < 0.9
    assert np.median(read_map(tmp_path / "run", "residual")) < 0.08
    shells = json.loads((tmp_path / "run" / "outputs" / "summary.json").read_text())["shells"]
    assert sum(shell["images"] for shell in shells) == 102


@pytest.mark.usefixtures("no_figures")
def test_real_water_says_free_water(shared_data, tmp_path):
    folder = shared_data / "dwi_phantom_water"
    assert fit_real(folder, tmp_path / "run") == 0
    notes = json.loads((tmp_path / "run" / "outputs" / "summary.json").read_text())["notes"]
    note = next(text for text in notes if text.startswith("This is free water"))
    assert "--fit.tissue.free-diffusivity" in note
    assert np.median(read_map(tmp_path / "run", "ndi")) < 0.1  # no neurites in water
    assert fit_real(folder, tmp_path / "cold", "--fit.tissue.free-diffusivity", "1.94") == 0
    assert np.median(read_map(tmp_path / "cold", "fwf")) > 0.9


@pytest.mark.usefixtures("no_figures")
def test_real_single_shell_is_refused_unless_allowed(shared_data, tmp_path, capsys):
    folder = shared_data / "dwi_human_64dir"
    assert fit_real(folder, tmp_path / "run") == 2
    line = only_line(capsys)
    assert "one shell cannot tell neurite density from free water" in line and "b = 994" in line
    assert fit_real(folder, tmp_path / "run", "--allow-single-shell") == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "1 direction(s) that are not numbers" in log and "Only one shell" in log
