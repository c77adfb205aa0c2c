"""What every stage does around its own work: start, notes, timing, a typed summary, the page, and runs of other stages.

A stage is a module with

- `Config`, a frozen dataclass, and presets `paper()`, `laptop()`, `smoke()` that return one;
- `Summary`, a frozen dataclass of what the run found, kept as outputs/summary.json, or a union of such;
- `run(config, folder)`, which begins with `begin` and ends with `finish`; it returns 1 when some records failed;
- `page(run)`, which makes the report from the files of the run and its summary: `jaxmed report RUN` writes it again.
"""

import dataclasses
import importlib
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Generic, NamedTuple, TypeVar

import jax

from jaxmed.config import from_record, to_record
from jaxmed.files import read_record, write_text
from jaxmed.recipes.bids import write_bids
from jaxmed.recipes.profile_section import profile_section
from jaxmed.report.page import Section, Tile, render
from jaxmed.train.log import Log
from jaxmed.train.processes import wait_for_all
from jaxmed.train.run_folder import RunFolder, RunOptions, open_run, read_summary, start, write_summary

Config = TypeVar("Config")
Summary = TypeVar("Summary")


class Page(NamedTuple):
    """What a stage shows of a run; configuration, timing, versions and command are added to it.

    Attributes:
        title: System and stage.
        subtitle: What was done to which data, in one sentence.
        tiles: The numbers to read first: label, value, and unit or explanation.
        sections: The body.
    """

    title: str
    subtitle: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]


@dataclasses.dataclass(frozen=True)
class Finished(Generic[Config, Summary]):
    """A run that is done, as its page sees it.

    Attributes:
        path: The run folder.
        config: As it was given.
        summary: What the stage kept.
        seconds: Of the parts of the run, by name; empty where timing.json is lost.
    """

    path: Path
    config: Config
    summary: Summary
    seconds: dict[str, float]

    @property
    def outputs(self) -> Path:
        """Folder of results."""
        return self.path / "outputs"


class Clock:
    """Seconds of the parts of a run, in order: each lap ends a part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Name what was done since the last lap."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def begin(folder: RunFolder, notes: Iterable[str] = (), *, tensorboard: bool = False) -> Log:
    """Make the run folder ready, open its log and say the notes; every process waits until the first has done so.

    Args:
        folder: Of the run; one that was begun before, for synthetic inputs, is left as it is.
        notes: What a user should know about the inputs.
        tensorboard: Whether metrics go to TensorBoard too.
    """
    first_only(lambda: start(folder), "folder")
    log = Log(folder.path, folder.options.quiet, tensorboard, jax.process_index() == 0)
    for note in (*([folder.note] if folder.note else []), *notes):
        log.say(f"Note: {note}")
    return log


def first_only(write: Callable[[], object], what: str) -> None:
    """Let the one process of several that writes do so, and every other wait for it.

    Args:
        write: What is done.
        what: Its name, the same in all processes.
    """
    if jax.process_index() == 0:
        write()
    wait_for_all(what)


def finish(
    folder: RunFolder,
    config: Config,
    summary: Summary,
    clock: Clock,
    page: Callable[[Finished[Config, Summary]], Page],
) -> None:
    """Write summary, timing, model cards and page of a run, from process 0; the page comes last: it says "complete".

    Args:
        folder: Of the run.
        config: Of the stage; the page sees it as config.json keeps it.
        summary: A frozen dataclass of numbers, words, None, tuples and dictionaries of such.
        clock: Its laps are the page's timing.
        page: Of the stage.
    """
    if jax.process_index() != 0:
        return
    found = {**to_record(summary), "device": jax.devices()[0].device_kind, "seconds": clock.seconds}
    write_summary(folder, found)
    if any((*folder.outputs.glob("*/record.json"), *folder.outputs.glob("*/*/record.json"))):
        # Imported on use: few stages train a model, and the families of published weights take a while.
        from jaxmed.recipes.model_card import write_cards

        write_cards(folder.path)
    if folder.options.bids:
        told = f"{write_bids(folder.path)} maps under the names of BIDS derivatives, in {folder.outputs / 'bids'}"
        Log(folder.path, folder.options.quiet).say(told)
    write_page(folder.path, type(config), type(summary), page)


def write_page(
    path: Path,
    config_type: type[Config],
    summary_type: type[Summary] | UnionType,
    page: Callable[[Finished[Config, Summary]], Page],
) -> None:
    """Write report.html of a run folder from config.json, timing.json and outputs/."""
    record, stored = read_record(path / "config.json"), read_summary(path)
    seconds, device = stored.pop("seconds"), stored.pop("device")
    config = from_record(config_type, record["config"], str(path / "config.json"))
    summary = from_record(summary_type, stored, str(path / "outputs" / "summary.json"))
    title, subtitle, tiles, sections = page(Finished(path, config, summary, seconds))
    again = f"jaxmed {record['system']} {record['stage']} --config {shlex.quote(str(path / 'config.json'))} --out RUN"
    software = record["versions"] | {"device": device}
    sections = [*sections, *profile_section(path)]
    text = render(title, subtitle, tiles, sections, record["config"], seconds, software, again)
    write_text(path / "report.html", text)


def load_stage(system: str, stage: str) -> ModuleType:
    """Import the module of a stage, by the words of the command line."""
    # A module named stage beside the folder of all stages would be read as one of them.
    name = "assign_stage" if (system, stage) == ("igndmoe", "stage") else stage.replace("-", "_")
    return importlib.import_module(f"jaxmed.systems.{system}.stages.{name}")


def nested_run(
    folder: RunFolder,
    name: str,
    changes: Mapping[str, Any],
    log: Log,
    why: str,
    *,
    preset: str = "smoke",
    place: str = "",
) -> RunFolder:
    """Run another stage for this one, in RUN/inputs; one that an earlier start has finished is not run again.

    Args:
        folder: Of the run that needs it, begun.
        name: System and stage, such as "tangerine pretrain".
        changes: Fields of the other stage's configuration by dotted name, over the preset: {"data.validation": 0.0}.
        log: Of the run that needs it.
        why: The line that says what is done.
        preset: Of the other stage.
        place: Folder in RUN/inputs; the stage's name by default.
    """
    system, stage = name.split()
    module = load_stage(system, stage)
    config = getattr(module, preset)()
    for field, value in changes.items():
        config = _replace(config, field.split("."), value)
    nested = open_run(system, stage, config, RunOptions(folder.path / "inputs" / (place or stage), quiet=True))
    if nested.status != "complete":
        log.say(why)
        module.run(config, nested)
    return nested


def _replace(config: Any, names: list[str], value: Any) -> Any:
    first, *rest = names
    return dataclasses.replace(config, **{first: _replace(getattr(config, first), rest, value) if rest else value})
