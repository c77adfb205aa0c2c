"""Train the toy in a process of its own, as the tests of killed and of several processes need it."""

import dataclasses
import json
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
from jaxmed.cli import tell_error
from jaxmed.errors import InputError
from jaxmed.train import processes
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
    fail_at: int = -1  # the step whose batch the last process cannot read
    records: bool = False  # read by the loader, and write down which process read what
    heartbeat: int = processes.HEARTBEAT_SECONDS
    mesh: MeshConfig = MeshConfig()


def loaded(config: Config, share: tuple[int, int]):
    """Return the stream of the loader over 48 images; each process notes its records of every step."""
    from jaxmed.data.loader import LoaderConfig, make_loader
    from jaxmed.data.records import ArraySource

    images = np.concatenate([batch["image"] for _, batch in zip(range(3), toy.batches()(0), strict=False)])
    loader = make_loader(
        ArraySource({"image": images}), lambda fields, generator: fields, LoaderConfig(batch_size=toy.BATCH), *share
    )

    def stream(first: int):
        for step, batch in enumerate(loader(first), first):
            with (config.out / f"records-{jax.process_index()}.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "records": batch["record"].tolist()}) + "\n")
            yield batch

    return stream


def main(config: Config) -> None:
    processes.HEARTBEAT_SECONDS = config.heartbeat
    mesh = make_mesh(config.mesh)
    is_writer = jax.process_index() == 0
    run = open_run("toy", "train", config.steps, RunOptions(config.out))
    if is_writer:
        start(run)
    processes.wait_for_all("folder")
    settings = OptimizerConfig(peak_lr=3e-3, warmup_steps=5, clip_norm=1.0)
    optimizer, schedule = make_optimizer(settings, config.steps), learning_rate(settings, config.steps)
    state = create_state(
        jax.random.key(1), lambda key: toy.init(key, config.width), optimizer, mesh, rules=toy.RULES, ema=True
    )
    step = make_train_step(toy.loss, optimizer, state=state, ema_decay=0.9, schedule=schedule)

    share = process_slice(mesh)
    batches = loaded(config, share) if config.records else toy.batches(share)

    def stream(first: int):
        for number, batch in enumerate(batches(first), first):
            time.sleep(config.pause)
            if number == config.stop_at:
                return
            if number == config.fail_at and jax.process_index() == jax.process_count() - 1:
                raise InputError("scan_7.nii.gz", "an image", "a truncated file")
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
    except BaseException as error:  # as the command line does
        code = tell_error(error, [])
        processes.leave_if_several(error, code)
        if code is None:
            raise
        sys.exit(code)
