"""Train the toy in a process of its own, as the tests of killed and of several processes need it."""

import dataclasses
import os
import sys
import time
from pathlib import Path

if "TOY_DEVICES" in os.environ:
    count = f"--xla_force_host_platform_device_count={os.environ['TOY_DEVICES']}"
    # The flags of the tests, which spare compilation, with another number of devices: of two, the last counts.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"

import jax
import numpy as np
import toy
import tyro

from jaxmed.arrays.trees import named_leaves
from jaxmed.errors import InputError
from jaxmed.train.checkpoint import Checkpoints
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig, fit
from jaxmed.train.mesh import MeshConfig, make_mesh, process_slice
from jaxmed.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from jaxmed.train.run_folder import RunOptions, open_run, start
from jaxmed.train.state import create_state
from jaxmed.train.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    steps: int = 30
    save_every: int = 4
    pause: float = 0.0
    width: int = toy.WIDTH
    stop_at: int = -1
    mesh: MeshConfig = MeshConfig()


def main(config: Config) -> None:
    mesh = make_mesh(config.mesh)
    is_writer = jax.process_index() == 0
    run = open_run("toy", "train", config.steps, RunOptions(config.out))
    if is_writer:
        start(run)
    settings = OptimizerConfig(peak_lr=3e-3, warmup_steps=5, clip_norm=1.0)
    optimizer, schedule = make_optimizer(settings, config.steps), learning_rate(settings, config.steps)
    state = create_state(
        jax.random.key(1), lambda key: toy.init(key, config.width), optimizer, mesh, rules=toy.RULES, ema=True
    )
    step = make_train_step(toy.loss, optimizer, state=state, ema_decay=0.9, schedule=schedule)

    def stream(first: int):
        for number, batch in enumerate(toy.batches(process_slice(mesh))(first), first):
            time.sleep(config.pause)
            if number == config.stop_at:
                return
            yield batch

    log = Log(config.out, is_writer=is_writer)
    loop = LoopConfig(steps=config.steps, save_every=config.save_every, log_every=1)
    try:
        state = fit(loop, state, step, stream, mesh=mesh, folder=run, log=log)
    except InputError as error:
        if config.stop_at < 0 or "no more records" not in str(error):
            raise
        return
    with Checkpoints(run.checkpoints / "state") as checkpoints:
        print("saved", *checkpoints.steps(), flush=True)
    everywhere = jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(mesh, jax.P()))
    leaves = named_leaves(everywhere({"params": state.params, "ema": state.ema_params, "opt": state.opt_state}))
    if is_writer:
        np.savez(config.out / "final.npz", **{name.replace("/", "."): np.asarray(x) for name, x in leaves.items()})


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(130)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
