"""The loop of every training run: restore, step, report, evaluate, save.

`fit` takes any `step(state, batch) -> (state, metrics)`: one that is compiled, or a round of work on the host that is
saved and resumed in the same way. It keeps the device busy: the next batch is read and placed while a step runs, and
the numbers of a step are looked at one step later.
"""

import collections
import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import jax
from jax.sharding import Mesh

from jaxmed.config import Count, Whole, checked
from jaxmed.errors import InputError, Interrupted
from jaxmed.train.announce import announce, require_memory
from jaxmed.train.best import Best
from jaxmed.train.checkpoint import Checkpoints, Restored
from jaxmed.train.log import Log, at_work
from jaxmed.train.mesh import shard_batch
from jaxmed.train.profile import tracing, waited
from jaxmed.train.rollback import NotFinite, Rollbacks
from jaxmed.train.run_folder import RunFolder

State = TypeVar("State")


@dataclasses.dataclass(frozen=True)
@checked
class LoopConfig:
    """Length of a run, and how often it speaks and saves.

    Attributes:
        steps: Length of the run, in steps.
        log_every: Steps between lines of metrics.jsonl.
        save_every: Steps between checkpoints; 0 saves at the end alone.
        evaluate_every: Steps between evaluations; 0 evaluates at the end alone.
        keep: Newest checkpoints that stay.
        keep_every: Checkpoints of the steps that it divides stay too; 0 for none.
        rollbacks: How often the run may go back to its last checkpoint when a loss or metric is not finite, and go on
            without the batches since then, which are listed in checkpoints/; 0 stops instead.
        best: Metric of the evaluation whose best state is kept in checkpoints/best; empty keeps none.
        best_is: Whether the largest or the smallest value is the best.
        patience: Evaluations without a better `best` after which the run ends; 0 never ends early.
        tensorboard: Write the metrics for TensorBoard too.
    """

    steps: Count = 1000
    log_every: Count = 10
    save_every: Whole = 500
    evaluate_every: Whole = 0
    keep: Count = 2
    keep_every: Whole = 0
    rollbacks: Whole = 0
    best: str = ""
    best_is: Literal["largest", "smallest"] = "largest"
    patience: Whole = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.patience and not self.best:
            raise ValueError("patience: expected the name of a metric in best, found none")


def length_notes(config: LoopConfig, epochs: float) -> list[str]:
    """Say that a number of steps is not looked at, where epochs decide the length and it was set."""
    if not epochs or config.steps == LoopConfig.steps:
        return []
    return [f"The length is {epochs:g} epochs; loop.steps {config.steps:,} is not looked at (--epochs 0 takes it)."]


def fit(
    config: LoopConfig,
    state: State,
    step: Callable[[State, Any], tuple[State, Mapping[str, jax.Array | float]]],
    batches: Callable[[int], Iterable[Any]],
    *,
    mesh: Mesh | None,
    folder: RunFolder,
    log: Log,
    evaluate: Callable[[State], Mapping[str, float]] | None = None,
    part: str = "",
    unit: str = "step",
    is_finished: Callable[[State], bool] | None = None,
) -> State:
    """Train until the last step, continuing from the newest checkpoint of the run.

    A fit by rounds takes one problem over and over, and may settle early:

        state = fit(LoopConfig(steps=20, log_every=1, save_every=1), state, one_round, lambda _: repeat(problem),
                    mesh=None, folder=folder, log=log, unit="round", is_finished=has_settled)

    Args:
        config: Length and intervals.
        state: A fresh state, in its place on the mesh.
        step: From `make_train_step`, or any of this signature; compiled here ahead of time where it is jitted.
        batches: `batches(start)` yields this process's share of the batches from step `start` on, all of one shape.
        mesh: The batches are split over its "data" axis; None takes them as they are.
        folder: The run.
        log: Its log.
        evaluate: `evaluate(state) -> metrics`, called in every process.
        part: Name of this one among several fits of a run: of its checkpoints, its lines and its numbers, "PART/loss".
        unit: What a step is called. The rate of anything but steps is not among the numbers.
        is_finished: Says of a state that nothing is left to do, before the last step.

    Returns:
        The state after the last step, saved; where `best` is set it is in checkpoints/best besides.

    Raises:
        InputError: A loss or metric is not finite (nothing is saved) and no rollback is left, the batches end too
            early, or a save fails.
        Interrupted: SIGTERM or Ctrl-C; the step at hand is finished and saved first.
    """
    record = {"run": folder.record}
    place = folder.checkpoints / (part or "state")
    checkpoints = Checkpoints(place, record, config.keep, config.keep_every)
    rollbacks = Rollbacks(folder.checkpoints / f"{place.name}-rollbacks.json", config.rollbacks)
    with checkpoints, _catch_signals() as signals:
        restored = checkpoints.restore(state)
        done = 0
        if restored is not None:
            done, state = restored
            log.say(f"Continuing after {unit} {done:,} of an interrupted run.")
        log.rewind(done, part)
        if restored is None and config.rollbacks:
            checkpoints.save(done, state)
        best = None
        if config.best:
            kept = Checkpoints(folder.checkpoints / "best", record, keep=None)
            best = Best(config.best, config.best_is, config.patience, kept)
            best.rewind(done, log)
        devices = 1 if mesh is None else mesh.size
        run = _Run(config, step, log, folder, checkpoints, best, evaluate, devices, part, unit, is_finished)
        while True:
            with contextlib.closing(_placed(rollbacks.batches(batches, done), mesh)) as stream:
                try:
                    state = run.advance(state, done, stream, signals)
                    break
                except NotFinite as error:
                    if not rollbacks.are_left:
                        raise
                    done, state = run.restore()
                    log.say(rollbacks.add(error, done))
    if best is not None:
        best.close()
    return state


def _placed(stream: Generator[Any, None, None], mesh: Mesh | None) -> Generator[Any, None, None]:
    with contextlib.closing(stream):
        for batch in waited(stream):
            yield batch if mesh is None else shard_batch(batch, mesh)


@dataclasses.dataclass
class _Run:
    """What stays the same while a run advances."""

    config: LoopConfig
    step: Callable[..., Any]
    log: Log
    folder: RunFolder
    checkpoints: Checkpoints
    best: Best | None
    evaluate: Callable[..., Mapping[str, float]] | None
    num_devices: int
    part: str
    unit: str
    is_finished: Callable[[Any], bool] | None
    compiled: tuple[Callable[..., Any], float] | None = None
    latest: Any = None  # the state that came last, for its shapes and places

    @property
    def label(self) -> str:
        return f"Training ({self.part})" if self.part else "Training"

    def advance(self, state: Any, done: int, stream: Iterator[Any], signals: list[int]) -> Any:
        """Take the steps that are left."""
        config, first = self.config, done
        if done >= config.steps or self._is_out_of_patience() or self._is_finished(state):
            return state
        batch = next(stream, None)
        self.compiled = self.compiled or self._compile(state, batch, config.steps - done)
        step, flops = self.compiled
        pending: collections.deque[tuple[int, Any]] = collections.deque()
        saved = done
        # The first two steps warm up.
        with (
            self.log.progress(self.label, config.steps, f"{self.unit}s", done) as update,
            tracing(self.folder, self.log, first + 2) as trace,
        ):
            began = time.monotonic()
            update(done)
            while True:
                if batch is None:
                    raise InputError("data", f"a batch for {self.unit} {done + 1:,}", "no more records")
                state, metrics = step(state, batch)
                self.latest = state
                done += 1
                pending.append((done, metrics))
                is_last = done == config.steps or self._is_finished(state)
                stop = self._must_stop(done, signals)
                is_evaluation = self.evaluate is not None and (is_last or _is_due(done, config.evaluate_every))
                is_save = is_last or stop is not None or _is_due(done, config.save_every)
                if not (is_last or stop is not None):
                    batch = next(stream, None)
                # Looking at the step before keeps the device one step ahead of us, and no more.
                while len(pending) > (0 if is_evaluation or is_save else 1):
                    self._check(*pending.popleft(), began, first)
                trace(done)
                # The first step of one that was not compiled above is mostly compilation: the rate counts from its end.
                is_compilation = done == first + 1 and not (flops or is_last)
                update(first if is_compilation else done, _rate(flops, done - first, time.monotonic() - began))
                if is_evaluation:
                    self._evaluate(done, state)
                    if self._is_out_of_patience():
                        self.log.say(f"Stopping after step {done:,}: {config.best} has not improved "
                                     f"in {config.patience} evaluations.")  # fmt: skip
                        is_save = is_last = True
                if is_save and saved != done:
                    if self.best is not None:
                        # A run that continues from this state does not evaluate it again: its best must be there.
                        self.best.checkpoints.wait()
                    self.checkpoints.save(done, state)
                    saved = done
                if stop is not None:
                    self.checkpoints.wait()
                    raise Interrupted(stop, f"{self.unit} {done:,} of {config.steps:,}")
                if is_last:
                    return state

    def restore(self) -> Restored:
        """Go back to the last save, and forget what came after it."""
        for kept in (self.checkpoints, *(() if self.best is None else (self.best.checkpoints,))):
            kept.wait()
        restored = self.checkpoints.restore(self.latest)
        assert restored is not None, "a run that may go back saves its first state"
        self.log.rewind(restored.step, self.part)
        if self.best is not None:
            self.best.rewind(restored.step, self.log)
        return restored

    def _is_out_of_patience(self) -> bool:
        return self.best is not None and self.best.is_out_of_patience

    def _is_finished(self, state: Any) -> bool:
        return self.is_finished is not None and self.is_finished(state)

    def _must_stop(self, done: int, signals: list[int]) -> int | None:
        if jax.process_count() > 1:  # all of them must stop at the same step
            return signal.SIGTERM if self.checkpoints.reached_preemption(done) else None
        return signals[0] if signals else None

    def _compile(self, state: Any, batch: Any, count: int) -> tuple[Callable[..., Any], float]:
        """Say what is coming, and compile the step ahead of time; return it and its operations."""
        if batch is None:
            return self.step, 0.0
        traced = None
        if hasattr(self.step, "trace"):
            with at_work("Tracing the step"):
                traced = self.step.trace(state, batch)  # pyright: ignore[reportFunctionMemberAccess]
        flops = announce(
            self.log, self.label, params=getattr(state, "params", state), held=state, batch=batch,
            program=None if traced is None else traced.jaxpr, count=count, unit=f"{self.unit}s",
            devices=self.num_devices, smaller=self.folder.smaller,
        )  # fmt: skip
        if traced is None:
            return self.step, 0.0
        began = time.monotonic()
        with at_work("Compiling the step"):
            compiled = traced.lower().compile()
        held, space = _bytes(compiled)
        memory = f"{held / 1e9:,.2f} GB for state and batch and {space / 1e9:,.2f} GB to work in" if held else "unknown"
        self.log.say(f"Compiled the step in {time.monotonic() - began:.1f} s. Memory it takes: {memory}.")
        require_memory(held + space, self.folder.smaller)
        return compiled, flops

    def _check(self, number: int, metrics: Mapping[str, jax.Array | float], began: float, first: int) -> None:
        """Stop at a number that is not finite; write the numbers that are due."""
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise NotFinite(self.unit, number, name, value)
        if _is_due(number, self.config.log_every) or number == self.config.steps:
            if self.unit == "step":
                values["steps_per_second"] = (number - first) / max(time.monotonic() - began, 1e-9)
            self.log.metrics(number, {f"{self.part}/{name}" if self.part else name: values[name] for name in values})

    def _evaluate(self, number: int, state: Any) -> None:
        assert self.evaluate is not None
        values = {f"evaluation/{name}": float(value) for name, value in self.evaluate(state).items()}
        self.log.metrics(number, values)
        shown = ", ".join(f"{name.removeprefix('evaluation/')} {value:.4g}" for name, value in values.items())
        self.log.say(f"Step {number:,}: {shown}")
        if self.best is not None:
            self.best.take(values, number, state, self.checkpoints)


def restore_best(folder: RunFolder, state: State) -> State:
    """Read the state that `LoopConfig.best` kept.

    Raises:
        InputError: There is none.
    """
    with Checkpoints(folder.checkpoints / "best", keep=None) as best:
        restored = best.restore(state)
    if restored is None:
        raise InputError(folder.checkpoints / "best", "a saved state", "none", "was the run evaluated?")
    return restored.state


def _bytes(compiled: Any) -> tuple[float, float]:
    """Return what a compiled step takes of each device: for arguments and results, and to work in; 0 where unknown."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return 0.0, 0.0
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return float(held), float(analysis.temp_size_in_bytes)


def _is_due(number: int, interval: int) -> bool:
    return interval > 0 and number % interval == 0


def _rate(flops: float, steps: int, seconds: float) -> str:
    return f"{flops * steps / max(seconds, 1e-9) / 1e9:,.1f} GFLOP/s" if flops else ""


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """Note SIGTERM and Ctrl-C instead of dying of them; a second one ends the process at once."""
    caught: list[int] = []
    if jax.process_count() > 1:  # jax's own service has caught SIGTERM, and lets all processes stop at one step
        yield caught
        return

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    # Handlers belong to the main thread.
    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
