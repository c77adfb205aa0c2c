"""Where the time of some steps goes: a trace of jax's profiler, and what it says in a few lines.

RUN/profile holds the trace for TensorBoard (plugins/profile/...) and Perfetto (ui.perfetto.dev opens the .json.gz), and
profile.json with the shares and the longest operations, which the report shows.

A moment counts once, for the first of these that a device is at: compute; collectives, so that those behind which
nothing computes are told; memory, which is copies and changes of layout; else the wait for the next batch; else other:
the host compiling (the first turn of a fit is traced too) or preparing, or nothing. The time of an operation is its
own, without that of operations inside it.
"""

import contextlib
import dataclasses
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Float64

from jaxmed.errors import InputError
from jaxmed.files import DAMAGED, write_json
from jaxmed.train.log import Log, duration
from jaxmed.train.run_folder import RunFolder

WAIT = "jaxmed: wait for input"
KINDS: tuple[str, ...] = ("compute", "collectives", "memory", "input wait", "other")
SUMMARY = "profile.json"
SHOWN = 10
COLLECTIVE = re.compile(
    r"all-?reduce|all-?gather|reduce-?scatter|all-?to-?all|collective-?(permute|broadcast)|nccl|\b(send|recv)\b", re.I
)
# Words of the names that XLA gives to operations which compute nothing, and those that say nothing either way.
MOVES = set(
    "copy transpose broadcast slice dynamic update concatenate pad reshape gather iota bitcast memcpyd2d memcpyh2d "
    "memcpyd2h memcpyp2p memset data formatting infeed outfeed reverse".split()
)
SILENT = set("fusion fused wrapped loop input kernel computation start done clone remat async".split())
CONTROL = set("while conditional call tuple parameter".split())
# Lines of an accelerator on which operations stand; others repeat them by module, step or scope.
LINES = ("Stream", "XLA Ops", "Async XLA Ops")
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a program.

    Attributes:
        name: As XLA calls it.
        kind: One of `KINDS`.
        seconds: That it took itself, on all devices together.
        share: Of the time of all operations.
        count: How often it ran.
    """

    name: str
    kind: str
    seconds: float
    share: float
    count: int


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a trace says.

    Attributes:
        seconds: From the first operation to the end of the last.
        devices: That worked.
        shares: Of that time, by kind, the mean over devices; they sum to 1.
        operations: The longest, in order.
    """

    seconds: float
    devices: int
    shares: dict[str, float]
    operations: tuple[Operation, ...]

    def words(self) -> tuple[str, str]:
        """Return the shares and the longest operations, each in a line."""
        shares = ", ".join(f"{kind} {self.shares[kind]:.1%}" for kind in KINDS)
        longest = "; ".join(f"{one.name} ({one.kind}) {one.share:.1%}" for one in self.operations[:5])
        return (
            f"Profile of {duration(self.seconds)}: {shares} (no device at work).",
            f"Longest operations: {longest or 'none'}.",
        )


def waited(stream: Iterable[Item]) -> Iterator[Item]:
    """Yield what a stream yields, and mark in a trace how long each item is waited for."""
    items = iter(stream)
    while True:
        with jax.profiler.TraceAnnotation(WAIT):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


@contextlib.contextmanager
def tracing(folder: RunFolder, log: Log, first: int = 0) -> Iterator[Callable[[int], None]]:
    """Trace some turns of work where --profile asks for it, and say where their time went.

    Args:
        folder: Of the run; its options say how many turns.
        log: Of the run.
        first: Turns before the trace begins, so that compilation and warming up are not in it.

    Yields:
        A function to call with the number of turns done: before the first and after each.
    """
    turns, place = folder.options.profile, folder.path / "profile"
    state = "waiting"

    def stop() -> None:
        nonlocal state
        state = "done"
        jax.profiler.stop_trace()
        if jax.process_index() == 0:
            tell_profile(place, log)

    def update(done: int) -> None:
        nonlocal state
        if turns and state == "waiting" and done >= first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # its events would crowd out those of the device
            jax.profiler.start_trace(place, profiler_options=options)
            state = "tracing"
        elif state == "tracing" and done >= first + turns:
            stop()

    try:
        yield update
    finally:
        if state == "tracing":
            stop()
        elif turns and state == "waiting":
            log.say(f"Nothing was traced: the work ended before {first} turns, after which --profile begins.")


def tell_profile(place: Path, log: Log) -> None:
    """Read the newest trace in RUN/profile, say what it holds, and write profile.json."""
    try:
        profile = read_trace(place)
    except InputError as error:  # no reason to end a run
        log.say(f"Note: {error}")
        return
    if profile is None:
        log.say(f"Note: the trace in {place} holds no operation of a device.")
        return
    write_json(place / SUMMARY, dataclasses.asdict(profile))
    for line in profile.words():
        log.say(line)


def read_trace(place: Path) -> Profile | None:
    """Read the newest trace that jax wrote into a folder; None where it holds no operation.

    Raises:
        InputError: There is no trace, or it is damaged.
    """
    found = sorted(place.glob("plugins/profile/*/*.trace.json.gz"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise InputError(place, "a trace of jax's profiler", "none", "run with --profile STEPS")
    try:
        with gzip.open(found[-1], "rb") as file:
            events = json.load(file)["traceEvents"]
    except DAMAGED as error:
        raise InputError(found[-1], "a trace", f"a damaged one ({error})", "run with --profile again") from error
    return summarise(events)


def summarise(events: Sequence[Mapping[str, Any]]) -> Profile | None:
    """Sum up the events of a trace in Chrome's format; None where there is no operation.

    Args:
        events: "X" events with pid, tid, ts and dur in microseconds; "M" events that name processes and threads.
    """
    processes, threads = _names(events)
    waits, lines = [], dict[tuple[Any, ...], list[tuple[float, float, str]]]()
    for event in events:
        if event.get("ph") != "X":
            continue
        start, end = float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0.0))
        if event["name"] == WAIT:
            waits.append((start, end))
        elif name := _operation(event, processes, threads):
            device = (event["pid"], event.get("args", {}).get("device_ordinal", ""))
            lines.setdefault((*device, event.get("tid")), []).append((start, end, name))
    if not lines:
        return None
    every = [one for line in lines.values() for one in line]
    first, last = min(one[0] for one in every), max(one[1] for one in every)
    length = max(last - first, 1e-9)
    devices = sorted({line[:2] for line in lines}, key=str)
    by_device: dict[Any, dict[str, list[tuple[float, float]]]] = {device: {} for device in devices}
    own: dict[str, list[float]] = {}
    for line, operations in lines.items():
        for (start, end, name), seconds in zip(*_own_times(operations), strict=True):
            own.setdefault(name, []).append(seconds)
            if (kind := kind_of(name)) != "other":
                by_device[line[0], line[1]].setdefault(kind, []).append((start, end))
    inside = [(max(start, first), min(end, last)) for start, end in waits if end > first and start < last]
    shares = dict.fromkeys(KINDS, 0.0)
    for kinds in by_device.values():
        covered, before = list[tuple[float, float]](), 0.0
        for kind in KINDS[:-1]:
            covered += inside if kind == "input wait" else kinds.get(kind, [])
            now = _covered(covered)
            shares[kind] += (now - before) / length / len(devices)
            before = now
        shares["other"] += (length - before) / length / len(devices)
    total = max(sum(sum(times) for times in own.values()), 1e-9)
    longest = sorted(own.items(), key=lambda item: -sum(item[1]))[:SHOWN]
    found = tuple(
        Operation(name, kind_of(name), sum(times) / 1e6, sum(times) / total, len(times)) for name, times in longest
    )
    return Profile(length / 1e6, len(devices), shares, found)


def kind_of(name: str) -> str:
    """Return which of `KINDS` an operation is, by the name that XLA gives it."""
    if COLLECTIVE.search(name):
        return "collectives"
    words = [word for word in re.split(r"[^a-z0-9]+|(?<=\D)\d+$", name.lower()) if word and not word.isdigit()]
    telling = [word for word in words if word not in SILENT]
    if telling and all(word in MOVES for word in telling):
        return "memory"
    return "other" if telling and telling[0] in CONTROL else "compute"


def _names(events: Iterable[Mapping[str, Any]]) -> tuple[dict[Any, str], dict[Any, str]]:
    processes, threads = dict[Any, str](), dict[Any, str]()
    for event in events:
        if event.get("ph") == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "M" and event["name"] == "thread_name":
            threads[event["pid"], event.get("tid")] = event["args"]["name"]
    return processes, threads


def _operation(event: Mapping[str, Any], processes: Mapping[Any, str], threads: Mapping[Any, str]) -> str:
    """Return the name of a device's operation; empty for any other event."""
    given = event.get("args", {})
    if processes.get(event["pid"], "").startswith("/device:"):
        line = threads.get((event["pid"], event.get("tid")), "")
        return str(given.get("hlo_op") or event["name"]) if line.startswith(LINES) else ""
    return str(given.get("hlo_op", ""))  # of the CPU, whose threads hold other events too


def _own_times(
    operations: Sequence[tuple[float, float, str]],
) -> tuple[list[tuple[float, float, str]], list[float]]:
    """Return the operations of one line in order, and the microseconds that each took besides those inside it."""
    # Of those that begin together the longer is outside.
    ordered = sorted(operations, key=lambda one: (one[0], -one[1]))
    times = [end - start for start, end, _ in ordered]
    around: list[int] = []
    for number, (start, end, _) in enumerate(ordered):
        while around and ordered[around[-1]][1] <= start:
            around.pop()
        if around:
            times[around[-1]] -= min(end, ordered[around[-1]][1]) - start
        around.append(number)
    return ordered, [max(time, 0.0) for time in times]


def _covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Return the length of a union of intervals."""
    if not intervals:
        return 0.0
    ordered: Float64[np.ndarray, "interval 2"] = np.array(sorted(intervals), np.float64)
    starts, ends = ordered[:, 0], np.maximum.accumulate(ordered[:, 1])
    reached = np.concatenate([starts[:1], ends[:-1]])
    return float(np.sum(np.maximum(ends - np.maximum(starts, reached), 0.0)))
