"""Run folders and logs."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from jaxmed.errors import InputError
from jaxmed.recipes.diffusion_scan import ScanConfig
from jaxmed.recipes.training import TrainConfig
from jaxmed.systems.noddi.stages.fit import Config
from jaxmed.train import run_inputs
from jaxmed.train.log import Log
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.run_folder import OWN_NAMES, RunOptions, open_run, remove, start

pytestmark = pytest.mark.core


def open_fit(path, config=None, **options):
    return open_run("noddi", "fit", config or Config(), RunOptions(path, **options))


def test_opening_writes_nothing(tmp_path):
    assert open_fit(tmp_path / "run").status == "new"
    assert not (tmp_path / "run").exists()


def test_the_life_of_a_run(tmp_path):
    path = tmp_path / "run"
    start(open_fit(path))
    assert json.loads((path / "config.json").read_text())["stage"] == "fit"
    assert open_fit(path).status == "unfinished"
    assert open_fit(path, resume=False).status == "new"
    (path / "report.html").write_text("page")
    assert open_fit(path).status == "complete"
    assert open_fit(path, overwrite=True).status == "new"


def test_a_batch_job_with_failures_is_not_complete(tmp_path):
    path = tmp_path / "run"
    start(open_fit(path))
    for name in ("report.html", "outputs/failed.csv"):
        (path / name).write_text("")

    def look(**options):
        return open_run("noddi", "fit", Config(), RunOptions(path, **options), tries_failed_again=True)

    assert open_fit(path).status == "complete" and look(overwrite=True).status == "new"
    assert look().status == "unfinished"
    start(look())
    assert not (path / "report.html").exists() and (path / "outputs" / "failed.csv").exists()


def test_a_run_of_another_configuration_is_kept_unless_overwritten(tmp_path):
    path = tmp_path / "run"
    start(open_fit(path))
    (path / "outputs" / "old.txt").write_text("old")
    with pytest.raises(InputError, match="a run of another configuration"):
        open_fit(path, Config(ScanConfig(seed=1)))
    start(open_fit(path, Config(ScanConfig(seed=1)), overwrite=True))
    assert not (path / "outputs" / "old.txt").exists()


def test_a_folder_with_other_files_is_never_taken(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="a folder holding thesis.tex"):
        open_fit(tmp_path, overwrite=True)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="found a file"):
        open_fit(tmp_path / "run")
    with pytest.raises(InputError, match="a folder above it"):
        open_fit(tmp_path / "run" / "inner")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_place_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="read-only"):
        open_fit(tmp_path / "run")


def test_metrics_are_json_lines_and_finite(tmp_path):
    log = Log(tmp_path, quiet=True)
    log.metrics(1, {"loss": 0.5})
    with pytest.raises(ValueError, match="step 2, loss: expected a finite number, found nan"):
        log.metrics(2, {"loss": float("nan")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}]


def test_numbers_that_a_resumed_run_takes_again_stand_once(tmp_path):
    log = Log(tmp_path, quiet=True)
    lines = [{"step": step, "a/loss": 0.1 * step} for step in (1, 2, 3)] + [{"step": 1, "b/loss": 0.5}]
    for line in lines:
        log.metrics(line["step"], {name: value for name, value in line.items() if name != "step"})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "b/lo')  # killed while it wrote
    again = Log(tmp_path, quiet=True)
    again.metrics(3, {"a/loss": 0.1 * 3})
    again.metrics(1, {"b/loss": 0.25})
    again.metrics(2, {"b/loss": 0.125})
    lines[-1] = {"step": 1, "b/loss": 0.25}
    assert again.read_metrics() == [*lines, {"step": 2, "b/loss": 0.125}]
    again.rewind(1, "a")
    assert again.read_metrics() == [lines[0], lines[-1], {"step": 2, "b/loss": 0.125}]
    again.metrics(1, {"a/loss": 0.1})
    again.metrics(2, {"a/loss": 0.5})
    again.rewind(1)
    assert again.read_metrics() == [lines[0], lines[-1]]
    again.metrics(2, {"b/loss": 1.0})
    again.metrics(2, {"b/loss": 1.0})  # twice in one run is what the stage says
    assert len(again.read_metrics()) == 4


def test_progress_without_a_terminal_is_plain_lines(tmp_path, capsys):
    with Log(tmp_path).progress("Fitting", 10, "voxels") as update:
        update(5)
        update(10)
    printed = capsys.readouterr().err
    assert printed.startswith("Fitting: 10 of 10 voxels") and printed.count("\n") == 1
    assert "Fitting" in (tmp_path / "log.txt").read_text()


def test_every_line_of_the_log_has_a_clock(tmp_path):
    log = Log(tmp_path, quiet=True)
    log.say("hello")
    with log.progress("Fitting", 10, "voxels") as update:
        update(10)
    log.say("goodbye")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 2
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d  \w", line) for line in lines)


def test_quiet_prints_nothing_but_keeps_the_log(tmp_path, capsys):
    log = Log(tmp_path, quiet=True)
    log.say("hello")
    with log.progress("Fitting", 10, "voxels") as update:
        update(10)
    assert capsys.readouterr().err == ""
    assert "hello" in (tmp_path / "log.txt").read_text()


def test_overwriting_removes_everything_a_run_owns(tmp_path):
    path = tmp_path / "run"
    start(open_fit(path))
    owned = [name for name in OWN_NAMES if name not in ("config.json", "inputs.json", "outputs")]
    for name in owned:
        (path / name).mkdir()
        (path / name / "old").write_text("old")
    run = open_fit(path, overwrite=True)
    start(run)
    assert not [name for name in owned if (path / name).exists()]
    (path / "inputs").mkdir()  # what the stage writes after it began stays, however often it begins
    start(run)
    assert (path / "inputs").exists()


def test_leftovers_of_a_killed_run_are_swept_and_are_not_foreign_files(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / ".0123456789ab-config.json").write_text("{")  # killed before there was a configuration
    start(open_fit(path))
    left = [path / "outputs" / ".fedcba987654-maps.nii.gz", path / "checkpoints" / "state" / ".writable-x1" / "a"]
    for place in left:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("half")
    kept = path / "outputs" / ".hidden"
    kept.write_text("not a temporary name")
    start(open_fit(path), is_shared=True)
    assert all(place.exists() for place in left)
    start(open_fit(path))
    assert [place.name for place in path.rglob(".*")] == [".hidden"]


@dataclasses.dataclass(frozen=True)
class Given:
    """Every kind of field that names files."""

    manifest: Path | None = None
    inner: Config = Config()
    several: tuple[Path, ...] = ()
    external: tuple[str, ...] = ()
    cache: Path | None = None
    rate: float = 0.5


@pytest.fixture
def given(tmp_path):
    for name in ("scans/a.nii", "scans/series/1.dcm", "scans/.DS_Store", "b.nii", "c.nii", "x.nii", "cache/0.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "all.csv").write_text("path;age\nb.nii;61.5\n scans/series ;7\nnone.nii;\n")
    (tmp_path / "other.csv").write_text("path\nx.nii\n")
    return Given(
        tmp_path / "all.csv", Config(ScanConfig(dwi=tmp_path / "c.nii")), (tmp_path / "scans",),
        (f"far:other={tmp_path}/other.csv",), tmp_path / "cache",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "is_input"),
    [
        ("all.csv", True), ("b.nii", True), ("scans/series/1.dcm", True), ("c.nii", True), ("scans/a.nii", True),
        ("other.csv", True), ("x.nii", True), ("cache/0.npy", False), ("scans/.DS_Store", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_complete", [False, True])
def test_files_replaced_in_place_are_noticed(tmp_path, given, name, is_input, is_complete):
    path = tmp_path / "run"
    start(open_fit(path, given))
    if is_complete:
        (path / "report.html").write_text("page")
    assert open_fit(path, given).status == ("complete" if is_complete else "unfinished")
    edit(tmp_path / name)
    if not is_input:
        open_fit(path, given)
        return
    with pytest.raises(InputError, match=f"as they were when this run began, found .*{name} changed; .*--overwrite"):
        open_fit(path, given)
    assert open_fit(path, given, overwrite=True).status == "new"
    (path / "outputs" / "failed.csv").write_text(f"path,id,reason\n{tmp_path / name},a,broken\n")
    assert open_fit(path, given).status != "new"  # a file that failed may be repaired
    (path / "outputs" / "failed.csv").write_text(f"path,id,reason\n{tmp_path},a,broken\n")
    assert open_fit(path, given).status != "new"  # and so may one of a series in a folder
    (path / "outputs" / "failed.csv").write_text(f"path,id,reason\n/elsewhere,a,{tmp_path / name}: expected a mask\n")
    assert open_fit(path, given).status != "new"  # or what belongs to a record


def edit(path, byte=1):
    """Change one byte of a file, which keeps its size; the second of a table is in a name of a column."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)
    redate(path)


def redate(path):
    time = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(time, time))


def test_files_that_were_copied_anew_are_the_same_files(tmp_path, given):
    path = tmp_path / "run"
    start(open_fit(path, given))
    assert open_fit(path, given).note == ""
    files = [item for item in tmp_path.rglob("*") if item.is_file() and path not in item.parents]
    for item in files:
        redate(item)
    run = open_fit(path, given)
    # All but the cache and the hidden file.
    assert run.note == f"{len(files) - 2} input file(s) have new dates and the contents that this run began with."
    start(run)
    assert open_fit(path, given).note == ""
    edit(tmp_path / "b.nii")
    with pytest.raises(InputError, match=r"found \S*b\.nii changed; run it again"):
        open_fit(path, given)


def test_of_large_files_three_parts_are_compared_and_the_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(run_inputs, "WHOLE_BYTES", 0)
    monkeypatch.setattr(run_inputs, "PART_BYTES", 8)
    scan, path = tmp_path / "scan.nii.gz", tmp_path / "run"
    scan.write_bytes(bytes(range(200)))
    given = Given(several=(scan,))
    start(open_fit(path, given))
    redate(scan)
    said = "1 input file(s) have new dates and the contents that this run began with"
    assert open_fit(path, given).note == f"{said}; 1 of them were compared at beginning, middle and end."
    for byte in (3, 102, -1):
        edit(scan, byte)
        with pytest.raises(InputError, match=r"scan\.nii\.gz changed"):
            open_fit(path, given)
        edit(scan, byte)  # back again
        open_fit(path, given)
    # Of a folder that was not copied, one file with a new date may have changed where nobody looked.
    (tmp_path / "beside.nii").write_bytes(bytes(200))
    given = Given(several=(scan, tmp_path / "beside.nii"))
    start(open_fit(path, given, overwrite=True))
    redate(scan)
    with pytest.raises(InputError, match=r"scan\.nii\.gz changed"):
        open_fit(path, given)
    redate(tmp_path / "beside.nii")
    assert open_fit(path, given).note.startswith("2 input file(s) have new dates")


def test_dates_count_where_an_older_run_kept_no_digests(tmp_path, given):
    path = tmp_path / "run"
    start(open_fit(path, given))
    record = json.loads((path / "inputs.json").read_text())
    short = {place: {name: entry[:2] for name, entry in names.items()} for place, names in record.items()}
    (path / "inputs.json").write_text(json.dumps(short))
    assert open_fit(path, given).status == "unfinished"
    redate(tmp_path / "b.nii")
    with pytest.raises(InputError, match=r"b\.nii changed"):
        open_fit(path, given)


def test_files_that_came_and_went_are_noticed(tmp_path, given):
    path = tmp_path / "run"
    start(open_fit(path, given))
    (tmp_path / "scans" / "new.nii").write_text("n")
    (tmp_path / "b.nii").unlink()
    with pytest.raises(InputError, match=r"b\.nii gone; .*new\.nii new"):
        open_fit(path, given)


def test_a_run_inside_a_run_does_not_count_the_outer_runs_files(tmp_path, given):
    outer, inner = tmp_path / "run", tmp_path / "run" / "inputs" / "meta"
    start(open_fit(outer, given))
    (outer / "inputs").mkdir()
    (outer / "inputs" / "made.csv").write_text("path\na\n")
    assert open_fit(inner, Given(manifest=outer / "inputs" / "made.csv")).inputs == {}
    assert open_fit(tmp_path / "other", Given(manifest=outer / "inputs" / "made.csv")).inputs


def test_commands_for_parts_of_a_run_share_its_folder(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Part:
        processes: int = 2
        process: int = 0

    start(open_fit(tmp_path / "run", Part()))
    assert open_fit(tmp_path / "run", Part(process=1)).status == "unfinished"
    with pytest.raises(InputError, match="another configuration"):
        open_fit(tmp_path / "run", Part(processes=3))


def test_a_run_goes_on_on_other_devices_and_processes(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Trained:
        train: TrainConfig = TrainConfig()

    def on(**mesh):
        return Trained(TrainConfig(mesh=MeshConfig(**mesh)))

    start(open_fit(tmp_path / "run", on(distributed=True, processes=2, process=0, coordinator="a:1")))
    for mesh in (on(distributed=True, processes=2, process=1, coordinator="a:1"), on(data=8)):
        assert open_fit(tmp_path / "run", mesh).status == "unfinished"
    with pytest.raises(InputError, match="another configuration"):
        open_fit(tmp_path / "run", Trained(TrainConfig(seed=1)))


def test_a_run_that_was_half_deleted_starts_from_nothing(tmp_path, monkeypatch):
    path = tmp_path / "run"
    start(open_fit(path))
    (path / "checkpoints" / "state").mkdir(parents=True)

    def killed(place):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(open_fit(path))
    assert (path / "checkpoints").exists() and open_fit(path).status == "new"
    monkeypatch.undo()
    remove(open_fit(path))
    assert not path.exists()
