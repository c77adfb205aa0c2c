"""TANGERINE pretrain: train a 3D masked autoencoder on chest CTs without labels."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxmed.arrays.types import KeyArray
from jaxmed.config import Share, checked
from jaxmed.data.augment import draw_flips, flip
from jaxmed.data.inputs import PreparedField
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.records import SubsetSource
from jaxmed.models.mae import MAE_LAPTOP_3D, MAE_SMOKE_3D, MaeConfig, masked_model
from jaxmed.models.published.tangerine import PREPROCESS
from jaxmed.models.published.timm_vit import entries
from jaxmed.models.published.warm_start import read_warm_start
from jaxmed.models.vit import VitConfig
from jaxmed.recipes.pretrain_mae import Augment, plan_pretraining, pretrain
from jaxmed.recipes.pretrain_pictures import Completed, completed, volume_figure, write_volumes
from jaxmed.recipes.pretrain_stage import (
    UnlabelledData,
    error_curves,
    find_unlabelled,
    load_initial_weights,
    model_record,
    prepared_source,
    pretrain_tiles,
    start_notes,
)
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, first_only
from jaxmed.recipes.training import TrainConfig, TrainData, TrainFlags, check_fit
from jaxmed.report.figures import MapStyle
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.synthesis.phantoms.chest import ChestConfig
from jaxmed.synthesis.phantoms.write_chest import write_chest_cohort
from jaxmed.systems.tangerine.adaptation import SOURCE
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import read_metrics
from jaxmed.train.loop import LoopConfig, length_notes
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder, start
from jaxmed.train.workload import Workload

STYLE = MapStyle(colormap="gray", limits=(0.0, 1.0))


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Pre-training of TANGERINE; defaults are the released code's.

    Attributes:
        data: Volumes listed in a table.
        input: A file, a DICOM folder, or a folder of such, instead of a table.
        weights: Published or own weights of a masked autoencoder to start from; random where empty.
        warm_start: A published 2D transformer in timm's names (MAE, say) whose blocks training starts from: tensors of
            the same name and shape are taken, patches, positions and prediction are drawn.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        fill: Intensity in HU of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are
            refused.
        preprocess: From a file to the model's input; its size is always that of the model's image.
        model: The masked autoencoder; its dtype is set by --dtype.
        train: Optimizer (AdamW with a cosine), length, reading, devices and seed.
        flip_probability: Probability of a flip along rows, and of one along columns.
    """

    data: UnlabelledData = UnlabelledData()
    input: Path | None = None
    weights: Path | None = None
    warm_start: Path | None = None
    series: str = ""
    fill: float | None = None
    preprocess: Preprocess = PREPROCESS
    model: MaeConfig = MaeConfig()
    train: TrainFlags = TrainConfig(
        OptimizerConfig(peak_lr=1e-4, b1=0.9, b2=0.95, weight_decay=0.05),
        LoopConfig(log_every=10, save_every=500, evaluate_every=500),
        LoaderConfig(batch_size=8, num_threads=4),
        epochs=400,
        warmup_epochs=20,
    )
    flip_probability: Share = 0.2

    def __post_init__(self) -> None:
        if len(self.model.encoder.image_size) != 3:
            raise ValueError(f"model.encoder.image_size: expected 3 axes, found {self.model.encoder.image_size}")
        # Files are prepared at the size of the model's image, and config.json says so.
        size = self.model.encoder.image_size
        object.__setattr__(self, "preprocess", dataclasses.replace(self.preprocess, size=size))
        if self.model.encoder.dtype not in ("float32", self.train.dtype):
            raise ValueError(f"model.encoder.dtype: expected to be left to --dtype, found {self.model.encoder.dtype}")
        if self.weights is not None and self.warm_start is not None:
            raise ValueError(f"warm_start: expected nothing beside weights, found {self.warm_start}")

    @property
    def is_synthetic(self) -> bool:
        """Whether the data are generated: files given take their place, whatever the preset."""
        return self.data.synthetic > 0 and not self.data.is_given and self.input is None


def paper() -> Config:
    """ViT-L at 256^3, 400 epochs, batch 224, bfloat16: for your scans on accelerators."""
    model = MaeConfig(dataclasses.replace(VitConfig(), remat=True, scan=True))
    loader = LoaderConfig(batch_size=224, num_threads=8)
    return Config(
        model=model, train=dataclasses.replace(Config().train, loader=loader, accumulation=4, dtype="bfloat16")
    )


def laptop() -> Config:
    """A small model at 32^3, in minutes: on your scans, or on 600 of 1,000 phantom chests."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=2e-3, b2=0.95, weight_decay=0.05),
        LoopConfig(log_every=50, save_every=1000, evaluate_every=1000),
        LoaderConfig(batch_size=16, num_threads=2),
        MeshConfig(data=1),
        epochs=130,
        warmup_epochs=13,
    )
    return Config(data=UnlabelledData(synthetic=1000), model=MAE_LAPTOP_3D, train=train)


def smoke() -> Config:
    """A tiny model at 32^3, in seconds: on your scans, or on a few phantom chests."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=3e-3, b2=0.95, weight_decay=0.05),
        LoopConfig(log_every=5, save_every=50, evaluate_every=50),
        LoaderConfig(batch_size=4),
        MeshConfig(data=1),
        epochs=40,
        warmup_epochs=2,
    )
    return Config(data=UnlabelledData(synthetic=16), model=MAE_SMOKE_3D, train=train)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a pre-training ended with.

    Attributes:
        volumes: Trained on ("train") and held out ("validation").
        parameters: Their number.
        window: HU that became 0 and 1.
        errors: Of the first held-out volumes.
        notes: What a user should know.
    """

    volumes: dict[str, int]
    parameters: int
    window: tuple[float, float]
    errors: tuple[Completed, ...]
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Read and check the volumes, train, export the model, write the report."""
    clock, train, preprocess = Clock(), config.train, config.preprocess
    model = trained_sizes(config)
    check_fit(train, masked_model(model).network)
    published = None
    if config.weights is not None:
        published = load_initial_weights(config.weights, "tangerine", model, masked_model(model))
    warm = None if config.warm_start is None else read_warm_start(config.warm_start, entries(model))
    given = warm or published
    given_data = with_synthetic(config, folder)
    volumes = find_unlabelled(
        given_data.data, given_data.input, preprocess, train, series=config.series, fill=config.fill
    )
    notes = [
        *volumes.notes,
        *length_notes(train.loop, train.epochs),
        *start_notes(published, preprocess),
        *([] if warm is None else [warm.note]),
    ]
    log = begin(folder, notes, tensorboard=train.loop.tensorboard)
    counts = volumes.counts
    log.say(f"{counts['train']:,} volumes to train on, {counts['validation']:,} held out.")
    cache = config.data.cache or (folder.path / "inputs" / "volumes" if config.data.synthetic else None)
    source = prepared_source(volumes, preprocess, cache, log)
    rows = np.arange(len(volumes.scans))
    held_out = SubsetSource(source, rows[volumes.num_training :]) if counts["validation"] else None
    clock.lap("read and check")
    data = TrainData(SubsetSource(source, rows[: volumes.num_training]), held_out, PreparedField(preprocess))
    params, pictures = pretrain(
        train, masked_model(model), data,
        folder=folder, log=log, augment=make_augment(config), start=None if given is None else given.params,
    )  # fmt: skip
    clock.lap("train, compilation included")
    export_parameters(
        folder.outputs / "model", params, model_record("tangerine", "mae", model, params, preprocess, published)
    )
    if jax.process_index() != 0:
        return
    low, high = preprocess.intensity.window
    constants = {"HU that is 0": low, "HU that is 1": high}
    write_volumes(folder.outputs, pictures, volumes.scans[volumes.num_training :], preprocess, ("",), constants)
    summary = Summary(
        counts, sum(leaf.size for leaf in jax.tree.leaves(params)), preprocess.intensity.window,
        completed(pictures), tuple(notes),
    )  # fmt: skip
    finish(folder, config, summary, clock, page)


def plan_step(config: Config, mesh: Mesh) -> Workload:
    """Return the step of a run and the shapes of its arguments; nothing is read or drawn."""
    return plan_pretraining(config.train, masked_model(trained_sizes(config)), mesh, make_augment(config))


def trained_sizes(config: Config) -> MaeConfig:
    """Return the masked autoencoder with the type of its products set."""
    return dataclasses.replace(
        config.model, encoder=dataclasses.replace(config.model.encoder, dtype=config.train.dtype)
    )


def make_augment(config: Config) -> Augment:
    """Return what happens to a training volume."""

    def augment(key: KeyArray, image: Float[Array, "..."]) -> Float[Array, "..."]:
        return flip(image, draw_flips(key, 3, (1, 2), config.flip_probability))

    return augment


def with_synthetic(config: Config, folder: RunFolder) -> Config:
    """Where no files are given, write phantom chests: half with fluid behind a lung, a third with each other finding.

    Of them a fifth is held out, and a fifth is left to tests of what grows on the model.
    """
    if not config.is_synthetic:
        return config
    place = folder.path / "inputs"

    def write() -> None:
        start(folder)
        write_chest_cohort(
            place, config.train.seed, config.data.synthetic, config.preprocess.volume_size,
            ChestConfig(severity=(0.5, 1.0)), finding="effusion", distractors=1 / 3,
        )  # fmt: skip

    first_only(write, "inputs")
    return dataclasses.replace(config, data=UnlabelledData(place / "scans.csv"))


# The page ------------------------------------------------------------------------------------------------------------


def page(run: Finished[Config, Summary]) -> Page:
    """Show how the error fell, and what the model completes."""
    summary, lines = run.summary, read_metrics(run.path)
    return Page(
        "TANGERINE pre-training",
        f"A 3D masked autoencoder of {summary.parameters:,} parameters, trained on {summary.volumes['train']:,} "
        "volumes without labels",
        pretrain_tiles(lines, summary.volumes, "volumes", "mean squared error of hidden voxels"),
        [_curves_section(lines, summary), *_pictures_section(run.outputs, summary), _reading_section()],
    )


def _curves_section(lines: list[dict[str, float]], summary: Summary) -> Section:
    low, high = summary.window
    caption = (
        f"Mean squared error of hidden voxels, intensities in [0, 1] ({low:g} to {high:g} HU), and that of the best "
        "constant: the variance of the hidden voxels."
    )
    return Section("Training", [*(Note(text, "warning") for text in summary.notes), *error_curves(lines, caption)])


def _pictures_section(outputs: Path, summary: Summary) -> list[Section]:
    if not summary.errors:
        return []
    scale = summary.window[1] - summary.window[0]
    blocks: list[Any] = []
    for number, found in enumerate(summary.errors):
        caption = (
            f"Held-out volume {number + 1}, on the model's grid: the input, what the encoder sees of it (hidden "
            "patches black), and the input with hidden patches as predicted. Root mean square error "
            f"{scale * found.error**0.5:.0f} HU."
        )
        blocks.append(volume_figure(outputs, number, "", caption, STYLE))
    rows = [
        (i + 1, e.error, e.variance, 1 - e.error / e.variance, scale * e.error**0.5)
        for i, e in enumerate(summary.errors)
    ]
    columns = ("Volume", "Error", "Variance", "Explained", "Root mean square error (HU)")
    caption = (
        "Hidden voxels of held-out volumes, intensities in [0, 1]. Variance is the error of the best constant; "
        "explained is 1 - error / variance."
    )
    blocks.append(Table(columns, rows, caption))
    return [Section("What the model completes", blocks)]


def _reading_section() -> Section:
    text = [
        "Three quarters of the patches are hidden from the encoder, and the decoder has to fill them in. The error is "
        "told on hidden patches only; a model that knows nothing predicts a constant, whose error is the variance. "
        "What counts is not the picture but whether the encoder's features help afterwards: jaxmed tangerine adapt.",
        SOURCE,
    ]
    return Section("How to read this", [Text(text)])
