"""What every benchmark shares: pinned cores, fair timing, a measured peak, one row per result.

A benchmark script reads its command line, pins itself, builds the callables, and lets them
alternate:

    config = parse_config(__doc__)
    conditions = prepare(config)
    peak = measure_peak()
    seconds = alternate({"jaxmed": ours, "AMICO": theirs}, config.repeats)
    emit(make_rows("noddi_fit", workload, measurements, conditions, peak), config.json)

jax is imported inside functions, so that this file costs nothing to a process that only pins.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

LOAD_LIMIT = 1.5
TURN_S = 0.1
LONG_S = 2.0
MOST_CALLS = 100

# Each library counts its threads once, when it is imported, from its own variable. NPROC is XLA's.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NPROC",
)


# --- Command line and conditions -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """The command line of every benchmark script.

    Attributes:
        size: Workload: seconds, minutes on CPU, one GPU, or the GPU workload on every device.
        peer: Also run the peers, alternating with jaxmed.
        json: File that gets the rows as JSON lines, beside standard output.
        repeats: Timed calls of each implementation, after one warm-up call.
        cores: CPU cores to pin to; all that this process may use when absent.
    """

    size: Literal["smoke", "cpu", "gpu", "pod"] = "smoke"
    peer: bool = False
    json: Path | None = None
    repeats: int = 5
    cores: int | None = None

    def __post_init__(self):
        """Refuse counts below one."""
        if self.repeats < 1:
            raise ValueError(f"repeats: expected 1 or more, got {self.repeats}")
        if self.cores is not None and self.cores < 1:
            raise ValueError(f"cores: expected 1 or more, got {self.cores}")


def parse_config(description: str | None, args: Sequence[str] | None = None) -> BenchmarkConfig:
    """Read a benchmark's command line.

    Args:
        description: The script's docstring, shown by `--help`.
        args: Arguments; those of the process when absent.

    Returns:
        The configuration.
    """
    return tyro.cli(BenchmarkConfig, description=description, args=args)


class Conditions(NamedTuple):
    """What a figure depends on besides the code.

    Attributes:
        cores: Pinned CPU cores.
        load: One-minute load average before the benchmark's own work.
    """

    cores: tuple[int, ...]
    load: float


def prepare(config: BenchmarkConfig) -> Conditions:
    """Pin the process and restart it once where its libraries were counted with other threads.

    Call it first in `main`. BLAS, OpenMP and numba fix their thread count at import, so a script
    with ordinary imports at its top has to start again with the variables set; affinity and
    environment survive the restart, and the second pass finds nothing to change.

    Args:
        config: The benchmark's command line.

    Returns:
        The pinned cores and the load before work.
    """
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    cores = pin(config.cores)
    if before != {name: os.environ.get(name) for name in THREAD_VARIABLES}:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    load = os.getloadavg()[0]
    if load > LOAD_LIMIT:
        print(
            f"note: load {load:.2f} is above {LOAD_LIMIT} before this benchmark began; "
            "its figures are not to be relied on",
            file=sys.stderr,
        )
    return Conditions(cores=cores, load=load)


def pin(cores: int | None = None) -> tuple[int, ...]:
    """Bind this process to its first `cores` cores and ask every library for as many threads.

    Args:
        cores: How many; all that the process may use when absent.

    Returns:
        The cores' numbers.

    Raises:
        ValueError: If there are fewer.
    """
    available = sorted(os.sched_getaffinity(0))
    if cores is not None and cores > len(available):
        raise ValueError(f"cores: expected at most {len(available)} here, got {cores}")
    chosen = tuple(available[:cores])
    os.sched_setaffinity(0, chosen)
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(len(chosen))))
    return chosen


# --- Timing ----------------------------------------------------------------------------------


def alternate(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    turn_s: float = TURN_S,
) -> dict[str, tuple[float, ...]]:
    """Time implementations in turn, after one warm-up call of each.

    Turns spread slow drifts (temperature, neighbours, frequency) over all of them alike. A call shorter than a turn is
    repeated within it, after one that is not timed: a library's threads go on spinning for some milliseconds when their
    work is done, and wake slowly when they have slept, which is neither's own time.

    Args:
        functions: Name to call. A peer that returns before its device is done must wait itself.
        repeats: Turns of each.
        clock: Seconds, monotonic.
        turn_s: Least seconds of a turn.

    Returns:
        Name to seconds of a call in each turn, in the order they ran.
    """
    calls: dict[str, int] = {}
    for name, function in functions.items():
        start = clock()
        _finish(function())
        first = clock() - start
        if first < LONG_S:  # else one call is a turn, whatever of it was warming up
            start = clock()
            _finish(function())
            first = clock() - start
        calls[name] = max(1, min(MOST_CALLS, math.ceil(turn_s / max(first, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if calls[name] > 1:
                _finish(function())
            start = clock()
            for _ in range(calls[name]):
                _finish(function())
            seconds[name].append((clock() - start) / calls[name])
    return {name: tuple(values) for name, values in seconds.items()}


def _finish(result: Any) -> None:
    """Wait for jax arrays in a result; other leaves are left alone."""
    if "jax" in sys.modules:
        sys.modules["jax"].block_until_ready(result)


class Compiled(NamedTuple):
    """A function compiled ahead of time.

    Attributes:
        call: Runs it; takes the arguments it was compiled for.
        seconds: Lowering and compilation.
        flops: XLA's count. The body of a loop is counted once, whatever its trip count.
        bytes: XLA's count of bytes read and written, with the same limit.
    """

    call: Callable[..., Any]
    seconds: float
    flops: float | None
    bytes: float | None


def compile_apart(function: Callable[..., Any], *args: Any) -> Compiled:
    """Compile a traceable function and time that alone.

    Args:
        function: To be jitted.
        *args: Arrays, or their shapes (`jax.ShapeDtypeStruct`).

    Returns:
        The compiled function with its costs.
    """
    import jax

    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    cost = compiled.cost_analysis() or {}
    return Compiled(compiled, seconds, cost.get("flops"), cost.get("bytes accessed"))


def first_call(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time a first call, for functions that compile inside: less the median, it is `compile_s`.

    Args:
        function: Called once.
        clock: Seconds, monotonic.

    Returns:
        Seconds.
    """
    start = clock()
    _finish(function())
    return clock() - start


# --- Peak ------------------------------------------------------------------------------------


class Peak(NamedTuple):
    """What this device reaches on the two plainest kernels.

    Attributes:
        matmul_flops: FLOP/s of a square float32 matmul at jax's default precision for the device
            (plain float32 on CPU, TF32 on recent NVIDIA, bfloat16 passes on TPU).
        copy_bytes_per_s: Bytes read plus bytes written per second, adding one to a large array.
    """

    matmul_flops: float
    copy_bytes_per_s: float


def measure_peak(repeats: int = 5) -> Peak:
    """Measure the default device's peak with jitted jax, best of `repeats`.

    Args:
        repeats: Timed calls of each kernel.

    Returns:
        The peak.
    """
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"
    edge = 2048 if on_cpu else 8192
    # Far larger than any cache: 256 MB on CPU, 1 GB elsewhere.
    count = 2**26 if on_cpu else 2**28

    matrix = jnp.full((edge, edge), 1e-3, jnp.float32)
    multiply = jax.jit(jnp.matmul)
    matmul_seconds = alternate({"matmul": lambda: multiply(matrix, matrix)}, repeats)["matmul"]

    # In place: a fresh output would time the operating system's page faults.
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)
    buffer = [jnp.zeros(count, jnp.float32)]

    def copy():
        buffer[0] = increment(buffer[0])
        return buffer[0]

    copy_seconds = alternate({"copy": copy}, repeats)["copy"]
    return Peak(2 * edge**3 / min(matmul_seconds), 2 * 4 * count / min(copy_seconds))


# --- Rows ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One implementation's result on a workload.

    Attributes:
        seconds: Timed calls.
        compile_s: Seconds spent once before them: compilation, or the peer's own preparation.
        flops: Floating-point operations per call; absent where nobody counted.
        bytes: Bytes read and written per call.
        accuracy: Error or score by name, so that a faster, worse answer shows.
        versions: Package to version, besides jaxmed, jax and python.
        device: Where it ran; jax's default device when absent.
    """

    seconds: tuple[float, ...]
    compile_s: float | None = None
    flops: float | None = None
    bytes: float | None = None
    accuracy: Mapping[str, float] | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    device: str | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a benchmark's output; the fields are the keys.

    Attributes:
        name: Row name, the same from run to run.
        workload: The input in words.
        implementation: `jaxmed` or the peer's name.
        unit: Of median, min and max.
        median: Of `n` calls.
        min: Of `n` calls.
        max: Of `n` calls.
        n: Timed calls.
        compile_s: Seconds spent once before them.
        flops: Per call.
        bytes: Per call.
        fraction_of_peak: See `fraction_of_peak`.
        ratio_to_peer: Peer's median over jaxmed's: above 1 means that jaxmed is faster. Null on
            a peer's row, and where no peer ran.
        accuracy: Error or score by name.
        device: Where it ran.
        load: One-minute load average before the benchmark; above 1.5 the figures are suspect.
        versions: Package to version.
    """

    name: str
    workload: str
    implementation: str
    unit: str
    median: float
    min: float
    max: float
    n: int
    compile_s: float | None
    flops: float | None
    bytes: float | None
    fraction_of_peak: float | None
    ratio_to_peer: float | None
    accuracy: Mapping[str, float] | None
    device: str
    load: float
    versions: Mapping[str, str]

    def to_json(self) -> str:
        """Write strict JSON on one line.

        Raises:
            ValueError: If a number is not finite.
        """
        try:
            return json.dumps(dataclasses.asdict(self), allow_nan=False)
        except ValueError as error:
            raise ValueError(f"{self.name}, {self.implementation}: expected finite figures, got {self}") from error


def make_rows(
    name: str,
    workload: str,
    measurements: Mapping[str, Measurement],
    conditions: Conditions,
    peak: Peak,
) -> list[Row]:
    """Turn measurements into rows: one jaxmed row per peer, then that peer's row.

    Args:
        name: Row name.
        workload: The input in words.
        measurements: Implementation to result; `jaxmed` must be among them.
        conditions: From `prepare`.
        peak: From `measure_peak`, in this run.

    Returns:
        The rows; a single one where no peer ran.
    """
    ours = measurements["jaxmed"]
    peers = {name: peer for name, peer in measurements.items() if name != "jaxmed"}
    our_versions = {"python": platform.python_version(), **versions("jaxmed", "jax")}

    def row(implementation: str, result: Measurement, ratio: float | None, found: dict) -> Row:
        median = statistics.median(result.seconds)
        # A peer on another device cannot be set against this device's peak.
        is_here = result.device is None
        return Row(
            name=name,
            workload=workload,
            implementation=implementation,
            unit="s",
            median=median,
            min=min(result.seconds),
            max=max(result.seconds),
            n=len(result.seconds),
            compile_s=result.compile_s,
            flops=result.flops,
            bytes=result.bytes,
            fraction_of_peak=fraction_of_peak(median, result, peak) if is_here else None,
            ratio_to_peer=ratio,
            accuracy=result.accuracy,
            device=result.device or describe_device(conditions.cores),
            load=conditions.load,
            versions=found,
        )

    if not peers:
        return [row("jaxmed", ours, None, {**our_versions, **ours.versions})]
    rows = []
    for peer_name, peer in peers.items():
        found = {**our_versions, **ours.versions, **peer.versions}
        ratio = statistics.median(peer.seconds) / statistics.median(ours.seconds)
        rows += [row("jaxmed", ours, ratio, found), row(peer_name, peer, None, found)]
    return rows


def fraction_of_peak(seconds: float, result: Measurement, peak: Peak) -> float | None:
    """Tell how near a result is to the nearer of the device's two limits.

    Args:
        seconds: Median time of a call.
        result: Its operations and bytes.
        peak: Measured in the same run.

    Returns:
        The larger of arithmetic rate over matmul rate and memory rate over copy rate; None where
        neither operations nor bytes were counted.
    """
    parts = []
    if result.flops is not None:
        parts.append(result.flops / seconds / peak.matmul_flops)
    if result.bytes is not None:
        parts.append(result.bytes / seconds / peak.copy_bytes_per_s)
    return max(parts, default=None)


def versions(*packages: str) -> dict[str, str]:
    """Look up installed versions.

    Args:
        *packages: Distribution names.

    Returns:
        Name to version, `not installed` where a package only runs from its source folder.
    """
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe_device(cores: Sequence[int]) -> str:
    """Name jax's default device.

    Args:
        cores: Pinned cores, told where the device is the CPU.

    Returns:
        CPU model and number of cores, or number and kind of the accelerators.
    """
    import jax

    if jax.default_backend() == "cpu":
        return describe_cpu(cores)
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def describe_cpu(cores: Sequence[int]) -> str:
    """Name the processor and the number of pinned cores."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {len(cores)} cores"


def emit(rows: Sequence[Row], path: Path | None = None) -> None:
    """Print one JSON line per row, and write the same lines to a file.

    Args:
        rows: Checked for finite numbers before anything is printed.
        path: Written under a temporary name, then renamed; nothing is written when absent.
    """
    text = "".join(row.to_json() + "\n" for row in rows)
    print(text, end="", flush=True)
    if path is not None:
        write_atomically(path, text)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        # mkstemp makes files that only the owner reads.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
