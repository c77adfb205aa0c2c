"""TANGERINE adapt: fine-tune or probe a pre-trained model on labelled scans, and score it here and elsewhere."""

import dataclasses
from functools import partial

from jax.sharding import Mesh

from jaxmed.arrays.task import Task
from jaxmed.data.loader import LoaderConfig
from jaxmed.recipes.adapt_sections import adapt_page
from jaxmed.recipes.adapt_stage import Summary, plan_adapt, run_adapt
from jaxmed.recipes.stage import Finished, Page
from jaxmed.recipes.training import TrainConfig
from jaxmed.systems.tangerine import adaptation
from jaxmed.systems.tangerine.adaptation import SOURCE, find_start, full_size, small, small_optimizer, with_synthetic
from jaxmed.train.loop import LoopConfig
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.workload import Workload

Config = adaptation.AdaptationConfig
LONG = LoopConfig(log_every=10, save_every=100)


def paper() -> Config:
    """ViT-L at 256^3, batch 3 x 4, 200 epochs, bfloat16: for your scans and the published weights."""
    return full_size()


def laptop() -> Config:
    """A small model at 32^3, in minutes: on your scans, or pre-trained and adapted on 1,000 phantom chests."""
    return small(
        1000,
        TrainConfig(small_optimizer(1e-3), LONG, LoaderConfig(batch_size=16), epochs=8, warmup_epochs=0.5),
    )


def smoke() -> Config:
    """A tiny model at 32^3, in seconds: on your scans, or pre-trained and adapted on phantom chests."""
    # A hundred steps: the head with BatchNorm learns in these, a linear one would need many more.
    train = TrainConfig(small_optimizer(2e-3), LONG, LoaderConfig(batch_size=15), epochs=32, warmup_epochs=1)
    return small(150, train, tiny=True, evaluate_epochs=4, auroc=False, hidden=16)


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, adapt, score every set, export the model, write the report. Returns 1 when scans failed."""
    made, notes = with_synthetic(config, folder)
    return run_adapt(config, made.labelled, partial(find_start, made), page, folder, notes, config.augment)


def plan_step(config: Config, mesh: Mesh) -> Workload:
    """Return the step of a run from scratch and the shapes of its arguments; nothing is read or drawn."""
    labelled = dataclasses.replace(config.labelled, weights=None)
    first = find_start(dataclasses.replace(config, labelled=labelled), Task())
    return plan_adapt(labelled, first, mesh, Task(), config.augment)


def page(run: Finished[Config, Summary]) -> Page:
    """Show the scores of every set."""
    return adapt_page(run, "TANGERINE adapted", SOURCE)
