"""What a run says while it works: lines, numbers and progress.

Lines go to the terminal and to log.txt; numbers to metrics.jsonl, one object per line, all finite; progress is a rich
bar on a terminal and a plain line every few seconds otherwise.
"""

import contextlib
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxmed.errors import InputError
from jaxmed.files import write_text

SECONDS_BETWEEN_LINES = 5.0


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
        self._board = _open_board(folder / "tensorboard") if tensorboard and is_writer else None

    def say(self, text: str) -> None:
        """Print a line and keep it with the time."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
        if not self.is_writer:
            return
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{now}  {text}\n")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append the numbers of a step.

        Raises:
            ValueError: One of them is not finite.
        """
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"step {step}: {name} is {value}")
        if not self.is_writer:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def read_metrics(self) -> list[dict[str, float]]:
        """Return the numbers written so far; a line that a killed run left half-written is left out."""
        return read_metrics(self.folder)

    def rewind(self, step: int) -> None:
        """Forget the numbers of steps that a resumed run will take again."""
        path = self.folder / "metrics.jsonl"
        if self.is_writer and path.exists():
            kept = [line for line in self.read_metrics() if line["step"] <= step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    @contextlib.contextmanager
    def progress(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
        """Show how far long work has come.

        Args:
            label: What is being done.
            total: Its size.
            unit: In what, in the plural.
            done: Where a resumed run begins.

        Yields:
            A function to call with the amount done so far and, if wanted, a few words to show beside it.
        """
        if self.quiet:
            yield lambda amount, note="": None
        elif sys.stderr.isatty():
            with _bar(label, total, unit, done) as update:
                yield update
        else:
            yield self._lines(label, total, unit, done)

    def _lines(self, label: str, total: int, unit: str, done: int) -> Callable[..., None]:
        began = last = time.monotonic()

        def update(amount: int, note: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < SECONDS_BETWEEN_LINES and amount < total:
                return
            last = now
            rate = (amount - done) / max(now - began, 1e-9)
            ending = f" in {_duration(now - began)}"
            if amount < total:
                # Before the first is done, nobody knows.
                ending = f", {_duration((total - amount) / rate)} left" if rate else ""
            note = f", {note}" if note else ""
            speed = f", {_rate(rate)} a second" if rate else ""
            self.say(f"{label}: {amount:,} of {total:,} {unit}{speed}{note}{ending}")

        return update


@contextlib.contextmanager
def _bar(label: str, total: int, unit: str, done: int) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    began = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, completed=done, rate="")

        def update(amount: int, note: str = "") -> None:
            rate = (amount - done) / max(time.monotonic() - began, 1e-9)
            progress.update(task, completed=amount, rate=f"{_rate(rate)}/s {note}".rstrip())

        yield update


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read metrics.jsonl of a run, without a last line that a killed run left half-written."""
    path, found = folder / "metrics.jsonl", []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return found


def _open_board(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise InputError("tensorboard", "its writer", "none", "pip install 'jaxmed[tensorboard]'") from error
    return SummaryWriter(str(folder))


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
