"""RETFound compare: encoders, ways of adapting, shares of labels and seeds, in one table and one page."""

import dataclasses
from functools import partial
from typing import Annotated

from jaxmed.arrays.task import Task
from jaxmed.config import checked
from jaxmed.data.loader import LoaderConfig
from jaxmed.io.tables import read_table
from jaxmed.recipes.adapt_stage import LabelledConfig, Start
from jaxmed.recipes.efficiency import StudyConfig, StudyFlags
from jaxmed.recipes.encoder_study import EncodersConfig, EncodersFlags, Summary, encoder_page, run_encoder_study
from jaxmed.recipes.stage import Finished, Page
from jaxmed.recipes.training import NO_PREFIX, TrainConfig
from jaxmed.synthesis.phantoms.write_retina import write_textures
from jaxmed.systems.retfound.adaptation import (
    EDGE,
    RATE,
    SOURCE,
    AdaptationConfig,
    find_start,
    full_size,
    pretrain_on,
    small,
    with_synthetic,
)
from jaxmed.train.loop import LoopConfig
from jaxmed.train.run_folder import RunFolder

TRIES_FAILED_AGAIN = True


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """A comparison of encoders; options are those of adapt, and what is varied.

    Attributes:
        adaptation: Of every cell; --weights and --mode are those of `compared`.
        compared: Encoders and ways of adapting.
        study: Shares of labels and repetitions.
    """

    adaptation: Annotated[AdaptationConfig, NO_PREFIX] = AdaptationConfig()
    compared: EncodersFlags = EncodersConfig()
    study: StudyFlags = StudyConfig((0.1, 0.2, 0.5, 0.9, 1.0))

    def __post_init__(self) -> None:
        labelled = self.adaptation.labelled
        if labelled.weights is not None:
            raise ValueError(f"weights: expected none, for --encoders NAME=PLACE names them, found {labelled.weights}")
        if labelled.adapt.mode != "full":
            raise ValueError(f"mode: expected none, for --modes names them, found {labelled.adapt.mode}")
        if labelled.data.weight and "knn" in self.compared.modes:
            raise ValueError(f"data.weight: expected none, for nearest neighbours, found {labelled.data.weight}")


def paper() -> Config:
    """ViT-L at 224, fine-tuning and the official linear probe, five shares of labels, five seeds: on accelerators."""
    return Config(full_size(), EncodersConfig(modes=("full", "frozen")))


def laptop() -> Config:
    """Small models at 64 pixels, three shares of labels, three seeds: on your images, or on 600 phantom eyes."""
    train = TrainConfig(
        RATE, LoopConfig(log_every=10, save_every=0), LoaderConfig(batch_size=24), epochs=8, warmup_epochs=1
    )
    return Config(small(600, train, evaluate_epochs=4), study=StudyConfig((0.1, 0.3, 1.0), 3, "steps"))


def smoke() -> Config:
    """Tiny models at 64 pixels, two shares of labels, two seeds, in seconds: on your images, or on phantom eyes."""
    train = TrainConfig(
        RATE, LoopConfig(log_every=10, save_every=0), LoaderConfig(batch_size=20), epochs=4, warmup_epochs=1
    )
    return Config(small(100, train, tiny=True, evaluate_epochs=2), study=StudyConfig((0.5, 1.0), 2, "steps"))


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, run every cell that is not finished, write tables and report. Returns 1 when cells failed."""
    made, notes = with_synthetic(config.adaptation, folder, is_shared=config.study.processes > 1)
    compared = config.compared
    if config.adaptation.labelled.is_synthetic and not compared.encoders:
        compared = dataclasses.replace(compared, encoders=_synthetic_encoders(made, folder))
        notes = [*notes, "specialist was pre-trained on eyes, generalist on textures, both without labels."]
    find = partial(_find_start, made)
    return run_encoder_study(config, made.labelled, compared, config.study, find, page, folder, notes)


def _synthetic_encoders(made: AdaptationConfig, folder: RunFolder) -> tuple[str, ...]:
    """Pre-train a second encoder on textures, beside the one on eyes."""
    seed, manifest = made.labelled.adapt.train.seed, made.labelled.data.manifest
    assert manifest is not None
    splits = read_table(manifest).column("split")
    # As many pictures as there are eyes to train on: neither encoder shall see more, or be trained longer.
    textures = write_textures(folder.path / "inputs" / "textures", seed, splits.count("train"), EDGE)
    preset = "laptop" if len(splits) >= 500 else "smoke"
    other = pretrain_on(folder, textures, seed, preset=preset, what="textures")
    return f"specialist={made.labelled.weights}", f"generalist={other}", "random=random"


def _find_start(config: AdaptationConfig, labelled: LabelledConfig, name: str, task: Task) -> Start:
    return find_start(dataclasses.replace(config, labelled=labelled), task)


def page(run: Finished[Config, Summary]) -> Page:
    """Show scores by share of labels, differences with tests, other sets, and costs."""
    return encoder_page(run, "RETFound study: encoders compared", SOURCE)
