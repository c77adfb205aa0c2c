"""What a run says while it works: lines, numbers and progress.

Lines go to the terminal and to log.txt; numbers to metrics.jsonl, one object per line, all finite; progress is a rich
bar on a terminal and a plain line every few seconds otherwise. While a stage runs, `keep_speaking` breaks every
silence, whatever the stage is busy with.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmed.errors import InputError
from jaxmed.files import write_text

SECONDS_BETWEEN_LINES = 5.0
SECONDS_OF_SILENCE = 8.0


@dataclasses.dataclass
class Work:
    """What is being done, and since when on the monotonic clock."""

    label: str
    began: float


class Screen:
    """What the terminal last showed of this process, and what the process is busy with."""

    def __init__(self) -> None:
        """Begin with nothing said."""
        self.spoken = self.began = time.monotonic()  # when a line, and when one that is no heartbeat, was last printed
        self.last = ""  # that line
        self.work: list[Work] = []  # what is being done, the innermost last
        self.is_silent = False  # another process speaks, or a bar moves by itself

    def say(self, text: str) -> None:
        """Print a line."""
        self.spoken = self.began = time.monotonic()
        self.last = text
        print(text, file=sys.stderr, flush=True)

    def heartbeat(self, now: float) -> str:
        """Return what breaks a silence; empty while there is none."""
        if self.is_silent or now - self.spoken < SECONDS_OF_SILENCE:
            return ""
        label = f"Still at work after '{self.last[:60]}'" if self.last else "Reading and checking the inputs"
        work = ([Work(label, self.began)] + self.work)[-1]
        return f"{work.label}: {duration(now - work.began)} so far"


_SCREEN = Screen()  # one per process, as there is one terminal


@contextlib.contextmanager
def keep_speaking(seconds: float = 1.0) -> Iterator[None]:
    """Say every few seconds what is being done and for how long, wherever the block itself says nothing.

    A compiler, the first step of a large model or a reader of many files holds a stage up for minutes: a thread speaks
    meanwhile. Its lines go to the terminal alone.

    Args:
        seconds: Between looks at the clock.
    """
    ended = threading.Event()
    _SCREEN.__init__()

    def watch() -> None:
        while not ended.wait(seconds):
            if text := _SCREEN.heartbeat(time.monotonic()):
                _SCREEN.spoken = time.monotonic()
                print(text, file=sys.stderr, flush=True)

    thread = threading.Thread(target=watch, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def at_work(label: str) -> Iterator[Work]:
    """Name what the block does, for the lines of `keep_speaking`; what it yields may be changed."""
    work = Work(label, time.monotonic())
    _SCREEN.work.append(work)
    try:
        yield work
    finally:
        _SCREEN.work.remove(work)


class Log:
    """Writer of log.txt and metrics.jsonl in a run folder that exists."""

    def __init__(self, folder: Path, quiet: bool = False, tensorboard: bool = False, is_writer: bool = True) -> None:
        """Open the log of a run; earlier lines of a resumed run stay.

        Args:
            folder: The run's.
            quiet: Print nothing.
            tensorboard: Write the numbers to RUN/tensorboard too.
            is_writer: Whether this process writes at all: of several, the first.

        Raises:
            InputError: TensorBoard's writer is not installed.
        """
        self.folder, self.quiet, self.is_writer = folder, quiet or not is_writer, is_writer
        _SCREEN.is_silent = _SCREEN.is_silent or not is_writer
        self._board = _open_board(folder / "tensorboard") if tensorboard and is_writer else None
        self._earlier: dict[tuple[Any, ...], dict[str, float]] | None = None

    def say(self, text: str) -> None:
        """Print a line and keep it with the time."""
        if not self.quiet:
            _SCREEN.say(text)
        if not self.is_writer:
            return
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        with (self.folder / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{now}  {text}\n")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append the numbers of a step; those of an earlier start that this one takes again give way.

        Raises:
            InputError: One of them is not finite.
        """
        for name, value in values.items():
            if not math.isfinite(value):
                advice = "it has diverged: lower the learning rate, or look at the data"
                raise InputError(f"step {step:,}, {name}", "a finite number", value, advice)
        if not self.is_writer:
            return
        self._write_line({"step": step, **values})
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def _write_line(self, line: dict[str, float]) -> None:
        if self._earlier is None:
            # Whole again before anything is appended: a kill may have left half a line.
            self._rewrite(self.read_metrics())
        assert self._earlier is not None
        old = self._earlier.pop(_name_of(line), None)
        if old is None:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        elif old != line:
            earlier = self._earlier
            self._rewrite([line if other == old else other for other in self.read_metrics()])
            self._earlier = earlier

    def _rewrite(self, lines: list[dict[str, float]]) -> None:
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        self._earlier = {_name_of(line): line for line in lines}

    def read_metrics(self) -> list[dict[str, float]]:
        """Return the numbers written so far; a line that a killed run left half-written is left out."""
        return read_metrics(self.folder)

    def rewind(self, step: int, part: str = "") -> None:
        """Forget the numbers of steps that a resumed run will take again.

        Args:
            step: The last one that stays.
            part: Only numbers called PART/NAME; all where empty.
        """
        if self.is_writer and (self.folder / "metrics.jsonl").exists():
            self._rewrite([
                line for line in self.read_metrics()
                if line["step"] <= step or (part and not any(name.startswith(f"{part}/") for name in line))
            ])  # fmt: skip

    @contextlib.contextmanager
    def progress(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
        """Show how far long work has come.

        Args:
            label: What is being done.
            total: Its size.
            unit: In what, in the plural.
            done: Where a resumed run begins.

        Yields:
            A function to call with the amount done so far and, if wanted, a few words to show beside it. Called with
            `done` again, it starts the clock anew: compilation then counts for nothing in the rate.
        """
        if self.quiet:
            yield lambda amount, note="": None
        elif sys.stderr.isatty():
            with _bar(label, total, unit, done) as update:
                yield update
        else:
            with at_work(f"{label}, {done:,} of {total:,} {unit} done, the next") as work:
                yield self._lines(work, label, total, unit, done)

    def _lines(self, work: Work, label: str, total: int, unit: str, done: int) -> Callable[..., None]:
        began = last = time.monotonic()

        def update(amount: int, note: str = "") -> None:
            nonlocal began, last
            now = time.monotonic()
            began = now if amount == done else began
            work.label, work.began = f"{label}, {amount:,} of {total:,} {unit} done, the next", now
            if now - last < SECONDS_BETWEEN_LINES and amount < total:
                return
            last = now
            rate = (amount - done) / max(now - began, 1e-9)
            ending = f" in {duration(now - began)}"
            if amount < total:
                # Before the first is done, nobody knows.
                ending = f", {duration((total - amount) / rate)} left" if rate else ""
            note = f", {note}" if note else ""
            speed = f", {_rate(rate)} {unit}/s" if rate else ""
            self.say(f"{label}: {amount:,} of {total:,} {unit}{speed}{note}{ending}")

        return update


@contextlib.contextmanager
def _bar(label: str, total: int, unit: str, done: int) -> Iterator[Callable[..., None]]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        "{task.description}", rich_progress.BarColumn(), rich_progress.MofNCompleteColumn(), unit,
        "{task.fields[rate]}", rich_progress.TimeElapsedColumn(), rich_progress.TimeRemainingColumn(),
    )  # fmt: skip
    began = time.monotonic()
    with _moving(), rich_progress.Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, completed=done, rate="")

        def update(amount: int, note: str = "") -> None:
            nonlocal began
            began = time.monotonic() if amount == done else began
            rate = (amount - done) / max(time.monotonic() - began, 1e-9)
            progress.update(task, completed=amount, rate=f"{_rate(rate)}/s {note}".rstrip())

        yield update


@contextlib.contextmanager
def _moving() -> Iterator[None]:
    """Keep the heartbeat out of a bar, whose clock moves by itself."""
    before, _SCREEN.is_silent = _SCREEN.is_silent, True
    try:
        yield
    finally:
        _SCREEN.is_silent, _SCREEN.spoken = before, time.monotonic()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read metrics.jsonl of a run, without a last line that a killed run left half-written."""
    path, found = folder / "metrics.jsonl", []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return found


def _name_of(line: dict[str, float]) -> tuple[Any, ...]:
    return (line["step"], *line)


def _open_board(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise InputError("tensorboard", "its writer", "none", "pip install 'jaxmed[tensorboard]'") from error
    return SummaryWriter(str(folder))


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """Return a time as people say it: 2.5 s, 3 min 4 s, 5 h 6 min."""
    if 0 < seconds < 0.1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 48 * 60:
        return f"{minutes // 1440} days"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def series(
    lines: Sequence[Mapping[str, float]], name: str, factor: float = 1
) -> tuple[Float[np.ndarray, " line"], Float[np.ndarray, " line"]]:
    """Return the steps and values (times a factor) of a metric, from the lines of metrics.jsonl."""
    found = [(line["step"], factor * line[name]) for line in lines if name in line]
    return np.array([step for step, _ in found], np.float64), np.array([value for _, value in found], np.float64)
