"""TANGERINE efficiency: how many labels and epochs a pre-trained model needs, against one from scratch."""

import dataclasses
from functools import partial
from typing import Annotated

from jaxmed.config import checked
from jaxmed.data.loader import LoaderConfig
from jaxmed.recipes.efficiency import StudyConfig, StudyFlags, Summary, efficiency_page, require_steps, run_efficiency
from jaxmed.recipes.stage import Finished, Page
from jaxmed.recipes.training import NO_PREFIX, TrainConfig
from jaxmed.systems.tangerine.adaptation import (
    SOURCE,
    AdaptationConfig,
    find_start,
    full_size,
    small,
    small_optimizer,
    with_synthetic,
)
from jaxmed.train.loop import LoopConfig
from jaxmed.train.run_folder import RunFolder

TRIES_FAILED_AGAIN = True


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """A study of label and training efficiency; options are those of adapt, and what is varied.

    Attributes:
        adaptation: Of every cell.
        study: Shares of labels and repetitions.
    """

    adaptation: Annotated[AdaptationConfig, NO_PREFIX] = AdaptationConfig()
    study: StudyFlags = StudyConfig()

    def __post_init__(self) -> None:
        require_steps(self.adaptation.labelled)


def paper() -> Config:
    """ViT-L at 256^3, six fractions, five seeds: 60 fine-tunings of the published weights, on accelerators."""
    return Config(full_size())


def laptop() -> Config:
    """A small model at 32^3, 10 % and all labels, three seeds, in minutes: on your scans, or on phantom chests."""
    train = TrainConfig(
        small_optimizer(1e-3), LoopConfig(log_every=10, save_every=0), LoaderConfig(batch_size=16), epochs=8,
        warmup_epochs=0.5,
    )  # fmt: skip
    return Config(small(1000, train), StudyConfig((0.1, 1.0), 3, "steps"))


def smoke() -> Config:
    """A tiny model at 32^3, two fractions, two seeds, in seconds: on your scans, or on phantom chests."""
    train = dataclasses.replace(
        laptop().adaptation.labelled.adapt.train, loader=LoaderConfig(batch_size=12), epochs=4, warmup_epochs=1
    )
    return Config(small(60, train, evaluate_epochs=2), StudyConfig((0.25, 1.0), 2, "steps"))


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, run every cell that is not finished, write tables and report. Returns 1 when cells failed."""
    is_shared = config.study.processes > 1
    made, notes = with_synthetic(config.adaptation, folder, is_shared=is_shared, elsewhere=False)
    find = partial(find_start, made)
    return run_efficiency(config, made.labelled, config.study, find, page, folder, notes, made.augment)


def page(run: Finished[Config, Summary]) -> Page:
    """Show scores by share of labels, and when they were reached."""
    return efficiency_page(run, "TANGERINE efficiency", SOURCE)
