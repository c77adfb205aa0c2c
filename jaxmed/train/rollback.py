"""Back to the last save when a number is not finite, and on without the batches since then.

The numbers of a run are a function of its seed and step, so the same batches would end at the same bad number. PaLM
(arXiv:2204.02311, section 5.1) went on in this way from its spikes: from a state before them, past the batches around
them. Which batches were left out is kept beside the checkpoints, so that a resumed run leaves them out as well.
"""

from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import jax

from jaxmed.errors import InputError
from jaxmed.files import read_record, write_json


class NotFinite(InputError):
    """A loss or metric that is not finite.

    Attributes:
        step: The step that it belongs to.
        metric: Its name.
        value: The number, in words.
    """

    def __init__(self, unit: str, step: int, metric: str, value: float) -> None:
        """Say it as a mistake of the user's, which it is unless the run may go back."""
        self.step, self.metric, self.value = step, metric, str(value)
        advice = (
            "the last save stays: lower --optimizer.peak-lr, set --optimizer.clip-norm, look at the data, or let the "
            "run go back and leave these batches out with --loop.rollbacks"
        )
        super().__init__(f"{unit} {step:,}, {metric}", "a finite number", value, advice)


class Rollbacks:
    """The rollbacks of a run, and the batches that it leaves out: batch b is what step b takes where none was."""

    def __init__(self, path: Path, most: int) -> None:
        """Read what earlier starts of the run left.

        Args:
            path: File of the record, which need not exist.
            most: Rollbacks that the run may make in all.
        """
        self.path, self.most = path, most
        self.record: list[dict[str, Any]] = []
        if path.exists():
            self.record = read_record(path)["rollbacks"]

    @property
    def skipped(self) -> set[int]:
        """Numbers of the batches that are left out."""
        return {batch for entry in self.record for batch in range(entry["first_batch"], entry["last_batch"] + 1)}

    @property
    def are_left(self) -> bool:
        """Whether the run may go back once more."""
        return len(self.record) < self.most

    def add(self, error: NotFinite, saved: int) -> str:
        """Leave out the batches from a save to a bad number, keep the record, and return the line that says so.

        Args:
            error: The bad number.
            saved: Step of the save that the run goes back to.
        """
        first, last = self._passed(saved) + 1, self._passed(error.step)
        self.record.append({
            "step": error.step, "metric": error.metric, "value": error.value, "back_to_step": saved,
            "first_batch": first, "last_batch": last,
        })  # fmt: skip
        if jax.process_index() == 0:
            write_json(self.path, {"rollbacks": self.record})
        return (
            f"{error.where} is {error.value}: going back to step {saved:,}, and on without batches {first:,} to "
            f"{last:,} (rollback {len(self.record)} of {self.most})."
        )

    def batches(self, batches: Callable[[int], Iterable[Any]], done: int) -> Generator[Any, None, None]:
        """Yield the batches from a step on, without those that are left out."""
        passed, skipped = self._passed(done), self.skipped
        stream = iter(batches(passed))
        try:
            for number, batch in enumerate(stream, passed + 1):
                if number not in skipped:
                    yield batch
        finally:
            if hasattr(stream, "close"):
                stream.close()  # pyright: ignore[reportAttributeAccessIssue]

    def _passed(self, done: int) -> int:
        """Return how many batches have been taken or left out once a number of steps is done."""
        passed = done
        for batch in sorted(self.skipped):
            passed += batch <= passed
        return passed
