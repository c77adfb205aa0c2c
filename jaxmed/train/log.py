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

SECONDS_BETWEEN_LINES = 5.0


class Log:
    """Writer of log.txt and metrics.jsonl in a run folder that exists."""

    def __init__(self, folder: Path, quiet: bool = False) -> None:
        """Open the log of a run; earlier lines of a resumed run stay."""
        self.folder, self.quiet = folder, quiet

    def say(self, text: str) -> None:
        """Print a line and keep it with the time."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
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
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    @contextlib.contextmanager
    def progress(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Show how far long work has come.

        Args:
            label: What is being done.
            total: Its size.
            unit: In what, in the plural.
            done: Where a resumed run begins.

        Yields:
            A function to call with the amount done so far.
        """
        if self.quiet:
            yield lambda amount: None
        elif sys.stderr.isatty():
            with _bar(label, total, unit, done) as update:
                yield update
        else:
            yield self._lines(label, total, unit, done)

    def _lines(self, label: str, total: int, unit: str, done: int) -> Callable[[int], None]:
        began = last = time.monotonic()

        def update(amount: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < SECONDS_BETWEEN_LINES and amount < total:
                return
            last = now
            rate = (amount - done) / max(now - began, 1e-9)
            left = (total - amount) / max(rate, 1e-9)
            ending = f", {_duration(left)} left" if amount < total else f" in {_duration(now - began)}"
            self.say(f"{label}: {amount:,} of {total:,} {unit}, {rate:,.0f} a second{ending}")

        return update


@contextlib.contextmanager
def _bar(label: str, total: int, unit: str, done: int) -> Iterator[Callable[[int], None]]:
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

        def update(amount: int) -> None:
            rate = (amount - done) / max(time.monotonic() - began, 1e-9)
            progress.update(task, completed=amount, rate=f"{rate:,.0f}/s")

        yield update


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
