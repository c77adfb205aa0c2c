"""The best state of a run by one metric of its evaluations, and when to stop waiting for a better one."""

from collections.abc import Mapping
from typing import Any, Literal

from jaxmed.errors import InputError
from jaxmed.train.checkpoint import Checkpoints
from jaxmed.train.log import Log


class Best:
    """The best evaluation so far; read back from metrics.jsonl, so that a resumed run decides as an unbroken one."""

    def __init__(
        self, metric: str, best_is: Literal["largest", "smallest"], patience: int, checkpoints: Checkpoints
    ) -> None:
        """Begin without an evaluation.

        Args:
            metric: Of the evaluation.
            best_is: Which of its values is the best.
            patience: Evaluations without a better one after which nobody waits any more; 0 waits for ever.
            checkpoints: Where the best state is kept.
        """
        self.metric, self.name, self.patience, self.checkpoints = metric, f"evaluation/{metric}", patience, checkpoints
        self._sign = 1 if best_is == "largest" else -1
        self._value: float | None = None
        self._since = 0  # evaluations

    @property
    def is_out_of_patience(self) -> bool:
        """Whether too many evaluations have passed without a better one."""
        return 0 < self.patience <= self._since

    def rewind(self, done: int, log: Log) -> None:
        """Forget what came after a step, and read again what came before."""
        self._value, self._since = None, 0
        self.checkpoints.discard_after(done)
        for line in log.read_metrics():
            # Of several processes the first takes later lines out of the file, but perhaps not yet.
            if self.name in line and line["step"] <= done:
                self._improves(line[self.name])

    def take(self, values: Mapping[str, float], number: int, state: Any, states: Checkpoints) -> None:
        """Save a new best; the one that a run continuing from the last saved state needs stays until the next.

        Args:
            values: Of an evaluation, by name.
            number: Its step.
            state: What was evaluated.
            states: Checkpoints that the run continues from.

        Raises:
            InputError: The metric is not among the values, or the state cannot be written.
        """
        if self.name not in values:
            known = ", ".join(key.removeprefix("evaluation/") for key in values)
            raise InputError("loop.best", f"a metric of the evaluation ({known})", self.metric)
        if self._improves(values[self.name]):
            states.wait()
            self.checkpoints.wait()
            last = max(states.steps(), default=0)
            self.checkpoints.keep_only([step for step in self.checkpoints.steps() if step <= last][-1:])
            self.checkpoints.save(number, state)

    def close(self) -> None:
        """Wait until the best is on disk, and delete what stood in for it."""
        self.checkpoints.wait()
        self.checkpoints.keep_only(self.checkpoints.steps()[-1:])
        self.checkpoints.close()

    def _improves(self, value: float) -> bool:
        is_better = self._value is None or self._sign * value > self._sign * self._value
        self._value, self._since = (value, 0) if is_better else (self._value, self._since + 1)
        return is_better
