"""What saving costs a run: rows `checkpoint_save` and `checkpoint_overlap`.

`checkpoint_save`: seconds for which saving a state holds up the loop; the accuracy column holds its share of a save
interval of 30 s, the size of the state, and the seconds until it is on disk.
`checkpoint_overlap`: mean seconds a step of `fit` that saves such a state at intervals, written behind while training
goes on, against the same run without saves (implementation `no saves`). The accuracy column holds the seconds by which
the step of a save is longer than the others, their share of the interval between two saves (5 % is allowed), and how
much longer the other steps of the interval are than those of a run without saves.
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_engine import batches, make_step
from timing import Measurement, emit, make_rows, measure_peak, parse_config, prepare

from jaxmed.train.checkpoint import Checkpoints
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig, fit
from jaxmed.train.mesh import MeshConfig, make_mesh
from jaxmed.train.run_folder import RunOptions, open_run, start

# Entries of the state that is saved, float32; steps between two saves, of about 20 ms each.
SIZES = {"smoke": (2**20, 10), "cpu": (2**26, 300), "gpu": (2**30, 500), "pod": (2**30, 500)}
SAVES = 2  # inside a timed run, before the last


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    entries, save_every = SIZES[config.size]
    peak = measure_peak()
    mesh = make_mesh(MeshConfig(data=1))
    blocked, written = save_states(entries, config.repeats, mesh)
    share = {
        "share_of_30_s": float(np.median(blocked)) / 30,
        "megabytes": 4 * entries / 1e6,
        "on_disk_s": float(np.median(written)),
    }
    measured = {"jaxmed": Measurement(tuple(blocked), accuracy=share)}
    rows = make_rows("checkpoint_save", f"{4 * entries / 1e6:,.0f} MB in 16 arrays", measured, conditions, peak)

    step, state, flops = make_step(peak.matmul_flops, mesh)
    # Donated, as a training step on an accelerator does; else every step would copy what it carries.
    with_arrays = jax.jit(lambda state, batch: carry(step, state, batch), donate_argnums=0)
    runs: dict[str, list[np.ndarray]] = {"jaxmed": [], "no saves": []}
    for repeat in range(config.repeats + 1):
        for name in runs if repeat % 2 else reversed(runs):
            first = {"work": jax.tree.map(jnp.copy, state), "carried": make_arrays(entries, mesh)}
            seconds = run_fit(with_arrays, first, save_every, name == "jaxmed", mesh)
            if repeat:  # the first turn warms up
                runs[name].append(seconds)
    measured = {
        name: Measurement(tuple(float(run.mean()) for run in found), flops=flops) for name, found in runs.items()
    }
    measured["jaxmed"] = dataclasses.replace(measured["jaxmed"], accuracy=overlap(runs, save_every))
    workload = f"{4 * entries / 1e6:,.0f} MB every {save_every} steps of {flops / 1e9:.2f} GFLOP"
    rows += make_rows("checkpoint_overlap", workload, measured, conditions, peak)
    emit(rows, config.json)


def make_arrays(entries: int, mesh: Any) -> dict[str, jax.Array]:
    """Return 16 arrays, of so many entries in all."""
    place = jax.NamedSharding(mesh, jax.P())
    arrays = {f"array_{i}": jax.device_put(jnp.full(entries // 16, float(i)), place) for i in range(16)}
    return jax.block_until_ready(arrays)


def save_states(entries: int, repeats: int, mesh: Any) -> tuple[list[float], list[float]]:
    """Return, per save, the seconds that the caller waits and the seconds until the state is on disk."""
    state = make_arrays(entries, mesh)
    blocked, written = [], []
    with tempfile.TemporaryDirectory() as name, Checkpoints(Path(name) / "state", keep=1) as checkpoints:
        for number in range(repeats + 1):
            began = time.perf_counter()
            checkpoints.save(number, state)
            returned = time.perf_counter() - began
            checkpoints.wait()
            if number:
                blocked.append(returned)
                written.append(time.perf_counter() - began)
    return blocked, written


def carry(step: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """Take a step of a state that carries further arrays."""
    work, metrics = step(state["work"], batch)
    return {"work": work, "carried": state["carried"]}, metrics


def run_fit(step: Any, state: Any, save_every: int, saves: bool, mesh: Any) -> np.ndarray:
    """Return the seconds of each step of `fit`, from the second on; the one at index `save_every - 2` saves."""
    times: list[float] = []
    steps = (SAVES + 1) * save_every
    with tempfile.TemporaryDirectory() as name:
        folder = open_run("benchmark", "checkpoint", None, RunOptions(Path(name) / "run", quiet=True))
        start(folder)
        log = Log(folder.path, quiet=True)
        loop = LoopConfig(steps=steps, log_every=10, save_every=save_every if saves else 0, keep=1)
        fit(loop, state, step, lambda first: batches(times), mesh=mesh, folder=folder, log=log)
    # The first two batches are asked for around the compilation of the step, the last before the save at the end.
    return np.diff(times[2:])


def overlap(runs: dict[str, list[np.ndarray]], save_every: int) -> dict[str, float]:
    """Tell how long a save holds up the loop, and how much slower the steps beside its writing are."""
    # A batch is asked for during the step before it, and the save of that step follows.
    saving = [number * save_every - 2 for number in range(1, SAVES + 1)]
    others = [np.delete(run, saving) for run in runs["jaxmed"]]
    usual = float(np.median(np.concatenate(others)))
    blocked = max(float(np.median([run[saving] for run in runs["jaxmed"]])) - usual, 0.0)
    alone = float(np.mean([run.mean() for run in runs["no saves"]]))
    return {
        "blocked_s": blocked,
        "share_of_interval": blocked / (save_every * usual),
        "slower_beside_writing": float(np.mean([run.mean() for run in others])) / alone - 1,
    }


if __name__ == "__main__":
    main()
