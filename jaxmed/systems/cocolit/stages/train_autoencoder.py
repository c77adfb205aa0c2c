"""CoCoLIT train-autoencoder: the KL autoencoder of MRI or of SUVR maps, against a discriminator."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.arrays.types import Params
from jaxmed.config import Positive, Size, checked, to_record
from jaxmed.data.augment import AugmentConfig
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.maps import write_map
from jaxmed.io.tables import resolve_paths
from jaxmed.models.autoencoder_kl import COCOLIT_AUTOENCODER, AutoencoderKlConfig, autoencoder
from jaxmed.models.patch_discriminator import COCOLIT_DISCRIMINATOR, PatchDiscriminatorConfig
from jaxmed.models.published import cocolit
from jaxmed.models.published.load import load_published
from jaxmed.recipes.adversarial_autoencoder import AutoencoderLossConfig, train_autoencoder
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, first_only
from jaxmed.recipes.training import TrainConfig, TrainFlags, whole
from jaxmed.report.figures import MapStyle, slice_maps
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.systems.cocolit.training import (
    COLUMNS,
    SOURCE,
    Modality,
    PairData,
    find_pairs,
    loss_figure,
    make_data,
    make_preprocess,
)
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import read_metrics
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder
from jaxmed.volume import Volume

UNITS = {"mri": "1", "suvr": "SUVR"}
AUGMENT = AugmentConfig(
    ("affine",), affine_probability=0.3, rotation=float(np.rad2deg(0.05)), scale=(0.95, 1.05), is_isotropic=False,
    translation=2 / 128, fill=None,
)  # fmt: skip
"""Rotations of .05 rad, scales of 5 %, shifts of 2 voxels of 128."""


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Training of an autoencoder; defaults are the released code's, but for what `match_release` says.

    Attributes:
        data: The pairs; all images of one modality are trained on.
        modality: Which of the two images: mri or suvr.
        size: Voxels of an input, multiples of what the autoencoder halves; scans are padded or cut about their middle.
        spacing: Voxel size in mm.
        mean: Of intensities, which is subtracted; the released one of the modality where none is given.
        std: By which they are divided, likewise.
        model: The autoencoder; its dtype is set by --dtype.
        discriminator: Its opponent.
        loss: What counts how much.
        augment: Variants of an image.
        weights: Autoencoder to start from, such as MAISI's; random where empty.
        train: The run.
    """

    data: PairData = PairData()
    modality: Modality = "mri"
    size: tuple[Size, ...] = (128, 152, 128)
    spacing: Positive = 1.5
    mean: float | None = None
    std: Positive | None = None
    model: AutoencoderKlConfig = COCOLIT_AUTOENCODER
    discriminator: PatchDiscriminatorConfig = COCOLIT_DISCRIMINATOR
    loss: AutoencoderLossConfig = AutoencoderLossConfig()
    augment: AugmentConfig = AUGMENT
    weights: Path | None = None
    train: TrainFlags = TrainConfig()

    def __post_init__(self) -> None:
        model, least = self.model, self.discriminator.least_size
        if (model.dimensions, model.channels, model.outputs) != (3, 1, 1) or self.discriminator.dimensions != 3:
            found = f"{model.dimensions} axes, {model.channels} and {model.outputs} channels"
            raise ValueError(f"model: expected volumes of one channel, found {found}")
        if len(self.size) != 3 or any(length % model.divisor or length < least for length in self.size):
            expected = f"three multiples of {model.divisor} that are {least} or more"
            raise ValueError(f"size: expected {expected}, found {self.size}")


def paper() -> Config:
    """20.9 M parameters on 128 x 152 x 128 voxels of 1.5 mm, 200 epochs in batches of 16: an accelerator."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=2e-4, end_lr=2e-5, weight_decay=0.0),
        LoopConfig(log_every=10, save_every=200, evaluate_every=100),
        LoaderConfig(batch_size=16, num_threads=4),
        MeshConfig(data=1),
        epochs=200,
        accumulation=16,
        dtype="bfloat16",
    )
    return Config(model=dataclasses.replace(COCOLIT_AUTOENCODER, remat=True), train=train)


def laptop() -> Config:
    """0.3 M parameters on 48 x 56 x 48 voxels of 4 mm, 1,000 steps of 2: your pairs, about an hour on a CPU."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=5e-4, end_lr=5e-5, weight_decay=0.0),
        LoopConfig(steps=1000, log_every=20, save_every=200, evaluate_every=200),
        LoaderConfig(batch_size=2),
        MeshConfig(data=1),
    )
    model = AutoencoderKlConfig(widths=(16, 32), blocks=(1, 1), groups=8)
    return Config(
        size=(48, 56, 48), spacing=4.0, model=model, discriminator=PatchDiscriminatorConfig(width=8), train=train
    )


def smoke() -> Config:
    """A tiny autoencoder at 24^3, in seconds: on your pairs, or on phantoms."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=3e-3, end_lr=3e-4, weight_decay=0.0),
        LoopConfig(steps=40, log_every=4, save_every=40),
        LoaderConfig(batch_size=2),
        MeshConfig(data=1),
    )
    model = AutoencoderKlConfig(widths=(8, 16), blocks=(1, 1), groups=4)
    return Config(
        PairData(synthetic=8), size=(24, 24, 24), spacing=8.0, model=model,
        discriminator=PatchDiscriminatorConfig(width=4, layers=1), train=train,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was trained.

    Attributes:
        images: Number of images trained on and held out.
        parameters: Number of the autoencoder's parameters.
        error: Mean absolute error of the reconstruction of the image shown, in its own unit.
        latent: Mean and standard deviation of its latent, and the share of entries beyond -1 and 1, at which the
            released sampler clips.
        notes: What a user should know.
    """

    images: dict[str, int]
    parameters: int
    error: float
    latent: dict[str, float]
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Read the table, train, export the autoencoder, show what becomes of one image."""
    clock = Clock()
    initial, origin, notes = read_start(config)
    column = COLUMNS[config.modality]
    table = find_pairs(config.data, folder, config.train.seed, (column,))
    preprocess = make_preprocess(config.modality, config.size, config.spacing, config.mean, config.std)
    data = make_data(table, {"image": (column, preprocess)})
    if not config.loss.perceptual:
        told = "Training without a perceptual term."
    else:
        told = "Training without the perceptual term: weights of its network cannot be given yet."
    log = begin(folder, notes, tensorboard=config.train.loop.tensorboard)
    images = {"train": len(data.training), "held out": 0 if data.held_out is None else len(data.held_out)}
    log.say(f"{images['train']:,} images of {config.modality} to train on, {images['held out']:,} held out. {told}")
    clock.lap("read")
    params = train_autoencoder(
        config.train, config.loss, config.model, config.discriminator, data, config.size, config.augment,
        folder=folder, log=log, start=initial,
    )  # fmt: skip
    params = whole(params, config.train)
    clock.lap("train, compilation included")
    record = {"family": cocolit.NAME, "kind": "autoencoder", "config": to_record(config.model)}
    record |= {"preprocess": to_record(preprocess), "modality": config.modality} | origin
    first_only(lambda: export_parameters(folder.outputs / "model", params, record), "network")
    place = resolve_paths(table, column)[shown_row(table.column("split"))]
    error, latent = show(config, params, preprocess, place, folder.outputs)
    clock.lap("show")
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    finish(folder, config, Summary(images, size, error, latent, notes), clock, page)


def read_start(config: Config) -> tuple[Params | None, dict[str, Any], tuple[str, ...]]:
    """Read an autoencoder to start from: parameters, what a record says of them, and notes.

    Raises:
        InputError: It is another network, or of other sizes.
    """
    if config.weights is None:
        return None, {}, ()
    published = load_published(config.weights)
    found = published.config
    if not isinstance(found, AutoencoderKlConfig):
        raise InputError(config.weights, "a KL autoencoder", f"a {published.report.kind}", "leave --weights out")
    found = dataclasses.replace(found, dtype=config.model.dtype, remat=config.model.remat)
    names = [f.name for f in dataclasses.fields(found) if getattr(found, f.name) != getattr(config.model, f.name)]
    if names:
        expected = f"an autoencoder with {names[0]} {getattr(config.model, names[0])}"
        raise InputError(config.weights, expected, f"{getattr(found, names[0])}", f"set --model.{names[0]}")
    return published.params, {"licence": published.report.licence}, published.report.lines


def shown_row(splits: list[str]) -> int:
    """Return the first record that was held out, or else the first."""
    return splits.index("validation") if "validation" in splits else 0


def show(
    config: Config, params: Params, preprocess: Preprocess, path: Path, outputs: Path
) -> tuple[float, dict[str, float]]:
    """Write an image and its reconstruction, in the unit of the file; return their distance, and tell of the latent."""
    model = autoencoder(dataclasses.replace(config.model, dtype=config.train.dtype))
    prepared = preprocess.prepare(path)
    found, latent, _ = jax.device_get(jax.jit(model.apply)(params, jnp.asarray(prepared.image[None])))
    (mean,), (std,) = preprocess.intensity.mean, preprocess.intensity.std
    images = {"image": prepared.image, "reconstruction": found[0]}
    own = {name: std * np.asarray(image[..., 0], np.float32) + mean for name, image in images.items()}
    affine = preprocess.input_grid(nifti.read(path).grid).affine
    if jax.process_index() == 0:
        for name, array in own.items():
            definition = f"{config.modality}, {name}, at the autoencoder's voxel size"
            write_map(
                outputs, name, Volume.make(array, affine), definition, UNITS[config.modality], {"path": str(path)}
            )
    numbers = {"mean": latent.mean(), "std": latent.std(), "beyond": np.mean(np.abs(latent) > 1)}
    error = float(np.mean(np.abs(own["image"] - own["reconstruction"])))
    return error, {name: float(value) for name, value in numbers.items()}


READING = (
    "The autoencoder is in outputs/model: that of the evaluation with the least error where images were held out. "
    "jaxmed cocolit encode takes two such runs, one of each modality.",
    "Blurred reconstructions are the common complaint: train longer, or look at the table, in which the mean absolute "
    "error should be the largest term without drowning the adversarial one.",
    SOURCE,
)


def page(run: Finished[Config, Summary]) -> Page:
    """Show the losses, what each term weighs, and one image with its reconstruction."""
    summary, lines, config = run.summary, read_metrics(run.path), run.config
    weights = {"reconstruction": 1.0, "divergence": config.loss.divergence}
    weights |= dict.fromkeys(("adversarial", "discriminator"), config.loss.adversarial)
    last = next(line for line in reversed(lines) if "loss" in line)
    rows = [(name, last[name], weight, weight * last[name]) for name, weight in weights.items()]
    losses = loss_figure(
        lines, {"mean absolute error": "reconstruction", "the same, held out": "evaluation/error"},
        "Mean absolute error of the reconstruction, in the network's unit; held out, of the mean latent.",
    )  # fmt: skip
    duel = loss_figure(
        lines, {"autoencoder": "adversarial", "discriminator": "discriminator"},
        "The adversarial losses: 1/4 each where the discriminator cannot tell images apart.",
    )  # fmt: skip
    volumes = {name.capitalize(): nifti.read(run.outputs / f"{name}.nii.gz") for name in ("image", "reconstruction")}
    style = MapStyle(UNITS[config.modality], colormap="gray" if config.modality == "mri" else "inferno")
    picture = slice_maps(
        {name: volume.array for name, volume in volumes.items()}, volumes["Image"].spacing,
        caption="An image that was not trained on (where any was held out), and its reconstruction.",
        styles=dict.fromkeys(volumes, style),
    )  # fmt: skip
    sections = [
        Section("Notes", [Note(text) for text in summary.notes]),
        Section("Training", [losses, duel, Table(
            ("term", "value", "weight", "in the loss"), rows, "The terms of the loss at the last line of the log."
        )]),
        Section("What becomes of an image", [picture]),
        Section("How to read this", [Text(READING)]),
    ]  # fmt: skip
    latent = summary.latent
    tiles = [
        ("Images", summary.images["train"], f"{summary.images['held out']} held out"),
        ("Parameters", f"{summary.parameters:,}", ""),
        ("Error", f"{summary.error:.3g}", "mean absolute, of the image shown, in its own unit"),
        ("Latent", f"{latent['std']:.2f}", f"deviation; {latent['beyond']:.0%} of entries beyond -1 and 1"),
    ]
    return Page("CoCoLIT autoencoder", f"A KL autoencoder of {config.modality}", tiles, sections)
