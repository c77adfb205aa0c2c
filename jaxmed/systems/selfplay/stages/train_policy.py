"""Self-play train-policy: teach System II's policy on familiar tasks, so that a new one needs less thought."""

import dataclasses
import shlex
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Seed, checked
from jaxmed.models.policy import TopkUnetConfig
from jaxmed.rl.pixel_game import PixelGame
from jaxmed.rl.selfplay import SelfPlayConfig
from jaxmed.systems.selfplay.data import Cases, DataConfig, read_cases, read_manifest
from jaxmed.systems.selfplay.frames import FrameConfig
from jaxmed.systems.selfplay.networks import load_for
from jaxmed.systems.selfplay.policy_page import write_page
from jaxmed.systems.selfplay.policy_training import (
    SNAPSHOT,
    PolicyState,
    VisitConfig,
    draw_visit,
    match_snapshots,
    policy_step,
    read_snapshots,
    settle,
    think_on,
    visits,
    write_policy,
)
from jaxmed.systems.selfplay.stages.adapt import make_embedded
from jaxmed.systems.selfplay.stages.meta_train import write_failed
from jaxmed.systems.selfplay.system_one import AS_THEY_ARE, AdaptConfig, SystemOne
from jaxmed.systems.selfplay.thinking import LAPTOP, PAPER, ThinkConfig, player_of
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig, fit
from jaxmed.train.mesh import MeshConfig, make_mesh
from jaxmed.train.run_folder import RunFolder, start, write_summary

LOOKS = 2


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Training of System II's policy.

    Attributes:
        data: Familiar tasks: rows of split train, and of split validation for tasks that are only looked at.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        weights: System I: a run of meta-train.
        frame: How files become images; read from the weights where it is left alone.
        adapt: Steps and rate of adaptation to each task.
        visit: What a visit to a task is.
        think: How to think; it always learns, in one round.
        loop: Visits to make, and intervals of lines, saves and evaluations.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Of the policy, of visits and of players.
    """

    data: DataConfig = DataConfig()
    series: str = ""
    weights: Path | None = None
    frame: FrameConfig | None = None
    adapt: AdaptConfig = AdaptConfig()
    visit: VisitConfig = VisitConfig()
    think: ThinkConfig = ThinkConfig()
    loop: LoopConfig = LoopConfig(steps=1000, log_every=1, save_every=50, evaluate_every=100)
    fill: float | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.think.mode != "learn" or self.think.rounds > 1:
            found = f"'{self.think.mode}' in {self.think.rounds} rounds"
            raise ValueError(f"think.mode, think.rounds: expected 'learn' in 1 round, found {found}")


def paper() -> Config:
    """The release's players and learning, from which think's paper preset goes on; a thousand visits is our number."""
    return Config(think=PAPER)


def laptop() -> Config:
    """A small policy, 24 visits: a quarter of an hour on two cores."""
    return Config(
        adapt=AdaptConfig(augment=dataclasses.replace(AS_THEY_ARE, shift=2)),
        think=LAPTOP,
        loop=LoopConfig(steps=24, log_every=1, save_every=6, evaluate_every=6),
    )


def smoke() -> Config:
    """Tiny networks and a few visits, in seconds: your images, or puzzles."""
    play = SelfPlayConfig(game=PixelGame(rule="elitist", at_most_k=True), games=16, steps=16)
    return Config(
        data=DataConfig(embedded=24),
        adapt=AdaptConfig(steps=4, rate=1e-3),
        visit=VisitConfig(shots=4, images=4, iterations=2),
        think=ThinkConfig(play=play, policy=TopkUnetConfig(widths=(8, 16), value_width=16)),
        loop=LoopConfig(steps=4, log_every=1, save_every=2),
    )


def run(config: Config, folder: RunFolder) -> int:
    """Read the tasks, visit them, export the policy, show what it is worth. Returns 1 when records failed."""
    began = time.monotonic()
    if config.data.embedded:
        prepared = make_embedded(config, folder)
        assert isinstance(prepared, Config)
        config = prepared
    trained, frame = load_for(config.weights, config.frame)
    training, failed = read_cases(config.data, frame, "train", config.seed, series=config.series, fill=config.fill)
    held_out, has_held_out = training, False
    if any(record.split == "validation" for record in read_manifest(config.data, config.seed)):
        held_out, further = read_cases(
            config.data, frame, "validation", config.seed, series=config.series, fill=config.fill
        )
        failed, has_held_out = failed + further, True
    start(folder)
    log = Log(folder.path, folder.options.quiet, config.loop.tensorboard)
    log.say(f"{len(training.images):,} cases of {len(training.task_names)} tasks: {', '.join(training.task_names)}.")
    ready = time.monotonic()
    first_key, root = jax.random.split(jax.random.key(config.seed))
    params = player_of(config.think, frame.size).init(first_key)
    looks = make_looks(config, trained.system, held_out)

    def evaluate(state: PolicyState) -> dict[str, float]:
        place = folder.outputs / "snapshots" / f"{SNAPSHOT}{int(state.step):06d}"
        write_policy(place, state.params, config.think, frame.size)
        return look(config, looks, state.params)

    fresh = evaluate(PolicyState(jnp.zeros((), jnp.int32), params, root))
    log.say(f"Before training, thinking gains {fresh['score_gain']:.4f} of the verifier's score in as many steps.")
    state = fit(
        config.loop,
        PolicyState(jnp.zeros((), jnp.int32), params, root),
        partial(policy_step, trained.system, config.adapt, config.think, config.visit.iterations),
        lambda first: visits(config.visit, training, config.seed, first, config.loop.steps),
        mesh=make_mesh(MeshConfig(data=1)),
        folder=folder,
        log=log,
        evaluate=evaluate,
    )
    visited = time.monotonic()
    numbers, snapshots = read_snapshots(folder.outputs / "snapshots", config.loop.steps)
    first = looks[0]
    match = match_snapshots(first.key, first.system, first.visit["image"], config.think, snapshots)
    played = time.monotonic()
    write_policy(folder.outputs / "policy", state.params, config.think, frame.size)
    write_failed(folder.outputs, failed)
    summary = {
        "tasks": list(training.task_names),
        "looked_at": held_out.task_names[0] if has_held_out else "",
        "fresh": fresh,
        "match": {"visits": numbers} | {name: values.round(4).tolist() for name, values in match._asdict().items()},
        "steps_of_visit": config.visit.iterations * config.think.play.steps_per_iteration,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "failed": len(failed),
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed selfplay train-policy --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {
            "read and cut": ready - began,
            "train, compilation included": visited - ready,
            "match of snapshots": played - visited,
        },
    }
    write_summary(folder, summary)
    write_page(folder.path)
    return 1 if failed else 0


report = write_page


class Look(NamedTuple):
    """Images that a policy is looked at with.

    Attributes:
        key: Of the players.
        system: System I, adapted to their task.
        visit: Labelled images and those to think about.
    """

    key: KeyArray
    system: SystemOne
    visit: dict[str, np.ndarray]


def make_looks(config: Config, system: SystemOne, cases: Cases) -> list[Look]:
    """Draw images of one task, the same for every policy, and adapt System I to it."""
    of_task = np.flatnonzero(cases.tasks == 0)
    looks = []
    for number, pair in enumerate(jax.random.split(jax.random.key(config.seed + 1), (LOOKS, 2))):
        visit = draw_visit(config.visit, cases, of_task, np.random.default_rng((config.seed, 12, number)))
        looks.append(Look(pair[1], settle(pair[0], system, visit, config.adapt), visit))
    return looks


def look(config: Config, looks: list[Look], params: Params) -> dict[str, float]:
    """Think with a policy about images of a task that it was not taught on, as long as a visit lasts."""
    found = [
        think_on(one.key, one.system, one.visit, config.think, config.visit.iterations, params)[1] for one in looks
    ]
    return {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}
