"""The folder that every run writes, in one layout.

config.json (complete, re-runnable), inputs.json (sizes, times and digests of the files that were given), metrics.jsonl,
checkpoints/, outputs/, inputs/ (synthetic data only), timing.json, report.html and log.txt. Equal runs have equal bytes
in outputs/, so that how long each took stands in a file of its own. `open_run` looks and decides without
writing anything; `start` makes the folder. The report is written last, so a run that has one is complete.
"""

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.files import LEFTOVER, expand_home, make_folder, read_record, remove_leftovers, write_json
from jaxmed.train.run_inputs import Inputs, add_digests, compare_inputs, find_inputs
from jaxmed.versions import software_versions

# config.json goes first: what a kill leaves of a run that is being replaced is then no run any more.
OWN_NAMES = (
    "config.json", "inputs.json", "metrics.jsonl", "checkpoints", "outputs", "inputs", "timing.json", "report.html",
    "log.txt", "profile", "tensorboard",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What every stage takes besides its own configuration.

    Attributes:
        out: Run folder to write.
        resume: Continue when the folder holds a run of the same configuration; otherwise start it anew.
        overwrite: Replace a run of another configuration, or a complete one. Only a run's own files are deleted.
        quiet: Print nothing but errors and the path of the report.
        debug: Show the traceback of an error.
        profile: Write a profiler trace of this many steps to RUN/profile, for TensorBoard or Perfetto, and say in log
            and report where their time goes.
        bids: Lay out the maps under the names of BIDS derivatives too, in RUN/outputs/bids.
    """

    out: Path
    resume: bool = True
    overwrite: bool = False
    quiet: bool = False
    debug: bool = False
    profile: int = 0
    bids: bool = False


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run folder that was looked at, and its place in the life of a run.

    Attributes:
        path: The folder.
        options: How the user wants it run.
        record: What config.json holds or will hold: system, stage, config and versions.
        status: "new", "unfinished" (of the same configuration) or "complete".
        inputs: Sizes, times and, where they are known, digests of the files that the configuration names.
        is_begun: Whether `start` has made the folder ready in this process.
        smaller: The preset that fits a CPU, in words, for work that turns out long; empty where there is none.
        note: What the user should know about a run that goes on; may be empty.
    """

    path: Path
    options: RunOptions
    record: dict[str, Any]
    status: Literal["new", "unfinished", "complete"]
    inputs: Inputs = dataclasses.field(default_factory=dict)
    is_begun: bool = dataclasses.field(default=False, init=False, compare=False)
    smaller: str = ""
    note: str = ""

    @property
    def outputs(self) -> Path:
        """Folder of results."""
        return self.path / "outputs"

    @property
    def checkpoints(self) -> Path:
        """Folder of what a killed run continues from."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report.html"


def open_run(
    system: str, stage: str, config: object, options: RunOptions, *, tries_failed_again: bool = False
) -> RunFolder:
    """Decide what a run folder allows, without writing.

    Args:
        system: First word of the command.
        stage: Second word of the command.
        config: The stage's configuration.
        options: The user's.
        tries_failed_again: A batch job: a run that ended with failures is unfinished, since its files may be repaired.

    Raises:
        InputError: The place holds something else, a run of another configuration or of files that have changed
            since, or cannot be written.
    """
    path = expand_home(options.out).absolute()
    record = {"system": system, "stage": stage, "config": to_record(config), "versions": software_versions()}
    _check_writable(path)
    status = _find_status(path, record)
    if status == "other" and not options.overwrite:
        advice = "choose another --out, or replace it with --overwrite"
        expected = "a new folder, or a run of this configuration"
        raise InputError(path, expected, "a run of another configuration", advice)
    if status == "other" or options.overwrite or not options.resume:
        status = "new"
    if status == "complete" and tries_failed_again and (path / "outputs" / "failed.csv").exists():
        status = "unfinished"
    inputs, note = find_inputs(config, path), ""
    if status != "new":
        changed, *_ = found = compare_inputs(path, inputs)
        note = found.note
        if changed:
            told = "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")
            advice = "run it again with --overwrite, or choose another --out"
            raise InputError(path, "input files as they were when this run began", told, advice)
    return RunFolder(path, options, record, status, inputs, note=note)


def start(run: RunFolder, *, is_shared: bool = False) -> None:
    """Make the folder ready: emptied of an older run unless this one continues it. A second call does nothing.

    Args:
        run: The folder.
        is_shared: Whether other processes may be writing in it, whose temporary files are left alone.
    """
    if run.is_begun:
        return
    object.__setattr__(run, "is_begun", True)
    if run.status == "new":
        remove(run)
    run.report.unlink(missing_ok=True)  # a run that goes on is not complete
    if not is_shared:
        remove_leftovers(run.path)
    make_folder(run.outputs)
    add_digests(run.inputs)
    write_json(run.path / "inputs.json", run.inputs)
    write_json(run.path / "config.json", run.record)


def write_summary(run: RunFolder, summary: dict[str, Any]) -> None:
    """Write what a run found to outputs/summary.json, and its "seconds" to timing.json."""
    write_json(run.path / "timing.json", {"seconds": summary.get("seconds", {})})
    write_json(run.outputs / "summary.json", {name: value for name, value in summary.items() if name != "seconds"})


def read_summary(path: Path) -> dict[str, Any]:
    """Read what `write_summary` wrote of the run in a folder; without its timing there are no "seconds" to show."""
    timing = path / "timing.json"
    seconds = read_record(timing) if timing.exists() else {"seconds": {}}
    return read_record(path / "outputs" / "summary.json") | seconds


def remove(run: RunFolder) -> None:
    """Delete everything that a run owns."""
    for name in OWN_NAMES:
        place = run.path / name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in there, or there is no folder
        run.path.rmdir()


def _find_status(path: Path, record: dict[str, Any]) -> Literal["new", "unfinished", "complete", "other"]:
    if not path.exists() or not any(path.iterdir()):
        return "new"
    if not (path / "config.json").exists():
        names = sorted(item.name for item in path.iterdir())
        foreign = next((name for name in names if name not in OWN_NAMES and not LEFTOVER.match(name)), None)
        if foreign is not None:
            found = f"a folder holding {foreign}"
            raise InputError(path, "a new or empty folder, or a run", found, "choose another --out")
        return "new"
    found = read_record(path / "config.json")
    if any(_shared(found.get(name)) != _shared(record[name]) for name in ("system", "stage", "config")):
        return "other"
    return "complete" if (path / "report.html").exists() else "unfinished"


def _shared(config: Any) -> Any:
    """Return a configuration without which part of a shared run a command takes, and on which devices: `mesh`."""
    if isinstance(config, dict):
        return {name: _shared(value) for name, value in config.items() if name not in ("process", "mesh")}
    return config


def _check_writable(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        # Orbax, which writes the checkpoints, takes no other names.
        raise InputError(path, "a folder whose name is UTF-8", error.reason, "choose another --out") from error
    if path.exists() and not path.is_dir():
        raise InputError(path, "a folder for the run", "a file", "choose another --out")
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise InputError(path, "a folder above it", f"the file {existing}", "choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(existing, "a writable place", "a read-only one", "choose another --out")
    with contextlib.suppress(AttributeError, OSError):  # not on every platform: writing will tell
        if os.statvfs(existing).f_flag & os.ST_RDONLY:
            raise InputError(existing, "a writable place", "a read-only file system", "choose another --out")
