"""Self-play meta-train: train generator and verifier on familiar tasks, so that a few labels suffice for a new one."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.config import Seed, Size, checked
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.tasks import Cases, TaskData, read_splits, task_batches
from jaxmed.models.mask_generator import GeneratorConfig
from jaxmed.models.mask_verifier import VerifierConfig
from jaxmed.recipes.few_shot_stage import example_figure, write_examples, write_puzzles
from jaxmed.recipes.map_files import write_failed
from jaxmed.recipes.scan_job import trouble_sections
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import curves
from jaxmed.report.page import Section, Table, Text
from jaxmed.systems.selfplay.inputs import TINY, write_system_one
from jaxmed.systems.selfplay.system_one import (
    MetaConfig,
    MetaState,
    SystemOne,
    SystemOneConfig,
    generate,
    handed_on,
    init_meta,
    init_params,
    meta_step,
    overlap,
    repo,
    verify,
)
from jaxmed.train.log import read_metrics, series
from jaxmed.train.loop import LoopConfig, fit
from jaxmed.train.mesh import MeshConfig, make_mesh
from jaxmed.train.run_folder import RunFolder

EVALUATED = 128


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Meta-training of System I.

    Attributes:
        data: Familiar tasks: rows of split train, and of split validation for tasks that are only looked at.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        preprocess: How files become images.
        system: Networks and losses.
        meta: Reptile.
        batch_size: Images of an inner step.
        loop: Tasks to see, and intervals of lines, saves and evaluations.
        mesh: The devices.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Seed of the parameters, tasks and batches.
    """

    data: TaskData = TaskData()
    series: str = ""
    preprocess: Preprocess = Preprocess((128, 128))
    system: SystemOneConfig = SystemOneConfig()
    meta: MetaConfig = MetaConfig()
    batch_size: Size = 32
    loop: LoopConfig = LoopConfig(steps=5000, log_every=20, save_every=500, evaluate_every=250)
    mesh: MeshConfig = MeshConfig()
    fill: float | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if len(self.preprocess.size) != self.system.generator.dimensions:
            found = f"{len(self.preprocess.size)} and {self.system.generator.dimensions}"
            raise ValueError(f"preprocess.size, system.generator.dimensions: expected as many axes, found {found}")
        if any(length % self.system.divisor for length in self.preprocess.size):
            raise ValueError(
                f"preprocess.size: expected multiples of {self.system.divisor}, found {self.preprocess.size}"
            )


def paper() -> Config:
    """The reference implementation on 32 x 32 digits: plain networks, no pixel loss, a learning rate of 1e-5."""
    system, meta, _ = repo()
    return Config(preprocess=Preprocess((32, 32)), system=system, meta=meta, loop=LoopConfig(steps=32, log_every=1))


def laptop() -> Config:
    """Small U-Nets on 32 x 32 images, 800 tasks: a quarter of an hour on two cores."""
    return Config(
        preprocess=Preprocess((32, 32)),
        system=SystemOneConfig(GeneratorConfig(widths=(8, 16, 32)), VerifierConfig(widths=(8, 16, 32))),
        meta=MetaConfig(epsilon=0.5, rate=1e-3),
        batch_size=16,
        loop=LoopConfig(steps=800, log_every=20, save_every=200, evaluate_every=100),
        mesh=MeshConfig(data=1),
    )


def smoke() -> Config:
    """Tiny networks at 16 x 16, in seconds: on your images, or on puzzles."""
    return Config(
        data=TaskData(synthetic=24),
        preprocess=TINY,
        system=SystemOneConfig(GeneratorConfig("plain", widths=(16, 16, 16)), VerifierConfig(widths=(8,), dense=(32,))),
        meta=MetaConfig(inner_steps=2, epsilon=0.5, rate=2e-3),
        batch_size=8,
        loop=LoopConfig(steps=40, log_every=5, save_every=40),
        mesh=MeshConfig(data=1),
    )


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was trained: cases of each familiar task, tasks that were only looked at, parameters of each network."""

    cases: dict[str, int]
    held_out: tuple[str, ...]
    failed: int
    parameters: dict[str, int]


def run(config: Config, folder: RunFolder) -> int:
    """Read the tasks, train, export System I, show what it makes of held-out tasks. Returns 1 when records failed."""
    clock = Clock()
    data = write_puzzles(config.data, config.preprocess, config.seed, folder)
    config = dataclasses.replace(config, data=data)
    cases, failed = read_splits(
        config.data, config.preprocess, ("train",), ("validation",), config.seed, config.series, config.fill
    )
    training, held_out, has_held_out = cases["train"], cases.get("validation", cases["train"]), "validation" in cases
    log = begin(folder, tensorboard=config.loop.tensorboard)
    log.say(f"{len(training.images):,} cases of {len(training.task_names)} tasks: {', '.join(training.task_names)}.")
    log.say(f"Looked at: {', '.join(held_out.task_names)}." if has_held_out else "No task is held out to look at.")
    clock.lap("read and cut")
    params = init_params(jax.random.key(config.seed), config.system, config.preprocess.size)
    state = init_meta(jax.random.key(config.seed + 1), config.system, config.meta, params)
    state = fit(
        config.loop,
        state,
        partial(meta_step, config.system, config.meta),
        partial(task_batches, training, (config.batch_size, config.meta.inner_steps), config.seed, config.loop.steps),
        mesh=make_mesh(config.mesh),
        folder=folder,
        log=log,
        evaluate=make_evaluation(config, held_out),
    )
    clock.lap("train, compilation included")
    system = SystemOne(config.system, handed_on(config.meta, state))
    write_system_one(folder.outputs / "system1", system, config.preprocess)
    write_examples(folder.outputs / "examples.npz", held_out, partial(generate, system.config, system.params))
    write_failed(folder.outputs, failed)
    counts = {name: int(np.sum(training.tasks == number)) for number, name in enumerate(training.task_names)}
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in state.params.items()}
    summary = Summary(counts, held_out.task_names if has_held_out else (), len(failed), sizes)
    finish(folder, config, summary, clock, page)
    return 1 if failed else 0


def make_evaluation(config: Config, held_out: Cases) -> Any:
    """Return the function that looks at a task that is not trained on."""
    some = held_out.spread(EVALUATED)
    images, masks = jnp.asarray(some.images), jnp.asarray(some.masks, jnp.float32)

    @jax.jit
    def measure(params: Any) -> dict[str, Any]:
        soft = generate(config.system, params, images)
        true = verify(config.system, params, images, masks)
        false = verify(config.system, params, images, soft)
        hard = (soft > config.system.threshold).astype(jnp.float32)
        return {
            "overlap": overlap(masks, hard).mean(),
            "squared_error": jnp.mean((soft - masks) ** 2),
            "discrimination": (true - false).mean(),
        }

    def evaluate(state: MetaState) -> dict[str, float]:
        return {name: float(value) for name, value in measure(state.params).items()}

    return evaluate


def page(run: Finished[Config, Summary]) -> Page:
    """Show how both networks learnt, and what the generator makes of held-out images."""
    summary, lines = run.summary, read_metrics(run.path)
    last = next((line for line in reversed(lines) if "evaluation/overlap" in line), {})
    which = "a task that is not trained on" if summary.held_out else "the tasks that are trained on"

    names = {"training, within a task": "overlap", which: "evaluation/overlap"}
    training = [
        curves(
            {name: series(lines, key, 100) for name, key in names.items()},
            xlabel="tasks seen", ylabel="Dice of the generator (%)",
            caption="Dice of the generated masks: in the inner loops, and of the averages.",
        ),
        curves(
            {name: series(lines, name) for name in ("generator", "verifier")}, xlabel="tasks seen", ylabel="loss",
            caption="Losses of both networks in the inner loops. The verifier's cannot reach 0: its targets are "
            "overlaps.",
        ),
        Table(("task", "cases"), list(summary.cases.items()),
              "Familiar tasks; held out: " + (", ".join(summary.held_out) or "none")),
    ]  # fmt: skip
    return Page(
        "System I, meta-trained",
        f"Self-play reasoning, {len(summary.cases)} familiar tasks",
        [
            ("Tasks", len(summary.cases), f"{sum(summary.cases.values()):,} cases"),
            ("Dice", f"{100 * last.get('evaluation/overlap', float('nan')):.1f} %", f"on {which}"),
            ("Discrimination", f"{last.get('evaluation/discrimination', float('nan')):.3f}", "D(true) - D(generated)"),
            ("Parameters", f"{sum(summary.parameters.values()):,}", "of both networks"),
        ],
        [
            *trouble_sections(run.outputs, (), summary.failed),
            Section("Training", training),
            Section("What the generator makes of " + which, [example_figure(run.outputs / "examples.npz")]),
            Section("How to read this", [Text([
                "Reptile moves the averages of both networks towards where a few steps on one task lead. The "
                "generator's Dice is that of the averages, without adaptation: what a few labels add is seen by the "
                "adapt stage.",
                "Discrimination is the mean of D of true masks minus D of generated ones. Near 0 the generator's masks "
                "please the verifier as much as true ones do: with a good generator that is as it should be, with a "
                "bad one it means that the verifier has learnt nothing.",
            ])]),
        ],
    )  # fmt: skip
