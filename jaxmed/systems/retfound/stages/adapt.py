"""RETFound adapt: fine-tune or probe an encoder on labelled images, and score it here and elsewhere."""

import dataclasses
from functools import partial

from jax.sharding import Mesh

from jaxmed.arrays.task import Task
from jaxmed.data.loader import LoaderConfig
from jaxmed.recipes.adapt_sections import adapt_page
from jaxmed.recipes.adapt_stage import Summary, plan_adapt, run_adapt
from jaxmed.recipes.stage import Finished, Page
from jaxmed.recipes.training import TrainConfig
from jaxmed.systems.retfound import adaptation
from jaxmed.systems.retfound.adaptation import RATE, SOURCE, find_start, full_size, small, with_synthetic
from jaxmed.train.loop import LoopConfig
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.workload import Workload

Config = adaptation.AdaptationConfig
LONG = LoopConfig(log_every=10, save_every=100)


def paper() -> Config:
    """ViT-L at 224, batch 24, 50 epochs, bfloat16: for your images and the published weights."""
    return full_size()


def laptop() -> Config:
    """A small model at 64 pixels, in minutes: on your images, or pre-trained and adapted on 1,000 phantom eyes."""
    return small(1000, TrainConfig(RATE, LONG, LoaderConfig(batch_size=24), epochs=20, warmup_epochs=2))


def smoke() -> Config:
    """A tiny model at 64 pixels, in seconds: on your images, or pre-trained and adapted on phantom eyes."""
    train = TrainConfig(RATE, LONG, LoaderConfig(batch_size=20), epochs=12, warmup_epochs=1)
    return small(120, train, tiny=True, evaluate_epochs=4)


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, adapt, score every set, export the model, write the report. Returns 1 when images failed."""
    made, notes = with_synthetic(config, folder)
    return run_adapt(config, made.labelled, partial(find_start, made), page, folder, notes)


def plan_step(config: Config, mesh: Mesh) -> Workload:
    """Return the step of a run from scratch and the shapes of its arguments; nothing is read or drawn."""
    labelled = dataclasses.replace(config.labelled, weights=None)
    first = find_start(dataclasses.replace(config, labelled=labelled), Task())
    return plan_adapt(labelled, first, mesh, Task())


def page(run: Finished[Config, Summary]) -> Page:
    """Show the scores of every set."""
    return adapt_page(run, "RETFound study: adapted", SOURCE)
