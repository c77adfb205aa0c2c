"""Self-play meta-train: train generator and verifier on familiar tasks, so that a few labels suffice for a new one."""

import dataclasses
import shlex
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.config import Seed, Size, checked
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.tables import write_table
from jaxmed.models.mask_generator import GeneratorConfig
from jaxmed.models.mask_verifier import VerifierConfig
from jaxmed.systems.selfplay import system_one
from jaxmed.systems.selfplay.data import Cases, DataConfig, Failure, read_cases, read_manifest, write_embedded
from jaxmed.systems.selfplay.frames import FrameConfig
from jaxmed.systems.selfplay.meta_page import write_page
from jaxmed.systems.selfplay.networks import write_system_one
from jaxmed.systems.selfplay.system_one import MetaConfig, MetaState, SystemOne, SystemOneConfig
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig, fit
from jaxmed.train.mesh import MeshConfig, make_mesh
from jaxmed.train.run_folder import RunFolder, start, write_summary

EVALUATED = 128
SHOWN = 8


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Meta-training of System I.

    Attributes:
        data: Familiar tasks: rows of split train, and of split validation for tasks that are only looked at.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        frame: How files become images.
        system: Networks and losses.
        meta: Reptile.
        batch_size: Images of an inner step.
        loop: Tasks to see, and intervals of lines, saves and evaluations.
        mesh: The devices.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Of parameters, tasks and batches.
    """

    data: DataConfig = DataConfig()
    series: str = ""
    frame: FrameConfig = FrameConfig()
    system: SystemOneConfig = SystemOneConfig()
    meta: MetaConfig = MetaConfig()
    batch_size: Size = 32
    loop: LoopConfig = LoopConfig(steps=5000, log_every=20, save_every=500, evaluate_every=250)
    mesh: MeshConfig = MeshConfig()
    fill: float | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, found {self.batch_size}")
        if len(self.frame.size) != self.system.generator.dimensions:
            found = f"{len(self.frame.size)} and {self.system.generator.dimensions}"
            raise ValueError(f"frame.size, system.generator.dimensions: expected as many axes, found {found}")
        if any(length % self.system.divisor for length in self.frame.size):
            raise ValueError(f"frame.size: expected multiples of {self.system.divisor}, found {self.frame.size}")


def paper() -> Config:
    """The reference implementation on 32 x 32 digits: plain networks, no pixel loss, a learning rate of 1e-5."""
    system, meta, _ = system_one.repo()
    return Config(frame=FrameConfig((32, 32)), system=system, meta=meta, loop=LoopConfig(steps=32, log_every=1))


def laptop() -> Config:
    """Small U-Nets on 32 x 32 images, 800 tasks: a quarter of an hour on two cores."""
    return Config(
        frame=FrameConfig((32, 32)),
        system=SystemOneConfig(GeneratorConfig(widths=(8, 16, 32)), VerifierConfig(widths=(8, 16, 32))),
        meta=MetaConfig(epsilon=0.5, rate=1e-3),
        batch_size=16,
        loop=LoopConfig(steps=800, log_every=20, save_every=200, evaluate_every=100),
        mesh=MeshConfig(data=1),
    )


def smoke() -> Config:
    """Tiny networks at 16 x 16, in seconds: on your images, or on puzzles."""
    return Config(
        data=DataConfig(embedded=24),
        frame=FrameConfig((16, 16)),
        system=SystemOneConfig(GeneratorConfig("plain", widths=(16, 16, 16)), VerifierConfig(widths=(8,), dense=(32,))),
        meta=MetaConfig(inner_steps=2, epsilon=0.5, rate=2e-3),
        batch_size=8,
        loop=LoopConfig(steps=40, log_every=5, save_every=40),
        mesh=MeshConfig(data=1),
    )


def run(config: Config, folder: RunFolder) -> int:
    """Read the tasks, train, export System I, show what it makes of held-out tasks. Returns 1 when records failed."""
    began = time.monotonic()
    config = prepare_data(config, folder)
    training, failed = read_cases(
        config.data, config.frame, "train", config.seed, series=config.series, fill=config.fill
    )
    has_held_out = any(record.split == "validation" for record in read_manifest(config.data, config.seed))
    held_out = training
    if has_held_out:
        held_out, further = read_cases(
            config.data, config.frame, "validation", config.seed, series=config.series, fill=config.fill
        )
        failed += further
    start(folder)
    log = Log(folder.path, folder.options.quiet, config.loop.tensorboard)
    log.say(f"{len(training.images):,} cases of {len(training.task_names)} tasks: {', '.join(training.task_names)}.")
    log.say(f"Looked at: {', '.join(held_out.task_names)}." if has_held_out else "No task is held out to look at.")
    ready = time.monotonic()
    params = system_one.init_params(jax.random.key(config.seed), config.system, config.frame.size)
    state = system_one.init_meta(jax.random.key(config.seed + 1), config.system, config.meta, params)
    state = fit(
        config.loop,
        state,
        partial(system_one.meta_step, config.system, config.meta),
        partial(batches, config, training),
        mesh=make_mesh(config.mesh),
        folder=folder,
        log=log,
        evaluate=make_evaluation(config, held_out),
    )
    trained = time.monotonic()
    system = SystemOne(config.system, system_one.handed_on(config.meta, state))
    write_system_one(folder.outputs / "system1", system, config.frame)
    write_examples(folder.outputs / "examples.npz", system, held_out)
    write_failed(folder.outputs, failed)
    counts = {name: int(np.sum(training.tasks == number)) for number, name in enumerate(training.task_names)}
    summary = {
        "cases": counts,
        "held_out": list(held_out.task_names) if has_held_out else [],
        "failed": len(failed),
        "parameters": {name: sum(a.size for a in jax.tree.leaves(tree)) for name, tree in state.params.items()},
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed selfplay meta-train --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read and cut": ready - began, "train, compilation included": trained - ready},
    }
    write_summary(folder, summary)
    write_page(folder.path)
    return 1 if failed else 0


report = write_page


def prepare_data(config: Any, folder: RunFolder) -> Any:
    """Write the puzzles of a run that has no manifest; other runs keep their settings.

    Args:
        config: Of a stage with `data`, `frame` and `seed`.
        folder: The run, begun here when there are puzzles.
    """
    if not config.data.embedded or config.data.manifest is not None:
        return config
    start(folder)
    data = write_embedded(config.data, config.frame, config.seed, folder.path / "inputs" / "puzzles")
    return dataclasses.replace(config, data=data)


def batches(config: Config, cases: Cases, first: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches [batch step *size] of one task each; step n's depends on the seed and n alone."""
    places = [np.flatnonzero(cases.tasks == number) for number in range(len(cases.task_names))]
    for number in range(first, config.loop.steps):
        generator = np.random.default_rng((config.seed, 7, number))
        of_task = places[generator.integers(len(places))]
        chosen = generator.choice(of_task, (config.batch_size, config.meta.inner_steps))
        yield {"image": cases.images[chosen], "mask": cases.masks[chosen].astype(np.float32)}


def make_evaluation(config: Config, held_out: Cases) -> Any:
    """Return the function that looks at a task that is not trained on."""
    some = np.linspace(0, len(held_out.images) - 1, min(EVALUATED, len(held_out.images))).round().astype(int)
    images, masks = jnp.asarray(held_out.images[some]), jnp.asarray(held_out.masks[some], jnp.float32)

    @jax.jit
    def measure(params: Any) -> dict[str, Any]:
        soft = system_one.generate(config.system, params, images)
        true = system_one.verify(config.system, params, images, masks)
        false = system_one.verify(config.system, params, images, soft)
        hard = (soft > config.system.threshold).astype(jnp.float32)
        return {
            "overlap": system_one.overlap(masks, hard).mean(),
            "squared_error": jnp.mean((soft - masks) ** 2),
            "discrimination": (true - false).mean(),
        }

    def evaluate(state: MetaState) -> dict[str, float]:
        return {name: float(value) for name, value in measure(state.params).items()}

    return evaluate


def write_examples(path: Path, system: SystemOne, cases: Cases) -> None:
    """Write a few images, their masks and the generator's, for the report."""
    some = np.linspace(0, len(cases.images) - 1, min(SHOWN, len(cases.images))).round().astype(int)
    images = cases.images[some]
    soft = np.asarray(jax.jit(partial(system_one.generate, system.config))(system.params, jnp.asarray(images)))
    write_npz(path, {"images": images, "masks": cases.masks[some], "generated": soft}, is_compressed=True)


def write_failed(folder: Path, failed: tuple[Failure, ...]) -> None:
    """Write failed.csv where records could not be used."""
    if failed:
        write_table(folder / "failed.csv", Failure._fields, [failure._asdict() for failure in failed])
