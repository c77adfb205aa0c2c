"""ProFound adapt: fine-tune a pre-trained model on labelled cases, or train a head on it, and score it."""

import dataclasses
from functools import partial

from jax.sharding import Mesh

from jaxmed.arrays.task import Task
from jaxmed.data.loader import LoaderConfig
from jaxmed.models.published.profound import PREPROCESS
from jaxmed.recipes.adapt_sections import adapt_page
from jaxmed.recipes.adapt_stage import Summary, plan_adapt, run_adapt
from jaxmed.recipes.stage import Finished, Page
from jaxmed.recipes.training import TrainConfig
from jaxmed.systems.profound import adaptation
from jaxmed.systems.profound.adaptation import find_start, small, small_optimizer, with_probe, with_synthetic
from jaxmed.systems.profound.cases import SOURCE
from jaxmed.systems.profound.scoring import score_case
from jaxmed.train.loop import LoopConfig
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.workload import Workload

Config = adaptation.AdaptationConfig
LONG = LoopConfig(log_every=10, save_every=100)


def paper() -> Config:
    """ConvNeXt V2 tiny at 64 x 224 x 224, batch 2, 400 epochs: for your cases and the published weights."""
    return Config()


def laptop() -> Config:
    """A small model at 16 x 32 x 32, in minutes: on your cases, or pre-trained and adapted on 400 phantoms."""
    train = TrainConfig(small_optimizer(2e-3), LONG, LoaderConfig(batch_size=16), epochs=20, warmup_epochs=1)
    return small(400, train)


def smoke() -> Config:
    """A tiny model at 16 x 32 x 32, in seconds: on your cases, or pre-trained and adapted on phantoms."""
    train = TrainConfig(small_optimizer(1e-2), LONG, LoaderConfig(batch_size=10), epochs=24, warmup_epochs=1)
    return small(60, train, tiny=True, evaluate_epochs=6)


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, adapt, score every set, export the model, write the report. Returns 1 when cases failed."""
    made, notes = with_synthetic(config, folder)
    made = dataclasses.replace(made, labelled=with_probe(made.labelled))
    scorer = partial(score_case, made.preprocess.apply(PREPROCESS).sequences), made.quality_scans
    return run_adapt(config, made.labelled, partial(find_start, made), page, folder, notes, config.augment, scorer)


def plan_step(config: Config, mesh: Mesh) -> Workload:
    """Return the step of a run from scratch and the shapes of its arguments; nothing is read or drawn."""
    scratch = dataclasses.replace(config, labelled=with_probe(dataclasses.replace(config.labelled, weights=None)))
    return plan_adapt(scratch.labelled, find_start(scratch, Task()), mesh, Task(), config.augment)


def page(run: Finished[Config, Summary]) -> Page:
    """Show the scores of every set."""
    return adapt_page(run, "ProFound adapted", SOURCE)
