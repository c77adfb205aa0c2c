"""What the training loop costs: row `engine_fit`.

Seconds a step of `fit`, with metrics checked at every step and written at every tenth, against the same compiled step
called in a bare loop (implementation `bare step`). The step multiplies matrices for about 20 ms. Seconds are told by
the moments at which batches are asked for, so neither compilation nor the last save counts.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Measurement, emit, make_rows, measure_peak, parse_config, prepare

from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig, fit
from jaxmed.train.mesh import MeshConfig, make_mesh, shard_batch
from jaxmed.train.run_folder import RunOptions, open_run, start

# Steps of a timed run.
SIZES = {"smoke": 20, "cpu": 150, "gpu": 300, "pod": 300}
STEP_S = 0.02


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    steps = SIZES[config.size]
    peak = measure_peak()
    mesh = make_mesh(MeshConfig(data=1))
    step, state, flops = make_step(peak.matmul_flops, mesh)
    loops: dict[str, list[float]] = {"jaxmed": [], "bare step": []}
    for repeat in range(config.repeats + 1):
        for name in loops if repeat % 2 else reversed(loops):
            seconds = run_fit(step, state, steps, mesh) if name == "jaxmed" else run_bare(step, state, steps, mesh)
            if repeat:  # the first turn warms up
                loops[name].append(seconds)
    rows = make_rows(
        "engine_fit",
        f"{steps} steps of {flops / 1e9:.2f} GFLOP",
        {name: Measurement(tuple(seconds), flops=flops) for name, seconds in loops.items()},
        conditions,
        peak,
    )
    emit(rows, config.json)


def make_step(rate: float, mesh: Any) -> tuple[Any, dict[str, jax.Array], float]:
    """Return a compiled step of about STEP_S, its first state, and its operations."""
    edge = 1024
    count = max(round(STEP_S * rate / (2 * edge**3)), 1)

    def step(state: dict[str, jax.Array], batch: dict[str, jax.Array]) -> tuple[Any, Any]:
        weight = state["weight"]
        for _ in range(count):
            weight = 1e-3 * (weight @ state["weight"]) + batch["value"].mean()
        metrics = {"loss": weight.mean(), "grad_norm": weight.max(), "learning_rate": weight.min()}
        return {"step": state["step"] + 1, "weight": state["weight"] + 1e-9 * weight}, metrics

    place = jax.NamedSharding(mesh, jax.P())
    state = jax.device_put({"step": jnp.int32(0), "weight": jnp.full((edge, edge), 1e-3)}, place)
    return jax.jit(step), state, 2.0 * edge**3 * count


def batches(times: list[float]) -> Iterator[dict[str, np.ndarray]]:
    """Yield the same small batch, noting when."""
    while True:
        times.append(time.perf_counter())
        yield {"value": np.zeros(8, np.float32)}


def run_fit(step: Any, state: Any, steps: int, mesh: Any) -> float:
    """Return the mean seconds of a step of `fit`."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = open_run("benchmark", "engine", None, RunOptions(Path(name) / "run", quiet=True))
        start(folder)
        log = Log(folder.path, quiet=True)
        loop = LoopConfig(steps=steps, log_every=10, save_every=0)
        fit(loop, state, step, lambda first: batches(times), mesh=mesh, folder=folder, log=log)
    return (times[-1] - times[2]) / (len(times) - 3)


def run_bare(step: Any, state: Any, steps: int, mesh: Any) -> float:
    """Return the mean seconds of a step in the barest loop that still waits for the device."""
    times: list[float] = []
    for _, batch in zip(range(steps), batches(times), strict=False):
        state, metrics = step(state, shard_batch(batch, mesh))
        jax.block_until_ready(metrics)
    return (times[-1] - times[2]) / (len(times) - 3)


if __name__ == "__main__":
    main()
