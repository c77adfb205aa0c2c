"""What several processes cost: row `scaling`.

The same training by two processes of four CPU devices each and by one process of eight (implementation `1 process`), on
the same cores: a linear autoencoder whose gradients are summed over all devices, over TCP (gloo) between the processes.
Seconds a step are told by the moments at which process 0 asks for batches. The accuracy column holds the overhead and
the largest relative difference of the two loss curves; where that is not rounding, the benchmark fails. Nothing here
tells how several machines scale: that is their network's.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from timing import Measurement, emit, make_rows, measure_peak, parse_config, prepare

DEVICES = 8
BATCH = 64
# Voxels and width of the autoencoder, and steps of a run.
SIZES = {"smoke": (512, 32, 12), "cpu": (8192, 512, 60), "gpu": (8192, 512, 60), "pod": (32768, 1024, 60)}
WARM_UP = 3  # steps that are not timed
MOST_DIFFERENCE = 1e-4
LIMIT_S = 900


def main() -> None:
    """Measure and print the row."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    peak = measure_peak()
    size = SIZES[config.size]
    voxels, width, steps = size
    seconds: dict[str, list[float]] = {"jaxmed": [], "1 process": []}
    curves: dict[str, np.ndarray] = {}
    for repeat in range(config.repeats):
        for name in seconds if repeat % 2 else reversed(seconds):
            times, losses = run(2 if name == "jaxmed" else 1, size)
            seconds[name].append(float(np.median(np.diff(times[WARM_UP:]))))
            curves[name] = losses
    difference = float(np.max(np.abs(curves["jaxmed"] / curves["1 process"] - 1)))
    if difference > MOST_DIFFERENCE:
        raise SystemExit(f"scaling: expected equal loss curves, found a relative difference of {difference:.2g}")
    flops = 12.0 * BATCH * voxels * width  # two products forward, four backward
    overhead = float(np.median(seconds["jaxmed"]) / np.median(seconds["1 process"]) - 1)
    accuracy = {"jaxmed": {"overhead": overhead, "curve_difference": difference}}
    measured = {name: Measurement(tuple(seconds[name]), flops=flops, accuracy=accuracy.get(name)) for name in seconds}
    workload = f"2 processes x 4 devices against 1 x 8: {2 * voxels * width / 1e6:.2f} M parameters, batch {BATCH}"
    emit(make_rows("scaling", workload, measured, conditions, peak), config.json)


def run(processes: int, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Train once.

    Args:
        processes: That share the devices.
        size: Voxels, width and steps.

    Returns:
        When process 0 asked for each batch, in seconds, and the loss of each step.
    """
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{place.getsockname()[1]}"
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "16",  # gloo hangs on few cores with jax's default pool
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        tasks = [
            {"out": folder, "size": size, "coordinator": coordinator, "processes": processes, "process": process}
            for process in range(processes)
        ]
        words = [sys.executable, __file__, "--worker"]
        started = [subprocess.Popen([*words, json.dumps(task)], env=environment) for task in tasks]
        try:
            codes = [process.wait(LIMIT_S) for process in started]
        finally:
            for process in started:
                process.kill()  # SIGTERM would be caught by jax
        if any(codes):
            raise SystemExit(f"scaling: expected the workers to end well, found exit codes {codes}")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        return np.load(Path(folder) / "times.npy"), np.array([line["loss"] for line in lines])


def work(task: dict[str, Any]) -> None:
    """Be one of the processes."""
    import jax
    import jax.numpy as jnp

    from jaxmed.train.log import Log
    from jaxmed.train.loop import LoopConfig, fit
    from jaxmed.train.mesh import MeshConfig, make_mesh, process_slice
    from jaxmed.train.optimizer import OptimizerConfig, make_optimizer
    from jaxmed.train.processes import wait_for_all
    from jaxmed.train.run_folder import RunOptions, open_run, start
    from jaxmed.train.state import create_state
    from jaxmed.train.step import make_train_step

    voxels, width, steps = task["size"]
    place = (task["coordinator"], task["processes"], task["process"]) if task["processes"] > 1 else (None, None, None)
    mesh = make_mesh(MeshConfig(0, 1, task["processes"] > 1, *place))
    is_first = jax.process_index() == 0
    folder = open_run("benchmark", "scaling", None, RunOptions(Path(task["out"]) / "run", quiet=True))
    if is_first:
        start(folder)
    wait_for_all("folder")

    def init(key: Any) -> dict[str, jax.Array]:
        encoder, decoder = jax.random.split(key)
        return {
            "encoder": jax.random.normal(encoder, (voxels, width)) * voxels**-0.5,
            "decoder": jax.random.normal(decoder, (width, voxels)) * width**-0.5,
        }

    def loss(params: Any, keys: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jnp.mean(jnp.square(batch["image"] @ params["encoder"] @ params["decoder"] - batch["image"])), {}

    optimizer = make_optimizer(OptimizerConfig(peak_lr=1e-3, warmup_steps=5), steps)
    state = create_state(jax.random.key(0), init, optimizer, mesh)
    step = make_train_step(loss, optimizer, state=state)
    times: list[float] = []
    stream = timed(batches(voxels, *process_slice(mesh)), times)
    loop = LoopConfig(steps=steps, log_every=1, save_every=0)
    log = Log(folder.path, quiet=True, is_writer=is_first)
    fit(loop, state, step, stream, mesh=mesh, folder=folder, log=log)
    if is_first:
        np.save(Path(task["out"]) / "times.npy", times)


def batches(voxels: int, index: int, count: int) -> Callable[[int], Iterator[dict[str, np.ndarray]]]:
    """Return a process's share of a stream that is a function of the step alone."""

    def stream(first: int) -> Iterator[dict[str, np.ndarray]]:
        step, share = first, BATCH // count
        while True:
            images = np.random.default_rng([0, step]).standard_normal((BATCH, voxels), np.float32)
            yield {"image": images[index * share : (index + 1) * share]}
            step += 1

    return stream


def timed(stream: Callable[[int], Iterator[Any]], times: list[float]) -> Callable[[int], Iterator[Any]]:
    """Note when each batch is asked for."""

    def noting(first: int) -> Iterator[Any]:
        for batch in stream(first):
            times.append(time.perf_counter())
            yield batch

    return noting


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]))
    else:
        main()
