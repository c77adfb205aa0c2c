"""Train a KL autoencoder of volumes against a discriminator: from records to outputs/model, and the page of it.

A stage says what its images are and how they are prepared; all else is here. What is written is read again by
`models.published.load_published`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.arrays.types import Params
from jaxmed.config import to_record
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.maps import write_map
from jaxmed.models.autoencoder_kl import AutoencoderKlConfig, autoencoder
from jaxmed.models.patch_discriminator import PatchDiscriminatorConfig
from jaxmed.models.published.load import load_published
from jaxmed.models.squeezenet import LEAST
from jaxmed.objectives.perceptual import PerceptualConfig, make_slice_distance
from jaxmed.recipes.adversarial_autoencoder import (
    Augment,
    AutoencoderLossConfig,
    Perceptual,
    train_autoencoder,
)
from jaxmed.recipes.latent_tables import moments_of
from jaxmed.recipes.pair_tables import count_records, loss_figure
from jaxmed.recipes.paired_maps import one_range
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, first_only
from jaxmed.recipes.training import TrainConfig, TrainData, whole
from jaxmed.report.figures import MapStyle, slice_maps
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import read_metrics
from jaxmed.train.run_folder import RunFolder
from jaxmed.volume import Volume


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was trained.

    Attributes:
        images: Number of images trained on and held out.
        parameters: Number of the autoencoder's parameters.
        error: Mean absolute error of the reconstruction of the image shown, in its own unit.
        latent: Mean and standard deviation of its latent, and the share of entries beyond -1 and 1.
        notes: What a user should know.
    """

    images: dict[str, int]
    parameters: int
    error: float
    latent: dict[str, float]
    notes: tuple[str, ...]


class Parts(NamedTuple):
    """What is trained, and how.

    Attributes:
        model: The autoencoder.
        discriminator: Its opponent.
        loss: What counts how much.
        augment: One image to a variant of it.
        weights: Autoencoder to start from; random where None.
        perceptual: Weights of the network of the perceptual term, which is left out where None.
        slices: Which slices that term looks at.
        train: The run.
    """

    model: AutoencoderKlConfig
    discriminator: PatchDiscriminatorConfig
    loss: AutoencoderLossConfig
    augment: Augment
    weights: Path | None
    perceptual: Path | None
    slices: PerceptualConfig
    train: TrainConfig


class Images(NamedTuple):
    """What it is trained on.

    Attributes:
        data: The records; field "image".
        preprocess: How a file becomes such an image; travels with the weights.
        shown: The file whose reconstruction is shown.
        name: What the images are, for lines and titles: "mri".
        unit: Of their intensities.
    """

    data: TrainData
    preprocess: Preprocess
    shown: Path
    name: str
    unit: str


def require_sizes(model: AutoencoderKlConfig, discriminator: PatchDiscriminatorConfig, size: tuple[int, ...]) -> None:
    """Check that a configuration is of volumes of one channel that both networks can halve.

    Raises:
        ValueError: It is not; for `__post_init__` of a stage's configuration.
    """
    if (model.dimensions, model.channels, model.outputs) != (3, 1, 1) or discriminator.dimensions != 3:
        found = f"{model.dimensions} axes, {model.channels} and {model.outputs} channels"
        raise ValueError(f"model: expected volumes of one channel, found {found}")
    least = discriminator.least_size
    if len(size) != 3 or any(length % model.divisor or length < least for length in size):
        expected = f"three multiples of {model.divisor} that are {least} or more"
        raise ValueError(f"size: expected {expected}, found {size}")


class Start(NamedTuple):
    """Where training begins: parameters or None, what the record of the result says of them, notes, and the term."""

    params: Params | None
    origin: dict[str, Any]
    notes: tuple[str, ...]
    perceptual: Perceptual | None


def read_start(parts: Parts) -> Start:
    """Read what is given, before anything is written.

    Raises:
        InputError: It is another network, or of other sizes.
    """
    term = None
    if parts.perceptual is not None and parts.loss.perceptual:
        term = make_slice_distance(load_published(parts.perceptual), parts.slices, str(parts.perceptual))
    if parts.weights is None:
        return Start(None, {}, (), term)
    published = load_published(parts.weights)
    found, model = published.config, parts.model
    if not isinstance(found, AutoencoderKlConfig):
        raise InputError(parts.weights, "a KL autoencoder", f"a {published.report.kind}", "leave --weights out")
    found = dataclasses.replace(found, dtype=model.dtype, remat=model.remat)
    names = [f.name for f in dataclasses.fields(found) if getattr(found, f.name) != getattr(model, f.name)]
    if names:
        expected = f"an autoencoder with {names[0]} {getattr(model, names[0])}"
        raise InputError(parts.weights, expected, f"{getattr(found, names[0])}", f"set --model.{names[0]}")
    return Start(published.params, {"licence": published.report.licence}, published.report.lines, term)


def run_autoencoder(
    config: Any,
    parts: Parts,
    initial: Start,
    images: Images,
    record: Mapping[str, Any],
    folder: RunFolder,
    clock: Clock,
    page: Any,
) -> None:
    """Train, export the autoencoder to outputs/model, show what becomes of one image, and finish the run.

    Args:
        config: Of the stage, for its page.
        parts: What is trained, and how.
        initial: From `read_start`.
        images: What it is trained on.
        record: What record.json says besides: family, kind and others.
        folder: Of the run.
        clock: Gets the laps.
        page: Of the stage.

    Raises:
        InputError: Images are too small for the perceptual term.
    """
    train, preprocess = parts.train, images.preprocess
    if initial.perceptual is not None and min(preprocess.size) < LEAST:
        expected = f"{LEAST} voxels or more along each axis, for the perceptual term"
        raise InputError("size", expected, f"{preprocess.size}", "leave --perceptual out, or change --size")
    log = begin(folder, initial.notes, tensorboard=train.loop.tensorboard)
    counts = count_records(images.data)
    told = "with" if initial.perceptual is not None else "without"
    log.say(
        f"{counts['train']:,} images of {images.name} to train on, {counts['held out']:,} held out. "
        f"Training {told} a perceptual term."
    )
    clock.lap("read")
    params = train_autoencoder(
        train, parts.loss, parts.model, parts.discriminator, images.data, preprocess.size, parts.augment,
        folder=folder, log=log, start=initial.params, perceptual=initial.perceptual,
    )  # fmt: skip
    params = whole(params, train)
    clock.lap("train, compilation included")
    written = {**record, "config": to_record(parts.model), "preprocess": to_record(preprocess), **initial.origin}
    first_only(lambda: export_parameters(folder.outputs / "model", params, written), "network")
    error, latent = show(parts, params, images, folder.outputs)
    clock.lap("show")
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    finish(folder, config, Summary(counts, size, error, latent, initial.notes), clock, page)


def shown_row(splits: Sequence[str]) -> int:
    """Return the first record that was held out, or else the first."""
    return list(splits).index("validation") if "validation" in splits else 0


def show(parts: Parts, params: Params, images: Images, outputs: Path) -> tuple[float, dict[str, float]]:
    """Write an image and its reconstruction, in the unit of the file; return their distance, and tell of the latent."""
    preprocess, path = images.preprocess, images.shown
    model = autoencoder(dataclasses.replace(parts.model, dtype=parts.train.dtype))
    prepared = preprocess.prepare(path)
    found, latent, _ = jax.device_get(jax.jit(model.apply)(params, jnp.asarray(prepared.image[None])))
    (mean,), (std,) = preprocess.intensity.mean, preprocess.intensity.std
    both = {"image": prepared.image, "reconstruction": found[0]}
    own = {name: std * np.asarray(image[..., 0], np.float32) + mean for name, image in both.items()}
    affine = preprocess.input_grid(nifti.read(path).grid).affine
    if jax.process_index() == 0:
        for name, array in own.items():
            definition = f"{images.name}, {name}, at the autoencoder's voxel size"
            write_map(outputs, name, Volume.make(array, affine), definition, images.unit, {"path": str(path)})
    return float(np.mean(np.abs(own["image"] - own["reconstruction"]))), moments_of(np.asarray(latent, np.float32))


def autoencoder_page(
    run: Finished[Any, Summary],
    title: str,
    subtitle: str,
    loss: AutoencoderLossConfig,
    style: MapStyle,
    reading: Sequence[str],
) -> Page:
    """Show the losses, what each term weighs, and one image with its reconstruction."""
    summary, lines = run.summary, read_metrics(run.path)
    last = next(line for line in reversed(lines) if "loss" in line)
    weights = {"reconstruction": 1.0, "divergence": loss.divergence, "perceptual": loss.perceptual}
    weights |= dict.fromkeys(("adversarial", "discriminator"), loss.adversarial)
    rows = [(name, last[name], weight, weight * last[name]) for name, weight in weights.items() if name in last]
    losses = loss_figure(
        lines, {"mean absolute error": "reconstruction", "the same, held out": "evaluation/error"},
        "Mean absolute error of the reconstruction, in the network's unit; held out, of the mean latent.",
    )  # fmt: skip
    duel = loss_figure(
        lines, {"autoencoder": "adversarial", "discriminator": "discriminator"},
        "The adversarial losses: 1/4 each where the discriminator cannot tell images apart.",
    )  # fmt: skip
    volumes = {name.capitalize(): nifti.read(run.outputs / f"{name}.nii.gz") for name in ("image", "reconstruction")}
    arrays = {name: volume.array for name, volume in volumes.items()}
    picture = slice_maps(
        arrays, volumes["Image"].spacing, styles=one_range(arrays, dict.fromkeys(arrays, style)),
        caption="An image that was not trained on (where any was held out), and its reconstruction.",
    )  # fmt: skip
    table = Table(("term", "value", "weight", "in the loss"), rows, "The terms at the last line of the log.")
    sections = [
        Section("Notes", [Note(text) for text in summary.notes]),
        Section("Training", [losses, duel, table]),
        Section("What becomes of an image", [picture]),
        Section("How to read this", [Text(reading)]),
    ]
    latent = summary.latent
    tiles = [
        ("Images", summary.images["train"], f"{summary.images['held out']} held out"),
        ("Parameters", f"{summary.parameters:,}", ""),
        ("Error", f"{summary.error:.3g}", "mean absolute, of the image shown, in its own unit"),
        ("Latent", f"{latent['std']:.2f}", f"deviation; {latent['beyond']:.0%} of entries beyond -1 and 1"),
    ]
    return Page(title, subtitle, tiles, sections)
