"""ProFound pretrain: train a masked autoencoder on prostate MRI without labels, of convolutions or a transformer."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmed.arrays.types import Params
from jaxmed.config import checked
from jaxmed.data.augment import AugmentConfig
from jaxmed.data.inputs import PreparedField
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.records import SubsetSource
from jaxmed.models.convnext import of_size
from jaxmed.models.fcmae import FcmaeConfig, fcmae_model
from jaxmed.models.mae import MaeConfig, MaskedModel, masked_model, oblong_positions
from jaxmed.models.published.profound import PREPROCESS
from jaxmed.recipes.pretrain_mae import plan_pretraining, pretrain
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
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.training import TrainConfig, TrainData, TrainFlags, check_fit
from jaxmed.report.figures import MapStyle
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.systems.profound.cases import SMALL_FCMAE, SMALL_INPUT, SOURCE, TINY_FCMAE, TINY_VIT, VIT_B, write_cases
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import read_metrics
from jaxmed.train.loop import LoopConfig, length_notes
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.workload import Workload

STYLE = MapStyle(colormap="gray", limits=(-2.0, 3.0))
Size = Literal["model", "atto", "femto", "pico", "nano", "tiny", "base", "large", "huge"]
AUGMENTATION = AugmentConfig(
    order=("flip", "affine"), flip_axes=(2,), affine_probability=1.0, rotation=0.0, scale=(0.9, 1.1),
    is_isotropic=False, translation=0.0,
)  # fmt: skip
"""A flip of left and right in half of the cases, and a zoom along every axis.

Source: ProFound, official code. Deviation: the cut is about the centre, not random.
"""


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Pre-training of ProFound; defaults are the released script's.

    Attributes:
        data: Cases listed in a table.
        input: A case, or a folder of cases, instead of a table.
        weights: Published or own weights of a masked autoencoder to start from; random where empty.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        preprocess: From a case to the model's input; its size is always that of the model's image.
        encoder: "convnext" trains the model of convolutions, "transformer" the other.
        size: Blocks and channels of a published size of ConvNeXt V2; "model" takes those of model.encoder.
        model: The masked autoencoder of convolutions; its dtype is set by --dtype.
        transformer: That around a transformer, likewise.
        match_release: Take the norm of responses over the voxels of a whole batch, and a transformer's positions as
            the release lays them out.
        train: Optimizer (AdamW with a cosine), length, reading, devices and seed.
        augmentation: What happens to training cases.
    """

    data: UnlabelledData = UnlabelledData()
    input: Path | None = None
    weights: Path | None = None
    fill: float | None = None
    preprocess: Preprocess = PREPROCESS
    encoder: Literal["convnext", "transformer"] = "convnext"
    size: Size = "model"
    model: FcmaeConfig = FcmaeConfig()
    transformer: MaeConfig = VIT_B
    match_release: bool = False
    train: TrainFlags = TrainConfig(
        OptimizerConfig(peak_lr=1e-3, b2=0.95, weight_decay=0.05),
        LoopConfig(log_every=10, save_every=500, evaluate_every=500),
        LoaderConfig(batch_size=16, num_threads=4),
        epochs=800,
        warmup_epochs=40,
    )
    augmentation: AugmentConfig = AUGMENTATION

    def __post_init__(self) -> None:
        scope = "batch" if self.match_release else "sample"
        encoder = self.model.encoder if self.size == "model" else of_size(self.model.encoder, self.size)
        model = dataclasses.replace(self.model, encoder=dataclasses.replace(encoder, response_scope=scope))
        object.__setattr__(self, "model", model)
        # Cases are prepared at the size of the model's image, and config.json says so.
        trained = self.trained.encoder
        if len(trained.image_size) != 3:
            raise ValueError(f"image_size: expected 3 axes, found {trained.image_size}")
        if trained.channels != self.preprocess.channels:
            found = f"{trained.channels} and {self.preprocess.channels}"
            raise ValueError(f"channels: expected as many of the model and of the preprocessing, found {found}")
        size = dataclasses.replace(self.preprocess, size=trained.image_size)
        object.__setattr__(self, "preprocess", size)
        if trained.dtype not in ("float32", self.train.dtype):
            raise ValueError(f"dtype: expected to be left to --dtype, found {trained.dtype} in the model")

    @property
    def trained(self) -> FcmaeConfig | MaeConfig:
        """Sizes of the model that is trained."""
        return self.model if self.encoder == "convnext" else self.transformer

    @property
    def is_synthetic(self) -> bool:
        """Whether the data are generated: files given take their place, whatever the preset."""
        return self.data.synthetic > 0 and not self.data.is_given and self.input is None


def paper() -> Config:
    """ConvNeXt V2 tiny at 64 x 224 x 224, 800 epochs, batch 16: for your cases on accelerators."""
    model = FcmaeConfig(dataclasses.replace(FcmaeConfig().encoder, remat=True))
    return Config(model=model)


def laptop() -> Config:
    """A small model at 16 x 32 x 32, in minutes: on your cases, or on 240 of 400 phantoms."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=2e-3, b2=0.95, weight_decay=0.05),
        LoopConfig(log_every=20, save_every=300, evaluate_every=300),
        LoaderConfig(batch_size=8, num_threads=2),
        MeshConfig(data=1),
        epochs=40,
        warmup_epochs=4,
    )
    return Config(
        UnlabelledData(synthetic=400), preprocess=SMALL_INPUT, model=SMALL_FCMAE, transformer=TINY_VIT, train=train
    )


def smoke() -> Config:
    """A tiny model at 16 x 32 x 32, in seconds: on your cases, or on a few phantoms."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=3e-3, b2=0.95, weight_decay=0.05),
        LoopConfig(log_every=5, save_every=60, evaluate_every=30),
        LoaderConfig(batch_size=4),
        MeshConfig(data=1),
        epochs=12,
        warmup_epochs=2,
    )
    return Config(
        UnlabelledData(synthetic=24), preprocess=SMALL_INPUT, model=TINY_FCMAE, transformer=TINY_VIT, train=train
    )


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a pre-training ended with.

    Attributes:
        volumes: Cases trained on ("train") and held out ("validation").
        parameters: Their number.
        channels: Name of each channel.
        errors: Of the first held-out cases.
        notes: What a user should know.
    """

    volumes: dict[str, int]
    parameters: int
    channels: tuple[str, ...]
    errors: tuple[Completed, ...]
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Read and check the cases, train, export the model, write the report."""
    clock, train, preprocess = Clock(), config.train, config.preprocess
    sizes, model, kind = make_masked(config)
    check_fit(train, model.network)
    published = None
    if config.weights is not None:
        published = load_initial_weights(config.weights, "profound", sizes, model)
    data, place = config.data, config.input
    if config.is_synthetic:
        data = UnlabelledData(write_cases(folder, train.seed, config.data.synthetic))
    cases = find_unlabelled(data, place, preprocess, train, fill=config.fill)
    notes = [*cases.notes, *length_notes(train.loop, train.epochs), *start_notes(published, preprocess)]
    log = begin(folder, notes, tensorboard=train.loop.tensorboard)
    counts = cases.counts
    log.say(f"{counts['train']:,} cases to train on, {counts['validation']:,} held out.")
    cache = data.cache or (folder.path / "inputs" / "volumes" if config.is_synthetic else None)
    source = prepared_source(cases, preprocess, cache, log)
    training, others = np.split(np.arange(len(cases.scans)), [cases.num_training])
    held_out = SubsetSource(source, others) if counts["validation"] else None
    clock.lap("read and check")
    params, pictures = pretrain(
        train, model, TrainData(SubsetSource(source, training), held_out, PreparedField(preprocess)),
        folder=folder, log=log, augment=make_augment(config),
        start=first_parameters(config) if published is None else published.params,
    )  # fmt: skip
    clock.lap("train, compilation included")
    export_parameters(
        folder.outputs / "model", params, model_record("profound", kind, sizes, params, preprocess, published)
    )
    if jax.process_index() != 0:
        return
    channels = preprocess.channel_names
    write_volumes(folder.outputs, pictures, cases.scans[cases.num_training :], preprocess, channels)
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    finish(folder, config, Summary(counts, number, channels, completed(pictures), tuple(notes)), clock, page)


def plan_step(config: Config, mesh: Mesh) -> Workload:
    """Return the step of a run and the shapes of its arguments; nothing is read or drawn."""
    return plan_pretraining(config.train, make_masked(config)[1], mesh, make_augment(config))


def make_augment(config: Config) -> AugmentConfig | None:
    """Return what happens to a training case; None where nothing does."""
    return config.augmentation if config.augmentation.active else None


def make_masked(config: Config) -> tuple[FcmaeConfig | MaeConfig, MaskedModel, str]:
    """Return the sizes with the type of products set, the masked autoencoder, and its kind among the family's."""
    encoder = dataclasses.replace(config.trained.encoder, dtype=config.train.dtype)
    sizes = dataclasses.replace(config.trained, encoder=encoder)
    model, kind = (fcmae_model(sizes), "fcmae") if isinstance(sizes, FcmaeConfig) else (masked_model(sizes), "mae")
    return sizes, model, kind


def first_parameters(config: Config) -> Params | None:
    """Return the tables of positions of a transformer as the release lays them out, where that is asked for."""
    layout = "upstream" if config.match_release else "clean"
    return None if config.encoder == "convnext" else oblong_positions(config.transformer, layout)


# The page ------------------------------------------------------------------------------------------------------------


def page(run: Finished[Config, Summary]) -> Page:
    """Show how the error fell, and what the model completes."""
    summary, lines = run.summary, read_metrics(run.path)
    what = "3D ConvNeXt V2" if run.config.encoder == "convnext" else "transformer"
    caption = (
        "Mean squared error of hidden voxels, each patch standardised over its voxels and channels, and that of the "
        "best constant."
    )
    training = [*(Note(text, "warning") for text in summary.notes), *error_curves(lines, caption)]
    return Page(
        "ProFound pre-training",
        f"A masked autoencoder around a {what}, {summary.parameters:,} parameters, trained on "
        f"{summary.volumes['train']:,} cases without labels",
        pretrain_tiles(lines, summary.volumes, "cases", "mean squared error of hidden voxels"),
        [Section("Training", training), *_pictures(run.outputs, summary), _reading()],
    )


def _pictures(outputs: Path, summary: Summary) -> list[Section]:
    if not summary.errors:
        return []
    blocks: list[Any] = []
    for number in range(len(summary.errors)):
        for channel in summary.channels if number == 0 else summary.channels[:1]:
            caption = (
                f"Held-out case {number + 1}, {channel}, on the model's grid and in its unit: the input, what the "
                "encoder sees of it (hidden patches 0), and the input with hidden patches as predicted."
            )
            blocks.append(volume_figure(outputs, number, channel, caption, STYLE))
    rows = [(i + 1, e.error, e.variance, 1 - e.error / e.variance) for i, e in enumerate(summary.errors)]
    caption = "Hidden voxels of held-out cases. Variance is the error of the best constant; explained 1 - error / it."
    blocks.append(Table(("Case", "Error", "Variance", "Explained"), rows, caption))
    return [Section("What the model completes", blocks)]


def _reading() -> Section:
    text = [
        "The encoder sees the patches that are not hidden, of all sequences at once, and the decoder has to fill in "
        "the others. Patches are standardised one by one before they are compared, so that faint structure counts as "
        "much as strong contrast; predictions are shown with each patch's own mean and spread, which the model does "
        "not predict. What counts is whether the encoder helps afterwards: jaxmed profound adapt.",
        SOURCE,
    ]
    return Section("How to read this", [Text(text)])
